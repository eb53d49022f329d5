"""python -m bench counts: what the kernels of convolutions execute, counted without a GPU, and cycles by a model.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.emulation import ptx

ROOT = Path(__file__).resolve().parents[1]


class Kind(NamedTuple):
    """Of machine instructions. latency: cycles to a result. occupancy: cycles that a warp's takes of a unit of its core."""

    name: str
    latency: float
    unit: int = -1
    occupancy: float = 0


TENSOR, FLOAT64, SPECIAL = 0, 1, 2  # units
UNITS = ("tensor unit", "float64 unit", "special unit", "")
KINDS = (
    Kind("free", 0),
    Kind("integer and float32", 5),
    Kind("integer division", 110),
    Kind("float64", 16, FLOAT64, 2),
    Kind("float64 division and root", 200, FLOAT64, 2),
    Kind("conversion", 22, SPECIAL, 8),
    Kind("special", 22, SPECIAL, 8),
    Kind("shared load", 30),
    Kind("shared store", 0),
    Kind("remote store", 0),
    Kind("global load", 600),
    Kind("global store", 0),
    Kind("asynchronous copy", 0),
    Kind("warp operation", 24),
    Kind("tensor", 20, TENSOR, 8),
    Kind("branch", 0),
    Kind("barrier", 0),
)
NUMBER = {kind.name: i for i, kind in enumerate(KINDS)}
CAUSES = ("issue", "branches", "code fetch", "shared wavefronts", "sectors", "barriers", *UNITS)

# What a line of the source belongs to: the innermost of these functions, and what has tensor instructions apart.
PHASES = ("rest", "load_mask", "start", "products", "tile", "next_piece", "cluster_sum", "decompose_in_warp", "finish", "pack_kernel")


def kind_of(opcode: str) -> tuple[str, str, float]:
    """The kind of a PTX instruction, that of a generic access outside shared memory, and machine instructions."""
    op, *rest = opcode.split(".")
    if op in ("ld", "st"):
        what = "load" if op == "ld" else "store"
        if "param" in rest:
            return "free", "free", 0
        if "shared::cluster" in opcode:
            return "remote store", "remote store", 1
        return f"shared {what}", f"global {what}", 1
    kind, weight = "integer and float32", 1.0
    double = rest[-1:] == ["f64"] and op != "setp" and op != "selp"
    if op in ("mov", "cvta", "ret") or opcode in ("and.pred", "or.pred", "cvt.u64.u32", "cvt.u32.u64", "cvt.s64.s32"):
        kind, weight = "free", 0
    elif op in ("div", "rcp", "sqrt") and rest[-1].startswith("f"):
        kind, weight = "float64 division and root", {"div": 20, "rcp": 10, "sqrt": 15}[op]
    elif op in ("div", "rem"):
        kind, weight = "integer division", 20
    elif op == "cvt" and "tf32" not in rest:
        kind = "conversion"
    elif op in ("bfind", "popc", "brev"):
        kind = "special"
    elif double:
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
    elif opcode == "mapa.shared::cluster.u32":
        weight = 1
    return kind, kind, weight


# A branch over so few machine instructions, and no other branch, becomes predicates.
PREDICATED = 4


def predicated(entry: ptx.Entry) -> set[int]:
    """Branches that the machine code has not."""
    inner = set(entry.labels.values())
    code = entry.instructions
    found = set()
    for i, made in enumerate(code):
        end = entry.labels.get(made.target, -1)
        body = range(i + 1, end)
        if made.guard and body and len(body) <= 2 * PREDICATED and not inner & set(body):
            kinds = [kind_of(code[k].opcode) for k in body]
            apart = any(kind in ("branch", "barrier", "warp operation") for kind, _, _ in kinds)
            if not apart and sum(weight for _, _, weight in kinds) <= PREDICATED:
                found.add(i)
    return found


def facts(entry: ptx.Entry) -> list[tuple[int, int, int, int, float]]:
    tensor = {made.block for made in entry.instructions if made.opcode.startswith("mma")}
    gone = predicated(entry)
    joined: dict[int, int] = {}  # blocks without the branch between them
    found = []
    for i, made in enumerate(entry.instructions):
        shared, elsewhere, weight = kind_of(made.opcode)
        phase = "pack_kernel" if "pack_kernel" in entry.name else "rest"
        for function in made.functions:
            named = [p for p in PHASES if f"{len(p)}{p}" in function]
            if named:
                phase = named[0]
                break
        if made.block in tensor:
            phase = "products"
        if i in gone:
            shared, elsewhere, weight = "free", "free", 0
            first = joined.get(made.block, made.block)
            for k in range(i + 1, entry.labels[made.target] + 1):
                joined[entry.instructions[k].block] = first
        found.append((NUMBER[shared], NUMBER[elsewhere], PHASES.index(phase), joined.get(made.block, made.block), weight))
    return found


MOST_KINDS, MOST_PHASES, MOST_UNITS = 32, 16, 4


class Model(ctypes.Structure):
    """As in tests/emulation/ptx.cpp."""

    _fields_ = [
        ("latency", ctypes.c_double * MOST_KINDS),
        ("occupancy", ctypes.c_double * MOST_KINDS),
        ("unit", ctypes.c_int * MOST_KINDS),
        ("line_miss", ctypes.c_double),
        ("cached_lines", ctypes.c_double),
        ("branch", ctypes.c_double),
        ("barrier", ctypes.c_double),
        ("cluster_barrier", ctypes.c_double),
        ("sector", ctypes.c_double),
    ]


_Counted = ctypes.c_double * MOST_KINDS * MOST_PHASES


class Counts(ctypes.Structure):
    _fields_ = [
        ("executed", _Counted),
        ("wavefronts", _Counted),
        ("sectors", _Counted),
        ("bytes", _Counted),
        ("cycles", ctypes.c_double * (MOST_KINDS + 6 + MOST_UNITS) * MOST_PHASES),
        ("total", ctypes.c_double),
        ("blocks", ctypes.c_double),
    ]
