"""How close the norms of training stay on networks trained against them, at the training radius, and what a step costs.

- `ours`: norms kept from step to step, iterations under control (`TrainingNorms`), on a network so trained.
- `fixed`: the published recipe's number of iterations from the global singular vector, on a network so trained.

Facts: `closeness_mean`, `closeness_min` over the first samples' products of layer norms by the converged ones, under
their own masks; `layer`, of the layer where the mean is least; `shared`, how many layers have one norm for all samples.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F

from bench import networks, step
from bench.support import DEVICE, interleaved, measure
from locallip_cuda import LocalBounds, local_bounds
from locallip_cuda.experiments.objective import certified_loss

CHECKED = 16
CASES = {name: ("ours", "fixed") for name in networks.RECIPES}


@pytest.mark.parametrize(("case", "repeat", "variant"), interleaved(CASES))
def test_closeness(benchmark: Any, case: str, repeat: int, variant: str) -> None:
    recipe = networks.RECIPES[case]
    model, norms = networks.trained_against(case, kept=variant == "ours")
    optimizer = step.adam(model)
    x, y = step.batch_of(case, recipe.batch if DEVICE.type == "cpu" else 256)

    def bounds(count: int) -> LocalBounds:
        given: dict[str, Any] = {"iterations": recipe.iterations} if norms is None else {"norms": norms, "y": y[:count]}
        return local_bounds(model, x[:count], recipe.eps_hard, **given)

    def call() -> None:
        b = bounds(len(x))
        robust = certified_loss(recipe.loss, b, y)
        optimizer.zero_grad()
        (robust if recipe.loss == "gloro" else 0.5 * F.cross_entropy(b.logits, y) + 0.5 * robust).backward()
        optimizer.step()

    facts: dict[str, float] = {}
    if repeat == 0:
        if norms is not None:
            norms.eval()
        layers = bounds(CHECKED).closeness
        product = layers.prod(1)
        facts = {"closeness_mean": product.mean().item(), "closeness_min": product.min().item()}
        facts |= {"layer": layers.mean(0).min().item(), "shared": float(sum(norms.shared) if norms else 0)}
        if norms is not None:
            norms.train()
    measure(benchmark, call, op="closeness", case=case, variant=variant, repeat=repeat, samples=len(x), **facts)
