"""The benchmark command's arithmetic: ratios per sample, medians over repeats, and what counts as a regression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import (
    bench_activation_pattern,
    bench_certificate,
    bench_margin,
    bench_masked_norm,
    bench_training_step,
    support,
)
from bench.bench_certificate import Cost
from locallip_cuda import checkpoint, presets, train

CASE = "cifar10-6c2f"


def entry(variant: str, repeat: int, seconds: float, samples: int = 32, **facts: float) -> dict[str, Any]:
    info = {"op": "training_step", "case": CASE, "variant": variant, "repeat": repeat, "samples": samples, **facts}
    return {"extra_info": info, "stats": {"median": seconds}}


def run(
    ours: float, paper: list[float], *, device: str = "cpu", ours_bytes: float = 40, ours_closeness: float = 0.99
) -> dict[str, Any]:
    benchmarks = []
    for repeat, seconds in enumerate(paper):
        facts: dict[str, float] = {}
        other: dict[str, float] = {}
        if repeat == 0:
            facts = {"peak_bytes": ours_bytes, "closeness_mean": ours_closeness}
            other = {"peak_bytes": 100, "closeness_mean": 0.9}
        benchmarks += [entry("ours", repeat, ours, **facts), entry("paper", repeat, seconds, **other)]
    machine = {"device": device, "torch": "2", "torch_threads": 2, "command": "pytest", "processor": "x"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {"machine_info": machine, "commit_info": commit, "datetime": "2000-01-01T00:00:00", "benchmarks": benchmarks}


@pytest.fixture(autouse=True)
def thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"training_step: {CASE}: ours vs paper"
    limits = {"cpu": {"speed": {key: 2.5}, "memory": {key: 0.6}}, "cuda": {"speed": {}, "memory": {}}}
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(limits))
    monkeypatch.setattr(command, "THRESHOLDS", path)


def test_the_recorded_thresholds_name_variants_that_exist() -> None:
    recorded = json.loads((Path(command.__file__).parent / "thresholds.json").read_text())
    existing = {
        f"{op}: {case}: {mine} vs {variant}"
        for op, cases in {
            "activation_pattern": bench_activation_pattern.CASES,
            "margin": bench_margin.CASES,
            "masked_norm": bench_masked_norm.CASES,
            "training_step": bench_training_step.CASES,
        }.items()
        for case, variants in cases.items()
        for mine in filter(command.is_ours, variants)
        for variant in variants
        if not command.is_ours(variant)
    }
    for device in ("cpu", "cuda"):
        assert recorded[device]["speed"].keys() | recorded[device]["memory"].keys() <= existing


def test_ratio_is_the_median_over_repeats_and_per_sample() -> None:
    cases = command.read(run(0.1, [0.3, 0.4, 9.0]))
    assert command.speedups(cases) == {f"training_step: {CASE}: ours vs paper": pytest.approx([3, 4, 90])}
    cases = command.read({"benchmarks": [entry("ours", 0, 0.1, 32), entry("materialised", 0, 0.1, 4)]})
    assert command.speedups(cases)[f"training_step: {CASE}: ours vs materialised"] == pytest.approx([8])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"paper": [0.2, 0.24, 9.0]}, "2.40 times as fast, want 2.5"),
        ({"ours_bytes": 70}, "peak memory 0.70"),
        ({"ours_closeness": 0.85}, "closeness_mean 0.8500"),
        ({"paper": [0.2], "device": "NVIDIA"}, None),
    ],
)
def test_regressions_against_the_thresholds(
    changed: dict[str, Any], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run(**({"ours": 0.1, "paper": [0.3, 0.3, 0.3]} | changed))))
    assert command.report(path) == (1 if message else 0)
    printed = capsys.readouterr().out
    assert ("REGRESSION" in printed) == bool(message)
    assert message is None or message in printed


def test_compare_fails_on_a_ratio_that_fell(capsys: pytest.CaptureFixture[str]) -> None:
    old = run(0.1, [0.4])
    assert command.compare(old, run(0.1, [0.39])) == 0
    assert command.compare(old, run(0.1, [0.3])) == 1
    assert "-25%  REGRESSION" in capsys.readouterr().out


def test_converged_norms_are_those_of_the_masked_matrices() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    rows, columns = torch.rand(6, 30) < 0.3, torch.rand(6, 40) < 0.3
    rows[0] = False
    columns[1], rows[1] = False, True
    columns[1, 4] = True
    norms = support.converged_norms(layer, rows, columns, (6, 40))
    matrices = layer.weight.double() * rows[:, :, None] * columns[:, None, :]
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrices.detach(), 2))
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    columns = torch.rand(4, 2, 7, 7) < 0.5
    eye = torch.eye(98).view(98, 2, 7, 7)
    matrix = nn.functional.conv2d(eye, convolution.weight, None, 2, 1).flatten(1).t()
    expected = torch.linalg.matrix_norm((matrix * columns.flatten(1)[:, None, :]).detach(), 2)
    norms = support.converged_norms(convolution, None, columns, columns.shape)
    torch.testing.assert_close(norms, expected.double(), rtol=1e-5, atol=0)


def test_certificates_are_timed_by_layer_on_samples_classified_correctly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = presets.recipe("digits")
    state = {f"model/{name}": t for name, t in train.build_model(digits).state_dict().items()}
    checkpoint.save(
        tmp_path / train.CHECKPOINT_NAME, state, {"recipe": digits.to_dict(), "position": {"epoch": 0, "step": 0}}
    )
    problem = bench_certificate.problem(tmp_path, None, samples=3)
    assert len(problem.x) == 3 and problem.model(problem.x).argmax(1).equal(problem.y)

    out = tmp_path / "costs.json"
    monkeypatch.setattr(bench_certificate, "PUBLISHED_ITERATIONS", 30)
    arguments = ["--checkpoint", str(tmp_path), "--samples", "3", "--batch-size", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench", "certificate", *arguments, "--published-samples", "2"])
    assert command.main() == 0
    figures = json.loads(out.read_text())
    costs = figures["costs"]
    assert list(costs) == ["estimate", "probabilistic", "deterministic", "published"]
    assert [cost["samples"] for cost in costs.values()] == [3, 3, 3, 2]
    assert [layer["name"] for layer in figures["layers"]] == [
        "conv 3x3, 1 to 16 on 8x8",
        "conv 4x4/2, 16 to 32 on 8x8",
        "dense 512 to 64",
    ]
    for cost in costs.values():
        assert len(cost["norms"]) == len(cost["layer_norms"][0]) == 3
        assert min(*cost["norms"], cost["propagation"], cost["margin"]) > 0
        assert cost["slowest"] >= cost["total"] / cost["samples"] * (1 - 1e-9)
    printed = capsys.readouterr().out
    assert "| norm: dense 512 to 64 |" in printed and "| Lipschitz constant / published |" in printed


def test_ratio_of_lipschitz_constants_is_over_the_samples_of_both() -> None:
    ours, other = Cost(samples=2, layer_norms=[[2.0, 3.0], [9.0, 9.0]]), Cost(samples=1, layer_norms=[[1.0, 4.0]])
    assert bench_certificate.lipschitz_ratio(ours, other) == 1.5
