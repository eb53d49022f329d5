"""``locallip compare``: a network trained against several bounds and losses."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...norms.masked_norm import GUARANTEES
from .. import checkpoint, comparison, comparison_report
from ..objective import PRECISIONS
from ..recipes import PRESETS, Recipe, recipe
from .options import (
    NO_PLOT,
    add_attack_steps_option,
    add_data_option,
    add_device_option,
    add_limit_option,
    add_recipe_options,
    check_data,
    choose_device,
)


def add(commands: Any) -> None:
    comparer = commands.add_parser(
        "compare",
        help="train a network against several bounds and losses, and certify all alike",
        description="Train the preset's network in several ways, with the same seeds, epochs and batches, certify all "
        "under one guarantee, and put them into one table. Writes compare.md, compare.json and compare.png; every run "
        "is in a folder of its own, and compare.md has the commands that repeat it. A comparison that is stopped goes "
        "on where it was when the same command is given again, and one with more rows or seeds takes what is done. "
        "digits has 20 epochs and radius 0.5 here unless an option says otherwise.",
    )
    comparer.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    rows = "; ".join(f"{name}, {row.about}" for name, row in comparison.ROWS.items())
    comparer.add_argument(
        "--rows",
        nargs="+",
        choices=comparison.ROWS,
        default=list(comparison.ROWS),
        metavar="ROW",
        help=f"ways to train: {rows} (default: all)",
    )
    comparer.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of each row (default: 0 1 2)"
    )
    add_data_option(comparer)
    comparer.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/compare-PRESET)")
    comparer.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: one a GPU, or one a processor, with a thread each)",
    )
    add_device_option(comparer)
    comparer.add_argument("--precision", choices=PRECISIONS, default="fp32", help="as for train (default: fp32)")
    comparer.add_argument(
        "--guarantee",
        choices=GUARANTEES,
        default="probabilistic",
        metavar="NAME",
        help="what to certify under: estimate, probabilistic or deterministic (default: probabilistic)",
    )
    add_limit_option(comparer)
    add_attack_steps_option(comparer)
    add_recipe_options(comparer, without=comparison.DECIDED)
    comparer.set_defaults(run=run)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    for name, least in (("jobs", 1), ("limit", 1), ("attack_steps", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    check_data(arguments.preset, arguments.data)
    out: Path = arguments.out or Path("runs") / f"compare-{arguments.preset}"
    checkpoint.make_folder(out)
    device = choose_device(arguments.device)
    fields = [f.name for f in dataclasses.fields(Recipe) if f.name != "preset"]
    chosen = {name: value for name, value in vars(arguments).items() if name in fields}
    given = {**comparison.SHORTENED.get(arguments.preset, {}), **chosen}
    base = recipe(arguments.preset).replace(**given)
    where = ["--data", str(arguments.data)] if arguments.data else []
    certifying = [*where, "--guarantee", arguments.guarantee, "--attack-steps", str(arguments.attack_steps)]
    certifying += ["--limit", str(arguments.limit)] if arguments.limit else []
    runs = comparison.runs(
        list(dict.fromkeys(arguments.rows)),
        list(dict.fromkeys(arguments.seeds)),
        base,
        out,
        given=given,
        training=[*where, "--precision", arguments.precision],
        certifying=certifying,
    )
    if device.type == "cuda":
        one = arguments.device is not None and arguments.device.index is not None
        gpus = [str(device)] if one else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        at_a_time, threads = arguments.jobs or len(gpus), 0
        devices = [gpus[i % len(gpus)] for i in range(at_a_time)]
    else:
        processors = len(os.sched_getaffinity(0))
        at_a_time = arguments.jobs or min(processors, len(runs))
        devices, threads = ["cpu"] * at_a_time, max(1, processors // at_a_time)
    work = comparison.Comparison(runs, devices, threads, say=functools.partial(print, flush=True))
    print(f"{len(runs)} runs, {at_a_time} at a time, in {out}", flush=True)
    try:
        work.work()
    except comparison.Stopped as stop:
        print("Stopped. The same command goes on from what is done.")
        return 128 + stop.number
    rows = comparison_report.collected([run for run in runs if run.name not in work.failed])
    if rows:
        seeds = ", ".join(map(str, arguments.seeds))
        title = f"{arguments.preset}, {base.epochs} epochs, l2 radius {base.eps:.4g}, seeds: {seeds}"
        text = comparison_report.table(rows, title, arguments.guarantee)
        print(text)
        comparison_report.write(out, rows, text, {"command": ["locallip", *command]})
        drawn = comparison_report.plot(out / "compare.png", rows, title, base.eps)
        written = ["compare.md", "compare.json", *(["compare.png"] if drawn else [])]
        print(f"Written: {', '.join(str(out / name) for name in written)}")
        if not drawn:
            print(NO_PLOT)
    if work.failed:
        raise comparison.CompareError(f"{len(work.failed)} of {len(runs)} runs failed: {', '.join(work.failed)}")
    return 0
