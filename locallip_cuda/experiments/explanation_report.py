"""How an explanation is shown and kept: a table for the terminal, JSON to repeat it, its figures as one plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .explanation import Explanation, Layer, Spread, Thresholds
from .report import aligned, windowed

CAVEAT = (
    "estimate: no proof. Norms come from an iteration that approaches the true ones from below, and its arithmetic is "
    "rounded."
)


def table(explanation: Explanation, title: str) -> str:
    """The explanation as aligned plain text."""
    e = explanation
    names = ("layer", "rows", "inputs", "columns", "local norm", "5 to 95 %", "global", "ratio", "ball", "both", "box")
    blocks: list[list[Sequence[str]]] = [
        [
            names,
            *(
                (
                    _name(layer),
                    *(f"{share:.1%}" for share in (layer.rows, layer.inputs, layer.columns)),
                    *_shown(layer.local_norm),
                    f"{layer.global_norm:.4g}",
                    f"{layer.ratio:.3f}",
                    *(f"{share:.1%}" for share in (layer.by_ball, layer.by_both, layer.by_box)),
                )
                for layer in e.layers
            ),
        ],
        [
            ("threshold", "initial", "learnt", "5 to 95 %"),
            *((_name(each), f"{each.initial.mean:.4g}", *_shown(each.learnt)) for each in e.thresholds),
        ],
        [
            ("Lipschitz constant", "", "5 to 95 %"),
            ("local", *_shown(e.lipschitz_product)),
            *([(f"local, {windowed(e.window)}", *_shown(e.lipschitz_composed))] if e.lipschitz_composed else []),
            ("global", f"{e.lipschitz_global:.4g}", ""),
        ],
        [
            ("decided by", "samples", "certified"),
            *((name, f"{own.samples}", f"{own.certified}") for name, own in e.decided.items()),
        ],
    ]
    shown = [aligned(block) for block in blocks if len(block) > 1]
    rule = "-" * max(len(line) for block in shown for line in block)
    lines = [title, rule]
    for block in shown:
        lines += [*block, rule]
    return "\n".join([*lines, textwrap.fill(CAVEAT, max(len(rule), 72), subsequent_indent="  ")])


def _name(of: Layer | Thresholds) -> str:
    name = f"{of.module} {of.path}".rstrip()
    return f"{name}, {of.name}" if isinstance(of, Thresholds) and of.name != "threshold" else name


def _shown(spread: Spread) -> tuple[str, str]:
    return f"{spread.mean:.4g}", f"{spread.low:.4g} to {spread.high:.4g}"


def write_json(path: Path, explanation: Explanation, context: dict[str, Any]) -> None:
    """The explanation and all that is needed to repeat it. OSError when it cannot be stored."""
    values = {**context, "result": asdict(explanation), "caveats": [CAVEAT]}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def plot(path: Path, explanation: Explanation, title: str) -> bool:
    """Draw the explanation as PNG. False, and no file, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = [_shares, _norms, _intervals, _lipschitz]
    panels += [_thresholds] if explanation.thresholds else []
    panels += [_decided] if explanation.window > 1 else []
    entries = max(len(explanation.layers), len(explanation.thresholds))
    figure = Figure(figsize=(16, 2 * max(3.8, 1.8 + 0.3 * entries)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(2, 3).flat, strict=False):
        panel(axes, explanation)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.suptitle(f"{title} (estimate)")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return True


def _rows(axes: Any, names: Sequence[str]) -> range:
    """Where horizontal bars of the names lie, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    return range(len(names))


def _of_layers(axes: Any, e: Explanation) -> range:
    return _rows(axes, [_name(layer) for layer in e.layers])


def _titled(axes: Any, title: str) -> None:
    """With the legend between title and axes, where it hides nothing."""
    axes.set_title(title, pad=26)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _shares(axes: Any, e: Explanation) -> None:
    at = _of_layers(axes, e)
    axes.barh([y - 0.2 for y in at], [100 * layer.rows for layer in e.layers], 0.4, label="rows")
    axes.barh([y + 0.2 for y in at], [100 * layer.columns for layer in e.layers], 0.4, label="columns of the next map")
    axes.set(xlabel="varying (%), mean over samples", xlim=(0, 100))
    _titled(axes, "What masks leave (estimate)")


def _norms(axes: Any, e: Explanation) -> None:
    at = _of_layers(axes, e)
    local = [layer.local_norm for layer in e.layers]
    spread = [[max(own.mean - own.low, 0) for own in local], [max(own.high - own.mean, 0) for own in local]]
    axes.barh([y - 0.2 for y in at], [own.mean for own in local], 0.4, xerr=spread, capsize=3, label="local, 5 to 95 %")
    whole = axes.barh(
        [y + 0.2 for y in at], [layer.global_norm for layer in e.layers], 0.4, color="0.7", label="global"
    )
    axes.bar_label(whole, [f"ratio {layer.ratio:.2f}" for layer in e.layers], padding=3)
    axes.margins(x=0.45)  # for the ratios
    axes.set(xlabel="operator norm, mean over samples")
    _titled(axes, "Local and global norms (estimate)")


def _intervals(axes: Any, e: Explanation) -> None:
    at, left = _of_layers(axes, e), [0.0] * len(e.layers)
    for name, label in (("by_ball", "both by the ball"), ("by_both", "one by each"), ("by_box", "both by the box")):
        own = [100 * getattr(layer, name) for layer in e.layers]
        axes.barh(at, own, 0.6, left=left, label=label)
        left = [a + b for a, b in zip(left, own, strict=True)]
    axes.set(xlabel="pre-activations (%), mean over samples", xlim=(0, 100))
    _titled(axes, "What gives the ends of intervals (estimate)")


def _lipschitz(axes: Any, e: Explanation) -> None:
    counts, local = e.lipschitz_histogram, e.lipschitz_product
    axes.stairs(counts.product, counts.edges, fill=True, alpha=0.5, label=f"product, mean {local.mean:.4g}")
    if e.lipschitz_composed is not None:
        label = f"{windowed(e.window)}, {e.lipschitz_composed.mean:.4g}"
        axes.stairs(counts.composed, counts.edges, fill=True, alpha=0.5, label=label)
    axes.axvline(e.lipschitz_global, color="black", linestyle="--", label=f"global, {e.lipschitz_global:.4g}")
    axes.set(xlabel="Lipschitz constant of all layers but the last", ylabel="samples")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    _titled(axes, "Local Lipschitz constants (estimate)")


def _thresholds(axes: Any, e: Explanation) -> None:
    at = _rows(axes, [_name(each) for each in e.thresholds])
    learnt = [each.learnt for each in e.thresholds]
    axes.hlines(
        at, [own.low for own in learnt], [own.high for own in learnt], linewidth=6, alpha=0.4, label="5 to 95 %"
    )
    axes.plot([own.mean for own in learnt], at, "o", color="C0", label="learnt, mean over units")
    axes.plot([each.initial.mean for each in e.thresholds], at, "x", color="black", label="initial")
    axes.set(xlabel="threshold")
    _titled(axes, "Thresholds")


def _decided(axes: Any, e: Explanation) -> None:
    at = _rows(axes, list(e.decided))
    axes.barh(at, [own.samples for own in e.decided.values()], 0.6, color="C0", alpha=0.4, label="samples")
    axes.barh(at, [own.certified for own in e.decided.values()], 0.6, color="C0", label="of them certified")
    axes.set(xlabel="samples")
    _titled(axes, "What gives the margin (estimate)")
