"""The command line as a user meets it: help, a whole run, Ctrl-C, and errors that are one clear line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from locallip_cuda import build_info
from locallip_cuda.experiments import checkpoint, cli
from locallip_cuda.experiments.network import load_model
from locallip_cuda.experiments.recipes import Recipe

TRAIN = ["train", "digits", "--device", "cpu", "--batch-size", "256"]


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_explains_every_number_and_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help("train", capsys)
    for field in dataclasses.fields(Recipe):
        if field.name not in ("preset", "model"):
            assert f"--{field.name.replace('_', '-')} " in text or f"--{field.name}, --no-" in text, field.name
            assert text.count(field.metadata["help"]) == 1, field.name
    assert (
        "0.1551 for cifar10-4c3f, cifar10-6c2f, cifar10-liresnet-s, cifar10-liresnet; 0.16 for tinyimagenet-8c2f"
        in text
    )
    assert "0.0001 for tinyimagenet-8c2f with (clipped-)maxmin" in text
    text = _help("certify", capsys)
    assert "(default: 50)" in text and "(default: probabilistic)" in text and "(default: 1e-9)" in text


def test_train_and_certify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main([*TRAIN, "--epochs", "3", "--eps", "1/4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        len(re.findall(r"^epoch \d/3:", printed, re.M)) == 3
        and "certified (estimate)" in printed
        and "samples/s" in printed
    )
    assert f"Certify with: locallip certify {out}" in printed
    assert list(out.glob("events.out.tfevents.*"))

    assert cli.main(["certify", str(out), "--limit", "100", "--attack-steps", "10", "--iterations", "10"]) == 0
    printed = capsys.readouterr().out
    about = "digits, clipped-relu: 100 test samples of digits, l2 radius 0.25"
    assert printed.startswith(f"Measuring {about}; guarantees: estimate, probabilistic; on cpu\n{about}\n---")
    assert f"Written: {out / 'certify.json'}, {out / 'certify.png'}\n" in printed and "no proof" in " ".join(
        printed.split()
    )
    assert "certified (probabilistic), local bound" in printed and "points" in printed
    assert not (out / "certify.partial.0.json").exists()
    assert (out / "certify.png").exists()
    values = json.loads((out / "certify.json").read_text())
    assert values["result"]["samples"] == 100 and values["result"]["eps"] == 0.25
    assert values["settings"]["guarantees"] == ["probabilistic"] and values["result"]["seed"] >= 0
    assert [sample["index"] for sample in values["result"]["per_sample"]] == list(range(100))
    assert values["command"][:3] == ["locallip", "certify", str(out)]
    assert values["recipe"]["epochs"] == 3 and values["environment"]["torch"] == torch.__version__
    beside = ["--limit", "9", "--out", str(tmp_path / "else"), "--window", "3"]
    assert cli.main(["certify", str(out / checkpoint.CHECKPOINT_NAME), *beside]) == 0
    values = json.loads((tmp_path / "else" / "certify.json").read_text())
    assert values["settings"]["window"] == 3 and len(values["result"]["composed"]) == 2
    assert "certified (probabilistic), local bound, up to 3 maps composed" in capsys.readouterr().out
    quick = ["--limit", "9", "--attack-steps", "1", "--guarantee", "estimate"]
    assert cli.main(["certify", str(out), *quick]) == 0
    again = f"Written: {out / 'certify.json'} (replaced), {out / 'certify.png'} (replaced)\n"
    assert capsys.readouterr().out.endswith(again)


def test_training_with_composed_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main([*TRAIN, "--epochs", "2", "--window", "2", "--out", str(out)]) == 0
    _, recipe, _ = load_model(out / checkpoint.CHECKPOINT_NAME)
    assert recipe.window == 2
    assert cli.main(["certify", str(out), "--limit", "20", "--attack-steps", "5", "--guarantee", "estimate"]) == 0
    assert "certified (estimate), local bound, up to 2 maps composed" in capsys.readouterr().out
    assert cli.main([*TRAIN, "--window", "2", "--radius", "global", "--out", str(tmp_path / "no")]) == 2
    assert "window is 2 and radius 'global'" in capsys.readouterr().err


def test_every_number_reaches_the_recipe(tmp_path: Path) -> None:
    given = {
        **{"activation": "clipped-maxmin", "loss": "lmt", "radius": "global", "eps": 0.11, "eps_train": 0.12},
        **{"epochs": 2, "warmup_epochs": 0.5, "rampup_epochs": 0.25, "global_epochs": 1.1, "constant_epochs": 1.5},
        **{
            "batch_size": 700,
            "learning_rate": 0.003,
            "final_learning_rate": 0.002,
            "iterations": 3,
            "sparse": 0.02,
            "window": 1,
        },
        **{"threshold_weight": 0.2, "threshold_init": 1.5, "clip_init_first": 0.3, "clip_init_last": 0.6},
        **{"crop": 2, "flip": True, "seed": 9, "evaluate_every": 2},
    }
    assert given.keys() == {f.name for f in dataclasses.fields(Recipe)} - {"preset", "model"}
    options = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    assert cli.main(["train", "digits", "--device", "cpu", "--out", str(tmp_path), *options]) == 0
    _, stored, _ = load_model(tmp_path / checkpoint.CHECKPOINT_NAME)
    assert stored.to_dict() == {"preset": "digits", "model": "", **given}


def test_ctrl_c_leaves_a_checkpoint_to_resume(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"
    command = [sys.executable, "-m", "locallip_cuda", *TRAIN, "--epochs", "2000", "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and "epoch 1/2000" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and not errors
    assert "Stopped by SIGINT in epoch" in printed
    again = f"Continue with: locallip {' '.join(TRAIN)} --epochs 2000 --out {out} --resume"
    assert again in printed
    position = checkpoint.load(out / checkpoint.CHECKPOINT_NAME)[1]["position"]
    assert f"in epoch {position['epoch'] + 1}, step {position['step']} of" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_certification_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main([*TRAIN, "--epochs", "1", "--out", str(out)]) == 0
    command = [sys.executable, "-m", "locallip_cuda", "certify", str(out), "--batch-size", "4", "--device", "cpu"]
    command += ["--limit", "48"]
    partial = out / "certify.partial.0.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert not errors and not (out / "certify.json").exists()
    if number == signal.SIGINT:
        assert process.returncode == 128 + number and "The same command goes on from what is done." in printed
    done = sum(map(len, json.loads(partial.read_text())["batches"].values()))
    assert 4 <= done < 48
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert f"{done} samples are done" in finished.stdout and not partial.exists()
    assert json.loads((out / "certify.json").read_text())["result"]["samples"] == 48


def test_a_refuted_proof_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*TRAIN, "--epochs", "2", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr("locallip_cuda.experiments.evaluation.pgd", lambda model, x, y, eps, **_: torch.zeros_like(x))
    assert cli.main(["certify", str(tmp_path), "--limit", "50", "--eps", "0.01"]) == 1
    captured = capsys.readouterr()
    assert "the attack broke samples that are proved" in captured.err and captured.err.count("\n") == 1
    assert "certified samples the attack broke" in captured.out


def test_resume_takes_the_runs_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TRAIN, "--out", str(tmp_path)]
    assert cli.main([*options, "--epochs", "1", "--eps", "0.2"]) == 0
    assert cli.main([*options, "--resume"]) == 0
    assert "has had its 1 epochs" in capsys.readouterr().out
    assert cli.main([*options, "--resume", "--eps", "0.3"]) == 2
    assert "--eps is 0.3, but the run" in capsys.readouterr().err
    assert cli.main(["train", "mnist-4c3f", "--data", ".", "--out", str(tmp_path), "--resume"]) == 2
    assert "the run in" in capsys.readouterr().err
    assert cli.main(options) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main([*options, "--epochs", "1", "--overwrite"]) == 0


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage")
    good = tmp_path / "good"
    assert cli.main([*TRAIN, "--epochs", "1", "--out", str(good)]) == 0
    capsys.readouterr()
    for arguments, message in [
        (["train", "mnist-4c3f", "--out", str(tmp_path / "m")], "mnist-4c3f needs --data DIR"),
        (["train", "mnist-4c3f", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "m")], "no such folder"),
        ([*TRAIN, "--precision", "tf32", "--out", str(tmp_path / "m")], "only GPUs have it"),
        ([*TRAIN, "--eps", "-1", "--out", str(tmp_path / "m")], "eps is -1.0"),
        ([*TRAIN, "--out", str(tmp_path / "m"), "--resume"], "no such checkpoint file"),
        ([*TRAIN, "--out", str(garbage)], "garbage"),
        (["certify", str(garbage)], "not a whole safetensors file"),
        (["certify", str(tmp_path / "no")], "no such checkpoint file"),
        (["certify", str(good), "--failure-probability", "2"], "failure_probability: got 2"),
        (["certify", str(good), "--limit", "0"], "limit is 0"),
        (["certify", str(good), "--eps", "-0.5"], "eps"),
    ]:
        assert cli.main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.err.startswith("locallip: error: ") and captured.err.count("\n") == 1, captured.err
        assert message in captured.err
    for arguments, message in [
        (["train", "cifar100"], "invalid choice: 'cifar100'"),
        ([*TRAIN, "--eps", "wide"], "'wide' is not a number"),
        (["certify", str(good), "--guarantee", "sure"], "invalid choice: 'sure'"),
        ([*TRAIN, "--device", "abacus"], "'abacus' is not a device"),
    ]:
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert cli.main([*TRAIN, "--epochs", "1", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.safetensors could not be written: No space left on device" in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"locallip_cuda {build_info()['version']}\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name, value in build_info().items():
        assert name in printed and (isinstance(value, list) or str(value) in printed)


def test_a_network_of_the_user_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "import torch.nn.functional as F\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        x = F.relu(self.conv(x) + x)\n"
        "        return self.head(F.max_pool2d(x, 2).flatten(1))\n"
    )
    monkeypatch.chdir(tmp_path)
    place = ["--model", "own_network:Net"]
    train = ["train", *place, "--dataset", "digits", "--epochs", "2", "--out", "run", "--device", "cpu"]
    assert cli.main(train) == 0
    assert "Certify with: locallip certify run --model own_network:Net" in capsys.readouterr().out
    assert cli.main(["certify", "run", *place, "--limit", "20", "--attack-steps", "3"]) == 0
    assert "own_network:Net: 20 test samples of digits" in capsys.readouterr().out
    assert cli.main([*train, "--resume"]) == 0
    for wrong, message in (
        (["certify", "run"], "model: got none, want own_network:Net"),
        (["certify", "run", "--model", "other:Net"], "model: got other:Net, want own_network:Net"),
        (["train", *place], "train takes a PRESET, or --model"),
        (["train", "digits", *place, "--dataset", "digits"], "train takes a PRESET, or --model"),
        (["train"], "train takes a PRESET, or --model"),
        (["train", "--model", "nowhere:net", "--dataset", "digits", "--out", "x"], "cannot be imported"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_certify_takes_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.rand(1, 1, 8, 8),), str(path), dynamo=False, verbose=False)
    options = ["--eps", "0.01", "--limit", "20", "--attack-steps", "2", "--iterations", "5", "--out", str(tmp_path)]
    assert cli.main(["certify", str(path), "--dataset", "digits", *options]) == 0
    assert "model.onnx: 20 test samples of digits, l2 radius 0.01" in capsys.readouterr().out
    assert json.loads((tmp_path / "certify.json").read_text())["recipe"]["model"] == "model.onnx"

    assert cli.main(["certify", str(path)]) == 2
    assert "dataset: got none for" in capsys.readouterr().err
    assert cli.main(["certify", str(tmp_path / "run"), "--dataset", "digits"]) == 2
    assert "want one for an ONNX file, none for a checkpoint" in capsys.readouterr().err
