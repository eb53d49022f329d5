"""Activation patterns of small and odd layers, and their gradients, against the plain-PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTIVATION_KINDS as ACTIVATIONS
from helpers import activation_arguments as arguments
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference

# units: one, on either side of a warp, not a multiple of four, more than a block takes; channels-last maps
SHAPES = [(2,), (30,), (34,), (66,), (2048,), (2056,), (2, 1, 1), (6, 5, 4), (8, 7, 3), (64, 9, 2)]


def both(
    device: str,
    activation: str,
    shape: tuple[int, ...],
    batch: int,
    box: bool,
    shared: bool,
    dtype: torch.dtype,
    box_behind: bool = True,
) -> None:
    args = [*arguments(activation, shape, batch, box=box, shared=shared, seed=len(shape), dtype=dtype), box_behind]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    results, gradients = [], []
    for op, to in ((ops.activation_pattern, (device, dtype)), (reference.activation_pattern, ("cpu", torch.float64))):
        own = [a.to(*to).detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
        out = op(*own)
        generator = torch.Generator().manual_seed(5)
        loss = torch.zeros((), dtype=to[1], device=to[0])
        for i in (0, 1, 4):
            weights = torch.rand(out[i].shape, generator=generator, dtype=torch.float64)
            loss = loss + (out[i] * weights.to(*to)).sum()
        loss.backward()
        results.append([t.detach().cpu() for t in out])
        grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in own if isinstance(a, Tensor)]
        gradients.append([grad.cpu() for grad in grads])
    for i, (mine, twin) in enumerate(zip(*results, strict=True)):
        if i in (2, 3, 5):
            assert torch.equal(mine, twin)
        else:
            torch.testing.assert_close(mine.double(), twin, rtol=tolerance, atol=tolerance)
    for mine, twin in zip(*gradients, strict=True):
        scale = max(1.0, twin.abs().max().item())
        torch.testing.assert_close(mine.double(), twin, rtol=10 * tolerance, atol=10 * tolerance * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("box_behind", [False, True])
def test_float32(device: str, activation: str, shape: tuple[int, ...], box: bool, box_behind: bool) -> None:
    both(device, activation, shape, 3, box, False, torch.float32, box_behind)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2,), (34,), (6, 5, 4)], ids=str)
def test_float64(device: str, activation: str, shape: tuple[int, ...]) -> None:
    both(device, activation, shape, 2, True, False, torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 31, 33])
def test_row_norms_of_all_samples(device: str, activation: str, batch: int) -> None:
    both(device, activation, (8, 3, 2), batch, True, True, torch.float32)


def test_masks_at_their_boundary(device: str) -> None:
    """ub == 0 and lb == threshold make a unit constant; NaN never does."""
    clean = torch.tensor([[-1.0, -1.0, 3.0, 3.0, float("nan"), 0.0]], device=device)
    norms = torch.tensor([[1.0, 1.1, 1.0, 1.1, 1.0, 0.0]], device=device) ** 2
    radius, threshold = torch.ones(1, device=device), torch.full((1, 6), 2.0, device=device)
    args = (clean, None, norms, radius, "clipped_relu", threshold, None)
    _, _, rows, columns, _, varying = ops.activation_pattern(*args)
    assert rows.tolist() == columns.tolist() == [[False, True, False, True, True, False]]
    assert varying.tolist() == [[3, 3]]
