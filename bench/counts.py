"""python -m bench counts: what the kernels of norms execute on chip, counted without a GPU, and a model of its cycles.

    python -m bench counts                       the layers of three networks, and one layer by its phases
    python -m bench counts --source OTHER/csrc   the kernels of another checkout
    python -m bench counts --measured FILE       beside the times of bench/results/gpu-h200-norms-2026-11-27.md
    python -m bench counts --json FILE           keep the counts;   --against FILE: fail where one of them has risen
    python -m bench counts --check               a few layers against bench/counts.json, which
    python -m bench counts --check --json bench/counts.json   renews

nvcc makes PTX, tests/emulation/ptx.cpp executes it for one sample, warp by warp. It counts instructions, wavefronts of
shared memory (32 banks of 4 bytes) and sectors of global memory (32 bytes). Nothing here is a measurement.

The model, of an H100 or H200:

- A PTX instruction is as many machine instructions as `kind_of` says: 20 an integer division, 2 an addition of 64 bits
  or a branch, none a move. Short conditional stretches are predicated, as ptxas does.
- A warp issues an instruction a cycle. Within a stretch without branches it issues each as soon as its operands are
  there (KINDS has the latencies) and its unit is free, loads and stores in the order of the text where they might meet;
  the next stretch begins when all have issued. So ptxas's order of a stretch is taken to be the best one.
- A multiprocessor has four cores, with a quarter of a block's warps each. From barrier to barrier it takes as long as
  the slowest warp, or as its busiest resource if that is more: issue slots, tensor, float64 and special unit of a core,
  shared memory (a wavefront a cycle), its share of L2 (SECTOR cycles a sector). Then the barrier.
- CACHED_LINES lines of 128 bytes of code are at hand, of a core's 12 KiB; any other takes LINE_MISS cycles.
- Blocks of a batch run in waves. Those that share a multiprocessor are taken to fill each other's waits entirely.

Latencies are those that are published of these chips, or near them. CLOCK is the H200's boost. CACHED_LINES, LINE_MISS
and the latency of a global load were fitted to its measured times; bench/results/counts-2026-12-01.md says how well.

The floor is the least time by FLOPs at the rate of mma.sync or by bytes (masks and start in, vectors out) at the
bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench.report import markdown_table
from locallip_cuda.experiments import models
from tests.emulation import ptx

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "counts.json"
NETWORKS = ("cifar10-6c2f", "mnist-4c3f", "tinyimagenet-8c2f")
PHASED = "3x3 32-32 on 32x32"
TOLERANCE = 0.03  # by which a count may rise

# ---- the device ------------------------------------------------------------------------------------------------------

MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.98e9, 4.2e12  # Hz, bytes/s
SHARED, SHARED_OF_BLOCK = 228 * 1024, 1024  # bytes of a multiprocessor; what each block takes beside its own
THREADS = 2048
LAUNCH = 3e-6  # seconds, in a CUDA graph
CACHED_LINES, LINE_MISS = 72, 52
BRANCH, BARRIER, CLUSTER_BARRIER, SECTOR = 10, 30, 1500, 1.5
# multiplications with addition, a cycle and multiprocessor, by mma.sync; float32 takes three products
TENSOR_RATE = {"float32": 512 / 3, "tf32": 512, "bfloat16": 1024}
FLOAT32_RATE = 128  # the same without tensor cores


class Kind(NamedTuple):
    """Of machine instructions. latency: cycles to a result. occupancy: those that a warp takes of its core's unit."""

    name: str
    latency: float
    unit: str = ""
    occupancy: float = 0


UNITS = ("tensor unit", "float64 unit", "special unit")
KINDS = (
    Kind("free", 0),
    Kind("integer and float32", 5),
    Kind("integer division", 110),
    Kind("float64", 16, "float64 unit", 2),
    Kind("float64 division and root", 200, "float64 unit", 2),
    Kind("conversion", 22, "special unit", 8),
    Kind("special", 22, "special unit", 8),
    Kind("shared load", 30),
    Kind("shared store", 0),
    Kind("remote store", 0),
    Kind("global load", 450),
    Kind("global store", 0),
    Kind("asynchronous copy", 450),
    Kind("warp operation", 24),
    Kind("tensor", 20, "tensor unit", 8),
    Kind("branch", 0),
    Kind("barrier", 0),
)
NUMBER = {kind.name: i for i, kind in enumerate(KINDS)}

# What an instruction is charged to: the innermost function of these that it is from; "products", the stretches of code
# with tensor instructions; "rest", none.
PHASES = (
    *("rest", "load_mask", "collect", "start", "apply", "products", "tile", "next_piece", "normalise"),
    *("cluster_sum", "send_edges", "find_in_warp", "finish", "pack_kernel", "gram_kernel"),
)
ONCE_A_CALL = "pack_kernel"  # whatever the batch


def kind_of(opcode: str) -> tuple[str, str, float]:
    """The kind of a PTX instruction, that of a generic access outside shared memory, and machine instructions."""
    op, *rest = opcode.split(".")
    if op == "ldmatrix":
        return "shared load", "shared load", 1
    if op in ("ld", "st"):
        what = "load" if op == "ld" else "store"
        if "param" in rest:
            return "free", "free", 0
        if "shared::cluster" in rest:
            return "remote store", "remote store", 1
        return f"shared {what}", f"global {what}", 1
    kind, weight = "integer and float32", 1.0
    if op in ("mov", "cvta", "ret") or opcode in ("and.pred", "or.pred", "cvt.u64.u32", "cvt.u32.u64", "cvt.s64.s32"):
        kind, weight = "free", 0
    elif op in ("div", "rcp", "sqrt") and rest[-1].startswith("f"):
        kind, weight = "float64 division and root", {"div": 20, "rcp": 10, "sqrt": 15}[op]
    elif op in ("div", "rem"):
        kind, weight = "integer division", 20
    elif op == "cvt" and not {"tf32", "bf16x2"} & set(rest):
        kind = "conversion"
    elif op in ("bfind", "popc", "brev"):
        kind = "special"
    elif rest[-1:] == ["f64"] and op not in ("setp", "selp"):
        kind = "float64"
    elif op in ("shfl", "vote") or opcode == "bar.warp.sync":
        kind = "warp operation"
    elif op == "mma":
        kind = "tensor"
    elif op == "bra":
        kind, weight = "branch", 1 if "uni" in rest else 2
    elif op in ("bar", "barrier"):
        kind = "barrier"
    elif op == "cp":
        kind = "asynchronous copy"
    elif opcode.endswith("64"):
        weight = 3 if op in ("mul", "mad") else 2
    return kind, kind, weight


# A branch over so few machine instructions, and no other branch, becomes predicates.
PREDICATED = 4


def predicated(entry: ptx.Entry) -> set[int]:
    """Branches that the machine code has not."""
    inner = set(entry.labels.values())
    found = set()
    for i, made in enumerate(entry.instructions):
        body = range(i + 1, entry.labels.get(made.target, 0))
        if not made.guard or not 0 < len(body) <= 2 * PREDICATED or inner & set(body):
            continue
        kinds = [kind_of(entry.instructions[k].opcode) for k in body]
        apart = any(kind in ("branch", "barrier", "warp operation") for kind, _, _ in kinds)
        if not apart and sum(weight for _, _, weight in kinds) <= PREDICATED:
            found.add(i)
    return found


def facts(entry: ptx.Entry) -> list[tuple[int, int, int, int, float]]:
    """For each instruction what ptx.cpp's `Fact` says: kinds, phase, stretch, machine instructions."""
    tensor = {made.block for made in entry.instructions if made.opcode.startswith("mma")}
    of_kernel = next((phase for phase in PHASES if phase in entry.name), "rest")
    gone = predicated(entry)
    joined: dict[int, int] = {}  # stretches without the branch between them
    found = []
    for i, made in enumerate(entry.instructions):
        shared, elsewhere, weight = kind_of(made.opcode)
        named = (phase for function in made.functions for phase in PHASES if f"{len(phase)}{phase}" in function)
        phase = "products" if made.block in tensor else next(named, of_kernel)
        if i in gone:
            shared, elsewhere, weight = "free", "free", 0
            first = joined.get(made.block, made.block)
            for k in range(i + 1, entry.labels[made.target] + 1):
                joined[entry.instructions[k].block] = first
        stretch = joined.get(made.block, made.block)
        found.append((NUMBER[shared], NUMBER[elsewhere], PHASES.index(phase), stretch, weight))
    return found


# ---- as ptx.cpp has them ---------------------------------------------------------------------------------------------

_KINDS, _PHASES, _UNITS = 32, 16, 4
CAUSES = ("issue", "branches", "code", "shared wavefronts", "sectors", "barriers", *UNITS)
_number = ctypes.c_double


class Model(ctypes.Structure):
    _fields_ = (
        ("latency", _number * _KINDS),
        ("occupancy", _number * _KINDS),
        ("unit", ctypes.c_int * _KINDS),
        *((name, _number) for name in ("line_miss", "cached_lines", "branch", "barrier", "cluster_barrier", "sector")),
    )

    @classmethod
    def of_device(cls) -> Model:
        model = cls()
        for i, kind in enumerate(KINDS):
            model.latency[i], model.occupancy[i] = kind.latency, kind.occupancy
            model.unit[i] = UNITS.index(kind.unit) if kind.unit else -1
        model.line_miss, model.cached_lines, model.branch = LINE_MISS, CACHED_LINES, BRANCH
        model.barrier, model.cluster_barrier, model.sector = BARRIER, CLUSTER_BARRIER, SECTOR
        return model


class Counts(ctypes.Structure):
    _fields_ = (
        *((name, _number * _KINDS * _PHASES) for name in ("executed", "wavefronts", "sectors", "bytes")),
        ("cycles", _number * (_KINDS + len(CAUSES) - len(UNITS) + _UNITS) * _PHASES),
        *((name, _number) for name in ("total", "launches", "blocks", "cluster", "threads", "shared_bytes")),
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution of maps in_channels x size x size, or with size 0 a dense layer."""

    in_channels: int
    out_channels: int
    size: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    density: float = 0.5

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1 if self.size else 0

    @property
    def units(self) -> tuple[int, int]:
        """In and out."""
        inside, outside = (self.size**2, self.out_size**2) if self.size else (1, 1)
        return self.in_channels * inside, self.out_channels * outside

    @property
    def title(self) -> str:
        if not self.size:
            return f"dense {self.out_channels}x{self.in_channels}, density {self.density}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels}-{self.out_channels}"
        return f"{self.kernel}x{self.kernel}{stride} {channels} on {self.size}x{self.size}"

    @property
    def geometry(self) -> tuple[int, ...]:
        """ConvolutionGeometry's fields."""
        if not self.size:
            return ()
        maps = (self.in_channels, self.size, self.size, self.out_channels, self.out_size, self.out_size)
        return (*maps, *[self.kernel] * 2, *[self.stride] * 2, *[self.padding] * 2)

    def flops(self, iterations: int) -> float:
        """Multiplications with addition of a sample's applications, padding included."""
        each = self.in_channels * self.units[1] * self.kernel**2
        return each * (2 * iterations + 1)


def layers_of(network: str) -> Iterator[Layer]:
    spec = models.spec(network)
    channels, size, _ = spec.input_shape
    for kernel, stride, padding, out in spec.convolutions:
        layer = Layer(channels, out, size, kernel, stride, padding)
        yield layer
        channels, size = out, layer.out_size
    widths = [channels * size**2, *spec.hidden, spec.classes]
    for width, out in itertools.pairwise(widths):
        yield Layer(width, out)


# ---- counting --------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """One launch for a sample. cycles: of a cluster, by phase and by what was waited for; totals: over all blocks."""

    name: str
    cycles: float
    phases: dict[str, dict[str, float]]
    totals: dict[str, float]
    blocks: int
    cluster: int
    at_once: int  # clusters on the device

    def seconds(self, batch: int) -> float:
        clusters = self.blocks // self.cluster * (1 if ONCE_A_CALL in self.name else batch)
        return math.ceil(clusters / self.at_once) * self.cycles / CLOCK + LAUNCH


@dataclass(frozen=True)
class Counted:
    """why: the kernel's reason not to compute the norms of this layer."""

    layer: Layer
    precision: str
    iterations: int
    kernels: tuple[Kernel, ...] = ()
    why: str = ""

    @property
    def title(self) -> str:
        return f"{self.layer.title}, {self.precision}, {self.iterations}"

    @property
    def main(self) -> Kernel:
        """The one that iterates."""
        return max(self.kernels, key=lambda kernel: kernel.cycles)

    def seconds(self, batch: int) -> float:
        return sum(kernel.seconds(batch) for kernel in self.kernels)

    def floor(self, batch: int) -> tuple[float, str]:
        rate = TENSOR_RATE[self.precision] if self.layer.size else FLOAT32_RATE
        into, out = self.layer.units
        flops = self.layer.flops(self.iterations) * (1 if self.layer.size else self.layer.density**2)
        floors = {
            "arithmetic": batch * flops / (rate * MULTIPROCESSORS * CLOCK),
            "memory": batch * ((into + out) * 5 + into * 4) / BANDWIDTH,
        }
        bound = max(floors, key=lambda name: floors[name])
        return floors[bound], bound

    def record(self) -> dict[str, float]:
        """What may not rise."""
        found: dict[str, float] = {}
        for kernel in self.kernels:
            for name, value in [*kernel.totals.items(), ("cycles", kernel.cycles)]:
                if value:
                    found[name] = round(found.get(name, 0) + value)
        return found


class Counter:
    """Counts with one build of the kernels."""

    def __init__(self, source: Path) -> None:
        self.library = ptx.make(source, HERE.parent / "build" / "ptx")
        self.handle = self.library.handle
        self.handle.locallip_ptx_counts.restype = ctypes.POINTER(Counts)
        self.handle.locallip_emulation_multiprocessors(0)  # the fewest blocks a sample, as for a large batch
        for name, entry in self.library.entries.items():
            self.library.load(name, facts(entry))
        self.handle.locallip_ptx_model(ctypes.byref(Model.of_device()))

    def count(self, layer: Layer, precision: str, iterations: int) -> Counted:
        random = torch.Generator().manual_seed(0)
        into, out = layer.units
        row_mask, col_mask = (torch.rand(1, n, generator=random) < layer.density for n in (out, into))
        start = torch.randn(1, into, generator=random)
        sizes = (layer.out_channels, layer.kernel, layer.kernel, layer.in_channels)
        weight = torch.randn(sizes if layer.size else sizes[::3], generator=random)
        self.reset()
        try:
            self.library.norms(
                *(weight, row_mask, col_mask, start),
                geometry=layer.geometry,
                iterations=iterations,
                precision=precision,
            )
        except ValueError as error:
            return Counted(layer, precision, iterations, why=str(error))
        kernels = tuple(self._kernel(name) for name in self.library.entries if self.counted(name).launches)
        return Counted(layer, precision, iterations, kernels)

    def counted(self, name: str) -> Counts:
        """Since the last reset."""
        found: Counts = self.handle.locallip_ptx_counts(name.encode()).contents
        return found

    def reset(self) -> None:
        for name in self.library.entries:
            ctypes.memset(ctypes.byref(self.counted(name)), 0, ctypes.sizeof(Counts))

    def _kernel(self, name: str) -> Kernel:
        counts = self.counted(name)
        clusters = counts.blocks / counts.cluster
        causes = [kind.name for kind in KINDS] + [""] * (_KINDS - len(KINDS)) + [*CAUSES]
        phases = {}
        for phase, row in zip(PHASES, counts.cycles, strict=False):
            waits = {cause: cycles / clusters for cause, cycles in zip(causes, row, strict=False) if cycles}
            if waits:
                phases[phase] = waits
        totals = {kind.name: sum(row[i] for row in counts.executed) for i, kind in enumerate(KINDS) if i}
        totals["shared wavefronts"] = sum(map(sum, counts.wavefronts))
        totals["sectors"] = sum(map(sum, counts.sectors))
        by_shared = SHARED // (int(counts.shared_bytes) + SHARED_OF_BLOCK)
        compiled_for = self.library.entries[name].blocks
        together = max(1, min(compiled_for, by_shared, THREADS // int(counts.threads)))
        at_once = MULTIPROCESSORS * together // int(counts.cluster)
        return Kernel(name, counts.total / clusters, phases, totals, int(counts.blocks), int(counts.cluster), at_once)


# ---- what is printed -------------------------------------------------------------------------------------------------


def table(counted: Sequence[Counted], batch: int) -> list[str]:
    us = f"us, B = {batch}"
    head = [
        "layer",
        "precision",
        "iterations",
        "blocks a sample",
        "cycles of a block",
        us,
        "floor, us",
        "ratio",
        "bound by",
    ]
    rows = []
    for each in counted:
        row = [each.layer.title, each.precision, str(each.iterations)]
        if each.why:
            rows.append([*row, each.why, "", "", "", "", ""])
            continue
        floor, bound = each.floor(batch)
        main = each.main
        numbers = [f"{main.cycles:.0f}", f"{1e6 * each.seconds(batch):.0f}", f"{1e6 * floor:.1f}"]
        rows.append([*row, str(main.blocks), *numbers, f"{each.seconds(batch) / floor:.1f}", bound])
    return markdown_table(head, rows)


_MEASURED = re.compile(
    r"\| (?:conv (?P<kernel>\d)x\d(?:/(?P<stride>\d))?, (?P<into>\d+) to (?P<out>\d+) on (?P<size>\d+)x\d+"
    r"|dense (?P<rows>\d+)x(?P<columns>\d+)), density (?P<density>[\d.]+), (?P<precision>\w+), on chip \|(?P<ms>.*)\|"
)


def fit_table(counter: Counter, text: str, batch: int) -> list[str]:
    """Counted over measured times, of a file of results with a row a layer and a column a number of iterations."""
    head = re.search(r"\| ms for \|(.*)\|", text)
    assert head is not None
    iterations = [int(number) for number in re.findall(r"\d+", head[1])]
    rows, errors = [], []
    for found in _MEASURED.finditer(text):
        if found["size"]:
            kernel, stride, into, out, size = (int(found[k] or 1) for k in ("kernel", "stride", "into", "out", "size"))
            layer = Layer(into, out, size, kernel, stride, 1, density=float(found["density"]))
        else:
            layer = Layer(int(found["columns"]), int(found["rows"]), density=float(found["density"]))
            if found["precision"] != "float32":
                continue
        row = [f"{layer.title}, {found['precision']}"]
        for number, ms in zip(iterations, found["ms"].split("|"), strict=True):
            if ms.strip():
                counted = 1e3 * counter.count(layer, found["precision"], number).seconds(batch)
                if layer.size:
                    errors.append(math.log(counted / float(ms)))
                row.append(f"{counted:.3f} / {float(ms):.3f} = {counted / float(ms):.2f}")
            else:
                row.append("")
        rows.append(row)
    spread = math.exp(math.sqrt(sum(error * error for error in errors) / len(errors)))
    table = markdown_table(["counted / measured, ms", *map(str, iterations)], rows)
    return [*table, "", f"Convolutions: off by a factor of {spread:.2f} (root mean square of the logarithms)."]


def phase_table(counted: Counted) -> list[str]:
    rows = []
    main = counted.main
    for phase, waits in sorted(main.phases.items(), key=lambda item: -sum(item[1].values())):
        cycles = sum(waits.values())
        first = sorted(waits.items(), key=lambda item: -item[1])[:5]
        shares = ", ".join(f"{cause} {100 * value / cycles:.0f} %" for cause, value in first)
        rows.append([phase, f"{cycles:.0f}", f"{100 * cycles / main.cycles:.0f} %", shares])
    return markdown_table(["phase", "cycles", "share", "waits for"], rows)


def instruction_table(counted: Counted) -> list[str]:
    totals = counted.main.totals
    return markdown_table(["kind", "a sample"], [[name, f"{value:.0f}"] for name, value in totals.items() if value])


def risen(old: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{title}: {name}: {value:.0f}, before {old[title].get(name, 0):.0f}"
        for title, values in new.items()
        for name, value in values.items()
        if title in old and value > (1 + TOLERANCE) * old[title].get(name, 0)
    ]


def checked(counter: Counter) -> Iterator[Counted]:
    """A few layers, of little time and all kinds of tiles."""
    for layer in (Layer(32, 32, 32, 3, 1, 1), Layer(32, 32, 16, 4, 2, 1), Layer(3, 32, 16, 3, 1, 1)):
        for precision in ptx.PRECISIONS:
            yield counter.count(layer, precision, 1)
    for layer in (Layer(256, 256, density=0.3), Layer(512, 10)):
        yield counter.count(layer, "float32", 2)


def compiler() -> str:
    path = ptx.nvcc()
    assert path is not None
    return subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout.split("release ")[1][
        :4
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=HERE.parent / "csrc", metavar="DIR", help="default: csrc")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME", help="whose layers")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--iterations", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--precision", nargs="+", default=ptx.PRECISIONS, choices=ptx.PRECISIONS)
    parser.add_argument(
        "--phases", default=PHASED, metavar="TITLE", help=f"layer to show by phases (default: {PHASED})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    parser.add_argument("--against", type=Path, metavar="FILE", help="fail where a count is above the file's")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="counted over the measured times of a results file"
    )
    parser.add_argument("--check", action="store_true", help=f"a few layers against {COMMITTED.name}")
    options = parser.parse_args(arguments)
    if reason := ptx.missing():
        print(f"Counts left out: {reason}.")
        return 0
    counter = Counter(options.source.resolve())
    if options.measured:
        print(*fit_table(counter, options.measured.read_text(), options.batch), sep="\n")
        return 0
    against = options.against or (COMMITTED if options.check and not options.json else None)
    if options.check:
        counted = list(checked(counter))
    else:
        layers = dict.fromkeys(layer for network in options.networks for layer in layers_of(network))
        counted = []
        for layer in layers:
            for precision in options.precision if layer.size else ("float32",):
                counted += [counter.count(layer, precision, iterations) for iterations in options.iterations]
    print(*table(counted, options.batch), sep="\n")
    for each in counted:
        if each.layer.title == options.phases and each.kernels and not options.check:
            print(f"\n{each.title} iterations\n", *phase_table(each), sep="\n")
            print("", *instruction_table(each), sep="\n")
    new = {each.title: each.record() for each in counted if each.kernels}
    if options.json:
        options.json.write_text(json.dumps({"nvcc": compiler(), "counts": new}, indent=1) + "\n")
    if against is None:
        return 0
    old = json.loads(against.read_text())
    if old["nvcc"] != compiler():
        print(f"\nNot compared: {against.name} is from nvcc {old['nvcc']}, this is {compiler()}.")
        return 0
    found = risen(old["counts"], new)
    print("", *[f"RISEN {line}" for line in found] or ["No count has risen."], sep="\n")
    return 1 if found else 0
