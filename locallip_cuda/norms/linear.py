"""The linear maps of a network as objects: applied, transposed, in absolute value, squared, composed and added.

A map takes a batch (B, *input_sizes) to (B, *output_sizes), differentiably in its weights. Maps in a row, and maps of
one value that are added, are what they say, a :class:`Composed` or a :class:`Sum`; :func:`folded` makes one kernel of
them where there is one: of a convolution behind a scaling, of x + conv(x), of a convolution before an average.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rounding import convolution
from ..shapes import flat, output_size, transposed_size
from .operator import Geometry, planar

# by which a function is told from a choice of the inputs
SAMPLES = 3

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class LinearMap(ABC):
    """A matrix A between values of these sizes, which are those of one sample.

    terms: in every row, at least as many roundings as one entry of A x takes, in any order of summation: computed
    products obey |fl(A x) - A x| <= gamma(terms) |A| |x|, |A| as :meth:`absolute`. adjoint_terms: the same of A^T y.
    roundings: how many the entries themselves come from, where they are not weights as they are stored.
    """

    def __init__(
        self,
        input_sizes: Sequence[int],
        output_sizes: Sequence[int],
        terms: int,
        adjoint_terms: int,
        roundings: int = 0,
    ) -> None:
        self.input_sizes, self.output_sizes = list(input_sizes), list(output_sizes)
        self.terms, self.adjoint_terms, self.roundings = terms, adjoint_terms, roundings

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x: (B, *input_sizes) -> (B, *output_sizes)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: (B, *output_sizes) -> (B, *input_sizes)."""

    def entries(self) -> tuple[int, int]:
        """How many entries that are not 0 a row has, and a column, at most."""
        return self.terms, self.adjoint_terms

    @abstractmethod
    def absolute(self) -> LinearMap:
        """A map with entries of at least |A_ij|; of exactly those, but where A is a product or a sum of others."""

    @abstractmethod
    def squared(self) -> LinearMap:
        """A map with entries of at least A_ij^2, of those but where A is a product or a sum of others: applied to a
        column mask, at least the squared norms of the rows."""

    def weights(self) -> list[Tensor]:
        """Those of its parts."""
        return []

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> LinearMap:
        """The map with ``function`` of each of its weights in its place, of the same shape."""
        return self

    def snapshot(self) -> LinearMap:
        """The map as it is now, with weights of its own and without gradients."""
        return self.with_weights(lambda weight: weight.detach().clone())

    def of_samples(self, indices: Tensor) -> LinearMap:
        """The map for a batch of these samples of the batch that its masks are of; itself where it has none."""
        return self

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
        super().__init__(sizes, sizes, 1, 1)
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

    def weights(self) -> list[Tensor]:
        return [self.weight]

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(function(self.weight))

    def absolute(self) -> Dense:
        return Dense(self.weight.abs())

    def squared(self) -> Dense:
        return Dense(self.weight.square())

    def dense(self) -> Tensor:
        return self.weight

    def planar(self) -> tuple[Tensor, list[int], list[int], Geometry]:
        """As the ops take it: weight, sizes of an input and of an output, geometry."""
        return self.weight, self.input_sizes, self.output_sizes, ([1, 1], [0, 0], [1, 1], 1)

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
        roundings: int = 0,
    ) -> None:
        conv = (stride, padding, dilation)
        spatial = [output_size(*n) for n in zip(input_sizes[1:], weight.shape[2:], *conv, strict=True)]
        # of a stride of s, every (s / gcd(s, d))-th tap meets one input
        taps = [-(-k // (s // math.gcd(s, d))) for k, s, d in zip(weight.shape[2:], stride, dilation, strict=True)]
        columns = weight.shape[0] // groups * math.prod(taps)
        super().__init__(input_sizes, [weight.shape[0], *spatial], weight[0].numel(), columns, roundings)
        self.weight = weight
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups

    def __call__(self, x: Tensor) -> Tensor:
        own = (self.stride, self.padding, self.dilation, self.groups)
        if _is_of_a_proof(x):
            return convolution(x, self.weight, *own)
        result: Tensor = _CONVOLUTION[len(self.stride)](x, self.weight, None, *own)
        return result

    def adjoint(self, y: Tensor) -> Tensor:
        if _is_of_a_proof(y):
            own = (self.stride, self.padding, self.dilation, self.groups)
            return convolution(y, self.weight, *own, transposed_to=self.input_sizes[1:])
        conv = (self.weight.shape[2:], self.stride, self.padding, self.dilation)
        shortest = [transposed_size(*numbers) for numbers in zip(self.output_sizes[1:], *conv, strict=True)]
        # what a stride leaves over at the far border
        rest = [n - least for n, least in zip(self.input_sizes[1:], shortest, strict=True)]
        result: Tensor = _TRANSPOSED[len(self.stride)](
            y, self.weight, None, self.stride, self.padding, rest, self.groups, self.dilation
        )
        return result

    def weights(self) -> list[Tensor]:
        return [self.weight]

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Convolution:
        return self.with_weight(function(self.weight))

    def absolute(self) -> Convolution:
        return self.with_weight(self.weight.abs())

    def squared(self) -> Convolution:
        return self.with_weight(self.weight.square())

    def with_weight(self, weight: Tensor) -> Convolution:
        """The same geometry with another weight, which may have other output channels."""
        own = (self.stride, self.padding, self.dilation, self.groups)
        return Convolution(weight, self.input_sizes, *own, self.roundings)

    def planar(self) -> tuple[Tensor, list[int], list[int], Geometry]:
        """As the ops take it: weight, sizes of an input and of an output, geometry."""
        own = (self.stride, self.padding, self.dilation, self.groups)
        return planar(self.weight, self.input_sizes, self.output_sizes, own)

    @property
    def like(self) -> Tensor:
        return self.weight


class Scaling(LinearMap):
    """x times ``factor`` (1, *sizes) or what broadcasts to it."""

    def __init__(self, factor: Tensor, sizes: Sequence[int], roundings: int = 0) -> None:
        super().__init__(sizes, sizes, 1, 1, roundings)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.factor

    def weights(self) -> list[Tensor]:
        return [self.factor]

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Scaling:
        return Scaling(function(self.factor), self.input_sizes, self.roundings)

    def absolute(self) -> Scaling:
        return Scaling(self.factor.abs(), self.input_sizes, self.roundings)

    def squared(self) -> Scaling:
        return Scaling(self.factor.square(), self.input_sizes, self.roundings)

    @property
    def like(self) -> Tensor:
        return self.factor


class Masking(LinearMap):
    """x where ``mask`` (B, *sizes) is True, 0 elsewhere: for a batch of B samples, or of any where B = 1."""

    def __init__(self, mask: Tensor, like: Tensor) -> None:
        super().__init__(mask.shape[1:], mask.shape[1:], 1, 1)
        self.mask, self._like = mask, like

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.where(self.mask, y, 0)

    def of_samples(self, indices: Tensor) -> Masking:
        return self if len(self.mask) == 1 else Masking(self.mask[indices], self._like)

    def absolute(self) -> Masking:
        return self

    def squared(self) -> Masking:
        return self

    @property
    def like(self) -> Tensor:
        return self._like


@dataclass(frozen=True)
class _Choice:
    """Which input each output is, -1 where it is 0, and how many outputs one input is, at most."""

    inputs: Tensor
    output_sizes: tuple[int, ...]
    most: int
    injective: bool
    bijective: bool


# What is known of functions by their keys and the sizes that they were called on: to find it out takes its time.
_choices: dict[Hashable, _Choice] = {}
_CHOICES_AT_MOST = 1024


def _choice(function: Callable[[Tensor], Tensor], sizes: Sequence[int], key: Hashable) -> _Choice:
    known = _choices.get((key, *sizes)) if key is not None else None
    if known is not None:
        return known
    units = math.prod(sizes)
    # samples whose numbers are all different, in different orders and of both signs: what sorts them shows
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(SAMPLES * units, generator=g)
    numbers = ((order + 1) * (1 - 2 * torch.randint(2, order.shape, generator=g))).double().view(SAMPLES, units)
    images = function(numbers.view(SAMPLES, *sizes))  # on the host: a look at them waits for no device
    if images.dim() == 0 or images.shape[0] != SAMPLES:
        got = tuple(images.shape)
        raise ValueError(f"function: got a result of shape {got} of {SAMPLES} samples, want ({SAMPLES}, ...)")
    found = flat(images)
    place = torch.empty(SAMPLES * units + 1, dtype=torch.int64)
    place[0], place[order + 1] = -1, torch.arange(SAMPLES * units)
    inputs = place[found[0].abs().nan_to_num(0).clamp(0, SAMPLES * units).long()]
    chosen = torch.where(inputs < 0, 0, numbers[:, inputs.clamp(0, max(units - 1, 0))] if units else 0)
    if not torch.equal(found.double(), chosen):
        raise ValueError("function: got one that is no choice of the inputs of each sample, want one")
    counts = torch.bincount(inputs + 1, minlength=units + 1)[1:]
    injective = bool((counts <= 1).all())  # no input is two outputs
    bijective = injective and bool((counts == 1).all()) and len(inputs) == units
    made = _Choice(inputs, tuple(images.shape[1:]), int(counts.max()) if units else 0, injective, bijective)
    if key is not None:
        if len(_choices) >= _CHOICES_AT_MOST:
            _choices.clear()
        _choices[(key, *sizes)] = made
    return made


class Rearrangement(LinearMap):
    """Every output is one of the inputs, or 0: reshapes, permutations, slices, paddings, nearest resizing.

    function: of a batch, sample by sample; ValueError where its outputs are not of that kind.
    key: equal for functions that are equal; None is equal to nothing.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        input_sizes: Sequence[int],
        like: Tensor,
        key: Hashable = None,
    ) -> None:
        choice = _choice(function, input_sizes, key)
        super().__init__(input_sizes, choice.output_sizes, 1, choice.most)
        self.function, self._like, self._inputs = function, like, choice.inputs
        self.injective, self.bijective = choice.injective, choice.bijective

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def of_mask(self, mask: Tensor) -> Tensor:
        """A bool mask of the inputs as one of the outputs, False where those are 0."""
        return self(mask.to(self.like.dtype)) > 0

    def adjoint(self, y: Tensor) -> Tensor:
        inputs = on_device(self._inputs, y.device)
        # one place more, for the outputs that are 0
        sums = y.new_zeros(len(y), math.prod(self.input_sizes) + 1).index_add(1, inputs + 1, flat(y))
        return sums[:, 1:].reshape(len(y), *self.input_sizes)

    def absolute(self) -> Rearrangement:
        return self

    def squared(self) -> Rearrangement:
        return self

    @property
    def like(self) -> Tensor:
        return self._like


_on_device: dict[tuple[bytes, torch.device], Tensor] = {}
_ON_DEVICE_AT_MOST = 256


def on_device(indices: Tensor, device: torch.device) -> Tensor:
    """Indices from the host, kept there: a CUDA graph that is captured cannot copy them."""
    if indices.device == device:
        return indices
    key = hashlib.sha256(indices.contiguous().numpy().tobytes()).digest(), device
    if key not in _on_device:
        if len(_on_device) >= _ON_DEVICE_AT_MOST:
            _on_device.clear()
        _on_device[key] = indices.to(device)
    return _on_device[key]


class Reshape(Rearrangement):
    """The same numbers in the same order, as other sizes."""

    def __init__(self, input_sizes: Sequence[int], output_sizes: Sequence[int], like: Tensor) -> None:
        LinearMap.__init__(self, input_sizes, output_sizes, 1, 1)
        self._like, self.injective, self.bijective = like, True, True

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.output_sizes)

    def of_mask(self, mask: Tensor) -> Tensor:
        return mask.reshape(len(mask), *self.output_sizes)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), *self.input_sizes)


class Adjoint(LinearMap):
    """The transpose of another map: a transposed convolution is that of a convolution."""

    def __init__(self, of: LinearMap) -> None:
        super().__init__(of.output_sizes, of.input_sizes, of.adjoint_terms, of.terms, of.roundings)
        self.of = of

    def __call__(self, x: Tensor) -> Tensor:
        return self.of.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.of(y)

    def entries(self) -> tuple[int, int]:
        row, column = self.of.entries()
        return column, row

    def weights(self) -> list[Tensor]:
        return self.of.weights()

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Adjoint:
        return Adjoint(self.of.with_weights(function))

    def of_samples(self, indices: Tensor) -> Adjoint:
        return Adjoint(self.of.of_samples(indices))

    def absolute(self) -> Adjoint:
        return Adjoint(self.of.absolute())

    def squared(self) -> Adjoint:
        return Adjoint(self.of.squared())

    @property
    def like(self) -> Tensor:
        return self.of.like


class Composed(LinearMap):
    """Maps in a row, the first one applied first."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        terms = (sum(m.terms for m in maps), sum(m.adjoint_terms for m in maps))
        super().__init__(maps[0].input_sizes, maps[-1].output_sizes, *terms, sum(m.roundings for m in maps))
        self.maps = list(maps)

    def __call__(self, x: Tensor) -> Tensor:
        for each in self.maps:
            x = each(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for each in reversed(self.maps):
            y = each.adjoint(y)
        return y

    def entries(self) -> tuple[int, int]:
        rows, columns = zip(*(each.entries() for each in self.maps), strict=True)
        return math.prod(rows), math.prod(columns)

    def weights(self) -> list[Tensor]:
        return [weight for each in self.maps for weight in each.weights()]

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Composed:
        return Composed([each.with_weights(function) for each in self.maps])

    def of_samples(self, indices: Tensor) -> Composed:
        return Composed([each.of_samples(indices) for each in self.maps])

    def absolute(self) -> Composed:
        return Composed([each.absolute() for each in self.maps])

    def squared(self) -> LinearMap:
        """The squares of the parts in a row. An entry is one product, and that exact, where the parts before one of
        them lead each input to one output, and those behind it make each output of one input; elsewhere a sum of n
        has its square below n times the sum of squares."""

        def factor(middle: int) -> int:
            before, behind = self.maps[:middle], self.maps[middle + 1 :]
            return math.prod(m.entries()[1] for m in before) * math.prod(m.entries()[0] for m in behind)

        squares = Composed([each.squared() for each in self.maps])
        return _times(min(factor(i) for i in range(len(self.maps))), squares)

    @property
    def like(self) -> Tensor:
        return self.maps[0].like


class Sum(LinearMap):
    """Maps of one value, added."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        terms = (sum(m.terms for m in maps), sum(m.adjoint_terms for m in maps))
        super().__init__(maps[0].input_sizes, maps[0].output_sizes, *terms, max(m.roundings for m in maps))
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

    def entries(self) -> tuple[int, int]:
        rows, columns = zip(*(each.entries() for each in self.maps), strict=True)
        return sum(rows), sum(columns)

    def weights(self) -> list[Tensor]:
        return [weight for each in self.maps for weight in each.weights()]

    def with_weights(self, function: Callable[[Tensor], Tensor]) -> Sum:
        return Sum([each.with_weights(function) for each in self.maps])

    def of_samples(self, indices: Tensor) -> Sum:
        return Sum([each.of_samples(indices) for each in self.maps])

    def absolute(self) -> Sum:
        return Sum([each.absolute() for each in self.maps])

    def squared(self) -> LinearMap:
        """The square of a sum of n is below n times the sum of squares."""
        return _times(len(self.maps), Sum([each.squared() for each in self.maps]))

    @property
    def like(self) -> Tensor:
        return self.maps[0].like


def _mover(linear: LinearMap) -> Rearrangement | None:
    return linear if isinstance(linear, Rearrangement) and linear.injective else None


def without_ends(
    linear: Composed, rows: Tensor | None, columns: Tensor | None, batch: int
) -> tuple[LinearMap, Tensor | None, Tensor | None, Rearrangement | None, Rearrangement | None]:
    """The map between the rearrangements at its ends that do nothing but move the masks, the masks (B, *) so moved, and
    the two, or None: diag(rows) A diag(columns) has the same norm.

    Where the first one leaves inputs out these go; its zeros are columns that are not there, and outputs that the last
    one leaves out are rows that are not.
    """
    maps, first, last = linear.maps, _mover(linear.maps[0]), _mover(linear.maps[-1])
    if first is not None:
        maps = maps[1:]
        kept = None if columns is None else first.of_mask(columns)
        if not first.bijective:
            ones = torch.ones(1, *first.input_sizes, dtype=torch.bool, device=linear.like.device)
            there = first.of_mask(ones).expand(batch, *first.output_sizes)
            kept = there if kept is None else kept & there
        columns = kept
    if last is not None and len(maps) > 1:
        maps = maps[:-1]
        if rows is not None or not last.bijective:
            like = linear.like
            chosen = torch.ones(batch, *last.output_sizes, dtype=like.dtype, device=like.device)
            rows = last.adjoint(chosen if rows is None else chosen * rows) > 0
    else:
        last = None
    return (Composed(maps) if len(maps) > 1 else maps[0]), rows, columns, first, last


def widest(linear: LinearMap) -> int:
    """Units of the largest vector on the way through a map."""
    own = max(math.prod(linear.input_sizes), math.prod(linear.output_sizes))
    return max([own, *(widest(each) for each in linear.maps)]) if isinstance(linear, (Composed, Sum)) else own


def is_of_even_size(linear: LinearMap) -> bool:
    """Whether products through the parts stay far from overflow and underflow: no entry but 0 outside
    [2^-100, 2^100], and along every row of parts binary orders of 720 at most."""
    inside = all(
        bool(((weight == 0) | (weight.abs() >= 2.0**-100) & (weight.abs() <= 2.0**100)).all())
        for weight in linear.weights()
    )
    return inside and _orders(linear) <= 720


def _orders(linear: LinearMap) -> float:
    """By how many binary orders the products of a row of parts, and sums of them, can differ from 1."""
    if isinstance(linear, Composed):
        return sum(_orders(each) for each in linear.maps)
    if isinstance(linear, Sum):
        return max(_orders(each) for each in linear.maps) + math.log2(len(linear.maps))
    if isinstance(linear, Adjoint):
        return _orders(linear.of)
    own = math.log2(max(linear.terms, linear.adjoint_terms, 1))
    for weight in linear.weights():
        orders = weight.detach().double().abs().log2().abs()
        own += float(torch.where(weight == 0, 0, orders).max()) if weight.numel() else 0
    return own


def _times(number: int, linear: LinearMap) -> LinearMap:
    if number == 1:
        return linear
    like = linear.like
    factor = torch.full((1,), float(number), dtype=like.dtype, device=like.device)
    return Composed([linear, Scaling(factor, linear.output_sizes)])


def same(first: Any, second: Any) -> bool:
    """Whether two maps, or what they are made of, are alike in every number and setting."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
    if isinstance(first, LinearMap):
        # what a function of a rearrangement does is in its choice of the inputs
        own, other = ({k: v for k, v in vars(each).items() if k != "function"} for each in (first, second))
        return own.keys() == other.keys() and all(same(own[k], other[k]) for k in own)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _is_of_a_proof(x: Tensor) -> bool:
    """Whether products are to be sums of products, as cuDNN's need not be."""
    return x.is_cuda and x.dtype == torch.float64 and not torch.is_grad_enabled()


def composed(first: LinearMap, second: LinearMap) -> LinearMap:
    """``second`` after ``first``."""
    if isinstance(first, Identity) or isinstance(second, Identity):
        return second if isinstance(first, Identity) else first
    return Composed(
        [each for part in (first, second) for each in (part.maps if isinstance(part, Composed) else [part])]
    )


def added(first: LinearMap, second: LinearMap) -> LinearMap:
    """``first`` and ``second`` of the same value."""
    return Sum([each for part in (first, second) for each in (part.maps if isinstance(part, Sum) else [part])])


def folded(linear: LinearMap) -> LinearMap:
    """The same map with as few parts as there can be; itself where nothing folds.

    Its entries are off those of ``linear`` by gamma(terms) of their sizes, |A| and terms of ``linear``.
    """
    if isinstance(linear, Composed):
        maps: list[LinearMap] = []
        for each in linear.maps:
            maps.append(folded(each))
            while len(maps) > 1 and (one := _in_one(maps[-2], maps[-1])) is not None:
                maps[-2:] = [one]
        same = len(maps) == len(linear.maps) and all(a is b for a, b in zip(maps, linear.maps, strict=True))
        return linear if same else maps[0] if len(maps) == 1 else Composed(maps)
    if isinstance(linear, Sum):
        parts = [folded(each) for each in linear.maps]
        left: list[LinearMap] = []
        for part in parts:
            for i, other in enumerate(left):
                one = _sum_in_one(other, part) or _sum_in_one(part, other)
                if one is not None:
                    left[i] = one
                    break
            else:
                left.append(part)
        same = len(left) == len(linear.maps) and all(a is b for a, b in zip(left, linear.maps, strict=True))
        return linear if same else left[0] if len(left) == 1 else Sum(left)
    return linear


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
    if isinstance(first, Reshape) and isinstance(second, Reshape):
        return Reshape(first.input_sizes, second.output_sizes, first.like)
    if isinstance(first, Scaling) and isinstance(second, Scaling):
        return Scaling(first.factor * second.factor, first.input_sizes)
    if isinstance(first, Convolution) and isinstance(second, Convolution):
        return _averaged(first, second)
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


def _averaged(first: Convolution, second: Convolution) -> Convolution | None:
    """A convolution before one of every channel by itself, as the one that they are, where it costs no more."""
    channels = first.weight.shape[0]
    if second.groups != channels or second.weight.shape[0] != channels or any(second.padding):
        return None
    if set(first.dilation) != {1} or set(second.dilation) != {1}:
        return None
    around = zip(first.weight.shape[2:], first.stride, second.weight.shape[2:], strict=True)
    kernel = [k + s * (n - 1) for k, s, n in around]
    if math.prod(kernel) * math.prod(second.output_sizes) > first.weight[0, 0].numel() * math.prod(first.output_sizes):
        return None
    by_channel = _TRANSPOSED[len(kernel)](
        first.weight.transpose(0, 1), second.weight, None, 1, 0, 0, channels, first.stride
    )
    stride = [s * t for s, t in zip(first.stride, second.stride, strict=True)]
    return Convolution(
        by_channel.transpose(0, 1), first.input_sizes, stride, first.padding, first.dilation, first.groups
    )


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
