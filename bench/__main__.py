"""Run the benchmarks, print how many times faster ours is than each baseline, and fail where a ratio has regressed.

    python -m bench                         run all, keep the JSON in bench/results, check bench/thresholds.json
    python -m bench -k training_step        run a part
    python -m bench --tiny                  every case at toy sizes: that the harness works
    python -m bench --read RUN.json         print and check an earlier run
    python -m bench --compare OLD.json NEW.json   ratios of two runs (of two commits, say) side by side
    python -m bench --prepare               train the networks and fill torch.compile's cache, timing nothing
    python -m bench --launch                the kernels that a profiler (ncu) is to see, once each
    python -m bench counts                  what the kernels execute and a model of its cycles, without a GPU
    python -m bench certificate --checkpoint RUN --data DATA_ROOT   what certificates cost by guarantee and by layer

They run on the GPU where there is one; bench/gpu_check.sh builds and tests on it first. What is timed is in
bench_*.py, which are pytest-benchmark's as well, `python -m pytest bench/bench_*.py`; how, in clock.py; report.py says
what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench import report

HERE = Path(__file__).resolve().parent


def benchmarks(options: argparse.Namespace) -> int:
    """Run pytest on the benchmarks, and show what it wrote."""
    import pytest  # as torch, not needed to read an earlier run

    output = (options.output or HERE / "results" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json").resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    given = {"-k": options.k, "--device": options.device, "--seconds": options.seconds}
    arguments = ["-q", "--benchmark-quiet", f"--benchmark-json={output}", *["--tiny"] * options.tiny]
    arguments += [part for name, value in given.items() if value is not None for part in (name, str(value))]
    os.chdir(HERE.parent)
    failed = int(pytest.main([*arguments, *sorted(f"bench/{path.name}" for path in HERE.glob("bench_*.py"))]))
    if failed:
        print(f"the benchmarks themselves failed (pytest exit status {failed})")
    shown = report.show(output) if output.exists() else 1
    return failed or shown


def untimed(options: argparse.Namespace) -> int:
    import torch

    from bench import harness
    from bench.case import DEVICE, Setting

    setting = Setting(torch.device(options.device or DEVICE), options.tiny)
    (harness.prepare if options.prepare else harness.launch)(setting)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["certificate"]:
        from bench import bench_certificate

        return bench_certificate.main(arguments[1:])
    if arguments[:1] == ["counts"]:
        from bench import counts

        return counts.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the benchmarks that match, as in pytest -k")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, and torch.compile without a code generator")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case after so many")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the JSON goes (default: bench/results/TIME.json)"
    )
    parser.add_argument(
        "--summary", type=Path, metavar="DIR", help="with --read: write DIR/summary.md and summary.json"
    )
    parser.add_argument("--stages", type=Path, metavar="FILE", help="for --summary: what bench/gpu_check.sh did")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--read", type=Path, metavar="FILE", help="print and check an earlier run")
    instead.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare the ratios of two runs")
    instead.add_argument("--prepare", action="store_true", help="run once what takes long the first time")
    instead.add_argument("--launch", action="store_true", help="ours once, for a profiler")
    options = parser.parse_args(arguments)
    if options.compare:
        old, new = (json.loads(path.read_text()) for path in options.compare)
        return report.compare(old, new)
    if options.read and options.summary:
        report.summarise(options.summary, options.read, options.stages)
        return 0
    if options.read:
        return report.show(options.read)
    return untimed(options) if options.prepare or options.launch else benchmarks(options)


if __name__ == "__main__":
    raise SystemExit(main())
