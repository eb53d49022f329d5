"""What a network is to the bounds: its modules as affine operators, activations and reshapes, named by their paths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize

SUPPORTED = (
    "Linear, Conv2d (padding_mode='zeros'), AvgPool2d, Normalize, Flatten, Identity, Dropout in eval mode, ReLU, "
    "ClippedReLU, MaxMin, ClippedMaxMin, LeakyReLU, ELU (alpha <= 1), Tanh, Sigmoid, Softplus (threshold >= 20), "
    "and Sequential of these"
)


class UnsupportedModuleError(TypeError):
    """A module in the network has no bound here; the message names its path and what is supported."""


DENSE = ([1, 1], [0, 0], [1, 1], 1)


@dataclass
class Operator:
    """One affine layer as the linear operator it is: ``conv`` is (stride, padding, dilation, groups), None if dense.

    ``relative_error`` bounds that of every weight, and so of the operator norm: the weights of AvgPool2d and Normalize
    are computed ones, non-negative or on a diagonal.
    """

    weight: Tensor
    bias: Tensor | None
    conv: tuple[list[int], list[int], list[int], int] | None
    relative_error: float = 0.0

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return self.conv or DENSE

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.affine(x, weight, bias, *self.geometry)

    def check_input(self, path: str, x: Tensor) -> None:
        """Raise ValueError naming the module at ``path`` where ``x`` does not fit it."""
        if self.weight.dtype != x.dtype or self.weight.device != x.device:
            raise ValueError(
                f"x: got {x.dtype} on {x.device}, want {self.weight.dtype} on {self.weight.device} as model.{path}"
            )
        if self.conv is None:
            wanted, fits = f"(B, {self.weight.shape[1]})", x.dim() == 2 and x.shape[1] == self.weight.shape[1]
        else:
            channels = self.weight.shape[1] * self.conv[3]
            wanted, fits = f"(B, {channels}, H, W)", x.dim() == 4 and x.shape[1] == channels
        if not fits:
            got = ", ".join(map(str, x.shape[1:]))
            raise ValueError(f"x: model.{path} gets shape (B, {got}), want {wanted}")

    def squared_row_norms(
        self, column_mask: Tensor | None, input_shape: Sequence[int], output: Tensor, *, exact: bool
    ) -> Tensor:
        """``||W_i * column_mask||^2`` of every row i of ``output``: (B or 1, *output).

        Not ``exact`` is the paper's: all columns, and for a convolution the whole kernel, at the padded border too.
        """
        squared = self.weight.square()
        if not exact and self.conv is not None:
            return squared.flatten(1).sum(1).view(1, -1, 1, 1).expand(1, *output.shape[1:])
        if not exact or column_mask is None:
            return self(squared.new_ones(1, *input_shape), squared)
        return self(column_mask.to(squared.dtype), squared)

    def norm(
        self,
        row_mask: Tensor | None,
        col_mask: Tensor | None,
        input_shape: Sequence[int],
        start: Tensor | None,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.masked_norm(self.weight, row_mask, col_mask, start, list(input_shape), *self.geometry, iterations)


@dataclass
class Activation:
    """An activation; ``kind`` is the op's name for it, "" for a monotone elementwise one applied by ``module``."""

    kind: str
    module: nn.Module
    first: Tensor | None = None
    second: Tensor | None = None


IDENTITY = Activation("identity", nn.Identity())
Step = Operator | Activation | nn.Flatten

# the modules that :func:`step` makes an Operator of
OPERATORS = (nn.Linear, nn.Conv2d, nn.AvgPool2d, Normalize)


def leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module._modules.items():  # named_children() would leave out a module's second place
            yield from leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _conv_arguments(path: str, module: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    if module.padding_mode != "zeros":
        raise UnsupportedModuleError(f"model.{path}: Conv2d with padding_mode={module.padding_mode!r}, want 'zeros'")
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise UnsupportedModuleError(f"model.{path}: Conv2d with an uneven 'same' padding, want a symmetric one")
        padding = tuple(r // 2 for r in reach) if padding == "same" else (0, 0)
    return list(module.stride), list(padding), list(module.dilation), module.groups


def _relative_error(like: Tensor) -> float:
    return 4 * torch.finfo(like.dtype).eps


def _average_pool(path: str, module: nn.AvgPool2d, like: Tensor) -> Operator:
    if module.ceil_mode or not module.count_include_pad:
        raise UnsupportedModuleError(f"model.{path}: AvgPool2d, want ceil_mode=False and count_include_pad=True")

    def pair(value: int | tuple[int, int]) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    kernel, channels = pair(module.kernel_size), like.shape[1]
    share = 1 / (module.divisor_override or math.prod(kernel))
    stride = pair(module.stride if module.stride is not None else module.kernel_size)
    weight = like.new_full((channels, 1, *kernel), share)
    return Operator(weight, None, (stride, pair(module.padding), [1, 1], channels), _relative_error(like))


def _normalize(module: Normalize, like: Tensor) -> Operator:
    scale = 1 / module.std.to(like)
    bias = -module.mean.to(like) * scale
    if like.dim() == 2:
        return Operator(
            torch.diag(scale.expand(like.shape[1])), bias.expand(like.shape[1]), None, _relative_error(like)
        )
    scale, bias = scale.expand(like.shape[1]), bias.expand(like.shape[1])
    conv = ([1, 1], [0, 0], [1, 1], like.shape[1])
    return Operator(scale.view(-1, 1, 1, 1), bias, conv, _relative_error(like))


def step(path: str, module: nn.Module, like: Tensor) -> Step | None:
    """What ``module`` does to the bounds of an input shaped as ``like``; None where it does nothing."""
    match module:
        case nn.Linear():
            return Operator(module.weight, module.bias, None)
        case nn.Conv2d():
            return Operator(module.weight, module.bias, _conv_arguments(path, module))
        case nn.AvgPool2d():
            return _average_pool(path, module, like)
        case Normalize():
            return _normalize(module, like)
        case nn.Flatten() if module.start_dim == 1 and module.end_dim == -1:
            return module
        case nn.Identity():
            return None
        case nn.Dropout() | nn.Dropout2d() if not module.training:
            return None
        case nn.ReLU():
            return Activation("relu", module)
        case ClippedReLU():
            return Activation("clipped_relu", module, module.threshold)
        case MaxMin():
            return Activation("maxmin", module)
        case ClippedMaxMin():
            return Activation("clipped_maxmin", module, module.upper, module.lower)
        case nn.LeakyReLU() if 0 <= module.negative_slope <= 1:
            return Activation("", module)
        case nn.ELU() if 0 < module.alpha <= 1:
            return Activation("", module)
        case nn.Tanh() | nn.Sigmoid():
            return Activation("", module)
        case nn.Softplus() if module.threshold >= 20:  # below, torch's jumps down at the threshold
            return Activation("", module)
    hint = " in training mode" if isinstance(module, (nn.Dropout, nn.Dropout2d)) else ""
    raise UnsupportedModuleError(f"model.{path}: {module}{hint} has no bound, want one of {SUPPORTED}")
