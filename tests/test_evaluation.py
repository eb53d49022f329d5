"""What ``locallip certify`` measures, against direct computations on a small trained network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from locallip_cuda import attack, certify, global_bounds, local_bounds
from locallip_cuda.experiments import checkpoint, data, evaluation, report
from locallip_cuda.experiments.journal import Journal
from locallip_cuda.experiments.network import load_model
from locallip_cuda.experiments.recipes import recipe
from locallip_cuda.experiments.trainer import Settings, Trainer
from locallip_cuda.propagation import global_proof
from locallip_cuda.propagation.graph import UnsupportedModuleError

EPS = 0.3
Trained = tuple[torch.nn.Sequential, data.Dataset]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("run")
    Trainer(recipe("digits").replace(epochs=4, evaluate_every=4), Settings(out=out)).run()
    model, _, _ = load_model(out / checkpoint.CHECKPOINT_NAME)
    return model, data.load("digits", train=False)[:200]


def measure(trained: Trained, folder: Path, **settings: Any) -> evaluation.Measurement:
    return evaluation.measure(*trained, EPS, Journal(folder, settings, seed=0), **settings)


@pytest.fixture(scope="module")
def measured(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> evaluation.Measurement:
    settings = {"iterations": 30, "attack_steps": 20, "guarantees": ["probabilistic", "deterministic"]}
    return measure(trained, tmp_path_factory.mktemp("measured"), **settings)


def test_figures_are_those_of_direct_computations(trained: Trained, measured: evaluation.Measurement) -> None:
    model, dataset = trained
    x, y = dataset.batch(torch.arange(200), torch.device("cpu"))
    with torch.no_grad():
        bounds = local_bounds(model, x, EPS, iterations=30)
        assert measured.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
        assert measured.certified["estimate"].accuracy == pytest.approx((bounds.margin(y) > 0).float().mean().item())
        assert measured.lipschitz_estimate == pytest.approx(bounds.lipschitz.mean().item(), rel=1e-4)
        assert measured.global_lipschitz_estimate == pytest.approx(bounds.global_lipschitz.item(), rel=1e-4)
    broken = attack.pgd(model, x, y, EPS, steps=20)
    assert measured.attacked_accuracy == pytest.approx((model(broken).argmax(1) == y).float().mean().item(), abs=0.03)
    assert measured.samples == 200 and not any(c.broken for c in measured.certified.values())


def test_composed_norms_beside_the_product(trained: Trained, tmp_path: Path) -> None:
    """Tried on what the product leaves open, and never certifying less."""
    settings = {"iterations": 30, "attack_steps": 5, "guarantees": ["probabilistic"], "window": 4}
    m = measure(trained, tmp_path, **settings)
    assert list(m.composed) == ["estimate", "probabilistic"] and m.window == 4
    for guarantee in m.composed:
        assert m.composed[guarantee].accuracy >= m.certified[guarantee].accuracy
        assert m.composed[guarantee].failure_probability == m.certified[guarantee].failure_probability
        assert m.composed[guarantee].broken == 0
    product = [sample["guarantees"].get("probabilistic", {}).get("certified", False) for sample in m.per_sample]
    tried = [sample["index"] for sample in m.per_sample if "probabilistic" in sample["composed"]]
    assert not any(product[i] for i in tried) and len(tried) == m.composed["probabilistic"].tried
    assert m.curve_composed[0] == m.accuracy
    assert all(own >= row[1] for own, row in zip(m.curve_composed, m.curve_estimate, strict=True))
    assert any(own > row[1] for own, row in zip(m.curve_composed, m.curve_estimate, strict=True))
    assert "certified (probabilistic), local bound, up to 4 maps composed" in report.table(m, "title")
    assert report.plot(tmp_path / "plot.png", m, "title")
    with pytest.raises(ValueError, match="window is 4 and radius 'global'"):
        measure(trained, tmp_path, radius="global", window=4)


@pytest.mark.parametrize("window", [1, 4])
def test_the_global_bound_alone(trained: Trained, tmp_path: Path, window: int) -> None:
    """Its figures are those of global_bounds, product and composed, and its table has no local one."""
    settings = {"iterations": 30, "attack_steps": 5, "guarantees": ["probabilistic"], "window": window}
    m = measure(trained, tmp_path, bound="global", **settings)
    model, dataset = trained
    x, y = dataset.batch(torch.arange(200), torch.device("cpu"))
    correct = model(x).argmax(1) == y
    with torch.no_grad():
        product = correct & (global_bounds(model, x, EPS, iterations=30).margin(y) > 0)
        proved = correct & (global_bounds(model, x, EPS, guarantee="probabilistic", window=window).margin(y) > 0)
    assert m.certified["estimate"].accuracy == pytest.approx(product.float().mean().item())
    found = m.composed if window > 1 else m.certified
    assert found["probabilistic"].accuracy == pytest.approx(proved.float().mean().item(), abs=1.5 / 200)
    assert found["probabilistic"].accuracy == pytest.approx(found["estimate"].accuracy, abs=1.5 / 200)
    assert {sample["guarantees"]["estimate"]["bound"] for sample in m.per_sample} == {"global"}
    assert m.curve_estimate[4][1] == m.curve_estimate[4][2]
    text = report.table(m, "title")
    assert "certified (probabilistic), global bound" in text and "local" not in text
    assert report.plot(tmp_path / "plot.png", m, "title")


def test_proofs(trained: Trained, measured: evaluation.Measurement) -> None:
    """Each sample's proof is the library's; those that the estimate does not certify are not tried."""
    model, dataset = trained
    estimate = measured.certified["estimate"]
    assert list(measured.certified) == ["estimate", "probabilistic", "deterministic"] and estimate.tried == 200
    x, y = dataset.batch(torch.arange(200), torch.device("cpu"))
    for guarantee, probability in (("probabilistic", 1e-9), ("deterministic", 0)):
        c = measured.certified[guarantee]
        assert c.failure_probability == probability and c.seconds > 0
        assert c.tried == round(200 * estimate.accuracy) and 0 < c.by_global < c.tried
        assert estimate.accuracy - 0.011 <= c.accuracy <= estimate.accuracy
        whole = global_bounds(model, x, EPS, guarantee=guarantee).margin(y)
        for sample in measured.per_sample:
            if guarantee in sample["guarantees"]:
                verdict, margin = sample["guarantees"][guarantee], float(whole[sample["index"]])
                assert (verdict["bound"] == "global") is (margin > 0) or abs(margin) < 0.02
                assert verdict["bound"] != "global" or verdict["margin"] == pytest.approx(margin, abs=0.05)
        local = [
            sample
            for sample in measured.per_sample
            if sample["guarantees"].get(guarantee, {}).get("bound") == "product"
        ]
        for sample in local[:8]:
            i, verdict = sample["index"], sample["guarantees"][guarantee]
            bounds = local_bounds(model, x[i : i + 1], EPS, guarantee=guarantee)
            assert verdict["margin"] == pytest.approx(bounds.margin(y[i : i + 1]).item(), rel=0.1, abs=0.05)
            assert verdict["certified"] is (verdict["margin"] > 0)
            assert verdict["lipschitz"] == pytest.approx(bounds.lipschitz.item(), rel=0.02)
    for sample in measured.per_sample:
        assert ("deterministic" in sample["guarantees"]) is sample["guarantees"]["estimate"]["certified"]
    assert "    decided by the global bound" in report.table(measured, "title")


def test_the_global_bound_comes_first(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms are proved once; what it certifies is put to no other proof; the failure probability is shared out."""
    asked: list[tuple[str, int, float, float]] = []
    taken: list[str] = []

    def watched(name: str, honest: Any) -> Any:
        def bounds(model: Any, x: Any, eps: float, **more: Any) -> Any:
            if more.get("guarantee", "estimate") != "estimate":
                asked.append((name, len(x), more["window"], more["failure_probability"]))
            return honest(model, x, eps, **more)

        return bounds

    single = global_proof.GlobalProof._proved
    monkeypatch.setattr(evaluation, "global_bounds", watched("global", global_bounds))
    monkeypatch.setattr(evaluation, "local_bounds", watched("local", local_bounds))
    monkeypatch.setattr(global_proof.GlobalProof, "_proved", lambda *a: (taken.append(a[1]), single(*a))[1])
    settings = {"iterations": 30, "attack_steps": 2, "guarantees": ["probabilistic"], "limit": 60, "batch_size": 20}
    for window, proofs in ((1, 2), (3, 3)):
        asked.clear()
        taken.clear()
        m = measure(trained, tmp_path, window=window, **settings)
        rows = [m.certified["probabilistic"], *([m.composed["probabilistic"]] if window > 1 else [])]
        by_global = sum(row.by_global for row in rows)
        decided = {sample["index"]: {} for sample in m.per_sample}
        for how in ("guarantees", "composed"):
            for sample in m.per_sample:
                decided[sample["index"]] |= {how: sample.get(how, {}).get("probabilistic", {}).get("bound")}
        bounds = [bound for each in decided.values() for bound in each.values() if bound]
        assert by_global == bounds.count("global") > 0 and ("product" in bounds or window > 1)
        assert not any(
            {"product", "composed"} & set(each.values()) for each in decided.values() if "global" in each.values()
        )
        assert [own for name, _, own, _ in asked if name == "global"] == [window] * 3
        assert {share for _, _, _, share in asked} == {1e-9 / proofs}
        put = {name: sum(count for own, count, _, _ in asked if own == name) for name in ("global", "local")}
        assert put["local"] == bounds.count("product") + bounds.count("composed")
        assert put["global"] == sum(1 for each in decided.values() if any(each.values()))
        assert len(taken) == 3  # operators of the network, for three batches


def test_a_stopped_measurement_goes_on(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third batch, it does that one again and no other, and ends with the same figures."""
    settings: dict[str, Any] = {"iterations": 5, "attack_steps": 2, "batch_size": 16, "limit": 60}
    settings |= {"guarantees": ["probabilistic"], "proof_seed": 0}
    (tmp_path / "whole").mkdir()
    whole = measure(trained, tmp_path / "whole", **settings)
    examined: list[int] = []
    honest = evaluation._Examiner.__call__

    def stop_at(limit: int) -> None:
        def examine(self: Any, batch: Any) -> Any:
            if len(examined) == limit:
                raise KeyboardInterrupt
            examined.append(batch.indices[0])
            return honest(self, batch)

        monkeypatch.setattr(evaluation._Examiner, "__call__", examine)

    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        measure(trained, tmp_path, **settings)
    assert examined == [0, 16]
    stop_at(100)
    again = measure(trained, tmp_path, **settings)
    assert examined == [0, 16, 32, 48]
    assert again.per_sample == whole.per_sample and again.curve_estimate == whole.curve_estimate
    assert again.seconds["estimate"] > 0
    assert again.proof_seed == 0 and again.certified["probabilistic"].failure_probability == 1
    assert any("void: its random vectors follow from the seed 0" in line for line in report.caveats(again))


def test_a_journal_answers_its_own_question_only(tmp_path: Path) -> None:
    path = tmp_path / "certify.partial.0.json"
    first = Journal(tmp_path, {"eps": 0.1}, seed=7)
    first.batches[3], first.seconds["clean"] = [{"label": 1}], 2.0
    first.save()
    same = Journal(tmp_path, {"eps": 0.1}, seed=8)
    assert same.batches == {3: [{"label": 1}]} and same.merged() == {"clean": 2.0} and same.seed == 7
    other = Journal(tmp_path, {"eps": 0.2}, seed=8)
    assert other.batches == {} and other.merged() == {} and other.seed == 8
    for broken in (b"", b"{", b"[]", b'{"question": 1}', path.read_bytes()[:-5]):
        path.write_bytes(broken)
        assert Journal(tmp_path, {"eps": 0.1}, seed=9).batches == {}
    first.remove()
    first.remove()
    assert not path.exists()


def test_figures_come_in_the_order_they_must(measured: evaluation.Measurement) -> None:
    certified = measured.certified["estimate"].accuracy
    assert 0 < measured.global_certified_estimate <= certified <= measured.attacked_accuracy <= measured.accuracy
    assert measured.lipschitz_estimate < measured.global_lipschitz_estimate


def test_curve(trained: Trained, measured: evaluation.Measurement) -> None:
    radii, local, everywhere = zip(*measured.curve_estimate, strict=True)
    assert radii == tuple(f * EPS for f in evaluation.CURVE)
    assert list(local) == sorted(local, reverse=True) and list(everywhere) == sorted(everywhere, reverse=True)
    assert all(a >= b for a, b in zip(local, everywhere, strict=True))
    assert local[0] == everywhere[0] == measured.accuracy
    assert (local[4], everywhere[4]) == (measured.certified["estimate"].accuracy, measured.global_certified_estimate)
    model, dataset = trained
    x, y = dataset.batch(torch.arange(200), torch.device("cpu"))
    for radius, share in ((radii[2], local[2]), (radii[6], local[6])):  # one below the radius, one above
        bounds = local_bounds(model, x, radius, iterations=30)
        assert share == pytest.approx((bounds.margin(y) > 0).float().mean().item())


def test_global_radius_is_the_largest_certified_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    logits = torch.randn(50, 4, generator=generator)
    y = torch.randint(0, 4, (50,), generator=generator)
    radius = evaluation.global_radius(logits, y, weight, 2.0)
    for i in range(50):
        others = [j for j in range(4) if j != y[i]]
        for eps, certified in ((radius[i] * 0.999, True), (radius[i] * 1.001, False)):
            if radius[i] > 0:
                moved = [logits[i, j] + 2.0 * eps * (weight[j] - weight[y[i]]).norm() for j in others]
                assert bool(logits[i, y[i]] > max(moved)) is certified
        assert bool(radius[i] > 0) is bool(logits[i].argmax() == y[i])


def test_global_radius_of_equal_rows() -> None:
    weight = torch.ones(2, 3)
    radius = evaluation.global_radius(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.zeros(3).long(), weight, 1.0
    )
    assert radius.tolist() == [torch.inf, -torch.inf, 0.0]


def test_a_certificate_that_the_attack_breaks_is_counted(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "pgd", lambda model, x, y, eps, **_: torch.zeros_like(x))
    measured = measure(trained, tmp_path, iterations=4, attack_steps=1, limit=40, guarantees=["probabilistic"])
    assert measured.certified["estimate"].broken > 0 and measured.certified["probabilistic"].broken > 0


def test_limit_and_batches_change_nothing_else(trained: Trained, tmp_path: Path) -> None:
    some = measure(trained, tmp_path, iterations=30, batch_size=7, limit=30, attack_steps=5)
    direct = measure((trained[0], trained[1][:30]), tmp_path, iterations=30, batch_size=30, attack_steps=5)
    assert some.samples == 30 and some.curve_estimate == direct.curve_estimate


def test_bad_numbers_are_named(trained: Trained, tmp_path: Path) -> None:
    for name, value in (("batch_size", 0), ("iterations", 0), ("limit", 0)):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            measure(trained, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="guarantee: got 'sure'"):
        measure(trained, tmp_path, guarantees=["sure"])


def test_what_has_no_proof_says_so_at_once(trained: Trained, tmp_path: Path) -> None:
    smooth = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.Softplus(), torch.nn.Linear(5, 10)
    )
    with pytest.raises(UnsupportedModuleError, match="model.2: the activation has no proof"):
        measure((smooth, trained[1]), tmp_path, guarantees=["probabilistic"])
    assert not list(tmp_path.iterdir())


def test_table_says_what_is_a_proof_and_what_is_none(measured: evaluation.Measurement) -> None:
    lines = report.table(measured, "title").splitlines()
    text = " ".join(" ".join(lines).split())
    assert lines[0] == "title" and "estimate: no proof." in text
    assert "a failure of probability 1e-09 a sample" in text and "deterministic: proved for the network" in text
    for start, value in (
        ("accuracy  ", measured.accuracy),
        ("accuracy under attack (PGD)", measured.attacked_accuracy),
        ("certified (estimate), local bound", measured.certified["estimate"].accuracy),
        ("certified (probabilistic), local bound", measured.certified["probabilistic"].accuracy),
        ("certified (deterministic), local bound", measured.certified["deterministic"].accuracy),
        ("certified (estimate), global bound", measured.global_certified_estimate),
    ):
        (line,) = [line for line in lines if line.startswith(start)]
        assert f"{value:.2%}" in line and line.endswith(" s")
        assert ("points" in line) is (start.startswith("certified (prob") or start.startswith("certified (det"))


def test_json_and_plot(measured: evaluation.Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_json(tmp_path / "r.json", measured, {"command": ["locallip"]})
    values = json.loads((tmp_path / "r.json").read_text())
    certified = values["result"]["certified"]
    assert certified["probabilistic"]["accuracy"] == measured.certified["probabilistic"].accuracy
    assert len(values["result"]["per_sample"]) == 200 and "no proof" in values["caveats"][0]
    assert report.plot(tmp_path / "r.png", measured, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not report.plot(tmp_path / "none.png", measured, "title") and not (tmp_path / "none.png").exists()


def test_with_the_paper_s_radius_a_proof_may_hold_where_the_estimate_does_not(tmp_path: Path) -> None:
    """The estimate takes the whole kernel's row norms, at the border too: all correct samples are tried."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)  # of which one tap lies on an image of one pixel
        model[0].bias.fill_(-1)
        model[3].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[3].bias.copy_(torch.tensor([0.1, 0.0]))
    images = torch.tensor([102, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    dataset = data.Dataset("pixels", images, torch.tensor([0, 1]), 2)
    settings: dict[str, Any] = {"radius": "global", "guarantees": ["deterministic"], "attack_steps": 5}
    measured = measure((model, dataset), tmp_path, **settings)
    assert measured.accuracy == 0.5 and measured.certified["deterministic"].tried == 1
    assert measured.certified["estimate"].accuracy == 0 and measured.certified["deterministic"].accuracy == 0.5


def test_classes_by_their_arithmetic(tmp_path: Path) -> None:
    """Logits 1 + 1e-9 and 1 + 2e-9: equal in float32, whose argmax is class 0, and class 1 in real arithmetic."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1e-9], [1.0, 2e-9]]))
    images = torch.full((1, 2, 1, 1), 255, dtype=torch.uint8)
    x = torch.ones(1, 2, 1, 1)
    assert model(x).argmax() == 0 and certify(model, x, 0.0).prediction == 1
    for label, clean in ((0, 1.0), (1, 0.0)):
        dataset = data.Dataset("pixels", images, torch.tensor([label]), 2)
        settings: dict[str, Any] = {"radius": "global", "guarantees": ["deterministic"], "attack_steps": 1}
        (tmp_path / str(label)).mkdir()
        measured = evaluation.measure(model, dataset, 1e-12, Journal(tmp_path / str(label), {}, seed=0), **settings)
        proof = measured.certified["deterministic"]
        assert measured.accuracy == clean and proof.accuracy == 0 and measured.per_sample[0]["prediction"] == 0
        assert proof.tried == proof.other_class == clean
        if clean:
            assert measured.per_sample[0]["guarantees"]["deterministic"]["prediction"] == 1
        said = any("another class in its arithmetic" in line for line in report.caveats(measured))
        assert said is bool(clean)
