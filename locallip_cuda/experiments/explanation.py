"""What ``locallip explain`` measures: why the local bounds of a trained network are below its global one.

These are the figures of Huang et al. (NeurIPS 2021, arXiv:2111.01395), and what decides where several bounds meet. All
of them are estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ops
from ..bounds import LocalBounds, local_bounds
from ..norms.linear_bound import converged_norm
from ..propagation.functional import lengths
from ..propagation.graph import lowered, traced
from ..propagation.recursion import LayerBound
from .data import Dataset
from .progress import counting

ITERATIONS = 50
BINS = 50
DECIDERS = ("product", "chain", "functional", "functional by label")


@dataclass
class Spread:
    """Of numbers: their mean, and their 5 % and 95 % quantiles."""

    mean: float
    low: float
    high: float


@dataclass
class Layer:
    """One masked norm, and the layer that it is of; a layer that adds maps of several values has one for each.

    Attributes:
        path, module: of the map's module, and its class.
        rows: share of the pre-activations that can still change the layer's output, mean over the samples, as all
            shares: rows that the norm keeps.
        inputs: share of the map's inputs that can vary: columns that the norm keeps.
        columns: share of the layer's outputs that can vary: columns of the map behind.
        local_norm: over the samples.   global_norm: without masks.
        ratio: of the mean local norm to that; 1 where both are 0.
        by_ball, by_both, by_box: shares of the pre-activations of whose interval the ball gives both ends, one end, and
            none. An end that ball and box give alike is the ball's.
    """

    path: str
    module: str
    rows: float
    inputs: float
    columns: float
    local_norm: Spread
    global_norm: float
    ratio: float
    by_ball: float
    by_both: float
    by_box: float


@dataclass
class Thresholds:
    """Those of one clipped activation, over its units.

    Attributes:
        path, module: of the activation's module, and its class.
        name: "threshold" of a clipped ReLU, "upper" or "lower" of a clipped MaxMin.
        initial, learnt: before and after training.
    """

    path: str
    module: str
    name: str
    initial: Spread
    learnt: Spread


@dataclass
class Histogram:
    """Counts of samples by local Lipschitz constant.

    Attributes:
        edges: of the bins, one more than there are bins, from 0 to the global constant, or to a local one above it.
        product, composed: samples in each bin; ``composed`` is empty where no norms are composed.
    """

    edges: list[float]
    product: list[int]
    composed: list[int]


@dataclass
class Decided:
    """How many samples a bound decided, and how many of those are certified."""

    samples: int
    certified: int


@dataclass
class Explanation:
    """Estimates of one network on one set at one l2 radius.

    Attributes:
        window: how many maps in a row were composed, 1 for none; ``layers`` and ``decided`` are of the bounds with it.
        layers: in the order in which the network runs.
        thresholds: of all clipped activations, in that order; empty where there is none.
        lipschitz_global: of all layers but the last, as here below.
        lipschitz_product, lipschitz_composed: local ones over the samples, as products of norms and with composed
            norms; the latter None where ``window`` is 1.
        certified: share of the samples that are certified for their label.
        decided: what gives the margin of the label, by name: the smallest bound of what the best rival gains.
            "product" and "chain" are ball and box of the last layer's inputs, where the ball's radius is the product's
            and where composed norms made it smaller; "functional" and "functional by label" are the last layers'
            functional, with masks, and without, where it is one for all samples of a label. Of equal ones it is the
            first.
        per_sample: index, label, prediction, margin of the label, whether it is certified, what decided, and the local
            Lipschitz constants.
    """

    samples: int
    eps: float
    window: int
    iterations: int
    layers: list[Layer]
    thresholds: list[Thresholds]
    lipschitz_global: float
    lipschitz_product: Spread
    lipschitz_composed: Spread | None
    lipschitz_histogram: Histogram
    certified: float
    decided: dict[str, Decided]
    per_sample: list[dict[str, Any]]


class _Intervals(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches where bounds intersect box and ball.

    shares: of every layer (B, 3), of the pre-activations of whose interval the ball gives both ends, one, and none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shares: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.locallip_cuda.activation_pattern.default:
            ends = _ends_by_ball(*args[:4])
            self.shares.append(torch.stack([_share(ends == count) for count in (2, 1, 0)], 1))
        return func(*args, **(kwargs or {}))


def _ends_by_ball(values: Tensor, half_width: Tensor | None, squared_row_norms: Tensor, radius: Tensor) -> Tensor:
    """(B, units), 0 to 2, by the arguments of :func:`locallip_cuda.ops.activation_pattern`."""
    clean = values[: len(radius)].flatten(1)
    if half_width is None:
        return torch.full_like(clean, 2)
    centre, half = values[len(radius) :].flatten(1), half_width.flatten(1)
    reach = radius.unsqueeze(1) * squared_row_norms.flatten(1).sqrt()
    return (clean - reach >= centre - half).int() + (clean + reach <= centre + half).int()


def _share(mask: Tensor) -> Tensor:
    """(B,) of the True ones."""
    return mask.flatten(1).double().mean(1)


def _of_norm(record: LayerBound, intervals: Tensor) -> Tensor:
    """(B, 7) shares of rows, inputs and columns, the norm, and the ``intervals`` of its layer."""
    rows, columns = _share(record.row_mask), _share(record.column_mask)
    inputs = torch.ones_like(rows) if record.input_mask is None else _share(record.input_mask)
    return torch.cat([torch.stack([rows, inputs, columns, record.norm.double()], 1), intervals], 1).cpu()


def _what_decides(bounds: LocalBounds, product: LocalBounds, y: Tensor) -> tuple[Tensor, list[str]]:
    """(B,) margins of the labels ``y``, and what gives each; ``product``: the bounds that compose nothing."""
    terms = [ops.margin(t.features, t.lower, t.upper, t.radius, t.weight, y) for t in bounds.last]
    gains, names = [torch.stack(terms).sum(0)], [""]
    for each in bounds.functionals:
        gains.append(each.gains(bounds.last_weight, y, lengths, lambda t: t))
        names.append("functional" if each.masked else "functional by label")
    every = torch.stack(gains)
    own = y.unsqueeze(1)
    short = bounds.logits.gather(1, own) - bounds.logits - every.amin(0)
    margin, rival = short.scatter(1, own, torch.inf).min(1)
    first = every[:, torch.arange(len(y), device=y.device), rival].argmin(0).tolist()
    shorter = (bounds.radius < product.radius).tolist()
    return margin, [names[k] or ("chain" if less else "product") for k, less in zip(first, shorter, strict=True)]


def _spread(numbers: Tensor) -> Spread:
    numbers = numbers.detach().double().flatten().cpu()
    low, high = torch.quantile(numbers, numbers.new_tensor([0.05, 0.95])).tolist()
    return Spread(float(numbers.mean()), low, high)


def _thresholds(model: nn.Module, initial: nn.Module, x: Tensor) -> list[Thresholds]:
    """Of ``model`` against ``initial``, which is the same network before training."""
    modules = dict(model.named_modules(remove_duplicate=False))
    graphs = [lowered(traced(each, x), x.dtype) for each in (model, initial)]
    found = []
    for layer, before in zip(*(graph.layers for graph in graphs), strict=True):
        kind, path = layer.activation.kind, layer.activation_path
        for name, learnt, first in (
            ("threshold" if kind == "clipped_relu" else "upper", layer.activation.first, before.activation.first),
            ("lower", layer.activation.second, before.activation.second),
        ):
            if learnt is not None and first is not None:
                found.append(Thresholds(path, type(modules[path]).__name__, name, _spread(first), _spread(learnt)))
    return found


def _layers(model: nn.Module, records: Sequence[LayerBound], of_norms: Sequence[Tensor]) -> list[Layer]:
    """records: of any batch, for the norms without masks.   of_norms: (samples, 7) as :func:`_of_norm` has them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for record, own in zip(records, of_norms, strict=True):
        rows, inputs, columns, mean, *ends = own.mean(0).tolist()
        whole = float(converged_norm(record.linear, None, None, 1))
        norms = (_spread(own[:, 3]), whole, mean / whole if whole else 1.0)
        found.append(Layer(record.path, type(modules[record.path]).__name__, rows, inputs, columns, *norms, *ends))
    return found


def _histogram(product: Tensor, composed: Tensor, whole: float) -> Histogram:
    """With the same bins for both, that hold the global constant ``whole`` too."""
    most = max(whole, *product.tolist(), *composed.tolist())
    counts, edges = torch.histogram(product, BINS, range=(0.0, most))
    more = torch.histogram(composed, edges)[0] if len(composed) else composed
    return Histogram(edges.tolist(), counts.int().tolist(), more.int().tolist())


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, want an integer >= 1")


@torch.no_grad()
def explain(
    model: nn.Module,
    initial: nn.Module,
    dataset: Dataset,
    eps: float,
    *,
    radius: Literal["local", "global"] = "local",
    window: int = 1,
    limit: int = 256,
    batch_size: int = 64,
    quiet: bool = True,
) -> Explanation:
    """Measure ``model`` on the first ``limit`` samples of ``dataset`` at l2 radius ``eps``, by norms of ``ITERATIONS``
    steps.

    initial: the same network as it was before training, on the same device.   radius, window: as for
    :func:`locallip_cuda.local_bounds`; the product of norms is measured beside a window above 1.

    ValueError for bad numbers; UnsupportedModuleError for a network without bounds.
    """
    _check("limit", limit)
    _check("batch_size", batch_size)
    model.eval()
    initial.eval()
    device = next(model.parameters()).device
    dataset = dataset[:limit]
    of_norms: list[list[Tensor]] = []
    per_sample: list[dict[str, Any]] = []
    with counting("explaining", len(dataset), silent=quiet) as count_up:
        for index in torch.split(torch.arange(len(dataset)), batch_size):
            x, y = dataset.batch(index, device)
            with _Intervals() as intervals:
                bounds = local_bounds(model, x, eps, radius=radius, iterations=ITERATIONS, window=window)
            bounds.check_labels(y)
            product = bounds if window == 1 else local_bounds(model, x, eps, iterations=ITERATIONS)
            ends = {
                term.index: own
                for layer, own in zip(bounds.graph.layers, intervals.shares, strict=True)
                for term in layer.terms
            }
            of_norms.append([_of_norm(record, ends[record.index]) for record in bounds.layers])
            margin, decided = _what_decides(bounds, product, y)
            for k, i in enumerate(index.tolist()):
                constants = {"lipschitz_product": float(product.lipschitz[k])}
                if window > 1:
                    constants["lipschitz_composed"] = float(bounds.lipschitz[k])
                per_sample.append(
                    {
                        "index": i,
                        "label": int(y[k]),
                        "prediction": int(bounds.logits[k].argmax()),
                        "margin": float(margin[k]),
                        "certified": bool(margin[k] > 0),
                        "decided": decided[k],
                        **constants,
                    }
                )
            count_up(len(y))
    by_product, composed = (
        torch.tensor([sample[name] for sample in per_sample if name in sample], dtype=torch.float64)
        for name in ("lipschitz_product", "lipschitz_composed")
    )
    whole = float(bounds.global_lipschitz)
    verdicts = {name: [sample["certified"] for sample in per_sample if sample["decided"] == name] for name in DECIDERS}
    return Explanation(
        samples=len(per_sample),
        eps=eps,
        window=window,
        iterations=ITERATIONS,
        layers=_layers(model, bounds.layers, [torch.cat(own) for own in zip(*of_norms, strict=True)]),
        thresholds=_thresholds(model, initial, x[:1]),
        lipschitz_global=whole,
        lipschitz_product=_spread(by_product),
        lipschitz_composed=_spread(composed) if window > 1 else None,
        lipschitz_histogram=_histogram(by_product, composed, whole),
        certified=sum(sample["certified"] for sample in per_sample) / len(per_sample),
        decided={name: Decided(len(own), sum(own)) for name, own in verdicts.items() if own},
        per_sample=per_sample,
    )
