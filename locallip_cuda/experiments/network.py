"""The network of a recipe: with fresh weights, or with those of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, models
from .checkpoint import CheckpointError
from .recipes import Recipe


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's network with fresh weights from its seed (torch's global generator is seeded)."""
    torch.manual_seed(recipe.seed)
    if recipe.model:
        return models.imported(recipe.model)
    return models.build(
        recipe.preset,
        recipe.activation,
        threshold=recipe.threshold_init,
        clip=(recipe.clip_init_first, recipe.clip_init_last),
    )


def load_model(path: Path, model: str = "") -> tuple[nn.Module, Recipe, dict[str, Any]]:
    """The network, the recipe and the whole configuration of a checkpoint. CheckpointError when it is unusable.

    ``model``: where to import the network from, if it is none of the presets'. What a checkpoint says of that is
    compared with it, and never imported for itself. ValueError where they differ.
    """
    tensors, config = checkpoint.load(path)
    try:
        recipe = Recipe.from_dict(config["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration is not a training run's ({error})") from error
    if recipe.model != model:
        raise ValueError(f"model: got {model or 'none'}, want {recipe.model or 'none'}, which {path} was trained with")
    network = build_model(recipe)
    checkpoint.load_into(network, checkpoint.group(tensors, "model"), path)
    return network.eval(), recipe, config
