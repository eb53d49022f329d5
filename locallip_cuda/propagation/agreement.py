"""Whether the pass computed what ``model(x)`` computes: a second net below the rules."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..norms.linear import Composed, Identity, LinearMap, Rearrangement, Sum
from .graph import Graph, Joined, Layer, UnsupportedModuleError, View, lowered
from .recursion import Pass
from .rules import Lipschitz
from .trace import Trace, without_autocast

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
def check(model: nn.Module, trace: Trace, x: Tensor, logits: Tensor) -> None:
    """UnsupportedModuleError where ``model(x)`` is further from ``logits`` (B, K) than rounding explains.

    The rounding of every unit is taken for independent of all others, relative to the sum of its terms' sizes, and
    carried on by the squared weights; and for the sake of units that are all alike, and round alike, that of all layers
    together is allowed to the last one's sizes. Where the network's dtype overflows, anything goes.
    """
    x = x.detach()
    answer = model(x.clone())  # an activation in place may write over its input
    if answer.shape == logits.shape:
        graph = lowered(trace, torch.float64, proof=True)
        rounding = _Rounding(graph, x)
        tolerance = _unit(x) * rounding.tolerance()
        off = (answer.double() - logits.double()).abs()
        if not bool(((off > tolerance) | off.isnan() & tolerance.isfinite()).any()):
            if bool((off.isfinite() & tolerance.isfinite()).any()):  # of no sample, or of NaN, it says nothing
                _agreed.add(model)
            return
        differs = f"by up to {float(off.nan_to_num(torch.inf).max()):.3g} in a logit"
    else:
        differs = f"in shape, {tuple(answer.shape)} and {tuple(logits.shape)}"
    raise UnsupportedModuleError(
        f"model: model(x) and the functions that it was seen to call differ {differs}, more than rounding explains: "
        "there is no bound of what the model computes; want rules that say what their functions do"
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


@dataclass(eq=False)
class _Fact:
    """A clean value, and the variance of its rounding error, in units of roundoff."""

    value: Tensor
    variance: Tensor


class _Rounding(Pass[_Fact]):
    """How far rounding may put values off, in units of roundoff."""

    def __init__(self, graph: Graph, x: Tensor) -> None:
        super().__init__(local=True)
        self.graph, self.limits = graph, torch.finfo(x.dtype)
        self.alike = 0.0
        self.largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with without_autocast(x.device.type):
            facts = self.run(graph, x.double(), self.largest)
            self.head = self._affine(graph.head, facts)

    def tolerance(self) -> Tensor:
        """(B, K) of the head; infinite where the dtype overflows."""
        _, variance, size = self.head
        found = MARGIN * variance.sqrt() + self.alike * size
        return torch.where((self.largest < self.limits.max).unsqueeze(1), found, torch.inf)

    def start(self, x: Tensor, eps: Tensor) -> _Fact:
        return _Fact(x, torch.zeros_like(x))

    def viewed(self, step: View, fact: _Fact) -> _Fact:
        return _Fact(step.rearrangement(fact.value), step.rearrangement(fact.variance))

    def joined(self, step: Joined, facts: Sequence[_Fact]) -> _Fact:
        return _Fact(torch.cat([f.value for f in facts], step.dim), torch.cat([f.variance for f in facts], step.dim))

    def closed(self, layer: Layer, facts: Sequence[_Fact]) -> _Fact:
        value, variance, _ = self._affine(layer, facts)
        activation = layer.activation
        out = activation.function(value)
        if activation.kind in ("maxmin", "clipped_maxmin"):
            a, b = variance.chunk(2, 1)
            variance = torch.maximum(a, b).repeat(1, 2, *[1] * (out.dim() - 2))
        elif isinstance(activation, Lipschitz):
            far = variance.flatten(1).sum(1) * activation.lipschitz**2
            variance = far.view(-1, *[1] * (out.dim() - 1)).expand_as(out)
        elif out.shape != variance.shape:  # maxima over windows
            variance = activation.function(variance)
        if not activation.exact:
            variance = activation.lipschitz**2 * variance + (4 * (1 + out.abs())).square()
        return _Fact(out, variance)

    def _affine(self, layer: Layer, facts: Sequence[_Fact]) -> tuple[Tensor, Tensor, Tensor]:
        """Value, variance and the sizes of what the value is the sum of."""
        zero = torch.zeros((), dtype=torch.float64, device=self.largest.device)
        value, variance, size = zero, zero, zero
        for term, fact in zip(layer.terms, facts, strict=True):
            own = self._through(term.parts, fact.value, fact.variance, fact.value.abs())
            value, variance, size = value + own[0], variance + own[1], size + own[2]
        if layer.bias is not None:
            value = value + layer.bias
        if layer.bias_size is not None:
            size = size + layer.bias_size
        if layer.bias is not None or len(facts) > 1:
            variance = variance + self._rounded(size, 1)
        return value, variance, size

    def _through(
        self, linear: LinearMap, value: Tensor, variance: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Behind a map, each of whose parts rounds by itself."""
        if isinstance(linear, (Identity, Rearrangement)):
            return linear(value), linear(variance), linear(size)
        if isinstance(linear, Composed):
            for part in linear.maps:
                value, variance, size = self._through(part, value, variance, size)
            return value, variance, size
        if isinstance(linear, Sum):
            parts = [self._through(part, value, variance, size) for part in linear.maps]
            value, variance, size = (torch.stack(list(each)).sum(0) for each in zip(*parts, strict=True))
            return value, len(parts) * variance + self._rounded(size, 1), size
        size = linear.absolute()(size)
        variance = linear.squared()(variance) + self._rounded(size, linear.terms)
        return linear(value), variance, size

    def _rounded(self, size: Tensor, terms: int) -> Tensor:
        """The variance of one sum of so many terms."""
        each = 2 + DRIFT * terms
        self.alike += 2 * each
        self.largest = torch.maximum(self.largest, size.flatten(1).amax(1))
        return (each * size + terms * self.limits.tiny / self.limits.eps).square()
