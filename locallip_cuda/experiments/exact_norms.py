"""Proofs in whole numbers that the norm of a matrix is at most a bound.

Let A be a sparse matrix of float32 numbers, scaled by a power of two so that its entries are whole, and q a whole
number of at most the square of the bound, scaled alike. With any matrix L at all,

    q I - A A^T = L L^T + R,   and ||A||^2 <= q where R is positive semidefinite,

because L L^T is. R is that where each of its diagonal entries is at least the sum of the sizes of the others in its row
(Gershgorin). L is the Cholesky factor of (1 - d) q I - A A^T, as float64 has it, rounded to whole numbers; nothing is
assumed of it, and a bad one proves nothing. R is then near d q I, and is computed exactly, by FLINT's integers. What is
trusted is their arithmetic, and this file.

Rows that have no column in common are orthogonal. Where A's rows are in such an order that all that meet lie within a
width w of each other, as a convolution's are pixel by pixel, A A^T is tridiagonal in blocks of w rows, and L
bidiagonal.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import scipy.linalg
import scipy.sparse
from flint import fmpz_mat
from numpy.typing import NDArray

Matrix: TypeAlias = scipy.sparse.csr_array
_Floats: TypeAlias = NDArray[np.float64]

# widths of blocks: narrower ones cost more calls, wider ones more memory and time than there is
NARROWEST, WIDEST = 128, 3000

# shares d by which the bound's square is taken to exceed the norm's, tried in turn
SHARES = (1e-7, 1e-8, 1e-9, 1e-10)

# of the whole number that stands for the bound: how finely L is rounded
BITS = 50

# steps of the power iteration that looks for a vector which A lengthens by more than the bound
STEPS = 500


class Finding(enum.Enum):
    """What is known of a bound; the value says it in words."""

    CONFIRMED = "confirmed"
    REFUTED = "below the norm"
    TOO_WIDE = f"not examined: the Gram matrix has a bandwidth above {WIDEST}"
    OPEN = "neither proved nor below the norm"


def examined(matrix: Matrix, bound: float) -> Finding:
    """Whether ``||matrix||_2 <= bound``.

    Args:
        matrix: (m, n) float64 of float32 numbers, rows and columns in an order in which those that meet are near each
            other.   bound: finite, >= 0.

    ValueError for an entry that float32 has not.
    """
    if (matrix.data.astype(np.float32) != matrix.data).any():
        raise ValueError("matrix: got entries that float32 has not, want float32 numbers")
    rows = _without_empty(matrix)
    columns = _without_empty(rows.T.tocsr())
    a = columns if columns.shape[0] < rows.shape[0] else columns.T.tocsr()
    if a.shape[0] == 0:
        return Finding.CONFIRMED
    width = max(_width(a), NARROWEST)
    if width <= WIDEST:
        blocks = [a[first : first + width] for first in range(0, a.shape[0], width)]
        for share in SHARES:
            factor = _factor(blocks, bound * bound * (1 - share))
            if factor is not None and _is_proof(blocks, bound, factor):
                return Finding.CONFIRMED
    if _is_exceeded(a, bound):
        return Finding.REFUTED
    return Finding.OPEN if width <= WIDEST else Finding.TOO_WIDE


def _without_empty(matrix: Matrix) -> Matrix:
    matrix.eliminate_zeros()
    return matrix[np.flatnonzero(np.diff(matrix.indptr))]


def _width(a: Matrix) -> int:
    """At least |i - j| of any two rows that have a column in common; no row is empty.

    Row j meets row i < j only if j's first column is at most i's last one. ``ahead`` is the least first column from a
    row on, and rises.
    """
    first = np.minimum.reduceat(a.indices, a.indptr[:-1])
    last = np.maximum.reduceat(a.indices, a.indptr[:-1])
    ahead = np.minimum.accumulate(first[::-1])[::-1]
    furthest = np.searchsorted(ahead, last, side="right") - 1
    return int((furthest - np.arange(len(first))).max())


def _factor(blocks: Sequence[Matrix], shift: float) -> list[tuple[_Floats, _Floats]] | None:
    """The Cholesky factor of shift I - A A^T in float64, by rows of blocks: the one on the diagonal, the one on its
    left. None where the matrix is not positive definite."""
    factor: list[tuple[_Floats, _Floats]] = []
    for k, block in enumerate(blocks):
        matrix = shift * np.eye(block.shape[0]) - (block @ block.T).toarray()
        left = np.zeros((block.shape[0], 0))
        if k:
            coupling = -(blocks[k - 1] @ block.T).toarray()
            left = scipy.linalg.solve_triangular(factor[-1][0], coupling, lower=True, check_finite=False).T
            matrix -= left @ left.T
        try:
            factor.append((scipy.linalg.cholesky(matrix, lower=True, check_finite=False), left))
        except scipy.linalg.LinAlgError:
            return None
    return factor


def _is_proof(blocks: Sequence[Matrix], bound: float, factor: Sequence[tuple[_Floats, _Floats]]) -> bool:
    """Whether R is diagonally dominant. A row's slack is its diagonal entry less the sizes of the others."""
    # a float32 number v has 24 bits: v 2^k is whole for every k of at least 24 - e, 2^e > |v|
    exponent = 24 - min(int(np.frexp(block.data)[1].min()) for block in blocks)
    exponent = max(exponent, BITS - math.frexp(bound)[1])
    square = math.floor(Fraction(bound) ** 2 * 4**exponent)
    slack: list[int] = []
    before: fmpz_mat | None = None
    for k, (block, (diagonal, left)) in enumerate(zip(blocks, factor, strict=True)):
        own, beside = _whole(diagonal, exponent), _whole(left, exponent)
        rest = -_gram(block, block, exponent) - own * own.transpose()
        above = slack
        if before is not None:
            rest -= beside * beside.transpose()
            coupling = -_gram(block, blocks[k - 1], exponent) - beside * before.transpose()
            above = [own - taken for own, taken in zip(above, _sizes(coupling.transpose()), strict=True)]
        if any(value < 0 for value in above):
            return False
        own_entries = [int(rest[i, i]) for i in range(rest.nrows())]
        slack = [square + d + abs(d) - taken for d, taken in zip(own_entries, _sizes(rest), strict=True)]
        if before is not None:
            slack = [value - taken for value, taken in zip(slack, _sizes(coupling), strict=True)]
        before = own
    return all(value >= 0 for value in slack)


def _whole(values: _Floats, exponent: int) -> fmpz_mat:
    """(values 2^exponent), rounded."""
    rows, columns = values.shape
    scaled = np.rint(np.ldexp(values, exponent)).ravel()
    fits = np.abs(scaled).max(initial=0.0) < 2.0**62  # numpy makes ints of those, faster
    return fmpz_mat(rows, columns, scaled.astype(np.int64).tolist() if fits else [int(v) for v in scaled.tolist()])


def _gram(a: Matrix, b: Matrix, exponent: int) -> fmpz_mat:
    """a b^T 4^exponent, exactly."""
    met = np.intersect1d(a.indices, b.indices)  # in the other columns one of them is 0
    left = _whole(a[:, met].toarray(), exponent)
    return left * (left if a is b else _whole(b[:, met].toarray(), exponent)).transpose()


def _sizes(matrix: fmpz_mat) -> list[int]:
    """Of each row, the sum of the sizes of its entries."""
    return [int(sum(map(abs, row))) for row in matrix.tolist()]


def _is_exceeded(a: Matrix, bound: float) -> bool:
    """Whether a vector x was found with ||A^T x|| > bound ||x||, rounding counted.

    A^T x is off by at most gamma(m) |A|^T |x| in each entry, m A's rows, and each of the norms by gamma(k + 2) of
    itself, k its entries (Higham, sections 3.1 and 3.5). Twice as much is allowed for, for the rounding of the bounds.
    """
    x = np.random.default_rng(0).standard_normal(a.shape[0])
    for _ in range(STEPS):
        x = a @ (a.T @ x)
        x /= np.linalg.norm(x)
    share = 2 * (max(a.shape) + 8) * 2.0**-53
    off = share * np.linalg.norm(abs(a).T @ abs(x))
    return bool(np.linalg.norm(a.T @ x) * (1 - share) - off > bound * np.linalg.norm(x) * (1 + share))
