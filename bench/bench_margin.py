"""margin: the most every logit can gain on the label's within ball and box, and the gradient.

Variants: `ours`; `paper`, the published translation loop for the label's K pairs; `paper-all-pairs`, the same loop for
all K x K pairs as published (left out for K=200, where one of its many tensors takes gigabytes). No norm is involved,
so there is no materialised variant. `excess` says how far above the maximum (from 200 bisections in float64) a result
lies, relative to it: every variant is an upper bound.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import paper_method
from bench.support import DEVICE, interleaved, measure
from locallip_cuda import ops
from locallip_cuda.ops import reference

ROUNDS = 10  # of the translation loop, as in the paper's MNIST recipe
SIZES = {"K=10 h=512": (256, 10, 512), "K=200 h=256": (256 if DEVICE.type == "cuda" else 64, 200, 256)}
CASES = {"K=10 h=512": ("ours", "paper", "paper-all-pairs"), "K=200 h=256": ("ours", "paper")}


class Problem(NamedTuple):
    features: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    weight: Tensor
    labels: Tensor
    maximum: Tensor


@lru_cache(maxsize=1)
def problem(case: str) -> Problem:
    """Features of a clipped ReLU layer, a third of them constant, with a radius at which ball and box both bind."""
    batch, classes, width = SIZES[case]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, width, generator=generator)
    reach = 0.5 * torch.rand(batch, width, generator=generator)
    features, lower, upper = (t.clamp(0, 1) for t in (z, z - reach, z + reach))
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    radius = 0.5 + torch.rand(batch, generator=generator) * 2
    labels = torch.randint(classes, (batch,), generator=generator)
    doubles = [t.double() for t in (features, lower, upper, radius, weight)]
    maximum = reference.margin(*doubles, labels)
    tensors = [t.to(DEVICE).requires_grad_() for t in (features, lower, upper, radius, weight)]
    return Problem(*tensors, labels.to(DEVICE), maximum.to(DEVICE))


def gains(variant: str, p: Problem) -> Tensor:
    if variant == "ours":
        return ops.margin(*p[:6])
    low, high = (p.lower - p.features).clamp(max=0), (p.upper - p.features).clamp(min=0)
    if variant == "paper":
        difference = p.weight - p.weight[p.labels].unsqueeze(1)
        gain = paper_method.translation_loop(difference, p.radius.view(-1, 1), low[:, None], high[:, None], ROUNDS)
        return gain.scatter(1, p.labels.unsqueeze(1), 0)
    difference = p.weight.unsqueeze(0) - p.weight.unsqueeze(1)
    radius = p.radius.view(-1, 1, 1)
    gain = paper_method.translation_loop(difference[None], radius, low[:, None, None], high[:, None, None], ROUNDS)
    return gain[torch.arange(len(p.labels), device=DEVICE), p.labels].scatter(1, p.labels.unsqueeze(1), 0)


@pytest.mark.parametrize(("case", "repeat", "variant"), interleaved(CASES))
def test_margin(benchmark: Any, case: str, repeat: int, variant: str) -> None:
    p = problem(case)

    def call() -> Tensor:
        gain = gains(variant, p)
        torch.autograd.grad(gain, list(p[:5]), torch.ones_like(gain))
        return gain

    excess = ((call().detach().double() - p.maximum) / p.maximum.clamp(min=1e-6)).amax().item()
    measure(
        benchmark, call, op="margin", case=case, variant=variant, repeat=repeat, samples=len(p.labels), excess=excess
    )
