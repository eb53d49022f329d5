"""Builds the extension with its CUDA kernels compiled for the host, under sanitizers, for the tests alone.

Everything comes from csrc/: the kernels as they are, beside `cuda_runtime.h` of this folder in place of CUDA's. Objects
are kept in build/emulation, and compiled again when what they are made of changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-sanitize=vptr")
CXX = os.environ.get("CXX", "c++")


def missing() -> str | None:
    """What this machine lacks for the build, or None."""
    if not Path("/usr/include/boost/context/fiber.hpp").exists():
        return "Boost.Context is not installed (Debian and Ubuntu: apt-get install libboost-context-dev)"
    return None


def _units() -> list[tuple[Path, list[str]]]:
    """Every source with its flags. Only the kernels carry sanitizers: what calls them is tested elsewhere."""
    common = ["-std=c++20", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    includes.append(f"-isystem{sysconfig.get_paths()['include']}")
    defines = ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DLOCALLIP_EMULATED_CUDA"]
    kernels = [
        (path, [*common, "-O1", "-g1", "-x", "c++", f"-I{HERE}", *SANITIZERS])
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    ]
    ops = [(path, [*common, "-O0", *defines, *includes]) for path in sorted((ROOT / "csrc").glob("*.cpp"))]
    return [
        *ops,
        *kernels,
        (ROOT / "csrc" / "cpu" / "lanczos_bound.cpp", [*common, "-O1", *includes]),
        (HERE / "emulation.cpp", [*common, "-O2", f"-I{HERE}"]),
    ]


def build(folder: Path, changed: dict[str, str] | None = None) -> Path:
    """The path of the module. `changed` maps a file of csrc/cuda to other text, to see whether the tests notice."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / "cuda_runtime.h"]
    seen = hashlib.sha256("\0".join(path.read_text() for path in sorted(headers)).encode())
    seen.update(f"{torch.__version__} {sys.version} {CXX}".encode())

    def compile_one(unit: tuple[Path, list[str]]) -> Path:
        source, flags = unit
        text = (changed or {}).get(source.name) or source.read_text()
        digest = seen.copy()
        digest.update(f"{flags}{text}".encode())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            if changed and source.name in changed:
                source_used = folder / source.name
                source_used.write_text(text)
                flags = [*flags, f"-iquote{source.parent}"]
            else:
                source_used = source
            partial = target.with_suffix(f".{os.getpid()}")
            subprocess.run([CXX, *flags, "-c", str(source_used), "-o", str(partial)], check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _units()))
    name = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    module = folder / name / "_C.so"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        link = [CXX, "-shared", *map(str, objects), *libraries, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        partial = module.with_suffix(f".{os.getpid()}")
        subprocess.run([*link, "-lboost_context", *SANITIZERS, "-o", str(partial)], check=True)
        partial.rename(module)
    return module


def build_program(source: Path, target: Path) -> None:
    """One .cu file with a main of its own."""
    kernel = ["-x", "c++", str(source), "-x", "none"]
    emulation = target.with_suffix(".o")
    flags = ["-std=c++20", "-w", f"-I{HERE}"]
    subprocess.run([CXX, *flags, "-O2", "-c", str(HERE / "emulation.cpp"), "-o", str(emulation)], check=True)
    command = [CXX, *flags, "-O1", "-g1", *SANITIZERS, *kernel, str(emulation), "-lboost_context", "-o", str(target)]
    subprocess.run(command, check=True)


def environment(module: Path) -> dict[str, str]:
    """The variables under which a Python process takes `module` for the extension, with the sanitizer in place."""

    def library(name: str) -> str:
        found = subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        return str(Path(found.stdout.strip()).resolve())

    return {
        # the C++ library too, or the sanitizer does not find what throws exceptions
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LOCALLIP_EMULATION": str(module),
        "OMP_NUM_THREADS": "1",
    }
