"""Probabilistic norms against singular values; the adversarial cases of every guarantee are in test_certificates.py."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import DEVICES, generator, true_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.norms import lanczos

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, int, int], dict[str, Any]]] = [
    ((5, 3, 3, 3), (3, 7, 6), {"padding": 1}),
    ((4, 2, 4, 4), (2, 9, 8), {"stride": 2, "padding": 1}),
    ((6, 2, 3, 2), (4, 6, 6), {"groups": 2, "dilation": (2, 1), "stride": (1, 2)}),
    ((3, 4, 1, 1), (4, 5, 5), {}),
    ((2, 2, 5, 5), (2, 3, 3), {"padding": 2}),
    ((4, 1, 2, 2), (4, 6, 7), {"groups": 4, "stride": 2}),
]


def masks(batch: int, shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    return torch.rand(batch, *shape, generator=generator(seed)) < density


def check(weight: Tensor, rows: Tensor | None, cols: Tensor | None, tightness: float = 5e-3, **conv: Any) -> None:
    bound = ll.masked_norm_bound(weight, rows, cols, tightness=tightness, **conv)
    size = conv.pop("input_size", None) or (tuple(cols.shape[1:]) if cols is not None else None)
    true = true_norms(weight, rows, cols, size if weight.dim() == 4 else None, **conv).to(bound.upper.device)
    assert bound.guarantee == "probabilistic" and bound.failure_probability == 1e-9
    assert bound.upper.dtype == bound.estimate.dtype == weight.dtype
    assert (bound.upper.double() >= true * (1 - 1e-14)).all()
    rounding = 2 * torch.finfo(weight.dtype).eps
    assert (bound.upper.double() <= true * (1 + tightness + rounding)).all(), "within the width asked for"
    assert (bound.estimate.double() <= true * (1 + rounding + 1e-12)).all()
    assert ((bound.upper == 0) == (true == 0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (30, 70), (200, 150)])
def test_dense(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(*shape, generator=generator(1), dtype=torch.float64).to(dtype).to(device)
    for density in (0.1, 0.6, 1.0):
        rows, cols = (masks(5, (n,), density, k).to(device) for k, n in enumerate(shape))
        check(weight, rows, cols)
    check(weight, None, None)
    check(weight, None, cols)
    check(weight, rows, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, size, conv", CONVOLUTIONS)
def test_convolution(shape: tuple[int, ...], size: tuple[int, int, int], conv: dict[str, Any], device: str) -> None:
    weight = torch.randn(*shape, generator=generator(2)).to(device)
    output = ll.masked_norm(weight, input_size=size, return_vectors=True, **conv)[2].shape[1:]
    for density in (0.15, 0.7, 1.0):
        rows, cols = masks(4, tuple(output), density, 3).to(device), masks(4, size, density, 4).to(device)
        check(weight, rows, cols, **conv)
    check(weight, None, None, input_size=size, **conv)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([0.05, 5e-4]))
def test_shapes_and_masks(m: int, n: int, density: float, seed: int, tightness: float) -> None:
    weight = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    check(weight, masks(3, (m,), density, seed), masks(3, (n,), density, seed + 1), tightness)


def test_empty_masks_and_batches() -> None:
    weight = torch.randn(4, 6)
    rows = torch.tensor([[False] * 4, [True] * 4, [True, False, False, False]])
    cols = torch.tensor([[True] * 6, [False] * 6, [False, True, False, False, False, False]])
    bound = ll.masked_norm_bound(weight, rows, cols)
    assert bound.upper[:2].tolist() == [0, 0] and bound.upper[2] >= weight[0, 1].abs()
    assert ll.masked_norm_bound(weight, rows[:0], cols[:0]).upper.shape == (0,)
    assert ll.masked_norm_bound(torch.zeros(3, 3)).upper.item() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scales(scale: float) -> None:
    weight = torch.randn(40, 30, generator=generator(6)) * scale
    check(weight, masks(4, (40,), 0.6, 1), masks(4, (30,), 0.6, 2))
    wide = torch.randn(40, 30, generator=generator(7), dtype=torch.float64) * scale**8
    check(wide, masks(4, (40,), 0.6, 1), masks(4, (30,), 0.6, 2))


def test_survivors_of_another_scale_than_the_weight() -> None:
    """What survives may be 60 decimal orders below the largest weight."""
    weight = torch.randn(20, 20, generator=generator(8))
    weight[:10] *= 1e30
    weight[10:] *= 1e-30
    rows = torch.zeros(1, 20, dtype=torch.bool)
    rows[:, 10:] = True
    check(weight, rows, torch.ones(1, 20, dtype=torch.bool))


def test_denormal_weights() -> None:
    """Sound even where a float64 weight cannot be scaled without loss."""
    tiny = torch.randn(6, 6, generator=generator(9), dtype=torch.float64) * 1e-310
    assert ll.masked_norm_bound(tiny).upper.item() >= torch.linalg.matrix_norm(tiny * 2.0**1000, 2).item() * 2.0**-1000
    mixed = torch.diag(torch.tensor([1.0, 5e-324], dtype=torch.float64)) * 1e300
    mixed[1, 1] = 5e-324
    rows = torch.tensor([[False, True]])
    assert ll.masked_norm_bound(mixed, rows).upper.item() >= 5e-324
    assert ll.masked_norm_bound(tiny.float()).upper.item() == 0


@pytest.mark.parametrize("guarantee", ["probabilistic", "deterministic"])
@pytest.mark.parametrize("seed", range(6))
def test_survivors_that_are_denormal_beside_a_large_weight(guarantee: str, seed: int) -> None:
    """Bounds that are denormal numbers are rounded up at their last digit, which is a long way."""
    g = generator(seed)
    weight = torch.zeros(4, 8, dtype=torch.float64)
    weight[0, 0] = 32.0
    weight[1:] = torch.randint(1, 2**20, (3, 8), generator=g).double() * 2.0**-1074 * 2.0 ** (seed * 4)
    rows = torch.tensor([[False, True, False, False], [False, True, True, True]])
    upper = ll.masked_norm_bound(weight, rows, guarantee=guarantee).upper.tolist()
    alone = [Fraction(v) for v in weight[1].tolist()]
    assert Fraction(upper[0]) ** 2 >= sum(v * v for v in alone)
    flat = torch.linalg.svdvals(weight[1:] * 2.0**1000)[0].item()
    assert Fraction(upper[1]) >= Fraction(flat) * Fraction(1, 2**1000) * (1 - Fraction(1, 10**14))


@pytest.mark.parametrize("least_miss", [0.2, 0.5])  # one start, and two
def test_failures_are_as_rare_as_promised(least_miss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a failure probability of 0.25 bounds fail where the starts nearly miss the top vector, and no more often."""
    monkeypatch.setattr(lanczos, "LEAST_MISS", least_miss)
    n, trials, probability = 400, 2000, 0.25
    weight = torch.diag(torch.linspace(0, 0.5, n, dtype=torch.float64))
    weight[7, 7] = 0.505
    everywhere, conv = torch.ones(trials, n, dtype=torch.bool), ([1, 1], [0, 0], [1, 1], 1)
    upper, _ = lanczos.probable_norms(weight, None, everywhere, [trials, n], *conv, probability, 0.01, seed=0)
    fails = int((upper < 0.505).sum())
    assert 0 < fails <= probability * trials + 4 * math.sqrt(trials * probability * (1 - probability)), fails


def test_random_vectors_are_fresh_and_can_be_repeated() -> None:
    weight = torch.randn(60, 60, generator=generator(10))
    torch.manual_seed(3)
    first = ll.masked_norm_bound(weight)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert first.upper != ll.masked_norm_bound(weight).upper, "another start, another bound, whatever torch's seed is"
    third, fourth = (ll.masked_norm_bound(weight, seed=seed) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert ll.masked_norm_bound(weight, seed=3).upper == third.upper != fourth.upper
    assert first.seed is None and first.failure_probability == 1e-9
    assert third.seed == 3 and third.failure_probability == 1, "a seed voids the promise, and the result says so"


def test_every_start_has_a_stream_of_its_own() -> None:
    drawn = lanczos._gaussian(400, 50, random.Random(0).getrandbits)
    assert drawn.shape == (400, 50) and drawn.dtype == torch.float64
    assert len({tuple(row) for row in drawn.tolist()}) == 400
    assert abs(drawn.mean()) < 5 / math.sqrt(drawn.numel()) and abs(drawn.var() - 1) < 5 * math.sqrt(2 / drawn.numel())
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlation.abs().max() < 6.5 / math.sqrt(50)
    keys: list[int] = []

    def randbits(bits: int) -> int:
        keys.append(bits)
        return 2**127 + len(keys)

    a, b = lanczos._gaussian(2, 50, randbits)
    assert keys == [128, 128] and not torch.equal(a, b)
    upper = lanczos._gaussian(1, 50, lambda bits: 2**127 + 1)
    assert torch.equal(upper[0], a)
    assert not torch.equal(lanczos._gaussian(1, 50, lambda bits: 1), upper), "the key's upper half counts too"


SEEDS = 255


def hidden_from(starts: Tensor) -> Tensor:
    """A float32 matrix (512, 512) whose top singular vector has no component on the rows of ``starts`` (510, 512)."""
    basis, _ = torch.linalg.qr(starts.double().T, mode="complete")
    values = torch.linspace(0, 0.85, 512, dtype=torch.float64)
    values[511] = 1.0
    return ((basis * values) @ basis.T).float()


def test_vectors_of_seeds_that_were_made_orthogonal() -> None:
    """Two starts for each of 255 seeds, torch's and this package's own, and a layer whose top vector they all miss."""
    everyone = torch.ones(1, 512, dtype=torch.bool)
    torch_s = [torch.randn(2, 512, generator=generator(seed), dtype=torch.float64) for seed in range(SEEDS)]
    own = [lanczos._gaussian(2, 512, random.Random(seed).getrandbits) for seed in range(SEEDS)]
    for starts in (torch_s, own):
        weight = hidden_from(torch.cat(starts))
        true = torch.linalg.matrix_norm(weight.double(), 2).item()
        assert abs(true - 1) < 1e-5
        fresh = seeded = 0
        for seed in range(SEEDS):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                fresh += ll.masked_norm_bound(weight, None, everyone).upper.item() < true
            if starts is own:
                void = ll.masked_norm_bound(weight, None, everyone, seed=seed)
                assert void.failure_probability == 1
                seeded += void.upper.item() < true
        assert fresh == 0
        assert seeded == (SEEDS if starts is own else 0), "vectors that are known can be hidden from"


def test_no_network_is_certified_wrongly_by_a_known_seed() -> None:
    """The norm is 1, and 0.85 is what the hidden vector leaves: between the two lie wrong certificates."""
    starts = [torch.randn(2, 512, generator=generator(seed), dtype=torch.float64) for seed in range(SEEDS)]
    weight = hidden_from(torch.cat(starts))
    top = torch.linalg.svd(weight.double())[2][0]
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 2))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.zero_()
        model[1].weight.copy_(torch.stack([top, -top]))
        model[1].bias.copy_(torch.tensor([0.9, -0.9]))
    x = torch.zeros(1, 512)
    with torch.no_grad():
        assert model((-0.99 * top).float().unsqueeze(0)).argmax() == 1, "class 0 is lost at a distance of 0.9"
    for seed in range(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert not ll.certify(model, x, 0.99).certified
    assert ll.certify(model, x, 0.85).certified


@pytest.mark.parametrize("probability", [0.5, 1e-3, 1e-9, 1e-20, 2.0**-96])
def test_failure_probabilities(probability: float) -> None:
    weight = torch.randn(80, 60, generator=generator(11), dtype=torch.float64)
    bound = ll.masked_norm_bound(weight, failure_probability=probability)
    true = torch.linalg.matrix_norm(weight, 2)
    assert bound.failure_probability == probability
    assert bound.upper.item() <= 1.005 * true and (probability > 1e-3 or bound.upper.item() >= true)


def test_samples_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 4, 3, 3, generator=generator(12))
    rows, cols = masks(7, (8, 6, 6), 0.5, 1), masks(7, (4, 6, 6), 0.5, 2)
    monkeypatch.setitem(lanczos.CHUNK, "cpu", 1)
    check(weight, rows, cols, padding=1)


def test_bad_arguments() -> None:
    weight = torch.randn(3, 3)
    for tightness in (0.0, -1.0, math.nan, math.inf, "tight"):
        with pytest.raises(ValueError, match="tightness: got"):
            ll.masked_norm_bound(weight, tightness=tightness)  # type: ignore[arg-type]
    for probability in (0.0, 1.0, -1.0, math.nan, 2.0**-97):
        with pytest.raises(ValueError, match="failure_probability: got"):
            ll.masked_norm_bound(weight, failure_probability=probability)
    layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"model.0: failure_probability: got .* for a norm, want at least 2\^-96"):
        ll.certify(layers, torch.rand(1, 3), 0.1, failure_probability=2.0**-96)
    assert ll.masked_norm_bound(weight, guarantee="deterministic", failure_probability=1e-200).failure_probability == 0
    with pytest.raises(TypeError, match="seed: got float, want an int or None"):
        ll.masked_norm_bound(weight, seed=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed: got 1 under guarantee 'deterministic', want None"):
        ll.certify(layers, torch.rand(1, 3), 0.1, guarantee="deterministic", seed=1)
    with pytest.raises(TypeError, match="failure_probability: got str"):
        ll.masked_norm_bound(weight, failure_probability="small")  # type: ignore[arg-type]
    for guarantee in ("probabilistic", "deterministic", "estimate"):
        with pytest.raises(ValueError, match="weight: got NaN or infinite"):
            ll.masked_norm_bound(torch.tensor([[1.0, math.nan]]), guarantee=guarantee)
    with pytest.raises(ValueError, match="guarantee: got 'certain'"):
        ll.masked_norm_bound(weight, guarantee="certain")
