"""Whether the pass computed what ``model(x)`` computes: a second net below the recognition of :mod:`.layers`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Activation, Leaf, Operator, UnsupportedModuleError

# How many times the rounding, as estimated here, a difference may be. The largest seen was 1, and 23 in networks of
# thousands of units that are all alike.
MARGIN = 100

_agreed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_due(model: nn.Module, x: Tensor, *, proof: bool) -> bool:
    """Whether the clean logits are to be compared: for every proof, and for the first estimate of a model.

    Not in a traced or captured graph, nor on tensors without values; and not where a parametrisation in training mode
    may keep a state, as spectral_norm does, which one call more would change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if type(x) not in (Tensor, nn.Parameter):
        return False
    if x.device.type not in ("cpu", "cuda") or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if proof:
        return True
    return model not in _agreed and not any(m.training and hasattr(m, "parametrizations") for m in model.modules())


@torch.no_grad()
def check(model: nn.Module, modules: Sequence[Leaf], x: Tensor, logits: Tensor, error: Tensor | None = None) -> None:
    """UnsupportedModuleError where ``model(x)`` is further from ``logits`` (B, K) than rounding and ``error`` explain.

    The rounding of every unit is taken for independent of all others, two units in the last place of the sum of its
    terms' sizes, and carried on by the squared weights; and for the sake of units that are all alike, and round alike,
    the last layer's is added as one of the whole network. Where that overflows, anything goes.
    """
    x = x.detach().to(next(model.parameters()).dtype)
    answer = model(x.clone())  # an activation in place may write over its input
    if answer.shape == logits.shape:
        tolerance = MARGIN * _unit(x) * _rounding(modules, x).double()
        tolerance = tolerance if error is None else tolerance + error
        off = (answer.double() - logits.double()).abs()
        if not bool(((off > tolerance) | off.isnan() & tolerance.isfinite()).any()):
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
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        return torch.finfo(torch.bfloat16).eps / 2
    if x.dtype == torch.float32 and (x.is_cuda or torch.get_float32_matmul_precision() != "highest"):
        return 2.0**-11  # TF32, which convolutions take by default
    return torch.finfo(x.dtype).eps / 2


def _rounding(modules: Sequence[Leaf], x: Tensor) -> Tensor:
    """(B, K) how far rounding may be expected to put the logits off, in units of roundoff."""
    value, variance, size = x, torch.zeros_like(x), x
    with torch.autocast(x.device.type, enabled=False):
        for leaf in modules:
            layer = leaf.step(value)
            if isinstance(layer, Operator):
                bias = None if layer.bias is None else layer.bias.abs()
                size = layer(value.abs(), layer.weight.abs(), bias)
                variance = layer(variance, layer.weight.square(), None) + (2 * size).square()
                value = layer(value, layer.weight, layer.bias)
            elif isinstance(layer, Activation):
                value = layer(value)
                if layer.kind in ("maxmin", "clipped_maxmin"):
                    a, b = variance.chunk(2, 1)
                    variance = torch.maximum(a, b).repeat(1, 2, *[1] * (value.dim() - 2))
                elif not layer.kind:
                    variance = variance + (4 * (1 + value.abs())).square()
            elif layer is not None:
                value, variance = layer(value), layer(variance)
    return variance.sqrt() + 4 * size
