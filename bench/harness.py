"""Runs cases: a variant's turn under pytest-benchmark, or what has no timing, `prepare` and `launch`.

Every case of a run is built once, when its first turn comes, and forgotten when another's does. A variant's first turn
checks what it returns, norms against converged ones, activation pattern and margin against float64, and measures its
memory. What fails says why in the JSON and leaves the other variants alone.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import locallip_cuda
from bench import networks
from bench.case import Case, Setting, Variant, is_compiled
from bench.clock import TIMER, Clock, captured, synchronize

NAMES = ("activation_pattern", "chain_norm", "closeness", "margin", "masked_norm", "training_step")
OPS = [import_module(f"bench.bench_{name}") for name in NAMES]


def every_case(setting: Setting) -> Iterator[Case]:
    for module in OPS:
        yield from module.cases(setting)


def turns(case: Case, setting: Setting) -> Iterator[tuple[str, int, str]]:
    """(case, repeat, variant) in the order to run them: all variants next to each other, again and again."""
    for repeat in range(setting.repeats):
        for label in case.labels:
            # it takes up to seconds a call, and its ratio is in the hundreds: two repeats do
            if label != "materialised" or repeat < 2:
                yield case.title, repeat, label


def set_precision(precision: str) -> None:
    """float32 means float32 for every variant: without this, torch's own convolutions would take TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_up() -> None:
    # A baseline that fell back to plain PyTorch unnoticed would be none: the translation loop compiles once a round.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def described(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


class Harness:
    """seconds: no case begins after so many."""

    def __init__(self, setting: Setting, seconds: float = math.inf) -> None:
        set_up()
        self.setting = setting
        self.clock = Clock(setting.device)
        self.end = time.monotonic() + seconds
        self.ceilings = ceilings(setting, self.clock)
        self.errors: dict[tuple[str, str, str], dict[str, str]] = {}
        self.current: tuple[str, str] | None = None
        self.variants: dict[str, Variant] = {}
        self.graphs: dict[str, Callable[[], None] | str] = {}  # or why there is none

    def turn(self, benchmark: Any, case: Case, repeat: int, label: str) -> None:
        """Times a variant; raises what it raises. What a baseline that may fail raises skips it."""
        name, _, work = label.partition(", ")
        work = work or "both"
        facts = {"op": case.op, "case": case.name, "precision": case.precision, "variant": name, "work": work}
        if (case.op, case.title) != self.current:
            self._begin(case)
        for key in ("", label):
            if (case.op, case.title, key) in self.errors:
                pytest.skip(self.errors[case.op, case.title, key]["error"])
        variant = self.variants[label]
        try:
            first = self._first(variant) if repeat == 0 else {}
            seconds = self.clock.turn(variant.call, self.setting.seconds)
        except Exception as error:
            self._failed(case, label, described(error))
            if is_compiled(label):
                pytest.skip(described(error))
            raise
        counted = {"flops": variant.flops, "bytes": variant.bytes}
        if work == "forward":
            counted["iterations"] = case.iterations
        benchmark.group = f"{case.op} {case.title}"
        benchmark.extra_info.update(facts, repeat=repeat, samples=variant.samples, **first)
        benchmark.extra_info.update({key: value for key, value in counted.items() if value is not None})
        if variant.capture and self.clock.on_gpu:
            benchmark.extra_info.update(self._graph_time(label, variant))
        TIMER.hand_over(benchmark, seconds)
        assert first.get("right") is not False, f"wrong result: {first}"
        assert "graph_error" not in benchmark.extra_info or is_compiled(label), benchmark.extra_info["graph_error"]

    def _begin(self, case: Case) -> None:
        self.current = (case.op, case.title)
        self.variants, self.graphs = {}, {}
        gc.collect()
        torch._dynamo.reset()
        set_precision(case.precision)
        if time.monotonic() > self.end:
            self._failed(case, "", "left out: no time")
            return
        try:
            self.variants = case.build()
        except Exception as error:
            self._failed(case, "", described(error))
            raise

    def _failed(self, case: Case, label: str, why: str) -> None:
        where = {"op": case.op, "case": case.name, "precision": case.precision}
        self.errors[case.op, case.title, label] = {**where, "variant": label, "error": why}

    def _first(self, variant: Variant) -> dict[str, Any]:
        """Whether the result is right, facts about it, and the memory it took."""
        found: dict[str, Any] = {}
        output = variant.call()
        synchronize()
        if variant.check:
            facts, right = variant.check(output)
            found = facts if right is None else {**facts, "right": bool(right)}
        del output
        if self.clock.on_gpu:
            found["peak_bytes"] = self.clock.peak_bytes(variant.call)
        elif variant.peak:
            found["peak_bytes"] = variant.peak()
        return found

    def _graph_time(self, label: str, variant: Variant) -> dict[str, Any]:
        if label not in self.graphs:
            try:
                self.graphs[label] = captured(variant.call)
            except Exception as error:
                self.graphs[label] = described(error)
        graph = self.graphs[label]
        if isinstance(graph, str):
            return {"graph_error": graph}
        return {"graph_ms": 1e3 * statistics.median(self.clock.turn(graph, self.setting.seconds))}


def prepare(setting: Setting) -> None:
    """Train the networks and fill torch.compile's cache."""
    set_up()
    start = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)

    if not setting.tiny:
        for name in networks.RECIPES:
            networks.trained(name)
            done(f"network {name}")
    for case in every_case(setting):
        for label in filter(is_compiled, case.labels):
            torch._dynamo.reset()
            set_precision(case.precision)
            case.build()[label].call()
            synchronize()
            done(f"{case.op}: {case.title}: {label}")


def launch(setting: Setting) -> None:
    """The kernels that a profiler is to see: ours of some cases, once, the profiler on."""
    for case in every_case(setting):
        if case.launch:
            print(f"{case.op}: {case.title}", flush=True)
            set_precision(case.precision)
            call = case.build()["ours"].call
            call()
            synchronize()
            if setting.device.type == "cuda":
                torch.cuda.profiler.start()
                call()
                synchronize()
                torch.cuda.profiler.stop()


def ceilings(setting: Setting, clock: Clock) -> dict[str, float]:
    """Rates of a large copy (bytes read and written) and of large matrix products, in 1/s."""
    size, count = (2**10, 32) if setting.tiny else (2**28, 8192) if clock.on_gpu else (2**26, 1024)
    source = torch.rand(size, device=setting.device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, count, count, device=setting.device)
    halves = [t.bfloat16() for t in (a, b)]
    product, calls = 2.0 * count**3, {}
    calls["copy"] = (8.0 * size, lambda: target.copy_(source))
    calls["float32"] = calls["tf32"] = (product, lambda: a @ b)
    calls["bfloat16"] = (product, lambda: halves[0] @ halves[1])
    rates = {}
    for name, (work, call) in calls.items():
        set_precision(name)
        clock.seconds(call, 3)
        rates[name] = work / statistics.median(clock.seconds(call, 10))
    return rates


def machine(setting: Setting) -> dict[str, Any]:
    """Hardware and software, as far as pytest-benchmark does not say."""
    found: dict[str, Any] = {
        "device": "cpu",
        "tiny": setting.tiny,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "none",
        "nvcc": nvcc_release(),
        "build": {key: str(value) for key, value in locallip_cuda.build_info().items()},
        "python": platform.python_version(),
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver.splitlines()[0] if driver else "unknown",
        }
    return found


def nvcc_release() -> str:
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
    release = re.search(r"release [^\n]*", output_of(nvcc, "--version") or "") if nvcc else None
    return release[0] if release else "none"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
