"""The code of the documentation runs, the API's page has every public name, and derived pages say what code does."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import locallip_cuda as ll
from locallip_cuda import attack, experiments
from locallip_cuda.experiments import cli
from locallip_cuda.propagation.rules import RULES

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after another, as one program; errors have the page's lines."""
    text = page.read_text()
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # classes look for their module
    rules = dict(RULES)
    try:
        for block in BLOCK.finditer(text):
            if "torch.compile" in block[1] and TORCH < (2, 12):
                continue
            code = "\n" * text[: block.start(1)].count("\n") + block[1]
            exec(compile(code, str(page), "exec"), module.__dict__)
    finally:
        RULES.clear()
        RULES.update(rules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "lightning":
        pytest.importorskip("lightning", reason="Lightning is not installed")
    run(page, monkeypatch)


def test_code_that_fails_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text("One.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(tmp_path / "page.md", monkeypatch)


def commands(text: str) -> list[str]:
    """Lines of blocks, fenced or indented, that are a call of ``locallip``."""
    return [line.strip() for line in text.splitlines() if re.match(r" *locallip \w", line)]


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_commands_have_their_options(page: Path) -> None:
    for line in commands(page.read_text()):
        words = [word.replace("$seed", "1").replace("$eps", "0.3") for word in shlex.split(line, comments=True)]
        assert cli.parser().parse_args(words[1:]).command == words[1], line


def public(module: Any) -> set[str]:
    own = getattr(module, "__all__", None)
    if own is None:
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
        ]
    return {name for name in own if not inspect.ismodule(getattr(module, name))}


MODULES = {
    "locallip_cuda": ll,
    **{f"locallip_cuda.{name}": getattr(ll, name) for name in ("losses", "nn", "rules", "testing")},
    "locallip_cuda.attack": attack,
    "locallip_cuda.experiments": experiments,
}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry(name: str) -> None:
    entries = re.findall(r"auto(?:class|function|exception):: (\S+)", (DOCS / "api.md").read_text())
    own = {entry.rpartition(".")[2] for entry in entries if entry.rpartition(".")[0] == name}
    assert own >= public(MODULES[name])


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_rule_is_listed_where_it_stands(generate: Any) -> None:
    listed = [function for _, rows in generate.sections() for _, functions in rows for function in functions]
    own = [function for function in RULES if not isinstance(function, type)]
    assert set(listed) == set(own) and len(listed) == len(own)
    page = generate.supported()
    assert "`F.leaky_relu` | negative_slope=…, want one in [0, 1]" in page
    assert all(f"## {title}" in page for title in ("Weights", "Activations", "Maxima"))


def test_modules_are_those_that_have_bounds(generate: Any) -> None:
    modules = set(generate.modules())
    assert {"Conv2d", "BatchNorm2d", "ReLU", "Tanh", "MaxPool2d", "Upsample", "PixelShuffle"} <= modules
    assert not {"LayerNorm", "MultiheadAttention", "Softmax", "UpsamplingBilinear2d", "GLU"} & modules


def test_command_line_has_all_options(generate: Any) -> None:
    page = generate.command_line()
    assert all(f"## locallip {name}\n" in page for name in ("train", "certify", "info"))
    assert "`--limit N`\n: only the first N test samples" in page and "`--eps-train X`\n: " in page


def test_every_result_is_linked() -> None:
    linked = set(re.findall(r"\(\.\./bench/results/([\w.-]+)\)", (DOCS / "results.md").read_text()))
    assert linked == {path.name for path in (DOCS.parent / "bench" / "results").glob("*.md")}
