from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import DEVICES, small_network
from torch import Tensor, nn

import locallip_cuda as ll

pytestmark = pytest.mark.parametrize("device", DEVICES)
Loss = Callable[[ll.LocalBounds, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "robust_cross_entropy": ll.losses.robust_cross_entropy,
    "gloro": ll.losses.gloro,
    "lipschitz_margin": ll.losses.lipschitz_margin,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def bounds(activation: str = "clipped-relu", eps: float = 0.1, device: str = "cpu") -> tuple[ll.LocalBounds, Tensor]:
    model = small_network(activation).to(device)
    x = torch.rand(6, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    return ll.local_bounds(model, x, eps, iterations=60), torch.tensor([0, 1, 2, 3, 4, 0], device=device)


def softmax_loss(rows: list[list[float]], labels: list[int]) -> float:
    """Mean of -log softmax at the label, from plain numbers."""
    total = 0.0
    for row, y in zip(rows, labels, strict=True):
        top = max(row)
        total += top + math.log(sum(math.exp(v - top) for v in row)) - row[y]
    return total / len(rows)


def test_robust_cross_entropy_by_its_formula(device: str) -> None:
    b, y = bounds(device=device)
    expected = softmax_loss(b.worst_logits(y).tolist(), y.tolist())
    assert ll.losses.robust_cross_entropy(b, y).item() == pytest.approx(expected, rel=1e-12)


def test_gloro_by_its_formula(device: str) -> None:
    b, y = bounds(device=device)
    rows = []
    for clean, worst, label in zip(b.logits.tolist(), b.worst_logits(y).tolist(), y.tolist(), strict=True):
        rows.append([*clean, max(v for j, v in enumerate(worst) if j != label)])
    assert ll.losses.gloro(b, y).item() == pytest.approx(softmax_loss(rows, y.tolist()), rel=1e-12)


@pytest.mark.parametrize("activation", ["clipped-relu", "maxmin"])
def test_lipschitz_margin_by_its_formula(activation: str, device: str) -> None:
    """The norm of the last layer is over the features that vary; it is an estimate of few iterations."""
    b, y = bounds(activation, device=device)
    rows = []
    for i, label in enumerate(y.tolist()):
        columns = b.column_masks[-1][i].double()
        norm = torch.linalg.matrix_norm(b.last_weight.detach() * columns, 2)
        reach = math.sqrt(2) * (b.eps[i] * b.lipschitz[i] * norm).item()
        rows.append([v + (reach if j != label else 0) for j, v in enumerate(b.logits[i].tolist())])
    assert ll.losses.lipschitz_margin(b, y).item() == pytest.approx(softmax_loss(rows, y.tolist()), rel=2e-3)


def test_sparsity_weighs_the_threshold_term(device: str) -> None:
    b, _ = bounds(device=device)
    values = [ll.losses.sparsity(b, w).item() for w in (0.0, 0.1, 1.0)]
    assert values[0] < values[1] < values[2]
    assert values[1] == pytest.approx(values[0] + 0.1 * (values[2] - values[0]))
    assert ll.losses.sparsity(b).item() == b.sparsity_loss.item() == values[1]
    for activation in ("relu", "clipped-maxmin"):  # no threshold term
        b, _ = bounds(activation, device=device)
        assert ll.losses.sparsity(b, 0.0).item() == ll.losses.sparsity(b, 5.0).item() > 0
    assert ll.losses.sparsity(bounds("maxmin", device=device)[0]).item() == 0


@every_loss
def test_without_a_ball_it_is_the_clean_loss(name: str, device: str) -> None:
    b, y = bounds(eps=0.0, device=device)
    expected = softmax_loss(b.logits.tolist(), y.tolist())
    if name == "gloro":  # its additional class repeats the best other logit
        rows = [
            [*r, max(v for j, v in enumerate(r) if j != t)] for r, t in zip(b.logits.tolist(), y.tolist(), strict=True)
        ]
        expected = softmax_loss(rows, y.tolist())
    assert LOSSES[name](b, y).item() == pytest.approx(expected, rel=1e-9)


@every_loss
@pytest.mark.parametrize("activation", ["relu", "clipped-relu", "maxmin", "clipped-maxmin"])
def test_grows_with_eps_and_trains(name: str, activation: str, device: str) -> None:
    values = [LOSSES[name](*bounds(activation, eps, device)).item() for eps in (0.0, 0.05, 0.2)]
    assert values[0] < values[1] < values[2]

    model = small_network(activation).to(device)
    x = torch.rand(10, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    y = torch.arange(10, device=device) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(25):
        loss = LOSSES[name](ll.local_bounds(model, x, 0.05), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.02


@every_loss
def test_gradients_against_finite_differences(name: str, device: str) -> None:
    model = small_network("clipped-relu").to(device)
    x = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    y = torch.tensor([0, 1, 2, 3], device=device)
    parameters = list(model.parameters())
    g = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64).to(device) for p in parameters]

    def value() -> Tensor:
        return LOSSES[name](ll.local_bounds(model, x, 0.1, iterations=100), y)

    slope = sum((d * p).sum() for d, p in zip(direction, torch.autograd.grad(value(), parameters), strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * 1e-6 * d
            ends.append(value())
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * 1e-6 * d
    # the last layer's norm in the Lipschitz margin is not converged, and its gradient not that of the value
    tolerance = 0.02 if name == "lipschitz_margin" else 1e-5
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=tolerance, atol=1e-7)


@every_loss
def test_one_sample_and_one_hidden_layer(name: str, device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to(device)
    b = ll.local_bounds(model, torch.rand(1, 3, device=device), 0.1)
    loss = LOSSES[name](b, torch.tensor([1], device=device))
    loss.backward()
    assert loss.shape == () and loss.isfinite() and model[0].weight.grad is not None
