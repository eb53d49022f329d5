"""`locallip compare`: its commands are its rows, it goes on where it was, and a run that fails takes no other along."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

from locallip_cuda.experiments import cli, comparison, comparison_report
from locallip_cuda.experiments.commands import train
from locallip_cuda.experiments.recipes import PRESETS, recipe

SMALL = ["--epochs", "1", "--batch-size", "512", "--limit", "20", "--attack-steps", "2"]


@pytest.mark.parametrize("preset", PRESETS)
def test_commands_are_the_rows(preset: str, tmp_path: Path) -> None:
    given = {"epochs": 40, "flip": not recipe(preset).flip, "eps": 36 / 255}
    base = recipe(preset).replace(**given)
    more = {"given": given, "training": ["--precision", "fp32"], "certifying": ["--limit", "5"]}
    found = comparison.runs(list(comparison.ROWS), [0, 3], base, tmp_path, **more)
    assert len({run.folder for run in found}) == len(found) == 2 * len(comparison.ROWS)
    for run in found:
        parsed = cli.parser().parse_args(run.train)
        assert train.recipe_of(parsed, run.folder) == run.recipe == comparison.ROWS[run.row].recipe(base, run.seed)
        assert parsed.out == run.folder and cli.parser().parse_args(run.certify).checkpoint == run.folder


def test_rows_are_what_they_say() -> None:
    base = recipe("digits").replace(epochs=30)
    rows = {name: row.recipe(base, 1) for name, row in comparison.ROWS.items()}
    for name in ("gloro", "bcp", "lmt", "emma", "crm"):
        assert rows[name].loss == name and rows[name].global_epochs == 30 and rows[name].window == 1
    assert rows["plain"].kappa(29.99) == 1 and rows["plain"].radius_at(29.99) == 0
    assert rows["local"] == base.replace(seed=1, evaluate_every=3)
    assert rows["composed"].window > 1 and rows["composed"].global_epochs == 0
    assert rows["liplt"].window > 1 and rows["liplt"].global_epochs == 30
    assert {row.epochs for row in rows.values()} == {30} and {row.batch_size for row in rows.values()} == {64}


def test_compares_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    command = ["compare", "digits", *SMALL, "--device", "cpu", "--seeds", "0", "1", "--out", str(out)]
    assert cli.main([*command, "--rows", "gloro"]) == 0
    first = json.loads((out / "compare.json").read_text())
    printed = capsys.readouterr().out
    assert "2 runs" in printed and "gloro: GloRo: global product" in printed and "composed: " not in printed

    seeds = first["rows"]["gloro"]["seeds"]
    assert set(seeds) == {"0", "1"}
    for seed, own in seeds.items():
        values = json.loads((out / "gloro" / f"seed-{seed}" / "certify.json").read_text())
        assert own["accuracy"] == values["result"]["accuracy"] and values["result"]["samples"] == 20
        assert own["certified"] == values["result"]["certified"]["probabilistic"]["accuracy"]
        assert own["memory"] > 2**27 and own["seconds_a_step"] == own["seconds"] / 2
        assert [record["epoch"] for record in own["history"]] == [1] and own["history"][0]["seconds"] > 0
        assert own["curve_estimate"][0] == [0, own["accuracy"]]
    row = next(line for line in printed.splitlines() if line.startswith("gloro  "))
    assert f"{100 * fmean(own['accuracy'] for own in seeds.values()):.2f} %" in row
    page = (out / "compare.md").read_text()
    assert f"    locallip certify {out / 'gloro' / 'seed-1'}" in page and page.count("    locallip train digits") == 2

    done = {path: path.stat().st_mtime_ns for path in out.glob("gloro/*/*") if path.is_file()}
    assert cli.main([*command, "--rows", "gloro", "composed"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing of it was made again
    second = json.loads((out / "compare.json").read_text())["rows"]
    assert second["gloro"] == first["rows"]["gloro"] and set(second) == {"gloro", "composed"}
    assert (out / "compare.png").stat().st_size > 10_000

    capsys.readouterr()
    other = [*command, "--rows", "gloro", "--learning-rate", "0.001"]  # what is done is of another recipe
    assert cli.main(other) == 1
    assert "--learning-rate is 0.001, but the run in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done if path.suffix != ".log"} == {
        path: time for path, time in done.items() if path.suffix != ".log"
    }


def test_a_run_that_fails_takes_no_other_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "gloro" / "seed-0" / "checkpoint.safetensors"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    command = ["compare", "digits", *SMALL, "--device", "cpu", "--seeds", "0", "--out", str(tmp_path)]
    assert cli.main([*command, "--rows", "gloro", "plain"]) == 1
    printed = capsys.readouterr()
    assert printed.err.strip() == "locallip: error: 1 of 2 runs failed: gloro, seed 0"
    assert f"gloro, seed 0: failed. {torn}: not a whole safetensors file" in printed.out
    assert torn.read_bytes() == b"torn"
    assert list(json.loads((tmp_path / "compare.json").read_text())["rows"]) == ["plain"]


def test_stopped_it_goes_on(tmp_path: Path) -> None:
    """Where it was: the epochs before the stop are not trained again."""
    options = ["--epochs", "60", "--batch-size", "512", "--limit", "20", "--attack-steps", "2", "--out", str(tmp_path)]
    program = [sys.executable, "-m", "locallip_cuda"]
    command = [*program, "compare", "digits", "--device", "cpu", "--seeds", "0", "--rows", "gloro", "local", *options]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folders = [tmp_path / row / "seed-0" for row in ("gloro", "local")]
    logs = [folder / "train.log" for folder in folders]
    deadline = time.monotonic() + 240
    while not any(log.exists() and "epoch 3/" in log.read_text() for log in logs):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    printed, _ = started.communicate(timeout=240)
    assert started.returncode == 128 + signal.SIGINT and "The same command goes on" in printed
    assert any("Stopped by SIGTERM" in log.read_text() for log in logs if log.exists())
    assert not list(tmp_path.glob("compare.*"))

    again = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    assert "gloro, seed 0: " in again.stdout and f"Written: {tmp_path / 'compare.md'}" in again.stdout
    for log in logs:
        assert log.read_text().count("epoch 3/60: ") == 1 and log.read_text().count("epoch 60/60: ") == 1


def test_errors_name_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
    ):
        assert cli.main(["compare", "digits", "--out", str(tmp_path), *wrong]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["compare", "mnist-4c3f", "--out", str(tmp_path)]) == 2
    assert "mnist-4c3f needs --data DIR" in capsys.readouterr().err


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert not comparison_report.plot(tmp_path / "compare.png", {}, "", 0.3)
    assert not list(tmp_path.iterdir())
