"""Several processes certify as one does: killed, stopped, resumed by another number of them, with and without a folder
that all of them see. `python -m tests.kill_certify --kills 20` kills more."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import kill_certify
import pytest

from locallip_cuda.experiments.distributed import Workers
from locallip_cuda.experiments.journal import Journal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    kill_certify.train(path)
    return path


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    kill_certify.finished(kill_certify.start(checkpoint, [folder]))
    return folder


def test_killed_processes_lose_nothing(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    found = kill_certify.disturbed(checkpoint, tmp_path, 2, random.Random(1))
    assert len(found) == 2 and 0 < found[0] < found[1] < kill_certify.LIMIT
    assert kill_certify.results(tmp_path) == kill_certify.results(whole)
    proofs = kill_certify.results(whole)["result"]["certified"]["probabilistic"]
    assert proofs["accuracy"] > 0 and proofs["tried"] < kill_certify.LIMIT
    assert not list(tmp_path.glob("certify.partial.*"))


def test_machines_that_share_no_folder(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """Each keeps its own; stopped by Ctrl-C, and started again in another order, they put together what both have."""
    folders = [tmp_path / "one", tmp_path / "other"]
    processes = kill_certify.start(checkpoint, folders)
    while not all(kill_certify.kept([folder]) for folder in folders):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(60)
        assert process.exitcode == 128 + signal.SIGINT
    assert "Stopped. The same command goes on" in (folders[0] / "0.printed").read_text()
    done = [kill_certify.kept([folder]) for folder in folders]
    kill_certify.finished(kill_certify.start(checkpoint, folders[::-1]))
    assert f"Going on: {sum(done)} samples are done." in (folders[1] / "0.printed").read_text()
    assert kill_certify.results(folders[1]) == kill_certify.results(whole)
    assert not (folders[0] / "certify.json").exists()
    assert not [path for folder in folders for path in folder.glob("certify.partial.*")]


def test_who_loses_another_says_so(checkpoint: Path, tmp_path: Path) -> None:
    first, second = kill_certify.start(checkpoint, [tmp_path, tmp_path], limit=24)
    while not kill_certify.kept([tmp_path]):
        time.sleep(0.01)
    second.kill()
    first.join(60)
    assert first.exitcode == 1 and kill_certify.kept([tmp_path]) >= 4
    printed = (tmp_path / "0.printed").read_text()
    assert "error: another of the 2 processes has ended" in printed and "goes on from what is done" in printed
    assert printed.startswith("Measuring ") and printed.count("\n") == 2


def test_what_was_read_twice_counts_once(tmp_path: Path) -> None:
    """Two processes' files that a third one starts from; the longer batch counts, another question's does not."""
    ranks = [Workers() for _ in range(3)]
    for rank, workers in enumerate(ranks):
        workers.rank = rank
    first = Journal(tmp_path, {"eps": 0.1}, 7, ranks[0])
    first.batches[4], first.seconds["clean"] = [{"label": 1}, {"label": 2}], 2.0
    first.save()
    second = Journal(tmp_path, {"eps": 0.1}, 8, ranks[1])
    assert second.seed == 7 and second.batches == first.batches
    second.batches[8], second.seconds["clean"] = [{"label": 3}], 0.5
    second.save()
    other = Journal(tmp_path, {"eps": 0.2}, 9, ranks[2])
    other.batches[12] = [{"label": 4}]
    other.save()
    third = Journal(tmp_path, {"eps": 0.1}, 8, Workers())
    third.seconds["clean"] = 0.25
    assert third.samples == 3 and third.batches == {4: [{"label": 1}, {"label": 2}], 8: [{"label": 3}]}
    assert third.merged() == {"clean": 2.75} and third.merged() == {"clean": 2.75}
    third.batches[4] = [{"label": 5}]
    third.save()
    assert Journal(tmp_path, {"eps": 0.1}, 8, ranks[0]).batches[4] == [{"label": 1}, {"label": 2}]
    third.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["certify.partial.2.json"]
