"""One training step of each variant, for the timing and the memory benchmarks of the same name.

- `ours`: local_bounds with the recipe's iterations, loss, backward, Adam.
- `ours-fewer`: the same with `fewer_iterations`; its norms are still closer to the converged ones than `paper`'s.
- `paper`: the published method as published: a forward pass of its own for the clean loss, all class pairs.
- `paper-lean`: the same method without those two (see `bench.paper_method`), as a careful user of plain PyTorch would.
- `plain`: forward, cross entropy, backward, Adam.

The loss is the recipe's: kappa * clean + (1 - kappa) * robust with kappa 1/2 for BCP, the GloRo loss alone for GloRo.
Each step is `python -m bench.step NETWORK VARIANT BATCH` too: it prints the step's peak memory on a CPU in bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import networks, paper_method
from locallip_cuda import LocalBounds, local_bounds
from locallip_cuda.experiments.objective import certified_loss

VARIANTS = ("ours", "ours-fewer", "paper", "paper-lean", "plain")


def adam(model: nn.Sequential, **options: Any) -> torch.optim.Optimizer:
    """Adam with learning rate zero: it does its arithmetic, and every round and variant meets the same weights."""
    return torch.optim.Adam(model.parameters(), lr=0.0, **options)


def batch_of(name: str, size: int) -> tuple[Tensor, Tensor]:
    """The synthetic images and labels that the steps are timed on."""
    return networks.images(name, size, seed=10**6)


def step(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    recipe: networks.Recipe,
    variant: str,
    x: Tensor,
    y: Tensor,
    compiled: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None,
) -> Callable[[], LocalBounds | paper_method.PaperBounds | None]:
    """A function that makes one training step on the batch (x, y) and returns its bounds, if any.

    compiled: torch.compile, or nothing; it gets the function that computes the loss, and then there are no bounds.
    """
    start = paper_method.random_state(model, x) if variant.startswith("paper") else None

    def combine(clean: Tensor, robust: Tensor) -> Tensor:
        return robust if recipe.loss == "gloro" else 0.5 * clean + 0.5 * robust

    def ours() -> tuple[Tensor, LocalBounds]:
        iterations = recipe.iterations if variant == "ours" else recipe.fewer_iterations
        bounds = local_bounds(model, x, recipe.eps, iterations=iterations)
        robust = certified_loss(recipe.loss, bounds, y)
        return combine(F.cross_entropy(bounds.logits, y), robust), bounds

    def paper() -> tuple[Tensor, paper_method.PaperBounds]:
        published = variant == "paper"
        clean = F.cross_entropy(model(x), y) if published else None
        bounds = paper_method.paper_bounds(model, x, recipe.eps, recipe.iterations, start)
        loss = paper_method.gloro if recipe.loss == "gloro" else paper_method.robust_cross_entropy
        robust = loss(bounds, y, recipe.rounds, all_pairs=published)
        return combine(F.cross_entropy(bounds.logits, y) if clean is None else clean, robust), bounds

    def plain() -> tuple[Tensor, None]:
        return F.cross_entropy(model(x), y), None

    both = {"ours": ours, "ours-fewer": ours, "paper": paper, "paper-lean": paper, "plain": plain}[variant]
    loss_alone = compiled(lambda: both()[0]) if compiled else None

    def one() -> LocalBounds | paper_method.PaperBounds | None:
        loss, bounds = (loss_alone(), None) if loss_alone else both()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return bounds

    return one


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_memory(name: str, variant: str, batch: int) -> int:
    """Bytes that one step on a CPU takes at its peak beyond what stands before it (weights, Adam's moments, libraries).

    It is the rise of the process's largest resident set, which counts what bypasses torch's allocator too (oneDNN's
    workspaces, the extension's own buffers), and so needs a fresh process; VmHWM, not ru_maxrss, which would start at
    the parent's. A step with a batch of two first loads the libraries and creates Adam's moments.
    """
    model = networks.trained(name)
    optimizer = adam(model)
    recipe = networks.RECIPES[name]
    step(model, optimizer, recipe, variant, *batch_of(name, 2))()
    measured = step(model, optimizer, recipe, variant, *batch_of(name, batch))
    optimizer.zero_grad()
    gc.collect()
    # Sets VmHWM back to the present; where that is not allowed, an earlier peak only makes the result larger.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS:")
    measured()
    return _resident("VmHWM:") - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Peak memory of one training step, in bytes.")
    parser.add_argument("network", choices=sorted(networks.RECIPES))
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("batch", type=int)
    arguments = parser.parse_args()
    print(peak_memory(arguments.network, arguments.variant, arguments.batch))
