"""Looks at a network while it trains: at the test set by estimates, and at how close the norms of training come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import LocalBounds, local_bounds
from . import data
from .distributed import Workers
from .objective import Objective, autocast, bounds_at_rest

# Looks at the test set during training take more steps for the norms than training does: an estimate from few steps
# is too low and would certify too much. Where norms are composed they take those of training, which control holds at
# 0.99 and which no test sample was trained against.
EVALUATION_ITERATIONS = 20

# Training samples whose norms are converged after each epoch, to see how close those of training come.
CLOSENESS_SAMPLES = 16


@dataclass(frozen=True)
class Evaluation:
    """Shares of a set that are classified rightly and, by an estimate, certified; mean local Lipschitz estimate."""

    accuracy: float
    certified_estimate: float
    lipschitz_estimate: float


@torch.no_grad()
def evaluate(
    objective: Objective,
    dataset: data.Dataset,
    workers: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """A quick look at ``dataset`` at the recipe's radius: norms are estimates, nothing here is proved.

    Where norms are composed they are those of training, and so is the bound, local or global: with so many chains all
    else would take as long as an epoch. None when ``stop``, asked after every batch, says so.
    """
    workers = workers or Workers()
    recipe = objective.recipe
    device = next(objective.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    batches = data.Batches(dataset, recipe.batch_size, device=device, rank=workers.rank, world_size=workers.count)
    for x, y in batches.epoch():
        if recipe.window > 1 and objective.norms is not None:
            bounds = bounds_at_rest(objective, x, y, recipe.eps)
        else:
            bounds = _afresh(objective, x)
        correct = bounds.logits.argmax(1) == y
        certified = bounds.margin(y) > 0
        sums += torch.stack([correct.sum(), (correct & certified).sum(), bounds.lipschitz.sum()])
        if stop():
            return None
    accuracy, certified_share, lipschitz = (workers.sum(sums) / len(dataset)).tolist()
    return Evaluation(accuracy, certified_share, lipschitz)


def _afresh(objective: Objective, x: Tensor) -> LocalBounds:
    """Local bounds by norms of more iterations than those of training."""
    recipe, iterations = objective.recipe, EVALUATION_ITERATIONS
    objective.eval()
    with autocast(objective.precision, x.device):
        bounds = local_bounds(
            objective.model, x, recipe.eps, radius=recipe.radius, iterations=iterations, window=recipe.window
        )
    objective.train()
    return bounds


def closeness(objective: Objective, dataset: data.Dataset, eps: float) -> dict[str, float]:
    """How much of the true norms training at radius ``eps`` sees, on the first samples of ``dataset``.

    mean and worst_sample of the product of the layer norms; worst_layer: the mean of the layer, or the chain of maps
    that is composed, where it is least.
    """
    device = next(objective.parameters()).device
    x, y = dataset.batch(torch.arange(min(CLOSENESS_SAMPLES, len(dataset))), device)
    bounds = bounds_at_rest(objective, x, y, eps)
    layers, product = torch.cat([bounds.closeness, bounds.composed_closeness], 1), bounds.closeness.prod(1)
    found = {"mean": product.mean(), "worst_sample": product.min(), "worst_layer": layers.mean(0).min()}
    return {f"closeness_{name}": float(value) for name, value in found.items()}
