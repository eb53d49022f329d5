"""``locallip explain``: why local bounds are below the global one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import checkpoint, data, explanation, explanation_report, models, report
from ..network import build_model, load_model
from ..objective import set_precision
from .options import (
    NO_PLOT,
    add_batch_size_option,
    add_data_option,
    add_device_option,
    add_eps_option,
    add_limit_option,
    add_model_option,
    check_data,
    choose_device,
)


def add(commands: Any) -> None:
    explainer = commands.add_parser(
        "explain",
        help="show why a trained network's local bounds are below its global one",
        description="Measure on the test set, by estimates, which units vary, local against global norms, Lipschitz "
        "constants, the thresholds learnt, and what decides where several bounds meet. Prints a table; writes "
        "explain.json and explain.png.",
    )
    explainer.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    add_model_option(explainer)
    add_data_option(explainer)
    explainer.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the checkpoint)")
    add_eps_option(explainer)
    add_limit_option(explainer, 256)
    explainer.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="maps in a row that are composed before a norm is taken, beside the product of norms; 1 for none "
        "(default: the recipe's)",
    )
    add_batch_size_option(explainer)
    add_device_option(explainer)
    explainer.set_defaults(run=run)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    path = checkpoint.in_folder(arguments.checkpoint)
    if path.suffix == ".onnx":
        raise ValueError(f"CHECKPOINT: got {path}, want a checkpoint or the folder of a run")
    model, stored, config = load_model(path, arguments.model)
    check_data(stored.preset, arguments.data)
    device = choose_device(arguments.device)
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
        **report.subject(path, config, stored, name, dataset),
        "environment": report.environment(device),
    }
    explanation_report.write_json(out / "explain.json", found, context)
    if explanation_report.plot(out / "explain.png", found, title):
        print(f"Written: {out / 'explain.json'}, {out / 'explain.png'}")
    else:
        print(f"Written: {out / 'explain.json'}")
        print(NO_PLOT)
    return 0
