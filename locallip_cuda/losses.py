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


def sparsity(b: LocalBounds, threshold_weight: float = 0.1) -> Tensor:
    """How far bounds are from making units constant (Huang et al., NeurIPS 2021), summed over the layers.

    ReLU: mean(relu(ub)); clipped ReLU: that + threshold_weight * mean(relu(theta - lb)); clipped MaxMin:
    mean(relu(upper - lb_max)) + mean(relu(ub_min - lower)). The default weight is the published one.
    """
    return b.sparsity(threshold_weight)
