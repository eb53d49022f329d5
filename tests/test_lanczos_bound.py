"""The bound that a Lanczos run's tridiagonal matrix proves, against runs on matrices whose eigenvalues are known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference

ROUNDING = 1e-13  # local residuals of a float64 run on a matrix of norm 1


def run(matrix: Tensor, q: Tensor, steps: int, disturb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """alpha, beta of a plain three-term run; ``disturb`` is added to the first product."""
    before, beta = torch.zeros_like(q), torch.zeros((), dtype=q.dtype)
    alphas, betas = [], []
    for j in range(steps):
        w = matrix @ q
        if disturb is not None and j == 0:
            w = w + disturb
        alphas.append(q @ w)
        w = w - alphas[-1] * q - beta * before
        beta = w.norm()
        betas.append(beta)
        before, q = q, w / beta if beta > 0 else torch.zeros_like(w)
    return torch.stack(alphas), torch.stack(betas)


def bound(alpha: Tensor, beta: Tensor, error: float, level: float) -> tuple[float, float]:
    one = [torch.tensor([v], dtype=torch.float64) for v in (error, level)]
    theta, upper = ops.lanczos_bound(alpha[None], beta[None], *one)
    return float(theta), float(upper)


def start(n: int, overlap: float, seed: int) -> Tensor:
    """A unit vector with that component along the first axis."""
    rest = torch.randn(n - 1, generator=generator(seed), dtype=torch.float64)
    rest = rest / rest.norm() * math.sqrt(1 - overlap**2)
    return torch.cat([torch.tensor([overlap], dtype=torch.float64), rest])


def spectrum(n: int, gap: float) -> Tensor:
    """1, then values from 1 - gap down to 0."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(1 - gap, 0, n - 1, dtype=torch.float64)])


@pytest.mark.parametrize("overlap", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("gap", [0.5, 1e-2, 1e-5, 0.0])
def test_it_holds_at_every_step_and_becomes_tight(gap: float, overlap: float) -> None:
    n = 300
    alpha, beta = run(torch.diag(spectrum(n, gap)), start(n, overlap, 1), 120)
    uppers = []
    for steps in range(1, 121, 7):
        theta, upper = bound(alpha[:steps], beta[:steps], ROUNDING, 0.999 * overlap)
        assert theta <= 1 + 1e-12 and upper >= 1
        uppers.append(upper)
    assert uppers[-1] < uppers[0] and uppers[-1] < 1 + 0.02


def test_a_run_that_missed_the_top_vector_proves_nothing_wrong() -> None:
    """Without a component on the top vector the run sees the rest; only the level knows, and it must be heeded."""
    n = 200
    alpha, beta = run(torch.diag(spectrum(n, 0.3)), start(n, 0.0, 2), 60)
    theta, wrong = bound(alpha, beta, ROUNDING, 1e-6)
    assert theta < 0.71 and wrong < 0.8, "a level that is not true gives a bound that is not true"
    for level in (0.0, -1.0, math.nan):
        assert bound(alpha, beta, ROUNDING, level)[1] == math.inf


@pytest.mark.parametrize("steps", [5, 10, 60])
def test_the_local_residuals_count(steps: int) -> None:
    """An error that takes the top vector out of the run after its first step is within the residual it leaves."""
    n, overlap = 100, 1e-6
    q = start(n, overlap, 3)
    matrix = torch.diag(torch.cat([torch.full((1,), 2.0), torch.linspace(1, 0, n - 1)]).double())
    removed = torch.zeros(n, dtype=torch.float64)
    alpha = q @ matrix @ q
    removed[0] = -(2 - float(alpha)) * overlap  # so that nothing is left along the first axis
    alpha, beta = run(matrix, q, steps, removed)
    assert bound(alpha, beta, 2.1 * overlap, 0.999 * overlap)[1] >= 2
    if steps == 10:
        assert bound(alpha, beta, 0.0, 0.999 * overlap)[1] < 1.9, "or this run deceives nobody"


def test_an_invariant_subspace_is_exact() -> None:
    alpha, beta = torch.tensor([0.25, 0.5, 0.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    theta, upper = bound(alpha, beta, 0.0, 1e-3)
    assert theta == pytest.approx(0.5, rel=1e-12) and 0.5 <= upper < 0.5 * (1 + 1e-6)


def test_zeros() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    theta, upper = bound(zero, zero, 0.0, 1e-3)
    assert theta == 0 and 0 <= upper < 1e-300


def test_it_grows_with_the_error_and_falls_with_the_level() -> None:
    alpha, beta = run(torch.diag(spectrum(100, 0.01)), start(100, 1e-2, 4), 25)
    by_error = [bound(alpha, beta, e, 1e-3)[1] for e in (0.0, 1e-8, 1e-4, 1e-2)]
    by_level = [bound(alpha, beta, 1e-12, v)[1] for v in (1e-2, 1e-4, 1e-8)]
    assert by_error == sorted(by_error) and by_error[0] < by_error[-1]
    assert by_level == sorted(by_level) and by_level[0] < by_level[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 60), st.integers(1, 80), st.floats(1e-9, 0.9), st.floats(1e-6, 1.0), st.integers(0, 1000),
    st.sampled_from([2.0**-300, 1e-30, 1.0, 2.0**300]),
)  # fmt: skip
def test_random_matrices(n: int, steps: int, overlap: float, decay: float, seed: int, scale: float) -> None:
    values = torch.rand(n, generator=generator(seed), dtype=torch.float64) ** (1 / decay)
    values[0] = 1.0
    alpha, beta = run(torch.diag(values) * scale, start(n, overlap, seed), steps)
    _, upper = bound(alpha, beta, ROUNDING * scale, overlap * (1 - 1e-9) - 1e-15)
    assert upper >= scale


def test_it_agrees_with_its_twin() -> None:
    g = generator(5)
    for steps in (1, 2, 9, 40):
        runs = [run(torch.diag(spectrum(80, 10.0**-k)), start(80, 10.0**-k, k), steps) for k in range(1, 6)]
        alpha, beta = (torch.stack(t) for t in zip(*runs, strict=True))
        error, level = 1e-10 * torch.rand(5, generator=g, dtype=torch.float64), torch.logspace(-1, -5, 5).double()
        theta, upper = ops.lanczos_bound(alpha, beta, error, level)
        expected_theta, expected_upper = reference.lanczos_bound(alpha, beta, error, level)
        torch.testing.assert_close(theta, expected_theta, rtol=1e-10, atol=0)
        torch.testing.assert_close(upper, expected_upper, rtol=1e-5, atol=0)


def test_opcheck_and_bad_input() -> None:
    alpha, beta = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    error, level = torch.full((3,), 1e-9, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.locallip_cuda.lanczos_bound.default, (alpha, beta, error, level))
    empty = ops.lanczos_bound(alpha[:0], beta[:0], error[:0], level[:0])
    assert empty[0].shape == empty[1].shape == (0,)
    with pytest.raises(RuntimeError, match="alpha, beta: got shapes"):
        ops.lanczos_bound(alpha, beta[:, :3], error, level)
    with pytest.raises(RuntimeError, match="error, level: got shapes"):
        ops.lanczos_bound(alpha, beta, error[:2], level)
    with pytest.raises(RuntimeError, match="want float64"):
        ops.lanczos_bound(alpha.float(), beta.float(), error.float(), level.float())
