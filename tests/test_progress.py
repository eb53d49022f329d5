"""What long runs say: lines without a terminal, a bar in 80 columns on one, and how long it will take."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from locallip_cuda.experiments import data, evaluation, progress, trainer
from locallip_cuda.experiments.journal import Journal
from locallip_cuda.experiments.monitor import Evaluation
from locallip_cuda.experiments.network import build_model
from locallip_cuda.experiments.progress import Pace, Progress, duration
from locallip_cuda.experiments.recipes import recipe
from locallip_cuda.experiments.trainer import Interrupted, Settings, Trainer

SHORT = recipe("digits").replace(epochs=2, batch_size=256, warmup_epochs=1, evaluate_every=2)


class Terminal(io.StringIO):
    """80 columns wide, and keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = pty.openpty()
        fcntl.ioctl(self.ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))

    def fileno(self) -> int:
        return self.ends[1]

    def isatty(self) -> bool:
        return True

    def drawn(self) -> list[str]:
        """Every state of the bar."""
        return [text for text in self.getvalue().split("\r") if text.strip()]


@contextmanager
def terminal() -> Iterator[Terminal]:
    """As stderr, its bar drawn anew at every occasion. No fixture: before a test pytest puts in its own stderr."""
    own = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", own)
        patch.setattr(progress, "REFRESH", 0.0)
        yield own
    for end in own.ends:
        os.close(end)


def test_durations() -> None:
    seconds = (0.2, 99.4, 100, 5900, 6000, 36_000, 350_000, 400_000)
    assert list(map(duration, seconds)) == ["0 s", "99 s", "2 min", "98 min", "1.7 h", "10 h", "97 h", "5 d"]


def test_pace_is_that_of_the_last_minute() -> None:
    pace = Pace(5.0, 100)
    assert pace.seconds_for(10) is None
    for step in range(50):  # cheap ones
        pace.mark(5.0 + 0.1 * (step + 1), 100 + step + 1)
    assert pace.seconds_for(10) == pytest.approx(1)
    for step in range(90):
        pace.mark(10.0 + step + 1, 150 + step + 1)
    assert pace.seconds_for(10) == pytest.approx(10)
    pace.mark(500.0, 250)  # a batch that takes longer than a minute
    assert pace.seconds_for(1) == pytest.approx(40)
    pace.mark(700.0, 250)  # nothing new
    assert pace.seconds_for(1) == pytest.approx(40)


def test_training_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an interval of nothing every step has its line, and every batch of the test set."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    Trainer(SHORT, Settings(out=tmp_path)).run()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert not captured.err
    assert [line.partition(":")[0] for line in lines] == [
        *(f"epoch 1/2, step {step}/5" for step in range(1, 6)),
        "epoch 1/2",
        *(f"epoch 2/2, step {step}/5" for step in range(1, 6)),
        "epoch 2/2",
        *["epoch 2/2, test"] * 3,
    ]
    assert re.search(r"loss [\d.]+ \(clean [\d.]+\), accuracy [\d.]+%, > \d+ s left$", lines[1])
    assert re.search(r"robust [\d.]+\), accuracy [\d.]+%, certified \(estimate\) [\d.]+%, \d+ s left$", lines[8])
    assert "samples/s, > " in lines[5] and "now the test set" not in lines[5]
    assert "learning rate" in lines[11] and lines[11].endswith("; now the test set")
    assert lines[12].startswith("epoch 2/2, test: 256 of 360 samples, ")
    assert "Lipschitz (estimate)" in lines[14] and lines[14].endswith("for 360 samples")


def test_nothing_is_read_from_the_device_where_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are read once an epoch within the first minute."""
    reads = []

    def means_of(totals: list[float]) -> dict[str, float]:
        reads.append(totals)
        return original(totals)

    original = trainer.means_of
    monkeypatch.setattr(trainer, "means_of", means_of)
    Trainer(SHORT, Settings(out=tmp_path)).run()
    assert len(reads) == 2
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "epoch 1/2",
        "epoch 2/2",
        "epoch 2/2, test",
    ]


def test_training_on_a_terminal_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "duration", lambda seconds: "23 h")
    numbers = SHORT.replace(epochs=800, warmup_epochs=798)
    run = Trainer(numbers, Settings(out=tmp_path))
    run.epoch = 798
    with terminal() as shown:
        run.run()
    drawn = shown.drawn()
    assert 75 < max(map(len, drawn)) <= 80
    bars = [text for text in drawn if re.match(r"epoch 799/800 \|.+\|", text)]
    assert re.search(r"\| loss [\d.]+, accuracy \d+%, certified \(estimate\) \d+%, 23 h left\s*$", bars[-1])
    tests = [text.rstrip() for text in drawn if text.startswith("epoch 800/800, test |")]
    assert tests[0].endswith("| 360 samples") and "| 256 of 360 samples, 23 h left" in tests[1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 800/800", "epoch 800/800, test"]


def test_the_fullest_bar_fits() -> None:
    means = {"loss": 9.99, "accuracy": 1.0, "robust": 1.0, "certified_estimate": 0.994}
    with terminal() as shown, Progress(10, 5, silent=False) as own:
        own.show("epoch 800/800", f"{trainer._short_line(means)}, 23 h left")
    assert max(map(len, shown.drawn())) <= 80
    assert any(text.rstrip().endswith("certified (estimate) 99%, 23 h left") for text in shown.drawn())


def test_time_left_is_of_steps_and_looks(tmp_path: Path) -> None:
    numbers = dataclasses.replace(SHORT, epochs=10, warmup_epochs=1, global_epochs=2, evaluate_every=4)
    run = Trainer(numbers, Settings(out=tmp_path))
    pace = Pace(0.0, 0)
    assert run._time_left(pace) == ""
    pace.mark(10.0, 5)
    run.look_seconds = 1.0
    for epoch, step, left in (
        (0, 5, "> 93 s"),  # 45 steps of two seconds, three looks
        (1, 0, "> 93 s"),
        (1, 3, "> 87 s"),  # by the global bound
        (2, 3, "77 s"),
        (4, 0, "62 s"),  # one look is done
        (9, 5, "1 s"),
    ):
        run.epoch, run.step = epoch, step
        assert run._time_left(pace) == f", {left} left", (epoch, step)


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal() as shown, Progress(10, 0, silent=True) as own, own.showing(lambda: ("here", "there")):
        assert not own.due() and not own.terminal
        own.line("a line")
    captured = capsys.readouterr()
    assert not captured.out and not captured.err and not shown.getvalue()


def _measure(folder: Path, quiet: bool) -> evaluation.Measurement:
    settings: dict[str, Any] = {"attack_steps": 2, "iterations": 5, "batch_size": 16}
    dataset = data.load("digits", train=False)[:48]
    return evaluation.measure(build_model(SHORT), dataset, 0.01, Journal(folder, settings, 0), quiet=quiet, **settings)


def test_certifying_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    _measure(tmp_path, quiet=True)
    assert not capsys.readouterr().out
    (tmp_path / "else").mkdir()
    _measure(tmp_path / "else", quiet=False)
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.splitlines()
    assert all(re.fullmatch(r"\d+/48 samples: [\w ]*(, \d+ s left)?", line) for line in lines)
    assert any(line.startswith("0/48 samples: attack") for line in lines)
    assert any(re.match(r"16/48 samples: [\w ]+, \d+ s left", line) for line in lines)


def test_counting_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with progress.counting("auditing", 4, silent=False) as count_up:
        for _ in range(4):
            time.sleep(0.1)
            count_up(1)
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.splitlines()
    assert lines[0] == "0/4 samples: auditing"
    assert all(re.fullmatch(r"[0-4]/4 samples: auditing(, \d+ s left)?", line) for line in lines)
    assert any(line.startswith("2/4 samples: auditing, ") for line in lines)


def test_certifying_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal() as shown:
        progress.REFRESH = 0.001
        _measure(tmp_path, quiet=False)
    assert not capsys.readouterr().out
    drawn = shown.drawn()
    assert 75 < max(map(len, drawn)) <= 80
    assert any(re.match(r"16/48 samples \|#.*\| [\w ]+, \d+ s left", text) for text in drawn)


def test_a_missing_tensorboard_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    original = Trainer._train_step

    def stop(self: Trainer, *inputs: Any) -> None:
        original(self, *inputs)
        if self.epoch == 1 and self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_train_step", stop)
        Trainer(SHORT, Settings(out=tmp_path)).run()
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1
    Trainer(SHORT, Settings(out=tmp_path, resume=True)).run()
    assert "tensorboard" not in capsys.readouterr().out


def test_names_are_the_same_in_history_and_log(tmp_path: Path) -> None:
    run = Trainer(SHORT, Settings(out=tmp_path))
    run.run()
    tests = {f"test_{field.name}" for field in dataclasses.fields(Evaluation)}
    assert tests == {"test_accuracy", "test_certified_estimate", "test_lipschitz_estimate"}
    assert tests <= run.history[1].keys() and not tests & run.history[0].keys()
    assert {name.removeprefix("test_") for name in tests} <= run.history[0].keys()
    fields = {field.name for field in dataclasses.fields(evaluation.Measurement)}
    assert {"accuracy", "lipschitz_estimate"} <= fields
    assert torch.tensor([*run.history[1].values()]).isfinite().all()
