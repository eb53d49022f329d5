"""What a run found: ratios to ours, regressions, targets, failures; as a table for the console, and as Markdown.

A run is the JSON of pytest-benchmark. A ratio says how many times as long a baseline takes a sample for the same work:
the median over the repeats, in which the variants of a case are timed in turn, so that ratios carry over between
machines better than seconds do; eager against eager, or CUDA graph against CUDA graph. A share is the least possible
time, by the flops and bytes that the cases count and the rates that a large copy and a large matrix product reach in
the same run, divided by the measured one: the graph's where there is one.

Neither torch nor the package is needed, so that a build that failed is reported too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Run = dict[str, Any]

THRESHOLDS = Path(__file__).parent / "thresholds.json"
# A ratio that fell by more than this between two runs counts as a regression.
COMPARE_TOLERANCE = 0.15
# Slack for "norms at least as close to the converged ones": they are means over a few samples with random starts.
CLOSENESS_SLACK = 0.01


@dataclass
class Variant:
    """Milliseconds a call by repeat, eager and as a CUDA graph; samples a call; what its benchmark recorded."""

    samples: int = 0
    times: dict[int, float] = field(default_factory=dict)
    graph_times: dict[int, float] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    iterations: int | None = None
    peak_bytes: float | None = None
    right: bool | None = None
    error: str | None = None
    graph_error: str | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def clock(self, graph: bool) -> dict[int, float]:
        return self.graph_times if graph else self.times

    def device_time(self) -> float | None:
        times = self.graph_times or self.times
        return statistics.median(times.values()) if times else None


@dataclass
class Case:
    """variants: by label, the name alone or with ", forward" or ", backward"."""

    op: str
    name: str
    precision: str
    variants: dict[str, Variant] = field(default_factory=dict)
    error: str | None = None

    @property
    def title(self) -> str:
        return f"{self.op}: {self.name}" + ("" if self.precision == "float32" else f", {self.precision}")

    def own(self, label: str) -> list[str]:
        """Variants of ours that do the same work as this baseline."""
        return [] if is_ours(label) else [mine for mine in self.variants if is_ours(mine) and work(mine) == work(label)]


Cases = dict[str, Case]  # by title


def work(label: str) -> str:
    return label.partition(", ")[2] or "both"


def is_ours(label: str) -> bool:
    return label.partition(", ")[0].split("-")[0] == "ours"


def read(run: Run) -> Cases:
    cases: Cases = {}

    def case_of(entry: dict[str, Any]) -> Case:
        case = Case(entry.pop("op"), entry.pop("case"), entry.pop("precision", "float32"))
        return cases.setdefault(case.title, case)

    for benchmark in run.get("benchmarks", ()):
        info = dict(benchmark["extra_info"])
        case, kind, repeat = case_of(info), info.pop("work", "both"), info.pop("repeat")
        name = info.pop("variant")
        variant = case.variants.setdefault(name if kind == "both" else f"{name}, {kind}", Variant())
        variant.times[repeat] = 1e3 * benchmark["stats"]["median"]
        if "graph_ms" in info:
            variant.graph_times[repeat] = info.pop("graph_ms")
        for key in ("samples", "flops", "bytes", "iterations", "peak_bytes", "right", "graph_error"):
            if key in info:
                setattr(variant, key, info.pop(key))
        variant.facts |= info
    for entry in map(dict, run.get("errors", ())):
        case, label = case_of(entry), entry["variant"]
        if label:
            case.variants.setdefault(label, Variant()).error = entry["error"]
        else:
            case.error = entry["error"]
    return cases


def ratios(other: Variant, mine: Variant, graph: bool = False, mine_as_graph: bool | None = None) -> list[float]:
    """How many times as long `other` takes a sample, one number a repeat. mine_as_graph: where only one has a graph."""
    above, below = other.clock(graph), mine.clock(graph if mine_as_graph is None else mine_as_graph)
    return [above[r] / other.samples / (below[r] / mine.samples) for r in sorted(above.keys() & below.keys())]


def pairs(cases: Cases) -> Iterator[tuple[str, Variant, Variant]]:
    """Every variant of ours with every baseline of the same work, and what the pair is called."""
    for title, case in cases.items():
        for label, baseline in case.variants.items():
            for mine in case.own(label):
                yield f"{title}: {mine} vs {label}", case.variants[mine], baseline


def speedups(cases: Cases) -> dict[str, list[float]]:
    found = {key: ratios(baseline, mine) for key, mine, baseline in pairs(cases)}
    return {key: each for key, each in found.items() if each}


def share(variant: Variant, ceilings: dict[str, float], precision: str) -> tuple[float, str] | None:
    """Least possible time over measured time, and what bounds it: memory or arithmetic."""
    measured = variant.device_time()
    if measured is None or not ceilings or not (variant.flops or variant.bytes):
        return None
    floors = {
        "memory": (variant.bytes or 0) / ceilings["copy"],
        "arithmetic": (variant.flops or 0) / ceilings[precision],
    }
    bound = max(floors, key=lambda name: floors[name])
    return 1e3 * floors[bound] / measured, bound


# ---- what is asked of a run ----


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


def targets(cases: Cases, ceilings: dict[str, float]) -> list[Target]:
    """Of a GPU's run."""
    found: list[Target] = []

    def variant(title: str, label: str) -> Variant:
        return cases[title].variants.get(label, Variant()) if title in cases else Variant()

    def ratio(
        title: str, other: str, mine: str, graph: bool = False, mine_as_graph: bool | None = None
    ) -> float | None:
        each = ratios(variant(title, other), variant(title, mine), graph, mine_as_graph)
        return statistics.median(each) if each else None

    for kind in ("relu", "clipped-relu", "clipped-maxmin"):
        for direction in ("forward", "backward"):
            own = variant(f"activation_pattern: {kind} 32x32x32", f"ours, {direction}")
            part = share(own, ceilings, "float32")
            title = f"activation pattern, {kind}, {direction}: share of the copy's bandwidth"
            found.append(Target(title, 0.8, part[0] if part else None, percent=True))
    for precision, suffix in (("float32", ""), ("tf32", ", tf32")):
        case = ("masked_norm: conv 3x3 32x32x32 density 0.5" + suffix, "streaming, forward", "ours, forward")
        value = ratio(*case, graph=True) or ratio(*case)
        found.append(Target(f"convolution 32x32x32 3x3, {precision}: resident against streaming", 3, value))
    for graph in (False, True):
        how = "CUDA graphs" if graph else "eager"
        value = ratio("masked_norm: dense 512x512 density 0.1", "paper compiled", "ours", graph)
        found.append(Target(f"dense norm 512x512, density 0.1, {how}: against torch.compile", 3, value))
    for classes, width in ((10, 512), (200, 256)):
        value = ratio(f"margin: K={classes} h={width}", "paper", "ours")
        found.append(Target(f"margin K={classes}: against the plain loop", 10, value))
    for precision, suffix in (("float32", ""), ("tf32", ", tf32")):
        case_title = "training_step: cifar10-6c2f" + suffix
        for graph in (False, True):
            title = f"cifar10-6c2f step, {precision}, {'CUDA graph' if graph else 'eager'}"
            value = ratio(case_title, "paper", "ours", mine_as_graph=graph)  # the paper's has no graph
            found.append(Target(f"{title}: against the paper's method", 8, value))
            value = ratio(case_title, "ours", "plain", graph)
            found.append(Target(f"{title}: of the plain step's time", 6, value, at_most=True))
    return found


def failures(cases: Cases) -> list[str]:
    """What failed or gave a wrong result. A torch.compile baseline may fail: it needs a compiler on the machine."""
    found = []
    for title, case in cases.items():
        if case.error:
            found.append(f"{title}: {case.error}")
        for label, variant in case.variants.items():
            if "compiled" not in label:
                found += [f"{title}: {label}: {why}" for why in (variant.error, variant.graph_error) if why]
            if variant.right is False:
                found.append(f"{title}: {label}: wrong result, {variant.facts}")
    return found


def regressions(cases: Cases, device: str) -> list[str]:
    """What of thresholds.json does not hold, for the cases that ran."""
    limits = json.loads(THRESHOLDS.read_text())["cpu" if device == "cpu" else "cuda"]
    measured = speedups(cases)
    found = [
        f"{key}: {statistics.median(measured[key]):.2f} times as fast, want {least}"
        for key, least in limits["speed"].items()
        if key in measured and statistics.median(measured[key]) < least
    ]
    for key, least in limits["closeness"].items():
        title, _, label = key.rpartition(": ")
        own = cases[title].variants.get(label) if title in cases else None
        value = math.nan if own is None else own.facts.get("closeness_mean", math.nan)
        if value < least:
            found.append(f"{key}: closeness_mean {value:.4f}, want {least}")
    for key, mine, baseline in pairs(cases):
        most = limits["memory"].get(key)
        if most is not None and mine.peak_bytes and baseline.peak_bytes:
            part = mine.peak_bytes / baseline.peak_bytes
            if part > most:
                found.append(f"{key}: peak memory {part:.2f} of the baseline's, want at most {most}")
        both = mine.facts.keys() & baseline.facts.keys()
        for fact in {"closeness_mean", "lipschitz_closeness"} & both if " vs paper" in key else set():
            ours, theirs = mine.facts[fact], baseline.facts[fact]
            if ours < theirs - CLOSENESS_SLACK:
                found.append(f"{key}: {fact} {ours:.4f}, less than the baseline's {theirs:.4f}")
    return found


# ---- for the console ----


def describe(run: Run) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    toys = "; toy sizes" if machine.get("tiny") else ""
    return (
        f"{run['datetime'][:19]}  commit {str(commit.get('id'))[:12]}{changed}\n"
        f"{processor(machine)}, {machine['torch_threads']} threads; device {machine['device']}; "
        f"torch {machine['torch']}{toys}\n{machine['command']}"
    )


def processor(machine: dict[str, Any]) -> str:
    name: str = machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or "unknown CPU"
    return name


def shown_facts(variant: Variant) -> list[str]:
    """Quality, and what went wrong."""
    notes = [
        f"{fact} {value:.4f}" if abs(value) > 1e-3 or not value else f"{fact} {value:.0e}"
        for fact, value in sorted(variant.facts.items())
    ]
    notes = ["WRONG"] * (variant.right is False) + notes
    notes += [variant.error] if variant.error else []
    return notes + ([f"no graph: {variant.graph_error}"] if variant.graph_error else [])


def table(cases: Cases) -> str:
    head = f"{'':24} {'ms/call':>10} {'graph':>10} {'samples':>7}"
    lines = [f"{head}  times as long as ours (range over the repeats; as graphs), quality"]

    def shown(times: dict[int, float]) -> str:
        value = statistics.median(times.values()) if times else None
        return "" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.4f}"

    for title, case in cases.items():
        lines.append(title + (f": {case.error}" if case.error else ""))
        for label, variant in case.variants.items():
            notes = []
            for mine in case.own(label):
                each, graphs = (ratios(variant, case.variants[mine], graph) for graph in (False, True))
                if each:
                    as_graphs = f"; {statistics.median(graphs):.2f}" if graphs else ""
                    spread = f"({min(each):.2f} to {max(each):.2f}{as_graphs})"
                    notes.append(f"{statistics.median(each):.2f}x {mine} {spread}")
            notes += shown_facts(variant)
            if variant.peak_bytes is not None:
                notes.append(f"peak {variant.peak_bytes / 2**20:.0f} MiB")
            times = f"{shown(variant.times):>10} {shown(variant.graph_times):>10}"
            lines.append(f"    {label:20} {times} {variant.samples:7d}  {', '.join(notes)}".rstrip())
    return "\n".join(lines)


def show(path: Path) -> int:
    """Print a run and what is wrong with it; 1 if anything is."""
    run = json.loads(path.read_text())
    cases = read(run)
    print(f"{describe(run)}\n\n{table(cases)}\n")
    machine, failed = run["machine_info"], failures(cases)
    worse = [] if machine.get("tiny") else regressions(cases, machine["device"])
    for line in failed:
        print(f"FAILED {line}")
    for line in worse:
        print(f"REGRESSION {line}")
    found = f"{len(worse)} regressions" if worse else "no regression"
    print(f"{path}: {f'{len(failed)} failures, ' if failed else ''}{found} against {THRESHOLDS.name}")
    return 1 if worse or failed else 0


def compare(old: Run, new: Run) -> int:
    before, after = speedups(read(old)), speedups(read(new))
    print(f"old: {describe(old)}\nnew: {describe(new)}\n\n{'':64} {'old':>7} {'new':>7} {'change':>7}")
    worse = 0
    for key in [k for k in before if k in after]:
        first, second = statistics.median(before[key]), statistics.median(after[key])
        change = second / first - 1
        worse += change < -COMPARE_TOLERANCE
        mark = "  REGRESSION" if change < -COMPARE_TOLERANCE else ""
        print(f"{key:64} {first:6.2f}x {second:6.2f}x {change:+7.0%}{mark}")
    for key in sorted(before.keys() ^ after.keys()):
        print(f"{key:64} only in the {'old' if key in before else 'new'} run")
    return 1 if worse else 0


# ---- as Markdown ----


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


HEAD = [
    "variant",
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


def case_rows(case: Case, ceilings: dict[str, float]) -> Iterator[list[str]]:
    def shown(times: dict[int, float]) -> str:
        if not times:
            return ""
        return f"{statistics.median(times.values()):.4g} ({min(times.values()):.4g} to {max(times.values()):.4g})"

    for label, variant in case.variants.items():
        measured, part = variant.device_time(), share(variant, ceilings, case.precision)
        against = [
            " / ".join(f"{statistics.median(e):.2f}" if e else "-" for e in each)
            for mine in case.own(label)
            if any(each := [ratios(variant, case.variants[mine], graph) for graph in (False, True)])
        ]
        yield [
            label,
            shown(variant.times),
            shown(variant.graph_times),
            f"{measured / variant.iterations:.4g}" if measured and variant.iterations else "",
            f"{variant.flops / measured / 1e9:.4g}" if measured and variant.flops else "",
            f"{variant.bytes / measured / 1e6:.4g}" if measured and variant.bytes else "",
            f"{100 * part[0]:.0f} % ({part[1]})" if part else "",
            ", ".join(against),
            f"{variant.peak_bytes / 2**20:.0f}" if variant.peak_bytes is not None else "",
            ", ".join(shown_facts(variant)).replace("_", " ").replace("|", "/").replace("\n", " "),
        ]


def on_gpu(run: Run) -> bool:
    return bool(run) and run["machine_info"]["device"] != "cpu"


def head_of(run: Run, stages: list[dict[str, str]]) -> list[str]:
    """Stages, targets and failures."""
    lines: list[str] = []
    if stages:
        rows = [[s["stage"], s["result"], s["seconds"], s["note"]] for s in stages]
        lines += ["## Stages", "", *markdown_table(["stage", "result", "seconds", "note"], rows), ""]
    if not run:
        return [*lines, "No benchmarks were written.", ""]
    cases = read(run)
    if on_gpu(run):
        every = targets(cases, run["ceilings"])
        lines += ["## Targets", "", *markdown_table(["target", "wanted", "measured", ""], [t.row() for t in every])]
        lines += ["", f"{sum(t.verdict == 'met' for t in every)} of {len(every)} met.", ""]
    failed = failures(cases)
    if failed:
        lines += ["## Failures", "", *(f"- {line}" for line in failed), ""]
    return lines


def body_of(run: Run) -> list[str]:
    ceilings = run.get("ceilings", {})
    lines = ["## Ceilings of this run", ""]
    for name, rate in ceilings.items():
        unit = f"{rate / 1e9:.4g} GB/s, bytes read and written" if name == "copy" else f"{rate / 1e12:.4g} TFLOP/s"
        lines.append(f"- {name if name == 'copy' else f'matrix product, {name}'}: {unit}")
    lines += [
        "",
        "Medians (range over the repeats). TFLOP/s, GB/s, share and ms an iteration by the graph's time where there is "
        "one. What is counted stands in the head of each op's file in bench/, how it is timed in bench/clock.py.",
        "",
    ]
    cases = read(run).values()
    for op in dict.fromkeys(case.op for case in cases):
        lines += [f"## {op}", ""]
        for case in cases:
            if case.op == op:
                lines += [f"### {case.title.partition(': ')[2]}", ""]
                lines += [case.error] if case.error else markdown_table(HEAD, list(case_rows(case, ceilings)))
                lines += [""]
    return lines


def environment_of(run: Run) -> list[str]:
    if not run:
        return ["# Benchmarks", ""]
    machine, commit = run["machine_info"], run["commit_info"]
    lines = [f"# Benchmarks, {run['datetime'][:16].replace('T', ' ')} UTC", ""]
    if on_gpu(run):
        lines += [f"- GPU: {machine['device']}, compute capability {machine['capability']}"]
        lines += [f"- driver: {machine['driver']}"]
    lines += [f"- CPU: {processor(machine)}, {machine['torch_threads']} threads"]
    lines += [f"- torch {machine['torch']}, CUDA {machine['cuda']}, nvcc {machine['nvcc']}, Python {machine['python']}"]
    lines += [f"- commit: {commit['id']}{' with uncommitted changes' if commit.get('dirty') else ''}"]
    return [*lines, f"- command: `{machine['command']}`", *["- toy sizes"] * machine["tiny"], ""]


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


def summarise(out: Path, path: Path | None, stages_path: Path | None) -> None:
    """Write OUT/summary.md and OUT/summary.json, and print what passed and which targets were met. path: of the run,
    which need not be there."""
    stages = read_stages(stages_path)
    run: Run = json.loads(path.read_text()) if path and path.exists() else {}
    head = head_of(run, stages)
    out.mkdir(parents=True, exist_ok=True)
    lines = [*environment_of(run), *head, *(body_of(run) if run else [])]
    (out / "summary.md").write_text("\n".join(lines))
    every = targets(read(run), run["ceilings"]) if on_gpu(run) else []
    met = [{"target": t.title, "wanted": t.wanted, "measured": t.value, "verdict": t.verdict} for t in every]
    values = without_nan({"stages": stages, "targets": met, **run})
    (out / "summary.json").write_text(json.dumps(values, indent=1) + "\n")
    print("\n".join(head))
