"""Certificates: whether, and how far around a sample, the prediction is constant, and what that statement is worth."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bounds import local_bounds
from .norms.masked_norm import ESTIMATE_ITERATIONS, check_guarantee, stated_failure_probability
from .propagation.composition import check_window


class Certificate(NamedTuple):
    """Result of :func:`certify` for B samples.

    prediction: (B,) int64, of the network that the certificate speaks of; a proof's is in real arithmetic, and may
    differ from ``model(x).argmax(1)`` where rounding decides. certified: (B,) bool, margin > 0. margin: (B,) bound over
    the ball of the predicted logit minus the best other. lipschitz: (B,) bound of the map to the last layer's input.
    guarantee: what they are worth; "estimate" proves nothing. failure_probability: chance that the statement is wrong
    for a sample: 0 for a deterministic proof, 1 for an estimate. seed: the one given for repetition; it voids the
    probabilistic guarantee, and makes the failure probability 1. execution: "real", or the type in which ``model(x')``
    has the prediction too, for every x' of the type in the ball.
    """

    prediction: Tensor
    certified: Tensor
    margin: Tensor
    lipschitz: Tensor
    guarantee: str
    failure_probability: float
    seed: int | None = None
    execution: str = "real"


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    guarantee: str = "probabilistic",
    failure_probability: float = 1e-9,
    seed: int | None = None,
    window: float = 1,
    execution: str = "real",
) -> Certificate:
    """Certify the predictions of ``model`` on ``x`` (B, *input) against l2 perturbations up to ``eps``.

    ``eps`` is a number or (B,). A proved certificate speaks of the network in real arithmetic with its weights as they
    are stored: no input within ``eps`` of the sample has another class. It is wrong with at most
    ``failure_probability`` for a sample under guarantee "probabilistic", whose random vectors are fresh at every call
    (a ``seed`` repeats them, and voids it), and never under "deterministic"; "estimate" proves nothing. Memory grows
    with B, so certify many samples in batches. A ``window`` above 1 composes norms and certifies more. With
    ``execution`` "float64" or "float32" it speaks of the network as it runs in that type, too. Arguments, errors and
    dtypes as :func:`locallip_cuda.local_bounds`.

    A model has two outputs or more. To certify the sign of a single output w . h + b, give it the Linear with weight
    [-w, w] and bias [-b, b] as its last layer: class 1 is the positive sign, and the margin is twice |w . h + b|'s.
    """
    b = local_bounds(
        model,
        x,
        eps,
        iterations=ESTIMATE_ITERATIONS,
        guarantee=guarantee,
        failure_probability=failure_probability,
        seed=seed,
        window=window,
        execution=execution,
    )
    margin = b.margin()
    prediction = b.logits.argmax(1)
    stated = stated_failure_probability(guarantee, failure_probability, seed)
    return Certificate(prediction, margin > 0, margin, b.lipschitz, guarantee, stated, seed, execution)


def certified_radius(
    model: nn.Module,
    x: Tensor,
    *,
    max_eps: float,
    tolerance: float = 1e-3,
    guarantee: str = "probabilistic",
    failure_probability: float = 1e-9,
    window: float = 1,
    execution: str = "real",
) -> Tensor:
    """(B,) the largest radius up to ``max_eps`` found by bisection at which :func:`certify` certifies each sample.

    Every radius returned was itself certified, under ``guarantee``; 0 where none was. Certificates need not be monotone
    in eps (the masks depend on it), so a larger one may exist. ``tolerance`` is absolute; ``failure_probability`` is
    shared by all certificates tried. float64 for a proof, because a rounded radius was not certified. ``window`` and
    ``execution`` as for :func:`certify`.
    """
    for name, value in (("max_eps", max_eps), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name}: got {value!r}, want a finite number > 0")
    check_guarantee(guarantee, failure_probability)
    check_window(window)
    halvings = max(math.ceil(math.log2(max_eps / tolerance)), 0)

    def certified(samples: Tensor, eps: float | Tensor) -> Tensor:
        share = failure_probability / (halvings + 1)
        found = certify(
            model,
            samples,
            eps,
            guarantee=guarantee,
            failure_probability=share,
            window=window,
            execution=execution,
        )
        return found.certified

    everywhere = certified(x, float(max_eps))
    dtype = x.dtype if guarantee == "estimate" and x.is_floating_point() else torch.float64
    high = torch.full((len(x),), float(max_eps), dtype=dtype, device=x.device)
    low = torch.where(everywhere, high, 0)
    for _ in range(halvings):
        undecided = (low < high).nonzero()[:, 0]
        if not len(undecided):
            break
        middle = (low[undecided] + high[undecided]) / 2
        holds = certified(x[undecided], middle)
        low[undecided] = torch.where(holds, middle, low[undecided])
        high[undecided] = torch.where(holds, high[undecided], middle)
    return low
