"""Certificates: whether, and how far around a sample, the prediction is constant, and what that statement is worth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bounds import local_bounds
from .norms import ESTIMATE_ITERATIONS, check_guarantee


class Certificate(NamedTuple):
    """Result of :func:`certify` for B samples.

    prediction: (B,) int64. certified: (B,) bool, margin > 0. margin: (B,) bound over the ball of the predicted logit
    minus the best other. lipschitz: (B,) bound of the map to the last layer's input. guarantee: "estimate" proves
    nothing.
    failure_probability: chance that the statement is wrong for a sample; 1 for an estimate.
    """

    prediction: Tensor
    certified: Tensor
    margin: Tensor
    lipschitz: Tensor
    guarantee: str
    failure_probability: float


@torch.no_grad()
def certify(
    model: nn.Sequential,
    x: Tensor,
    eps: float | Tensor,
    *,
    guarantee: str = "probabilistic",
    failure_probability: float = 1e-9,
) -> Certificate:
    """Certify the predictions of ``model`` on ``x`` (B, *input) against l2 perturbations up to ``eps``.

    ``eps`` is a number or (B,). Only ``guarantee="estimate"`` exists yet: it says what the bounds suggest and proves
    nothing, because the norms in it are Rayleigh quotients. Errors as :func:`locallip_cuda.local_bounds`.
    """
    check_guarantee(guarantee, failure_probability)
    b = local_bounds(model, x, eps, iterations=ESTIMATE_ITERATIONS, guarantee=guarantee)
    prediction = b.logits.argmax(1)
    margin = b.margin(prediction)
    return Certificate(prediction, margin > 0, margin, b.lipschitz, guarantee, 1.0)


def certified_radius(
    model: nn.Sequential,
    x: Tensor,
    *,
    max_eps: float,
    tolerance: float = 1e-3,
    guarantee: str = "probabilistic",
    failure_probability: float = 1e-9,
) -> Tensor:
    """(B,) the largest radius up to ``max_eps`` found by bisection at which :func:`certify` certifies each sample.

    Every radius returned was itself certified, under ``guarantee``; 0 where none was. Certificates need not be monotone
    in eps (the masks depend on it), so a larger one may exist. ``tolerance`` is absolute.
    """
    for name, value in (("max_eps", max_eps), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, want a finite number > 0")

    def certified(eps: Tensor) -> Tensor:
        return certify(model, x, eps, guarantee=guarantee, failure_probability=failure_probability).certified

    everywhere = certified(torch.tensor(float(max_eps)))
    high = x.new_full((x.shape[0],), float(max_eps))
    low = torch.where(everywhere, high, 0)
    width = float(max_eps)
    while width > tolerance:
        middle = (low + high) / 2
        holds = certified(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
        width /= 2
    return low
