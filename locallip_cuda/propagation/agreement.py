"""Whether the pass computed what ``model(x)`` computes: a second net below the recognition of :mod:`.layers`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Activation, Leaf, Operator, UnsupportedModuleError

# How many times the rounding, as estimated here, a difference may be.
MARGIN = 8

# Sums of m terms that are all alike, added one after another, were seen off by m / 7 units of roundoff.
DRIFT = 1 / 8

_agreed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_due(model: nn.Module, x: Tensor, *, proof: bool) -> bool:
    """Whether the clean logits are to be compared: for every proof, and for the first estimate of a model.

    Not in a traced or captured graph, nor on tensors without values; and not where a parametrisation in training mode
    may keep a state, as spectral_norm does, which one call more would change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if x.device.type not in ("cpu", "cuda") or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if proof:
        return True
    return (
        type(x) in (Tensor, nn.Parameter)
        and model not in _agreed
        and not any(m.training and hasattr(m, "parametrizations") for m in model.modules())
    )


@torch.no_grad()
def check(model: nn.Module, modules: Sequence[Leaf], x: Tensor, logits: Tensor) -> None:
    """UnsupportedModuleError where ``model(x)`` is further from ``logits`` (B, K) than rounding explains.

    The rounding of every unit is taken for independent of all others, relative to the sum of its terms' sizes, and
    carried on by the squared weights; and for the sake of units that are all alike, and round alike, that of all layers
    together is allowed to the last one's sizes. Where the network's dtype overflows, anything goes.
    """
    head: Any = modules[-1].module
    x = x.detach().to(head.weight.dtype)
    answer = model(x.clone())  # an activation in place may write over its input
    if answer.shape == logits.shape:
        tolerance = _unit(x) * _rounding(modules, x)
        off = (answer.double() - logits.double()).abs()
        if not bool(((off > tolerance) | off.isnan() & tolerance.isfinite()).any()):
            if bool((off.isfinite() & tolerance.isfinite()).any()):  # of no sample, or of NaN, it says nothing
                _agreed.add(model)
            return
        differs = f"by up to {float(off.nan_to_num(torch.inf).max()):.3g} in a logit"
    else:
        differs = f"in shape, {tuple(answer.shape)} and {tuple(logits.shape)}"
    raise UnsupportedModuleError(
        f"model: model(x) and its modules one after another differ {differs}, more than rounding explains: there is no "
        "bound of what the model computes; want modules whose call nothing changes"
    )


def _unit(x: Tensor) -> float:
    """Unit roundoff of the products that ``model(x)`` takes; the largest that the settings allow."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps / 2
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # settings by backend, which may be of several minds
        precision = "medium"
    if x.dtype == torch.float32 and precision == "medium":
        return torch.finfo(torch.bfloat16).eps / 2
    if x.dtype == torch.float32 and (x.is_cuda or precision != "highest"):
        return 2.0**-11  # TF32, which convolutions take by default
    return torch.finfo(x.dtype).eps / 2


def _rounding(modules: Sequence[Leaf], x: Tensor) -> Tensor:
    """(B, K) how far rounding may put the logits off, in units of roundoff; infinite where x's dtype overflows."""
    limits = torch.finfo(x.dtype)
    value, variance, size, alike = x.double(), torch.zeros_like(x, dtype=torch.float64), x.double(), 0.0
    largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for leaf in modules:
            layer = leaf.step(value)
            if isinstance(layer, Operator):
                layer = layer.snapshot(torch.float64)
                terms = layer.weight[0].numel()
                each = 2 + DRIFT * terms
                size = layer(value.abs(), layer.weight.abs(), None if layer.bias is None else layer.bias.abs())
                underflow = terms * limits.tiny / limits.eps
                variance = layer(variance, layer.weight.square(), None) + (each * size + underflow).square()
                value = layer(value, layer.weight, layer.bias)
                alike += 2 * each
                largest = torch.maximum(largest, size.flatten(1).amax(1))
            elif isinstance(layer, Activation):
                value = layer(value)
                if layer.kind in ("maxmin", "clipped_maxmin"):
                    a, b = variance.chunk(2, 1)
                    variance = torch.maximum(a, b).repeat(1, 2, *[1] * (value.dim() - 2))
                elif not layer.kind:
                    variance = variance + (4 * (1 + value.abs())).square()
            elif layer is not None:
                value, variance = layer(value), layer(variance)
    found: Tensor = MARGIN * variance.sqrt() + alike * size
    return torch.where((largest < limits.max).unsqueeze(1), found, torch.inf)
