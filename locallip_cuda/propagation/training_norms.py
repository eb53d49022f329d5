"""Norms that stay close while a network is trained against them: kept start vectors, and iterations under control.

The norms of training are Ritz values, below the true ones, and a network trained against them learns to hide from them:
it turns its masked top singular vectors away from where the iteration starts. So the iteration starts from where they
were: of each layer, the right singular vectors that the last batches found, averaged. Nothing is kept for a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..norms.iteration import iterated_norm
from ..norms.linear import Composed, Dense, Identity, LinearMap, Rearrangement, Scaling
from ..norms.masked_norm import check_input
from .composition import chains, check_window, folded_map, unmasked_indices
from .graph import lowered, output_classes, traced

if TYPE_CHECKING:
    from ..bounds import LocalBounds
    from .recursion import ChainBound

# Of the batch's vectors in the kept ones, a step.
RATE = 0.3

# Iterations of a network's first vectors, of a norm shared by all samples (a batch of one), and of those that control
# compares with.
FIRST_ITERATIONS = 20
SHARED_ITERATIONS = 15
CONVERGED_ITERATIONS = 40

# Iterations that control chooses from, and the fewest of a convolution and of a dense layer, which costs next to
# nothing: with three a network hides from a convolution within the 25 steps until the next look. Fifteen are what
# kernels on a GPU's chip take.
CHOICES = (5, 6, 7, 8, 10, 12, 15)
LEAST, LEAST_DENSE = 5, 8
# Down by so many places in the list at a time: what the starts are worth may be better known the next time.
DOWN_AT_ONCE = 2

# What control holds on its samples: means over them of the product and of every layer, and the worst product.
SAMPLES = 8
PRODUCT, LAYER, WORST = 0.985, 0.99, 0.95

# From this share of its global norm on, the masked norms of a layer give way to it, and so do the norms of its rows to
# those without masks; below the second they come back.
SHARE, LESS_SHARE = 0.98, 0.97

# Up to this share of the units that vary whose interval it narrows, a layer's box is left out; above the second it
# comes back.
NARROWED, MORE_NARROWED = 0.01, 0.02


class TrainingNorms(nn.Module):
    """The state of the norm iteration from step to step of a training: where it starts, how many iterations it takes.

    Give it to :func:`locallip_cuda.local_bounds` with the labels, and let :meth:`control` have a look at the bounds now
    and then, every 25 steps say::

        norms = ll.TrainingNorms(model, x)
        ...
        bounds = ll.local_bounds(model, x, eps, norms=norms, y=y)
        if step % 25 == 0:
            norms.control(bounds, y)

    A convolution starts from one right singular vector, the mean over the last batches, a dense layer from one for
    every class. In training mode every call moves them by the batch's; in eval mode they stay. Where its masks take
    away next to nothing of it (2 %), a layer has one norm for all samples, its global one, which is above the masked
    ones; everywhere else norms are Ritz values, below the true ones but for rounding. A chain of such layers, whose
    masks take as little away, is left to its norm without masks. Likewise a layer does without the box of its input
    where the ball alone bounds next to all units, and without masks in the norms of its rows where they take next to
    nothing: its intervals are then as wide as the ball, never too narrow. The state travels in ``state_dict()``.

    Args:
        model: the network, on its device; its operators' sizes are taken from it, and first vectors.
        x: (B, *input), B >= 1, as for local_bounds; of which only shape and dtype matter.
        window: that of the bounds: chains of maps have a start and iterations of their own.

    Attributes:
        iterations: of every layer but the last, then of every chain of maps that is composed; those of a shared norm,
            and of one without masks, are 15.
        shared: whether the layer has one norm for all samples, or the chain none but that without masks.
        boxed: whether the layer takes the box of its input.
        rows_masked: whether the norms of its rows, which make the ball, are of the columns that vary.
        functional: whether the last layers' functional is taken with masks too.
        unmasked: numbers of the layers and chains that have a norm without masks beside the one with them.
    """

    def __init__(self, model: nn.Module, x: Tensor, *, window: float = 1) -> None:
        super().__init__()
        check_input(x)
        check_window(window)
        self.iterations: list[int] = []
        self.shared: list[bool] = []
        self.boxed: list[bool] = []
        self.rows_masked: list[bool] = []
        self.functional = True
        self.unmasked: set[int] = set()
        with torch.no_grad():
            trace = traced(model, x[:1])
            classes = output_classes(trace)
            graph = lowered(trace, x.dtype)
            of_layers = [chain for each in chains(graph, window).values() for chain in each]
            maps = [term.linear for term in graph.operators]
            maps += [chain.linear(folded_map, None) for chain in of_layers]
            self.unmasked = unmasked_indices(graph, window)
            for index, linear in enumerate(maps):
                dense = _begins_dense(linear)
                vectors = iterated_norm(linear, None, None, 1, None, FIRST_ITERATIONS)[1]
                copies = vectors.repeat(classes if dense else 1, *[1] * (vectors.dim() - 1))
                self.register_buffer(f"right{index}", _laid_out(copies))
                if index in self.unmasked:
                    self.register_buffer(f"unmasked{index}", _laid_out(vectors.clone()))
                self.iterations.append(LEAST_DENSE if dense else LEAST)
                self.shared.append(False)
                self.boxed.append(True)
                self.rows_masked.append(True)

    def extra_repr(self) -> str:
        counts = zip(self.iterations, self.shared, strict=True)
        return ", ".join("shared" if shared else str(count) for count, shared in counts)

    def get_extra_state(self) -> Tensor:
        each = zip(self.shared, self.boxed, self.rows_masked, strict=True)
        flags = [shared + 2 * (not boxed) + 4 * (not masked) for shared, boxed, masked in each]
        return torch.tensor([[*self.iterations, 0], [*flags, int(self.functional)]])

    def set_extra_state(self, state: Tensor) -> None:
        wanted = (2, len(self.iterations) + 1)
        if state.shape != wanted:
            raise ValueError(f"state: got iterations of shape {tuple(state.shape)}, want {wanted}")
        [*self.iterations, _], [*flags, functional] = state.tolist()
        self.shared, self.functional = [bool(flag & 1) for flag in flags], bool(functional)
        self.boxed, self.rows_masked = ([not flag & bit for flag in flags] for bit in (2, 4))

    def launches(self) -> Hashable:
        """What decides which kernels a step launches: a CUDA graph holds as long as this is the same."""
        counts = zip(self.iterations, self.shared, strict=True)
        taken = (*self.boxed, *self.rows_masked, self.functional)
        return *(0 if shared else count for count, shared in counts), *taken

    def norm(self, layer: int, linear: LinearMap, rows: Tensor, columns: Tensor | None, y: Tensor) -> Tensor:
        """(B,) norms of the operator of this number for one batch, differentiable in the weights."""
        if self.shared[layer]:
            return self.shared_norm(layer, linear).expand(len(rows))
        return self._masked_norm(layer, linear, rows, columns, y)

    def chain_norm(
        self, index: int, linear: LinearMap, rows: Tensor, columns: Tensor | None, y: Tensor
    ) -> Tensor | None:
        """The same of a chain; None where it is left to its norm without masks."""
        return None if self.shared[index] else self._masked_norm(index, linear, rows, columns, y)

    def _masked_norm(self, index: int, linear: LinearMap, rows: Tensor, columns: Tensor | None, y: Tensor) -> Tensor:
        start = self._start(index, linear.input_sizes, y)
        norm, right, _ = iterated_norm(linear, rows, columns, len(rows), start, self.iterations[index])
        if self.training:
            self._move(index, start, right, y)
        return norm

    def shared_norm(self, layer: int, linear: LinearMap) -> Tensor:
        """(1,) the operator's global norm, which stands for the masked ones."""
        return self._global_norm(self._kept(layer, linear.input_sizes), linear)

    def unmasked_norm(self, index: int, linear: LinearMap, *, alone: bool) -> Tensor:
        """(1,) the global norm of an operator, or chain, beside the masked ones; ``alone`` where none are taken, whose
        start follows then."""
        kept = self._kept(index, linear.input_sizes, "unmasked")
        norm = self._global_norm(kept, linear)
        if alone and self.training:
            self._kept(index, linear.input_sizes).copy_(kept)
        return norm

    def _global_norm(self, kept: Tensor, linear: LinearMap) -> Tensor:
        norm, right, _ = iterated_norm(linear, None, None, 1, kept[:1], SHARED_ITERATIONS)
        if self.training:
            # neither of a zero weight nor of one that is no number
            some = (norm > 0).view(-1, *[1] * len(linear.input_sizes))
            kept.copy_(torch.where(some, right, kept))
        return norm

    def _kept(self, layer: int, sizes: Sequence[int], name: str = "right") -> Tensor:
        kept = self.get_buffer(f"{name}{layer}")
        if list(kept.shape[1:]) != list(sizes):
            raise ValueError(
                f"norms: got vectors of shape {tuple(kept.shape[1:])} for layer {layer}, want {tuple(sizes)}: "
                "they are of another model or another size of its input"
            )
        return kept

    def _start(self, layer: int, sizes: Sequence[int], y: Tensor) -> Tensor:
        kept = self._kept(layer, sizes)
        return kept if len(kept) == 1 else kept[y]

    @torch.no_grad()
    def _move(self, layer: int, start: Tensor, right: Tensor, y: Tensor) -> None:
        """The kept vectors towards the batch's, each of which has the sign that its start has."""
        kept = self._kept(layer, right.shape[1:])
        flat = right.flatten(1)
        signs = torch.where((flat * start.flatten(1)).sum(1, keepdim=True) < 0, -1.0, 1.0).to(flat)
        signed = signs * flat
        if len(kept) == 1:
            mean = signed.sum(0, keepdim=True) / max(len(flat), 1)
        else:  # in float64, which autocast leaves alone
            own = (y.unsqueeze(1) == torch.arange(len(kept), device=y.device)).double()
            mean = (own.T @ signed.double() / own.sum(0).clamp_min(1).unsqueeze(1)).to(flat)
        moved = (1 - RATE) * kept.flatten(1) + RATE * mean
        length = moved.norm(dim=1, keepdim=True)
        kept.copy_(torch.where(length > 0, moved / length, kept.flatten(1)).view(kept.shape))

    @torch.no_grad()
    def control(self, bounds: LocalBounds, y: Tensor) -> None:
        """Choose the iterations of every layer anew, from how close they come on the first samples of ``bounds``, and
        what is taken with masks, and with boxes, at all.

        The cheapest are taken that hold 0.985 of the converged product (on average; 0.95 for the worst sample) and 0.99
        of every layer's norm, but never far fewer than before. It reads values back, and so waits for a GPU.

        Args:
            bounds: of a batch, from :func:`locallip_cuda.local_bounds` with these norms.   y: its labels.
        """
        count = min(SAMPLES, len(bounds.eps))
        if not count:
            return
        ratios: dict[int, list[Tensor]] = {}
        choices: dict[int, list[int]] = {}
        costs: dict[int, float] = {}
        chosen = torch.arange(count, device=y.device)
        single = len(bounds.layers)
        records = (*bounds.layers, *bounds.composed)
        unmasked = {record.index: record for record in bounds.unmasked}
        found: dict[int, tuple[Callable[[int], Tensor], Tensor]] = {}
        for record in records:
            if isinstance(record.linear, (Identity, Scaling, Rearrangement)):  # exact, however many iterations
                continue
            norm = self._on(record, chosen, y[:count])
            converged = norm(CONVERGED_ITERATIONS)
            found[record.index] = norm, converged
            self.shared[record.index] = self._gives_way(record, converged, unmasked.get(record.index))
        self._keep_what_longer_ones_need(bounds.composed)
        for record in records:
            index = record.index
            if index not in found or self.shared[index]:
                continue
            norm, converged = found[index]
            least = LEAST_DENSE if _begins_dense(record.linear) else LEAST
            fewer = [c for c in CHOICES if c < self.iterations[index]][-DOWN_AT_ONCE:]
            choices[index] = [c for c in CHOICES if c >= max([least, *fewer[:1]])]
            ratios[index] = []
            for iterations in choices[index]:
                ratios[index].append(torch.where(converged > 0, norm(iterations) / converged, 1).double())
                if ratios[index][-1].mean() > 0.999:
                    break
            costs[index] = _cost(record.linear)
        for index, choice in _cheapest(ratios, choices, costs, single).items():
            self.iterations[index] = choice
        self._choose_boxes(bounds, y[:count])
        if len(bounds.functionals) > 1 and bounds.logits.shape[1] > 1:
            gains = [bounds._gains(y, masked=masked).sum() for masked in (True, False)]
            self.functional = not gains[0] >= (SHARE if self.functional else LESS_SHARE) * gains[1]

    def _choose_boxes(self, bounds: LocalBounds, y: Tensor) -> None:
        mode = self.training
        self.eval()
        narrowed, shares = bounds.look(self, y)
        self.train(mode)
        for index, share in narrowed.items():
            self.boxed[index] = share > (NARROWED if self.boxed[index] else MORE_NARROWED)
        for index, share in shares.items():
            self.rows_masked[index] = share < (SHARE if self.rows_masked[index] else LESS_SHARE)

    def _on(self, record: ChainBound, chosen: Tensor, y: Tensor) -> Callable[[int], Tensor]:
        """The masked norms of the first samples, by iterations."""
        count, columns = len(chosen), record.input_mask
        assert record.row_mask is not None
        linear, rows = record.linear.of_samples(chosen), record.row_mask[:count]
        columns = None if columns is None else columns[:count]
        start = self._start(record.index, linear.input_sizes, y)
        return lambda iterations: iterated_norm(linear, rows, columns, count, start, iterations)[0]

    def _keep_what_longer_ones_need(self, composed: Sequence[ChainBound]) -> None:
        """The recursion with masks goes as far as its norms: a chain gives way only if all longer ones to its end do.

        composed: those of a layer one after another, the shortest one first.
        """
        for record, longer in zip(composed[-2::-1], composed[:0:-1], strict=True):
            if longer.parts[1:] == record.parts and not self.shared[longer.index]:
                self.shared[record.index] = False

    def _gives_way(self, record: ChainBound, converged: Tensor, whole: ChainBound | None) -> bool:
        """Whether the masked norms of a layer, or of a chain of such layers, are next to what they are without masks.

        converged: (samples,) of the masked ones.   whole: the chain without masks; None of a layer.
        """
        index = record.index
        if len(record.parts) == 1:
            linear, name = record.linear, "right"
        elif whole is not None and all(part < 0 or self.shared[part] for part in record.parts):
            linear, name = whole.linear, "unmasked"
        else:
            return False
        start = self._kept(index, linear.input_sizes, name)[:1]
        norm = iterated_norm(linear, None, None, 1, start, CONVERGED_ITERATIONS)[0]
        return float(converged.mean() / norm) >= (LESS_SHARE if self.shared[index] else SHARE)


def _begins_dense(linear: LinearMap) -> bool:
    return isinstance(linear.maps[0] if isinstance(linear, Composed) else linear, Dense)


def _laid_out(vectors: Tensor) -> Tensor:
    return vectors.contiguous(memory_format=torch.channels_last if vectors.dim() == 4 else torch.contiguous_format)


def _cost(linear: LinearMap) -> float:
    """About what an iteration costs: two applications of the map, and passes over its vectors."""
    if isinstance(linear, Composed):
        return sum(_cost(each) for each in linear.maps)
    inputs, outputs = math.prod(linear.input_sizes), math.prod(linear.output_sizes)
    return 2 * linear.terms * outputs + 200 * (inputs + outputs)


def _cheapest(
    ratios: dict[int, list[Tensor]], choices: dict[int, list[int]], costs: dict[int, float], single: int
) -> dict[int, int]:
    """Iterations by layer that hold what is wanted, by steps of the most gain in the product for the cost.

    ratios: of each layer and choice, (samples,) norm by converged norm.   single: how many layers there are; chains
    behind them are each held by itself, and are no part of the product.
    """
    taken = dict.fromkeys(ratios, 0)

    def gain(layer: int) -> float:
        at = taken[layer]
        more = ratios[layer][at + 1].log().mean() - ratios[layer][at].log().mean()
        return float(more) / (costs[layer] * (choices[layer][at + 1] - choices[layer][at]))

    while taken:
        own = [ratios[layer][at] for layer, at in taken.items() if layer < single]
        can_grow = [layer for layer, at in taken.items() if at + 1 < len(ratios[layer])]
        far = [layer for layer in can_grow if ratios[layer][taken[layer]].mean() < LAYER]
        if not far and own:
            product = torch.stack(own).prod(0)
            if not (product.mean() >= PRODUCT and product.min() >= WORST):
                far = [layer for layer in can_grow if layer < single]
        if not far:
            break
        taken[max(far, key=gain)] += 1
    return {layer: choices[layer][at] for layer, at in taken.items()}
