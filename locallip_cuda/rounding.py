"""What rounding can do to float64 arithmetic, and how a bound stays a bound: the constants of every proof here.

The model is IEEE 754 binary64, rounded to nearest: fl(a op b) = (a op b)(1 + d), |d| <= UNIT, but for underflow, which
adds at most TINY (also where denormals are flushed to zero). Higham, "Accuracy and Stability of Numerical Algorithms",
2nd edition, chapters 2 and 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .shapes import transposed_size

UNIT = 2.0**-53
TINY = 2.0**-1022


def gamma(k: int) -> float:
    """Relative error of ``k`` roundings in a row, k u / (1 - k u), and so of an inner product of k terms in any order.

    |fl(x . y) - x . y| <= gamma(k) |x| . |y| + k TINY (Higham, lemma 3.1 and section 3.1).
    """
    if k * UNIT >= 0.01:
        raise ValueError(f"k: got {k} roundings, want fewer than {int(0.01 / UNIT)}")
    return math.nextafter(k * UNIT / (1 - k * UNIT) * (1 + 4 * UNIT), math.inf)


def up(t: Tensor) -> Tensor:
    """A float64 at or above the exact result of the one operation that ``t`` is the rounded result of."""
    return torch.where(t.abs() < TINY, TINY, torch.nextafter(t, torch.full_like(t, math.inf)))


def down(t: Tensor) -> Tensor:
    """A float64 at or below the exact result of the one operation that ``t`` is the rounded result of."""
    return -up(-t)


def rounded_up(t: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 ``t`` in ``dtype``, never below it."""
    out = t.to(dtype)
    return torch.where(out.double() < t, torch.nextafter(out, torch.full_like(out, math.inf)), out)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact, for integers in [-1022, 1023]; torch.ldexp and torch.pow may round."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def exponent_of(t: Tensor) -> Tensor:
    """int64 e with 2^e <= t < 2^(e + 1), for positive t, kept in [-1000, 1000]."""
    return (torch.frexp(t)[1].to(torch.int64) - 1).clamp(-1000, 1000)


def rescaled(t: Tensor, power: Tensor | float) -> Tensor:
    """At least ``t`` times a power of two; equal to it but where that is a denormal number."""
    result = t * power
    return torch.where(result / power < t, up(result), result)


@contextmanager
def textbook_products(device_type: str) -> Iterator[None]:
    """Products are taken as the error bounds have them: in the dtype of the tensors, by sums of products.

    No autocast, in this thread alone. That cuDNN, some of whose convolutions (Winograd, FFT) are not sums of products,
    stays out of those in float64 is said in each call, :func:`convolution` here and the op ``affine``: torch's switch
    would turn it off, or on again, in the middle of another thread's work. RuntimeError where cuBLAS is set to emulate
    float64 by integers of fewer bits.
    """
    emulated = os.environ.get("CUBLAS_EMULATE_DOUBLE_PRECISION", "")
    if device_type == "cuda" and emulated not in ("", "0"):
        raise RuntimeError(
            f"CUBLAS_EMULATE_DOUBLE_PRECISION: got {emulated!r}, want it unset or 0: a proof on a GPU takes float64 "
            "products that are sums of float64 products, not emulated ones"
        )
    with torch.autocast(device_type, enabled=False):
        yield


def convolution(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed_to: Sequence[int] | None = None,
) -> Tensor:
    """The convolution W x without cuDNN; with ``transposed_to``, the sizes (H, W) of an input, the adjoint W^T x."""
    rest = [0] * len(stride)  # what a stride leaves over at the far border
    if transposed_to is not None:
        sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        rest = [n - transposed_size(*of_axis) for n, of_axis in zip(transposed_to, sizes, strict=True)]
    transposed, switches = transposed_to is not None, (False, False, False, False)  # the third one is cuDNN's
    arguments = (list(stride), list(padding), list(dilation), transposed, rest, groups)
    result: Tensor = torch.ops.aten._convolution.default(x, weight, None, *arguments, *switches)
    return result
