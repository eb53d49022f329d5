"""The outward-rounded pass, piece by piece, against rationals."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import ACTIVATIONS, DEVICES, ZOO, generator, small_network, zoo_input
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize
from locallip_cuda.norms.linear import Dense
from locallip_cuda.ops import reference
from locallip_cuda.propagation import proof as proved
from locallip_cuda.propagation.graph import Layer, Term, UnsupportedModuleError
from locallip_cuda.propagation.rules import IDENTITY, Activation

PROOFS = ["probabilistic", "deterministic"]
every_proof = pytest.mark.parametrize("guarantee", PROOFS)


def layer(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """A dense one."""
    dense = Dense(weight)
    size = None if bias is None else bias.abs()
    return Layer("", [Term(0, dense, "", dense)], bias, size, 0, 0.0, IDENTITY, "", dense.output_sizes)


numbers = st.floats(-1e18, 1e18, allow_subnormal=True) | st.sampled_from([0.0, 1.0, -1.0, 1e16, -1e16, 0.1, 5e-324])


def exactly(t: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in t.flatten().tolist()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 1e6)), min_size=1, max_size=6), numbers)
def test_affine_holds_every_corner(terms: list[tuple[float, float, float]], bias: float) -> None:
    """Cancellation and underflow included: weights, centres and half-widths of any size."""
    weight = torch.tensor([[w for w, _, _ in terms]], dtype=torch.float64)
    centre = torch.tensor([[c for _, c, _ in terms]], dtype=torch.float64)
    half = torch.tensor([[h for _, _, h in terms]], dtype=torch.float64)
    own = layer(weight, torch.tensor([bias], dtype=torch.float64))
    out, width = proved.affine(own.terms, own, [(centre, half)])
    w, c, h = exactly(weight), exactly(centre), exactly(half)
    middle = sum((a * b for a, b in zip(w, c, strict=True)), Fraction(bias))
    spread = sum(abs(a) * b for a, b in zip(w, h, strict=True))
    assert abs(middle - Fraction(out.item())) + spread <= Fraction(width.item())


def test_the_rounding_of_the_half_width_itself_is_covered() -> None:
    """Sums of many positive terms, which float64 gets wrong by several of its last digits, in both directions."""
    g = generator(4)
    weight = torch.rand(40, 400, generator=g, dtype=torch.float64)
    half = torch.rand(1, 400, generator=g, dtype=torch.float64)
    own = layer(weight)
    _, width = proved.affine(own.terms, own, [(torch.zeros_like(half), half)])
    for row, found in zip(weight, width[0].tolist(), strict=True):
        assert sum(a * b for a, b in zip(exactly(row), exactly(half), strict=True)) <= Fraction(found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=8), st.floats(0, 1e6))
def test_row_norms_are_not_too_small(terms: list[tuple[float, bool]], scale: float) -> None:
    weight = torch.tensor([[w for w, _ in terms]], dtype=torch.float64)
    columns = torch.tensor([[float(c) for _, c in terms]], dtype=torch.float64)
    norm = Fraction(proved.row_norms(layer(weight).terms[0], columns).item())
    assert norm**2 >= sum(w**2 for w, (_, c) in zip(exactly(weight), terms, strict=True) if c)


MODULES = {
    "relu": (nn.ReLU(), None, None),
    "clipped_relu": (ClippedReLU(4, torch.tensor([0.5, 0.0, 1e-30, 3.0])), "threshold", None),
    "maxmin": (MaxMin(), None, None),
    "clipped_maxmin": (ClippedMaxMin(2, torch.tensor([0.5, -0.2]), torch.tensor([-0.5, -0.3])), "upper", "lower"),
    "": (nn.LeakyReLU(0.1), None, None),
}


@pytest.mark.parametrize("kind", MODULES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_activations_hold_their_values(kind: str, data: st.DataObject) -> None:
    """Values between the end points are mapped between the images, and units said not to vary do not."""
    module, first, second = MODULES[kind]
    picks = [0.0, 0.5, -0.5, -0.2, -0.3, 3.0, 1e-30, 1.0, -2.0, 5e-324, 0.7]
    ends = [sorted(data.draw(st.tuples(st.sampled_from(picks), st.sampled_from(picks)))) for _ in range(4)]
    lower, upper = (torch.tensor([[e[k] for e in ends]], dtype=torch.float64) for k in (0, 1))
    thresholds = [None if n is None else getattr(module, n).detach().double() for n in (first, second)]
    function = copy.deepcopy(module).double().requires_grad_(False)
    activation = Activation(function, 1.0, None, kind, *thresholds, exact=bool(kind))
    rounded = proved.Rounded(activation)
    low, high = rounded.interval(lower, upper)
    rows, cols, _ = rounded.varying(lower, upper)
    shares = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=4)), dtype=torch.float64)
    points = torch.minimum(torch.maximum(lower + (upper - lower) * shares, lower), upper)
    images = module.double()(points).detach()
    assert (images >= low).all() and (images <= high).all()
    assert (images.amax(0) == images.amin(0))[~cols[0]].all(), "a column that goes is constant"
    for k in (~rows[0]).nonzero()[:, 0].tolist():
        moved = points.clone()
        moved[:, k] = lower[0, k]
        assert torch.equal(module(moved), images), "a row that goes changes nothing"


def test_masks_at_the_boundary() -> None:
    """ub == 0 and lb == threshold, exactly, are constant; the next number is not."""
    above, below = math.nextafter(0.0, 1.0), math.nextafter(0.5, 0.0)
    lower = torch.tensor([[-1.0, -1.0, 0.5, below]], dtype=torch.float64)
    upper = torch.tensor([[0.0, above, 0.6, 0.6]], dtype=torch.float64)
    threshold = torch.full((1, 4), 0.5, dtype=torch.float64)
    activation = Activation(nn.Identity(), kind="clipped_relu", first=threshold, exact=True)
    rows, cols, _ = proved.Rounded(activation).varying(lower, upper)
    assert rows.tolist() == cols.tolist() == [[False, True, False, True]]


def test_a_threshold_below_zero_is_a_constant() -> None:
    """Left behind by an optimiser step that was not projected: the module's output is the threshold, everywhere."""
    torch.manual_seed(0)
    clipped = ClippedReLU(3, 1.0)
    with torch.no_grad():
        clipped.threshold[0, 1] = -0.25
    model = nn.Sequential(nn.Linear(2, 3), clipped, nn.Linear(3, 2)).double()
    x = torch.rand(4, 2, dtype=torch.float64)
    b = ll.local_bounds(model, x, 0.5, guarantee="deterministic")
    assert (b.lower[:, 1] <= -0.25).all() and (b.upper[:, 1] >= -0.25).all()
    torch.testing.assert_close(b.features, model[:-1](x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-300])
@pytest.mark.parametrize("order", list(itertools.permutations([1e16, 1.0, -1e16])))
def test_clean_values_that_cancel_stay_inside(order: tuple[float, ...], eps: float) -> None:
    """The pre-activation is 1, and float64 may say 0, which a ReLU's mask would take for a constant."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([order]))  # type: ignore[union-attr, operator, arg-type]
    b = ll.local_bounds(model, torch.ones(1, 3, dtype=torch.float64), eps, guarantee="deterministic")
    assert b.lower.item() <= 1 <= b.upper.item()
    assert abs(b.features.item() - 1) <= b.feature_error.item()


@pytest.mark.parametrize("device", DEVICES)
def test_gains_are_above_the_maximum_and_close(device: str) -> None:
    g = generator(0)
    batch, width, classes = 40, 12, 5
    features = torch.randn(batch, width, generator=g, dtype=torch.float64)
    lower = features - 10 ** (-3 * torch.rand(batch, width, generator=g, dtype=torch.float64))
    upper = features + 10 ** (-3 * torch.rand(batch, width, generator=g, dtype=torch.float64))
    lower[::5, ::2] = features[::5, ::2]
    radius = 10 ** (2 - 5 * torch.rand(batch, generator=g, dtype=torch.float64))
    radius[:3] = torch.tensor([0.0, 1e-200, 1e200], dtype=torch.float64)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    weight[3] = weight[2]
    labels = torch.randint(classes, (batch,), generator=g)
    arguments = [t.to(device) for t in (lower, upper, radius, weight, labels)]
    gain = proved.gains(features.to(device), torch.zeros_like(features).to(device), *arguments).cpu()
    expected = reference.margin(features, lower, upper, radius, weight, labels)
    expected[1] = 0.0  # squares of 1e-200 underflow in the twin
    assert (gain >= expected * (1 - 1e-12) - 1e-150).all() and (gain > 0).all()
    assert (gain <= expected * (1 + 1e-9) + 1e-100).all()


def test_the_rounding_of_gains_is_covered() -> None:
    """Where the box is far the gain is radius times ||w_j - w_y||, which rationals know: sums of many terms."""
    g = generator(6)
    width, classes = 300, 40
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    weight[20:] = weight[:20] * (1 + 1e-9 * torch.rand(20, 1, generator=g, dtype=torch.float64))
    features = torch.randn(1, width, generator=g, dtype=torch.float64)
    radius = torch.tensor([0.7], dtype=torch.float64)
    for label in (0, 3):
        arguments = features - 100, features + 100, radius, weight, torch.tensor([label])
        gain = proved.gains(features, torch.zeros_like(features), *arguments)[0]
        for j in range(classes):
            rows = zip(exactly(weight[j]), exactly(weight[label]), strict=True)
            squared = Fraction(radius.item()) ** 2 * sum((a - b) ** 2 for a, b in rows)
            assert Fraction(gain[j].item()) ** 2 >= squared
            assert Fraction(gain[j].item()) ** 2 <= squared * (1 + Fraction(1, 10**10)) + Fraction(1, 10**200)


@pytest.mark.parametrize("radius", [0.5, 5.0, 500.0])
def test_gains_allow_for_the_error_of_the_features(radius: float) -> None:
    """They hold for every feature vector within the error: the room up to the box may be that much wider."""
    g = generator(7)
    features = torch.randn(6, 8, generator=g, dtype=torch.float64)
    weight, labels = torch.randn(4, 8, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    error = 0.2 * torch.rand(6, 8, generator=g, dtype=torch.float64)
    box = features - 0.3, features + 0.4
    radii = torch.full((6,), radius, dtype=torch.float64)
    gain = proved.gains(features, error, *box, radii, weight, labels)
    for _ in range(20):
        moved = features + error * (2 * torch.rand(6, 8, generator=g, dtype=torch.float64) - 1).sign()
        assert (gain >= reference.margin(moved, *box, radii, weight, labels) * (1 - 1e-12) - 1e-150).all()


def test_gains_against_points_in_rationals() -> None:
    """Points of ball and box, evaluated exactly; weights and features on which float64 cancels."""
    g = generator(1)
    width = 4
    features = torch.randn(1, width, generator=g, dtype=torch.float64) * 1e8
    weight = torch.randn(2, width, generator=g, dtype=torch.float64)
    weight[1] = weight[0] * (1 + 2.0**-50)
    error = torch.full_like(features, 1e-9)
    lower, upper = features - 3.0, features + 2.0
    radius = torch.tensor([2.5], dtype=torch.float64)
    for label in (0, 1):
        gain = proved.gains(features, error, lower, upper, radius, weight, torch.tensor([label]))
        direction = [a - b for a, b in zip(exactly(weight[1 - label]), exactly(weight[label]), strict=True)]
        norm = math.sqrt(sum(float(d) ** 2 for d in direction))
        for scale in (2.5, 1.0):
            delta = [min(max(Fraction(scale) * d / Fraction(norm), Fraction(-3)), Fraction(2)) for d in direction]
            if sum(d * d for d in delta) <= Fraction(2.5) ** 2:
                assert sum(a * b for a, b in zip(direction, delta, strict=True)) <= Fraction(gain[0, 1 - label].item())
        far = torch.full_like(radius, 100.0)
        box = sum(abs(d) * (2 if d > 0 else 3) for d in direction)
        assert (
            Fraction(
                proved.gains(features, error, lower, upper, far, weight, torch.tensor([label]))[0, 1 - label].item()
            )
            >= box
        )


@every_proof
@pytest.mark.parametrize("name", ZOO)
def test_proofs_are_close_to_the_estimate(name: str, guarantee: str) -> None:
    model, x = ZOO[name][0], zoo_input(name, 4)
    if any(isinstance(module, nn.Softplus) for module in model):
        with pytest.raises(UnsupportedModuleError, match="model.1: the activation has no proof, because torch's jumps"):
            ll.local_bounds(model, x, 0.1, guarantee=guarantee)
        return
    estimate = ll.local_bounds(model, x, 0.1, iterations=100)
    b = ll.local_bounds(model, x, 0.1, guarantee=guarantee)
    slack = 1e-5 if guarantee == "deterministic" else 0.05
    assert (b.margin() <= estimate.margin() + 1e-9).all()
    scale = (estimate.logits.amax(1) - estimate.margin()).abs() + 1
    assert (b.margin() >= estimate.margin() - slack * scale).all()
    assert (b.lipschitz >= estimate.lipschitz * (1 - 1e-9)).all()
    assert (b.lipschitz <= estimate.lipschitz * (1 + slack) + 1e-12).all()
    assert (b.lower <= estimate.lower + 1e-12).all() and (b.upper >= estimate.upper - 1e-12).all()
    assert 1 - 1e-9 <= b.global_lipschitz / estimate.global_lipschitz <= 1 + slack
    for ours, theirs in zip(b.row_masks + b.column_masks, estimate.row_masks + estimate.column_masks, strict=True):
        assert ours.dtype == torch.bool and ours.shape == theirs.shape and (ours | ~theirs).all()


@every_proof
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fields(activation: str, guarantee: str) -> None:
    model = small_network(activation, dtype=torch.float32)
    x = torch.rand(3, 2, 6, 6, generator=generator(2)).requires_grad_(True)
    b = ll.local_bounds(model, x, torch.tensor([0.0, 0.1, 0.2]), guarantee=guarantee)
    assert b.guarantee == guarantee and b.layer_norms.shape == (3, 3)
    for name in ("logits", "radius", "layer_norms", "lipschitz", "features", "lower", "upper", "eps", "sparsity_loss"):
        value = getattr(b, name)
        assert value.dtype == torch.float64 and not value.requires_grad, name
    y = torch.tensor([1, 0, 4])
    own = b.logits.gather(1, y[:, None])
    worst = b.worst_logits(y)
    assert torch.equal(worst.gather(1, y[:, None]), own)
    others = worst.scatter(1, y[:, None], -math.inf).amax(1)
    assert (b.margin(y) >= (own[:, 0] - others) * (1 + 1e-12) - 1e-12).all()
    torch.testing.assert_close(b.margin(y), own[:, 0] - others)
    assert torch.equal(b.margin(), b.margin(b.logits.argmax(1)))
    with pytest.raises(ValueError, match="y: got labels"):
        b.margin(torch.tensor([0, 1, 5]))
    with pytest.raises(TypeError, match="y: got"):
        b.worst_logits([0, 1, 2])


@every_proof
def test_the_paper_radius_is_not_tighter(guarantee: str) -> None:
    model, x = small_network("clipped-relu", seed=3), torch.rand(4, 2, 6, 6, dtype=torch.float64)
    local = ll.local_bounds(model, x, 0.2, guarantee=guarantee)
    paper = ll.local_bounds(model, x, 0.2, guarantee=guarantee, radius="global")
    slack = 1e-5 if guarantee == "deterministic" else 2e-2
    assert (paper.radius >= local.radius * (1 - slack)).all()


def test_layers_share_the_failure_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    honest = proved.proved_norm

    def spy(*arguments: object) -> Tensor:
        asked.append(arguments[5])  # type: ignore[arg-type]
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(proved, "proved_norm", spy)
    model, shape = ZOO["normalised, pooled, grouped"]
    x = torch.rand(2, *shape, dtype=torch.float64)
    for radius in ("local", "global"):
        asked.clear()
        ll.local_bounds(model, x, 0.1, guarantee="probabilistic", failure_probability=1e-6, radius=radius)
        assert sum(asked) == pytest.approx(1e-6, rel=1e-9)


def test_errors() -> None:
    model = small_network("relu", dtype=torch.float32)
    x = torch.rand(2, 2, 6, 6)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="x: got NaN or infinite values"):
            ll.local_bounds(model, broken, 0.1, guarantee="probabilistic")
    with pytest.raises(ValueError, match=r"x: got shape .*, torch.float64, on cpu, which model does not take; model.0"):
        ll.local_bounds(model, x.double(), 0.1, guarantee="probabilistic")
    worse = copy.deepcopy(model)
    with torch.no_grad():
        worse[2].weight[0, 0, 0, 0] = math.nan  # type: ignore[index, union-attr, operator]
    for guarantee in PROOFS:
        with pytest.raises(ValueError, match="model.2: weight: got NaN or infinite"):
            ll.local_bounds(worse, x, 0.1, guarantee=guarantee)
    for layers in (
        [nn.Linear(3, 5), MaxMin(), nn.Linear(5, 2)],
        [nn.Linear(3, 5), ClippedReLU(4), nn.Linear(5, 2)],
        [Normalize([0.0] * 2, [1.0] * 2), nn.Linear(3, 2)],
    ):
        with pytest.raises((ValueError, RuntimeError)):
            ll.local_bounds(nn.Sequential(*layers), torch.rand(2, 3), 0.1, guarantee="probabilistic")


def test_autocast_and_gradients_do_not_reach_in() -> None:
    model = small_network("clipped-relu", dtype=torch.float32)
    x = torch.rand(2, 2, 6, 6)
    alone = ll.local_bounds(model, x, 0.1, guarantee="deterministic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ll.local_bounds(model, x, 0.1, guarantee="deterministic")
        margin = inside.margin()
    assert torch.equal(alone.margin(), margin) and torch.equal(alone.layer_norms, inside.layer_norms)
