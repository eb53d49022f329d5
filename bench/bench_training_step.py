"""One whole training step by the paper's recipes: mnist-4c3f (GloRo, 5 iterations), cifar10-6c2f (BCP, 2 iterations).

Variants: see `bench.step`; `paper compiled` is `paper` under torch.compile. One Adam a variant, on a GPU in its
capturable form. `closeness_*` compares every layer norm of the first samples, and `lipschitz_closeness` their product,
with the converged norms under the same masks. A materialised variant does not exist: one masked convolution of
cifar10-6c2f alone is a 32768 x 32768 matrix a sample.

Counted are the operators, A_l its flops for the batch, L without the last. Plain: forward, and backward for the weight
and, but for the first, the input. Ours: clean value, box centre, half-width and row norms through every operator (clean
value alone through the first, which also needs no gradient of its input), each with a gradient of weight and input (row
norms: of the weight); 2 iterations + 1 applications for the norm, and its gradient. The published method is not
counted: it does whatever it does.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import networks, step
from bench.case import Case, Setting, Variant
from bench.converged import closeness, converged_norms
from bench.paper_method import PaperBounds
from locallip_cuda import LocalBounds
from locallip_cuda.experiments import models

CHECKED = 4
LEAST_CLOSENESS = 0.9  # of all norms, on average


def cases(setting: Setting) -> Iterator[Case]:
    for name in ("cifar10-6c2f", "mnist-4c3f"):  # the targets' first: a run can be cut short
        for precision in ("float32", "tf32") if setting.gpu else ("float32",):
            # mnist-4c3f's ten rounds of the translation loop would take minutes to compile
            compiled = setting.gpu and precision == "float32" and name == "cifar10-6c2f"
            labels = [*step.VARIANTS, *["paper compiled"] * compiled]
            yield Case("training_step", name, labels, partial(build, setting, name), precision)


def build(setting: Setting, name: str) -> dict[str, Variant]:
    """Trained networks, on synthetic images (`bench.networks`)."""
    recipe = networks.RECIPES[name]
    if setting.tiny:
        recipe = replace(recipe, iterations=1, rounds=1)
        model, x, y = models.build("digits"), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    else:
        model = copy.deepcopy(networks.trained(name))
        x, y = step.batch_of(name, setting.batch(recipe.batch))
    model, x, y = model.to(setting.device), x.to(setting.device), y.to(setting.device)
    adam = {"capturable": True} if setting.device.type == "cuda" else {}
    counts = flops(model, x, recipe)

    def check(least: float | None, bounds: Any) -> tuple[dict[str, float], bool | None]:
        if bounds is None:
            return {}, None
        facts = quality(model, x, bounds)
        return facts, None if least is None else facts["closeness_mean"] > least

    def variant(kind: str, how: Callable[..., Any] | None = None) -> Variant:
        return Variant(
            step.step(model, step.adam(model, **adam), recipe, kind, x, y, how),
            len(x),
            counts.get(kind),
            # fewer iterations than the recipe has promise nothing
            check=partial(check, (0 if setting.tiny else LEAST_CLOSENESS) if kind == "ours" else None),
            capture=not kind.startswith("paper"),  # the published translation loop waits for the device
            peak=None if setting.tiny else partial(peak_bytes, name, kind, len(x)),
        )

    return {**{kind: variant(kind) for kind in step.VARIANTS}, "paper compiled": variant("paper", setting.compile)}


def flops(model: nn.Sequential, x: Tensor, recipe: networks.Recipe) -> dict[str, float]:
    applied: list[float] = []  # of one application, by operator
    value = x
    with torch.no_grad():
        for module in model:
            value = module(value)
            if isinstance(module, nn.Linear | nn.Conv2d):
                applied.append(2.0 * value.numel() * module.weight[0].numel())

    def ours(iterations: int) -> float:
        norms = 2 * iterations + 2
        return (2 + norms) * applied[0] + (3 * 3 + 2 + norms) * sum(applied[1:-1]) + 3 * applied[-1]

    return {
        "plain": 2 * applied[0] + 3 * sum(applied[1:]),
        "ours": ours(recipe.iterations),
        "ours-fewer": ours(recipe.fewer_iterations),
    }


def quality(model: nn.Sequential, x: Tensor, bounds: LocalBounds | PaperBounds) -> dict[str, float]:
    """Closeness of all layer norms to the converged ones under the bounds' own masks, and the mean Lipschitz bound.

    x: what the bounds are of; the first samples are compared.
    """
    operators = [m for m in list(model)[:-1] if isinstance(m, nn.Conv2d | nn.Linear)]
    # LocalBounds lists the masks of outputs; PaperBounds those of inputs, the network's own input (None) first.
    columns: list[Tensor | None]
    columns = list(bounds.column_masks[:-1]) if isinstance(bounds, PaperBounds) else [None, *bounds.column_masks[:-1]]
    shapes, value = [], x[:CHECKED]
    with torch.no_grad():
        for module in list(model)[:-1]:
            if isinstance(module, nn.Conv2d | nn.Linear):
                shapes.append(value.shape)
            value = module(value)
    converged = [
        converged_norms(
            layer,
            None if rows is None else rows[:CHECKED],
            None if cols is None else cols[:CHECKED].reshape(shape),
            shape,
        )
        for layer, rows, cols, shape in zip(operators, bounds.row_masks, columns, shapes, strict=True)
    ]
    facts = closeness(bounds.layer_norms[:CHECKED], torch.stack(converged, 1))
    lipschitz = bounds.lipschitz[:CHECKED].double() / torch.stack(converged, 1).prod(1)
    return {
        **facts,
        "lipschitz_closeness": lipschitz.mean().item(),
        "lipschitz_mean": bounds.lipschitz.mean().item(),
    }


def peak_bytes(name: str, variant: str, batch: int) -> int:
    """See `bench.step.peak_memory`; the allocator is told to give freed memory back at once."""
    allocator = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.step", name, variant, str(batch)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=os.environ | allocator, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_training_step(turn: Callable[[], None]) -> None:
    turn()
