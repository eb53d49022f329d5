"""How a measurement is shown and kept: a table for the terminal, JSON to repeat it, a plot of the curve."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..build_info import build_info
from .checkpoint import write_atomically
from .data import Dataset
from .evaluation import Certified, Measurement
from .recipes import Recipe

CAVEAT = {
    "estimate": (
        "estimate: no proof. The norms come from an iteration that approaches the true ones from below, and its "
        "arithmetic is rounded: these figures may be too high."
    ),
    "probabilistic": (
        "probabilistic: proved for the network in real arithmetic with its weights as stored{execution}, but for a "
        "failure of probability {failure_probability:g} a sample."
    ),
    "deterministic": "deterministic: proved for the network in real arithmetic with its weights as stored{execution}.",
}
VOID = (
    "probabilistic, void: its random vectors follow from the seed {seed}; nothing is promised against whoever knew it."
)


def caveats(measurement: Measurement) -> list[str]:
    """What each guarantee of the measurement is worth, in plain words."""
    lines: list[str] = []
    for name, c in (*measurement.certified.items(), *measurement.composed.items()):
        void = name == "probabilistic" and measurement.proof_seed is not None
        text = VOID.format(seed=measurement.proof_seed) if void else CAVEAT[name]
        runs = measurement.execution
        of = "" if runs == "real" else f" and for what it computes in {runs}, as docs/guarantees.md assumes it to run"
        text = text.format(failure_probability=c.failure_probability, execution=of)
        lines += [] if text in lines else [text]
        if c.other_class:
            lines.append(
                f"{name}: {c.other_class} of the samples it was tried on have another class in its arithmetic than in "
                "the network's own, which the accuracy counts; what is certified has the label in both."
            )
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with columns of one width, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))]
        ).rstrip()
        for first, *rest in rows
    ]


def table(measurement: Measurement, title: str) -> str:
    """The measurement as aligned plain text, with what its guarantees are worth."""
    m, seconds = measurement, measurement.seconds
    estimate = m.certified["estimate"].accuracy
    rows = [
        ("", "value", "against the estimate", "time", "a sample"),
        ("accuracy", f"{m.accuracy:.2%}", "", f"{seconds['clean']:.1f} s", ""),
        ("accuracy under attack (PGD)", f"{m.attacked_accuracy:.2%}", "", f"{seconds['attack']:.1f} s", ""),
    ]
    for name, c in m.certified.items():
        price = "" if name == "estimate" else f"{100 * (c.accuracy - estimate):+.2f} points"
        each = f"{c.seconds / c.tried:.3f} s" if c.tried else ""
        rows.append((f"certified ({name}), {m.bound} bound", f"{c.accuracy:.2%}", price, f"{c.seconds:.1f} s", each))
        rows += _by_global(c, m)
    for name, c in m.composed.items():
        price = f"{100 * (c.accuracy - estimate):+.2f} points"
        each = f"{c.seconds / c.tried:.3f} s" if c.tried else ""
        label = f"certified ({name}), {m.bound} bound, {windowed(m.window)}"
        rows.append((label, f"{c.accuracy:.2%}", price, f"{c.seconds:.1f} s", each))
        rows += _by_global(c, m)
    broken = sum(c.broken for c in (*m.certified.values(), *m.composed.values()))
    if m.bound == "local":
        everywhere = f"{m.global_certified_estimate:.2%}"
        rows += [
            ("certified (estimate), global bound", everywhere, "", f"{seconds['global bound']:.1f} s", ""),
            ("Lipschitz (estimate), local bound, mean", f"{m.lipschitz_estimate:.4g}", "", "", ""),
        ]
    rows += [
        ("Lipschitz (estimate), global bound", f"{m.global_lipschitz_estimate:.4g}", "", "", ""),
        ("certified samples the attack broke", f"{broken}", "", "", ""),
    ]
    lines = aligned(rows)
    rule = "-" * max(map(len, lines))
    notes = [textwrap.fill(text, max(len(rule), 72), subsequent_indent="  ") for text in caveats(m)]
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *notes])


def _by_global(c: Certified, m: Measurement) -> list[tuple[str, str, str, str, str]]:
    if not c.by_global or m.bound == "global":
        return []
    return [("    decided by the global bound", f"{c.by_global / m.samples:.2%}", "", "", "")]


def windowed(window: int) -> str:
    return f"up to {window} maps composed"


def environment(device: torch.device) -> dict[str, Any]:
    """Program, libraries and hardware, as far as they can change a figure."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "build": build_info(),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _commit() -> str | None:
    """The commit of the source tree this package lies in, None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(dataset: Dataset) -> str:
    """CRC-32 over images and labels, in hexadecimal: tells one copy of a data set from another."""
    labels = dataset.labels.cpu().numpy().tobytes()
    return f"{zlib.crc32(labels, zlib.crc32(dataset.images.cpu().contiguous().numpy().data)):08x}"


def subject(path: Path, config: dict[str, Any], stored: Recipe, name: str, dataset: Dataset) -> dict[str, Any]:
    """What a file is of: the checkpoint at ``path``, its recipe, and the test data called ``name``."""
    return {
        "checkpoint": {"path": str(path), "sha256": digest(path), "epoch": config["position"]["epoch"]},
        "recipe": stored.to_dict(),
        "data": {"name": name, "split": "test", "crc32": checksum(dataset)},
    }


def write_json(path: Path, measurement: Measurement, context: dict[str, Any]) -> None:
    """The measurement and all that is needed to repeat it. OSError when it cannot be stored."""
    values = {**context, "result": asdict(measurement), "caveats": caveats(measurement)}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def plot(path: Path, measurement: Measurement, title: str) -> bool:
    """Draw certified accuracy over the radius as PNG. False, and no file, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    m = measurement
    radii, local, everywhere = ([row[i] for row in m.curve_estimate] for i in range(3))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(radii, [100 * v for v in local], marker="o", label=f"{m.bound} bound (estimate)")
    if m.curve_composed:
        label = f"{m.bound} bound, {windowed(m.window)} (estimate)"
        axes.plot(radii, [100 * v for v in m.curve_composed], marker="^", label=label)
    if m.bound == "local":
        axes.plot(radii, [100 * v for v in everywhere], marker="s", label="global bound (estimate)")
    for name, c in m.certified.items():
        if name != "estimate":
            axes.plot([m.eps], [100 * c.accuracy], marker="D", linestyle="none", label=f"{m.bound} bound ({name})")
    for name, c in m.composed.items():
        if name != "estimate":
            label = f"{m.bound} bound, {windowed(m.window)} ({name})"
            axes.plot([m.eps], [100 * c.accuracy], marker="P", linestyle="none", label=label)
    axes.plot(
        [m.eps], [100 * m.attacked_accuracy], marker="x", linestyle="none", color="black", label="under attack (PGD)"
    )
    axes.axvline(m.eps, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="l2 radius", ylabel="accuracy (%)", title=title, ylim=(0, 100), xlim=(0, max(radii) or 1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")  # within, it would lie on the curves
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return True
