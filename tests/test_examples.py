"""The examples run, and say what they are there to show."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

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
