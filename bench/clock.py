"""How long calls take: by CUDA events on a GPU, by perf_counter on a CPU.

On a GPU the L2 cache is displaced between calls, so that every call reads its inputs from memory. That is done by
reading: what was written would be written back at the expense of the call that is timed. While the cache is displaced
the host runs ahead, but a call of many small kernels still waits for the host; a CUDA graph of it has the device's own
time alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

MOST_CALLS = 50  # in one turn


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Timer:
    """pytest-benchmark's timer: it stands still but for what the clock has measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def __str__(self) -> str:
        return "bench.clock"  # in the JSON

    def hand_over(self, benchmark: Any, seconds: list[float]) -> None:
        """One round of pytest-benchmark for each figure."""
        figures = iter(seconds)

        def pass_time() -> None:
            self.now += next(figures)

        benchmark.pedantic(pass_time, rounds=len(seconds))


TIMER = Timer()


class Clock:
    """Of one device. On a GPU it leaves the default stream, where nothing can be captured."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_stream(torch.cuda.Stream(device))
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.zeros(max(cache, 2**24), device=device)  # four bytes each
            self.sum = torch.zeros((), device=device)

    def seconds(self, call: Callable[[], object], count: int) -> list[float]:
        """Of `count` calls, each. Garbage is not collected meanwhile."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._on_gpu(call, count) if self.on_gpu else self._on_cpu(call, count)
        finally:
            if collects:
                gc.enable()

    def _on_cpu(self, call: Callable[[], object], count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def _on_gpu(self, call: Callable[[], object], count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for before, after in events:
            torch.sum(self.buffer, 0, out=self.sum)
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in events]

    def turn(self, call: Callable[[], object], budget: float) -> list[float]:
        """Of as many calls as `budget` seconds hold, after one that warms up."""
        estimate = max(self.seconds(call, 1)[0], 1e-9)
        return self.seconds(call, min(max(round(budget / estimate), 1), MOST_CALLS))

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory of the GPU at its peak, beyond what stood before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph, captured on the current stream. The results live as long as the function returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay
