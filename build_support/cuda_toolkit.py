"""Whether to compile the CUDA part, and with which toolkit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Toolkit(NamedTuple):
    home: Path
    version: str  # "13.0"


class NoCuda(Exception):
    """Why there is no CUDA part."""


def choose_toolkit(torch_version: str, torch_cuda: str | None) -> Toolkit:
    """The toolkit to compile with. Raises NoCuda with the reason, or ends the build where LOCALLIP_CUDA=1 forbids that.

    torch_cuda is torch.version.cuda, None for a torch without CUDA.
    """
    wish = os.environ.get("LOCALLIP_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"LOCALLIP_CUDA={wish!r}: expected 1 (CUDA build), 0 (CPU build), or unset (CUDA where it can be).")
    if wish == "0":
        raise NoCuda("LOCALLIP_CUDA=0 was set for the build")
    try:
        if torch_cuda is None:
            raise NoCuda(f"torch {torch_version} was built without CUDA")
        return find_toolkit(torch_cuda)
    except NoCuda as reason:
        if wish == "1":
            sys.exit(f"LOCALLIP_CUDA=1 asks for the CUDA part, but {reason}. Install what is missing or unset it.")
        raise


def find_toolkit(torch_cuda: str) -> Toolkit:
    """The first toolkit of torch's CUDA major version: CUDA_HOME, CUDA_PATH, nvcc on PATH, the standard places."""
    passed_over = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            if toolkit := open_toolkit(Path(value)):
                if major(toolkit.version) != major(torch_cuda):
                    raise NoCuda(
                        f"{variable}={value} is a CUDA {toolkit.version} toolkit and torch was built with CUDA "
                        f"{torch_cuda}: the major versions must be the same"
                    )
                return toolkit
            passed_over.append(f"{variable}={value} lacks bin/nvcc or include/cuda_runtime.h")

    for home in [*roots_of_nvcc_on_path(), *standard_places(torch_cuda)]:
        if toolkit := open_toolkit(home):
            if major(toolkit.version) == major(torch_cuda):
                return toolkit
            passed_over.append(f"{toolkit.home} is CUDA {toolkit.version}")
    reason = f"no toolkit for torch's CUDA {torch_cuda} was found (bin/nvcc and include/cuda_runtime.h)"
    if passed_over:
        reason += f"; passed over: {', '.join(dict.fromkeys(passed_over))}"
    raise NoCuda(reason)


def open_toolkit(home: Path) -> Toolkit | None:
    """The toolkit at home, None where nvcc or the headers are not there."""
    nvcc = home / "bin" / "nvcc"
    headers = [home / "include", *home.glob("targets/*/include")]
    if not os.access(nvcc, os.X_OK) or not any((folder / "cuda_runtime.h").is_file() for folder in headers):
        return None
    found = re.search(r"release (\d+\.\d+)", output_of([str(nvcc), "--version"]))
    return Toolkit(home, found[1]) if found else None


def roots_of_nvcc_on_path() -> list[Path]:
    """Where the toolkit of the nvcc on PATH may lie. A wrapper lies elsewhere, but nvcc itself knows its place."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    roots = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
    own = re.search(r"^#\$ TOP=(.+)$", output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]), re.MULTILINE)
    return [*roots, Path(own[1].strip()).resolve()] if own else roots


def standard_places(torch_cuda: str) -> list[Path]:
    versioned = sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return [Path(f"/usr/local/cuda-{torch_cuda}"), Path("/usr/local/cuda"), *versioned, Path("/opt/cuda")]


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def major(version: str) -> str:
    return version.split(".")[0]
