"""The emulation that the CUDA kernels are tested on notices what is wrong. The kernels: `python -m tests.emulation`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.emulation import build

# in the order of faults.cu, with what tells them; the first is none
FAULTS = {
    "none": "",
    "missing barrier": "wrong in",
    "missing warp barrier": "wrong in",
    "write past shared memory": "heap-buffer-overflow",
    "write past global memory": "heap-buffer-overflow",
    "missing wait for a copy": "wrong in",
    "shared memory nobody wrote": "wrong in",
    "barrier that not all threads reach": "not every thread reaches",
    "shuffle that not all lanes reach": "waits for",
    "missing cluster barrier": "wrong in",
    "copy between unaligned addresses": "not aligned",
    "store to a block that has not begun": "has not begun",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = build.missing()
    if reason:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("faults") / "faults"
    build.build_program(build.HERE / "faults.cu", path)
    return path


@pytest.mark.parametrize("number, fault", list(enumerate(FAULTS)))
def test_a_fault_is_noticed(program: Path, number: int, fault: str) -> None:
    run = subprocess.run([program, str(number)], capture_output=True, text=True)
    if fault == "none":
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0 and FAULTS[fault] in run.stdout + run.stderr, run.stdout + run.stderr
