"""Networks that are layers in a row, layer by layer: what an audit covers. Nothing but modules and weights is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import ClippedMaxMin, ClippedReLU, MaxMin

ACTIVATIONS = (nn.ReLU, ClippedReLU, MaxMin, ClippedMaxMin)
COVERED = (
    "an audit covers float32 nn.Sequential networks of Conv2d (zero padding, one group) and Linear, each but the last, "
    "a Linear, followed by ReLU, ClippedReLU, MaxMin or ClippedMaxMin, and Flatten"
)


@dataclass(frozen=True, eq=False)
class Step:
    """An affine map and the activation behind it.

    path: the map's module in the network.   activation: None behind the last map.
    input_shape, output_shape: of one sample, (C, H, W) or (features,).
    """

    path: str
    linear: nn.Conv2d | nn.Linear
    activation: nn.Module | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def steps(model: nn.Module, input_shape: Sequence[int]) -> list[Step]:
    """The steps of ``model`` on samples of ``input_shape``. ValueError by path for what an audit does not cover."""
    found: list[Step] = []
    shape = tuple(input_shape)
    pending: tuple[str, nn.Conv2d | nn.Linear, tuple[int, ...]] | None = None
    for path, module in _modules("", model):
        if type(module) is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise _uncovered(path, "a Flatten of some dimensions")
            if pending is not None:
                raise _uncovered(path, "a Flatten in front of an activation")
            shape = (math.prod(shape),)
        elif type(module) is nn.Conv2d or type(module) is nn.Linear:
            if pending is not None:
                raise _uncovered(path, "a map right behind another")
            pending = (path, module, shape)
            shape = _output_shape(path, module, shape)
        elif type(module) in ACTIVATIONS:
            if pending is None:
                raise _uncovered(path, "an activation that follows no map")
            found.append(Step(pending[0], pending[1], module, pending[2], shape))
            pending = None
        else:
            raise _uncovered(path, f"a {type(module).__name__}")
    if pending is None or not isinstance(pending[1], nn.Linear):
        raise _uncovered("", "no Linear at its end")
    found.append(Step(pending[0], pending[1], None, pending[2], shape))
    return found


def _modules(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that run, in the order in which they do."""
    hooks = [own for name, own in vars(module).items() if name.startswith("_forward") and own]
    if hooks or "forward" in vars(module):
        raise _uncovered(path, f"a {type(module).__name__} with hooks or a forward of its own")
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise _uncovered(path, f"a {name} of {tensor.dtype}, or with NaN or infinite entries")
    if type(module) is nn.Sequential:
        for name, child in module._modules.items():  # named_children leaves out a module's second place
            assert child is not None
            yield from _modules(f"{path}.{name}" if path else name, child)
    else:
        yield path, module


def _output_shape(path: str, module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        if shape != (module.in_features,):
            raise _uncovered(path, f"a Linear of {module.in_features} features on a sample of shape {shape}")
        return (module.out_features,)
    if len(shape) != 3 or shape[0] != module.in_channels:
        raise _uncovered(path, f"a Conv2d of {module.in_channels} channels on a sample of shape {shape}")
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise _uncovered(path, "a Conv2d with groups, or padded by its surroundings or by a name")
    sizes = zip(shape[1:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    return (module.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))


def _uncovered(path: str, what: str) -> ValueError:
    return ValueError(f"module {path!r}: got {what}; {COVERED}" if path else f"model: got {what}; {COVERED}")
