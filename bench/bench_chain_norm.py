"""chain_norm: the norm of weights in a row, with a batch of masks before, between and behind them, and its gradient.

The weights are those of the briefly trained cifar10-6c2f of `bench.networks`; masks are random with the density the
case names. Variants: `ours`; `twin`, the op in plain PyTorch, which has no gradient; `product`, the norms of the
weights one by one, by `masked_norm`, which is what a chain is taken beside.

Counted are the operators without masks, 2 flops a multiplication: A and its adjoint once an iteration, A once more at
the end, and once for the gradient of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import locallip_cuda
from bench.bench_masked_norm import ABOVE, LEAST_CLOSENESS, layer_of
from bench.case import Case, Random, Setting, Variant, no_grad
from bench.converged import closeness, converged_norms_of, linear_part
from locallip_cuda import ops
from locallip_cuda.ops import reference

ITERATIONS = 6
DENSITY = 0.5
CHAINS = {
    "conv 3x3 32x32x32, conv 4x4s2": ("conv 3x3 32x32x32", "conv 4x4s2 32x32x32"),
    "conv 4x4s2 64x16x16, dense 512x4096": ("conv 4x4s2 64x16x16", "dense 512x4096"),
    "dense 512x4096, dense 10x512": ("dense 512x4096", "dense 10x512"),
}


def cases(setting: Setting) -> Iterator[Case]:
    for name in CHAINS:
        labels = ["ours, forward", "twin, forward", "ours", "product"]
        yield Case(
            "chain_norm", f"{name} density {DENSITY}", labels, partial(build, setting, name), "float32", ITERATIONS
        )


def fitted(setting: Setting, names: tuple[str, ...]) -> tuple[list[nn.Linear | nn.Conv2d], tuple[int, ...]]:
    """The layers, and the size of the first one's input; toys of them fit each other."""
    found = [layer_of(setting, name) for name in names]
    layers, shape = [layer for layer, _ in found], found[0][1]
    if setting.tiny:
        for i, layer in enumerate(layers):
            size = value_sizes(layers[:i], shape)[-1]
            if isinstance(layer, nn.Linear):
                layers[i] = nn.Linear(torch.Size(size).numel(), layer.out_features).to(setting.device)
            else:
                layers[i] = nn.Conv2d(size[0], 4, layer.kernel_size, layer.stride, layer.padding).to(setting.device)
    return layers, shape


def value_sizes(layers: list[nn.Linear | nn.Conv2d], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the input of every layer, flat in front of a dense one, and of the last one's output."""
    sizes, value = [], torch.zeros(1, *shape)
    for layer in layers:
        value = value.flatten(1) if isinstance(layer, nn.Linear) else value
        sizes.append(tuple(value.shape[1:]))
        value = linear_part(layer, value, layer.weight.detach().cpu())
    return [*sizes, tuple(value.shape[1:])]


def build(setting: Setting, name: str) -> dict[str, Variant]:
    layers, shape = fitted(setting, CHAINS[name])
    weights = [layer.weight for layer in layers]
    batch, random = setting.batch(32), Random(setting.device)
    sizes = value_sizes(layers, shape)
    masks = [random.uniform(batch, *size) < DENSITY for size in sizes]
    masks = [m.contiguous(memory_format=torch.channels_last) if m.dim() == 4 else m for m in masks]
    starts = [random.normal(1, *size) for size in sizes[:-1]]
    numbers: dict[str, list[int]] = {"stride": [], "padding": [], "dilation": []}
    for layer in layers:
        for key, own in numbers.items():
            own.extend(getattr(layer, key) if isinstance(layer, nn.Conv2d) else (1, 1))  # type: ignore[arg-type]
    given = (masks[1:-1], masks[-1], masks[0], starts[0], [batch, *shape], *numbers.values(), [1] * len(layers))
    few = min(batch, 4)

    def chained(value: Tensor) -> Tensor:
        for layer, mask in zip(layers, masks[1:], strict=True):
            value = linear_part(layer, value, layer.weight.detach().double())
            value = value if mask is masks[-1] else value.reshape(len(value), *mask.shape[1:]) * mask[:few]
        return value

    converged = converged_norms_of(chained, masks[-1][:few], masks[0][:few], (few, *shape), setting.device)
    ones = torch.ones(batch, device=setting.device)

    def ours() -> Tensor:
        return ops.chain_norm(weights, *given, ITERATIONS)[0]

    def twin() -> Tensor:
        return reference.chain_norm(weights, *given, ITERATIONS)[0]

    def product() -> Tensor:
        total = ones
        for layer, rows, columns, start in zip(layers, masks[1:], masks, starts, strict=False):
            conv = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}
            laid_out = rows.reshape(batch, *_out(layer, columns))
            more = {"iterations": ITERATIONS, "start": start, **conv}
            own = locallip_cuda.masked_norm(layer.weight, laid_out, columns, **more)
            total = total * own
        return total

    def with_gradient(norms: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            sigma = norms()
            return sigma.detach(), *torch.autograd.grad(sigma, weights, ones)

        return both

    def check(result: Any) -> tuple[dict[str, float], bool]:
        sigma = result if isinstance(result, Tensor) else result[0]
        facts = closeness(sigma[:few], converged)
        close = facts["closeness_max"] - 1 < ABOVE["float32"] and facts["closeness_min"] > LEAST_CLOSENESS
        return facts, close and bool(sigma.isfinite().all())

    applied = sum(
        2.0 * batch * torch.Size(_out(layer, columns)).numel() * layer.weight[0].numel()
        for layer, columns in zip(layers, masks, strict=False)
    )
    forward, both = (batch, (2 * ITERATIONS + 1) * applied), (batch, (2 * ITERATIONS + 2) * applied)
    return {
        "ours, forward": Variant(no_grad(ours), *forward, check=check),
        "twin, forward": Variant(no_grad(twin), *forward, check=check, capture=False),
        "ours": Variant(with_gradient(ours), *both, check=check),
        "product": Variant(with_gradient(product), *both),
    }


def _out(layer: nn.Linear | nn.Conv2d, columns: Tensor) -> tuple[int, ...]:
    return tuple(linear_part(layer, columns[:1].float().cpu(), layer.weight.detach().cpu()).shape[1:])


def test_chain_norm(turn: Callable[[], None]) -> None:
    turn()
