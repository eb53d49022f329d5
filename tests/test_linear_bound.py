"""Proved norms of linear maps of every kind under random masks, against float64 SVD of their matrices."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import generator
from test_iteration import MAPS
from test_linear import randn

from locallip_cuda.norms import linear_bound
from locallip_cuda.norms.linear import Composed, Convolution, Dense, LinearMap, Scaling, Sum
from locallip_cuda.norms.linear_bound import absolute_norm, converged_norm, proved_norm


def masks(linear: LinearMap, batch: int, density: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    rows = torch.rand(batch, *linear.output_sizes, generator=g) < density
    columns = torch.rand(batch, *linear.input_sizes, generator=g) < density
    rows[-1] = False
    return rows, columns


def true_norms(linear: LinearMap, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    matrix = linear.dense().unsqueeze(0)
    matrix = matrix if rows is None else matrix * rows.flatten(1).unsqueeze(2)
    matrix = matrix if columns is None else matrix * columns.flatten(1).unsqueeze(1)
    return torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.parametrize("guarantee", ["probabilistic", "deterministic"])
@pytest.mark.parametrize("name", MAPS)
def test_bounds_hold_and_are_tight(name: str, guarantee: str) -> None:
    linear = MAPS[name]
    for density in (0.5, 0.9):
        for rows, columns in (masks(linear, 4, density), (None, None)):
            batch = 1 if rows is None else 4
            true = true_norms(linear, rows, columns)
            found = proved_norm(linear, rows, columns, batch, guarantee, 1e-9)
            assert found.shape == true.shape
            assert (found >= true * (1 - 1e-14)).all()
            torch.testing.assert_close(found, true, rtol=6e-3, atol=1e-9)
            assert (absolute_norm(linear, rows, columns, batch) >= true * (1 - 1e-14)).all()
            torch.testing.assert_close(converged_norm(linear, rows, columns, batch), true, rtol=1e-7, atol=1e-12)


def test_parts_stand_in_for_what_is_too_large_to_write_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_bound, "DENSE_ENTRIES", 0)
    for name in ("product: two convolutions", "product: scaled by place", "sum: convolutions of other geometry"):
        linear = MAPS[name]
        assert isinstance(linear, (Composed, Sum))
        rows, columns = masks(linear, 4, 0.7)
        true, found = true_norms(linear, rows, columns), proved_norm(linear, rows, columns, 4, "deterministic", 1e-9)
        assert (found >= true).all() and (found[:3] < 4 * true[:3]).all()


def test_sizes_far_apart_leave_the_absolute_norm() -> None:
    g = generator(0)
    tiny = Dense(randn(g, 5, 5) * 1e-200)
    huge = Dense(randn(g, 5, 5) * 1e200)
    for linear in (Composed([tiny, huge]), Composed([huge, tiny]), Composed([huge, huge]), Composed([tiny, tiny])):
        found = float(proved_norm(linear, None, None, 1, "probabilistic", 1e-9))
        first, second = (each.dense() for each in linear.maps)
        sizes = [float(torch.linalg.matrix_norm(each, 2)) for each in (first, second)]
        unit = Fraction(float(torch.linalg.matrix_norm((second / sizes[1]) @ (first / sizes[0]), 2)))
        true = unit * Fraction(sizes[0]) * Fraction(sizes[1])
        assert found == math.inf or Fraction(found) >= true * Fraction(1 - 1e-12)


def test_batches_of_none() -> None:
    conv = Convolution(randn(generator(0), 2, 2, 3, 3), [2, 4, 4], [1, 1], [1, 1], [1, 1], 1)
    both = Composed([conv, conv])
    for linear in (conv, both, Scaling(torch.ones(1, dtype=torch.float64), [2, 4, 4])):
        empty = torch.ones(0, 2, 4, 4, dtype=torch.bool)
        for guarantee in ("probabilistic", "deterministic"):
            assert proved_norm(linear, empty, empty, 0, guarantee, 1e-9).shape == (0,)
        assert converged_norm(linear, empty, empty, 0).shape == (0,)


@pytest.mark.parametrize("guarantee", ["probabilistic", "deterministic"])
def test_of_maps_that_have_no_input_or_output_left(guarantee: str) -> None:
    """A sum that does not fold, whose sizes say nothing of it: next to 0, also where no sample of a batch has any."""
    g = generator(0)
    linear = Sum([Dense(randn(g, 5, 5)), Composed([Dense(randn(g, 2, 5)), Dense(randn(g, 5, 2))])])
    some, none = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    for rows, columns in ((some, none), (none, some), (none, none)):
        assert (proved_norm(linear, rows, columns, 2, guarantee, 1e-9) <= 1e-30).all()
    mixed = torch.stack([some[0], none[0]])
    found = proved_norm(linear, some, mixed, 2, guarantee, 1e-9)
    assert found[0] > 0 and found[1] <= 1e-30
