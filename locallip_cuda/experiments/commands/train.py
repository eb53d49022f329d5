"""``locallip train``: a network by a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..distributed import Workers
from ..network import load_model
from ..objective import PRECISIONS
from ..recipes import OF_DATA, PRESETS, Recipe, recipe
from ..trainer import Interrupted, Settings, Trainer
from .options import add_data_option, add_device_option, add_model_option, add_recipe_options, check_data, choose_device


def add(commands: Any) -> None:
    trainer = commands.add_parser(
        "train",
        help="train a network by a preset recipe",
        description="Train a network by a preset recipe. Ctrl-C leaves a checkpoint; --resume goes on from it exactly. "
        "Several processes: torchrun --nproc-per-node N --no-python locallip train ...",
    )
    trainer.add_argument("preset", nargs="?", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    add_model_option(trainer)
    trainer.add_argument(
        "--dataset", choices=OF_DATA, help="what to train it on, by the numbers of the preset for this data"
    )
    add_data_option(trainer)
    trainer.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for checkpoint and logs (default: runs/PRESET)"
    )
    existing = trainer.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, with its recipe")
    existing.add_argument("--overwrite", action="store_true", help="start afresh although --out holds a run")
    add_device_option(trainer)
    trainer.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the products in clean pass and bounds: fp32; tf32, on GPUs; bf16, by autocast (default: fp32)",
    )
    add_recipe_options(trainer)
    trainer.set_defaults(run=run)


def _preset(arguments: argparse.Namespace) -> str:
    """The preset given, or the one whose numbers a network of the user's is trained by."""
    if bool(arguments.model) != bool(arguments.dataset) or bool(arguments.model) == bool(arguments.preset):
        raise ValueError("train takes a PRESET, or --model PACKAGE.MODULE:FUNCTION with --dataset NAME")
    return arguments.preset or OF_DATA[arguments.dataset]


def recipe_of(arguments: argparse.Namespace, out: Path) -> Recipe:
    """The preset's recipe with what the command line changes, or that of the run to resume."""
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Recipe) if f.name in vars(arguments)}
    if not arguments.resume:
        changes = {name: value for name, value in given.items() if name not in ("preset", "activation")}
        return recipe(_preset(arguments), given.get("activation")).replace(**changes)
    path = out / checkpoint.CHECKPOINT_NAME
    _, stored, _ = load_model(path, arguments.model)
    for name, value in {**given, "preset": _preset(arguments)}.items():
        if value != getattr(stored, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but the run in {out} has {getattr(stored, name)}; "
                "a resumed run keeps its recipe"
            )
    return stored


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    preset = _preset(arguments)
    check_data(preset, arguments.data)
    out: Path = arguments.out or Path("runs") / (arguments.model.rpartition(":")[2] or preset)
    with Workers() as workers:
        device = choose_device(arguments.device, workers.local_rank)
        workers.connect(device)
        settings = Settings(
            out=out,
            data_root=arguments.data,
            device=device,
            precision=arguments.precision,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
        )
        trainer = Trainer(recipe_of(arguments, out), settings, workers)
        done = trainer.epoch == trainer.recipe.epochs
        try:
            trainer.run()
        except Interrupted as stop:
            if workers.rank == 0:
                again = [a for a in command if a not in ("--overwrite", "--resume")]
                where = f"epoch {trainer.epoch + 1}, step {trainer.step} of {trainer.steps}"
                print(f"Stopped by {signal.Signals(stop.number).name} in {where}. Checkpoint: {stop.path}")
                launcher = f"torchrun --nproc-per-node {workers.count} --no-python " if workers.count > 1 else ""
                print(f"Continue with: {launcher}{shlex.join(['locallip', *again, '--resume'])}")
                sys.stdout.flush()
            return 128 + stop.number
        if workers.rank == 0:
            if done:
                print(f"The run in {out} has had its {trainer.recipe.epochs} epochs; nothing is left to do.")
            else:
                print(f"Trained {trainer.seconds:.0f} s. Checkpoint: {trainer.path}")
            data_option = f" --data {shlex.quote(str(arguments.data))}" if arguments.data else ""
            own = f" --model {shlex.quote(arguments.model)}" if arguments.model else ""
            print(f"Certify with: locallip certify {shlex.quote(str(out))}{own}{data_option}")
    return 0
