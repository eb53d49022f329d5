"""Builds locallip_cuda._C. What is compiled and why is recorded beside it, in _build.json, for build_info().

LOCALLIP_CUDA=1 or 0 asks for or leaves out the CUDA part; TORCH_CUDA_ARCH_LIST names its architectures;
MAX_JOBS bounds the parallel compilers.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_support"))

from cuda_toolkit import NoCuda, choose_toolkit
from torch_backend import TORCH_RANGE, expose_torch, torch_minor

DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
HEADERS = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)

# No -march and no -ffast-math: a wheel runs on other machines than this one, and the bounds count on IEEE arithmetic.
# libgomp is not linked: its symbols come from the OpenMP runtime that torch has loaded, so that there is one thread
# pool, the one that torch.set_num_threads governs.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"]


def extension_and_command():
    """The extension to compile, and the build_ext that does it. Imports torch, which takes seconds."""
    import torch

    try:
        toolkit = choose_toolkit(torch.__version__, torch.version.cuda)
        reason = None
    except NoCuda as no:
        toolkit = None
        reason = str(no)

    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    from torch.utils import cpp_extension

    architectures = []
    if toolkit:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # it was guessed when the module was imported, maybe long before
        architectures = cuda_architectures(cpp_extension)
        print(f"locallip-cuda: CUDA {toolkit.version} from {toolkit.home} for {', '.join(architectures)}")
    else:
        print(f"locallip-cuda: CPU build, because {reason}")

    facts = {
        "torch": str(torch.__version__),
        "cuda": toolkit.version if toolkit else None,
        "architectures": architectures,
        "reason": reason,
    }
    kind = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    extension = kind(
        "locallip_cuda._C",
        sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp"), *(glob("csrc/cuda/*.cu") if toolkit else [])]),
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("LOCALLIP_CUDA", None)] if toolkit else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # One folder for installs, editable installs and wheels (setuptools gives the second a temporary one), so
            # that ninja finds what it compiled before; one for each torch, because objects do not mix.
            self.build_temp = f"build/temp-{sys.implementation.cache_tag}-torch-{torch.__version__}" + (
                f"-cuda-{toolkit.version}" if toolkit else ""
            )

        def build_extensions(self):
            super().build_extensions()
            target = Path(self.get_ext_fullpath(extension.name)).with_name("_build.json")
            target.write_text(json.dumps({"version": self.distribution.get_version(), **facts}, indent=1) + "\n")

        def copy_extensions_to_source(self):  # an editable install
            super().copy_extensions_to_source()
            facts_file = Path(self.build_lib) / "locallip_cuda" / "_build.json"
            shutil.copy(facts_file, self.get_finalized_command("build_py").get_package_dir("locallip_cuda"))

    return extension, BuildExt


def cuda_architectures(cpp_extension) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST comes to: sm_80 is machine code for 8.0, compute_90 is PTX of 9.0."""
    wanted = os.environ["TORCH_CUDA_ARCH_LIST"]
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError) as error:
        why = "no GPU is visible here" if wanted == "native" else error
        sys.exit(f"TORCH_CUDA_ARCH_LIST={wanted!r} cannot be used: {why}. One that can: {DEFAULT_ARCHITECTURES}")
    return sorted((flag.split(",code=")[1] for flag in flags), key=lambda name: (name.startswith("compute"), name))


def prepare_ninja() -> None:
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    # The build's own ninja first, if only because its environment may not be activated: another release of it on PATH
    # would not trust this one's log, and compile everything again.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("ninja") or []:
            if file.name == "ninja":
                os.environ["PATH"] = f"{Path(file.locate()).resolve().parent}{os.pathsep}{os.environ['PATH']}"


requirements = ["numpy", "safetensors", "scikit-learn", "tqdm"]
commands = set(sys.argv[1:])
if commands & {"sdist", "egg_info"}:
    setup(install_requires=[f"torch{TORCH_RANGE}", *requirements])
else:
    torch_version = expose_torch()
    if torch_version is None:
        sys.exit(f"locallip-cuda compiles against torch: install torch{TORCH_RANGE} first.")
    compiled_for = "torch=={}.{}.*".format(*torch_minor(torch_version))
    if "dist_info" in commands:  # metadata alone
        setup(install_requires=[compiled_for, *requirements])
    else:
        prepare_ninja()
        extension, build_ext = extension_and_command()
        setup(
            install_requires=[compiled_for, *requirements],
            ext_modules=[extension],
            cmdclass={"build_ext": build_ext},
        )
