"""The global bound as a proof: norms without masks, one for all samples, around the clean values of each.

The arithmetic, the norms and their rounding are those of :mod:`.proof`; there is a ball and no box. The norms are the
same for every sample, and so is the event that one of them fails.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..norms.linear import Identity, LinearMap, same
from ..rounding import down, up
from .composition import Chain, folded_map
from .execution import Arithmetic, column
from .graph import Layer, Term
from .proof import Fact, Proof, Rounded, affine, stage_of
from .rules import Lipschitz


class ProvedNorms:
    """Norms without masks that :func:`locallip_cuda.global_bounds` has proved, for its next calls: it takes one again
    for the maps that it was proved for, weight by weight, under the same guarantee, and proves it anew for others."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[LinearMap], Tensor]] = {}

    def norm(self, key: Hashable, maps: Sequence[LinearMap], prove: Callable[[], Tensor]) -> Tensor:
        """(1,) what ``prove`` gave, for ``maps`` as they are and under ``key``, now or before."""
        kept = self._kept.get(key)
        if kept is None or not all(map(same, kept[0], maps)):
            kept = self._kept[key] = [each.snapshot() for each in maps], prove()
        return kept[1]


class GlobalProof(Proof):
    """norms: how many share the failure probability.   kept: those that were proved already."""

    masked = False
    tightness = widest = 1e-4  # once for all samples, at next to no cost

    def __init__(
        self,
        guarantee: str,
        failure_probability: float,
        seed: int | None,
        norms: int,
        kept: ProvedNorms,
        *,
        window: float = 1,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        more = (guarantee, failure_probability, seed, norms)
        super().__init__("local", *more, window=window, arithmetic=arithmetic)
        self.kept = kept

    def closed(self, layer: Layer, facts: Sequence[Fact]) -> Fact:
        values, error = affine(layer.terms, layer, [(fact.values, fact.error) for fact in facts])
        rows, activation, running = torch.ones_like(values, dtype=torch.bool), Rounded(layer.activation), self.running
        if running is not None:
            reach, inputs = self.reach(layer.terms, facts)
            eta, apart = running.affine(layer, inputs)
            wide = up(up(reach + error) + apart)
            box = down(values - wide), up(values + wide)
        values, error = activation.clean(values, error)
        norms = [self._global_norm(layer, term) for term in layer.terms]
        if self.window > 1 and len(layer.terms) == 1:
            self.stages[layer] = stage_of(layer.terms[0], norms[0], 1)
        nothing: list[Tensor | None] = [None] * len(facts)
        taken = [None if norm is None else norm.expand(len(rows)) for norm in norms]
        radius = self.radius(layer, [fact.radius for fact in facts], nothing, taken, rows)
        columns = torch.ones_like(values, dtype=torch.bool)
        self.record(layer, nothing, taken, rows, columns, None)
        computed = None
        if running is not None:
            ball = up(up(values.abs() + error) + column(radius, values))
            largest = ball if isinstance(layer.activation, Lipschitz) else activation.largest(*box)
            computed = running.closed(layer, inputs, norms, eta, apart, rows, columns, largest)
        return Fact(values, error, None, None, radius, None, computed)

    def unmasked_norms(self, layer: Layer, norms: Sequence[Tensor | None], own: Sequence[Chain]) -> list[Tensor | None]:
        return []  # they all are

    def chain_norm(self, chain: Chain) -> Tensor:
        stages = [self.stages[layer] for layer in chain.layers]
        all_rows = self.rows[chain.last].new_ones(1, *chain.last.sizes)
        norm = self._kept(
            chain.index,
            [layer.terms[0] for layer in chain.layers],
            chain.linear(folded_map, None),
            lambda: self._chain_norm(chain, None, all_rows, None, stages),
        )
        return norm.expand(len(self.rows[chain.last]))

    def _global_norm(self, layer: Layer, term: Term) -> Tensor | None:
        if isinstance(term.linear, Identity):
            return None
        return self._kept(term.index, [term], term.linear, lambda: self._proved(layer.path, term, None, None, 1))

    def _kept(self, index: int, terms: Sequence[Term], linear: LinearMap, prove: Callable[[], Tensor]) -> Tensor:
        stored = tuple(term.linear is term.parts for term in terms)  # by which proofs see what was folded
        key = (index, stored, self.guarantee, self.failure_probability, self.seed)
        return self.kept.norm(key, [linear, *(term.parts for term in terms)], prove)
