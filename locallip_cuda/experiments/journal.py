"""Results of a long measurement, kept batch by batch: a killed one goes on where it stopped, with as many processes as
it is given then."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .distributed import Workers

NAME = "certify.partial.{}.json"  # of a process


class Journal:
    """The batches that are done, in a JSON file for each process that answers one question and no other.

    All processes of ``workers`` make theirs together, and each starts from what any of them finds: in its folder, of
    any number of processes of earlier runs, or in another one's, on a machine that does not share it.

    folder: of the files; it must exist. question: all that the results depend on, of plain JSON values; a file that
    answers another question is left out of account, and overwritten where it has this process's name.
    seed: for the first run; process 0's counts.

    batches: {index of its first sample: result of each sample}. seconds: {stage: time spent} by this process.
    seed: the one that the first run drew. ValueError where the processes ask several questions.
    """

    def __init__(self, folder: Path, question: dict[str, Any], seed: int, workers: Workers | None = None) -> None:
        self.workers = workers or Workers()
        self.path = folder / NAME.format(self.workers.rank)
        self.digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        self.batches: dict[int, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self._spent: dict[str, dict[str, float]] = {}  # by one process in one run: whoever hears of it counts it once
        self._read: list[Path] = []
        found = []
        for path in sorted(folder.glob(NAME.format("*"))):
            kept = self._kept(path)
            if kept is not None:
                self._read.append(path)
                found.append(kept)
        said = self.workers.share([self.digest, [kept["seed"] for kept in found], seed])
        if any(digest != self.digest for digest, _, _ in said):
            raise ValueError("question: got several of the processes, want one: the same command, checkpoint and data")
        self.seed = int(next((known[0] for _, known, _ in said if known), said[0][2]))
        self._take(found)
        self._take(self.workers.share(self._values()))
        self._spent[secrets.token_hex(8)] = self.seconds

    def _kept(self, path: Path) -> dict[str, Any] | None:
        """What a file has that answers the question; None for any other: nothing is lost that could be used."""
        try:
            kept = json.loads(path.read_bytes())
            if kept["question"] != self.digest:
                return None
            return {
                "seed": int(kept["seed"]),
                "batches": {int(first): [dict(result) for result in own] for first, own in kept["batches"].items()},
                "spent": {str(who): {str(k): float(v) for k, v in own.items()} for who, own in kept["spent"].items()},
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _take(self, found: Iterable[Mapping[str, Any]]) -> None:
        """What has the seed. Of a batch that a limit has cut somewhere, the longer one."""
        for kept in found:
            if kept["seed"] == self.seed:
                self._spent.update(kept["spent"])
                for first, own in kept["batches"].items():
                    if len(own) > len(self.batches.get(int(first), ())):
                        self.batches[int(first)] = own

    @property
    def samples(self) -> int:
        """How many are done."""
        return sum(map(len, self.batches.values()))

    def _values(self) -> dict[str, Any]:
        return {"question": self.digest, "seed": self.seed, "spent": self._spent, "batches": self.batches}

    def save(self) -> None:
        """Write it down; OSError when it cannot be stored."""
        write_atomically(self.path, json.dumps(self._values()).encode())

    def merged(self) -> dict[str, float]:
        """``batches`` becomes that of all processes, which call this together; the seconds of all runs of them all."""
        self._take(self.workers.share(self._values()))
        total: dict[str, float] = {}
        for own in self._spent.values():
            for stage, time in own.items():
                total[stage] = total.get(stage, 0.0) + time
        return total

    def remove(self) -> None:
        """This process's file, and those that it started from."""
        for path in (self.path, *self._read):
            path.unlink(missing_ok=True)
