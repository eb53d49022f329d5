"""What composed norms gain on a trained network, and what they cost: the smaller the window, the nearer the product.

    python -m bench.composition RUN --data DATA_ROOT --eps 0.5 --limit 200
    python -m bench.composition RUN --data DATA_ROOT --eps 0.5 --limit 64 --step    times of a training step as well

RUN: a folder of `locallip train`. Bounds are estimates with converged norms, of the first test images; radius and gain
are relative to the product's, means over the samples and over all rival classes. A step is bounds, GloRo's loss and the
backward pass with TrainingNorms, by turns, the fastest of three.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallip_cuda as ll
from bench.report import markdown_table
from locallip_cuda.experiments import checkpoint, data, models
from locallip_cuda.experiments.network import load_model

WINDOWS = (1, 2, 3, math.inf)
ITERATIONS = 30


@torch.no_grad()
def gains(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[list[str]]:
    rows: list[list[str]] = []
    rivals = F.one_hot(y, model(x[:1]).shape[1]) == 0
    product: tuple[Tensor, Tensor] | None = None
    ll.local_bounds(model, x, eps, iterations=1)  # what the first call does alone is not timed
    for window in WINDOWS:
        started = time.perf_counter()
        b = ll.local_bounds(model, x, eps, window=window, iterations=ITERATIONS)
        gain, certified = (b.worst_logits(y) - b.logits)[rivals], b.margin(y) > 0
        seconds = time.perf_counter() - started
        product = product or (b.radius, gain)
        means = [(b.radius / product[0]).mean(), (gain / product[1]).mean()]
        shares = [(b.logits.argmax(1) == y).double().mean(), certified.double().mean()]
        each = [f"{float(t):.4f}" for t in means] + [f"{float(t):.1%}" for t in shares]
        rows.append([str(window), *each, f"{1e3 * seconds / len(x):.0f} ms"])
    return rows


def steps(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[list[str]]:
    windows, best = (1, 2, 3), [math.inf] * 3
    states = [ll.TrainingNorms(model, x, window=window) for window in windows]
    for turn in range(5):
        for i, (window, norms) in enumerate(zip(windows, states, strict=True)):
            started = time.perf_counter()
            b = ll.local_bounds(model, x, eps, norms=norms, y=y, window=window)
            ll.losses.gloro(b, y).backward()
            if turn < 2:
                norms.control(b, y)
            else:
                best[i] = min(best[i], time.perf_counter() - started)
            model.zero_grad()
    kept = [", ".join("s" if s else str(n) for n, s in zip(t.iterations, t.shared, strict=True)) for t in states]
    return [[str(w), f"{t:.2f} s", f"{t / best[0]:.2f}", k] for w, t, k in zip(windows, best, kept, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.composition", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--eps", type=float, metavar="X", help="l2 radius (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=200, metavar="N")
    parser.add_argument("--step", action="store_true")
    options = parser.parse_args()
    model, recipe, _ = load_model(options.run / checkpoint.CHECKPOINT_NAME)
    eps = recipe.eps if options.eps is None else options.eps
    dataset = data.load(models.spec(recipe.preset).data, options.data, train=False)[: options.limit]
    x, y = dataset.batch(torch.arange(len(dataset)), torch.device("cpu"))
    print(f"{recipe.network}, {len(x)} test images, radius {eps:g}\n")
    head = ["window", "radius", "gain", "clean", "certified (estimate)", "a sample"]
    print("\n".join(markdown_table(head, gains(model, x, y, eps))), flush=True)
    if options.step:
        head = ["window", "a step", "of the product's", "iterations (s: shared)"]
        print("\n" + "\n".join(markdown_table(head, steps(model.train(), x, y, eps))))


if __name__ == "__main__":
    main()
