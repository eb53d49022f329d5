"""``locallip audit``: deterministic certificates derived again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint, data, models, report, witness
from ..network import load_model
from .options import add_model_option


def add(commands: Any) -> None:
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
    add_model_option(auditor)
    auditor.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets, to compare inputs and labels with"
    )
    auditor.add_argument("--limit", type=int, metavar="N", help="only the first N certificates (default: all)")
    auditor.set_defaults(run=run)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    try:
        from .. import audit
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
