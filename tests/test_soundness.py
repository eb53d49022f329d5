"""Proved bounds, and estimates with converged norms, against attacks on each of their statements: no point of the ball
may break one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import pytest
import torch
from helpers import ACTIVATIONS, DEVICES, ZOO, generator, zoo_input
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda import attack

pytestmark = pytest.mark.parametrize("device", DEVICES)
Radius = Literal["local", "global"]
SLACK = 1e-7
CONVERGED = 100
PROOFS = ["probabilistic", "deterministic"]


def column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1))


def project(delta: Tensor, eps: Tensor) -> Tensor:
    return delta * column((eps / delta.flatten(1).norm(dim=1).clamp_min(1e-300)).clamp(max=1), delta)


def random_points(x: Tensor, eps: Tensor, count: int) -> Iterator[Tensor]:
    """On the sphere, with some of them sparse, and inside the ball."""
    g = generator(11)
    for k in range(count):
        delta = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)
        if k % 3 == 0:
            delta = torch.where(torch.rand(x.shape, generator=g).to(x.device) < 0.1, delta, 0)
        delta = project(1e6 * delta, eps)
        yield x + (delta if k % 2 else delta * column(torch.rand(len(x), generator=g).to(x), x))


def ascend(objective: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Normalised gradient ascent on objective(points) (B,) in the ball, from a random point; every point on the way."""
    delta = project(1e6 * torch.randn(x.shape, generator=generator(seed), dtype=torch.float64).to(x), eps)
    for k in range(steps):
        with torch.enable_grad():
            point = (x + delta).requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(point).sum(), point)
        unit = gradient / column(gradient.flatten(1).norm(dim=1).clamp_min(1e-300), x)
        delta = project(delta + column(eps, x) * unit / (2 + 0.5 * k), eps)
        yield x + delta


class Judge:
    """Checks points against bounds, and keeps how near they came."""

    def __init__(self, model: nn.Module, x: Tensor, bounds: list[ll.LocalBounds]) -> None:
        self.model, self.x, self.bounds = model, x, bounds
        classes = bounds[0].logits.shape[1]
        # [b, y, j]: the most that logit j minus logit y can become
        self.worst = []
        self.safe = []  # [b, y]: certified for label y
        for b in bounds:
            labels = [torch.full((len(x),), y, device=x.device) for y in range(classes)] if classes > 1 else []
            if not labels:
                self.worst.append(b.upper.new_full((len(x), 1, 1), torch.inf))
                self.safe.append(torch.zeros(len(x), 1, dtype=torch.bool))
                continue
            self.worst.append(torch.stack([b.worst_logits(y) for y in labels], 1) - b.logits.unsqueeze(2))
            self.safe.append(torch.stack([b.margin(y) > 0 for y in labels], 1))
        self.reached_radius = self.reached_box = self.reached_margin = 0.0
        self.points = 0

    @torch.no_grad()
    def __call__(self, points: Iterator[Tensor]) -> None:
        for point in points:
            self.points += 1
            features, logits = features_of(self.model, point), self.model(point)
            difference = logits.unsqueeze(1) - logits.unsqueeze(2)
            others = logits.argmax(1, keepdim=True) != torch.arange(logits.shape[1], device=point.device)
            for b, worst, safe in zip(self.bounds, self.worst, self.safe, strict=True):
                moved = (features - b.features).norm(dim=1)
                scale = 1 + b.radius
                assert (moved <= b.radius + SLACK * scale).all(), "the features leave the ball"
                assert (features >= b.lower - SLACK * column(scale, features)).all(), "a feature is below its box"
                assert (features <= b.upper + SLACK * column(scale, features)).all(), "a feature is above its box"
                assert (difference <= worst + SLACK * (1 + worst.abs())).all(), "a logit difference is past its margin"
                assert not (safe & others).any(), "a certified sample falls"
            b, worst = self.bounds[0], self.worst[0]
            moved = (features - b.features).norm(dim=1)
            self.reached_radius = max(self.reached_radius, float((moved / b.radius).max()))
            half = (b.upper - b.lower) / 2
            share = (features - (b.upper + b.lower) / 2).abs() / half.clamp_min(1e-9)
            self.reached_box = max(self.reached_box, float(share.max()))
            clean = b.logits.unsqueeze(1) - b.logits.unsqueeze(2)
            room = worst - clean
            gained = (difference - clean) / room.clamp_min(1e-9)
            self.reached_margin = max(self.reached_margin, float(gained.max()))


def features_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the last layer takes: a bound of a ball without a radius knows the clean values."""
    return ll.global_bounds(model, x, 0.0, iterations=0).features


def judge_everything(model: nn.Module, x: Tensor, eps: Tensor, *, steps: int, units: int, count: int) -> Judge:
    radii: tuple[Radius, Radius] = ("local", "global")
    with torch.no_grad():
        bounds = [ll.local_bounds(model, x, eps, radius=r, iterations=CONVERGED) for r in radii]
        bounds.append(ll.local_bounds(model, x, eps, iterations=CONVERGED, window=math.inf))
        if not any(isinstance(module, nn.Softplus) for module in model.modules()):
            bounds += [ll.local_bounds(model, x, eps, radius=r, guarantee=g) for r in radii for g in PROOFS]
            bounds += [ll.local_bounds(model, x, eps, window=math.inf, guarantee=g) for g in PROOFS]
            bounds += [ll.global_bounds(model, x, eps, window=w, guarantee=g) for w in (1, math.inf) for g in PROOFS]
    judge = Judge(model, x, bounds)
    features, clean = partial(features_of, model), bounds[0].features
    classes = bounds[0].logits.shape[1]
    judge(random_points(x, eps, count))
    judge(ascend(lambda p: (features(p) - clean).square().sum(1), x, eps, steps, 0))
    chosen = torch.randperm(clean.shape[1], generator=generator(3))[:units].tolist()
    for k in chosen:
        for sign in (1, -1):
            judge(ascend(lambda p, k=k, sign=sign: sign * features(p)[:, k], x, eps, steps // 2, k))
    prediction = bounds[0].logits.argmax(1)
    for shift in range(1, classes):
        other = (prediction + shift) % classes

        def gain(p: Tensor, other: Tensor = other) -> Tensor:
            logits = model(p)
            rows = torch.arange(len(p), device=p.device)
            return logits[rows, other] - logits[rows, prediction]

        judge(ascend(gain, x, eps, steps, shift))
    g = torch.Generator().manual_seed(5)
    if classes == 1:
        return judge
    judge(iter([attack.pgd(model, x, prediction, eps, steps=30, generator=g)]))
    return judge


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_trained_network(
    activation: str, eps: float, device: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> None:
    model, x = copy.deepcopy(trained(activation)).to(device), digits[0][:16].to(device)
    each = torch.full((len(x),), eps, dtype=torch.float64, device=device)
    each[::3] *= 0.5
    judge = judge_everything(model, x, each, steps=8, units=4, count=40)
    # the attacks come near: bounds that were a fifth too small would not have passed
    assert judge.reached_radius > 0.2, judge.reached_radius
    assert judge.reached_box > 0.3, judge.reached_box
    assert judge.reached_margin > 0.3, judge.reached_margin
    certified = judge.bounds[0].margin() > 0
    assert certified.any()


@pytest.mark.parametrize("name", ZOO)
def test_every_module(name: str, device: str) -> None:
    model, x = copy.deepcopy(ZOO[name][0]).to(device).requires_grad_(False), zoo_input(name, 6, device)
    eps = torch.tensor([0.01, 0.05, 0.1, 0.3, 1.0, 3.0], dtype=torch.float64, device=device)
    judge_everything(model, x, eps, steps=10, units=4, count=40)


@pytest.mark.parametrize("activation", ["clipped-relu", "clipped-maxmin"])
def test_single_precision_estimate_holds_too(
    activation: str, device: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> None:
    """Training's arithmetic: converged float32 bounds are those of float64 to a few digits."""
    model, x = copy.deepcopy(trained(activation)).to(device), digits[0][:24].to(device)
    double = ll.local_bounds(model, x, 0.1, iterations=CONVERGED)
    single = ll.local_bounds(copy.deepcopy(model).float(), x.float(), 0.1, iterations=CONVERGED)
    for field in ("radius", "lower", "upper", "logits"):
        torch.testing.assert_close(getattr(single, field).double(), getattr(double, field), rtol=1e-3, atol=1e-3)


def test_the_judge_finds_bounds_that_are_too_small(
    device: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> None:
    model, x = copy.deepcopy(trained("clipped-relu")).to(device), digits[0][:8].to(device)
    b = ll.local_bounds(model, x, 0.05, iterations=CONVERGED)
    wide = torch.full((8,), 0.5, dtype=torch.float64, device=device)
    judge = Judge(model, x, [b])
    with pytest.raises(AssertionError, match="the features leave the ball"):
        judge(ascend(lambda p: (model[:-1](p) - b.features).square().sum(1), x, wide, 10, 0))
