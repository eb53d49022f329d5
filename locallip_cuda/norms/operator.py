"""A masked operator as its user gives it: checked, and laid out as the ops take it.

The ops know dense weights and convolutions over two dimensions. Every other one here is one of those, exactly: a
convolution over one dimension has images of height 1; over three, the first becomes channels, with a weight that is 0
where no tap of the kernel lies; and a transposed one is the adjoint of a convolution, so that rows and columns change
places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rounding import convolution
from ..shapes import output_size, transposed_size

# stride, padding, dilation and groups, as the ops take them
Geometry = tuple[list[int], list[int], list[int], int]


def described(value: object) -> str:
    """What a message says it got, where it wants a tensor or a number: a dtype, or a type by its full name."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} of {getattr(value, 'dtype', None)}" if getattr(value, "ndim", 0) else name


@dataclass
class MaskedOperator:
    """``diag(row_mask) W diag(col_mask)`` as the ops take it.

    weight: (m, n) or (Cout, Cin/groups, kH, kW). input_shape: [B, n] or [B, Cin, H, W]; the masks have these shapes.
    sizes: of one input of the operator that the user means, and of one output. transposed: this is its adjoint.
    """

    weight: Tensor
    row_mask: Tensor | None
    col_mask: Tensor | None
    input_shape: list[int]
    geometry: Geometry
    sizes: tuple[list[int], list[int]]
    transposed: bool

    def arguments(
        self, start: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[int], list[int], list[int], list[int], int]:
        """What :func:`locallip_cuda.ops.masked_norm` takes but the iterations; ``start`` as the user means it."""
        if start is not None:
            start = self._start(start)
        return self.weight, self.row_mask, self.col_mask, start, self.input_shape, *self.geometry

    def vectors(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """The singular vectors of the operator that the user means, from the op's."""
        if self.transposed:
            right, left = left, right
        inner, outer = self.sizes
        return right.reshape(len(right), *inner), left.reshape(len(left), *outer)

    def _start(self, start: Tensor) -> Tensor:
        sizes, batch = self.sizes[0], self.input_shape[0]
        if not isinstance(start, Tensor) or start.dtype != self.weight.dtype or start.device != self.weight.device:
            raise TypeError(
                f"start: want a tensor of weight's dtype {self.weight.dtype} and device {self.weight.device}"
            )
        if list(start.shape) == sizes:
            start = start.unsqueeze(0)
        if list(start.shape[1:]) != sizes or start.shape[0] not in (1, batch):
            raise ValueError(f"start: got shape {tuple(start.shape)}, want {tuple(sizes)} or (B, *) of it")
        if not self.transposed:
            return start.reshape(len(start), *self.input_shape[1:])
        numbers = zip(self.input_shape[2:], self.weight.shape[2:], *self.geometry[:3], strict=True)
        rest = [output_size(*of_axis) for of_axis in numbers]
        start = start.detach().reshape(len(start), self.weight.shape[0], *rest)
        return convolution(start, self.weight.detach(), *self.geometry, transposed_to=self.input_shape[2:])


def masked_operator(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_size: Sequence[int] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    transposed: bool,
) -> MaskedOperator:
    """Of the arguments of :func:`locallip_cuda.masked_norm`; TypeError or ValueError where they do not fit."""
    _check_weight(weight)
    dimensions = weight.dim() - 2
    conv = (
        _numbers("stride", stride, 1, dimensions),
        _numbers("padding", padding, 0, dimensions),
        _numbers("dilation", dilation, 1, dimensions),
    )
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed: got {described(transposed)}, want a bool")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        of = "input" if transposed else "output"
        raise ValueError(f"groups: got {groups!r}, want a positive divisor of weight's {weight.shape[0]} {of} channels")
    if dimensions:
        sizes = _convolution_sizes(weight, row_mask, col_mask, input_size, conv, groups, transposed)
    else:
        if any(set(numbers) - {default} for numbers, default in zip(conv, (1, 0, 1), strict=True)) or groups != 1:
            raise ValueError("stride, padding, dilation, groups: got one for a dense weight (m, n), want the defaults")
        if transposed:
            raise ValueError("transposed: got True for a dense weight (m, n), want False, and weight.T")
        sizes = [weight.shape[1]], [weight.shape[0]]
        if input_size is not None and list(input_size) != sizes[0]:
            raise ValueError(f"input_size: got {tuple(input_size)}, want None or ({sizes[0][0]},) for a dense weight")
    _check_mask("row_mask", row_mask, sizes[1], weight)
    _check_mask("col_mask", col_mask, sizes[0], weight)
    batches = {mask.shape[0] for mask in (row_mask, col_mask) if mask is not None}
    if len(batches) > 1:
        raise ValueError(f"row_mask, col_mask: got batch sizes {sorted(batches)}, want one batch size")
    batch = batches.pop() if batches else 1
    inner, outer = sizes
    if transposed:
        inner, outer, row_mask, col_mask = outer, inner, col_mask, row_mask
    geometry: Geometry = ([1, 1], [0, 0], [1, 1], 1)
    if dimensions:
        weight, inner, outer, geometry = planar(weight, inner, outer, (*conv, groups))
    row_mask = None if row_mask is None else row_mask.reshape(batch, *outer)
    col_mask = None if col_mask is None else col_mask.reshape(batch, *inner)
    return MaskedOperator(weight, row_mask, col_mask, [batch, *inner], geometry, sizes, transposed)


def planar(
    weight: Tensor, inner: list[int], outer: list[int], geometry: Geometry
) -> tuple[Tensor, list[int], list[int], Geometry]:
    """A convolution as one over two dimensions: its weight, the sizes of an input and of an output, its geometry."""
    (stride, padding, dilation, groups), dimensions = geometry, len(inner) - 1
    if dimensions == 1:
        inner, outer = ([channels, 1, length] for channels, length in (inner, outer))
        return weight.unsqueeze(2), inner, outer, ([1, *stride], [0, *padding], [1, *dilation], groups)
    if dimensions == 3:
        taps, device = weight.shape[2], weight.device
        place = torch.arange(outer[1], device=device).view(-1, 1, 1) * stride[0] - padding[0]
        place = place + torch.arange(taps, device=device) * dilation[0]  # (output, 1, tap): where in the input
        meets = place == torch.arange(inner[1], device=device).view(-1, 1)
        tap = torch.where(meets.any(2), meets.byte().argmax(2), taps)  # (output, input); the one behind the last is 0
        unrolled = F.pad(weight, (0, 0, 0, 0, 0, 1))[:, :, tap]
        weight = unrolled.permute(0, 2, 1, 3, 4, 5).flatten(2, 3).flatten(0, 1)
        inner, outer = ([channels * depth, *rest] for channels, depth, *rest in (inner, outer))
        return weight, inner, outer, (stride[1:], padding[1:], dilation[1:], groups)
    return weight, inner, outer, geometry


def _convolution_sizes(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_size: Sequence[int] | None,
    conv: tuple[list[int], list[int], list[int]],
    groups: int,
    transposed: bool,
) -> tuple[list[int], list[int]]:
    """Sizes of one input and of one output."""
    kernel = weight.shape[2:]
    axes = ", ".join(["D", "H", "W"][3 - len(kernel) :])
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input_size is None:
        if col_mask is None:
            raise ValueError(f"input_size: got None, want (Cin, {axes}) for a convolution without col_mask")
        if not isinstance(col_mask, Tensor):
            raise TypeError(f"col_mask: got {described(col_mask)}, want a bool torch.Tensor or None")
        input_size = list(col_mask.shape[1:])
    inner = list(input_size)
    if len(inner) != len(kernel) + 1 or inner[0] != channels or min(inner) < 1:
        name = "input_size" if col_mask is None else "col_mask"
        raise ValueError(f"{name}: got {tuple(inner)}, want (Cin, {axes}) with Cin = {channels}")
    if not transposed:
        spatial = [output_size(*numbers) for numbers in zip(inner[1:], kernel, *conv, strict=True)]
        if min(spatial) < 1:
            raise ValueError(f"input_size: got {tuple(inner)}, want an input no smaller than the dilated kernel")
        return inner, [weight.shape[0], *spatial]
    outer = [transposed_size(*numbers) for numbers in zip(inner[1:], kernel, *conv, strict=True)]
    if isinstance(row_mask, Tensor) and row_mask.dim() == len(inner) + 1:
        given = list(row_mask.shape[2:])  # of which output_padding decides
        back = [output_size(*numbers) for numbers in zip(given, kernel, *conv, strict=True)]
        if back != inner[1:]:
            raise ValueError(
                f"row_mask: got shape {tuple(row_mask.shape)}, want (B, Cout, {axes}) of an output of this transposed "
                f"convolution, as {tuple(outer)} is without output_padding"
            )
        outer = given
    if min(outer) < 1:
        raise ValueError(f"input_size: got {tuple(inner)}, want an input whose transposed convolution is not empty")
    return inner, [weight.shape[1] * groups, *outer]


def _numbers(name: str, value: int | Sequence[int], least: int, dimensions: int) -> list[int]:
    """One for each dimension; a pair for a dense weight, whose are the defaults of a convolution over two."""
    count = dimensions or 2
    numbers = list(value) if isinstance(value, Sequence) else [value] * count
    if len(numbers) != count or any(not isinstance(n, int) or isinstance(n, bool) or n < least for n in numbers):
        several = {1: "a sequence of one", 2: "a pair of them", 3: "three of them"}[count]
        raise ValueError(f"{name}: got {value!r}, want an integer >= {least} or {several}")
    return numbers


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {described(weight)}, want a torch.Tensor")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight: got dtype {weight.dtype}, want torch.float32 or torch.float64")
    if not 2 <= weight.dim() <= 5 or math.prod(weight.shape) == 0:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, want (m, n) or (Cout, Cin/groups, *kernel) with one to three "
            "dimensions of the kernel, no dimension 0"
        )


def _check_mask(name: str, mask: Tensor | None, shape: Sequence[int], weight: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {described(mask)}, want a bool torch.Tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {mask.dtype}, want torch.bool")
    if mask.dim() != len(shape) + 1 or list(mask.shape[1:]) != list(shape):
        wanted = ", ".join(map(str, ["B", *shape]))
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, want ({wanted})")
    if mask.device != weight.device:
        raise ValueError(f"{name}: got device {mask.device}, want weight's, {weight.device}")
