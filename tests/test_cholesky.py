"""Deterministic norms: against singular values, and the pieces of the proof against explicit matrices."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import generator, masked_matrices, matrix, true_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import locallip_cuda as ll
from locallip_cuda import cholesky, norms
from locallip_cuda.norms import Geometry

DENSE: Geometry = ([1, 1], [0, 0], [1, 1], 1)
Convolution = tuple[tuple[int, ...], tuple[int, int, int], dict[str, Any]]
CONVOLUTIONS: dict[str, Convolution] = {
    "padded": ((5, 3, 3, 3), (3, 7, 6), {"padding": 1}),
    "no padding": ((4, 3, 3, 2), (3, 6, 7), {}),
    "strided": ((4, 2, 4, 4), (2, 9, 8), {"stride": 2, "padding": 1}),
    "stride past the kernel": ((3, 2, 2, 2), (2, 9, 9), {"stride": 3, "padding": 1, "dilation": 2}),
    "dilated, grouped": ((6, 2, 3, 2), (4, 6, 6), {"groups": 2, "dilation": (2, 1), "stride": (1, 2)}),
    "depthwise": ((4, 1, 2, 2), (4, 6, 7), {"groups": 4, "stride": 2}),
    "one by one": ((3, 4, 1, 1), (4, 5, 5), {}),
    "kernel as wide as the image": ((2, 2, 5, 5), (2, 3, 3), {"padding": 2}),
    "one row": ((2, 2, 3, 3), (2, 1, 5), {"padding": 1}),
    "one column": ((2, 2, 3, 3), (2, 5, 1), {"padding": 1}),
    "one pixel": ((3, 4, 3, 3), (4, 1, 1), {"padding": 1}),
    "many channels out": ((40, 2, 3, 3), (2, 6, 6), {"padding": 1, "stride": 2}),
}


def geometry(conv: dict[str, Any]) -> Geometry:
    pairs = [conv.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    stride, padding, dilation = (list(p) if isinstance(p, tuple) else [p, p] for p in pairs)
    return stride, padding, dilation, conv.get("groups", 1)


def masks(batch: int, shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    return torch.rand(batch, *shape, generator=generator(seed)) < density


def problem(name: str, density: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    shape, size, conv = CONVOLUTIONS[name]
    weight = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    weight /= 2 * weight.abs().max()
    output = ll.masked_norm(weight, input_size=size, return_vectors=True, **conv)[2].shape[1:]
    return weight, masks(3, tuple(output), density, seed + 1), masks(3, size, density, seed + 2), size, conv


def absolute(weight: Tensor) -> float:
    """At least the root of the largest absolute row sum times the largest column sum."""
    dims = list(range(2, weight.dim()))
    return math.sqrt(float(weight.abs().sum([1, *dims]).max()) * float(weight.abs().sum([0, *dims]).max())) * (
        1 + 1e-12
    )


def check(bound: ll.norms.NormBound, true: Tensor, width: float = 1e-6) -> None:
    assert bound.guarantee == "deterministic" and bound.failure_probability == 0
    assert (bound.upper.double() >= true * (1 - 1e-14)).all()
    assert (bound.upper.double() <= true * (1 + width)).all()
    assert ((bound.upper == 0) == (true == 0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (30, 70), (200, 150)])
def test_dense(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, generator=generator(1), dtype=torch.float64).to(dtype)
    for density in (0.1, 0.6, 1.0):
        rows, cols = (masks(4, (n,), density, k) for k, n in enumerate(shape))
        check(ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic"), true_norms(weight, rows, cols))
    check(ll.masked_norm_bound(weight, guarantee="deterministic"), true_norms(weight, None, None))


@pytest.mark.parametrize("density", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, density: float) -> None:
    weight, rows, cols, size, conv = problem(name, density)
    bound = ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic", **conv)
    check(bound, true_norms(weight, rows, cols, size, **conv))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CONVOLUTIONS)), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([1, 3, 16, 512])
)  # fmt: skip
def test_any_mask_and_any_block(name: str, density: float, seed: int, block: int) -> None:
    weight, rows, cols, size, conv = problem(name, density, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "BLOCK", block)
        patch.setattr(cholesky, "PANEL", 5 * block)
        bound = ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic", **conv)
    check(bound, true_norms(weight, rows, cols, size, **conv))


@pytest.mark.parametrize("estimate", [0.0, 0.5, 0.99, 1 - 1e-4, 1.3, 100.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["dense", "padded", "strided"])
def test_nothing_is_assumed_of_the_estimate(name: str, estimate: float) -> None:
    if name == "dense":
        weight = torch.randn(20, 30, generator=generator(3), dtype=torch.float64) / 8
        rows, cols = masks(3, (20,), 0.6, 1), masks(3, (30,), 0.6, 2)
        true, shape, conv = true_norms(weight, rows, cols), [3, 30], DENSE
    else:
        weight, rows, cols, size, options = problem(name, 0.6)
        true, shape, conv = true_norms(weight, rows, cols, size, **options), [3, *size], geometry(options)
    upper = cholesky.proved_norms(weight, rows, cols, estimate * true, shape, *conv)
    assert (upper >= true * (1 - 1e-14)).all() and upper.isfinite().all()
    if 1 - 1e-3 < estimate < 1:
        assert (upper <= true * 1.01).all(), "a little wrong costs a little"


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_stencil_is_the_gram_matrix(name: str) -> None:
    weight, rows, cols, size, conv = problem(name, 0.7)
    dense = masked_matrices(matrix(weight, size, **conv), rows, cols)[0]
    spectrum = torch.linalg.svdvals(dense)
    pieces = list(cholesky._pieces(weight, rows[0], cols[0], absolute(weight), size, geometry(conv)))
    assert len(pieces) == conv.get("groups", 1)
    found = []
    for piece in pieces:
        assert isinstance(piece, cholesky.Banded)
        pixels, channels = piece.alive.shape
        whole = torch.zeros(pixels, channels, pixels, channels, dtype=torch.float64)
        for offset, values in piece.stencil:
            for p in range(pixels):
                if p + offset < pixels:
                    whole[p, :, p + offset] = values[p]
                    whole[p + offset, :, p] = values[p].T
                else:
                    assert not values[p].any()
        alive = piece.alive.flatten()
        gram = whole.flatten(2).flatten(0, 1)[alive][:, alive]
        found.append(torch.linalg.eigvalsh(gram))
    eigenvalues = torch.cat(found).sort(descending=True).values
    count = min(len(eigenvalues), len(spectrum))
    torch.testing.assert_close(
        eigenvalues[:count].clamp_min(0).sqrt()[:3], spectrum[:count][:3], rtol=1e-12, atol=1e-13
    )
    assert (eigenvalues[len(spectrum) :].abs() < 1e-12).all() or len(eigenvalues) <= len(spectrum)


@pytest.mark.parametrize("block, panel", [(1, 1), (4, 7), (16, 16), (512, 1024)])
@pytest.mark.parametrize("name", ["padded", "strided", "kernel as wide as the image", "many channels out"])
def test_a_shift_below_the_largest_eigenvalue_is_refused(
    name: str, block: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", block)
    monkeypatch.setattr(cholesky, "PANEL", panel)
    weight, rows, cols, size, conv = problem(name, 0.8)
    (piece,) = cholesky._pieces(weight, rows[0], cols[0], absolute(weight), size, geometry(conv))
    top = torch.linalg.svdvals(masked_matrices(matrix(weight, size, **conv), rows, cols)[0])[0].item() ** 2
    for below in (1e-10, 1e-6, 0.1, 0.9):
        assert piece.error(top * (1 - below)) is None
    error = piece.error(top * (1 + 1e-9))
    assert error is not None and 0 < error < 1e-9 * top


def test_a_shift_below_the_largest_eigenvalue_is_refused_for_dense_weights() -> None:
    weight = torch.randn(30, 50, generator=generator(4), dtype=torch.float64) / 8
    (piece,) = cholesky._pieces(weight, None, None, absolute(weight), [50], DENSE)
    top = torch.linalg.matrix_norm(weight, 2).item() ** 2
    assert piece.error(top * (1 - 1e-12)) is None and piece.error(-1.0) is None and piece.error(math.nan) is None
    assert piece.error(top * (1 + 1e-12)) is not None


def test_every_error_is_added() -> None:
    """By hand: one unit, G = 1/4 with an error said to be 1/8; and the bound of the factorisation's own."""
    piece = cholesky.Dense(torch.tensor([[0.25]], dtype=torch.float64), 0.125)
    bound = cholesky._prove([piece], 0.5)
    assert bound is not None and Fraction(bound) ** 2 >= Fraction(1, 2) + Fraction(1, 8)
    assert bound == pytest.approx(math.sqrt(0.625), rel=1e-12)
    exact = cholesky.Dense(torch.tensor([[0.25]], dtype=torch.float64), 0.0)
    assert cholesky._prove([piece, exact], 0.5) == bound, "the worst of several pieces"
    u = 2.0**-53
    error = cholesky._factorisation_error(largest=3.0, trace=10.0, width=100)
    assert error >= 4 * 102 * u * 10 + u * 3
    assert cholesky._factorisation_error(largest=3.0, trace=math.inf, width=5) >= 4 * 7 * u * 11 * 3


def test_the_rounding_of_the_gram_matrix_is_covered() -> None:
    """Entries that cancel: the float64 Gram matrix is off by more than its last digits, within the error stated."""
    g = generator(5)
    weight = torch.randn(6, 4000, generator=g, dtype=torch.float64)
    weight[1] = weight[0] * (1 + 1e-14)
    weight[2:4] = torch.randn(1, 4000, generator=g, dtype=torch.float64).sign()
    weight /= 2 * weight.abs().max()
    (piece,) = cholesky._pieces(weight, None, None, absolute(weight), [4000], DENSE)
    assert isinstance(piece, cholesky.Dense)
    exact = [[Fraction(0)] * 6 for _ in range(6)]
    rows = [[Fraction(v) for v in row] for row in weight.tolist()]
    for i in range(6):
        for j in range(6):
            exact[i][j] = sum((a * b for a, b in zip(rows[i], rows[j], strict=True)), Fraction(0))
    off = max(sum(abs(Fraction(float(piece.gram[i, j])) - exact[i][j]) for j in range(6)) for i in range(6))
    assert 0 < off <= Fraction(piece.gram_error)


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e-30, 1e30, 1e300])
def test_scales(scale: float) -> None:
    weight = torch.randn(12, 15, generator=generator(6), dtype=torch.float64)
    rows, cols = masks(4, (12,), 0.6, 1), masks(4, (15,), 0.6, 2)
    bound = ll.masked_norm_bound(weight * scale, rows, cols, guarantee="deterministic")
    true = true_norms(weight, rows, cols)
    assert (bound.upper / scale >= true * (1 - 1e-13)).all() and (bound.upper / scale <= true * (1 + 1e-6)).all()


def test_survivors_far_smaller_than_the_largest_weight() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=generator(7), dtype=torch.float64)
    weight[:4] *= 2.0**300
    weight[4:] *= 2.0**-300
    rows = torch.zeros(1, 8, 6, 6, dtype=torch.bool)
    rows[:, 4:] = masks(1, (4, 6, 6), 0.7, 1)
    cols = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    bound = ll.masked_norm_bound(weight, rows, cols, padding=1, guarantee="deterministic")
    true = true_norms(weight[4:] * 2.0**300, rows[:, 4:], cols, (4, 6, 6), padding=1) * 2.0**-300
    check(bound, true)


def test_without_masks_the_norm_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator(8))
    calls: list[int] = []
    honest = norms.proved_norms

    def spy(*arguments: Any, **options: Any) -> Tensor:
        calls.append(len(arguments[3]))
        return honest(*arguments, **options)

    monkeypatch.setattr(norms, "proved_norms", spy)
    everything = torch.ones(5, 4, 7, 7, dtype=torch.bool)

    def bound() -> float:
        upper = ll.masked_norm_bound(weight, None, everything, padding=1, guarantee="deterministic").upper
        assert (upper == upper[0]).all()
        return upper[0].item()

    first = bound()
    assert calls == [5, 1] and bound() == first and calls == [5, 1, 5]
    weight.data *= 1.5  # an edit that no version counter sees
    assert bound() == pytest.approx(1.5 * first, rel=1e-6) and calls[-2:] == [5, 1]


def test_the_bound_is_the_same_at_every_call_and_leaves_the_random_numbers_alone() -> None:
    weight = torch.randn(30, 30, generator=generator(9))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = ll.masked_norm_bound(weight, guarantee="deterministic").upper
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, ll.masked_norm_bound(weight, guarantee="deterministic").upper)
