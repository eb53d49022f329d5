"""The benchmarks: every case runs and is right, what is counted, ratios and targets, regressions; and the GPU check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import bench_certificate, bench_closeness, harness, passes, report
from bench.bench_certificate import Cost
from bench.case import Case, Setting, Variant
from bench.clock import Clock
from bench.converged import converged_norms
from bench.harness import Harness, every_case
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
    cpu = {"speed": {key: 2.5}, "memory": {key: 0.6}, "closeness": {f"training_step: {CASE}: ours": 0.95}}
    limits = {"cpu": cpu, "cuda": {"speed": {}, "memory": {}, "closeness": {}}}
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(limits))
    monkeypatch.setattr(report, "THRESHOLDS", path)


def test_the_recorded_thresholds_name_variants_that_exist() -> None:
    recorded = json.loads((Path(command.__file__).parent / "thresholds.json").read_text())
    for kind in ("cpu", "cuda"):
        existing = {
            f"{case.op}: {case.title}: {mine} vs {label}"
            for case in every_case(Setting(torch.device(kind)))
            for mine in filter(report.is_ours, case.labels)
            for label in case.labels
            if not report.is_ours(label) and report.work(label) == report.work(mine)
        }
        assert recorded[kind]["speed"].keys() | recorded[kind]["memory"].keys() <= existing
        alone = {f"{case.op}: {case.title}: {label}" for case in every_case(Setting()) for label in case.labels}
        assert recorded[kind]["closeness"].keys() <= alone


def test_ratio_is_the_median_over_repeats_and_per_sample() -> None:
    cases = report.read(run(0.1, [0.3, 0.4, 9.0]))
    assert report.speedups(cases) == {f"training_step: {CASE}: ours vs paper": pytest.approx([3, 4, 90])}
    cases = report.read({"benchmarks": [entry("ours", 0, 0.1, 32), entry("materialised", 0, 0.1, 4)]})
    assert report.speedups(cases)[f"training_step: {CASE}: ours vs materialised"] == pytest.approx([8])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"paper": [0.2, 0.24, 9.0]}, "2.40 times as fast, want 2.5"),
        ({"ours_bytes": 70}, "peak memory 0.70"),
        ({"ours_closeness": 0.85}, "closeness_mean 0.8500, less than the baseline's 0.9000"),
        ({"ours_closeness": 0.94}, "closeness_mean 0.9400, want 0.95"),
        ({"paper": [0.2], "device": "NVIDIA"}, None),
    ],
)
def test_regressions_against_the_thresholds(
    changed: dict[str, Any], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run(**({"ours": 0.1, "paper": [0.3, 0.3, 0.3]} | changed))))
    assert report.show(path) == (1 if message else 0)
    printed = capsys.readouterr().out
    assert ("REGRESSION" in printed) == bool(message)
    assert message is None or message in printed


def test_compare_fails_on_a_ratio_that_fell(capsys: pytest.CaptureFixture[str]) -> None:
    old = run(0.1, [0.4])
    assert report.compare(old, run(0.1, [0.39])) == 0
    assert report.compare(old, run(0.1, [0.3])) == 1
    assert "-25%  REGRESSION" in capsys.readouterr().out


def test_converged_norms_are_those_of_the_masked_matrices() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    rows, columns = torch.rand(6, 30) < 0.3, torch.rand(6, 40) < 0.3
    rows[0] = False
    columns[1], rows[1] = False, True
    columns[1, 4] = True
    norms = converged_norms(layer, rows, columns, (6, 40))
    matrices = layer.weight.double() * rows[:, :, None] * columns[:, None, :]
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrices.detach(), 2))
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    columns = torch.rand(4, 2, 7, 7) < 0.5
    eye = torch.eye(98).view(98, 2, 7, 7)
    matrix = nn.functional.conv2d(eye, convolution.weight, None, 2, 1).flatten(1).t()
    expected = torch.linalg.matrix_norm((matrix * columns.flatten(1)[:, None, :]).detach(), 2)
    norms = converged_norms(convolution, None, columns, columns.shape)
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


# ---- the cases ----

ROOT = Path(command.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All variants of a CPU's run and of a GPU's at toy sizes, by a process of its own: it sets torch's flags."""
    out = tmp_path_factory.mktemp("bench") / "run.json"
    arguments = [sys.executable, "-m", "bench", "--device", "cpu", "--tiny", "--output", str(out)]
    # pytest-benchmark takes no time in a process of pytest-xdist's, which it knows by the environment
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environ = inherited | {"OMP_NUM_THREADS": "1", "LOCALLIP_COMMIT": "0123abc-dirty"}
    done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run: dict[str, Any] = json.loads(out.read_text())
    return run


@pytest.fixture(scope="module")
def tiny_cases(tiny_run: dict[str, Any]) -> report.Cases:
    return report.read(tiny_run)


def test_every_case_runs_and_is_right(tiny_run: dict[str, Any], tiny_cases: report.Cases) -> None:
    tiny = {
        f"{case.op}: {case.title}": set(case.labels) for case in every_case(Setting(torch.device("cpu"), tiny=True))
    }
    for kind in ("cpu", "cuda"):
        for case in every_case(Setting(torch.device(kind))):
            assert set(case.labels) <= tiny[f"{case.op}: {case.title}"]
    assert {title: case.variants.keys() for title, case in tiny_cases.items()} == tiny
    assert not report.failures(tiny_cases) and not tiny_run["errors"]
    for case in tiny_cases.values():
        for label, variant in case.variants.items():
            assert variant.times.keys() == {0, 1} and min(variant.times.values()) > 0
            if case.op != "closeness" and label.partition(", ")[0] in ("ours", "streaming", "materialised"):
                assert variant.right
    assert tiny_run["ceilings"].keys() == {"copy", "float32", "tf32", "bfloat16"}
    assert tiny_run["machine_info"]["command"].startswith("python -m bench --device cpu --tiny")
    if not (ROOT / ".git").exists():
        assert (tiny_run["commit_info"]["id"], tiny_run["commit_info"]["dirty"]) == ("0123abc", True)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that takes as many seconds as it is told, by a clock that stands still else."""
    now = [0.0]
    monkeypatch.setattr("bench.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(seconds: float) -> None:
        now[0] += seconds

    return call


def test_pytest_benchmark_has_the_times_of_the_clock(
    tiny_run: dict[str, Any], pass_time: Callable[[float], None]
) -> None:
    for benchmark in tiny_run["benchmarks"]:
        assert benchmark["options"]["timer"] == "bench.clock"
        assert 0 < benchmark["stats"]["min"] <= benchmark["stats"]["median"]
    assert Clock(torch.device("cpu")).turn(lambda: pass_time(0.01), 0.03) == pytest.approx([0.01] * 3)


def test_counted_bytes_are_those_of_the_tensors_that_go_in_and_come_out(tiny_cases: report.Cases) -> None:
    shape = (4, 6, 6)
    thresholds = {"relu": [], "clipped_relu": [torch.ones(1, *shape)], "clipped_maxmin": [torch.ones(1, 2, 6, 6)] * 2}
    for activation, given in thresholds.items():
        inputs = [torch.rand(4, *shape), torch.rand(2, *shape), torch.rand(2, *shape)]
        first, second = (*given, None, None)[:2]
        outputs = ops.activation_pattern(*inputs, torch.rand(2), activation, first, second)
        read = sum(t.nbytes for t in [*inputs, *given])
        gradients = sum(t.nbytes for t in outputs[:2])
        variants = tiny_cases[f"activation_pattern: {activation.replace('_', '-')} 32x32x32"].variants
        forward, backward, both = (variants[label].bytes for label in ("ours, forward", "ours, backward", "ours"))
        assert forward == read + sum(t.nbytes for t in outputs[:4])
        assert backward == read + gradients + read  # read again, gradients in, gradients out
        assert both == forward + backward
    # weight, two masks of a byte a unit, start; norms and two singular vectors
    dense = tiny_cases["masked_norm: dense 512x512 density 0.5"].variants["ours, forward"]
    assert dense.bytes == 4 * 16 * 16 + 2 * (16 + 16) + 4 * 16 + 4 * (2 + 2 * 32)
    # features, box, radius, labels and weight; gain and step
    margin = tiny_cases["margin: K=10 h=512"].variants["ours, forward"]
    assert margin.bytes == 4 * (3 * 2 * 16 + 2 + 10 * 16) + 8 * 2 + 2 * 4 * 2 * 10


def test_counted_operations_are_those_torch_counts(tiny_cases: report.Cases) -> None:
    def counted(call: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    applied = {
        "dense 512x4096": lambda: F.linear(torch.rand(2, 128), torch.rand(16, 128)),
        "conv 3x3 32x32x32": lambda: F.conv2d(torch.rand(2, 4, 8, 8), torch.rand(4, 4, 3, 3), None, 1, 1),
        "conv 4x4s2 64x16x16": lambda: F.conv2d(torch.rand(2, 8, 4, 4), torch.rand(8, 8, 4, 4), None, 2, 1),
    }
    for layer, apply in applied.items():
        variants = tiny_cases[f"masked_norm: {layer} density 0.5"].variants
        assert variants["ours, forward"].flops == 9 * counted(apply)
        assert variants["ours"].flops == 10 * counted(apply)
    model, x = models.build("digits"), torch.rand(2, 1, 8, 8)
    plain = tiny_cases["training_step: cifar10-6c2f"].variants["plain"]
    assert plain.flops == counted(lambda: model(x).sum().backward())
    assert tiny_cases["margin: K=10 h=512"].variants["ours, forward"].flops == 8 * 2 * 9 * 16


class Recorded:
    """A benchmark fixture that keeps what it is given."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, function: Any, rounds: int) -> None:
        self.rounds = rounds


@pytest.fixture
def flags_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for setter in ("set_up", "set_precision"):
        monkeypatch.setattr(harness, setter, lambda *_: None)


def case_of(name: str, **calls: Any) -> Case:
    variants = {label.replace("_", " "): Variant(call, 1) for label, call in calls.items()}
    return Case("op", name, tuple(variants), lambda: variants)


def broken() -> None:
    raise RuntimeError("no memory")


def test_a_variant_that_fails_says_so_and_leaves_the_others_alone(flags_stay: None) -> None:
    h = Harness(Setting(torch.device("cpu"), tiny=True))
    case = case_of("a", ours=lambda: None, paper=broken, paper_compiled=broken)
    with pytest.raises(RuntimeError, match="no memory"):
        h.turn(Recorded(), case, 0, "paper")
    for label in ("paper", "paper compiled"):  # once it has failed; what may fail
        with pytest.raises(pytest.skip.Exception, match="no memory"):
            h.turn(Recorded(), case, 1, label)
    benchmark = Recorded()
    h.turn(benchmark, case, 0, "ours")
    assert benchmark.rounds and benchmark.extra_info["variant"] == "ours"
    case.build()["ours"].check = lambda _: ({"excess": 2.0}, False)
    with pytest.raises(AssertionError, match="wrong result"):
        h.turn(benchmark, case, 0, "ours")
    assert benchmark.extra_info["right"] is False
    h.end = 0  # no case begins any more
    with pytest.raises(pytest.skip.Exception, match="no time"):
        h.turn(Recorded(), case_of("b", ours=broken), 0, "ours")
    found = report.read({"errors": list(h.errors.values())})
    assert report.failures(found) == ["op: a: paper: RuntimeError: no memory", "op: b: left out: no time"]


def test_on_a_gpu_graphs_are_timed_too(
    flags_stay: None, monkeypatch: pytest.MonkeyPatch, pass_time: Callable[[float], None]
) -> None:
    monkeypatch.setattr(harness, "ceilings", lambda *_: {})  # rates of what takes no time here
    h = Harness(Setting(torch.device("cpu"), tiny=True))
    monkeypatch.setattr(harness, "captured", lambda call: call)
    for name, value in (("on_gpu", True), ("_on_gpu", h.clock._on_cpu), ("peak_bytes", lambda _: 7)):
        monkeypatch.setattr(h.clock, name, value)
    benchmark, case = Recorded(), case_of("a", ours=lambda: pass_time(0.002))
    h.turn(benchmark, case, 0, "ours")
    assert benchmark.extra_info["graph_ms"] == pytest.approx(2) and benchmark.extra_info["peak_bytes"] == 7
    monkeypatch.setattr(harness, "captured", lambda call: broken())
    with pytest.raises(AssertionError, match="no memory"):
        h.turn(benchmark, case_of("b", ours=lambda: None), 0, "ours")
    assert benchmark.extra_info["graph_error"] == "RuntimeError: no memory"


def test_what_a_profiler_sees_and_what_is_prepared(flags_stay: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--launch", "--tiny", "--device", "cpu"]) == 0
    launched = capsys.readouterr().out.splitlines()
    assert len(launched) == 10 and len({line.partition(":")[0] for line in launched}) == 3
    assert command.main(["--prepare", "--tiny", "--device", "cpu"]) == 0
    prepared = [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert len(prepared) == 4 and prepared[-1] == "training_step: cifar10-6c2f: paper compiled"


# ---- the report ----


def made_up(op: str, case: str, precision: str = "float32", **variants: dict[str, Any]) -> list[dict[str, Any]]:
    """Benchmarks of a made-up run: variants by "name__work", with milliseconds or an error, and what else they hold."""
    entries = []
    for key, values in variants.items():
        name, _, work = key.partition("__")
        info = {"op": op, "case": case, "precision": precision, "variant": name.replace("_", " ")}
        if "error" in values:
            entries.append(info | values)
            continue
        info |= {"work": work or "both", "repeat": 0, "samples": 256} | values
        entries.append({"extra_info": info, "stats": {"median": 1e-3 * info.pop("ms")}})
    return entries


def made_up_run(*cases: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {
        "device": "Imaginary 1",
        "capability": "1.0",
        "driver": "1.2",
        "torch": "2",
        "cuda": "13",
        "nvcc": "none",
    }
    machine |= {"python": "3", "torch_threads": 1, "command": "none", "tiny": False}
    entries = [entry for case in cases for entry in case]
    return {
        "machine_info": machine,
        "commit_info": {"id": "abc"},
        "datetime": "2000-01-01T00:00:00",
        "ceilings": {"copy": 1e12, "float32": 1e13, "tf32": 2e13},
        "benchmarks": [entry for entry in entries if "stats" in entry],
        "errors": [entry for entry in entries if "error" in entry],
    }


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
            "conv 3x3 32x32x32 density 0.5",
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
    found = report.targets(report.read(run), run["ceilings"])
    verdicts = {t.title: (t.verdict, t.value and round(t.value, 6)) for t in found}
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


def test_the_targets_name_variants_that_a_run_on_a_gpu_has() -> None:
    cases = every_case(Setting(torch.device("cuda")))
    timed = {"ms": 1.0, "graph_ms": 1.0, "bytes": 1.0}
    every = [made_up(c.op, c.name, c.precision, **{x.replace(", ", "__"): timed for x in c.labels}) for c in cases]
    run = made_up_run(*every)
    assert "not measured" not in {t.verdict for t in report.targets(report.read(run), run["ceilings"])}


def test_report_shows_stages_failures_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
                "closeness_max": 1.5,
                "right": False,
            },
            streaming__forward={"ms": 6.0, "graph_ms": 5.0},
            materialised={"ms": 3.0, "samples": 4, "peak_bytes": 2**21, "odd": float("nan")},
            paper_compiled={"error": "CompileError: no | compiler"},
        ),
        [{"op": "margin", "case": "K=10", "precision": "tf32", "variant": "", "error": "left out: no time"}],
    )
    stages, path = tmp_path / "stages.tsv", tmp_path / "run.json"
    stages.write_text("build\tpassed\t60\tfine\ntests\ttimed out\t150\t3 passed\n")
    path.write_text(json.dumps(run))
    out = tmp_path / "out"
    assert command.main(["--read", str(path), "--stages", str(stages), "--summary", str(out)]) == 0
    printed, text = capsys.readouterr().out, (out / "summary.md").read_text()
    assert "| tests | timed out | 150 | 3 passed |" in printed and "| tests | timed out | 150 | 3 passed |" in text
    title = "masked_norm: dense 512x512 density 0.1"
    assert f"- {title}: ours, forward: wrong result, {{'closeness_max': 1.5}}" in printed
    assert "- margin: K=10, tf32: left out: no time" in printed
    assert "- masked_norm: dense 512x512 density 0.1: paper compiled" not in printed
    # by the graph's time; 5 GFLOP at 10 TFLOP/s take longer than 0.1 GB at 1 TB/s
    rates = "0.25 | 5 | 100 | 50 % (arithmetic)"
    assert f"| ours, forward | 2 (2 to 2) | 1 (1 to 1) | {rates} |  |  | WRONG, closeness max 1.5000 |" in text
    assert "| streaming, forward | 6 (6 to 6) | 5 (5 to 5) |  |  |  |  | 3.00 / 5.00 |  |  |" in text
    assert "| materialised | 3 (3 to 3) |  |  |  |  |  |  | 2 | odd nan |" in text
    assert "CompileError: no / compiler" in text
    assert "- GPU: Imaginary 1, compute capability 1.0" in text and "- commit: abc" in text
    values = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert values["stages"][1]["result"] == "timed out" and values["errors"] == run["errors"]
    assert {t["verdict"] for t in values["targets"]} == {"not measured"}
    assert command.main(["--read", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "3.00x ours, forward (3.00 to 3.00; 5.00)" in printed and "FAILED margin: K=10, tf32: left out" in printed


def test_report_of_a_build_that_failed_needs_no_package(tmp_path: Path) -> None:
    (tmp_path / "stages.tsv").write_text("build\tfailed\t9\tno compiler\n")
    arguments = ["--read", "missing.json", "--stages", str(tmp_path / "stages.tsv"), "--summary", str(tmp_path / "out")]
    isolated = [sys.executable, "-S", "-m", "bench", *arguments]  # -S: no site-packages
    subprocess.run(isolated, cwd=ROOT, check=True, capture_output=True)
    assert "| build | failed | 9 | no compiler |" in (tmp_path / "out" / "summary.md").read_text()


# ---- the GPU check ----


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


def test_passes_of_a_step_by_layer_and_phase() -> None:
    """Every op of a step counts once, and each phase at its layer."""
    call = bench_closeness.variant(Setting(torch.device("cpu"), tiny=True), "mnist-4c3f", kept=True).call
    weights = [tuple(m.weight.shape) for m in models.build("digits") if isinstance(m, nn.Conv2d | nn.Linear)]
    recorded, whole = passes.least(call, 2)
    spent = passes.by_phase(recorded, weights)
    assert sum(map(sum, spent.values())) == pytest.approx(sum(op.ms for op in recorded)) and whole > 0
    hidden, last = range(len(weights) - 1), len(weights) - 1
    for layer in hidden:
        for phase in ("values", "masks", "norms"):
            forward, backward = spent[layer, phase]
            assert forward > 0 and backward > 0, (layer, phase)
        assert spent[layer, "rows"][0] > 0
    assert min(spent[last, "values"]) > 0 and not {(last, "masks"), (last, "norms")} & spent.keys()
