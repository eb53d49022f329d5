"""Deterministic norms: against singular values, and the pieces of the proof against explicit matrices."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, masked_matrices, matrix, true_norms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import locallip_cuda as ll
from locallip_cuda.norms import cholesky
from locallip_cuda.norms import masked_norm as norms
from locallip_cuda.norms.masked_norm import Geometry

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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    groups = draw(1, 2)
    shape = (groups * draw(1, 3), draw(1, 3), draw(1, 4), draw(1, 4))
    size = (groups * shape[1], draw(1, 6), draw(1, 6))
    conv = {
        "stride": (draw(1, 3), draw(1, 3)),
        "padding": (draw(0, 3), draw(0, 3)),
        "dilation": (draw(1, 2), draw(1, 2)),
        "groups": groups,
    }
    axes = zip(size[1:], conv["padding"], conv["dilation"], shape[2:], strict=True)
    assume(all(n + 2 * p - d * (k - 1) >= 1 for n, p, d, k in axes))
    seed, density = draw(0, 10**6), data.draw(st.sampled_from([0.2, 0.7, 1.0]))
    weight = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    output = F.conv2d(torch.zeros(1, *size, dtype=torch.float64), weight, **conv).shape[1:]
    rows, cols = masks(2, tuple(output), density, seed + 1), masks(2, size, density, seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "BLOCK", data.draw(st.sampled_from([1, 5, 256])))
        bound = ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic", **conv)
    check(bound, true_norms(weight, rows, cols, size, **conv))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_any_dense_shape(m: int, n: int, density: float, seed: int, single: bool) -> None:
    weight = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    weight = weight.float() if single else weight
    rows, cols = masks(3, (m,), density, seed + 1), masks(3, (n,), density, seed + 2)
    check(ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic"), true_norms(weight, rows, cols))


def known_norms() -> dict[str, tuple[Tensor, Tensor | None, Tensor | None, dict[str, Any], Fraction]]:
    """Operators whose squared norm is rational and known: (weight, row mask, column mask, convolution, square)."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    g = generator(11)
    a, b = (torch.randint(-(2**26), 2**26, (n,), generator=g, dtype=torch.float64) for n in (30, 50))
    sums = [sum(Fraction(v) ** 2 for v in t.tolist()) for t in (a, b)]
    delta = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    delta[range(3), range(3), 1, 1] = 0.3
    image = torch.ones(1, 3, 6, 6, dtype=torch.bool)
    one_output, one_input, one_pixel = (torch.zeros(1, 3, 6, 6, dtype=torch.bool) for _ in range(3))
    one_output[0, 1, 3, 3] = one_input[0, 2, 2, 4] = True
    one_pixel[0, :, 3, 3] = True
    random = torch.randn(3, 3, 3, 3, generator=g, dtype=torch.float64)
    row = sum((Fraction(v) ** 2 for v in random[1].flatten().tolist()), Fraction(0))
    spike = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    spike[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.7])
    column = sum((Fraction(v) ** 2 for v in (0.1, 0.2, 0.7)), Fraction(0))
    padded = {"padding": 1}
    return {
        "orthogonal": (hadamard / 3, None, None, {}, 32 * Fraction(1 / 3) ** 2),
        "rank one": (a[:, None] * b, None, None, {}, sums[0] * sums[1]),
        "rank one, tall": (b[:, None] * a, None, None, {}, sums[0] * sums[1]),
        "identity by a 3x3 kernel": (delta, None, image, padded, Fraction(0.3) ** 2),
        "one output": (random, one_output, image, padded, row),
        "one output, one input": (random, one_output, one_input, padded, Fraction(random[1, 2, 0, 2].item()) ** 2),
        "one pixel": (spike, one_pixel, image, padded, column),
        "nothing": (random, torch.zeros_like(image), image, padded, Fraction(0)),
        "zero weights": (torch.zeros_like(random), image, image, padded, Fraction(0)),
    }


@pytest.mark.parametrize("name", known_norms())
def test_norms_known_exactly(name: str) -> None:
    weight, rows, cols, conv, square = known_norms()[name]
    upper = ll.masked_norm_bound(weight, rows, cols, guarantee="deterministic", **conv).upper
    assert square <= Fraction(upper.item()) ** 2 <= square * Fraction(1 + 1e-6)


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
    assert all(piece.error(shift) is None for shift in (top * (1 - 1e-12), -1.0, math.nan, math.inf))
    broken = torch.tensor([[math.nan]], dtype=torch.float64)
    assert not cholesky._positive(broken, torch.tensor(0)), "whatever the library says"
    assert piece.error(top * (1 + 1e-12)) is not None


def quotient(dense: Tensor) -> Fraction:
    """A lower bound of the squared norm, exact for the vector it is taken at, and so within 1e-25 of it or so."""
    vector = [Fraction(v) for v in torch.linalg.svd(dense, full_matrices=False)[2][0].tolist()]
    image = [sum(Fraction(a) * v for a, v in zip(row, vector, strict=True) if a) for row in dense.tolist()]
    return sum((v * v for v in image), Fraction(0)) / sum((v * v for v in vector), Fraction(0))


def test_the_errors_cover_the_least_shift_that_is_factorised() -> None:
    """To the last digit: some shifts below the eigenvalue are factorised, and with the errors none is below it."""
    cases: list[tuple[cholesky.Dense | cholesky.Banded, Tensor]] = []
    for seed in range(6):
        weight = torch.randn(12, 17, generator=generator(seed), dtype=torch.float64) / 8
        if seed % 2:
            weight = torch.linalg.qr(weight.T)[0].T  # clustered: all singular values agree to rounding
        cases.append((next(cholesky._pieces(weight, None, None, absolute(weight), [17], DENSE)), weight))
        for name in ("padded", "no padding", "one row", "many channels out"):
            weight, rows, cols, size, conv = problem(name, 0.8, seed)
            dense = masked_matrices(matrix(weight, size, **conv), rows, cols)[0]
            pieces = cholesky._pieces(weight, rows[0], cols[0], absolute(weight), size, geometry(conv))
            cases.append((next(pieces), dense))
    below = 0
    for piece, dense in cases:
        square = quotient(dense)
        low, high = (float(square) * (1 + share) for share in (-1e-11, 1e-11))
        assert piece.error(low) is None and piece.error(high) is not None
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (low, middle) if piece.error(middle) is not None else (middle, high)
        error = piece.error(high)
        assert error is not None and Fraction(high) + Fraction(error) >= square
        below += Fraction(high) < square
    assert below > 0, "without the errors the proof would be wrong"


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_rounding_of_the_stencil_is_covered(name: str) -> None:
    """By as many roundings as an entry of A^T A has terms, on the side that has fewer."""
    weight, rows, cols, size, conv = problem(name, 1.0)
    dense = matrix(weight, size, **conv)
    absolute_norm = float(cholesky.absolute_norms(weight, None, None, [1, *size], *geometry(conv)))
    there = (dense != 0).double()
    terms = min(int((there.T @ there).max()), int((there @ there.T).max()))
    for piece in cholesky._pieces(weight, rows[0], cols[0], absolute_norm, size, geometry(conv)):
        assert piece.gram_error >= terms * 2.0**-53 * torch.linalg.matrix_norm(dense.abs(), 2) ** 2


@pytest.mark.parametrize("name", ["padded", "strided", "kernel as wide as the image"])
def test_nothing_but_the_lower_triangle_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows, cols, size, conv = problem(name, 0.8)
    (piece,) = cholesky._pieces(weight, rows[0], cols[0], absolute(weight), size, geometry(conv))
    monkeypatch.setattr(cholesky, "BLOCK", 4)
    monkeypatch.setattr(cholesky, "PANEL", 4)
    shift = 1.0001 * torch.linalg.svdvals(masked_matrices(matrix(weight, size, **conv), rows, cols)[0])[0].item() ** 2
    expected = piece.error(shift)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, math.nan, **options))
    assert expected is not None and piece.error(shift) == expected


def test_the_cap_is_asked_for_where_the_first_shift_fails_and_holds_from_there() -> None:
    weight = torch.randn(20, 30, generator=generator(12), dtype=torch.float64) / 8
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[0, 0] = False
    true = true_norms(weight, None, mask)
    asked: list[float] = []

    def bound(estimate: float, cap: float) -> float:
        asked.clear()
        return float(
            cholesky.proved_norms(
                weight, None, mask, estimate * true, [1, 30], *DENSE, cap=lambda: asked.append(cap) or cap
            )
        )

    cap = true.item() * 1.01
    assert true.item() <= bound(1.0, cap) < true.item() * (1 + 1e-6) and not asked
    assert true.item() <= bound(1 - 1e-5, cap) < true.item() * (1 + 1e-4) and asked
    assert bound(0.5, cap) == cap == bound(0.9, cap)
    assert bound(1.02, cap) < true.item() * 1.03, "a proof of its own"


def test_every_error_is_added() -> None:
    """By hand: one unit, G = 1/4 with an error said to be 1/8; and the bound of the factorisation's own."""
    piece = cholesky.Dense(torch.tensor([[0.25]], dtype=torch.float64), 0.125)
    bound = cholesky._prove([piece], 0.5)
    assert bound is not None and Fraction(bound) ** 2 >= Fraction(1, 2) + Fraction(1, 8)
    assert bound == pytest.approx(math.sqrt(0.625), rel=1e-12)
    exact = cholesky.Dense(torch.tensor([[0.25]], dtype=torch.float64), 0.0)
    assert cholesky._prove([piece, exact], 0.5) == bound, "the worst of several pieces"
    assert cholesky._search([piece], math.sqrt(0.5), 10.0, None) >= bound, "the search returns what was proved"
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
