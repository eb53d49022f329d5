"""Local Lipschitz bounds of a network: what they are, and :func:`local_bounds`, which makes them."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from . import ops
from .norms.linear import LinearMap
from .norms.linear_bound import converged_norm
from .norms.masked_norm import (
    TIGHTNESS,
    check_guarantee,
    check_input,
    stated_failure_probability,
    values_are_at_hand,
)
from .norms.operator import described
from .propagation import agreement
from .propagation.composition import (
    Chain,
    Norms,
    chains,
    check_window,
    folded_map,
    last_chain,
    linked,
    radii,
    unmasked_indices,
)
from .propagation.estimate import GLOBAL_ITERATIONS, Estimate, Global, Look, affine, box_of
from .propagation.estimate import Fact as EstimatedFact
from .propagation.execution import Arithmetic, Computed, arithmetic_of, pairs_apart
from .propagation.functional import Functional, Lengths, functional, lengths
from .propagation.global_proof import GlobalProof, ProvedNorms
from .propagation.graph import Graph, Layer, joined_radius, lowered, output_classes, traced
from .propagation.proof import Fact as ProvedFact
from .propagation.proof import Proof, check_provable, gains, last_weight, proved_lengths, term_norm
from .propagation.proof import affine as proved_affine
from .propagation.recursion import ChainBound, LayerBound
from .propagation.trace import Trace
from .propagation.training_norms import SAMPLES, TrainingNorms
from .rounding import textbook_products, up

_Bounds = TypeVar("_Bounds", bound="LocalBounds")

# of an estimate's norms, where neither their number nor a training's norms are given
ITERATIONS = 4


@dataclass(eq=False)
class LastTerm:
    """What one fact has in the logits: W features, W the rows of the last layer that it meets.

    Attributes:
        features, lower, upper: (B, h) clean values, and a box that holds them over the ball.   radius: (B,).
        weight: (K, h).
        error, weight_error: (B, h), (K, h): what features and weight of a proof may be off by; None for nothing.
        computed: what is known of the features that run, beside the real ones; None for nothing.
        columns: bool (B, h), which features can vary; None for all, and of an estimate.
    """

    features: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    weight: Tensor
    error: Tensor | None = None
    weight_error: Tensor | None = None
    computed: Computed | None = None
    columns: Tensor | None = None


@dataclass(eq=False)
class LocalBounds:
    """Bounds of one batch, from :func:`local_bounds`. B samples, K classes, h features, L - 1 masked norms.

    They are a snapshot: what becomes of the model, of x and of eps afterwards changes nothing here.

    Attributes:
        logits: (B, K) clean logits.
        lipschitz: (B,) bound of the map to the last layer's input, from the masked norms: in a chain their product.
        eps: (B,) radius of the ball at the input.
        guarantee: what the bounds are worth; "estimate" proves nothing.
        layers: one record a masked norm, in the order in which the network runs: ``path``, ``norm`` (B,),
            ``row_mask``, ``input_mask``, ``column_mask``; a layer that adds maps of several values has
            one for each. A norm of an estimate is a Ritz value, below the true norm but for rounding; one that all
            samples share is the global norm's.
        last: one a value that the logits are affine in: features, box, radius, rows of the last layer.
        composed: one record a norm of two maps or more in a row, where ``window`` is above 1: as ``layers``, with the
            maps' masks between them, and without column_mask.
        unmasked: one record a norm of maps without masks, where ``window`` is above 1: masks between maps can make the
            norm of a product larger.
        sparsity_terms, graph, functionals: what the losses, global_lipschitz and the margin are made of.
        first: of bounds with TrainingNorms, which may look again, inputs (samples, *input) of the first samples, and
            ``radius``.
    """

    logits: Tensor
    lipschitz: Tensor
    eps: Tensor
    guarantee: str
    layers: list[LayerBound]
    composed: list[ChainBound]
    unmasked: list[ChainBound]
    last: list[LastTerm]
    sparsity_terms: Tensor
    graph: Graph
    functionals: list[Functional]
    first: tuple[Tensor, str] | None

    @property
    def layer_norms(self) -> Tensor:
        """(B, L-1) those of ``layers``."""
        norms = [layer.norm for layer in self.layers]
        return torch.stack(norms, 1) if norms else self.logits.new_ones(len(self.logits), 0)

    @property
    def row_masks(self) -> list[Tensor]:
        """One bool tensor (B, *output) a norm: pre-activations that can still change the layer's output."""
        return [layer.row_mask for layer in self.layers]

    @property
    def column_masks(self) -> list[Tensor]:
        """One bool tensor (B, *) a norm: outputs of its layer that can vary inside the ball."""
        return [layer.column_mask for layer in self.layers]

    @property
    def radius(self) -> Tensor:
        """(B,) bound of ||features(x') - features(x)||_2 over the ball."""
        return joined_radius([t.radius for t in self.last], _identity) if len(self.last) > 1 else self.last[0].radius

    @property
    def features(self) -> Tensor:
        """(B, h) clean input of the last layer; of several values one behind the other, here and below."""
        return _together([t.features for t in self.last])

    @property
    def lower(self) -> Tensor:
        """(B, h): with ``upper`` a box that holds the features over the ball."""
        return _together([t.lower for t in self.last])

    @property
    def upper(self) -> Tensor:
        """(B, h)."""
        return _together([t.upper for t in self.last])

    @property
    def last_weight(self) -> Tensor:
        """(K, h) weight of the last layer; the identity where the network ends in an activation."""
        return _together([t.weight for t in self.last])

    @cached_property
    def closeness(self) -> Tensor:
        """(B, L-1) every layer norm divided by the converged one under the same masks; 1 where both are 0.

        In training a norm from few iterations is below the true one, and a network trained against it learns to hide
        from it: its masked top singular vectors turn away from where the iteration starts. This shows how much it
        hides, on its own batches and masks. ``closeness.prod(1)`` is, in a chain, the closeness of ``lipschitz``. Above
        1 is only a norm that all samples share (:class:`locallip_cuda.TrainingNorms`).
        """
        return self._closeness(self.layers)

    @cached_property
    def composed_closeness(self) -> Tensor:
        """(B, norms) the same of the norms in ``composed`` and ``unmasked``."""
        return self._closeness([record for record in (*self.composed, *self.unmasked) if record.norm is not None])

    def _closeness(self, records: Sequence[ChainBound]) -> Tensor:
        ratios, batch = [], len(self.eps)
        for record in records:
            assert record.norm is not None
            masked = record.row_mask is not None
            converged = converged_norm(record.linear, record.row_mask, record.input_mask, batch if masked else 1)
            ratios.append((record.norm.detach().double() / converged).expand(batch))
        none = torch.ones(batch, 0, dtype=torch.float64, device=self.eps.device)
        return torch.stack(ratios, 1).nan_to_num(nan=1.0) if ratios else none

    @torch.no_grad()
    def look(self, norms: TrainingNorms, y: Tensor) -> tuple[dict[int, float], dict[int, float]]:
        """What boxes, and masks in the norms of rows, are worth on the first samples.

        By number of an operator: the share of the units that vary whose interval a box narrows; and norms of rows by
        those with all columns, on average.

        It reads values back, and so waits for a GPU. For :meth:`locallip_cuda.TrainingNorms.control`.

        Args:
            norms: in eval mode.   y: labels of the first samples.
        """
        if self.first is None:
            return {}, {}
        x, radius = self.first
        look = Look(radius, norms, y)
        look.run(self.graph, x, self.eps[: len(y)])
        return look.narrowed, look.shares

    @cached_property
    def global_lipschitz(self) -> Tensor:
        """() ``lipschitz`` by the global (unmasked) operator norms, of which none is composed; an estimate."""
        with torch.no_grad():
            norms = [converged_norm(layer.linear, None, None, 1).to(self.logits.dtype) for layer in self.layers]
            return _lipschitz(self.graph, norms, self.logits.new_ones(1), _identity)[0][0]

    @property
    def sparsity_loss(self) -> Tensor:
        """() :func:`locallip_cuda.losses.sparsity` with the published weight of its threshold term."""
        return self.sparsity(0.1)

    def sparsity(self, threshold_weight: float) -> Tensor:
        terms = self.sparsity_terms.sum(0)
        return terms[0] + threshold_weight * terms[1]

    def worst_logits(self, y: Tensor) -> Tensor:
        """(B, K): logit y as it is, logit j plus the most it can gain on logit y over the ball and the box.

        The gain is the dual of max (w_j - w_y) . delta over ||delta|| <= radius, lower <= features + delta <= upper:
        an upper bound of the maximum whatever its multiplier. Where norms are composed it is the smaller of that and
        the last layers' functional, w_j - w_y through the last ``window`` layers. Differentiable in all it depends on.

        Args:
            y: (B,) int64 labels in [0, K).
        """
        self.check_labels(y)
        worst = self.logits
        for t in self.last:
            worst = worst + self._gain(t, y, [each for each in self.functionals if each.counts])
        return worst

    def _gains(self, y: Tensor, *, masked: bool) -> Tensor:
        """(B, K) what each logit can gain on logit y, with or without the functional that has masks; an estimate."""
        own = [each for each in self.functionals if masked or not each.masked]
        return torch.stack([self._gain(t, y, own) for t in self.last]).sum(0)

    def _gain(self, t: LastTerm, y: Tensor, functionals: Sequence[Functional]) -> Tensor:
        gain = ops.margin(t.features, t.lower, t.upper, t.radius, t.weight, y)
        for each in functionals:
            gain = torch.minimum(gain, each.gains(t.weight, y, lengths, _identity))
        return gain

    def _check_classes(self) -> None:
        if self.logits.shape[1] < 2:
            raise ValueError(
                f"model: got {self.logits.shape[1]} output, want a logit for each of two classes or more; the sign of "
                "one output f is certified as the classes of two, (-f, f)"
            )

    def check_labels(self, y: Tensor) -> None:
        """TypeError or ValueError where ``y`` is no int64 tensor (B,) of classes, or where there is one class alone."""
        self._check_classes()
        _check_labels(y, *self.logits.shape)

    def margin(self, y: Tensor | None = None) -> Tensor:
        """(B,) lower bound over the ball of logit y minus the best other logit; ``y`` is the prediction by default.

        A sample is certified for y where this is above zero, in the sense of ``guarantee``. ValueError for a model with
        fewer than two outputs.
        """
        self._check_classes()
        if y is None:
            y = self.logits.argmax(1)
        worst = self.worst_logits(y)
        own = self.logits.gather(1, y.unsqueeze(1)).squeeze(1)
        return own - worst.scatter(1, y.unsqueeze(1), -math.inf).amax(1)


@dataclass(eq=False)
class ProvedBounds(LocalBounds):
    """Bounds that are proved, under guarantee "probabilistic" or "deterministic"; float64, without gradients.

    They hold for the network in real arithmetic with its weights as they are stored: boxes, radii, norms and margins
    are rounded outward. :meth:`margin` is a lower bound of the real margin, and ``worst_logits(y)`` minus the clean
    logit y an upper bound of how much each logit can exceed logit y. Under ``execution`` "float64" or "float32" they
    hold for the logits that ``model(x')`` computes in that type as well.

    Attributes:
        execution: "real", or the type of what runs.
        logit_error: (B, K) how far the real clean values may be from ``logits``.
        execution_error: (B, K) how far the logits that ``model(x')`` computes may be from the real ones, for any x' of
            the type in the ball; infinite where a number may overflow. None for real arithmetic.
        failure_probability: that the statement on one sample is wrong: 0 under the deterministic guarantee; 1 with a
            seed.
        seed: of the random vectors, if one was given; it voids the probabilistic guarantee.
        share: of the failure probability, for each norm of global_lipschitz.
        lengths: of the functional's vectors, from above.
        last_rounding: (B, K) what the last layer alone adds to ``execution_error``.
    """

    execution: str
    logit_error: Tensor
    execution_error: Tensor | None
    last_rounding: Tensor | None
    failure_probability: float
    seed: int | None
    share: float
    lengths: Lengths

    @property
    def feature_error(self) -> Tensor:
        """(B, h) how far the real clean values may be from ``features``."""
        return _together([torch.zeros_like(t.features) if t.error is None else t.error for t in self.last])

    @property
    def radius(self) -> Tensor:
        return joined_radius([t.radius for t in self.last], up) if len(self.last) > 1 else self.last[0].radius

    @cached_property
    def global_lipschitz(self) -> Tensor:
        """() ``lipschitz`` by the global operator norms, of which none is composed, under the same guarantee."""
        one = self.logits.new_ones(1)
        with torch.no_grad(), textbook_products(one.device.type):
            more = (None, None, 1, self.guarantee, self.share, TIGHTNESS, self.seed)
            norms = [term_norm(term.path, term, *more) for term in self.graph.operators]
            return _lipschitz(self.graph, norms, one, up)[0][0]

    @torch.no_grad()
    def worst_logits(self, y: Tensor) -> Tensor:
        self.check_labels(y)
        own = self.logits.gather(1, y.unsqueeze(1))
        return torch.where(_is_label(self.logits, y), own, up(own + self._excess(y)))

    @torch.no_grad()
    def margin(self, y: Tensor | None = None) -> Tensor:
        self._check_classes()
        y = self.logits.argmax(1) if y is None else y
        self.check_labels(y)
        return -self._excess(y).masked_fill(_is_label(self.logits, y), -math.inf).amax(1)

    def _excess(self, y: Tensor) -> Tensor:
        """(B, K) at least logit j minus logit y, anywhere in the ball."""
        with textbook_products(y.device.type):
            gain = torch.zeros_like(self.logits)
            for t in self.last:
                error = torch.zeros_like(t.features) if t.error is None else t.error
                found = gains(t.features, error, t.lower, t.upper, t.radius, t.weight, y, t.weight_error)
                for each in self.functionals:
                    found = torch.minimum(found, each.gains(t.weight, y, self.lengths, up))
                gain = found if len(self.last) == 1 else up(gain + found)
        label = y.unsqueeze(1)
        excess = up(up(self.logits - self.logits.gather(1, label)) + gain)
        excess = up(excess + up(self.logit_error + self.logit_error.gather(1, label)))
        if self.last_rounding is None:
            return excess
        excess = up(excess + self._apart(y))
        return torch.where(excess.isnan(), math.inf, excess)

    def _apart(self, y: Tensor) -> Tensor:
        """(B, K) at least how far logit j minus logit y, as computed, is from the real one, anywhere in the ball."""
        assert self.last_rounding is not None
        apart = up(self.last_rounding + self.last_rounding.gather(1, y.unsqueeze(1)))
        for t in self.last:
            assert t.computed is not None
            own = (t.columns, y, t.computed.apart.flatten(1), t.computed.distance)
            apart = up(apart + pairs_apart(t.weight, t.weight_error, *own))
        return apart


def _identity(t: Tensor) -> Tensor:
    return t


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _lipschitz(
    graph: Graph,
    norms: Mapping[Layer, Norms] | Sequence[Tensor],
    one: Tensor,
    rounded: Callable[[Tensor], Tensor],
    of: Mapping[Layer, Sequence[Chain]] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(B,) of the map to the head's facts together, and to each: their radii at 1, in a chain the product of norms.

    norms: of the layers, or one an operator.   of: the chains of layers that are composed; None where none are.
    """
    if not isinstance(norms, Mapping):
        each = norms
        norms = {
            layer: Norms([each[term.index] if term.index >= 0 else None for term in layer.terms])
            for layer in graph.layers
        }
    taken = [norm for layer in graph.layers for norm in norms[layer].terms if norm is not None]
    composed = any(norms[layer].chains or norms[layer].unmasked for layer in graph.layers)
    if graph.is_chain and taken and rounded is _identity and not composed:
        own = [torch.stack([norm.expand_as(one) for norm in taken], 1).prod(1)]
    else:
        found = radii(graph, one, norms, of or {layer: () for layer in graph.layers}, rounded)
        own = [found[term.source] for term in graph.head.terms]
    return own[0] if len(own) == 1 else joined_radius(own, rounded), own


def _is_label(logits: Tensor, y: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=y.device) == y.unsqueeze(1)


def _check_labels(y: Tensor | None, batch: int, classes: int) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y: got {described(y)}, want a torch.int64 tensor")
    if y.shape != (batch,):
        raise ValueError(f"y: got shape {tuple(y.shape)}, want ({batch},)")
    if values_are_at_hand(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"y: got labels in [{int(y.min())}, {int(y.max())}], want [0, {classes})")


def _iterations(given: int | None, default: int, norms: TrainingNorms | ProvedNorms | None) -> int:
    if given is None:
        return default
    if norms is not None:
        raise ValueError(f"iterations: got {given!r} together with norms, want one of the two")
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(f"iterations: got {given!r}, want an integer >= 0")
    return given


def _norms(graph: Graph, window: float) -> tuple[int, int]:
    """How many masked norms a pass takes: of operators, and of chains."""
    return len(graph.operators), sum(map(len, chains(graph, window).values()))


def _unmasked_norms(graph: Graph, window: float) -> int:
    """How many norms without masks a pass takes beside them."""
    return len(unmasked_indices(graph, window)) if linked(graph, window) else 0


def _check_norms(norms: TrainingNorms, graph: Graph, window: float, guarantee: str = "estimate") -> None:
    if not isinstance(norms, TrainingNorms):
        raise TypeError(f"norms: got {described(norms)}, want a locallip_cuda.TrainingNorms or None")
    if guarantee != "estimate":
        raise ValueError(f"norms: got some under guarantee {guarantee!r}, want None: they prove nothing")
    single, composed = _norms(graph, window)
    if len(norms.iterations) != single + composed:
        more = f" and {composed} chains within a window of {window}" if composed else ""
        raise ValueError(f"norms: got those of {len(norms.iterations)} operators, want model's {single}{more}")
    if norms.unmasked != unmasked_indices(graph, window):
        raise ValueError(f"norms: got those of another window, want {window}: give TrainingNorms the same")


def _radius_of_input(eps: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(eps, Tensor):
        if eps.shape not in ((), x.shape[:1]):
            raise ValueError(f"eps: got shape {tuple(eps.shape)}, want () or ({x.shape[0]},)")
        if eps.device != x.device and eps.dim():
            raise ValueError(f"eps: got device {eps.device}, want x's, {x.device}")
        if values_are_at_hand(eps) and not bool(((eps >= 0) & eps.isfinite()).all()):
            raise ValueError(f"eps: got {eps.min().item()} as its least value, want finite values >= 0")
        radii = eps.to(x)
        if not eps.is_floating_point():  # an integer may have more digits than the radius; a smaller one would not do
            exact = 2 ** round(-math.log2(torch.finfo(x.dtype).eps))
            radii = torch.where(radii >= exact, torch.nextafter(radii, torch.full_like(radii, math.inf)), radii)
        return radii.expand(x.shape[0]).clone()
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {described(eps)}, want a number (float or int) or a torch tensor () or (B,)")
    if not 0 <= eps <= sys.float_info.max:
        raise ValueError(f"eps: got {eps}, want a finite number >= 0, at most {sys.float_info.max:.4g}")
    if torch.compiler.is_compiling() and isinstance(eps, float):
        return x.new_ones(x.shape[0]) * eps  # a number that is filled in would be a constant, and compiled anew
    radius = float(eps)
    if radius < eps:  # of an integer with more digits than that
        radius = math.nextafter(radius, math.inf)
    return x.new_full((x.shape[0],), radius)


def _of_bytes(x: Tensor, model: nn.Module) -> tuple[Tensor, float]:
    """``x`` / 255 of bytes, in the dtype of the model's weights, and how far in l2 the exact quotients may be."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        return x, 0.0
    of = next((t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.float32)
    # a rounding each of numbers up to 1
    off = math.sqrt(math.prod(x.shape[1:])) * torch.finfo(of).eps / 2
    return x.to(of) / 255, off * (1 + 1e-9)


def _as_it_runs(
    model: nn.Module, x: Tensor, execution: str, guarantee: str
) -> tuple[nn.Module, Tensor, float, Arithmetic | None]:
    """What is traced: model and x in the type of the execution; what eps grows by; and the type's arithmetic."""
    x, off = _of_bytes(x, model)
    check_input(x)
    arithmetic = arithmetic_of(execution, x.dtype)
    if arithmetic is None:
        return model, x, off, None
    if guarantee == "estimate":
        raise ValueError(f"execution: got {execution!r} with guarantee='estimate', want a proof, or 'real'")
    if arithmetic.dtype != x.dtype:
        model, x = _in_float64(model), x.double()
    return model, x, off, arithmetic


def _widened(radius: Tensor, off: float) -> Tensor:
    """``radius`` (B,) for a centre that is ``off``; an estimate's is rounded to nearest."""
    if not off:
        return radius
    return up(radius + off) if radius.dtype == torch.float64 else radius + off


def _agreed(model: nn.Module, trace: Trace, x: Tensor, bounds: _Bounds, *, proof: bool) -> _Bounds:
    """``bounds``, whose clean logits are those of ``model(x)`` where that is to be compared."""
    if agreement.is_due(model, x, proof=proof):
        agreement.check(model, trace, x, bounds.logits)
    return bounds


def _in_float64(model: nn.Module) -> nn.Module:
    """A copy of the network that runs in float64."""
    try:
        return copy.deepcopy(model).double()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"model: got one in float32 that cannot be copied ({error}), want model.double() for execution='float64'"
        ) from error


def local_bounds(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    radius: Literal["local", "global"] = "local",
    iterations: int | None = None,
    guarantee: str = "estimate",
    failure_probability: float = 1e-9,
    seed: int | None = None,
    norms: TrainingNorms | None = None,
    y: Tensor | None = None,
    window: float = 1,
    execution: str = "real",
) -> LocalBounds:
    """Bounds of ``model`` over the l2 ball of radius ``eps`` around each sample of ``x``, differentiable in both, once,
    unless they are to be proved.

    Around each sample many activations are provably constant; their rows and columns leave the neighbouring weight
    operators before the operator norm is taken (Huang et al., NeurIPS 2021, arXiv:2111.01395). Every layer intersects
    a box (interval arithmetic) with a ball: clean value +- radius * norm of the surviving part of each row.

    Args:
        model: any module that returns (B, K) by functions that have bounds; docs/networks.md lists them. It is run on
            a tensor without numbers to see which: what has bounds is what ``model(x)`` computes, with an overridden
            ``forward``, hooks, parametrised weights, a module used twice.
        x: (B, *input), float32 or float64 as the model's weights; or uint8, an image whose ball is around x / 255 (the
            model is given that in its weights' dtype, and eps grows by what is rounded). B = 0 gives empty bounds.
        eps: radius of the ball, a number or (B,), >= 0.
        radius: "local" takes each layer's masked norm into the radius at once; "global" is the paper's: the radius
            grows by global norms on the way, and the masked norms enter only in the final product. "local" is never
            looser and costs less.
        iterations: of :func:`locallip_cuda.masked_norm`, per layer, for the estimate; None is 4. Samples from which no
            row or column of a layer goes share one norm, of 15 iterations or more. ``closeness`` of the result says
            how much of the true norms they see.
        window: how many maps in a row, with the masks between them, are one operator before its norm is taken, at
            most (docs/composition.md). 1 is the paper's product of norms; more is tighter, and costs more norms;
            ``math.inf`` composes all there is. Composed are layers that follow each other, of one map each, with
            activations whose slopes are known, as ReLU's and its clipped one's; behind any other the window begins
            anew. A window above 1 also bounds the margin by the last layers' functional, through as many layers.
        norms: the state of a training's norms, in place of ``iterations``: in training they keep the estimate close.
            Both together are an error.
        y: (B,) int64 labels, which choose where ``norms`` start.
        guarantee: "estimate": differentiable, for training; norms are Rayleigh quotients, which can be too small, so
            nothing is proved. "probabilistic", "deterministic": :class:`ProvedBounds`, in float64 with all rounding
            accounted for and without gradients; the norms are those of :func:`locallip_cuda.masked_norm_bound`.
        failure_probability: of the probabilistic guarantee, over all layers of one sample; at least 2^-96 a layer.
        seed: repeats the random vectors of the probabilistic guarantee, and voids it against whoever knew the seed.
        execution: of which network a proof speaks: "real", in real arithmetic; "float64" or "float32", what
            ``model(x')`` returns in that type, too, for every x' of the type in the ball (docs/guarantees.md has what
            is assumed). "float64" of a network in float32 is of ``model.double()``, and costs next to nothing.

    Raises:
        UnsupportedModuleError (a TypeError): a module without a bound, or without a proof, by its path in the model.
        ValueError, TypeError: arguments that do not fit, NaN or infinite weights of hidden layers (on a CPU; on a GPU,
            and in the last layer, they give NaN, which certifies nothing).
    """
    check_guarantee(guarantee, failure_probability, seed)
    if radius not in ("local", "global"):
        raise ValueError(f"radius: got {radius!r}, want 'local' or 'global'")
    iterations = _iterations(iterations, ITERATIONS, norms)
    check_window(window)
    if window > 1 and radius == "global":
        raise ValueError(f"window: got {window} with radius='global', want 1: the paper's bound composes nothing")
    model, x, off, arithmetic = _as_it_runs(model, x, execution, guarantee)
    trace = traced(model, x)
    classes = output_classes(trace)
    if guarantee == "estimate":
        graph = lowered(trace, x.dtype)
        if norms is not None:
            _check_norms(norms, graph, window, guarantee)
            if y is None:
                raise TypeError(f"y: got None with norms, want ({len(x)},) int64 labels, by which norms start")
            _check_labels(y, len(x), classes)
        at_input = _widened(_radius_of_input(eps, x), off)
        estimate = Estimate(radius, iterations, norms, y, window=window)
        first = None if norms is None else (x[:SAMPLES].detach().clone(), radius)
        estimated = _estimated(graph, estimate, estimate.run(graph, x, at_input), at_input, first)
        return _agreed(model, trace, x, estimated, proof=False)
    with torch.no_grad(), textbook_products(x.device.type):
        graph = lowered(trace, torch.float64, proof=True)
        check_provable(model, trace, graph)
        if norms is not None:
            _check_norms(norms, graph, window, guarantee)
        at_input = _widened(_radius_of_input(eps, x.double()), off)
        count = sum(_norms(graph, window)) + _unmasked_norms(graph, window)
        proof = Proof(radius, guarantee, failure_probability, seed, count, window=window, arithmetic=arithmetic)
        bounds = _proved(graph, proof, proof.run(graph, x, at_input), at_input, failure_probability)
        return _agreed(model, trace, x, bounds, proof=True)


def global_bounds(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    iterations: int | None = None,
    guarantee: str = "estimate",
    failure_probability: float = 1e-9,
    seed: int | None = None,
    norms: TrainingNorms | ProvedNorms | None = None,
    window: float = 1,
    execution: str = "real",
) -> LocalBounds:
    """The plain global bound, in the shape of a local one: every row and column stays, and no box helps.

    With it the losses are the published ones, GloRo's, LMT's, BCP's without its box, EMMA's without its least radius.
    It is the baseline of the local bound, and cheap: a norm is taken once for all samples.

    Args:
        model, x, eps, errors: as for :func:`local_bounds`.
        iterations: of each norm of an estimate, in place of ``norms``; None is 30. Both together are an error.
        guarantee, failure_probability, seed: as for :func:`local_bounds`. That a norm fails is the same event for all
            samples: each statement is wrong with at most ``failure_probability``, and they may be so together.
        norms: for an estimate the state of a training's norms: each starts where the last call's ended, and takes 15.
            For a proof a :class:`ProvedNorms`, from which the next calls for the same network take theirs.
        window: as for :func:`local_bounds`; above 1 it is LipLT (Fazlyab, Entesari, Roy, Chellappa, NeurIPS 2023,
            arXiv:2310.00116).
        execution: as for :func:`local_bounds`.
    """
    check_guarantee(guarantee, failure_probability, seed)
    iterations = _iterations(iterations, GLOBAL_ITERATIONS, norms)
    check_window(window)
    model, x, off, arithmetic = _as_it_runs(model, x, execution, guarantee)
    kept, training = (norms, None) if isinstance(norms, ProvedNorms) else (ProvedNorms(), norms)
    if norms is kept and guarantee == "estimate":
        raise ValueError("norms: got ProvedNorms under guarantee 'estimate', want TrainingNorms or None")
    trace = traced(model, x)
    output_classes(trace)
    if guarantee == "estimate":
        graph = lowered(trace, x.dtype)
        if training is not None:
            _check_norms(training, graph, window)
        radius = _widened(_radius_of_input(eps, x), off)
        plain = Global(iterations, training, window=window)
        return _agreed(model, trace, x, _estimated(graph, plain, plain.run(graph, x, radius), radius), proof=False)
    with torch.no_grad(), textbook_products(x.device.type):
        graph = lowered(trace, torch.float64, proof=True)
        check_provable(model, trace, graph)
        if training is not None:
            _check_norms(training, graph, window, guarantee)
        radius = _widened(_radius_of_input(eps, x.double()), off)
        count = sum(_norms(graph, window))
        proof = GlobalProof(guarantee, failure_probability, seed, count, kept, window=window, arithmetic=arithmetic)
        bounds = _proved(graph, proof, proof.run(graph, x, radius), radius, failure_probability)
        return _agreed(model, trace, x, bounds, proof=True)


def _estimated(
    graph: Graph,
    done: Estimate,
    facts: Sequence[EstimatedFact],
    eps: Tensor,
    first: tuple[Tensor, str] | None = None,
) -> LocalBounds:
    head, last = graph.head, []
    far = [fact.radius for fact in facts]
    taken = done.norms if done.window > 1 else [layer.norm for layer in done.layers]
    lipschitz, own = _lipschitz(graph, taken, torch.ones_like(eps), _identity, done.chains)
    if not done.local:
        far = [eps * each for each in own]
    logits: Tensor | None = None
    for term, fact, radius in zip(head.terms, facts, far, strict=True):
        features, centre, half_width = box_of(fact)
        part = affine(term.linear, features, head.bias if logits is None else None)
        logits = part if logits is None else logits + part
        features, lower, upper = (t.flatten(1) for t in (features, centre - half_width, centre + half_width))
        last.append(LastTerm(features, lower, upper, radius, term.linear.dense().clone()))
    assert logits is not None
    none = [logits.new_zeros(2)]
    return LocalBounds(
        logits=logits,
        lipschitz=lipschitz,
        eps=eps,
        guarantee="estimate",
        layers=done.layers,
        composed=done.composed,
        unmasked=done.unmasked,
        last=last,
        sparsity_terms=torch.stack(done.sparsity_terms or none),
        graph=graph,
        functionals=_functionals(graph, done, facts[0].columns, far[0]),
        first=first,
    )


def _proved(
    graph: Graph, done: Proof, facts: Sequence[ProvedFact], eps: Tensor, failure_probability: float
) -> ProvedBounds:
    head, last = graph.head, []
    far = [fact.radius for fact in facts]
    taken = done.norms if done.window > 1 else [layer.norm for layer in done.layers]
    lipschitz, own = _lipschitz(graph, taken, torch.ones_like(eps), up, done.chains)
    if not done.local:
        far = [up(eps * each) for each in own]
    logits, logit_error = proved_affine(head.terms, head, [(fact.values, fact.error) for fact in facts])
    for term, fact, radius in zip(head.terms, facts, far, strict=True):
        weight, weight_error = last_weight(term)
        features, lower, upper = (t.flatten(1) for t in (fact.values, *fact.end_points()))
        more = (fact.error.flatten(1), weight_error, fact.computed, fact.columns)
        last.append(LastTerm(features, lower, upper, radius, weight, *more))
    last_rounding, execution_error = done.head_apart(head, facts)
    return ProvedBounds(
        logits=logits,
        lipschitz=lipschitz,
        eps=eps,
        guarantee=done.guarantee,
        layers=done.layers,
        composed=done.composed,
        unmasked=done.unmasked,
        last=last,
        sparsity_terms=torch.stack(done.sparsity_terms or [logits.new_zeros(2)]),
        graph=graph,
        functionals=_functionals(graph, done, facts[0].columns, far[0]),
        first=None,
        execution=done.execution,
        logit_error=logit_error,
        execution_error=execution_error,
        last_rounding=last_rounding,
        failure_probability=stated_failure_probability(done.guarantee, failure_probability, done.seed),
        seed=done.seed,
        share=failure_probability / max(len(done.layers), 1),
        lengths=proved_lengths(done.stages, last[0].weight_error),
    )


def _functionals(graph: Graph, done: Estimate | Proof, columns: Tensor | None, radius: Tensor) -> list[Functional]:
    """Through as many layers as are composed, with masks and without; none where norms are not composed."""
    if done.window == 1 or len(graph.head.terms) > 1:
        return []
    chain = last_chain(graph, done.window)
    copies: dict[Layer, LinearMap] = {}
    for layer in chain.layers:  # a result is a snapshot, of which this part has gradients
        copies[layer] = folded_map(layer).with_weights(torch.clone)
    found = [functional(chain, copies.__getitem__, None, done.closings, radius)]
    if done.masked:
        masks = (done.rows, done.inputs, columns)
        found.append(functional(chain, copies.__getitem__, masks, done.closings, radius))
        found = found if done.linked else found[1:]
    kept = [each for each in found if each is not None]
    if isinstance(done, Estimate) and done.kept is not None:
        for each in kept:
            each.counts = done.kept.functional or not each.masked or len(kept) == 1
    return kept
