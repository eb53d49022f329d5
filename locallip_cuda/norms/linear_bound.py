"""Bounds of the masked norms of any linear map, with the guarantees of :func:`locallip_cuda.masked_norm_bound`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rounding import UNIT, gamma, textbook_products, up
from .iteration import iterated_norm
from .lanczos import absolute_norms_of, probable_norms_of
from .linear import (
    Adjoint,
    Composed,
    Convolution,
    Dense,
    Identity,
    LinearMap,
    Rearrangement,
    Scaling,
    Sum,
    without_ends,
)
from .masked_norm import ESTIMATE_CHUNK, ESTIMATE_ITERATIONS, TIGHTNESS, norm_bound

# entries of a matrix that is written out for a factorisation, and the most rows or columns that it factorises
DENSE_ENTRIES = 2**24
DENSE_UNITS = 2048


@torch.no_grad()
def converged_norm(linear: LinearMap, rows: Tensor | None, columns: Tensor | None, batch: int) -> Tensor:
    """(B,) float64: the iteration's value where it has converged, a few samples at a time; an estimate."""
    chunk = max(ESTIMATE_CHUNK // max(math.prod(linear.input_sizes), 1), 1)
    parts = []
    for first in range(0, batch, chunk):
        own_rows, own_columns = (None if mask is None else mask[first : first + chunk] for mask in (rows, columns))
        count = min(chunk, batch - first)
        parts.append(iterated_norm(linear, own_rows, own_columns, count, None, ESTIMATE_ITERATIONS)[0])
    return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64, device=linear.like.device)


@torch.no_grad()
def proved_norm(
    linear: LinearMap,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    guarantee: str,
    failure_probability: float,
    tightness: float = TIGHTNESS,
    seed: int | None = None,
) -> Tensor:
    """(B,) float64 at least ``||diag(rows) A diag(columns)||_2`` of the map whose weights are those of ``linear``.

    Args:
        linear: in float64.   rows, columns: bool (B, *output_sizes), (B, *input_sizes), or None for all.
        guarantee, failure_probability, tightness, seed: as for :func:`locallip_cuda.masked_norm_bound`.

    A product or a sum of kernels has under the probabilistic guarantee the bound of the one operator that it is. Under
    the deterministic one it is written out where it is small; elsewhere the product, or the sum, of its parts' stands.
    """
    more = (guarantee, failure_probability, tightness, seed)
    if isinstance(linear, (Identity, Scaling, Rearrangement)):
        return up(iterated_norm(linear, rows, columns, batch, None, 0)[0]) if batch else linear.like.new_empty(0)
    if isinstance(linear, Adjoint):
        return proved_norm(linear.of, columns, rows, batch, *more)
    if isinstance(linear, (Dense, Convolution)):
        weight, inner, outer, geometry = linear.planar()
        rows = None if rows is None else rows.reshape(batch, *outer)
        columns = None if columns is None else columns.reshape(batch, *inner)
        return norm_bound(weight, rows, columns, [batch, *inner], geometry, *more)[0]
    if isinstance(linear, Composed):
        inner_map, inner_rows, inner_columns, first, last = without_ends(linear, rows, columns, batch)
        if first is not None or last is not None:
            return proved_norm(inner_map, inner_rows, inner_columns, batch, *more)
    absolute = absolute_norm(linear, rows, columns, batch)
    if guarantee == "deterministic":
        return torch.minimum(absolute, _factorised(linear, rows, columns, batch, absolute, *more))
    with textbook_products(linear.like.device.type):
        return probable_norms_of(linear, rows, columns, absolute, failure_probability, tightness, seed)[0]


@torch.no_grad()
def absolute_norm(linear: LinearMap, rows: Tensor | None, columns: Tensor | None, batch: int) -> Tensor:
    """(B,) float64 at least ``|| diag(rows) |A| diag(columns) ||_2``, which a relative error of all entries is of."""
    return absolute_norms_of(linear, rows, columns, batch)


def _factorised(
    linear: LinearMap,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    absolute: Tensor,
    guarantee: str,
    failure_probability: float,
    tightness: float,
    seed: int | None,
) -> Tensor:
    more = (batch, guarantee, failure_probability, tightness, seed)
    outputs, inputs = math.prod(linear.output_sizes), math.prod(linear.input_sizes)
    if outputs * inputs <= DENSE_ENTRIES and min(outputs, inputs) <= DENSE_UNITS:
        flat_rows, flat_columns = (None if mask is None else mask.flatten(1) for mask in (rows, columns))
        written_out = proved_norm(Dense(linear.dense()), flat_rows, flat_columns, *more)
        return up(written_out + up(absolute * (gamma(linear.adjoint_terms + 8) * (1 + 4 * UNIT))))
    if isinstance(linear, Composed):
        result, last = torch.ones_like(absolute), len(linear.maps) - 1
        for i, part in enumerate(linear.maps):
            result = up(result * proved_norm(part, rows if i == last else None, None if i else columns, *more))
        return result
    assert isinstance(linear, Sum)
    result = torch.zeros_like(absolute)
    for part in linear.maps:
        result = up(result + proved_norm(part, rows, columns, *more))
    return result
