"""Briefly trained networks for the benchmarks: mask densities and spectra of a random initialisation say nothing.

The data is synthetic and needs no download: scikit-learn's 8x8 digits, enlarged, shifted and coloured at random. The
networks train from a fixed seed by the paper's method (not by the code under test, so that they do not change with it)
and are kept in bench/.cache. They are inputs of benchmarks, not results. Only those that show how close the norms of
training stay are trained against these very norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench import paper_method
from bench.case import DEVICE
from locallip_cuda import TrainingNorms, local_bounds
from locallip_cuda.experiments import models
from locallip_cuda.experiments.objective import certified_loss
from locallip_cuda.nn import project_thresholds_

CACHE = Path(__file__).parent / ".cache"
VERSION = 1  # of what is below: a change makes new networks
CLEAN_STEPS, ROBUST_STEPS, BATCH = 150, 40, 32
# The same of the networks that are trained against this package's own norms, which do change with it.
OWN_VERSION = 4
OWN_CLEAN_STEPS, OWN_RAMP_STEPS, OWN_STEPS = 50, 200, 100
CONTROL_EVERY = 25


@dataclass(frozen=True)
class Recipe:
    """The numbers of a recipe of the paper that a training step needs.

    eps_train is where the brief training here ends; eps, at which the steps are timed, is one that the ramp-up passes
    through, chosen so that in these networks a good part of the units is constant. iterations: the published recipe's.
    fewer_iterations: with which our norms are still clearly closer to the converged ones than the published method's
    with `iterations` steps from random starts. rounds: of the translation loop. eps_hard: the published radius of
    training.
    """

    batch: int
    eps_train: float
    eps: float
    iterations: int
    fewer_iterations: int
    loss: str
    rounds: int
    eps_hard: float


RECIPES = {
    "mnist-4c3f": Recipe(
        batch=64,
        eps_train=0.3,
        eps=0.05,
        iterations=5,
        fewer_iterations=2,
        loss="gloro",
        rounds=10,
        eps_hard=1.58,
    ),
    "cifar10-6c2f": Recipe(
        batch=32,
        eps_train=0.1551,
        eps=0.02,
        iterations=2,
        fewer_iterations=1,
        loss="bcp",
        rounds=1,
        eps_hard=0.1551,
    ),
}


def images(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` synthetic images in [0, 1] of the shape that network `name` takes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = models.spec(name).input_shape
    digits = load_digits()
    pick = torch.randint(len(digits.target), (count,), generator=generator)
    small = torch.as_tensor(digits.images, dtype=torch.float32)[pick, None] / 16
    side = height - 8
    large = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    canvas = torch.zeros(count, 1, height, width)
    for i, (top, left) in enumerate(torch.randint(0, 9, (count, 2), generator=generator).tolist()):
        canvas[i, :, top : top + side, left : left + side] = large[i]
    if channels == 3:
        front, back = torch.rand(2, count, 3, 1, 1, generator=generator)
        front, back = 0.6 + 0.4 * front, 0.4 * back
        canvas = back + (front - back) * canvas
        canvas = (canvas + 0.02 * torch.randn(canvas.shape, generator=generator)).clamp(0, 1)
    return canvas, torch.as_tensor(digits.target, dtype=torch.int64)[pick]


def _train(name: str, activation: str) -> nn.Sequential:
    torch.manual_seed(0)
    recipe = RECIPES[name]
    model = models.build(name, activation).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(CLEAN_STEPS + ROBUST_STEPS):
        x, y = (t.to(DEVICE) for t in images(name, BATCH, seed=step))
        progress = max(step + 1 - CLEAN_STEPS, 0) / ROBUST_STEPS
        if progress == 0:
            loss = F.cross_entropy(model(x), y)
        else:
            bounds = paper_method.paper_bounds(model, x, progress * recipe.eps_train, 1)
            loss = (1 - progress) * F.cross_entropy(bounds.logits, y)
            loss = loss + progress * paper_method.robust_cross_entropy(bounds, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project_thresholds_(model)
    return model.cpu()


def _train_against(name: str, norms: TrainingNorms | None, model: nn.Sequential, device: torch.device) -> None:
    recipe = RECIPES[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(OWN_CLEAN_STEPS + OWN_RAMP_STEPS + OWN_STEPS):
        x, y = (t.to(device) for t in images(name, BATCH, seed=step))
        progress = min(max(step + 1 - OWN_CLEAN_STEPS, 0) / OWN_RAMP_STEPS, 1.0)
        loss = F.cross_entropy(model(x), y)
        if progress:
            given = {"iterations": recipe.iterations} if norms is None else {"norms": norms, "y": y}
            bounds = local_bounds(model, x, progress * recipe.eps_hard, **given)
            robust = certified_loss(recipe.loss, bounds, y)
            loss = (1 - progress) * F.cross_entropy(bounds.logits, y) + progress * robust
            if norms is not None and step % CONTROL_EVERY == 0:
                norms.control(bounds, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project_thresholds_(model)


@lru_cache
def trained_against(name: str, *, kept: bool, device: torch.device) -> tuple[nn.Sequential, TrainingNorms | None]:
    """A network trained by this package's own local bound at the training radius, long enough to hide from its norms.

    kept: with TrainingNorms, which come with it; else by the published recipe's number of iterations, with None. The
    first time takes about two minutes on a CPU.
    """
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}-{'kept' if kept else 'fixed'}-{OWN_VERSION}.pt"
    torch.manual_seed(0)
    model = models.build(name).to(device)
    norms = TrainingNorms(model, images(name, 1, seed=0)[0].to(device)) if kept else None
    parts = nn.ModuleDict({"model": model, **({} if norms is None else {"norms": norms})})
    if not path.exists():
        _train_against(name, norms, model, device)
        partial = path.with_suffix(".part")
        torch.save(parts.state_dict(), partial)
        partial.replace(path)
    parts.load_state_dict(torch.load(path, weights_only=True, map_location=device))
    return model, norms


@lru_cache
def trained(name: str, activation: str = "clipped-relu") -> nn.Sequential:
    """The trained network, float32 on the CPU; treat it as read-only. The first time takes about a minute on a CPU."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}-{activation}-{VERSION}.pt"
    if not path.exists():
        state = _train(name, activation).state_dict()
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(path)
    model = models.build(name, activation)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
