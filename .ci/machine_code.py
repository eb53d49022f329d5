"""Checks the kernels' machine code against csrc/cuda/budgets.toml, and prints what it found.

    machine_code.py BUILD_LOG CUBINS

BUILD_LOG: of a build under nvcc's -Xptxas=-v. CUBINS: the folder that its --keep-dir named. `nvdisasm` is on PATH.
Local memory and spills are errors everywhere. Where a kernel has tensor instructions, its innermost loops around them
are shown, the longest row of them first, with instructions for each, and held to what the budgets allow.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

BUDGETS = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "budgets.toml"
# generic loads, addresses of 64 bits, conversions to double, and its division: none has a place among tensor
# instructions
FORBIDDEN = re.compile(r"\b(LD\.E|IMAD\.WIDE|F2F|MUFU\.RCP64H|DFMA|DMUL|DADD)\b")
REGISTERS, LANES = 65536, 32  # of a multiprocessor; of a warp


@dataclass
class Kernel:
    """loops: (tensor instructions, all instructions, the forbidden among them)."""

    registers: dict[str, int] = field(default_factory=dict)  # by architecture
    memory: dict[str, str] = field(default_factory=dict)  # stack frame and spills
    loops: list[tuple[int, int, list[str]]] = field(default_factory=list)


def named(mangled: str) -> str:
    """As in the source, without namespaces and parameters: name<arguments>."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"(locallip|cuda|\(anonymous namespace\))::", "", text.removeprefix("void "))
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:at]
    return text


def from_log(log: str) -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {}
    name = architecture = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, architecture = named(found[1]), found[2]
        elif found := re.search(r"\d+ bytes stack frame, .*", line):
            kernels.setdefault(name, Kernel()).memory[architecture] = found[0]
        elif found := re.search(r"Used (\d+) registers", line):
            kernels.setdefault(name, Kernel()).registers[architecture] = int(found[1])
    return kernels


def add_loops(kernels: dict[str, Kernel], cubin: Path) -> None:
    listing = subprocess.run(["nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\s*\.text\.", listing, flags=re.M)[1:]:
        name = named(part[: part.index(":")])
        labels: dict[str, int] = {}
        code: list[str] = []
        loops = []
        for line in part.splitlines():
            if found := re.match(r"\s*(\.L_\S+):", line):
                labels[found[1]] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
                code.append(found[1])
                back = re.search(r"BRA\b.*`\((\.L_\S+)\)", found[1])
                if back and back[1] in labels:
                    loops.append((labels[back[1]], len(code)))
        tensor = [loop for loop in loops if any("HMMA" in line for line in code[slice(*loop)])]
        for first, last in tensor:
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in tensor):
                body = code[first:last]
                bad = sorted({found[1] for line in body if (found := FORBIDDEN.search(line))})
                kernels[name].loops.append((sum("HMMA" in line for line in body), len(body), bad))
        kernels[name].loops.sort(reverse=True)


def wrong(name: str, kernel: Kernel, budget: dict[str, object] | None) -> list[str]:
    found = [f"{arch}: {text}" for arch, text in kernel.memory.items() if re.search(r"\b[1-9]\d* bytes", text)]
    if budget is None:
        return [*found, "it has no budget"] if kernel.loops else found
    most, threads, blocks = (int(str(budget[key])) for key in ("registers", "threads", "blocks"))
    for arch, used in kernel.registers.items():
        if used > most:
            found.append(f"{arch}: {used} registers, budget {most}")
        fit = REGISTERS // ((used + 7) // 8 * 8 * LANES) // (threads // LANES)
        if fit < blocks:
            found.append(f"{arch}: {fit} blocks of {threads} threads a multiprocessor by registers, want {blocks}")
    allowed = budget.get("per_tensor_instruction", [])
    assert isinstance(allowed, list)
    if len(allowed) != len(kernel.loops):
        found.append(f"{len(kernel.loops)} loops with tensor instructions, the budget has {len(allowed)}")
    for (tensor, every, bad), most_each in zip(kernel.loops, allowed, strict=False):
        if every > float(most_each) * tensor:
            found.append(f"{every} instructions for {tensor} tensor instructions, budget {most_each} each")
        if bad:
            found.append(f"{', '.join(bad)} in the loop of {tensor} tensor instructions")
    return found


def main() -> int:
    log, cubins = Path(sys.argv[1]), Path(sys.argv[2])
    kernels = from_log(log.read_text())
    for cubin in sorted(cubins.glob("*compute_90.cubin")):
        add_loops(kernels, cubin)
    budgets = tomllib.loads(BUDGETS.read_text())
    problems = [f"{name}: no such kernel" for name in budgets if name not in kernels]
    for name, kernel in sorted(kernels.items()):
        registers = ", ".join(f"{arch} {used}" for arch, used in sorted(kernel.registers.items()))
        loops = "; ".join(f"{every / tensor:.1f} for each of {tensor}" for tensor, every, _ in kernel.loops)
        print(f"{name}: registers {registers}{f'; tensor loops {loops}' if loops else ''}")
        problems += [f"{name}: {why}" for why in wrong(name, kernel, budgets.get(name))]
    print(f"{len(kernels)} kernels, {len(problems)} beyond their budgets")
    for line in problems:
        print(f"BUDGET {line}")
    return 1 if problems or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
