"""What several test files share: devices, masked operators as dense matrices, small networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ACTIVATIONS = ["relu", "clipped-relu", "maxmin", "clipped-maxmin"]


def generator(seed: int) -> torch.Generator:
    """On the CPU whatever the device, so that every device is tested on the same numbers."""
    return torch.Generator().manual_seed(seed)


def matrix(weight: Tensor, input_size: tuple[int, ...] | None = None, **conv: Any) -> Tensor:
    """The operator as a matrix (m, n) in float64, differentiable in `weight`: its action on the unit vectors."""
    weight = weight.double()
    if weight.dim() == 2:
        return weight
    assert input_size is not None
    units = torch.eye(torch.Size(input_size).numel(), dtype=torch.float64, device=weight.device)
    return F.conv2d(units.view(-1, *input_size), weight, None, **conv).flatten(1).T


def masked_matrices(dense: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor:
    """diag(row) W diag(col) of every sample, (B, m, n)."""
    out = dense.unsqueeze(0)
    if row_mask is not None:
        out = out * row_mask.flatten(1).unsqueeze(2)
    if col_mask is not None:
        out = out * col_mask.flatten(1).unsqueeze(1)
    return out


def true_norms(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_size: tuple[int, ...] | None = None,
    **conv: Any,
) -> Tensor:
    """(B,) operator norms in float64 from the singular values of the materialised masked matrices."""
    return torch.linalg.svdvals(masked_matrices(matrix(weight, input_size, **conv), row_mask, col_mask))[:, 0]


def activation(name: str, shape: tuple[int, ...], threshold: float = 0.4, clip: float = 0.3) -> nn.Module:
    half = (shape[0] // 2, *shape[1:])
    return {
        "relu": nn.ReLU,
        "clipped-relu": lambda: ClippedReLU(shape, threshold),
        "maxmin": MaxMin,
        "clipped-maxmin": lambda: ClippedMaxMin(half, clip, -clip),
    }[name]()


def small_network(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions (the second with a stride), two Linear layers, on inputs (B, 2, 6, 6); 5 classes."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1), activation(name, (4, 6, 6)),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), activation(name, (6, 3, 3)),
        nn.Flatten(),
        nn.Linear(54, 16), activation(name, (16,)),
        nn.Linear(16, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(dtype)
