from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import ACTIVATION_KINDS as ACTIVATIONS
from helpers import DEVICES, generator
from helpers import activation_arguments as arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locallip_cuda import ops
from locallip_cuda.ops import reference

pytestmark = pytest.mark.parametrize("device", DEVICES)

# more units than a chunk of the backward pass holds, in both layouts
SHAPES = {"dense": (34,), "image": (6, 5, 4), "channels": (70, 3, 2), "wide": (2500,), "large image": (10, 24, 23)}

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def bounds_of(args: list[Any]) -> tuple[Tensor, Tensor]:
    """Pre-activation lower and upper bounds, written out once more."""
    values, half_width, norms, radius, *_ = args
    clean = values[: len(radius)]
    reach = torch.einsum("b,b...->b...", radius, norms.sqrt().expand_as(clean))
    lower, upper = clean - reach, clean + reach
    if half_width is not None:
        centre = values[len(radius) :]
        lower, upper = torch.maximum(lower, centre - half_width), torch.minimum(upper, centre + half_width)
    return lower, upper


def apply(activation: str, z: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """The activation, as the network computes it."""
    if activation == "identity":
        return z
    if activation == "relu":
        return z.relu()
    if activation == "clipped_relu":
        assert first is not None
        return torch.minimum(z.relu(), first)
    a, b = z.chunk(2, 1)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    if activation == "clipped_maxmin":
        assert first is not None and second is not None
        high, low = torch.minimum(high, first), torch.maximum(low, second)
    return torch.cat([high, low], 1)


def floats(args: list[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def compare_gradients(args: list[Any], *, slack: bool = True, seed: int = 1, rtol: float = 1e-10) -> None:
    """Of a random combination of all outputs in all inputs, against autograd through the reference."""
    gradients = []
    for function in (ops.activation_pattern, reference.activation_pattern):
        own = [a.detach().clone().requires_grad_(True) if isinstance(a, Tensor) else a for a in args]
        values, half_width, _, _, terms, _ = function(*own)
        g = generator(seed)
        outputs = [values, half_width, terms] if slack else [values, half_width]
        total = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outputs)
        gradients.append(torch.autograd.grad(total, floats(own), allow_unused=True))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=rtol, atol=1e-12)


# ---- against the reference -----------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("box_behind", [True, False])
def test_equals_the_reference(
    activation: str, shape: str, box: bool, shared: bool, box_behind: bool, device: str
) -> None:
    args = [*arguments(activation, SHAPES[shape], 3, box=box, shared=shared, device=device), box_behind]
    got, expected = ops.activation_pattern(*args), reference.activation_pattern(*args)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert got[2].dtype == got[3].dtype == torch.bool
    compare_gradients(args)
    if activation.startswith("clipped"):
        assert 0.05 < got[2].double().mean() < 0.95, "the masks must bite, or this test checks little"
        assert 0.05 < got[3].double().mean() < 0.95


@every_activation
@pytest.mark.parametrize("shape", [(34,), (6, 5, 4), (64, 32, 32)])
def test_single_precision(activation: str, shape: tuple[int, ...], device: str) -> None:
    args = arguments(activation, shape, 4, device=device)
    single = [a.float() if isinstance(a, Tensor) else a for a in args]
    double = [a.double() if isinstance(a, Tensor) else a for a in single]
    for mine, theirs in zip(ops.activation_pattern(*single), reference.activation_pattern(*double), strict=True):
        if mine.dtype == torch.bool:
            assert (
                mine == theirs
            ).double().mean() > 0.9999  # a bound within rounding of its threshold may fall on either side
        else:
            torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)


@every_activation
def test_layouts_do_not_matter(activation: str, device: str) -> None:
    args = arguments(activation, (6, 5, 4), 3, device=device)
    expected = ops.activation_pattern(*args)

    def scattered(t: Tensor) -> Tensor:
        return torch.stack([t, t + 7], -1)[..., 0]

    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3) if t.dim() == 4 else t,
        scattered,
    ):
        moved = [change(a) if isinstance(a, Tensor) else a for a in args]
        for mine, theirs in zip(ops.activation_pattern(*moved), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        compare_gradients(moved)


@every_activation
@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)])
@pytest.mark.parametrize("box", [True, False])
def test_batches_of_none_and_one(activation: str, shape: tuple[int, ...], box: bool, device: str) -> None:
    for batch in (0, 1):
        args = arguments(activation, shape, batch, box=box, shared=True, device=device)
        values, half_width, rows, columns, slack, _ = ops.activation_pattern(*args)
        assert values.shape == (2 * batch, *shape) and half_width.shape == (batch, *shape)
        assert rows.shape == columns.shape == (batch, *shape) and slack.shape == (batch, 2)
        assert [len(t) for t in ops.activation_pattern(*args, False)[:2]] == [batch, 0]
        if batch:
            compare_gradients(args)
        else:
            own = [a.requires_grad_(True) if isinstance(a, Tensor) else a for a in args]
            out = ops.activation_pattern(*own)
            total = out[0].sum() + out[1].sum() + out[4].sum()
            for gradient, like in zip(torch.autograd.grad(total, floats(own)), floats(own), strict=True):
                assert gradient.shape == like.shape and (gradient == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(ACTIVATIONS),
    st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_shape(
    device: str, activation: str, shape: tuple[int, ...], batch: int, box: bool, shared: bool, seed: int
) -> None:
    shape = (2 * shape[0], *shape[1:])
    args = arguments(activation, shape, batch, box=box, shared=shared, seed=seed, device=device)
    for mine, theirs in zip(ops.activation_pattern(*args), reference.activation_pattern(*args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    compare_gradients(args, seed=seed)


# ---- against what it means -----------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("box", [True, False])
def test_values_between_the_bounds_stay_inside(activation: str, box: bool, device: str) -> None:
    """Box and masks against samples of the pre-activation, whatever the reference says."""
    args = arguments(activation, (40,), 5, box=box, device=device)
    first, second = args[5:]
    lower, upper = bounds_of(args)
    assert (lower <= upper).all()
    values, half_width, _, columns, *_ = ops.activation_pattern(*args)
    clean, centre = values.chunk(2)
    torch.testing.assert_close(clean, apply(activation, args[0][:5], first, second))
    low, high = centre - half_width, centre + half_width
    for k in range(200):
        z = lower + (upper - lower) * torch.rand(lower.shape, generator=generator(k), dtype=torch.float64).to(device)
        out = apply(activation, z, first, second)
        assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()
        assert (columns | ((out - clean).abs() < 1e-12)).all()
    # the box is the smallest: its ends are taken on
    for z, end in ((lower, low), (upper, high)):
        torch.testing.assert_close(apply(activation, z, first, second), end, rtol=0, atol=1e-12)
    assert (half_width[~columns].abs() < 1e-12).all()


def test_masks_of_clipped_relu_by_their_definition(device: str) -> None:
    args = arguments("clipped_relu", (200,), 4, device=device)
    lower, upper = bounds_of(args)
    stays = (upper > 0) & (lower < args[5])
    _, _, rows, columns, slack, _ = ops.activation_pattern(*args)
    assert torch.equal(rows, stays) and torch.equal(columns, stays)
    expected = torch.stack([upper.relu().mean(1), (args[5] - lower).relu().mean(1)], 1)
    torch.testing.assert_close(slack, expected)
    args = arguments("relu", (4, 3, 2), 4, device=device)
    lower, upper = bounds_of(args)
    _, _, rows, columns, slack, _ = ops.activation_pattern(*args)
    assert torch.equal(rows, upper > 0) and torch.equal(columns, rows)
    torch.testing.assert_close(slack[:, 0], upper.relu().flatten(1).mean(1))
    assert (slack[:, 1] == 0).all()


def test_sparsity_terms_of_clipped_maxmin_by_their_definition(device: str) -> None:
    args = arguments("clipped_maxmin", (8, 3, 2), 4, device=device)
    (lower_a, lower_b), (upper_a, upper_b) = (t.chunk(2, 1) for t in bounds_of(args))
    top, bottom = torch.maximum(lower_a, lower_b), torch.minimum(upper_a, upper_b)
    slack = ops.activation_pattern(*args)[4]
    expected = (args[5] - top).relu().flatten(1).mean(1) + (bottom - args[6]).relu().flatten(1).mean(1)
    torch.testing.assert_close(slack, torch.stack([expected, torch.zeros_like(expected)], 1))


def test_masks_of_maxmin_are_all_true(device: str) -> None:
    _, _, rows, columns, slack, _ = ops.activation_pattern(*arguments("maxmin", (40,), 4, device=device))
    assert rows.all() and columns.all() and (slack == 0).all()


def test_rows_and_columns_of_clipped_maxmin_go_exactly_where_nothing_depends_on_them(device: str) -> None:
    """Every pair of integer intervals in 0..4 against the outputs over their grid, bounds on thresholds included."""
    ends = [(low, high) for low in range(5) for high in range(low + 1, 5)]
    pairs = list(itertools.product(ends, ends))
    for upper, lower in ((2, 2), (3, 1), (4, 0), (2, 0), (3, 2)):
        low = torch.tensor([[a[0], b[0]] for a, b in pairs], dtype=torch.float64, device=device)
        high = torch.tensor([[a[1], b[1]] for a, b in pairs], dtype=torch.float64, device=device)
        middle, width = (low + high) / 2, (high - low) / 2
        norms, radius = torch.full_like(middle, 100.0), torch.ones(len(pairs), dtype=torch.float64, device=device)
        clips = [torch.full((1, 1), float(c), dtype=torch.float64, device=device) for c in (upper, lower)]
        out = ops.activation_pattern(torch.cat([middle, middle]), width, norms, radius, "clipped_maxmin", *clips)
        for (a, b), row, column in zip(pairs, out[2].tolist(), out[3].tolist(), strict=True):
            grid_a, grid_b = range(a[0], a[1] + 1), range(b[0], b[1] + 1)
            table = {
                (p, q): (min(max(p, q), upper), max(min(p, q), lower)) for p, q in itertools.product(grid_a, grid_b)
            }
            varies = [len({o[k] for o in table.values()}) > 1 for k in range(2)]
            needs_a = any(len({table[p, q] for p in grid_a}) > 1 for q in grid_b)
            needs_b = any(len({table[p, q] for q in grid_b}) > 1 for p in grid_a)
            assert column == varies, (a, b, upper, lower)
            assert row == [needs_a, needs_b], (a, b, upper, lower)


# ---- ties and edges ------------------------------------------------------------------------------------------------


def quarters(args: list[Any]) -> list[Any]:
    """All numbers moved to quarters, so that ties abound and every sum is exact; row norms are squares of quarters."""
    out = [(a * 4).round() / 4 if isinstance(a, Tensor) else a for a in args]
    out[2] = ((args[2] * 4).round().clamp_min(1) / 4).square()
    return out


@every_activation
@pytest.mark.parametrize("shape", [(400,), (8, 7, 6)])
@pytest.mark.parametrize("box", [True, False])
def test_ties(activation: str, shape: tuple[int, ...], box: bool, device: str) -> None:
    """Bounds on thresholds, box on ball, the two of a pair alike: as in the reference, masks and gradients included."""
    args = quarters(arguments(activation, shape, 4, box=box, device=device))
    lower, upper = bounds_of(args)
    if activation == "clipped_relu":
        assert (lower == args[5]).any() and (upper == 0).any()
    if box:
        assert (args[0][4:] - args[1] == args[0][:4] - torch.einsum("b,b...->b...", args[3], args[2].sqrt())).any()
    for mine, theirs in zip(ops.activation_pattern(*args), reference.activation_pattern(*args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    compare_gradients(args, slack=False)


def unit(
    activation: str,
    low: float,
    high: float,
    device: str,
    first: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """The op on a single unit with these bounds."""
    t = torch.tensor([[(low + high) / 2]], dtype=dtype, device=device)
    half = torch.tensor([[(high - low) / 2]], dtype=dtype, device=device)
    threshold = None if first is None else torch.full_like(t, first)
    one = torch.ones_like(t)
    return ops.activation_pattern(torch.cat([t, t]), half, 64 * one, one[0], activation, threshold, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_exactly_at_the_thresholds(dtype: torch.dtype, device: str) -> None:
    cases = [
        ("relu", -1.0, 0.0, None, False),
        ("relu", -1.0, 2**-20, None, True),
        ("relu", 0.0, 1.0, None, True),
        ("clipped_relu", -1.0, 0.0, 0.5, False),
        ("clipped_relu", 0.5, 1.0, 0.5, False),
        ("clipped_relu", 0.5 - 2**-20, 1.0, 0.5, True),
        ("clipped_relu", 0.0, 1.0, 0.0, False),
        ("clipped_relu", -1.0, 0.0, 0.0, False),
        ("identity", 0.0, 0.0, None, True),
    ]
    for activation, low, high, threshold, stays in cases:
        out, half, row, column, *_ = unit(activation, low, high, device, threshold, dtype)
        assert row.item() is stays and column.item() is stays, (activation, low, high)
        if not stays:
            assert half.item() == 0 and out[0].item() == out[1].item()


def test_threshold_zero_makes_all_outputs_zero(device: str) -> None:
    args = arguments("clipped_relu", (50,), 3, device=device)
    args[5] = torch.zeros_like(args[5])
    values, half_width, *_ = ops.activation_pattern(*args)
    assert (values == 0).all() and (half_width == 0).all()
    compare_gradients(args)


@every_activation
def test_radius_zero_is_a_point(activation: str, device: str) -> None:
    args = arguments(activation, (20,), 3, box=False, device=device)
    args[3] = torch.zeros_like(args[3])
    values, half_width, *_ = ops.activation_pattern(*args)
    assert (half_width == 0).all() and torch.equal(values[:3], values[3:])


@every_activation
def test_row_norm_zero_has_no_infinite_gradient(activation: str, device: str) -> None:
    """Also where rounding has left a squared norm a little below zero."""
    for square in (0.0, -1e-14):
        args = arguments(activation, (20,), 3, box=False, device=device)
        args[2] = torch.full_like(args[2], square)
        own = [a.requires_grad_(True) if isinstance(a, Tensor) else a for a in args]
        values, half_width, _, _, slack, _ = ops.activation_pattern(*own)
        assert (half_width <= 2e-7).all() and (square < 0 or (half_width == 0).all())
        gradients = torch.autograd.grad(values.sum() + half_width.sum() + slack.sum(), floats(own))
        assert all(g.isfinite().all() for g in gradients)
        assert square < 0 or (gradients[1] == 0).all()  # squared_row_norms


NAN_INPUTS = {"clean": 0, "squared_row_norms": 2, "radius": 3, "threshold": 5, "second threshold": 6}


@every_activation
@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("where", NAN_INPUTS)
def test_nan_never_becomes_a_plausible_number(activation: str, box: bool, where: str, device: str) -> None:
    """A NaN shows in the unit's output or its box, and no mask hides it."""
    args = arguments(activation, (8,), 2, box=box, device=device)
    at = NAN_INPUTS[where]
    if args[at] is None:
        return
    if where == "radius":
        args[at][0] = torch.nan
        touched = slice(None)
    else:
        args[at][0, 1] = torch.nan
        paired = activation.endswith("maxmin")
        touched = [1, 5] if paired else [1]
    values, half_width, rows, columns, *_ = ops.activation_pattern(*args)
    shows = (values[0].isnan() | values[2].isnan() | half_width[0].isnan())[touched]
    if activation.endswith("maxmin"):
        shows = shows.view(2, -1).any(0)  # one output of the pair
    if where == "radius" and activation != "identity":
        # a unit that only its box bounds to a point, or that is clipped on both ends, may well be a number
        assert shows.any() and (shows | (half_width[0] == 0).view(-1, shows.numel()).all(0)).all()
    else:
        assert shows.all()
    kept = (rows[0] & columns[0])[touched]
    assert (kept.view(2, -1).any(0) if activation.endswith("maxmin") else kept).all()


# ---- gradients and registration ------------------------------------------------------------------------------------


@every_activation
@pytest.mark.parametrize("box", [True, False])
def test_gradcheck(activation: str, box: bool, device: str) -> None:
    args = arguments(activation, (4, 2, 1), 2, box=box, shared=True, seed=5, device=device)
    inputs = [a.requires_grad_(True) for a in floats(args)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        out = ops.activation_pattern(*[next(it) if isinstance(a, Tensor) else a for a in args])
        return out[0], out[1], out[4]

    assert torch.autograd.gradcheck(function, inputs)


@every_activation
@pytest.mark.parametrize(
    "shape, box, shared", [((6,), True, False), ((4, 3, 2), False, True), ((4, 3, 2), True, False)]
)
def test_opcheck(activation: str, shape: tuple[int, ...], box: bool, shared: bool, device: str) -> None:
    args = arguments(activation, shape, 3, box=box, shared=shared, device=device)
    own = [a.requires_grad_(True) if isinstance(a, Tensor) else a for a in args]
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    for box_behind in (True, False):
        torch.library.opcheck(torch.ops.locallip_cuda.activation_pattern.default, [*own, box_behind])
        out = ops.activation_pattern(*own, box_behind)
        gradients = [torch.randn_like(out[k]).detach() for k in (0, 1, 4)]
        backward = torch.ops.locallip_cuda.activation_pattern_backward.default
        torch.library.opcheck(backward, [*gradients, *detached, box_behind])


def test_compiles_into_one_graph(device: str) -> None:
    args = arguments("clipped_relu", (4, 3, 2), 3, device=device)

    def loss(values: Tensor, *rest: Any) -> Tensor:
        out = ops.activation_pattern(values, *rest)
        return out[0].square().sum() + out[4].sum() + (out[1] * out[3]).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        values = args[0].clone().requires_grad_(True)
        value = function(values, *args[1:])
        value.backward()
        results.append((value.detach(), values.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({4: "gelu"}, "activation: got gelu, want identity, relu"),
        ({0: torch.ones(4, 3, 2)}, r"values: got shape \[4, 3, 2\]"),
        ({0: torch.ones(3, 6, dtype=torch.float64)}, "values: got 3 rows, want 4"),
        ({1: torch.ones(2, 5, dtype=torch.float64)}, r"half_width: got shape \[2, 5\]"),
        ({2: torch.ones(3, 6, dtype=torch.float64)}, r"squared_row_norms: got shape \[3, 6\]"),
        ({5: None}, "first: wanted for activation clipped_relu"),
        ({6: torch.ones(1, 6, dtype=torch.float64)}, "second: not wanted"),
        ({5: torch.ones(6, dtype=torch.float64)}, r"first: got shape \[6\], want"),
        ({3: torch.ones(2)}, "got a tensor of Float"),
    ],
)
def test_errors(change: dict[int, Any], message: str, device: str) -> None:
    args = arguments("clipped_relu", (6,), 2, device=device)
    for k, v in change.items():
        args[k] = v.to(device) if isinstance(v, Tensor) else v
    with pytest.raises(RuntimeError, match=message):
        ops.activation_pattern(*args)
    odd = arguments("maxmin", (6,), 2, device=device)
    odd[:3] = [odd[0][:, :5], odd[1][:, :5], odd[2][:, :5]]
    with pytest.raises(RuntimeError, match="values: got 5 channels, want an even number"):
        ops.activation_pattern(*odd)
