"""The command line: ``locallip train``, ``compare``, ``certify``, ``explain``, ``audit``, ``info``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..build_info import build_info
from ..norms.masked_norm import GUARANTEES, check_guarantee
from ..propagation.execution import EXECUTIONS
from ..propagation.graph import UnsupportedModuleError
from . import (
    checkpoint,
    comparison,
    comparison_report,
    data,
    evaluation,
    explanation,
    explanation_report,
    models,
    report,
    sequential,
    witness,
)
from .checkpoint import CheckpointError
from .distributed import Workers
from .journal import Journal
from .network import build_model, load_model
from .objective import PRECISIONS, set_precision
from .recipes import OF_DATA, PRESETS, RADII, Recipe, recipe
from .trainer import Interrupted, Settings, Trainer, TrainingError

NO_PLOT = 'No plot: matplotlib is not installed (pip install "locallip-cuda[plot]").'


class RefutedError(Exception):
    """An attack broke what was proved."""


def _real(text: str) -> float:
    """A number, also as a fraction such as 36/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} asked for, but torch sees no GPU here")
    return device


def _choose_device(asked: torch.device | None, local_rank: int = 0) -> torch.device:
    """The device asked for, or a GPU where there is one and the extension has a CUDA part; made the current one."""
    if asked is None:
        asked = torch.device("cuda" if build_info()["cuda"] and torch.cuda.is_available() else "cpu")
    if asked.type != "cuda":
        return asked
    device = torch.device("cuda", local_rank if asked.index is None else asked.index)
    torch.cuda.set_device(device)
    return device


def _check_data(preset: str, folder: Path | None) -> None:
    name = models.spec(preset).data
    if folder is None and name != "digits":
        raise ValueError(f"{preset} needs --data DIR, the folder that holds the files of {name}")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _defaults(name: str) -> str:
    """The default of a recipe number as ``--help`` shows it: one value, or each with the presets that have it."""
    users: dict[str, list[str]] = {}
    for preset in PRESETS:
        own = getattr(recipe(preset), name)
        users.setdefault(_show(own), []).append(preset)
        maxmin = getattr(recipe(preset, "clipped-maxmin"), name)
        if name != "activation" and maxmin != own:
            users.setdefault(_show(maxmin), []).append(f"{preset} with (clipped-)maxmin")
    if len(users) == 1:
        return next(iter(users))
    return "; ".join(f"{value} for {', '.join(presets)}" for value, presets in users.items())


def _add_recipe_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    group = parser.add_argument_group("the recipe's numbers", "Each has the preset's value unless given here.")
    types = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in ("preset", "model", *without):
            continue
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {_defaults(field.name)})".replace("%", "%%"),
        }
        kind = types[field.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" in field.metadata:
            options["choices"] = field.metadata["choices"]
        else:
            options["type"] = _real if kind is float else kind
            options["metavar"] = "X" if kind is float else "N"
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a network of yours in place of a preset's: a function of no arguments that returns it",
    )


def _add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets; digits needs none")


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _preset(arguments: argparse.Namespace) -> str:
    """The preset given, or the one whose numbers a network of the user's is trained by."""
    if bool(arguments.model) != bool(arguments.dataset) or bool(arguments.model) == bool(arguments.preset):
        raise ValueError("train takes a PRESET, or --model PACKAGE.MODULE:FUNCTION with --dataset NAME")
    return arguments.preset or OF_DATA[arguments.dataset]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locallip", description="Train and certify networks against l2 perturbations with local Lipschitz bounds."
    )
    parser.add_argument("--version", action="version", version=f"locallip_cuda {build_info()['version']}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    trainer = commands.add_parser(
        "train",
        help="train a network by a preset recipe",
        description="Train a network by a preset recipe. Ctrl-C leaves a checkpoint; --resume goes on from it exactly. "
        "Several processes: torchrun --nproc-per-node N --no-python locallip train ...",
    )
    trainer.add_argument("preset", nargs="?", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    _add_model_option(trainer)
    trainer.add_argument(
        "--dataset", choices=OF_DATA, help="what to train it on, by the numbers of the preset for this data"
    )
    _add_data_option(trainer)
    trainer.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for checkpoint and logs (default: runs/PRESET)"
    )
    existing = trainer.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out, with its recipe")
    existing.add_argument("--overwrite", action="store_true", help="start afresh although --out holds a run")
    _add_device_option(trainer)
    trainer.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the products in clean pass and bounds: fp32; tf32, on GPUs; bf16, by autocast (default: fp32)",
    )
    _add_recipe_options(trainer)
    trainer.set_defaults(run=_train)

    _add_compare(commands)

    certifier = commands.add_parser(
        "certify",
        help="measure a trained network's accuracy: plain, under attack and certified",
        description="Measure a trained network on the test set. Prints a table; writes certify.json and certify.png. "
        "A run that is stopped goes on where it was when the same command is given again. Several processes: "
        "torchrun --nproc-per-node N --no-python locallip certify ...",
    )
    certifier.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, the folder of a run, or an ONNX file"
    )
    _add_model_option(certifier)
    certifier.add_argument("--dataset", choices=OF_DATA, help="what an ONNX file is measured on")
    _add_data_option(certifier)
    certifier.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the checkpoint)")
    certifier.add_argument("--eps", type=_real, metavar="X", help="l2 radius, images in [0, 1] (default: the recipe's)")
    certifier.add_argument("--limit", type=int, metavar="N", help="only the first N test samples (default: all)")
    certifier.add_argument(
        "--guarantee",
        nargs="+",
        choices=GUARANTEES,
        default=["probabilistic"],
        metavar="NAME",
        help="what to certify under, one or more of estimate (no proof; always measured beside the others), "
        "probabilistic and deterministic (default: probabilistic)",
    )
    certifier.add_argument(
        "--execution",
        choices=EXECUTIONS,
        default="real",
        help="of which network the proofs speak: real, in real arithmetic; float64 or float32, of what it computes in "
        "that type too (default: real)",
    )
    certifier.add_argument(
        "--failure-probability",
        type=_real,
        default=1e-9,
        metavar="X",
        help="of a probabilistic certificate, for one sample (default: 1e-9)",
    )
    certifier.add_argument(
        "--bound",
        choices=RADII,
        default="local",
        help="local; or global alone, whose norms are proved once for all samples: what certifies a network that is "
        "trained against it, and a large test set in minutes, with a large --batch-size (default: local)",
    )
    certifier.add_argument(
        "--save",
        action="store_true",
        help=f"write {witness.NAME} beside certify.json: what `locallip audit` checks the deterministic certificates "
        "by, those by the product of norms; needs --guarantee deterministic",
    )
    certifier.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="maps in a row that are composed before a norm is taken, beside the product of norms; 1 for none, a "
        "number above the network's layers for all (default: the recipe's)",
    )
    certifier.add_argument(
        "--iterations", type=int, default=50, metavar="N", help="steps for the estimated norms (default: 50)"
    )
    certifier.add_argument(
        "--attack-steps", type=int, default=100, metavar="N", help="steps of the attack, each eps / 4 (default: 100)"
    )
    certifier.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")
    certifier.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the random vectors of attack and proofs, for repetition; a probabilistic guarantee is void with it "
        "(default: one drawn afresh and written down for the attack, the operating system's entropy for proofs)",
    )
    _add_device_option(certifier)
    certifier.set_defaults(run=_certify)

    explainer = commands.add_parser(
        "explain",
        help="show why a trained network's local bounds are below its global one",
        description="Measure on the test set, by estimates, which units vary, local against global norms, Lipschitz "
        "constants, the thresholds learnt, and what decides where several bounds meet. Prints a table; writes "
        "explain.json and explain.png.",
    )
    explainer.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    _add_model_option(explainer)
    _add_data_option(explainer)
    explainer.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the checkpoint)")
    explainer.add_argument("--eps", type=_real, metavar="X", help="l2 radius, images in [0, 1] (default: the recipe's)")
    explainer.add_argument(
        "--limit", type=int, default=256, metavar="N", help="only the first N test samples (default: 256)"
    )
    explainer.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="maps in a row that are composed before a norm is taken, beside the product of norms; 1 for none "
        "(default: the recipe's)",
    )
    explainer.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")
    _add_device_option(explainer)
    explainer.set_defaults(run=_explain)

    auditor = commands.add_parser(
        "audit",
        help="derive deterministic certificates again, by a path of its own",
        description=f"Derive the deterministic certificates of a {witness.NAME} again, in ball arithmetic and whole "
        "numbers, without what made them. Prints a table; writes FILE.audit.json. Exits with 0 only where all are "
        "confirmed. Slow: seconds to minutes a sample.",
    )
    auditor.add_argument(
        "file", type=Path, metavar="FILE", help="what `locallip certify --save` wrote, or the folder it is in"
    )
    auditor.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="a checkpoint, or the folder of a run (default: beside FILE)"
    )
    _add_model_option(auditor)
    auditor.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets, to compare inputs and labels with"
    )
    auditor.add_argument("--limit", type=int, metavar="N", help="only the first N certificates (default: all)")
    auditor.set_defaults(run=_audit)

    info = commands.add_parser("info", help="say what the extension was built for")
    info.set_defaults(run=_info)
    return parser


def _add_compare(commands: Any) -> None:
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
    _add_data_option(comparer)
    comparer.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/compare-PRESET)")
    comparer.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time (default: one a GPU, or one a processor, with a thread each)",
    )
    _add_device_option(comparer)
    comparer.add_argument("--precision", choices=PRECISIONS, default="fp32", help="as for train (default: fp32)")
    comparer.add_argument(
        "--guarantee",
        choices=GUARANTEES,
        default="probabilistic",
        metavar="NAME",
        help="what to certify under: estimate, probabilistic or deterministic (default: probabilistic)",
    )
    comparer.add_argument("--limit", type=int, metavar="N", help="only the first N test samples (default: all)")
    comparer.add_argument(
        "--attack-steps", type=int, default=100, metavar="N", help="steps of the attack, each eps / 4 (default: 100)"
    )
    _add_recipe_options(comparer, without=comparison.DECIDED)
    comparer.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    for name, least in (("jobs", 1), ("limit", 1), ("attack_steps", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    _check_data(arguments.preset, arguments.data)
    out: Path = arguments.out or Path("runs") / f"compare-{arguments.preset}"
    checkpoint.make_folder(out)
    device = _choose_device(arguments.device)
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


def _recipe(arguments: argparse.Namespace, out: Path) -> Recipe:
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


def _train(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    preset = _preset(arguments)
    _check_data(preset, arguments.data)
    out: Path = arguments.out or Path("runs") / (arguments.model.rpartition(":")[2] or preset)
    with Workers() as workers:
        device = _choose_device(arguments.device, workers.local_rank)
        workers.connect(device)
        settings = Settings(
            out=out,
            data_root=arguments.data,
            device=device,
            precision=arguments.precision,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
        )
        trainer = Trainer(_recipe(arguments, out), settings, workers)
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


def _certify(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    for guarantee in arguments.guarantee:
        check_guarantee(guarantee, arguments.failure_probability)
    with_rank = Workers()
    try:
        with with_rank as workers:
            workers.connect(torch.device("cpu"))  # nothing travels but what the processes tell each other
            measurement = _measured(arguments, command, workers)
    except KeyboardInterrupt:
        if with_rank.rank == 0:
            print("Stopped. The same command goes on from what is done.")
        return 128 + signal.SIGINT
    except ConnectionError as error:
        raise ConnectionError(f"{error}; the same command goes on from what is done") from None
    proofs = (*measurement.certified.items(), *measurement.composed.items())
    broken = {guarantee: c.broken for guarantee, c in proofs if c.broken}
    if with_rank.rank == 0 and set(broken) - {"estimate"}:
        raise RefutedError(f"the attack broke samples that are proved: {broken}; this is a fault of the proof")
    return 0


def _measured(arguments: argparse.Namespace, command: Sequence[str], workers: Workers) -> evaluation.Measurement:
    """By all processes together; what process 0 has printed and written."""
    path = checkpoint.in_folder(arguments.checkpoint)
    model, stored, config = load_model(path, arguments.model, arguments.dataset)
    _check_data(stored.preset, arguments.data)
    device = _choose_device(arguments.device, workers.local_rank)
    eps = stored.eps if arguments.eps is None else arguments.eps
    window = stored.window if arguments.window is None else arguments.window
    name = models.spec(stored.preset).data
    dataset = data.load(name, arguments.data, train=False)
    if arguments.save:
        if "deterministic" not in arguments.guarantee:
            raise ValueError(f"--save: got --guarantee {' '.join(arguments.guarantee)}, want deterministic among them")
        if arguments.bound == "global" and window > 1:
            raise ValueError(
                f"--save: got --bound global and --window {window}, want --window 1: nothing composed is kept"
            )
        sequential.steps(model, dataset.images.shape[1:])  # an error now, and not after hours
    set_precision("fp32", device)
    out: Path = arguments.out or path.parent
    checkpoint.make_folder(out)
    context: dict[str, Any] = {
        "checkpoint": {"path": str(path), "sha256": report.digest(path), "epoch": config["position"]["epoch"]},
        "recipe": stored.to_dict(),
        "data": {"name": name, "split": "test", "crc32": report.checksum(dataset)},
        "settings": {
            "eps": eps,
            "bound": arguments.bound,
            "window": window,
            "guarantees": arguments.guarantee,
            "execution": arguments.execution,
            "failure_probability": arguments.failure_probability,
            "iterations": arguments.iterations,
            "attack_steps": arguments.attack_steps,
            "attack_step_size": eps / 4,
            "batch_size": arguments.batch_size,
        },
    }
    question = {"settings": context["settings"], "seed": arguments.seed, "device": device.type}
    question |= {"checkpoint": context["checkpoint"]["sha256"], "data": context["data"], "build": build_info()}
    question |= {"save": True} if arguments.save else {}
    seed = secrets.randbits(48) if arguments.seed is None else arguments.seed
    journal = Journal(out, question, seed, workers)
    title = f"{stored.network}: {len(dataset[: arguments.limit])} test samples of {name}, l2 radius {eps:.4g}"
    title += "" if arguments.execution == "real" else f", as it runs in {arguments.execution}"
    if workers.rank == 0:
        guarantees = ", ".join(dict.fromkeys(["estimate", *arguments.guarantee]))
        print(f"Measuring {title}; guarantees: {guarantees}; on {device}", flush=True)
        if journal.samples:
            print(f"Going on: {journal.samples} samples are done.", flush=True)
    recorder = None
    if arguments.save:
        digests = (witness.weights_digest(model), context["checkpoint"]["sha256"])
        afresh = not journal.samples and workers.rank == 0
        recorder = witness.Recorder(out / witness.NAME, *digests, afresh=afresh)
        workers.any(False)  # no batch is kept before process 0 has made room
    measurement = evaluation.measure(
        model.to(device),
        dataset,
        eps,
        journal,
        bound=arguments.bound,
        radius=stored.radius,
        window=window,
        guarantees=arguments.guarantee,
        execution=arguments.execution,
        failure_probability=arguments.failure_probability,
        iterations=arguments.iterations,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        attack_steps=arguments.attack_steps,
        proof_seed=arguments.seed,
        witness=recorder,
        quiet=False,
    )
    if workers.rank == 0:
        print(report.table(measurement, title))
        environment = {**report.environment(device), "processes": workers.count}
        context = {"command": ["locallip", *command], **context, "environment": environment}
        written = {path: " (replaced)" if path.exists() else "" for path in (out / "certify.json", out / "certify.png")}
        report.write_json(out / "certify.json", measurement, context)
        if not report.plot(out / "certify.png", measurement, stored.network):
            del written[out / "certify.png"]
            print(NO_PLOT)
        print(f"Written: {', '.join(f'{path}{replaced}' for path, replaced in written.items())}")
        if recorder is not None:
            composed = " by products of norms; those by composed norms are not in it" if window > 1 else ""
            print(f"Written: {recorder.path}, {recorder.finish()} deterministic certificates{composed}.")
    workers.any(False)  # the others keep what they have until process 0 has written it all
    journal.remove()
    if recorder is not None:
        recorder.remove()  # after the journal: a run that goes on from that needs the batches
    return measurement


def _explain(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    path = checkpoint.in_folder(arguments.checkpoint)
    if path.suffix == ".onnx":
        raise ValueError(f"CHECKPOINT: got {path}, want a checkpoint or the folder of a run")
    model, stored, config = load_model(path, arguments.model)
    _check_data(stored.preset, arguments.data)
    device = _choose_device(arguments.device)
    eps = stored.eps if arguments.eps is None else arguments.eps
    window = stored.window if arguments.window is None else arguments.window
    name = models.spec(stored.preset).data
    dataset = data.load(name, arguments.data, train=False)
    set_precision("fp32", device)
    out: Path = arguments.out or path.parent
    checkpoint.make_folder(out)
    found = explanation.explain(
        model.to(device),
        build_model(stored).to(device),
        dataset,
        eps,
        radius=stored.radius,
        window=window,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        quiet=False,
    )
    title = f"{stored.network}: {found.samples} test samples of {name}, l2 radius {eps:.4g}"
    title += "" if window == 1 else f", {report.windowed(window)}"
    print(explanation_report.table(found, title))
    context = {
        "command": ["locallip", *command],
        "checkpoint": {"path": str(path), "sha256": report.digest(path), "epoch": config["position"]["epoch"]},
        "recipe": stored.to_dict(),
        "data": {"name": name, "split": "test", "crc32": report.checksum(dataset)},
        "environment": report.environment(device),
    }
    explanation_report.write_json(out / "explain.json", found, context)
    if explanation_report.plot(out / "explain.png", found, title):
        print(f"Written: {out / 'explain.json'}, {out / 'explain.png'}")
    else:
        print(f"Written: {out / 'explain.json'}")
        print(NO_PLOT)
    return 0


def _audit(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    try:
        from . import audit
    except ImportError as error:
        raise ImportError(f"{error}; an audit needs: pip install python-flint scipy") from error
    file: Path = arguments.file / witness.NAME if arguments.file.is_dir() else arguments.file
    read = witness.read(file)
    path = checkpoint.in_folder(arguments.checkpoint or file.parent)
    if arguments.checkpoint is None and not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file; --checkpoint says where the network's is")
    model, stored, _ = load_model(path, arguments.model)
    name = models.spec(stored.preset).data
    compared = arguments.data is not None or name == "digits"
    dataset = data.load(name, arguments.data, train=False) if compared else None
    auditor = audit.Auditor(model, read, dataset)
    results = audit.audited(auditor, arguments.limit, quiet=False)
    radii = sorted({done.eps for done in results})
    radius = f"l2 radius {radii[0]:.4g}" if len(radii) == 1 else f"l2 radii {radii[0]:.4g} to {radii[-1]:.4g}"
    print(audit.table(results, f"{stored.network}: {len(results)} of {len(read)} certificates of {name}, {radius}"))
    if not compared:
        print(f"Inputs and labels were not compared with {name}: no --data.")
    context = {
        "command": ["locallip", *command],
        "witness": {"path": str(file), "sha256": report.digest(file), "certificates": len(read)},
        "weights": read.weights,
        "checkpoint": {"path": str(path), "sha256": report.digest(path), "certified": read.checkpoint},
        "compared_with": name if compared else None,
        "environment": report.environment(torch.device("cpu")),
        "samples": audit.values(results),
    }
    written = file.with_name(file.name + ".audit.json")
    checkpoint.write_atomically(written, (json.dumps(context, indent=2) + "\n").encode())
    print(f"Written: {written}")
    return 0 if all(done.verdict is audit.Verdict.CONFIRMED for done in results) else 1


def _info(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    for name, value in build_info().items():
        print(f"{name:<14}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    print(f"{'GPU':<14}{torch.cuda.get_device_name() if torch.cuda.is_available() else None}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failure on the way, 2 for what the user can put right, 128 +
    the signal's number for a training that was stopped."""
    command = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(command)
    try:
        return int(arguments.run(arguments, command))
    except (
        CheckpointError,
        UnsupportedModuleError,
        ValueError,
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        message, code = str(error), 2
    except FileExistsError as error:
        message, code = f"{error} (--resume, --overwrite, --out)", 2
    except (OSError, ImportError, RefutedError, TrainingError, comparison.CompareError) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 128 + signal.SIGINT
    print(f"locallip: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
