"""Norms of small and odd layers against the plain-PyTorch twin and the singular values of the materialised operator."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import generator, true_norms
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference

MASKS = ["none", "all", "empty", "one bit", "random", "rows", "columns"]


def mask(kind: str, batch: int, shape: list[int], seed: int) -> Tensor | None:
    full = torch.ones(batch, *shape, dtype=torch.bool)
    if kind == "all":
        return full
    if kind == "empty":
        return ~full
    random = torch.rand(batch, *shape, generator=generator(seed)) < 0.5
    if kind == "one bit":
        one = (~full).flatten(1)
        one[torch.arange(batch), torch.arange(batch) * 7 % one.shape[1]] = True
        return one.view(batch, *shape)
    return random


def masks(kind: str, batch: int, rows: list[int], columns: list[int]) -> tuple[Tensor | None, Tensor | None]:
    row_mask = None if kind in ("none", "columns") else mask(kind, batch, rows, 1)
    col_mask = None if kind in ("none", "rows") else mask(kind, batch, columns, 2)
    return row_mask, col_mask


def check(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_shape: list[int],
    conv: list[Any],
    iterations: int,
    device: str,
    tolerance: float,
    start: Tensor | None = None,
    lost: float | None = None,
) -> None:
    """The op's triple: the twin's value, never above the norm, unit vectors within the masks, A u = sigma v.

    lost: of the twin's value, at most; the tolerance where it is not given.
    """
    arguments = [row_mask, col_mask, start, input_shape, *conv, iterations]
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    sigma, right, left = (t.cpu().double() for t in ops.masked_norm(weight.to(device), *moved))
    double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    expected, _, _ = reference.masked_norm(weight.double(), *double)  # type: ignore[arg-type]
    true = true_norms(
        weight, row_mask, col_mask, *([tuple(input_shape[1:])] if weight.dim() == 4 else []), **keywords(weight, conv)
    ).expand(input_shape[0])
    scale = weight.double().abs().max() * weight[0].numel() ** 0.5
    assert (sigma <= true * (1 + tolerance) + tolerance * 1e-3 * scale).all()
    least = 1 - (tolerance if lost is None else lost)
    assert (sigma >= expected * least - tolerance * 1e-3 * scale).all(), (sigma, expected)
    alive = true > tolerance * scale
    assert (sigma[true == 0] == 0).all() and (right[true == 0] == 0).all() and (left[true == 0] == 0).all()
    for vector, mask_ in ((right, col_mask), (left, row_mask)):
        assert mask_ is None or (vector[~mask_] == 0).all()
        assert torch.allclose(vector.flatten(1).norm(dim=1)[alive], torch.ones(1, dtype=torch.float64), atol=1e-4)
    image = reference.affine(right, weight.double(), None, *conv)
    image = image if row_mask is None else image * row_mask
    residual = (image - sigma.view(-1, *[1] * (image.dim() - 1)) * left).flatten(1).norm(dim=1)
    assert (residual[alive] <= 30 * tolerance * true[alive] + tolerance * 1e-2 * scale).all(), (residual, true)


def keywords(weight: Tensor, conv: list[Any]) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation", "groups"), conv, strict=True)) if weight.dim() == 4 else {}


NO_CONV = [[1, 1], [0, 0], [1, 1], 1]
# the last two: more survivors than fit on chip, and more weights than are gathered at all
DENSE = [(1, 1), (1, 33), (31, 1), (33, 31), (16, 40), (17, 64), (40, 129), (600, 5), (300, 600), (800, 700)]


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_dense(device: str, shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape, generator=generator(0))
    rows, columns = masks(kind, 3, [shape[0]], [shape[1]])
    batch = 1 if kind == "none" else 3
    check(weight, rows, columns, [batch, shape[1]], NO_CONV, 4, device, 1e-5)


@pytest.mark.parametrize("iterations", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_iterations(device: str, iterations: int, dtype: torch.dtype) -> None:
    weight = torch.randn(35, 50, generator=generator(0)).to(dtype)
    rows, columns = masks("random", 3, [35], [50])
    check(weight, rows, columns, [3, 50], NO_CONV, iterations, device, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("shape", [(1, 33), (33, 31), (40, 129), (300, 600)], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_dense_streaming(device: str, shape: tuple[int, int], kind: str) -> None:
    """As many iterations as there are without a restart, by the last vector alone: most have the whole space before."""
    weight = torch.randn(shape, generator=generator(0))
    rows, columns = masks(kind, 3, [shape[0]], [shape[1]])
    batch = 1 if kind == "none" else 3
    check(weight, rows, columns, [batch, shape[1]], NO_CONV, 15, device, 1e-5)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("iterations", [4, 15])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 1e-3, 0])
@pytest.mark.parametrize("shape", [(60, 90), (30, 2500), (2501, 30)], ids=str)
def test_falling_singular_values(device: str, shape: tuple[int, int], ratio: float, iterations: int) -> None:
    """Vectors lose any share of their length to the last ones, all of it included; no value rises for it."""
    u, _ = torch.linalg.qr(torch.randn(shape[0], 30, generator=generator(0)))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 30, generator=generator(1)))
    weight = u * torch.tensor(ratio) ** torch.arange(30) @ v.T
    start = (v.T[:2] + 1e-3 * v.T[1:3]).contiguous()
    check(weight, None, None, [2, shape[1]], NO_CONV, iterations, device, 1e-5, start)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize(
    ("length", "iterations"), [(5000, 6), (5001, 6), (12003, 6), (25000, 6), (31001, 6), (5001, 17), (31000, 17)]
)
@pytest.mark.parametrize("wide", [True, False])
def test_long_vectors(device: str, length: int, iterations: int, wide: bool, shared_limit: Any) -> None:
    """Beyond a block's shared memory: in clusters with the last vector, without it, and in none."""
    shared_limit(18400)
    weight = torch.randn(20, length, generator=generator(0)) * 0.97 ** torch.arange(20).unsqueeze(1)
    weight = weight if wide else weight.T.contiguous()
    rows, columns = masks("random", 2, [weight.shape[0]], [weight.shape[1]])
    check(weight, rows, columns, [2, weight.shape[1]], NO_CONV, iterations, device, 1e-5)


@pytest.mark.usefixtures("streaming", "code_for_compute_80")
@pytest.mark.parametrize("length", [1000, 3000, 5000])
def test_long_vectors_without_clusters(device: str, length: int, shared_limit: Any) -> None:
    shared_limit(18400)
    weight = torch.randn(20, length, generator=generator(0))
    check(weight, *masks("random", 2, [20], [length]), [2, length], NO_CONV, 6, device, 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_dense_far_from_one(device: str, scale: float) -> None:
    weight = torch.randn(35, 50, generator=generator(0)) * scale
    check(weight, *masks("random", 3, [35], [50]), [3, 50], NO_CONV, 4, device, 1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (12, 30), (30, 20, 3, 3)], ids=str)
@pytest.mark.parametrize("iterations", [4, 30])
@pytest.mark.parametrize("streaming", ["", "1"])
def test_rank_one(
    device: str, shape: tuple[int, ...], iterations: int, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Krylov space is exhausted after one step, and what follows is rounding."""
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    a, b = torch.randn(shape[0], generator=generator(0)), torch.randn(shape[1], generator=generator(1))
    weight = torch.outer(a, b)
    if len(shape) == 2:
        check(weight, *masks("random", 2, [shape[0]], [shape[1]]), [2, shape[1]], NO_CONV, iterations, device, 1e-5)
    else:
        centre = torch.zeros(shape)
        centre[:, :, 1, 1] = weight
        conv = [[1, 1], [1, 1], [1, 1], 1]
        check(centre, None, None, [2, shape[1], 5, 4], conv, iterations, device, 1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_start(device: str, per_sample: bool, dense: bool) -> None:
    shape = [3, 40] if dense else [3, 5, 6, 7]
    weight = torch.randn(30, 40, generator=generator(0)) if dense else torch.randn(4, 5, 3, 3, generator=generator(0))
    rows, columns = masks("random", 3, [30] if dense else [4, 6, 7], shape[1:])
    start = torch.randn(shape if per_sample else [1, *shape[1:]], generator=generator(3))
    start[0] = 0  # such a start is none
    conv = NO_CONV if dense else [[1, 1], [1, 1], [1, 1], 1]
    check(weight, rows, columns, shape, conv, 2, device, 1e-5, start)


# channels in and out, kernel, stride, padding, map: every residue of a stride, kernels smaller than it, borders
CONVOLUTIONS = [
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 33, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 32, (3, 3), (1, 1), (1, 1), (9, 31)),
    (31, 33, (3, 3), (1, 1), (0, 0), (5, 3)),
    (33, 3, (4, 4), (2, 2), (1, 1), (7, 9)),
    (8, 12, (4, 4), (2, 2), (1, 1), (8, 8)),
    (5, 8, (2, 3), (3, 2), (2, 0), (11, 8)),
    (4, 6, (1, 1), (2, 2), (0, 0), (6, 5)),
    (4, 7, (2, 1), (3, 4), (1, 2), (9, 10)),
    (2, 4, (5, 3), (1, 1), (4, 2), (3, 4)),
    (1, 40, (3, 3), (1, 1), (1, 1), (17, 16)),
    (1, 8, (3, 3), (1, 1), (1, 1), (23, 23)),
]


def convolve(
    device: str,
    layer: tuple[Any, ...],
    kind: str,
    iterations: int,
    tolerance: float = 1e-5,
    lost: float | None = None,
) -> None:
    channels, out, kernel, stride, padding, size = layer
    weight = torch.randn(out, channels, *kernel, generator=generator(0))
    conv = [list(stride), list(padding), [1, 1], 1]
    batch = 1 if kind == "none" else 3
    shape = [batch, channels, *size]
    image = reference.affine(torch.zeros(shape), weight, None, *conv)
    rows, columns = masks(kind, batch, list(image.shape[1:]), shape[1:])
    check(weight, rows, columns, shape, conv, iterations, device, tolerance, lost=lost)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kind", ["none", "empty", "one bit", "random"])
def test_convolution(device: str, layer: tuple[Any, ...], kind: str) -> None:
    convolve(device, layer, kind, 3)


def in_bfloat16(device: str, streaming: str) -> tuple[float, float]:
    """The tolerance of a convolution's norm by vectors in bfloat16, and what may be lost.

    Where they are off, no value is above the norm for it, and the left one is the image of the right one; but on a
    GPU's chip the value is that of weights and vectors in bfloat16.
    """
    on_chip = streaming == "0" and (device == "cuda" or "LOCALLIP_EMULATION" in os.environ)
    return (4e-3, 4e-3) if on_chip else (1e-5, 3e-3)


# a layer, how much shared memory a block may have, and how many blocks a sample then takes, in float32 and in bfloat16;
# none where it streams
TALL = (8, 12, (3, 3), (1, 1), (1, 1), (17, 8))
CLUSTERS = [
    (CONVOLUTIONS[3], 40000, 2, 1),
    (CONVOLUTIONS[4], 43000, 2, 1),
    (CONVOLUTIONS[5], 26200, 2, 2),
    (CONVOLUTIONS[5], 25000, 4, 2),
    (CONVOLUTIONS[6], 14200, 4, 4),
    (TALL, 33500, 2, 2),
    (TALL, 29000, 4, 4),
    (TALL, 27000, 8, 4),
    (TALL, 26000, 0, 8),
]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("layer", "limit", "blocks", "narrow_blocks"), CLUSTERS, ids=str)
def test_convolution_in_clusters(
    device: str,
    layer: tuple[Any, ...],
    limit: int,
    blocks: int,
    narrow_blocks: int,
    narrow: bool,
    shared_limit: Any,
    took_blocks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", "0")
    shared_limit(limit)
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        tolerance, lost = in_bfloat16(device, "0") if narrow else (1e-5, None)
        convolve(device, layer, "random", 2, tolerance, lost)
    if expected := narrow_blocks if narrow else blocks:
        took_blocks(expected)


def test_convolution_that_does_not_fit_streams(device: str, shared_limit: Any) -> None:
    shared_limit(18600)
    convolve(device, CONVOLUTIONS[5], "random", 2)


def test_clusters_need_code_that_has_them(device: str, shared_limit: Any, code_for_compute_80: None) -> None:
    """Code of earlier devices takes every block for the first of its cluster."""
    shared_limit(43000)
    convolve(device, CONVOLUTIONS[4], "random", 2)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolution_is_close_in_float32(device: str, layer: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensor cores too, whose sums are rounded toward zero."""
    monkeypatch.setenv("LOCALLIP_STREAMING", "0")
    channels, out, kernel, stride, padding, size = layer
    weight = torch.randn(out, channels, *kernel, generator=generator(0))
    conv = [list(stride), list(padding), [1, 1], 1]
    shape = [2, channels, *size]
    image = reference.affine(torch.zeros(shape), weight, None, *conv)
    rows, columns = masks("random", 2, list(image.shape[1:]), shape[1:])
    given = [t.to(device) for t in (weight, rows, columns) if t is not None]
    sigma, _, _ = ops.masked_norm(*given, None, shape, *conv, 3)
    expected, _, _ = reference.masked_norm(weight.double(), rows, columns, None, shape, *conv, 3)
    assert torch.allclose(sigma.cpu().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("iterations", [0, 1, 15, 16, 33])
def test_convolution_iterations(device: str, iterations: int) -> None:
    convolve(device, CONVOLUTIONS[5], "random", iterations)


@pytest.mark.parametrize("streaming", ["0", "1"])
def test_convolution_in_tf32(device: str, streaming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        convolve(device, CONVOLUTIONS[5], "random", 4, tolerance=2e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kind", ["none", "empty", "one bit", "random"])
@pytest.mark.parametrize("streaming", ["0", "1"])
def test_convolution_by_vectors_in_bfloat16(
    device: str, layer: tuple[Any, ...], kind: str, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    convolve(device, layer, kind, 5, *in_bfloat16(device, streaming))


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize(("kind", "iterations"), [("random", 4), ("empty", 4), ("one bit", 15), ("none", 30)])
@pytest.mark.parametrize("streaming", ["", "1"])
def test_dense_by_vectors_in_bfloat16(
    device: str,
    shape: tuple[int, int],
    kind: str,
    iterations: int,
    streaming: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    weight = torch.randn(shape, generator=generator(0))
    rows, columns = masks(kind, 3, [shape[0]], [shape[1]])
    batch = 1 if kind == "none" else 3
    check(weight, rows, columns, [batch, shape[1]], NO_CONV, iterations, device, 1e-5, lost=3e-3)


@pytest.mark.usefixtures("autocast", "streaming")
@pytest.mark.parametrize("length", [5000, 12001, 25000, 31000])
def test_long_vectors_in_bfloat16(device: str, length: int, shared_limit: Any) -> None:
    shared_limit(18400)
    weight = torch.randn(20, length, generator=generator(0)) * 0.97 ** torch.arange(20).unsqueeze(1)
    check(weight, *masks("random", 2, [20], [length]), [2, length], NO_CONV, 6, device, 1e-5, lost=3e-3)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", ["one bit", "random", "rows"])
def test_long_convolution(device: str, kind: str, narrow: bool) -> None:
    """Both sides by the last vector alone, though the left one is short."""
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        convolve(device, (3, 4, (5, 5), (4, 4), (1, 1), (32, 32)), kind, 15, lost=3e-3 if narrow else None)


@pytest.mark.usefixtures("streaming")
def test_autocast_is_heard(device: str) -> None:
    """The right vectors are bfloat16's, where that is fast, and the values float32's of them."""
    if device == "cpu" and not os.environ.get("LOCALLIP_EMULATION"):
        pytest.skip("a CPU may have no instructions for bfloat16")
    weight = torch.randn(40, 129, generator=generator(0)).to(device)
    arguments = (weight, None, None, None, [1, 129], *NO_CONV, 6)
    exact, right, _ = ops.masked_norm(*arguments)
    with torch.autocast(device, torch.bfloat16):
        sigma, narrow, left = ops.masked_norm(*arguments)
    assert 1e-4 < (right - narrow).norm() < 0.1
    torch.testing.assert_close(sigma, (narrow @ weight.T).norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(sigma, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(left, narrow @ weight.T / sigma, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("streaming", ["0", "1"])
def test_by_vectors_in_bfloat16_far_from_one(
    device: str, scale: float, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    weight = torch.randn(6, 4, 3, 3, generator=generator(0)) * scale
    rows, columns = masks("random", 2, [6, 5, 5], [4, 5, 5])
    conv = [[1, 1], [1, 1], [1, 1], 1]
    tolerance, lost = in_bfloat16(device, streaming)
    check(weight, rows, columns, [2, 4, 5, 5], conv, 3, device, tolerance, lost=lost)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("streaming", ["", "1"])
def test_convolution_far_from_one(device: str, scale: float, streaming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    weight = torch.randn(6, 4, 3, 3, generator=generator(0)) * scale
    conv = [[1, 1], [1, 1], [1, 1], 1]
    rows, columns = masks("random", 2, [6, 5, 5], [4, 5, 5])
    check(weight, rows, columns, [2, 4, 5, 5], conv, 3, device, 1e-5)


@pytest.mark.parametrize("scale", [1e-19, 1e-22, 1e-25, 1e-37])
@pytest.mark.parametrize("streaming", ["", "1"])
@pytest.mark.parametrize("narrow", [False, True])
def test_survivors_far_below_the_largest_weight(
    device: str, scale: float, narrow: bool, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose squares float32 does not have: such a norm is small, and neither taken for none nor for more."""
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    weight = torch.randn(6, 4, 3, 3, generator=generator(0))
    weight[:, 1:] *= scale
    columns = torch.ones(2, 4, 5, 5, dtype=torch.bool, device=device)
    columns[:, 0] = False
    conv = [[1, 1], [1, 1], [1, 1], 1]
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        sigma, _, _ = ops.masked_norm(weight.to(device), None, columns, None, [2, 4, 5, 5], *conv, 8)
    true = true_norms(weight, None, columns.cpu(), (4, 5, 5), **keywords(weight, conv))
    ratio = sigma.cpu().double() / true
    least = 0.8 if narrow and scale < 1e-36 else 0.98  # which bfloat16 has as denormal numbers alone
    assert (ratio > least).all() and (ratio < (1.01 if narrow else 1 + 1e-5)).all(), ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (20, 3000), (5, 30)], ids=str)
def test_overflow_is_no_small_norm(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.full(shape, 3e38 if dtype == torch.float32 else 1e308, dtype=dtype, device=device)
    for iterations in (9, 20):
        sigma, _, _ = ops.masked_norm(weight, None, None, None, [2, shape[1]], *NO_CONV, iterations)
        assert not sigma.isfinite().any(), sigma


@pytest.mark.parametrize("scale", [1e-157, 1e-100, 1e100])
def test_few_rows_far_from_one(device: str, scale: float) -> None:
    weight = torch.randn(5, 20, generator=generator(0), dtype=torch.float64) * scale
    sigma, right, left = ops.masked_norm(weight.to(device), None, None, None, [1, 20], *NO_CONV, 4)
    true = torch.linalg.matrix_norm(weight / scale, 2) * scale
    torch.testing.assert_close(sigma.cpu(), true.view(1), rtol=1e-4, atol=0)
    assert right.isfinite().all() and left.isfinite().all()


def test_close_values_of_long_vectors_in_float64(device: str) -> None:
    """What is left of a vector by the last one alone has fewer digits than float64."""
    u, _ = torch.linalg.qr(torch.randn(3000, 2, generator=generator(0), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(200, 2, generator=generator(1), dtype=torch.float64))
    for gap in (1e-4, 1e-5, 1e-6):
        weight = u @ torch.diag(torch.tensor([1, 1 - gap], dtype=torch.float64)) @ v.T
        sigma, _, _ = ops.masked_norm(weight.to(device), None, None, None, [4, 200], *NO_CONV, 8)
        assert ((sigma - 1).abs() < 1e-12).all(), (gap, sigma - 1)


@pytest.mark.parametrize(
    ("shape", "input_shape", "stride", "padding"),
    [
        ((6, 4, 3, 3), [1, 4, 2, 8], 2, 0),
        ((6, 4, 3, 3), [1, 3, 8, 8], 1, 1),
        ((6, 4, 3, 3), [1, 4, 8, 8], 1, -1),
        ((6, 4), [1, 5], 1, 0),
    ],
)
def test_shapes_that_do_not_fit(
    device: str, shape: tuple[int, ...], input_shape: list[int], stride: int, padding: int
) -> None:
    conv = [[stride, stride], [padding, padding], [1, 1], 1]
    with pytest.raises(RuntimeError, match="input_shape|padding"):
        ops.masked_norm(torch.randn(shape, device=device), None, None, None, input_shape, *conv, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("iterations", [3, 20])
def test_streaming_convolution(device: str, dtype: torch.dtype, iterations: int) -> None:
    """Groups and dilation, and float64: what no resident kernel takes."""
    weight = torch.randn(6, 2, 3, 3, generator=generator(0)).to(dtype)
    conv = [[1, 2], [2, 1], [2, 1], 2]
    rows, columns = masks("random", 2, [6, 7, 4], [4, 7, 7])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    check(weight, rows, columns, [2, 4, 7, 7], conv, iterations, device, tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(5, 20), (20, 30), (6, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("streaming", ["", "1"])
@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_no_number_shows(
    device: str, value: float, shape: tuple[int, ...], streaming: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALLIP_STREAMING", streaming)
    weight = torch.randn(shape, generator=generator(0))
    weight.view(-1)[7] = value
    sizes = [2, shape[1]] if len(shape) == 2 else [2, 4, 5, 5]
    conv = [[1, 1], [1, 1], [1, 1], 1] if len(shape) == 4 else NO_CONV
    columns = torch.zeros(sizes, dtype=torch.bool, device=device)
    columns[1] = True
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        sigma, _, _ = ops.masked_norm(weight.to(device), None, columns, None, sizes, *conv, 4)
    assert sigma.isnan().all()


@pytest.mark.parametrize("narrow", [False, True])
def test_a_start_that_is_no_number_shows(device: str, narrow: bool) -> None:
    """In every vector after it: weights are finite."""
    start = torch.randn(1, 4, 5, 5, generator=generator(0)).to(device)
    start[0, 1, 2, 3] = float("inf")
    weight = torch.randn(6, 2, 3, 3, generator=generator(0)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        sigma, right, _ = ops.masked_norm(weight, None, None, start, [1, 4, 5, 5], [1, 1], [1, 1], [1, 1], 2, 4)
    assert sigma.isnan().all() and right.isnan().all()
