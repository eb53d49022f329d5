"""The one pass over a graph: what a step does to facts, whatever arithmetic the facts are in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..norms.linear import LinearMap
from ..norms.masked_norm import values_are_at_hand
from .composition import Chain, Closing, Norms, chains, closing_of, linked
from .graph import Graph, Joined, Layer, View, closed_radius
from .trace import at

Fact = TypeVar("Fact")


@dataclass(eq=False)
class ChainBound:
    """The norm of maps in a row that end in a layer, with the layers' row masks between them; B samples.

    Attributes:
        path: of the last map's module.   linear: the maps, as they were, without gradients.
        norm: (B,), or (1,) of maps without masks; None where none was taken and those without masks stand for it
            (:class:`locallip_cuda.TrainingNorms`).
        row_mask: bool (B, *output), pre-activations that can still change the layer's output; None for all.
        input_mask: bool (B, *input), inputs of the first map that can vary; None for all.
        index: its number among the norms of a network.   parts: those of its maps; -1 of one that has none.
    """

    path: str
    linear: LinearMap
    norm: Tensor | None
    row_mask: Tensor | None
    input_mask: Tensor | None
    index: int
    parts: tuple[int, ...]


@dataclass(eq=False)
class LayerBound(ChainBound):
    """One masked norm of a pass: of one term of a layer, B samples.

    Attributes:
        column_mask: bool (B, *), outputs of the layer that can vary inside the ball.
    """

    norm: Tensor
    row_mask: Tensor
    column_mask: Tensor


class Pass(ABC, Generic[Fact]):
    """Facts from the input to the last layer's, and a record of every norm.

    local: whether the radius grows by masked norms; else by global ones, as in the paper.
    window: how many maps in a row are composed before a norm is taken, at most.
    masked: whether rows and columns go before norms are taken.
    """

    masked = True
    rounded: Callable[[Tensor], Tensor]

    def __init__(self, *, local: bool, window: float = 1) -> None:
        self.local, self.window = local, window
        self.layers: list[LayerBound] = []
        self.composed: list[ChainBound] = []
        self.unmasked: list[ChainBound] = []
        self.sparsity_terms: list[Tensor] = []
        self.chains: dict[Layer, list[Chain]] = {}
        self.linked: set[Layer] = set()
        # of every layer that was closed
        self.rows: dict[Layer, Tensor] = {}
        self.inputs: dict[Layer, Tensor | None] = {}
        self.closings: dict[Layer, Closing] = {}
        self.norms: dict[Layer, Norms] = {}
        self.snapshots: dict[Layer, LinearMap] = {}

    def run(self, graph: Graph, x: Tensor, eps: Tensor) -> list[Fact]:
        """What is known of the facts of the graph's head."""
        self.chains, self.linked = chains(graph, self.window), linked(graph, self.window)
        facts = [self.start(x, eps)]
        for step in graph.steps:
            if isinstance(step, View):
                facts.append(self.viewed(step, facts[step.source]))
            elif isinstance(step, Joined):
                facts.append(self.joined(step, [facts[source] for source in step.sources]))
            else:
                facts.append(self.closed(step, [facts[term.source] for term in step.terms]))
        return [facts[term.source] for term in graph.head.terms]

    @abstractmethod
    def start(self, x: Tensor, eps: Tensor) -> Fact:
        """Of the input (B, *), anywhere within ``eps`` (B,)."""

    @abstractmethod
    def viewed(self, step: View, fact: Fact) -> Fact: ...

    @abstractmethod
    def joined(self, step: Joined, facts: Sequence[Fact]) -> Fact: ...

    @abstractmethod
    def closed(self, layer: Layer, facts: Sequence[Fact]) -> Fact:
        """Behind a layer whose terms take ``facts``."""

    def chain_norm(self, chain: Chain) -> Tensor | None:
        """(B,) of a chain whose layers' rows and inputs are known; None where the one without masks does."""
        raise NotImplementedError

    def unmasked_norms(self, layer: Layer, norms: Sequence[Tensor | None], own: Sequence[Chain]) -> list[Tensor | None]:
        """(1,), or (B,) all alike, without masks: of a layer's map (None: 1), whose masked norm is the first of
        ``norms``, and of the chains that end in it. None at all where those of the pass have no masks."""
        raise NotImplementedError

    def radius(
        self,
        layer: Layer,
        radii: Sequence[Tensor],
        inputs: Sequence[Tensor | None],
        norms: Sequence[Tensor | None],
        rows: Tensor,
    ) -> Tensor:
        """(B,) behind a layer, of its facts' radii and column masks, its terms' norms (None: 1) and its row mask."""
        self.rows[layer], self.inputs[layer] = rows, inputs[0]
        own, taken = self.chains[layer], []
        unmasked = self.unmasked_norms(layer, norms, own) if layer in self.linked else []
        for chain in own:
            norm = self.chain_norm(chain)
            if norm is None:
                break
            taken.append(norm)
        self.norms[layer] = Norms(norms, taken, unmasked)
        closing = self.closings[layer] = closing_of(layer, radii, self.norms[layer], own, self.closings, self.rounded)
        return closed_radius(layer, closing.reach, self.rounded)

    def record(
        self,
        layer: Layer,
        inputs: Sequence[Tensor | None],
        norms: Sequence[Tensor | None],
        rows: Tensor,
        columns: Tensor,
        slack: Tensor | None,
    ) -> None:
        """inputs: column masks of the layer's facts; norms: of its terms, None where it is 1 and none is taken."""
        taken = 0
        for term, mask, norm in zip(layer.terms, inputs, norms, strict=True):
            linear = self.snapshots[layer] = term.linear.snapshot()
            if norm is not None:
                taken += 1
                alone = (term.index, (term.index,))
                self.layers.append(LayerBound(term.path, linear, norm, rows, mask, *alone, columns))
        if taken and slack is not None:
            self.sparsity_terms.append(slack.sum(0) / max(len(rows), 1))
        found = self.norms[layer]
        if found.unmasked and found.unmasked[0] is not None:
            linear, index = self.snapshots[layer], layer.terms[0].index
            self.unmasked.append(ChainBound(layer.path, linear, found.unmasked[0], None, None, index, (index,)))
        for i, chain in enumerate(self.chains[layer]):
            parts = tuple(each.terms[0].index for each in chain.layers)
            linear = chain.linear(self.snapshots.__getitem__, self.rows)
            own = found.chains[i] if i < len(found.chains) else None
            first = self.inputs[chain.first]
            self.composed.append(ChainBound(layer.path, linear, own, rows, first, chain.index, parts))
            if found.unmasked:
                linear = chain.linear(self.snapshots.__getitem__, None)
                more = (None, None, chain.index, parts)
                self.unmasked.append(ChainBound(layer.path, linear, found.unmasked[1 + i], *more))


def viewed_mask(step: View, mask: Tensor | None, batch: int) -> Tensor | None:
    """A column mask behind a view, in which the zeros between its numbers do not vary; None for all."""
    move = step.rearrangement
    if mask is not None:
        return move.of_mask(mask)
    if move.bijective:
        return None
    ones = torch.ones(1, *move.input_sizes, dtype=torch.bool, device=move.like.device)
    return move.of_mask(ones).expand(batch, *move.output_sizes)


def joined_mask(step: Joined, masks: Sequence[Tensor | None], values: Sequence[Tensor]) -> Tensor | None:
    """Column masks side by side, of values (B, *); None for all."""
    if all(mask is None for mask in masks):
        return None
    full = [torch.ones_like(v, dtype=torch.bool) if m is None else m for m, v in zip(masks, values, strict=True)]
    return torch.cat(full, step.dim)


def check_norm(path: str, norm: Tensor) -> None:
    """ValueError by path where NaN or infinite weights made the norm NaN; not on a GPU."""
    if values_are_at_hand(norm) and bool(norm.isnan().any()):
        raise ValueError(f"{at(path)}: got NaN or infinite weights, want finite ones")
