"""Sizes of convolutions along one dimension, and the numbers that torch takes one for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flat(t: Tensor) -> Tensor:
    """(B, numbers of a sample), of values of any shape (B, *), (B,) too."""
    return t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How long a convolution's output is; below 1 where there is none."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def transposed_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How long a transposed convolution's output is without ``output_padding``: the shortest input that gives it."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1


def several(value: int | Sequence[int], count: int) -> list[int]:
    """The ``count`` numbers that torch takes an integer, or a sequence of one, for."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers
