"""Norms by iterations, on chip and streaming: from which number on a kernel is worth it (csrc/masked_norm.cpp).

    python -m bench.iterations          on a GPU; prints ms of a call as a CUDA graph, B = 256

Weights and masks are random, of density 0.5 for convolutions; each figure is the median of some calls, the L2 cache
displaced before each.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import locallip_cuda
from bench.bench_masked_norm import STREAMING
from bench.clock import Clock, captured
from bench.harness import set_precision
from bench.report import markdown_table

BATCH = 256
ITERATIONS = (0, 1, 2, 4, 8)
# input, weight, stride and padding
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "conv 3x3 32x32x32": ((32, 32, 32), (32, 32, 3, 3), 1, 1),
    "conv 3x3 3x32x32": ((3, 32, 32), (32, 3, 3, 3), 1, 1),
    "conv 4x4s2 32x32x32": ((32, 32, 32), (32, 32, 4, 4), 2, 1),
    "conv 3x3 64x16x16": ((64, 16, 16), (64, 64, 3, 3), 1, 1),
    "conv 4x4s2 64x16x16": ((64, 16, 16), (64, 64, 4, 4), 2, 1),
    "dense 512x512": ((512,), (512, 512), 1, 0),
    "dense 512x4096": ((4096,), (512, 4096), 1, 0),
}
DENSITIES = {"dense 512x512": (0.1, 0.3, 0.5, 0.75, 1.0)}


def norms(name: str, density: float, iterations: int, device: torch.device) -> Callable[[], Tensor]:
    inputs, kernel, stride, padding = LAYERS[name]
    random = torch.Generator(device).manual_seed(0)
    weight = torch.randn(kernel, generator=random, device=device)
    columns = torch.rand(BATCH, *inputs, generator=random, device=device) < density
    if len(kernel) == 2:
        rows = torch.rand(BATCH, kernel[0], generator=random, device=device) < density
        return lambda: locallip_cuda.masked_norm(weight, rows, columns, iterations=iterations)
    side = (inputs[1] + 2 * padding - kernel[2]) // stride + 1
    rows = torch.rand(BATCH, kernel[0], side, side, generator=random, device=device) < density
    rows, columns, weight = (t.contiguous(memory_format=torch.channels_last) for t in (rows, columns, weight))
    return lambda: locallip_cuda.masked_norm(
        weight, rows, columns, stride=stride, padding=padding, iterations=iterations
    )


@torch.no_grad()
def main() -> None:
    device = torch.device("cuda")
    clock = Clock(device)
    lines = []
    for name in LAYERS:
        for density in DENSITIES.get(name, (0.5,)):
            for precision in ("float32", "tf32"):
                set_precision(precision)
                for path, flag in (("on chip", "0"), ("streaming", "1")):
                    os.environ[STREAMING] = flag
                    times = []
                    for iterations in ITERATIONS:
                        call = norms(name, density, iterations, device)
                        call()
                        times.append(1e3 * statistics.median(clock.turn(captured(call), 0.02)))
                    lines.append([f"{name} density {density}, {precision}, {path}", *(f"{t:.3f}" for t in times)])
    head = ["layer", *(f"{iterations} iterations" for iterations in ITERATIONS)]
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; ms, B = {BATCH}\n")
    print("\n".join(markdown_table(head, lines)))


if __name__ == "__main__":
    main()
