from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pytest
import torch
import torch._dynamo.testing
from helpers import ACTIVATIONS, DEVICES, ZOO, generator, small_network, zoo_input
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import locallip_cuda as ll
from locallip_cuda import ops
from locallip_cuda.experiments import models
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize
from locallip_cuda.norms.linear import Dense
from locallip_cuda.propagation import rules
from locallip_cuda.propagation.graph import UnsupportedModuleError

every_device = pytest.mark.parametrize("device", DEVICES)
both_radii = pytest.mark.parametrize("radius", ["local", "global"])
Radius = Literal["local", "global"]
CONVERGED = 100


# ---- a plain twin of local_bounds ----------------------------------------------------------------------------------


@dataclass
class Plain:
    logits: Tensor
    features: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    layer_norms: list[Tensor]
    global_norms: list[Tensor]
    row_masks: list[Tensor]
    column_masks: list[Tensor]
    sparsity: Tensor


def as_matrix(module: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor, torch.Size]:
    """(matrix, bias, output shape) of an affine module, by applying it to zero and to the unit vectors."""
    units = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    offset = module(torch.zeros(1, *shape, dtype=torch.float64))
    return (module(units) - offset).flatten(1).T, offset.flatten(), offset.shape[1:]


def flat_leaves(model: nn.Sequential) -> list[nn.Module]:
    return [leaf for m in model for leaf in (flat_leaves(m) if isinstance(m, nn.Sequential) else [m])]


def masks_of(module: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns that stay by the rules of the paper and of MaxMin; lower, upper (B, *shape)."""
    stays = torch.ones_like(lower, dtype=torch.bool)
    if isinstance(module, nn.ReLU):
        stays = upper > 0
    elif isinstance(module, ClippedReLU):
        stays = (upper > 0) & (lower < module.threshold)
    elif isinstance(module, ClippedMaxMin):
        (la, lb), (ua, ub) = lower.chunk(2, 1), upper.chunk(2, 1)
        top = torch.maximum(la, lb) < module.upper
        bottom = torch.minimum(ua, ub) > module.lower
        row_a, row_b = top | bottom, top | bottom
        row_a = torch.where(la >= ub, top, torch.where(lb >= ua, bottom, row_a))
        row_b = torch.where(la >= ub, bottom, torch.where(lb >= ua, top, row_b))
        return torch.cat([row_a, row_b], 1), torch.cat([top, bottom], 1)
    return stays, stays


def sparsity_of(module: nn.Module, lower: Tensor, upper: Tensor, weight: float) -> Tensor:
    if isinstance(module, nn.ReLU):
        return upper.relu().mean()
    if isinstance(module, ClippedReLU):
        return upper.relu().mean() + weight * (module.threshold - lower).relu().mean()
    if isinstance(module, ClippedMaxMin):
        (la, lb), (ua, ub) = lower.chunk(2, 1), upper.chunk(2, 1)
        top, bottom = torch.maximum(la, lb), torch.minimum(ua, ub)
        return (module.upper - top).relu().mean() + (bottom - module.lower).relu().mean()
    return torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def plain_bounds(model: nn.Sequential, x: Tensor, eps: float, weight: float = 0.1) -> Plain:
    """radius="local" with every operator a matrix and every norm from singular values, step by step."""
    leaves = flat_leaves(model)
    batch = len(x)
    mu, lower, upper = x, x - eps, x + eps
    radius = torch.full((batch,), eps, dtype=torch.float64)
    columns = torch.ones_like(x, dtype=torch.bool)
    out = Plain(x, x, x, x, radius, [], [], [], [], torch.zeros((), dtype=torch.float64))
    run: list[nn.Module] = []  # affine modules since the last activation, which are one operator

    def advance(activation: nn.Module) -> None:
        nonlocal mu, lower, upper, radius, columns, run
        dense = None
        if not any(isinstance(module, AFFINE) for module in run):
            moved = nn.Sequential(*run)
            mu, lower, upper, columns = (moved(t) for t in (mu, lower, upper, columns))
            reach = radius.unsqueeze(1) * columns.flatten(1)
            centre, half = ((upper + lower) / 2).flatten(1), ((upper - lower) / 2).flatten(1)
            flat, shape = mu.flatten(1), mu.shape[1:]
        else:
            dense, bias, shape = as_matrix(nn.Sequential(*run), mu.shape[1:])
            reach = radius.unsqueeze(1) * (columns.flatten(1).double() @ dense.square().T).sqrt()
            centre = ((upper + lower) / 2).flatten(1) @ dense.T + bias
            half = ((upper - lower) / 2).flatten(1) @ dense.abs().T
            flat = mu.flatten(1) @ dense.T + bias
        low = torch.maximum(centre - half, flat - reach).view(-1, *shape)
        high = torch.minimum(centre + half, flat + reach).view(-1, *shape)
        rows, new_columns = masks_of(activation, low, high)
        mu = activation(flat.view(-1, *shape))
        if dense is not None:
            masked = dense * rows.flatten(1).unsqueeze(2) * columns.flatten(1).unsqueeze(1)
            norm = torch.linalg.matrix_norm(masked, 2)
            radius = radius * norm
            out.layer_norms.append(norm)
            out.global_norms.append(torch.linalg.matrix_norm(dense, 2))
            out.row_masks.append(rows)
            out.column_masks.append(new_columns)
            out.sparsity += sparsity_of(activation, low, high, weight)
        radius = radius * constant_of(activation)
        # intersected with the ball behind the activation, which local_bounds claims to be never tighter
        ball = radius.view(-1, *[1] * (mu.dim() - 1))
        lower, upper = torch.maximum(activation(low), mu - ball), torch.minimum(activation(high), mu + ball)
        columns, run = new_columns, []

    for module in leaves:
        if isinstance(module, (*AFFINE, nn.Flatten)):
            run.append(module)
        elif not isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            advance(module)
    out.logits = nn.Sequential(*run)(mu)
    out.features, out.lower, out.upper, out.radius = mu.flatten(1), lower.flatten(1), upper.flatten(1), radius
    return out


AFFINE = (nn.Linear, nn.Conv2d, nn.AvgPool2d, Normalize)

# Of two maps in a row that are no kernel together the rows have norms that are not at hand, but bounds of them.
NOT_ONE_KERNEL = ("normalised, pooled, grouped", "convolved and pooled at once", "nested")


def constant_of(activation: nn.Module) -> float:
    return 0.25 if isinstance(activation, nn.Sigmoid) else 1.0


@every_device
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_equals_the_plain_twin(name: str, eps: float, device: str) -> None:
    model, x = ZOO[name][0], zoo_input(name, 5)
    expected = plain_bounds(model, x, eps)
    b = ll.local_bounds(copy.deepcopy(model).to(device), x.to(device), eps, iterations=CONVERGED)
    torch.testing.assert_close(b.logits.cpu(), expected.logits, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(b.features.cpu(), expected.features, rtol=1e-8, atol=1e-9)
    if name in NOT_ONE_KERNEL:
        assert (b.lower.cpu() <= expected.lower + 1e-9).all() and (b.upper.cpu() >= expected.upper - 1e-9).all()
        assert (b.radius.cpu() >= expected.radius * (1 - 1e-8)).all()
        return
    for field in ("lower", "upper", "radius"):
        torch.testing.assert_close(getattr(b, field).cpu(), getattr(expected, field), rtol=1e-8, atol=1e-9)
    assert b.layer_norms.shape == (5, len(expected.layer_norms))
    for k, norm in enumerate(expected.layer_norms):
        torch.testing.assert_close(b.layer_norms[:, k].cpu(), norm, rtol=1e-8, atol=1e-9)
    constants = math.prod(constant_of(module) for module in flat_leaves(model))
    torch.testing.assert_close(b.lipschitz.cpu(), b.layer_norms.cpu().prod(1) * constants)
    torch.testing.assert_close(b.radius, b.lipschitz * eps)
    product = torch.stack([*expected.global_norms, torch.tensor(constants, dtype=torch.float64)]).prod()
    torch.testing.assert_close(b.global_lipschitz.cpu(), product, rtol=1e-6, atol=0)
    assert len(b.row_masks) == len(expected.row_masks) and len(b.column_masks) == len(expected.column_masks)
    for mine, theirs in zip(
        [*b.row_masks, *b.column_masks], [*expected.row_masks, *expected.column_masks], strict=True
    ):
        assert mine.dtype == torch.bool and torch.equal(mine.cpu(), theirs)
    torch.testing.assert_close(b.sparsity_loss.cpu(), expected.sparsity, rtol=1e-8, atol=1e-10)


def test_the_twin_is_tried_where_masks_bite() -> None:
    for name in ("convolutional, relu", "convolutional, clipped-relu", "convolutional, clipped-maxmin"):
        b = ll.local_bounds(ZOO[name][0], zoo_input(name, 5), 0.05)
        shares = [m.double().mean().item() for m in b.column_masks]
        assert min(shares) < 0.9 and max(shares) > 0.1, (name, shares)
        rows = [m.double().mean().item() for m in b.row_masks]
        assert min(rows) < 0.95, (name, rows)


# ---- by hand -------------------------------------------------------------------------------------------------------


def hand_network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for layer, rows in ((model[0], [[1.0, 0.0], [0.0, 2.0]]), (model[2], [[1.0, 1.0], [-1.0, 0.0]])):
            layer.weight.copy_(torch.tensor(rows))  # type: ignore[union-attr, operator]
            layer.bias.zero_()  # type: ignore[union-attr, operator]
    return model


@every_device
@both_radii
def test_by_hand(radius: Radius, device: str) -> None:
    """z = (1, -2) within 0.5 times the rows' norms (1, 2): the second unit is off; norms 1 with masks and 2 without."""
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64, device=device)
    y = torch.tensor([0], device=device)
    b = ll.local_bounds(hand_network().to(device), x, 0.5, radius=radius)
    assert b.row_masks[0].tolist() == b.column_masks[0].tolist() == [[True, False]]
    for value, expected in (
        (b.logits, [[1, -1]]), (b.radius, [0.5]), (b.lipschitz, [1]), (b.layer_norms, [[1]]), (b.features, [[1, 0]]),
        (b.lower, [[0.5, 0]]), (b.upper, [[1.5, 0]]), (b.worst_logits(y), [[1, 0]]), (b.margin(y), [1]),
        (b.margin(), [1]),
        (b.worst_logits(1 - y), [[2, -1]]), (b.margin(1 - y), [-3]), (b.sparsity_loss, 0.75), (b.global_lipschitz, 2),
    ):  # fmt: skip
        torch.testing.assert_close(value.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# ---- properties ----------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both_radii
def test_shapes_dtypes_and_order(activation: str, dtype: torch.dtype, radius: Radius, device: str) -> None:
    model = small_network(activation, dtype=dtype).to(device)
    x = torch.rand(3, 2, 6, 6, generator=generator(0)).to(device, dtype)
    y = torch.tensor([0, 4, 2], device=device)
    b = ll.local_bounds(model, x, 0.1, radius=radius)
    shapes = {
        "logits": (3, 5), "radius": (3,), "lipschitz": (3,), "global_lipschitz": (), "layer_norms": (3, 3),
        "features": (3, 16), "lower": (3, 16), "upper": (3, 16), "sparsity_loss": (), "eps": (3,),
    }  # fmt: skip
    for field, shape in shapes.items():
        value = getattr(b, field)
        assert value.shape == shape and value.dtype == dtype and value.device == x.device, field
    assert b.worst_logits(y).shape == (3, 5) and b.margin(y).shape == (3,) and b.margin().dtype == dtype
    digits = 2e-3 if dtype == torch.float32 else 1e-10  # a GPU's convolutions may use TF32
    torch.testing.assert_close(b.logits, model(x), rtol=digits, atol=digits)
    torch.testing.assert_close(b.features, model[:-1](x), rtol=digits, atol=digits)
    pre = [(3, 4, 6, 6), (3, 6, 3, 3), (3, 16)]
    assert [tuple(m.shape) for m in b.row_masks] == pre and [tuple(m.shape) for m in b.column_masks] == pre
    assert all(m.dtype == torch.bool for m in [*b.row_masks, *b.column_masks])
    slack = 1e-3 if dtype == torch.float32 else 1e-12
    assert (b.lower <= b.features + slack).all() and (b.features <= b.upper + slack).all()
    assert b.guarantee == "estimate"


@every_device
@pytest.mark.parametrize("name", ZOO)
def test_local_is_never_above_global(name: str, device: str) -> None:
    model, x = copy.deepcopy(ZOO[name][0]).to(device), zoo_input(name, 8, device)
    for eps in (0.01, 0.1, 1.0):
        local, world = (ll.local_bounds(model, x, eps, radius=r, iterations=CONVERGED) for r in ("local", "global"))
        assert (local.radius <= world.radius * (1 + 1e-7)).all()
        assert (world.lipschitz <= world.global_lipschitz * (1 + 1e-7)).all()
        assert (local.lower >= world.lower - 1e-9).all() and (local.upper <= world.upper + 1e-9).all()
        assert (local.margin() >= world.margin() - 1e-9).all()
        for mine, theirs in zip(local.column_masks, world.column_masks, strict=True):
            assert (theirs | ~mine).all()


@both_radii
@pytest.mark.parametrize(
    "name", ["convolutional, clipped-relu", "dense, clipped-maxmin", "normalised, pooled, grouped"]
)
def test_one_eps_per_sample_equals_separate_calls(name: str, radius: Radius) -> None:
    model, x = ZOO[name][0], zoo_input(name, 4)
    eps = torch.tensor([0.0, 0.03, 0.2, 1.0], dtype=torch.float64)
    together = ll.local_bounds(model, x, eps, radius=radius, iterations=CONVERGED)
    y = torch.tensor([0, 1, 2, 1])
    for i in range(4):
        alone = ll.local_bounds(model, x[i : i + 1], float(eps[i]), radius=radius, iterations=CONVERGED)
        for field in ("logits", "radius", "lipschitz", "layer_norms", "features", "lower", "upper"):
            got = getattr(together, field)[i : i + 1]
            torch.testing.assert_close(got, getattr(alone, field), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            together.worst_logits(y)[i], alone.worst_logits(y[i : i + 1])[0], rtol=1e-7, atol=1e-9
        )


def test_eps_as_tensor_of_any_kind() -> None:
    model, x = ZOO["dense, relu"][0], zoo_input("dense, relu", 2)
    expected = ll.local_bounds(model, x, 1.0)
    for eps in (1, torch.tensor(1), torch.tensor(1.0), torch.ones(2), torch.ones(2, dtype=torch.int64)):
        torch.testing.assert_close(ll.local_bounds(model, x, eps).radius, expected.radius)


@pytest.mark.parametrize("eps", [2**53 + 1, 2**60 + 1, 3 * 2**61 - 1, 2**53 - 1, 7])
def test_integer_eps_never_rounds_down(eps: int) -> None:
    """2^53 + 1 lies between two float64 numbers; a proof for the smaller one would not be one for it."""
    model, x = ZOO["dense, relu"][0], zoo_input("dense, relu", 2)
    for given in (eps, torch.tensor(eps), torch.tensor([eps, eps])):
        b = ll.local_bounds(model, x, given, guarantee="deterministic")
        assert all(eps <= int(r) <= eps * (1 + 2**-50) for r in b.eps.tolist())
    single = ll.local_bounds(copy.deepcopy(model).float(), x.float(), torch.tensor(2**24 + 1))
    assert all(r >= 2**24 + 1 for r in single.eps.tolist())


@every_device
@both_radii
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eps_zero_is_a_point(activation: str, radius: Radius, device: str) -> None:
    model, x = small_network(activation).to(device), torch.rand(3, 2, 6, 6, dtype=torch.float64, device=device)
    y = torch.tensor([0, 1, 2], device=device)
    b = ll.local_bounds(model, x, 0.0, radius=radius)
    assert (b.radius == 0).all()
    torch.testing.assert_close(b.lower, b.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.upper, b.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.worst_logits(y), b.logits, rtol=0, atol=1e-12)
    loss = ll.losses.robust_cross_entropy(b, y) + ll.losses.sparsity(b)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


@every_device
@both_radii
@pytest.mark.parametrize("name", ZOO)
def test_empty_batch(name: str, radius: Radius, device: str) -> None:
    model, x = copy.deepcopy(ZOO[name][0]).to(device), zoo_input(name, 0, device)
    b = ll.local_bounds(model, x, 0.1, radius=radius)
    classes, width = ll.local_bounds(model, zoo_input(name, 1, device), 0.1).last_weight.shape
    y = torch.zeros(0, dtype=torch.int64, device=device)
    assert b.logits.shape == b.worst_logits(y).shape == (0, classes)
    assert b.radius.shape == b.lipschitz.shape == b.margin().shape == (0,)
    assert b.lower.shape == b.upper.shape == b.features.shape == (0, width)
    assert b.layer_norms.shape == (0, len(b.row_masks)) and b.sparsity_loss == 0
    (b.radius.sum() + b.worst_logits(y).sum() + b.sparsity_loss).backward()


def test_frozen_units_leave_a_zero_norm() -> None:
    """All units of a layer off: radius 0 behind it, and margins that are the clean ones."""
    model = small_network("relu")
    with torch.no_grad():
        model[2].bias.fill_(-1e3)
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    b = ll.local_bounds(model, x, 0.2)
    assert (b.radius == 0).all() and not b.column_masks[1].any()
    assert torch.equal(b.lower, b.upper)
    torch.testing.assert_close(b.worst_logits(torch.tensor([0, 1, 2])), b.logits)
    (b.radius.sum() + b.margin().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_layouts_do_not_matter() -> None:
    model, x = small_network("clipped-relu"), torch.rand(3, 2, 6, 6, dtype=torch.float64)
    expected = ll.local_bounds(model, x, 0.1)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        b = ll.local_bounds(model.to(memory_format=torch.channels_last), other, 0.1)
        for field in ("logits", "radius", "lower", "upper"):
            torch.testing.assert_close(getattr(b, field), getattr(expected, field), rtol=1e-10, atol=1e-12)


def test_modules_and_parameters_are_left_alone() -> None:
    model, x = small_network("clipped-relu"), torch.rand(2, 2, 6, 6, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    ll.local_bounds(model, x, 0.1).margin().sum().backward()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@every_device
@pytest.mark.parametrize("where", ["input", "weight", "bias", "threshold"])
def test_nan_is_never_certified(where: str, device: str) -> None:
    model, x = small_network("clipped-relu").to(device), torch.rand(2, 2, 6, 6, dtype=torch.float64, device=device)
    with torch.no_grad():
        if where == "input":
            x[0, 0, 3, 3] = math.nan
        elif where == "weight":
            model[2].weight[0] = math.nan
        elif where == "bias":
            model[2].bias[0] = math.nan
        else:
            model[3].threshold[0, 0, 1, 1] = math.nan
    if where == "weight" and device == "cpu":
        with pytest.raises(ValueError, match=r"model.2: got NaN or infinite weights"):
            ll.local_bounds(model, x, 0.05)
        return
    b = ll.local_bounds(model, x, 0.05)
    touched = slice(0, 1) if where == "input" else slice(None)
    assert not (b.margin(b.logits.argmax(1))[touched] > 0).any()
    assert b.margin()[touched].isnan().all()
    if where == "input":
        assert b.margin()[1].isfinite()


# ---- gradients -----------------------------------------------------------------------------------------------------


def differentiable(b: ll.LocalBounds, y: Tensor) -> dict[str, Tensor]:
    def mixed(t: Tensor) -> Tensor:
        return (t * torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype).view_as(t)).sum()

    return {
        "lipschitz": mixed(b.lipschitz), "radius": mixed(b.radius), "layer_norms": mixed(b.layer_norms),
        "worst_logits": mixed(b.worst_logits(y)), "margin": mixed(b.margin(y)), "sparsity": b.sparsity(0.3),
        "lower": mixed(b.lower), "upper": mixed(b.upper), "logits": mixed(b.logits),
    }  # fmt: skip


@both_radii
@pytest.mark.parametrize(
    "name",
    [
        *(f"convolutional, {a}" for a in ACTIVATIONS),
        "dense, clipped-maxmin",
        "dense, Tanh",
        "normalised, pooled, grouped",
    ],
)
def test_gradients_against_finite_differences(name: str, radius: Radius) -> None:
    """Along a random direction of all parameters, the input and eps at once, for every output."""
    model = copy.deepcopy(ZOO[name][0])
    x, y = zoo_input(name, 3).requires_grad_(True), torch.tensor([0, 2, 1])
    eps = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), x, eps]
    direction = [torch.randn(p.shape, generator=generator(k), dtype=torch.float64) for k, p in enumerate(inputs)]

    def values() -> dict[str, Tensor]:
        return differentiable(ll.local_bounds(model, x, eps, radius=radius, iterations=CONVERGED), y)

    ends: list[dict[str, Tensor]] = []
    step = 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(inputs, direction, strict=True):
                p += sign * step * d
            ends.append(values())
            for p, d in zip(inputs, direction, strict=True):
                p -= sign * step * d
    results = values()
    for key, value in results.items():
        gradients = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, direction, strict=True)
        slope = sum(((g * d).sum() for g, d in pairs if g is not None), torch.zeros((), dtype=torch.float64))
        expected = (ends[0][key] - ends[1][key]) / (2 * step)
        torch.testing.assert_close(slope, expected, rtol=2e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_every_parameter_has_a_gradient() -> None:
    model = small_network("clipped-relu")
    b = ll.local_bounds(model, torch.rand(8, 2, 6, 6, dtype=torch.float64), 0.1)
    (ll.losses.robust_cross_entropy(b, torch.arange(8) % 5) + ll.losses.sparsity(b)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@every_device
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["dense, relu", "convolutional, clipped-maxmin"])
@pytest.mark.parametrize("output", ["logits", "radius", "lipschitz", "worst_logits", "upper", "sparsity"])
def test_second_derivatives_are_errors(output: str, name: str, device: str) -> None:
    """Of what depends on the weights twice; the first derivative, and a graph of it that nobody uses, are fine."""
    model = copy.deepcopy(ZOO[name][0]).to(device)
    x = zoo_input(name, 3, device).requires_grad_(True)
    b = ll.local_bounds(model, x, 0.1)
    values = differentiable(b, torch.tensor([0, 2, 1], device=device))
    inputs = [x, *model.parameters()]
    once = torch.autograd.grad(values[output].sum(), inputs, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(values[output].sum(), inputs, create_graph=True, allow_unused=True)
    for first, second in zip(once, twice, strict=True):
        assert (first is None) == (second is None) and (first is None or torch.equal(first, second))
    penalty = torch.cat([g.flatten() for g in twice if g is not None]).square().sum()
    with pytest.raises(NotImplementedError, match="bounds have no second derivative, want one backward pass"):
        penalty.backward()


# ---- autocast and compile ------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("activation", ["clipped-relu", "clipped-maxmin"])
def test_autocast_stays_close(activation: str, device: str) -> None:
    model = small_network(activation, dtype=torch.float32).to(device)
    x = torch.rand(4, 2, 6, 6, generator=generator(0)).to(device)
    exact = ll.local_bounds(model, x, 0.1)
    with torch.autocast(device, torch.bfloat16):
        b = ll.local_bounds(model, x, 0.1)
        loss = ll.losses.robust_cross_entropy(b, torch.zeros(4, dtype=torch.int64, device=device))
    assert b.radius.dtype == b.lower.dtype == torch.float32
    torch.testing.assert_close(b.radius, exact.radius, rtol=0.03, atol=0)
    for field in ("logits", "features", "lower", "upper"):
        torch.testing.assert_close(getattr(b, field).float(), getattr(exact, field), rtol=0.03, atol=0.02)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


dynamo = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="torch.compile of torch 2.11 cannot follow the lowering of a graph (docs/networks.md)",
)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=dynamo), False])
def test_compiles(whole: bool) -> None:
    """The bounds into one graph; the look at the labels on a CPU breaks it. Value and gradients as without."""
    model, x = small_network("clipped-relu", dtype=torch.float32), torch.rand(3, 2, 6, 6)
    y = torch.tensor([0, 1, 2])

    def loss(x: Tensor) -> Tensor:
        b = ll.local_bounds(model, x, 0.1, iterations=40)  # converged: the start vectors differ
        return b.radius.sum() + b.upper.sum() + b.sparsity_loss if whole else ll.losses.robust_cross_entropy(b, y)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=whole, backend="aot_eager")):
        value = function(x)
        parameters = list(model.parameters())
        results.append((value.detach(), torch.autograd.grad(value, parameters, materialize_grads=True)))
    torch.testing.assert_close(results[0], results[1])


def parametrised() -> nn.Module:
    layers = [nn.Linear(72, 8), nn.ReLU(), parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 5)]
    return nn.Sequential(nn.Flatten(), *layers)


COMPILED = {
    "sequential": lambda: small_network("clipped-relu", dtype=torch.float32),
    "residual": lambda: models.build("cifar10-liresnet-s", "maxmin"),
    "computed weights": parametrised,
}


@dynamo
@pytest.mark.parametrize("name", COMPILED)
def test_a_whole_step_compiles(name: str) -> None:
    """Bounds, loss and backward pass in one graph, for numbers and tensors as eps, with weights that move."""
    torch.manual_seed(0)
    model, y = COMPILED[name](), torch.tensor([0, 1, 2])
    x = torch.rand(3, 3, 32, 32) if name == "residual" else torch.rand(3, 2, 6, 6)
    weights = list(model.parameters())

    def loss(x: Tensor, eps: float | Tensor) -> Tensor:
        b = ll.local_bounds(model, x, eps, iterations=40)
        return ll.losses.robust_cross_entropy(b, y) + b.radius.sum()

    loss(x, 0.01)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for eps in (0.01, 0.02, 0.03, 0.04, torch.tensor(0.01), torch.tensor(0.02)):
        values = [function(x, eps) for function in (compiled, loss)]
        ours, plain = (torch.autograd.grad(value, weights, materialize_grads=True) for value in values)
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)
        with torch.no_grad():
            for p, gradient in zip(weights, plain, strict=True):
                p.sub_(gradient, alpha=1e-4)
    assert counter.frame_count <= 3 or name == "computed weights", "a number for eps compiles anew"


def test_a_model_that_compilation_meets_first_is_an_error() -> None:
    model, x = small_network("relu", dtype=torch.float32), torch.rand(3, 2, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ll.local_bounds(model, x, 0.1).radius, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"model: got one that torch.compile meets first|Observed exception"):
        compiled(x)


# ---- errors --------------------------------------------------------------------------------------------------------

X = torch.rand(2, 2, 6, 6)


def call(model: Any = None, x: Any = X, eps: Any = 0.1, **more: Any) -> ll.LocalBounds:
    return ll.local_bounds(small_network("relu", dtype=torch.float32) if model is None else model, x, eps, **more)


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *modules, nn.Flatten(), nn.Linear(144, 5))


def integer_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    model[0].weight.data = model[0].weight.data.int()
    return model


deep = nn.Sequential(
    nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(6)), nn.Flatten()
)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a function": (lambda: call(lambda x: x), TypeError, "model: got function, want a torch.nn.Module"),
    "images": (lambda: call(nn.Sequential()), TypeError, r"model: returns shape \(B, 2, 6, 6\), want \(B, K\)"),
    "no tensor": (lambda: call(nn.LSTM(6, 3), X[:, 0]), TypeError, "model: "),
    "unsupported inside": (
        lambda: call(nn.Sequential(*deep, nn.Linear(144, 5))),
        TypeError,
        r"model\.2\.1: layer_norm has no bound; want other functions, or a rule",
    ),
    "batch norm in training": (lambda: call(sequence(nn.BatchNorm2d(4))), TypeError, "model.1: batch_norm.*eval mode"),
    "dropout in training": (lambda: call(sequence(nn.Dropout(0.5))), TypeError, "model.1: dropout.* training mode"),
    "dropout2d in training": (lambda: call(sequence(nn.Dropout2d(0.5))), TypeError, "model.1: dropout2d.* training"),
    "expansive leaky": (lambda: call(sequence(nn.LeakyReLU(1.5))), TypeError, "model.1: leaky_relu.*slope=1.5"),
    "expansive elu": (lambda: call(sequence(nn.ELU(2.0))), TypeError, "model.1: elu has no bound: alpha=2.0"),
    "jumping softplus": (lambda: call(sequence(nn.Softplus(threshold=1))), TypeError, "model.1: softplus.*threshold=1"),
    "lopsided same": (
        lambda: call(nn.Sequential(nn.Conv2d(2, 4, 2, padding="same"), nn.Flatten(), nn.Linear(144, 5))),
        TypeError,
        "model.0: conv2d has no bound: an uneven 'same' padding",
    ),
    "pool with ceil": (
        lambda: call(nn.Sequential(nn.AvgPool2d(4, ceil_mode=True), nn.Flatten(), nn.Linear(8, 5))),
        TypeError,
        "model.0: avg_pool2d.*ceil_mode=False",
    ),
    "pool without pad": (
        lambda: call(sequence(nn.AvgPool2d(3, 1, 1, count_include_pad=False))),
        TypeError,
        "model.1: avg_pool2d.*count_include_pad",
    ),
    "x no tensor": (lambda: call(x=[1.0]), TypeError, "x: got list, want a torch.float32 or torch.float64 tensor"),
    "integer x": (lambda: call(x=X.int()), TypeError, "x: got torch.int32"),
    "half x": (lambda: call(x=X.half()), TypeError, "x: got torch.float16"),
    "x without batch": (lambda: call(x=X[0, 0, 0]), ValueError, r"x: got shape \(6,\), want \(B, ...\)"),
    "x of other channels": (
        lambda: call(x=X[:, :1]),
        ValueError,
        r"x: got shape \(2, 1, 6, 6\), torch.float32.*model.0: conv2d of",
    ),
    "x flat": (lambda: call(x=X.flatten(1)), ValueError, r"x: got shape \(2, 72\).*model.0: conv2d of"),
    "x too small for the head": (
        lambda: call(x=X[..., :4, :4]),
        ValueError,
        r"x: got shape \(2, 2, 4, 4\).*model.5: linear of \(2, 24\)",
    ),
    "x in double": (
        lambda: call(x=X.double()),
        ValueError,
        "x: got shape .*, torch.float64, on cpu, which model does not take; model.0: conv2d",
    ),
    "x on another device": (lambda: call(x=X.to("meta")), ValueError, "x: got one on meta, want cpu as model.0"),
    "integer weight": (
        lambda: call(integer_model(), torch.rand(2, 3)),
        (TypeError, ValueError),
        "model.0: linear has no bound: a weight in torch.int32, want torch.float32",
    ),
    "negative eps": (lambda: call(eps=-0.1), ValueError, "eps: got -0.1, want a finite number >= 0"),
    "infinite eps": (lambda: call(eps=math.inf), ValueError, "eps: got inf"),
    "eps beyond every float": (lambda: call(eps=10**400), ValueError, "eps: got 1000.*, want a finite number >= 0, at"),
    "nan eps": (lambda: call(eps=math.nan), ValueError, "eps: got nan"),
    "negative eps tensor": (lambda: call(eps=torch.tensor([0.1, -0.2])), ValueError, "eps: got -0.2"),
    "nan eps tensor": (lambda: call(eps=torch.tensor([0.1, math.nan])), ValueError, "eps: got"),
    "eps of another batch": (
        lambda: call(eps=torch.ones(3)),
        ValueError,
        r"eps: got shape \(3,\), want \(\) or \(2,\)",
    ),
    "eps of shape (B, 1)": (lambda: call(eps=torch.ones(2, 1)), ValueError, r"eps: got shape \(2, 1\)"),
    "x an array": (
        lambda: call(x=X.numpy()),
        TypeError,
        "x: got numpy.ndarray of float32, want a torch.float32 or torch.float64 tensor",
    ),
    "eps text": (lambda: call(eps="0.1"), TypeError, "eps: got str, want a number"),
    "eps a numpy scalar": (
        lambda: call(eps=numpy.float32(0.1)),
        TypeError,
        r"eps: got numpy.float32, want a number \(float or int\) or a torch tensor",
    ),
    "eps a numpy integer": (lambda: call(eps=numpy.int64(1)), TypeError, "eps: got numpy.int64, want a number"),
    "eps an array": (lambda: call(eps=numpy.ones(2)), TypeError, "eps: got numpy.ndarray of float64, want a number"),
    "labels an array": (
        lambda: call().margin(numpy.zeros(2, dtype="int64")),
        TypeError,
        "y: got numpy.ndarray of int64, want a torch.int64 tensor",
    ),
    "eps bool": (lambda: call(eps=True), TypeError, "eps: got bool"),
    "radius unknown": (lambda: call(radius="both"), ValueError, "radius: got 'both', want 'local' or 'global'"),
    "iterations negative": (lambda: call(iterations=-1), ValueError, "iterations: got -1, want an integer >= 0"),
    "guarantee unknown": (lambda: call(guarantee="sure"), ValueError, "guarantee: got 'sure', want one of"),
    "failure probability": (lambda: call(failure_probability=1.5), ValueError, "failure_probability: got 1.5"),
    "labels as floats": (
        lambda: call().worst_logits(torch.zeros(2)),
        TypeError,
        "y: got torch.float32, want a torch.int64 tensor",
    ),
    "labels no tensor": (lambda: call().worst_logits([0, 1]), TypeError, "y: got list"),
    "labels of another batch": (
        lambda: call().margin(torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"y: got shape \(3,\), want \(2,\)",
    ),
    "label too large": (
        lambda: call().worst_logits(torch.tensor([0, 5])),
        ValueError,
        r"y: got labels in \[0, 5\], want \[0, 5\)",
    ),
    "label negative": (lambda: call().margin(torch.tensor([-1, 0])), ValueError, r"y: got labels in \[-1, 0\]"),
    "odd MaxMin": (
        lambda: call(nn.Sequential(nn.Linear(3, 5), MaxMin(), nn.Linear(5, 2)), torch.rand(2, 3)),
        (ValueError, RuntimeError),
        "5",
    ),
    "threshold of another shape": (
        lambda: call(nn.Sequential(nn.Linear(3, 5), ClippedReLU(4), nn.Linear(5, 2)), torch.rand(2, 3)),
        (ValueError, RuntimeError),
        "4",
    ),
    "normalisation of another channel count": (
        lambda: call(nn.Sequential(Normalize([0.0] * 3, [1.0] * 3), nn.Flatten(), nn.Linear(72, 2))),
        (ValueError, RuntimeError),
        "3",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case: str) -> None:
    run, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        run()
    if "model." in message and kind is TypeError:
        assert isinstance(caught.value, UnsupportedModuleError)


# ---- snapshots -----------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("guarantee", ["estimate", "probabilistic", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["convolutional, clipped-maxmin", "normalised, pooled, grouped", "linear alone", "activation first"]
)
def test_a_result_is_a_snapshot(name: str, dtype: torch.dtype, guarantee: str, device: str) -> None:
    """What happens to the weights, x and eps after the call changes nothing that the result says."""
    seed = 0 if guarantee == "probabilistic" else None

    def bounds() -> tuple[ll.LocalBounds, list[Tensor]]:
        model = copy.deepcopy(ZOO[name][0]).to(device, dtype)
        x = zoo_input(name, 3, device).to(dtype).contiguous(memory_format=CHANNELS_LAST[len(ZOO[name][1])])
        eps = torch.tensor([0.05, 0.1, 0.2], device=device, dtype=dtype)
        with torch.no_grad():
            b = ll.local_bounds(model, x, eps, guarantee=guarantee, seed=seed)
        return b, [*model.parameters(), *model.buffers(), x, eps]

    def said(b: ll.LocalBounds) -> dict[str, Tensor]:
        y = torch.tensor([0, 2, 1], device=device)
        with torch.no_grad():
            return {**differentiable(b, y), "eps": b.eps, "global": b.global_lipschitz, "features": b.features}

    expected = said(bounds()[0])
    b, inputs = bounds()
    with torch.no_grad():
        for t in inputs:
            t.mul_(-3).add_(1)
    for key, value in said(b).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


CHANNELS_LAST = {1: torch.contiguous_format, 3: torch.channels_last}


# ---- closeness -----------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize(
    "name", ["convolutional, clipped-relu", "normalised, pooled, grouped", "activations in a row", "nested"]
)
def test_closeness_is_the_share_of_the_converged_norms(name: str, device: str) -> None:
    model, x = ZOO[name][0].to(device), zoo_input(name, 3, device)
    few = ll.local_bounds(model, x, 0.1, iterations=0)
    assert few.closeness.shape == few.layer_norms.shape and not few.closeness.requires_grad
    assert (few.closeness <= 1 + 1e-9).all() and (few.closeness > 0.05).all()
    assert few.closeness.min() < 0.99 or name in ("activations in a row", "nested"), (
        "dense layers of few rows are exact"
    )
    many = ll.local_bounds(model, x, 0.1, iterations=CONVERGED)
    torch.testing.assert_close(many.closeness, torch.ones_like(many.closeness), rtol=1e-6, atol=0)
    # by hand for the first layer, whose masks do not depend on the iterations
    torch.testing.assert_close(few.closeness[:, 0], (few.layer_norms / many.layer_norms)[:, 0].detach())
    proved = ll.local_bounds(model, x, 0.1, guarantee="deterministic")
    assert ((proved.closeness >= 1 - 1e-9) & (proved.closeness < 1.001)).all()


def test_closeness_without_layers_and_of_empty_masks() -> None:
    model, x = ZOO["linear alone"][0], zoo_input("linear alone", 3)
    assert ll.local_bounds(model, x, 0.1).closeness.shape == (3, 0)
    frozen = copy.deepcopy(ZOO["dense, relu"][0])
    with torch.no_grad():
        frozen[0].bias.fill_(-100)
    b = ll.local_bounds(frozen, zoo_input("dense, relu", 3), 0.1)
    assert (b.layer_norms[:, 0] == 0).all() and torch.equal(b.closeness[:, 0], torch.ones(3, dtype=torch.float64))


def test_samples_that_nothing_leaves_share_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch in which some samples keep all rows and columns of a layer, only the others are iterated."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    with torch.no_grad():
        for layer, bias in ((model[0], 3.0), (model[2], 30.0)):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(1)) / 10)
            layer.bias.fill_(bias)
    x = torch.rand(6, 20, generator=generator(2), dtype=torch.float64)
    some = torch.tensor([1, 4])
    x[some] -= 40 * model[0].weight[3].detach()  # the unit 3 is off there
    calls: list[int] = []
    honest = ops.masked_norm

    def spy(weight: Tensor, rows: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(0 if rows is None else len(rows))
        return honest(weight, rows, *arguments)

    monkeypatch.setattr(ops, "masked_norm", spy)
    b = ll.local_bounds(model, x, 0.1, iterations=40)
    assert calls == [0, 2, 0, 2] and not b.row_masks[0][some].all() and b.row_masks[1].all()
    rest = torch.tensor([0, 2, 3, 5])
    for layer, linear in enumerate((model[0], model[2])):
        whole = torch.linalg.matrix_norm(linear.weight, 2)
        torch.testing.assert_close(b.layer_norms[rest, layer], whole.expand(4))
        assert (b.layer_norms[some, layer] < whole * (1 - 1e-6)).all()
        for samples, norm in ((rest, 4 * whole), (some, None)):
            (gradient,) = torch.autograd.grad(b.layer_norms[samples, layer].sum(), linear.weight, retain_graph=True)
            if norm is None:
                assert gradient.abs().sum() > 0
            else:
                torch.testing.assert_close(gradient, torch.autograd.grad(norm, linear.weight)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.closeness, torch.ones_like(b.closeness), rtol=1e-7, atol=0)


# ---- the global bound ----------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("name", sorted(ZOO))
def test_global_bounds_are_the_plain_product(name: str, device: str) -> None:
    """Of norms by singular values; the worst logits are those of the ball alone; never below the local bound."""
    model, x = copy.deepcopy(ZOO[name][0]).to(device), zoo_input(name, 3, device)
    b = ll.global_bounds(model, x, 0.1, iterations=CONVERGED)
    torch.testing.assert_close(b.logits, model(x))
    product, value = torch.ones((), dtype=torch.float64, device=device), x
    run: list[nn.Module] = []
    for module in flat_leaves(copy.deepcopy(model)):
        if isinstance(module, (*AFFINE, nn.Flatten)):
            run.append(module)
            continue
        if any(isinstance(each, AFFINE) for each in run):
            weight, _, _ = as_matrix(nn.Sequential(*run).cpu(), value.shape[1:])
            product = product * torch.linalg.matrix_norm(weight, 2).to(device)
        value = module(nn.Sequential(*run).to(device)(value))
        product, run = product * constant_of(module), []
    torch.testing.assert_close(b.lipschitz, product.expand(3), rtol=1e-6, atol=0)
    torch.testing.assert_close(b.closeness, torch.ones_like(b.closeness), rtol=1e-6, atol=0)
    y = torch.tensor([0, 2, 1], device=device)
    distance = torch.cdist(b.last_weight, b.last_weight)[y]
    expected = b.logits + 0.1 * product * distance
    torch.testing.assert_close(b.worst_logits(y), expected, rtol=1e-6, atol=1e-9)
    local = ll.local_bounds(model, x, 0.1, iterations=CONVERGED)
    assert (local.margin(y) >= b.margin(y) - 1e-9).all()
    inputs = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(b.worst_logits(y).sum(), inputs, retain_graph=True, allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in ours)


def test_global_bounds_speak_of_the_model() -> None:
    model, x = small_network("relu"), torch.rand(2, 2, 6, 6, generator=generator(0), dtype=torch.float64)
    nan = copy.deepcopy(model)
    nan[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.2: got NaN or infinite weights"):
        ll.global_bounds(nan, x, 0.1)
    hooked = copy.deepcopy(model)
    hooked[0].register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(ll.global_bounds(hooked, x, 0.1).logits, hooked(x))
    doubled = ll.global_bounds(hooked, x, 0.1, iterations=CONVERGED).lipschitz
    torch.testing.assert_close(doubled, 2 * ll.global_bounds(model, x, 0.1, iterations=CONVERGED).lipschitz)
    with pytest.MonkeyPatch.context() as patch:  # what a rule says wrongly, the logits show
        patch.setitem(rules.RULES, nn.functional.linear, lambda at, value, w, b: rules.Affine(Dense(2 * w), b))
        with pytest.raises(UnsupportedModuleError, match="differ by up to"):
            ll.global_bounds(copy.deepcopy(model), x, 0.1)
