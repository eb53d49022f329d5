"""Training losses over :class:`locallip_cuda.bounds.LocalBounds`. Each is a scalar mean over the batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import LocalBounds
from .norms.masked_norm import masked_norm


def robust_cross_entropy(b: LocalBounds, y: Tensor) -> Tensor:
    """Cross entropy of the worst logits (BCP: Lee, Lee, Park, NeurIPS 2020). ``y``: (B,) int64 labels."""
    return F.cross_entropy(b.worst_logits(y), y)


def gloro(b: LocalBounds, y: Tensor) -> Tensor:
    """Cross entropy over the K clean logits and one more, the largest worst logit of a class other than ``y``.

    The added class stands for "not certified" (GloRo: Leino, Wang, Fredrikson, ICML 2021, arXiv:2102.08452).
    """
    rival = b.worst_logits(y).scatter(1, y.unsqueeze(1), -math.inf).amax(1, keepdim=True)
    return F.cross_entropy(torch.cat([b.logits, rival], 1), y)


def lipschitz_margin(b: LocalBounds, y: Tensor) -> Tensor:
    """Cross entropy with sqrt(2) * eps * Lipschitz added to every logit but ``y``'s.

    The Lipschitz bound is of the whole network, last layer included (LMT: Tsuzuku, Sato, Sugiyama, NeurIPS 2018,
    arXiv:1802.04034).
    """
    b.check_labels(y)
    columns = (b.upper > b.lower).detach()
    last = masked_norm(b.last_weight, None, columns)
    reach = math.sqrt(2) * b.radius * last
    others = F.one_hot(y, b.logits.shape[1]) == 0
    return F.cross_entropy(b.logits + reach.unsqueeze(1) * others, y)


def emma(b: LocalBounds, y: Tensor) -> Tensor:
    """Cross entropy with each logit but ``y``'s raised at most until it is level with that of ``y``.

    The raise is Lipschitz constant of the difference of the two logits times radius. The radius is the one at which
    they are level, between 0 and eps, and it is held constant in the gradient (EMMA: Hu, Zou, Wang, Leino, Fredrikson,
    NeurIPS 2023, arXiv:2301.12549). Here the constant is the local one, gain / eps, gain what ``b.worst_logits`` adds.
    The published code keeps the radius at 0.01 eps at least, and its recipes train with an eps that grows beyond the
    one certified, for CIFAR-10 to three times it.
    """
    logits, margins, gains = _rivals(b, y)
    share = (margins.detach() / gains.detach()).clamp(0, 1).nan_to_num(0)  # of eps; 0 / 0 at y itself
    return F.cross_entropy(logits + share * gains, y)


def crm(b: LocalBounds, y: Tensor, weight: float = 15.0, t: float = 5.0, r_0: float | None = None) -> Tensor:
    """Cross entropy of the clean logits minus ``weight`` times a soft minimum of the radii at which rivals catch up.

    A rival's radius is margin over Lipschitz constant of the difference of the two logits, the soft minimum
    -logsumexp(-t * radii) / t. It counts for samples that are classified correctly and whose least radius is below
    ``r_0``; others have 0 in its place, so that the value jumps at r_0 (CRM: Fazlyab, Entesari, Roy, Chellappa,
    NeurIPS 2023, arXiv:2310.00116, in the form of its published code). Here the constant is the local one, gain / eps,
    gain what ``b.worst_logits`` adds: a radius above eps certifies eps, one below it nothing, and a rival without gain
    has none. Without a ball it is the clean loss.

    Args:
        weight: lambda; the published scripts have 15 for CIFAR-10 (images in [-1, 1]), 30 for MNIST and 150 for Tiny
            ImageNet.
        t: sharpness of the soft minimum; theirs are 5, 5 and 12. It is one over a distance, as lambda is.
        r_0: by default 1.4 * b.eps; theirs are 0.2, 2.2 and 0.2, for certificates at 0.141, 1.58 and 0.141.
    """
    logits, margins, gains = _rivals(b, y)
    cap = 1.4 * b.eps if r_0 is None else r_0
    limited = (logits.argmax(1) == y).unsqueeze(1) & (gains > 0)
    far = torch.finfo(logits.dtype).max ** 0.5  # finite: a sum of no exponentials would have no gradient
    radii = torch.where(limited, margins * b.eps.unsqueeze(1) / torch.where(limited, gains, 1), far)
    soft = -torch.logsumexp(-t * radii, 1) / t
    return F.cross_entropy(logits, y) - weight * torch.where(radii.amin(1) < cap, soft, 0).mean()


def _rivals(b: LocalBounds, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K) logits, margins of logit y over each, and gains: what each can gain on logit y within eps."""
    worst = b.worst_logits(y)
    return b.logits, b.logits.gather(1, y.unsqueeze(1)) - b.logits, worst - b.logits


def sparsity(b: LocalBounds, threshold_weight: float = 0.1) -> Tensor:
    """How far bounds are from making units constant (Huang et al., NeurIPS 2021), summed over the layers.

    ReLU: mean(relu(ub)); clipped ReLU: that + threshold_weight * mean(relu(theta - lb)); clipped MaxMin:
    mean(relu(upper - lb_max)) + mean(relu(ub_min - lower)). The default weight is the published one.
    """
    return b.sparsity(threshold_weight)
