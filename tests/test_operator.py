"""Convolutions over one to three dimensions and transposed ones: norms, vectors, gradients and bounds, against the SVD
of the matrix that torch's own function is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import locallip_cuda as ll

pytestmark = pytest.mark.parametrize("device", DEVICES)

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass
class Problem:
    """One convolution, float64 on the CPU, with its masks, and as the matrix that it is."""

    weight: Tensor
    input_size: tuple[int, ...]
    conv: dict[str, Any]
    transposed: bool
    output_padding: list[int]
    seed: int

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        dimensions = weight.dim() - 2
        if self.transposed:
            return TRANSPOSED[dimensions](x, weight, **self.conv, output_padding=self.output_padding)
        return FORWARD[dimensions](x, weight, **self.conv)

    def matrix(self) -> tuple[Tensor, list[int]]:
        """(outputs, inputs), and the sizes of an output."""
        units = math.prod(self.input_size)
        images = self.apply(torch.eye(units, dtype=torch.float64).view(units, *self.input_size), self.weight)
        return images.flatten(1).T, list(images.shape[1:])

    def masks(self, sizes: list[int], batch: int = 3) -> tuple[Tensor, Tensor]:
        g = generator(self.seed)
        return torch.rand(batch, *sizes, generator=g) < 0.6, torch.rand(batch, *self.input_size, generator=g) < 0.7

    def arguments(self, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor]:
        """Arguments of masked_norm, and the true norms."""
        matrix, sizes = self.matrix()
        rows, cols = self.masks(sizes)
        masked = rows.flatten(1).unsqueeze(2) * matrix * cols.flatten(1).unsqueeze(1)
        true = torch.linalg.matrix_norm(masked, 2)
        weight = self.weight.to(device, dtype)
        return (weight, rows.to(device), cols.to(device)), {**self.conv, "transposed": self.transposed}, true.to(device)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 2))

    def numbers(least: int, most: int) -> list[int]:
        return [draw(st.integers(least, most)) for _ in range(dimensions)]

    kernel, stride, dilation = numbers(1, 3), numbers(1, 2), numbers(1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, min(r, 2))) for r in reach]
    most = {1: 6, 2: 3, 3: 2}[dimensions]
    sizes = [max(1, r + 1 - 2 * p) + draw(st.integers(0, most)) for r, p in zip(reach, padding, strict=True)]
    if transposed:  # an output of one at least
        sizes = [max(n, 1 + math.ceil(2 * p / s)) for n, p, s in zip(sizes, padding, stride, strict=True)]
    inner, outer = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    shape = (inner, outer // groups) if transposed else (outer, inner // groups)
    seed = draw(st.integers(0, 10**6))
    weight = torch.randn(*shape, *kernel, generator=generator(seed), dtype=torch.float64)
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    left_over = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    left_over = [min(rest, s - 1) for rest, s in zip(left_over, stride, strict=True)]
    return Problem(weight, (inner, *sizes), conv, transposed, left_over if transposed else [], seed)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_norms_and_vectors(device: str, problem: Problem) -> None:
    arguments, conv, true = problem.arguments(device, torch.float64)
    sigma, right, left = ll.masked_norm(*arguments, **conv, iterations=60, return_vectors=True)
    torch.testing.assert_close(sigma, true, rtol=1e-9, atol=1e-12)
    assert right.shape == arguments[2].shape and left.shape == arguments[1].shape
    image = problem.apply(right.cpu() * arguments[2].cpu(), problem.weight).to(device) * arguments[1]
    torch.testing.assert_close(image, left * sigma.view(-1, *[1] * (left.dim() - 1)), rtol=0, atol=1e-5)
    few = ll.masked_norm(*arguments, **conv, iterations=1)
    assert (few <= true * (1 + 1e-12)).all()


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_a_start_is_a_right_vector_of_the_operator(device: str, problem: Problem) -> None:
    arguments, conv, true = problem.arguments(device, torch.float64)
    right = ll.masked_norm(*arguments, **conv, iterations=60, return_vectors=True)[1]
    torch.testing.assert_close(
        ll.masked_norm(*arguments, **conv, iterations=2, start=right), true, rtol=0.05, atol=1e-12
    )
    one = ll.masked_norm(*arguments, **conv, iterations=2, start=right[0])
    assert (one <= true * (1 + 1e-12)).all()


@settings(max_examples=30, deadline=None)
@given(problem=problems(), guarantee=st.sampled_from(["probabilistic", "deterministic"]))
def test_bounds_are_above_and_near(device: str, problem: Problem, guarantee: str) -> None:
    arguments, conv, true = problem.arguments(device, torch.float64)
    bound = ll.masked_norm_bound(*arguments, **conv, guarantee=guarantee)
    assert (bound.upper >= true * (1 - 1e-13)).all()
    assert (bound.upper <= true * 1.006 + 1e-12).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_gradients(device: str, dimensions: int, transposed: bool) -> None:
    g = generator(dimensions)
    weight = torch.randn(2, 2, *[3] * dimensions, generator=g, dtype=torch.float64)
    conv = {"stride": 2, "padding": 1, "dilation": 1, "groups": 1}
    problem = Problem(weight, (2, *[4] * dimensions), conv, transposed, [0] * dimensions, 0)
    (weight, *masks), conv, _ = problem.arguments(device, torch.float64)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ll.masked_norm(w, *masks, **conv, iterations=40), weight)


def test_transposed_without_masks_has_the_norm_of_its_convolution(device: str) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=generator(0)).to(device)
    forward = ll.masked_norm(weight, input_size=(3, 8, 8), padding=1, stride=2, iterations=40)
    back = ll.masked_norm(
        weight,
        torch.ones(1, 3, 8, 8, dtype=torch.bool, device=device),
        padding=1,
        stride=2,
        input_size=(4, 4, 4),
        transposed=True,
        iterations=40,
    )
    torch.testing.assert_close(forward, back)
    smaller = ll.masked_norm(
        weight, padding=1, stride=2, input_size=(4, 4, 4), transposed=True, return_vectors=True, iterations=40
    )
    assert smaller[2].shape == (1, 3, 7, 7) and smaller[0] <= back * (1 + 1e-5)


K1, K2 = torch.ones(4, 2, 3), torch.ones(4, 2, 3, 3)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one dimension without a size": (lambda: ll.masked_norm(K1), ValueError, r"input_size: got None, want \(Cin, W\)"),
    "three dimensions without a size": (
        lambda: ll.masked_norm(torch.ones(4, 2, 3, 3, 3)),
        ValueError,
        r"input_size: got None, want \(Cin, D, H, W\)",
    ),
    "two strides for one dimension": (
        lambda: ll.masked_norm(K1, input_size=(2, 9), stride=(1, 2)),
        ValueError,
        r"stride: got \(1, 2\), want an integer >= 1 or a sequence of one",
    ),
    "a transposed dense weight": (
        lambda: ll.masked_norm(torch.ones(4, 2), transposed=True),
        ValueError,
        r"transposed: got True for a dense weight \(m, n\), want False, and weight.T",
    ),
    "transposed as a number": (lambda: ll.masked_norm(K2, transposed=1), TypeError, "transposed: got int, want a bool"),
    "channels of the convolution, not of its adjoint": (
        lambda: ll.masked_norm(K2, input_size=(2, 5, 5), transposed=True),
        ValueError,
        r"input_size: got \(2, 5, 5\), want \(Cin, H, W\) with Cin = 4",
    ),
    "an output that no output_padding gives": (
        lambda: ll.masked_norm(
            K2, torch.ones(1, 2, 9, 9, dtype=torch.bool), input_size=(4, 5, 5), transposed=True, padding=1
        ),
        ValueError,
        r"row_mask: got shape \(1, 2, 9, 9\), want \(B, Cout, H, W\).* as \(5, 5\) is without",
    ),
    "nothing comes out": (
        lambda: ll.masked_norm(K2, input_size=(4, 1, 1), transposed=True, padding=2),
        ValueError,
        r"input_size: got \(4, 1, 1\), want an input whose transposed convolution is not empty",
    ),
    "a row mask of another shape": (
        lambda: ll.masked_norm(
            K2, torch.ones(1, 3, 5, 5, dtype=torch.bool), input_size=(4, 5, 5), transposed=True, padding=1
        ),
        ValueError,
        r"row_mask: got shape \(1, 3, 5, 5\), want \(B, 2, 5, 5\)",
    ),
    "a start of the output's shape": (
        lambda: ll.masked_norm(K2, input_size=(4, 5, 5), transposed=True, start=torch.ones(2, 7, 7)),
        ValueError,
        r"start: got shape \(2, 7, 7\), want \(4, 5, 5\) or",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(device: str, case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
