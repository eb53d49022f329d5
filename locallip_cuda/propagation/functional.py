"""The last layers' functional: how far the difference of two logits moves, by adjoints through the last layers' maps.

With d the difference of two rows of the last layer, d V A ... is a vector, not an operator: its length is exact, and no
norm is taken. The recursion is that of :func:`.composition.composed_reach`, with these lengths for norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..norms.linear import LinearMap, widest
from .composition import Chain, Closing, composed_reach
from .graph import Layer
from .trace import without_autocast

# elements of the vectors that are worked on at a time
CHUNK = 2**24


@dataclass(eq=False)
class Step:
    """A layer in front of the last one.

    layer: for its activation.   linear: its map.   moves: what rearranges its output, one after another.
    rows: bool (B, *output), which of the pre-activations can change the output.   inputs: bool (B, *input), what can
    vary of what the map is of; None for all.   radius: (B,) of that.   reach: (B,) how far the pre-activations move
    that ``rows`` leaves.
    """

    layer: Layer
    linear: LinearMap
    moves: list[LinearMap]
    rows: Tensor | None
    inputs: Tensor | None
    radius: Tensor
    reach: Tensor


# Of directions (N, k, *sizes), of ``samples`` of the batch, the lengths (N, k) at the features and behind every step.
Lengths = Callable[["Functional", Tensor, slice], list[Tensor]]


@dataclass(eq=False)
class Functional:
    """steps: the layer before the last one, the one before that, and so on.

    sizes: of the features, one sample.   columns: bool (B, *sizes), which of them can vary; None for all.
    radius: (B,) how far they move.   counts: whether it is taken into the bound.
    """

    steps: list[Step]
    sizes: list[int]
    columns: Tensor | None
    radius: Tensor
    counts: bool = True

    def images(self, directions: Tensor, samples: slice) -> Iterator[Tensor]:
        """Directions (N, k, h) at the features, and what becomes of them behind every step: (N, k, *sizes), 0 where
        nothing varies."""
        count = directions.shape[:2]
        g = _masked(directions.view(*count, *self.sizes), self.columns, samples)
        yield g
        for step in self.steps:
            g = g.flatten(0, 1)
            for move in reversed(step.moves):
                g = move.adjoint(g)
            g = g.view(*count, *g.shape[1:])
            if step.layer.activation.drops_rows:
                g = _masked(g, step.rows, samples)
            g = step.linear.adjoint(g.flatten(0, 1))
            g = _masked(g.view(*count, *g.shape[1:]), step.inputs, samples)
            yield g

    @property
    def masked(self) -> bool:
        """Whether lengths are of a sample, not of its label alone."""
        return any(mask is not None for step in self.steps for mask in (step.rows, step.inputs, self.columns))

    def gains(self, weight: Tensor, y: Tensor, lengths: Lengths, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, K) at most what logit j gains on the label's, 0 at the label; of ``weight`` (K, h), ``y`` (B,)."""
        batch, classes = len(y), len(weight)
        by_label = not self.masked and classes < batch
        norms = self._lengths(weight, torch.arange(classes, device=y.device) if by_label else y, lengths)
        if by_label:
            norms = [norm[y] for norm in norms]
        firsts = [step.layer for step in self.steps]
        before = [self.radius[:, None], *(step.radius[:, None] for step in self.steps)]
        gain = composed_reach(norms, firsts, before, [step.reach[:, None] for step in self.steps], rounded)
        return gain.new_zeros(batch, classes).scatter(1, _rivals(y, classes), gain)

    def _lengths(self, weight: Tensor, y: Tensor, lengths: Lengths) -> list[Tensor]:
        """(N, K - 1) at the features and behind every step, of the rivals of each of ``y`` (N,), in pieces."""
        count, classes = len(y), len(weight)
        units = max(widest(step.linear) for step in self.steps)
        own = max(min(CHUNK // units, classes - 1), 1)  # pairs of a label at a time
        at_once = max(CHUNK // (units * own), 1)
        others = _rivals(y, classes)
        whole = at_once >= count and own >= classes - 1
        found = [weight.new_zeros(1 + len(self.steps), 0, classes - 1)]
        for first in range(0, count, at_once):
            samples = slice(first, first + at_once)
            parts = []
            for start in range(0, classes - 1, own):
                rivals = others[samples, start : start + own]

                def part(weight: Tensor, rivals: Tensor = rivals, samples: slice = samples) -> Tensor:
                    with without_autocast(weight.device.type):
                        directions = weight[rivals] - weight[y[samples]].unsqueeze(1)
                        return torch.stack(lengths(self, directions, samples))

                # several chunks are gone through once more for their gradients, or they would all be kept
                again = not whole and torch.is_grad_enabled()
                parts.append(checkpoint(part, weight, use_reentrant=False) if again else part(weight))
            found.append(torch.cat(parts, 2))
        return list((found[1] if len(found) == 2 else torch.cat(found, 1)).unbind())


def _rivals(y: Tensor, classes: int) -> Tensor:
    """(N, K - 1) the classes but each label's."""
    others = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return others + (others >= y.unsqueeze(1))


def functional(
    chain: Chain,
    of: Callable[[Layer], LinearMap],
    masks: tuple[Mapping[Layer, Tensor], Mapping[Layer, Tensor | None], Tensor | None] | None,
    closings: Mapping[Layer, Closing],
    radius: Tensor,
) -> Functional | None:
    """Through the layers of ``chain`` before its last one, which is the graph's head; None where there are none.

    of: each layer's map.   masks: rows and inputs of every layer as a pass keeps them, and the columns of the head's
    fact; None for none.   radius: of the head's fact.
    """
    rows, inputs, columns = masks or ({}, {}, None)
    steps = []
    for layer, moves in zip(chain.layers[-2::-1], chain.moves[::-1], strict=True):
        closing = closings[layer]
        reach = closing.whole if masks is None else closing.reach
        steps.append(Step(layer, of(layer), moves, rows.get(layer), inputs.get(layer), closing.radius, reach))
    return Functional(steps, chain.last.terms[0].linear.input_sizes, columns, radius) if steps else None


def lengths(of: Functional, directions: Tensor, samples: slice) -> list[Tensor]:
    """As the dtype has them; differentiable."""
    return [torch.linalg.vector_norm(g.flatten(2), dim=2) for g in of.images(directions, samples)]


def _masked(g: Tensor, mask: Tensor | None, samples: slice) -> Tensor:
    return g if mask is None else torch.where(mask[samples].unsqueeze(1), g, 0)
