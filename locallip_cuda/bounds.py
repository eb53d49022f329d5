"""Local Lipschitz bounds of a network: what they are, and :func:`local_bounds`, which makes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .norms.masked_norm import (
    ESTIMATE_ITERATIONS,
    check_guarantee,
    check_input,
    norm_bound,
    stated_failure_probability,
    values_are_at_hand,
)
from .norms.operator import described
from .propagation import agreement
from .propagation.estimate import GLOBAL_ITERATIONS, Propagation, check_norm
from .propagation.layers import IDENTITY, OPERATORS, Activation, Leaf, Operator, clean_pass, network
from .propagation.proof import ProvedPropagation, affine, check_provable, gains
from .propagation.training_norms import TrainingNorms
from .rounding import textbook_products, up


@dataclass
class LocalBounds:
    """Bounds of one batch, from :func:`local_bounds`. B samples, K classes, h features, L operators with the last one.

    They are a snapshot: what becomes of the model, of x and of eps afterwards changes nothing here.

    Attributes:
        logits: (B, K) clean logits.
        radius: (B,) bound of ||features(x') - features(x)||_2 over the ball.
        layer_norms: (B, L-1) masked operator norm of every layer but the last, in the order of the network. An estimate
            is a Ritz value, below the true norm but for rounding; one that all samples share is the global norm's.
        lipschitz: (B,) their product.
        features, lower, upper: (B, h) clean input of the last layer, and a box that holds it over the ball.
        row_masks, column_masks: one bool tensor (B, *output) per layer but the last: pre-activations that can still
            change the layer's output, and outputs that can vary inside the ball.
        varying: (B, L-1, 2), int64, how many each of the two leaves.
        eps: (B,) radius of the ball at the input.
        guarantee: what the bounds are worth; "estimate" proves nothing.
        last_weight, sparsity_terms, operators, input_masks: what worst_logits, the losses, global_lipschitz and
            closeness are made of.
    """

    logits: Tensor
    radius: Tensor
    layer_norms: Tensor
    lipschitz: Tensor
    features: Tensor
    lower: Tensor
    upper: Tensor
    row_masks: list[Tensor]
    column_masks: list[Tensor]
    varying: Tensor
    eps: Tensor
    guarantee: str
    last_weight: Tensor
    sparsity_terms: Tensor
    operators: list[tuple[Operator, list[int]]]
    input_masks: list[Tensor | None]

    @cached_property
    def closeness(self) -> Tensor:
        """(B, L-1) every layer norm divided by the converged one under the same masks; 1 where both are 0.

        In training a norm from few iterations is below the true one, and a network trained against it learns to hide
        from it: its masked top singular vectors turn away from where the iteration starts. This shows how much it
        hides, on its own batches and masks. ``closeness.prod(1)`` is the closeness of ``lipschitz``. Above 1 is only a
        norm that all samples share (:class:`locallip_cuda.TrainingNorms`).
        """
        ratios = []
        for layer, (operator, sizes) in enumerate(self.operators):
            masks, shape = (self.row_masks[layer], self.input_masks[layer]), [len(self.eps), *sizes]
            _, converged = norm_bound(operator.weight, *masks, shape, operator.geometry, "estimate", 1.0)
            ratios.append(self.layer_norms[:, layer].detach().double() / converged)
        return torch.stack(ratios, 1).nan_to_num(nan=1.0) if ratios else self.layer_norms.detach().double()

    @cached_property
    def global_lipschitz(self) -> Tensor:
        """() product of the global (unmasked) operator norms of every layer but the last; an estimate."""
        with torch.no_grad():
            norms = [
                operator.norm(None, None, [1, *sizes], None, ESTIMATE_ITERATIONS)[0]
                for operator, sizes in self.operators
            ]
            return torch.cat([*norms, self.radius.new_ones(1)]).prod()

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
        an upper bound of the maximum whatever its multiplier. Differentiable in all it depends on.

        Args:
            y: (B,) int64 labels in [0, K).
        """
        self.check_labels(y)
        return self.logits + ops.margin(self.features, self.lower, self.upper, self.radius, self.last_weight, y)

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


@dataclass
class ProvedBounds(LocalBounds):
    """Bounds that are proved, under guarantee "probabilistic" or "deterministic"; float64, without gradients.

    They hold for the network in real arithmetic with its weights as they are stored: boxes, radii, norms and margins
    are rounded outward. :meth:`margin` is a lower bound of the real margin, and ``worst_logits(y)`` minus the clean
    logit y an upper bound of how much each logit can exceed logit y.

    Attributes:
        feature_error, logit_error: (B, h), (B, K) how far the real clean values may be from ``features``, ``logits``.
        failure_probability: that the statement on one sample is wrong: 0 under the deterministic guarantee; 1 with a
            seed.
        seed: of the random vectors, if one was given; it voids the probabilistic guarantee.
        share: of the failure probability, for each norm of global_lipschitz.
    """

    feature_error: Tensor
    logit_error: Tensor
    failure_probability: float
    seed: int | None
    share: float

    @cached_property
    def global_lipschitz(self) -> Tensor:
        """() product of the global operator norms of every layer but the last, under the same guarantee."""
        product = self.radius.new_ones(())
        with textbook_products(product.device.type):
            for operator, sizes in self.operators:
                shape, geometry = [1, *sizes], operator.geometry
                norm, _ = norm_bound(
                    operator.weight, None, None, shape, geometry, self.guarantee, self.share, seed=self.seed
                )
                product = up(up(product * norm[0]) * (1 + operator.relative_error))
        return product

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
            gain = gains(self.features, self.feature_error, self.lower, self.upper, self.radius, self.last_weight, y)
        label = y.unsqueeze(1)
        excess = up(up(self.logits - self.logits.gather(1, label)) + gain)
        return up(excess + up(self.logit_error + self.logit_error.gather(1, label)))


def _is_label(logits: Tensor, y: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=y.device) == y.unsqueeze(1)


def _check_labels(y: Tensor | None, batch: int, classes: int) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y: got {described(y)}, want a torch.int64 tensor")
    if y.shape != (batch,):
        raise ValueError(f"y: got shape {tuple(y.shape)}, want ({batch},)")
    if values_are_at_hand(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"y: got labels in [{int(y.min())}, {int(y.max())}], want [0, {classes})")


def _check_iterations(iterations: int) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: got {iterations!r}, want an integer >= 0")


def _check_norms(norms: TrainingNorms, hidden: Sequence[Leaf], guarantee: str = "estimate") -> None:
    if not isinstance(norms, TrainingNorms):
        raise TypeError(f"norms: got {described(norms)}, want a locallip_cuda.TrainingNorms or None")
    if guarantee != "estimate":
        raise ValueError(f"norms: got some under guarantee {guarantee!r}, want None: they prove nothing")
    layers = sum(leaf.kind in OPERATORS for leaf in hidden)
    if len(norms.iterations) != layers:
        raise ValueError(f"norms: got those of {len(norms.iterations)} layers, want model's {layers}")


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
    radius = float(eps)
    if radius < eps:  # of an integer with more digits than that
        radius = math.nextafter(radius, math.inf)
    return x.new_full((x.shape[0],), radius)


def local_bounds(
    model: nn.Sequential,
    x: Tensor,
    eps: float | Tensor,
    *,
    radius: Literal["local", "global"] = "local",
    iterations: int = 4,
    guarantee: str = "estimate",
    failure_probability: float = 1e-9,
    seed: int | None = None,
    norms: TrainingNorms | None = None,
    y: Tensor | None = None,
) -> LocalBounds:
    """Bounds of ``model`` over the l2 ball of radius ``eps`` around each sample of ``x``, differentiable in both, once,
    unless they are to be proved.

    Around each sample many activations are provably constant; their rows and columns leave the neighbouring weight
    operators before the operator norm is taken (Huang et al., NeurIPS 2021, arXiv:2111.01395). Every layer intersects
    a box (interval arithmetic) with a ball: clean value +- radius * norm of the surviving part of each row.

    Args:
        model: Sequential of supported modules that ends in Linear. Bounds are of what ``model(x)`` computes: one that
            may compute something else than its classes, by a ``forward`` of its own or a hook, is an error.
        x: (B, *input), float32 or float64 as the model's weights. B = 0 gives empty bounds.
        eps: radius of the ball, a number or (B,), >= 0.
        radius: "local" takes each layer's masked norm into the radius at once; "global" is the paper's: the radius
            grows by global norms on the way, and the masked norms enter only in the final product. "local" is never
            looser and costs less.
        iterations: of :func:`locallip_cuda.masked_norm`, per layer, for the estimate. Samples from which no row or
            column of a layer goes share one norm, of 15 iterations or more. ``closeness`` of the result says how much
            of the true norms they see.
        norms: the state of a training's norms, in place of ``iterations``: in training they keep the estimate close.
        y: (B,) int64 labels, which choose where ``norms`` start.
        guarantee: "estimate": differentiable, for training; norms are Rayleigh quotients, which can be too small, so
            nothing is proved. "probabilistic", "deterministic": :class:`ProvedBounds`, in float64 with all rounding
            accounted for and without gradients; the norms are those of :func:`locallip_cuda.masked_norm_bound`.
        failure_probability: of the probabilistic guarantee, over all layers of one sample; at least 2^-96 a layer.
        seed: repeats the random vectors of the probabilistic guarantee, and voids it against whoever knew the seed.

    Raises:
        UnsupportedModuleError (a TypeError): a module without a bound, or without a proof, by its path in the model.
        ValueError, TypeError: arguments that do not fit, NaN or infinite weights of hidden layers (on a CPU; on a GPU,
            and in the last layer, they give NaN, which certifies nothing).
    """
    check_guarantee(guarantee, failure_probability, seed)
    if radius not in ("local", "global"):
        raise ValueError(f"radius: got {radius!r}, want 'local' or 'global'")
    _check_iterations(iterations)
    check_input(x)
    modules = network(model)
    *hidden, last = modules
    if norms is not None:
        _check_norms(norms, hidden, guarantee)
        assert isinstance(last.module, nn.Linear)
        _check_labels(y, len(x), last.module.weight.shape[0])
    radii = _radius_of_input(eps, x if guarantee == "estimate" else x.double())
    if guarantee == "estimate":
        propagation = Propagation(x, radii, radius, iterations, norms, y)
        _pass(hidden, propagation)
        estimated = _estimated(propagation, last)
        if agreement.is_due(model, x, proof=False):
            agreement.check(model, modules, x, estimated.logits)
        return estimated
    check_provable(modules)
    with torch.no_grad(), textbook_products(x.device.type):
        count = sum(leaf.kind in OPERATORS for leaf in hidden)
        proved = ProvedPropagation(x, radii, radius, guarantee, failure_probability, seed, count)
        _pass(hidden, proved)
        bounds = _proved(proved, last, failure_probability)
        if agreement.is_due(model, x, proof=True):
            agreement.check(model, modules, x, bounds.logits)
        return bounds


def global_bounds(
    model: nn.Sequential,
    x: Tensor,
    eps: float | Tensor,
    *,
    iterations: int = GLOBAL_ITERATIONS,
    norms: TrainingNorms | None = None,
) -> LocalBounds:
    """The plain global bound, in the shape of a local one: every row and column stays, and no box helps; an estimate.

    With it the losses are the published ones, GloRo's, LMT's, BCP's without its box. It is the baseline of the local
    bound, and cheap: a norm is taken once for all samples.

    Args:
        model, x, eps, errors: as for :func:`local_bounds`.
        iterations: of each norm, where there are no ``norms``.
        norms: the state of a training's norms: each starts where the last call's ended, and takes 15.
    """
    _check_iterations(iterations)
    check_input(x)
    modules = network(model)
    if norms is not None:
        _check_norms(norms, modules[:-1])
    radii = _radius_of_input(eps, x)
    operators: list[tuple[Operator, list[int]]] = []
    masks: list[Tensor] = []
    found: list[Tensor] = []
    *hidden, (head, features, logits) = clean_pass(modules, x)
    for leaf, (step, value, output) in zip(modules, hidden, strict=False):
        if not isinstance(step, Operator):
            continue
        sizes = list(value.shape[1:])
        if norms is None:
            norm = step.norm(None, None, [1, *sizes], None, iterations)[0]
        else:
            norm = norms.shared_norm(len(found), step, sizes)
        check_norm(leaf.path, norm)
        found.append(norm.expand(len(x)))
        masks.append(torch.ones_like(output, dtype=torch.bool))
        operators.append((step.snapshot(), sizes))
    assert isinstance(head, Operator)
    if agreement.is_due(model, x, proof=False):
        agreement.check(model, modules, x, logits)
    layer_norms = torch.stack(found, 1) if found else features.new_ones(len(x), 0)
    lipschitz = layer_norms.prod(1)
    radius = radii * lipschitz
    return LocalBounds(
        logits=logits,
        radius=radius,
        layer_norms=layer_norms,
        lipschitz=lipschitz,
        features=features.clone(),
        lower=features - radius.unsqueeze(1),
        upper=features + radius.unsqueeze(1),
        row_masks=masks,
        column_masks=masks,
        varying=_stacked([_counts(mask, mask) for mask in masks], features),
        eps=radii,
        guarantee="estimate",
        last_weight=head.weight.clone(),
        sparsity_terms=features.new_zeros(1, 2),
        operators=operators,
        input_masks=[None] * len(found),
    )


def _pass(hidden: list[Leaf], propagation: Propagation | ProvedPropagation) -> None:
    pending: tuple[str, Operator] | None = None  # until it is known what activation follows
    for leaf in hidden:
        if pending is not None and leaf.kind in OPERATORS:
            propagation.pass_layer(*pending, IDENTITY)
            pending = None
        layer = leaf.step(propagation.values)
        if isinstance(layer, Operator):
            pending = (leaf.path, layer)
        elif isinstance(layer, Activation):
            operator_path, operator = pending or (leaf.path, None)
            propagation.pass_layer(operator_path, operator, layer)
            pending = None
        elif layer is not None:
            if pending is not None:
                propagation.pass_layer(*pending, IDENTITY)
                pending = None
            propagation.flatten()
    if pending is not None:
        propagation.pass_layer(*pending, IDENTITY)


def _operator(last: Leaf, like: Tensor) -> Operator:
    head = last.step(like)
    assert isinstance(head, Operator)
    return head


def _estimated(done: Propagation, last: Leaf) -> LocalBounds:
    head = _operator(last, done.values)
    head.check_input(last.path, done.values)
    features, centre = done.values[: done.batch], done.values[done.values.shape[0] - done.batch :]
    half_width = done.eps.unsqueeze(1) if done.half_width is None else done.half_width
    layer_norms = torch.stack(done.norms, 1) if done.norms else features.new_ones(done.batch, 0)
    lipschitz = layer_norms.prod(1)
    none = [features.new_zeros(2)]
    return LocalBounds(
        logits=head(features, head.weight, head.bias),
        radius=done.reach if done.local else done.eps * lipschitz,
        layer_norms=layer_norms,
        lipschitz=lipschitz,
        features=features,
        lower=centre - half_width,
        upper=centre + half_width,
        row_masks=done.row_masks,
        column_masks=done.column_masks,
        varying=_stacked(done.varying, features),
        eps=done.eps,
        guarantee="estimate",
        last_weight=head.weight.clone(),
        sparsity_terms=torch.stack(done.sparsity_terms or none),
        operators=done.operators,
        input_masks=done.input_masks,
    )


def _counts(row_mask: Tensor, column_mask: Tensor) -> Tensor:
    return torch.stack([row_mask.flatten(1).sum(1), column_mask.flatten(1).sum(1)], 1)


def _stacked(counts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(counts, 1) if counts else like.new_zeros(like.shape[0], 0, 2, dtype=torch.int64)


def _proved(done: ProvedPropagation, last: Leaf, failure_probability: float) -> ProvedBounds:
    head = done.exact(last.path, _operator(last, done.values))
    logits, logit_error = affine(head, done.values, done.error)
    lipschitz = torch.ones_like(done.eps)
    for norm in done.norms:
        lipschitz = up(lipschitz * norm)
    lower, upper = done.box()
    return ProvedBounds(
        logits=logits,
        radius=done.reach if done.local else up(done.eps * lipschitz),
        layer_norms=torch.stack(done.norms, 1) if done.norms else logits.new_ones(done.batch, 0),
        lipschitz=lipschitz,
        features=done.values,
        lower=lower,
        upper=upper,
        row_masks=done.row_masks,
        column_masks=done.column_masks,
        varying=_stacked([_counts(*masks) for masks in zip(done.row_masks, done.column_masks, strict=True)], logits),
        eps=done.eps,
        guarantee=done.guarantee,
        last_weight=head.weight,
        sparsity_terms=torch.stack(done.sparsity_terms or [logits.new_zeros(2)]),
        operators=done.operators,
        input_masks=done.input_masks,
        feature_error=done.error,
        logit_error=logit_error,
        failure_probability=stated_failure_probability(done.guarantee, failure_probability, done.seed),
        seed=done.seed,
        share=failure_probability / max(len(done.operators), 1),
    )
