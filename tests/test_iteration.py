"""Iterated norms of linear maps of every kind under random masks, against float64 SVD of their matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear import BETWEEN, CONV, FLAT, LIKE, PLACES, PRODUCTS, REARRANGEMENTS, SKIP, SUMS, WEIGHT, matrix
from torch import Tensor

from locallip_cuda.norms.iteration import iterated_norm
from locallip_cuda.norms.linear import (
    Adjoint,
    Composed,
    Convolution,
    Dense,
    Identity,
    LinearMap,
    Rearrangement,
    Scaling,
    added,
    composed,
)

HEAD = Dense(torch.randn(7, 100, generator=generator(1), dtype=torch.float64))
LINE = Convolution(torch.randn(3, 2, 3, generator=generator(2), dtype=torch.float64), [2, 6], [2], [1], [1], 1)
CUBE = Convolution(
    torch.randn(2, 2, 2, 2, 2, generator=generator(3), dtype=torch.float64), [2, 3, 3, 4], [1] * 3, [1] * 3, [1] * 3, 1
)
MAPS: dict[str, LinearMap] = {
    **{f"product: {name}": composed(first, second) for name, (first, second, _, _) in PRODUCTS.items()},
    **{f"sum: {name}": added(first, second) for name, (first, second, _, _) in SUMS.items()},
    **{name: Rearrangement(function, sizes, LIKE) for name, (function, sizes, _, _) in REARRANGEMENTS.items()},
    "identity": SKIP,
    "scaling": PLACES,
    "dense": Dense(WEIGHT),
    "line": LINE,
    "cube": CUBE,
    "transposed": Adjoint(CONV),
    "transposed line": Adjoint(LINE),
    "transposed sum": Adjoint(added(CONV, PLACES)),
    "head": Composed([FLAT, HEAD]),
    "head of a convolution": Composed([CONV, FLAT, HEAD]),
    "a crop before and after": Composed(
        [
            Rearrangement(lambda x: x[:, :, 1:4, :4], [4, 5, 5], LIKE),
            Convolution(CONV.weight, [4, 3, 4], [1, 1], [1, 1], [1, 1], 1),
            Rearrangement(lambda x: x[:, 1:3, :, 1:], [4, 3, 4], LIKE),
        ]
    ),
    "zeros before": Composed(
        [
            Rearrangement(lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1)), [4, 3, 3], LIKE),
            Convolution(CONV.weight, [4, 5, 5], [1, 1], [0, 0], [1, 1], 1),
        ]
    ),
    "circular": Composed(
        [
            Rearrangement(lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), [4, 5, 5], LIKE),
            Convolution(CONV.weight, [4, 7, 7], [1, 1], [0, 0], [1, 1], 1),
        ]
    ),
    "between": BETWEEN,
}


def masks(linear: LinearMap, seed: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    shares = torch.rand(2, generator=g)
    rows = torch.rand(batch, *linear.output_sizes, generator=g) < shares[0]
    return rows, torch.rand(batch, *linear.input_sizes, generator=g) < shares[1]


def true_norms(linear: LinearMap, rows: Tensor | None, columns: Tensor | None, batch: int) -> Tensor:
    full = matrix(linear, linear.input_sizes).expand(batch, -1, -1)
    full = full if rows is None else full * rows.flatten(1).unsqueeze(2)
    full = full if columns is None else full * columns.flatten(1).unsqueeze(1)
    return torch.linalg.matrix_norm(full, 2)


@pytest.mark.parametrize("name", MAPS)
def test_norms_and_vectors(name: str) -> None:
    linear = MAPS[name]
    for seed in range(2):
        rows, columns = masks(linear, seed)
        for r, c in ((rows, columns), (rows, None), (None, columns), (None, None)):
            true = true_norms(linear, r, c, 3)
            sigma, right, left = iterated_norm(linear, r, c, 3, None, 100)
            torch.testing.assert_close(sigma, true, rtol=1e-7, atol=1e-12)
            few = iterated_norm(linear, r, c, 3, None, 1)[0]
            assert (few <= true * (1 + 1e-12)).all()
            image = linear(right if c is None else right * c)
            image = image if r is None else image * r
            torch.testing.assert_close(image, left * sigma.view(-1, *[1] * (left.dim() - 1)), rtol=0, atol=1e-4)
            again = iterated_norm(linear, r, c, 3, right, 0 if sigma.min() > 0 else 5)[0]
            assert (again >= true * 0.9 - 1e-12).all() and (again <= true * (1 + 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(MAPS)), seed=st.integers(0, 10**6))
def test_random_masks(name: str, seed: int) -> None:
    linear = MAPS[name]
    rows, columns = masks(linear, seed)
    true = true_norms(linear, rows, columns, 3)
    found = [iterated_norm(linear, rows, columns, 3, None, iterations)[0] for iterations in (0, 3, 60)]
    assert all((norm <= true * (1 + 1e-12)).all() for norm in found)
    torch.testing.assert_close(found[-1], true, rtol=1e-5, atol=1e-12)


def test_empty_masks_and_batches() -> None:
    for linear in MAPS.values():
        rows = torch.zeros(2, *linear.output_sizes, dtype=torch.bool)
        sigma, right, left = iterated_norm(linear, rows, None, 2, None, 3)
        assert (sigma == 0).all() and (left == 0).all() and right.isfinite().all()
        none = torch.zeros(0, *linear.output_sizes, dtype=torch.bool)
        assert iterated_norm(linear, none, None, 0, None, 3)[0].shape == (0,)


@pytest.mark.parametrize("kind", ["circular", "sum", "transposed", "scaling", "skip", "head"])
def test_gradients(kind: str) -> None:
    g = generator(5)
    weight = torch.randn(4, 4, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(1, 4, 1, 1, generator=g, dtype=torch.float64, requires_grad=True)

    def build(weight: Tensor, factor: Tensor) -> LinearMap:
        conv = CONV.with_weight(weight)
        scaling = Scaling(factor, [4, 5, 5])
        match kind:
            case "circular":
                return Composed([MAPS["circular"].maps[0], MAPS["circular"].maps[1].with_weight(weight)])  # type: ignore[attr-defined]
            case "sum":
                return composed(added(conv, PLACES), scaling)
            case "transposed":
                return Adjoint(composed(scaling, conv))
            case "scaling":
                return scaling
            case "skip":
                return added(composed(conv, scaling), Identity([4, 5, 5], LIKE))
        return Composed([conv, scaling, FLAT, HEAD])

    rows, columns = masks(build(weight, factor), 3, 2)

    def norms(weight: Tensor, factor: Tensor) -> Tensor:
        return iterated_norm(build(weight, factor), rows, columns, 2, None, 80)[0]

    assert torch.autograd.gradcheck(norms, (weight, factor), fast_mode=True, atol=1e-4)
