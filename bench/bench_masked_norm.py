"""masked_norm: the norm of one weight under a batch of row and column masks, and its gradient.

The weights are those of the briefly trained networks of `bench.networks`, in the shapes of the paper: 512x512
(mnist-4c3f), 512x4096, convolutions 3x3 and 4x4 with stride 2 on 32x32x32 (cifar10-6c2f). Masks are random with the
density the case names. One call is forward and backward.

Variants: `ours`; `paper`, power iteration from a random start with gradients through the iterations, as many
steps as ours; `materialised`, one masked matrix a sample and torch.linalg.matrix_norm. The last takes a full
singular value decomposition a sample, so it does fewer samples, and is compared per sample; a convolution on 32x32x32
would be a 32768 x 32768 matrix, so it has cases of its own on 32x8x8, where ours runs too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import locallip_cuda
from bench import networks, paper_method
from bench.support import DEVICE, closeness, converged_norms, interleaved, measure

ITERATIONS = 4
CHECKED = {2: 64, 4: 4}  # samples whose norms are compared with converged ones, by dimensions of the weight
DENSE_BATCH = 256
CONV_BATCH = 256 if DEVICE.type == "cuda" else 32
SMALL_BATCH = 2
MATERIALISED_SAMPLES = {"dense 512x512": 16, "dense 512x4096": 4}
LAYERS = {
    "dense 512x512": ("mnist-4c3f", 11),
    "dense 512x4096": ("cifar10-6c2f", 13),
    "conv 3x3": ("cifar10-6c2f", 2),
    "conv 4x4s2": ("cifar10-6c2f", 4),
}
CASES = {
    **{
        f"{layer} density {density}": ("ours", "paper", "materialised")
        for layer in ("dense 512x512", "dense 512x4096")
        for density in (0.1, 0.5, 1.0)
    },
    **{
        f"{layer} 32x32x32 density {density}": ("ours", "paper")
        for layer in ("conv 3x3", "conv 4x4s2")
        for density in (0.1, 0.5, 1.0)
    },
    **{f"{layer} 32x8x8 density 0.5": ("ours", "paper", "materialised") for layer in ("conv 3x3", "conv 4x4s2")},
}


class Problem(NamedTuple):
    layer: nn.Conv2d | nn.Linear
    rows: Tensor
    columns: Tensor
    start: Tensor
    converged: Tensor


@lru_cache(maxsize=1)
def problem(case: str) -> Problem:
    name, density = case.split(" density ")
    network, index = LAYERS[" ".join(name.split(" ")[:2])]
    layer = networks.trained(network)[index].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = (DENSE_BATCH, layer.in_features)
    else:
        side = int(name.rsplit("x", 1)[1])
        shape = (SMALL_BATCH if side == 8 else CONV_BATCH, layer.in_channels, side, side)
    columns = torch.rand(shape, generator=generator).to(DEVICE) < float(density)
    with torch.no_grad():
        image = layer(columns.to(layer.weight.dtype))
    rows = torch.rand(image.shape, generator=generator).to(DEVICE) < float(density)
    start = torch.randn(shape, generator=generator).to(DEVICE)
    checked = min(CHECKED[layer.weight.dim()], shape[0])
    converged = converged_norms(layer, rows[:checked], columns[:checked], (checked, *shape[1:]))
    return Problem(layer, rows, columns, start, converged)


def matrix(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> Tensor:
    """The layer as a dense matrix, differentiable in its weight."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    eye = torch.eye(shape.numel(), device=layer.weight.device).view(-1, *shape)
    return nn.functional.conv2d(eye, layer.weight, None, layer.stride, layer.padding).flatten(1).t()


def norms(variant: str, p: Problem, samples: int) -> Tensor:
    rows, columns = p.rows[:samples], p.columns[:samples]
    if variant == "ours":
        conv = {} if isinstance(p.layer, nn.Linear) else {"stride": p.layer.stride, "padding": p.layer.padding}
        return locallip_cuda.masked_norm(p.layer.weight, rows, columns, iterations=ITERATIONS, **conv)
    if variant == "paper":
        return paper_method.masked_power_norm(p.layer, p.start[:samples], rows, columns, ITERATIONS)
    dense = matrix(p.layer, columns.shape[1:])
    masked = dense * rows.flatten(1).unsqueeze(2) * columns.flatten(1).unsqueeze(1)
    return torch.linalg.matrix_norm(masked, ord=2)


@pytest.mark.parametrize(("case", "repeat", "variant"), interleaved(CASES))
def test_masked_norm(benchmark: Any, case: str, repeat: int, variant: str) -> None:
    p = problem(case)
    samples = len(p.rows)
    if variant == "materialised":
        samples = MATERIALISED_SAMPLES.get(case.split(" density ")[0], samples)

    def call() -> Tensor:
        p.layer.weight.grad = None
        sigma = norms(variant, p, samples)
        sigma.sum().backward()
        return sigma

    sigma = call()
    checked = min(len(sigma), len(p.converged))
    facts = closeness(sigma[:checked], p.converged[:checked])
    if variant == "materialised":  # the reference must be what it says, or closeness means nothing
        assert abs(facts["closeness_min"] - 1) < 1e-3 and abs(facts["closeness_mean"] - 1) < 1e-3
    measure(benchmark, call, op="masked_norm", case=case, variant=variant, repeat=repeat, samples=samples, **facts)
