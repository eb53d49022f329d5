"""Building blocks for networks with tight local Lipschitz bounds.

Every activation here is 1-Lipschitz in the l2 norm, per unit (ClippedReLU) or per pair of units (MaxMin and
ClippedMaxMin: sorting two numbers is an orthogonal map on each side of a = b, and clipping is a contraction).
The clipped ones follow "Training Certifiably Robust Neural Networks with Efficient Local Lipschitz Bounds"
(Huang et al., NeurIPS 2021, arXiv:2111.01395): beyond its threshold a unit is constant, so its row and column
drop out of the neighbouring weight operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

__all__ = [
    "ClippedMaxMin",
    "ClippedReLU",
    "MaxMin",
    "Normalize",
    "clipped_maxmin",
    "clipped_relu",
    "maxmin",
    "project_thresholds_",
]


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"shape must be one or more positive integers (without the batch), got {shape!r}")
    return sizes


def _initial(name: str, value: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    """`value` as a new finite floating-point tensor of shape (1, *shape)."""
    given = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be a real number or tensor, got dtype {given.dtype}")
    if not given.is_floating_point():
        given = given.to(torch.get_default_dtype())
    try:
        full = given.expand(1, *shape).clone()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be a number or a tensor that broadcasts to {(1, *shape)}, got shape {tuple(given.shape)}"
        ) from error
    if not bool(torch.isfinite(full).all()):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return full


def halves(module: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the channels of z (B, C, ...); ValueError where C is odd."""
    if z.dim() < 2 or z.shape[1] % 2:
        raise ValueError(
            f"{module} pairs channel i with channel i + C/2 and needs an input (B, C, ...) with even C, "
            f"got shape {tuple(z.shape)}"
        )
    half = z.shape[1] // 2
    return z[:, :half], z[:, half:]


def clipped_relu(z: Tensor, threshold: Tensor) -> Tensor:
    """min(max(z, 0), threshold): z (B, *shape), threshold (1, *shape), >= 0."""
    if has_torch_function((z, threshold)):
        return handle_torch_function(clipped_relu, (z, threshold), z, threshold)
    return torch.minimum(torch.relu(z), threshold)


def maxmin(z: Tensor) -> Tensor:
    """cat([max(a, b), min(a, b)], 1) for the halves a, b of the channels of z (B, C, ...), C even."""
    if has_torch_function((z,)):
        return handle_torch_function(maxmin, (z,), z)
    a, b = halves("MaxMin", z)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def clipped_maxmin(z: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """cat([min(max(a, b), upper), max(min(a, b), lower)], 1) for the halves a, b of the channels of z (B, C, ...).

    upper, lower: (1, C/2, ...), upper >= lower.
    """
    if has_torch_function((z, upper, lower)):
        tensors = (z, upper, lower)
        return handle_torch_function(clipped_maxmin, tensors, z, upper=upper, lower=lower)
    a, b = halves("ClippedMaxMin", z)
    high = torch.minimum(torch.maximum(a, b), upper)
    low = torch.maximum(torch.minimum(a, b), lower)
    return torch.cat([high, low], dim=1)


class ClippedReLU(nn.Module):
    """min(max(z, 0), threshold), with a learnable threshold >= 0 for each unit.

    shape: the shape of one sample, such as (C, H, W) or (C,).
    init: the initial threshold, a number or a tensor that broadcasts to (1, *shape); non-negative and finite.
    `.threshold` is a parameter of shape (1, *shape). The forward pass uses it as it is; an optimiser step can take
    it below 0, so call `project_thresholds_` after each one.
    ValueError: a bad shape or init, or an input that is not (B, *shape).
    """

    threshold: nn.Parameter

    def __init__(self, shape: int | Sequence[int], init: float | Tensor = 1.0) -> None:
        super().__init__()
        value = _initial("init", init, _shape(shape))
        if bool((value < 0).any()):
            raise ValueError(f"init must be non-negative, got {init!r}")
        self.threshold = nn.Parameter(value)

    def forward(self, z: Tensor) -> Tensor:
        if z.shape[1:] != self.threshold.shape[1:]:
            raise ValueError(
                f"ClippedReLU has thresholds for (B, {', '.join(map(str, self.threshold.shape[1:]))}), "
                f"got an input of shape {tuple(z.shape)}"
            )
        return clipped_relu(z, self.threshold)

    def extra_repr(self) -> str:
        return f"{tuple(self.threshold.shape[1:])}"


class MaxMin(nn.Module):
    """Sorts pairs of channels: for a = z[:, :C/2] and b = z[:, C/2:], cat([max(a, b), min(a, b)], dim=1).

    Input and output: (B, C) or (B, C, H, W) with even C (Anil, Lucas, Grosse, ICML 2019, there called GroupSort 2).
    ValueError: an odd number of channels.
    """

    def forward(self, z: Tensor) -> Tensor:
        return maxmin(z)


class ClippedMaxMin(nn.Module):
    """MaxMin with learnable clipping: cat([min(max(a, b), upper), max(min(a, b), lower)], dim=1).

    shape: the shape of one half of the channels of one sample, such as (C/2, H, W) or (C/2,).
    upper, lower: initial values, numbers or tensors that broadcast to (1, *shape); finite, upper >= lower.
    `.upper` and `.lower` are parameters of shape (1, *shape). `project_thresholds_` keeps upper >= lower.
    ValueError: a bad shape, upper or lower, or an input that is not (B, 2 * shape[0], *shape[1:]).
    """

    upper: nn.Parameter
    lower: nn.Parameter

    def __init__(self, shape: int | Sequence[int], upper: float | Tensor, lower: float | Tensor) -> None:
        super().__init__()
        sizes = _shape(shape)
        high, low = _initial("upper", upper, sizes), _initial("lower", lower, sizes)
        if bool((high < low).any()):
            raise ValueError(f"upper must be at least lower everywhere, got upper {upper!r} and lower {lower!r}")
        self.upper = nn.Parameter(high)
        self.lower = nn.Parameter(low)

    def forward(self, z: Tensor) -> Tensor:
        a, _ = halves("ClippedMaxMin", z)
        if a.shape[1:] != self.upper.shape[1:]:
            half = tuple(self.upper.shape[1:])
            wanted = ", ".join(map(str, (2 * half[0], *half[1:])))
            raise ValueError(f"ClippedMaxMin takes an input (B, {wanted}), got shape {tuple(z.shape)}")
        return clipped_maxmin(z, self.upper, self.lower)

    def extra_repr(self) -> str:
        return f"{tuple(self.upper.shape[1:])}"


class Normalize(nn.Module):
    """(x - mean) / std per channel, for an input (B, C) or (B, C, H, W).

    mean, std: one number per channel (a sequence or a tensor of shape (C,)), or one number for a single channel.
    They are kept as buffers `.mean` and `.std` of shape (C,). As a linear map it has the norm 1 / min(std).
    ValueError: mean and std of different lengths, not finite, std <= 0, or an input of another channel count.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            numbers = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().clone()
            if numbers.dim() == 0:
                numbers = numbers.reshape(1)
            if numbers.dim() != 1 or not numbers.numel() or not bool(torch.isfinite(numbers).all()):
                raise ValueError(f"{name} must be one finite number per channel, got {value!r}")
            self.register_buffer(name, numbers)
        if self.mean.shape != self.std.shape:
            raise ValueError(f"mean and std must have one number per channel each, got {mean!r} and {std!r}")
        if bool((self.std <= 0).any()):
            raise ValueError(f"std must be positive, got {std!r}")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.mean.shape[0]:
            raise ValueError(f"Normalize takes an input (B, {self.mean.shape[0]}, ...), got shape {tuple(x.shape)}")
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        return (x - self.mean.view(per_channel)) / self.std.view(per_channel)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


@torch.no_grad()
def project_thresholds_(model: nn.Module) -> None:
    """Brings the clipping thresholds of all modules in `model` back into range, in place; call it after a step.

    ClippedReLU: threshold >= 0. ClippedMaxMin: upper >= lower; a crossed pair meets in the middle, which is its
    nearest point in range. Does not synchronise the device.
    """
    for module in model.modules():
        if isinstance(module, ClippedReLU):
            module.threshold.clamp_(min=0)
        elif isinstance(module, ClippedMaxMin):
            middle = (module.upper + module.lower) / 2
            crossed = module.upper < module.lower
            module.upper.copy_(torch.where(crossed, middle, module.upper))
            module.lower.copy_(torch.where(crossed, middle, module.lower))
