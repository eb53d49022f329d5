"""masked_norm: the norm of one weight under a batch of row and column masks, and its gradient.

The weights are those of the briefly trained networks of `bench.networks`, in the shapes of the paper: dense layers by
outputs and inputs, convolutions by kernel and input. Masks are random with the density the case names.

Variants: `ours`, from one start vector for all samples; `streaming`, ours kept from its kernels that stay on a GPU's
chip; `paper`, power iteration from a random start for each sample with gradients through the iterations, as many steps
as ours; `paper compiled`, that under torch.compile; `materialised`, one masked matrix a sample and
torch.linalg.matrix_norm. The last takes a full singular value decomposition a sample, so it does fewer samples, and is
compared per sample; a convolution on 32x32x32 would be a 32768 x 32768 matrix, so it has cases of its own on 32x8x8,
where ours runs too.

Counted is the operator without masks, 2 flops a multiplication of the kernel with a value (padding included): A and its
adjoint once an iteration, A once more at the end, and once for the gradient of the weight. Bytes forward: weight, masks
(one byte a unit) and start vector read; norms and singular vectors written. Backward: weight, singular vectors and
norms' gradients read, weight's gradient written.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import locallip_cuda
from bench import networks, paper_method
from bench.case import Case, Random, Setting, Variant, no_grad
from bench.converged import closeness, converged_norms
from locallip_cuda.experiments import models

ITERATIONS = 4
STREAMING = "LOCALLIP_STREAMING"  # set to 1, ours leaves its resident kernels
# How far an estimate may lie above the converged norm: rounding, and for TF32 the 10 bits of its products.
ABOVE = {"float32": 1e-4, "tf32": 5e-3}
LEAST_CLOSENESS = 0.5  # of any one norm

# network, index of the layer in it, size of the input
LAYERS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "dense 512x512": ("mnist-4c3f", 11, (512,)),
    "dense 512x4096": ("cifar10-6c2f", 13, (4096,)),
    "dense 10x512": ("cifar10-6c2f", 15, (512,)),
    "conv 3x3 3x32x32": ("cifar10-6c2f", 0, (3, 32, 32)),
    "conv 3x3 32x32x32": ("cifar10-6c2f", 2, (32, 32, 32)),
    "conv 4x4s2 32x32x32": ("cifar10-6c2f", 4, (32, 32, 32)),
    "conv 3x3 64x16x16": ("cifar10-6c2f", 8, (64, 16, 16)),
    "conv 4x4s2 64x16x16": ("cifar10-6c2f", 10, (64, 16, 16)),
    "conv 3x3 32x8x8": ("cifar10-6c2f", 2, (32, 8, 8)),
    "conv 4x4s2 32x8x8": ("cifar10-6c2f", 4, (32, 8, 8)),
}
MATERIALISED_SAMPLES = {
    "dense 512x512": 16,
    "dense 512x4096": 4,
    "dense 10x512": 256,
    "conv 3x3 32x8x8": 2,
    "conv 4x4s2 32x8x8": 2,
}
DENSITIES = (0.5, 0.1, 1.0)
COMPILED = (("conv 3x3 32x32x32", 0.5), ("dense 512x512", 0.1), ("dense 512x4096", 0.1))
LAUNCHED = (
    ("conv 3x3 32x32x32", 0.5, "float32"),
    ("conv 3x3 32x32x32", 0.5, "tf32"),
    ("conv 4x4s2 32x32x32", 0.5, "float32"),
    ("dense 512x512", 0.1, "float32"),
    ("dense 512x512", 1.0, "float32"),
    ("dense 512x4096", 0.1, "float32"),
)


def rows(setting: Setting) -> Iterator[tuple[str, float, str]]:
    """Layer, density and precision; what the targets are about first, for a run can be cut short."""
    targets = ("conv 3x3 32x32x32", "dense 512x512")
    yield from ((layer, density, "float32") for layer in targets for density in DENSITIES)
    if setting.gpu:
        yield from ((layer, 0.5, "tf32") for layer in targets)
        for layer in ("conv 3x3 3x32x32", "conv 3x3 64x16x16", "conv 4x4s2 64x16x16"):
            yield from ((layer, 0.5, precision) for precision in ("float32", "tf32"))
        yield "conv 4x4s2 32x32x32", 0.5, "tf32"
        yield "dense 10x512", 0.5, "float32"
    for layer in ("conv 4x4s2 32x32x32", "dense 512x4096"):
        yield from ((layer, density, "float32") for density in DENSITIES)
    if setting.cpu:
        yield from ((layer, 0.5, "float32") for layer in ("conv 3x3 32x8x8", "conv 4x4s2 32x8x8"))


def cases(setting: Setting) -> Iterator[Case]:
    for layer, density, precision in rows(setting):
        labels = ["ours", "paper"]
        if setting.gpu:
            labels = ["ours, forward", "streaming, forward", "ours", "streaming", "paper"]
            labels += ["paper compiled"] * (precision == "float32" and (layer, density) in COMPILED)
        labels += ["materialised"] * (precision == "float32" and layer in MATERIALISED_SAMPLES)
        make = partial(build, setting, layer, density, precision)
        launch = (layer, density, precision) in LAUNCHED
        yield Case("masked_norm", f"{layer} density {density}", labels, make, precision, ITERATIONS, launch)


def layer_of(setting: Setting, name: str) -> tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]:
    """The layer, and the size of its input."""
    network, index, shape = LAYERS[name]
    if not setting.tiny:
        return copy.deepcopy(networks.trained(network)[index]).to(setting.device), shape
    torch.manual_seed(0)
    layer = models.build(network)[index]
    if isinstance(layer, nn.Linear):
        inputs = layer.in_features // 32
        return nn.Linear(inputs, max(layer.out_features // 32, 10)).to(setting.device), (inputs,)
    channels = max(layer.in_channels // 8, 3)
    small = nn.Conv2d(channels, layer.out_channels // 8, layer.kernel_size, layer.stride, layer.padding)
    return small.to(setting.device), (channels, *(side // 4 for side in shape[1:]))


def build(setting: Setting, name: str, density: float, precision: str) -> dict[str, Variant]:
    layer, shape = layer_of(setting, name)
    weight, dense = layer.weight, isinstance(layer, nn.Linear)
    batch = 2 if name.endswith("32x8x8") else setting.batch(256 if dense else 32)
    random = Random(setting.device)
    columns = random.uniform(batch, *shape) < density
    with torch.no_grad():
        rows = random.uniform(batch, *layer(columns[:1].to(weight.dtype)).shape[1:]) < density
    if not dense:
        rows, columns = (t.contiguous(memory_format=torch.channels_last) for t in (rows, columns))
    start, shared = random.normal(batch, *shape), random.normal(1, *shape)
    few = min(batch, 64 if dense else 4)
    converged = converged_norms(layer, rows[:few], columns[:few], (few, *shape))
    ones = torch.ones(batch, device=setting.device)
    convolution = {} if dense else {"stride": layer.stride, "padding": layer.padding}

    def ours() -> Tensor:
        return locallip_cuda.masked_norm(weight, rows, columns, iterations=ITERATIONS, start=shared, **convolution)

    def paper() -> Tensor:
        return paper_method.masked_power_norm(layer, start, rows, columns, ITERATIONS)

    materialised_samples = min(MATERIALISED_SAMPLES.get(name, 0), batch)

    def materialised() -> Tensor:
        few_rows, few_columns = (t[:materialised_samples].flatten(1) for t in (rows, columns))
        return torch.linalg.matrix_norm(matrix(layer, shape) * few_rows.unsqueeze(2) * few_columns.unsqueeze(1), ord=2)

    def with_gradient(norms: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            sigma = norms()
            return sigma.detach(), torch.autograd.grad(sigma, weight, ones[: len(sigma)])[0]

        return both

    def norms_of(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return (result if isinstance(result, Tensor) else result[0]).detach()

    def quality(result: Any) -> tuple[dict[str, float], None]:
        sigma = norms_of(result)[:few]
        return closeness(sigma, converged[: len(sigma)]), None

    def check(result: Any) -> tuple[dict[str, float], bool]:
        facts, _ = quality(result)
        close = facts["closeness_max"] - 1 < ABOVE[precision] and facts["closeness_min"] > LEAST_CLOSENESS
        return facts, close and bool(norms_of(result).isfinite().all())

    def exact(result: Any) -> tuple[dict[str, float], bool]:
        facts, _ = quality(result)  # the yardstick must be what it says, or closeness means nothing
        return facts, facts["closeness_max"] - 1 < 1e-3 and 1 - facts["closeness_min"] < 1e-3

    applied = 2.0 * batch * rows[0].numel() * weight[0].numel()
    units = batch * (rows[0].numel() + columns[0].numel())
    forward_bytes = 4 * weight.numel() + units + 4 * shared.numel() + 4 * (batch + units)
    both_bytes = forward_bytes + 8 * weight.numel() + 4 * (batch + units)
    forward = (batch, (2 * ITERATIONS + 1) * applied, forward_bytes)
    both = (batch, (2 * ITERATIONS + 2) * applied, both_bytes)
    return {
        "ours, forward": Variant(no_grad(ours), *forward, check),
        "streaming, forward": Variant(streaming(no_grad(ours)), *forward, check),
        "ours": Variant(with_gradient(ours), *both, check),
        "streaming": Variant(streaming(with_gradient(ours)), *both, check),
        "paper": Variant(with_gradient(paper), *both, quality),
        "paper compiled": Variant(with_gradient(setting.compile(paper)), *both, quality),
        "materialised": Variant(with_gradient(materialised), materialised_samples, check=exact, capture=False),
    }


def matrix(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> Tensor:
    """The layer as a dense matrix, differentiable in its weight. shape: of the input."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    size = torch.Size(shape).numel()
    eye = torch.eye(size, device=layer.weight.device).view(size, *shape)
    return nn.functional.conv2d(eye, layer.weight, None, layer.stride, layer.padding).flatten(1).t()


def streaming(call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        os.environ[STREAMING] = "1"
        try:
            return call()
        finally:
            del os.environ[STREAMING]

    return forced


def test_masked_norm(turn: Callable[[], None]) -> None:
    turn()
