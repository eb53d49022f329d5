"""Run the benchmarks, print how many times faster ours is than each baseline, and fail where a ratio has regressed.

    python -m bench                         run all, keep the JSON in bench/results, check bench/thresholds.json
    python -m bench -k training_step        run a part
    python -m bench --read RUN.json         print and check an earlier run
    python -m bench --compare OLD.json NEW.json   ratios of two runs (of two commits, say) side by side
    python -m bench certificate --checkpoint RUN --data DATA_ROOT   what certificates cost by guarantee and by layer

On a machine with an NVIDIA GPU, bench/gpu_check.sh builds, tests and times the CUDA part (`bench.gpu`).

Ratios are between variants of one run, timed in turn, so they carry over between machines better than seconds do; a
ratio is the median over the repeats of baseline time per sample by our time per sample.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import bench_certificate
from bench.support import DEVICE
from locallip_cuda.experiments import report as program
from locallip_cuda.norms.masked_norm import GUARANTEES

HERE = Path(__file__).parent
THRESHOLDS = HERE / "thresholds.json"
# A ratio that fell by more than this between two runs counts as a regression.
COMPARE_TOLERANCE = 0.15
# Slack for "norms at least as close to the converged ones": they are means over a few samples with random starts.
CLOSENESS_SLACK = 0.01


@dataclass
class Variant:
    """One variant of a case: milliseconds a call per repeat, samples a call, and the facts its benchmark recorded."""

    samples: int = 0
    times: dict[int, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def typical(self) -> float:
        return statistics.median(self.times.values())


Cases = dict[tuple[str, str], dict[str, Variant]]


def read(run: dict[str, Any]) -> Cases:
    cases: Cases = {}
    for entry in run["benchmarks"]:
        info = dict(entry["extra_info"])
        op, case, name, repeat = (info.pop(key) for key in ("op", "case", "variant", "repeat"))
        variant = cases.setdefault((op, case), {}).setdefault(name, Variant())
        variant.samples = info.pop("samples")
        variant.times[repeat] = entry["stats"]["median"] * 1e3
        variant.facts |= info
    return cases


def ratios(ours: Variant, other: Variant) -> list[float]:
    """How many times as long `other` takes a sample, one number a repeat."""
    both = sorted(ours.times.keys() & other.times.keys())
    return [other.times[r] / other.samples / (ours.times[r] / ours.samples) for r in both]


def is_ours(name: str) -> bool:
    return name.split("-")[0] == "ours"


def pairs(cases: Cases) -> Iterator[tuple[str, Variant, Variant]]:
    """Every variant of ours with every baseline of the same case, and what the pair is called."""
    for (op, case), variants in cases.items():
        for mine in filter(is_ours, variants):
            for name in variants:
                if not is_ours(name):
                    yield f"{op}: {case}: {mine} vs {name}", variants[mine], variants[name]


def speedups(cases: Cases) -> dict[str, list[float]]:
    return {key: ratios(mine, baseline) for key, mine, baseline in pairs(cases)}


def describe(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine.get("processor", "unknown CPU"))
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"{run['datetime'][:19]}  commit {str(commit.get('id'))[:12]}{changed}\n"
        f"{cpu}, {machine['torch_threads']} threads; device {machine['device']}; torch {machine['torch']}\n"
        f"{machine['command']}"
    )


def table(cases: Cases) -> str:
    lines = [f"{'':24} {'ms/call':>10} {'samples':>7}  times as long as ours (range over the repeats), quality"]
    for (op, case), variants in cases.items():
        lines.append(f"{op}: {case}")
        for name, variant in variants.items():
            notes = []
            for mine in filter(is_ours, variants):
                if not is_ours(name):
                    each = ratios(variants[mine], variant)
                    notes.append(f"{statistics.median(each):.2f}x {mine} ({min(each):.2f} to {max(each):.2f})")
            notes += [f"{fact} {value:.4f}" for fact, value in sorted(variant.facts.items()) if fact != "peak_bytes"]
            if "peak_bytes" in variant.facts:
                notes.append(f"peak {variant.facts['peak_bytes'] / 2**20:.0f} MiB")
            lines.append(f"    {name:20} {variant.typical():10.2f} {variant.samples:7d}  {', '.join(notes)}".rstrip())
    return "\n".join(lines)


def regressions(cases: Cases, device: str) -> list[str]:
    """What of thresholds.json does not hold, for the cases that ran."""
    limits = json.loads(THRESHOLDS.read_text())["cpu" if device == "cpu" else "cuda"]
    measured = speedups(cases)
    found = [
        f"{key}: {statistics.median(measured[key]):.2f} times as fast, want {least}"
        for key, least in limits["speed"].items()
        if key in measured and statistics.median(measured[key]) < least
    ]
    for key, mine, baseline in pairs(cases):
        ours, theirs = mine.facts, baseline.facts
        both = ours.keys() & theirs.keys()
        most = limits["memory"].get(key)
        if most is not None and "peak_bytes" in both and ours["peak_bytes"] > most * theirs["peak_bytes"]:
            share = ours["peak_bytes"] / theirs["peak_bytes"]
            found.append(f"{key}: peak memory {share:.2f} of the baseline's, want at most {most}")
        for fact in {"closeness_mean", "lipschitz_closeness"} & both if " vs paper" in key else set():
            if ours[fact] < theirs[fact] - CLOSENESS_SLACK:
                found.append(f"{key}: {fact} {ours[fact]:.4f}, less than the baseline's {theirs[fact]:.4f}")
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
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


def report(path: Path) -> int:
    run = json.loads(path.read_text())
    cases = read(run)
    print(f"{describe(run)}\n\n{table(cases)}\n")
    found = regressions(cases, run["machine_info"]["device"])
    for line in found:
        print(f"REGRESSION {line}")
    print(f"{path}: {f'{len(found)} regressions' if found else 'no regression'} against {THRESHOLDS.name}")
    return 1 if found else 0


def certificate(arguments: argparse.Namespace) -> int:
    """Time the certificates of one network, print the table and write the JSON. The times are no regression test."""
    p = bench_certificate.problem(arguments.checkpoint, arguments.data, arguments.samples)
    costs, layers = bench_certificate.run(p, arguments.guarantee, arguments.batch_size, arguments.published_samples)
    environment = program.environment(DEVICE)
    when, command = f"{datetime.now(timezone.utc):%Y-%m-%d}", shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    lines = [
        f"- command: `{command}`",
        f"- commit: {environment['commit']}, {when}",
        f"- hardware: {environment['processor']}, {environment['threads']} threads; device {environment['device']}",
        f"- software: torch {environment['torch']}, Python {environment['python']}",
        f"- network: {p.title}",
        f"- l2 radius {p.eps:.4g}; the first {len(p.x)} samples classified correctly, {arguments.batch_size} at a time",
        "- rows, columns: the share that the masks keep in the first batch",
    ]
    published = costs.get(bench_certificate.PUBLISHED)
    if published is not None:
        lines.append(
            f"- published: {bench_certificate.PUBLISHED_ITERATIONS} power iterations a layer, on masks from the "
            f"published bounds, plain PyTorch in float32, {published.samples} of the samples at once (the ratios of "
            f"Lipschitz constants are over these); its global norms took {published.once:.1f} s more, once"
        )
    print("\n".join(lines) + "\n\n" + bench_certificate.table(costs, layers))
    if arguments.out:
        values = {
            "command": command,
            "date": when,
            "environment": environment,
            "network": p.title,
            "eps": p.eps,
            "batch_size": arguments.batch_size,
            "layers": [asdict(layer) for layer in layers],
            "costs": {name: asdict(cost) | {"total": cost.total} for name, cost in costs.items()},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the benchmarks that match, as in pytest -k")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the JSON goes (default: bench/results/TIME.json)"
    )
    parser.add_argument("--read", type=Path, metavar="FILE", help="print and check an earlier run")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare the ratios of two runs")
    commands = parser.add_subparsers(dest="command", metavar="certificate", help="see its own --help")
    costs = commands.add_parser("certificate", description=(bench_certificate.__doc__ or "").split("\n")[0])
    costs.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help=f"a checkpoint or the folder of a run (default: {bench_certificate.FALLBACK}, trained briefly here)",
    )
    costs.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets; digits needs none")
    costs.add_argument("--samples", type=int, default=16, metavar="N", help="default: %(default)s")
    costs.add_argument("--batch-size", type=int, default=8, metavar="N", help="at a time (default: %(default)s)")
    costs.add_argument("--guarantee", nargs="+", choices=GUARANTEES, default=GUARANTEES, help="default: all")
    costs.add_argument(
        "--published-samples",
        type=int,
        default=4,
        metavar="N",
        help="so many of the samples for the published evaluation (default: %(default)s; 0 leaves it out)",
    )
    costs.add_argument("--out", type=Path, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    if arguments.command == "certificate":
        return certificate(arguments)
    if arguments.compare:
        old, new = (json.loads(path.read_text()) for path in arguments.compare)
        return compare(old, new)
    if arguments.read:
        return report(arguments.read)
    output = arguments.output or HERE / "results" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable-gc", f"--benchmark-json={output}"]
    command += ["--benchmark-columns=median", "--benchmark-quiet", *(["-k", arguments.k] if arguments.k else [])]
    command += sorted(f"{HERE.name}/{path.name}" for path in HERE.glob("bench_*.py"))
    failed = subprocess.run(command, cwd=HERE.parent, check=False).returncode
    if failed:
        print(f"the benchmarks themselves failed (pytest exit status {failed})")
        return failed
    return report(output)


if __name__ == "__main__":
    raise SystemExit(main())
