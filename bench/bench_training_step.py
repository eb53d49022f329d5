"""One whole training step by the paper's recipes: mnist-4c3f (GloRo, 5 iterations), cifar10-6c2f (BCP, 2 iterations).

Variants and their peak memory: see `bench.step`. `closeness_*` compares every layer norm of the first samples, and
`lipschitz_closeness` their product, with the converged norms under the same masks. A materialised variant does not
exist: one masked convolution of cifar10-6c2f alone is a 32768 x 32768 matrix a sample.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import networks, step
from bench.paper_method import PaperBounds
from bench.support import DEVICE, closeness, converged_norms, interleaved, measure
from locallip_cuda import LocalBounds

CHECKED = 4
CASES = {name: step.VARIANTS for name in networks.RECIPES}


@lru_cache(maxsize=1)
def network(name: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = networks.trained(name).to(DEVICE)
    return model, step.adam(model)


def batch_size(name: str) -> int:
    return 256 if DEVICE.type == "cuda" else networks.RECIPES[name].batch


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


def peak_bytes(name: str, variant: str) -> int:
    """See `bench.step.peak_memory`; the allocator is told to give freed memory back at once."""
    allocator = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.step", name, variant, str(batch_size(name))]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=os.environ | allocator, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.parametrize(("case", "repeat", "variant"), interleaved(CASES))
def test_training_step(benchmark: Any, case: str, repeat: int, variant: str) -> None:
    model, optimizer = network(case)
    x, y = step.batch_of(case, batch_size(case))
    call = step.step(model, optimizer, networks.RECIPES[case], variant, x, y)
    facts: dict[str, float] = {}
    if repeat == 0:
        bounds = call()
        facts = {"peak_bytes": peak_bytes(case, variant)}
        if bounds is not None:
            facts |= quality(model, x, bounds)
    measure(
        benchmark,
        call,
        op="training_step",
        case=case,
        variant=variant,
        repeat=repeat,
        samples=batch_size(case),
        **facts,
    )
