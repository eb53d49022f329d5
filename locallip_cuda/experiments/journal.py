"""Results of a long measurement, kept sample by sample: a killed one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically


class Journal:
    """The samples that are done, in a JSON file that answers one question and no other.

    path: the file; its folder must exist. question: all that the results depend on, of plain JSON values; a file that
    answers another question is left out of account and overwritten.

    samples: {index: result}. seconds: {stage: time spent}, over all runs. seed: the one the first run drew.
    """

    def __init__(self, path: Path, question: dict[str, Any], seed: int) -> None:
        self.path = path
        self.digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        self.samples: dict[int, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.seed = seed
        try:
            kept = json.loads(path.read_bytes())
            if kept["question"] != self.digest:
                return
            samples = {int(index): dict(result) for index, result in kept["samples"].items()}
            self.seconds, self.seed = {str(k): float(v) for k, v in kept["seconds"].items()}, int(kept["seed"])
            self.samples = samples
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return  # none, or not one of these: nothing is lost that could be used

    def save(self) -> None:
        """Write it down; OSError when it cannot be stored."""
        values = {"question": self.digest, "seed": self.seed, "seconds": self.seconds, "samples": self.samples}
        write_atomically(self.path, json.dumps(values).encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
