"""What several test files share: devices, masked operators as dense matrices, small networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ACTIVATIONS = ["relu", "clipped-relu", "maxmin", "clipped-maxmin"]
# as the op names them
ACTIVATION_KINDS = ["identity", "relu", "clipped_relu", "maxmin", "clipped_maxmin"]


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


def activation_arguments(
    activation: str,
    shape: tuple[int, ...],
    batch: int,
    *,
    box: bool = True,
    shared: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """Random arguments of ops.activation_pattern, without ties, in which every kind of unit occurs."""
    g = generator(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return (low + (high - low) * torch.rand(size, generator=g, dtype=torch.float64)).to(device, dtype)

    clean = uniform(-2, 2, batch, *shape)
    offset = uniform(-0.5, 0.5, batch, *shape)
    centre, half_width = clean + offset, offset.abs() + uniform(0.05, 1, batch, *shape)
    norms = uniform(0.01, 2, 1 if shared else batch, *shape)
    radius = uniform(0.05, 1.5, batch)
    half = (1, shape[0] // 2, *shape[1:])
    thresholds = {
        "clipped_relu": (uniform(0, 1, 1, *shape), None),
        "clipped_maxmin": (uniform(-0.5, 0.8, *half), uniform(-0.8, 0.5, *half)),
    }.get(activation, (None, None))
    values = torch.cat([clean, centre]) if box else clean
    return [values, half_width if box else None, norms, radius, activation, *thresholds]


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


def zoo() -> dict[str, tuple[nn.Sequential, tuple[int, ...]]]:
    """Untrained float64 networks that between them hold every supported module, with the shape of one input."""
    torch.manual_seed(7)
    networks: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
        f"convolutional, {name}": (list(small_network(name)), (2, 6, 6)) for name in ACTIVATIONS
    }
    for name in ACTIVATIONS:
        layers = [
            nn.Linear(6, 20),
            activation(name, (20,)),
            nn.Linear(20, 14),
            activation(name, (14,)),
            nn.Linear(14, 4),
        ]
        networks[f"dense, {name}"] = (layers, (6,))
    for module in (nn.LeakyReLU(0.2), nn.ELU(0.7), nn.Tanh(), nn.Sigmoid(), nn.Softplus(beta=2)):
        layers = [nn.Linear(6, 12), module, nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)]
        networks[f"dense, {type(module).__name__}"] = (layers, (6,))
    pooled = [
        Normalize([0.4, 0.5], [0.2, 0.3]), nn.Conv2d(2, 4, 3, padding="same", dilation=2, groups=2, bias=False),
        ClippedReLU((4, 7, 6), 0.6), nn.AvgPool2d(3, stride=2, padding=1), nn.Conv2d(4, 3, (2, 1), stride=(1, 2)),
        nn.ReLU(), nn.AvgPool2d((1, 2), count_include_pad=True, divisor_override=3), nn.Flatten(), nn.Linear(9, 4),
    ]  # fmt: skip
    networks["normalised, pooled, grouped"] = (pooled, (2, 7, 6))
    at_once = [
        nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 2), Normalize([0.1] * 4, [0.5] * 4),
        nn.AvgPool2d(2, stride=1), nn.Flatten(), nn.Linear(4, 3),
    ]  # fmt: skip
    networks["convolved and pooled at once"] = (at_once, (2, 6, 6))
    inner = nn.Sequential(nn.Identity(), nn.Linear(18, 10), nn.Sequential(MaxMin(), nn.Dropout(0.5), nn.Linear(10, 8)))
    nested = [nn.Dropout2d(0.3), nn.Flatten(), Normalize([0.1] * 18, [0.5] * 18), inner, nn.ReLU(), nn.Linear(8, 3)]
    networks["nested"] = (nested, (2, 3, 3))
    networks["linear alone"] = ([nn.Linear(5, 3)], (5,))
    networks["linear twice"] = ([nn.Linear(5, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)], (5,))
    networks["activation first"] = ([nn.Tanh(), ClippedReLU(5, 0.5), nn.Linear(5, 4), nn.Linear(4, 3)], (5,))
    twice = [
        nn.Linear(5, 8),
        nn.ReLU(),
        MaxMin(),
        nn.Linear(8, 6),
        ClippedMaxMin(3, 0.2, -0.1),
        nn.ReLU(),
        nn.Linear(6, 3),
    ]
    networks["activations in a row"] = (twice, (5,))
    return {name: (nn.Sequential(*layers).double().eval(), shape) for name, (layers, shape) in networks.items()}


ZOO = zoo()


def zoo_input(name: str, batch: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.rand(batch, *ZOO[name][1], generator=generator(seed), dtype=torch.float64).to(device)
