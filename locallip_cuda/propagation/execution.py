"""The network as it runs: how far what floating point computes is from the real network, over the whole ball.

Let h be a value of the real network at some x' of the ball that is a number of the type, and h^ what ``model(x')``
computes of it. Carried beside every fact are, for all such x' at once,

- apart: |h^ - h| of every number,   distance: ||h^ - h||_2,   magnitude: at least |h^|.

An affine layer z = sum_k A_k h_k + b computes z^ = z + sum_k A_k (h^_k - h_k) + e with

    |e| <= gamma(n) (|A| |h^| + |b|) + underflow =: eta.

Every number that z^ is a sum of is a product of stored numbers, one way from an input or a bias to the output, times
(1 + d) for each rounding on that way, |d| <= u, whatever the order of summation, and with or without fused products
(Higham, section 3.1). n counts them: those of sums, and ``PER_MAP`` for the product, an entry that is computed, or was
rounded to the type first, and the bias. A sum does not round for terms that are 0, so a dense layer counts its inputs
that are not. |A| |h^| is the smaller of that of the box, and |A| (|h| + |h^ - h|) at the centre plus the ball's radius
times the norm of the row of |A|.

    apart = eta + min(sum_k |A_k| apart_k, sum_k ||(A_k)_i diag(c_k)|| distance_k)

widens the bounds of the pre-activations before the masks are chosen: then units that went are constant, and the same,
in both networks. With row mask v, and the proved norm of the layer,

    distance = L min(sum_k ||diag(v) A_k diag(c_k)|| distance_k + ||diag(v) eta||, ||diag(v) apart||),

L the constant of the activation, which is exact where it chooses, and adds its own error where it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..norms.linear import Composed, Convolution, Dense, Identity, LinearMap, Rearrangement, Sum
from ..rounding import TINY, UNIT, down, gamma, up
from .graph import Joined, Layer, Term, UnsupportedModuleError, View, joined_radius
from .rules import Activation, Lipschitz, MaxPool
from .trace import at

EXECUTIONS = ("real", "float64", "float32")

# roundings of a map besides those of its sums: products, computed entries, the bias
PER_MAP = 8

# relative and absolute error of an activation that computes, in units of roundoff
COMPUTED_ERROR = 64

# elements (sample, class, feature) of the logits' pairs at a time
CHUNK = 2**22


@dataclass(frozen=True)
class Arithmetic:
    """A floating-point type: its unit roundoff, its smallest normal number, and its largest."""

    dtype: torch.dtype
    unit: float
    tiny: float
    largest: float

    @staticmethod
    def of(dtype: torch.dtype) -> Arithmetic:
        info = torch.finfo(dtype)
        return Arithmetic(dtype, info.eps / 2, info.tiny, info.max)

    def relative(self, roundings: Tensor) -> Tensor:
        """gamma of so many roundings; infinite where they are too many for it."""
        share = roundings * self.unit
        return torch.where(share < 0.1, up(share / (1 - share)) * (1 + 8 * UNIT), math.inf)


def arithmetic_of(execution: str, dtype: torch.dtype) -> Arithmetic | None:
    """None for real arithmetic. ValueError for another name, or for float32 of a network in float64."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution: got {execution!r}, want one of {', '.join(map(repr, EXECUTIONS))}")
    if execution == "real":
        return None
    if execution == "float32" and dtype != torch.float32:
        raise ValueError(f"execution: got 'float32' and a network in {dtype}, want model.float(), or 'float64'")
    return Arithmetic.of(torch.float32 if execution == "float32" else torch.float64)


@dataclass(eq=False)
class Computed:
    """Of one value, beside the real one: apart (B, *), distance (B,), magnitude (B, *), float64, from above."""

    apart: Tensor
    distance: Tensor
    magnitude: Tensor


def viewed_computed(step: View, computed: Computed) -> Computed:
    move = step.rearrangement
    return Computed(move(computed.apart), computed.distance, move(computed.magnitude))


def joined_computed(step: Joined, parts: Sequence[Computed]) -> Computed | None:
    if not parts:
        return None
    apart, magnitude = (
        torch.cat(list(t), step.dim) for t in zip(*((p.apart, p.magnitude) for p in parts), strict=True)
    )
    return Computed(apart, joined_radius([p.distance for p in parts], up), magnitude)


@dataclass(eq=False)
class Input:
    """What a term of a layer is of.

    values: (B, *) at least the sizes of the clean ones.   computed: what runs.   reach: (B, *output), radius times the
    norms of the rows of |A|.   rows: (B, *output) the norms of the rows of A, of the columns that vary.
    """

    values: Tensor
    computed: Computed
    reach: Tensor
    rows: Tensor


class Running:
    """The recursion of one batch. within: (B,) whether no number of the network can overflow."""

    def __init__(self, arithmetic: Arithmetic, batch: int, device: torch.device) -> None:
        self.arithmetic = arithmetic
        self.within = torch.ones(batch, dtype=torch.bool, device=device)

    def start(self, x: Tensor, eps: Tensor) -> Computed:
        """Of the input, any number of the type within ``eps`` (B,)."""
        magnitude = up(x.abs() + column(eps, x))
        return Computed(torch.zeros_like(x), torch.zeros_like(eps), magnitude)

    def affine(self, layer: Layer, inputs: Sequence[Input]) -> tuple[Tensor, Tensor]:
        """(B, *output) eta and apart of the layer's pre-activations."""
        size, near, far, under = (torch.zeros_like(inputs[0].reach) for _ in range(4))
        roundings = torch.zeros_like(inputs[0].computed.distance)
        for term, own in zip(layer.terms, inputs, strict=True):
            c = own.computed
            state = torch.stack([c.magnitude, up(own.values + c.apart), c.apart, torch.zeros_like(c.apart)])
            state, count = self._through(term.parts, state)
            size = up(size + torch.minimum(state[0], up(state[1] + own.reach)))
            near, under = up(near + state[2]), up(under + state[3])
            far = up(far + up(own.rows * column(c.distance, far)))
            # bias_terms has the roundings of all maps, those that only add a constant too
            others = max(layer.bias_terms - term.parts.terms - term.parts.roundings, 0)
            roundings = torch.maximum(roundings, count + others + len(inputs) + PER_MAP)
        self.within &= layer.bias_most < self.arithmetic.largest / 4
        if layer.bias_size is not None:
            size = up(size + layer.bias_size.abs() * (1 + gamma(layer.bias_terms + 8)) + TINY)
        self.within &= size.flatten(1).amax(1) < self.arithmetic.largest / 4
        eta = up(up(size * column(self.arithmetic.relative(roundings), size)) + under)
        return eta, up(eta + torch.minimum(near, far))

    def _through(self, linear: LinearMap, state: Tensor) -> tuple[Tensor, Tensor]:
        """|A| of a stack (4, B, *), of which the last is what underflow does, and the roundings of each sample."""
        batch = state.shape[1]
        if isinstance(linear, (Identity, Rearrangement)):
            return _stacked(linear, state), state.new_zeros(batch)
        if isinstance(linear, Composed):
            total = state.new_zeros(batch)
            for part in linear.maps:
                state, count = self._through(part, state)
                total = total + count
            return state, total
        if isinstance(linear, Sum):
            parts = [self._through(part, state) for part in linear.maps]
            total, most = parts[0]
            for other, count in parts[1:]:
                total, most = up(total + other), torch.maximum(most, count)
            return total, most + len(parts)
        a = self.arithmetic
        terms = torch.full((batch,), float(linear.terms), dtype=torch.float64, device=state.device)
        if isinstance(linear, Dense):
            terms = (state[0] > 0).sum(1).double()
        weight = max(float(each.abs().max()) for each in linear.weights())
        most = state[0].flatten(1).amax(1)
        out = _stacked(partial(of_sizes, linear), state)
        # results, operands and entries that are denormal may count as zeros
        under = a.tiny * (linear.terms + PER_MAP) * (4 + most + weight)
        out = torch.cat([out[:3], up(out[3:] + column(up(under), out[3]))])
        largest = torch.maximum(out[0], out[1]).flatten(1).amax(1)
        self.within &= (largest < a.largest / 4) & (most < a.largest / 4) & (weight < a.largest / 4)
        return out, terms + linear.roundings + PER_MAP

    def closed(
        self,
        layer: Layer,
        inputs: Sequence[Input],
        norms: Sequence[Tensor | None],
        eta: Tensor,
        apart: Tensor,
        rows: Tensor,
        columns: Tensor,
        most: Tensor,
    ) -> Computed:
        """Behind the activation.

        norms: of the terms between the masks (None: 1).   rows, columns: the masks.   most: (B, *) the largest size of
        what the activation makes of the widened box.
        """
        activation = layer.activation
        grown = length(torch.where(rows, eta, 0))
        for own, norm in zip(inputs, norms, strict=True):
            distance = own.computed.distance
            grown = up(grown + (distance if norm is None else up(norm * distance)))
        distance = torch.minimum(grown, length(torch.where(rows, apart, 0)))
        if activation.lipschitz != 1:
            distance = up(distance * activation.lipschitz)
        error = self._error(layer, most)
        out: Tensor | None = None
        if activation.slopes is not None:
            slope = max(abs(s) for s in activation.slopes)
            out = apart if slope == 1 else up(apart * slope)
        elif activation.kind in ("maxmin", "clipped_maxmin"):
            first, second = apart.chunk(2, 1)
            out = torch.maximum(first, second).repeat(1, 2, *[1] * (apart.dim() - 2))
        elif isinstance(activation, MaxPool):
            out = activation.function(apart)
        elif activation.valley is not None:  # of every number by itself
            out = up(apart * activation.lipschitz)
        if error is not None:
            distance = up(distance + length(error.expand_as(most)))
            out = None if out is None else up(out + error)
        limit = column(distance, most).expand_as(most)
        magnitude = most if error is None else up(most + error)
        if out is None:
            magnitude = up(magnitude + limit)
        out = torch.where(columns, limit if out is None else torch.minimum(out, limit), 0)
        self.within &= magnitude.flatten(1).amax(1) < self.arithmetic.largest / 4
        return Computed(out, distance, magnitude)

    def _error(self, layer: Layer, most: Tensor) -> Tensor | None:
        """What the activation's own arithmetic is off by; None where it only chooses."""
        activation: Activation = layer.activation
        if isinstance(activation, Lipschitz):
            if self.arithmetic.dtype != torch.float64 or activation.error is None:
                raise UnsupportedModuleError(
                    f"{at(layer.activation_path)}: its rule says what float64 does to it, not {self.arithmetic.dtype}; "
                    "want execution='float64' or 'real'"
                )
            return torch.full_like(most, activation.error)
        if activation.exact and (activation.kind or isinstance(activation, MaxPool)):
            return None
        return up(COMPUTED_ERROR * self.arithmetic.unit * (1 + most) + 2 * self.arithmetic.tiny)


def widened(lower: Tensor, upper: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """A box that holds the computed values too."""
    return down(lower - apart), up(upper + apart)


def length(t: Tensor) -> Tensor:
    """(B,) at least the l2 norms of (B, *)."""
    flat = t.flatten(1).abs()
    largest = flat.amax(1).clamp_min(2.0**-1000).nan_to_num(posinf=2.0**1000).clamp_max(2.0**1000)
    scaled = up(flat / largest.unsqueeze(1))  # squares neither overflow nor vanish
    squares = scaled.square().sum(1) * (1 + gamma(flat.shape[1] + 8)) + flat.shape[1] * TINY
    return up(up(up(squares).sqrt() * (1 + 4 * UNIT)) * largest)


def applied(linear: LinearMap, x: Tensor) -> Tensor:
    """A x of one kernel, by the op, which keeps cuDNN out."""
    if not isinstance(linear, (Dense, Convolution)):
        return linear(x)
    weight, inner, _, geometry = linear.planar()
    return ops.affine(x.reshape(len(x), *inner), weight, None, *geometry).reshape(len(x), *linear.output_sizes)


def of_sizes(linear: LinearMap, sizes: Tensor) -> Tensor:
    """At least |A| ``sizes`` of one kernel, of sizes >= 0."""
    spread = applied(linear.absolute(), sizes)
    return up(spread * (1 + gamma(linear.terms + 2 * linear.roundings + 16)) + 4 * (linear.terms + 4) * TINY)


def _stacked(function: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """A function of batches, of each of a stack (n, B, *)."""
    out = function(state.flatten(0, 1))
    return out.view(*state.shape[:2], *out.shape[1:])


def rows_of_sizes(term: Term, columns: Tensor) -> Tensor:
    """At least the norms of the rows of |A|, of a map as it is written in the network."""
    squares = term.parts.squared()(columns) if not isinstance(term.parts, Identity) else columns
    spread = 1 + 2 * gamma(term.parts.terms + term.parts.roundings + 16)
    return up(up(squares * spread + term.parts.terms * 4 * TINY).sqrt() * (1 + 4 * UNIT))


def pairs_apart(
    weight: Tensor, weight_error: Tensor | None, columns: Tensor | None, y: Tensor, apart: Tensor, distance: Tensor
) -> Tensor:
    """(B, K) at least |(w_j - w_y) . (h^ - h)|, of rows ``weight`` (K, h), features ``apart`` (B, h), labels (B,)."""
    parts = []
    chunk = max(CHUNK // weight.numel(), 1)
    for first in range(0, len(y), chunk):
        own = slice(first, first + chunk)
        direction = (weight - weight[y[own]].unsqueeze(1)).abs()
        if weight_error is not None:
            direction = up(direction + up(weight_error + weight_error[y[own]].unsqueeze(1)))
        direction = direction * (1 + 4 * UNIT)
        box = (direction * apart[own].unsqueeze(1)).sum(2) * (1 + gamma(weight.shape[1] + 8)) + weight.shape[1] * TINY
        moving = direction if columns is None else direction * columns[own].flatten(1).unsqueeze(1)
        ball = up(length(moving.flatten(0, 1)).view(box.shape) * distance[own].unsqueeze(1))
        parts.append(torch.minimum(up(box), ball))
    return torch.cat(parts) if parts else distance.new_zeros(0, len(weight))


def column(t: Tensor, like: Tensor) -> Tensor:
    """(B,) or (1,) as what broadcasts to ``like`` (B, *)."""
    return t.view(-1, *[1] * (like.dim() - 1))
