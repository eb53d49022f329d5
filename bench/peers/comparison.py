"""One network and its test images through every certifier, in turn, and the distance at which an attack succeeds."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import locallip_cuda as ll
from bench.peers.certifiers import OWN, Holds, Peer
from bench.report import markdown_table
from locallip_cuda.attack import pgd

# Radii are looked for up to so many times eps.
LARGEST = 4.0
ATTACK_STEPS = 50
ATTACK_HALVINGS = 10


@dataclass
class Row:
    """What one certifier found.

    Attributes:
        once: processor seconds of what it does once for the network.
        seconds: processor seconds of the certificates at eps, of all samples.
        radius: of each sample the largest found at which it is certified; 0 where there is none, or the class is wrong.
        refuted: how many radii are larger than the distance of an adversarial point.
        problem: why there are no figures.
    """

    peer: Peer
    version: str = ""
    once: float = 0.0
    seconds: float = 0.0
    radius: list[float] = field(default_factory=list)
    refuted: int = 0
    problem: str = ""


def compare(
    model: nn.Sequential, x: Tensor, y: Tensor, eps: float, batch_size: int, halvings: int, peers: Sequence[Peer]
) -> tuple[list[Row], Tensor]:
    """A row for each peer, and (N,) distances of adversarial points, of x (N, *input) with labels y (N,).

    halvings: of the interval in which a radius lies; with none it is eps or 0.

    The peers take turns on each batch, so that a slow minute of the machine is everyone's. What a first call does alone
    is not timed. A peer that fails has the reason in its row, and no more turns.
    """
    rows = [Row(peer) for peer in peers]
    holds = {row.peer.name: attempt(row, prepare, model, x[:1], y[:1], eps) for row in rows}
    distances = []
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    for part, labels in tqdm(batches, unit="batch", leave=False):
        distances.append(adversarial_distance(model, part, labels, LARGEST * eps))
        for row in rows:
            if not row.problem:
                attempt(row, certify_batch, holds[row.peer.name], model, part, labels, eps, halvings)
    distance = torch.cat(distances)
    for row in rows:
        if not row.problem:
            row.refuted = int((torch.tensor(row.radius, dtype=torch.float64) > distance).sum())
    return rows, distance


def attempt(row: Row, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(row, ...)``, without gradients; None, and the reason in the row, where it fails."""
    try:
        with torch.no_grad():
            return function(row, *arguments)
    except Exception as error:  # other people's code may fail in any way
        row.problem = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return None


def prepare(row: Row, model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Holds | None:
    peer = row.peer
    if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
        row.problem = "not installed"
        return None
    started = time.process_time()
    holds = peer.make(model, x)
    row.once = time.process_time() - started
    row.version = version(peer)
    holds(x, y, torch.full((1,), eps, dtype=torch.float64))
    return holds


def version(peer: Peer) -> str:
    """Of what was imported, which need not be what is installed."""
    if peer.distribution == OWN:
        return str(ll.build_info()["version"])
    module = sys.modules[peer.module.partition(".")[0]]
    place = Path(module.__file__ or next(iter(module.__path__))).parent
    try:
        installed = metadata.distribution(peer.distribution)
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and place.is_relative_to(Path(str(installed.locate_file("")))):
        return installed.version
    return f"{getattr(module, '__version__', 'unknown')}, from {place}"


def certify_batch(
    row: Row, holds: Holds, model: nn.Sequential, x: Tensor, y: Tensor, eps: float, halvings: int
) -> None:
    right = model(x).argmax(1) == y
    radius = torch.full((len(x),), eps, dtype=torch.float64)
    started = time.process_time()
    at_eps = holds(x, y, radius)
    row.seconds += time.process_time() - started
    low, high = torch.where(at_eps & right, radius, 0), torch.where(at_eps, LARGEST * radius, radius)
    for _ in range(halvings):
        middle = (low + high) / 2
        certified = right & holds(x, y, middle)
        low, high = torch.where(certified, middle, low), torch.where(certified, high, middle)
    row.radius += low.tolist()


def adversarial_distance(model: nn.Sequential, x: Tensor, y: Tensor, largest: float) -> Tensor:
    """(B,) float64, distance of the nearest point found that has another class than y in float64; inf for none.

    0 where x has. ``largest``: how far away points are looked for.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    found = torch.full((len(x),), math.inf, dtype=torch.float64)
    unbroken, reach = torch.zeros_like(found), torch.full_like(found, largest)
    for _ in range(ATTACK_HALVINGS):
        points = pgd(model, x, y, reach, steps=ATTACK_STEPS)
        with torch.no_grad():
            broken = model(points).argmax(1) != y
        distance = (points - x).flatten(1).norm(dim=1)
        found = torch.where(broken, torch.minimum(found, distance), found)
        unbroken = torch.where(broken, unbroken, reach)
        reach = (unbroken + found.clamp(max=largest)) / 2
    return found


def table(rows: Sequence[Row], distance: Tensor, eps: float) -> list[str]:
    """In Markdown. The attack is last: no radius of a proof exceeds its distance."""
    head = ["certifier", "version", f"certified at {eps:g}", "radius, mean", "median", "once, s", "a sample, s"]
    head += ["above the attack", "what it proves"]
    cells = []
    for row in rows:
        figures = [f"no figures: {row.problem}".replace("|", "/"), *[""] * 5]
        if not row.problem:
            radius = torch.tensor(row.radius, dtype=torch.float64)
            seconds = [f"{row.once:.2f}", f"{row.seconds / len(radius):.2g}"]
            figures = [*shown(radius, eps), *seconds, str(row.refuted)]
        cells.append([row.peer.name, row.version, *figures, row.peer.proves])
    nearest = distance.clamp(max=LARGEST * eps)
    cells.append(["PGD: distance of adversarial points", "", *shown(nearest, eps), "", "", "", "nothing: from above"])
    return markdown_table(head, cells)


def shown(radius: Tensor, eps: float) -> list[str]:
    return [f"{(radius >= eps).double().mean():.1%}", f"{radius.mean():.3f}", f"{radius.quantile(0.5):.3f}"]
