"""``locallip compare``: the same network trained against several bounds and losses, and certified alike.

A row of the comparison is a way to train. Each of its seeds is a run of its own, by the commands that repeat it,
``locallip train`` and ``locallip certify``, in processes of their own: their peak of memory is then the run's, and what
is done stays done when the comparison is stopped.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from . import checkpoint, report
from .checkpoint import CHECKPOINT_NAME, CheckpointError
from .recipes import Recipe

ALL_MAPS = 99  # a window that no preset's network is longer than


@dataclass(frozen=True)
class Row:
    """A way to train: what it is, and what it changes of the recipe."""

    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    globally: bool = False  # against the plain global bound, to the end
    clean: bool = False  # by the cross entropy alone

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The recipe of its run with ``seed``. About ten looks at the test set, for the accuracy over time."""
        changes = {**self.changes, "seed": seed, "evaluate_every": max(1, base.epochs // 10)}
        if self.globally:
            changes["global_epochs"] = float(base.epochs)
        if self.clean:
            changes |= {"warmup_epochs": float(base.epochs), "rampup_epochs": 0.0}
        return base.replace(**changes)


ROWS: dict[str, Row] = {
    "plain": Row("cross entropy alone", clean=True),
    "gloro": Row("GloRo: global product", {"loss": "gloro"}, globally=True),
    "bcp": Row("BCP's loss: global product", {"loss": "bcp"}, globally=True),
    "lmt": Row("LMT: global product", {"loss": "lmt"}, globally=True),
    "emma": Row("EMMA: global product", {"loss": "emma"}, globally=True),
    "crm": Row("CRM: global product", {"loss": "crm"}, globally=True),
    "liplt": Row("global bound, all maps composed", {"window": ALL_MAPS}, globally=True),
    "local": Row("local product"),
    "local-relu": Row("local product, ReLU without thresholds", {"activation": "relu"}),
    "local-sparse": Row("local product, sparsity loss 0.01", {"sparse": 0.01}),
    "composed": Row("local bound, all maps composed", {"window": ALL_MAPS}),
}

# What a comparison changes of a preset where no option says otherwise: all rows within minutes.
SHORTENED: dict[str, dict[str, Any]] = {"digits": {"epochs": 20, "eps": 0.5, "eps_train": 0.55}}

# What rows and seeds decide, so that no option does.
DECIDED = ("activation", "loss", "radius", "global_epochs", "window", "sparse", "seed", "evaluate_every")


class CompareError(RuntimeError):
    """Runs that failed; what the others gave is kept."""


@dataclass(frozen=True)
class Run:
    """One seed of one row, in a folder of its own."""

    row: str
    seed: int
    recipe: Recipe
    folder: Path
    train: tuple[str, ...]  # what follows `locallip`
    certify: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT_NAME

    def trained(self) -> dict[str, Any] | None:
        """The checkpoint's configuration where this training is done, and no other's; None where it is not."""
        if not self.checkpoint.is_file():
            return None
        _, config = checkpoint.load(self.checkpoint)
        done = config["position"]["epoch"] == self.recipe.epochs
        return config if done and config["recipe"] == self.recipe.to_dict() else None

    def certified(self) -> dict[str, Any] | None:
        """What certify.json holds where it is of this command and of this checkpoint, None where it is not."""
        path = self.folder / "certify.json"
        if not path.is_file() or not self.checkpoint.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text())
        same = values["command"][: 1 + len(self.certify)] == ["locallip", *self.certify]  # behind it is the device
        return values if same and values["checkpoint"]["sha256"] == report.digest(self.checkpoint) else None


def runs(
    rows: Sequence[str],
    seeds: Sequence[int],
    base: Recipe,
    out: Path,
    *,
    given: Mapping[str, Any],
    training: Sequence[str],
    certifying: Sequence[str],
) -> list[Run]:
    """Every seed of every row, the first seed of all rows first.

    base: the recipe that rows change.   given: what was changed of it to begin with.   training, certifying: more
    options of the two commands.
    """
    found = []
    for seed in seeds:
        for row in rows:
            folder = out / row / f"seed-{seed}"
            wanted, said = ROWS[row].recipe(base, seed), {*given, "seed"}
            decided = {k: v for k, v in wanted.to_dict().items() if k in said or v != getattr(base, k)}
            options = [part for name, value in decided.items() for part in _option(name, value)]
            train = ("train", base.preset, *options, *training, "--out", str(folder))
            bound = ("--bound", "global") if ROWS[row].globally else ()
            found.append(Run(row, seed, wanted, folder, train, ("certify", str(folder), *bound, *certifying)))
    return found


def _option(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]


class Stopped(Exception):
    """SIGINT or SIGTERM; every run at work has left what it needs to go on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Comparison:
    """The runs of a comparison, several at a time.

    Args:
        devices: one for each run at a time, as --device takes it; "" leaves it to the run.   threads: of each.
        say: called with a line for people, from any thread.
    """

    def __init__(
        self, runs: Sequence[Run], devices: Sequence[str], threads: int, say: Callable[[str], None] = print
    ) -> None:
        self.runs, self.say = runs, say
        self.failed: dict[str, str] = {}
        self._at_a_time, self._threads = len(devices), threads
        self._devices: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._devices.put(device)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stop = 0

    def work(self) -> None:
        """Do what is not done. Stopped after SIGINT or SIGTERM; a run that fails is in ``failed``, the others go on."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self._at_a_time) as pool:
                for done in [pool.submit(self._one, run) for run in self.runs]:
                    done.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop:
            raise Stopped(self._stop)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stop = number
        for child in tuple(self._children):
            child.terminate()

    def _one(self, run: Run) -> None:
        if self._stop:
            return
        device = self._devices.get()
        try:
            if run.trained() is None:
                self._call(run, (*run.train, *(["--resume"] if run.checkpoint.is_file() else [])), device, "train")
            if run.certified() is None:
                self._call(run, run.certify, device, "certify")
            values = run.certified()
            if values is not None:
                self.say(f"{run.name}: {best(values['result'])['accuracy']:.2%} certified")
        except (subprocess.CalledProcessError, CheckpointError) as error:
            if not self._stop:
                self.failed[run.name] = str(error)
                self.say(f"{run.name}: failed. {error}")
        finally:
            self._devices.put(device)

    def _call(self, run: Run, command: Sequence[str], device: str, step: str) -> None:
        """Run a command with its output in a log beside its results. CalledProcessError with the log's last line."""
        if self._stop:
            return
        checkpoint.make_folder(run.folder)
        log = run.folder / f"{step}.log"
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if self._threads}
        where = ["--device", device] if device else []
        with open(log, "ab") as output, self._lock:
            # in a session of its own, so that a Ctrl-C reaches it once, from here
            child = subprocess.Popen(
                [sys.executable, "-m", "locallip_cuda", *command, *where],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads},
                start_new_session=True,
            )
            self._children.add(child)
        if self._stop:  # it came before the child was known
            child.terminate()
        code = child.wait()
        self._children.discard(child)
        if code:
            raise _Failed(code, log)


class _Failed(subprocess.CalledProcessError):
    """A command that ended with an error; its message is the last line of its log."""

    def __init__(self, code: int, log: Path) -> None:
        super().__init__(code, "locallip")
        self.log = log

    def __str__(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{last} (exit code {self.returncode}; {self.log})"


def best(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the strongest guarantee tried gave by all bounds together, of a certify.json's result."""
    by = result["composed"] or result["certified"]
    found: dict[str, Any] = by[list(by)[-1]]
    return found
