"""The network of a recipe: with fresh weights, or with those of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..interchange import from_onnx
from . import checkpoint, models
from .checkpoint import CheckpointError
from .recipes import OF_DATA, Recipe, recipe


def build_model(chosen: Recipe) -> nn.Module:
    """The recipe's network with fresh weights from its seed (torch's global generator is seeded)."""
    torch.manual_seed(chosen.seed)
    if chosen.model:
        return models.imported(chosen.model)
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
    tensors, config = checkpoint.load(path)
    try:
        stored = Recipe.from_dict(config["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration is not a training run's ({error})") from error
    if stored.model != model:
        raise ValueError(f"model: got {model or 'none'}, want {stored.model or 'none'}, which {path} was trained with")
    network = build_model(stored)
    checkpoint.load_into(network, checkpoint.group(tensors, "model"), path)
    return network.eval(), stored, config
