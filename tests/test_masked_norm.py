from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, generator, masked_matrices, matrix, true_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import locallip_cuda as ll
from locallip_cuda import ops
from locallip_cuda.ops import reference

pytestmark = pytest.mark.parametrize("device", DEVICES)


@dataclass
class Problem:
    """One weight, float64, with its masks."""

    weight: Tensor
    row_mask: Tensor | None = None
    col_mask: Tensor | None = None
    input_size: tuple[int, ...] | None = None
    conv: dict[str, Any] = field(default_factory=dict)
    start: Tensor | None = None

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        def move(t: Tensor | None, kind: torch.dtype) -> Tensor | None:
            return None if t is None else t.to(device, kind)

        weight = self.weight.to(device, dtype)
        masks = [move(m, torch.bool) for m in (self.row_mask, self.col_mask)]
        return Problem(weight, *masks, self.input_size, self.conv, move(self.start, dtype))

    def norm(self, iterations: int, **more: Any) -> Any:
        size = self.input_size if self.col_mask is None else None
        return ll.masked_norm(
            self.weight,
            self.row_mask,
            self.col_mask,
            input_size=size,
            iterations=iterations,
            start=self.start,
            **self.conv,
            **more,
        )

    def true(self) -> Tensor:
        # of the weight as rounded to its dtype: the error measured is the solver's alone
        return true_norms(self.weight, self.row_mask, self.col_mask, self.input_size, **self.conv)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def bits(g: torch.Generator, p: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g) < p


def with_values(g: torch.Generator, m: int, n: int, values: Tensor) -> Tensor:
    """A random m x n matrix with the given singular values."""
    u, v = torch.linalg.qr(randn(g, m, len(values)))[0], torch.linalg.qr(randn(g, n, len(values)))[0]
    return u @ torch.diag(values.double()) @ v.T


def one_hot(size: int, batch: int) -> Tensor:
    return F.one_hot(torch.arange(batch) % size, size).bool()


def block_diagonal(g: torch.Generator, start: bool) -> Problem:
    """Two blocks; half the samples have only the weak one's columns on, and a start may lie in it alone."""
    weight = torch.block_diag(randn(g, 20, 20), 3 * randn(g, 20, 20))
    columns = torch.ones(6, 40, dtype=torch.bool)
    columns[3:, 20:] = False
    first = torch.cat([randn(g, 20), torch.zeros(20, dtype=torch.float64)])
    return Problem(weight, None, columns, start=first if start else None)


DENSE: dict[str, Callable[[torch.Generator], Problem]] = {
    "wide": lambda g: Problem(randn(g, 40, 60), bits(g, 0.5, 6, 40), bits(g, 0.5, 6, 60)),
    "tall": lambda g: Problem(randn(g, 70, 30), bits(g, 0.5, 6, 70), bits(g, 0.8, 6, 30)),
    "unmasked": lambda g: Problem(randn(g, 50, 50)),
    "rows only": lambda g: Problem(randn(g, 40, 60), bits(g, 0.5, 6, 40)),
    "columns only": lambda g: Problem(randn(g, 40, 60), None, bits(g, 0.5, 6, 60)),
    "heavily masked": lambda g: Problem(randn(g, 80, 90), bits(g, 0.06, 12, 80), bits(g, 0.06, 12, 90)),
    "low rank": lambda g: Problem(randn(g, 50, 2) @ randn(g, 2, 70), bits(g, 0.5, 6, 50), bits(g, 0.5, 6, 70)),
    "rank one": lambda g: Problem(randn(g, 50, 1) @ randn(g, 1, 70), bits(g, 0.5, 6, 50), bits(g, 0.5, 6, 70)),
    "repeated top": lambda g: Problem(
        with_values(g, 40, 50, torch.cat([torch.full((5,), 3.0), torch.linspace(2.5, 0, 30)]))
    ),
    "orthogonal": lambda g: Problem(torch.linalg.qr(randn(g, 48, 48))[0]),
    "repeated blocks": lambda g: Problem(torch.block_diag(*[randn(g, 9, 11)] * 4)),
    "clustered": lambda g: Problem(with_values(g, 60, 60, 1 - 1e-3 * torch.arange(40))),
    "tiny gap": lambda g: Problem(
        with_values(g, 50, 40, torch.cat([torch.tensor([1, 1 - 1e-6, 1 - 2e-6]), torch.linspace(0.9, 0, 30)]))
    ),
    "dense spectrum": lambda g: Problem(with_values(g, 120, 120, torch.linspace(1, 0.2, 120))),
    "diagonal": lambda g: Problem(
        torch.diag(torch.linspace(0.1, 1, 50, dtype=torch.float64)), None, bits(g, 0.6, 8, 50)
    ),
    "identity": lambda g: Problem(torch.eye(33, dtype=torch.float64), bits(g, 0.5, 6, 33), bits(g, 0.5, 6, 33)),
    "block diagonal": lambda g: block_diagonal(g, False),
    "block diagonal, start in one block": lambda g: block_diagonal(g, True),
    "one row": lambda g: Problem(randn(g, 1, 40), None, bits(g, 0.5, 6, 40)),
    "one column": lambda g: Problem(randn(g, 40, 1), bits(g, 0.5, 6, 40)),
    "one number": lambda g: Problem(randn(g, 1, 1)),
    "single bits": lambda g: Problem(randn(g, 5, 7), one_hot(5, 35), one_hot(7, 35)),
    "a wide layer": lambda g: Problem(randn(g, 64, 600), bits(g, 0.3, 4, 64), bits(g, 0.3, 4, 600)),
}


def convolution(
    g: torch.Generator,
    size: tuple[int, int, int],
    out: int,
    kernel: tuple[int, int],
    p: float = 0.6,
    batch: int = 4,
    **conv: Any,
) -> Problem:
    weight = randn(g, out, size[0] // conv.get("groups", 1), *kernel)
    shape = F.conv2d(torch.zeros(1, *size, dtype=torch.float64), weight, None, **conv).shape[1:]
    return Problem(weight, bits(g, p, batch, *shape), bits(g, p, batch, *size), size, conv)


def low_rank_convolution(g: torch.Generator) -> Problem:
    problem = convolution(g, (3, 8, 7), 6, (3, 3), padding=1)
    problem.weight = torch.einsum("o,i,h,w->oihw", randn(g, 6), randn(g, 3), randn(g, 3), randn(g, 3))
    return problem


def repeated_convolution(g: torch.Generator) -> Problem:
    """Two groups with the same weights: every singular value comes twice."""
    problem = convolution(g, (4, 6, 6), 6, (3, 3), groups=2, padding=1)
    problem.weight[3:] = problem.weight[:3]
    problem.row_mask = problem.col_mask = None
    return problem


def shift_convolution(g: torch.Generator) -> Problem:
    """A kernel that only moves its input: all singular values 1 or 0."""
    problem = convolution(g, (3, 6, 6), 3, (3, 3), padding=1)
    problem.weight = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    problem.weight[range(3), range(3), 0, 2] = 1
    return problem


CONVOLUTIONS: dict[str, Callable[[torch.Generator], Problem]] = {
    "stride 1, padding 0": lambda g: convolution(g, (3, 8, 8), 5, (3, 3)),
    "stride 1, padding 1": lambda g: convolution(g, (3, 8, 6), 5, (3, 3), padding=1),
    "stride 1, padding 2": lambda g: convolution(g, (2, 6, 9), 5, (3, 3), padding=2),
    "stride 2, padding 0": lambda g: convolution(g, (3, 9, 8), 5, (4, 4), stride=2),
    "stride 2, padding 1": lambda g: convolution(g, (3, 8, 8), 5, (4, 4), stride=2, padding=1),
    "stride 2, padding 2": lambda g: convolution(g, (3, 7, 8), 5, (4, 4), stride=2, padding=2),
    "stride past the kernel": lambda g: convolution(g, (3, 8, 8), 4, (2, 2), stride=3),
    "dilation 2": lambda g: convolution(g, (3, 9, 8), 5, (3, 3), dilation=2, padding=1),
    "groups 2": lambda g: convolution(g, (4, 8, 8), 6, (3, 3), groups=2, padding=1),
    "depthwise": lambda g: convolution(g, (5, 7, 7), 5, (3, 3), groups=5, padding=1),
    "all at once": lambda g: convolution(
        g, (4, 11, 9), 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2
    ),
    "kernel 1": lambda g: convolution(g, (6, 5, 4), 7, (1, 1)),
    "kernel as large as the input": lambda g: convolution(g, (3, 4, 5), 6, (4, 5)),
    "heavily masked": lambda g: convolution(g, (4, 8, 8), 6, (3, 3), p=0.06, batch=8, padding=1),
    "unmasked": lambda g: Problem(randn(g, 5, 3, 3, 3), None, None, (3, 7, 8), {"padding": 1}),
    "rows only": lambda g: Problem(randn(g, 5, 3, 3, 3), bits(g, 0.5, 4, 5, 7, 8), None, (3, 7, 8), {"padding": 1}),
    "columns only": lambda g: Problem(randn(g, 5, 3, 3, 3), None, bits(g, 0.5, 4, 3, 7, 8), (3, 7, 8), {"padding": 1}),
    "smoothing along a line": lambda g: Problem(
        torch.tensor([1, 2, 1]).double().view(1, 1, 1, 3), None, None, (1, 1, 150), {"padding": (0, 1)}
    ),
    "box filter": lambda g: Problem(torch.ones(1, 1, 3, 3).double(), None, None, (1, 16, 16), {"padding": 1}),
    "low rank": low_rank_convolution,
    "repeated top": repeated_convolution,
    "shift": shift_convolution,
}

PROBLEMS = {f"dense, {k}": v for k, v in DENSE.items()} | {f"convolution, {k}": v for k, v in CONVOLUTIONS.items()}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def relative(value: Tensor, true: Tensor) -> Tensor:
    """(value - true) / true, and value itself where true is 0."""
    return torch.where(true > 0, (value.double() - true) / true.clamp_min(1e-300), value.double())


# ---- the value ------------------------------------------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_converged_norm_is_the_largest_singular_value(
    name: str, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    problem = PROBLEMS[name](generator(0)).to(device, dtype)
    sigma, u, v = problem.norm(200, return_vectors=True)
    true = problem.true()
    assert sigma.dtype == dtype and sigma.shape == true.shape
    if name == "dense, dense spectrum":  # 120 values within 1: the top one is told from the next to 1e-6 only
        tolerance = max(tolerance, 1e-7)
    assert relative(sigma, true).abs().max() < tolerance

    # singular vectors: unit, zero where masked, and sigma is v^T W u
    alive = (true > 0).double()
    digits = 1e-5 if dtype == torch.float32 else 1e-10
    for vector, mask in ((u, problem.col_mask), (v, problem.row_mask)):
        torch.testing.assert_close(vector.double().flatten(1).norm(dim=1), alive, rtol=0, atol=digits)
        assert mask is None or (vector[~mask] == 0).all()
    dense = matrix(problem.weight, problem.input_size, **problem.conv)
    bilinear = torch.einsum("bm,mn,bn->b", v.double().flatten(1), dense, u.double().flatten(1))
    torch.testing.assert_close(bilinear, sigma.double(), rtol=digits, atol=1e-300)


@every_problem
def test_few_iterations_never_exceed_the_norm(name: str, device: str) -> None:
    for seed in range(3):
        problem = PROBLEMS[name](generator(seed)).to(device, torch.float32)
        true = problem.true()
        for iterations in range(5):
            assert relative(problem.norm(iterations), true).max() <= 1e-5, iterations


@every_problem
def test_more_iterations_are_not_worse(name: str, device: str) -> None:
    problem = PROBLEMS[name](generator(1)).to(device, torch.float32)
    values = torch.stack([problem.norm(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 20, 40, 80)])
    assert (values[1:] >= values[:-1] * (1 - 2e-6)).all()


def test_no_small_problem_stalls(device: str) -> None:
    """Saddles are rare: many problems are needed to meet one."""
    worst, count = 0.0, 0
    for seed in range(60):
        g = generator(seed)
        m, n = (int(k) for k in torch.randint(2, 24, (2,), generator=g))
        p = float(torch.rand((), generator=g)) * 0.9 + 0.1
        kinds = [randn(g, m, n), randn(g, m, 2) @ randn(g, 2, n), randn(g, m, n).round()]
        problem = Problem(kinds[seed % 3], bits(g, p, 16, m), bits(g, p, 16, n)).to(device, torch.float32)
        worst = max(worst, float(relative(problem.norm(200), problem.true()).abs().max()))
        count += 16
    for seed in range(24):
        g = generator(1000 + seed)
        stride, padding, groups = (int(torch.randint(a, b, (), generator=g)) for a, b in ((1, 3), (0, 3), (1, 3)))
        problem = convolution(g, (2, 5, 6), 4, (3, 3), 0.5, 8, stride=stride, padding=padding, groups=groups)
        problem = problem.to(device, torch.float32)
        worst = max(worst, float(relative(problem.norm(200), problem.true()).abs().max()))
        count += 8
    assert count > 1000
    assert worst < 1e-5


# ---- the start ------------------------------------------------------------------------------------------------------


def start_problem(kind: str) -> Problem:
    g = generator(3)
    weight = with_values(g, 30, 40, torch.linspace(2, 0.1, 25))
    _, _, vh = torch.linalg.svd(weight)
    other = randn(g, 40)
    start = {
        "zero": torch.zeros(40, dtype=torch.float64),
        "second singular vector": vh[1],
        "last singular vector": vh[-1],
        "orthogonal to the top one": other - vh[0] * (vh[0] @ other),
        "top singular vector": vh[0],
        "huge": 1e25 * other,
        "tiny": 1e-25 * other,
        "per sample": torch.stack([vh[0], vh[1], torch.zeros_like(vh[0])]),
    }[kind]
    return Problem(weight, None, torch.ones(3, 40, dtype=torch.bool), start=start)


STARTS = [
    "zero",
    "second singular vector",
    "last singular vector",
    "orthogonal to the top one",
    "huge",
    "tiny",
    "per sample",
]


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_start_misses_the_top_singular_vector(kind: str, dtype: torch.dtype, device: str) -> None:
    problem = start_problem(kind).to(device, dtype)
    assert relative(problem.norm(200), problem.true()).abs().max() < 1e-5


def test_a_start_hidden_by_the_mask_is_no_start(device: str) -> None:
    problem = start_problem("zero")
    problem.start = torch.zeros(40, dtype=torch.float64)
    problem.start[:10] = 1
    problem.col_mask = torch.ones(3, 40, dtype=torch.bool)
    problem.col_mask[:, :10] = False
    problem = problem.to(device, torch.float32)
    assert relative(problem.norm(200), problem.true()).abs().max() < 1e-5


def test_the_top_singular_vector_as_start_is_all_but_exact(device: str) -> None:
    problem = start_problem("top singular vector").to(device, torch.float32)
    error = relative(problem.norm(2), problem.true()).abs().max()
    problem.start = None
    assert error < 2e-3
    assert error < 0.1 * relative(problem.norm(2), problem.true()).abs().max()


def test_same_call_gives_the_same_bits(device: str) -> None:
    problem = PROBLEMS["convolution, all at once"](generator(0)).to(device, torch.float32)
    assert torch.equal(problem.norm(3), problem.norm(3))


# ---- masks and scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convolutional", [False, True])
def test_empty_masks_give_exactly_zero(iterations: int, dtype: torch.dtype, convolutional: bool, device: str) -> None:
    g = generator(0)
    if convolutional:
        problem = convolution(g, (2, 5, 5), 3, (3, 3), p=1, batch=4, padding=1).to(device, dtype)
    else:
        problem = Problem(randn(g, 6, 9), torch.ones(4, 6), torch.ones(4, 9)).to(device, dtype)
    assert problem.row_mask is not None and problem.col_mask is not None
    problem.row_mask[1] = False
    problem.col_mask[2] = False
    problem.row_mask[3] = problem.col_mask[3] = False
    problem.weight.requires_grad_(True)
    sigma, u, v = problem.norm(iterations, return_vectors=True)
    assert sigma[0] > 0 and (sigma[1:] == 0).all()
    assert (u[1:] == 0).all() and (v[1:] == 0).all()
    (whole,) = torch.autograd.grad(sigma.sum(), problem.weight, retain_graph=True)
    (first,) = torch.autograd.grad(sigma[0], problem.weight, retain_graph=True)
    (empty,) = torch.autograd.grad(sigma[1:].sum(), problem.weight)
    assert (empty == 0).all() and torch.equal(whole, first) and first.abs().sum() > 0

    problem.row_mask[:] = False
    sigma, u, v = problem.norm(iterations, return_vectors=True)
    assert (sigma == 0).all() and (u == 0).all() and (v == 0).all()
    assert (torch.autograd.grad(sigma.sum(), problem.weight)[0] == 0).all()


@pytest.mark.parametrize("convolutional", [False, True])
def test_zero_weights_give_zero(convolutional: bool, device: str) -> None:
    shape, size = ((3, 2, 3, 3), (2, 5, 5)) if convolutional else ((4, 6), (6,))
    weight = torch.zeros(shape, device=device, requires_grad=True)
    sigma, u, v = ll.masked_norm(weight, input_size=size, iterations=20, return_vectors=True)
    sigma.sum().backward()
    assert sigma.tolist() == [0.0] and (u == 0).all() and (v == 0).all() and (weight.grad == 0).all()


def test_masks_that_meet_in_no_weight(device: str) -> None:
    weight = torch.block_diag(torch.ones(3, 4), torch.ones(2, 5)).to(device)
    rows = torch.tensor([[True] * 3 + [False] * 2], device=device)
    columns = torch.tensor([[False] * 4 + [True] * 5], device=device)
    assert ll.masked_norm(weight, rows, columns, iterations=20).tolist() == [0.0]


def test_one_bit_each_is_the_entry(device: str) -> None:
    weight = randn(generator(0), 4, 6).to(device, torch.float32)
    rows = torch.eye(4, dtype=torch.bool, device=device).repeat_interleave(6, 0)
    columns = torch.eye(6, dtype=torch.bool, device=device).repeat(4, 1)
    for iterations in (0, 3, 30):
        sigma = ll.masked_norm(weight, rows, columns, iterations=iterations)
        torch.testing.assert_close(sigma, weight.abs().flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-8, 1e8, 1e15, 1e30])
@pytest.mark.parametrize("name", ["dense, wide", "dense, low rank", "convolution, stride 2, padding 1"])
def test_scale_changes_nothing_else(name: str, scale: float, device: str) -> None:
    problem = PROBLEMS[name](generator(0)).to(device, torch.float32)
    problem.weight = problem.weight * scale
    problem.weight.requires_grad_(True)
    sigma = problem.norm(200)
    assert relative(sigma, problem.true()).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(sigma.sum(), problem.weight)
    # Euler: sigma is homogeneous of degree 1
    torch.testing.assert_close(
        (gradient.double() * problem.weight.double()).sum(), sigma.double().sum(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("iterations", [0, 4, 30])
def test_empty_batch(iterations: int, device: str) -> None:
    weight = torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    columns = torch.ones(0, 2, 5, 5, dtype=torch.bool, device=device)
    rows = torch.ones(0, 3, 3, 3, dtype=torch.bool, device=device)
    for masks in ((rows, columns), (None, columns)):
        sigma, u, v = ll.masked_norm(weight, *masks, iterations=iterations, return_vectors=True)
        assert sigma.shape == (0,) and u.shape == (0, 2, 5, 5) and v.shape == (0, 3, 3, 3)
        assert (torch.autograd.grad(sigma.sum(), weight)[0] == 0).all()


def test_no_masks_are_a_batch_of_one(device: str) -> None:
    sigma, u, v = ll.masked_norm(torch.randn(5, 7, device=device), return_vectors=True)
    assert sigma.shape == (1,) and u.shape == (1, 7) and v.shape == (1, 5)
    size = (2, 6, 5)
    sigma, u, v = ll.masked_norm(torch.randn(3, 2, 3, 3, device=device), input_size=size, stride=2, return_vectors=True)
    assert sigma.shape == (1,) and u.shape == (1, 2, 6, 5) and v.shape == (1, 3, 2, 2)


def test_a_sample_does_not_depend_on_its_neighbours(device: str) -> None:
    problem = PROBLEMS["convolution, stride 2, padding 1"](generator(0)).to(device, torch.float32)
    assert problem.row_mask is not None and problem.col_mask is not None
    together = problem.norm(60)
    for b in range(4):
        alone = Problem(problem.weight, problem.row_mask[b : b + 1], problem.col_mask[b : b + 1], None, problem.conv)
        torch.testing.assert_close(alone.norm(60), together[b : b + 1], rtol=1e-5, atol=0)


def test_many_samples_of_long_vectors(device: str) -> None:
    """More than fit in a cache: the CPU takes them a few at a time."""
    g = generator(8)
    start = randn(g, 37, 70_000)
    problem = Problem(randn(g, 3, 70_000), bits(g, 0.7, 37, 3), bits(g, 0.3, 37, 70_000), start=start)
    problem = problem.to(device, torch.float32)
    sigma, u, v = problem.norm(20, return_vectors=True)
    masked = masked_matrices(problem.weight.double(), problem.row_mask, problem.col_mask)
    true = torch.linalg.eigvalsh(masked @ masked.mT)[:, -1].clamp_min(0).sqrt()
    assert relative(sigma, true).abs().max() < 1e-5
    assert problem.row_mask is not None and problem.col_mask is not None
    assert (u[~problem.col_mask] == 0).all() and (v[~problem.row_mask] == 0).all()
    alive = (true > 0).to(u.dtype)
    torch.testing.assert_close(u.norm(dim=1), alive, rtol=0, atol=1e-5)
    torch.testing.assert_close(v.norm(dim=1), alive, rtol=0, atol=1e-5)

    size, batch = (2, 190, 190), 13  # not a multiple of what one or two cores take
    conv: dict[str, Any] = {"stride": 10, "padding": 1}
    weight = randn(g, 3, 2, 4, 4).to(device, torch.float32)
    rows, columns = bits(g, 0.5, batch, 3, 19, 19).to(device), bits(g, 0.5, batch, *size).to(device)
    together = ll.masked_norm(weight, rows, columns, iterations=40, **conv)
    for k in range(batch):
        alone = ll.masked_norm(weight, rows[k : k + 1], columns[k : k + 1], iterations=40, **conv)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("iterations", [0, 4, 12])
def test_weights_that_are_not_finite(value: float, hidden: bool, iterations: int, device: str) -> None:
    """An error on the CPU; on a GPU, which must not wait, a NaN. A mask over the weight does not hide it."""
    weight = torch.ones(4, 5, device=device)
    weight[1, 2] = value
    rows = torch.ones(2, 4, dtype=torch.bool, device=device)
    rows[:, 1] = not hidden
    if device == "cpu":
        with pytest.raises(ValueError, match="weight: got NaN or infinite values"):
            ll.masked_norm(weight, rows, iterations=iterations)
    else:
        assert ll.masked_norm(weight, rows, iterations=iterations).isnan().all()


# ---- the gradient ---------------------------------------------------------------------------------------------------


GRADIENT_PROBLEMS = [
    "dense, wide",
    "dense, tall",
    "dense, low rank",
    "convolution, all at once",
    "convolution, groups 2",
]


@pytest.mark.parametrize("name", GRADIENT_PROBLEMS)
def test_gradient_is_that_of_the_singular_value(name: str, device: str) -> None:
    problem = PROBLEMS[name](generator(0)).to(device, torch.float64)
    problem.weight.requires_grad_(True)
    mix = torch.linspace(0.5, 2, problem.true().shape[0], dtype=torch.float64, device=device)
    (got,) = torch.autograd.grad((problem.norm(200) * mix).sum(), problem.weight)
    (expected,) = torch.autograd.grad((problem.true() * mix).sum(), problem.weight)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_gradcheck(device: str) -> None:
    g = generator(5)
    rows, columns = bits(g, 0.7, 3, 5), bits(g, 0.7, 3, 6)
    weight = randn(g, 5, 6).to(device).requires_grad_(True)
    rows, columns = rows.to(device), columns.to(device)
    assert torch.autograd.gradcheck(lambda w: ll.masked_norm(w, rows, columns, iterations=60), weight)
    problem = convolution(g, (2, 4, 5), 4, (3, 2), 0.7, 2, stride=(2, 1), padding=1, groups=2).to(device, torch.float64)
    kernel, row, col = problem.weight.requires_grad_(True), problem.row_mask, problem.col_mask
    assert torch.autograd.gradcheck(
        lambda w: ll.masked_norm(w, row, col, stride=(2, 1), padding=1, groups=2, iterations=60), kernel
    )


def test_vectors_carry_no_gradient_and_frozen_weights_none(device: str) -> None:
    weight = torch.randn(5, 6, device=device, requires_grad=True)
    sigma, u, v = ll.masked_norm(weight, return_vectors=True)
    assert sigma.requires_grad and not u.requires_grad and not v.requires_grad
    assert not ll.masked_norm(weight.detach()).requires_grad
    with torch.no_grad():
        assert not ll.masked_norm(weight).requires_grad


def test_gradient_of_a_repeated_value_is_a_subgradient(device: str) -> None:
    """v u^T for some top pair: its inner product with W is sigma, and its norm is 1."""
    problem = PROBLEMS["dense, repeated top"](generator(0)).to(device, torch.float64)
    problem.weight.requires_grad_(True)
    sigma = problem.norm(200)
    (gradient,) = torch.autograd.grad(sigma.sum(), problem.weight)
    torch.testing.assert_close((gradient * problem.weight).sum(), sigma[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.linalg.matrix_norm(gradient, 2), torch.ones_like(sigma[0]), rtol=1e-9, atol=0)


def test_layouts_do_not_matter(device: str) -> None:
    g = generator(2)
    problem = convolution(g, (4, 6, 5), 6, (3, 3), padding=1).to(device, torch.float64)
    assert problem.row_mask is not None and problem.col_mask is not None
    problem.weight.requires_grad_(True)
    expected = problem.norm(5).detach()
    (expected_gradient,) = torch.autograd.grad(problem.norm(5).sum(), problem.weight)

    def scattered(t: Tensor) -> Tensor:
        return torch.stack([t, t.logical_not() if t.dtype == torch.bool else -t], -1)[..., 0]

    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        scattered,
    ]
    for change in layouts:
        weight = change(problem.weight.detach()).requires_grad_(True)
        got = ll.masked_norm(weight, change(problem.row_mask), change(problem.col_mask), padding=1, iterations=5)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), weight)[0], expected_gradient, rtol=1e-10, atol=1e-12)

    dense = randn(g, 7, 9).to(device)
    rows = bits(g, 0.7, 1, 7).to(device).expand(3, 7)
    torch.testing.assert_close(
        ll.masked_norm(dense.T.contiguous().T, rows, iterations=5),
        ll.masked_norm(dense, rows.contiguous(), iterations=5),
    )


# ---- against the reference, and as an op ----------------------------------------------------------------------------


def arguments(problem: Problem, iterations: int) -> tuple[Any, ...]:
    """Those of ops.masked_norm and reference.masked_norm."""
    masks = [m for m in (problem.row_mask, problem.col_mask) if m is not None]
    batch = masks[0].shape[0] if masks else 1
    size = problem.input_size if problem.weight.dim() == 4 else (problem.weight.shape[1],)
    conv = [
        [k, k] if isinstance(k, int) else list(k)
        for k in (problem.conv.get("stride", 1), problem.conv.get("padding", 0), problem.conv.get("dilation", 1))
    ]
    assert size is not None
    start = problem.start
    if start is not None and start.dim() == len(size):
        start = start.unsqueeze(0)
    groups = problem.conv.get("groups", 1)
    return problem.weight, problem.row_mask, problem.col_mask, start, [batch, *size], *conv, groups, iterations


# where the Krylov space is exhausted early, the compiled solver goes on in a random direction
EXHAUSTED = ("shift", "heavily masked", "repeated top", "kernel as large as the input")
GENERIC = [
    "dense, wide", "dense, tall", "dense, unmasked", "dense, rows only", "dense, columns only", "dense, a wide layer",
    *(f"convolution, {k}" for k in CONVOLUTIONS if k not in EXHAUSTED),
]  # fmt: skip


@pytest.mark.parametrize("name", GENERIC)
def test_equals_the_reference_before_a_restart(name: str, device: str) -> None:
    problem = PROBLEMS[name](generator(4)).to(device, torch.float64)
    for start in (
        None,
        torch.ones_like(problem.weight[0] if problem.weight.dim() == 2 else torch.zeros(problem.input_size or ())),
    ):
        problem.start = None if start is None else start.to(problem.weight)
        for iterations in (0, 1, 4, 7):
            if name == "convolution, low rank" and iterations > 4:
                continue
            got = ops.masked_norm(*arguments(problem, iterations))
            expected = reference.masked_norm(*arguments(problem, iterations))
            torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=0)
            for mine, theirs in zip(got[1:], expected[1:], strict=True):
                sign = (mine * theirs).flatten(1).sum(1).sign().view(-1, *[1] * (mine.dim() - 1))
                torch.testing.assert_close(mine, sign * theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["dense, wide", "dense, rows only", "convolution, all at once", "convolution, columns only"]
)
def test_opcheck(name: str, device: str) -> None:
    problem = PROBLEMS[name](generator(0)).to(device, torch.float64)
    problem.weight.requires_grad_(True)
    args = arguments(problem, 3)
    torch.library.opcheck(torch.ops.locallip_cuda.masked_norm.default, (*args, False))
    sigma, u, v = ops.masked_norm(*args)
    back = (torch.randn_like(sigma).detach(), problem.weight.detach(), u, v, *args[5:9])
    torch.library.opcheck(torch.ops.locallip_cuda.masked_norm_backward.default, back)


def test_opcheck_with_a_start_and_an_empty_batch(device: str) -> None:
    weight = torch.randn(4, 5, device=device, requires_grad=True)
    ones = [[1, 1], [0, 0], [1, 1], 1, 2, False]
    start = torch.randn(1, 5, device=device)
    torch.library.opcheck(torch.ops.locallip_cuda.masked_norm.default, (weight, None, None, start, [1, 5], *ones))
    columns = torch.ones(0, 5, dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.locallip_cuda.masked_norm.default, (weight, None, columns, None, [0, 5], *ones))


@pytest.mark.parametrize("name", ["dense, wide", "convolution, all at once"])
def test_compiles_into_one_graph(name: str, device: str) -> None:
    problem = PROBLEMS[name](generator(0)).to(device, torch.float32)
    row, col, conv = problem.row_mask, problem.col_mask, problem.conv

    def loss(weight: Tensor) -> Tensor:
        return ll.masked_norm(weight, row, col, iterations=3, **conv).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        weight = problem.weight.clone().requires_grad_(True)
        value = function(weight)
        value.backward()
        results.append((value.detach(), weight.grad))
    torch.testing.assert_close(results[0], results[1])


# ---- any shape, any mask --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.floats(0, 1), st.integers(0, 10**6))
def test_any_dense_problem(device: str, m: int, n: int, batch: int, p: float, seed: int) -> None:
    g = generator(seed)
    problem = Problem(randn(g, m, n), bits(g, p, batch, m), bits(g, p, batch, n)).to(device, torch.float32)
    true = problem.true() if batch else torch.zeros(0, dtype=torch.float64, device=device)
    assert (relative(problem.norm(60), true).abs() < 1e-5).all()
    assert (relative(problem.norm(2), true) <= 1e-5).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_convolution(device: str, data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    groups, kernel, dilation, padding, stride = (
        data.draw(st.integers(1, 3)),
        pair(1, 3),
        pair(1, 2),
        pair(0, 2),
        pair(1, 3),
    )
    inside = [d * (k - 1) + 1 - 2 * q for k, d, q in zip(kernel, dilation, padding, strict=True)]
    height, width = (max(1, least) + data.draw(st.integers(0, 3)) for least in inside)
    size = (groups * data.draw(st.integers(1, 2)), height, width)
    out = groups * data.draw(st.integers(1, 2))
    g = generator(data.draw(st.integers(0, 10**6)))
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    problem = convolution(g, size, out, kernel, data.draw(st.floats(0, 1)), 2, **conv).to(device, torch.float32)
    true = problem.true()
    assert (relative(problem.norm(80), true).abs() < 1e-5).all()
    assert (relative(problem.norm(2), true) <= 1e-5).all()


# ---- errors ---------------------------------------------------------------------------------------------------------


W, K = torch.ones(4, 6), torch.ones(4, 2, 3, 3)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weight of another type": (lambda: ll.masked_norm([[1.0]]), TypeError, "weight: got list, want a torch.Tensor"),
    "integer weight": (
        lambda: ll.masked_norm(W.int()),
        TypeError,
        "weight: got dtype torch.int32, want torch.float32 or torch.float64",
    ),
    "half weight": (lambda: ll.masked_norm(W.half()), TypeError, "weight: got dtype torch.float16"),
    "six-dimensional weight": (
        lambda: ll.masked_norm(torch.ones(2, 3, 1, 1, 1, 1)),
        ValueError,
        r"weight: got shape \(2, 3, 1, 1, 1, 1\), want \(m, n\) or",
    ),
    "empty weight": (lambda: ll.masked_norm(torch.ones(0, 4)), ValueError, r"weight: got shape \(0, 4\)"),
    "float row mask": (
        lambda: ll.masked_norm(W, torch.ones(2, 4)),
        TypeError,
        "row_mask: got dtype torch.float32, want torch.bool",
    ),
    "integer column mask": (
        lambda: ll.masked_norm(W, None, torch.ones(2, 6).long()),
        TypeError,
        "col_mask: got dtype torch.int64, want torch.bool",
    ),
    "row mask no tensor": (
        lambda: ll.masked_norm(W, [True] * 4),
        TypeError,
        "row_mask: got list, want a bool torch.Tensor or None",
    ),
    "column mask no tensor": (lambda: ll.masked_norm(K, None, [True]), TypeError, "col_mask: got list"),
    "row mask too short": (
        lambda: ll.masked_norm(W, torch.ones(2, 6) > 0),
        ValueError,
        r"row_mask: got shape \(2, 6\), want \(B, 4\)",
    ),
    "row mask without batch": (
        lambda: ll.masked_norm(W, torch.ones(4) > 0),
        ValueError,
        r"row_mask: got shape \(4,\), want \(B, 4\)",
    ),
    "column mask too short": (
        lambda: ll.masked_norm(W, None, torch.ones(2, 4) > 0),
        ValueError,
        r"col_mask: got shape \(2, 4\), want \(B, 6\)",
    ),
    "batches differ": (
        lambda: ll.masked_norm(W, torch.ones(2, 4) > 0, torch.ones(3, 6) > 0),
        ValueError,
        r"row_mask, col_mask: got batch sizes \[2, 3\]",
    ),
    "convolution row mask": (
        lambda: ll.masked_norm(K, torch.ones(1, 4, 5, 5) > 0, torch.ones(1, 2, 5, 5) > 0),
        ValueError,
        r"row_mask: got shape \(1, 4, 5, 5\), want \(B, 4, 3, 3\)",
    ),
    "convolution channels": (
        lambda: ll.masked_norm(K, None, torch.ones(1, 3, 5, 5) > 0),
        ValueError,
        r"col_mask: got .* want .*2",
    ),
    "no input size": (lambda: ll.masked_norm(K), ValueError, r"input_size: got None, want \(Cin, H, W\)"),
    "input size of two": (
        lambda: ll.masked_norm(K, input_size=(5, 5)),
        ValueError,
        r"input_size: got \(5, 5\), want \(Cin, H, W\) with Cin = 2",
    ),
    "input size against mask": (
        lambda: ll.masked_norm(K, None, torch.ones(1, 2, 5, 5) > 0, input_size=(2, 6, 6)),
        ValueError,
        r"col_mask: got shape \(1, 2, 5, 5\), want \(B, 2, 6, 6\)",
    ),
    "input smaller than kernel": (
        lambda: ll.masked_norm(K, input_size=(2, 2, 9)),
        ValueError,
        r"input_size: got \(2, 2, 9\), want .* kernel",
    ),
    "dense input size": (
        lambda: ll.masked_norm(W, input_size=(5,)),
        ValueError,
        r"input_size: got \(5,\), want None or \(6,\)",
    ),
    "stride 0": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), stride=0),
        ValueError,
        "stride: got 0, want an integer >= 1",
    ),
    "fractional stride": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), stride=1.5),
        (TypeError, ValueError),
        "stride: got 1.5",
    ),
    "negative padding": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), padding=-1),
        ValueError,
        "padding: got -1, want an integer >= 0",
    ),
    "padding of three": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), padding=(1, 1, 1)),
        ValueError,
        "padding: got",
    ),
    "dilation 0": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), dilation=(1, 0)),
        ValueError,
        r"dilation: got \(1, 0\)",
    ),
    "groups 3": (
        lambda: ll.masked_norm(K, input_size=(2, 5, 5), groups=3),
        ValueError,
        "groups: got 3, want a positive divisor of weight's 4",
    ),
    "groups 0": (lambda: ll.masked_norm(K, input_size=(2, 5, 5), groups=0), ValueError, "groups: got 0"),
    "dense stride": (
        lambda: ll.masked_norm(W, stride=2),
        ValueError,
        "stride, padding, dilation, groups: got one for a dense weight",
    ),
    "negative iterations": (
        lambda: ll.masked_norm(W, iterations=-1),
        ValueError,
        "iterations: got -1, want an integer >= 0",
    ),
    "fractional iterations": (lambda: ll.masked_norm(W, iterations=1.5), ValueError, "iterations: got 1.5"),
    "start of another dtype": (
        lambda: ll.masked_norm(W, start=torch.ones(6).double()),
        TypeError,
        "start: .* torch.float32",
    ),
    "start too short": (
        lambda: ll.masked_norm(W, start=torch.ones(4)),
        ValueError,
        r"start: got shape .*4.*, want \(6,\)",
    ),
    "start of another batch": (
        lambda: ll.masked_norm(W, torch.ones(3, 4) > 0, start=torch.ones(2, 6)),
        ValueError,
        r"start: got shape \(2, 6\)",
    ),
    "guarantee unknown": (
        lambda: ll.masked_norm_bound(W, guarantee="sure"),
        ValueError,
        "guarantee: got 'sure', want one of 'estimate', 'probabilistic', 'deterministic'",
    ),
    "failure probability 0": (
        lambda: ll.masked_norm_bound(W, guarantee="estimate", failure_probability=0),
        ValueError,
        "failure_probability: got 0, want",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str, device: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_devices_must_agree(device: str) -> None:
    other = torch.ones(2, 4, dtype=torch.bool, device="meta" if device == "cpu" else "cpu")
    with pytest.raises(ValueError, match="row_mask: got device (meta|cpu), want weight's"):
        ll.masked_norm(W.to(device), other)


def test_norm_bound_of_an_estimate(device: str) -> None:
    problem = PROBLEMS["dense, wide"](generator(0)).to(device, torch.float32)
    problem.weight.requires_grad_(True)
    bound = ll.masked_norm_bound(problem.weight, problem.row_mask, problem.col_mask, guarantee="estimate")
    assert bound.guarantee == "estimate" and bound.failure_probability == 1
    assert torch.equal(bound.upper, bound.estimate) and not bound.upper.requires_grad
    assert relative(bound.estimate, problem.true()).abs().max() < 1e-5


def test_masked_matrices_helper(device: str) -> None:
    """The oracle itself, on one case by hand."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    out = masked_matrices(
        matrix(weight), torch.tensor([[True, False]], device=device), torch.tensor([[False, True]], device=device)
    )
    assert out.tolist() == [[[0, 2], [0, 0]]]
    kernel = torch.ones(1, 1, 1, 2, device=device)
    assert matrix(kernel, (1, 1, 3)).tolist() == [[1, 1, 0], [0, 1, 1]]


def test_vectors_are_unit_where_the_space_finds_the_top_one_twice(device: str) -> None:
    """A long vector that begins near the top one, which has converged long before the last iteration."""
    g = generator(5)
    left, right = (torch.linalg.qr(torch.randn(n, 60, generator=g))[0] for n in (3000, 5000))
    values = torch.cat([torch.tensor([1.0]), torch.linspace(0.6, 0.05, 59)])
    weight = (left * values @ right.T).to(device)
    start = right[:, 0].to(device)
    norm, u, v = ll.masked_norm(weight, iterations=15, start=start, return_vectors=True)
    true = torch.linalg.matrix_norm(weight.double(), 2)
    assert abs(float(norm[0] / true) - 1) < 1e-5
    for vector in (u, v):
        assert abs(float(vector.norm()) - 1) < 1e-5
    assert abs(float(u[0] @ start)) > 1 - 1e-5


@pytest.mark.parametrize("value", [1e27, 1.45e38])
def test_long_starts(value: float, device: str) -> None:
    """A long vector's length, of which float32 does not have the reciprocal in full."""
    units = 400_000
    weight = torch.zeros(20, units, device=device)
    weight[0] = units**-0.5
    start = torch.full((1, units), value, device=device)
    sigma = ops.masked_norm(weight, None, None, start, [1, units], [1, 1], [0, 0], [1, 1], 1, 3)[0]
    assert sigma.item() <= float(weight[0].double().norm()) * (1 + 2e-6)
