"""pytest's side of the harness: options, the turns of every case, and what the JSON says beside the figures."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.case import DEVICE, Setting
from bench.clock import TIMER
from bench.harness import Harness, machine, turns

ROOT = Path(__file__).resolve().parent.parent
HARNESS = pytest.StashKey[Harness]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("locallip benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default=DEVICE.type, help="default: %(default)s")
    group.addoption("--tiny", action="store_true", help="toy sizes, and torch.compile without a code generator")
    group.addoption("--seconds", type=float, default=math.inf, help="begin no case after so many")


def pytest_configure() -> None:
    # A run that `timeout` cuts short ends as by Ctrl-C, which writes the JSON of what has run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def setting_of(config: pytest.Config) -> Setting:
    return Setting(torch.device(config.getoption("--device")), config.getoption("--tiny"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        setting = setting_of(metafunc.config)
        every = [turn for case in metafunc.module.cases(setting) for turn in turns(case, setting)]
        mark = pytest.mark.benchmark(timer=TIMER)
        metafunc.parametrize(("case", "repeat", "variant"), [pytest.param(*turn, marks=mark) for turn in every])


@pytest.fixture(scope="session")
def harness(pytestconfig: pytest.Config) -> Harness:
    made = Harness(setting_of(pytestconfig), pytestconfig.getoption("--seconds"))
    pytestconfig.stash[HARNESS] = made
    return made


@pytest.fixture
def turn(
    request: pytest.FixtureRequest, benchmark: Any, harness: Harness, case: str, repeat: int, variant: str
) -> Callable[[], None]:
    """What a test is to call: it times one variant of one case, for one repeat."""
    (found,) = (c for c in request.module.cases(harness.setting) if c.title == case)
    return partial(harness.turn, benchmark, found, repeat, variant)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    program = "bench" if Path(sys.argv[0]).parent == ROOT / "bench" else "pytest"
    machine_info.update(machine(setting_of(config)), command=shlex.join(["python", "-m", program, *sys.argv[1:]]))


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """LOCALLIP_COMMIT names the commit of a tree that is no git checkout."""
    if not (ROOT / ".git").exists():
        commit, dirty, _ = os.environ.get("LOCALLIP_COMMIT", "unknown").partition("-dirty")
        commit_info.update(id=commit, dirty=bool(dirty))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    made = config.stash[HARNESS]
    output_json.update(ceilings=made.ceilings, errors=list(made.errors.values()))
