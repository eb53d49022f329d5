"""Each op once more in a few lines of plain PyTorch: the oracle the compiled ops are tested against.

Nothing here is tuned. Every function is differentiable by autograd and takes the same arguments as its twin in
:mod:`locallip_cuda.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# share of the pseudo-random vector in a given start, so that no start lacks the top singular vector
NOISE = 0.1


def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``W x + bias`` for a dense weight (m, n) and x (B, n), or a convolution weight and x (B, Cin, H, W)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)


def adjoint(
    weight: Tensor,
    y: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``W^T y``; ``input_shape`` is the shape of one input of the operator, (n,) or (Cin, H, W)."""
    if weight.dim() == 2:
        return y @ weight
    shape = [y.shape[0], *input_shape]
    x = y.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        image = affine(x, weight.detach(), None, stride, padding, dilation, groups)
    return torch.autograd.grad(image, x, y)[0]


def pseudo_random(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    """Numbers in [-1, 1], none of them 0, from ``seed`` and the channels-last index alone: the same on every device."""
    last = [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else list(shape)
    low32 = 0xFFFFFFFF
    h = (torch.arange(math.prod(shape), device=like.device) * 0x9E3779B9 + seed * 0x85EBCA6B) & low32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & low32
    h = (h ^ (h >> 16)) | 1
    x = (((h ^ 2**31) - 2**31).to(torch.float32) / 2**31).to(like.dtype).view(last)
    return x.movedim(-1, 1) if len(shape) == 4 else x


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
    """Largest singular value of ``diag(row) W diag(col)`` on a Krylov space with ``iterations + 1`` dimensions.

    The space is orthonormalised twice and never restarted, and the singular value of its image is LAPACK's. Of a dense
    weight with at most 16 rows it is the whole of what A^T A reaches.
    Returns (sigma (B,), right ``input_shape``, left (B, *output)), the vectors without a gradient.
    """
    conv = (stride, padding, dilation, groups)
    if weight.dim() == 2 and weight.shape[0] <= 16:
        iterations = max(iterations, weight.shape[0] - 1)
    return _largest(
        lambda x: affine(x, weight, None, *conv),
        lambda y: adjoint(weight, y, input_shape[1:], *conv),
        row_mask,
        col_mask,
        start,
        input_shape,
        iterations,
        weight,
    )


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
    """:func:`masked_norm` of weights in a row with masks between them, as :func:`locallip_cuda.ops.chain_norm`."""

    def conv(k: int) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
        pair = slice(2 * k, 2 * k + 2)
        return stride[pair], padding[pair], dilation[pair], groups[k]

    def forward(x: Tensor) -> Tensor:
        for k, weight in enumerate(weights):
            x = affine(x, weight, None, *conv(k))
            if k < len(masks):
                x = torch.where(masks[k], x.reshape(len(x), *masks[k].shape[1:]), 0)
        return x

    def backward(y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), *input_shape[1:]).requires_grad_()
        with torch.enable_grad():
            image = forward(x)
        return torch.autograd.grad(image, x, y)[0]

    return _largest(forward, backward, row_mask, col_mask, start, input_shape, iterations, weights[0])


def _largest(
    apply: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    start: Tensor | None,
    input_shape: Sequence[int],
    iterations: int,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    def length(x: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
        return norms.view(-1, *[1] * (x.dim() - 1))

    def unit(x: Tensor, noise: Tensor | float = 0) -> Tensor:
        return torch.where(length(x) > noise, x / length(x), 0)

    def project(x: Tensor) -> Tensor:
        return x if col_mask is None else torch.where(col_mask, x, 0)

    def forward(x: Tensor) -> Tensor:
        z = apply(x)
        return z if row_mask is None else torch.where(row_mask, z, 0)

    with torch.no_grad():
        x = unit(project(pseudo_random(input_shape, 0, like)))
        if start is not None:
            x = unit(project(start.expand(*input_shape))) + NOISE * x
        right: list[Tensor] = []
        left: list[Tensor] = []
        for _ in range(iterations + 1):
            noise = 16 * torch.finfo(x.dtype).eps * length(x)  # what is no longer is rounding: the space is exhausted
            for _twice in range(2):
                for q in right:
                    x = x - q * (q * x).flatten(1).sum(1).view(-1, *[1] * (x.dim() - 1))
            right.append(unit(x, noise))
            left.append(forward(right[-1]))
            x = project(transposed(left[-1]))
        basis = torch.stack([q.flatten(1) for q in right], 2)
        image = torch.stack([z.flatten(1) for z in left], 2)
        u, s, vh = torch.linalg.svd(image, full_matrices=False)
        alive = (s[:, :1] > 0).to(like.dtype)
        best_left = (u[:, :, 0] * alive).reshape_as(left[0])
        best_right = ((basis @ vh[:, 0].unsqueeze(2)).squeeze(2) * alive).reshape_as(right[0])
    # v^T W u with u and v held constant carries exactly the analytic gradient
    sigma = (best_left * forward(best_right)).flatten(1).sum(1)
    return sigma, best_right, best_left


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
    """Bounds in; masks, box, sparsity terms and counts out, as :func:`locallip_cuda.ops.activation_pattern`."""
    batch = radius.shape[0]
    clean = values[:batch]
    reach = radius.view(-1, *[1] * (clean.dim() - 1)) * squared_row_norms.clamp_min(0).sqrt()
    lower, upper = clean - reach, clean + reach
    if half_width is not None:
        centre = values[batch:]
        lower = torch.where(centre - half_width > lower, centre - half_width, lower)
        upper = torch.where(centre + half_width < upper, centre + half_width, upper)
    zero = clean.new_zeros(batch)

    def mean(x: Tensor) -> Tensor:
        return x.clamp_min(0).flatten(1).mean(1)

    if activation in ("maxmin", "clipped_maxmin"):
        (a, b), (lower_a, lower_b), (upper_a, upper_b) = (x.chunk(2, 1) for x in (clean, lower, upper))

        def maxmin(p: Tensor, q: Tensor) -> Tensor:
            largest, smallest = torch.where(p >= q, p, q), torch.where(p >= q, q, p)
            if first is not None and second is not None:
                largest, smallest = (
                    torch.where(largest < first, largest, first),
                    torch.where(smallest > second, smallest, second),
                )
            return torch.cat([largest, smallest], 1)

        outputs = [maxmin(p, q) for p, q in ((a, b), (lower_a, lower_b), (upper_a, upper_b))]
        row_mask = col_mask = torch.ones_like(clean, dtype=torch.bool)
        slack = torch.stack([zero, zero], 1)
        if first is not None and second is not None:
            top, bottom = torch.maximum(lower_a, lower_b), torch.minimum(upper_a, upper_b)
            top_varies, bottom_varies = ~(top >= first), ~(bottom <= second)
            col_mask = torch.cat([top_varies, bottom_varies], 1)
            a_first, b_first, either = lower_a >= upper_b, lower_b >= upper_a, top_varies | bottom_varies
            row_a = torch.where(a_first, top_varies, torch.where(b_first, bottom_varies, either))
            row_b = torch.where(a_first, bottom_varies, torch.where(b_first, top_varies, either))
            row_mask = torch.cat([row_a, row_b], 1)
            slack = torch.stack([mean(first - top) + mean(bottom - second), zero], 1)
    else:

        def phi(z: Tensor) -> Tensor:
            if activation == "identity":
                return z
            return F.relu(z) if first is None else torch.where(z < first, F.relu(z), first)  # z == theta is clipped

        outputs = [phi(z) for z in (clean, lower, upper)]
        row_mask = torch.ones_like(clean, dtype=torch.bool) if activation == "identity" else ~(upper <= 0)
        if first is not None:
            row_mask = row_mask & ~(lower >= first)
        col_mask = row_mask
        slack = torch.stack(
            [zero if activation == "identity" else mean(upper), mean(first - lower) if first is not None else zero], 1
        )
    out, low, high = outputs
    varying = torch.stack([mask.flatten(1).sum(1) for mask in (row_mask, col_mask)], 1)
    values, wide = (torch.cat([out, (low + high) / 2]), (high - low) / 2) if box_behind else (out, out.new_empty(0))
    return values, wide, row_mask, col_mask, slack, varying


def margin(features: Tensor, lower: Tensor, upper: Tensor, radius: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """gain[b, j] = min over lambda > 0 of the dual of max (w_j - w_y) . delta over the ball and the box, by bisection.

    Shapes: features, lower, upper (B, h), radius (B,), weight (K, h), labels (B,) -> (B, K), 0 at the label.
    """
    direction = weight.unsqueeze(0) - weight[labels].unsqueeze(1)
    below, above = (lower - features).clamp_max(0).unsqueeze(1), (upper - features).clamp_min(0).unsqueeze(1)
    limit = radius.view(-1, 1, 1)

    def step(multiplier: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(direction / multiplier, below), above)

    with torch.no_grad():
        tiny = torch.finfo(features.dtype).tiny ** 0.5
        small = torch.full_like(direction[..., :1], tiny)
        # at lambda = ||d|| / r the ball alone holds, so the optimum is at or below it
        large = torch.where(limit > 0, direction.norm(dim=2, keepdim=True) / limit.clamp_min(tiny), 1).clamp_min(tiny)
        for _ in range(200):
            middle = (small * large).sqrt()
            inside = step(middle).norm(dim=2, keepdim=True) <= limit
            small, large = torch.where(inside, small, middle), torch.where(inside, middle, large)
    delta = step(large)
    gain = (direction * delta - large * delta.square() / 2).sum(2) + (large * limit.square()).squeeze(2) / 2
    box_only = (torch.where(direction > 0, above, below) * direction).sum(2)
    box_wins = torch.where(direction > 0, above, below).norm(dim=2) <= radius.view(-1, 1)
    gain = torch.where(box_wins, box_only, gain)
    return torch.where(limit.squeeze(2) > 0, gain, 0)


def lanczos_bound(alpha: Tensor, beta: Tensor, error: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(theta, upper) as :func:`locallip_cuda.ops.lanczos_bound`, by a dense solve at every step of a bisection."""
    steps = alpha.shape[1]
    t_matrix = torch.diag_embed(alpha)
    if steps > 1:
        t_matrix = t_matrix + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    theta = torch.linalg.eigvalsh(t_matrix)[:, -1]
    weights = error[:, None].repeat(1, steps)
    weights[:, -1] += (1 + 1e-6) * beta[:, -1]
    eye = torch.eye(steps, dtype=alpha.dtype, device=alpha.device)

    def proved(t: Tensor) -> Tensor:
        overlap = torch.linalg.solve(t[:, None, None] * eye - t_matrix, weights)[:, 0]
        holds: Tensor = overlap < level
        return holds

    low, high = theta.clamp_min(torch.finfo(alpha.dtype).tiny), torch.full_like(theta, 1e300)
    for _ in range(200):
        middle = torch.where(high > 4 * low, low.sqrt() * high.sqrt(), (low + high) / 2)
        holds = proved(middle)
        low, high = torch.where(holds, low, middle), torch.where(holds, middle, high)
    return theta, torch.where(proved(high), high, math.inf)
