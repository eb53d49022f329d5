"""activation_pattern: bounds in; masks, post-activation box and sparsity terms out, and the gradient.

On 32x32x32 pre-activations, as behind the first convolutions of cifar10-6c2f. Variant `paper` is what the published
method computes at the same place, in plain PyTorch: box and ball intersected, masks by comparison, the box through the
activation, the sparsity terms of its TinyImageNet recipes. No norm is involved, so there is no materialised variant.
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
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU

BATCH = 256 if DEVICE.type == "cuda" else 32
SHAPE = (32, 32, 32)
CASES = {"clipped-relu 32x32x32": ("ours", "paper"), "clipped-maxmin 32x32x32": ("ours", "paper")}


class Problem(NamedTuple):
    activation: ClippedReLU | ClippedMaxMin
    clean: Tensor
    centre: Tensor
    half: Tensor
    row_norms: Tensor
    radius: Tensor


@lru_cache(maxsize=2)
def problem(case: str, layout: torch.memory_format) -> Problem:
    """Bounds of which about half of the units are constant; half of them come from the box, half from the ball."""
    generator = torch.Generator().manual_seed(0)
    activation = ClippedReLU(SHAPE, 1.0) if "relu" in case else ClippedMaxMin((16, 32, 32), 0.5, -0.5)
    clean = torch.randn(BATCH, *SHAPE, generator=generator)
    centre = clean + 0.02 * torch.randn(clean.shape, generator=generator)
    half = 0.6 * torch.rand(clean.shape, generator=generator)
    row_norms = 0.5 + torch.rand(SHAPE[0], generator=generator)
    radius = torch.full((BATCH,), 0.3)
    tensors = [clean, centre, half, row_norms, radius]
    on_device = [(t.to(memory_format=layout) if t.dim() == 4 else t).to(DEVICE).requires_grad_() for t in tensors]
    return Problem(activation.to(DEVICE), *on_device)


def published(p: Problem) -> list[Tensor]:
    activation = p.activation
    lower, upper = paper_method.box_and_ball(p.clean, p.centre, p.half, p.row_norms, p.radius)
    if isinstance(activation, ClippedReLU):
        mask = paper_method.row_mask(activation, lower, upper)
        slack = [upper.relu().mean(), (activation.threshold - lower).relu().mean()]
        lower, upper = activation(lower), activation(upper)
    else:
        lower, upper = activation(lower), activation(upper)
        mask = paper_method.column_mask(activation, lower, upper)
        slack = [
            (activation.upper - lower.chunk(2, 1)[0]).relu().mean(),
            (upper.chunk(2, 1)[1] - activation.lower).relu().mean(),
        ]
    assert mask is not None
    return [activation(p.clean), (upper + lower) / 2, (upper - lower) / 2, *slack]


def ours(p: Problem, values: Tensor, squared: Tensor) -> list[Tensor]:
    if isinstance(p.activation, ClippedReLU):
        kind, first, second = "clipped_relu", p.activation.threshold, None
    else:
        kind, first, second = "clipped_maxmin", p.activation.upper, p.activation.lower
    outputs = ops.activation_pattern(values, p.half, squared, p.radius, kind, first, second)
    return [outputs[0], outputs[1], outputs[4]]  # values, half-width, sparsity terms


@pytest.mark.parametrize(("case", "repeat", "variant"), interleaved(CASES))
def test_activation_pattern(benchmark: Any, case: str, repeat: int, variant: str) -> None:
    # Each in the layout its convolutions hand over.
    p = problem(case, torch.channels_last if variant == "ours" else torch.contiguous_format)
    # In the forward pass clean values and box centres come out of one convolution, stacked.
    values = torch.cat([p.clean, p.centre]).detach().requires_grad_()
    squared = p.row_norms.detach().square().view(1, -1, 1, 1).expand(1, *SHAPE)
    squared = squared.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [values, p.half, squared, p.radius] if variant == "ours" else list(p[1:])

    def call() -> None:
        outputs = ours(p, values, squared) if variant == "ours" else published(p)
        # A gradient of ones into every output: the backward pass of a sum, without the sum's own cost.
        torch.autograd.grad(outputs, [*leaves, *p.activation.parameters()], [torch.ones_like(o) for o in outputs])

    measure(benchmark, call, op="activation_pattern", case=case, variant=variant, repeat=repeat, samples=BATCH)
