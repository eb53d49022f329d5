"""How a comparison is shown and kept: a table, JSON with the commands that repeat each row, and a plot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .checkpoint import write_atomically
from .comparison import ROWS, Run, best
from .report import aligned

COLUMNS = (
    "trained with",
    "accuracy",
    "under attack",
    "certified",
    "by seed",
    "global product",
    "Lipschitz",
    "ms a step",
    "training",
    "memory",
)


def collected(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What the finished runs gave, by row: about, and of each seed its figures and commands."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        config, values = run.trained(), run.certified()
        if config is None or values is None:
            continue
        result = values["result"]
        steps = config["recipe"]["epochs"] * (config["samples"] // config["recipe"]["batch_size"])
        row = rows.setdefault(run.row, {"about": ROWS[run.row].about, "seeds": {}})
        row["seeds"][str(run.seed)] = {
            "commands": [shlex.join(["locallip", *command]) for command in (run.train, run.certify)],
            "accuracy": result["accuracy"],
            "attacked_accuracy": result["attacked_accuracy"],
            "certified": best(result)["accuracy"],
            "global_certified_estimate": result["global_certified_estimate"],
            "lipschitz_estimate": fmean(map(_lipschitz, result["per_sample"])),
            "seconds": config["seconds"],
            "seconds_a_step": config["seconds"] / steps,
            "memory": config["memory"],
            "curve_estimate": _curve(result),
            "history": config["history"],
            "environment": values["environment"],
            "data": values["data"],
        }
    return rows


def _lipschitz(sample: Mapping[str, Any]) -> float:
    """The smallest estimate of a sample's constant: its composed one, where norms are composed for it."""
    ways = [sample[how].get("estimate") for how in ("guarantees", "composed") if how in sample]
    return float(min(found["lipschitz"] for found in ways if found is not None))


def _curve(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Certified accuracy over the radius, by all bounds together."""
    radii, product = ([row[i] for row in result["curve_estimate"]] for i in range(2))
    return list(zip(radii, result["curve_composed"] or product, strict=True))


def table(rows: Mapping[str, Mapping[str, Any]], title: str, guarantee: str) -> str:
    """Means over the seeds, as aligned plain text, and what the columns are."""
    text = aligned([COLUMNS, *(_line(name, row) for name, row in rows.items())])
    rule = "-" * len(text[0])
    about = [f"{name}: {row['about']}" for name, row in rows.items()]
    notes = [
        f"Means over the seeds. certified: under guarantee {guarantee}, by the bound that the row is trained against.",
        "global product: certified by that. That and Lipschitz, the mean constant of the row's bound, are estimates.",
        "memory: peak of the training, of the process on a CPU and of tensors on a GPU.",
    ]
    return "\n".join([title, rule, text[0], rule, *text[1:], rule, *about, *notes])


def _line(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    seeds = list(row["seeds"].values())

    def mean(key: str) -> float:
        return fmean(seed[key] for seed in seeds)

    return (
        name,
        f"{100 * mean('accuracy'):.2f} %",
        f"{100 * mean('attacked_accuracy'):.2f} %",
        f"{100 * mean('certified'):.2f} %",
        ", ".join(f"{100 * seed['certified']:.1f}" for seed in seeds),
        f"{100 * mean('global_certified_estimate'):.2f} %",
        f"{mean('lipschitz_estimate'):.3g}",
        f"{1000 * mean('seconds_a_step'):.1f}",
        f"{mean('seconds'):.0f} s",
        f"{mean('memory') / 2**20:.0f} MiB",
    )


def write(out: Path, rows: Mapping[str, Mapping[str, Any]], text: str, context: Mapping[str, Any]) -> None:
    """compare.json and compare.md. OSError when they cannot be stored."""
    write_atomically(out / "compare.json", (json.dumps({**context, "rows": rows}, indent=2) + "\n").encode())
    commands = [line for row in rows.values() for seed in row["seeds"].values() for line in seed["commands"]]
    page = ["```", text, "```", "", "Each row again:", "", *(f"    {line}" for line in commands)]
    write_atomically(out / "compare.md", ("\n".join(page) + "\n").encode())


def plot(path: Path, rows: Mapping[str, Mapping[str, Any]], title: str, eps: float) -> bool:
    """Certified accuracy over the radius, and both accuracies over the time of training, as PNG; means over the seeds.

    False, and no file, where matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    over_radius, over_time = figure.subplots(1, 2)
    colours = [colormaps["tab20"](k) for k in (*range(0, 20, 2), *range(1, 20, 2))]
    for i, (name, row) in enumerate(rows.items()):
        seeds, style = list(row["seeds"].values()), {"color": colours[i % 20], "marker": "os^vDPX<>*h"[i % 11], "ms": 4}
        curves = [seed["curve_estimate"] for seed in seeds]
        certified = [100 * fmean(point[1] for point in points) for points in zip(*curves, strict=True)]
        over_radius.plot([radius for radius, _ in curves[0]], certified, label=name, **style)
        looks = [[record for record in seed["history"] if "test_accuracy" in record] for seed in seeds]
        points = list(zip(*looks, strict=True))
        seconds = [fmean(record["seconds"] for record in point) for point in points]
        for key, line in (("test_certified_estimate", "-"), ("test_accuracy", ":")):
            over_time.plot(seconds, [100 * fmean(r[key] for r in point) for point in points], line, **style)
    over_radius.axvline(eps, color="grey", linewidth=0.8, linestyle=":")
    over_radius.set(xlabel="l2 radius", ylabel="certified accuracy (estimate, %)", ylim=(0, 100), xlim=(0, None))
    over_radius.legend()
    over_time.set(
        xlabel="seconds of training",
        ylabel=f"test accuracy (dotted), certified at {eps:.3g} (estimate, %)",
        ylim=(0, 100),
        xlim=(0, None),
    )
    for axes in (over_radius, over_time):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return True
