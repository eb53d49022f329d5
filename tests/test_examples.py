"""The examples run, and say what they are there to show."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import Any

import pytest

from locallip_cuda.propagation.rules import RULES

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str) -> dict[str, Any]:
    before = dict(RULES)
    try:
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))
    finally:
        if name != "own_rule":
            assert before == RULES


def test_own_network() -> None:
    assert run("own_network")["main"](steps=120) > 0.5


def test_residual_network() -> None:
    together, apart = run("residual_network")["main"]()
    assert together < 0.8 * apart


def test_own_rule() -> None:
    before = dict(RULES)
    try:
        margins = run("own_rule")["main"]()
    finally:
        RULES.clear()
        RULES.update(before)
    assert margins.shape == (5,) and margins.isfinite().all() and (margins > 0).any()


@pytest.mark.parametrize("name", ["gloro_global", "gloro_local", "emma_global", "emma_local"])
def test_plug_in(name: str) -> None:
    assert run(f"plug_in/{name}")["main"](steps=80) > 0.2


@pytest.mark.parametrize("name", ["gloro", "emma"])
def test_plug_in_takes_few_lines_which_its_readme_shows(name: str) -> None:
    files = [f"{name}_{bound}.py" for bound in ("global", "local")]
    before, after = ((EXAMPLES / "plug_in" / file).read_text().splitlines() for file in files)
    diff = [line.rstrip() for line in difflib.unified_diff(before, after, *files, n=1, lineterm="")]
    assert len([line for line in diff[2:] if line.startswith("+") and line.strip("+")]) <= 8
    shown = (EXAMPLES / "plug_in" / "README.md").read_text()
    assert "```diff\n" + "\n".join(diff) + "\n```" in shown
