"""Local bounds that are proofs: the pass in float64, rounded outward.

What is proved is a statement about the network in real arithmetic with its weights as they are stored. Everything
carried is a float64 number and a bound of its distance from the real one:

- the clean value: centre mu and error e, |real - mu| <= e;
- the box over the ball: centre c and half-width w, |real - c| <= w;
- the radius r, rounded up.

A linear map with m terms to a row maps a centre x and half-width d to fl(W x) with half-width |W| (d + gamma |x|),
gamma = gamma(m + k + 8): m roundings of the sum (Higham, section 3.1), and k of the entries where those are computed
(of BatchNorm, averages, Normalize). That half-width is again a sum of positive numbers, rounded up by its own relative
error. A map that was folded into one kernel is taken with the kernel's entries, and what these may be off by,
gamma(m + k + 16) of the sizes of what they were summed from, is applied to the same box. Activations that rise map the
end points; those that fall first have their least value between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..norms.linear import Composed, Dense, Identity, LinearMap, Rearrangement, Sum
from ..norms.linear_bound import CHAIN_UNDERFLOW, Stage, absolute_norm, product_off_by, proved_chain_norm, proved_norm
from ..rounding import TINY, UNIT, down, gamma, up
from .composition import Chain, folded_map
from .execution import (
    Arithmetic,
    Computed,
    Input,
    Running,
    applied,
    column,
    joined_computed,
    length,
    of_sizes,
    rows_of_sizes,
    viewed_computed,
    widened,
)
from .functional import Functional, Lengths
from .graph import Graph, Joined, Layer, Term, UnsupportedModuleError, View, joined_radius
from .recursion import Pass, joined_mask, viewed_mask
from .rules import Activation, Lipschitz
from .trace import Trace, at

# relative and absolute error that is allowed to a smooth activation of torch in float64, in units of UNIT
SMOOTH_ERROR = 16

# elements (sample, class, feature) of the margin at a time
CHUNK = 2**22


def _end_points(centre: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    return down(centre - half_width), up(centre + half_width)


def _centred(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    centre = lower / 2 + upper / 2
    return centre, torch.maximum(up(upper - centre), up(centre - lower))


def enclosed(linear: LinearMap, centre: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and half-width of what a map in float64 makes of a box."""
    if isinstance(linear, (Identity, Rearrangement)):
        return linear(centre), linear(half_width)
    if isinstance(linear, Composed):
        for part in linear.maps:
            centre, half_width = enclosed(part, centre, half_width)
        return centre, half_width
    if isinstance(linear, Sum):
        boxes = [enclosed(part, centre, half_width) for part in linear.maps]
        return _sum(boxes)
    relative = gamma(linear.terms + linear.roundings + 8)
    out = applied(linear, centre)
    spread = applied(linear.absolute(), up(half_width + relative * centre.abs() * (1 + 4 * UNIT)))
    return out, up(spread * (1 + gamma(linear.terms + linear.roundings + 16)) + 4 * (linear.terms + 4) * TINY)


def _sum(boxes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    (centre, half_width), *others = boxes
    for other, spread in others:
        centre = centre + other
        half_width = up(up(half_width + spread) + (2 * UNIT * centre.abs() + TINY))
    return centre, half_width


def magnitude(linear: LinearMap, sizes: Tensor) -> Tensor:
    """At least |A| ``sizes``, of sizes >= 0."""
    if isinstance(linear, (Identity, Rearrangement)):
        return linear(sizes)
    if isinstance(linear, Composed):
        for part in linear.maps:
            sizes = magnitude(part, sizes)
        return sizes
    if isinstance(linear, Sum):
        total = magnitude(linear.maps[0], sizes)
        for part in linear.maps[1:]:
            total = up(total + magnitude(part, sizes))
        return total
    return of_sizes(linear, sizes)


def affine(terms: Sequence[Term], layer: Layer, boxes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Centre and half-width of an affine value, of the boxes of its facts."""
    found = []
    for term, (centre, half_width) in zip(terms, boxes, strict=True):
        out, spread = enclosed(term.linear, centre, half_width)
        if term.linear is not term.parts:
            off = magnitude(term.parts, up(centre.abs() + half_width)) * _folding(term)
            spread = up(spread + up(off))
        found.append((out, spread))
    centre, half_width = _sum(found)
    if layer.bias is not None and layer.bias_size is not None:
        centre = centre + layer.bias
        off = layer.bias_size.abs() * gamma(layer.bias_terms + 8) + 2 * UNIT * centre.abs()
        half_width = up(half_width + off * (1 + 8 * UNIT) + 4 * TINY)
    return centre, half_width


def _folding(term: Term) -> float:
    """What the entries of a folded map are off by, of the sizes of what they were summed from."""
    return gamma(term.parts.terms + term.parts.roundings + 16) * (1 + 8 * UNIT)


def row_norms(term: Term, columns: Tensor) -> Tensor:
    """At least ``||A_i * columns||`` of every row i."""
    if isinstance(term.linear, Identity):
        return columns
    squares = magnitude(term.linear.squared(), columns)
    found = up(squares.sqrt()) * (1 + 4 * UNIT)
    if term.linear is not term.parts:
        found = up(found + up(magnitude(term.parts, columns) * _folding(term)))
    return found


def _computed_input(term: Term, fact: Fact, columns: Tensor, of_rows: Tensor) -> Input:
    """Of a fact with what runs beside it; of_rows: :func:`row_norms` for ``columns``."""
    assert fact.computed is not None
    sizes = of_rows if term.linear is term.parts else rows_of_sizes(term, columns)
    reach = up(column(fact.radius, sizes) * sizes)
    return Input(up(fact.values.abs() + fact.error), fact.computed, reach, of_rows)


def check_provable(model: nn.Module, trace: Trace, graph: Graph) -> None:
    """UnsupportedModuleError for what the estimate supports and no proof does.

    In training mode a parametrisation may give other weights at every read, as torch's spectral_norm does.
    """
    for layer in graph.layers:
        if layer.activation.unproved:
            raise UnsupportedModuleError(
                f"{at(layer.activation_path)}: the activation has no proof, because {layer.activation.unproved}; "
                "want another, or guarantee='estimate'"
            )
    for node in trace.nodes:
        for tensor in node.tensors():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise UnsupportedModuleError(
                    f"{at(node.path)}: takes a {type(tensor).__name__} and has no bound, because it may compute "
                    "otherwise than a tensor; want a torch.Tensor"
                )
    for path, module in model.named_modules():
        for name in getattr(module, "parametrizations", ()):
            if not torch.equal(getattr(module, name), getattr(module, name)):
                raise UnsupportedModuleError(
                    f"{at(path)}: its parametrised {name} changes from one read to the next; want eval mode"
                )


class Rounded:
    """An activation on end points: what it maps them to, and what can still vary between them."""

    def __init__(self, activation: Activation) -> None:
        self.kind, self.activation = activation.kind, activation
        self.first, self.second = activation.first, activation.second

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), as float64 has it."""
        return self.activation.function(z)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """At most the least value between ``lower`` and ``upper``, and at least the largest."""
        least, most = self.activation.interval(lower, upper)
        if isinstance(self.activation, Lipschitz):
            assert self.activation.error is not None
            return down(least - self.activation.error), up(most + self.activation.error)
        if self.activation.exact:
            return least, most
        low, high = (SMOOTH_ERROR * UNIT * (1 + value.abs()) + TINY for value in (least, most))
        return least - low, most + high

    def clean(self, values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """What float64 makes of clean values, and how far from it the image of a real one within ``error`` can be."""
        black_box = isinstance(self.activation, Lipschitz)
        least, most = self.interval(*((values, values) if black_box else _end_points(values, error)))
        found = self(values)  # the middle would drift with the error
        off = torch.maximum(up(most - found), up(found - least))
        if black_box:
            off = up(off + column(up(length(error) * self.activation.lipschitz), off))
        return found, off

    def largest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """At least the size of any value between ``lower`` and ``upper``."""
        least, most = self.interval(lower, upper)
        return torch.maximum(least.abs(), most.abs())

    def varying(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row mask, column mask, and the two sparsity terms (B, 2) of :func:`locallip_cuda.losses.sparsity`."""
        zero = lower.new_zeros(len(lower))

        def mean(t: Tensor) -> Tensor:
            return t.clamp_min(0).flatten(1).mean(1)

        varies = torch.ones_like(lower, dtype=torch.bool)
        if not self.kind:
            rows = self.activation.rows(lower, upper)
            columns = torch.ones_like(self(lower), dtype=torch.bool)
            return varies if rows is None else rows, columns, torch.stack([zero, zero], 1)
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


@dataclass(eq=False)
class Fact:
    """What is proved of one value: it is within ``error`` of ``values``, over the ball within ``half_width`` of
    ``centre``, and within ``radius`` (B,) of itself. Without a box where the ball lies inside it, as in the estimate.
    columns: bool, what can vary; None for all."""

    values: Tensor
    error: Tensor
    centre: Tensor | None
    half_width: Tensor | None
    radius: Tensor
    columns: Tensor | None
    computed: Computed | None = None

    def box(self) -> tuple[Tensor, Tensor]:
        """Centre and half-width."""
        if self.centre is not None and self.half_width is not None:
            return self.centre, self.half_width
        wide = up(self.radius.view(-1, *[1] * (self.values.dim() - 1)) + self.error)
        return self.values, wide

    def end_points(self) -> tuple[Tensor, Tensor]:
        """Of the box."""
        return _end_points(*self.box())


class Proof(Pass[Fact]):
    """norms: how many share the failure probability.   stages, unmasked_stages: of each layer with one term, as a part
    of chains.   arithmetic: of the network as it runs; None for real numbers alone."""

    rounded = staticmethod(up)

    # Relative width of the probabilistic norms, which multiply up over the layers. A chain of n maps counts about 2^-n,
    # and its norm may be so much wider, up to a limit.
    tightness, widest = 1.5e-3, 0.02

    def __init__(
        self,
        radius: str,
        guarantee: str,
        failure_probability: float,
        seed: int | None,
        norms: int,
        *,
        window: float = 1,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        super().__init__(local=radius == "local", window=window)
        self.guarantee, self.seed, self.arithmetic = guarantee, seed, arithmetic
        self.running: Running | None = None
        self.failure_probability = failure_probability / max(norms * (1 if self.local else 2), 1)
        self.stages: dict[Layer, Stage] = {}
        self.unmasked_stages: dict[Layer, Stage] = {}

    def start(self, x: Tensor, eps: Tensor) -> Fact:
        if not bool(x.isfinite().all()):
            raise ValueError("x: got NaN or infinite values, want finite ones")
        values = x.detach().to(torch.float64, copy=True)
        computed = None
        if self.arithmetic is not None:
            self.running = Running(self.arithmetic, len(x), x.device)
            computed = self.running.start(values, eps)
        return Fact(values, torch.zeros_like(values), None, None, eps, None, computed)

    def viewed(self, step: View, fact: Fact) -> Fact:
        move = step.rearrangement
        columns = viewed_mask(step, fact.columns, len(fact.radius))
        box = [None if t is None else move(t) for t in (fact.centre, fact.half_width)]
        computed = None if fact.computed is None else viewed_computed(step, fact.computed)
        return Fact(move(fact.values), move(fact.error), box[0], box[1], fact.radius, columns, computed)

    def joined(self, step: Joined, facts: Sequence[Fact]) -> Fact:
        values, error = (torch.cat(list(t), step.dim) for t in zip(*((f.values, f.error) for f in facts), strict=True))
        boxes: list[Tensor | None] = [None, None]
        if any(fact.centre is not None for fact in facts):
            boxes = [torch.cat(list(t), step.dim) for t in zip(*(fact.box() for fact in facts), strict=True)]
        columns = joined_mask(step, [fact.columns for fact in facts], [fact.values for fact in facts])
        radius = joined_radius([f.radius for f in facts], up)
        computed = joined_computed(step, [f.computed for f in facts if f.computed is not None])
        return Fact(values, error, boxes[0], boxes[1], radius, columns, computed)

    def closed(self, layer: Layer, facts: Sequence[Fact]) -> Fact:
        rounded, terms = Rounded(layer.activation), layer.terms
        values, error = affine(terms, layer, [(fact.values, fact.error) for fact in facts])
        reach, inputs = self.reach(terms, facts)
        lower, upper = _end_points(values, up(reach + error))
        if any(fact.centre is not None for fact in facts):
            box = _end_points(*affine(terms, layer, [fact.box() for fact in facts]))
            lower, upper = torch.maximum(lower, box[0]), torch.minimum(upper, box[1])
        wide, running = (lower, upper), self.running
        if running is not None:  # both the real and the computed values obey the masks
            eta, apart = running.affine(layer, inputs)
            wide = widened(lower, upper, apart)
        rows, columns, slack = rounded.varying(*wide)
        black_box = isinstance(layer.activation, Lipschitz)
        values, error = rounded.clean(values, error)
        # of a black box, and the radius, below
        centre, half_width = (values, error) if black_box else _centred(*rounded.interval(lower, upper))
        if not self.local and layer.activation.kind == "clipped_maxmin":
            rows = torch.ones_like(rows)  # the paper removes none
        norms = [self._norm(layer.path, t, rows, fact.columns, fact) for t, fact in zip(terms, facts, strict=True)]
        growth = norms
        if not self.local:
            growth = [self._whole(layer.path, t, fact) for t, fact in zip(terms, facts, strict=True)]
        if self.window > 1 and len(terms) == 1:
            self.stages[layer] = stage_of(terms[0], norms[0], len(rows))
        varying = [fact.columns for fact in facts]
        radius = self.radius(layer, [fact.radius for fact in facts], varying, growth, rows)
        self.record(layer, varying, norms, rows, columns, slack)
        if black_box:
            half_width = up(half_width + column(radius, half_width))
        computed = None
        if running is not None:
            largest = rounded.largest(*wide) if not black_box else up(values.abs() + half_width)
            computed = running.closed(layer, inputs, norms, eta, apart, rows, columns, largest)
        return Fact(values, error, centre, half_width, radius, columns, computed)

    def reach(self, terms: Sequence[Term], facts: Sequence[Fact]) -> tuple[Tensor, list[Input]]:
        """(B, *) how far the ball lets each number of an affine value move; and what runs beside it is of."""
        reach: Tensor | None = None
        inputs: list[Input] = []
        for term, fact in zip(terms, facts, strict=True):
            considered = fact.values.new_ones(1, *fact.values.shape[1:])
            if fact.columns is not None and self.local:
                considered = fact.columns.double()
            of_rows = row_norms(term, considered)
            own = up(column(fact.radius, of_rows) * of_rows)
            reach = own if reach is None else up(reach + own)
            if fact.computed is not None:
                inputs.append(_computed_input(term, fact, considered, of_rows))
        assert reach is not None
        return reach, inputs

    @property
    def execution(self) -> str:
        return "real" if self.arithmetic is None else str(self.arithmetic.dtype).removeprefix("torch.")

    def head_apart(self, head: Layer, facts: Sequence[Fact]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(B, K) what the last layer's rounding does to the logits, and how far they are from the real ones."""
        running = self.running
        if running is None:
            return None, None
        found = running.affine(head, self.reach(head.terms, facts)[1])
        within = running.within.unsqueeze(1)
        eta, apart = (torch.where(within & ~t.isnan(), t, torch.inf) for t in found)
        return eta, apart

    def chain_norm(self, chain: Chain) -> Tensor:
        stages = [self.stages[layer] for layer in chain.layers]
        return self._chain_norm(chain, self.rows, self.rows[chain.last], self.inputs[chain.first], stages)

    def unmasked_norms(self, layer: Layer, norms: Sequence[Tensor | None], own: Sequence[Chain]) -> list[Tensor | None]:
        [term] = layer.terms
        whole = None if isinstance(term.linear, Identity) else self._proved(layer.path, term, None, None, 1)
        self.unmasked_stages[layer] = stage_of(term, whole, 1)
        all_rows = self.rows[layer].new_ones(1, *layer.sizes)
        found = []
        for chain in own:
            stages = [self.unmasked_stages[each] for each in chain.layers]
            found.append(self._chain_norm(chain, None, all_rows, None, stages))
        return [whole, *found]

    def _chain_norm(
        self,
        chain: Chain,
        inner: Mapping[Layer, Tensor] | None,
        rows: Tensor,
        columns: Tensor | None,
        stages: Sequence[Stage],
    ) -> Tensor:
        tightness = min(self.tightness * 2 ** (len(stages) - 1), self.widest)
        more = (self.guarantee, self.failure_probability, tightness, self.seed)
        try:
            norm = proved_chain_norm(chain.linear(folded_map, inner), rows, columns, stages, *more)
        except ValueError as error:
            raise ValueError(f"{at(chain.last.path)}: {error}") from None
        return up(norm + _folding_of_chain(chain, stages))

    def _norm(self, path: str, term: Term, rows: Tensor, columns: Tensor | None, fact: Fact) -> Tensor | None:
        if isinstance(term.linear, Identity):
            return None
        return self._proved(path, term, rows, columns, len(fact.radius))

    def _whole(self, path: str, term: Term, fact: Fact) -> Tensor | None:
        return None if isinstance(term.linear, Identity) else self._proved(path, term, None, None, 1)

    def _proved(self, path: str, term: Term, rows: Tensor | None, columns: Tensor | None, batch: int) -> Tensor:
        more = (self.guarantee, self.failure_probability, self.tightness, self.seed)
        return term_norm(path, term, rows, columns, batch, *more)


def term_norm(
    path: str,
    term: Term,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    guarantee: str,
    failure_probability: float,
    tightness: float,
    seed: int | None,
) -> Tensor:
    """(B,) at least the masked norm of a term as it is written in the network. ValueError by path."""
    try:
        norm = proved_norm(term.linear, rows, columns, batch, guarantee, failure_probability, tightness, seed)
    except ValueError as error:
        raise ValueError(f"{at(path)}: {error}") from None
    if not _is_computed(term):
        return norm
    return up(norm + up(absolute_norm(term.parts, rows, columns, batch) * _folding(term)))


def _is_computed(term: Term) -> bool:
    """Whether the entries of its map are not stored weights."""
    return term.linear is not term.parts or term.parts.roundings > 0


def stage_of(term: Term, norm: Tensor | None, batch: int) -> Stage:
    """Of a chain, with its norm (B,) or (1,), None for 1."""
    absolute = absolute_norm(term.parts, None, None, 1)
    if _is_computed(term):
        absolute = up(absolute * (1 + 2 * _folding(term)))
    return Stage(term.linear, absolute.new_ones(batch) if norm is None else norm, absolute)


def _folding_of_chain(chain: Chain, stages: Sequence[Stage]) -> Tensor:
    """(B,) what the norm of folded maps in a row is off by."""
    terms = [layer.terms[0] for layer in chain.layers]
    if not any(_is_computed(term) for term in terms):
        return torch.zeros_like(stages[0].norm)
    off = [
        up(stage.absolute * _folding(term)) if _is_computed(term) else torch.zeros_like(stage.absolute)
        for stage, term in zip(stages, terms, strict=True)
    ]
    return product_off_by([stage.norm for stage in stages], off)


def proved_lengths(stages: Mapping[Layer, Stage], weight_error: Tensor | None) -> Lengths:
    """Of :class:`.functional.Functional`, from above.

    What a direction is off by, e, and its computed length g become nu (e + (gamma(n) + f) (g + e)) behind a map whose
    transpose has n terms, and whose entries are off by f of their sizes |A|, with nu of at least || |A| ||.
    """
    wrong = 0.0 if weight_error is None else 2 * float(length(weight_error).max())

    def lengths(of: Functional, directions: Tensor, samples: slice) -> list[Tensor]:
        found: list[Tensor] = []
        error = torch.zeros(directions.shape[:2], dtype=torch.float64, device=directions.device)
        for i, g in enumerate(of.images(directions, samples)):
            long = length(g.flatten(0, 1)).view(error.shape)
            if i:
                term, nu = of.steps[i - 1].layer.terms[0], stages[of.steps[i - 1].layer].absolute
                off = gamma(term.linear.adjoint_terms + 8) + (_folding(term) if _is_computed(term) else 0.0)
                error = up(up(error + up(off * found[-1]) * (1 + 4 * UNIT)) * nu) * (1 + 8 * UNIT)
                error = up(error + g[0, 0].numel() * CHAIN_UNDERFLOW)
            else:
                error = up(4 * UNIT * long + wrong) * (1 + 4 * UNIT) + CHAIN_UNDERFLOW
            found.append(up(long + error))
        return found

    return lengths


def last_weight(term: Term) -> tuple[Tensor, Tensor | None]:
    """(K, h) rows of a last layer's term, and what they may be off by; None where they are stored."""
    weight = term.linear.dense()
    if isinstance(term.linear, (Dense, Identity)) and term.linear is term.parts:
        return weight, None
    return weight, up(term.parts.absolute().dense().abs() * (2 * _folding(term)) + 2.0**-900)


def gains(
    features: Tensor,
    error: Tensor,
    lower: Tensor,
    upper: Tensor,
    radius: Tensor,
    weight: Tensor,
    labels: Tensor,
    weight_error: Tensor | None = None,
) -> Tensor:
    """(B, K) at least what logit j can gain on the label's over the ball and the box: the dual, rounded up.

    For every t > 0 the dual is sum_i max_{l_i <= delta <= h_i} [d_i delta - delta^2 / (2 t)] + r^2 / (2 t). It is
    evaluated near the t that :func:`locallip_cuda.ops.margin_step` finds, whatever that is worth. With d off by
    u |d| and delta by 2 u |d| t from the maximiser, a term is too small by at most u |d delta| + 16 u^2 d^2 t, and the
    sum by gamma(h + 16) of the sizes of its terms.

    Args: features, error, lower, upper (B, h): clean features within ``error``, and their box; radius (B,), weight
    (K, h), labels (B,). All float64 but labels. weight_error (K, h): what ``weight`` may be off by, or None.
    """
    parts = []
    chunk = max(CHUNK // weight.numel(), 1)
    for first in range(0, len(features), chunk):
        own = [t[first : first + chunk] for t in (features, error, lower, upper, radius, labels)]
        parts.append(_gains_of_chunk(weight, *own))
    if not parts:
        return features.new_empty(0, len(weight))
    found = torch.cat(parts)
    if weight_error is None:
        return found
    furthest = up(torch.maximum((upper - features).abs(), (features - lower).abs())) + error
    off = (furthest @ weight_error.T) * (1 + gamma(weight.shape[1] + 16))
    return up(found + up(off + off.gather(1, labels.unsqueeze(1))) * (1 + 8 * UNIT) + TINY)


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
