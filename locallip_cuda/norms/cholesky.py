"""Deterministic bounds of masked operator norms: a Cholesky factorisation that runs to completion is the proof.

Let A be what the masks leave of the operator, G = A^T A or A A^T, whichever is cheaper, and g its float64 rounding. If
the float64 Cholesky factorisation of fl(lambda I - g) runs to completion, then (Rump, "Verification of positive
definiteness", BIT 2006; Demmel 1989; Higham, "Accuracy and Stability of Numerical Algorithms", theorem 10.3)

    lambda_max(G) <= lambda + E_chol + E_shift + E_gram,

because the factors multiply to M + dM, M = fl(lambda I - g), which is positive semidefinite, and

- |dM_ij| <= c sqrt(M_ii M_jj), c = gamma(w + 2) / (1 - gamma(w + 2)), where no inner product of the factorisation has
  more than w nonzero terms. The matrix of these bounds has the norm c trace(M) at most, and, where a row of M has
  at most 2 w + 1 entries in its band, c (2 w + 1) max_i M_ii: E_chol is the smaller one, four times, as a cushion
  for triangular solves that multiply by rounded reciprocals;
- the subtraction on the diagonal is off by u max_i M_ii, at most: E_shift is twice that;
- |g - G| <= gamma(t + 2) |A|^T |A| with t terms to an entry, whose norm is at most the largest absolute row sum of A
  times its largest absolute column sum: E_gram.

Underflow adds less than UNDERFLOW to each: the survivors are scaled by a power of two where they are all tiny.

lambda is the square of an iteration's value, a little raised, and raised again where the factorisation fails. Nothing
is assumed of that value. What is assumed: LAPACK's potrf and BLAS's gemm and trsm, as torch calls them on the CPU, are
the textbook algorithms in some order of summation. Everything runs on the CPU.

For a convolution, units in pixel-major order make G banded. It is held as a stencil, (pixel, offset) -> channels x
channels, and factorised through a window that slides over the band: the factor itself is not needed, so the memory is
the square of the bandwidth. A grouped convolution is block diagonal, and its groups are proved one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import UNIT, exponent_of, gamma, power_of_two, rescaled
from ..shapes import output_size
from .lanczos import absolute_norms

# relative raises of the estimate, tried in turn; the first one fits a converged estimate
RAISES = (2e-7, 2e-6, 2e-5, 2e-4, 2e-3, 2e-2, 2e-1)

# of all sums of the Gram matrix and the factorisation: fewer than 2^60 operations, each off by 2^-1022
UNDERFLOW = 2.0**-900

# rows eliminated at a time, and columns of the window updated at a time: tuned on two cores
BLOCK = 256
PANEL = 256


def proved_norms(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    estimate: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    cap: Callable[[], float] | None = None,
) -> Tensor:
    """(B,) float64 proved upper bounds of ``||diag(row) W diag(col)||_2``, on the CPU.

    Args:
        weight: float64, with no entry above 1. Masks and shapes as :func:`locallip_cuda.ops.masked_norm`.
        estimate: (B,) values near the norms, where the search for a bound begins. A wrong one costs time or tightness.
        cap: a proved bound of the operator without masks, asked for where that may be the better one.

    Exactly 0 where no nonzero weight survives.
    """
    conv = (stride, padding, dilation, groups)
    trivial = absolute_norms(weight, row_mask, col_mask, input_shape, *conv)
    upper = trivial.clone()
    for b in (trivial > 0).nonzero()[:, 0].tolist():
        rows, cols = (None if mask is None else mask[b] for mask in (row_mask, col_mask))
        if cap is not None and all(mask is None or bool(mask.all()) for mask in (rows, cols)):
            upper[b] = min(float(trivial[b]), cap())
            continue
        exponent = exponent_of(trivial[b]).clamp(-900, 0)
        scale = float(power_of_two(-exponent))
        size = float(trivial[b]) * scale
        pieces = list(_pieces(weight * scale, rows, cols, size, input_shape[1:], conv))
        limit = None if cap is None else (lambda scale=scale: cap() * scale)
        found = _search(pieces, float(estimate[b]) * scale, size, limit)
        upper[b] = rescaled(torch.tensor(found, dtype=torch.float64, device="cpu"), 1 / scale)
    return upper


def _search(pieces: list[Dense | Banded], estimate: float, trivial: float, cap: Callable[[], float] | None) -> float:
    best = trivial
    for attempt, share in enumerate(RAISES):
        candidate = estimate * (1 + share)
        if attempt == 1 and cap is not None:
            best = min(best, cap())
        if not candidate < best:  # NaN too
            break
        found = _prove(pieces, candidate * candidate)
        if found is not None:
            return min(found, best)
    return best


def _prove(pieces: list[Dense | Banded], shift: float) -> float | None:
    """A bound of the norm proved by factorising shift I - G for every piece, or None where one is not positive."""
    worst = 0.0
    for piece in pieces:
        error = piece.error(shift)
        if error is None:
            return None
        worst = max(worst, error)
    return math.sqrt((shift + worst) * (1 + 8 * UNIT)) * (1 + 8 * UNIT)


def _factorisation_error(largest: float, trace: float, width: int) -> float:
    """E_chol + E_shift for a matrix with that largest diagonal entry and trace, w = ``width``."""
    factor = gamma(width + 2) / (1 - gamma(width + 2)) * (1 + 16 * UNIT)
    return 4 * factor * min(trace * (1 + 1e-6), (2 * width + 1) * largest) + 2 * UNIT * largest + UNDERFLOW


def _positive(factor: Tensor, info: Tensor) -> bool:
    return int(info) == 0 and bool(factor.diagonal().isfinite().all())


@dataclass
class Dense:
    """A Gram matrix and the bound of its rounding."""

    gram: Tensor
    gram_error: float

    def error(self, shift: float) -> float | None:
        """E_chol + E_shift + E_gram where shift I - G is factorised to the end, else None."""
        diagonal = shift - self.gram.diagonal()
        matrix = (-self.gram).diagonal_scatter(diagonal)
        if not _positive(*torch.linalg.cholesky_ex(matrix)):
            return None
        largest, trace = float(diagonal.max()), float(diagonal.sum())
        return _factorisation_error(largest, trace, len(diagonal)) + self.gram_error


@dataclass
class Banded:
    """A Gram matrix of pixels x channels as a stencil, its units that survive, and the bound of its rounding.

    stencil: {offset: (pixels, channels, channels)}, offset >= 0 in pixels: the block of pixel p and p + offset.
    alive: (pixels, channels) bool.
    """

    stencil: list[tuple[int, Tensor]]
    alive: Tensor
    gram_error: float

    def error(self, shift: float) -> float | None:
        """E_chol + E_shift + E_gram where shift I - G is factorised to the end, else None."""
        blocks = list(self._blocks())
        units = self.alive.sum(1)
        widest = max(int(units[first:end].sum()) for first, _, end in blocks)
        window = torch.empty(widest, widest, dtype=torch.float64, device="cpu")  # of which the lower triangle is used
        held = known = 0  # units in the window; pixels that have entered it
        largest = 0.0
        for first, last, end in blocks:
            rows = self._rows(shift, first, known, end)
            diagonal = rows.diagonal(held)
            largest = max(largest, float(diagonal.max())) if len(rows) else largest
            window[held : held + len(rows), : held + len(rows)] = rows
            held, known = held + len(rows), end
            size = int(units[first:last].sum())
            if size and not _eliminated(window[:held, :held], size):
                return None
            held -= size
        return _factorisation_error(largest, math.inf, widest) + self.gram_error

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """(first, last, end): pixels [first, last) are eliminated together, and none of them reaches past end."""
        pixels, channels = self.alive.shape
        before = [0, *self.alive.sum(1).cumsum(0).tolist()]  # survivors in front of a pixel
        reach = max(offset for offset, _ in self.stencil)
        most = max(reach // 4, BLOCK // channels, 1)  # pixels at a time, where few survive
        first = 0
        while first < pixels:
            last = first + 1
            while last < min(pixels, first + most) and before[last + 1] - before[first] <= BLOCK:
                last += 1
            yield first, last, min(last + reach, pixels)
            first = last

    def _rows(self, shift: float, first: int, known: int, end: int) -> Tensor:
        """The rows of shift I - G of pixels [known, end), in the columns of pixels [first, end), up to the diagonal."""
        channels, own = self.alive.shape[1], torch.arange(known, end, device="cpu")
        rows = torch.zeros(end - known, channels, end - first, channels, dtype=torch.float64, device="cpu")
        for offset, values in self.stencil:
            there = own[own - offset >= first]
            rows[there - known, :, there - offset - first, :] = values[there - offset].transpose(1, 2).neg_()
        rows = rows.flatten(2).flatten(0, 1)
        if not bool(self.alive[first:end].all()):
            rows = rows[self.alive[known:end].flatten()][:, self.alive[first:end].flatten()]
        diagonal = rows.diagonal(rows.shape[1] - rows.shape[0])
        diagonal += shift
        return rows


def _eliminated(window: Tensor, size: int) -> bool:
    """The first ``size`` units are eliminated and what is left moves to the front; False where that breaks down."""
    factor, info = torch.linalg.cholesky_ex(window[:size, :size])
    if not _positive(factor, info):
        return False
    left = torch.linalg.solve_triangular(factor, window[size:, :size].T, upper=False)
    rest = window[size:, size:]
    for at in range(0, len(rest), PANEL):
        rest[at:, at : at + PANEL].addmm_(left[:, at:].T, left[:, at : at + PANEL], alpha=-1)
    for at in range(0, len(rest), size):  # as many rows at a time as do not overlap where they go
        moved = rest[at : at + size, : at + size]
        window[at : at + len(moved), : moved.shape[1]] = moved
    return True


def _pieces(
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    absolute: float,
    size: Sequence[int],
    conv: tuple[Sequence[int], Sequence[int], Sequence[int], int],
) -> Iterator[Dense | Banded]:
    """The Gram matrix of one sample's operator, as blocks on a diagonal.

    absolute: at least the root of the largest absolute row sum times the largest absolute column sum of what survives.
    """
    square = absolute * absolute * (1 + 4 * UNIT)
    if weight.dim() == 2:
        kept = weight if rows is None else weight[rows]
        kept = kept if cols is None else kept[:, cols]
        kept = kept if len(kept) <= kept.shape[1] else kept.T
        yield Dense(kept @ kept.T, gamma(kept.shape[1] + 2) * square * (1 + 4 * UNIT) + UNDERFLOW)
        return
    stride, padding, dilation, groups = conv
    out, channels = weight.shape[0] // groups, weight.shape[1]
    for g in range(groups):
        own = weight[g * out : (g + 1) * out]
        own_rows = None if rows is None else rows[g * out : (g + 1) * out]
        own_cols = None if cols is None else cols[g * channels : (g + 1) * channels]
        yield _convolution(own, own_rows, own_cols, square, size[1:], stride, padding, dilation)


def _convolution(
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    square: float,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Banded:
    """The smaller of the two Gram matrices, by the work of its factorisation."""
    kernel = weight.shape[2:]
    output = [output_size(*numbers) for numbers in zip(size, kernel, stride, padding, dilation, strict=True)]
    places = [
        torch.arange(k, device="cpu").view(-1, 1) * d - p for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    # where output pixel i takes its k-th tap from, along each axis: (kernel, output)
    taps = [p + torch.arange(n, device="cpu") * s for p, n, s in zip(places, output, stride, strict=True)]
    inputs = [torch.where((t >= 0) & (t < n), t, -1) for t, n in zip(taps, size, strict=True)]
    # and which output pixel takes its k-th tap from input pixel i: (kernel, input)
    outputs = []
    for place, n, m, s in zip(places, size, output, stride, strict=True):
        at = torch.arange(n, device="cpu") - place
        outputs.append(torch.where((at % s == 0) & (at >= 0) & (at < m * s), at.div(s, rounding_mode="floor"), -1))

    def alive(mask: Tensor | None, channels: int, sizes: Sequence[int]) -> Tensor:
        everything = torch.ones(channels, *sizes, dtype=torch.bool, device="cpu") if mask is None else mask
        return everything.flatten(1).T.contiguous()

    row_units, col_units = alive(rows, weight.shape[0], output), alive(cols, weight.shape[1], size)
    by_tap = weight.flatten(2).movedim(2, 0)  # (taps, out, in)
    sides = [
        _Side(inputs, size, by_tap, row_units, col_units),
        _Side(outputs, output, by_tap.transpose(1, 2), col_units, row_units),
    ]
    return min(sides, key=lambda side: side.work()).gram(square)


class _Side:
    """One Gram matrix of a convolution: sums over hidden units of products of the visible units' weights.

    taps: along both axes, (kernel, hidden pixels): the visible pixel, -1 for none. visible: sizes of both axes.
    weight: (taps, hidden channels, visible channels). hidden, alive: (pixels, channels) bool, what survives of each.
    """

    def __init__(
        self, taps: list[Tensor], visible: Sequence[int], weight: Tensor, hidden: Tensor, alive: Tensor
    ) -> None:
        height, width = taps
        pixel = height.view(len(height), 1, -1, 1) * visible[1] + width.view(1, len(width), 1, -1)
        inside = (height.view(len(height), 1, -1, 1) >= 0) & (width.view(1, len(width), 1, -1) >= 0)
        self.pixels = torch.where(inside, pixel, -1).flatten(2).flatten(0, 1)  # (taps, hidden pixels)
        self.weight, self.hidden, self.alive = weight, hidden, alive
        pairs: dict[int, dict[int, list[tuple[int, Tensor]]]] = {}  # {offset: {tap: [(other tap, hidden pixels)]}}
        for k in range(len(weight)):
            for other in range(len(weight)):
                both = (self.pixels[k] >= 0) & (self.pixels[other] >= 0)
                offsets = (self.pixels[other] - self.pixels[k])[both]
                for offset in torch.unique(offsets).tolist():  # more than one only where the image is narrow
                    if offset >= 0:
                        here = both & (self.pixels[other] - self.pixels[k] == offset)
                        pairs.setdefault(offset, {}).setdefault(k, []).append((other, here.nonzero()[:, 0]))
        self.pairs = pairs

    def work(self) -> float:
        """Operations of the factorisation, but for a constant."""
        units, pixels = float(self.alive.sum()), len(self.alive)
        return units * (units / pixels * (max(self.pairs, default=0) + 1)) ** 2

    def gram(self, square: float) -> Banded:
        taps, hidden, visible = self.weight.shape
        stencil = {
            o: torch.zeros(len(self.alive), visible, visible, dtype=torch.float64, device="cpu") for o in self.pairs
        }
        for k, own in enumerate(self.weight.transpose(1, 2)):
            masked = own * self.hidden.unsqueeze(1)  # (hidden pixels, visible, hidden channels)
            for offset, pairs in self.pairs.items():
                for other, here in pairs.get(k, ()):
                    stencil[offset].index_add_(0, self.pixels[k, here], masked[here] @ self.weight[other])
        error = gamma(taps * hidden + 2) * square * (1 + 4 * UNIT) + UNDERFLOW
        return Banded(sorted(stencil.items()), self.alive, error)
