"""What a run of bench/gpu_check.sh found, as Markdown and as one JSON.

    python -m bench.gpu_report OUT --stages STAGES.tsv --benchmarks BENCHMARKS.json

writes OUT/summary.json and OUT/summary.md, and prints the part that says what passed and which targets were met.

A ratio says how many times as long the other variant takes a sample for the same work: eager against eager, or CUDA
graph against CUDA graph. A share is the least possible time, by the counts and ceilings of `bench.gpu`, divided by the
measured one: the graph's where there is one. Neither torch nor the package is needed, so that a build that failed is
reported too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Variant = dict[str, Any]
Run = dict[str, Any]

NOT_IN_THE_TABLE = ("lipschitz_mean",)


@dataclass(frozen=True)
class Target:
    """value: None where it was not measured."""

    title: str
    wanted: float
    value: float | None
    at_most: bool = False
    percent: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value <= self.wanted if self.at_most else self.value >= self.wanted) else "MISSED"

    def row(self) -> list[str]:
        def shown(value: float) -> str:
            return f"{100 * value:.0f} %" if self.percent else f"{value:.2f} times"

        sign = "at most" if self.at_most else "at least"
        value = "" if self.value is None else shown(self.value)
        return [self.title, f"{sign} {shown(self.wanted)}", value, self.verdict]


def find(run: Run, op: str, case: str, precision: str, work: str, name: str) -> Variant | None:
    for entry in run["cases"]:
        if (entry["op"], entry["case"], entry["precision"]) == (op, case, precision):
            for variant in entry["variants"]:
                if (variant["work"], variant["name"]) == (work, name):
                    return variant
    return None


def milliseconds(variant: Variant | None, graph: bool) -> float | None:
    measured = (variant or {}).get("graph_ms" if graph else "ms")
    return measured["median"] if measured else None


def device_time(variant: Variant) -> float | None:
    """Milliseconds, of the graph where there is one."""
    graph = milliseconds(variant, True)
    return milliseconds(variant, False) if graph is None else graph


def ratio(numerator: Variant | None, denominator: Variant | None, graph: bool) -> float | None:
    """How many times as long the numerator takes a sample."""
    above, below = milliseconds(numerator, graph), milliseconds(denominator, graph)
    if above is None or below is None or numerator is None or denominator is None:
        return None
    return above / numerator["samples"] / (below / denominator["samples"])


def share(variant: Variant, ceilings: dict[str, float], precision: str) -> tuple[float, str] | None:
    """Least possible time over measured time, and what bounds it: memory or arithmetic."""
    measured = device_time(variant)
    if measured is None or not ceilings or not (variant["flops"] or variant["bytes"]):
        return None
    floors = {
        "memory": (variant["bytes"] or 0) / ceilings["copy"],
        "arithmetic": (variant["flops"] or 0) / ceilings[precision],
    }
    bound = max(floors, key=lambda name: floors[name])
    return 1e3 * floors[bound] / measured, bound


def targets(run: Run) -> list[Target]:
    found = []
    ceilings = run.get("ceilings", {})
    names = ("relu", "clipped-relu", "clipped-maxmin")
    for kind in names:
        for work in ("forward", "backward"):
            variant = find(run, "activation_pattern", f"{kind} 32x32x32", "float32", work, "ours")
            part = share(variant, ceilings, "float32") if variant else None
            title = f"activation pattern, {kind}, {work}: share of the copy's bandwidth"
            found.append(Target(title, 0.8, part[0] if part else None, percent=True))
    for precision in ("float32", "tf32"):
        case = ("masked_norm", "conv 3x3 32 to 32 on 32x32 density 0.5", precision, "forward")
        ours, streaming = find(run, *case, "ours"), find(run, *case, "streaming")
        value = ratio(streaming, ours, graph=True) or ratio(streaming, ours, graph=False)
        found.append(Target(f"convolution 32x32x32 3x3, {precision}: resident against streaming", 3, value))
    for graph in (False, True):
        case = ("masked_norm", "dense 512x512 density 0.1", "float32", "both")
        value = ratio(find(run, *case, "paper compiled"), find(run, *case, "ours"), graph)
        how = "CUDA graphs" if graph else "eager"
        found.append(Target(f"dense norm 512x512, density 0.1, {how}: against torch.compile", 3, value))
    for classes in (10, 200):
        case = ("margin", f"K={classes} h=512", "float32", "both")
        value = ratio(find(run, *case, "paper"), find(run, *case, "ours"), graph=False)
        found.append(Target(f"margin K={classes}: against the plain loop", 10, value))
    for precision in ("float32", "tf32"):
        case = ("training_step", "cifar10-6c2f", precision, "both")
        ours, paper, plain = (find(run, *case, name) for name in ("ours", "paper", "plain"))
        for graph in (False, True):
            title = f"cifar10-6c2f step, {precision}, {'CUDA graph' if graph else 'eager'}"
            own, other = milliseconds(ours, graph), milliseconds(paper, False)  # the paper's has no graph
            against = None if own is None or other is None else other / own
            found.append(Target(f"{title}: against the paper's method", 8, against))
            found.append(Target(f"{title}: of the plain step's time", 6, ratio(ours, plain, graph), at_most=True))
    return found


def wrong(run: dict[str, Any]) -> list[str]:
    """What of ours failed or gave a wrong result. Baselines may fail: torch.compile needs a compiler, for one."""
    found = []
    for case in run["cases"]:
        title = f"{case['op']}: {case['case']} ({case['precision']})"
        if "error" in case:
            found.append(f"{title}: {case['error']}")
        for variant in case["variants"]:
            if variant["name"] in ("ours", "streaming"):
                for key in ("error", "graph_error"):
                    if key in variant:
                        found.append(f"{title}: {variant['name']}, {variant['work']}: {variant[key]}")
                if variant.get("right") is False:
                    found.append(f"{title}: {variant['name']}, {variant['work']}: wrong result, {variant['facts']}")
    return found


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def shown_time(measured: dict[str, float] | None) -> str:
    return f"{measured['median']:.4g} ({measured['low']:.4g} to {measured['high']:.4g})" if measured else ""


def shown_facts(variant: Variant) -> str:
    if "error" in variant:
        return variant["error"].replace("|", "/").replace("\n", " ")
    facts = {k: v for k, v in variant.get("facts", {}).items() if k not in NOT_IN_THE_TABLE}
    notes = [
        f"{k.replace('_', ' ')} {v:.4f}" if abs(v) > 1e-3 else f"{k.replace('_', ' ')} {v:.0e}"
        for k, v in facts.items()
    ]
    if variant.get("right") is False:
        notes.insert(0, "WRONG")
    if "graph_error" in variant:
        notes.append("no graph: " + variant["graph_error"].replace("|", "/").replace("\n", " "))
    return ", ".join(notes)


def case_rows(entry: dict[str, Any], ceilings: dict[str, float]) -> Iterator[list[str]]:
    mine = {v["work"]: v for v in entry["variants"] if v["name"] == "ours"}
    for variant in entry["variants"]:
        measured = device_time(variant)
        rate = [""] * 2
        if measured:
            rate = [
                f"{variant[key] / measured / 1e9 if key == 'flops' else variant[key] / measured / 1e6:.4g}"
                if variant[key]
                else ""
                for key in ("flops", "bytes")
            ]
        part = share(variant, ceilings, entry["precision"])
        own = mine.get(variant["work"])
        against = [ratio(variant, own, graph) if own is not variant else None for graph in (False, True)]
        yield [
            f"{variant['name']}, {variant['work']}",
            shown_time(variant.get("ms")),
            shown_time(variant.get("graph_ms")),
            f"{measured / variant['iterations']:.4g}" if measured and "iterations" in variant else "",
            *rate,
            f"{100 * part[0]:.0f} % ({part[1]})" if part else "",
            " / ".join("-" if value is None else f"{value:.2f}" for value in against) if any(against) else "",
            f"{variant['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in variant else "",
            shown_facts(variant),
        ]


HEAD = [
    "variant, work",
    "ms",
    "ms as a graph",
    "ms an iteration",
    "TFLOP/s",
    "GB/s",
    "share (bound by)",
    "times ours / graphs",
    "peak MiB",
    "result",
]


def head_of(run: Run, stages: list[dict[str, str]]) -> list[str]:
    """Stages, targets and failures."""
    lines: list[str] = []
    if stages:
        lines += ["## Stages", ""]
        lines += markdown_table(
            ["stage", "result", "seconds", "note"],
            [[s["stage"], s["result"], s["seconds"], s["note"]] for s in stages],
        )
        lines += [""]
    if not run:
        return [*lines, "No benchmarks were written.", ""]
    every = targets(run)
    lines += ["## Targets", ""]
    lines += markdown_table(["target", "wanted", "measured", ""], [t.row() for t in every])
    met = sum(t.verdict == "met" for t in every)
    lines += ["", f"{met} of {len(every)} met.", ""]
    failed = wrong(run)
    if failed:
        lines += ["## Failures", "", *(f"- {line}" for line in failed), ""]
    return lines


def body_of(run: Run) -> list[str]:
    if not run:
        return []
    lines = ["## Ceilings of this run", ""]
    ceilings = run.get("ceilings", {})
    for name, rate in ceilings.items():
        unit = f"{rate / 1e9:.4g} GB/s, bytes read and written" if name == "copy" else f"{rate / 1e12:.4g} TFLOP/s"
        lines.append(f"- {name if name == 'copy' else f'matrix product, {name}'}: {unit}")
    lines += [
        "",
        f"Batch {run['environment']['batch']}. Medians (range over the rounds). TFLOP/s, GB/s, share and ms an "
        "iteration by the graph's time where there is one. What is counted, and how it is timed: bench/gpu.py.",
        "",
    ]
    for op in dict.fromkeys(entry["op"] for entry in run["cases"]):
        lines += [f"## {op}", ""]
        for entry in run["cases"]:
            if entry["op"] != op:
                continue
            lines += [f"### {entry['case']}, {entry['precision']}", ""]
            rows = list(case_rows(entry, ceilings))
            lines += [entry["error"]] if "error" in entry else markdown_table(HEAD, rows)
            lines += [""]
    return lines


def environment_of(run: Run) -> list[str]:
    if not run:
        return ["# GPU check", ""]
    e = run["environment"]
    lines = [f"# GPU check, {e['date']}", ""]
    lines += [f"- GPU: {e['gpu']}" + (f", compute capability {e['capability']}" if "capability" in e else "")]
    if "driver" in e:
        lines += [f"- driver: {e['driver']}"]
    lines += [f"- torch {e['torch']}, CUDA {e['cuda']}, nvcc {e['nvcc']}, Python {e['python']}"]
    return [*lines, f"- commit: {e['commit']}", f"- command: `{e['command']}`", ""]


def read_stages(path: Path | None) -> list[dict[str, str]]:
    """Lines of stage, result, seconds and note, separated by tabs."""
    if path is None or not path.exists():
        return []
    keys = ("stage", "result", "seconds", "note")
    return [dict(zip(keys, line.split("\t"), strict=True)) for line in path.read_text().splitlines()]


def without_nan(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for summary.json and summary.md")
    parser.add_argument("--stages", type=Path, metavar="FILE")
    parser.add_argument("--benchmarks", type=Path, metavar="FILE", help="what bench.gpu wrote")
    options = parser.parse_args(arguments)
    stages = read_stages(options.stages)
    written = options.benchmarks and options.benchmarks.exists()
    run: Run = json.loads(options.benchmarks.read_text()) if written else {}
    head = head_of(run, stages)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.md").write_text("\n".join([*environment_of(run), *head, *body_of(run)]))
    met = (
        [{"target": t.title, "wanted": t.wanted, "measured": t.value, "verdict": t.verdict} for t in targets(run)]
        if run
        else []
    )
    values = without_nan({"stages": stages, "targets": met, **run})
    (options.out / "summary.json").write_text(json.dumps(values, indent=1) + "\n")
    print("\n".join(head))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
