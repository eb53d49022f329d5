"""What a network is to the bounds: its modules as affine operators, activations and reshapes, named by their paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from .. import ops
from ..nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize
from ..shapes import several

SUPPORTED = (
    "Linear, Conv2d (padding_mode='zeros'), AvgPool2d, Normalize, Flatten, Identity, Dropout in eval mode, ReLU, "
    "ClippedReLU, MaxMin, ClippedMaxMin, LeakyReLU, ELU (alpha <= 1), Tanh, Sigmoid, Softplus (threshold >= 20), "
    "and Sequential of these"
)


class UnsupportedModuleError(TypeError):
    """A module in the network has no bound here; the message names its path and what is supported."""


def at(path: str) -> str:
    """How messages name the module at ``path``."""
    return f"model.{path}" if path else "model"


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

    def snapshot(self, dtype: torch.dtype | None = None) -> Operator:
        """The operator as it is now, without gradients, in ``dtype`` where one is given."""
        weight = self.weight.detach().to(dtype or self.weight.dtype, copy=True)
        bias = None if self.bias is None else self.bias.detach().to(weight.dtype, copy=True)
        return Operator(weight, bias, self.conv, self.relative_error)

    def check_input(self, path: str, x: Tensor) -> None:
        """Raise ValueError naming the module at ``path`` where ``x`` does not fit it."""
        if self.weight.dtype != x.dtype or self.weight.device != x.device:
            raise ValueError(
                f"x: got {x.dtype} on {x.device}, want {self.weight.dtype} on {self.weight.device} as {at(path)}"
            )
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            raise ValueError(f"{at(path)}: got a bias in {self.bias.dtype}, want its weight's, {self.weight.dtype}")
        if self.conv is None:
            wanted, fits = f"(B, {self.weight.shape[1]})", x.dim() == 2 and x.shape[1] == self.weight.shape[1]
        else:
            channels = self.weight.shape[1] * self.conv[3]
            wanted, fits = f"(B, {channels}, H, W)", x.dim() == 4 and x.shape[1] == channels
        if not fits:
            got = ", ".join(map(str, x.shape[1:]))
            raise ValueError(f"x: {at(path)} gets shape (B, {got}), want {wanted}")

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

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of ``z``, which stays as it is where the module works in place."""
        value: Tensor = self.module(z.clone() if getattr(self.module, "inplace", False) else z)
        return value


IDENTITY = Activation("identity", nn.Identity())
Step = Operator | Activation | nn.Flatten


def _convolution(path: str, module: nn.Conv2d, like: Tensor) -> Operator:
    if module.padding_mode != "zeros":
        raise UnsupportedModuleError(f"{at(path)}: Conv2d with padding_mode={module.padding_mode!r}, want 'zeros'")
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(several(module.dilation, 2), module.weight.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise UnsupportedModuleError(f"{at(path)}: Conv2d with an uneven 'same' padding, want a symmetric one")
        padding = tuple(r // 2 for r in reach) if padding == "same" else (0, 0)
    conv = (several(module.stride, 2), several(padding, 2), several(module.dilation, 2), module.groups)
    return Operator(module.weight, module.bias, conv)


def _relative_error(like: Tensor) -> float:
    return 4 * torch.finfo(like.dtype).eps


def _average_pool(path: str, module: nn.AvgPool2d, like: Tensor) -> Operator:
    if module.ceil_mode or not module.count_include_pad:
        raise UnsupportedModuleError(f"{at(path)}: AvgPool2d, want ceil_mode=False and count_include_pad=True")
    kernel, channels = several(module.kernel_size, 2), like.shape[1]
    share = 1 / (module.divisor_override or math.prod(kernel))
    stride = several(module.stride or module.kernel_size, 2)
    weight = like.new_full((channels, 1, *kernel), share)
    return Operator(weight, None, (stride, several(module.padding, 2), [1, 1], channels), _relative_error(like))


def _normalize(path: str, module: Normalize, like: Tensor) -> Operator:
    scale = 1 / module.std.to(like)
    bias = -module.mean.to(like) * scale
    if like.dim() == 2:
        return Operator(
            torch.diag(scale.expand(like.shape[1])), bias.expand(like.shape[1]), None, _relative_error(like)
        )
    scale, bias = scale.expand(like.shape[1]), bias.expand(like.shape[1])
    conv = ([1, 1], [0, 0], [1, 1], like.shape[1])
    return Operator(scale.view(-1, 1, 1, 1), bias, conv, _relative_error(like))


def _activation(kind: str, *thresholds: str) -> Callable[[str, Any, Tensor], Activation]:
    return lambda path, module, like: Activation(kind, module, *(getattr(module, name) for name in thresholds))


def _only_where(
    holds: Callable[[Any], bool], wanted: str, build: Callable[[str, Any, Tensor], Step | None]
) -> Callable[[str, Any, Tensor], Step | None]:
    """``build``, or an error that says what is ``wanted`` where the module's settings have no bound."""

    def checked(path: str, module: Any, like: Tensor) -> Step | None:
        if not holds(module):
            raise UnsupportedModuleError(f"{at(path)}: {module} has no bound, want {wanted}")
        return build(path, module, like)

    return checked


def _nothing(path: str, module: nn.Module, like: Tensor) -> None:
    return None


_in_eval_mode = _only_where(lambda module: not module.training, "eval mode: it is in training mode", _nothing)

# What each kind of module does to the bounds of an input shaped as the last argument; None where it does nothing.
KINDS: dict[type[nn.Module], Callable[[str, Any, Tensor], Step | None]] = {
    nn.Linear: lambda path, module, like: Operator(module.weight, module.bias, None),
    nn.Conv2d: _convolution,
    nn.AvgPool2d: _average_pool,
    Normalize: _normalize,
    nn.Flatten: _only_where(
        lambda module: (module.start_dim, module.end_dim) == (1, -1),
        "start_dim=1 and end_dim=-1",
        lambda path, module, like: module,
    ),
    nn.Identity: _nothing,
    nn.Dropout: _in_eval_mode,
    nn.Dropout2d: _in_eval_mode,
    nn.ReLU: _activation("relu"),
    ClippedReLU: _activation("clipped_relu", "threshold"),
    MaxMin: _activation("maxmin"),
    ClippedMaxMin: _activation("clipped_maxmin", "upper", "lower"),
    nn.LeakyReLU: _only_where(lambda module: 0 <= module.negative_slope <= 1, "slopes in [0, 1]", _activation("")),
    nn.ELU: _only_where(lambda module: 0 < module.alpha <= 1, "0 < alpha <= 1", _activation("")),
    nn.Tanh: _activation(""),
    nn.Sigmoid: _activation(""),
    # below, torch's jumps down at the threshold
    nn.Softplus: _only_where(lambda module: module.threshold >= 20, "threshold >= 20", _activation("")),
}

# those of them that are affine layers, with an operator norm
OPERATORS = (nn.Linear, nn.Conv2d, nn.AvgPool2d, Normalize)

# What a call of a module looks up on its class, as torch and this package define it, for every kind.
_CALL = (
    "__call__",
    "_wrapped_call_impl",
    "_compiled_call_impl",
    "_call_impl",
    "__getattr__",
    "__getattribute__",
    "forward",
)
_RUNS: dict[type[nn.Module], dict[str, Any]] = {
    kind: {
        name: getattr(kind, name)
        for name in (*_CALL, *{nn.Conv2d: ("_conv_forward",), nn.Sequential: ("__iter__",)}.get(kind, ()))
    }
    for kind in (*KINDS, nn.Sequential)
}


@dataclass(frozen=True)
class Leaf:
    """A module of the network that has a bound: where it stands, and as which of the ``KINDS`` it runs."""

    path: str
    module: nn.Module
    kind: type[nn.Module]

    def step(self, like: Tensor) -> Step | None:
        """What it does to the bounds of an input shaped as ``like``; None where it does nothing."""
        return KINDS[self.kind](self.path, self.module, like)


def leaves(model: nn.Module) -> list[Leaf]:
    """What calling ``model`` runs, in that order; a module used twice is there twice.

    UnsupportedModuleError, by path, for a module without a bound, and wherever a call may run something else than what
    the bound is of: a ``forward`` that is overridden, or set on the instance, or a hook.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedModuleError(
            "model: torch has global forward hooks, which may change what a module computes; want none"
        )
    return list(_leaves(model, ""))


def network(model: nn.Module) -> list[Leaf]:
    """The :func:`leaves` of a network that has bounds: a Sequential that ends in Linear. UnsupportedModuleError."""
    if not isinstance(model, nn.Sequential):
        raise UnsupportedModuleError(f"model: got {type(model).__name__}, want a Sequential of {SUPPORTED}")
    modules = leaves(model)
    if not modules or modules[-1].kind is not nn.Linear:
        end = f"{at(modules[-1].path)}: {modules[-1].module}" if modules else "nothing"
        raise UnsupportedModuleError(f"model: ends in {end}, want a Linear at its end")
    return modules


def _leaves(module: nn.Module, path: str) -> Iterator[Leaf]:
    kind = _kind(module, path)
    if kind is not nn.Sequential:
        yield Leaf(path, module, kind)
        return
    for name, child in module._modules.items():  # named_children() would leave out a module's second place
        below = f"{path}.{name}" if path else name
        if child is None:
            raise UnsupportedModuleError(f"{at(below)}: got None, want a module")
        yield from _leaves(child, below)


def clean_pass(modules: Sequence[Leaf], x: Tensor) -> Iterator[tuple[Step | None, Tensor, Tensor]]:
    """What each of ``modules`` does, the clean value that it gets, and the one that it makes of it."""
    for leaf in modules:
        step, value = leaf.step(x), x
        if isinstance(step, Operator):
            step.check_input(leaf.path, x)
            x = step(x, step.weight, step.bias)
        elif step is not None:
            x = step(x)
        yield step, value, x


def _compiled(module: nn.Module, name: str) -> bool:
    """Whether its attribute ``name`` is what ``module.compile()`` sets, and compiles the module's own call."""
    own = module.__dict__[name]
    call = getattr(own, "_torchdynamo_orig_callable", None)
    return name == "_compiled_call_impl" and (own is None or call == module._call_impl)


def _kind(module: nn.Module, path: str) -> type[nn.Module]:
    """As which of the ``KINDS``, or as Sequential, ``module`` runs: its own class, or one whose call it inherits."""
    own = type(module)
    kind = next((cls for cls in own.__mro__ if cls in _RUNS), None)
    if kind is None:
        what = own.__name__ if module._modules else str(module)
        raise UnsupportedModuleError(f"{at(path)}: {what} has no bound, want one of {SUPPORTED}")
    for name, runs in _RUNS[kind].items():
        if name in module.__dict__ and not _compiled(module, name):
            what = f"has a {name!r} of its own, set on the instance"
        elif getattr(own, name) is not runs:
            what = f"overrides {name!r} of {kind.__name__}"
        else:
            continue
        raise UnsupportedModuleError(
            f"{at(path)}: {own.__name__} {what}, so that it may compute another function, and has no bound; "
            f"want {kind.__name__} itself or a subclass that leaves {name!r} alone"
        )
    for hooks in ("forward_pre", "forward", "backward_pre", "backward"):
        if getattr(module, f"_{hooks}_hooks"):
            raise UnsupportedModuleError(
                f"{at(path)}: {own.__name__} has {hooks.replace('_', ' ')} hooks, which may change what it computes, "
                "and no bound; want none. In place of the older spectral_norm and weight_norm of torch.nn.utils take "
                "torch.nn.utils.parametrizations; after pruning, torch.nn.utils.prune.remove"
            )
    return kind
