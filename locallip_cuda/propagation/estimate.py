"""The estimate: a differentiable pass that carries the clean value, a box, a radius and the masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..norms.iteration import iterated_norm
from ..norms.linear import Composed, Convolution, Dense, Identity, LinearMap
from ..norms.masked_norm import values_are_at_hand
from ..shapes import flat
from .composition import Chain, folded_map
from .graph import Graph, Joined, Layer, Term, View, joined_radius
from .recursion import Pass, check_norm, joined_mask, viewed_mask
from .rules import Lipschitz
from .trace import without_autocast
from .training_norms import SHARED_ITERATIONS, TrainingNorms

# The global norms are taken for a batch of one. As a start for the masked norms a rough singular vector does: a
# convolution has it nearly for free, a dense layer reads its whole weight for it. As a value they want to be converged.
START_ITERATIONS = 8
DENSE_START_ITERATIONS = 5
GLOBAL_ITERATIONS = 30


@dataclass(eq=False)
class Fact:
    """What is known of one value.

    values: clean ones, followed by the box centres once there is a box, (2B, *): one convolution serves both.
    half_width: (B, *); None where the ball lies inside the box, as at the input, and behind the first operator.
    radius: (B,).   columns: bool (B, *), what can vary; None for all.   columns_left: (B,) how many those are.
    """

    values: Tensor
    half_width: Tensor | None
    radius: Tensor
    columns: Tensor | None
    columns_left: Tensor | None


def _unchanged(t: Tensor) -> Tensor:
    return t


class Estimate(Pass[Fact]):
    """Masked norms of ``iterations``, from the global singular vectors, or those of ``kept`` with the labels ``y``."""

    rounded = staticmethod(_unchanged)
    least_unmasked = GLOBAL_ITERATIONS

    def __init__(
        self,
        radius: str,
        iterations: int,
        kept: TrainingNorms | None = None,
        y: Tensor | None = None,
        *,
        window: float = 1,
    ) -> None:
        super().__init__(local=radius == "local", window=window)
        self.iterations, self.kept, self.y = iterations, kept, y
        self.starts: dict[int, Tensor] = {}  # right singular vectors of the chains without masks
        self.boxed_behind: set[Layer] = set()  # layers whose box a later one takes, or the margin

    def run(self, graph: Graph, x: Tensor, eps: Tensor) -> list[Fact]:
        taken = {term.source for term in graph.head.terms}  # numbers of facts; the input is 0
        for number, step in reversed(list(enumerate(graph.steps, 1))):
            if isinstance(step, Layer):
                taken.update(term.source for term in step.terms if all(map(self.boxed, step.terms)))
            elif number in taken:
                taken.update([step.source] if isinstance(step, View) else step.sources)
        self.boxed_behind = {s for number, s in enumerate(graph.steps, 1) if isinstance(s, Layer) and number in taken}
        return super().run(graph, x, eps)

    def makes_box(self, layer: Layer) -> bool:
        """Whether it leaves a box behind its activation: one without a kernel is computed of it."""
        return layer in self.boxed_behind or not layer.activation.kind

    def start(self, x: Tensor, eps: Tensor) -> Fact:
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return Fact(x.clone(memory_format=layout), None, eps, None, None)

    def viewed(self, step: View, fact: Fact) -> Fact:
        move = step.rearrangement
        columns = viewed_mask(step, fact.columns, len(fact.radius))
        left = fact.columns_left
        if not move.bijective:
            left = None if columns is None else flat(columns).sum(1)
        half_width = None if fact.half_width is None else move(fact.half_width)
        return Fact(move(fact.values), half_width, fact.radius, columns, left)

    def joined(self, step: Joined, facts: Sequence[Fact]) -> Fact:
        boxes = any(fact.half_width is not None for fact in facts)
        half_width = None
        if boxes:
            facts = [_with_box(fact) for fact in facts]
            half_width = torch.cat([fact.half_width for fact in facts if fact.half_width is not None], step.dim)
        values = torch.cat([fact.values for fact in facts], step.dim)
        columns = joined_mask(step, [fact.columns for fact in facts], [f.values[: len(f.radius)] for f in facts])
        left = None if columns is None else flat(columns).sum(1)
        return Fact(values, half_width, joined_radius([fact.radius for fact in facts], _unchanged), columns, left)

    def closed(self, layer: Layer, facts: Sequence[Fact]) -> Fact:
        if not all(self.boxed(term) for term in layer.terms):
            facts = [_without_box(fact) for fact in facts]
        if len(facts) > 1 and any(fact.half_width is not None for fact in facts):
            facts = [_with_box(fact) for fact in facts]
        values, half_width = None, None
        for term, fact in zip(layer.terms, facts, strict=True):
            bias = layer.bias if values is None else None
            own = affine(term.linear, fact.values, bias)
            values = own if values is None else values + own
            if fact.half_width is not None:
                spread = affine(term.linear.absolute(), fact.half_width, None)
                half_width = spread if half_width is None else half_width + spread
        assert values is not None
        activation = layer.activation
        squares, radius = self._ball(layer, facts)
        pattern = self.pattern(layer, values, half_width, squares, radius)
        values, rows, columns = (t.reshape(len(t), *layer.sizes) for t in (pattern[0], *pattern[2:4]))
        half_width = pattern[1].reshape(len(rows), *layer.sizes) if self.makes_box(layer) else None
        slack, varying = pattern[4:]
        if not activation.kind:
            assert half_width is not None
            clean, centre = values.chunk(2)
            low, high = centre - half_width, centre + half_width
            ends = (clean, clean) if isinstance(activation, Lipschitz) else (low, high)
            lower, upper = activation.interval(*ends)
            values = torch.cat([activation.function(clean), (lower + upper) / 2])
            half_width = (upper - lower) / 2
            found = activation.rows(low.detach(), high.detach())
            if found is not None:
                rows = found
            if half_width.shape != columns.shape:
                columns = torch.ones_like(half_width, dtype=torch.bool)
            varying = torch.stack([flat(rows).sum(1), flat(columns).sum(1)], 1)
        if not self.local and activation.kind == "clipped_maxmin":
            rows = torch.ones_like(rows)  # the paper removes none
            varying = torch.stack([torch.full_like(varying[:, 0], rows.shape[1:].numel()), varying[:, 1]], 1)
        norms, growth = [], []
        for term, fact in zip(layer.terms, facts, strict=True):
            norm, whole = self._norm(layer.path, term, fact, rows, varying[:, 0])
            norms.append(norm)
            growth.append(norm if whole is None else whole)
        inputs = [fact.columns for fact in facts]
        radius = self.radius(layer, [fact.radius for fact in facts], inputs, growth, rows)
        self.record(layer, inputs, norms, rows, columns, slack)
        if isinstance(activation, Lipschitz):
            clean = values[: len(radius)]
            half_width = radius.view(-1, *[1] * (clean.dim() - 1)).expand_as(clean)
            values = torch.cat([clean, clean])
        return Fact(values, half_width, radius, columns, varying[:, 1])

    def boxed(self, term: Term) -> bool:
        """Whether the box of its fact is carried through the term; a ball alone bounds the units without."""
        return self.kept is None or term.index < 0 or self.kept.boxed[term.index]

    def rows_masked(self, term: Term) -> bool:
        """Whether the norms of its rows are of the columns that vary; else they are of all, for all samples alike."""
        return self.kept is None or term.index < 0 or self.kept.rows_masked[term.index]

    def pattern(
        self, layer: Layer, values: Tensor, half_width: Tensor | None, squares: Tensor, radius: Tensor
    ) -> tuple[Tensor, ...]:
        """:func:`locallip_cuda.ops.activation_pattern` of the layer."""
        activation = layer.activation
        return ops.activation_pattern(
            planar_values(values),
            None if half_width is None else planar_values(half_width),
            planar_values(squares),
            radius,
            activation.kind or "identity",
            None if activation.first is None else planar_values(activation.first),
            None if activation.second is None else planar_values(activation.second),
            self.makes_box(layer),
        )

    def unmasked_norms(self, layer: Layer, norms: Sequence[Tensor | None], own: Sequence[Chain]) -> list[Tensor | None]:
        [term] = layer.terms
        whole: list[Tensor | None] = [None]
        if not isinstance(term.linear, Identity):
            shared = self.kept is not None and self.kept.shared[term.index]
            whole = [norms[0] if shared else self._unmasked(layer, term.index, term.linear)]
        return [*whole, *(self._unmasked(layer, chain.index, chain.linear(folded_map, None)) for chain in own)]

    def _unmasked(self, layer: Layer, index: int, linear: LinearMap) -> Tensor:
        if self.kept is not None:
            norm = self.kept.unmasked_norm(index, linear, alone=self.kept.shared[index] or not self.masked)
        else:
            iterations = max(self.iterations, self.least_unmasked)
            norm, self.starts[index], _ = iterated_norm(linear, None, None, 1, None, iterations)
        check_norm(layer.path, norm)
        return norm

    def chain_norm(self, chain: Chain) -> Tensor | None:
        rows, columns = self.rows[chain.last], self.inputs[chain.first]
        linear = chain.linear(folded_map, self.rows)
        norm: Tensor | None
        if self.kept is not None and self.y is not None:
            norm = self.kept.chain_norm(chain.index, linear, rows, columns, self.y)
        else:
            if chain.index not in self.starts:
                with torch.no_grad():
                    whole = chain.linear(folded_map, None)
                    self.starts[chain.index] = iterated_norm(whole, None, None, 1, None, START_ITERATIONS)[1]
            start = self.starts[chain.index]
            norm = iterated_norm(linear, rows, columns, len(rows), start, self.iterations)[0]
        if norm is not None:
            check_norm(chain.last.path, norm)
        return norm

    def _ball(self, layer: Layer, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
        """(squared row norms, radius) of the ball around the clean values: of several terms, that of the sum."""
        squares = [self.squared_row_norms(t, fact) for t, fact in zip(layer.terms, facts, strict=True)]
        if len(facts) == 1:
            return squares[0], facts[0].radius
        total: Tensor | None = None
        for square, fact in zip(squares, facts, strict=True):
            reach = fact.radius.view(-1, *[1] * len(layer.sizes)) * _root(square)
            total = reach if total is None else total + reach
        assert total is not None
        return total.square(), torch.ones_like(facts[0].radius)

    def squared_row_norms(self, term: Term, fact: Fact) -> Tensor:
        """``||A_i * columns||^2`` of every row i: (B or 1, *output).

        Not ``local`` is the paper's: all columns, and for a convolution the whole kernel, at the padded border too.
        """
        like, linear, sizes = fact.values, term.linear, term.linear.input_sizes
        if isinstance(linear, Identity):
            return like.new_ones(1, *sizes) if fact.columns is None else fact.columns.to(like.dtype)
        squared = linear.squared()
        if not self.local and isinstance(squared, Convolution):
            of_channel = squared.weight.flatten(1).sum(1).view(1, -1, *[1] * (len(sizes) - 1))
            return of_channel.expand(1, *linear.output_sizes)
        if not self.local or fact.columns is None or not self.rows_masked(term):
            return affine(squared, like.new_ones(1, *sizes), None)
        return affine(squared, fact.columns.to(like.dtype), None)

    def _norm(
        self, path: str, term: Term, fact: Fact, rows: Tensor, rows_left: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B,) masked norms, and in the paper's mode the global ones, which its radius grows by; None for 1."""
        linear = term.linear
        if isinstance(linear, Identity):
            return None, None
        batch, units = len(fact.radius), math.prod(linear.output_sizes)
        everything = rows_left == units
        if fact.columns_left is not None:
            everything = everything & (fact.columns_left == math.prod(linear.input_sizes))
        whole: Tensor | None = None
        start: Tensor | None = None
        if not self.local:
            whole, start, _ = iterated_norm(linear, None, None, 1, None, max(self.iterations, GLOBAL_ITERATIONS))
        if self.kept is not None and self.y is not None:
            norm = self.kept.norm(term.index, linear, rows, fact.columns, self.y)
        else:
            norm = self._fresh_norm(linear, rows, fact.columns, batch, everything, whole, start)
        check_norm(path, norm)
        return norm, whole

    def _fresh_norm(
        self,
        linear: LinearMap,
        rows: Tensor,
        columns: Tensor | None,
        batch: int,
        everything: Tensor,
        whole: Tensor | None,
        start: Tensor | None,
    ) -> Tensor:
        """From the global singular vector; the samples that lose nothing have the global norm, ``whole``."""
        if whole is None and (not values_are_at_hand(everything) or bool(everything.any())):
            whole, start, _ = iterated_norm(linear, None, None, 1, None, max(self.iterations, SHARED_ITERATIONS))
        elif whole is None:
            with torch.no_grad():
                steps = DENSE_START_ITERATIONS if isinstance(linear, Dense) else START_ITERATIONS
                start = iterated_norm(linear, None, None, 1, None, steps)[1]
        if whole is None or not values_are_at_hand(everything):
            norm = iterated_norm(linear, rows, columns, batch, start, self.iterations)[0]
            return norm if whole is None else torch.where(everything, whole, norm)
        rest = (~everything).nonzero()[:, 0]
        norm = whole.expand(batch)
        if not len(rest):
            return norm
        columns = None if columns is None else columns[rest]
        masked = iterated_norm(linear, rows[rest], columns, len(rest), start, self.iterations)[0]
        return norm.index_copy(0, rest, masked)


class Look(Estimate):
    """A pass that takes every box, and the norms of rows of what varies, and sees what either of them is worth.

    narrowed: by number of an operator, share of the units that the ball lets vary whose interval the box narrows.
    shares: norms of rows by those with all columns, on average.
    """

    def __init__(self, radius: str, kept: TrainingNorms, y: Tensor) -> None:
        super().__init__(radius, 0, kept, y)
        self.narrowed: dict[int, float] = {}
        self.shares: dict[int, float] = {}

    def boxed(self, term: Term) -> bool:
        return True

    def rows_masked(self, term: Term) -> bool:
        return True

    def pattern(
        self, layer: Layer, values: Tensor, half_width: Tensor | None, squares: Tensor, radius: Tensor
    ) -> tuple[Tensor, ...]:
        if half_width is not None:
            clean, centre = values.chunk(2)
            reach = radius.view(-1, *[1] * len(layer.sizes)) * _root(squares)
            narrower = (centre - half_width > clean - reach) | (centre + half_width < clean + reach)
            varying = super().pattern(layer, clean, None, squares, radius)[2].reshape(clean.shape)
            share = float((narrower & varying).sum() / varying.sum().clamp_min(1))
            self.narrowed.update((term.index, share) for term in layer.terms)
        return super().pattern(layer, values, half_width, squares, radius)

    def squared_row_norms(self, term: Term, fact: Fact) -> Tensor:
        squares = super().squared_row_norms(term, fact)
        if fact.columns is not None:
            everything = Fact(fact.values, None, fact.radius, None, None)
            whole = super().squared_row_norms(term, everything)
            self.shares[term.index] = float((_root(squares) / _root(whole)).mean())
        return squares


class Global(Estimate):
    """The plain global bound: norms without masks, a ball, and no box."""

    masked, least_unmasked = False, 0

    def __init__(self, iterations: int, kept: TrainingNorms | None = None, *, window: float = 1) -> None:
        super().__init__("local", iterations, kept, window=window)

    def closed(self, layer: Layer, facts: Sequence[Fact]) -> Fact:
        value, norms = None, []
        for term, fact in zip(layer.terms, facts, strict=True):
            own = affine(term.linear, fact.values, layer.bias if value is None else None)
            value = own if value is None else value + own
            norms.append(self._global_norm(layer.path, term, len(fact.radius)))
        assert value is not None
        out = layer.activation.function(value)
        rows, columns = (torch.ones_like(t, dtype=torch.bool) for t in (value, out))
        nothing: list[Tensor | None] = [None] * len(facts)
        radius = self.radius(layer, [fact.radius for fact in facts], nothing, norms, rows)
        self.record(layer, nothing, norms, rows, columns, None)
        return Fact(out, None, radius, None, None)

    def unmasked_norms(self, layer: Layer, norms: Sequence[Tensor | None], own: Sequence[Chain]) -> list[Tensor | None]:
        return []  # they all are

    def chain_norm(self, chain: Chain) -> Tensor:
        norm = self._unmasked(chain.last, chain.index, chain.linear(folded_map, None))
        return norm.expand(len(self.rows[chain.last]))

    def _global_norm(self, path: str, term: Term, batch: int) -> Tensor | None:
        if isinstance(term.linear, Identity):
            return None
        if self.kept is not None:
            norm = self.kept.shared_norm(term.index, term.linear)
        else:
            norm = iterated_norm(term.linear, None, None, 1, None, self.iterations)[0]
        check_norm(path, norm)
        return norm.expand(batch)


def box_of(fact: Fact) -> tuple[Tensor, Tensor, Tensor]:
    """Clean values, and centre and half-width of the box."""
    batch = len(fact.radius)
    half_width = fact.half_width
    if half_width is None:
        half_width = fact.radius.view(-1, *[1] * (fact.values.dim() - 1))
    return fact.values[:batch], fact.values[len(fact.values) - batch :], half_width


def _with_box(fact: Fact) -> Fact:
    if fact.half_width is not None:
        return fact
    wide = fact.radius.view(-1, *[1] * (fact.values.dim() - 1)).expand_as(fact.values)
    return Fact(torch.cat([fact.values, fact.values]), wide, fact.radius, fact.columns, fact.columns_left)


def _without_box(fact: Fact) -> Fact:
    if fact.half_width is None:
        return fact
    return Fact(fact.values[: len(fact.radius)], None, fact.radius, fact.columns, fact.columns_left)


def planar_values(values: Tensor) -> Tensor:
    """Values over one or three dimensions as images, which the op takes."""
    if values.dim() == 1:
        return values.unsqueeze(1)
    if values.dim() == 3:
        return values.unsqueeze(2)
    return values.flatten(2, 3) if values.dim() == 5 else values


def _root(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # at 0 it has no gradient


def affine(linear: LinearMap, x: Tensor, bias: Tensor | None) -> Tensor:
    """A x + bias, by the ops where A is one kernel, or a kernel behind what moves numbers."""
    if isinstance(linear, (Dense, Convolution)):
        weight, inner, outer, geometry = linear.planar()
        own = _by_channel(bias, weight, linear)
        laid_out = x if list(x.shape[1:]) == inner else x.reshape(len(x), *inner)
        result = ops.affine(laid_out, weight, own, *geometry)
        result = result if linear.output_sizes == outer else result.reshape(len(x), *linear.output_sizes)
        return result if bias is None or own is not None else result + bias
    if isinstance(linear, Composed):
        for part in linear.maps[:-1]:
            x = affine(part, x, None)
        return affine(linear.maps[-1], x, bias)
    with without_autocast(x.device.type):
        return linear(x) if bias is None else linear(x) + bias


def _by_channel(bias: Tensor | None, weight: Tensor, linear: LinearMap) -> Tensor | None:
    """(m,) a bias that the op can take; None of another."""
    channels = linear.output_sizes[0]
    if bias is None or bias.numel() != channels or len(weight) != channels:
        return None
    if bias.dim() > 1 and list(bias.shape) != [1, channels, *[1] * (len(linear.output_sizes) - 1)]:
        return None
    if bias.dim() == 1 and len(linear.output_sizes) > 1:
        return None
    return bias.reshape(-1)
