"""Typed wrappers over the registered ops, their fake kernels and their gradients: the floor that all else stands on.

The ops live in ``torch.ops.locallip_cuda``; they run on CPU and CUDA, in float32 and float64, under autograd and under
torch.compile. They check shapes; the arguments of users are checked above, in :mod:`norms` and :mod:`bounds`.
Four-dimensional results are channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..build_info import load_extension
from ..shapes import output_size

load_extension()
_ops = torch.ops.locallip_cuda


def _narrowed(weight: Tensor) -> bool:
    """Whether autocast asks for bfloat16 where the weight is."""
    device = weight.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``W x + bias`` for a dense weight (m, n) or a convolution weight (Cout, Cin/groups, kH, kW), in weight's dtype.

    It differs from torch's own in its backward pass on a CPU, which leaves out leading and trailing samples whose
    gradient is zero: where the ball bounds every unit, that is the box's half of the batch. Under autocast to bfloat16
    the products are taken in bfloat16, forward and backward. TF32 is taken only where
    ``torch.backends.cuda.matmul.allow_tf32`` or ``torch.set_float32_matmul_precision`` asks for it; the
    gradient of a convolution's weight takes it where torch lets cuDNN, as it does by default.
    """
    result: Tensor = _ops.affine(x, weight, bias, stride, padding, dilation, groups, _narrowed(weight))
    return result


def masked_norm(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    start: Tensor | None,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma (B,), right ``input_shape``, left (B, *output)) of ``diag(row) W diag(col)``; only sigma has a gradient.

    ``input_shape`` is (B, n) or (B, Cin, H, W); masks are bool of the full shapes, or None for all True; ``start`` is
    None or of ``input_shape``, or with a batch of one. Under autocast to bfloat16 a CPU that has instructions for it,
    and a GPU, find the right vectors in bfloat16; one product of theirs in float32 then gives values and left vectors,
    but for convolutions on a GPU's chip, whose weights, vectors and values are all by products in bfloat16. See
    :func:`locallip_cuda.masked_norm`.
    """
    result: tuple[Tensor, Tensor, Tensor] = _ops.masked_norm(
        weight, row_mask, col_mask, start, input_shape, stride, padding, dilation, groups, iterations, _narrowed(weight)
    )
    return result


def chain_norm(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    start: Tensor | None,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: Sequence[int],
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`masked_norm` of two weights or more in a row, the first one applied first, with masks between them.

    ``masks[k]``, bool (B, *) or (1, *), lies between weights k and k + 1, in the shape in which the latter takes its
    input: the output of the former is reshaped to it. stride, padding and dilation have two numbers for every weight,
    groups one; those of a dense weight mean nothing. sigma has a gradient in every weight.
    """
    result: tuple[Tensor, Tensor, Tensor] = _ops.chain_norm(
        weights,
        masks,
        row_mask,
        col_mask,
        start,
        input_shape,
        stride,
        padding,
        dilation,
        groups,
        iterations,
        len(weights) > 0 and _narrowed(weights[0]),
    )
    return result


def activation_pattern(
    values: Tensor,
    half_width: Tensor | None,
    squared_row_norms: Tensor,
    radius: Tensor,
    activation: str,
    first: Tensor | None,
    second: Tensor | None,
    box_behind: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer's bounds in; masks, post-activation box, sparsity terms and counts out, in one pass.

    The pre-activation box [centre - half_width, centre + half_width] is intersected with the ball
    clean +- radius * sqrt(squared_row_norms). The ball behind the activation, h +- r_l, needs no pass of its own: a
    surviving row's norm is at most the masked operator norm, so intersecting with it never tightens this one.

    Args:
        values: clean pre-activations (B, *shape), followed by the box centres where there is a box, (2B, *shape).
        half_width: (B, *shape), or None where only the ball bounds the units.
        squared_row_norms: (B, *shape), or (1, *shape) for all samples.
        radius: (B,) of the ball at the layer's input.
        activation: "identity", "relu", "clipped_relu", "maxmin" or "clipped_maxmin".
        first, second: (1, *shape) threshold of clipped_relu; upper and lower of clipped_maxmin, half the channels.
        box_behind: whether the box behind the activation is wanted.

    Returns:
        values (2B, *shape): clean outputs, then the centres of their box; half_width (B, *shape); without a box
        values (B, *shape) and half_width (0,); row_mask and col_mask, bool (B, *shape); slack (B, 2): the means over
        the units of the two sparsity terms, relu(ub) and relu(threshold - lb); for clipped_maxmin
        relu(upper - lb_max) + relu(ub_min - lower) and 0; varying, int64 (B, 2): how many units are True in row_mask
        and in col_mask.
        Differentiable in all floating-point inputs; where box and ball tie, the gradient goes to the ball.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = _ops.activation_pattern(
        values, half_width, squared_row_norms, radius, activation, first, second, box_behind
    )
    return result


def margin(features: Tensor, lower: Tensor, upper: Tensor, radius: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(B, K): the most logit j can gain on the label's logit, 0 at the label; a Lagrangian dual, so never too small.

    gain[b, j] = max (w_j - w_y) . delta over ||delta|| <= radius_b, lower_b <= features_b + delta <= upper_b.

    Args:
        features, lower, upper: (B, h); radius: (B,); weight: (K, h); labels: int64 (B,).

    Differentiable in all of them but labels, by the envelope theorem.
    """
    gain: Tensor = _ops.margin(features, lower, upper, radius, weight, labels)[0]
    return gain


def margin_step(
    features: Tensor, lower: Tensor, upper: Tensor, radius: Tensor, weight: Tensor, labels: Tensor
) -> Tensor:
    """(B, K): the reciprocal of the multiplier at which :func:`margin` takes its dual, without a gradient.

    Infinite where the box alone bounds the gain; 0 at the label and where the radius is 0.
    """
    step: Tensor = _ops.margin(features, lower, upper, radius, weight, labels)[1]
    return step


def lanczos_bound(alpha: Tensor, beta: Tensor, error: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(theta, upper), both (B,): the largest eigenvalue of a Lanczos run's tridiagonal matrix, and a bound of A^T A's.

    With q_0.. the vectors of a run on M = A^T A, the local residuals
    M q_j - beta_{j-1} q_{j-1} - alpha_j q_j - beta_j q_{j+1} no longer than ``error``, every |q_j| <= 1 + 1e-6 and v a
    top eigenvector of M, |<v, q_0>| >= ``level`` implies that ``upper`` is above M's largest eigenvalue; the derivation
    is in csrc/lanczos_bound.h. The op's own rounding is accounted for, and no orthogonality is assumed.

    Args:
        alpha, beta: (B, steps), float64 on the CPU, >= 0. error, level: (B,), alike.

    ``theta`` is right but for rounding. ``upper`` is infinite where level <= 0.
    """
    result: tuple[Tensor, Tensor] = _ops.lanczos_bound(alpha, beta, error, level)
    return result


# ---- fake kernels: shapes and layouts without data ----


def _laid_out(like: Tensor, shape: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _output_shape(
    weight: Tensor, input_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    output = [input_shape[0], weight.shape[0]]
    if weight.dim() == 4:
        sizes = zip(input_shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        output += [output_size(*numbers) for numbers in sizes]
    return output


@torch.library.register_fake("locallip_cuda::affine")
def _(x, weight, bias, stride, padding, dilation, groups, bfloat16):  # type: ignore[no-untyped-def]
    return _laid_out(weight, _output_shape(weight, x.shape, stride, padding, dilation))


@torch.library.register_fake("locallip_cuda::affine_backward")
def _(grad, x, weight, stride, padding, dilation, groups, bfloat16, of_input, of_weight, of_bias):  # type: ignore[no-untyped-def]
    none = weight.new_empty(0)
    return (
        _laid_out(x, x.shape) if of_input else none,
        torch.empty_like(weight) if of_weight else none,
        weight.new_empty(weight.shape[0]) if of_bias else none,
    )


@torch.library.register_fake("locallip_cuda::masked_norm")
def _(weight, row_mask, col_mask, start, input_shape, stride, padding, dilation, groups, iterations, bfloat16):  # type: ignore[no-untyped-def]
    output = _output_shape(weight, input_shape, stride, padding, dilation)
    return weight.new_empty(input_shape[0]), _laid_out(weight, input_shape), _laid_out(weight, output)


@torch.library.register_fake("locallip_cuda::masked_norm_backward")
def _(grad, weight, right, left, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


@torch.library.register_fake("locallip_cuda::chain_norm")
def _(  # type: ignore[no-untyped-def]
    weights, masks, row_mask, col_mask, start, input_shape, stride, padding, dilation, groups, iterations, bfloat16
):
    shape = list(input_shape)
    for k, weight in enumerate(weights):
        own = (numbers[2 * k : 2 * k + 2] for numbers in (stride, padding, dilation))
        shape = _output_shape(weight, shape, *own)
        if k < len(masks):
            shape = [shape[0], *masks[k].shape[1:]]
    like = weights[0]
    return like.new_empty(input_shape[0]), _laid_out(like, input_shape), _laid_out(like, shape)


@torch.library.register_fake("locallip_cuda::chain_norm_backward")
def _(grad, weights, masks, right, left, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return [torch.empty_like(weight) for weight in weights]


@torch.library.register_fake("locallip_cuda::activation_pattern")
def _(values, half_width, squared_row_norms, radius, activation, first, second, box_behind):  # type: ignore[no-untyped-def]
    shape = [radius.shape[0], *values.shape[1:]]
    mask = [_laid_out(values, shape, torch.bool) for _ in range(2)]
    out = _laid_out(values, [(1 + box_behind) * shape[0], *shape[1:]])
    wide = _laid_out(values, shape) if box_behind else values.new_empty(0)
    slack, varying = values.new_empty(shape[0], 2), values.new_empty(shape[0], 2, dtype=torch.int64)
    return out, wide, *mask, slack, varying


@torch.library.register_fake("locallip_cuda::activation_pattern_backward")
def _(grad_values, grad_half_width, grad_slack, values, half_width, norms, radius, kind, first, second, box_behind):  # type: ignore[no-untyped-def]
    def like(t: Tensor | None) -> Tensor:
        return values.new_empty(0) if t is None else _laid_out(t, t.shape)

    return like(values), like(half_width), like(norms), radius.new_empty(radius.shape), like(first), like(second)


@torch.library.register_fake("locallip_cuda::margin")
def _(features, lower, upper, radius, weight, labels):  # type: ignore[no-untyped-def]
    shape = (features.shape[0], weight.shape[0])
    return features.new_empty(shape), features.new_empty(shape)


@torch.library.register_fake("locallip_cuda::lanczos_bound")
def _(alpha, beta, error, level):  # type: ignore[no-untyped-def]
    return torch.empty_like(error), torch.empty_like(error)


@torch.library.register_fake("locallip_cuda::margin_backward")
def _(grad_gain, step, features, lower, upper, radius, weight, labels):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (features, lower, upper, radius, weight))


# ---- gradients ----


def _affine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.arguments = inputs[3:]


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads = _ops.affine_backward(grad, *ctx.saved_tensors, *ctx.arguments, *wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * 5


def _masked_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, *_, stride, padding, dilation, groups, _iterations, _bfloat16 = inputs
    ctx.save_for_backward(weight, output[1], output[2])
    ctx.conv = (stride, padding, dilation, groups)
    ctx.mark_non_differentiable(output[1], output[2])


def _masked_norm_backward(ctx: Any, grad: Tensor, _right: Tensor, _left: Tensor) -> tuple[Tensor | None, ...]:
    weight, right, left = ctx.saved_tensors
    to_weight = _ops.masked_norm_backward(grad, weight, right, left, *ctx.conv) if ctx.needs_input_grad[0] else None
    return to_weight, *[None] * 10


def _chain_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, masks, *_, stride, padding, dilation, groups, _iterations, _bfloat16 = inputs
    ctx.save_for_backward(*weights, *masks, output[1], output[2])
    ctx.count, ctx.conv = len(weights), (stride, padding, dilation, groups)
    ctx.mark_non_differentiable(output[1], output[2])


def _chain_norm_backward(ctx: Any, grad: Tensor, _right: Tensor, _left: Tensor) -> tuple[Any, ...]:
    *tensors, right, left = ctx.saved_tensors
    weights, masks = tensors[: ctx.count], tensors[ctx.count :]
    to_weights = _ops.chain_norm_backward(grad, weights, masks, right, left, *ctx.conv)
    return to_weights, [None] * len(masks), *[None] * 10


def _activation_pattern_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, half_width, norms, radius, activation, first, second, box_behind = inputs
    ctx.save_for_backward(values, half_width, norms, radius, first, second)
    ctx.activation, ctx.box_behind = activation, box_behind
    ctx.mark_non_differentiable(output[2], output[3], output[5])


def _activation_pattern_backward(
    ctx: Any, grad_values: Tensor, grad_half_width: Tensor, _row: Any, _col: Any, grad_slack: Tensor, _varying: Any
) -> tuple[Tensor | None, ...]:
    values, half_width, norms, radius, first, second = ctx.saved_tensors
    bounds = (values, half_width, norms, radius, ctx.activation, first, second, ctx.box_behind)
    grads = _ops.activation_pattern_backward(grad_values, grad_half_width, grad_slack, *bounds)
    to_values, to_half_width, to_norms, to_radius, to_first, to_second = grads
    return (
        to_values,
        None if half_width is None else to_half_width,
        to_norms,
        to_radius,
        None,
        None if first is None else to_first,
        None if second is None else to_second,
        None,
    )


def _margin_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _margin_backward(ctx: Any, grad_gain: Tensor, _step: Tensor) -> tuple[Tensor | None, ...]:
    return *_ops.margin_backward(grad_gain, *ctx.saved_tensors), None


for _name, _backward, _setup in (
    ("affine", _affine_backward, _affine_setup),
    ("masked_norm", _masked_norm_backward, _masked_norm_setup),
    ("chain_norm", _chain_norm_backward, _chain_norm_setup),
    ("activation_pattern", _activation_pattern_backward, _activation_pattern_setup),
    ("margin", _margin_backward, _margin_setup),
):
    torch.library.register_autograd(f"locallip_cuda::{_name}", _backward, setup_context=_setup)


def _not_twice(ctx: Any, *_grads: Any) -> NoReturn:
    raise NotImplementedError(
        "locallip_cuda: bounds have no second derivative, want one backward pass through them: the singular vectors of "
        "a norm, its masks and a margin's multiplier are held constant in the first"
    )


for _name in ("affine", "masked_norm", "chain_norm", "activation_pattern", "margin"):
    torch.library.register_autograd(f"locallip_cuda::{_name}_backward", _not_twice)
