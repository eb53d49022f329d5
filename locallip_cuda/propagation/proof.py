"""Local bounds that are proofs: the pass of :mod:`.estimate` again, in float64 and rounded outward.

What is proved is a statement about the network in real arithmetic with its weights as they are stored. Everything
carried is a float64 number and a bound of its distance from the real one:

- the clean value: centre mu and error e, |real - mu| <= e;
- the box over the ball: centre c and half-width w, |real - c| <= w;
- the radius r, rounded up.

An affine layer with m terms to a row maps a centre x and half-width d to fl(W x + b) with half-width
|W| (d + gamma |x|) + gamma |b|, gamma = gamma(m + 8): m + 2 roundings of the sum (Higham, section 3.1), and room for
weights and biases that are themselves the result of up to 4 roundings (of AvgPool2d and Normalize). That half-width
is again a sum of positive numbers, rounded up by its own relative error. Activations are monotone: they map the end
points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import halves
from ..norms.masked_norm import norm_bound
from ..rounding import TINY, UNIT, down, gamma, up
from .layers import Activation, Leaf, Operator, UnsupportedModuleError, at

# relative and absolute error that is allowed to a smooth activation of torch in float64, in units of UNIT
SMOOTH_ERROR = 16

# relative width of the probabilistic norms, which multiply up over the layers
TIGHTNESS = 1.5e-3

# elements (sample, class, feature) of the margin at a time
CHUNK = 2**22


def _end_points(centre: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    return down(centre - half_width), up(centre + half_width)


def _centred(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    centre = lower / 2 + upper / 2
    return centre, torch.maximum(up(upper - centre), up(centre - lower))


def affine(operator: Operator, centre: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and half-width of what ``operator``, with float64 weights, maps a box to."""
    terms = operator.weight[0].numel()
    size, relative = operator.weight.abs(), gamma(terms + 8)
    bias = None if operator.bias is None else operator.bias.abs() * relative
    out = operator(centre, operator.weight, operator.bias)
    spread = operator(up(half_width + relative * centre.abs() * (1 + 4 * UNIT)), size, bias)
    return out, up(spread * (1 + gamma(terms + 16)) + 4 * (terms + 4) * TINY)


def row_norms(operator: Operator, columns: Tensor) -> Tensor:
    """At least ``||W_i * columns||`` of every row i."""
    terms = operator.weight[0].numel()
    squared = operator(columns, operator.weight.square())
    return up((squared * (1 + gamma(terms + 8)) + 4 * terms * TINY).sqrt()) * (1 + 4 * UNIT)


def check_provable(modules: Sequence[Leaf]) -> None:
    """UnsupportedModuleError for a module that the estimate supports and no proof does.

    In training mode a parametrisation may give other weights at every read, as torch's spectral_norm does.
    """
    for leaf in modules:
        if leaf.kind is nn.Softplus:
            raise UnsupportedModuleError(
                f"{at(leaf.path)}: {leaf.module} has no proof, because torch's jumps at its threshold; "
                "want another activation, or guarantee='estimate'"
            )
        for name, tensor in (*leaf.module.named_parameters(), *leaf.module.named_buffers()):
            if type(tensor) not in (Tensor, nn.Parameter):
                raise UnsupportedModuleError(
                    f"{at(leaf.path)}: its {name} is a {type(tensor).__name__} and has no bound, because it may "
                    "compute otherwise than a tensor; want a torch.Tensor"
                )
        for name in getattr(leaf.module, "parametrizations", ()):
            if not torch.equal(getattr(leaf.module, name), getattr(leaf.module, name)):
                raise UnsupportedModuleError(
                    f"{at(leaf.path)}: its parametrised {name} changes from one read to the next; want eval mode"
                )


class Rounded:
    """An activation on end points: what it maps them to, and what can still vary between them."""

    def __init__(self, activation: Activation) -> None:
        self.kind, self.activation = activation.kind, activation
        self.first = None if activation.first is None else activation.first.detach().double()
        self.second = None if activation.second is None else activation.second.detach().double()

    def __call__(self, z: Tensor, direction: int) -> Tensor:
        """phi(z), rounded to +inf (``direction`` 1) or to -inf (-1), or as it is (0)."""
        match self.kind:
            case "identity":
                return z
            case "relu":
                return z.clamp_min(0)
            case "clipped_relu":
                assert self.first is not None
                return torch.minimum(z.clamp_min(0), self.first)
            case "maxmin" | "clipped_maxmin":
                a, b = halves(type(self.activation.module).__name__, z)
                largest, smallest = torch.maximum(a, b), torch.minimum(a, b)
                if self.first is not None and self.second is not None:
                    largest, smallest = torch.minimum(largest, self.first), torch.maximum(smallest, self.second)
                return torch.cat([largest, smallest], 1)
        value = self.activation(z)
        return value if not direction else value + direction * (SMOOTH_ERROR * UNIT * (1 + value.abs()) + TINY)

    def varying(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row mask, column mask, and the two sparsity terms (B, 2) of :func:`locallip_cuda.losses.sparsity`."""
        zero = lower.new_zeros(len(lower))

        def mean(t: Tensor) -> Tensor:
            return t.clamp_min(0).flatten(1).mean(1)

        varies = torch.ones_like(lower, dtype=torch.bool)
        if self.kind in ("relu", "clipped_relu"):
            varies, slack = ~(upper <= 0), [mean(upper), zero]
            if self.first is not None:
                varies, slack = varies & ~(lower >= self.first), [slack[0], mean(self.first - lower)]
            return varies, varies, torch.stack(slack, 1)
        if self.kind != "clipped_maxmin":
            return varies, varies, torch.stack([zero, zero], 1)
        assert self.first is not None and self.second is not None
        (lower_a, lower_b), (upper_a, upper_b) = lower.chunk(2, 1), upper.chunk(2, 1)
        top, bottom = torch.maximum(lower_a, lower_b), torch.minimum(upper_a, upper_b)
        top_varies, bottom_varies = ~(top >= self.first), ~(bottom <= self.second)
        a_first, b_first, either = lower_a >= upper_b, lower_b >= upper_a, top_varies | bottom_varies
        row_a = torch.where(a_first, top_varies, torch.where(b_first, bottom_varies, either))
        row_b = torch.where(a_first, bottom_varies, torch.where(b_first, top_varies, either))
        slack = [mean(self.first - top) + mean(bottom - self.second), zero]
        return torch.cat([row_a, row_b], 1), torch.cat([top_varies, bottom_varies], 1), torch.stack(slack, 1)


class ProvedPropagation:
    """The state of one pass: what is proved of the values behind the layers that have been passed."""

    def __init__(
        self,
        x: Tensor,
        eps: Tensor,
        radius: str,
        guarantee: str,
        failure_probability: float,
        seed: int | None,
        operators: int,
    ) -> None:
        """``operators``: how many there are, the last one not counted; they share the failure probability."""
        if not bool(x.isfinite().all()):
            raise ValueError("x: got NaN or infinite values, want finite ones")
        self.batch, self.eps, self.local, self.guarantee = len(x), eps, radius == "local", guarantee
        self.dtype = x.dtype
        norms = max(operators * (1 if self.local else 2), 1)
        self.failure_probability, self.seed = failure_probability / norms, seed
        self.values = x.detach().to(torch.float64, copy=True)
        self.error = torch.zeros_like(self.values)
        # as in the estimate: at the input the ball lies inside the box, and needs none behind the first operator
        self.centre: Tensor | None = None
        self.half_width: Tensor | None = None
        self.reach = self.eps
        self.column_mask: Tensor | None = None
        self.row_masks: list[Tensor] = []
        self.column_masks: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.sparsity_terms: list[Tensor] = []
        self.operators: list[tuple[Operator, list[int]]] = []
        self.input_masks: list[Tensor | None] = []

    def pass_layer(self, path: str, operator: Operator | None, activation: Activation) -> None:
        """One layer: ``operator`` (the identity where None), then ``activation``."""
        rounded = Rounded(activation)
        sizes, columns = list(self.values.shape[1:]), self.column_mask
        considered = self.values.new_ones(1, *sizes) if columns is None or not self.local else columns.double()
        norms = considered
        if operator is not None:
            operator = self.exact(path, operator)
            self.values, self.error = affine(operator, self.values, self.error)
            if self.centre is not None and self.half_width is not None:
                self.centre, self.half_width = affine(operator, self.centre, self.half_width)
            norms = row_norms(operator, considered)
        activation(self.values[:1])  # raises where its shape does not fit
        reach = self.reach.view(-1, *[1] * len(self.values.shape[1:]))
        lower, upper = _end_points(self.values, up(up(reach * norms) + self.error))
        if self.centre is not None and self.half_width is not None:
            box = _end_points(self.centre, self.half_width)
            lower, upper = torch.maximum(lower, box[0]), torch.minimum(upper, box[1])
        rows, self.column_mask, slack = rounded.varying(lower, upper)
        clean = _end_points(self.values, self.error)
        least, most = rounded(clean[0], -1), rounded(clean[1], 1)
        self.values = rounded(self.values, 0)  # what float64 makes of it: the middle would drift with the error
        self.error = torch.maximum(up(most - self.values), up(self.values - least))
        self.centre, self.half_width = _centred(rounded(lower, -1), rounded(upper, 1))
        if operator is None:
            return
        if not self.local and activation.kind == "clipped_maxmin":
            rows = torch.ones_like(rows)  # the paper removes none
        norm = self._norm(path, operator, rows, columns, [self.batch, *sizes])
        reach = norm if self.local else self._norm(path, operator, None, None, [1, *sizes])
        self.reach = up(self.reach * reach)
        self.norms.append(norm)
        self.row_masks.append(rows)
        self.column_masks.append(self.column_mask)
        self.sparsity_terms.append(slack.sum(0) / max(self.batch, 1))
        self.operators.append((operator, sizes))
        self.input_masks.append(columns)

    def exact(self, path: str, operator: Operator) -> Operator:
        """``operator`` with its weights in float64; ValueError where the values do not fit it."""
        if operator.weight.dtype not in (self.dtype, torch.float64):
            raise ValueError(f"x: got {self.dtype}, want {operator.weight.dtype} as {at(path)}")
        exact = operator.snapshot(torch.float64)
        exact.check_input(path, self.values)
        return exact

    def _norm(
        self, path: str, operator: Operator, rows: Tensor | None, columns: Tensor | None, shape: list[int]
    ) -> Tensor:
        try:
            upper, _ = norm_bound(
                operator.weight,
                rows,
                columns,
                shape,
                operator.geometry,
                self.guarantee,
                self.failure_probability,
                TIGHTNESS,
                self.seed,
            )
        except ValueError as error:
            raise ValueError(f"{at(path)}: {error}") from None
        return up(upper * (1 + operator.relative_error))

    def box(self) -> tuple[Tensor, Tensor]:
        """End points of the box."""
        if self.centre is None or self.half_width is None:
            return _end_points(self.values, self.eps.unsqueeze(1))
        return _end_points(self.centre, self.half_width)

    def flatten(self) -> None:
        self.values, self.error = self.values.flatten(1), self.error.flatten(1)
        if self.centre is not None and self.half_width is not None:
            self.centre, self.half_width = self.centre.flatten(1), self.half_width.flatten(1)
        self.column_mask = None if self.column_mask is None else self.column_mask.flatten(1)


def gains(
    features: Tensor,
    error: Tensor,
    lower: Tensor,
    upper: Tensor,
    radius: Tensor,
    weight: Tensor,
    labels: Tensor,
) -> Tensor:
    """(B, K) at least what logit j can gain on the label's over the ball and the box: the dual, rounded up.

    For every t > 0 the dual is sum_i max_{l_i <= delta <= h_i} [d_i delta - delta^2 / (2 t)] + r^2 / (2 t). It is
    evaluated near the t that :func:`locallip_cuda.ops.margin_step` finds, whatever that is worth. With d off by
    u |d| and delta by 2 u |d| t from the maximiser, a term is too small by at most u |d delta| + 16 u^2 d^2 t, and the
    sum by gamma(h + 16) of the sizes of its terms.

    Args: features, error, lower, upper (B, h): clean features within ``error``, and their box; radius (B,), weight
    (K, h), labels (B,). All float64 but labels.
    """
    parts = []
    chunk = max(CHUNK // weight.numel(), 1)
    for first in range(0, len(features), chunk):
        own = [t[first : first + chunk] for t in (features, error, lower, upper, radius, labels)]
        parts.append(_gains_of_chunk(weight, *own))
    return torch.cat(parts) if parts else features.new_empty(0, len(weight))


def _gains_of_chunk(
    weight: Tensor, features: Tensor, error: Tensor, lower: Tensor, upper: Tensor, radius: Tensor, labels: Tensor
) -> Tensor:
    radius = radius.clamp_min(2.0**-400)  # squares of it do not underflow
    least, most = _end_points(features, error)
    low = down(lower - most).clamp_max(0).unsqueeze(1)
    high = up(upper - least).clamp_min(0).unsqueeze(1)
    step = ops.margin_step(features, features + low[:, 0], features + high[:, 0], radius, weight, labels)
    direction = weight - weight[labels].unsqueeze(1)
    box = torch.maximum(direction * low, direction * high).sum(2)
    inverse = 1 / step.unsqueeze(2)
    delta = (direction * step.unsqueeze(2)).clamp(low, high)
    linear, square = direction * delta, delta * (delta * inverse) / 2
    ball = (radius.unsqueeze(1) * inverse[:, :, 0]) * (radius.unsqueeze(1) / 2)
    size = linear.abs().sum(2) + square.sum(2) + ball
    terms = weight.shape[1] + 16
    slack = gamma(2 * terms) * size + 16 * UNIT**2 * step * direction.square().sum(2)
    dual = linear.sum(2) - square.sum(2) + ball + slack
    absolute = TINY * (4 * terms + direction.abs().sum(2))
    bounded = torch.minimum(dual, box * (1 + gamma(terms)))  # NaN, where step is 0 or infinite, must not stay
    return up(torch.where(dual.isfinite(), bounded, box * (1 + gamma(terms))) * (1 + 4 * UNIT) + absolute)
