"""Reads the PTX that nvcc makes of a .cu file into what ptx.cpp executes, and builds a library that does.

The host code of the file is compiled as it is, beside `cuda_runtime.h` of this folder; its launches then run the PTX:
the inline PTX of csrc/cuda/primitives.cuh too, which the kernels compiled as C++ do not contain.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import build

ARCHITECTURE = "sm_90"
KERNELS = ("masked_norm_convolution", "masked_norm_dense")
PRECISIONS = ("float32", "tf32", "bfloat16")
SPECIAL = ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%cluster_ctarank", "%laneid")  # as ptx.cpp fills them
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def nvcc() -> str | None:
    """The compiler: CUDA_HOME's, or PATH's, or the newest of /usr/local."""
    homes = [os.environ.get("CUDA_HOME", ""), *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in homes]
    return found[0] or shutil.which("nvcc") or next(filter(None, found), None)


def missing() -> str | None:
    """What this machine lacks to make and run PTX, or None."""
    return "nvcc is not installed" if nvcc() is None else build.missing()


# ---- the text of a program -------------------------------------------------------------------------------------------


@dataclass
class Instruction:
    """registers, results first; `functions`: where it comes from, the innermost first, as mangled names."""

    opcode: str
    guard: str
    results: int
    registers: list[int]
    offset: int = 0
    target: str = ""
    functions: tuple[str, ...] = ()
    block: int = 0


@dataclass
class Entry:
    """One kernel. constants: register to the 64 bits that it always holds; labels: to the number of an instruction.

    own: names of registers, where a number may follow; shared: the one array of shared memory.
    """

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    shared: str = ""
    constants: dict[int, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    blocks: int = 1  # that the kernel is compiled to have on a multiprocessor
    instructions: list[Instruction] = field(default_factory=list)

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def operand(self, text: str) -> int:
        """Of a value: a register's number, that of a constant's where it is one."""
        number = self.register(text)
        name, _, distance = text.partition("+")
        if text in self.parameters:
            self.constants[number] = self.parameters[text]
        elif text.startswith(("0f", "0d")):
            self.constants[number] = int(text[2:], 16)
        elif re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
            self.constants[number] = int(text, 0) % 2**64
        elif name == self.shared:
            self.constants[number] = int(distance or 0)
        elif text not in SPECIAL and text != "_" and re.sub(r"\d+$", "", text) not in self.own:
            raise ValueError(f"{text}, in {self.name}, is nothing that is known here")
        return number


def _parameters(entry: Entry, header: str) -> None:
    for align, kind, name, count in re.findall(r"\.param (?:\.align (\d+) )?\.\w(\d+) (\w+)(?:\[(\d+)\])?", header):
        size = SIZES[kind]
        boundary = int(align or size)
        at = (entry.parameter_bytes + boundary - 1) // boundary * boundary
        entry.parameters[name] = at
        entry.parameter_bytes = at + size * int(count or 1)


def _instruction(entry: Entry, statement: str) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL).groups()  # type: ignore[union-attr]
    if opcode.startswith("bra"):
        return Instruction(opcode, guard or "", 0, [], target=rest)
    offset = 0
    memory = re.search(r"\[([^\]]+)\]", rest)
    operands = [part.strip() for part in re.split(r"[,|{}]|\[[^\]]+\]", rest) if part.strip()]
    first = re.match(r"\s*\{([^}]*)\}|[^,|]*\|?[^,]*", rest)
    assert first is not None
    stores = opcode.startswith(("st.", "bar", "cp.", "ret"))
    results = 0 if stores else len([part for part in re.split(r"[,|{}]", first[0]) if part.strip()])
    if memory:
        base, plus, distance = memory[1].partition("+")
        offset = int(distance) if plus else 0
        operands.insert(results, base)
    if opcode.startswith("cp.async.cg"):  # both of its operands are addresses
        operands = [part.strip("[] ") for part in rest.split(",")]
    return Instruction(opcode, guard or "", results, [entry.operand(part) for part in operands], offset)


def _names(text: str) -> dict[str, str]:
    """Strings of the debug section by label: the functions' names."""
    names = {}
    for label, data in re.findall(r"^(\$L__info_string\d+):\n((?:\.b8 [\d,]+\n)+)", text, re.MULTILINE):
        values = [int(number) for number in re.findall(r"\d+", data.replace(".b8", ""))]
        names[label] = bytes(values[:-1]).decode()
    return names


def parse(text: str) -> Iterator[Entry]:
    """The kernels of a PTX file, with -lineinfo."""
    names = _names(text)
    place = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:, function_name (\S+), inlined_at (\d+) (\d+) (\d+))?")
    for name, header, body in re.findall(r"\.entry (\w+)\((.*?)\)\n(.*?)^}", text, re.MULTILINE | re.DOTALL):
        entry = Entry(name)
        entry.shared = "".join(re.findall(r"^\.extern \.shared .* (\w+)\[\];", text, re.MULTILINE))
        entry.own = set(re.findall(r"\.reg\s+\.\w+\s+([%\w]+?)(?:<\d+>)?\s*;", body))
        if found := re.search(r"\.minnctapersm (\d+)", body):
            entry.blocks = int(found[1])
        _parameters(entry, header)
        chains: dict[tuple[str, ...], tuple[str, ...]] = {}
        lines: dict[tuple[str, str], tuple[str, ...]] = {}
        functions: tuple[str, ...] = ()
        block = 0
        for line in body.splitlines():
            line = line.partition("//")[0].strip()
            if found := place.match(line):
                at, (function, *outer) = (found[1], found[2], found[3]), found.groups()[3:]
                if function:
                    functions = (names[function], *chains.get(tuple(outer), ()))
                elif at[1] != "0":  # what the compiler made of several places has lost the chain
                    functions = lines.get(at[:2], ())
                chains[at] = lines[at[:2]] = functions
            elif found := re.fullmatch(r"(\$\w+):", line):
                entry.labels[found[1]] = len(entry.instructions)
                block += 1
            else:
                for statement in re.sub(r"^\{", "", line).split(";"):
                    if re.match(r"@|[a-z]", statement := statement.strip()):
                        made = _instruction(entry, statement)
                        made.functions, made.block = functions, block
                        entry.instructions.append(made)
                        block += made.opcode.startswith(("bra", "ret"))
        yield entry


# ---- the library -----------------------------------------------------------------------------------------------------


class Library:
    """csrc's host code, whose launches run PTX. entries: by the names that the host's compiler gives the kernels."""

    def __init__(self, path: Path, entries: dict[str, Entry]) -> None:
        self.handle = ctypes.CDLL(str(path))
        self.entries = entries
        for function in (
            "locallip_ptx_program",
            "locallip_ptx_launch",
            "locallip_convolution_norms",
            "locallip_dense_norms",
        ):
            getattr(self.handle, function).restype = ctypes.c_char_p
        # kernels are not exported: the distance from a symbol that is finds them
        listed = subprocess.run(["nm", str(path)], check=True, capture_output=True, text=True).stdout
        symbols = {name: int(at, 16) for at, name in re.findall(r"^(\w+) \w (\w+)$", listed, re.MULTILINE)}
        known = "locallip_ptx_kernel"
        base = (ctypes.cast(getattr(self.handle, known), ctypes.c_void_p).value or 0) - symbols[known]
        for name in entries:
            self.handle.locallip_ptx_kernel(ctypes.c_void_p(base + symbols[name]), name.encode())
            self.load(name)

    def load(self, name: str, facts: Sequence[Sequence[float]] | None = None) -> None:
        """Hands a program to ptx.cpp. facts: for each instruction what it counts as (`Fact` there)."""
        entry = self.entries[name]
        head = [name, len(entry.registers), entry.parameter_bytes, len(entry.constants), len(entry.instructions)]
        lines = [" ".join(map(str, head)), *(f"{number} {value}" for number, value in entry.constants.items())]
        lines.append(" ".join(str(entry.registers.get(which, -1)) for which in SPECIAL))
        for i, made in enumerate(entry.instructions):
            guard = entry.registers[made.guard.lstrip("!")] if made.guard else -1
            target = entry.labels[made.target] if made.target else -1
            fact = facts[i] if facts else (0, 0, 0, made.block, 1)
            fields = [guard, int(made.guard.startswith("!")), made.results, len(made.registers), *made.registers]
            lines.append(" ".join(map(str, [made.opcode, *fields, made.offset, target, *fact])))
        if wrong := self.handle.locallip_ptx_program("\n".join(lines).encode()):
            raise ValueError(wrong.decode())

    def norms(
        self,
        weight: Tensor,
        row_mask: Tensor,
        col_mask: Tensor,
        start: Tensor,
        *,
        geometry: Sequence[int] = (),
        iterations: int,
        precision: str = "float32",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sigma, right, left for masks [B, units]. ValueError where the kernel says no.

        geometry: a convolution's, as the fields of ConvolutionGeometry; its weight is [out, height, width, in].
        """
        batch = len(row_mask)
        results = (
            weight.new_full((batch,), math.nan),
            weight.new_full(col_mask.shape, math.nan),
            weight.new_full(row_mask.shape, math.nan),
        )
        numbers = geometry or weight.shape
        run = self.handle.locallip_convolution_norms if geometry else self.handle.locallip_dense_norms
        arrays = [ctypes.c_void_p(x.data_ptr()) for x in (row_mask, col_mask, start, weight)]
        wrong = run(
            (ctypes.c_int * len(numbers))(*numbers),
            batch,
            iterations,
            *arrays,
            PRECISIONS.index(precision),
            *(ctypes.c_void_p(x.data_ptr()) for x in results),
        )
        if wrong:
            raise ValueError(wrong.decode())
        return results


def _host_name(name: str) -> str:
    """Of a kernel: the unnamed namespace has a name of its own from either compiler."""
    return re.sub(r"(\d+)(_GLOBAL__N__\w+)", lambda found: "12_GLOBAL__N_1" + found[2][int(found[1]) :], name)


def make(source: Path, folder: Path) -> Library:
    """Of a folder like csrc. Kept in `folder` by what it is made of."""
    compiler = nvcc()
    assert compiler is not None
    files = [*source.rglob("*.h"), *source.rglob("*.cu*"), *build.HERE.glob("*.cpp"), *build.HERE.glob("*.h")]
    text = "\0".join(f"{path.name} {path.read_text()}" for path in sorted(files))
    target = folder / hashlib.sha256(f"{build.CXX} {compiler} {text}".encode()).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    kernels = [source / "cuda" / f"{name}.cu" for name in KERNELS]
    library = target / "norms.so"

    def run(command: list[object]) -> None:
        subprocess.run([str(part) for part in command], check=True)

    if not library.exists():
        for path in kernels:
            run(
                [
                    compiler,
                    "-ptx",
                    "-lineinfo",
                    f"-arch={ARCHITECTURE}",
                    "-std=c++17",
                    "-O3",
                    path,
                    "-o",
                    target / f"{path.stem}.ptx",
                ]
            )
        parts = [(path, ["-O0", "-x", "c++"]) for path in kernels]
        parts += [
            (build.HERE / "emulation.cpp", ["-O1"]),
            (build.HERE / "ptx.cpp", ["-O2"]),
            (build.HERE / "norms.cpp", ["-O0"]),
        ]
        for path, own in parts:
            flags = ["-std=c++20", "-w", "-fPIC", f"-I{build.HERE}", f"-I{source}", *own]
            run([build.CXX, *flags, "-c", path, "-o", target / f"{path.stem}.o"])
        partial = library.with_suffix(f".{os.getpid()}")
        run([build.CXX, "-shared", *(target / f"{path.stem}.o" for path, _ in parts), "-lboost_context", "-o", partial])
        partial.rename(library)
    texts = [(target / f"{path.stem}.ptx").read_text() for path in kernels]
    return Library(library, {_host_name(entry.name): entry for each in texts for entry in parse(each)})
