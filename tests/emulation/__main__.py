"""python -m tests.emulation [pytest's arguments]: the kernel tests on the emulated CUDA kernels, under sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys

from . import build

REQUIRED = "LOCALLIP_REQUIRE_EMULATION"

reason = build.missing()
if reason and os.environ.get(REQUIRED) != "1":
    print(f"Emulated CUDA kernels left out: {reason}.")
    sys.exit(0)
if reason:
    sys.exit(f"Emulated CUDA kernels cannot be built: {reason}.")
module = build.build(build.ROOT / "build" / "emulation")
variables = os.environ | build.environment(module) | {"PYTHONPATH": str(build.ROOT)}
# -s: what a sanitizer says as it ends the process must not be lost in pytest's capture
command = [sys.executable, "-m", "pytest", "-p", "tests.emulation.plugin", "-p", "no:cacheprovider", "-q", "-s"]
arguments = sys.argv[1:] or ["tests/kernels"]
sys.exit(subprocess.run([*command, *arguments], cwd=build.ROOT, env=variables).returncode)
