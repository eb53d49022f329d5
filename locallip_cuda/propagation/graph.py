"""A model as the bounds see it: layers of linear maps and an activation, lowered from what ``model(x)`` runs.

A value of the network is known as a *fact* once it is the input, or what an activation returns; everything between is
affine in facts, a list of terms (fact, linear map) and a bias. Affine functions map every term, a sum of two values
joins their lists, and terms on the same fact become one map. An activation closes the list: that is a layer.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..norms.linear import (
    Composed,
    Identity,
    LinearMap,
    Rearrangement,
    Reshape,
    Scaling,
    added,
    composed,
    folded,
    is_of_even_size,
)
from .rules import IDENTITY, RULES, Activation, Affine, Lipschitz, MaxPool, Site, module_classes, rearranged
from .trace import Forward, Node, Trace, UntraceableError, at, with_constants, without_autocast


class UnsupportedModuleError(TypeError):
    """Something in the network has no bound here; the message names the module's path and what is wanted."""


@dataclass(eq=False)
class Term:
    """What one fact has in an affine value.

    source: the number of the fact. parts: the map as it is written in the network; linear: the same, folded.
    path: of the last module that did more than move numbers.   index: the number of its norm, -1 for none.
    """

    source: int
    parts: LinearMap
    path: str
    linear: LinearMap
    index: int = -1


@dataclass(eq=False)
class Layer:
    """An affine value that is closed by an activation, or by none, which is ``IDENTITY``.

    path: of its first term.   bias: what broadcasts to (1, *sizes), or None; in a graph for proofs it is off by
    gamma(bias_terms) bias_size, at most, and ``bias_most`` is its largest size behind any of the terms' maps.
    sizes: of one sample before the activation.
    """

    path: str
    terms: list[Term]
    bias: Tensor | None
    bias_size: Tensor | None
    bias_terms: int
    bias_most: float
    activation: Activation
    activation_path: str
    sizes: list[int]


@dataclass(eq=False)
class View:
    """A fact with its numbers elsewhere, some of them left out, or zeros between them."""

    source: int
    rearrangement: Rearrangement


@dataclass(eq=False)
class Joined:
    """Facts one behind the other along a dimension, the batch's being 0."""

    sources: list[int]
    dim: int


@dataclass(eq=False)
class Graph:
    """Fact 0 is the input, and the i-th of ``steps`` makes fact i + 1. head: what the model returns, not closed."""

    steps: list[Layer | View | Joined]
    head: Layer
    sizes: list[int]

    @property
    def layers(self) -> list[Layer]:
        return [step for step in self.steps if isinstance(step, Layer)]

    @property
    def operators(self) -> list[Term]:
        """The terms of layers with a norm, in the order of their numbers."""
        return [term for layer in self.layers for term in layer.terms if term.index >= 0]

    @property
    def is_chain(self) -> bool:
        """Whether the radius is that of the input times the norms, one after another."""
        return len(self.head.terms) == 1 and all(
            isinstance(step, View)
            or (isinstance(step, Layer) and len(step.terms) == 1 and step.activation.lipschitz == 1)
            for step in self.steps
        )


def closed_reach(
    layer: Layer, radii: Sequence[Tensor], norms: Sequence[Tensor | None], rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """How far the pre-activations of a layer move: the sum of its facts' radii times the norms (None: 1)."""
    total: Tensor | None = None
    for radius, norm in zip(radii, norms, strict=True):
        own = radius if norm is None else rounded(radius * norm)
        total = own if total is None else rounded(total + own)
    assert total is not None
    return total


def closed_radius(layer: Layer, reach: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Behind a layer: how far its pre-activations move, times its activation's constant."""
    constant = layer.activation.lipschitz
    return reach if constant == 1 else rounded(reach * constant)


def joined_radius(radii: Sequence[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Of facts together: the root of the sum of squares."""
    largest = torch.stack([radius.detach() for radius in radii]).amax(0)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)  # squares neither overflow nor vanish
    total: Tensor | None = None
    for radius in radii:
        square = rounded(rounded(radius / scale).square())
        total = square if total is None else rounded(total + square)
    assert total is not None
    tiny = torch.finfo(total.dtype).tiny  # where the root has no gradient
    return rounded(rounded(total.clamp_min(tiny).sqrt()) * scale)


@dataclass
class _Value:
    """A value of the network while it is affine in facts."""

    terms: list[Term]
    bias: Tensor | None
    bias_size: Tensor | None
    bias_terms: int
    sizes: list[int]
    path: str
    bias_most: float = 0.0


# Added to the sizes of biases, so that what they are off by is above what underflow may do to a sum of products.
NO_UNDERFLOW = 2.0**-900

# Functions whose results are parts of the value, one behind the other.
_PARTS = {
    *(Tensor.split, torch.split, Tensor.chunk, torch.chunk, Tensor.unbind, torch.unbind, torch.functional.split),
    *(Tensor.tensor_split, torch.tensor_split, Tensor.hsplit, torch.hsplit, Tensor.vsplit, torch.vsplit),
    *(Tensor.dsplit, torch.dsplit, Tensor.split_with_sizes, torch.split_with_sizes),
}

# What a rule may raise where the arguments are none that it knows.
_RULE_ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError)

_JOIN = {torch.cat, torch.concat, torch.concatenate}
_SUMS = {Tensor.add: 1, torch.add: 1, Tensor.__add__: 1, Tensor.__radd__: 1}
_COMMUTE = {*_SUMS, Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply, torch.multiply}
_SUMS |= {Tensor.sub: -1, torch.sub: -1, Tensor.__sub__: -1, Tensor.subtract: -1, torch.subtract: -1}


def lowered(trace: Trace, dtype: torch.dtype, *, proof: bool = False) -> Graph:
    """The graph of what ``trace`` recorded, with all its constants in ``dtype``; ``proof``: with sizes of its biases.

    UnsupportedModuleError by path for a function without a rule.
    """
    with without_autocast(trace.device.type):
        return _Lowering(trace, dtype, proof).graph


class _Lowering:
    def __init__(self, trace: Trace, dtype: torch.dtype, proof: bool) -> None:
        self.proof, self.dtype, self.batch = proof, trace.input.dtype, trace.input.shape[:1]
        self.like = torch.empty(0, dtype=dtype, device=trace.device)
        self.steps: list[Layer | View | Joined] = []
        self.views: dict[tuple[int, int], int] = {}
        self.norms = 0
        sizes = list(trace.input.shape[1:])
        self.values: dict[int, _Value] = {id(trace.input): self._bare(0, sizes, "")}
        self.readers: dict[int, int] = {}
        for node in trace.nodes:
            for read in node.reads():
                self.readers[id(read)] = self.readers.get(id(read), 0) + 1
        self.readers[id(trace.output)] = self.readers.get(id(trace.output), 0) + 1
        of_several = {id(node.args[0]) for node in trace.nodes if node.function is None}
        for node in trace.nodes:
            if id(node) not in of_several:
                self.values[id(node)] = self._kept(node, self._value(node))
        out = self.values[id(trace.output)]
        self.graph = Graph(self.steps, self._layer(out, IDENTITY, out.path, head=True), sizes)

    def _bare(self, source: int, sizes: list[int], path: str) -> _Value:
        identity = Identity(sizes, self.like)
        return _Value([Term(source, identity, path, identity)], None, None, 0, sizes, path)

    def _kept(self, node: Node, value: _Value) -> _Value:
        """``value``; closed, where several functions read it and it is more than numbers moved and scaled."""
        if self.readers[id(node)] < 2 or (len(value.terms) == 1 and _is_cheap(value.terms[0].parts)):
            return value
        return self._closed(value, IDENTITY, value.path, value.sizes)

    def _closed(self, value: _Value, activation: Activation, path: str, output_sizes: list[int]) -> _Value:
        if not value.sizes and activation is not IDENTITY:
            raise UnsupportedModuleError(f"{at(path)}: an activation of one number (B,) has no bound, want (B, 1)")
        self.steps.append(self._layer(value, activation, path))
        return self._bare(len(self.steps), output_sizes, path)

    def _layer(self, value: _Value, activation: Activation, activation_path: str, *, head: bool = False) -> Layer:
        terms = []
        for term in value.terms:
            source, parts = term.source, term.parts
            maps = parts.maps if isinstance(parts, Composed) else [parts]
            while maps and isinstance(maps[0], Rearrangement) and maps[0].injective:
                source, maps = self._view(source, maps[0]), maps[1:]
            if not maps:
                parts = Identity(value.sizes, self.like)
            elif len(maps) < len(getattr(parts, "maps", [parts])):
                parts = Composed(maps) if len(maps) > 1 else maps[0]
            closed = Term(source, parts, term.path, folded(parts))
            if not head and not isinstance(closed.linear, Identity):
                closed.index, self.norms = self.norms, self.norms + 1
            terms.append(closed)
        weighted = [term.path for term in terms if not isinstance(term.linear, Identity)]
        path = weighted[0] if weighted else activation_path
        bias = (value.bias, value.bias_size, value.bias_terms, value.bias_most)
        return Layer(path, terms, *bias, activation, activation_path, value.sizes)

    def _view(self, source: int, rearrangement: Rearrangement) -> int:
        key = source, id(rearrangement)
        if key not in self.views:
            self.steps.append(View(source, rearrangement))
            self.views[key] = len(self.steps)
        return self.views[key]

    def _value(self, node: Node) -> _Value:
        args, kwargs = node.args, node.kwargs
        if node.dtype != self.dtype or node.shape[:1] != self.batch or 0 in node.shape[1:]:
            name = _name(node.args[0].function if node.function is None else node.function)
            raise UnsupportedModuleError(
                f"{at(node.path)}: {name} makes {tuple(node.shape)} in {node.dtype} of a batch of "
                f"{self.batch[0]} in {self.dtype}, which has no bound; want values of that batch and type"
            )
        if node.function is None:
            of, i = args
            function, (first, *rest), kwargs = of.function, of.args, of.kwargs
            if not isinstance(first, Node) or of.reads() != [first]:
                raise self._unsupported(node, of)
            value = self.values[id(first)]
            if function in RULES and i == 0:  # of a pool that returns indices too
                return self._by_rule(node, function, value, tuple(rest), kwargs)
            if function not in _PARTS:
                raise self._unsupported(node, of)
            try:
                key = () if any(isinstance(each, Tensor) for each in rest) else (function, rest, kwargs, i)
                chosen = rearranged(self._site(value, node), lambda x: function(x, *rest, **kwargs)[i], *key)
            except _RULE_ERRORS as error:
                raise self._unsupported(node, of) from error
            return self._mapped(value, chosen, node)
        read = node.reads()
        if isinstance(node.function, Forward):
            module, _, *more = args
            return self._by_rule(node, node.function.kind, self.values[id(read[0])], tuple(more), kwargs, module)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        if len(args) == 1 and "other" in kwargs:
            args, kwargs = (*args, kwargs["other"]), {k: v for k, v in kwargs.items() if k != "other"}
        if node.function in _JOIN or node.function is torch.stack:
            return self._join(node, *args, **kwargs)
        if len(read) == 2 and node.function in _SUMS and isinstance(args[0], Node) and isinstance(args[1], Node):
            return self._sum(node, *args, **kwargs)
        if len(read) == 1 and not isinstance(args[0], Node) and len(args) > 1 and args[1] is read[0]:
            if node.function in _COMMUTE and not kwargs:
                args = (args[1], args[0])
            elif _SUMS.get(node.function) == -1 and not kwargs:
                node = Node(torch.rsub, (args[1], args[0]), kwargs, node.path, node.shape, node.dtype)
                args = node.args
        if len(read) != 1 or args[0] is not read[0] or node.function not in RULES:
            raise self._unsupported(node, node)
        return self._by_rule(node, node.function, self.values[id(read[0])], args[1:], kwargs)

    def _by_rule(
        self,
        node: Node,
        function: Callable[..., Any],
        value: _Value,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: nn.Module | None = None,
    ) -> _Value:
        for constant in node.tensors():
            if constant.device != self.like.device and constant.dim():
                raise ValueError(f"x: got one on {self.like.device}, want {constant.device} as {at(node.path)}")
        args, kwargs = (with_constants(given, self._constant) for given in (args, kwargs))
        try:
            found = RULES[function](self._site(value, node), self._constants_of(module), *args, **kwargs)
        except _RULE_ERRORS as error:
            raise UnsupportedModuleError(f"{at(node.path)}: {_name(function)} has no bound: {error}") from error
        sizes = list(node.shape[1:])
        if isinstance(found, Affine):
            made = found.linear.output_sizes
        else:
            made = sizes if isinstance(found, (MaxPool, Lipschitz)) else value.sizes
        if made != sizes:
            raise UnsupportedModuleError(
                f"{at(node.path)}: {_name(function)} has no bound: its rule makes {tuple(made)} of "
                f"{tuple(value.sizes)}, and it makes {tuple(sizes)}"
            )
        if isinstance(found, Affine):
            return self._mapped(value, found, node)
        return self._closed(value, found, node.path, sizes)

    def _constant(self, tensor: Tensor) -> Tensor:
        """Of a proof a copy, which stays as it is."""
        return tensor.detach().to(self.like.dtype, copy=True) if self.proof else tensor.to(self.like.dtype)

    def _constants_of(self, module: nn.Module | None) -> nn.Module | None:
        """The module that a rule reads its weights from: of a proof a copy in its dtype."""
        return copy.deepcopy(module).to(self.like.dtype) if self.proof and module is not None else module

    def _site(self, value: _Value, node: Node) -> Site:
        return Site(value.sizes, list(node.shape[1:]), self.like, self.proof)

    def _mapped(self, value: _Value, affine: Affine, node: Node) -> _Value:
        linear, sizes = affine.linear, affine.linear.output_sizes
        if self.proof and not self._stays_in_range(value, linear):
            value = self._closed(value, IDENTITY, value.path, value.sizes)
        moves = isinstance(linear, (Rearrangement, Identity))
        terms = [
            Term(t.source, parts := composed(t.parts, linear), t.path if moves else node.path, parts)
            for t in value.terms
        ]
        bias, size = affine.bias, None
        if self.proof and bias is not None:
            size = (bias if affine.bias_size is None else affine.bias_size).abs()
        if value.bias is not None:
            carried = linear(value.bias.expand(1, *value.sizes))
            bias = carried if bias is None else carried + bias
        if value.bias_size is not None:
            carried = linear.absolute()((value.bias_size + NO_UNDERFLOW).expand(1, *value.sizes))
            size = carried if size is None else carried + size
        count = value.bias_terms + linear.terms + linear.roundings + 8
        most = value.bias_most if size is None else max(value.bias_most, float(size.max()))
        return _Value(terms, bias, size, count, sizes, value.path if moves else node.path, most)

    def _stays_in_range(self, value: _Value, linear: LinearMap) -> bool:
        """Whether nothing overflows or underflows in the one map, and in the bias, that ``linear`` makes of ``value``.

        A single map without a bias in front of it may have weights of any size.
        """
        if not linear.weights() or (value.bias is None and not any(term.parts.weights() for term in value.terms)):
            return True
        return all(is_of_even_size(composed(term.parts, linear)) for term in value.terms)

    def _sum(self, node: Node, first: Node, second: Node, *, alpha: float = 1) -> _Value:
        alpha = alpha * _SUMS[node.function]  # type: ignore[index]
        sizes = list(node.shape[1:])
        one, other = (self._broadcast(self.values[id(each)], sizes, node) for each in (first, second))
        if alpha != 1:
            factor = torch.full((1,), float(alpha), dtype=self.like.dtype, device=self.like.device)
            other = self._mapped(other, Affine(Scaling(factor, sizes)), node)
        terms = list(one.terms)
        for term in other.terms:
            for i, own in enumerate(terms):
                if own.source == term.source:
                    parts = added(own.parts, term.parts)
                    path = own.path if isinstance(term.parts, Identity) else term.path
                    terms[i] = Term(own.source, parts, path, parts)
                    break
            else:
                terms.append(term)
        bias, size = one.bias, one.bias_size
        bias, size = _plus(bias, other.bias), _plus(size, other.bias_size)
        count, most = one.bias_terms + other.bias_terms + 1, one.bias_most + other.bias_most
        return _Value(terms, bias, size, count, sizes, node.path, most)

    def _broadcast(self, value: _Value, sizes: list[int], node: Node) -> _Value:
        if value.sizes == sizes:
            return value
        if len(value.sizes) != len(sizes):
            raise UnsupportedModuleError(
                f"{at(node.path)}: a sum of values of {tuple(value.sizes)} and {tuple(sizes)} has no bound, want as "
                "many dimensions"
            )
        wide = rearranged(self._site(value, node), lambda x: x.expand(len(x), *sizes), Tensor.expand, sizes)
        return self._mapped(value, wide, node)

    def _join(self, node: Node, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> _Value:
        dim = (dim if axis is None else axis) % len(node.shape)
        if dim == 0 or not all(isinstance(each, Node) for each in tensors):
            what = "the batch" if dim == 0 else "constants"
            raise UnsupportedModuleError(f"{at(node.path)}: {_name(node.function)} along {what} has no bound")
        values = [self.values[id(each)] for each in tensors]
        if node.function is torch.stack:
            sizes = [*values[0].sizes[: dim - 1], 1, *values[0].sizes[dim - 1 :]]
            values = [self._mapped(value, Affine(Reshape(value.sizes, sizes, self.like)), node) for value in values]
        if len(values) == 1:
            return values[0]
        sources = {term.source for value in values for term in value.terms}
        if len(sources) == 1:
            return self._stacked(values, dim, node)
        facts = []
        for value in values:
            (first, *more), bare = value.terms, value.bias is None
            if more or not bare or not isinstance(first.parts, Identity):
                first = self._closed(value, IDENTITY, value.path, value.sizes).terms[0]
            facts.append(first.source)
        self.steps.append(Joined(facts, dim))
        return self._bare(len(self.steps), list(node.shape[1:]), node.path)

    def _stacked(self, values: list[_Value], dim: int, node: Node) -> _Value:
        """Values of the same fact one behind the other, as a sum of values among zeros."""
        lengths = [value.sizes[dim - 1] for value in values]
        before, total = 0, None
        for value, length in zip(values, lengths, strict=True):
            around = [0] * (2 * (len(value.sizes) - dim)) + [before, sum(lengths) - before - length]
            pad = partial(nn.functional.pad, pad=around)
            wide = rearranged(self._site(value, node), pad, nn.functional.pad, around)
            own, before = self._mapped(value, wide, node), before + length
            if total is None:
                total = own
                continue
            parts = added(total.terms[0].parts, own.terms[0].parts)
            total.terms = [Term(total.terms[0].source, parts, own.terms[0].path, parts)]
            total.bias, total.bias_size = _plus(total.bias, own.bias), _plus(total.bias_size, own.bias_size)
            total.bias_terms = max(total.bias_terms, own.bias_terms) + 1
            total.bias_most = max(total.bias_most, own.bias_most)
        assert total is not None
        return total

    def _unsupported(self, node: Node, of: Node) -> UnsupportedModuleError:
        name = _name(of.function)
        takes = len(of.reads())
        of_two = f" of {takes} values" if takes > 1 else ""
        known = "; want other functions, or a rule for this one (ll.rule)"
        return UnsupportedModuleError(f"{at(node.path)}: {name}{of_two} has no bound{known}")


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _is_cheap(linear: LinearMap) -> bool:
    parts = linear.maps if isinstance(linear, Composed) else [linear]
    return all(isinstance(part, (Identity, Scaling, Rearrangement)) for part in parts)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", None)
    if name == "fn":  # how torch's functions with return_indices are made
        return next((key for key, value in vars(nn.functional).items() if value is function), "a function")
    return name or repr(function)


# For torch.compile, which can go through a trace, but not make one: of each model and size of a sample the last one,
# as long as the model lives.
_at_hand: dict[tuple[int, tuple[int, ...]], Trace] = {}


def _keep(model: nn.Module, x: Tensor, trace: Trace) -> None:
    """The same object as long as the same is run: torch.compile asks for it."""
    key = id(model), tuple(x.shape[1:])
    known = _at_hand.get(key)
    if known is None or not known.runs_the_same(trace):
        if known is None:
            weakref.finalize(model, _at_hand.pop, key, None)
        _at_hand[key] = trace


def _kept_trace(model: nn.Module, x: Tensor) -> Trace:
    trace = _at_hand.get((id(model), tuple(x.shape[1:])))
    if trace is None:
        raise RuntimeError(
            "model: got one that torch.compile meets first, want one call of local_bounds without it before, with a "
            "sample of this size, from which it takes what the model runs"
        )
    return trace


def traced(model: nn.Module, x: Tensor) -> Trace:
    """What ``model(x)`` runs. UnsupportedModuleError where that cannot be recorded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    if torch.compiler.is_compiling():
        return _kept_trace(model, x)
    try:
        trace = Trace(model, x, module_classes())
        _keep(model, x, trace)
        return trace
    except UntraceableError as error:
        raise UnsupportedModuleError(f"{error}; it has no bound") from error
    except (RuntimeError, TypeError, IndexError) as error:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedModuleError(
                    f"{at(path)}: TorchScript has no bound, want the module it is of"
                ) from error
        where = getattr(error, "__notes__", None)
        if where is None:
            raise
        got = f"shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
        raise ValueError(f"x: got {got}, which model does not take; {where[0]}: {error}") from error


def output_classes(trace: Trace) -> int:
    """K of a model that returns (B, K). UnsupportedModuleError."""
    shape = trace.output.shape
    if len(shape) != 2 or shape[0] != trace.input.shape[0] or math.prod(shape[1:]) == 0:
        got = ", ".join(map(str, shape[1:]))
        raise UnsupportedModuleError(f"model: returns shape (B, {got}), want (B, K), a logit for each class")
    return shape[1]
