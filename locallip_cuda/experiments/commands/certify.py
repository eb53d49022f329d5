"""``locallip certify``: the accuracy of a trained network, plain, under attack and certified."""

from __future__ import annotations

import argparse
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...build_info import build_info
from ...norms.masked_norm import GUARANTEES, check_guarantee
from ...propagation.execution import EXECUTIONS
from .. import checkpoint, data, evaluation, models, report, sequential, witness
from ..distributed import Workers
from ..journal import Journal
from ..network import load_model
from ..objective import set_precision
from ..recipes import OF_DATA, RADII
from .options import (
    NO_PLOT,
    add_attack_steps_option,
    add_batch_size_option,
    add_data_option,
    add_device_option,
    add_eps_option,
    add_limit_option,
    add_model_option,
    check_data,
    choose_device,
    number,
)


class RefutedError(Exception):
    """An attack broke what was proved."""


def add(commands: Any) -> None:
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
    add_model_option(certifier)
    certifier.add_argument("--dataset", choices=OF_DATA, help="what an ONNX file is measured on")
    add_data_option(certifier)
    certifier.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the checkpoint)")
    add_eps_option(certifier)
    add_limit_option(certifier)
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
        type=number,
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
    add_attack_steps_option(certifier)
    add_batch_size_option(certifier)
    certifier.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the random vectors of attack and proofs, for repetition; a probabilistic guarantee is void with it "
        "(default: one drawn afresh and written down for the attack, the operating system's entropy for proofs)",
    )
    add_device_option(certifier)
    certifier.set_defaults(run=run)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
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
    check_data(stored.preset, arguments.data)
    device = choose_device(arguments.device, workers.local_rank)
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
        **report.subject(path, config, stored, name, dataset),
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
