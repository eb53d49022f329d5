"""Composed norms: which layers of a graph follow each other, and what the norms of chains make of a radius.

An activation of slopes in [s, t] moves by D dz where its input moves by dz, with D = c V + h V Psi: V the row mask, c =
(s + t) / 2, h = (t - s) / 2, and Psi diagonal with entries in [-1, 1]. With a bound a of the surviving change of the
layer in front, the change behind the next map A is so at most

    ||V' A d|| <= h ||V' A C|| a + c ||V' A V (A_before d_before)||,

and so on through a window of layers. Each chain is one operator, with a mask between its maps, whose norm is at most
the product of theirs and usually far less: neighbouring maps' top singular vectors do not meet. Without masks this is
LipLT (Fazlyab, Entesari, Roy, Chellappa, NeurIPS 2023, arXiv:2310.00116).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.linear import LinearMap, Masking, composed
from .graph import Graph, Joined, Layer, View, closed_radius, closed_reach, joined_radius


@dataclass(eq=False)
class Chain:
    """Layers of one term in a row, the first one applied first, each in front of the next one.

    moves: of every layer but the first, what rearranges the output of the layer before it, one after another.
    index: the number of its norm, behind those of the operators; -1 for none.
    """

    layers: list[Layer]
    moves: list[list[LinearMap]]
    index: int = -1

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def last(self) -> Layer:
        return self.layers[-1]

    def linear(self, of: Callable[[Layer], LinearMap], rows: Mapping[Layer, Tensor] | None) -> LinearMap:
        """The maps in a row, each by ``of``, with the row masks of all layers but the last one between them; without
        where ``rows`` is None."""
        linear = of(self.first)
        for before, layer, moves in zip(self.layers, self.layers[1:], self.moves, strict=False):
            if rows is not None and before.activation.drops_rows:
                linear = composed(linear, Masking(rows[before], linear.like))
            for each in (*moves, of(layer)):
                linear = composed(linear, each)
        return linear


def check_window(window: float) -> None:
    """ValueError where ``window`` is no number of maps."""
    if isinstance(window, bool) or not (window == math.inf or (isinstance(window, int) and window >= 1)):
        raise ValueError(f"window: got {window!r}, want an integer >= 1, or math.inf for all")


def folded_map(layer: Layer) -> LinearMap:
    """Of a layer of one term."""
    return layer.terms[0].linear


def chains(graph: Graph, window: float) -> dict[Layer, list[Chain]]:
    """Of every layer the chains of 2 to ``window`` layers that end in it, the shortest one first."""
    found: dict[Layer, list[Chain]] = {}
    index = len(graph.operators)
    for layer in graph.layers:
        found[layer] = []
        for chain in _chains_to(graph, layer, window):
            found[layer].append(Chain(chain.layers, chain.moves, index))
            index += 1
    return found


def linked(graph: Graph, window: float) -> set[Layer]:
    """The layers whose map is part of what is composed, with the head or without; empty where no rows go between maps,
    so that no norm without masks can be below one with masks."""
    own = {layer for found in chains(graph, window).values() for chain in found for layer in chain.layers}
    if window > 1 and len(graph.head.terms) == 1:
        own.update(last_chain(graph, window).layers[:-1])
    return own if any(layer.activation.drops_rows for layer in own) else set()


def unmasked_indices(graph: Graph, window: float) -> set[int]:
    """The numbers of the norms that are taken without masks where there are masks, or in the global form."""
    own = {chain.index for found in chains(graph, window).values() for chain in found}
    return own | {term.index for layer in linked(graph, window) for term in layer.terms if term.index >= 0}


def last_chain(graph: Graph, depth: float) -> Chain:
    """Of the graph's head, and of up to ``depth`` layers before it."""
    found = [Chain([graph.head], []), *_chains_to(graph, graph.head, depth + 1)]
    return found[-1]


def _chains_to(graph: Graph, layer: Layer, longest: float) -> Iterator[Chain]:
    layers: list[Layer] = [layer]
    moves: list[list[LinearMap]] = []
    while len(layers) < longest:
        link = _before(graph, layers[0])
        if link is None:
            return
        layers, moves = [link[0], *layers], [link[1], *moves]
        yield Chain(layers, moves)


def _before(graph: Graph, layer: Layer) -> tuple[Layer, list[LinearMap]] | None:
    """The layer of one term whose output the layer's one term is of, and what rearranges that; None where there is none
    that composes."""
    if len(layer.terms) != 1:
        return None
    source = layer.terms[0].source
    moves: list[LinearMap] = []
    while source:
        step = graph.steps[source - 1]
        if not isinstance(step, View):
            break
        source, moves = step.source, [step.rearrangement, *moves]
    if not source:
        return None
    if not isinstance(step, Layer) or len(step.terms) != 1 or step.activation.slopes is None:
        return None
    return step, moves


@dataclass(eq=False)
class Norms:
    """Of what ends in a layer; each (B,), or (1,) where it is the same for all samples.

    terms: of its own maps; None for 1.   chains: of the chains that end in it, the shortest one first, as far as they
    are taken.   unmasked: of its one map and of those chains without any mask; empty where none are composed.
    """

    terms: Sequence[Tensor | None]
    chains: Sequence[Tensor] = ()
    unmasked: Sequence[Tensor | None] = ()


@dataclass(eq=False)
class Closing:
    """What a layer's radius came from, (B,) each.

    radius: of what its map is of.   reach: how far its surviving pre-activations move.   whole: how far all of them do.
    """

    radius: Tensor
    reach: Tensor
    whole: Tensor


def composed_reach(
    norms: Sequence[Tensor | None],
    firsts: Sequence[Layer],
    radii: Sequence[Tensor],
    reaches: Sequence[Tensor],
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """How far the values behind a map move, by the ``norms`` (None: 1) of the chains of 1, 2, ... n maps that end in
    it. Of any shapes that broadcast.

    Args:
        firsts: the first layer of every chain but the first, which stands in front of the chain before.
        radii: of what each chain is of.   reaches: how far the pre-activations of ``firsts`` move, those that the masks
            of ``norms`` leave.

    At whatever length one stops, the rest is the product, and the least of all is taken: so this is never above the
    product of norms, which closes it in where the norms of chains are estimates; where norms are proved every one of
    these is a bound, and so is the least.
    """
    far = _times(norms[-1], radii[len(norms) - 1], rounded)
    for k in range(len(norms) - 2, -1, -1):
        centre, half = firsts[k].activation.centre_and_half()
        spread = rounded(half * _times(norms[k], reaches[k], rounded))
        far = torch.minimum(_times(norms[k], radii[k], rounded), rounded(rounded(centre * far) + spread))
    return far


def _times(norm: Tensor | None, radius: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    return radius if norm is None else rounded(radius * norm)


def closing_of(
    layer: Layer,
    radii: Sequence[Tensor],
    norms: Norms,
    own: Sequence[Chain],
    closings: Mapping[Layer, Closing],
    rounded: Callable[[Tensor], Tensor],
) -> Closing:
    """Of a layer whose facts have ``radii``. own: the chains that end in it.

    Masks between maps are not monotone: with fewer units between them the norm of a product can be larger. So the
    recursion without masks is a bound of its own, and the smaller one counts.
    """
    firsts = [chain.first for chain in own]
    before = [radii[0], *(closings[first].radius for first in firsts)]
    if norms.chains:
        reaches = [closings[first].reach for first in firsts]
        reach = composed_reach([norms.terms[0], *norms.chains], firsts, before, reaches, rounded)
    else:
        reach = closed_reach(layer, radii, norms.terms, rounded)
    if not norms.unmasked:
        return Closing(radii[0], reach, reach)
    whole = composed_reach(norms.unmasked, firsts, before, [closings[first].whole for first in firsts], rounded)
    return Closing(radii[0], torch.minimum(reach, whole), whole)


def radii(
    graph: Graph,
    radius: Tensor,
    norms: Mapping[Layer, Norms],
    of: Mapping[Layer, Sequence[Chain]],
    rounded: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """(B,) of every fact, from those at the input and the ``norms`` of layers and of the chains ``of`` them."""
    found = [radius]
    closings: dict[Layer, Closing] = {}
    for step in graph.steps:
        if isinstance(step, View):
            found.append(found[step.source])
        elif isinstance(step, Joined):
            found.append(joined_radius([found[source] for source in step.sources], rounded))
        else:
            before = [found[term.source] for term in step.terms]
            closings[step] = closing_of(step, before, norms[step], of[step], closings, rounded)
            found.append(closed_radius(step, closings[step].reach, rounded))
    return found
