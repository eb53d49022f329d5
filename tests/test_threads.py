"""Every op on more than one thread: the same samples, the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import generator, small_network
from torch import Tensor

import locallip_cuda as ll


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param
    torch.set_num_threads(1)


def results(guarantee: str) -> list[Tensor]:
    """Bounds, margins and gradients of 33 samples: more than there are threads, and no multiple of them."""
    model = small_network("clipped-maxmin", dtype=torch.float32)
    x = torch.rand(33, 2, 6, 6, generator=generator(0))
    torch.manual_seed(0)
    bounds = ll.local_bounds(model, x, 0.1, guarantee=guarantee)
    y = torch.arange(33) % 5
    out = [bounds.layer_norms, bounds.lower, bounds.upper, bounds.worst_logits(y), *bounds.row_masks]
    if guarantee == "estimate":
        loss = ll.losses.robust_cross_entropy(bounds, y) + ll.losses.sparsity(bounds)
        out += torch.autograd.grad(loss, list(model.parameters()))
    return [t.detach() for t in out]


@pytest.mark.parametrize("guarantee", ["estimate", "probabilistic", "deterministic"])
def test_threads_do_not_change_results(guarantee: str, threads: int) -> None:
    expected = results(guarantee)
    torch.set_num_threads(threads)
    for ours, single in zip(results(guarantee), expected, strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-6)
