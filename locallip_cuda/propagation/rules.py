"""What each function does to a value: the table, by function of torch or class of module, of what they are.

A rule gets a :class:`Site`, which says where it stands, and the function's arguments; in place of the value that the
function is of, the first one, stands None, and the module in the rule of a class. It returns an :class:`Affine` map, an
:class:`Activation`, or a function of which no more than its constant is known, :class:`Lipschitz`; ValueError says what
the arguments would have to be. :func:`rule` registers one::

    @ll.rule(MyScale)
    def _(at, module):
        return ll.rules.Affine(ll.rules.Scaling(module.scale, at.input_sizes))

:func:`locallip_cuda.testing.check_rule` tries it. Registered rules come before what a module's ``forward`` calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..nn import clipped_maxmin, clipped_relu, maxmin
from ..norms.linear import (
    Adjoint,
    Convolution,
    Dense,
    Identity,
    LinearMap,
    Rearrangement,
    Reshape,
    Scaling,
    added,
    composed,
    on_device,
)
from ..shapes import output_size, several

__all__ = [
    "Activation",
    "Adjoint",
    "Affine",
    "Convolution",
    "Dense",
    "Identity",
    "LinearMap",
    "Lipschitz",
    "MaxPool",
    "Rearrangement",
    "Reshape",
    "Scaling",
    "Site",
    "added",
    "composed",
    "rule",
]


@dataclass
class Site:
    """Where a function stands.

    input_sizes, output_sizes: of one sample of its value, and of its result, without the batch.
    like: an empty tensor of the dtype, and on the device, that maps are wanted in.
    proof: whether computed entries have to be right but for ``ROUNDINGS``, which denormal numbers are not.
    """

    input_sizes: list[int]
    output_sizes: list[int]
    like: Tensor
    proof: bool = False


@dataclass
class Affine:
    """``linear`` x + ``bias``; the bias (1, *output) or what broadcasts to it.

    bias_size: where the bias is a sum in which terms may cancel, the sum of their sizes.
    """

    linear: LinearMap
    bias: Tensor | None = None
    bias_size: Tensor | None = None


@dataclass
class Activation:
    """A function that rises, or falls and then rises, in every number that it takes.

    function: of a batch.   lipschitz: its constant in the l2 norm.
    kind: the name by which the ops know it, with ``first`` and ``second``, its thresholds; "" for another.
    valley: where a function of every number by itself turns from falling to rising; None where it rises everywhere.
    exact: whether ``function`` does not round.   unproved: why there is no proof of it, if there is none.
    slopes: of a function of every number by itself, its least and its largest slope, at most ``lipschitz`` in size:
        what norms are composed through. None for others, and where they are not known.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float = 1.0
    valley: float | None = None
    kind: str = ""
    first: Tensor | None = None
    second: Tensor | None = None
    exact: bool = False
    unproved: str = ""
    slopes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.slopes is not None and not -self.lipschitz <= self.slopes[0] <= self.slopes[1] <= self.lipschitz:
            raise ValueError(f"slopes: got {self.slopes}, want them within {self.lipschitz} of 0, the least one first")

    def centre_and_half(self) -> tuple[float, float]:
        """Of the slopes: the size of their middle, and how far it is from both, rounded up."""
        if self.slopes is None:
            raise ValueError("slopes: got None, want them")
        low, high = self.slopes
        halves = abs(high + low) / 2, (high - low) / 2
        return halves if low in (0, high) else (up_to(halves[0]), up_to(halves[1]))

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value between ``lower`` and ``upper``, but for rounding."""
        low, high = self.function(lower), self.function(upper)
        if self.valley is None:
            return low, high
        bottom = torch.minimum(torch.maximum(torch.full_like(lower, self.valley), lower), upper)
        return self.function(bottom), torch.maximum(low, high)

    def rows(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Which of the inputs between ``lower`` and ``upper`` can still change the outputs; None for all.

        Of an activation that the ops know they tell it themselves.
        """
        return None

    @property
    def drops_rows(self) -> bool:
        """Whether inputs, of a function of every number by itself, can cease to change the outputs."""
        return self.kind in ("relu", "clipped_relu") or type(self).rows is not Activation.rows


@dataclass
class Lipschitz(Activation):
    """A function of which only its constant in the l2 norm is known, ``lipschitz``: a block of another library, say.
    Its box is the ball around the clean value.

    error: for proofs, what float64 may put any output off by; without one there is none.
    """

    error: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error is None:
            self.unproved = self.unproved or "its rule does not say what rounding does to it"


IDENTITY = Activation(lambda x: x, kind="identity", exact=True, slopes=(1.0, 1.0))


Rule = Callable[..., Affine | Activation]
AnyRule = TypeVar("AnyRule", bound=Rule)
RULES: dict[Callable[..., Any], Rule] = {}


def rule(*of: Callable[..., Any]) -> Callable[[AnyRule], AnyRule]:
    """Register the decorated rule for functions, or for classes of modules, of which each is known by its own
    ``forward``: a subclass that overrides it is what its own ``forward`` calls. TypeError for anything else.
    """
    for each in of:
        if not callable(each):
            raise TypeError(f"of: got {each!r}, want functions or classes of modules")

    def registered(build: AnyRule) -> AnyRule:
        RULES.update(dict.fromkeys(of, build))
        return build

    return registered


def module_classes() -> list[type[nn.Module]]:
    """Those that have a rule."""
    return [key for key in RULES if isinstance(key, type) and issubclass(key, nn.Module)]


# At least how many the entries of maps come from that are computed here.
ROUNDINGS = 8


# ---- weights ----


def _check_computed(at: Site, factor: Tensor, *of: Tensor) -> None:
    """That a product of ``of``, or a quotient, neither overflowed nor came near a denormal number; of a proof."""
    if not at.proof:
        return
    there = torch.ones_like(factor, dtype=torch.bool)
    for each in of:
        there = there & (each != 0)
    if bool((there & ~((factor.abs() >= 2.0**-960) & (factor.abs() <= 2.0**960))).any()):
        raise ValueError("a factor outside [2^-960, 2^960], want numbers that are not so far apart")


def _check_weight(at: Site, weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dtype != at.like.dtype:
        raise ValueError(f"a weight in {getattr(weight, 'dtype', type(weight).__name__)}, want {at.like.dtype}")


@rule(F.linear)
def _linear(at: Site, value: Any, weight: Tensor, bias: Tensor | None = None) -> Affine:
    _check_weight(at, weight)
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        raise ValueError("a weight or bias of other dimensions, want (m, n) and (m,)")
    if len(at.input_sizes) == 1:
        return Affine(Dense(weight), bias)
    # along the last dimension of several: a convolution with a kernel of one, over all the others
    *places, features = at.input_sizes
    before = Rearrangement(lambda x: x.flatten(1, -2).transpose(1, 2), at.input_sizes, at.like, "features last")
    conv = Convolution(weight.unsqueeze(2), [features, math.prod(places)], [1], [0], [1], 1)
    back = ("features back", *at.output_sizes)
    after = Rearrangement(
        lambda x: x.transpose(1, 2).reshape(len(x), *at.output_sizes), conv.output_sizes, at.like, back
    )
    return Affine(composed(composed(before, conv), after), bias)


def _by_channel(bias: Tensor | None, dimensions: int) -> Tensor | None:
    return None if bias is None else bias.view(1, -1, *[1] * dimensions)


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(
    at: Site,
    value: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Affine:
    _check_weight(at, weight)
    count = weight.dim() - 2
    steps, dilations = several(stride, count), several(dilation, count)
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(r % 2 for r in reach):
            raise ValueError("an uneven 'same' padding, want a symmetric one")
        padding = [r // 2 for r in reach]
    conv = Convolution(weight, at.input_sizes, steps, several(padding, count), dilations, groups)
    return Affine(conv, _by_channel(bias, count))


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _transposed(
    at: Site,
    value: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Affine:
    _check_weight(at, weight)
    count = weight.dim() - 2
    numbers = (several(stride, count), several(padding, count), several(dilation, count))
    conv = Convolution(weight, at.output_sizes, *numbers, groups)
    if conv.output_sizes != at.input_sizes:
        raise ValueError(f"output_padding={output_padding!r} beyond the stride, want less")
    return Affine(Adjoint(conv), _by_channel(bias, count))


@rule(F.batch_norm)
def _batch_norm(
    at: Site,
    value: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine:
    if training or running_mean is None or running_var is None:
        raise ValueError("batch statistics, want eval mode and running ones")
    scale = (running_var + eps).rsqrt()
    of = [scale] if weight is None else [scale, weight]
    scale = scale if weight is None else scale * weight
    _check_computed(at, scale, *of)
    shift = -running_mean * scale
    size = shift.abs() if bias is None else shift.abs() + bias.abs()
    shift = shift if bias is None else shift + bias
    rest = len(at.input_sizes) - 1
    factor = scale.view(1, -1, *[1] * rest)
    return Affine(Scaling(factor, at.input_sizes, ROUNDINGS), _by_channel(shift, rest), _by_channel(size, rest))


# ---- averages ----


def _average(
    at: Site, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], divisor: int | None = None
) -> Affine:
    channels = at.input_sizes[0]
    weight = at.like.new_full((channels, 1, *kernel), 1 / (divisor or math.prod(kernel)))
    return Affine(Convolution(weight, at.input_sizes, stride, padding, [1] * len(kernel), channels, ROUNDINGS))


@rule(torch.avg_pool1d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def _average_pool(
    at: Site,
    value: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Affine:
    count = len(at.input_sizes) - 1
    padded = several(padding, count)
    if ceil_mode or (any(padded) and not count_include_pad):
        raise ValueError("averages of different numbers of places, want ceil_mode=False and count_include_pad=True")
    kernel = several(kernel_size, count)
    return _average(at, kernel, several(stride or kernel, count), padded, divisor_override)


@rule(F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def _adaptive_average_pool(at: Site, value: Any, output_size: Any) -> Affine:
    inner, outer = at.input_sizes[1:], at.output_sizes[1:]
    if any(n % m for n, m in zip(inner, outer, strict=True)):
        raise ValueError(f"output_size={tuple(outer)} of {tuple(inner)}, want sizes that divide")
    kernel = [n // m for n, m in zip(inner, outer, strict=True)]
    return _average(at, kernel, kernel, [0] * len(kernel))


@rule(Tensor.mean, torch.mean)
def _mean(
    at: Site, value: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None
) -> Affine:
    dim = dim if axis is None else axis
    if dim is None or dtype is not None:
        raise ValueError("a mean over the batch, or in another dtype, want dim=")
    count = len(at.input_sizes)
    dims = sorted(d % (count + 1) for d in ([dim] if isinstance(dim, int) else dim))
    if not dims or dims[0] == 0:
        raise ValueError(f"a mean over dim={dim}, which holds the batch, want others")
    rest = [d for d in range(1, count + 1) if d not in dims]
    kept, averaged = ([at.input_sizes[d - 1] for d in some] for some in (rest, dims))
    order = [0, *rest, *dims]
    before = Rearrangement(
        lambda x: x.permute(order).reshape(len(x), math.prod(kept), math.prod(averaged)),
        at.input_sizes,
        at.like,
        ("averaged last", len(rest), *order),
    )
    length = [math.prod(averaged)]
    pool = _average(Site(before.output_sizes, [], at.like), length, length, [0]).linear
    after = Reshape(pool.output_sizes, at.output_sizes, at.like)
    return Affine(composed(composed(before, pool), after))


# ---- constants ----


def _constant(at: Site, other: Any) -> Tensor:
    """A number or a tensor that is the same for every sample, as (1, *) or a tensor that broadcasts to one sample."""
    if not isinstance(other, (int, float, Tensor)) or isinstance(other, bool):
        raise ValueError(f"a constant of type {type(other).__name__}, want a number or a tensor")
    if isinstance(other, Tensor) and not other.is_floating_point() and other.is_complex():
        raise ValueError(f"a constant in {other.dtype}, want real numbers")
    if isinstance(other, Tensor):
        constant = other.to(at.like)
    else:  # filled in on the device, in all its digits
        constant = torch.full((), other, dtype=at.like.dtype, device=at.like.device)
    if constant.dim() > len(at.input_sizes) and constant.shape[0] != 1:
        raise ValueError(f"a constant of shape {tuple(constant.shape)}, want one that is the same for every sample")
    return constant


def _scaled(at: Site, factor: Tensor, roundings: int = 0) -> LinearMap:
    if at.input_sizes != at.output_sizes:
        raise ValueError(f"a constant that makes {tuple(at.output_sizes)} of {tuple(at.input_sizes)}, want the same")
    return Scaling(factor, at.input_sizes, roundings)


@rule(Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply, torch.multiply)
def _times(at: Site, value: Any, other: Any) -> Affine:
    return Affine(_scaled(at, _constant(at, other)))


@rule(Tensor.div, torch.div, Tensor.__truediv__, torch.true_divide, Tensor.divide, torch.divide)
def _divided(at: Site, value: Any, other: Any, *, rounding_mode: str | None = None) -> Affine:
    if rounding_mode is not None:
        raise ValueError(f"rounding_mode={rounding_mode!r}, want None")
    factor = 1 / _constant(at, other)
    _check_computed(at, factor)
    return Affine(_scaled(at, factor, ROUNDINGS))


@rule(Tensor.neg, torch.neg, Tensor.__neg__, Tensor.negative, torch.negative)
def _negative(at: Site, value: Any) -> Affine:
    return Affine(_scaled(at, -torch.ones_like(at.like.new_empty(1))))


@rule(Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__)
def _plus(at: Site, value: Any, other: Any, *, alpha: float = 1) -> Affine:
    if at.input_sizes != at.output_sizes:
        raise ValueError(f"a constant that makes {tuple(at.output_sizes)} of {tuple(at.input_sizes)}, want the same")
    return Affine(Identity(at.input_sizes, at.like), alpha * _constant(at, other))


@rule(Tensor.sub, torch.sub, Tensor.__sub__, Tensor.subtract, torch.subtract)
def _minus(at: Site, value: Any, other: Any, *, alpha: float = 1) -> Affine:
    return _plus(at, value, other, alpha=-alpha)


@rule(Tensor.__rsub__, torch.rsub)
def _from(at: Site, value: Any, other: Any) -> Affine:
    return Affine(_negative(at, value).linear, _constant(at, other))


# ---- rearrangements ----


@rule(
    *(Tensor.flatten, torch.flatten, Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten),
    *(Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.view_as, Tensor.reshape_as),
)
def _reshape(at: Site, value: Any, *sizes: Any, **more: Any) -> Affine:
    if math.prod(at.input_sizes) != math.prod(at.output_sizes):
        raise ValueError(f"one that makes {tuple(at.output_sizes)} of {tuple(at.input_sizes)}, want each sample whole")
    return Affine(Reshape(at.input_sizes, at.output_sizes, at.like))


@rule(Tensor.contiguous, Tensor.clone, torch.clone)
def _same(at: Site, value: Any, **layout: Any) -> Affine:
    return Affine(Identity(at.input_sizes, at.like))


@rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout(at: Site, value: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Affine:
    if training:
        raise ValueError("training mode, want eval mode")
    return _same(at, value)


def rearranged(at: Site, function: Callable[[Tensor], Tensor], *key: Any) -> Affine:
    """``key``: a function and its arguments, by which the same one is known again; nothing for none."""
    known = (key[0], repr(key[1:])) if key else None
    return Affine(Rearrangement(function, at.input_sizes, at.like, known))


def _rearranged(function: Callable[..., Any]) -> None:
    """A rule for a function whose results choose from the inputs, whatever its other arguments are."""

    def build(at: Site, value: Any, *args: Any, **kwargs: Any) -> Affine:
        def moved(x: Tensor) -> Tensor:
            own = tree_map(lambda each: each.to(x.device) if isinstance(each, Tensor) else each, (args, kwargs))
            result: Tensor = function(x, *own[0], **own[1])
            return result

        indices = any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs)))
        if indices:
            return rearranged(at, moved)
        return rearranged(at, lambda x: function(x, *args, **kwargs), function, args, kwargs)

    rule(function)(build)


for _function in (
    *(Tensor.permute, torch.permute, Tensor.transpose, torch.transpose, Tensor.movedim, torch.movedim),
    *(Tensor.swapaxes, Tensor.__getitem__, Tensor.narrow, torch.narrow, Tensor.select, torch.select),
    *(Tensor.flip, torch.flip, torch.pixel_shuffle, torch.pixel_unshuffle),
    *(torch.channel_shuffle, Tensor.index_select, torch.index_select, Tensor.repeat_interleave),
    *(vars(torch._C.TensorBase)["mT"].__get__, Tensor.repeat, Tensor.tile, torch.tile),
):
    _rearranged(_function)


@rule(Tensor.roll, torch.roll)
def _roll(at: Site, value: Any, shifts: Any, dims: Any = None) -> Affine:
    moved = [dims] if isinstance(dims, int) else list(dims or ())
    if not moved or any(dim % (len(at.input_sizes) + 1) == 0 for dim in moved):
        raise ValueError(f"dims={dims}, which hold the batch, want others")
    return rearranged(at, lambda x: x.roll(shifts, dims), torch.roll, shifts, dims)


@rule(Tensor.expand, Tensor.expand_as)
def _expand(at: Site, value: Any, *sizes: Any) -> Affine:
    if len(at.input_sizes) != len(at.output_sizes):
        raise ValueError("more dimensions, want as many")
    return rearranged(at, lambda x: x.expand(len(x), *at.output_sizes), Tensor.expand, at.output_sizes)


@rule(Tensor.to, Tensor.cpu, Tensor.double, Tensor.float, Tensor.type_as)
def _same_type(at: Site, value: Any, *args: Any, **kwargs: Any) -> Affine:
    return Affine(Identity(at.input_sizes, at.like))


@rule(Tensor.sum, torch.sum)
def _sum(
    at: Site, value: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None
) -> Affine:
    mean = _mean(at, value, dim, keepdim, axis=axis, dtype=dtype).linear
    count = torch.full((1,), 1.0, dtype=at.like.dtype, device=at.like.device)
    count = count * (math.prod(at.input_sizes) // max(math.prod(at.output_sizes), 1))
    return Affine(composed(mean, Scaling(count, mean.output_sizes)))


@rule(F.pad)
def _pad(at: Site, input_: Any, /, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Affine:
    if mode == "constant" and value:
        raise ValueError(f"padding with {value}, want zeros")
    return rearranged(at, lambda x: F.pad(x, list(pad), mode), F.pad, list(pad), mode)


@rule(F.interpolate)
def _resized(
    at: Site, value: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *args: Any, **more: Any
) -> Affine:
    if mode not in ("nearest", "nearest-exact"):
        raise ValueError(f"mode={mode!r}, want 'nearest'")
    numbers = (size, scale_factor, mode)
    resized = rearranged(at, lambda x: F.interpolate(x, *numbers), F.interpolate, *numbers)
    if any(m % n for n, m in zip(at.input_sizes[1:], at.output_sizes[1:], strict=True)):
        raise ValueError(f"{tuple(at.input_sizes[1:])} to {tuple(at.output_sizes[1:])}, want an integer factor")
    return resized


# ---- activations ----

# Slopes of those that rise by no more than their input.
RISING = (0.0, 1.0)


def _activation(
    *functions: Callable[..., Any], lipschitz: float = 1.0, valley: float | None = None, **more: Any
) -> None:
    """A rule for functions that have no arguments, or none that matters here."""
    for function in functions:

        def build(at: Site, value: Any, *, inplace: bool = False, function: Any = function) -> Activation:
            slopes = (0.0, lipschitz) if valley is None else None
            return Activation(function, lipschitz, valley, slopes=slopes, **more)

        rule(function)(build)


_activation(F.relu, torch.relu, Tensor.relu, kind="relu", exact=True)
_activation(F.relu6, exact=True)
_activation(F.tanh, torch.tanh, Tensor.tanh)
_activation(F.sigmoid, torch.sigmoid, Tensor.sigmoid, lipschitz=0.25)
_activation(F.hardsigmoid, lipschitz=1 / 6 * (1 + 1e-7))  # a float32 sixth is in torch's gradient
_activation(torch.abs, Tensor.abs, Tensor.__abs__, valley=0.0, exact=True)
# Largest slopes, rounded up, and where the functions are least.
_activation(F.silu, lipschitz=1.09983932014, valley=-1.278464542761074)
_activation(F.mish, lipschitz=1.08849816126, valley=-1.1924312145154952)
_activation(F.hardswish, lipschitz=1.5, valley=-1.5)


@rule(F.gelu)
def _gelu(at: Site, value: Any, approximate: str = "none") -> Activation:
    lipschitz, valley = 1.12890414519, -0.7517915246935645
    if approximate == "tanh":
        lipschitz, valley = 1.12899306868, -0.7524614220710163
    return Activation(lambda x: F.gelu(x, approximate=approximate), lipschitz, valley)


@rule(F.leaky_relu)
def _leaky_relu(at: Site, value: Any, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    if not 0 <= negative_slope <= 1:
        raise ValueError(f"negative_slope={negative_slope}, want one in [0, 1]")
    return Activation(lambda x: F.leaky_relu(x, negative_slope), slopes=(float(negative_slope), 1.0))


@rule(F.elu)
def _elu(at: Site, value: Any, alpha: float = 1.0, inplace: bool = False) -> Activation:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}, want 0 < alpha <= 1")
    return Activation(lambda x: F.elu(x, alpha), slopes=RISING)


@rule(F.celu)
def _celu(at: Site, value: Any, alpha: float = 1.0, inplace: bool = False) -> Activation:
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}, want alpha > 0")
    return Activation(lambda x: F.celu(x, alpha), slopes=RISING)


@rule(F.hardtanh)
def _hardtanh(at: Site, value: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation:
    return Activation(lambda x: F.hardtanh(x, min_val, max_val), exact=True, slopes=RISING)


@rule(Tensor.clamp, torch.clamp, Tensor.clip, torch.clip)
def _clamp(at: Site, value: Any, min: Any = None, max: Any = None) -> Activation:
    if any(isinstance(limit, Tensor) and limit.dim() > 1 and len(limit) != 1 for limit in (min, max)):
        raise ValueError("limits that differ between samples, want the same for every sample")
    return Activation(lambda x: x.clamp(min, max), exact=True, slopes=RISING)


@rule(F.softplus)
def _softplus(at: Site, value: Any, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    if not beta > 0 or threshold < 20:  # below, torch's jumps down at the threshold
        raise ValueError(f"beta={beta}, threshold={threshold}, want beta > 0 and threshold >= 20")
    jumps = "torch's jumps at its threshold"
    return Activation(lambda x: F.softplus(x, beta, threshold), unproved=jumps, slopes=RISING)


@rule(torch.prelu)
def _prelu(at: Site, value: Any, weight: Tensor) -> Activation:
    slopes = weight.detach()
    # a step that is being captured was looked at in the calls before
    seen = slopes.is_meta or (slopes.is_cuda and torch.cuda.is_current_stream_capturing())
    if not seen and not bool(((slopes >= 0) & (slopes <= 1)).all()):
        raise ValueError(f"slopes in [{float(slopes.min()):.3g}, {float(slopes.max()):.3g}], want them in [0, 1]")
    return Activation(lambda x: F.prelu(x, weight.to(x)), slopes=RISING)


def _threshold(threshold: Tensor, sizes: list[int]) -> Tensor:
    """(1, *sizes)."""
    if threshold.dim() > len(sizes) and threshold.shape[0] != 1:
        raise ValueError(f"a threshold of shape {tuple(threshold.shape)}, want one that is the same for every sample")
    return threshold.expand(1, *sizes)


@rule(clipped_relu)
def _clipped_relu(at: Site, value: Any, threshold: Tensor) -> Activation:
    threshold = _threshold(threshold, at.input_sizes)
    return Activation(
        lambda z: clipped_relu(z, threshold), kind="clipped_relu", first=threshold, exact=True, slopes=RISING
    )


@rule(maxmin)
def _maxmin(at: Site, value: Any) -> Activation:
    return Activation(maxmin, kind="maxmin", exact=True)


@rule(clipped_maxmin)
def _clipped_maxmin(at: Site, value: Any, upper: Tensor, lower: Tensor) -> Activation:
    half = [at.input_sizes[0] // 2, *at.input_sizes[1:]]
    upper, lower = _threshold(upper, half), _threshold(lower, half)
    function = partial(clipped_maxmin, upper=upper, lower=lower)
    return Activation(function, kind="clipped_maxmin", first=upper, second=lower, exact=True)


# ---- maxima ----


@dataclass
class MaxPool(Activation):
    """Maxima over windows. inputs: (outputs, taps) int64, which input each tap of a window is; -1 for none."""

    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def rows(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Those that are the maximum of a window that holds them, for some values: not below the lower bound of
        another of its units."""
        most = self.function(lower).flatten(1).unsqueeze(2).expand(-1, *self.inputs.shape)
        inputs = on_device(self.inputs, lower.device)
        flat, there = lower.flatten(1), inputs >= 0
        least = torch.full_like(flat, math.inf)
        index = inputs.clamp_min(0).flatten().expand(len(flat), -1)
        most = torch.where(there, most, math.inf).flatten(1)
        least = least.scatter_reduce(1, index, most, "amin")
        return ~(upper < least.view_as(upper))


def _max_pool(at: Site, function: Callable[[Tensor], Tensor], conv: Sequence[Sequence[int]]) -> MaxPool:
    """conv: kernel, stride, padding and dilation over the last dimensions."""
    if len(at.input_sizes) < 2 or len(at.output_sizes) != len(at.input_sizes):
        raise ValueError(f"values of {tuple(at.input_sizes)}, want channels and places")
    kernel, stride, padding, dilation = conv
    spatial = at.input_sizes[1:]
    if [output_size(*n) for n in zip(spatial, kernel, stride, padding, dilation, strict=True)] != at.output_sizes[1:]:
        raise ValueError("ceil_mode=True, with windows beyond the border, want ceil_mode=False")
    inputs, most = _windows(tuple(at.input_sizes), *(tuple(numbers) for numbers in conv))
    return MaxPool(function, up_to(math.sqrt(most)), exact=True, inputs=inputs)


@lru_cache(maxsize=256)
def _windows(sizes: tuple[int, ...], *conv: tuple[int, ...]) -> tuple[Tensor, int]:
    """(outputs, taps) which input each tap of a window is, -1 for none; and the most windows that one input is in."""
    kernel, stride, padding, dilation = conv
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    numbers = F.pad(numbers, [n for p in reversed(padding) for n in (p, p)], value=-1)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 1):
        numbers = numbers.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    inputs = numbers.reshape(-1, math.prod(kernel))
    if bool((inputs < 0).all(1).any()):
        raise ValueError("windows that lie in the padding, want some input in each")
    return inputs, int(torch.bincount(inputs[inputs >= 0], minlength=1).max())


def up_to(number: float) -> float:
    """``number``, which was rounded, from above."""
    return number if number == int(number) else math.nextafter(number, math.inf)


_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@rule(
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices),
)
def _max_pooled(
    at: Site,
    value: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPool:
    count = len(at.input_sizes) - 1
    kernel = several(kernel_size, count)
    numbers = (kernel, several(stride or kernel, count), several(padding, count), several(dilation, count))
    return _max_pool(at, lambda x: _MAX_POOLS[count](x, *numbers), numbers)


@rule(
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices),
    torch.adaptive_max_pool1d,
)
def _adaptive_max_pooled(at: Site, value: Any, output_size: Any, return_indices: bool = False) -> MaxPool:
    inner, outer = at.input_sizes[1:], at.output_sizes[1:]
    if any(n % m for n, m in zip(inner, outer, strict=True)):
        raise ValueError(f"output_size={tuple(outer)} of {tuple(inner)}, want sizes that divide")
    kernel = [n // m for n, m in zip(inner, outer, strict=True)]
    numbers = (kernel, kernel, [0] * len(kernel), [1] * len(kernel))
    return _max_pool(at, lambda x: _MAX_POOLS[len(kernel)](x, *numbers), numbers)
