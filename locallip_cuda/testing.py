"""A rule is what certificates rest on: :func:`check_rule` tries one against the function that it is of."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .propagation.graph import Graph, Layer, lowered, traced
from .propagation.rules import Lipschitz


def check_rule(module: nn.Module, input_sizes: Sequence[int], *, samples: int = 64, seed: int = 0) -> None:
    """AssertionError where the rules of what ``module`` calls do not say what it computes.

    Tried in float64, at random values: that the affine maps are the module's, that their transposes are theirs, that
    absolute values and squares are not too small; of activations, that their values stay in their intervals, that
    inputs whose rows go change nothing, that no slope is above the constant, and that slopes that are given hold. A
    rule that passes can be wrong all the same: of Lipschitz constants and intervals only violations can be found.

    Args:
        module: put into float64, as a copy, and called on (B, *input_sizes).
        samples: B, how many random values.   seed: of them.
    """
    g = torch.Generator().manual_seed(seed)
    own = _in_float64(module)
    x = torch.randn(samples, *input_sizes, generator=g, dtype=torch.float64)
    with torch.no_grad():
        graph = lowered(traced(own, x), torch.float64, proof=True)
        expected = own(x.clone())
        facts = [x]
        for step in graph.steps:
            assert isinstance(step, Layer) or not graph.layers, "module: joins values, want one with a single rule"
            if isinstance(step, Layer):
                value = _affine(step, facts, g)
                _check_activation(step, value, g)
                facts.append(step.activation.function(value))
            else:
                facts.append(step.rearrangement(facts[step.source]))  # type: ignore[union-attr]
        found = _affine(graph.head, facts, g)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"the module's values: {m}")
    _check_slopes(graph, own, x)


def _in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().requires_grad_(False)


def _affine(layer: Layer, facts: list[Tensor], g: torch.Generator) -> Tensor:
    """The layer's affine value, its maps tried."""
    total: Tensor | None = None
    for term in layer.terms:
        x, linear = facts[term.source], term.linear
        y = torch.randn(len(x), *linear.output_sizes, generator=g, dtype=torch.float64)
        image = linear(x)
        products = ((image * y).flatten(1).sum(1), (x * linear.adjoint(y)).flatten(1).sum(1))
        torch.testing.assert_close(*products, rtol=1e-8, atol=1e-8, msg=lambda m: f"adjoint: {m}")
        tolerance = 1e-9 * (1 + image.abs())
        assert (linear.absolute()(x.abs()) >= image.abs() - tolerance).all(), "absolute: got less than |A| |x|"
        squares = linear.squared()(torch.ones_like(x[:1]))
        signs = (torch.rand(len(x), *linear.input_sizes, generator=g) < 0.5).double() * 2 - 1
        mean = linear(signs).square().mean(0)
        assert (squares[0] * (1 + 8 / len(x) ** 0.5) + 1e-9 >= mean).all(), "squared: got less than the row norms"
        total = image if total is None else total + image
    assert total is not None
    return total if layer.bias is None else total + layer.bias


def _check_activation(layer: Layer, value: Tensor, g: torch.Generator) -> None:
    activation = layer.activation
    wide = torch.rand(value.shape, generator=g, dtype=torch.float64) * 10 ** (
        3 * torch.rand(value.shape, generator=g, dtype=torch.float64) - 2
    )
    lower, upper = value - wide, value + wide
    share = torch.rand(value.shape, generator=g, dtype=torch.float64)
    inside = lower + share * (upper - lower)
    image = activation.function(inside)
    if not isinstance(activation, Lipschitz):
        low, high = activation.interval(lower, upper)
        slack = 1e-12 * (1 + image.abs())
        assert (image >= low - slack).all() and (image <= high + slack).all(), "interval: a value is outside"
        rows = activation.rows(lower, upper)
        if rows is not None:
            other = torch.where(rows, inside, lower + (1 - share) * (upper - lower))
            assert torch.equal(activation.function(other), image), "rows: got False for one that changes the output"
    if activation.slopes is not None:
        _check_elementwise(layer, value, inside, image)
    moved = (image - activation.function(value)).flatten(1).norm(dim=1)
    distance = (inside - value).flatten(1).norm(dim=1)
    assert (moved <= activation.lipschitz * distance * (1 + 1e-9) + 1e-12).all(), "lipschitz: two points are steeper"


def _check_elementwise(layer: Layer, value: Tensor, inside: Tensor, image: Tensor) -> None:
    """That each number of the output is of the same number of the input, and rises within the slopes."""
    activation = layer.activation
    assert activation.slopes is not None
    before = activation.function(value)
    assert image.shape == inside.shape, "slopes: got some for a function of other sizes"
    step, rise = inside - value, image - before
    low, high = (slope * step for slope in activation.slopes)
    slack = 1e-12 * (1 + image.abs() + before.abs())
    holds = (rise >= torch.minimum(low, high) - slack) & (rise <= torch.maximum(low, high) + slack)
    assert holds.all(), "slopes: two points rise by less or more, or by other inputs"
    others = torch.roll(inside, 1, 0)
    one = inside.flatten(1).clone()
    kept = torch.arange(one.shape[1], device=one.device) % 2 == 0
    one[:, ~kept] = others.flatten(1)[:, ~kept]
    mixed = activation.function(one.view_as(inside)).flatten(1)
    off = (mixed - image.flatten(1)).abs()[:, kept] <= slack.flatten(1)[:, kept]
    assert off.all(), "slopes: got some for a function of several numbers"


def _check_slopes(graph: Graph, module: nn.Module, x: Tensor) -> None:
    """Steepest directions of each activation by autograd, a few steps of the power iteration."""
    value = x
    for layer in graph.layers:
        if len(layer.terms) > 1 or layer.terms[0].source > graph.steps.index(layer):
            return
        function, constant = layer.activation.function, layer.activation.lipschitz
        with torch.no_grad():
            linear = layer.terms[0].linear
            if list(value.shape[1:]) != linear.input_sizes:
                return
            value = linear(value) if layer.bias is None else linear(value) + layer.bias
        direction = torch.randn_like(value)
        for _ in range(5):  # of the power iteration on J^T J, with J of a difference
            direction = direction / _lengths(direction).clamp_min(1e-30)
            ahead, behind = (function(value + sign * STEP * direction) for sign in (1, -1))
            slope = (ahead - behind) / (2 * STEP)
            point = value.clone().requires_grad_()
            (direction,) = torch.autograd.grad(function(point), point, slope, allow_unused=True, materialize_grads=True)
            steepest = _lengths(direction) / _lengths(slope).clamp_min(1e-30)
            assert (steepest <= constant * (1 + 1e-9) + 1e-12).all(), "lipschitz: a slope is steeper"
        value = function(value)


# of the differences that directions are chosen by
STEP = 1e-6


def _lengths(t: Tensor) -> Tensor:
    lengths: Tensor = t.flatten(1).norm(dim=1)
    return lengths.view(-1, *[1] * (t.dim() - 1))
