"""The benchmark commands: ratios per sample, medians over repeats, what counts as a regression; and the GPU check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import (
    bench_activation_pattern,
    bench_certificate,
    bench_closeness,
    bench_margin,
    bench_masked_norm,
    bench_training_step,
    gpu,
    gpu_report,
    support,
)
from bench.bench_certificate import Cost
from locallip_cuda import ops
from locallip_cuda.experiments import checkpoint, models
from locallip_cuda.experiments import recipes as presets
from locallip_cuda.experiments.network import build_model

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
            "closeness": bench_closeness.CASES,
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
    state = {f"model/{name}": t for name, t in build_model(digits).state_dict().items()}
    checkpoint.save(
        tmp_path / checkpoint.CHECKPOINT_NAME, state, {"recipe": digits.to_dict(), "position": {"epoch": 0, "step": 0}}
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


# ---- the GPU check ----

ROOT = Path(command.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases and baselines of bench.gpu at toy sizes on the CPU, by a process of its own: it sets torch's flags."""
    out = tmp_path_factory.mktemp("gpu") / "benchmarks.json"
    arguments = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", str(out)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "LOCALLIP_COMMIT": "0123abc"}
    done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run: dict[str, Any] = json.loads(out.read_text())
    return run


def variant(run: dict[str, Any], op: str, case: str, work: str, name: str) -> dict[str, Any]:
    found = gpu_report.find(run, op, case, "float32", work, name)
    assert found is not None
    return found


def test_every_case_of_the_gpu_benchmark_runs_and_is_right(tiny_run: dict[str, Any]) -> None:
    assert {case["op"] for case in tiny_run["cases"]} == {
        "activation_pattern",
        "margin",
        "masked_norm",
        "training_step",
    }
    names = set()
    for case in tiny_run["cases"]:
        assert "error" not in case
        for v in case["variants"]:
            names.add(v["name"])
            assert "error" not in v and v["ms"]["low"] <= v["ms"]["median"] <= v["ms"]["high"]
            assert v["name"] not in ("ours", "streaming") or v["right"]
    assert names == {"ours", "streaming", "paper", "paper compiled", "paper-lean", "materialised", "plain"}
    assert tiny_run["ceilings"].keys() == {"copy", "float32", "tf32", "bfloat16"}
    if not (ROOT / ".git").exists():
        assert tiny_run["environment"]["commit"] == "0123abc"


def test_counted_bytes_are_those_of_the_tensors_that_go_in_and_come_out(tiny_run: dict[str, Any]) -> None:
    shape = (4, 6, 6)
    thresholds = {"relu": [], "clipped_relu": [torch.ones(1, *shape)], "clipped_maxmin": [torch.ones(1, 2, 6, 6)] * 2}
    for activation, given in thresholds.items():
        inputs = [torch.rand(4, *shape), torch.rand(2, *shape), torch.rand(2, *shape)]
        first, second = (*given, None, None)[:2]
        outputs = ops.activation_pattern(*inputs, torch.rand(2), activation, first, second)
        read = sum(t.nbytes for t in [*inputs, *given])
        gradients = sum(t.nbytes for t in outputs[:2])
        case = ("activation_pattern", f"{activation.replace('_', '-')} 4x6x6")
        forward, backward, both = (
            variant(tiny_run, *case, w, "ours")["bytes"] for w in ("forward", "backward", "both")
        )
        assert forward == read + sum(t.nbytes for t in outputs[:4])
        assert backward == read + gradients + read  # read again, gradients in, gradients out
        assert both == forward + backward
    # weight, two masks of a byte a unit, start; norms and two singular vectors
    dense = variant(tiny_run, "masked_norm", "dense 16x16 density 0.5", "forward", "ours")
    assert dense["bytes"] == 4 * 16 * 16 + 2 * (16 + 16) + 4 * 16 + 4 * (2 + 2 * 32)
    # features, box, radius, labels and weight; gain and step
    margin = variant(tiny_run, "margin", "K=10 h=16", "forward", "ours")
    assert margin["bytes"] == 4 * (3 * 2 * 16 + 2 + 10 * 16) + 8 * 2 + 2 * 4 * 2 * 10


def test_counted_operations_are_those_torch_counts(tiny_run: dict[str, Any]) -> None:
    def counted(call: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    applied = {
        "dense 16x128 density 0.5": lambda: F.linear(torch.rand(2, 128), torch.rand(16, 128)),
        "conv 3x3 4 to 4 on 8x8 density 0.5": lambda: F.conv2d(
            torch.rand(2, 4, 8, 8), torch.rand(4, 4, 3, 3), None, 1, 1
        ),
        "conv 4x4/2 8 to 8 on 4x4 density 0.5": lambda: F.conv2d(
            torch.rand(2, 8, 4, 4), torch.rand(8, 8, 4, 4), None, 2, 1
        ),
    }
    for case, apply in applied.items():
        forward, both = (variant(tiny_run, "masked_norm", case, work, "ours")["flops"] for work in ("forward", "both"))
        assert forward == 9 * counted(apply) and both == 10 * counted(apply)
    model, x = models.build("digits"), torch.rand(2, 1, 8, 8)
    plain = variant(tiny_run, "training_step", "digits as cifar10-6c2f", "both", "plain")
    assert plain["flops"] == counted(lambda: model(x).sum().backward())
    margin = variant(tiny_run, "margin", "K=10 h=16", "forward", "ours")
    assert margin["flops"] == 8 * 2 * 9 * 16


def made_up(op: str, case: str, precision: str = "float32", **variants: dict[str, Any]) -> dict[str, Any]:
    """A case of a made-up run: variants by "name__work", with milliseconds, or with what else they are to hold."""
    entries = []
    for key, values in variants.items():
        name, _, work = key.partition("__")
        entry = {"name": name.replace("_", " "), "work": work or "both", "samples": 256, "flops": None, "bytes": None}
        for clock in ("ms", "graph_ms"):
            if clock in values:
                values = values | {clock: {"median": values[clock], "low": values[clock], "high": values[clock]}}
        entries.append(entry | values)
    return {"op": op, "case": case, "precision": precision, "variants": entries}


def made_up_run(*cases: dict[str, Any]) -> dict[str, Any]:
    about = {"gpu": "Imaginary 1", "capability": "1.0", "driver": "1.2", "torch": "2", "cuda": "13", "nvcc": "none"}
    about |= {"python": "3", "commit": "abc", "command": "none", "date": "2000-01-01", "batch": 256}
    return {"environment": about, "ceilings": {"copy": 1e12, "float32": 1e13, "tf32": 2e13}, "cases": list(cases)}


def test_targets_are_met_missed_or_not_measured() -> None:
    run = made_up_run(
        made_up(
            "activation_pattern",
            "relu 32x32x32",
            ours__forward={"ms": 9.0, "graph_ms": 1.0, "bytes": 0.85e9},
            ours__backward={"ms": 1.0, "bytes": 0.7e9},
        ),
        made_up(
            "masked_norm",
            "conv 3x3 32 to 32 on 32x32 density 0.5",
            ours__forward={"ms": 1.0, "graph_ms": 1.0},
            streaming__forward={"ms": 4.0, "graph_ms": 2.0},
        ),
        made_up(
            "masked_norm",
            "dense 512x512 density 0.1",
            ours={"ms": 2.0, "graph_ms": 0.5},
            paper_compiled={"ms": 7.0, "graph_error": "x"},
        ),
        made_up("margin", "K=10 h=512", ours={"ms": 1.0}, paper={"error": "out of memory"}),
        made_up(
            "training_step",
            "cifar10-6c2f",
            ours={"ms": 10.0, "graph_ms": 7.0},
            paper={"ms": 70.0},
            plain={"ms": 2.0, "graph_ms": 1.0},
        ),
    )
    verdicts = {t.title: (t.verdict, t.value and round(t.value, 6)) for t in gpu_report.targets(run)}
    share = "share of the copy's bandwidth"
    expected = {
        f"activation pattern, relu, forward: {share}": ("met", 0.85),
        f"activation pattern, relu, backward: {share}": ("MISSED", 0.7),
        f"activation pattern, clipped-relu, forward: {share}": ("not measured", None),
        "convolution 32x32x32 3x3, float32: resident against streaming": ("MISSED", 2.0),
        "convolution 32x32x32 3x3, tf32: resident against streaming": ("not measured", None),
        "dense norm 512x512, density 0.1, eager: against torch.compile": ("met", 3.5),
        "dense norm 512x512, density 0.1, CUDA graphs: against torch.compile": ("not measured", None),
        "margin K=10: against the plain loop": ("not measured", None),
        "cifar10-6c2f step, float32, eager: against the paper's method": ("MISSED", 7.0),
        "cifar10-6c2f step, float32, CUDA graph: against the paper's method": ("met", 10.0),
        "cifar10-6c2f step, float32, eager: of the plain step's time": ("met", 5.0),
        "cifar10-6c2f step, float32, CUDA graph: of the plain step's time": ("MISSED", 7.0),
    }
    assert {title: verdicts[title] for title in expected} == expected


def test_the_targets_name_cases_that_the_gpu_benchmark_has(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {(c.op, c.name, c.precision) for c in gpu.cases(gpu.Setting(torch.device("cpu")))}
    asked: set[tuple[str, str, str]] = set()

    def find(run: Any, op: str, case: str, precision: str, work: str, name: str) -> None:
        asked.add((op, case, precision))

    monkeypatch.setattr(gpu_report, "find", find)
    gpu_report.targets(made_up_run())
    assert asked and asked <= every


def test_gpu_report_shows_stages_failures_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up_run(
        made_up(
            "masked_norm",
            "dense 512x512 density 0.1",
            ours__forward={
                "ms": 2.0,
                "graph_ms": 1.0,
                "flops": 5e9,
                "bytes": 1e8,
                "iterations": 4,
                "facts": {"closeness_max": 1.5},
                "right": False,
            },
            streaming__forward={"ms": 6.0, "graph_ms": 5.0},
            materialised={"ms": 3.0, "samples": 4, "peak_bytes": 2**21},
            paper={"error": "CompileError: no | compiler"},
        ),
        {"op": "margin", "case": "K=10", "precision": "float32", "error": "left out: no time", "variants": []},
    )
    stages, benchmarks = tmp_path / "stages.tsv", tmp_path / "benchmarks.json"
    stages.write_text("build\tpassed\t60\tfine\ntests\ttimed out\t150\t3 passed\n")
    benchmarks.write_text(json.dumps(run))
    out = tmp_path / "out"
    assert gpu_report.main([str(out), "--stages", str(stages), "--benchmarks", str(benchmarks)]) == 0
    printed, text = capsys.readouterr().out, (out / "summary.md").read_text()
    assert "| tests | timed out | 150 | 3 passed |" in printed and "| tests | timed out | 150 | 3 passed |" in text
    title = "masked_norm: dense 512x512 density 0.1 (float32)"
    assert f"- {title}: ours, forward: wrong result, {{'closeness_max': 1.5}}" in printed
    assert "- margin: K=10 (float32): left out: no time" in printed
    # by the graph's time; 5 GFLOP at 10 TFLOP/s take longer than 0.1 GB at 1 TB/s
    rates = "0.25 | 5 | 100 | 50 % (arithmetic)"
    assert f"| ours, forward | 2 (2 to 2) | 1 (1 to 1) | {rates} |  |  | WRONG, closeness max 1.5000 |" in text
    assert "| streaming, forward | 6 (6 to 6) | 5 (5 to 5) |  |  |  |  | 3.00 / 5.00 |  |  |" in text
    assert "| materialised, both | 3 (3 to 3) |  |  |  |  |  |  | 2 |  |" in text
    assert "CompileError: no / compiler" in text
    assert "- GPU: Imaginary 1, compute capability 1.0" in text and "- commit: abc" in text
    values = json.loads((out / "summary.json").read_text())
    assert values["stages"][1]["result"] == "timed out" and values["cases"] == run["cases"]
    assert {t["verdict"] for t in values["targets"]} == {"not measured"}


def test_gpu_report_of_a_build_that_failed_needs_no_package(tmp_path: Path) -> None:
    (tmp_path / "stages.tsv").write_text("build\tfailed\t9\tno compiler\n")
    arguments = [str(tmp_path / "out"), "--stages", str(tmp_path / "stages.tsv"), "--benchmarks", "missing.json"]
    isolated = [sys.executable, "-S", "-m", "bench.gpu_report", *arguments]  # -S: no site-packages
    subprocess.run(isolated, cwd=ROOT, check=True, capture_output=True)
    assert "| build | failed | 9 | no compiler |" in (tmp_path / "out" / "summary.md").read_text()


def test_ratios_of_the_gpu_report_are_per_sample_and_nan_stays_out_of_its_json() -> None:
    slow = {"ms": {"median": 8.0}, "samples": 4}
    assert gpu_report.ratio(slow, {"ms": {"median": 1.0}, "samples": 8}, graph=False) == 16
    assert gpu_report.ratio(slow, None, graph=False) is None
    assert gpu_report.without_nan({"a": [float("nan"), 1.5]}) == {"a": ["nan", 1.5]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would check the GPU that is here")
def test_gpu_check_without_a_gpu_says_so_and_fails(tmp_path: Path) -> None:
    script = ROOT / "bench" / "gpu_check.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    out = tmp_path / "out"
    environ = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([str(script), str(out)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not out.exists()
    assert "needs a machine with an NVIDIA GPU" in done.stderr or "no torch that can use the GPU" in done.stderr
    assert subprocess.run([str(script)], capture_output=True, check=False).returncode == 2
