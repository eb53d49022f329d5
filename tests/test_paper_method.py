"""The benchmarks' baseline is itself checked: a wrong baseline would make every ratio meaningless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import paper_method
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin

EPS = 0.3


def network(activation: str) -> nn.Sequential:
    torch.manual_seed(3)

    def act(*shape: int) -> nn.Module:
        half = (shape[0] // 2, *shape[1:])
        return {
            "relu": nn.ReLU(),
            "clipped-relu": ClippedReLU(shape, 0.3),
            "maxmin": MaxMin(),
            "clipped-maxmin": ClippedMaxMin(half, 0.2, -0.2),
        }[activation]

    layers = [
        nn.Conv2d(2, 4, 3, padding=1), act(4, 6, 6),
        nn.Conv2d(4, 4, 3, stride=2, padding=1), act(4, 3, 3),
        nn.Flatten(), nn.Linear(36, 20), act(20), nn.Linear(20, 5),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def dense(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> torch.Tensor:
    """The matrix of a layer, from its action on the unit vectors."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    eye = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    out = nn.functional.conv2d(eye, layer.weight, None, layer.stride, layer.padding)
    return out.flatten(1).t()


ACTIVATIONS = ["relu", "clipped-relu", "maxmin", "clipped-maxmin"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norms_are_those_of_the_masked_matrices(activation: str) -> None:
    model = network(activation)
    x = torch.rand(6, 2, 6, 6, dtype=torch.float64)
    bounds = paper_method.paper_bounds(model, x, EPS, 3000)
    shapes = [torch.Size([2, 6, 6]), torch.Size([4, 6, 6]), torch.Size([36])]
    for k, (layer, shape) in enumerate(zip([model[0], model[2], model[5]], shapes, strict=True)):
        matrix = dense(layer, shape).expand(6, -1, -1)
        torch.testing.assert_close(bounds.global_norms[k], torch.linalg.matrix_norm(matrix[0], 2), rtol=1e-4, atol=0)
        if (columns := bounds.column_masks[k]) is not None:
            matrix = matrix * columns.flatten(1)[:, None, :]
        if (rows := bounds.row_masks[k]) is not None:
            matrix = matrix * rows.flatten(1)[:, :, None]
        torch.testing.assert_close(bounds.layer_norms[:, k], torch.linalg.matrix_norm(matrix, 2), rtol=1e-4, atol=0)
    if activation == "maxmin":
        torch.testing.assert_close(bounds.lipschitz, bounds.global_norms.prod().expand(6), rtol=1e-3, atol=0)
    else:  # the masks must bite, or this test checks nothing
        assert (bounds.lipschitz < 0.98 * bounds.global_norms.prod()).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_point_of_the_ball_leaves_the_bounds(activation: str) -> None:
    model = network(activation)
    x = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, EPS, 2 * EPS], dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 4])
    bounds = paper_method.paper_bounds(model, x, eps, 2000)
    worst = bounds.worst_logits(y, 100)
    torch.testing.assert_close(worst, bounds.worst_logits(y, 100, all_pairs=True))
    delta = torch.randn(500, 4, 2, 6, 6, dtype=torch.float64)
    delta *= (eps / delta.flatten(2).norm(dim=2))[..., None, None, None]
    with torch.no_grad():
        features = model[:-1]((x + delta).flatten(0, 1)).view(500, 4, -1)
        logits = model[-1](features)
    slack = 1e-6
    assert ((features - bounds.features).norm(dim=2) <= bounds.radius + slack).all()
    assert (features >= bounds.lower - slack).all() and (features <= bounds.upper + slack).all()
    index = y.view(1, -1, 1).expand(500, -1, 1)
    assert (logits - logits.gather(2, index) <= worst - bounds.logits.gather(1, index[0]) + slack).all()


def test_translation_loop_ends_at_the_maximum() -> None:
    torch.manual_seed(1)
    difference = torch.randn(50, 12, dtype=torch.float64)
    low, high = -torch.rand(50, 12, dtype=torch.float64), torch.rand(50, 12, dtype=torch.float64)
    low[:, :3] = high[:, :3] = 0
    radius = torch.linspace(0.1, 3, 50, dtype=torch.float64)
    got = paper_method.translation_loop(difference, radius, low, high, 1000)
    # The Lagrangian dual: its minimum over a fine grid of multipliers is the maximum from above.
    lam = torch.logspace(-6, 3, 20000, dtype=torch.float64).view(-1, 1, 1)
    point = (difference / lam).clamp(low, high)
    dual = (difference * point - lam * point**2 / 2).sum(-1) + lam[..., 0] * radius**2 / 2
    torch.testing.assert_close(got, dual.amin(0), rtol=1e-5, atol=1e-9)
    assert (paper_method.translation_loop(difference, radius, low, high, 1) >= got - 1e-9).all()


@pytest.mark.parametrize("loss", [paper_method.robust_cross_entropy, paper_method.gloro])
def test_gradients_flow_through_the_iterations(loss) -> None:  # type: ignore[no-untyped-def]
    model = network("clipped-relu")
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    state = paper_method.random_state(model, x)
    parameters = list(model.parameters())

    def value() -> torch.Tensor:
        return loss(paper_method.paper_bounds(model, x, 0.05, 3, state), y, 2)

    gradients = torch.autograd.grad(value(), parameters)
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            ends.append(value())
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * step * d
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-4, atol=1e-7)


def test_masks_remove_what_is_constant_and_nothing_else() -> None:
    lower = torch.tensor([[-2.0, -1.0, 0.2, 0.5, 0.6]])
    upper = torch.tensor([[-1.0, 0.0, 0.4, 0.7, 0.9]])
    clipped = ClippedReLU((5,), 0.5)
    assert paper_method.row_mask(nn.ReLU(), lower, upper).tolist() == [[0, 0, 1, 1, 1]]  # type: ignore[union-attr]
    assert paper_method.row_mask(clipped, lower, upper).tolist() == [[0, 0, 1, 0, 0]]  # type: ignore[union-attr]
    sort = ClippedMaxMin((2,), 0.5, -0.5)
    # Bounds of the outputs: two of the max, which is constant at its upper end, two of the min, at its lower end.
    lower, upper = torch.tensor([[0.5, 0.4, -0.5, -0.5]]), torch.tensor([[0.5, 0.5, -0.5, -0.4]])
    assert paper_method.column_mask(sort, lower, upper).tolist() == [[0, 1, 0, 1]]  # type: ignore[union-attr]
    assert paper_method.row_mask(sort, lower, upper) is paper_method.column_mask(nn.ReLU(), lower, upper) is None
