"""Kills one of several certifying processes again and again, and compares the outcome with that of an undisturbed run.

    python -m tests.kill_certify --kills 20

Every time the processes go on with the same command, one to three of them; the moment of a kill and which one it hits
are random, and the others are killed a little later, as torchrun does. The last ones are left to finish. The random
vectors have a seed, so that the results must be the same but for the times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from locallip_cuda.experiments import cli

LIMIT = 60


# of processes that have imported everything and done nothing: a start takes a moment instead of seconds
SERVER = multiprocessing.get_context("forkserver")
LAZY = ["sklearn.datasets", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]
SERVER.set_forkserver_preload(["locallip_cuda.experiments.cli", *LAZY])


def command(arguments: Sequence[str], environment: Mapping[str, str], printed: Path) -> None:
    """The command line in a process of its own, and the exit code it ends with."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with printed.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = cli.main(arguments)
    sys.exit(code)


def train(checkpoint: Path) -> None:
    """A network that certifies some samples, and not all."""
    options = ["digits", "--device", "cpu", "--batch-size", "128", "--epochs", "3", "--out", str(checkpoint)]
    process = SERVER.Process(target=command, args=(["train", *options], {}, checkpoint.with_suffix(".train")))
    process.start()
    finished([process])


def start(checkpoint: Path, folders: Sequence[Path], limit: int = LIMIT) -> list[BaseProcess]:
    """One process for each folder that it writes to, as torchrun starts them. What they print: FOLDER/RANK.printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--device", "cpu", "--batch-size", "4", "--limit", str(limit), "--attack-steps", "40", "--seed", "0"]
    started: list[BaseProcess] = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(folders))}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = ["certify", str(checkpoint), *options, "--out", str(folder)]
        process = SERVER.Process(target=command, args=(own, environment, folder / f"{rank}.printed"))
        process.start()
        started.append(process)
    return started


def finished(processes: Sequence[BaseProcess]) -> None:
    """AssertionError where one failed."""
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, process.exitcode


def kept(folders: Sequence[Path]) -> int:
    """How many samples are in the files of a run."""
    batches: dict[str, int] = {}
    for path in {path for folder in folders for path in folder.glob("certify.partial.*.json")}:
        with contextlib.suppress(FileNotFoundError):
            batches |= {first: len(own) for first, own in json.loads(path.read_bytes())["batches"].items()}
    return sum(batches.values())


def disturbed(checkpoint: Path, folder: Path, kills: int, chance: random.Random, limit: int = LIMIT) -> list[int]:
    """Killed so many times, then finished: how many samples were kept after each kill."""
    found: list[int] = []
    for _ in range(kills):
        before = kept([folder])
        processes = start(checkpoint, [folder] * chance.choice([2, 2, 3]), limit)
        try:
            while kept([folder]) == before and all(process.is_alive() for process in processes):
                time.sleep(0.01)
            time.sleep(chance.expovariate(1 / 0.3))
            chance.choice(processes).kill()
            time.sleep(chance.random() * 0.2)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if (folder / "certify.json").exists():  # it was faster
            break
        found.append(kept([folder]))
        assert found[-1] >= before, "what was kept is lost"
    if not (folder / "certify.json").exists():
        finished(start(checkpoint, [folder] * chance.choice([1, 2, 3]), limit))
    return found


def results(folder: Path) -> dict[str, Any]:
    """The JSON without times, command and environment."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(own) for name, own in value.items() if name != "seconds"}
        return value

    values = json.loads((folder / "certify.json").read_text())
    return timeless({name: own for name, own in values.items() if name not in ("command", "environment")})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="samples to certify")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        checkpoint, whole, folder = (Path(place) / name for name in ("run", "whole", "killed"))
        train(checkpoint)
        finished(start(checkpoint, [whole], options.limit))
        found = disturbed(checkpoint, folder, options.kills, random.Random(options.seed), options.limit)
        same = results(whole) == results(folder)
        left = [path.name for path in folder.glob("certify.partial.*")]
    print(f"{len(found)} kills, after which {found} samples were kept; the result is {'' if same else 'NOT '}the same")
    return int(not same or len(found) < options.kills or bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
