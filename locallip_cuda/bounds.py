"""Local Lipschitz bounds: one pass through the network carrying the clean value, a box, a radius and the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .layers import IDENTITY, SUPPORTED, Activation, Operator, UnsupportedModuleError, leaves, step
from .norms import ESTIMATE_ITERATIONS, check_guarantee, values_are_at_hand

# The global norms are taken for a batch of one. As a start for the masked norms a rough singular vector does: a
# convolution has it nearly for free, a dense layer reads its whole weight for it. As a value they want to be converged.
START_ITERATIONS = 8
DENSE_START_ITERATIONS = 5
GLOBAL_ITERATIONS = 30


@dataclass
class LocalBounds:
    """Bounds of one batch, from :func:`local_bounds`. B samples, K classes, h features, L operators with the last one.

    Attributes:
        logits: (B, K) clean logits.
        radius: (B,) bound of ||features(x') - features(x)||_2 over the ball.
        layer_norms: (B, L-1) masked operator norm of every layer but the last, in the order of the network.
        lipschitz: (B,) their product.
        features, lower, upper: (B, h) clean input of the last layer, and a box that holds it over the ball.
        row_masks, column_masks: one bool tensor (B, *output) per layer but the last: pre-activations that can still
            change the layer's output, and outputs that can vary inside the ball.
        eps: (B,) radius of the ball at the input.
        guarantee: what the norms are worth; "estimate" proves nothing.
        last_weight, sparsity_terms, operators: what worst_logits, the losses and global_lipschitz are made of.
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
    eps: Tensor
    guarantee: str
    last_weight: Tensor
    sparsity_terms: Tensor
    operators: list[tuple[Operator, list[int]]]

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
        classes = self.logits.shape[1]
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise TypeError(f"y: got {getattr(y, 'dtype', type(y).__name__)}, want a torch.int64 tensor")
        if y.shape != self.logits.shape[:1]:
            raise ValueError(f"y: got shape {tuple(y.shape)}, want ({self.logits.shape[0]},)")
        if values_are_at_hand(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"y: got labels in [{int(y.min())}, {int(y.max())}], want [0, {classes})")
        return self.logits + ops.margin(self.features, self.lower, self.upper, self.radius, self.last_weight, y)

    def margin(self, y: Tensor | None = None) -> Tensor:
        """(B,) lower bound over the ball of logit y minus the best other logit; ``y`` is the prediction by default.

        A sample is certified for y where this is above zero, in the sense of ``guarantee``.
        """
        if y is None:
            y = self.logits.argmax(1)
        worst = self.worst_logits(y)
        own = self.logits.gather(1, y.unsqueeze(1)).squeeze(1)
        return own - worst.scatter(1, y.unsqueeze(1), -math.inf).amax(1)


def _radius_of_input(eps: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(eps, Tensor):
        if eps.shape not in ((), x.shape[:1]):
            raise ValueError(f"eps: got shape {tuple(eps.shape)}, want () or ({x.shape[0]},)")
        if eps.device != x.device and eps.dim():
            raise ValueError(f"eps: got device {eps.device}, want x's, {x.device}")
        if values_are_at_hand(eps) and not bool(((eps >= 0) & eps.isfinite()).all()):
            raise ValueError(f"eps: got {eps.min().item()} as its least value, want finite values >= 0")
        return eps.to(x).expand(x.shape[0])
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, want a number or a tensor (B,)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, want a finite number >= 0")
    return x.new_full((x.shape[0],), float(eps))


class _Propagation:
    """The state of one pass: what is known of the values behind the layers that have been passed."""

    def __init__(self, x: Tensor, eps: Tensor, radius: str, iterations: int) -> None:
        self.batch = x.shape[0]
        self.eps = eps
        self.local = radius == "local"
        self.iterations = iterations
        # clean values, followed by the box centres once there is a box: one convolution serves both
        self.values = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        # at the input the ball lies inside the box +- eps, and so it does behind the first operator: no box needed yet
        self.half_width: Tensor | None = None
        self.reach = eps
        self.column_mask: Tensor | None = None
        self.row_masks: list[Tensor] = []
        self.column_masks: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.sparsity_terms: list[Tensor] = []
        self.operators: list[tuple[Operator, list[int]]] = []

    def pass_layer(self, path: str, operator: Operator | None, activation: Activation) -> None:
        """One layer: ``operator`` (the identity where None), then ``activation``."""
        sizes = list(self.values.shape[1:])
        columns = self.column_mask
        if operator is None:
            ones = self.values.new_ones(1, *sizes)
            squared_row_norms = ones if columns is None else columns.to(ones.dtype)
        else:
            operator.check_input(path, self.values)
            self.values = operator(self.values, operator.weight, operator.bias)
            if self.half_width is not None:
                self.half_width = operator(self.half_width, operator.weight.abs())
            squared_row_norms = operator.squared_row_norms(columns, sizes, self.values, exact=self.local)
        self.values, self.half_width, rows, self.column_mask, slack = ops.activation_pattern(
            self.values,
            self.half_width,
            squared_row_norms,
            self.reach,
            activation.kind or "identity",
            activation.first,
            activation.second,
        )
        if not activation.kind:
            self.values, self.half_width = _monotone(activation.module, self.values, self.half_width)
        if operator is None:
            return
        if not self.local and activation.kind == "clipped_maxmin":
            rows = torch.ones_like(rows)  # the paper removes none
        self.norms.append(self._norm(path, operator, rows, columns, sizes))
        self.row_masks.append(rows)
        self.column_masks.append(self.column_mask)
        self.sparsity_terms.append(slack.sum(0) / max(self.batch, 1))
        self.operators.append((operator, sizes))

    def _norm(self, path: str, operator: Operator, rows: Tensor, columns: Tensor | None, sizes: list[int]) -> Tensor:
        if self.local:
            with torch.no_grad():
                steps = DENSE_START_ITERATIONS if operator.conv is None else START_ITERATIONS
                start = operator.norm(None, None, [1, *sizes], None, steps)[1]
            norm = operator.norm(rows, columns, [self.batch, *sizes], start, self.iterations)[0]
            self.reach = self.reach * norm
        else:
            global_norm, start, _ = operator.norm(
                None, None, [1, *sizes], None, max(self.iterations, GLOBAL_ITERATIONS)
            )
            norm = operator.norm(rows, columns, [self.batch, *sizes], start, self.iterations)[0]
            self.reach = self.reach * global_norm
        if values_are_at_hand(norm) and bool(norm.isnan().any()):
            raise ValueError(f"model.{path}: got NaN or infinite weights, want finite ones")
        return norm

    def flatten(self) -> None:
        self.values = self.values.flatten(1)
        self.half_width = None if self.half_width is None else self.half_width.flatten(1)
        self.column_mask = None if self.column_mask is None else self.column_mask.flatten(1)

    def finish(self, path: str, last: nn.Linear, guarantee: str) -> LocalBounds:
        head = Operator(last.weight, last.bias, None)
        head.check_input(path, self.values)
        features, centre = self.values[: self.batch], self.values[self.values.shape[0] - self.batch :]
        half_width = self.eps.unsqueeze(1) if self.half_width is None else self.half_width
        layer_norms = torch.stack(self.norms, 1) if self.norms else features.new_ones(self.batch, 0)
        lipschitz = layer_norms.prod(1)
        none = [features.new_zeros(2)]
        return LocalBounds(
            logits=head(features, head.weight, head.bias),
            radius=self.reach if self.local else self.eps * lipschitz,
            layer_norms=layer_norms,
            lipschitz=lipschitz,
            features=features,
            lower=centre - half_width,
            upper=centre + half_width,
            row_masks=self.row_masks,
            column_masks=self.column_masks,
            eps=self.eps,
            guarantee=guarantee,
            last_weight=last.weight,
            sparsity_terms=torch.stack(self.sparsity_terms or none),
            operators=self.operators,
        )


def _monotone(module: nn.Module, values: Tensor, half_width: Tensor) -> tuple[Tensor, Tensor]:
    """Box through a monotone elementwise activation with slopes in [0, 1]."""
    clean, centre = values.chunk(2)
    lower, upper = module(centre - half_width), module(centre + half_width)
    return torch.cat([module(clean), (lower + upper) / 2]), (upper - lower) / 2


def local_bounds(
    model: nn.Sequential,
    x: Tensor,
    eps: float | Tensor,
    *,
    radius: Literal["local", "global"] = "local",
    iterations: int = 4,
    guarantee: str = "estimate",
    failure_probability: float = 1e-9,
) -> LocalBounds:
    """Bounds of ``model`` over the l2 ball of radius ``eps`` around each sample of ``x``, differentiable in both.

    Around each sample many activations are provably constant; their rows and columns leave the neighbouring weight
    operators before the operator norm is taken (Huang et al., NeurIPS 2021, arXiv:2111.01395). Every layer intersects
    a box (interval arithmetic) with a ball: clean value +- radius * norm of the surviving part of each row.

    Args:
        model: Sequential of supported modules that ends in Linear.
        x: (B, *input), float32 or float64 as the model's weights. B = 0 gives empty bounds.
        eps: radius of the ball, a number or (B,), >= 0.
        radius: "local" takes each layer's masked norm into the radius at once; "global" is the paper's: the radius
            grows by global norms on the way, and the masked norms enter only in the final product. "local" is never
            looser and costs less.
        iterations: of :func:`locallip_cuda.masked_norm`, per layer.
        guarantee: only "estimate" yet: norms are Rayleigh quotients, which can be too small, so nothing is proved.
        failure_probability: of the probabilistic guarantee, over all layers of one sample.

    Raises:
        UnsupportedModuleError (a TypeError): a module without a bound, by its path in the model.
        ValueError, TypeError: arguments that do not fit, NaN or infinite weights (on a CPU; on a GPU they give NaN).
        NotImplementedError: a guarantee other than "estimate".
    """
    check_guarantee(guarantee, failure_probability)
    if radius not in ("local", "global"):
        raise ValueError(f"radius: got {radius!r}, want 'local' or 'global'")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: got {iterations!r}, want an integer >= 0")
    if not isinstance(model, nn.Sequential):
        raise UnsupportedModuleError(f"model: got {type(model).__name__}, want a Sequential of {SUPPORTED}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: got {getattr(x, 'dtype', type(x).__name__)}, want a torch.float32 or torch.float64 tensor")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (B, ...)")
    modules = list(leaves(model, ""))
    last = modules[-1][1] if modules else None
    if not isinstance(last, nn.Linear):
        end = f"model.{modules[-1][0]}: {last}" if modules else "nothing"
        raise UnsupportedModuleError(f"model: ends in {end}, want a Linear at its end")
    propagation = _Propagation(x, _radius_of_input(eps, x), radius, iterations)
    pending: tuple[str, Operator] | None = None  # until it is known what activation follows
    for path, module in modules[:-1]:
        layer = step(path, module, propagation.values)
        if isinstance(layer, Activation):
            operator_path, operator = pending or (path, None)
            propagation.pass_layer(operator_path, operator, layer)
            pending = None
        elif layer is not None:
            if pending is not None:
                propagation.pass_layer(*pending, IDENTITY)
            pending = (path, layer) if isinstance(layer, Operator) else None
            if isinstance(layer, nn.Flatten):
                propagation.flatten()
    if pending is not None:
        propagation.pass_layer(*pending, IDENTITY)
    return propagation.finish(modules[-1][0], last, guarantee)
