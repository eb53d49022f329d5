"""The linear maps of a network as objects: applied, transposed, in absolute value, squared, composed and added.

A map takes a batch (B, *input_sizes) to (B, *output_sizes), differentiably in its weights. Maps in a row, and maps of
one value that are added, become one where that has a form of its own: a convolution behind a scaling, x + conv(x).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import output_size, transposed_size

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class LinearMap(ABC):
    """A matrix A between values of these sizes, which are those of one sample.

    terms: in every row, at least as many roundings as one entry of A x takes, in any order of summation: computed
    products obey |fl(A x) - A x| <= gamma(terms) |A| |x|, |A| as :meth:`absolute`. adjoint_terms: the same of A^T y.
    """

    def __init__(self, input_sizes: Sequence[int], output_sizes: Sequence[int], terms: int, adjoint_terms: int) -> None:
        self.input_sizes, self.output_sizes = list(input_sizes), list(output_sizes)
        self.terms, self.adjoint_terms = terms, adjoint_terms

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x: (B, *input_sizes) -> (B, *output_sizes)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: (B, *output_sizes) -> (B, *input_sizes)."""

    @abstractmethod
    def absolute(self) -> LinearMap:
        """A map with entries of at least |A_ij|; of exactly those, but where A is a product or a sum of others."""

    @abstractmethod
    def squared(self) -> LinearMap | None:
        """The map with entries A_ij^2; None where it is not at hand."""

    def dense(self) -> Tensor:
        """(outputs, inputs), differentiable; for small ones."""
        outputs = math.prod(self.output_sizes)
        eye = torch.eye(outputs, dtype=self.like.dtype, device=self.like.device)
        return self.adjoint(eye.view(outputs, *self.output_sizes)).flatten(1)

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of its weights."""


class Identity(LinearMap):
    """x itself."""

    def __init__(self, sizes: Sequence[int], like: Tensor) -> None:
        super().__init__(sizes, sizes, 0, 0)
        self._like = like

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def absolute(self) -> Identity:
        return self

    def squared(self) -> Identity:
        return self

    @property
    def like(self) -> Tensor:
        return self._like


class Dense(LinearMap):
    """A weight (m, n)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__([weight.shape[1]], [weight.shape[0]], weight.shape[1], weight.shape[0])
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.weight

    def absolute(self) -> Dense:
        return Dense(self.weight.abs())

    def squared(self) -> Dense:
        return Dense(self.weight.square())

    def dense(self) -> Tensor:
        return self.weight

    @property
    def like(self) -> Tensor:
        return self.weight


class Convolution(LinearMap):
    """A zero-padded convolution over one to three dimensions: weight (Cout, Cin/groups, *kernel), as torch's."""

    def __init__(
        self,
        weight: Tensor,
        input_sizes: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        conv = (stride, padding, dilation)
        spatial = [output_size(*n) for n in zip(input_sizes[1:], weight.shape[2:], *conv, strict=True)]
        super().__init__(input_sizes, [weight.shape[0], *spatial], weight[0].numel(), weight[:, 0].numel() // groups)
        self.weight = weight
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups

    def __call__(self, x: Tensor) -> Tensor:
        convolution = _CONVOLUTION[len(self.stride)]
        result: Tensor = convolution(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return result

    def adjoint(self, y: Tensor) -> Tensor:
        conv = (self.weight.shape[2:], self.stride, self.padding, self.dilation)
        shortest = [transposed_size(*numbers) for numbers in zip(self.output_sizes[1:], *conv, strict=True)]
        # what a stride leaves over at the far border
        rest = [n - least for n, least in zip(self.input_sizes[1:], shortest, strict=True)]
        result: Tensor = _TRANSPOSED[len(self.stride)](
            y, self.weight, None, self.stride, self.padding, rest, self.groups, self.dilation
        )
        return result

    def absolute(self) -> Convolution:
        return self.with_weight(self.weight.abs())

    def squared(self) -> Convolution:
        return self.with_weight(self.weight.square())

    def with_weight(self, weight: Tensor) -> Convolution:
        """The same geometry with another weight, which may have other output channels."""
        return Convolution(weight, self.input_sizes, self.stride, self.padding, self.dilation, self.groups)

    @property
    def like(self) -> Tensor:
        return self.weight


class Scaling(LinearMap):
    """x times ``factor`` (1, *sizes) or what broadcasts to it."""

    def __init__(self, factor: Tensor, sizes: Sequence[int]) -> None:
        super().__init__(sizes, sizes, 1, 1)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.factor

    def absolute(self) -> Scaling:
        return Scaling(self.factor.abs(), self.input_sizes)

    def squared(self) -> Scaling:
        return Scaling(self.factor.square(), self.input_sizes)

    @property
    def like(self) -> Tensor:
        return self.factor


class Rearrangement(LinearMap):
    """Every output is one of the inputs, or 0: reshapes, permutations, slices, paddings, nearest resizing.

    function: of a batch, sample by sample; ValueError where its outputs are not of that kind.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], input_sizes: Sequence[int], like: Tensor) -> None:
        units = math.prod(input_sizes)
        numbers = torch.arange(1, 2 * units + 1, dtype=torch.float64, device=like.device).view(2, *input_sizes)
        images = function(numbers)
        if images.shape[0] != 2:
            raise ValueError(f"function: got a result of shape {tuple(images.shape)} of two samples, want (2, ...)")
        first, second = images.flatten(1).long()
        if not torch.equal(images.flatten(1), torch.stack([first, second]).double()) or not torch.equal(
            second, torch.where(first > 0, first + units, 0)
        ):
            raise ValueError("function: got one that is no choice of inputs of each sample, want one")
        if bool(((first < 0) | (first > units)).any()):
            raise ValueError("function: got one that mixes samples, or numbers of its own, want a choice of inputs")
        self._inputs = first - 1  # -1 where an output is 0
        counts = torch.bincount(first, minlength=units + 1)[1:]
        super().__init__(input_sizes, images.shape[1:], 0, int(counts.max()) if units else 0)
        self.function, self._like = function, like
        self.injective = bool((counts <= 1).all())  # no input is two outputs
        self.bijective = self.injective and bool((counts == 1).all()) and len(first) == units

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        kept = self._inputs >= 0
        flat = y.new_zeros(len(y), math.prod(self.input_sizes))
        return flat.index_add(1, self._inputs[kept], y.flatten(1)[:, kept]).view(len(y), *self.input_sizes)

    def absolute(self) -> Rearrangement:
        return self

    def squared(self) -> Rearrangement:
        return self

    @property
    def like(self) -> Tensor:
        return self._like


class Adjoint(LinearMap):
    """The transpose of another map: a transposed convolution is that of a convolution."""

    def __init__(self, of: LinearMap) -> None:
        super().__init__(of.output_sizes, of.input_sizes, of.adjoint_terms, of.terms)
        self.of = of

    def __call__(self, x: Tensor) -> Tensor:
        return self.of.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.of(y)

    def absolute(self) -> Adjoint:
        return Adjoint(self.of.absolute())

    def squared(self) -> Adjoint | None:
        squared = self.of.squared()
        return None if squared is None else Adjoint(squared)

    @property
    def like(self) -> Tensor:
        return self.of.like


class Composed(LinearMap):
    """Maps in a row, the first one applied first."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        terms = (sum(m.terms for m in maps), sum(m.adjoint_terms for m in maps))
        super().__init__(maps[0].input_sizes, maps[-1].output_sizes, *terms)
        self.maps = list(maps)

    def __call__(self, x: Tensor) -> Tensor:
        for each in self.maps:
            x = each(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for each in reversed(self.maps):
            y = each.adjoint(y)
        return y

    def absolute(self) -> Composed:
        return Composed([each.absolute() for each in self.maps])

    def squared(self) -> Composed | None:
        """Where no entry is a sum of several products: all maps but one choose or scale, those before it without
        giving one input to two outputs."""
        full = [i for i, each in enumerate(self.maps) if not isinstance(each, (Scaling, Rearrangement, Identity))]
        before = self.maps[: full[0]] if full else []
        if len(full) > 1 or any(isinstance(each, Rearrangement) and not each.injective for each in before):
            return None
        squares = [each.squared() for each in self.maps]
        return None if any(each is None for each in squares) else Composed([each for each in squares if each])

    @property
    def like(self) -> Tensor:
        return self.maps[0].like


class Sum(LinearMap):
    """Maps of one value, added."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        more = len(maps) - 1
        terms = (max(m.terms for m in maps) + more, max(m.adjoint_terms for m in maps) + more)
        super().__init__(maps[0].input_sizes, maps[0].output_sizes, *terms)
        self.maps = list(maps)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.maps[0](x)
        for each in self.maps[1:]:
            result = result + each(x)
        return result

    def adjoint(self, y: Tensor) -> Tensor:
        result = self.maps[0].adjoint(y)
        for each in self.maps[1:]:
            result = result + each.adjoint(y)
        return result

    def absolute(self) -> Sum:
        return Sum([each.absolute() for each in self.maps])

    def squared(self) -> None:
        return None

    @property
    def like(self) -> Tensor:
        return self.maps[0].like


def composed(first: LinearMap, second: LinearMap) -> LinearMap:
    """``second`` after ``first``, as one kernel where there is one."""
    if isinstance(first, Identity):
        return second
    if isinstance(second, Identity):
        return first
    maps = [*(first.maps if isinstance(first, Composed) else [first])]
    for each in second.maps if isinstance(second, Composed) else [second]:
        folded = _in_one(maps[-1], each)
        if folded is None:
            maps.append(each)
        else:
            maps[-1] = folded
    return maps[0] if len(maps) == 1 else Composed(maps)


def added(first: LinearMap, second: LinearMap) -> LinearMap:
    """``first`` and ``second`` of the same value, as one kernel where there is one."""
    folded = _sum_in_one(first, second) or _sum_in_one(second, first)
    if folded is not None:
        return folded
    return Sum([each for part in (first, second) for each in (part.maps if isinstance(part, Sum) else [part])])


def _by_channel(scaling: Scaling) -> Tensor | None:
    """(C,) the factors of a scaling that is the same at every place of a channel, None of another."""
    factor, dimensions = scaling.factor, len(scaling.input_sizes)
    if factor.dim() > dimensions + 1:
        return None
    factor = factor.reshape(*[1] * (dimensions + 1 - factor.dim()), *factor.shape)
    if math.prod(factor.shape[2:]) != 1:
        return None
    return factor.reshape(-1).expand(scaling.input_sizes[0])


def _in_one(first: LinearMap, second: LinearMap) -> LinearMap | None:
    if isinstance(first, Scaling) and isinstance(second, Scaling):
        return Scaling(first.factor * second.factor, first.input_sizes)
    if isinstance(first, Dense) and isinstance(second, Dense) and second.weight.shape[0] <= first.weight.shape[1]:
        return Dense(second.weight @ first.weight)
    for weighted, scaling in ((first, second), (second, first)):
        if not isinstance(scaling, Scaling) or not isinstance(weighted, (Dense, Convolution)):
            continue
        factor = _by_channel(scaling)
        if factor is None:
            return None
        weight = weighted.weight
        rest = [1] * (weight.dim() - 2)
        if weighted is first:  # scales the outputs
            scaled = weight * factor.view(-1, 1, *rest)
        elif isinstance(weighted, Dense):
            scaled = weight * factor
        else:
            by_group = factor.view(weighted.groups, 1, weight.shape[1], *rest)
            scaled = (weight.unflatten(0, (weighted.groups, -1)) * by_group).flatten(0, 1)  # type: ignore[no-untyped-call]
        return Dense(scaled) if isinstance(weighted, Dense) else weighted.with_weight(scaled)
    return None


def _sum_in_one(first: LinearMap, second: LinearMap) -> LinearMap | None:
    if isinstance(first, Identity) and isinstance(second, Identity):
        return Scaling(torch.full((1,), 2.0, dtype=first.like.dtype, device=first.like.device), first.input_sizes)
    if isinstance(first, Dense):
        if isinstance(second, Dense):
            return Dense(first.weight + second.weight)
        if isinstance(second, Identity):
            return Dense(
                first.weight + torch.eye(len(first.weight), dtype=first.weight.dtype, device=first.weight.device)
            )
    if not isinstance(first, Convolution):
        return None
    if isinstance(second, Convolution):
        alike = ("stride", "padding", "dilation", "groups", "input_sizes")
        same = first.weight.shape == second.weight.shape and all(getattr(first, n) == getattr(second, n) for n in alike)
        return first.with_weight(first.weight + second.weight) if same else None
    if isinstance(second, Identity):
        centred = all(
            s == 1 and p <= d * (k - 1) and p % d == 0
            for s, p, d, k in zip(first.stride, first.padding, first.dilation, first.weight.shape[2:], strict=True)
        )
        if not centred or first.output_sizes != first.input_sizes:
            return None
        channels = torch.arange(first.weight.shape[0], device=first.weight.device)
        place = [p // d for p, d in zip(first.padding, first.dilation, strict=True)]
        one: Tensor = first.weight.new_zeros(first.weight.shape[:2])
        one[channels, channels % one.shape[1]] = 1
        around = [n for at, k in zip(place, first.weight.shape[2:], strict=True) for n in (k - 1 - at, at)]
        one = F.pad(one.view(*one.shape, *[1] * len(place)), around[::-1])
        return first.with_weight(first.weight + one)
    return None
