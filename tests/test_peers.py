"""The comparison of certifiers, those that need no installation: radii below an attack's, problems in their rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.peers import __main__ as command
from bench.peers import certifiers, comparison
from bench.peers.certifiers import OWN, PEERS
from bench.peers.comparison import LARGEST, adversarial_distance, compare, table
from locallip_cuda.experiments import checkpoint, recipes
from locallip_cuda.experiments.network import build_model
from tests.helpers import small_network

EPS = 0.15
HERE = [peer for peer in PEERS if peer.distribution == OWN]


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, Tensor, Tensor]:
    """An untrained network, eight images, and labels: what it answers, but for the last image."""
    monkeypatch.setattr(certifiers, "PUBLISHED_ITERATIONS", 30)
    for name, value in {"ATTACK_STEPS": 20, "ATTACK_HALVINGS": 5}.items():
        monkeypatch.setattr(comparison, name, value)
    model = small_network("relu")
    x = torch.rand(8, 2, 6, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % 5
    return model, x, y


def test_no_radius_of_a_proof_exceeds_the_distance_of_an_adversarial_point(
    problem: tuple[nn.Sequential, Tensor, Tensor],
) -> None:
    model, x, y = problem
    rows, distance = compare(model, x, y, EPS, 4, 3, HERE)
    assert [row.peer.name for row in rows] == [peer.name for peer in HERE] and len(rows) == 7
    assert not any(row.problem for row in rows)
    assert bool((distance < LARGEST * EPS).any())
    for row in rows:
        radius = torch.tensor(row.radius, dtype=torch.float64)
        assert row.seconds > 0 and bool((radius > 0).any())
        assert row.refuted == int((radius > distance).sum())
        if row.peer.is_proof:
            assert row.refuted == 0, row.peer.name
            certified = row.peer.make(model, x[:1])(x, y, torch.full((len(x),), EPS, dtype=torch.float64))
            assert (radius >= EPS).tolist() == (certified & (model(x).argmax(1) == y)).tolist()
    assert len(table(rows, distance, EPS)) == 2 + len(rows) + 1


def test_what_certifies_too_much_is_refuted(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = problem
    too_much = replace(HERE[0], make=lambda *_: lambda x, y, eps: eps < 3 * EPS)
    (row,), distance = compare(model, x, y, EPS, 8, 3, [too_much])
    right = model(x).argmax(1) == y
    assert row.radius == pytest.approx([2.875 * EPS * float(each) for each in right])  # from 1 to 4, halved three times
    assert row.refuted == int((right & (distance < 2.875 * EPS)).sum()) > 0


def test_adversarial_points_of_a_linear_network_lie_at_its_boundary() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0]]))
        model[0].bias.zero_()
    x, y = torch.tensor([[0.5, 2, 1], [-0.25, 1, 1], [4.0, 0, 0], [0.5, 0, 0]]), torch.tensor([0, 1, 0, 1])
    expected = torch.tensor([0.5, 0.25, torch.inf, 0], dtype=torch.float64)
    torch.testing.assert_close(adversarial_distance(model, x, y, 2.0), expected, rtol=0.02, atol=0)


def test_a_peer_that_is_missing_or_fails_is_a_row_that_says_so(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("no such | layer\nand more")

    missing = replace(HERE[0], name="missing", module="a_module_that_nobody_has")
    failing = replace(HERE[0], name="failing", make=lambda *_: fails)
    rows, distance = compare(*problem, EPS, 4, 0, [missing, failing, HERE[0]])
    assert [row.problem for row in rows] == ["not installed", "RuntimeError: no such | layer", ""]
    lines = table(rows, distance, EPS)
    assert "not installed" in lines[2] and "no such / layer" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_dense_layers_are_what_the_convolutions_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))
    x = torch.rand(1, 1, 5, 5)
    first, last = certifiers.dense(model, x, (nn.ReLU,))
    bias = model[0].bias.repeat_interleave(9).double()
    hidden = (first @ x.flatten().double() + bias).relu()
    torch.testing.assert_close(last @ hidden + model[3].bias, model.double()(x.double())[0])
    with pytest.raises(TypeError, match="takes Tanh alone, got ReLU as layer 1"):
        certifiers.dense(model, x.double(), (nn.Tanh,))


def test_global_products_certify_up_to_the_margin() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(2 * torch.eye(2))
        model[2].weight.copy_(torch.eye(2))
    holds = certifiers.product(model, lambda layer: float(torch.linalg.matrix_norm(layer.weight.detach(), 2)))
    # margin 2, and the difference of the logits moves by sqrt(2) * 2 times the distance
    x, y = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1])
    assert holds(x, y, torch.tensor([0.707, 0.708, 0], dtype=torch.float64)).tolist() == [True, False, False]


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipes.recipe("digits")
    state = {f"model/{name}": t for name, t in build_model(recipe).state_dict().items()}
    checkpoint.save(
        tmp_path / checkpoint.CHECKPOINT_NAME, state, {"recipe": recipe.to_dict(), "position": {"epoch": 0, "step": 0}}
    )
    without = [peer.name for peer in PEERS[1:]]
    assert command.main([str(tmp_path), "--limit", "3", "--without", *without]) == 0
    assert (tmp_path / "peers.md").read_text() in capsys.readouterr().out
    values = json.loads((tmp_path / "peers.json").read_text())
    assert [row["peer"] for row in values["certifiers"]] == ["local, estimate"]
    assert len(values["certifiers"][0]["radius"]) == len(values["adversarial_distance"]) == 3
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--auto-lirpa", str(tmp_path)])
