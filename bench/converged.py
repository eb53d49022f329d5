"""Converged norms of masked layers in float64, to judge estimates by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def converged_norms(
    layer: nn.Conv2d | nn.Linear, rows: Tensor | None, columns: Tensor | None, shape: Sequence[int], steps: int = 60
) -> Tensor:
    """Norms of diag(rows) W diag(columns), float64, (B,). shape: (B, *input)."""
    weight = layer.weight.detach().double()
    return converged_norms_of(lambda x: linear_part(layer, x, weight), rows, columns, shape, weight.device, steps)


def linear_part(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer makes of ``x`` with this weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def converged_norms_of(
    forward: Callable[[Tensor], Tensor],
    rows: Tensor | None,
    columns: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    steps: int = 60,
) -> Tensor:
    """Norms of diag(rows) A diag(columns), float64, by Golub-Kahan-Lanczos with full reorthogonalisation. (B,).

    Independent of the code under test. forward: A, in float64. shape: (B, *input). The value is a Ritz value, so never
    above the true norm.
    """

    def masked(value: Tensor, mask: Tensor | None) -> Tensor:
        return value if mask is None else value * mask

    def unit(value: Tensor, floor: Tensor) -> Tensor:
        # Below the floor the direction is rounding noise: the sample's Krylov space is exhausted, and zero ends it.
        length = value.flatten(1).norm(dim=1)
        scale = torch.where(length > floor, 1 / length, torch.zeros_like(length))
        return value * scale.view(-1, *[1] * (value.dim() - 1))

    def against(value: Tensor, basis: list[Tensor]) -> Tensor:
        stack = torch.stack([b.flatten(1) for b in basis], 2)
        flat = value.flatten(1).unsqueeze(2)
        for _ in range(2):
            flat = flat - stack @ (stack.mT @ flat)
        return flat.view_as(value)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)
    start = masked(start, columns)
    rights = [unit(start, torch.zeros(shape[0], dtype=torch.float64, device=device))]
    images: list[Tensor] = []
    for _ in range(steps):
        # The adjoint by autograd: the operator is linear, so its vector-Jacobian product is the same at every point.
        variable = rights[-1].detach().requires_grad_()
        applied = masked(forward(variable), rows)
        image = applied.detach()
        (back,) = torch.autograd.grad(applied, variable, image)
        images.append(image)
        back = masked(back, columns)
        rights.append(unit(against(back, rights), 1e-10 * back.flatten(1).norm(dim=1)))
    # The square root of a Gram matrix's largest eigenvalue is as exact as the largest singular value, and far cheaper.
    stack = torch.stack([i.flatten(1) for i in images], 2)
    return torch.linalg.eigvalsh(stack.mT @ stack)[:, -1].clamp(min=0).sqrt()


def closeness(estimate: Tensor, converged: Tensor) -> dict[str, float]:
    """Estimate over converged norm: mean, least and most over samples. An empty operator counts as exact."""
    ratio = torch.where(converged > 0, estimate.detach().double() / converged, torch.ones_like(converged))
    mean, low, high = (value.item() for value in (ratio.mean(), ratio.min(), ratio.max()))
    return {"closeness_mean": mean, "closeness_min": low, "closeness_max": high}
