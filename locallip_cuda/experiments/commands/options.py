"""Options that several commands have, and what they say."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ...build_info import build_info
from .. import models
from ..recipes import PRESETS, Recipe, recipe

NO_PLOT = 'No plot: matplotlib is not installed (pip install "locallip-cuda[plot]").'


def number(text: str) -> float:
    """A number, also as a fraction such as 36/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} asked for, but torch sees no GPU here")
    return found


def choose_device(asked: torch.device | None, local_rank: int = 0) -> torch.device:
    """The device asked for, or a GPU where there is one and the extension has a CUDA part; made the current one."""
    if asked is None:
        asked = torch.device("cuda" if build_info()["cuda"] and torch.cuda.is_available() else "cpu")
    if asked.type != "cuda":
        return asked
    chosen = torch.device("cuda", local_rank if asked.index is None else asked.index)
    torch.cuda.set_device(chosen)
    return chosen


def check_data(preset: str, folder: Path | None) -> None:
    name = models.spec(preset).data
    if folder is None and name != "digits":
        raise ValueError(f"{preset} needs --data DIR, the folder that holds the files of {name}")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _defaults(name: str) -> str:
    """The default of a recipe number as ``--help`` shows it: one value, or each with the presets that have it."""
    users: dict[str, list[str]] = {}
    for preset in PRESETS:
        own = getattr(recipe(preset), name)
        users.setdefault(_show(own), []).append(preset)
        maxmin = getattr(recipe(preset, "clipped-maxmin"), name)
        if name != "activation" and maxmin != own:
            users.setdefault(_show(maxmin), []).append(f"{preset} with (clipped-)maxmin")
    if len(users) == 1:
        return next(iter(users))
    return "; ".join(f"{value} for {', '.join(presets)}" for value, presets in users.items())


def add_recipe_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    group = parser.add_argument_group("the recipe's numbers", "Each has the preset's value unless given here.")
    types = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in ("preset", "model", *without):
            continue
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {_defaults(field.name)})".replace("%", "%%"),
        }
        kind = types[field.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" in field.metadata:
            options["choices"] = field.metadata["choices"]
        else:
            options["type"] = number if kind is float else kind
            options["metavar"] = "X" if kind is float else "N"
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a network of yours in place of a preset's: a function of no arguments that returns it",
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets; digits needs none")


def add_eps_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eps", type=number, metavar="X", help="l2 radius, images in [0, 1] (default: the recipe's)")


def add_limit_option(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    said = "all" if default is None else default
    parser.add_argument(
        "--limit", type=int, default=default, metavar="N", help=f"only the first N test samples (default: {said})"
    )


def add_attack_steps_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attack-steps", type=int, default=100, metavar="N", help="steps of the attack, each eps / 4 (default: 100)"
    )


def add_batch_size_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one)")
