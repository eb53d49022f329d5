"""How close the norms of training stay on networks trained against them, at the training radius, and what a step costs.

- `ours`: norms kept from step to step, iterations under control (`TrainingNorms`), on a network so trained.
- `ours-bfloat16`: the same under autocast to bfloat16.
- `fixed`: the published recipe's number of iterations from the global singular vector, on a network so trained.
- `paper`, `plain`: the published method and plain training (`bench.step`), on the network of `ours`.

Facts: `closeness_mean`, `closeness_min` over the first samples' products of layer norms by the converged ones, under
their own masks; `layer`, of the layer where the mean is least; `shared`, how many layers have one norm for all samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import networks, step
from bench.case import Case, Setting, Variant
from locallip_cuda import LocalBounds, TrainingNorms, local_bounds
from locallip_cuda.experiments import models
from locallip_cuda.experiments.objective import certified_loss

CHECKED = 16


def cases(setting: Setting) -> Iterator[Case]:
    for name in networks.RECIPES:
        yield Case(
            "closeness", name, ("ours", "ours-bfloat16", "fixed", "paper", "plain"), partial(build, setting, name)
        )


def build(setting: Setting, name: str) -> dict[str, Variant]:
    recipe = networks.RECIPES[name]
    model, _, x, y = subject(setting, name, kept=True)
    recipe = dataclasses.replace(
        recipe, eps=recipe.eps_hard, **({"iterations": 1, "rounds": 1} if setting.tiny else {})
    )
    others = {
        kind: Variant(step.step(model, step.adam(model), recipe, kind, x, y), len(x), capture=False)
        for kind in ("paper", "plain")
    }
    return {
        "ours": variant(setting, name, kept=True),
        "ours-bfloat16": variant(setting, name, kept=True, bfloat16=True),
        "fixed": variant(setting, name, kept=False),
        **others,
    }


def subject(
    setting: Setting, name: str, *, kept: bool
) -> tuple[nn.Sequential, TrainingNorms | None, torch.Tensor, torch.Tensor]:
    """Network, norms, and a batch."""
    if setting.tiny:
        model, x, y = models.build("digits").to(setting.device), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        norms = TrainingNorms(model, x[:1].to(setting.device)) if kept else None
    else:
        model, norms = networks.trained_against(name, kept=kept, device=setting.device)
        x, y = step.batch_of(name, setting.batch(networks.RECIPES[name].batch))
    return model, norms, x.to(setting.device), y.to(setting.device)


def variant(setting: Setting, name: str, *, kept: bool, bfloat16: bool = False) -> Variant:
    recipe = networks.RECIPES[name]
    model, norms, x, y = subject(setting, name, kept=kept)
    optimizer = step.adam(model)

    def bounds(count: int) -> LocalBounds:
        given: dict[str, Any] = {"iterations": recipe.iterations} if norms is None else {"norms": norms, "y": y[:count]}
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=bfloat16):
            return local_bounds(model, x[:count], recipe.eps_hard, **given)

    def call() -> None:
        b = bounds(len(x))
        robust = certified_loss(recipe.loss, b, y)
        optimizer.zero_grad()
        (robust if recipe.loss == "gloro" else 0.5 * F.cross_entropy(b.logits, y) + 0.5 * robust).backward()
        optimizer.step()

    def check(_: None) -> tuple[dict[str, float], None]:
        if norms is not None:
            norms.eval()
        layers = bounds(CHECKED).closeness
        product = layers.prod(1)
        facts = {"closeness_mean": product.mean().item(), "closeness_min": product.min().item()}
        facts |= {"layer": layers.mean(0).min().item(), "shared": float(sum(norms.shared) if norms else 0)}
        if norms is not None:
            norms.train()
        return facts, None

    return Variant(call, len(x), check=check, capture=False)


def test_closeness(turn: Callable[[], None]) -> None:
    turn()
