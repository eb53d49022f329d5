"""This package's kept norms beside the published scheme, which stores a singular vector of every sample and layer.

    python -m bench.stored_vectors [--epochs 100] [--eps 0.5] [--seeds 3]

Trains the digits network by both, and by the plain global bound, with the same recipe, order of samples and epochs, and
prints how close the norms of training are along the way, and what converged norms certify at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import paper_method
from bench.converged import converged_norms
from locallip_cuda import LocalBounds, TrainingNorms, global_bounds, local_bounds, losses
from locallip_cuda.experiments import data, models
from locallip_cuda.experiments.recipes import Recipe, recipe
from locallip_cuda.nn import project_thresholds_

CONTROL_EVERY = 25
CHECKED = 16
LOOKS = 20

# (indices, x, y, eps, step, whether to look) -> clean logits, certified loss, and at a look the closeness of every
# layer's norm, (samples, layers)
Bounds = Callable[[Tensor, Tensor, Tensor, float, int, bool], tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class Outcome:
    """Least over the looks of the mean product, of the worst sample's and of a layer's mean; what is certified."""

    product: float
    worst: float
    layer: float
    clean: float
    certified: float
    seconds: float


def stored(model: nn.Sequential, numbers: Recipe, samples: int, example: Tensor) -> Bounds:
    """The published scheme: power iterations from where those of the same sample ended an epoch ago."""
    drawn = paper_method.random_state(model, example)
    shared = drawn.shared
    vectors = [torch.randn(samples, *start.shape[1:]) for start in shared]

    def bounds(
        index: Tensor, x: Tensor, y: Tensor, eps: float, step: int, look: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        nonlocal shared
        state = paper_method.PowerState(shared, [stored[index] for stored in vectors])
        b = paper_method.paper_bounds(model, x, eps, numbers.iterations, state)
        shared = b.state.shared
        for kept, reached in zip(vectors, b.state.per_sample, strict=True):
            kept[index] = reached
        closeness = None
        if look:
            layers = [m for m in model[:-1] if isinstance(m, nn.Conv2d | nn.Linear)]
            converged = []
            for layer, rows, columns, kept in zip(layers, b.row_masks, b.column_masks, vectors, strict=False):
                masks = (None if mask is None else mask[:CHECKED] for mask in (rows, columns))
                converged.append(converged_norms(layer, *masks, (CHECKED, *kept.shape[1:])))
            closeness = b.layer_norms[:CHECKED].detach() / torch.stack(converged, 1)
        return b.logits, paper_method.robust_cross_entropy(b, y), closeness

    return bounds


def own(
    bound: Literal["local", "global"], model: nn.Sequential, numbers: Recipe, samples: int, example: Tensor
) -> Bounds:
    """This package's local or global bound, its norms kept from step to step."""
    norms = TrainingNorms(model, example)

    def of(x: Tensor, y: Tensor, eps: float) -> LocalBounds:
        if bound == "global":
            return global_bounds(model, x, eps, norms=norms)
        return local_bounds(model, x, eps, norms=norms, y=y)

    def bounds(
        index: Tensor, x: Tensor, y: Tensor, eps: float, step: int, look: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        b, closeness = of(x, y, eps), None
        if look:
            norms.eval()
            closeness = of(x[:CHECKED], y[:CHECKED], eps).closeness
            norms.train()
        if bound == "local" and step % CONTROL_EVERY == 0:
            norms.control(b, y)
        return b.logits, losses.robust_cross_entropy(b, y), closeness

    return bounds


SCHEMES = {
    "kept (this package)": partial(own, "local"),
    "stored a sample (published)": stored,
    "global": partial(own, "global"),
}


def run(scheme: Callable[..., Bounds], numbers: Recipe) -> Outcome:
    torch.manual_seed(numbers.seed)
    model = models.build("digits", threshold=numbers.threshold_init)
    training, test = data.load("digits", train=True), data.load("digits", train=False)
    samples = len(training)
    bounds = scheme(model, numbers, samples, training.batch(torch.arange(1))[0])
    optimiser = torch.optim.Adam(model.parameters(), lr=numbers.learning_rate)
    order = torch.Generator().manual_seed(numbers.seed)
    seen: list[Tensor] = []
    started, step, steps = time.perf_counter(), 0, samples // numbers.batch_size
    for epoch in range(numbers.epochs):
        shuffled = torch.randperm(samples, generator=order)
        for number in range(steps):
            index = shuffled[number * numbers.batch_size :][: numbers.batch_size]
            now = epoch + number / steps
            kappa, eps = numbers.kappa(now), numbers.radius_at(now)
            optimiser.param_groups[0]["lr"] = numbers.learning_rate_at(now)
            x, y = training.batch(index)
            if kappa < 1:
                look = number == steps - 1 and (epoch + 1) % max(numbers.epochs // LOOKS, 1) == 0
                logits, certified, closeness = bounds(index, x, y, eps, step, look)
                loss = kappa * F.cross_entropy(logits, y) + (1 - kappa) * certified
                if closeness is not None:
                    seen.append(closeness)
            else:
                loss = F.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            project_thresholds_(model)
            step += 1
    seconds = time.perf_counter() - started
    x, y = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        b = local_bounds(model, x, numbers.eps, iterations=60)
        clean, certified = b.logits.argmax(1) == y, b.margin(y) > 0
    products = [closeness.prod(1) for closeness in seen]
    return Outcome(
        min(p.mean().item() for p in products),
        min(p.min().item() for p in products),
        min(closeness.mean(0).min().item() for closeness in seen),
        clean.float().mean().item(),
        certified.float().mean().item(),
        seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--eps", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print("| norms | seed | least mean product | least worst sample | least layer | clean | certified | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for seed in range(arguments.seeds):
        numbers = recipe("digits").replace(epochs=arguments.epochs, eps=arguments.eps, eps_train=arguments.eps)
        numbers = numbers.replace(seed=seed, iterations=4)
        for name, scheme in SCHEMES.items():
            o = run(scheme, numbers)
            figures = f"{o.product:.3f} | {o.worst:.3f} | {o.layer:.3f} | {o.clean:.1%} | {o.certified:.1%}"
            print(f"| {name} | {seed} | {figures} | {o.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
