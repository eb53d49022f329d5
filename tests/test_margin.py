from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import DEVICES, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference

pytestmark = pytest.mark.parametrize("device", DEVICES)


def problem(
    batch: int, width: int, classes: int, *, radius: float = 1.0, room: float = 0.5, seed: int = 0, device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    g = generator(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=g, dtype=torch.float64)

    features = 2 * uniform(batch, width) - 1
    lower, upper = features - room * uniform(batch, width), features + room * uniform(batch, width)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=g)
    radii = radius * (0.2 + uniform(batch))
    floats = [t.to(device, dtype) for t in (features, lower, upper, radii, weight)]
    return [*floats, labels.to(device)]


def maximum(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, K) twice: the value of a feasible point, so below the maximum; and that of a dual, so above it. In float64.

    delta(s) = clip(s d) maximises over the box intersected with the ball of radius ||delta(s)||: bisection in s.
    """
    features, lower, upper, radius, weight = (t.double() for t in args[:5])
    d = weight.unsqueeze(0) - weight[args[5]].unsqueeze(1)
    low, high = (lower - features).clamp_max(0).unsqueeze(1), (upper - features).clamp_min(0).unsqueeze(1)
    limit = radius.view(-1, 1, 1)

    def point(s: Tensor) -> Tensor:
        step = torch.where(d == 0, torch.zeros_like(d), s * d)
        return torch.minimum(torch.maximum(step, low), high)

    left, right = torch.full_like(d[..., :1], -600), torch.full_like(d[..., :1], 600)  # of log s
    for _ in range(200):
        middle = (left + right) / 2
        inside = point(middle.exp()).norm(dim=2, keepdim=True) <= limit
        left, right = torch.where(inside, middle, left), torch.where(inside, right, middle)
    feasible = point(left.exp())
    assert (feasible.norm(dim=2) <= radius.unsqueeze(1)).all()
    lam = (-right).exp()
    corner = point(right.exp())
    dual = (d * corner - lam * corner.square() / 2).sum(2) + (lam * limit.square()).squeeze(2) / 2
    return (d * feasible).sum(2), dual


CASES = {
    "ball and box": {},
    "ball inside the box": {"radius": 0.05, "room": 20.0},
    "box inside the ball": {"radius": 30.0, "room": 0.1},
    "ball alone": {"radius": 0.3, "room": math.inf},
    "narrow": {"radius": 1.2, "room": 0.2},
    "tiny": {"radius": 1e-6, "room": 1e-6},
    "large": {"radius": 1e6, "room": 1e5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(6, 1, 2), (6, 7, 4), (4, 512, 10), (2, 256, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_maximum_over_ball_and_box(
    case: str, size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    args = problem(*size, **CASES[case], device=device, dtype=dtype)
    gain = ops.margin(*args)
    below, above = maximum(args)
    torch.testing.assert_close(below, above, rtol=1e-9, atol=1e-100)  # the oracle agrees with itself
    digits = 2e-6 if dtype == torch.float32 else 1e-12
    assert gain.dtype == dtype and gain.shape == below.shape
    assert (gain.double() >= below * (1 - digits)).all(), "never below the maximum"
    torch.testing.assert_close(gain.double(), above, rtol=max(digits, 1e-9), atol=1e-100)
    assert (gain.gather(1, args[5].unsqueeze(1)) == 0).all()
    expected = reference.margin(*args)
    torch.testing.assert_close(gain, expected, rtol=max(2 * digits, 1e-9), atol=1e-7 * float(above.max()))


def test_no_feasible_point_gains_more(device: str) -> None:
    """Random points of the intersection, drawn towards its boundary, against the gain."""
    features, lower, upper, radius, weight, labels = args = problem(5, 6, 4, radius=0.6, device=device)
    gain = ops.margin(*args)
    g = generator(1)
    for _ in range(2000):
        delta = torch.randn(5, 6, generator=g, dtype=torch.float64).to(device) * 2
        delta = torch.minimum(torch.maximum(delta, lower - features), upper - features)
        delta *= (radius / delta.norm(dim=1)).clamp(max=1).unsqueeze(1)
        moved = delta @ weight.T
        assert (moved - moved.gather(1, labels.unsqueeze(1)) <= gain + 1e-12).all()


def test_by_hand(device: str) -> None:
    """d = (3, 4), r = 1: the ball alone gives 5; with delta_2 <= 0.6, 3 * 0.8 + 4 * 0.6; in a box of 0.1, 0.7."""
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64, device=device)
    zero = torch.zeros(1, 2, dtype=torch.float64, device=device)
    radius, label = torch.ones(1, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for low, high, expected in (
        ((-9, -9), (9, 9), (0, 5, 5)),
        ((-9, -9), (9, 0.6), (0, 4.8, 5)),
        ((-0.1, -0.1), (0.1, 0.1), (0, 0.7, 0.7)),
        ((0, 0), (9, 9), (0, 5, 0)),
        ((0, -9), (0, 9), (0, 4, 4)),
    ):
        gain = ops.margin(
            zero, zero + torch.tensor(low).to(zero), zero + torch.tensor(high).to(zero), radius, weight, label
        )
        torch.testing.assert_close(gain, torch.tensor([expected]).to(zero))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_zero_and_point_boxes_gain_nothing(dtype: torch.dtype, device: str) -> None:
    args = problem(4, 9, 5, device=device, dtype=dtype)
    args[3] = torch.zeros_like(args[3])
    assert (ops.margin(*args) == 0).all()
    args = problem(4, 9, 5, device=device, dtype=dtype)
    args[1] = args[2] = args[0]
    assert (ops.margin(*args) == 0).all()
    args = problem(4, 9, 5, device=device, dtype=dtype)
    args[4] = args[4][:1].expand(5, 9)
    assert (ops.margin(*args) == 0).all()


def test_ties_of_directions_and_rooms(device: str) -> None:
    """All units alike: they reach the box at once, and the step count must not be what ends the climb."""
    features = torch.zeros(3, 16, dtype=torch.float64, device=device)
    radius = torch.tensor([0.1, 2.0, 9.0], dtype=torch.float64, device=device)
    weight = torch.zeros(2, 16, dtype=torch.float64, device=device)
    weight[1] = 1
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    gain = ops.margin(features, features - 0.5, features + 0.5, radius, weight, labels)
    torch.testing.assert_close(gain[:, 1].cpu(), torch.tensor([0.4, 8.0, 8.0], dtype=torch.float64))


def test_as_many_breakpoints_as_units(device: str) -> None:
    """Rooms over many powers of ten: the units reach the box one after another."""
    width = 120
    rooms = torch.logspace(-9, 0, width, dtype=torch.float64, device=device).unsqueeze(0)
    weight = torch.zeros(2, width, dtype=torch.float64, device=device)
    weight[1] = torch.logspace(0, -3, width, dtype=torch.float64)
    zero = torch.zeros_like(rooms)
    for scale in (1e-8, 1e-4, 0.1, 0.9, 1.5, 2.0):
        radius = torch.full((1,), scale, dtype=torch.float64, device=device)
        args = [zero, -rooms, rooms, radius, weight, torch.zeros(1, dtype=torch.int64, device=device)]
        below, above = maximum(args)
        gain = ops.margin(*args)
        assert (gain >= below * (1 - 1e-12)).all() and (gain <= above * (1 + 1e-6)).all()


def test_clean_value_outside_its_box_by_rounding(device: str) -> None:
    args = problem(3, 6, 3, device=device)
    args[1][:, 0] = args[0][:, 0] + 1e-9
    args[2][:, 1] = args[0][:, 1] - 1e-9
    gain = ops.margin(*args)
    args[1][:, 0] = args[0][:, 0]
    args[2][:, 1] = args[0][:, 1]
    torch.testing.assert_close(gain, ops.margin(*args), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-18, 1e15])
@pytest.mark.parametrize("which", ["weight", "ball and box", "ball"])
def test_any_scale(scale: float, which: str, device: str) -> None:
    """Squares that underflow or overflow in float32 must not make the bound too small, or a NaN."""
    args = problem(3, 8, 4, radius=0.5, device=device, dtype=torch.float32)
    args[1], args[2] = args[1] - args[0], args[2] - args[0]
    args[0] = torch.zeros_like(args[0])
    for k in {"weight": [4], "ball and box": [1, 2, 3], "ball": [3]}[which]:
        args[k] = args[k] * scale
    gain = ops.margin(*args)
    below, above = maximum(args)
    assert (gain.double() >= below * (1 - 1e-5)).all()
    if which != "ball and box":  # there it may be loose
        torch.testing.assert_close(gain.double(), above, rtol=1e-4, atol=1e-45)


@pytest.mark.parametrize("where", range(5))
def test_nan_never_becomes_a_plausible_number(where: int, device: str) -> None:
    args = problem(2, 4, 3, device=device)
    args[5][:] = 0
    args[where][0 if where < 4 else 1] = math.nan
    gain = ops.margin(*args)
    others = gain[0, 1:] if where < 4 else gain[:, 1]
    assert others.isnan().all()
    assert where == 4 or gain[1].isfinite().all()


def test_empty_batch(device: str) -> None:
    args = problem(0, 5, 3, device=device)
    own = [t.requires_grad_(True) for t in args[:5]]
    gain = ops.margin(*own, args[5])
    assert gain.shape == (0, 3)
    for gradient, like in zip(torch.autograd.grad(gain.sum(), own), own, strict=True):
        assert gradient.shape == like.shape and (gradient == 0).all()


# ---- gradients -----------------------------------------------------------------------------------------------------


def gradients(function: Any, args: list[Tensor]) -> tuple[Tensor, ...]:
    own = [t.detach().clone().requires_grad_(True) for t in args[:5]]
    gain = function(*own, args[5])
    mix = torch.randn(gain.shape, generator=generator(9), dtype=torch.float64).to(gain)
    return torch.autograd.grad((gain * mix).sum(), own)


@pytest.mark.parametrize("case", [c for c in CASES if c != "ball alone"])
@pytest.mark.parametrize("size", [(3, 1, 2), (5, 7, 4), (3, 300, 10)])
def test_gradient_equals_that_of_the_reference(case: str, size: tuple[int, int, int], device: str) -> None:
    args = problem(*size, **CASES[case], device=device)
    for mine, theirs in zip(gradients(ops.margin, args), gradients(reference.margin, args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7 * float(theirs.abs().max()))


@pytest.mark.parametrize("case", ["ball and box", "ball inside the box", "box inside the ball"])
def test_gradcheck(case: str, device: str) -> None:
    args = problem(3, 4, 3, **CASES[case], device=device)
    inputs = [t.requires_grad_(True) for t in args[:5]]
    assert torch.autograd.gradcheck(lambda *t: ops.margin(*t, args[5]), inputs)


def test_gradients_at_radius_zero_and_without_room_are_finite(device: str) -> None:
    args = problem(3, 4, 3, device=device)
    args[3] = torch.zeros_like(args[3])
    assert all(g.isfinite().all() for g in gradients(ops.margin, args))
    args = problem(3, 4, 3, device=device)
    args[1] = args[2] = args[0]
    assert all(g.isfinite().all() for g in gradients(ops.margin, args))


def test_layouts_do_not_matter(device: str) -> None:
    args = problem(4, 6, 3, device=device)
    moved = [t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in args]
    assert torch.equal(ops.margin(*args), ops.margin(*moved))
    for mine, theirs in zip(gradients(ops.margin, moved), gradients(ops.margin, args), strict=True):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 4), st.integers(1, 12), st.integers(1, 6), st.floats(1e-3, 10), st.floats(1e-3, 10),
    st.integers(0, 10**6),
)  # fmt: skip
def test_any_problem(device: str, batch: int, width: int, classes: int, radius: float, room: float, seed: int) -> None:
    args = problem(batch, width, classes, radius=radius, room=room, seed=seed, device=device)
    gain = ops.margin(*args)
    below, above = maximum(args)
    assert (gain >= below * (1 - 1e-12)).all() and (gain <= above * (1 + 1e-9)).all()


# ---- registration and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int, device: str) -> None:
    args = problem(batch, 5, 4, device=device)
    inputs = [*(t.requires_grad_(True) for t in args[:5]), args[5]]
    torch.library.opcheck(torch.ops.locallip_cuda.margin.default, inputs)
    gain, step = torch.ops.locallip_cuda.margin(*inputs)
    detached = [t.detach() for t in args]
    back = (torch.randn_like(gain).detach(), step.detach(), *detached)
    torch.library.opcheck(torch.ops.locallip_cuda.margin_backward.default, back)


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: torch.ones(3, 5)}, r"features, lower, upper: got shapes"),
        ({4: torch.ones(4, 6)}, r"weight: got shape \[4, 6\], want \(K, 5\)"),
        ({3: torch.ones(2)}, r"radius: got shape \[2\], want \(B,\)"),
        ({5: torch.ones(3)}, "labels: got Float"),
        ({4: torch.ones(4, 5)}, "margin: got a tensor of Float"),
    ],
)
def test_errors(change: dict[int, Tensor], message: str, device: str) -> None:
    args = problem(3, 5, 4, device=device)
    dtype = torch.float32 if "got a tensor of Float" in message else torch.float64
    for k, v in change.items():
        args[k] = v.to(device, dtype if k < 5 else torch.float32)
    if "features" in message:
        args[1] = torch.ones(3, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=message):
        ops.margin(*args)
