"""The paper's published method in plain PyTorch: the baseline of the training-step benchmarks.

Huang, Zhang, Shi, Kolter, Anandkumar, "Training Certifiably Robust Neural Networks with Efficient Local Lipschitz
Bounds" (NeurIPS 2021), whose code extends box constraint propagation (Lee, Lee, Park, NeurIPS 2020):

1. Propagate, layer by layer, a box (centre through W, half-width through |W|) and a ball whose radius is
   multiplied by the *global* norm of each layer; intersect both before and after each activation. The ball bounds a
   pre-activation by the radius times the norm of its row; for a convolution that is the norm of the whole kernel, at
   the zero-padded borders too.
2. Read from the pre-activation box which rows and columns are constant.
3. Power iteration per sample on each masked operator; the product of these *local* norms times eps is the radius at the
   last layer's input, and it is used nowhere else.
4. Worst logits from the intersection of ball and box by a loop that clips what leaves the box and stretches the rest to
   the radius that remains.

Gradients flow through all of it, every step of the power iterations included.

Two things are left to the caller, so that a benchmark can time the method both as published and as a careful user
of plain PyTorch would write it. Published: the clean loss has a forward pass of its own; here the bound pass has the
clean logits too. Published: worst logits are computed for all K x K pairs of classes, of which K are then used
(`all_pairs=True`); without it, for the label's K pairs.

Where the rest departs from the published code it does less work, so that the baseline is not slowed down by what the
method does not need:

- the first layer's box centre, which is its clean value, is computed once;
- bounds are kept as lower and upper ends (published: converted to centre and half-width and back at every step);
- masks come from comparisons (published: zeros, ones and indexed writes);
- the power iterations run a fixed number of steps (published: they also test for convergence at every step, which
  costs a pass over the vectors and, on a GPU, a synchronisation; at the recipes' 1 to 5 steps it never stops them);
- random starts are drawn by `random_state` ahead of time, so that a benchmark need not time them (published:
  the last epoch's vectors are stored for every training sample, and copied in and out at every step).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin

# The published code's guard against division by zero and against the infinite slope of a square root at zero.
TINY = 1e-12


@dataclass
class PowerState:
    """Start vectors per layer but the last: `shared` (1, *input) for the global norms, `per_sample` (B, *input)."""

    shared: list[Tensor] = field(default_factory=list)
    per_sample: list[Tensor] = field(default_factory=list)


@dataclass
class PaperBounds:
    """What `paper_bounds` returns; shapes as in `locallip_cuda.bounds.LocalBounds`, masks as floats (1 = can vary)."""

    logits: Tensor
    radius: Tensor
    lipschitz: Tensor
    layer_norms: Tensor
    global_norms: Tensor
    features: Tensor
    lower: Tensor
    upper: Tensor
    column_masks: list[Tensor | None]
    row_masks: list[Tensor | None]
    weight: Tensor
    state: PowerState

    def worst_logits(self, y: Tensor, steps: int = 1, *, all_pairs: bool = False) -> Tensor:
        """Logit y as it is, every other raised by what the loop of `steps` rounds gives. (B, K)."""
        low, high = (self.lower - self.features).clamp(max=0), (self.upper - self.features).clamp(min=0)
        classes = torch.arange(len(self.weight), device=y.device)
        if all_pairs:
            difference = self.weight.unsqueeze(0) - self.weight.unsqueeze(1)  # [i, j] is w_j - w_i
            gain = translation_loop(
                difference[None], self.radius.view(-1, 1, 1), low[:, None, None], high[:, None, None], steps
            )
            gain = gain[torch.arange(len(y), device=y.device), y]
        else:
            difference = self.weight - self.weight[y].unsqueeze(1)  # (B, K, h)
            gain = translation_loop(difference, self.radius.view(-1, 1), low[:, None], high[:, None], steps)
        return self.logits + gain * (classes != y.unsqueeze(1))


def translation_loop(difference: Tensor, radius: Tensor, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """max of difference . delta over the ball of `radius` and low <= delta <= high, from above.

    difference (..., h), radius (...), low <= 0 <= high (..., h), broadcast against each other; returns (...). Every
    round fixes the coordinates that reach the box at its side and stretches the others to the radius that remains. It
    ends when none leaves the box (then it is the maximum), or after `steps` rounds.
    """
    delta = radius.unsqueeze(-1) * F.normalize(difference, dim=-1)
    for _ in range(steps):
        below, above = delta <= low, delta >= high
        clipped = torch.where(below, low, torch.where(above, high, torch.zeros_like(delta)))
        free = delta.masked_fill(below | above, 0)
        remaining = (radius.square() - clipped.square().sum(-1)).clamp(min=0)
        stretch = (remaining + TINY).sqrt() / (free.square().sum(-1) + TINY).sqrt()
        delta = clipped + stretch.unsqueeze(-1) * free
        if not ((delta < low) | (delta > high)).any():
            break
    return (difference * delta).sum(-1)


def paper_bounds(
    model: nn.Sequential, x: Tensor, eps: float | Tensor, iterations: int, state: PowerState | None = None
) -> PaperBounds:
    """Bounds of `model` within ‖x' - x‖ <= eps by the published method, differentiable by autograd.

    model: Conv2d, Linear, Flatten, ReLU, ClippedReLU, MaxMin, ClippedMaxMin, the last a Linear. x: (B, *input). eps: a
    number or (B,). iterations: power steps for local and global norms. state: start vectors (random when None); the
    vectors reached are in the result's `state`.
    """
    layers = list(model)
    if not isinstance(layers[-1], nn.Linear):
        raise TypeError(f"model must end in Linear, got {type(layers[-1]).__name__}")
    starts = random_state(model, x) if state is None else state
    batch = len(x)
    radius0 = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(batch)
    mu, radius = x, radius0
    lower, upper = x - _per_sample(radius0, x), x + _per_sample(radius0, x)
    global_norms: list[Tensor] = []
    reached = PowerState()
    operators: list[nn.Conv2d | nn.Linear] = []
    columns: list[Tensor | None] = [None]
    rows: list[Tensor | None] = []

    for index, layer in enumerate(layers[:-1]):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            clean = layer(mu)
            box_centre = layer((upper + lower) / 2) if operators else clean
            box_half = _apply(layer, (upper - lower) / 2, layer.weight.abs())
            lower, upper = box_and_ball(clean, box_centre, box_half, layer.weight.flatten(1).norm(dim=1), radius)
            norm, vector = _power_iteration(layer, starts.shared[len(operators)], None, None, iterations)
            reached.shared.append(vector)
            global_norms.append(norm)
            radius = radius * norm
            mu = clean
            operators.append(layer)
            rows.append(None)
            columns.append(None)
        elif isinstance(layer, nn.Flatten):
            mu, lower, upper = layer(mu), layer(lower), layer(upper)
            if operators and columns[-1] is not None:
                columns[-1] = layer(columns[-1])
        elif isinstance(layer, nn.ReLU | ClippedReLU | MaxMin | ClippedMaxMin):
            rows[-1] = row_mask(layer, lower, upper)
            reach = _per_sample(radius, mu)
            lower, upper = (
                torch.maximum(layer(lower), layer(mu - reach)),
                torch.minimum(layer(upper), layer(mu + reach)),
            )
            mu = layer(mu)
            columns[-1] = rows[-1] if rows[-1] is not None else column_mask(layer, lower, upper)
        else:
            raise TypeError(f"model[{index}]: {type(layer).__name__} is not part of the published method")

    norms: list[Tensor] = []
    for number, layer in enumerate(operators):
        norm, vector = _power_iteration(layer, starts.per_sample[number], rows[number], columns[number], iterations)
        reached.per_sample.append(vector)
        norms.append(norm)
    layer_norms = torch.stack(norms, 1)
    lipschitz = layer_norms.prod(1)
    return PaperBounds(
        logits=layers[-1](mu),
        radius=lipschitz * radius0,
        lipschitz=lipschitz,
        layer_norms=layer_norms,
        global_norms=torch.cat(global_norms),
        features=mu,
        lower=lower,
        upper=upper,
        column_masks=columns,
        row_masks=rows,
        weight=layers[-1].weight,
        state=reached,
    )


def box_and_ball(
    clean: Tensor, centre: Tensor, half: Tensor, row_norms: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of the box centre +- half intersected with the ball clean +- radius * row_norms.

    clean, centre, half: (B, C, ...); row_norms (C,); radius (B,).
    """
    ball = _per_sample(radius, clean) * row_norms.view(1, -1, *[1] * (clean.dim() - 2))
    return torch.maximum(centre - half, clean - ball), torch.minimum(centre + half, clean + ball)


def row_mask(activation: nn.Module, lower: Tensor, upper: Tensor) -> Tensor | None:
    """1 where a unit of ReLU or ClippedReLU can vary between its pre-activation bounds; None for other activations."""
    if isinstance(activation, nn.ReLU):
        return (upper > 0).to(upper.dtype)
    if isinstance(activation, ClippedReLU):
        return ((upper > 0) & (lower < activation.threshold)).to(upper.dtype)
    return None


def column_mask(activation: nn.Module, lower: Tensor, upper: Tensor) -> Tensor | None:
    """1 where an output of ClippedMaxMin can vary, from the bounds of its outputs; None for other activations."""
    if not isinstance(activation, ClippedMaxMin):
        return None
    low_max, high_min = lower.chunk(2, 1)[0], upper.chunk(2, 1)[1]
    return torch.cat([low_max < activation.upper, high_min > activation.lower], 1).to(upper.dtype)


def robust_cross_entropy(bounds: PaperBounds, y: Tensor, steps: int = 1, *, all_pairs: bool = False) -> Tensor:
    """Cross entropy of the worst logits: BCP's robust loss."""
    return F.cross_entropy(bounds.worst_logits(y, steps, all_pairs=all_pairs), y)


def gloro(bounds: PaperBounds, y: Tensor, steps: int = 1, *, all_pairs: bool = False) -> Tensor:
    """Cross entropy of the clean logits and one more, the largest worst logit of another class (Leino et al. 2021)."""
    worst = bounds.worst_logits(y, steps, all_pairs=all_pairs)
    other = worst.scatter(1, y.unsqueeze(1), float("-inf")).amax(1, keepdim=True)
    return F.cross_entropy(torch.cat([bounds.logits, other], 1), y)


def masked_power_norm(
    layer: nn.Conv2d | nn.Linear, start: Tensor, rows: Tensor | None, columns: Tensor | None, iterations: int
) -> Tensor:
    """Norm of diag(rows) W diag(columns) per sample after `iterations` power steps from `start` (B, *input). (B,)."""
    return _power_iteration(layer, start, rows, columns, iterations)[0]


def random_state(model: nn.Sequential, x: Tensor) -> PowerState:
    """Standard normal start vectors for every operator of `model` below the last, at x's shape, dtype and device."""
    state = PowerState()
    for shape in _input_shapes(model, x):
        state.shared.append(torch.randn(1, *shape, dtype=x.dtype, device=x.device))
        state.per_sample.append(torch.randn(len(x), *shape, dtype=x.dtype, device=x.device))
    return state


def _input_shapes(model: nn.Sequential, x: Tensor) -> Iterator[torch.Size]:
    with torch.no_grad():
        value = x[:1]
        for layer in list(model)[:-1]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                yield value.shape[1:]
            value = layer(value)


def _power_iteration(
    layer: nn.Conv2d | nn.Linear, vector: Tensor, rows: Tensor | None, columns: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor]:
    weight = layer.weight
    shape = vector.shape[1:]
    if columns is not None:
        vector = vector * columns
    image = vector
    for _ in range(iterations):
        image = _apply(layer, vector, weight)
        if rows is not None:
            image = image * rows
        image = image / _per_sample(image.flatten(1).norm(dim=1) + TINY, image)
        vector = _apply_transpose(layer, image, weight, shape)
        if columns is not None:
            vector = vector * columns
        vector = vector / _per_sample(vector.flatten(1).norm(dim=1) + TINY, vector)
    # The left vector is masked already: the rows need no second mask.
    return (image * _apply(layer, vector, weight)).flatten(1).sum(1), vector.detach()


def _apply(layer: nn.Conv2d | nn.Linear, value: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(value, weight)
    return F.conv2d(value, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _apply_transpose(layer: nn.Conv2d | nn.Linear, value: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(value, weight.t())
    # Rows and columns of the input that a stride leaves over at the far border.
    extra = [
        size - ((out - 1) * stride - 2 * int(pad) + dilation * (kernel - 1) + 1)
        for size, out, stride, pad, dilation, kernel in zip(
            shape[1:], value.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
    ]
    return F.conv_transpose2d(value, weight, None, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))
