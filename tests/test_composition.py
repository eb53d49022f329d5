"""Composed norms: the recursion against dense matrices and LAPACK, and what composes and what does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from verify_norms import DENSE, HIDDEN

import locallip_cuda as ll
from bench import composition as measured
from locallip_cuda.nn import ClippedReLU, MaxMin
from locallip_cuda.norms.linear import Dense, LinearMap, Masking, composed, is_of_even_size
from locallip_cuda.norms.linear_bound import Stage, absolute_norm, proved_chain_norm, proved_norm
from locallip_cuda.propagation import composition, functional, recursion, rules
from locallip_cuda.propagation.graph import lowered, traced

CONVERGED = 60


def dense_of(module: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> Tensor:
    """(outputs, inputs) of an affine module, by its images."""
    units = math.prod(sizes)
    with torch.no_grad():
        images = module(torch.eye(units, dtype=torch.float64).view(units, *sizes)) - module(
            torch.zeros(1, *sizes, dtype=torch.float64)
        )
    return images.flatten(1).T


def network(seed: int, depth: int, activation: str, convolutional: bool) -> tuple[nn.Sequential, tuple[int, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        sizes: tuple[int, ...] = (2, 5, 5) if convolutional else (12,)
        first = sizes
        for i in range(depth):
            if convolutional and i < 2:
                layers.append(nn.Conv2d(sizes[0], 4, 3, stride=1 + i, padding=1))
                sizes = (4, 5, 5) if i == 0 else (4, 3, 3)
            else:
                if len(sizes) == 3:
                    layers.append(nn.Flatten())
                    sizes = (math.prod(sizes),)
                layers.append(nn.Linear(sizes[0], 10 + i))
                sizes = (10 + i,)
            kind = activation if activation != "mixed" else ("relu", "clipped", "leaky", "sigmoid")[(seed + i) % 4]
            layers.append(
                {
                    "relu": nn.ReLU(),
                    "clipped": ClippedReLU(sizes, 0.5),
                    "leaky": nn.LeakyReLU(0.1),
                    "sigmoid": nn.Sigmoid(),
                }[kind]
            )
        layers += [nn.Flatten(), nn.Linear(math.prod(sizes), 4)]
        return nn.Sequential(*layers).double().requires_grad_(False), first


SLOPES = {nn.ReLU: (0.0, 1.0), ClippedReLU: (0.0, 1.0), nn.LeakyReLU: (0.1, 1.0), nn.Sigmoid: (0.0, 0.25)}


class Reference:
    """The recursion written out: dense matrices, full decompositions, one sample."""

    def __init__(self, model: nn.Sequential, bounds: Any, b: int, sizes: tuple[int, ...], eps: float) -> None:
        self.maps: list[Tensor] = []
        self.slopes: list[tuple[float, float]] = []
        self.masks = [bounds.row_masks[i][b].flatten().double() for i in range(len(bounds.row_masks))]
        self.eps = eps
        x = torch.zeros(1, *sizes, dtype=torch.float64)
        pending: list[nn.Module] = []
        for module in model:
            if type(module) in SLOPES:
                self.maps.append(dense_of(nn.Sequential(*pending), tuple(x.shape[1:])))
                x = nn.Sequential(*pending)(x)
                self.slopes.append(SLOPES[type(module)])
                pending = []
            else:
                pending.append(module)
        self.head = dense_of(nn.Sequential(*pending), tuple(x.shape[1:]))

    def chain(self, last: int, first: int, masked: bool) -> Tensor:
        """V_l A_l V_{l-1} ... V_f A_f, of which masks outside on the right are those of the layer before."""
        if not masked:
            return reduce(
                lambda product, layer: self.maps[layer] @ product, range(first + 1, last + 1), self.maps[first]
            )
        product = self.masks[first][:, None] * self.maps[first]
        if first:
            product = product * self.columns(first - 1)
        for layer in range(first + 1, last + 1):
            product = self.masks[layer][:, None] * (self.maps[layer] @ product)
        return product

    def columns(self, layer: int) -> Tensor:
        return self.masks[layer]

    def far(self, norms: list[float], last: int, reach: list[float], radii: list[float]) -> float:
        """The least, over where the window ends, of the sums in its statement; norms[i] of i + 1 maps down from
        ``last``."""
        found = []
        for count in range(1, len(norms) + 1):
            factor, total = 1.0, 0.0
            for i in range(1, count):
                low, high = self.slopes[last - i]
                total += factor * (high - low) / 2 * norms[i - 1] * reach[last - i]
                factor *= (high + low) / 2
            found.append(total + factor * norms[count - 1] * radii[last - count + 1])
        return min(found)

    def run(self, window: float) -> tuple[list[list[float]], list[float]]:
        """How far the pre-activations move, those that the masks leave and all, and the radii in front of every layer
        and of the head."""
        reaches: list[list[float]] = [[], []]
        radii = [self.eps]
        for layer in range(len(self.maps)):
            first = max(0, layer - int(min(window, 99)) + 1)
            for masked, reach in zip((True, False), reaches, strict=True):
                chains = [self.chain(layer, f, masked) for f in range(layer, first - 1, -1)]
                norms = [float(torch.linalg.matrix_norm(chain, 2)) for chain in chains]
                reach.append(self.far(norms, layer, reach, radii))
            if window > 1:
                reaches[0][-1] = min(reaches[0][-1], reaches[1][-1])
            radii.append(reaches[0][-1] * self.slopes[layer][1])
        return reaches, radii

    def functional(self, window: float, y: int, masked: bool) -> Tensor:
        reaches, radii = self.run(window)
        gains = []
        layers = len(self.maps)
        for j in range(len(self.head)):
            row = (self.head[j] - self.head[y]) * (self.columns(layers - 1) if masked else 1)
            norms = [float(row.norm())]
            for layer in range(layers - 1, max(-1, layers - 1 - int(min(window, 99))), -1):
                row = (row * (self.masks[layer] if masked else 1)) @ self.maps[layer]
                if layer and masked:
                    row = row * self.columns(layer - 1)
                norms.append(float(row.norm()))
            gains.append(self.far(norms, layers, reaches[0 if masked else 1], radii))
        return torch.tensor(gains, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(2, 5),
    st.sampled_from(["relu", "clipped", "mixed"]),
    st.booleans(),
    st.sampled_from([1, 2, 3, math.inf]),
    st.sampled_from([0.02, 0.2, 1.0]),
)
def test_the_recursion_is_that_of_dense_matrices(
    seed: int, depth: int, activation: str, convolutional: bool, window: float, eps: float
) -> None:
    model, sizes = network(seed, depth, activation, convolutional)
    x = torch.rand(3, *sizes, generator=generator(seed), dtype=torch.float64)
    y = torch.tensor([0, 3, 1])
    b = ll.local_bounds(model, x, eps, window=window, iterations=CONVERGED)
    proof = ll.local_bounds(model, x, eps, window=window, guarantee="deterministic")
    for k in range(len(x)):
        reference = Reference(model, b, k, sizes, eps)
        _, radii = reference.run(window)
        assert float(b.radius[k]) == pytest.approx(radii[-1], rel=1e-6, abs=1e-12)
        assert float(b.lipschitz[k]) * eps == pytest.approx(radii[-1], rel=1e-6, abs=1e-12)
        own = Reference(model, proof, k, sizes, eps)
        assert own.run(window)[1][-1] <= float(proof.radius[k])
        assert float(proof.radius[k]) <= own.run(window)[1][-1] * (1 + 1e-5) + 1e-12
        if window > 1:
            assert len(b.functionals) == len(proof.functionals) >= 1
            for one, other in zip(b.functionals, proof.functionals, strict=True):
                gains = reference.functional(window, int(y[k]), one.masked)
                found = one.gains(b.last_weight, y, functional.lengths, lambda t: t)[k]
                torch.testing.assert_close(found, gains, rtol=1e-6, atol=1e-12)
                proved = other.gains(proof.last_weight, y, proof.lengths, lambda t: t)[k]
                exact = own.functional(window, int(y[k]), one.masked)
                assert (proved >= exact * (1 - 1e-14)).all() and (proved <= exact * (1 + 1e-5) + 1e-12).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.integers(2, 4), st.booleans(), st.sampled_from([0.05, 0.4]))
def test_never_above_the_product_nor_the_global_form(seed: int, depth: int, convolutional: bool, eps: float) -> None:
    model, sizes = network(seed, depth, "mixed", convolutional)
    x = torch.rand(4, *sizes, generator=generator(seed), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3])
    product = ll.local_bounds(model, x, eps, iterations=CONVERGED)
    for window in (2, 3, math.inf):
        b = ll.local_bounds(model, x, eps, window=window, iterations=CONVERGED)
        for other in (product, ll.global_bounds(model, x, eps, window=window, iterations=CONVERGED)):
            assert (b.radius <= other.radius * (1 + 1e-9)).all()
            assert (b.worst_logits(y) <= other.worst_logits(y) + 1e-9).all()
            assert all((a <= b).all() for a, b in zip(b.row_masks, other.row_masks, strict=True))


def test_a_window_of_one_is_the_product_bit_for_bit() -> None:
    model, sizes = network(1, 4, "clipped", True)
    x = torch.rand(3, *sizes, generator=generator(1), dtype=torch.float64)
    plain, b = ll.local_bounds(model, x, 0.1), ll.local_bounds(model, x, 0.1, window=1)
    assert torch.equal(plain.radius, b.radius) and torch.equal(b.lipschitz, b.layer_norms.prod(1))
    assert b.functionals == [] and b.composed == b.unmasked == [] and b.composed_closeness.shape == (3, 0)


def paths(model: nn.Module, x: Tensor, window: float) -> list[tuple[str, int]]:
    """The module that each chain ends in, and how many maps with weights it has."""
    b = ll.local_bounds(model.double(), x.double(), 0.05, window=window)
    return [(record.path, len(record.linear.weights())) for record in b.composed]


def test_what_ends_a_chain() -> None:
    x = torch.rand(2, 8)

    def dense(*activations: nn.Module) -> nn.Sequential:
        layers = [module for each in activations for module in (nn.Linear(8, 8), each)]
        return nn.Sequential(*layers, nn.Linear(8, 3))

    relu, sort = nn.ReLU(), MaxMin()
    assert paths(dense(relu, relu, relu), x, 2) == [("2", 2), ("4", 2)]
    assert paths(dense(relu, relu, relu), x, math.inf) == [("2", 2), ("4", 2), ("4", 3)]
    assert paths(dense(relu, sort, relu, relu), x, math.inf) == [("2", 2), ("6", 2)]
    assert paths(dense(relu, nn.GELU(), relu, relu), x, math.inf) == [("2", 2), ("6", 2)]
    assert paths(dense(sort, sort), x, math.inf) == []
    pooled = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2),
    )  # fmt: skip
    # of the pool, whose map is the identity, the rows that are never a maximum go from the map before
    assert paths(pooled, torch.rand(2, 1, 8, 8), math.inf) == [("2", 1), ("6", 2)]


class Skip(nn.Module):
    """A sum that folds into one operator, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = F.relu(h + self.second(h))  # of one value: one operator
        h = F.relu(x + self.third(h))  # of two values
        return self.head(h)  # type: ignore[no-any-return]


def test_sums_that_fold_compose_and_others_do_not() -> None:
    model, x = Skip().double(), torch.rand(4, 6, dtype=torch.float64)
    graph = lowered(traced(model, x), torch.float64)
    lengths = [len(own) for own in composition.chains(graph, math.inf).values()]
    assert sum(lengths) == 1 and len(composition.last_chain(graph, math.inf).layers) == 1
    b = ll.local_bounds(model, x, 0.1, window=math.inf)
    plain = ll.local_bounds(model, x, 0.1)
    assert b.functionals == [] and (b.radius <= plain.radius).all() and (b.radius < plain.radius).any()


def test_slopes_are_checked_and_rounded_up() -> None:
    rules = ll.rules
    assert rules.Activation(torch.relu, slopes=(0.0, 0.3)).centre_and_half() == (0.15, 0.15)
    assert rules.Activation(torch.relu, slopes=(1.0, 1.0)).centre_and_half() == (1.0, 0.0)
    centre, half = rules.Activation(torch.abs, slopes=(-1.0, 0.1)).centre_and_half()
    assert centre >= 0.45 and half >= 0.55
    with pytest.raises(ValueError, match="slopes: got"):
        rules.Activation(torch.relu, slopes=(0.0, 2.0))
    with pytest.raises(ValueError, match="slopes: got"):
        rules.Activation(torch.relu, slopes=(1.0, 0.0))


@pytest.mark.parametrize("name", ["window", "classes"])
def test_the_functional_in_pieces_is_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over samples, and over classes where one sample is too much; with its gradients."""
    model, sizes = network(3, 3, "clipped", True)
    model.requires_grad_()
    x, y = torch.rand(5, *sizes, generator=generator(3), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])

    def run() -> tuple[Tensor, list[Tensor]]:
        worst = ll.local_bounds(model, x, 0.1, window=math.inf, iterations=CONVERGED).worst_logits(y)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return worst, list(torch.autograd.grad(worst.square().sum(), parameters))

    whole, gradients = run()
    monkeypatch.setattr(functional, "CHUNK", 700 if name == "window" else 120)
    pieces, again = run()
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    own = ll.local_bounds(model, x, 0.1, window=math.inf, guarantee="deterministic").worst_logits(y)
    monkeypatch.undo()
    expected = ll.local_bounds(model, x, 0.1, window=math.inf, guarantee="deterministic").worst_logits(y)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_composed_bound() -> None:
    """By finite differences, through chains, radii, masks that stay as they are and the functional."""
    model, sizes = network(5, 3, "relu", False)
    x, y = torch.rand(2, *sizes, generator=generator(5), dtype=torch.float64), torch.tensor([1, 2])
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for _, p in model.named_parameters()]

    def worst(*weights: Tensor) -> Tensor:
        changed = copy.deepcopy(model)
        for name, weight in zip(names, weights, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = changed.get_submodule(owner)
            delattr(module, leaf)
            setattr(module, leaf, weight)
        return ll.local_bounds(changed, x, 0.05, window=math.inf, iterations=CONVERGED).worst_logits(y)

    assert torch.autograd.gradcheck(worst, values, eps=1e-7, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_rows_that_are_alike_gain_nothing_and_have_gradients() -> None:
    model, sizes = network(2, 2, "relu", False)
    model.requires_grad_()
    with torch.no_grad():
        model[-1].weight[1] = model[-1].weight[0]  # type: ignore[index, operator, union-attr]
    x = torch.rand(2, *sizes, generator=generator(2), dtype=torch.float64)
    b = ll.local_bounds(model, x, 0.3, window=2)
    gain = b.worst_logits(torch.tensor([0, 1])) - b.logits
    assert gain[0, 1].abs() < 1e-12 and gain[1, 0].abs() < 1e-12
    ll.losses.gloro(b, torch.tensor([0, 1])).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_control_of_a_single_output() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    norms = ll.TrainingNorms(model, x, window=2)
    b = ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=2)
    norms.control(b, y)
    assert norms.functional


def test_two_classes_and_an_empty_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.rand(3, 3, dtype=torch.float64)
    for guarantee in ("estimate", "probabilistic", "deterministic"):
        b = ll.local_bounds(model, x, 0.1, window=2, guarantee=guarantee)
        assert (b.margin() >= ll.local_bounds(model, x, 0.1, guarantee=guarantee).margin() - 1e-6).all()
        empty = ll.local_bounds(model, x[:0], 0.1, window=2, guarantee=guarantee)
        assert empty.margin().shape == (0,)


def test_the_global_form_is_liplt() -> None:
    """Of Fazlyab et al., NeurIPS 2023, for slopes in [0, 1]: m_l = sum_k 2^-(l - k) ||A_l ... A_k|| m_{k-1}, and no
    masks."""
    model, sizes = network(4, 4, "relu", True)
    x = torch.rand(2, *sizes, generator=generator(4), dtype=torch.float64)
    b = ll.global_bounds(model, x, 1.0, window=math.inf, iterations=100)
    reference = Reference(model, b, 0, sizes, 1.0)
    assert all(bool(mask.all()) for mask in b.row_masks)
    reach, radii = [], [1.0]
    for layer, own in enumerate(reference.maps):
        product, total = own, 0.0
        for first in range(layer, 0, -1):
            total += 2.0 ** -(layer - first + 1) * float(torch.linalg.matrix_norm(product, 2)) * reach[first - 1]
            product = product @ reference.maps[first - 1]
        total += 2.0**-layer * float(torch.linalg.matrix_norm(product, 2))
        reach.append(total)
        radii.append(total)
    assert (b.radius <= radii[-1] * (1 + 1e-6)).all() and float(b.radius[0]) > 0.5 * radii[-1]
    assert float(b.radius[0]) == pytest.approx(reference.run(math.inf)[1][-1], rel=1e-6)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2", math.nan, None])
def test_windows_that_are_none(window: Any) -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.rand(1, 2)
    for call in (
        lambda: ll.local_bounds(model, x, 0.1, window=window),
        lambda: ll.global_bounds(model, x, 0.1, window=window),
        lambda: ll.certify(model, x, 0.1, window=window),
        lambda: ll.certified_radius(model, x, max_eps=0.1, window=window),
        lambda: ll.TrainingNorms(model, x, window=window),
    ):
        with pytest.raises(ValueError, match="window: got"):
            call()


def test_the_paper_s_radius_composes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.rand(1, 2)
    with pytest.raises(ValueError, match="window: got 2 with radius='global', want 1"):
        ll.local_bounds(model, x, 0.1, radius="global", window=2)


def test_training_norms_know_their_window() -> None:
    model, sizes = network(6, 3, "relu", False)
    x, y = torch.rand(9, *sizes, generator=generator(6), dtype=torch.float64), torch.zeros(9, dtype=torch.int64)
    norms = ll.TrainingNorms(model, x, window=3)
    assert len(norms.iterations) == 3 + 3
    with pytest.raises(ValueError, match="want model's 3 and 1 chains|want model's 3 and 2 chains"):
        ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=2)
    with pytest.raises(ValueError, match="norms: got those of 6 operators, want model's 3$"):
        ll.local_bounds(model, x, 0.1, norms=norms, y=y)
    one = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()  # no chains, but a functional
    z = torch.rand(9, 4, dtype=torch.float64)
    for own, window in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"norms: got those of another window, want {window}: give"):
            ll.local_bounds(one, z, 0.1, norms=ll.TrainingNorms(one, z, window=own), y=y, window=window)
    for _ in range(12):
        b = ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=3)
        norms.control(b, y)
    b = ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=3)
    assert (b.composed_closeness > 0.98).all() and (b.composed_closeness <= 1 + 1e-9).all()


def both_signs() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A_2 A_1 = 0, as of |x| = relu(x) + relu(-x), and samples on which one half of the units is off: with that mask
    between them the chain has norm 1."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(9), dtype=torch.float64))[0]
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([turn, -turn]))
        model[2].weight.copy_(torch.cat([torch.eye(4), torch.eye(4)], 1))
        for i in (0, 2):
            model[i].bias.zero_()  # type: ignore[union-attr, operator]
    return model, 3 * turn.sum(0).repeat(9, 1), torch.arange(9) % 3


def test_a_chain_that_is_less_without_its_masks_stays_close_in_training() -> None:
    model, x, y = both_signs()
    norms = ll.TrainingNorms(model, x, window=2)
    for _ in range(4):
        b = ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=2)
        norms.control(b, y)
        assert norms.shared[2:] == [False]
        torch.testing.assert_close(b.composed[0].norm, torch.ones(9, dtype=torch.float64))
        assert float(b.unmasked[-1].norm.detach()) < 1e-6
        assert (b.composed_closeness[:, :-1] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("guarantee", ["estimate", "probabilistic", "deterministic"])
def test_masks_never_take_what_the_global_form_has(guarantee: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where masks leave one unit of a pair in some places: by the norms with masks alone most bounds would be looser
    than without any."""
    model, _, _ = both_signs()
    x, y = torch.randn(32, 4, generator=generator(0), dtype=torch.float64) / 4, torch.arange(32) % 3
    whole = ll.global_bounds(model, x, 0.2, window=2, iterations=CONVERGED)

    def local() -> ll.LocalBounds:
        return ll.local_bounds(model, x, 0.2, window=2, guarantee=guarantee, iterations=CONVERGED)

    b = local()
    assert (b.radius <= whole.radius * (1 + 3e-3)).all() and (b.lipschitz <= whole.lipschitz * (1 + 3e-3)).all()
    assert (b.worst_logits(y) <= whole.worst_logits(y) + 1e-3).all()
    with monkeypatch.context() as without:
        without.setattr(recursion, "linked", lambda graph, window: set())
        masked = local()
    assert (masked.radius > 1.1 * whole.radius).sum() > 16
    assert (masked.worst_logits(y) > whole.worst_logits(y) + 1e-2).any(1).sum() > 16


class OwnReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class WithRows(rules.Activation):
    def rows(self, lower: Tensor, upper: Tensor) -> Tensor:
        return upper > 0


def test_rows_of_an_own_activation_are_masked_between_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    own_rule = WithRows(torch.relu, exact=True, slopes=(0.0, 1.0))
    monkeypatch.setitem(rules.RULES, OwnReLU, lambda at, module: own_rule)
    model, x, _ = both_signs()
    own = nn.Sequential(*(OwnReLU() if isinstance(module, nn.ReLU) else module for module in model))
    for guarantee in ("estimate", "deterministic"):
        bounds = [ll.local_bounds(m, x, 0.1, window=2, guarantee=guarantee, iterations=60) for m in (model, own)]
        torch.testing.assert_close(bounds[1].radius, bounds[0].radius)
        assert (bounds[1].radius >= 0.1 - 1e-9).all() and len(bounds[1].functionals) == 2


def test_a_short_chain_is_taken_for_the_longer_ones_behind_it() -> None:
    """Masks that take from the first layers alone: later chains give way, where no longer one needs them."""
    torch.manual_seed(3)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(12, 12), nn.ReLU())), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for k, value in ((0, -1.0), (2, 50.0), (4, 200.0), (6, 900.0)):
            model[k].bias.fill_(value)  # type: ignore[union-attr, operator]
        model[0].bias[6:] = 20.0  # type: ignore[index, union-attr]
    x, y = torch.rand(9, 12, dtype=torch.float64) / 9, torch.arange(9) % 3
    norms = ll.TrainingNorms(model, x, window=math.inf)
    for _ in range(4):
        b = ll.local_bounds(model, x, 0.01, norms=norms, y=y, window=math.inf)
        norms.control(b, y)
    b = ll.local_bounds(model, x, 0.01, norms=norms, y=y, window=math.inf)
    assert all((record.norm is None) == norms.shared[record.index] for record in b.composed)
    assert any(norms.shared[1:4]) and not all(norms.shared[4:])
    converged = ll.local_bounds(model, x, 0.01, window=math.inf, iterations=60)
    torch.testing.assert_close(b.radius, converged.radius, rtol=0.03, atol=0)


def test_what_masks_leave_as_it_is_is_not_taken_with_them() -> None:
    """Far from every boundary: chains and functional give way to those without masks, and come back."""
    model, sizes = network(11, 3, "relu", False)
    x, y = torch.rand(12, *sizes, generator=generator(11), dtype=torch.float64), torch.arange(12) % 4
    biases = [module.bias for module in model if isinstance(module, nn.Linear)][:-1]
    before = [bias.clone() for bias in biases]
    norms = ll.TrainingNorms(model, x, window=2)

    def step() -> ll.LocalBounds:
        b = ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=2)
        norms.control(b, y)
        return ll.local_bounds(model, x, 0.1, norms=norms, y=y, window=2)

    for bias in biases:
        bias.fill_(50.0)
    b = step()
    assert norms.shared == [True] * 5 and not norms.functional
    starts = norms.get_buffer("right3")  # of a chain: follow the one without masks, for the time when they come back
    torch.testing.assert_close(starts, norms.get_buffer("unmasked3").expand_as(starts))
    assert all(record.norm is None for record in b.composed) and b.composed_closeness.shape == (12, 5)
    whole = ll.global_bounds(model, x, 0.1, window=2, iterations=CONVERGED)
    torch.testing.assert_close(b.radius, whole.radius, rtol=1e-3, atol=0)
    torch.testing.assert_close(b.worst_logits(y), whole.worst_logits(y), rtol=1e-3, atol=1e-4)
    for bias, value in zip(biases, before, strict=True):
        bias.copy_(value)
    b = step()
    assert not all(norms.shared[3:]) and any(record.norm is not None for record in b.composed)
    step()
    assert norms.functional


def test_certificates_and_radii_take_a_window() -> None:
    model, sizes = network(8, 3, "relu", False)
    x = torch.rand(6, *sizes, generator=generator(8), dtype=torch.float64)
    plain = ll.certified_radius(model, x, max_eps=1.0)
    composed = ll.certified_radius(model, x, max_eps=1.0, window=math.inf)
    assert (composed >= plain - 5e-3).all() and (composed > plain).any()
    margins = [ll.certify(model, x, 0.01, window=w, guarantee="deterministic").margin for w in (1, math.inf)]
    assert (margins[1] > margins[0]).any() and (margins[1] >= margins[0] - 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_proved_norms_of_chains_are_above_the_true_ones(data: st.DataObject) -> None:
    """Of matrices of every kind of tests/verify_norms.py, with masks between them, some of them empty."""
    g = generator(data.draw(st.integers(0, 10**6)))
    sizes = data.draw(st.lists(st.integers(1, 24), min_size=3, max_size=6))
    kinds = sorted(DENSE.keys() - {HIDDEN})
    batch, density = 3, data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    masks = [torch.rand(batch, size, generator=g) < density for size in sizes]
    maps = [DENSE[data.draw(st.sampled_from(kinds))](g, m, n).double() for n, m in pairwise(sizes)]
    guarantee = data.draw(st.sampled_from(["probabilistic", "deterministic"]))
    linear: LinearMap = Dense(maps[0])
    for weight, mask in zip(maps[1:], masks[1:], strict=False):
        linear = composed(composed(linear, Masking(mask, weight)), Dense(weight))
    stages = []
    for i, weight in enumerate(maps):
        norm = proved_norm(Dense(weight), masks[i + 1], masks[i], batch, "deterministic", 1e-9)
        stages.append(Stage(Dense(weight), norm, absolute_norm(Dense(weight), None, None, 1)))
    found = proved_chain_norm(linear, masks[-1], masks[0], stages, guarantee, 1e-9)
    product = torch.stack([stage.norm for stage in stages]).prod(0)
    for b in range(batch):
        chain = torch.diag(masks[0][b].double())
        for weight, mask in zip(maps, masks[1:], strict=True):
            chain = mask[b].double()[:, None] * (weight @ chain)
        true = float(torch.linalg.matrix_norm(chain, 2))
        assert true - 1e-13 * float(product[b]) <= float(found[b]) <= float(product[b]) * (1 + 1e-9)
        # where less is left of a map, rounding, which counts all of it, is what is seen
        some = all(float(stage.norm[b]) >= 1e-5 * float(stage.absolute) for stage in stages)
        if some and is_of_even_size(linear) and true > 1e-4 * float(product[b]):
            assert float(found[b]) <= true * (1 + 6e-3)
        if not any(mask[b].any() for mask in masks):
            assert float(found[b]) == 0


@pytest.mark.parametrize("guarantee", ["probabilistic", "deterministic"])
def test_rounding_and_folding_are_added(guarantee: str) -> None:
    """Chains through a BatchNorm that folds."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)
    )  # fmt: skip
    model = model.double().eval().requires_grad_(False)
    x = torch.rand(4, 5, dtype=torch.float64)
    b = ll.local_bounds(model, x, 0.5, window=2, guarantee=guarantee)
    for record in b.composed:
        for k in range(len(x)):
            one = record.linear.of_samples(torch.tensor([k]))
            rows = record.row_mask[k].double()
            true = float(torch.linalg.matrix_norm(rows[:, None] * one.dense(), 2))
            assert true <= float(record.norm[k]) <= true * (1 + 2e-3)


def test_autocast_leaves_the_functional_alone() -> None:
    model, sizes = network(3, 3, "relu", True)
    model = model.float()
    x, y = torch.rand(3, *sizes, generator=generator(3)), torch.tensor([0, 1, 2])
    b = ll.local_bounds(model, x, 0.1, window=math.inf)
    expected = b.worst_logits(y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(b.worst_logits(y), expected)


def test_a_result_is_a_snapshot_with_gradients() -> None:
    """What an optimiser's step does to the weights afterwards changes nothing, and the backward pass still goes."""
    model, sizes = network(3, 3, "relu", True)
    model.requires_grad_()
    x, y = torch.rand(3, *sizes, generator=generator(3), dtype=torch.float64), torch.tensor([0, 1, 2])
    expected = ll.local_bounds(model, x, 0.1, window=2).worst_logits(y)
    b = ll.local_bounds(model, x, 0.1, window=2)
    with torch.no_grad():
        for module in model[4:]:
            for parameter in module.parameters():
                parameter.mul_(2)
    assert torch.equal(b.worst_logits(y), expected)


def test_what_composing_gains_by_the_command() -> None:
    model, sizes = network(3, 3, "clipped", True)
    model.requires_grad_()
    x, y = torch.rand(4, *sizes, generator=generator(3), dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    rows = measured.gains(model, x, y, 0.1)
    assert [row[0] for row in rows] == ["1", "2", "3", "inf"] and rows[0][1:3] == ["1.0000", "1.0000"]
    assert 0 < float(rows[-1][2]) < 1 and float(rows[-1][1]) <= float(rows[1][1]) < 1
    assert [row[0] for row in measured.steps(model, x, y, 0.1)] == ["1", "2", "3"]
