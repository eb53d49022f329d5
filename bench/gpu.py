"""Time the ops and whole training steps on a GPU beside their baselines, and write what was measured as JSON.

    python -m bench.gpu OUT.json                       all cases; bench/gpu_check.sh runs this
    python -m bench.gpu --prepare                      train the networks and fill torch.compile's cache, timing nothing
    python -m bench.gpu --launch                       every op of ours once, the profiler on around it: for ncu
    python -m bench.gpu --device cpu --tiny OUT.json   every case at toy sizes: that this program works

How it is timed: CUDA events around one call, the L2 cache overwritten between calls, so that every call reads its
inputs from memory; warmed up; the variants of a case in turn, several rounds over; the median of all calls. While the
cache is overwritten the host runs ahead, but a call of many small kernels still waits for the host. So what can be
captured is timed once more as a CUDA graph, which has the device's own time alone ("graph_ms").

What is counted: the floating-point operations a variant must do and the bytes it must move, each input read once and
each output written once; the formulas stand beside the cases. Divided by the rates that a large copy and a large matrix
product reach in the same run they give the least possible time, whose share of the measured time is the report's.

Each timed result is checked: norms against converged ones, activation pattern and margin against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import locallip_cuda as ll
from bench import paper_method
from bench.gpu_report import wrong
from bench.support import DEVICE, REPEATS, closeness, converged_norms
from locallip_cuda import ops
from locallip_cuda.experiments import models
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU
from locallip_cuda.ops import reference

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 4  # of the masked norms
MARGIN_ROUNDS = 10  # of the published translation loop, as in the paper's MNIST recipe
MOST_CALLS = 20  # of one variant in one round
SLOW = 0.2  # seconds: what takes longer has two rounds only
STREAMING = "LOCALLIP_STREAMING"  # set to 1, the masked norm leaves its resident kernels

# How far an estimate may lie above the converged norm: rounding, and for TF32 the 10 bits of its products.
ABOVE = {"float32": 1e-4, "tf32": 5e-3}
LEAST_CLOSENESS = 0.5  # of any one norm after ITERATIONS
LEAST_MEAN_CLOSENESS = 0.9  # of all norms of a training step with the recipes' iterations


@dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool = False

    @property
    def batch(self) -> int:
        return 2 if self.tiny else 256

    @property
    def seconds(self) -> float:
        """Of timed calls for one variant, and again for its graph."""
        return 0.005 if self.tiny else 0.1

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")


@dataclass
class Variant:
    """One way to do a case's work.

    work: "forward", "backward" or "both"; variants with the same work are compared.   call: does it once.
    samples: that one call serves.   flops, bytes: what one call must do and move at least, where counted.
    check: facts about what a call returned, and whether it is right (None: not known).   capture: in a CUDA graph.
    """

    name: str
    work: str
    call: Callable[[], Any]
    samples: int
    flops: float | None = None
    bytes: float | None = None
    check: Callable[[Any], tuple[dict[str, float], bool | None]] | None = None
    capture: bool = True


@dataclass
class Case:
    """build: makes inputs and variants.   iterations: of the norm, for the time of one."""

    op: str
    name: str
    build: Callable[[], list[Variant]]
    precision: str = "float32"
    iterations: int | None = None
    compiled: bool = False  # has a torch.compile baseline


# ---- activation pattern ----


def activation_cases(setting: Setting) -> Iterator[Case]:
    channels, side = (4, 6) if setting.tiny else (32, 32)
    for kind in ("relu", "clipped-relu", "clipped-maxmin"):

        def build(kind: str = kind) -> list[Variant]:
            return activation_variants(setting, kind, (channels, side, side))

        yield Case("activation_pattern", f"{kind} {channels}x{side}x{side}", build)


def activation_variants(setting: Setting, kind: str, shape: tuple[int, int, int]) -> list[Variant]:
    """Row norms differ from sample to sample, as behind every layer but the first.

    With N = batch x units values of 4 bytes and P bytes of thresholds, forward: read clean, centre, half-width and row
    norms, 4 N; write clean, centre and half-width, 3 N, and two masks of N/4. Backward: read the gradients of the three
    outputs, 3 N, and the four inputs again, 4 N; write the gradients of the inputs, 4 N. P is read in both and its
    gradient written. Radii and sparsity terms are left out: a few numbers a sample. It is all memory traffic.
    """
    batch = setting.batch
    generator = torch.Generator(setting.device).manual_seed(0)

    def layout(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=setting.device)

    # about half of the units are constant; half of them by the box, half by the ball
    clean = normal(batch, *shape)
    values = layout(torch.cat([clean, clean + 0.02 * normal(*clean.shape)]))
    half = layout(0.6 * torch.rand(clean.shape, generator=generator, device=setting.device))
    row_norms = 0.5 + torch.rand(clean.shape, generator=generator, device=setting.device)
    squared = layout(row_norms.square())
    radius = torch.full((batch,), 0.3, device=setting.device, requires_grad=True)
    module = {
        "relu": nn.ReLU,
        "clipped-relu": lambda: ClippedReLU(shape, 1.0),
        "clipped-maxmin": lambda: ClippedMaxMin((shape[0] // 2, *shape[1:]), 0.5, -0.5),
    }[kind]().to(setting.device)
    thresholds = [layout(t.detach()) for t in module.parameters()]
    leaves = [values, half, squared, radius, *thresholds]

    def pattern(inputs: list[Tensor]) -> list[Tensor]:
        first, second = (*inputs[4:], None, None)[:2]
        outputs = ops.activation_pattern(*inputs[:4], kind.replace("-", "_"), first, second)
        return [outputs[0], outputs[1], outputs[4]]  # values, half-width, sparsity terms

    held = pattern(leaves)
    gradients = [torch.rand(t.shape, generator=generator, device=setting.device) for t in held]
    gradients[:2] = [g.contiguous(memory_format=torch.channels_last) for g in gradients[:2]]

    # The same for the first samples in float64 on the CPU. Gradients of the thresholds sum over all samples.
    first = min(batch, 2)
    pairs = [*range(first), *range(batch, batch + first)]  # clean values, then the centres
    few = [t.detach().cpu().double() for t in leaves]
    few[:4] = [few[0][pairs], *(t[:first] for t in few[1:4])]
    few = [t.requires_grad_() for t in few]
    expected = pattern(few)
    few_gradients = [g.cpu().double()[i] for g, i in zip(gradients, (pairs, slice(first), slice(first)), strict=True)]
    expected_gradients = torch.autograd.grad(expected, few[:3], few_gradients)

    def error(actual: list[Tensor], wanted: Any, limit: float) -> tuple[dict[str, float], bool]:
        parts = [actual[0].detach()[pairs], *(t.detach()[:first] for t in actual[1:3])]
        errors = [
            ((a.cpu().double() - w).norm() / w.norm()).item() for a, w in zip(parts, wanted, strict=True) if w.any()
        ]
        return {"relative_error": max(errors)}, all(e < limit for e in errors)

    def backward(outputs: list[Tensor], **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, leaves, gradients, **options))

    plain_leaves = [t.detach().contiguous().requires_grad_() for t in leaves[:4]]

    def published() -> tuple[Tensor, ...]:
        """What the published method computes here, but for its row norms: those are the same for all samples."""
        mu, centre = plain_leaves[0].chunk(2)
        ball = plain_leaves[3].view(-1, 1, 1, 1) * plain_leaves[2].sqrt()
        lower = torch.maximum(centre - plain_leaves[1], mu - ball)
        upper = torch.minimum(centre + plain_leaves[1], mu + ball)
        mask, slack = paper_method.row_mask(module, lower, upper), upper.relu().mean()
        if isinstance(module, ClippedReLU):
            slack = slack + (module.threshold - lower).relu().mean()
        lower, upper = module(lower), module(upper)
        if isinstance(module, ClippedMaxMin):
            mask = paper_method.column_mask(module, lower, upper)
            slack = (module.upper - lower.chunk(2, 1)[0]).relu().mean()
            slack = slack + (upper.chunk(2, 1)[1] - module.lower).relu().mean()
        outputs = [module(mu), (upper + lower) / 2, (upper - lower) / 2, slack]
        ones = [torch.ones_like(t) for t in outputs]
        return mask, *torch.autograd.grad(outputs, [*plain_leaves, *module.parameters()], ones)

    size, small = 4 * clean.numel(), 4 * sum(t.numel() for t in thresholds)
    forward_bytes, backward_bytes = 7.5 * size + small, 11 * size + 2 * small
    return [
        Variant(
            "ours",
            "forward",
            lambda: pattern(leaves),
            batch,
            bytes=forward_bytes,
            check=lambda result: error(result, expected, 1e-5),
        ),
        Variant(
            "ours",
            "backward",
            lambda: backward(held, retain_graph=True),
            batch,
            bytes=backward_bytes,
            check=lambda result: error(result, expected_gradients, 1e-3),
        ),
        Variant(
            "ours",
            "both",
            lambda: backward(pattern(leaves)),
            batch,
            bytes=forward_bytes + backward_bytes,
            check=lambda result: error(result, expected_gradients, 1e-3),
        ),
        Variant("paper", "both", published, batch),
    ]


# ---- masked norm ----


def norm_cases(setting: Setting) -> Iterator[Case]:
    def dense(m: int, n: int) -> tuple[str, Callable[[], nn.Linear], tuple[int, ...]]:
        m, n = (max(m // 32, 10), n // 32) if setting.tiny else (m, n)
        return f"dense {m}x{n}", lambda: nn.Linear(n, m), (n,)

    def conv(cin: int, cout: int, side: int, kernel: int, stride: int) -> tuple[str, Callable[[], nn.Conv2d], Any]:
        cin, cout, side = (max(cin // 8, 3), cout // 8, side // 4) if setting.tiny else (cin, cout, side)
        name = f"conv {kernel}x{kernel}{'/2' if stride == 2 else ''} {cin} to {cout} on {side}x{side}"
        return name, lambda: nn.Conv2d(cin, cout, kernel, stride, padding=1), (cin, side, side)

    wide, others = conv(32, 32, 32, 3, 1), [conv(3, 32, 32, 3, 1), conv(32, 32, 32, 4, 2)]
    others += [conv(64, 64, 16, 3, 1), conv(64, 64, 16, 4, 2)]
    # layer, density, precision, whether torch.compile's baseline runs too, samples of the materialised one
    rows = [(wide, d, "float32", d == 0.5, 0) for d in (0.5, 0.1, 1.0)]
    rows += [(dense(512, 512), d, "float32", d == 0.1, 4 * (d == 0.1)) for d in (0.1, 0.5, 1.0)]
    rows += [(layer, 0.5, "tf32", False, 0) for layer in (wide, dense(512, 512))]
    rows += [(layer, 0.5, precision, False, 0) for layer in others for precision in ("float32", "tf32")]
    rows += [(dense(512, 4096), d, "float32", d == 0.1, 2 * (d == 0.1)) for d in (0.1, 0.5, 1.0)]
    rows += [(dense(10, 512), 0.5, "float32", False, 256)]
    for (name, make, shape), density, precision, compiled, materialised in rows:

        def build(
            make: Any = make,
            shape: Any = shape,
            density: float = density,
            precision: str = precision,
            compiled: bool = compiled,
            materialised: int = materialised,
        ) -> list[Variant]:
            return norm_variants(setting, make, shape, density, precision, compiled, materialised)

        yield Case("masked_norm", f"{name} density {density}", build, precision, ITERATIONS, compiled)


def norm_variants(
    setting: Setting,
    make: Callable[[], nn.Linear | nn.Conv2d],
    shape: tuple[int, ...],
    density: float,
    precision: str,
    compiled: bool,
    materialised: int,
) -> list[Variant]:
    """The count is that of the operator without masks, 2 flops a multiplication of the kernel with a value (padding
    included): A and its adjoint once an iteration, A once more at the end, and once for the gradient of the weight.
    Bytes forward: weight, masks (one byte a unit) and start vector read; norms and singular vectors written. Backward:
    weight, singular vectors and norms' gradients read, weight's gradient written.
    """
    batch = setting.batch
    torch.manual_seed(0)
    layer = make().to(setting.device)
    weight = layer.weight
    generator = torch.Generator(setting.device).manual_seed(0)

    def bits(sizes: tuple[int, ...]) -> Tensor:
        return torch.rand(batch, *sizes, generator=generator, device=setting.device) < density

    columns = bits(shape)
    with torch.no_grad():
        rows = bits(tuple(layer(columns[:1].to(weight.dtype)).shape[1:]))
    start = torch.randn(batch, *shape, generator=generator, device=setting.device)
    shared = torch.randn(1, *shape, generator=generator, device=setting.device)
    if isinstance(layer, nn.Conv2d):
        rows, columns = (t.contiguous(memory_format=torch.channels_last) for t in (rows, columns))
    conv = {} if isinstance(layer, nn.Linear) else {"stride": layer.stride, "padding": layer.padding}
    few = min(batch, 4 if isinstance(layer, nn.Conv2d) else 64)
    converged = converged_norms(layer, rows[:few], columns[:few], (few, *shape))

    def check(sigma: Tensor | tuple[Tensor, ...]) -> tuple[dict[str, float], bool]:
        sigma = (sigma if isinstance(sigma, Tensor) else sigma[0]).detach()
        count = min(len(sigma), few)
        facts = norm_closeness(sigma[:count], converged[:count])
        above = facts["closeness_max"] - 1
        return facts, above < ABOVE[precision] and facts["closeness_min"] > LEAST_CLOSENESS and sigma.isfinite().all()

    ones = torch.ones(batch, device=setting.device)

    def ours() -> Tensor:
        return ll.masked_norm(weight, rows, columns, iterations=ITERATIONS, start=shared, **conv)

    def with_gradient(norms: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            sigma = norms()
            return sigma.detach(), torch.autograd.grad(sigma, weight, ones[: len(sigma)])[0]

        return both

    def published() -> Tensor:
        return paper_method.masked_power_norm(layer, start, rows, columns, ITERATIONS)

    def dense_norms() -> Tensor:
        assert isinstance(layer, nn.Linear)
        few_rows, few_columns = rows[:materialised], columns[:materialised]
        return torch.linalg.matrix_norm(weight * few_rows.unsqueeze(2) * few_columns.unsqueeze(1), ord=2)

    applied = 2.0 * batch * rows[0].numel() * weight[0].numel()
    units = batch * (rows[0].numel() + columns[0].numel())
    forward_flops, both_flops = (2 * ITERATIONS + 1) * applied, (2 * ITERATIONS + 2) * applied
    forward_bytes = 4 * weight.numel() + units + 4 * shared.numel() + 4 * (batch + units)
    both_bytes = forward_bytes + 8 * weight.numel() + 4 * (batch + units)

    counted = (batch, forward_flops, forward_bytes, check)
    counted_both = (batch, both_flops, both_bytes, check)
    variants = [
        Variant("ours", "forward", no_grad(ours), *counted),
        Variant("streaming", "forward", streaming(no_grad(ours)), *counted),
        Variant("ours", "both", with_gradient(ours), *counted_both),
        Variant("streaming", "both", streaming(with_gradient(ours)), *counted_both),
        Variant("paper", "both", with_gradient(published), *counted_both),
    ]
    if compiled:
        variants.append(Variant("paper compiled", "both", with_gradient(setting.compile(published)), *counted_both))
    if materialised:
        samples = min(materialised, batch)
        variants.append(
            Variant("materialised", "both", with_gradient(dense_norms), samples, check=check, capture=False)
        )
    return variants


def norm_closeness(estimate: Tensor, converged: Tensor) -> dict[str, float]:
    ratio = torch.where(converged > 0, estimate.double() / converged, 1.0)
    return closeness(estimate, converged) | {"closeness_max": ratio.max().item()}


def no_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)


def streaming(call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        os.environ[STREAMING] = "1"
        try:
            return call()
        finally:
            del os.environ[STREAMING]

    return forced


# ---- margin ----


def margin_cases(setting: Setting) -> Iterator[Case]:
    width = 16 if setting.tiny else 512
    for classes in (10, 200):

        def build(classes: int = classes) -> list[Variant]:
            return margin_variants(setting, classes, width)

        yield Case("margin", f"K={classes} h={width}", build)


def margin_variants(setting: Setting, classes: int, width: int) -> list[Variant]:
    """Of each of the B (K - 1) h terms: one difference of weights, and at the least one evaluation of the dual at the
    multiplier found (scaled, clipped at two sides, squared and summed, multiplied and summed), 8 flops; how many
    evaluations find it depends on the data. Backward: 6 (difference, shift, and the two gradients' sums). Bytes
    forward: features, box and weight read, gain and step written; backward: those read, and the gradients written.
    """
    batch = setting.batch
    generator = torch.Generator(setting.device).manual_seed(0)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator, device=setting.device)

    # features of a clipped ReLU layer, a third of them constant, with a radius at which ball and box both bind
    z = torch.randn(batch, width, generator=generator, device=setting.device)
    reach = 0.5 * uniform(batch, width)
    features, lower, upper = (t.clamp(0, 1).requires_grad_() for t in (z, z - reach, z + reach))
    weight = torch.randn(classes, width, generator=generator, device=setting.device).div_(width**0.5).requires_grad_()
    radius = (0.5 + 2 * uniform(batch)).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator, device=setting.device)
    leaves = [features, lower, upper, radius, weight]
    few = min(batch, 8)
    maximum = reference.margin(
        *(t.detach()[:few].double() for t in (features, lower, upper, radius)), weight.detach().double(), labels[:few]
    )

    def ours() -> Tensor:
        return ops.margin(features, lower, upper, radius, weight, labels)

    def published() -> Tensor:
        low, high = (lower - features).clamp(max=0), (upper - features).clamp(min=0)
        difference = weight - weight[labels].unsqueeze(1)
        gain = paper_method.translation_loop(difference, radius.view(-1, 1), low[:, None], high[:, None], MARGIN_ROUNDS)
        return gain.scatter(1, labels.unsqueeze(1), 0)

    def with_gradient(gains: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            gain = gains()
            return gain.detach(), *torch.autograd.grad(gain, leaves, torch.ones_like(gain))

        return both

    def check(result: Tensor | tuple[Tensor, ...]) -> tuple[dict[str, float], bool]:
        gain = result if isinstance(result, Tensor) else result[0]
        excess = ((gain[:few].double() - maximum) / maximum.clamp(min=1e-6)).flatten()
        low, high = excess.min().item(), excess.max().item()
        return {"excess_min": low, "excess_max": high}, low > -1e-5 and high < 1e-3

    def bound_check(result: Any) -> tuple[dict[str, float], None]:
        return check(result)[0], None  # the published loop stops early: an upper bound, how far above is its affair

    terms = batch * (classes - 1) * width
    read = 4 * (3 * batch * width + weight.numel() + batch) + 8 * batch
    written, gradients = 8 * batch * classes, 4 * (3 * batch * width + weight.numel() + batch)
    forward, both = (8.0 * terms, read + written), (14.0 * terms, 2 * read + 2 * written + gradients)
    return [
        Variant("ours", "forward", no_grad(ours), batch, *forward, check=check),
        Variant("ours", "both", with_gradient(ours), batch, *both, check=check),
        # The loop asks after every round whether it can end, which waits for the device.
        Variant("paper", "forward", no_grad(published), batch, *forward, check=bound_check, capture=False),
        Variant("paper", "both", with_gradient(published), batch, *both, check=bound_check, capture=False),
    ]


# ---- the whole training step ----


def step_cases(setting: Setting, name: str) -> Iterator[Case]:
    for precision in ("float32", "tf32"):
        compiled = precision == "float32"

        def build(compiled: bool = compiled) -> list[Variant]:
            return step_variants(setting, name, compiled)

        yield Case("training_step", f"digits as {name}" if setting.tiny else name, build, precision, compiled=compiled)


def step_variants(setting: Setting, name: str, compiled: bool) -> list[Variant]:
    """Trained networks, on synthetic images (bench.networks). One Adam in its capturable form for every variant.

    Counted are the operators, A_l its flops for the batch, L without the last. Plain: forward, and backward for the
    weight and, but for the first, the input. Ours: clean value, box centre, half-width and row norms through every
    operator (clean value alone through the first, which also needs no gradient of its input), each with a gradient of
    weight and input (row norms: of the weight); 2 iterations + 1 applications for the norm, and its gradient. The
    published method is not counted: it does whatever it does.
    """
    from bench import bench_training_step, networks, step  # needs scikit-learn's digits

    recipe = networks.RECIPES[name]
    if setting.tiny:
        recipe = replace(recipe, iterations=1, rounds=1)
        model = models.build("digits").to(setting.device)
        x, y = torch.rand(2, 1, 8, 8, device=setting.device), torch.tensor([0, 1], device=setting.device)
    else:
        model = networks.trained(name).to(setting.device)
        x, y = (t.to(setting.device) for t in networks.images(name, setting.batch, seed=10**6))
    adam = {"capturable": True} if setting.device.type == "cuda" else {}

    def check(bounds: Any) -> tuple[dict[str, float], bool | None]:
        if isinstance(bounds, ll.LocalBounds):
            facts = bench_training_step.quality(model, x, bounds)
            return facts, facts["closeness_mean"] > (0 if setting.tiny else LEAST_MEAN_CLOSENESS)
        return bench_training_step.quality(model, x, bounds) if bounds else {}, None  # a compiled step has no bounds

    applied: list[float] = []  # flops of one application, by operator
    with torch.no_grad():
        value = x
        for module in model:
            value = module(value)
            if isinstance(module, nn.Linear | nn.Conv2d):
                applied.append(2.0 * value.numel() * module.weight[0].numel())
    norms = 2 * recipe.iterations + 2
    flops = {
        "plain": 2 * applied[0] + 3 * sum(applied[1:]),
        "ours": (2 + norms) * applied[0] + (3 * 3 + 2 + norms) * sum(applied[1:-1]) + 3 * applied[-1],
    }

    def variant(kind: str, how: Callable[..., Any] | None = None) -> Variant:
        call = step.step(model, step.adam(model, **adam), recipe, kind, x, y, how)
        judge = check if kind in ("ours", "paper") else None
        capture = kind in ("ours", "plain")  # the published translation loop waits for the device
        label = f"{kind} compiled" if how else kind
        return Variant(label, "both", call, len(x), flops.get(kind), None, judge, capture)

    variants = [variant(kind) for kind in ("ours", "paper", "paper-lean", "plain")]
    return [*variants, variant("paper", setting.compile)] if compiled else variants


# ---- measuring ----


class Clock:
    """Milliseconds of calls. On a GPU by events, the L2 cache overwritten before each."""

    def __init__(self, setting: Setting) -> None:
        self.seconds = setting.seconds
        self.on_gpu = setting.device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
            self.buffer = torch.empty(max(4 * cache, 2**26), dtype=torch.uint8, device=setting.device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def many(self, call: Callable[[], object], count: int) -> list[float]:
        if not self.on_gpu:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for before, after in events:
            self.buffer.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in events]

    def in_turn(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """The median of every round, for each call."""
        estimate = {name: 1e-3 * self.many(call, 1)[0] for name, call in calls.items()}
        rounds: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(REPEATS):
            for name, call in calls.items():
                if index < 2 or estimate[name] < SLOW:
                    count = min(max(int(self.seconds / REPEATS / max(estimate[name], 1e-6)), 1), MOST_CALLS)
                    rounds[name].append(statistics.median(self.many(call, count)))
        return rounds


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, captured on the current stream. The results live as long as the function returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = call()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def summary(rounds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rounds), "low": min(rounds), "high": max(rounds)}


def failure(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


def set_precision(precision: str) -> None:
    """float32 means float32 for every variant: without this, torch's own convolutions would take TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def measure(case: Case, setting: Setting, clock: Clock, prepare: bool = False) -> dict[str, Any]:
    """One case as it goes into the JSON. A variant that fails says why and leaves the others alone."""
    result: dict[str, Any] = {"op": case.op, "case": case.name, "precision": case.precision}
    torch._dynamo.reset()
    set_precision(case.precision)
    try:
        variants = case.build()
    except Exception as error:
        return {**result, "error": failure(error), "variants": []}
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for variant in variants:
        entry: dict[str, Any] = {"name": variant.name, "work": variant.work, "samples": variant.samples}
        entry |= {"flops": variant.flops, "bytes": variant.bytes}
        if case.iterations and variant.work == "forward":
            entry["iterations"] = case.iterations
        key = f"{variant.work}: {variant.name}"
        entries[key] = entry
        try:
            output = variant.call()
            clock.synchronize()
            if variant.check:
                facts, right = variant.check(output)
                entry |= {"facts": facts, "right": None if right is None else bool(right)}
            del output
            if clock.on_gpu:
                entry["peak_bytes"] = peak_bytes(variant.call)
            calls[key] = variant.call
        except Exception as error:
            entry["error"] = failure(error)
    if not prepare:
        for key, rounds in clock.in_turn(calls).items():
            entries[key]["ms"] = summary(rounds)
        if clock.on_gpu:
            graphs: dict[str, Callable[[], object]] = {}
            for key in [f"{v.work}: {v.name}" for v in variants if v.capture]:
                if key in calls:
                    try:
                        graphs[key] = captured(calls[key])
                    except Exception as error:
                        entries[key]["graph_error"] = failure(error)
            for key, rounds in clock.in_turn(graphs).items():
                entries[key]["graph_ms"] = summary(rounds)
    return {**result, "variants": list(entries.values())}


def launch(case: Case) -> None:
    """The ops of ours once, the profiler on."""
    set_precision(case.precision)
    for variant in case.build():
        if variant.name == "ours" and variant.work == "both":
            variant.call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            variant.call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory at its peak beyond what stood before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(setting: Setting, clock: Clock) -> dict[str, float]:
    """Rates of a large copy (bytes read and written) and of large matrix products, in 1/s."""
    size, count = (2**10, 32) if setting.tiny else (2**28, 8192)
    source = torch.rand(size, device=setting.device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[float, Callable[[], object]]] = {"copy": (8.0 * size, lambda: target.copy_(source))}
    a, b = torch.randn(2, count, count, device=setting.device)
    halves = [t.bfloat16() for t in (a, b)]
    calls |= {name: (2.0 * count**3, lambda: a @ b) for name in ("float32", "tf32")}
    calls["bfloat16"] = (2.0 * count**3, lambda: halves[0] @ halves[1])
    rates = {}
    for name, (work, call) in calls.items():
        set_precision(name)
        clock.many(call, 3)
        rates[name] = 1e3 * work / statistics.median(clock.many(call, 10))
    return rates


# ---- what it was measured on ----


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str:
    """Of the tree this file lies in; else LOCALLIP_COMMIT; else "unknown"."""
    described = None
    if (ROOT / ".git").exists():
        described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described or os.environ.get("LOCALLIP_COMMIT") or "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
    release = re.search(r"release [^\n]*", _output(nvcc, "--version") or "") if nvcc else None
    gpu: dict[str, Any] = {"gpu": "none: cpu"}
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver.splitlines()[0] if driver else "unknown",
        }
    return {
        **gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "nvcc": release[0] if release else "none",
        "build": ll.build_info(),
        "python": platform.python_version(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def cases(setting: Setting) -> list[Case]:
    """What the targets are about first: a run can be cut short."""
    cifar, mnist = (list(step_cases(setting, name)) for name in ("cifar10-6c2f", "mnist-4c3f"))
    return [*activation_cases(setting), *margin_cases(setting), *norm_cases(setting), *cifar, *mnist]


def write(path: Path, run: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(run, indent=1) + "\n")
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="where the JSON goes; rewritten after every case")
    parser.add_argument("--device", default=DEVICE.type, choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, and torch.compile without a code generator")
    parser.add_argument("--prepare", action="store_true", help="run once what takes long the first time")
    parser.add_argument("--launch", action="store_true", help="every op of ours once, for a profiler")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    options = parser.parse_args(arguments)
    if options.prepare + options.launch + bool(options.out) != 1:
        parser.error("want a file for the JSON, --prepare or --launch, one of the three")
    begin = time.monotonic()
    setting = Setting(torch.device(options.device), options.tiny)
    clock = Clock(setting)
    # A baseline that fell back to plain PyTorch unnoticed would be none: the translation loop compiles once a round.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    run: dict[str, Any] = {"environment": environment(setting.device) | {"batch": setting.batch}, "cases": []}
    # Not on the default stream, where nothing can be captured.
    with torch.cuda.stream(torch.cuda.Stream()) if clock.on_gpu else nullcontext():
        if options.launch:
            for case in cases(setting):
                if case.op != "training_step":
                    print(f"{case.op}: {case.name} ({case.precision})", flush=True)
                    launch(case)
            return 0
        if not options.prepare:
            run["ceilings"] = ceilings(setting, clock)
        for case in cases(setting):
            if options.prepare and not case.compiled:
                continue
            title = f"{case.op}: {case.name} ({case.precision})"
            if time.monotonic() - begin > options.seconds:
                result: dict[str, Any] = {"op": case.op, "case": case.name, "precision": case.precision}
                result |= {"error": "left out: no time", "variants": []}
            else:
                result = measure(case, setting, clock, options.prepare)
            run["cases"].append(result)
            print(f"{time.monotonic() - begin:7.1f} s  {title}", flush=True)
            if options.out:
                write(options.out, run)
    found = wrong(run)
    for line in found:
        print(f"FAILED {line}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
