"""The differentiable pass through a network that carries the clean value, a box, a radius and the masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..norms.masked_norm import values_are_at_hand
from .layers import Activation, Operator, at
from .training_norms import SHARED_ITERATIONS, TrainingNorms

# The global norms are taken for a batch of one. As a start for the masked norms a rough singular vector does: a
# convolution has it nearly for free, a dense layer reads its whole weight for it. As a value they want to be converged.
START_ITERATIONS = 8
DENSE_START_ITERATIONS = 5
GLOBAL_ITERATIONS = 30


class Propagation:
    """The state of one pass: what is known of the values behind the layers that have been passed.

    The masked norms take ``iterations``, from the global singular vectors, or those of ``kept`` with the labels ``y``.
    """

    def __init__(
        self,
        x: Tensor,
        eps: Tensor,
        radius: str,
        iterations: int,
        kept: TrainingNorms | None = None,
        y: Tensor | None = None,
    ) -> None:
        self.batch = x.shape[0]
        self.eps = eps
        self.local = radius == "local"
        self.iterations = iterations
        self.kept = kept
        self.y = y
        # clean values, followed by the box centres once there is a box: one convolution serves both
        self.values = x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
        # at the input the ball lies inside the box +- eps, and so it does behind the first operator: no box needed yet
        self.half_width: Tensor | None = None
        self.reach = eps
        self.column_mask: Tensor | None = None
        self.columns_left: Tensor | None = None  # (B,) how many
        self.row_masks: list[Tensor] = []
        self.column_masks: list[Tensor] = []
        self.varying: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.sparsity_terms: list[Tensor] = []
        self.operators: list[tuple[Operator, list[int]]] = []
        self.input_masks: list[Tensor | None] = []

    def pass_layer(self, path: str, operator: Operator | None, activation: Activation) -> None:
        """One layer: ``operator`` (the identity where None), then ``activation``."""
        sizes = list(self.values.shape[1:])
        columns, columns_left = self.column_mask, self.columns_left
        if operator is None:
            ones = self.values.new_ones(1, *sizes)
            squared_row_norms = ones if columns is None else columns.to(ones.dtype)
        else:
            operator.check_input(path, self.values)
            self.values = operator(self.values, operator.weight, operator.bias)
            if self.half_width is not None:
                self.half_width = operator(self.half_width, operator.weight.abs())
            squared_row_norms = operator.squared_row_norms(columns, sizes, self.values, exact=self.local)
        self.values, self.half_width, rows, self.column_mask, slack, varying = ops.activation_pattern(
            self.values,
            self.half_width,
            squared_row_norms,
            self.reach,
            activation.kind or "identity",
            activation.first,
            activation.second,
        )
        self.columns_left = varying[:, 1]
        if not activation.kind:
            self.values, self.half_width = _monotone(activation, self.values, self.half_width)
        if operator is None:
            return
        if not self.local and activation.kind == "clipped_maxmin":
            rows = torch.ones_like(rows)  # the paper removes none
            varying = torch.stack([torch.full_like(varying[:, 0], rows.shape[1:].numel()), varying[:, 1]], 1)
        everything = varying[:, 0] == rows.shape[1:].numel()
        if columns_left is not None:
            everything = everything & (columns_left == math.prod(sizes))
        self.norms.append(self._norm(path, operator, rows, columns, sizes, everything))
        self.row_masks.append(rows)
        self.column_masks.append(self.column_mask)
        self.varying.append(varying)
        self.sparsity_terms.append(slack.sum(0) / max(self.batch, 1))
        self.operators.append((operator.snapshot(), sizes))
        self.input_masks.append(columns)

    def _norm(
        self,
        path: str,
        operator: Operator,
        rows: Tensor,
        columns: Tensor | None,
        sizes: list[int],
        everything: Tensor,
    ) -> Tensor:
        """(B,) masked norms, and the radius times them; ``everything``: (B,) where no row or column goes."""
        whole: Tensor | None = None
        start: Tensor | None = None
        if not self.local:
            iterations = max(self.iterations, GLOBAL_ITERATIONS)
            whole, start, _ = operator.norm(None, None, [1, *sizes], None, iterations)
        if self.kept is not None and self.y is not None:
            norm = self.kept.norm(len(self.norms), operator, rows, columns, sizes, self.y)
        else:
            norm = self._fresh_norm(operator, rows, columns, sizes, everything, whole, start)
        self.reach = self.reach * (norm if whole is None else whole)
        check_norm(path, norm)
        return norm

    def _fresh_norm(
        self,
        operator: Operator,
        rows: Tensor,
        columns: Tensor | None,
        sizes: list[int],
        everything: Tensor,
        whole: Tensor | None,
        start: Tensor | None,
    ) -> Tensor:
        """From the global singular vector; the samples that lose nothing have the global norm, ``whole``."""
        one = [1, *sizes]
        if whole is None and (not values_are_at_hand(everything) or bool(everything.any())):
            whole, start, _ = operator.norm(None, None, one, None, max(self.iterations, SHARED_ITERATIONS))
        elif whole is None:
            with torch.no_grad():
                steps = DENSE_START_ITERATIONS if operator.conv is None else START_ITERATIONS
                start = operator.norm(None, None, one, None, steps)[1]
        if whole is None or not values_are_at_hand(everything):
            norm = operator.norm(rows, columns, [self.batch, *sizes], start, self.iterations)[0]
            return norm if whole is None else torch.where(everything, whole, norm)
        rest = (~everything).nonzero()[:, 0]
        norm = whole.expand(self.batch)
        if not len(rest):
            return norm
        columns = None if columns is None else columns[rest]
        masked = operator.norm(rows[rest], columns, [len(rest), *sizes], start, self.iterations)[0]
        return norm.index_copy(0, rest, masked)

    def flatten(self) -> None:
        self.values = self.values.flatten(1)
        self.half_width = None if self.half_width is None else self.half_width.flatten(1)
        self.column_mask = None if self.column_mask is None else self.column_mask.flatten(1)


def check_norm(path: str, norm: Tensor) -> None:
    """ValueError by path where NaN or infinite weights made the norm NaN; not on a GPU."""
    if values_are_at_hand(norm) and bool(norm.isnan().any()):
        raise ValueError(f"{at(path)}: got NaN or infinite weights, want finite ones")


def _monotone(activation: Activation, values: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    """Box through a monotone elementwise activation with slopes in [0, 1]."""
    clean, centre = values.chunk(2)
    lower, upper = activation(centre - half_width), activation(centre + half_width)
    return torch.cat([activation(clean), (lower + upper) / 2]), (upper - lower) / 2
