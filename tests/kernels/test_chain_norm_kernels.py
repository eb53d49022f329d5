"""Chains stream through the kernels of the masked norm: against the plain twin, and in both precisions."""

from __future__ import annotations

import pytest
import torch
from test_chain_norm import KINDS, dense, problem

from locallip_cuda import ops
from locallip_cuda.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [3, 20])  # without a restart, and with one
@pytest.mark.parametrize("kinds", KINDS)
def test_chain_norm(device: str, kinds: str, iterations: int, dtype: torch.dtype) -> None:
    given = problem(11, kinds, 0.7, dtype, device)
    given["weights"] = [weight.requires_grad_() for weight in given["weights"]]
    sigma = ops.chain_norm(**given, iterations=iterations)[0]
    twin = reference.chain_norm(**given, iterations=iterations)[0]
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(sigma, twin, **tolerance)
    ours, theirs = (torch.autograd.grad(value.sum(), given["weights"]) for value in (sigma, twin))
    close = (1e-2, 1e-3) if dtype == torch.float32 else (1e-5, 1e-6)  # vectors converge by half the digits
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=close[0], atol=close[1])


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("kinds", KINDS)
def test_by_vectors_in_bfloat16(device: str, kinds: str) -> None:
    given = problem(11, kinds, 0.7, torch.float32, device)
    sigma = ops.chain_norm(**given, iterations=20)[0].cpu()
    norms = torch.stack([torch.linalg.matrix_norm(dense(given, b), 2) for b in range(len(sigma))]).cpu()
    assert (sigma <= norms * (1 + 1e-5)).all() and (sigma >= norms * (1 - 3e-3)).all(), (sigma, norms)
