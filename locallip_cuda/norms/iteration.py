"""Norms of masked linear maps by iteration, for training: by the compiled op where a map is one kernel.

``||diag(rows) A diag(columns)||_2`` for a batch of masks, never above the true norm but for rounding, with the gradient
v^T diag(rows) dA diag(columns) u of its singular vectors u and v, which are held constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import NOISE, pseudo_random
from ..shapes import flat
from .linear import (
    Adjoint,
    Composed,
    Convolution,
    Dense,
    Identity,
    LinearMap,
    Masking,
    Rearrangement,
    Reshape,
    Scaling,
    without_ends,
)


def iterated_norm(
    linear: LinearMap,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    start: Tensor | None,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma (B,), right (B, *input), left (B, *output)): norms and singular vectors; only sigma has a gradient.

    Args:
        rows, columns: bool (B, *output_sizes) and (B, *input_sizes), True where one stays; None keeps all.
        batch: B.   start: None or right vectors to start from, (B or 1, *input_sizes).
        iterations: dimensions of the Krylov space, but one; of no meaning for what has its norm in closed form.
    """
    if isinstance(linear, (Identity, Scaling)):
        return _of_diagonal(linear, rows, columns, batch)
    if isinstance(linear, Rearrangement):
        return _of_rearrangement(linear, rows, columns, batch)
    if isinstance(linear, Composed):
        return _of_composed(linear, rows, columns, batch, start, iterations)
    if isinstance(linear, Adjoint):
        first = None if start is None else linear(start.detach())
        sigma, right, left = iterated_norm(linear.of, columns, rows, batch, first, iterations)
        return sigma, left, right
    if isinstance(linear, (Dense, Convolution)):
        return _of_kernel(linear, rows, columns, batch, start, iterations)
    return _of_any(linear, rows, columns, batch, start, iterations)


def _laid_out(t: Tensor | None, sizes: list[int]) -> Tensor | None:
    return None if t is None else t.reshape(len(t), *sizes)


def _of_kernel(
    linear: Dense | Convolution,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    start: Tensor | None,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, inner, outer, geometry = linear.planar()

    sigma, right, left = ops.masked_norm(
        weight,
        _laid_out(rows, outer),
        _laid_out(columns, inner),
        _laid_out(start, inner),
        [batch, *inner],
        *geometry,
        iterations,
    )
    return sigma, right.reshape(batch, *linear.input_sizes), left.reshape(batch, *linear.output_sizes)


def _of_composed(
    linear: Composed, rows: Tensor | None, columns: Tensor | None, batch: int, start: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Without the rearrangements at its ends where they do nothing but move the masks."""
    inner, rows, columns, first, last = without_ends(linear, rows, columns, batch)
    if first is None and last is None:
        chain = _chain(linear)
        if chain is not None:
            return _of_chain(linear, chain, rows, columns, batch, start, iterations)
        return _of_any(linear, rows, columns, batch, start, iterations)
    moved = start if start is None or first is None else first(start)
    sigma, right, left = iterated_norm(inner, rows, columns, batch, moved, iterations)
    return sigma, right if first is None else first.adjoint(right), left if last is None else last(left)


def _chain(linear: Composed) -> tuple[list[Dense | Convolution], list[Tensor]] | None:
    """Its kernels, and the masks between them, each in the shape of the next one's input; None where it is more than
    kernels, masks and reshapes."""
    kernels: list[Dense | Convolution] = []
    masks: list[Tensor] = []
    between: Tensor | None = None
    for each in linear.maps:
        if isinstance(each, (Dense, Convolution)):
            if kernels:
                sizes = each.planar()[1]
                if between is None:
                    between = torch.ones(1, *sizes, dtype=torch.bool, device=each.like.device)
                masks.append(between.reshape(len(between), *sizes))
            kernels.append(each)
            between = None
        elif isinstance(each, Reshape) and kernels:
            between = None if between is None else between.reshape(len(between), *each.output_sizes)
        elif isinstance(each, Masking) and kernels:
            between = each.mask if between is None else between & each.mask
        else:
            return None
    return (kernels, masks) if between is None and len(kernels) > 1 else None


def _of_chain(
    linear: Composed,
    chain: tuple[list[Dense | Convolution], list[Tensor]],
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    start: Tensor | None,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, masks = chain
    weights, inputs, outputs, geometry = zip(*(kernel.planar() for kernel in kernels), strict=True)
    *numbers, groups = zip(*geometry, strict=True)
    stride, padding, dilation = ([n for own in each for n in own] for each in numbers)
    inner, outer = inputs[0], outputs[-1]
    sigma, right, left = ops.chain_norm(
        weights,
        masks,
        _laid_out(rows, outer),
        _laid_out(columns, inner),
        _laid_out(start, inner),
        [batch, *inner],
        stride,
        padding,
        dilation,
        groups,
        iterations,
    )
    return sigma, right.reshape(batch, *linear.input_sizes), left.reshape(batch, *linear.output_sizes)


def _of_diagonal(
    linear: Identity | Scaling, rows: Tensor | None, columns: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, like = linear.input_sizes, linear.like
    entries = linear(torch.ones(1, *sizes, dtype=like.dtype, device=like.device)).expand(batch, *sizes)
    for mask in (rows, columns):
        entries = entries if mask is None else torch.where(mask, entries, 0)
    diagonal = flat(entries)
    largest = diagonal.detach().abs().argmax(1, keepdim=True)
    value = diagonal.gather(1, largest)
    right = torch.zeros_like(diagonal).detach().scatter(1, largest, (value != 0).to(diagonal.dtype))
    left = right * value.detach().sign()
    return value.abs()[:, 0], right.view(batch, *sizes), left.view(batch, *sizes)


def _of_rearrangement(
    linear: Rearrangement, rows: Tensor | None, columns: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The root of how many outputs, at most, one input is."""
    like = linear.like
    kept = torch.ones(batch, *linear.output_sizes, dtype=like.dtype, device=like.device)
    kept = kept if rows is None else kept * rows
    counts = linear.adjoint(kept)
    counts = counts if columns is None else counts * columns
    most, largest = flat(counts).max(1, keepdim=True)
    right = torch.zeros_like(flat(counts)).scatter(1, largest, (most > 0).to(like.dtype))
    right = right.view(batch, *linear.input_sizes)
    left = linear(right) * kept / most.sqrt().clamp_min(1).view(batch, *[1] * len(linear.output_sizes))
    return most[:, 0].sqrt(), right, left


def _of_any(
    linear: LinearMap, rows: Tensor | None, columns: Tensor | None, batch: int, start: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value on a Krylov space of A^T A, orthonormalised twice and never restarted."""
    like, sizes = linear.like.detach(), linear.input_sizes
    tiny = 16 * torch.finfo(like.dtype).eps

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return flat(x * y).sum(1).view(-1, *[1] * (x.dim() - 1))

    def masked(x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0)

    def unit(x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        length = dot(x, x).sqrt()
        return torch.where(length > noise, x / length, 0)

    with torch.no_grad():
        noise_vector = pseudo_random([batch, math.prod(sizes)], 0, like).view(batch, *sizes)
        x = unit(masked(noise_vector, columns))
        if start is not None:
            x = unit(masked(start.expand(batch, *sizes), columns)) + NOISE * x
        right: list[Tensor] = []
        left: list[Tensor] = []
        for _ in range(min(iterations + 1, math.prod(sizes))):
            length = dot(x, x).sqrt()
            for _twice in range(2):
                for q in right:
                    x = x - q * dot(q, x)
            right.append(unit(x, tiny * length))  # what is no longer is rounding: the space is exhausted
            left.append(masked(linear(right[-1]), rows))
            x = masked(linear.adjoint(left[-1]), columns)
        image = torch.stack([flat(z) for z in left], 2).double()
        top = torch.linalg.eigh(image.mT @ image)[1][:, :, -1]
        best_right = sum(q * top[:, j].to(q).view(-1, *[1] * len(sizes)) for j, q in enumerate(right))
        best_right = unit(best_right)
        best_left = unit(masked(linear(best_right), rows))
    sigma = flat(best_left * masked(linear(best_right), rows)).sum(1)
    return sigma, best_right, best_left
