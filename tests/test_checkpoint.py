"""Checkpoints: what is written comes back, and whatever is damaged, foreign or cannot be stored is a clear error."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from locallip_cuda.experiments import checkpoint
from locallip_cuda.experiments.checkpoint import CheckpointError

CONFIG = {"name": "Größe", "numbers": [1, 2.5, 0.1 + 0.2], "nested": {"flag": True, "none": None}}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model/weight": torch.randn(4, 6, generator=generator).t(),
        "model/double": torch.randn(3, dtype=torch.float64, generator=generator),
        "optimiser/step": torch.tensor(7.0),
        "random/cpu/0": torch.get_rng_state(),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, _tensors(), CONFIG)
    return path


def test_what_is_saved_comes_back(saved: Path) -> None:
    tensors, config = checkpoint.load(saved)
    assert config == CONFIG
    assert tensors.keys() == _tensors().keys()
    for name, value in _tensors().items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name
    assert set(checkpoint.group(tensors, "model")) == {"weight", "double"}
    assert os.listdir(saved.parent) == [saved.name]


def test_any_change_of_one_byte_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    for position in [*range(0, len(whole), 97), 0, len(whole) - 1]:
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=saved.name):
            checkpoint.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_torn_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"{saved.name}: not a whole safetensors file"):
        checkpoint.load(saved)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("unpickled",)


def test_a_foreign_file_is_refused_and_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "foreign"
    with pytest.raises(CheckpointError, match="foreign: no such checkpoint file"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(path)
    torch.save({"weight": _Trap()}, path)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(path)
    assert not (tmp_path / "unpickled").exists()
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not one that locallip wrote"):
        checkpoint.load(path)
    safetensors.torch.save_file({"w": torch.zeros(3)}, path, {"format": checkpoint.FORMAT, "version": "99"})
    with pytest.raises(CheckpointError, match="version 99"):
        checkpoint.load(path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_keeps_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, failing, full)
    with pytest.raises(OSError, match=rf"{saved.name} could not be written: No space left.*previous file is kept") as e:
        checkpoint.save(saved, {"x": torch.zeros(5)}, {})
    assert e.value.errno == errno.ENOSPC
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_an_interrupted_write_keeps_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, {"x": torch.zeros(5)}, {})
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_write_that_the_system_cuts_short_keeps_the_previous_checkpoint(saved: Path) -> None:
    before = saved.read_bytes()
    # The kernel itself refuses to let the file grow past the limit, in the middle of the data.
    code = (
        "import resource, signal, sys, torch\n"
        "from locallip_cuda.experiments import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "checkpoint.save(sys.argv[1], {'x': torch.zeros(100_000)}, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode != 0 and "could not be written: File too large" in done.stderr
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    checkpoint.load_into(model, good, "file")
    assert torch.equal(model.weight, torch.ones(2, 3))
    for weights, message in [
        ({"weight": torch.ones(2, 3)}, "file: has no tensor 'bias'"),
        ({**good, "scale": torch.ones(1)}, "file: has a tensor 'scale'"),
        ({**good, "weight": torch.ones(3, 2)}, r"file: tensor 'weight' is torch.float32 \(3, 2\)"),
        ({**good, "bias": torch.ones(2, dtype=torch.float64)}, "file: tensor 'bias' is torch.float64"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_into(model, weights, "file")


def test_a_folder_that_cannot_be_is_told_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=f"out: got {path}, which a file is in the way of, want a folder"):
            checkpoint.make_folder(path)
    checkpoint.make_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for another user: root may write anywhere
    with pytest.raises(PermissionError, match=f"out: got {tmp_path}, where nothing can be written"):
        checkpoint.make_folder(tmp_path)


def test_why_a_folder_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match=r"which cannot be made \(Permission denied\), want another folder"):
        checkpoint.make_folder(tmp_path / "new")
