"""Margins of small and odd layers, and their gradients, against the plain-PyTorch twin."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import generator
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference


def arguments(batch: int, classes: int, width: int, dtype: torch.dtype, kind: str = "both") -> list[Tensor]:
    """Ball and box bind some units each; or `kind` "box" or "ball" alone."""
    g = generator(batch + classes + width)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=g, dtype=torch.float64)

    features = uniform(batch, width) - 0.5
    room = {"both": 0.3, "box": 1e-3, "ball": 100.0}[kind]
    lower, upper = features - room * uniform(batch, width), features + room * uniform(batch, width)
    radius = 0.2 + uniform(batch)
    if batch > 2:
        radius[2] = 0
    weight = uniform(classes, width) - 0.5
    labels = torch.randint(classes, (batch,), generator=g)
    return [*(t.to(dtype) for t in (features, lower, upper, radius, weight)), labels]


def both(device: str, args: list[Tensor], tolerance: float) -> None:
    values, gradients = [], []
    for op, to in ((ops.margin, (device, args[0].dtype)), (reference.margin, ("cpu", torch.float64))):
        own = [a.to(*to).detach().requires_grad_() for a in args[:5]]
        gain = op(*own, args[5].to(to[0]))
        weights = torch.rand(gain.shape, generator=generator(1), dtype=torch.float64).to(*to)
        (gain * weights).sum().backward()
        values.append(gain.detach().cpu().double())
        gradients.append([a.grad.cpu().double() for a in own])
    torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance)
    assert (values[0] >= values[1] * (1 - tolerance) - 1e-7).all()  # a dual value: never below the maximum
    for mine, twin in zip(*gradients, strict=True):
        scale = max(1.0, twin.abs().max().item())
        torch.testing.assert_close(mine, twin, rtol=30 * tolerance, atol=30 * tolerance * scale)


@pytest.mark.parametrize("classes", [1, 2, 10, 33])
@pytest.mark.parametrize("width", [1, 31, 33, 256, 300, 700, 1100])
def test_float32(device: str, classes: int, width: int) -> None:
    both(device, arguments(3, classes, width, torch.float32), 1e-4)


@pytest.mark.parametrize("width", [1, 33, 300, 600])
@pytest.mark.parametrize("kind", ["both", "box", "ball"])
def test_float64(device: str, width: int, kind: str) -> None:
    both(device, arguments(4, 5, width, torch.float64, kind), 1e-9)


@pytest.mark.parametrize("batch", [1, 31, 33])
def test_batches(device: str, batch: int) -> None:
    both(device, arguments(batch, 3, 20, torch.float32), 1e-4)


def test_a_box_without_room_and_no_direction(device: str) -> None:
    features, lower, upper, radius, weight, labels = arguments(2, 3, 40, torch.float32)
    weight[1] = weight[0]
    both(device, [features, features.clone(), features.clone(), radius, weight, labels * 0], 1e-4)
    both(device, [features, lower, upper, radius, weight, labels * 0], 1e-4)


def test_a_label_that_is_none_gives_nan(device: str) -> None:
    if device == "cpu" and "LOCALLIP_EMULATION" not in os.environ:
        pytest.skip("on a CPU labels are checked before the op")
    features, lower, upper, radius, weight, labels = (t.to(device) for t in arguments(2, 3, 40, torch.float32))
    labels[1] = 3
    features.requires_grad_()
    gain = ops.margin(features, lower, upper, radius, weight, labels)
    gain.sum().backward()
    assert gain[1].isnan().all() and not gain[0].isnan().any()
    assert features.grad is not None and features.grad[1].isnan().all() and not features.grad[0].isnan().any()
