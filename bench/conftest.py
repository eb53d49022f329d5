"""What pytest-benchmark's JSON says of a run beside its own machine and commit: torch, threads, device, command."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import torch

import locallip_cuda
from bench.support import DEVICE


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info["device"] = "cpu" if DEVICE.type == "cpu" else torch.cuda.get_device_name(DEVICE)
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["build"] = {key: str(value) for key, value in locallip_cuda.build_info().items()}
    machine_info["command"] = shlex.join(["python", "-m", "pytest", *sys.argv[1:]])
