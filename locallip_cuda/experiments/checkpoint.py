"""Checkpoints: tensors and a JSON configuration in one safetensors file, written atomically. No pickle anywhere.

A file holds named tensors and, in its metadata, the configuration as JSON and a CRC-32 over both, so that a torn or
bit-rotten file is told from a good one. It is written beside its final name, flushed to the disk and renamed over the
old one: at any moment the name holds a whole checkpoint, the previous or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

CHECKPOINT_NAME = "checkpoint.safetensors"  # in the folder of a run
FORMAT = "locallip-cuda checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names the file and what is wrong with it."""


def in_folder(path: Path) -> Path:
    """The checkpoint's file: ``path`` itself, or the one in it where it is the folder of a run."""
    return path / CHECKPOINT_NAME if path.is_dir() else path


def make_folder(path: Path) -> None:
    """Make the folder ``path`` where there is none, and see that files can be written there: before a long run.

    NotADirectoryError, PermissionError or another OSError that says what is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"out: got {path}, which a file is in the way of, want a folder") from error
    except OSError as error:
        raise type(error)(f"out: got {path}, which cannot be made ({error.strerror}), want another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"out: got {path}, where nothing can be written, want another folder")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step; on any failure the old file stays and nothing is left beside it.

    OSError, with the cause's errno and a message that names ``path``, when the data cannot be stored.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "; the previous file is kept as it was" if path.exists() else ""
            raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}{kept}") from error
        raise
    # The rename itself survives a power cut only once the folder is on the disk too; some file systems refuse this.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checksum(tensors: Mapping[str, Tensor], config: str) -> str:
    value = zlib.crc32(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write ``tensors`` (any device, dtype and layout) and ``config`` (JSON values) to ``path``, atomically.

    OSError when they cannot be stored; the previous file at ``path`` is then still there, whole.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(config)
    metadata = {"format": FORMAT, "version": str(VERSION), "config": text, "crc32": _checksum(stored, text)}
    write_atomically(Path(path), safetensors.torch.save(stored, metadata))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the configuration that ``save`` wrote to ``path``.

    CheckpointError, naming the file and what is wrong with it, when it is missing, torn, damaged or foreign.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: a safetensors file, but not one that locallip wrote")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{path}: checkpoint of version {metadata.get('version')}; this program reads version {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    text = metadata.get("config", "")
    if metadata.get("crc32") != _checksum(tensors, text):
        raise CheckpointError(f"{path}: damaged, its contents do not match its checksum")
    config = json.loads(text)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its configuration is a {type(config).__name__}, not an object")
    return tensors, config


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix/``, under the rest of their names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + "/")}


def load_into(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy ``weights`` into ``module``. CheckpointError naming the first tensor that is missing or does not fit."""
    own = module.state_dict()
    for name in [*own, *weights]:
        if name not in weights:
            raise CheckpointError(f"{path}: has no tensor {name!r}, which the model needs")
        if name not in own:
            raise CheckpointError(f"{path}: has a tensor {name!r}, which the model does not know")
        if own[name].shape != weights[name].shape or own[name].dtype != weights[name].dtype:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {weights[name].dtype} {tuple(weights[name].shape)}, "
                f"the model has {own[name].dtype} {tuple(own[name].shape)}"
            )
    module.load_state_dict(dict(weights))
