"""PEP 517 and 660 backend: setuptools, compiling against the torch of the environment that is installed into.

A C++ extension works only with the torch minor release it was compiled against. A plain ``requires = ["torch"]`` would
fetch the newest torch into the isolated build environment, and the result would not load beside the user's. pip runs
the hooks with the user's own interpreter and hides its site-packages; this backend looks there for torch, and asks for
one only where there is none.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist

TORCH_RANGE = ">=2.11,<2.15"
OLDEST, NEWEST = (2, 11), (2, 14)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def environment_path() -> list[str]:
    """sys.path of this interpreter as its user sees it, build isolation lifted."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    run = subprocess.run(command, env=environ, cwd=sys.prefix, stdout=subprocess.PIPE, text=True, check=True)
    return [entry for entry in json.loads(run.stdout.splitlines()[-1]) if entry]


def expose_torch() -> str | None:
    """Make the environment's torch importable, behind all that is importable already.

    Returns its version, or None where there is no torch. Stops the build where the version is out of range.
    """
    for hidden in ([], [entry for entry in environment_path() if entry not in sys.path]):
        for torch in importlib.metadata.distributions(name="torch", path=[*sys.path, *hidden]):
            release = torch_minor(torch.version)
            if not OLDEST <= release <= NEWEST:
                sys.exit(
                    f"locallip-cuda needs torch{TORCH_RANGE}, but this environment has torch {torch.version} "
                    f"(in {torch.locate_file('')}). Install a torch in that range first, for example "
                    f'pip install "torch{TORCH_RANGE}", or use a fresh virtual environment.'
                )
            sys.path += hidden
            return torch.version
    return None


def torch_minor(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        sys.exit(f"locallip-cuda cannot read the torch version {version!r} of this environment.")
    return int(match[1]), int(match[2])


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [] if expose_torch() else [f"torch{TORCH_RANGE}"]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def with_torch(hook: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> str:
        if expose_torch() is None:
            sys.exit(
                "locallip-cuda compiles against torch, and this environment has none. Install torch"
                f"{TORCH_RANGE} first, or leave out --no-build-isolation."
            )
        return hook(*args, **kwargs)

    return wrapped


@with_torch
def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    # setuptools copies into build/lib* and packs all that lies there, modules that were since renamed or deleted too.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


prepare_metadata_for_build_wheel = with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = with_torch(build_meta.prepare_metadata_for_build_editable)
build_editable = with_torch(build_meta.build_editable)
