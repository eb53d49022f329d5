"""The real network's answers, whatever rounding does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import ZOO, generator, zoo_input
from hypothesis import given, settings
from hypothesis import strategies as st
from test_execution import Off, Offset, exact, in_float32
from test_random_graphs import ACTIVATIONS, RandomGraph, graphs
from torch import Tensor, nn

import locallip_cuda as ll


def agrees(model: nn.Module, x: Tensor) -> None:
    real, logits = exact(model, x), ll.checked(model)(x)
    assert logits.dtype == torch.float64
    assert (logits.argmax(1) == real.argmax(1)).all()


@pytest.mark.parametrize("name", sorted(name for name in ZOO if "Softplus" not in name))
def test_networks_of_every_kind(name: str) -> None:
    agrees(in_float32(ZOO[name][0]), zoo_input(name, 8).float())


@settings(max_examples=30, deadline=None)
@given(graphs(sorted(ACTIVATIONS)), st.integers(0, 99), st.sampled_from([0.0, 1e4]))
def test_random_graphs(steps: list[tuple[object, ...]], seed: int, offset: float) -> None:
    model = RandomGraph(steps, seed).eval().requires_grad_(False)
    for conv in model.convs.values():
        conv.bias += offset * torch.randn(conv.bias.shape, generator=generator(seed), dtype=torch.float64)
    x = torch.rand(8, 2, 4, 4, generator=generator(seed), dtype=torch.float64).float()
    agrees(in_float32(model), x)


@pytest.mark.parametrize("model", [Offset(2.0**20), Offset(2.0**30), Off()], ids=["2^20", "2^30", "off"])
def test_where_float32_is_wrong(model: nn.Module) -> None:
    inputs = 2 if isinstance(model, Off) else 4
    x = torch.randn(400, inputs, generator=generator(0)) * 0.05
    x = x[exact(model, x).diff(dim=1).abs()[:, 0] > 1e-3]
    wrong = model(x).argmax(1) != exact(model, x).argmax(1)
    assert wrong.any()
    agrees(model, x)


def test_most_samples_need_no_float64() -> None:
    model, x = in_float32(ZOO["dense, relu"][0]), zoo_input("dense, relu", 200).float()
    seen: list[torch.dtype] = []
    checked = ll.checked(model)
    checked(x[:1])
    (network,) = checked._networks.values()
    run = network.run

    def noted(x: Tensor) -> object:
        seen.append(x.dtype)
        return run(x)

    network.run = noted  # type: ignore[method-assign]
    checked(x)
    assert seen[0] == torch.float32
    assert run(x).decided.double().mean() > 0.9
    torch.set_float32_matmul_precision("medium")
    try:
        seen.clear()
        checked(x)
        assert seen == [torch.float64]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_tie_is_an_error() -> None:
    model, x = Offset(1.0).eval(), torch.tensor([[0.5, 0.0, 0.0, 0.0], [1.0, -1.0, 0.5, -0.5]])
    checked = ll.checked(model)
    assert checked(x[:1]).argmax() == 0
    with pytest.raises(ValueError, match=r"x: got samples \[1\] nearer to a decision boundary"):
        checked(x)


def test_it_is_a_snapshot() -> None:
    model, x = in_float32(ZOO["dense, relu"][0]), zoo_input("dense, relu", 4).float()
    checked, before = ll.checked(model), exact(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(checked(x), before, rtol=1e-5, atol=1e-5)


def test_other_weights_count_once_they_are_loaded(tmp_path: Path) -> None:
    model, x = in_float32(ZOO["dense, relu"][0]), zoo_input("dense, relu", 4).float()
    checked = ll.checked(model)
    checked(x)
    values = checked.state_dict()
    values["model." + list(model.state_dict())[-1]] = torch.tensor([0.0, 100.0, 0.0, 0.0])
    checked.load_state_dict(values)
    assert (checked(x).argmax(1) == 1).all()
    torch.save(checked, tmp_path / "checked.pt")
    again = torch.load(tmp_path / "checked.pt", weights_only=False)
    assert torch.equal(again(x), checked(x))


def test_overflow_is_seen_before_an_activation_hides_it() -> None:
    """relu(-inf) = 0, and the real network's unit is on behind the next layer."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e38)
        model[1].weight.fill_(-1e3)
        model[1].bias.fill_(0.0)
        model[3].weight.copy_(torch.tensor([[1e-38], [0.0]]))
        model[3].bias.copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([[-1.0], [1.0]])
    agrees(model, x)


def test_errors() -> None:
    model = copy.deepcopy(in_float32(ZOO["dense, relu"][0]))
    with pytest.raises(ValueError, match="guarantee: got 'estimate', want 'probabilistic' or 'deterministic'"):
        ll.checked(model, guarantee="estimate")
    with pytest.raises(ValueError, match="x: got NaN or infinite values"):
        ll.checked(model)(torch.full((1, 6), torch.nan))
    with pytest.raises(TypeError, match="x: got"):
        ll.checked(model)(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ll.UnsupportedModuleError):
        ll.checked(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)))(torch.rand(1, 4))
