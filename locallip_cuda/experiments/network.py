"""The network of a recipe: with fresh weights, or with those of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..interchange import from_onnx
from . import checkpoint, models
from .checkpoint import CheckpointError
from .recipes import OF_DATA, Recipe, recipe


def build_model(chosen: Recipe) -> nn.Module:
    """The recipe's network with fresh weights from its seed (torch's global generator is seeded)."""
    torch.manual_seed(chosen.seed)
    return models.imported(chosen.model) if chosen.model else _of_preset(chosen)


def _of_preset(chosen: Recipe) -> nn.Module:
    return models.build(
        chosen.preset,
        chosen.activation,
        threshold=chosen.threshold_init,
        clip=(chosen.clip_init_first, chosen.clip_init_last),
    )


def load_model(path: Path, model: str = "", dataset: str | None = None) -> tuple[nn.Module, Recipe, dict[str, Any]]:
    """The network, the recipe and the whole configuration of a checkpoint. CheckpointError when it is unusable.

    ``model``: where to import the network from, if it is none of the presets'. What a checkpoint says of that is
    compared with it, and never imported for itself. ValueError where they differ. ``dataset``: of an ONNX file, which
    has no recipe but the numbers of the preset for that data.
    """
    if (path.suffix == ".onnx") != (dataset is not None):
        raise ValueError(
            f"dataset: got {dataset or 'none'} for {path}, want one for an ONNX file, none for a checkpoint"
        )
    if dataset is not None:
        return from_onnx(path), recipe(OF_DATA[dataset]).replace(model=path.name), {"position": {"epoch": None}}
    weights, stored, config = _read(path)
    if stored.model != model:
        raise ValueError(f"model: got {model or 'none'}, want {stored.model or 'none'}, which {path} was trained with")
    network = build_model(stored)
    checkpoint.load_into(network, weights, path)
    return network.eval(), stored, config


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The network of a training run by ``locallip train``, in eval mode.

    Args:
        path: a checkpoint, or the folder of a run.
        model: the network to copy the weights into, which is the one returned, on whatever device it is; by default
            the preset's is built, on the CPU. A run of ``--model`` needs it: what a checkpoint says of where its
            network is to be imported from is never followed.

    Raises:
        CheckpointError (a ValueError): no file, one that is torn, damaged or foreign, or one whose tensors do not have
            the names, shapes and dtypes of ``model``'s; ``model`` is then as it was.
        ValueError: no ``model`` for a run of ``--model``.
        TypeError: a ``model`` that is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module or None")
    path = checkpoint.in_folder(Path(path))
    weights, stored, _ = _read(path)
    if model is None:
        if stored.model:
            raise ValueError(f"model: got None, want the network of {stored.model}, which {path} was trained with")
        model = _of_preset(stored)  # torch's generator is the caller's, and not seeded here
    checkpoint.load_into(model, weights, path)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, Tensor], Recipe, dict[str, Any]]:
    """The network's tensors, the recipe and the whole configuration."""
    tensors, config = checkpoint.load(path)
    try:
        stored = Recipe.from_dict(config["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration is not a training run's ({error})") from error
    return checkpoint.group(tensors, "model"), stored, config
