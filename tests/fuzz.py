"""Certificates of random networks against points of their balls: local and global, with both guarantees, every
execution, radius and window.

    python -m tests.fuzz                        2000 networks, as many as an hour and a half allows
    python -m tests.fuzz --seed S --networks 1  one network again

The oracle is the network in rational numbers (:mod:`exact`) where it is piecewise linear, elsewhere float64 with room
for its rounding. A margin must hold at every point: of the real network, and of what ``model(x')`` computes where the
certificate speaks of that.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import secrets
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from exact import evaluate, inside_ball
from test_random_graphs import ACTIVATIONS, MOVES, SIDE, RandomGraph

import locallip_cuda as ll

GUARANTEES = ("probabilistic", "deterministic")
EXECUTIONS = ("real", "float64", "float32")
SMOOTH = {"gelu", "tanh"}


def random_network(rng: random.Random) -> tuple[RandomGraph, bool]:
    """A network in float32 or float64, and whether it is piecewise linear."""
    names = [name for name in ACTIVATIONS if name not in SMOOTH]
    smooth = rng.random() < 0.2
    names += sorted(SMOOTH) if smooth else []
    kinds = ["conv", "conv", "act", "act", "move", "sum", "cat"]
    steps: list[tuple[object, ...]] = []
    for _ in range(rng.randint(2, 7)):
        kind, of = rng.choice(kinds), rng.randint(0, 6)
        steps.append(
            {
                "conv": ("conv", of, rng.choice([1, 3]), rng.choice([1, 2])),
                "act": ("act", of, rng.choice([*names, "relu"])),
                "move": ("move", of, rng.choice(sorted(MOVES))),
                "sum": ("sum", of, rng.randint(0, 6), rng.random() < 0.5),
                "cat": ("cat", of, rng.randint(0, 6)),
            }[kind]
        )
    model = RandomGraph(steps, rng.randrange(2**31)).eval().requires_grad_(False)
    spread = rng.choice([0, 1, 6, 30])
    for layer in [*model.convs.values(), model.head]:
        layer.weight *= 10 ** rng.uniform(-spread, spread)  # type: ignore[operator]
        layer.bias *= 10 ** rng.uniform(-spread, spread)  # type: ignore[operator]
        if rng.random() < 0.2:
            layer.weight *= (torch.rand(layer.weight.shape) < 0.5).double()  # type: ignore[operator, arg-type]
    return (model.float() if rng.random() < 0.8 else model), not smooth


def points(model: nn.Module, x: Tensor, eps: float, rng: random.Random) -> Iterator[Tensor]:
    """Numbers of x's type inside the ball: at random, and where the best rival gains."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    double = copy.deepcopy(model).double()
    for k in range(8):
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        if k % 2:
            at = x.double().clone().requires_grad_()
            logits = double(at)
            top = logits.topk(2, 1).values
            (slope,) = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), at)
            if bool(slope.isfinite().all()) and bool((slope != 0).any()):
                step = slope / slope.abs().max() + 0.1 * (k - 1) * step / step.norm()
        point = (x.double() + (1 - 1e-6) * eps * step / step.norm()).to(x.dtype)
        if inside_ball(point, x, eps):
            yield point


def real_logits(model: nn.Module, point: Tensor, exactly: bool) -> tuple[list[Fraction], Fraction]:
    """The real network's, and what they may be off by."""
    if exactly:
        return [Fraction(int(v.p), int(v.q)) for v in evaluate(model, point[0])], Fraction(0)
    logits = copy.deepcopy(model).double()(point.double())[0]
    return fractions(logits), Fraction(1e-9 * (1 + float(logits.abs().max())))


def fractions(logits: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in logits.double().tolist()]


def gap(logits: list[Fraction], label: int) -> Fraction:
    return logits[label] - max(v for j, v in enumerate(logits) if j != label)


def trial(seed: int) -> int:
    """How many certificates of the network with this number were tried against points; AssertionError where one is
    wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, exactly = random_network(rng)
    dtype = model.head.weight.dtype
    x = torch.rand(1, 2, SIDE, SIDE, dtype=dtype) * 10 ** rng.uniform(-2, 1)
    eps = 10 ** rng.uniform(-4, 0.3)
    more, bounds = {"window": rng.choice([1, 1, 2, math.inf])}, rng.choice([ll.local_bounds] * 3 + [ll.global_bounds])
    if more["window"] == 1 and bounds is ll.local_bounds and rng.random() < 0.2:
        more = {"radius": "global"}  # type: ignore[dict-item]
    among, exact_gaps = list(points(model, x, eps, rng)), {}
    count = 0
    for guarantee in GUARANTEES:
        for execution in EXECUTIONS:
            if execution == "float32" and dtype != torch.float32:
                continue
            try:
                b = bounds(model, x, eps, guarantee=guarantee, execution=execution, **more)  # type: ignore[operator]
            except ll.UnsupportedModuleError:  # factors too far apart for a proof, say
                continue
            label, margin = int(b.logits.argmax()), float(b.margin()[0])
            if math.isnan(margin) or margin == -math.inf:
                continue
            count += 1
            what = f"seed {seed}, {bounds.__name__}, {guarantee}, {execution}, {more}: margin {margin}"
            for k, point in enumerate(among):
                if (k, label) not in exact_gaps:
                    logits, off = real_logits(model, point, exactly)
                    exact_gaps[k, label] = gap(logits, label) + off
                assert exact_gaps[k, label] >= Fraction(margin), f"{what}, real gap {float(exact_gaps[k, label])}"
                if execution != "real":
                    run = model if execution == str(dtype)[6:] else copy.deepcopy(model).double()
                    computed = run(point.to(next(run.parameters()).dtype))[0]
                    assert bool(computed.isfinite().all()), f"{what}, computed {computed.tolist()}"
                    found = gap(fractions(computed), label)
                    assert found >= Fraction(margin), f"{what}, computed gap {float(found)}"
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", type=int, default=2000, metavar="N")
    parser.add_argument("--seconds", type=float, default=5400, metavar="X", help="at most (default: %(default)g)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first network; the others follow")
    options = parser.parse_args()
    first = secrets.randbits(40) if options.seed is None else options.seed
    torch.set_num_threads(1)  # of numbers so small several threads only wait for each other
    print(f"seeds from {first}", flush=True)
    started, certificates, done, wrong = time.monotonic(), 0, 0, 0
    for seed in range(first, first + options.networks):
        if time.monotonic() - started > options.seconds:
            break
        try:
            certificates += trial(seed)
        except AssertionError as error:
            wrong += 1
            print(f"WRONG: {error}", flush=True)
        done += 1
    took = time.monotonic() - started
    print(f"{done} networks, {certificates} certificates against points of their balls, {wrong} wrong, {took:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
