"""Every op on more than one thread: the same samples, the same results."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import generator, small_network
from torch import Tensor, nn

import locallip_cuda as ll


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param
    torch.set_num_threads(1)


def results(guarantee: str, model: nn.Sequential | None = None) -> list[Tensor]:
    """Bounds, margins and gradients of 33 samples: more than there are threads, and no multiple of them."""
    model = model or small_network("clipped-maxmin", dtype=torch.float32)
    x = torch.rand(33, 2, 6, 6, generator=generator(0))
    bounds = ll.local_bounds(model, x, 0.1, guarantee=guarantee, seed=0 if guarantee == "probabilistic" else None)
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


def trained(model: nn.Sequential, steps: int) -> tuple[list[Tensor], set[bool]]:
    """Weights after some steps, and the states of cuDNN's switch seen on the way."""
    optimiser, switches = torch.optim.Adam(model.parameters(), lr=1e-2), set()
    x, y = torch.rand(8, 2, 6, 6, generator=generator(1)), torch.arange(8) % 5
    for _ in range(steps):
        loss = ll.losses.robust_cross_entropy(ll.local_bounds(model, x, 0.1), y)
        switches.add(torch.backends.cudnn.enabled)
        optimiser.zero_grad()
        loss.backward()
        switches.add(torch.backends.cudnn.enabled)
        optimiser.step()
    return [p.detach() for p in model.parameters()], switches


def test_two_threads_certify_while_a_third_trains() -> None:
    """None notices the others: the same proofs and the same weights as alone, and no switch of the process is moved."""
    # networks are drawn from torch's global generator, and so before there are threads
    certified = {g: small_network("clipped-maxmin", dtype=torch.float32) for g in ("probabilistic", "deterministic")}
    model = small_network("clipped-relu", seed=3, dtype=torch.float32)
    alone = {guarantee: results(guarantee, network) for guarantee, network in certified.items()}
    weights, _ = trained(copy.deepcopy(model), 40)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    over = threading.Event()

    def certify(guarantee: str) -> list[list[Tensor]]:
        found = []
        while not over.is_set() or not found:
            found.append(results(guarantee, certified[guarantee]))
        return found

    try:
        with ThreadPoolExecutor(3) as pool:
            proofs = {guarantee: pool.submit(certify, guarantee) for guarantee in alone}
            training = pool.submit(trained, model, 40)
            try:
                together, switches = training.result()
            finally:
                over.set()
    finally:
        sys.setswitchinterval(interval)
    assert switches == {True} and torch.backends.cudnn.enabled
    for one, other in zip(together, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for guarantee, future in proofs.items():
        for found in future.result():
            for one, other in zip(found, alone[guarantee], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
