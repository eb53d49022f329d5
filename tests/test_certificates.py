"""Certificates against adversaries: the proved ones hold on everything here, and an estimate is shown to fail.

Norms are judged by proved lower bounds, networks by their linear pieces in rationals: both in exact.py.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from exact import (
    PIECEWISE_LINEAR,
    Exact,
    affine,
    evaluate,
    float_of,
    floats,
    inside_ball,
    margin_of,
    operator_matrix,
    operator_norm,
    plane_network,
    rational,
    rationals,
    survivors,
)
from flint import arb
from helpers import DEVICES, ZOO, generator, zoo_input
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SMALL, build, with_rational_roots
from test_networks import briefly_trained
from test_networks import trained as trained_network
from test_random_graphs import ACTIVATIONS, SIDE, RandomGraph, graphs
from test_soundness import features_of
from torch import Tensor, nn
from verify_norms import (
    DENSE,
    HIDDEN,
    LIMITS,
    MaskedOperators,
    Operators,
    Tally,
    chain_operators,
    convolution_operators,
    dense_operators,
    hidden_from_the_start,
    verify,
    with_values,
)

import locallip_cuda as ll
from bench.paper_method import PowerState, paper_bounds
from locallip_cuda import attack
from locallip_cuda.nn import Normalize
from locallip_cuda.norms import masked_norm as norms
from locallip_cuda.ops.reference import pseudo_random

PROOFS = ["probabilistic", "deterministic"]
# ways to bound: of which the last one composes norms
HOW: list[dict[str, Any]] = [{"radius": "local"}, {"radius": "global"}, {"window": math.inf}]
every_proof = pytest.mark.parametrize("guarantee", PROOFS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# --- norms ------------------------------------------------------------------------------------------------------------


def lowest(problem: MaskedOperators) -> list[np.longdouble]:
    """A proved lower bound of every sample's norm."""
    return [norm.lower for norm in problem.norms()]


def assert_bounds(problem: MaskedOperators, guarantee: str, device: str = "cpu", worst: float | None = None) -> None:
    bound = problem.bound(guarantee, device)
    assert bound.dtype == problem.weight.dtype
    _, limit = LIMITS[guarantee]
    for upper, norm in zip(bound.double().tolist(), lowest(problem), strict=True):
        assert np.longdouble(upper) >= norm, f"{problem.kind}: {upper!r} is below the norm {norm!r}"
        if norm == 0:
            assert upper == 0
        else:
            assert upper / norm <= 1 + (limit if worst is None else worst), f"{problem.kind}: loose"


def bits(seed: int, batch: int, *shape: int, density: float = 0.5) -> Tensor:
    return torch.rand(batch, *shape, generator=generator(seed)) < density


@every_proof
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", DENSE)
def test_bounds_of_every_kind_of_matrix(kind: str, guarantee: str, device: str) -> None:
    m, n = 70, 90
    weight = DENSE[kind](generator(0), m, n)
    weight = weight / weight.abs().max()
    assert_bounds(MaskedOperators(kind, weight, None, None), guarantee, device)
    assert_bounds(MaskedOperators(kind, weight.float(), None, bits(1, 2, weight.shape[1])), guarantee, device)
    assert_bounds(MaskedOperators(kind, weight, bits(2, 2, weight.shape[0]), None), guarantee, device)


@pytest.mark.parametrize("device", DEVICES)
def test_bounds_of_random_operators(device: str) -> None:
    """A small run of `python -m tests.verify_norms`; the estimate is below the norm, if by its rounding only."""
    problems: list[Operators] = [dense_operators(generator(k), largest=96) for k in range(70)]
    problems += [convolution_operators(generator(k), channels=6, pixels=7) for k in range(50)]
    problems += [chain_operators(generator(k), largest=40, channels=5, pixels=6) for k in range(40)]
    tallies, disagreement = verify(enumerate(problems), ["estimate", *PROOFS], device)
    assert disagreement < 1e-13
    for guarantee in PROOFS:
        tally = tallies[guarantee].summary()
        median, worst = LIMITS[guarantee]
        assert tally["violations"] == [] and tally["empty_operators_with_a_bound_above_0"] == 0
        assert tally["compared"] > 150 and tally["median_excess"] <= median and tally["worst_excess"] <= worst
    assert len(tallies["estimate"].violations) > 10


def test_the_tally_finds_a_bound_that_is_too_small() -> None:
    problem = MaskedOperators("", normal(0, 5, 6).float(), None, bits(0, 3, 6))
    expected = [operator_norm(survivors(operator_matrix(problem.weight), None, mask)) for mask in problem.col_mask]
    tally = Tally()
    values = torch.tensor([float(norm.value) for norm in expected], dtype=torch.float64)
    tally.add({}, values * (1 + 1e-13), expected)
    assert not tally.violations and max(tally.excess) < 1e-12
    tally.add({}, values * (1 - 1e-13), expected)
    assert len(tally.violations) == 3
    tally.add({}, torch.full_like(values, math.nan), expected)
    assert len(tally.violations) == 6


SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
LARGEST = {torch.float32: 2.0**120, torch.float64: 2.0**1016}


@every_proof
@pytest.mark.parametrize("dtype", SMALLEST)
def test_scales_to_the_ends_of_the_format(dtype: torch.dtype, guarantee: str) -> None:
    """Whole numbers of the smallest denormal number, and a matrix that is all but infinite."""
    whole = (10 * normal(0, 12, 15)).round()
    for scale in (SMALLEST[dtype], 1e-30, 1e30, LARGEST[dtype]):
        weight = (whole * scale).to(dtype)
        assert torch.equal(weight.double() / scale, whole) or scale in (1e-30, 1e30)
        # a bound that is rounded up to a denormal number, or to the smallest normal one, may be loose
        worst = math.inf if scale == SMALLEST[dtype] else None
        assert_bounds(MaskedOperators(str(scale), weight, None, None), guarantee, worst=worst)
        assert_bounds(MaskedOperators(str(scale), weight, bits(1, 3, 12), bits(2, 3, 15)), guarantee, worst=worst)


@every_proof
def test_masks_that_leave_denormal_numbers_alone(guarantee: str) -> None:
    """Scaling by the largest weight, which is hidden, does not lift them: the bound may be loose but not too small."""
    for dtype, smallest in SMALLEST.items():
        weight = ((10 * normal(0, 12, 15)).round() * smallest).to(dtype)
        weight[0], weight[:, 0] = 1.0, 1.0
        masks = [torch.ones(2, size, dtype=torch.bool) for size in weight.shape]
        masks[0][:, 0] = masks[1][:, 0] = False
        masks[0][1, 5:] = False
        problem = MaskedOperators("denormal", weight, *masks)
        bound = problem.bound(guarantee).double()
        for upper, norm in zip(bound.tolist(), lowest(problem), strict=True):
            assert np.longdouble(upper) >= norm > 0
        assert (bound < 1e-30).all(), "the hidden weights are counted"


@every_proof
def test_norms_that_are_denormal_numbers(guarantee: str) -> None:
    """Where a relative error is not one: the last rounding of the bound can be of a thousandth of it."""
    for seed in range(30):
        weight = torch.zeros(2, 6, dtype=torch.float64)
        weight[0] = 32.0  # what masks hide still decides how the rest is scaled
        weight[1] = (2.0 ** (8 + seed % 20) * normal(seed, 1)).round() * 2.0**-1060
        columns = torch.arange(6) <= 1 + seed % 5
        problem = MaskedOperators("denormal", weight, torch.tensor([[False, True]]), columns[None])
        [norm], upper = lowest(problem), problem.bound(guarantee).item()
        assert np.longdouble(upper) >= norm, seed


@cache
def misleading_problems() -> list[tuple[MaskedOperators, list[np.longdouble]]]:
    """Operators with proved lower bounds of their norms; the largest are factorised in several steps."""
    problems = [dense_operators(generator(k), largest=60) for k in range(15)]
    problems += [convolution_operators(generator(k), channels=4, pixels=6) for k in range(15)]
    for groups in (1, 2):
        weight = normal(groups, 12, 12 // groups, 3, 3)
        weight[:6] *= 0.9  # the second group has the norm
        masks = bits(1, 1, 12, 8, 9, density=0.8), bits(2, 1, 12, 8, 9, density=0.8)
        problems.append(MaskedOperators("windows", weight, *masks, (12, 8, 9), {"padding": 1, "groups": groups}))
    return [(problem, lowest(problem)) for problem in problems]


@pytest.mark.parametrize("factor", [0.5, 1 - 1e-5, 2.0, math.nan])
def test_a_wrong_estimate_is_not_believed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the deterministic proof starts from is no part of it."""
    found = norms.probable_norms

    def misled(*arguments: Any) -> tuple[Tensor, Tensor]:
        upper, estimate = found(*arguments)
        return upper, factor * estimate

    monkeypatch.setattr(norms, "probable_norms", misled)
    monkeypatch.setattr(norms, "_global_norms", {})
    for problem, expected in misleading_problems():
        upper = problem.bound("deterministic").double().tolist()
        assert all(np.longdouble(u) >= norm for u, norm in zip(upper, expected, strict=True)), problem.kind


def power_iteration(matrix: Tensor, start: Tensor, steps: int) -> float:
    """The value that published certifiers take for the norm."""
    x = start.double()
    for _ in range(steps):
        x = matrix.T @ (matrix @ x)
        x = x / x.norm()
    return float((matrix @ x).norm() / x.norm())


def without_ones(n: int) -> Tensor:
    """The top right singular vector is (1, -1, 0, ...) / sqrt(2): a start of ones is orthogonal to it and stays so."""
    weight = torch.eye(n, dtype=torch.float64)
    weight[:2] = 0
    weight[0, :2] = torch.tensor([3.0, -3.0])
    return weight


def one_part_in(size: int, first: int) -> Tensor:
    """A start that is all but orthogonal to the first coordinate."""
    return torch.cat([torch.tensor([10.0**-first]), torch.ones(size - 1)]).double()


# the matrix, the start and the share of the norm that 2000 steps do not see
STALLED: dict[str, Callable[[], tuple[Tensor, Tensor, float]]] = {
    "start orthogonal to the top vector": lambda: (without_ones(40), torch.ones(40), 0.7),
    "start with a part in 10^12 of it": lambda: (
        torch.diag(torch.linspace(1.002, 1, 40).double()),
        one_part_in(40, 12),
        4e-5,
    ),
    "start in the weaker of two blocks": lambda: (
        torch.block_diag(normal(0, 20, 20), 3 * normal(1, 20, 20)),
        torch.cat([normal(2, 20), torch.zeros(20).double()]),
        0.5,
    ),
    "random start, a bump on a plateau": lambda: (
        with_values(generator(0), 300, 300, torch.cat([torch.tensor([1 + 2e-4]), torch.ones(299)]).double()),
        normal(1, 300),
        1e-4,
    ),
    "random start, values close together": lambda: (
        with_values(generator(0), 300, 300, torch.linspace(1, 1 - 1e-3, 300)),
        normal(1, 300),
        1e-4,
    ),
}


@every_proof
@pytest.mark.parametrize("name", STALLED)
def test_where_power_iteration_stalls(name: str, guarantee: str) -> None:
    weight, start, share = STALLED[name]()
    problem = MaskedOperators(name, weight, None, None)
    [norm] = lowest(problem)
    assert power_iteration(weight, start, 2000) < float(norm) * (1 - share)
    assert_bounds(problem, guarantee)


@every_proof
def test_where_the_package_s_own_estimate_stalls(guarantee: str) -> None:
    problem = MaskedOperators(HIDDEN, hidden_from_the_start(generator(0), 256, 1.001), None, None)
    [norm] = lowest(problem)
    assert problem.bound("estimate").item() < float(norm) * (1 - 4e-3)
    assert_bounds(problem, guarantee)


# --- certificates that are broken -------------------------------------------------------------------------------------

Victim = tuple[nn.Sequential, Tensor, float]


def two_classes(weight: Tensor, bias: Tensor, direction: Tensor, margin: float) -> nn.Sequential:
    """relu(W x + bias), and logits whose difference at x = 0 is `margin` and falls with `direction` . features."""
    model = nn.Sequential(nn.Linear(*weight.T.shape), nn.ReLU(), nn.Linear(len(weight), 2)).to(weight.dtype)
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(weight)
        first.bias.copy_(bias)
        last.weight.copy_(torch.stack([torch.zeros_like(direction), direction]))
        last.bias.copy_(torch.tensor([margin + float(bias.clamp_min(0) @ direction.to(bias)), 0.0]))
    return model.requires_grad_(False)


def around(weight: Tensor, margin: float) -> Victim:
    """Every unit is on throughout the ball, and its top singular vector is what the logits look at."""
    left, _, _ = torch.linalg.svd(weight.double())
    model = two_classes(weight, torch.full((len(weight),), 10.0).to(weight), left[:, 0].to(weight), margin)
    return model, torch.zeros(1, weight.shape[1], dtype=weight.dtype), 1.0


def blind(dtype: torch.dtype) -> Victim:
    """The estimate sees the norm 1 where it is 3 sqrt(2), after any number of iterations.

    Two entries of its start are equal but for the sign. The first row is orthogonal to every vector of which that is
    true, no other row touches them, and so the iteration never leaves these vectors.
    """
    size, units = 8192, 40
    start = pseudo_random([1, size], 0, torch.zeros(1))[0]
    _, place, count = start.abs().unique(return_inverse=True, return_counts=True)
    i, j = (place == (count > 1).nonzero()[0, 0]).nonzero()[:, 0].tolist()
    weight = torch.zeros(units, size, dtype=dtype)
    weight[0, i], weight[0, j] = 3.0, -3.0 * float(start[i] / start[j])
    others = [k for k in range(units + 2) if k not in (i, j)][: units - 1]
    weight[range(1, units), others] = torch.linspace(1, 0.02, units - 1, dtype=dtype)
    bias = torch.zeros(units, dtype=dtype)
    bias[0] = 10
    direction = torch.zeros(units, dtype=dtype)
    direction[0] = 1
    return two_classes(weight, bias, direction, 2.0), torch.zeros(1, size, dtype=dtype), 1.0


def plateau(size: int, top: float) -> Tensor:
    return with_values(generator(0), size, size, torch.cat([torch.tensor([top]), torch.ones(size - 1)]).double())


def by_estimate(model: nn.Sequential, x: Tensor, eps: float) -> bool:
    return bool(ll.certify(model, x, eps, guarantee="estimate").certified)


def by_training_bounds(model: nn.Sequential, x: Tensor, eps: float) -> bool:
    return bool(ll.local_bounds(model, x, eps).margin() > 0)


def by_published_method(model: nn.Sequential, x: Tensor, eps: float, start: Tensor | None = None) -> bool:
    """The published evaluation: 2000 power iterations a layer, from random starts or a given one."""
    state = None if start is None else PowerState([start[None]], [start[None]])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        bounds = paper_bounds(model, x, eps, 2000, state)
        return bool(bounds.worst_logits(bounds.logits.argmax(1)).argmax(1) == bounds.logits.argmax(1))


Certifier = Callable[[nn.Sequential, Tensor, float], bool]
BROKEN: dict[str, tuple[Callable[[], Victim], Certifier]] = {
    "published method, start of ones": (
        lambda: around(without_ones(20), 2.0),
        lambda *victim: by_published_method(*victim, torch.ones(20, dtype=torch.float64)),
    ),
    "published method, random starts": (lambda: around(plateau(200, 1 + 4e-4), 1 + 2e-4), by_published_method),
    "bounds of training": (lambda: around(hidden_from_the_start(generator(0), 64, 1.1), 1.02), by_training_bounds),
    "estimate, float32, blind": (lambda: blind(torch.float32), by_estimate),
    "estimate, float64, blind": (lambda: blind(torch.float64), by_estimate),
    "estimate, float64, hidden": (lambda: around(hidden_from_the_start(generator(0), 512, 1.01), 1.005), by_estimate),
}


def falls(model: nn.Sequential, point: Tensor, x: Tensor, eps: float, label: int) -> bool:
    """Whether a point (1, *) is in the ball and not of class `label`: a proof, in rationals."""
    logits = evaluate(model, point[0])
    return inside_ball(point, x, eps) and bool(margin_of(logits, label) <= 0)


@pytest.mark.parametrize("name", BROKEN)
def test_unsound_certificates_are_broken_and_proofs_hold(name: str) -> None:
    victim, unsound = BROKEN[name]
    model, x, eps = victim()
    prediction = model(x).argmax(1)
    assert unsound(model, x, eps), "the unsound certifier is not deceived"
    point = attack.pgd(model, x, prediction, eps, steps=200, generator=generator(0))
    assert falls(model, point, x, eps, int(prediction)), "the attack does not find the point"
    for guarantee in PROOFS:
        for window in (1, math.inf):
            certificate = ll.certify(model, x, eps, guarantee=guarantee, window=window)
            assert not certificate.certified, (guarantee, window)
        smaller = ll.certify(model, x, 0.4 * eps, guarantee=guarantee)
        assert smaller.certified, "the proof is refused whatever the ball"


# --- small networks, exactly ------------------------------------------------------------------------------------------


def exactly(model: nn.Module, x: Tensor, eps: float, directions: Tensor | None = None) -> Exact:
    """Of what the bounds call features: the package names them, and computes none of what it is judged by."""
    return Exact(model, x, eps, directions, features=partial(features_of, copy.deepcopy(model).double()))


def wrong_statements(exact: Exact, bounds: Any, b: int = 0) -> list[str]:
    """What sample b of the bounds says that is not so. Comparisons are of rationals, without a tolerance, but for the
    last one: that the last weights make the logits of the features, so that none of these is left out."""
    wrong = []
    logits, features = bounds.logits[b].tolist(), bounds.features[b].tolist()
    for label in range(len(logits) if len(logits) > 1 else 0):
        margin = float(bounds.margin(torch.full((len(bounds.logits),), label))[b])
        if math.isnan(margin) or (margin > -math.inf and rational(margin) > exact.margin(label)):
            wrong.append(f"margin of class {label}: {margin}, want at most {float_of(exact.margin(label))}")
    if math.isfinite(float(bounds.radius[b])) and rational(float(bounds.radius[b])) ** 2 < exact.moved_squared:
        wrong.append(f"radius {float(bounds.radius[b])}, want at least {float_of(exact.moved_squared) ** 0.5}")
    stretch = exact.stretch_squared
    if math.isfinite(float(bounds.lipschitz[b])) and not arb(float(bounds.lipschitz[b])) ** 2 >= stretch:
        wrong.append(f"lipschitz {float(bounds.lipschitz[b])}, want at least {float(stretch) ** 0.5}")
    low, high = exact.feature_range
    for k in range(len(features)):
        least, most = float(bounds.lower[b, k]), float(bounds.upper[b, k])
        if not (least == -math.inf or rational(least) <= low[k]) or not (most == math.inf or rational(most) >= high[k]):
            wrong.append(f"feature {k}: [{least}, {most}], want [{float_of(low[k])}, {float_of(high[k])}]")
    for layer in bounds.layers:
        if not exact.has_constant(~layer.column_mask[b]):
            wrong.append(f"constant outputs of {layer.path!r}: {int((~layer.column_mask[b]).sum())}, which are not")
    true = floats(exact.logit_values)
    rest = true - bounds.last_weight.detach().double() @ floats(exact.feature_values)
    if not (rest - rest[:, :1]).abs().max() <= 1e-9 * (1 + true.abs().max()):
        wrong.append("the last weights make something else of the features than the logits")
    return wrong + wrong_clean_values(exact, bounds, b)


def wrong_clean_values(exact: Exact, bounds: Any, b: int) -> list[str]:
    """Of what proofs say at the input itself."""
    wrong = []
    if isinstance(bounds, ll.bounds.ProvedBounds):
        for kind, values, errors, true in (
            ("logit", bounds.logits[b], bounds.logit_error[b], exact.clean_logits),
            ("clean feature", bounds.features[b], bounds.feature_error[b], exact.clean),
        ):
            for k, (value, error) in enumerate(zip(values.tolist(), errors.tolist(), strict=True)):
                if not (error == math.inf or abs(rational(value) - true[k]) <= rational(error)):
                    wrong.append(f"{kind} {k}: {value} up to {error}, want {float_of(true[k])}")
    return wrong


SLACK = 1 - 1e-12  # of a direction that is not to be longer than 1
PLANE_EPS = [1e-9, 0.05, 0.4, 2.0]


@cache
def plane_problem(name: str, seed: int, inputs: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, list[Exact]]:
    """A network, as many copies of one input as there are radii, and what is exactly so in each of the balls."""
    model = plane_network(name, seed, inputs, dtype)
    x = torch.rand(inputs, generator=generator(seed), dtype=torch.float64).to(dtype)
    return model, x.expand(len(PLANE_EPS), -1), [exactly(model, x, eps) for eps in PLANE_EPS]


@every_proof
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_every_statement_about_plane_networks(name: str, how: dict[str, Any], guarantee: str) -> None:
    certified = constant = 0
    for seed in range(2):
        for inputs, dtype in ((1, torch.float64), (2, torch.float32), (2, torch.float64)):
            model, x, exact = plane_problem(name, seed, inputs, dtype)
            eps = torch.tensor(PLANE_EPS, dtype=torch.float64)
            bounds = ll.local_bounds(model, x, eps, **how, guarantee=guarantee)
            for b in range(len(x)):
                assert wrong_statements(exact[b], bounds, b) == []
            certified += int((bounds.margin() > 0).sum())
            constant += sum(int((~mask).sum()) for mask in bounds.column_masks)
    assert certified >= 6, "hardly anything is certified, so that little was tested"
    assert constant > 0 or name in ("maxmin", "leaky-relu")


def test_the_estimate_s_statements_about_plane_networks_are_not_all_true() -> None:
    """Its boxes and margins are off by their rounding, and its float32 radii are not those asked for."""
    wrong = []
    for name in PIECEWISE_LINEAR:
        model, x, exact = plane_problem(name, 0, 2, torch.float32)
        bounds = ll.local_bounds(model, x, torch.tensor(PLANE_EPS, dtype=torch.float64), iterations=100)
        wrong += [statement for b in range(len(x)) for statement in wrong_statements(exact[b], bounds, b)]
    assert len(wrong) > 5


@every_proof
def test_the_judge_finds_what_is_wrong(guarantee: str) -> None:
    """Tight bounds of a ball 1 % smaller say something false of the larger one, in every one of their parts."""
    model, x, exact = chain_problems("relu", torch.float64)[1]
    wrong = wrong_statements(exact, ll.local_bounds(model, x, 0.99 * EPS, guarantee=guarantee))
    assert {text.split()[0] for text in wrong} == {"margin", "radius", "feature"}
    bounds = ll.local_bounds(model, x, EPS, guarantee=guarantee)
    bounds.lipschitz = 0.99 * bounds.lipschitz
    bounds.layers[-1].column_mask = torch.zeros_like(bounds.column_masks[-1])
    assert [text.split()[0] for text in wrong_statements(exact, bounds)] == ["lipschitz", "constant"]


def on_a_line(model: nn.Module, x: Tensor, eps: float) -> Exact:
    """What is exactly so on the line from an input in a direction that lowers the margin."""
    logits = model(x)
    point = attack.pgd(model, x, logits.argmax(1), eps, steps=20, generator=generator(0)) if logits.shape[1] > 1 else x
    direction = (point - x).double()
    if not direction.any():  # nothing in the ball is worse than the input
        direction = normal(0, *x.shape)
    return exactly(model, x[0], eps, SLACK * direction / direction.norm())


@cache
def line_problem(name: str, eps: float) -> tuple[nn.Sequential, Tensor, Exact]:
    model, x = copy.deepcopy(ZOO[name][0]).requires_grad_(False), zoo_input(name, 1, seed=1)
    return model, x, on_a_line(model, x, eps)


@every_proof
@pytest.mark.parametrize(
    "name",
    [
        "convolutional, clipped-relu",
        "convolutional, maxmin",
        "normalised, pooled, grouped",
        "nested",
        "activations in a row",
        "dense, relu",
    ],
)
def test_every_module_on_a_line(name: str, guarantee: str) -> None:
    """Strides, padding, dilation, groups, pooling and normalisation, on the line through the input to an attack."""
    for eps in (0.05, 2.0):
        model, x, exact = line_problem(name, eps)
        for how in HOW:
            bounds = ll.local_bounds(model, x, eps, **how, guarantee=guarantee)
            assert wrong_statements(exact, bounds) == []
    assert exact.moved_squared > 0, "nothing happens in the larger ball"


GRAPH_EPS = [0.05, 0.4, 1.5]


@cache
def graph_problem(name: str, state: str, seed: int) -> tuple[nn.Module, Tensor, list[Exact]]:
    """A network of SMALL, random or briefly trained, as `plane_problem` has it."""
    model, x = build(name, seed, of=SMALL)
    if state == "trained":
        briefly_trained(model, x, steps=12)
    with_rational_roots(model).requires_grad_(False)
    return model, x[:1].expand(len(GRAPH_EPS), -1), [exactly(model, x[0], eps) for eps in GRAPH_EPS]


@every_proof
@pytest.mark.parametrize("state", ["random", "trained"])
@pytest.mark.parametrize("name", SMALL)
def test_every_statement_about_graphs(name: str, state: str, guarantee: str) -> None:
    """Skips, concatenations, pools, tied and normalised layers, in all of a ball."""
    for seed in range(2):
        model, x, exact = graph_problem(name, state, seed)
        eps = torch.tensor(GRAPH_EPS, dtype=torch.float64)
        for how in HOW:
            bounds = ll.local_bounds(model, x, eps, **how, guarantee=guarantee)
            for b in range(len(x)):
                assert wrong_statements(exact[b], bounds, b) == []
        assert exact[-1].moved_squared > 0, "nothing happens in the largest ball"


@every_proof
def test_the_judge_finds_what_is_wrong_with_a_graph(guarantee: str) -> None:
    """Bounds of a ball half as large, and bounds of which a part is changed."""
    model, x, exact = graph_problem("dense", "trained", 0)
    bounds = ll.local_bounds(model, x, 0.5 * torch.tensor(GRAPH_EPS).double(), guarantee=guarantee)
    assert {text.split()[0] for text in wrong_statements(exact[0], bounds)} == {"margin", "radius", "feature"}
    bounds = ll.local_bounds(model, x, torch.tensor(GRAPH_EPS).double(), guarantee=guarantee)
    bounds.lipschitz = 0.9 * bounds.lipschitz
    bounds.logit_error = 0 * bounds.logit_error
    bounds.last[0].weight = 1.01 * bounds.last[0].weight
    assert {text.split()[0] for text in wrong_statements(exact[0], bounds)} >= {"lipschitz", "logit", "the"}


# networks of networks.py that are piecewise linear, with radii at which something happens
CUT = {"vgg": 0.5, "densenet": 0.5, "liresnet": 0.3, "circular": 0.5, "ends in an activation": 0.5, "one output": 0.5}


@cache
def network_problem(name: str, state: str) -> tuple[nn.Module, Tensor, Exact]:
    model, x = build(name) if state == "random" else trained_network(name)
    with_rational_roots(model).requires_grad_(False)
    return model, x[:1], on_a_line(model, x[:1], CUT[name])


@every_proof
@pytest.mark.parametrize("state", ["random", "trained"])
@pytest.mark.parametrize("name", CUT)
def test_networks_on_a_line(name: str, state: str, guarantee: str) -> None:
    model, x, exact = network_problem(name, state)
    for how in HOW:
        bounds = ll.local_bounds(model, x, CUT[name], **how, guarantee=guarantee)
        assert wrong_statements(exact, bounds) == []


@settings(max_examples=40, deadline=None)
@given(
    graphs(sorted({*ACTIVATIONS} - {"gelu", "tanh"})), st.integers(0, 99), st.sampled_from([0.05, 1.0]),
    st.sampled_from(HOW), st.sampled_from(PROOFS),
)  # fmt: skip
def test_random_graphs_on_a_line(
    steps: list[tuple[object, ...]], seed: int, eps: float, how: dict[str, Any], guarantee: str
) -> None:
    model = RandomGraph(steps, seed).eval().requires_grad_(False)
    x = torch.rand(1, 2, SIDE, SIDE, generator=generator(seed), dtype=torch.float64)
    bounds = ll.local_bounds(model, x, eps, **how, guarantee=guarantee)
    assert wrong_statements(on_a_line(model, x, eps), bounds) == []


@every_proof
def test_certified_radii_are_robust(guarantee: str) -> None:
    for name in PIECEWISE_LINEAR:
        for inputs, dtype in ((1, torch.float64), (2, torch.float32)):
            model, x, _ = plane_problem(name, 1, inputs, dtype)
            found = ll.certified_radius(model, x[:1], max_eps=1.5, tolerance=1e-2, guarantee=guarantee)
            assert 0 < float(found) < 1.5
            label = int(model(x[:1]).argmax())
            assert Exact(model, x[0], float(found)).margin(label) > 0


# --- rounding ---------------------------------------------------------------------------------------------------------


def set_all(model: nn.Sequential, g: torch.Generator) -> nn.Sequential:
    """Weights of both signs between 1/2 and 3/2, rounded to the model's dtype."""
    for parameter in model.parameters():
        sign = 1 - 2.0 * (torch.rand(parameter.shape, generator=g) < 0.3)
        parameter.data = (sign * (0.5 + torch.rand(parameter.shape, generator=g, dtype=torch.float64))).to(
            parameter.dtype
        )
    return model.requires_grad_(False).eval()


def chain(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """One pixel through layers of one unit: the bounds are exact but for rounding. Shape of the input (1, 1, 1, 1)."""
    make = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "elu": nn.ELU, "none": nn.Identity}
    first, second = (make[name]() if name in make else PIECEWISE_LINEAR[name](1) for _ in range(2))
    g = generator(seed)
    if name == "clipped-relu":
        first = ll.nn.ClippedReLU((1, 1, 1), 0.7)
    layers = [
        Normalize([0.3 + 0.1 * (seed % 3)], [0.1 + 0.3 * (seed % 7)]), nn.Conv2d(1, 1, 1), first,
        nn.AvgPool2d(3, 1, 1), nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), second, nn.Linear(1, 3),
    ]  # fmt: skip
    model = set_all(nn.Sequential(*layers).to(dtype), g)
    return model, torch.rand(1, 1, 1, 1, generator=g, dtype=torch.float64).to(dtype)


EPS = 0.7  # a float32 of this value is smaller: a proof has to be about the number that was given
CHAINS = ["none", "relu", "leaky-relu", "clipped-relu"]


@cache
def chain_problems(name: str, dtype: torch.dtype, count: int = 12) -> list[tuple[nn.Sequential, Tensor, Exact]]:
    """The first chains that are not constant in the ball, with what is exactly so there."""
    alive: list[tuple[nn.Sequential, Tensor, Exact]] = []
    for seed in itertools.count():
        if len(alive) == count:
            return alive
        model, x = chain(name, seed, dtype)
        exact = exactly(model, x[0], EPS)
        if exact.moved_squared > 0:
            alive.append((model, x, exact))
    raise AssertionError


@every_proof
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_that_are_tight_but_for_rounding(name: str, dtype: torch.dtype, guarantee: str) -> None:
    """A rounding that is not accounted for makes some of these statements false."""
    for model, x, exact in chain_problems(name, dtype):
        bounds = ll.local_bounds(model, x, EPS, guarantee=guarantee)
        assert wrong_statements(exact, bounds) == []
        for label in range(3):
            true = float_of(exact.margin(label))
            assert true - float(bounds.margin(torch.tensor([label]))) <= 1e-9 * (1 + abs(true)), "loose"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_estimate_does_not_survive_its_rounding(dtype: torch.dtype) -> None:
    deceived = 0
    for name in CHAINS:
        for model, x, exact in chain_problems(name, dtype):
            deceived += bool(wrong_statements(exact, ll.local_bounds(model, x, EPS, iterations=100)))
    assert deceived > 20


def by_balls(name: str, z: arb) -> arb:
    match name:
        case "tanh":
            return z.tanh()
        case "sigmoid":
            return 1 / (1 + (-z).exp())
        case "elu":
            return z if z > 0 else z.expm1()
    raise ValueError(name)


@every_proof
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "elu"])
def test_smooth_activations_in_ball_arithmetic(name: str, guarantee: str) -> None:
    """A chain of monotone functions: the least margin is at one end of the interval."""
    for seed in range(10):
        model, x = chain(name, seed, torch.float64)
        layers: list[Any] = []
        for module in model:
            if isinstance(module, (nn.Tanh, nn.Sigmoid, nn.ELU)):
                layers.append(None)
            elif not isinstance(module, nn.Flatten):
                sizes = (1,) if isinstance(module, nn.Linear) else (1, 1, 1)
                layers.append(affine(module, sizes))
        ends = []
        for end in (rationals(x)[0] - rational(EPS), rationals(x)[0] + rational(EPS)):
            values = [arb(end)]
            for layer in layers:
                if layer is None:
                    values = [by_balls(name, v) for v in values]
                else:
                    values = [arb(layer.matrix[i, 0]) * values[0] + arb(bias) for i, bias in enumerate(layer.bias)]
            ends.append(values)
        bounds = ll.local_bounds(model, x, EPS, guarantee=guarantee)
        for label in range(3):
            claim = float(bounds.margin(torch.tensor([label])))
            differences = [end[label] - end[j] for end in ends for j in range(3) if j != label]
            assert all(arb(claim) <= difference for difference in differences)
            assert any(arb(claim) + 1e-9 >= difference for difference in differences), "loose"


@every_proof
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_network_s_margin_is_its_distance(dtype: torch.dtype, guarantee: str) -> None:
    for seed in range(20):
        model = set_all(nn.Sequential(nn.Linear(30, 3, bias=False)).to(dtype), generator(seed))
        x = normal(seed, 1, 30).to(dtype) * (seed % 2)  # at 0 the logits are exact, and hide no error of the distance
        logits, weight = evaluate(model, x[0]), affine(model, (30,)).matrix
        bounds = ll.local_bounds(model, x, EPS, guarantee=guarantee)
        for label in range(3):
            claim = float(bounds.margin(torch.tensor([label])))
            margins = []
            for other in {0, 1, 2} - {label}:
                square = sum((weight[label, k] - weight[other, k]) ** 2 for k in range(30))
                margins.append(arb(logits[label] - logits[other]) - arb(rational(EPS)) * arb(square).sqrt())
            assert all(arb(claim) <= margin for margin in margins)
            assert any(arb(claim) + 1e-9 >= margin for margin in margins), "loose"


def live_by_an_ulp(kind: str, dtype: torch.dtype, seed: int) -> tuple[nn.Sequential, Tensor, float]:
    """A unit that rounding takes for constant at the end of the interval, and a logit that magnifies it."""
    g = generator(seed)
    magnified = 2.0 ** (28 if dtype == torch.float32 else 57)
    weight, x, eps = (torch.rand((), generator=g, dtype=torch.float64).to(dtype) + 1 for _ in range(3))
    threshold = torch.tensor(3.0, dtype=dtype)
    if kind == "relu":  # (x + eps) w + b = 0
        bias, activation, ends = -(weight * x + weight * eps), nn.ReLU(), ([0.0, magnified], [1.0, 0.0])
    else:  # (x - eps) w + b = threshold
        bias = threshold - (weight * x - weight * eps)
        activation, ends = ll.nn.ClippedReLU(1, threshold), ([0.0, -magnified], [1.0, 3.0 * magnified])
    units = 1
    if kind == "clipped-maxmin":
        units, activation = 2, ll.nn.ClippedMaxMin(1, threshold, -100.0)
    model = nn.Sequential(nn.Linear(1, units), activation, nn.Linear(units, 2)).to(dtype).requires_grad_(False)
    first, last = model[0], model[2]
    first.weight[:] = weight if units == 1 else torch.stack([weight, 0 * weight])[:, None]
    first.bias[:] = bias if units == 1 else torch.stack([bias, 0 * bias])
    last.weight.zero_()
    last.weight[:, 0], last.bias[:] = torch.tensor(ends[0]), torch.tensor(ends[1])
    return model, x.view(1, 1), float(eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["relu", "clipped-relu", "clipped-maxmin"])
def test_masks_that_rounding_gets_wrong(kind: str, dtype: torch.dtype) -> None:
    deceived = 0
    for seed in range(150):
        model, x, eps = live_by_an_ulp(kind, dtype, seed)
        margin = Exact(model, x[0], eps).margin(0)
        if margin > 0:
            continue
        deceived += by_estimate(model, x, eps)
        for guarantee in PROOFS:
            certificate = ll.certify(model, x, eps, guarantee=guarantee)
            assert not certificate.certified or Exact(model, x[0], eps).margin(int(certificate.prediction)) > 0
    assert deceived > 3, "rounding is not what was tested"


@every_proof
@pytest.mark.parametrize("how", HOW, ids=str)
def test_masks_on_their_boundary(how: dict[str, Any], guarantee: str) -> None:
    """Units that touch 0, their threshold or each other at the ends of the interval, in numbers without rounding."""
    x, eps = torch.tensor([[0.0]], dtype=torch.float64), 0.5
    nearest = [0.0, 2.0**-54, -(2.0**-54)]  # half an ulp of the numbers around it
    for off in nearest:
        biases = torch.tensor([-0.5 + off, 0.5 + off, 1.0 + off, 0.5 - off, -0.5, 0.0, 1.5 + off, -1.5 - off])
        for name in PIECEWISE_LINEAR:
            activation = PIECEWISE_LINEAR[name](8)
            for parameter in activation.parameters():
                parameter.data = torch.full_like(parameter.data, 0.5).double()
            model = nn.Sequential(nn.Linear(1, 8), activation, nn.Linear(8, 2)).double().requires_grad_(False)
            set_all(model[2:], generator(0))
            model[0].weight[:] = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0]).double()[:, None]
            model[0].bias[:] = biases.double()
            bounds = ll.local_bounds(model, x, eps, **how, guarantee=guarantee)
            assert wrong_statements(exactly(model, x[0], eps), bounds) == []


def test_logits_that_rounding_puts_in_the_wrong_order() -> None:
    """At eps = 0 a certificate is about the class of one point; here the logits differ by less than their rounding."""
    deceived = certified = 0
    for seed in range(60):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        set_all(model, generator(seed))
        x = torch.rand(1, 8, generator=generator(seed))
        logits = model(x)[0]
        model[2].bias[1] += logits[0] - logits[1] + 1e-6 * (seed % 5 - 2)
        exact = evaluate(model, x[0])
        estimate = ll.certify(model, x, 0.0, guarantee="estimate")
        deceived += bool(estimate.certified) and bool(margin_of(exact, int(estimate.prediction)) <= 0)
        for guarantee in PROOFS:
            certificate = ll.certify(model, x, 0.0, guarantee=guarantee)
            certified += bool(certificate.certified)
            assert not certificate.certified or margin_of(exact, int(certificate.prediction)) > 0
    assert deceived > 3 and certified >= 50


def through_small_numbers(scale: float, dtype: torch.dtype) -> nn.Sequential:
    """x -> scale^2 x -> 2 x, in two steps each; class 1 from x = 1/2 on. The products of weights leave the format."""
    model = (
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)), nn.ReLU(), nn.Linear(1, 2)).to(dtype).requires_grad_(False)
    )
    for layer, weight in zip(model, [scale, scale, 1 / scale, 1 / scale], strict=False):
        layer.weight[:], layer.bias[:] = weight, 0
    model[5].weight[:], model[5].bias[:] = torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 0.0])
    return model


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e-25), (torch.float64, 1e-200), (torch.float64, 1e200)])
def test_weights_whose_products_leave_the_format(dtype: torch.dtype, scale: float, flush: bool) -> None:
    model, x, eps = through_small_numbers(scale, dtype), torch.full((1, 1), 0.25, dtype=dtype), 0.75
    assert Exact(model, x[0], eps).margin(0) < 0
    if scale < 1:
        assert by_estimate(model, x, eps)
    torch.set_flush_denormal(flush)
    try:
        for guarantee in PROOFS:
            assert not ll.certify(model, x, eps, guarantee=guarantee).certified
    finally:
        torch.set_flush_denormal(False)


# the largest share of bounds that are wrong, among the top values tried, comes near the stated one
@pytest.mark.parametrize("stated, top, tightness", [(0.9, 1.3, 1.0), (0.5, 1.1, 1.0), (0.1, 1.3, 1.0)])
def test_the_stated_probability_is_kept_and_needed(stated: float, top: float, tightness: float) -> None:
    values = torch.linspace(0, 1, 100, dtype=torch.float64)
    values[0] = top
    everywhere = torch.ones(2000, 100, dtype=torch.bool)
    weight = torch.diag(values)
    bound = ll.masked_norm_bound(weight, None, everywhere, failure_probability=stated, tightness=tightness, seed=0)
    assert 0.4 * stated < (bound.upper < top).double().mean() <= stated
