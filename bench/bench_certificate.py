"""Whole certificates, by guarantee and by layer, beside the published evaluation: what a proof costs.

Each guarantee certifies the same samples in the same batches, in turn: `local_bounds` and its margin as
`locallip_cuda.certify` calls them, so that the norm of each layer can be timed where it is taken. The samples are the
first of a test set that the network classifies correctly, for no others are worth a certificate. The published
evaluation is `paper_method` with 2000 power iterations a layer, in float32 and without gradients; its norms are
estimates from below. Its global norms, which depend on no sample, are timed apart.

It is a command of its own (`python -m bench certificate`) and no test of pytest-benchmark: a trained network is an
input here, and a repeat takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import networks, paper_method
from bench.case import DEVICE
from bench.clock import synchronize
from locallip_cuda import LocalBounds, local_bounds
from locallip_cuda.experiments import data, models, report
from locallip_cuda.experiments.checkpoint import CHECKPOINT_NAME
from locallip_cuda.experiments.data import Dataset
from locallip_cuda.experiments.network import load_model
from locallip_cuda.norms.linear import Convolution
from locallip_cuda.norms.masked_norm import ESTIMATE_ITERATIONS, GUARANTEES
from locallip_cuda.propagation.estimate import Estimate
from locallip_cuda.propagation.proof import Proof

PUBLISHED = "published"
PUBLISHED_ITERATIONS = 2000
# Rounds of the published loop for the worst logits: more than it takes to end by itself in most samples.
ROUNDS = 10
# The network without a checkpoint.
FALLBACK = "cifar10-6c2f"


@dataclass
class Problem:
    """A network, the test images to certify (all classified correctly), and what they are."""

    title: str
    model: nn.Sequential
    x: Tensor
    y: Tensor
    eps: float


@dataclass
class Cost:
    """Seconds of one method, summed over its samples, and what it found.

    Attributes:
        norms: of each layer but the last.
        propagation: boxes, balls, activations and masks; all but norms and margin.
        slowest: seconds a sample in the slowest batch.
        once: the published method's global norms, not in the others.
        layer_norms: by sample and layer.
    """

    samples: int = 0
    norms: list[float] = field(default_factory=list)
    propagation: float = 0.0
    margin: float = 0.0
    slowest: float = 0.0
    once: float = 0.0
    certified: int = 0
    layer_norms: list[list[float]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.norms) + self.propagation + self.margin

    def add(self, bounding: float, norms: Sequence[float], margin: float, layer_norms: Tensor, holds: Tensor) -> None:
        """One batch. bounding: seconds of all but the margin and `once`, the norms among them."""
        batch = len(layer_norms)
        self.samples += batch
        self.norms = [a + b for a, b in zip(self.norms or [0.0] * len(norms), norms, strict=True)]
        self.propagation += bounding - sum(norms)
        self.margin += margin
        self.slowest = max(self.slowest, (bounding + margin) / batch)
        self.certified += int(holds.sum())
        self.layer_norms += layer_norms.tolist()


@dataclass
class Layer:
    """What a layer is, and the shares of its rows and columns that the masks keep."""

    name: str
    rows: float
    columns: float


def problem(checkpoint: Path | None, data_root: Path | None, samples: int) -> Problem:
    """The network of a checkpoint (a file or the folder of a run) with its test set, or one of `bench.networks`."""
    if checkpoint is not None:
        path = checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint
        model, recipe, config = load_model(path)
        dataset = data.load(models.spec(recipe.preset).data, data_root, train=False)
        eps = recipe.eps
        epochs, digest = config["position"]["epoch"], report.digest(path)[:12]
        title = f"{recipe.preset}, {recipe.activation}, {epochs} epochs (checkpoint {digest}); {dataset.name} test set"
    else:
        model, eps = networks.trained(FALLBACK), networks.RECIPES[FALLBACK].eps
        x, y = networks.images(FALLBACK, 4 * samples + 64, seed=10**6)
        dataset = Dataset("synthetic", (x * 255).round().to(torch.uint8), y, 10)
        title = f"{FALLBACK}, trained briefly on synthetic images of digits (bench/networks.py), which are the samples"
    model = model.to(DEVICE).eval()
    return Problem(title, model, *correct_samples(model, dataset, samples), eps)


@torch.no_grad()
def correct_samples(model: nn.Sequential, dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images that the model classifies correctly, and their labels."""
    found = torch.empty(0, dtype=torch.int64)
    for part in torch.arange(len(dataset)).split(256):
        x, y = dataset.batch(part, DEVICE)
        found = torch.cat([found, part[(model(x).argmax(1) == y).cpu()]])
        if len(found) >= count:
            return dataset.batch(found[:count], DEVICE)
    raise ValueError(f"samples: got {count}, but the network classifies only {len(found)} images correctly")


def _now() -> float:
    synchronize()
    return time.perf_counter()


@contextmanager
def _timed(owner: object, name: str, seconds: list[float]) -> Iterator[None]:
    """Append what each call of `owner`'s function takes to `seconds`."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = function(*args, **kwargs)
        seconds.append(_now() - start)
        return result

    with mock.patch.object(owner, name, call):
        yield


def certify_batch(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, guarantee: str, cost: Cost) -> LocalBounds:
    norms: list[float] = []
    with torch.no_grad(), _timed(Estimate, "_fresh_norm", norms), _timed(Proof, "_proved", norms):
        start = _now()
        bounds = local_bounds(model, x, eps, iterations=ESTIMATE_ITERATIONS, guarantee=guarantee)
        bounded = _now()
        margin = bounds.margin(y)
        cost.add(bounded - start, norms, _now() - bounded, bounds.layer_norms, margin > 0)
    return bounds


def evaluate_as_published(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, cost: Cost) -> None:
    norms: list[float] = []
    with torch.no_grad(), _timed(paper_method, "_power_iteration", norms):
        start = _now()
        bounds = paper_method.paper_bounds(model, x, eps, PUBLISHED_ITERATIONS)
        bounded = _now()
        holds = bounds.worst_logits(y, ROUNDS).argmax(1) == y
        margin = _now() - bounded
    # the global norms come first, on the way through the network, and the local ones at its end
    layers = len(norms) // 2
    once = sum(norms[:layers])
    cost.once += once
    cost.add(bounded - start - once, norms[layers:], margin, bounds.layer_norms, holds)


def describe_layers(bounds: LocalBounds) -> list[Layer]:
    layers = []
    for layer in bounds.layers:
        linear, sizes = layer.linear, layer.linear.input_sizes
        name = f"{type(linear).__name__.lower()} {math.prod(sizes)} to {math.prod(linear.output_sizes)}"
        if isinstance(linear, Convolution):
            kernel = "x".join(map(str, linear.weight.shape[2:])) + (f"/{s}" if (s := linear.stride[0]) > 1 else "")
            places = "x".join(map(str, sizes[1:]))
            name = f"conv {kernel}, {sizes[0]} to {linear.output_sizes[0]} on {places}"
        columns = 1.0 if layer.input_mask is None else layer.input_mask.double().mean().item()
        layers.append(Layer(name, layer.row_mask.double().mean().item(), columns))
    return layers


def run(
    p: Problem, guarantees: Sequence[str], batch_size: int, published_samples: int
) -> tuple[dict[str, Cost], list[Layer]]:
    """Costs by guarantee, the published evaluation's last, and the layers (their masks in the first batch)."""
    costs = {guarantee: Cost() for guarantee in guarantees}
    layers: list[Layer] = []
    with tqdm(total=len(p.x) * len(costs), unit="sample", leave=False) as bar:
        for guarantee in guarantees:
            if guarantee != "deterministic":  # loads what a process loads once; there it is nothing beside the rest
                certify_batch(p.model, p.x[:1], p.y[:1], p.eps, guarantee, Cost())
        for x, y in zip(p.x.split(batch_size), p.y.split(batch_size), strict=True):
            for guarantee, cost in costs.items():
                bar.set_description(guarantee)
                bounds = certify_batch(p.model, x, y, p.eps, guarantee, cost)
                layers = layers or describe_layers(bounds)
                bar.update(len(x))
        if published_samples:
            bar.set_description(PUBLISHED)
            costs[PUBLISHED] = Cost()
            x, y = p.x[:published_samples], p.y[:published_samples]
            evaluate_as_published(p.model, x, y, p.eps, costs[PUBLISHED])
    return costs, layers


def lipschitz_ratio(cost: Cost, other: Cost) -> float:
    """Mean over the samples of both of the product of the layer norms divided by the other's."""
    both = min(cost.samples, other.samples)
    ours, theirs = (torch.tensor(c.layer_norms[:both], dtype=torch.float64).prod(1) for c in (cost, other))
    return (ours / theirs).mean().item()


def table(costs: dict[str, Cost], layers: Sequence[Layer]) -> str:
    """Seconds a sample in Markdown: a column a method, a row a layer."""

    def row(name: str, cells: Iterable[object], rows: str = "", columns: str = "") -> list[str]:
        return [name, rows, columns, *map(str, cells)]

    def each(name: str, values: Iterable[float], rows: str = "", columns: str = "") -> list[str]:
        cells = [f"{value / cost.samples:.3f}" for value, cost in zip(values, costs.values(), strict=True)]
        return row(name, cells, rows, columns)

    all_costs = list(costs.values())
    rows = [row("seconds a sample", costs, "rows", "columns"), row("---", ["---:"] * len(costs), "---:", "---:")]
    for index, layer in enumerate(layers):
        norms = [cost.norms[index] for cost in all_costs]
        rows.append(each(f"norm: {layer.name}", norms, f"{layer.rows:.0%}", f"{layer.columns:.0%}"))
    rows.append(each("propagation", [cost.propagation for cost in all_costs]))
    rows.append(each("margin", [cost.margin for cost in all_costs]))
    rows.append(each("all", [cost.total for cost in all_costs]))
    rows.append(row("all, in the slowest batch", [f"{cost.slowest:.3f}" for cost in all_costs]))
    rows.append(row("samples", [cost.samples for cost in all_costs]))
    rows.append(row("certified", [cost.certified for cost in all_costs]))
    yardstick = costs.get(PUBLISHED)
    if yardstick is not None:
        ratios = [f"{lipschitz_ratio(cost, yardstick):.4f}" for cost in all_costs]
        rows.append(row("Lipschitz constant / published", ratios))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(arguments: Sequence[str]) -> int:
    """Time the certificates of one network, print the table and write the JSON. The times are no regression test."""
    parser = argparse.ArgumentParser(prog="python -m bench certificate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help=f"a checkpoint or the folder of a run (default: {FALLBACK}, trained briefly here)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets; digits needs none")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument("--guarantee", nargs="+", choices=GUARANTEES, default=GUARANTEES, help="default: all")
    parser.add_argument(
        "--published-samples",
        type=int,
        default=4,
        metavar="N",
        help="so many of the samples for the published evaluation (default: %(default)s; 0 leaves it out)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    p = problem(options.checkpoint, options.data, options.samples)
    costs, layers = run(p, options.guarantee, options.batch_size, options.published_samples)
    environment = report.environment(DEVICE)
    when, command = f"{datetime.now(timezone.utc):%Y-%m-%d}", shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    lines = [
        f"- command: `{command}`",
        f"- commit: {environment['commit']}, {when}",
        f"- hardware: {environment['processor']}, {environment['threads']} threads; device {environment['device']}",
        f"- software: torch {environment['torch']}, Python {environment['python']}",
        f"- network: {p.title}",
        f"- l2 radius {p.eps:.4g}; the first {len(p.x)} samples classified correctly, {options.batch_size} at a time",
        "- rows, columns: the share that the masks keep in the first batch",
    ]
    published = costs.get(PUBLISHED)
    if published is not None:
        lines.append(
            f"- published: {PUBLISHED_ITERATIONS} power iterations a layer, on masks from the published bounds, plain "
            f"PyTorch in float32, {published.samples} of the samples at once (the ratios of Lipschitz constants are "
            f"over these); its global norms took {published.once:.1f} s more, once"
        )
    print("\n".join(lines) + "\n\n" + table(costs, layers))
    if options.out:
        values = {
            "command": command,
            "date": when,
            "environment": environment,
            "network": p.title,
            "eps": p.eps,
            "batch_size": options.batch_size,
            "layers": [asdict(layer) for layer in layers],
            "costs": {name: asdict(cost) | {"total": cost.total} for name, cost in costs.items()},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0
