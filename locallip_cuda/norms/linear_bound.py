"""Bounds of the masked norms of any linear map, with the guarantees of :func:`locallip_cuda.masked_norm_bound`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    is_of_even_size,
    widest,
    without_ends,
)
from .masked_norm import ESTIMATE_CHUNK, ESTIMATE_ITERATIONS, TIGHTNESS, norm_bound

# entries of a matrix that is written out for a factorisation, and the most rows or columns that it factorises
DENSE_ENTRIES = 2**24
DENSE_UNITS = 2048

# At least what underflow inside maps in a row of even size does to a unit: TINY, times 720 binary orders, times units.
CHAIN_UNDERFLOW = 2.0**-250


@torch.no_grad()
def converged_norm(linear: LinearMap, rows: Tensor | None, columns: Tensor | None, batch: int) -> Tensor:
    """(B,) float64: the iteration's value where it has converged, a few samples at a time; an estimate."""
    chunk = max(ESTIMATE_CHUNK // max(math.prod(linear.input_sizes), 1), 1)
    parts = []
    for first in range(0, batch, chunk):
        own_rows, own_columns = (None if mask is None else mask[first : first + chunk] for mask in (rows, columns))
        count = min(chunk, batch - first)
        own = linear.of_samples(torch.arange(first, first + count, device=linear.like.device))
        parts.append(iterated_norm(own, own_rows, own_columns, count, None, ESTIMATE_ITERATIONS)[0])
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
    rounding = torch.full_like(absolute, gamma(linear.terms) + gamma(linear.adjoint_terms))
    with textbook_products(linear.like.device.type):
        return probable_norms_of(linear, rows, columns, absolute, rounding, failure_probability, tightness, seed)[0]


@dataclass(eq=False)
class Stage:
    """One of the maps of a chain, in float64.

    norm: (B,) at least its norm between the masks beside it.   absolute: (1,) at least ``|| |A| ||_2``.
    """

    linear: LinearMap
    norm: Tensor
    absolute: Tensor


@torch.no_grad()
def proved_chain_norm(
    linear: LinearMap,
    rows: Tensor,
    columns: Tensor | None,
    stages: Sequence[Stage],
    guarantee: str,
    failure_probability: float,
    tightness: float = TIGHTNESS,
    seed: int | None = None,
) -> Tensor:
    """(B,) float64 at least the norm of a chain, and at most the product of its stages' norms.

    Args:
        linear: the stages in a row, with masks (:class:`.linear.Masking`) and rearrangements between them.
        rows, columns: as for :func:`proved_norm`.   stages: the first one applied first; all their norms hold.

    A stage that rounds by gamma(m) |A_k| |x| turns vectors of length 1 into ones that are off by at most
    sum_k gamma(m_k) nu_k prod_{j != k} (s_j + gamma(m_j) nu_j) behind all of them, with ``norm`` s and ``absolute`` nu.
    """
    norms = [stage.norm for stage in stages]
    product = torch.ones_like(norms[0])
    for norm in norms:
        product = torch.where((product == 0) | (norm == 0), 0, up(product * norm))
    off = []
    for direction in ("terms", "adjoint_terms"):
        own = [up(gamma(getattr(stage.linear, direction) + 8) * stage.absolute) for stage in stages]
        off.append(product_off_by(norms, own))
    with textbook_products(linear.like.device.type):
        if guarantee == "deterministic":
            found = _written_out(linear, rows, columns, product, off[1], failure_probability)
        else:
            rounding = up(up(off[0] + off[1]) / product).nan_to_num(nan=0.0)
            more = (failure_probability, tightness, seed)
            found = probable_norms_of(linear, rows, columns, product, rounding, *more)[0]
    return torch.minimum(found, product)


def product_off_by(norms: Sequence[Tensor], off: Sequence[Tensor]) -> Tensor:
    """(B,) at least the norm of the difference between a product of maps of ``norms``, and one of maps that differ from
    them by ``off`` in norm: of one difference and the others' maps, the sum over all of them."""
    total = torch.zeros_like(norms[0])
    for k, own in enumerate(off):
        share = own.expand_as(total)
        for j, norm in enumerate(norms):
            if j != k:
                share = up(share * up(norm + off[j]))
        total = up(total + share)
    return total


def _written_out(
    linear: LinearMap,
    rows: Tensor,
    columns: Tensor | None,
    product: Tensor,
    rounding: Tensor,
    failure_probability: float,
) -> Tensor:
    """Norms of the chains that are small enough to be written out, sample by sample; ``product`` of the others."""
    found = product.clone()
    if not is_of_even_size(linear):
        return found
    at_once = max(DENSE_ENTRIES // widest(linear), 1)
    kept_rows = rows.flatten(1)
    kept_columns = linear.like.new_ones(len(rows), math.prod(linear.input_sizes), dtype=torch.bool)
    kept_columns = kept_columns if columns is None else columns.flatten(1)
    for b in (product > 0).nonzero()[:, 0].tolist():
        own_rows, own_columns = kept_rows[b].nonzero()[:, 0], kept_columns[b].nonzero()[:, 0]
        count = len(own_rows)
        if not count * len(own_columns):
            found[b] = 0
            continue
        if count * len(own_columns) > DENSE_ENTRIES or min(count, len(own_columns)) > DENSE_UNITS:
            continue
        own = linear.of_samples(torch.tensor([b], device=rows.device))
        parts = []
        for first in range(0, count, at_once):
            chosen = own_rows[first : first + at_once]
            units = torch.zeros(len(chosen), kept_rows.shape[1], dtype=torch.float64, device=rows.device)
            units.scatter_(1, chosen.unsqueeze(1), 1.0)
            image = own.adjoint(units.view(len(chosen), *linear.output_sizes))
            parts.append(image.flatten(1)[:, own_columns])
        weight = torch.cat(parts)
        norm = proved_norm(Dense(weight), None, None, 1, "deterministic", failure_probability)
        off = up(rounding[b] * math.sqrt(count) * (1 + 4 * UNIT))
        found[b] = up(up(norm[0] + off) + weight.numel() * CHAIN_UNDERFLOW)
    return found


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
