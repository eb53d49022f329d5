"""Norms by iterations, on chip and streaming: from which number on a kernel is worth it (csrc/masked_norm.cpp).

    python -m bench.iterations          on a GPU; prints ms of a call as a CUDA graph, B = 256

The layers are those of bench_masked_norm, the masks random, of density 0.5 for convolutions; each figure is the median
of some calls, the L2 cache displaced before each.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import locallip_cuda
from bench.bench_masked_norm import STREAMING, layer_of
from bench.case import Random, Setting
from bench.clock import Clock, captured
from bench.harness import set_precision
from bench.report import markdown_table

BATCH = 256
ITERATIONS = (0, 1, 2, 4, 8)
DENSITIES: dict[str, tuple[float, ...]] = {
    "conv 3x3 32x32x32": (0.5,),
    "conv 3x3 3x32x32": (0.5,),
    "conv 4x4s2 32x32x32": (0.5,),
    "conv 3x3 64x16x16": (0.5,),
    "conv 4x4s2 64x16x16": (0.5,),
    "dense 512x512": (0.1, 0.3, 0.5, 0.75, 1.0),
    "dense 512x4096": (0.5,),
}


def norms(setting: Setting, name: str, density: float, iterations: int) -> Callable[[], Tensor]:
    layer, shape = layer_of(setting, name)
    random, batch = Random(setting.device), setting.batch(BATCH)
    columns = random.uniform(batch, *shape) < density
    rows = random.uniform(batch, *layer(columns[:1].to(layer.weight.dtype)).shape[1:]) < density
    convolution = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}
    if convolution:
        rows, columns = (t.contiguous(memory_format=torch.channels_last) for t in (rows, columns))
    return lambda: locallip_cuda.masked_norm(layer.weight, rows, columns, iterations=iterations, **convolution)


@torch.no_grad()
def main() -> None:
    setting = Setting(torch.device("cuda"))
    clock = Clock(setting.device)
    lines = []
    for name, density in ((name, density) for name, every in DENSITIES.items() for density in every):
        for precision in ("float32", "tf32", "bfloat16"):
            set_precision(precision)
            for path, flag in (("on chip", "0"), ("streaming", "1")):
                os.environ[STREAMING] = flag
                times = []
                for iterations in ITERATIONS:
                    call = norms(setting, name, density, iterations)
                    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                        call()
                        times.append(1e3 * statistics.median(clock.turn(captured(call), setting.seconds)))
                lines.append([f"{name} density {density}, {precision}, {path}", *(f"{t:.3f}" for t in times)])
    head = ["layer", *(f"{iterations} iterations" for iterations in ITERATIONS)]
    print(f"{torch.cuda.get_device_name(setting.device)}, torch {torch.__version__}; ms, B = {BATCH}\n")
    print("\n".join(markdown_table(head, lines)))


if __name__ == "__main__":
    main()
