"""What ``locallip certify`` measures, against direct computations on a small trained network."""

import json
from pathlib import Path

import pytest
import torch

from locallip_cuda import attack, data, evaluation, local_bounds, report, train
from locallip_cuda.presets import recipe

EPS = 0.3
Trained = tuple[torch.nn.Sequential, data.Dataset]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("run")
    train.Trainer(recipe("digits").replace(epochs=4, evaluate_every=4), train.Settings(out=out)).run()
    model, _, _ = train.load_model(out / train.CHECKPOINT_NAME)
    return model, data.load("digits", train=False)[:200]


@pytest.fixture(scope="module")
def measured(trained: Trained) -> evaluation.Measurement:
    return evaluation.measure(*trained, EPS, iterations=30, batch_size=64, attack_steps=20)


def test_figures_are_those_of_direct_computations(trained: Trained, measured: evaluation.Measurement) -> None:
    model, dataset = trained
    x, y = dataset.batch(torch.arange(200), torch.device("cpu"))
    with torch.no_grad():
        bounds = local_bounds(model, x, EPS, iterations=30)
        assert measured.clean == pytest.approx((model(x).argmax(1) == y).float().mean().item())
        assert measured.certified_local == pytest.approx((bounds.margin(y) > 0).float().mean().item())
        assert measured.lipschitz_local == pytest.approx(bounds.lipschitz.mean().item(), rel=1e-4)
        assert measured.lipschitz_global == pytest.approx(bounds.global_lipschitz.item(), rel=1e-4)
    broken = attack.pgd(model, x, y, EPS, steps=20)
    assert measured.attacked == pytest.approx((model(broken).argmax(1) == y).float().mean().item(), abs=0.03)
    assert measured.samples == 200 and measured.certified_and_broken == 0


def test_figures_come_in_the_order_they_must(measured: evaluation.Measurement) -> None:
    assert 0 < measured.certified_global <= measured.certified_local <= measured.attacked <= measured.clean
    assert measured.lipschitz_local < measured.lipschitz_global


def test_curve(trained: Trained, measured: evaluation.Measurement) -> None:
    radii, local, everywhere = zip(*measured.curve, strict=True)
    assert radii == tuple(f * EPS for f in evaluation.CURVE)
    assert list(local) == sorted(local, reverse=True) and list(everywhere) == sorted(everywhere, reverse=True)
    assert all(a >= b for a, b in zip(local, everywhere, strict=True))
    assert local[0] == everywhere[0] == measured.clean
    assert (local[4], everywhere[4]) == (measured.certified_local, measured.certified_global)
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


def test_a_certificate_that_the_attack_breaks_is_counted(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "pgd", lambda model, x, y, eps, **_: torch.zeros_like(x))
    measured = evaluation.measure(*trained, EPS, iterations=4, attack_steps=1)
    assert measured.certified_and_broken > 0


def test_limit_and_batches_change_nothing_else(trained: Trained) -> None:
    model, dataset = trained
    some = evaluation.measure(model, dataset, EPS, iterations=30, batch_size=7, limit=30, attack_steps=5)
    direct = evaluation.measure(model, dataset[:30], EPS, iterations=30, batch_size=30, attack_steps=5)
    assert some.samples == 30 and some.curve == direct.curve


def test_bad_numbers_are_named(trained: Trained) -> None:
    for name, value in (("batch_size", 0), ("iterations", 0), ("limit", 0)):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            evaluation.measure(*trained, EPS, **{name: value})
    with pytest.raises(NotImplementedError, match="probabilistic"):
        evaluation.measure(*trained, EPS, guarantee="probabilistic")


def test_table_says_that_it_is_no_proof(measured: evaluation.Measurement) -> None:
    lines = report.table(measured, "title").splitlines()
    assert lines[0] == "title" and "no proof" in lines[-1] + lines[-2]
    for text, value in (
        ("clean accuracy", measured.clean),
        ("accuracy under attack (PGD)", measured.attacked),
        ("certified (estimate), local bound", measured.certified_local),
        ("certified (estimate), global bound", measured.certified_global),
    ):
        (line,) = [line for line in lines if line.startswith(text)]
        assert f"{value:.2%}" in line and line.endswith(" s")


def test_json_and_plot(measured: evaluation.Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_json(tmp_path / "r.json", measured, {"command": ["locallip"]})
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["result"]["certified_local"] == measured.certified_local and "no proof" in values["caveat"]
    assert report.plot(tmp_path / "r.png", measured, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not report.plot(tmp_path / "none.png", measured, "title") and not (tmp_path / "none.png").exists()
