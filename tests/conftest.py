from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.experiments import models
from locallip_cuda.nn import project_thresholds_

# Most tests are thousands of tiny calls: on a machine that is busy, or gives a process less than it shows, threads that
# wait for one another make them ten times slower. test_threads.py is about more than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """300 images (300, 1, 8, 8), float64 in [0, 1], that `trained` has not seen, and their labels."""
    images, labels = _digits()
    return images[-300:].double(), labels[-300:]


@pytest.fixture(scope="session")
def trained() -> Callable[[str], nn.Sequential]:
    """The digits network with the named activation, float64 on the CPU, briefly trained, shared: do not change it.

    Random weights would not do: hardly a unit is constant in a network that was not trained for it.
    """
    return _trained


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:, None], dtype=torch.float32) / 16, torch.tensor(data.target, dtype=torch.int64)


@cache
def _trained(activation: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, labels = (t[:-300] for t in _digits())
        model = models.build("digits", activation, threshold=0.5, clip=(0.05, 0.3))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        clean_steps, robust_steps = 60, 80
        for step in range(clean_steps + robust_steps):
            index = torch.randint(len(images), (64,))
            x, y = images[index], labels[index]
            share = max(step - clean_steps, 0) / robust_steps
            b = ll.local_bounds(model, x, 0.3 * share, iterations=2)
            loss = (1 - share) * F.cross_entropy(b.logits, y) + share * ll.losses.robust_cross_entropy(b, y)
            optimizer.zero_grad()
            (loss + 0.02 * ll.losses.sparsity(b)).backward()
            optimizer.step()
            project_thresholds_(model)
    return model.double().requires_grad_(False)
