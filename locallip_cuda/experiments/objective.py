"""The training loss of a recipe as one module, the precision it is computed in, and what it tells of a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..bounds import LocalBounds, global_bounds, local_bounds
from ..propagation.estimate import GLOBAL_ITERATIONS
from ..propagation.training_norms import TrainingNorms
from . import models
from .recipes import Recipe

PRECISIONS = ("fp32", "tf32", "bf16")

CERTIFIED_LOSSES: dict[str, Callable[[LocalBounds, Tensor], Tensor]] = {
    "bcp": losses.robust_cross_entropy,
    "gloro": losses.gloro,
    "lmt": losses.lipschitz_margin,
    "emma": losses.emma,
    "crm": losses.crm,
}

STATISTICS = (
    "samples",
    "loss",
    "clean",
    "correct",
    "bounded",
    "robust",
    "sparsity",
    "certified_estimate",
    "lipschitz_estimate",
)


def set_precision(precision: str, device: torch.device) -> None:
    """Let float32 products round to TF32, or not. ValueError for an unknown precision, and for tf32 without a GPU."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision is 'tf32' on {device}; only GPUs have it")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a network and its bounds are computed with ``precision``."""
    # Without the cache of cast weights, which a CUDA graph must not find filled.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext()


def certified_loss(kind: str, bounds: LocalBounds, y: Tensor) -> Tensor:
    """The certified loss ``kind`` (one of ``recipes.LOSSES``), a scalar."""
    return CERTIFIED_LOSSES[kind](bounds, y)


class Objective(nn.Module):
    """The training loss of a recipe as a module: forward(x, y, eps, kappa) -> (loss, statistics).

    loss = kappa * CE(clean) + (1 - kappa) * (certified loss + sparse * sparsity loss). That the bounds are computed in
    here, on the wrapped parameters, is what lets DistributedDataParallel see them. At kappa = 1 only the clean logits
    are needed, and no bound is computed; a kappa that is a tensor, float64, is taken to be below 1 without a look at
    it. The statistics are sums over the batch, in the order of ``STATISTICS``, float64 on x's device.

    Attributes:
        bound: "local", or "global" for the plain global bound in the certified loss.
        norms: the state of the norms where the recipe leaves their iterations open, None otherwise.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.precision = precision
        self.bound = "local"
        self.train()
        first = next(model.parameters()).new_zeros(1, *models.spec(recipe.preset).input_shape)
        self.norms = None if recipe.iterations else TrainingNorms(model, first, window=recipe.window)

    def train(self, mode: bool = True) -> Objective:
        """As for any module, but that BatchNorm keeps its statistics: those of a batch have no bound."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def bounds(self, x: Tensor, y: Tensor, eps: float | Tensor) -> LocalBounds:
        """What the certified loss is of."""
        recipe = self.recipe
        if self.bound == "global":
            iterations = max(recipe.iterations, GLOBAL_ITERATIONS) if self.norms is None else None
            return global_bounds(self.model, x, eps, iterations=iterations, norms=self.norms, window=recipe.window)
        return local_bounds(
            self.model,
            x,
            eps,
            radius=recipe.radius,
            iterations=recipe.iterations if self.norms is None else None,
            norms=self.norms,
            y=y,
            window=recipe.window,
        )

    def launches(self) -> Hashable:
        """What decides which kernels a step with bounds launches."""
        return self.bound, None if self.norms is None else self.norms.launches()

    def forward(self, x: Tensor, y: Tensor, eps: float | Tensor, kappa: float | Tensor) -> tuple[Tensor, Tensor]:
        recipe, count = self.recipe, x.shape[0]

        def number(value: float) -> Tensor:  # filled in on the device: a copy from the host would wait for it
            return torch.full((), value, dtype=torch.float64, device=x.device)

        bounded = isinstance(kappa, Tensor) or kappa < 1
        clean_weight = kappa if isinstance(kappa, Tensor) else number(kappa)
        robust = sparsity = certified = lipschitz = zero = number(0)
        with autocast(self.precision, x.device):
            if bounded:
                bounds = self.bounds(x, y, eps)
                logits = bounds.logits
            else:
                logits = self.model(x)
        clean = F.cross_entropy(logits.float(), y)
        loss = clean_weight.to(clean) * clean
        if bounded:
            robust_weight = 1 - clean_weight
            robust = certified_loss(recipe.loss, bounds, y)
            loss = loss + robust_weight.to(robust) * robust
            if recipe.sparse:
                sparsity = losses.sparsity(bounds, recipe.threshold_weight)
                loss = loss + (robust_weight * recipe.sparse).to(sparsity) * sparsity
            with torch.no_grad():
                certified = (bounds.margin(y) > 0).sum()
                lipschitz = bounds.lipschitz.sum()
        correct = (logits.detach().argmax(1) == y).sum()
        samples = number(count)
        means = (loss * count, clean * count, correct, samples if bounded else zero, robust * count, sparsity * count)
        statistics = torch.stack([s.detach().double() for s in (samples, *means, certified, lipschitz)])
        return loss, statistics


@torch.no_grad()
def bounds_at_rest(objective: Objective, x: Tensor, y: Tensor, eps: float) -> LocalBounds:
    """The bounds of a training step, which leave the state of its norms as it is."""
    objective.eval()
    with autocast(objective.precision, x.device):
        bounds = objective.bounds(x, y, eps)
    objective.train()
    return bounds


def means_of(totals: Sequence[float]) -> dict[str, float]:
    """Means over the samples; those of the bound over the samples that had one (none in the warm-up)."""
    sums = dict(zip(STATISTICS, totals, strict=True))
    names = {"loss": "loss", "clean": "clean", "accuracy": "correct"}
    means = {name: sums[of] / max(sums["samples"], 1) for name, of in names.items()}
    bounded = {
        name: sums[name] / max(sums["bounded"], 1)
        for name in ("robust", "sparsity", "certified_estimate", "lipschitz_estimate")
    }
    return {**means, **bounded}
