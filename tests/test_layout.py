"""The library stands alone: it never imports the program built on it, and its floors import downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import locallip_cuda

PACKAGE = Path(locallip_cuda.__file__).parent
# from the lowest floor to the highest; a module imports from its own floor and from lower ones
FLOORS = (
    ("build_info", "shapes", "rounding", "nn"),
    ("onnx_nodes", "interchange"),
    ("ops",),
    ("norms",),
    ("propagation",),
    ("bounds",),
    ("losses", "certify", "checked", "attack", "testing"),
    ("experiments",),
)
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


def _imports(source: str, file: Path) -> Iterator[str]:
    """Top-level names of this package that ``file`` imports when it runs."""

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield child
                yield from visit(child)

    here = ["locallip_cuda", *file.parts[:-1]]
    for node in visit(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "locallip_cuda" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


def _upwards(source: str, file: Path) -> list[str]:
    if file.name == "__init__.py" and len(file.parts) == 1:
        return [name for name in _imports(source, file) if name == "experiments"]
    own = FLOOR[file.parts[0].removesuffix(".py")]
    return [name for name in _imports(source, file) if FLOOR[name] > own]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_downwards(file: Path) -> None:
    assert not _upwards((PACKAGE / file).read_text(), file)


@pytest.mark.parametrize(
    "line",
    [
        "from ..experiments import data",
        "from locallip_cuda.experiments.data import load",
        "import locallip_cuda.experiments",
        "from .. import experiments",
        "def f():\n    from ..bounds import local_bounds",
    ],
)
def test_an_import_upwards_shows(line: str) -> None:
    assert _upwards(line, Path("propagation/estimate.py"))
