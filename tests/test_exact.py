"""The oracles of test_certificates.py themselves: against rationals, LAPACK, torch and a million points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import (
    PIECEWISE_LINEAR,
    Exact,
    evaluate,
    float_of,
    layers_of,
    operator_matrix,
    operator_norm,
    plane_network,
    quotient_below,
    rational,
    rationals,
)
from flint import fmpq, fmpq_mat
from helpers import generator, matrix, true_norms
from verify_norms import convolution_operators, dense_operators


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_operator_matrix_is_the_operator() -> None:
    for index in range(60):
        problem = convolution_operators(generator(index), channels=4, pixels=6)
        expected = matrix(problem.weight, problem.input_size, **problem.conv)
        found = operator_matrix(problem.weight, problem.input_size, **problem.conv).toarray()
        assert np.array_equal(found, expected.numpy()), problem


def test_proved_lower_bound_is_the_rational_quotient_to_18_digits() -> None:
    for index in range(40):
        problem = dense_operators(generator(index), largest=12)
        dense = operator_matrix(problem.weight)
        x = normal(index, dense.shape[1]).numpy()
        image = fmpq_mat(*dense.shape, rationals(problem.weight)) * fmpq_mat(len(x), 1, [rational(v) for v in x])
        square = sum(row[0] ** 2 for row in image.tolist()) / sum(rational(v) ** 2 for v in x)
        below = quotient_below(dense, x)
        mantissa, exponent = np.frexp(below)
        high = float(mantissa)
        exact = (rational(high) + rational(float(mantissa - np.longdouble(high)))) * fmpq(2) ** int(exponent)
        assert exact**2 <= square <= exact**2 * (1 + fmpq(1, 10**16)), problem


def test_oracle_agrees_with_the_singular_value() -> None:
    """Also where Lanczos takes LAPACK's place, and at scales whose squares leave float64."""
    for scale in (1.0, 2.0**-1000, 2.0**900):
        weight = normal(0, 30, 40) * scale
        norm = operator_norm(operator_matrix(weight))
        expected = torch.linalg.matrix_norm(weight / scale, 2).item()
        for value in (norm.lower, norm.value):
            assert abs(float(value / np.longdouble(scale)) / expected - 1) < 1e-14
    weight = normal(1, 8, 8, 3, 3)
    norm = operator_norm(operator_matrix(weight, (8, 12, 12), padding=1))
    expected = true_norms(weight, None, None, (8, 12, 12), padding=1).item()
    assert abs(float(norm.value) / expected - 1) < 1e-12 and abs(float(norm.lower / norm.value) - 1) < 1e-14


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_enumeration_is_the_network(name: str) -> None:
    """A million random points find the extremes of a plane network to three digits, and none beyond those of a line."""
    line, plane = plane_network(name, 0, 1), plane_network(name, 0, 2)
    for model, inputs in ((line, 1), (plane, 2)):
        x = torch.rand(inputs, generator=generator(1), dtype=torch.float64)
        exact = Exact(model, x, 1.5)
        assert len(exact.pieces) > 3
        if inputs == 1:
            points = x + torch.linspace(-1.5, 1.5, 200_001, dtype=torch.float64)[:, None]
        else:
            angles = 2 * math.pi * torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
            circle = torch.stack([angles.cos(), angles.sin()], 2)
            points = (x + 1.5 * torch.linspace(0, 1, 301).double()[:, None] * circle).flatten(0, 1)
        logits, features = model(points), model[:-1](points)
        clean = model[:-1](x[None])
        margin = (logits[:, 0] - logits[:, 1:].amax(1)).min().item()
        moved = (features - clean).square().sum(1).max().item()
        low, high = exact.feature_range()
        close = {"rel": 2e-2 if inputs == 2 else 1e-4, "abs": 2e-2 if inputs == 2 else 1e-4}
        assert float_of(exact.margin(0)) == pytest.approx(margin, **close)
        assert float_of(exact.moved_squared()) == pytest.approx(moved, **close)
        assert [float_of(v) for v in low] == pytest.approx(features.amin(0).tolist(), **close)
        assert [float_of(v) for v in high] == pytest.approx(features.amax(0).tolist(), **close)
        if inputs == 1:
            slope = ((features[1:] - features[:-1]).norm(dim=1) / (points[1:] - points[:-1]).norm(dim=1)).max().item()
            assert float(exact.stretch_squared()) ** 0.5 == pytest.approx(slope, rel=1e-6)
        for k in range(0, len(points), 50_000):
            values = evaluate(layers_of(model, x.shape), rationals(points[k]))
            assert [float_of(v) for v in values] == pytest.approx(logits[k].tolist(), abs=1e-12)
