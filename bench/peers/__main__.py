"""Peers in one run: certified radius and time a sample, of one network and its test images, by several certifiers.

    python -m bench.peers RUN --data DATA_ROOT --limit 100
    python -m bench.peers RUN --auto-lirpa PATH      with the auto_LiRPA of that folder

RUN: a folder of `locallip train`. README.md beside this file says how to make the environment; a certifier that is not
installed, or fails, is a row that says so. The table goes to RUN/peers.md too, and with the radii to RUN/peers.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.peers.certifiers import PEERS
from bench.peers.comparison import LARGEST, compare, table
from bench.report import without_nan
from locallip_cuda.experiments import checkpoint, data, models, report
from locallip_cuda.experiments.network import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets; digits needs none")
    parser.add_argument("--eps", type=float, metavar="X", help="l2 radius (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="test images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument("--halvings", type=int, default=6, metavar="N", help="for a radius (default: %(default)s)")
    parser.add_argument("--auto-lirpa", type=Path, metavar="PATH", help="a folder that has auto_LiRPA/")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", choices=[p.name for p in PEERS])
    options = parser.parse_args(arguments)
    if options.auto_lirpa is not None:
        if not (options.auto_lirpa / "auto_LiRPA").is_dir():
            parser.error(f"--auto-lirpa: got {options.auto_lirpa}, want a folder that has auto_LiRPA/")
        sys.path.insert(0, str(options.auto_lirpa))
    environment = report.environment(torch.device("cpu"))  # of the code that runs, whatever is committed meanwhile
    model, recipe, config = load_model(options.run / checkpoint.CHECKPOINT_NAME)
    eps = recipe.eps if options.eps is None else options.eps
    dataset = data.load(models.spec(recipe.preset).data, options.data, train=False)[: options.limit]
    x, y = dataset.batch(torch.arange(len(dataset)), torch.device("cpu"))
    torch.manual_seed(0)
    peers = [peer for peer in PEERS if peer.name not in options.without]
    rows, distance = compare(model, x, y, eps, options.batch_size, options.halvings, peers)

    command, date = shlex.join(["python", "-m", "bench.peers", *arguments]), f"{datetime.now(timezone.utc):%Y-%m-%d}"
    network = (
        f"{recipe.network}, {config['position']['epoch']} epochs; {dataset.name} test set, the first {len(x)} images"
    )
    lines = [
        f"- command: `{command}`",
        f"- commit: {environment['commit']}, {date}",
        f"- hardware: {environment['processor']}, {environment['threads']} threads; seconds are processor time",
        f"- software: torch {environment['torch']}, Python {environment['python']}",
        f"- network: {network}, {options.batch_size} at a time",
        f"- radius: of all samples, the largest found below {LARGEST * eps:g} by {options.halvings} halvings from "
        f"{eps:g} on; 0 where there is none or the class is wrong",
        *(f"- {row.peer.name}: {row.peer.settings}" for row in rows if row.peer.settings),
        "",
        *table(rows, distance, eps),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (options.run / "peers.md").write_text(text)
    values = {
        "command": command,
        "date": date,
        "environment": environment,
        "network": network,
        "eps": eps,
        "adversarial_distance": distance.tolist(),
        "certifiers": [{**asdict(row), "peer": row.peer.name, "proves": row.peer.proves} for row in rows],
    }
    (options.run / "peers.json").write_text(json.dumps(without_nan(values), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
