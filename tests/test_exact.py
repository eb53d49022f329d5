"""The oracles of test_certificates.py themselves: against rationals, LAPACK, torch and a million points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import exact as exact_module
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import (
    FUNCTIONS,
    PIECEWISE_LINEAR,
    Cell,
    Exact,
    evaluate,
    float_of,
    floats,
    operator_matrix,
    operator_norm,
    plane_network,
    quotient_below,
    rational,
    rationals,
)
from flint import fmpq, fmpq_mat
from helpers import generator, matrix, true_norms
from networks import SMALL, build, with_rational_roots
from torch import Tensor, nn
from verify_norms import convolution_operators, dense_operators

from locallip_cuda.nn import clipped_maxmin, clipped_relu, maxmin


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
        below = quotient_below(x, dense)
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
        exact = Exact(model, x, 1.5, features=model[:-1])
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
        low, high = exact.feature_range
        close = {"rel": 2e-2 if inputs == 2 else 1e-4, "abs": 2e-2 if inputs == 2 else 1e-4}
        assert float_of(exact.margin(0)) == pytest.approx(margin, **close)
        assert float_of(exact.moved_squared) == pytest.approx(moved, **close)
        assert [float_of(v) for v in low] == pytest.approx(features.amin(0).tolist(), **close)
        assert [float_of(v) for v in high] == pytest.approx(features.amax(0).tolist(), **close)
        if inputs == 1:
            slope = ((features[1:] - features[:-1]).norm(dim=1) / (points[1:] - points[:-1]).norm(dim=1)).max().item()
            assert float(exact.stretch_squared) ** 0.5 == pytest.approx(slope, rel=1e-6)
        for k in range(0, len(points), 50_000):
            values = evaluate(model, points[k])
            assert [float_of(v) for v in values] == pytest.approx(logits[k].tolist(), abs=1e-12)


def area(cell: Cell) -> fmpq:
    """Of a polygon, or the length of a segment."""
    if len(cell[0]) == 1:
        return abs(cell[1][0] - cell[0][0])
    crossed = (p[0] * q[1] - p[1] * q[0] for p, q in zip(cell, [*cell[1:], cell[0]], strict=True))
    return abs(sum(crossed, fmpq(0))) / 2


@pytest.mark.parametrize("name", SMALL)
def test_pieces_of_graphs_fill_the_slice_and_are_the_network(name: str) -> None:
    """They add up, exactly, and agree with the model in all their corners: that is where their forms are known by."""
    model, x = build(name, of=SMALL)
    with_rational_roots(model).requires_grad_(False)
    direction = normal(3, 1, 2)
    for directions in (None, 0.999 * direction / direction.norm()):
        exact = Exact(model, x[0], 1.5, directions)
        assert len(exact.pieces) > 1
        whole = Exact(nn.Identity(), x[0], 1.5, directions)
        assert sum(area(piece.cell) for piece in exact.pieces) == area(whole.pieces[0].cell)
        torch.testing.assert_close(floats(exact.logit_values).T, model(exact.corners), rtol=1e-12, atol=1e-12)


FOUR = torch.tensor([0.25, 0.75, 0.125, 0.875], dtype=torch.float64)  # whose squares are numbers, too
WEIGHT = normal(8, 6, 4, 3, 3, 3)
# of values (1, 4, 4, 4); between them they call everything that is known
CALLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.linear(x, WEIGHT[0, :, :, 0, 0].T[:, [0, 1, 2, 0]], WEIGHT[0, 0, 0, 0]),
    lambda x: F.linear(x.flatten(1), WEIGHT.flatten()[:128].view(2, 64), WEIGHT[0, 0, 0, 0, :2]),
    lambda x: torch.conv1d(x.flatten(2), WEIGHT[..., 0, 0], WEIGHT[:, 0, 0, 0, 0], 2, 1),
    lambda x: torch.conv2d(x, WEIGHT[:4, :2, ..., 0], None, 1, 2, 2, 2),
    lambda x: torch.conv3d(x.unsqueeze(2), WEIGHT[:, :, 1:2], WEIGHT[:, 0, 0, 0, 0], padding=(0, 1, 0)),
    lambda x: torch.conv_transpose1d(x.flatten(2), WEIGHT[:4, ..., 0, 0], WEIGHT[0, :, 0, 0, 0], 2),
    lambda x: torch.conv_transpose2d(x, WEIGHT[:4, ..., 0], None, 2, 1, 1),
    lambda x: torch.conv_transpose3d(x.unsqueeze(2), WEIGHT[:4], WEIGHT[0, :, 0, 0, 0]),
    lambda x: torch.avg_pool1d(x.flatten(2), 3, 2, 1),
    lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    lambda x: F.avg_pool3d(x, 3, 1, 1, divisor_override=7),
    lambda x: x.mean(1) + torch.mean(x, (2, 3)),
    lambda x: torch.adaptive_avg_pool1d(x.flatten(2), 3),
    lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    lambda x: F.adaptive_avg_pool3d(x, 2),
    lambda x: torch.flatten(x, 1) + x.flatten(1) + x.view(1, 64) + x.reshape(1, -1) + torch.reshape(x, (1, 64)),
    lambda x: x[:, 1:, [0, 2]] + torch.permute(x, (0, 3, 2, 1))[:, 1:, :2] + x.permute(0, 2, 1, 3)[:, :-1, ::2],
    lambda x: torch.transpose(x, 1, 2) + x.transpose(2, 3) + torch.flip(x, (1,)) + x.flip(2) + x.roll(1, 3),
    lambda x: torch.squeeze(x[:, :1], 1) + x[:, 1:2].squeeze(1),
    lambda x: torch.unsqueeze(x, 3) + x.unsqueeze(2),
    lambda x: torch.cat([x, 1 - x], 1) + torch.stack([x, x.flip(1)], 2).flatten(1, 2),
    lambda x: torch.chunk(x, 2, 1)[0] + x.chunk(2, 1)[1] + torch.split(x, 2, 1)[0] + x.split([1, 2, 1], 1)[1],
    lambda x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (1, 2, 0, 1), mode="circular") + F.pad(x, (1, 2, 1, 0), mode="reflect"),
    lambda x: F.interpolate(torch.pixel_shuffle(x, 2), scale_factor=2.0),
    lambda x: F.dropout(x.contiguous().clone(), training=False) + F.dropout2d(x, training=False),
    lambda x: torch.add(x, x.flip(1), alpha=0.3) - torch.sub(x, 0.1, alpha=2) + FOUR - (x - FOUR.view(4, 1, 1)),
    lambda x: torch.rsub(x, 0.7) + (2 - x) + torch.neg(x) - (-x),
    lambda x: torch.mul(x, 3) + 0.3 * x + x * FOUR + torch.div(x, 3) + x / FOUR.view(4, 1, 1),
    lambda x: x.clone().add_(1.5).sub_(x.flip(1)).mul_(0.3).div_(FOUR),
    lambda x: F.batch_norm(x, FOUR, FOUR.square(), FOUR, None, eps=0.0),
    lambda x: F.batch_norm(x, FOUR, torch.full_like(FOUR, 0.75), None, FOUR, eps=0.25),
    lambda x: F.relu(x - 0.5) + torch.relu(0.5 - x) + (x - 0.2).relu(),
    lambda x: F.relu6(10 * x - 2) + F.hardtanh(x, 0.2, 0.4) + x.clamp(max=0.5) + torch.clamp(x, 0.3, 0.4),
    lambda x: F.leaky_relu(x - 0.5) + F.leaky_relu(x - 0.4, 0.3) + torch.prelu(x - 0.4, FOUR),
    lambda x: torch.abs(x - 0.5) + (x - 0.3).abs(),
    lambda x: clipped_relu(x, FOUR) + maxmin(x),
    lambda x: clipped_maxmin(x, FOUR / 2 + 0.3, FOUR / 2),
    lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1, 2),
    lambda x: F.max_pool2d(x, (1, 3), 1, (0, 1)),
    lambda x: F.max_pool3d(x, 2, 1),
    lambda x: F.adaptive_max_pool1d(x.flatten(2), 3),
    lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    lambda x: F.adaptive_max_pool3d(x, 2),
]  # fmt: skip


def test_every_function_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    class Noted(dict[Any, Any]):
        def __getitem__(self, function: Any) -> Any:
            called.add(function)
            return super().__getitem__(function)

    monkeypatch.setattr(exact_module, "FUNCTIONS", Noted(FUNCTIONS))
    x = torch.rand(4, 4, 4, generator=generator(0), dtype=torch.float64)
    for call in CALLS:
        expected = call(x[None]).flatten()
        torch.testing.assert_close(floats([evaluate(call, x)])[0], expected, rtol=1e-12, atol=1e-12)
    assert called == set(FUNCTIONS)


def test_what_is_not_piecewise_linear_is_refused() -> None:
    x = torch.rand(4, generator=generator(0), dtype=torch.float64)
    norm = nn.BatchNorm1d(4).double().eval()
    for call, message in ((torch.tanh, "tanh"), (norm, "root"), (lambda x: F.dropout(x), "numbers")):
        with pytest.raises((NotImplementedError, AssertionError), match=message):
            evaluate(call, x)
    with pytest.raises(AssertionError, match="product"):
        Exact(lambda x: x * x, x, 1.0, normal(0, 1, 4) / 10)
