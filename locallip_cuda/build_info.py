"""The compiled extension: finding it, loading it, and what it was built for."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_NAME = f"{__package__}._C"


def build_info() -> dict[str, Any]:
    """What the compiled extension was built for.

    Returns a dict: ``version`` of locallip-cuda, ``torch`` it was compiled against, ``cuda`` the toolkit's version or
    None, ``architectures`` of the CUDA part (``sm_80`` is machine code, ``compute_90`` PTX; empty without one) and
    ``reason`` why there is no CUDA part (None where there is one).

    Raises ImportError where there is no extension.
    """
    facts: dict[str, Any] = json.loads(Path(_find().origin or "").with_name("_build.json").read_text())
    return facts


def load_extension() -> ModuleType:
    """Load ``locallip_cuda._C``, which registers the ops. Raises ImportError saying what is wrong and what to do."""
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    spec = _find()
    built_for = str(build_info()["torch"])
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"{spec.origin} was compiled against torch {built_for}, but torch {torch.__version__} is installed, and a "
            "C++ extension works only with the torch minor release it was compiled against. Compile it again (in the "
            f"repository: pip install .) or install torch=={'.'.join(built_for.split('.')[:2])}.*"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(_NAME, None)
        raise ImportError(
            f"{spec.origin} could not be loaded: {error}. It was compiled against torch {built_for} (CUDA: "
            f"{build_info()['cuda']}); installed is torch {torch.__version__} (CUDA: {torch.version.cuda}). Compile it "
            "again for this one: in the repository, pip install ."
        ) from error
    return module


def _find() -> ModuleSpec:
    # With the repository's root as working directory the package is the source tree, and __path__ goes on with the
    # installed one, whose extension is newer than one an editable install once left in the tree. Of several that are
    # installed it is the first, whose Python files are used too.
    folders = sorted(sys.modules[__package__].__path__, key=lambda folder: Path(folder).with_name("setup.py").exists())
    spec = PathFinder.find_spec(_NAME, folders)
    if spec is None or not str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES)):
        others = [str(file) for folder in folders for file in Path(folder).glob("_C.*.so")]
        raise ImportError(
            f"the compiled extension {_NAME} is not in {' or '.join(folders)}"
            + (f" (there is {', '.join(others)}, for another Python)" if others else "")
            + ". Compile it: in the repository, pip install . (or pip install -e . to work on it)"
        )
    return spec
