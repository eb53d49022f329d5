"""The real network's answers: in float32 where its rounding cannot have changed them, in float64 where it may have.

The bound of :mod:`.propagation.execution`, at one point and in l2 alone: behind an affine layer
``z = sum_k A_k h_k + b`` of computed inputs h^_k that are within q_k of the real ones, what is computed is within

    sum_k ||A_k|| q_k + || gamma(n) (sum_k |A_k| |h^_k| + |b|) || + underflow,

with norms without masks, proved once. |A| |h^| is taken in the type that runs, and what that may be off by added. An
activation multiplies the distance by its constant, and adds its own error. At the logits the error of each pair of
classes is compared with its gap.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .norms.linear import Adjoint, Composed, Convolution, Dense, Identity, LinearMap, Rearrangement, Sum
from .norms.linear_bound import absolute_norm
from .norms.masked_norm import TIGHTNESS, check_guarantee, check_input
from .propagation import agreement
from .propagation.execution import COMPUTED_ERROR, PER_MAP, Arithmetic, length
from .propagation.graph import Graph, Joined, Layer, View, lowered, output_classes, traced
from .propagation.proof import check_provable, last_weight, term_norm
from .propagation.rules import Lipschitz, MaxPool
from .rounding import UNIT, convolution, gamma, rounded_up, textbook_products, up


@dataclass(eq=False)
class _Affine:
    """An affine layer as it runs in one type, and what bounds its rounding.

    maps, sizes: its terms' maps, and those of their absolute values.   bias, bias_size: of one sample, or None.
    norms: of each term at least ||A||.   roundings: n, of which ``terms`` are those of a dense map, or 0.
    under: of each term, what underflow may do, for an input of norm 0, and for each unit of norm more, in units of the
    type's smallest normal number.
    """

    layer: Layer
    maps: list[LinearMap]
    sizes: list[LinearMap]
    bias: Tensor | None
    bias_size: Tensor | None
    norms: list[float]
    roundings: int
    terms: int
    under: list[tuple[float, float]]

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        out = _sum([_apply(linear, value) for linear, value in zip(self.maps, values, strict=True)])
        return out if self.bias is None else out + self.bias

    def rounding(self, values: Sequence[Tensor], a: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """What rounding does to each pre-activation is at most its size (B, *output), as the type has it, times (B,)
        float64, but for underflow, which all together is at most (B,) in l2."""
        size = _sum([_apply(linear, value.abs()) for linear, value in zip(self.sizes, values, strict=True)])
        size = size if self.bias_size is None else size + self.bias_size
        count = torch.full((len(size),), float(self.roundings), dtype=torch.float64, device=size.device)
        if self.terms:  # sums do not round for zeros
            count = count - self.terms + (values[0] != 0).sum(1)
        share = a.relative(count)
        under = torch.zeros_like(share)
        for value, (base, slope) in zip(values, self.under, strict=True):
            under = up(under + 2 * a.tiny * (base + slope * _norm(value, a)) * (1 + 8 * UNIT))
        return size, up(share * (1 + 4 * share)), under


@dataclass(eq=False)
class _Answer:
    """logits (B, K) in float64, and whether each sample's largest one is the real network's."""

    logits: Tensor
    decided: Tensor


class Checked(nn.Module):
    """See :func:`checked`."""

    def __init__(self, model: nn.Module, guarantee: str = "probabilistic", failure_probability: float = 1e-9) -> None:
        super().__init__()
        check_guarantee(guarantee, failure_probability)
        if guarantee == "estimate":
            raise ValueError("guarantee: got 'estimate', want 'probabilistic' or 'deterministic'")
        self.model = copy.deepcopy(model)
        self.guarantee, self.failure_probability = guarantee, failure_probability
        self._networks: dict[tuple[torch.Size, torch.device], _Network] = {}
        self._weights: list[tuple[int, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_networks": {}, "_weights": []}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, K) float64 logits of ``x`` (B, *input), in the dtype of the model's weights.

        ValueError for a sample that lies so near a decision boundary that float64 cannot tell its side either.
        """
        check_input(x)
        if not bool(x.isfinite().all()):
            raise ValueError("x: got NaN or infinite values, want finite ones")
        weights = [(t.data_ptr(), t._version) for t in (*self.model.parameters(), *self.model.buffers())]
        if weights != self._weights:  # others were loaded, or they are somewhere else
            self._networks.clear()
            self._weights = weights
        key = (x.shape[1:], x.device)
        with textbook_products(x.device.type):
            if key not in self._networks:
                self._networks[key] = _Network(self.model, x, self.guarantee, self.failure_probability)
            network = self._networks[key]
            logits = torch.zeros(len(x), network.classes, dtype=torch.float64, device=x.device)
            left = torch.arange(len(x), device=x.device)
            types = [torch.float64]
            if x.dtype == torch.float32 and _in_full_precision():
                types = [torch.float32, torch.float64]
            for dtype in types:
                answer = network.run(x[left].to(dtype))
                logits[left] = answer.logits
                left = left[~answer.decided]
                if not len(left):
                    return logits
        raise ValueError(
            f"x: got samples {left.tolist()} nearer to a decision boundary than float64 can tell, want others"
        )


def checked(model: nn.Module, guarantee: str = "probabilistic", failure_probability: float = 1e-9) -> Checked:
    """A module whose logits (B, K), float64, have the largest one where the real network has it: what a certificate
    with ``execution="real"`` speaks of, whatever rounding does.

    It runs in the dtype of ``x``, bounds its own rounding for every sample, and repeats in float64 the samples whose
    two largest logits are nearer to each other than that. Where torch is set to TF32 or bfloat16 products all are. The
    model is copied as it is; what is known of it is found out once for every size of a sample, and again where other
    weights are loaded.

    Args:
        model: as for :func:`locallip_cuda.local_bounds`, in eval mode.
        guarantee, failure_probability: of the norms of its layers, all together: "probabilistic" or "deterministic".
    """
    return Checked(model, guarantee, failure_probability)


def _in_full_precision() -> bool:
    """Whether products in float32 are not taken in fewer bits."""
    backends = torch.backends
    on_cpu: Any = backends.mkldnn
    settings = (backends, on_cpu, on_cpu.conv, on_cpu.matmul, backends.cuda.matmul)
    if any(getattr(each, "fp32_precision", "none") not in ("none", "ieee") for each in settings):
        return False
    try:
        return bool(torch.get_float32_matmul_precision() == "highest")
    except RuntimeError:  # settings by backend, which may be of several minds
        return False


class _Network:
    """The graph for samples of one size, with norms."""

    def __init__(self, model: nn.Module, x: Tensor, guarantee: str, failure_probability: float) -> None:
        trace = traced(model, x)
        self.classes = output_classes(trace)
        self.graph: Graph = lowered(trace, torch.float64, proof=True)
        check_provable(model, trace, self.graph)
        share = failure_probability / max(len(self.graph.operators), 1)
        self.layers: dict[torch.dtype, dict[Layer, _Affine]] = {torch.float32: {}, torch.float64: {}}
        for layer in (*self.graph.layers, self.graph.head):
            norms = _norms(layer, guarantee, share)
            for dtype, layers in self.layers.items():
                layers[layer] = _affine(layer, norms, dtype)
        weights = [last_weight(term) for term in self.graph.head.terms]
        self.pairs = [_pair_norms(weight, error) for weight, error in weights]
        agreement.check(model, trace, x, self.run(x.double()).logits)

    def run(self, x: Tensor) -> _Answer:
        arithmetic, layers = Arithmetic.of(x.dtype), self.layers[x.dtype]
        values, apart = [x], [torch.zeros(len(x), dtype=torch.float64, device=x.device)]

        def of(layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
            sources = [term.source for term in layer.terms]
            return [values[i] for i in sources], [apart[i] for i in sources]

        for step in self.graph.steps:
            if isinstance(step, View):
                value, far = step.rearrangement(values[step.source]), apart[step.source]
            elif isinstance(step, Joined):
                value = torch.cat([values[source] for source in step.sources], step.dim)
                far = length(torch.stack([apart[source] for source in step.sources], 1))
            else:
                value, far = _closed(layers[step], *of(step), arithmetic)
            values.append(value)
            apart.append(far)
        return self._compared(layers[self.graph.head], *of(self.graph.head), arithmetic)

    def _compared(self, head: _Affine, values: Sequence[Tensor], apart: Sequence[Tensor], a: Arithmetic) -> _Answer:
        logits, prediction = (out := head(values)).double(), out.argmax(1)
        size, share, under = head.rounding(values, a)
        rounding = up(up(size.double() * share.unsqueeze(1)) + under.unsqueeze(1))
        far = up(rounding + rounding.gather(1, prediction.unsqueeze(1)))
        for own, pairs in zip(apart, self.pairs, strict=True):
            far = up(far + up(pairs[prediction] * own.unsqueeze(1)))
        gap = logits.gather(1, prediction.unsqueeze(1)) - logits
        rival = torch.arange(self.classes, device=logits.device) != prediction.unsqueeze(1)
        # of two numbers of the type the difference has one rounding
        decided = ((gap * (1 - 4 * UNIT) > far) | ~rival).all(1) & logits.isfinite().all(1)
        return _Answer(logits, decided)


def _norms(layer: Layer, guarantee: str, share: float) -> list[float]:
    """At least those of a layer's terms; of the last layer, whose pairs of rows count, nothing that is used."""
    return [
        float(term_norm(term.path, term, None, None, 1, guarantee, share, TIGHTNESS, None)) if term.index >= 0 else 1.0
        for term in layer.terms
    ]


def _affine(layer: Layer, norms: list[float], dtype: torch.dtype) -> _Affine:
    maps = [term.parts.with_weights(lambda weight: weight.to(dtype)) for term in layer.terms]
    bias = None if layer.bias is None else layer.bias.to(dtype)
    size = None
    if layer.bias_size is not None:
        size = rounded_up(up(layer.bias_size.abs() * (1 + gamma(layer.bias_terms + 8))), dtype)
    roundings = layer.bias_terms + len(layer.terms) + 2 * PER_MAP
    terms = layer.terms[0].parts.terms if len(maps) == 1 and isinstance(maps[0], Dense) else 0
    under = [_underflow(term.parts)[1:] for term in layer.terms]
    return _Affine(layer, maps, [each.absolute() for each in maps], bias, size, norms, roundings, terms, under)


def _underflow(linear: LinearMap) -> tuple[float, float, float]:
    """At least || |A| ||, and what underflow may do behind ``linear``, as ``_Affine.under``."""
    if isinstance(linear, (Identity, Rearrangement)):
        return float(absolute_norm(linear, None, None, 1)), 0.0, 0.0
    if isinstance(linear, Composed):
        size, base, slope = 1.0, 0.0, 0.0
        for part in linear.maps:
            own, b, s = _underflow(part)
            base, slope, size = own * base + b, own * slope + s * size, own * size
        return size, base * 1.001, slope * 1.001
    if isinstance(linear, Sum):
        parts = [_underflow(part) for part in linear.maps]
        size, base, slope = (sum(each) * 1.001 for each in zip(*parts, strict=True))
        return size, base, slope
    weight = max(float(each.abs().max()) for each in linear.weights())
    each = (linear.terms + PER_MAP) * math.sqrt(math.prod(linear.output_sizes)) * 1.001
    return float(absolute_norm(linear, None, None, 1)), each * (4 + weight), each


def _pair_norms(weight: Tensor, error: Tensor | None) -> Tensor:
    """(K, K) at least ||w_j - w_k||."""
    rows = []
    for k in range(len(weight)):
        difference = up((weight - weight[k]).abs())
        rows.append(length(difference if error is None else up(difference + up(error + error[k]))))
    return torch.stack(rows)


def _norm(t: Tensor, a: Arithmetic) -> Tensor:
    """(B,) float64, at least the l2 norms of (B, *), which is in the type or in float64."""
    flat = t.flatten(1)
    count = flat.shape[1]
    spread = a.relative(torch.full((), count + 8.0, dtype=torch.float64, device=t.device))
    lost = math.sqrt(4 * count) * math.sqrt(a.tiny)  # squares that vanish
    return up(torch.linalg.vector_norm(flat, dim=1).double() * (1 + 2 * spread) + lost)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _apply(linear: LinearMap, x: Tensor) -> Tensor:
    """A x by sums of products: no cuDNN."""
    if isinstance(linear, Composed):
        for part in linear.maps:
            x = _apply(part, x)
        return x
    if isinstance(linear, Sum):
        return _sum([_apply(part, x) for part in linear.maps])
    transposed = isinstance(linear, Adjoint)
    kernel = linear.of if isinstance(linear, Adjoint) else linear
    if not isinstance(kernel, Convolution):
        return linear(x)
    own = (kernel.stride, kernel.padding, kernel.dilation, kernel.groups)
    return convolution(x, kernel.weight, *own, transposed_to=kernel.input_sizes[1:] if transposed else None)


def _closed(of: _Affine, values: Sequence[Tensor], apart: Sequence[Tensor], a: Arithmetic) -> tuple[Tensor, Tensor]:
    """What a layer computes, and how far it may be from the real one."""
    activation, z = of.layer.activation, of(values)
    size, share, under = of.rounding(values, a)
    far = up(up(_norm(size, a) * share) + under)
    for own, norm in zip(apart, of.norms, strict=True):
        far = up(far + up(own * norm))
    h = activation.function(z.double())  # in float64, which rounds less, and where a rule's constants are
    far = up(far * activation.lipschitz)
    if isinstance(activation, Lipschitz):
        assert activation.error is not None
        far = up(far + up(torch.full_like(far, activation.error) * math.sqrt(h[0].numel()) * (1 + 8 * UNIT)))
    if not (activation.exact and (activation.kind or isinstance(activation, MaxPool))):
        far = up(
            far + (COMPUTED_ERROR * a.unit + 2 * a.tiny) * (math.sqrt(h[0].numel()) + _norm(h, a)) * (1 + 8 * UNIT)
        )
    # an infinite number on the way is one here, before an activation hides it
    return h.to(a.dtype), torch.where(z.flatten(1).isfinite().all(1), far, torch.inf)
