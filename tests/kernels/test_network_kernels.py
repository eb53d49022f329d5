"""All kernels together: bounds, loss and gradients of small networks in float32 against the same in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTIVATIONS, generator, small_network

import locallip_cuda as ll


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_step(device: str, activation: str) -> None:
    x = torch.rand(3, 2, 6, 6, generator=generator(0), dtype=torch.float64)
    y = torch.tensor([0, 4, 2])
    losses, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        model = small_network(activation).to(device, dtype)
        bounds = ll.local_bounds(model, x.to(device, dtype), 0.2, iterations=4)
        loss = ll.losses.robust_cross_entropy(bounds, y.to(device)) + ll.losses.gloro(bounds, y.to(device))
        loss = loss + ll.losses.lipschitz_margin(bounds, y.to(device)) + 0.1 * ll.losses.sparsity(bounds)
        loss.backward()
        losses.append(loss.detach().cpu().double())
        gradients.append([p.grad.cpu().double() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for mine, twin in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-2, atol=1e-2 * max(twin.abs().max().item(), 1e-3))
