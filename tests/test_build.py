"""The build: which torch and which CUDA toolkit it takes, what it compiles again, and what the package says of it.

The builds here are real ones, by this repository's setup.py and backend, of a copy whose C++ is a few lines.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import cuda_toolkit
import pytest
import setuptools
import torch
import torch_backend

import locallip_cuda
from locallip_cuda.build_info import load_extension

ROOT = Path(__file__).resolve().parent.parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])


# The torch to compile against ---------------------------------------------------------------------------------------


def environment_with(tmp_path, monkeypatch, versions):
    """Let the backend see an environment with these torch versions, in an isolated build environment without one."""
    for version in versions:
        info = tmp_path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "isolated")])
    monkeypatch.setattr(torch_backend, "environment_path", lambda: [str(tmp_path)])


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.13.0a0+git1234"])
def test_torch_of_the_environment_is_used(tmp_path, monkeypatch, version):
    environment_with(tmp_path, monkeypatch, [version])
    assert torch_backend.get_requires_for_build_wheel() == []
    assert torch_backend.get_requires_for_build_editable() == []
    assert sys.path == [str(tmp_path / "isolated"), str(tmp_path)]  # behind the build's own requirements


def test_torch_is_asked_for_where_there_is_none(tmp_path, monkeypatch):
    environment_with(tmp_path, monkeypatch, [])
    assert torch_backend.get_requires_for_build_wheel() == ["torch>=2.11,<2.15"]
    assert torch_backend.get_requires_for_build_sdist() == []
    with pytest.raises(SystemExit, match=r"compiles against torch, and this environment has none"):
        torch_backend.build_wheel(str(tmp_path))


@pytest.mark.parametrize("version", ["1.13.1", "2.10.1+cu126", "2.15.0", "3.0.0"])
def test_torch_out_of_range_is_an_error(tmp_path, monkeypatch, version):
    environment_with(tmp_path, monkeypatch, [version])
    with pytest.raises(SystemExit) as error:
        torch_backend.get_requires_for_build_wheel()
    assert version in str(error.value) and ">=2.11,<2.15" in str(error.value) and str(tmp_path) in str(error.value)


# The CUDA toolkit ----------------------------------------------------------------------------------------------------


def make_toolkit(home, version, headers=True):
    """A folder that looks like a CUDA toolkit; its nvcc answers --version and --dryrun."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;\n"
        f"--dryrun) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def no_toolkit(tmp_path, monkeypatch):
    """A machine without a toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "LOCALLIP_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(cuda_toolkit, "standard_places", lambda torch_cuda: [])


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_comes_first(tmp_path, monkeypatch, no_toolkit, variable):
    named = make_toolkit(tmp_path / "named", "13.1")
    monkeypatch.setenv("PATH", str(make_toolkit(tmp_path / "other", "13.0") / "bin"))
    monkeypatch.setenv(variable, str(named))
    assert cuda_toolkit.choose_toolkit("2.14.1", "13.0") == (named, "13.1")


def test_unusable_cuda_home_is_passed_over(tmp_path, monkeypatch, no_toolkit):
    found = make_toolkit(tmp_path / "found", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "headless", "13.0", headers=False)))
    monkeypatch.setattr(cuda_toolkit, "standard_places", lambda torch_cuda: [found])
    assert cuda_toolkit.find_toolkit("13.0").home == found


def test_nvcc_on_path_behind_a_link(tmp_path, monkeypatch, no_toolkit):
    home = make_toolkit(tmp_path / "cuda", "12.8")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cuda_toolkit.find_toolkit("12.6") == (home, "12.8")


def test_nvcc_on_path_is_a_wrapper(tmp_path, monkeypatch, no_toolkit):
    home = make_toolkit(tmp_path / "deep" / "cuda", "13.0")
    wrapper = tmp_path / "usr" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert cuda_toolkit.find_toolkit("13.0") == (home, "13.0")


def test_toolkit_of_another_major_version_is_passed_over(tmp_path, monkeypatch, no_toolkit):
    old = make_toolkit(tmp_path / "old", "12.4")
    new = make_toolkit(tmp_path / "new", "13.0")
    monkeypatch.setattr(cuda_toolkit, "standard_places", lambda torch_cuda: [old, new])
    assert cuda_toolkit.find_toolkit("13.0").home == new
    with pytest.raises(cuda_toolkit.NoCuda, match="passed over: .*old is CUDA 12.4, .*new is CUDA 13.0"):
        cuda_toolkit.find_toolkit("14.0")
    monkeypatch.setenv("CUDA_HOME", str(old))
    with pytest.raises(cuda_toolkit.NoCuda, match="is a CUDA 12.4 toolkit and torch was built with CUDA 13.0"):
        cuda_toolkit.find_toolkit("13.0")


def test_locallip_cuda_decides(tmp_path, monkeypatch, no_toolkit):
    with pytest.raises(cuda_toolkit.NoCuda, match="no toolkit for torch's CUDA 13.0 was found"):
        cuda_toolkit.choose_toolkit("2.14.1+cu130", "13.0")
    with pytest.raises(cuda_toolkit.NoCuda, match=r"torch 2\.13\.0\+cpu was built without CUDA"):
        cuda_toolkit.choose_toolkit("2.13.0+cpu", None)

    monkeypatch.setenv("LOCALLIP_CUDA", "1")
    with pytest.raises(SystemExit, match="LOCALLIP_CUDA=1 .*no toolkit for torch's CUDA 13.0 was found"):
        cuda_toolkit.choose_toolkit("2.14.1+cu130", "13.0")
    with pytest.raises(SystemExit, match=r"LOCALLIP_CUDA=1 .*torch 2\.13\.0\+cpu was built without CUDA"):
        cuda_toolkit.choose_toolkit("2.13.0+cpu", None)

    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", "13.0")))
    assert cuda_toolkit.choose_toolkit("2.14.1+cu130", "13.0").version == "13.0"
    monkeypatch.setenv("LOCALLIP_CUDA", "0")
    with pytest.raises(cuda_toolkit.NoCuda, match="LOCALLIP_CUDA=0"):
        cuda_toolkit.choose_toolkit("2.14.1+cu130", "13.0")
    monkeypatch.setenv("LOCALLIP_CUDA", "yes")
    with pytest.raises(SystemExit, match="LOCALLIP_CUDA='yes': expected 1"):
        cuda_toolkit.choose_toolkit("2.14.1+cu130", "13.0")


# Builds --------------------------------------------------------------------------------------------------------------


class Project:
    """A copy of the repository with a few lines of C++, and a Python whose site-packages are hidden, as pip does it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        package = self.folder / "locallip_cuda"
        package.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(ROOT / "build_support", self.folder / "build_support")
        for name in ("build_info.py", "py.typed"):
            shutil.copy(ROOT / "locallip_cuda" / name, package)
        (package / "__init__.py").write_text(
            "import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n"
            "from .build_info import build_info, load_extension\nanswer = load_extension().answer\n"
        )
        self.write("csrc/answer.h", "int answer();\n")
        self.write("csrc/cpu/answer.cpp", '#include "answer.h"\nint answer() { return 41; }\n')
        self.write("csrc/cpu/other.cpp", "int other() { return 0; }\n")
        self.write(
            "csrc/ops.cpp",
            """
            #include <Python.h>
            #include "answer.h"
            static PyObject* call(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
            static PyMethodDef methods[] = {{"answer", call, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
            static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
            PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
            """,
        )

        overlay = folder / "overlay"
        overlay.mkdir()
        for path in Path(setuptools.__file__).parent.parent.glob("setuptools*"):
            (overlay / path.name).symlink_to(path)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            f"import sys\nsys.path = [p for p in sys.path if not p.endswith('-packages')] + [{str(overlay)!r}]\n"
        )
        self.environ = {**os.environ, "PYTHONPATH": str(site), "LOCALLIP_CUDA": "0"}

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def hook(self, call: str) -> str:
        """Call a hook of the backend, as a front end does: in a process of its own. Returns what it returned."""
        out = self.folder / "dist"
        code = (
            "import os, sys\nsys.path.insert(0, 'build_support')\nimport torch_backend\n"
            f"os.makedirs('dist', exist_ok=True)\nassert 'torch' not in sys.modules\nresult = torch_backend.{call}\n"
            "open('dist/result', 'w').write(str(result))\nprint('torch imported:', 'torch' in sys.modules)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=self.environ, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
        self.imported_torch = "torch imported: True" in run.stdout
        return (out / "result").read_text()

    def wheel(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.folder / "dist" / self.hook("build_wheel('dist')"))

    def objects(self) -> dict[str, int]:
        """When each object file was written."""
        return {path.stem: path.stat().st_mtime_ns for path in self.folder.glob("build/temp-*/**/*.o")}

    def python(self, code: str, *path: Path) -> str:
        """What the code prints in an ordinary Python at the project's root with these folders on its path."""
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=environ, capture_output=True, text=True, check=True
        ).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("build"))


def changed(before, after):
    return {name for name in after if after[name] != before.get(name)}


def test_wheel_in_isolation(project):
    assert project.hook("get_requires_for_build_wheel()") == "[]"
    wheel = project.wheel()
    names = wheel.namelist()
    assert {"locallip_cuda/py.typed", "locallip_cuda/_build.json", "locallip_cuda/build_info.py"} <= set(names)
    assert "locallip_cuda/_C" + EXTENSION_SUFFIXES[0] in names
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    dist_info = f"locallip_cuda-{version}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{dist_info}/METADATA"))
    assert f"torch=={TORCH_MINOR}.*" in metadata.get_all("Requires-Dist")
    assert metadata["License-Expression"] == "MIT" and f"{dist_info}/licenses/LICENSE" in names
    assert "locallip = locallip_cuda.experiments.cli:main" in wheel.read(f"{dist_info}/entry_points.txt").decode()
    assert json.loads(wheel.read("locallip_cuda/_build.json")) == {
        "version": version,
        "torch": torch.__version__,
        "cuda": None,
        "architectures": [],
        "reason": "LOCALLIP_CUDA=0 was set for the build",
    }


def test_metadata_alone_is_the_wheels_and_quick(project):
    folder = project.folder / "dist" / project.hook("prepare_metadata_for_build_wheel('dist')")
    assert not project.imported_torch
    metadata = email.message_from_bytes((folder / "METADATA").read_bytes())
    assert f"torch=={TORCH_MINOR}.*" in metadata.get_all("Requires-Dist")


def test_only_what_changed_is_compiled_again(project):
    project.wheel()
    before = project.objects()
    assert set(before) == {"ops", "answer", "other"}
    project.wheel()
    assert project.objects() == before

    # An editable install finds the objects of the plain one, and the other way round.
    project.write("csrc/cpu/answer.cpp", '#include "answer.h"\nint answer() { return 42; }\n')
    project.hook("build_editable('dist')")
    assert changed(before, project.objects()) == {"answer"}
    assert project.python("import locallip_cuda; print(locallip_cuda.answer())").strip() == "42"

    before = project.objects()
    project.write("csrc/answer.h", "int answer(); // now with a comment\n")
    project.wheel()
    assert changed(before, project.objects()) == {"answer", "ops"}


def test_import_from_the_root_takes_the_installed_extension(project, tmp_path):
    project.hook("build_editable('dist')")  # leaves an extension in the tree, which is soon out of date
    project.write("csrc/cpu/answer.cpp", '#include "answer.h"\nint answer() { return 43; }\n')
    project.wheel().extractall(tmp_path)
    code = "import locallip_cuda as ll; print(ll.__file__, ll.answer(), ll.build_info()['torch'], sep='\\n')"
    file, answer, built_for = project.python(code, tmp_path).splitlines()
    assert Path(file).is_relative_to(project.folder)
    assert answer == "43"
    assert built_for == torch.__version__


def test_of_several_that_are_installed_the_first_counts(project, tmp_path):
    """Python files and extension alike."""
    for answer in (44, 45):
        project.write("csrc/cpu/answer.cpp", f'#include "answer.h"\nint answer() {{ return {answer}; }}\n')
        project.wheel().extractall(tmp_path / str(answer))
    code = "import sys; sys.path.remove(''); import locallip_cuda as ll; print(ll.__file__, ll.answer())"
    for first, second in ((44, 45), (45, 44)):
        file, answer = project.python(code, tmp_path / str(first), tmp_path / str(second)).split()
        assert Path(file).is_relative_to(tmp_path / str(first)) and answer == str(first)


def test_wheel_holds_no_deleted_module(project):
    module = project.folder / "locallip_cuda" / "gone.py"
    module.touch()
    assert "locallip_cuda/gone.py" in project.wheel().namelist()
    module.unlink()
    assert "locallip_cuda/gone.py" not in project.wheel().namelist()


def test_sdist_builds_without_torch_and_then_installs(project, tmp_path):
    sdist = project.folder / "dist" / project.hook("build_sdist('dist')")
    assert not project.imported_torch
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    metadata = email.message_from_string((source / "PKG-INFO").read_text())
    assert "torch<2.15,>=2.11" in metadata.get_all("Requires-Dist")
    inside = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {"csrc/ops.cpp", "csrc/answer.h", "csrc/cpu/answer.cpp", "LICENSE", "locallip_cuda/py.typed"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o", "_build.json"))]

    copy = Project(tmp_path / "again")
    shutil.rmtree(copy.folder)
    shutil.copytree(source, copy.folder)
    assert "locallip_cuda/_C" + EXTENSION_SUFFIXES[0] in copy.wheel().namelist()


# What the package says of its extension ------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of one module, build_info, beside which a test lays an extension; gives its folder and the module."""
    folder = tmp_path / "lonely"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(ROOT / "locallip_cuda" / "build_info.py", folder)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder, import_module("lonely.build_info")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lonely"]:
        del sys.modules[name]


def record(folder, torch_version):
    (folder / "_build.json").write_text(json.dumps({"torch": torch_version, "cuda": None}))


def test_no_extension(installed):
    folder, module = installed
    with pytest.raises(ImportError, match=rf"lonely\._C is not in .*{folder.name}\. Compile it: .*pip install \."):
        module.load_extension()
    with pytest.raises(ImportError, match="is not in"):
        module.build_info()
    (folder / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match=r"_C\.cpython-27.*, for another Python"):
        module.load_extension()


def test_extension_for_another_torch(installed):
    folder, module = installed
    (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    record(folder, "2.7.1+cu126")
    with pytest.raises(ImportError) as error:
        module.load_extension()
    message = str(error.value)
    assert "compiled against torch 2.7.1+cu126" in message and f"torch {torch.__version__} is installed" in message
    assert "pip install ." in message and "torch==2.7.*" in message


def test_extension_that_does_not_load(installed):
    folder, module = installed
    (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    record(folder, torch.__version__)
    with pytest.raises(ImportError, match=r"could not be loaded: .*pip install \."):
        module.load_extension()
    assert "lonely._C" not in sys.modules


def test_build_info_of_this_build():
    info = locallip_cuda.build_info()
    assert set(info) == {"version", "torch", "cuda", "architectures", "reason"}
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert (info["cuda"] is None) == bool(info["reason"]) == (info["architectures"] == [])


@pytest.mark.skipif(locallip_cuda.build_info()["cuda"] is not None, reason="this build takes GPU tensors")
@pytest.mark.parametrize("op", ["affine", "masked_norm", "chain_norm", "activation_pattern", "margin"])
def test_gpu_tensors_on_a_build_for_the_cpu_alone(op):
    """The dispatcher is asked for the GPU's kernel, since there may be no GPU to put a tensor on."""
    x, geometry = torch.ones(2, 2), ([1, 1], [0, 0], [1, 1], 1)
    arguments = {
        "affine": (x, x, None, *geometry, False),
        "masked_norm": (x, None, None, None, [2, 2], *geometry, 1, False),
        "chain_norm": ([x, x], [x > 0], None, None, None, [2, 2], [1] * 4, [0] * 4, [1] * 4, [1, 1], 1, False),
        "activation_pattern": (x, None, x, x[0], "relu", None, None, True),
        "margin": (x, x, x, x[0], x, torch.zeros(2, dtype=torch.int64)),
    }
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=rf"locallip_cuda::{op}: got a tensor on a GPU.*CPU alone.*build_info"):
        getattr(torch.ops.locallip_cuda, op).default.redispatch(gpu, *arguments[op])


def test_extension_links_no_openmp_runtime_of_its_own():
    """It uses torch's: a second thread pool would compete for the cores and not know torch.set_num_threads."""
    binary = Path(load_extension().__file__).read_bytes()
    assert b"libtorch_cpu.so" in binary
    assert b"libgomp.so" not in binary and b"libomp.so" not in binary
