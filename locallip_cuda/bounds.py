"""Local Lipschitz bounds: one pass through the network carrying the clean value, a box, a radius and the masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize
from .norms import check_guarantee

SUPPORTED = (
    "Linear, Conv2d (padding_mode='zeros'), AvgPool2d, Normalize, Flatten, Identity, Dropout in eval mode, ReLU, "
    "ClippedReLU, MaxMin, ClippedMaxMin, LeakyReLU, ELU (alpha <= 1), Tanh, Sigmoid, Softplus (threshold >= 20), and Sequential of these"
)


class UnsupportedModuleError(TypeError):
    """A module in the network has no bound here; the message names its path and what is supported."""


DENSE = ([1, 1], [0, 0], [1, 1], 1)


@dataclass(frozen=True)
class _Operator:
    """One affine layer as the linear operator it is: ``conv`` is (stride, padding, dilation, groups), None if dense."""

    weight: Tensor
    bias: Tensor | None
    conv: tuple[list[int], list[int], list[int], int] | None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.affine(x, weight, bias, *(self.conv or DENSE))

    def squared_row_norms(
        self, column_mask: Tensor | None, input_shape: Sequence[int], output: Tensor, *, exact: bool
    ) -> Tensor:
        """``||W_i * column_mask||^2`` of every row i of ``output``: (B or 1, *output).

        Not ``exact`` is the paper's: all columns, and for a convolution the whole kernel, at the padded border too.
        """
        squared = self.weight.square()
        if not exact and self.conv is not None:
            return squared.flatten(1).sum(1).view(1, -1, 1, 1).expand(1, *output.shape[1:])
        masked = exact and column_mask is not None
        columns = column_mask.to(squared.dtype) if masked and column_mask is not None else squared.new_ones(1, *input_shape)
        return self(columns, squared)

    def norm(
        self, row_mask: Tensor | None, col_mask: Tensor | None, input_shape: Sequence[int], start: Tensor | None, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        conv = self.conv or DENSE
        return ops.masked_norm(self.weight, row_mask, col_mask, start, list(input_shape), *conv, iterations)


@dataclass(frozen=True)
class _Activation:
    """An elementwise (or MaxMin) activation; ``kind`` is the op's name for it, "" for a monotone one applied by ``module``."""

    kind: str
    module: nn.Module
    first: Tensor | None = None
    second: Tensor | None = None


# The global norms are taken for a batch of one, so their iterations are nearly free. As a start for the masked norms a
# rough singular vector does; as a value they want to be converged.
START_ITERATIONS = 8
GLOBAL_ITERATIONS = 30

_IDENTITY = _Activation("identity", nn.Identity())
_Step = _Operator | _Activation | nn.Flatten


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, module


def _conv_arguments(path: str, module: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    if module.padding_mode != "zeros":
        raise UnsupportedModuleError(f"model.{path}: Conv2d with padding_mode={module.padding_mode!r}, want 'zeros'")
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise UnsupportedModuleError(f"model.{path}: Conv2d with an uneven 'same' padding, want a symmetric one")
        padding = tuple(r // 2 for r in reach) if padding == "same" else (0, 0)
    return list(module.stride), list(padding), list(module.dilation), module.groups


def _average_pool(path: str, module: nn.AvgPool2d, like: Tensor) -> _Operator:
    if module.ceil_mode or not module.count_include_pad:
        raise UnsupportedModuleError(f"model.{path}: AvgPool2d, want ceil_mode=False and count_include_pad=True")

    def pair(value: int | tuple[int, int]) -> list[int]:
        return [value, value] if isinstance(value, int) else list(value)

    kernel, channels = pair(module.kernel_size), like.shape[1]
    share = 1 / (module.divisor_override or math.prod(kernel))
    stride = pair(module.stride if module.stride is not None else module.kernel_size)
    weight = like.new_full((channels, 1, *kernel), share)
    return _Operator(weight, None, (stride, pair(module.padding), [1, 1], channels))


def _normalize(module: Normalize, like: Tensor) -> _Operator:
    scale = 1 / module.std.to(like)
    bias = -module.mean.to(like) * scale
    if like.dim() == 2:
        return _Operator(torch.diag(scale.expand(like.shape[1])), bias.expand(like.shape[1]), None)
    scale, bias = scale.expand(like.shape[1]), bias.expand(like.shape[1])
    return _Operator(scale.view(-1, 1, 1, 1), bias, ([1, 1], [0, 0], [1, 1], like.shape[1]))


def _step(path: str, module: nn.Module, like: Tensor) -> _Step | None:
    """What ``module`` does to the bounds of an input shaped as ``like``; None where it does nothing."""
    match module:
        case nn.Linear():
            return _Operator(module.weight, module.bias, None)
        case nn.Conv2d():
            return _Operator(module.weight, module.bias, _conv_arguments(path, module))
        case nn.AvgPool2d():
            return _average_pool(path, module, like)
        case Normalize():
            return _normalize(module, like)
        case nn.Flatten() if module.start_dim == 1 and module.end_dim == -1:
            return module
        case nn.Identity():
            return None
        case nn.Dropout() | nn.Dropout2d() if not module.training:
            return None
        case nn.ReLU():
            return _Activation("relu", module)
        case ClippedReLU():
            return _Activation("clipped_relu", module, module.threshold)
        case MaxMin():
            return _Activation("maxmin", module)
        case ClippedMaxMin():
            return _Activation("clipped_maxmin", module, module.upper, module.lower)
        case nn.LeakyReLU() if 0 <= module.negative_slope <= 1:
            return _Activation("", module)
        case nn.ELU() if 0 < module.alpha <= 1:
            return _Activation("", module)
        case nn.Tanh() | nn.Sigmoid():
            return _Activation("", module)
        case nn.Softplus() if module.threshold >= 20:  # below, torch's jumps down at the threshold
            return _Activation("", module)
    hint = " in training mode" if isinstance(module, (nn.Dropout, nn.Dropout2d)) else ""
    raise UnsupportedModuleError(f"model.{path}: {module}{hint} has no bound, want one of {SUPPORTED}")


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
    _global_norm: Callable[[], Tensor]

    @cached_property
    def global_lipschitz(self) -> Tensor:
        """() product of the global (unmasked) operator norms of every layer but the last; an estimate."""
        return self._global_norm()

    @property
    def sparsity_loss(self) -> Tensor:
        """() the sparsity loss with the published weight of its threshold term, see :func:`locallip_cuda.losses.sparsity`."""
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
        if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"y: got labels in [{int(y.min())}, {int(y.max())}], want [0, {classes})")
        return self.logits + ops.margin(self.features, self.lower, self.upper, self.radius, self.last_weight, y)

    def margin(self, y: Tensor | None = None) -> Tensor:
        """(B,) lower bound over the ball of logit y minus the best other logit; ``y`` is the prediction by default.

        A sample is certified for y where this is above zero, in the sense of ``guarantee``.
        """
        if y is None:
            y = self.logits.argmax(1)
        own = self.logits.gather(1, y.unsqueeze(1)).squeeze(1)
        others = self.worst_logits(y).scatter(1, y.unsqueeze(1), -math.inf)
        return own - others.amax(1)


def _radius_of_input(eps: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(eps, Tensor):
        if eps.shape not in ((), x.shape[:1]):
            raise ValueError(f"eps: got shape {tuple(eps.shape)}, want () or ({x.shape[0]},)")
        if eps.device != x.device and eps.dim():
            raise ValueError(f"eps: got device {eps.device}, want x's, {x.device}")
        if eps.device.type == "cpu" and not bool(((eps >= 0) & eps.isfinite()).all()):
            raise ValueError(f"eps: got {eps.min().item()} as its least value, want finite values >= 0")
        return eps.to(x).expand(x.shape[0])
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, want a number or a tensor (B,)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, want a finite number >= 0")
    return x.new_full((x.shape[0],), float(eps))


def _check_input(path: str, operator: _Operator, x: Tensor) -> None:
    if operator.weight.dtype != x.dtype or operator.weight.device != x.device:
        raise ValueError(
            f"x: got {x.dtype} on {x.device}, want {operator.weight.dtype} on {operator.weight.device} as model.{path}"
        )
    if operator.conv is None:
        wanted, fits = f"(B, {operator.weight.shape[1]})", x.dim() == 2 and x.shape[1] == operator.weight.shape[1]
    else:
        channels = operator.weight.shape[1] * operator.conv[3]
        wanted, fits = f"(B, {channels}, H, W)", x.dim() == 4 and x.shape[1] == channels
    if not fits:
        raise ValueError(f"x: model.{path} gets shape {tuple(x.shape)}, want {wanted}")


def _propagate(
    leaves: list[tuple[str, nn.Module]], x: Tensor, eps: Tensor, radius: str, iterations: int, guarantee: str
) -> LocalBounds:
    batch = x.shape[0]
    # clean values, followed by the box centres once there is a box: one convolution serves both
    values = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    # at the input the ball lies inside the box +- eps, and so it does behind the first operator: no box needed yet
    half_width: Tensor | None = None
    reach, column_mask = eps, None
    row_masks: list[Tensor] = []
    column_masks: list[Tensor] = []
    norms: list[Tensor] = []
    terms: list[Tensor] = []
    operators: list[tuple[_Operator, list[int]]] = []
    pending: tuple[str, _Operator] | None = None

    def advance(activation: _Activation) -> None:
        """One layer: the pending operator (identity where there is none), then ``activation``."""
        nonlocal values, half_width, reach, column_mask, pending
        sizes = list(values.shape[1:])
        operator = None
        if pending is None:
            squared_row_norms = values.new_ones(1, *sizes) if column_mask is None else column_mask.to(values.dtype)
        else:
            path, operator = pending
            pending = None
            _check_input(path, operator, values)
            values = operator(values, operator.weight, operator.bias)
            half_width = None if half_width is None else operator(half_width, operator.weight.abs())
            squared_row_norms = operator.squared_row_norms(column_mask, sizes, values, exact=radius == "local")
        kind = activation.kind or "identity"
        values, half_width, rows, varying_outputs, slack = ops.activation_pattern(
            values, half_width, squared_row_norms, reach, kind, activation.first, activation.second
        )
        if not activation.kind:
            values, half_width = _monotone(activation.module, values, half_width)
        if operator is not None:
            shape = [1, *sizes]
            if radius == "global":
                global_norm, start, _ = operator.norm(None, None, shape, None, GLOBAL_ITERATIONS)
                reach = reach * global_norm
            else:
                with torch.no_grad():
                    start = operator.norm(None, None, shape, None, START_ITERATIONS)[1]
            if radius == "global" and activation.kind == "clipped_maxmin":
                rows = torch.ones_like(rows)  # the paper removes none
            norm = operator.norm(rows, column_mask, [batch, *sizes], start, iterations)[0]
            if norm.device.type == "cpu" and bool(norm.isnan().any()):
                raise ValueError(f"model.{path}: got NaN or infinite weights, want finite ones")
            if radius == "local":
                reach = reach * norm
            norms.append(norm)
            row_masks.append(rows)
            column_masks.append(varying_outputs)
            operators.append((operator, shape))
            terms.append(slack.sum(0) / max(batch, 1))
        column_mask = varying_outputs

    for path, module in leaves[:-1]:
        step = _step(path, module, values)
        if isinstance(step, _Activation):
            advance(step)
        elif step is not None:
            if pending is not None:
                advance(_IDENTITY)
            if isinstance(step, _Operator):
                pending = (path, step)
            else:
                values, half_width, column_mask = (None if t is None else t.flatten(1) for t in (values, half_width, column_mask))
    if pending is not None:
        advance(_IDENTITY)

    path, last = leaves[-1]
    head = _Operator(last.weight, last.bias, None)
    _check_input(path, head, values)
    features, centre = values[:batch], values[-batch:] if batch else values
    width = eps.unsqueeze(1) if half_width is None else half_width
    layer_norms = torch.stack(norms, 1) if norms else x.new_ones(batch, 0)
    lipschitz = layer_norms.prod(1)

    def global_norm_product() -> Tensor:
        with torch.no_grad():
            each = [operator.norm(None, None, shape, None, GLOBAL_ITERATIONS)[0] for operator, shape in operators]
            return torch.cat([*each, x.new_ones(1)]).prod()

    return LocalBounds(
        logits=head(features, last.weight, last.bias),
        radius=reach if radius == "local" else eps * lipschitz,
        layer_norms=layer_norms,
        lipschitz=lipschitz,
        features=features,
        lower=centre - width,
        upper=centre + width,
        row_masks=row_masks,
        column_masks=column_masks,
        eps=eps,
        guarantee=guarantee,
        last_weight=last.weight,
        sparsity_terms=torch.stack(terms) if terms else x.new_zeros(1, 2),
        _global_norm=global_norm_product,
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
    leaves = list(_leaves(model, ""))
    if not leaves or not isinstance(leaves[-1][1], nn.Linear):
        last = f"model.{leaves[-1][0]}: {leaves[-1][1]}" if leaves else "nothing"
        raise UnsupportedModuleError(f"model: ends in {last}, want a Linear at its end")
    eps_each = _radius_of_input(eps, x)
    return _propagate(leaves, x, eps_each, radius, iterations, guarantee)
