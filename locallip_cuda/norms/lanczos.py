"""Probabilistic bounds of masked operator norms: batched Golub-Kahan-Lanczos from fresh Gaussian vectors, in float64.

For A = diag(row) W diag(col) and g Gaussian on the surviving columns, the overlap <v, g> with a top singular vector v
of A is a standard normal number, whatever A is: |<v, g>| < c with probability at most c sqrt(2 / pi). Of several
independent vectors all miss v so badly with probability at most (c sqrt(2 / pi))^starts = failure_probability. But for
that event, a run that starts from q_0 = g / |g| with |<v, g>| >= c, and finds no eigenvalue of A^T A above theta,
proves a bound of ||A||^2 little above theta: :func:`locallip_cuda.ops.lanczos_bound`, with |<v, q_0>| >= level =
c / |g|. The event does not depend on the number of steps, so the runs may be watched and stopped as soon as the bound
is tight. This needs about as many steps as the a priori theorem of Kuczynski and Wozniakowski, "Estimating the largest
eigenvalue by the power and Lanczos algorithms with a random start" (1992), where the spectrum is dense at its end, and
far fewer where it has a gap.

Rounding. Nothing is assumed of the vectors but short local residuals, so they are not reorthogonalised and only three
are held at a time. With nu >= || |A| ||_2 (the root of the largest absolute row sum times the largest column sum),
m terms to a row and n to a column, and |q_j| <= 1 + 1e-6, one step

    z = A q_j,   w = A^T z,   r = w - alpha_j q_j - beta_{j-1} q_{j-1},   q_{j+1} = r / beta_j

leaves a local residual of at most ((gamma(m) + gamma(n)) 1.01 + 64 u) nu^2: gamma(m) nu^2 and gamma(n) nu^2 from the
two products (of a chain of maps, whose || |A| || would be far above its norm, what its stages leave, and nu >= ||A||),
4u (|w| + |alpha q| + |beta q'|) <= 4u * 6 nu^2 from the differences and 3u * 3.1 nu^2 from the division;
alpha and beta themselves may be any numbers. The masks carry a power of two that brings nu to [1, 2), so that only
float64 weights that span more than 900 binary orders underflow, by less than UNDERFLOW. A rounded q_0 is off by at
most 4u.

Because a level below these residuals would prove nothing, there are as many starts as let each miss with a probability
of 2e-6 or more: two at the default failure probability, also where 200 norms share it. They need a fifth more
applications than one would.

Entropy. "Whatever A is" includes an A made by someone who knows how the vectors are drawn, and can make v orthogonal to
n - 1 of them. Every start has a stream of its own, numpy's Philox with 128 bits of key from the operating system: it is
among those with a probability below n 2^-128. A seed that can be guessed voids the promise.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..rounding import TINY, UNIT, convolution, exponent_of, gamma, power_of_two, rescaled, up
from .linear import LinearMap, is_of_even_size, widest

LEAST_MISS = 2e-6
KEY_BITS = 128
# What a key leaves against 2^32 prepared vectors. Several starts have several keys, but no more is promised.
LEAST_FAILURE_PROBABILITY = 2.0 ** (32 - KEY_BITS)
UNDERFLOW = 2.0**-80
# Beyond, the lengths of vectors that the residual is derived with would not hold, and no bound would be of use.
LARGEST_ROUNDING = 1e-3

# Elements of the vectors that are worked on at a time: on a CPU few enough for its cache, and for the unfolded input of
# a convolution, in which each counts once a tap, to come from memory that is at hand; on a GPU enough to fill it.
# Not by the number of threads: the runs of a chunk stop together, so that it would show in the bounds.
CHUNK = {"cpu": 2**17, "cuda": 2**24}


@dataclass
class _Operator:
    """What a run needs of A, in float64.

    products: A and A^T for some of the samples, which matter where there are masks inside A.
    norm: (B,) nu, at least ||A||.   rounding: (B,), at least what the two products of a unit vector are off by, in
    units of nu: |fl(A q) - A q| + |fl(A^T p) - A^T p|.
    sizes: of an input.   units: of the largest vector on the way.
    """

    products: Callable[[Tensor], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]
    norm: Tensor
    rounding: Tensor
    sizes: list[int]
    units: int
    device: torch.device


def _apply(weight: Tensor, x: Tensor, conv: tuple[Sequence[int], Sequence[int], Sequence[int], int]) -> Tensor:
    if weight.dim() == 2:
        return x @ weight.T
    return convolution(x, weight, *conv)


def _apply_transposed(
    weight: Tensor, z: Tensor, input_shape: Sequence[int], conv: tuple[Sequence[int], Sequence[int], Sequence[int], int]
) -> Tensor:
    if weight.dim() == 2:
        return z @ weight
    return convolution(z, weight, *conv, transposed_to=input_shape[1:])


def absolute_norms(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """(B,) at least ``|| |A| ||_2`` and so ``||A||_2``: root of the largest absolute row and column sums, float64.

    0 exactly where no nonzero weight survives.
    """
    conv, size = (stride, padding, dilation, groups), weight.abs()

    def units(mask: Tensor | None, shape: Sequence[int]) -> Tensor:
        return size.new_ones(1, *shape) if mask is None else mask.to(size.dtype)

    def largest(sums: Tensor, mask: Tensor | None) -> Tensor:
        return (sums if mask is None else torch.where(mask, sums, 0)).flatten(1).amax(1)

    columns = units(col_mask, input_shape[1:])
    rows = _apply(size, columns, conv)
    row_sums = largest(rows, row_mask)
    col_sums = largest(_apply_transposed(size, units(row_mask, rows.shape[1:]), input_shape[1:], conv), col_mask)
    terms = weight[0].numel() + weight[:, 0].numel()
    # sums of positive numbers, their roots and the product after them, which may be denormal
    norms: Tensor = up(row_sums.sqrt() * col_sums.sqrt() * (1 + gamma(terms + 8)))
    return torch.where((row_sums > 0) & (col_sums > 0), norms, 0).expand(input_shape[0])


def absolute_norms_of(linear: LinearMap, row_mask: Tensor | None, col_mask: Tensor | None, batch: int) -> Tensor:
    """:func:`absolute_norms` of a map in float64, (batch,); infinite where products of its parts overflow.

    Not 0 where products of small entries underflow: each product is some TINY larger.
    """
    size, like = linear.absolute(), linear.like

    def largest(
        product: Callable[[Tensor], Tensor], mask: Tensor | None, sizes: list[int], of: Tensor | None
    ) -> Tensor:
        ones = like.new_ones(1, *sizes) if mask is None else mask.to(like.dtype)
        sums = product(ones)
        return (sums if of is None else torch.where(of, sums, 0)).flatten(1).amax(1)

    row_sums = largest(size, col_mask, linear.input_sizes, row_mask)
    col_sums = largest(size.adjoint, row_mask, linear.output_sizes, col_mask)
    growth = 1 + gamma(linear.terms + linear.adjoint_terms + 8)
    norms: Tensor = up(up(row_sums + UNDERFLOW).sqrt() * up(col_sums + UNDERFLOW).sqrt() * growth)
    return norms.nan_to_num(nan=math.inf, posinf=math.inf).expand(batch)


def _enough_steps(level: float, tightness: float) -> int:
    """Steps after which a Chebyshev polynomial has amplified an overlap of ``level`` past all else."""
    gap = (1 + tightness) ** 2 - 1
    return math.ceil(math.log(2 / level) / (2 * math.sqrt(gap)))


def check_entropy(failure_probability: float) -> None:
    """ValueError for a failure probability of one norm that the entropy of the start vectors does not allow."""
    if failure_probability < LEAST_FAILURE_PROBABILITY:
        raise ValueError(
            f"failure_probability: got {failure_probability:.3g} for a norm, want at least 2^-96 = "
            f"{LEAST_FAILURE_PROBABILITY:.3g}: the entropy of the random start vectors allows no less"
        )


def _gaussian(count: int, units: int, randbits: Callable[[int], int]) -> Tensor:
    """(count, units) standard normal numbers, float64 on the CPU, each row from a Philox stream under its own key."""
    rows = np.empty((count, units))
    for row in rows:
        np.random.Generator(np.random.Philox(key=randbits(KEY_BITS))).standard_normal(out=row)
    return torch.from_numpy(rows)


def probable_norms(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    failure_probability: float,
    tightness: float,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(upper, estimate), float64 (B,): each ``upper`` holds with probability 1 - failure_probability.

    ``weight``: float64, scaled so that its largest entry is near 1. Shapes as :func:`locallip_cuda.ops.masked_norm`.
    ``upper`` is within a factor 1 + ``tightness`` of the estimate, but for operators so badly scaled that rounding
    swamps them; these get a wider bound. The keys of the random vectors come from the operating system, or follow from
    ``seed``, for repetition: then nothing is promised against whoever knew it.
    """
    conv = (stride, padding, dilation, groups)
    absolute = absolute_norms(weight, row_mask, col_mask, input_shape, *conv)
    products = (lambda x: _apply(weight, x, conv), lambda z: _apply_transposed(weight, z, input_shape[1:], conv))
    operator = _Operator(
        lambda samples: products,
        absolute,
        torch.full_like(absolute, gamma(weight[0].numel()) + gamma(weight[:, 0].numel() * groups)),
        list(input_shape[1:]),
        max(math.prod(input_shape[1:]), weight.shape[0] * math.prod(input_shape[2:])),
        weight.device,
    )
    return _in_chunks(operator, row_mask, col_mask, failure_probability, tightness, seed)


def probable_norms_of(
    linear: LinearMap,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    norm: Tensor,
    rounding: Tensor,
    failure_probability: float,
    tightness: float,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`probable_norms` of a map in float64, whose norms are at most ``norm`` (B,), and whose products are off by
    ``rounding`` (B,) of that, as :class:`_Operator` has it.

    Where sizes are so far apart that a product between its parts might underflow, ``upper`` is ``norm``: parts as
    :func:`.linear.is_of_even_size` has them and a norm of 2^-150 or more leave an underflow of less than UNDERFLOW of
    the norm.
    """

    def products(samples: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        own = linear.of_samples(samples)
        return own, own.adjoint

    if not is_of_even_size(linear):
        return norm.clone(), torch.zeros_like(norm)
    in_range = (norm >= 2.0**-150) & norm.isfinite() & (rounding <= LARGEST_ROUNDING)
    scale, off = torch.where(in_range, norm, 0), torch.where(in_range, rounding, 0)
    operator = _Operator(products, scale, off, linear.input_sizes, widest(linear), linear.like.device)
    upper, estimate = _in_chunks(operator, row_mask, col_mask, failure_probability, tightness, seed)
    return torch.where(in_range, upper, norm), estimate


def _in_chunks(
    operator: _Operator,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    failure_probability: float,
    tightness: float,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    check_entropy(failure_probability)
    randbits = secrets.randbits if seed is None else random.Random(seed).getrandbits
    some = operator.norm > 0
    for mask in (row_mask, col_mask):  # what has no row, or no column, has norm 0, whatever is known of it
        some = some if mask is None else some & mask.flatten(1).any(1)
    upper, estimate = torch.where(some, operator.norm, 0), torch.zeros_like(operator.norm)
    alive = some.nonzero()[:, 0]
    starts = max(math.ceil(math.log(failure_probability) / math.log(LEAST_MISS)), 1)
    chunk = max(CHUNK[operator.device.type] // (starts * operator.units), 1)
    for part in torch.split(alive, chunk) if len(alive) else ():
        rows, cols = (None if mask is None else mask[part] for mask in (row_mask, col_mask))
        found = _bounds_of_chunk(operator, part, rows, cols, starts, failure_probability, tightness, randbits)
        upper[part], estimate[part] = torch.minimum(upper[part], found[0]), found[1]
    return upper, estimate


def _lengths(t: Tensor) -> Tensor:
    """(B,) of (B, *), in whatever memory format, without a copy."""
    found: Tensor = torch.linalg.vector_norm(t, dim=list(range(1, t.dim())))
    return found


def _bounds_of_chunk(
    operator: _Operator,
    samples: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    starts: int,
    failure_probability: float,
    tightness: float,
    randbits: Callable[[int], int],
) -> tuple[Tensor, Tensor]:
    norm, batch, sizes = operator.norm[samples], len(samples), operator.sizes

    def column(t: Tensor, like: Tensor | None = None) -> Tensor:
        return t.view(-1, *[1] * (len(sizes) if like is None else like.dim() - 1))

    exponent = exponent_of(norm).clamp_min(-900)
    power = power_of_two(-exponent)
    # the state of the runs: (samples * starts, *), the starts of one sample next to each other
    rows = power if row_mask is None else row_mask * column(power, row_mask)
    cols = column(power) if col_mask is None else col_mask * column(power)
    rows, cols = rows.repeat_interleave(starts, 0), cols.repeat_interleave(starts, 0)
    q = _gaussian(starts * batch, math.prod(sizes), randbits).to(operator.device).view(-1, *sizes)
    q, rows, cols = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (q, rows, cols))
    q = q if col_mask is None else torch.where(cols != 0, q, 0)
    length = q.flatten(1).norm(dim=1)
    q = q / column(length)
    before = torch.zeros_like(q)

    level = math.sqrt(math.pi / 2) * failure_probability ** (1 / starts) / length.cpu() * (1 - 1e-9) - 4 * UNIT
    rounding = operator.rounding[samples].cpu().repeat_interleave(starts)
    nu = (norm * power).cpu().repeat_interleave(starts)
    error = (1.01 * rounding + 64 * UNIT) * nu.square() * (1 + 8 * UNIT) + 2 * UNDERFLOW

    upper, estimate = (torch.full((batch,), value, dtype=torch.float64, device="cpu") for value in (math.inf, 0))
    running = torch.arange(batch, device="cpu")
    samples = samples.repeat_interleave(starts)
    apply, adjoint = operator.products(samples)
    alpha, beta, last = [], [], torch.zeros_like(length)
    limit = 2 * _enough_steps(float(level.clamp_min(TINY).min()), tightness)
    check = 8
    for step in range(1, limit + 1):
        z = apply(q)
        z = z * (column(rows, z) if row_mask is None else rows)
        w = adjoint(z) * cols
        alpha.append(_lengths(z).square())
        w.addcmul_(column(alpha[-1]), q, value=-1).addcmul_(column(last), before, value=-1)
        last = _lengths(w)
        last = torch.where(last > UNDERFLOW, last, 0)  # an invariant subspace: the rest of the residual is an error
        beta.append(last)
        before, q = q, torch.mul(w, column(torch.where(last > 0, 1 / last, 0)), out=before)
        if step < check and step < limit:
            continue
        check = step + max(4, step // 8)
        theta, top = ops.lanczos_bound(torch.stack(alpha, 1).cpu(), torch.stack(beta, 1).cpu(), error, level)
        theta, top = theta.view(-1, starts).amax(1), top.view(-1, starts).amax(1)
        upper[running], estimate[running] = torch.minimum(upper[running], top), theta
        keep = upper[running] > (1 + tightness) ** 2 * theta
        if not keep.any():
            break
        if keep.sum() <= 0.75 * len(keep):
            running = running[keep]
            both = keep.repeat_interleave(starts)
            error, level, kept = error[both], level[both], both.to(q.device)
            q, before, last, rows, cols = q[kept], before[kept], last[kept], rows[kept], cols[kept]
            alpha, beta = [a[kept] for a in alpha], [b[kept] for b in beta]
            samples = samples[kept]
            apply, adjoint = operator.products(samples)
    return (
        rescaled((upper.sqrt() * (1 + 4 * UNIT)).to(norm.device), power_of_two(exponent)),
        estimate.sqrt().to(norm.device) * power_of_two(exponent),
    )
