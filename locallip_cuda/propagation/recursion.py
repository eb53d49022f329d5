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
from .composition import Chain, Closing, chains, reach_of
from .graph import Graph, Joined, Layer, View, closed_radius
from .trace import at

Fact = TypeVar("Fact")


@dataclass(eq=False)
class ChainBound:
    """The norm of maps in a row that end in a layer, with the layers' row masks between them; B samples.

    Attributes:
        path: of the last map's module.   linear: the maps, as they were, without gradients.
        norm: (B,).
        row_mask: bool (B, *output), pre-activations that can still change the layer's output.
        input_mask: bool (B, *input), inputs of the first map that can vary; None for all.
    """

    path: str
    linear: LinearMap
    norm: Tensor
    row_mask: Tensor
    input_mask: Tensor | None


@dataclass(eq=False)
class LayerBound(ChainBound):
    """One masked norm of a pass: of one term of a layer, B samples.

    Attributes:
        column_mask: bool (B, *), outputs of the layer that can vary inside the ball.
    """

    column_mask: Tensor


class Pass(ABC, Generic[Fact]):
    """Facts from the input to the last layer's, and a record of every norm.

    local: whether the radius grows by masked norms; else by global ones, as in the paper.
    window: how many maps in a row are composed before a norm is taken, at most.
    """

    rounded: Callable[[Tensor], Tensor]

    def __init__(self, *, local: bool, window: float = 1) -> None:
        self.local, self.window = local, window
        self.layers: list[LayerBound] = []
        self.composed: list[ChainBound] = []
        self.sparsity_terms: list[Tensor] = []
        self.chains: dict[Layer, list[Chain]] = {}
        # of every layer that was closed
        self.rows: dict[Layer, Tensor] = {}
        self.inputs: dict[Layer, Tensor | None] = {}
        self.closings: dict[Layer, Closing] = {}
        self.chain_norms: dict[Layer, list[Tensor]] = {}
        self.snapshots: dict[Layer, LinearMap] = {}

    def run(self, graph: Graph, x: Tensor, eps: Tensor) -> list[Fact]:
        """What is known of the facts of the graph's head."""
        self.chains = chains(graph, self.window)
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

    def chain_norm(self, chain: Chain) -> Tensor:
        """(B,) of a chain whose layers' rows and inputs are known."""
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
        own = self.chains[layer]
        self.chain_norms[layer] = [self.chain_norm(chain) for chain in own]
        reach = reach_of(layer, radii, norms, own, self.chain_norms[layer], self.closings, self.rounded)
        self.closings[layer] = Closing(radii[0], reach)
        return closed_radius(layer, reach, self.rounded)

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
                self.layers.append(LayerBound(term.path, linear, norm, rows, mask, columns))
        if taken and slack is not None:
            self.sparsity_terms.append(slack.sum(0) / max(len(rows), 1))
        for chain, norm in zip(self.chains[layer], self.chain_norms[layer], strict=True):
            linear = chain.linear(self.snapshots.__getitem__, self.rows)
            self.composed.append(ChainBound(layer.path, linear, norm, rows, self.inputs[chain.first]))


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
