"""``locallip info``: what the extension was built for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ...build_info import build_info


def add(commands: Any) -> None:
    info = commands.add_parser("info", help="say what the extension was built for")
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    for name, value in build_info().items():
        print(f"{name:<14}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    print(f"{'GPU':<14}{torch.cuda.get_device_name() if torch.cuda.is_available() else None}")
    return 0
