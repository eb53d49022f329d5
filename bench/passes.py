"""What a training step on a CPU spends its time on, by layer and phase, beside a plain step.

    OMP_NUM_THREADS=1 python -m bench.passes cifar10-6c2f [--bfloat16]

The steps are those of `bench_closeness`, at the training radius, on a network trained against its own norms. Printed is
processor time in milliseconds, of every op the least of some steps, which other processes disturb little. `values` are
the clean ones, with the centres of the box where there is one, `box` its half-widths, `rows` the norms of rows, `masks`
activation patterns, `norms` those of masked operators; each forward / backward.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_closeness, networks, step
from bench.case import Setting
from bench.report import markdown_table

STEPS = 9
PHASES = ("values", "box", "rows", "masks", "norms")


class Op(NamedTuple):
    """weight: the shape of the weight that it applies, () of another op.   biased: whether a bias is part of it.
    ms: what it took.
    """

    name: str
    weight: tuple[int, ...]
    biased: bool
    ms: float


class Recorder(TorchDispatchMode):
    """The ops that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.thread_time()
        result = func(*args, **(kwargs or {}))
        ms = 1e3 * (time.thread_time() - began)
        name = func.__name__.split(".")[0]
        at = {"affine": 1, "affine_backward": 2, "masked_norm": 0, "masked_norm_backward": 1}.get(name)
        biased = (name == "affine" and args[2] is not None) or (name == "affine_backward" and args[-1])
        self.ops.append(Op(name, () if at is None else tuple(args[at].shape), biased, ms))
        return result


def least(call: Callable[[], object], steps: int) -> tuple[list[Op], float]:
    """The ops of a call, each with the least time that it took, and the least of a call without their record."""
    whole, runs = [], []
    for _ in range(steps):
        began = time.thread_time()
        call()
        whole.append(1e3 * (time.thread_time() - began))
        with Recorder() as recorder:
            call()
        runs.append(recorder.ops)
    ops = [min(same, key=lambda op: op.ms) for same in zip(*runs[1:], strict=True)]
    return ops, min(whole)


def by_phase(ops: Sequence[Op], weights: Sequence[tuple[int, ...]]) -> dict[tuple[int, str], list[float]]:
    """Forward and backward milliseconds by layer and phase; layer -1 is the rest."""
    spent: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    layer, masks = 0, 0
    for position, op in enumerate(ops):
        backward = op.name.endswith("_backward")
        if op.weight:
            ahead = range(layer, -1, -1) if backward else range(layer, len(weights))
            layer = next(i for i in ahead if weights[i] == op.weight)
        kind = op.name.removesuffix("_backward")
        key = -1, op.name
        if kind == "affine":
            # of a layer's without a bias, the last one forward and the first one backward is of the row norms
            rest = ops[position + 1 :] if not backward else ops[position - 1 :: -1]
            another = any(o.name == op.name and o.weight == op.weight and not o.biased for o in _until(rest, op.name))
            key = layer, "values" if op.biased else "box" if another else "rows"
        elif kind == "masked_norm":
            key = layer, "norms"
        elif kind == "activation_pattern":
            masks += -1 if backward else 1
            key = masks if backward else masks - 1, "masks"
        elif kind == "margin":
            key = -1, "margin"
        elif "foreach" in kind or "adam" in kind:
            key = -1, "Adam"
        spent[key][backward] += op.ms
    return spent


def _until(ops: Sequence[Op], name: str) -> Sequence[Op]:
    ends = (i for i, op in enumerate(ops) if op.name.startswith("activation_pattern"))
    return ops[: next(ends, len(ops))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Processor time of a training step by layer and phase.")
    parser.add_argument("network", choices=sorted(networks.RECIPES))
    parser.add_argument("--bfloat16", action="store_true", help="ours under autocast to bfloat16")
    arguments = parser.parse_args()
    name = arguments.network
    setting = Setting(torch.device("cpu"))
    ours = bench_closeness.variant(setting, name, kept=True, bfloat16=arguments.bfloat16).call
    model, norms = networks.trained_against(name, kept=True, device=torch.device("cpu"))
    x, y = step.batch_of(name, networks.RECIPES[name].batch)
    plain = step.step(model, step.adam(model), networks.RECIPES[name], "plain", x, y)
    weights = [tuple(m.weight.shape) for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    (_, plain_ms), (ops, ms) = least(plain, STEPS), least(ours, STEPS)
    spent = by_phase(ops, weights)
    lines = []
    for layer, weight in enumerate(weights):
        cells = ["{:.1f} / {:.1f}".format(*spent.get((layer, phase), (0, 0))) for phase in PHASES]
        lines.append(["x".join(map(str, weight)), *cells])
    sums = [sum(sum(spent[key]) for key in spent if key[1] == phase) for phase in PHASES]
    lines.append(["all", *(f"{s:.1f}" for s in sums)])
    print(f"{name}, {norms}: {ms:.1f} ms, {ms / plain_ms:.2f} plain steps of {plain_ms:.1f} ms\n")
    print("\n".join(markdown_table(["weight", *PHASES], lines)))
    rest = {key[1]: sum(v) for key, v in spent.items() if key[0] < 0}
    print("\nrest:", ", ".join(f"{k} {v:.1f}" for k, v in sorted(rest.items(), key=lambda kv: -kv[1])[:14]))
    print(f"in no op: {ms - sum(map(sum, spent.values())):.1f}")


if __name__ == "__main__":
    main()
