"""Linear maps against the matrices that torch's own functions are: products, transposes, absolute values, squares,
folded products and sums, roundings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locallip_cuda.norms.linear import (
    Adjoint,
    Composed,
    Convolution,
    Dense,
    Identity,
    LinearMap,
    Rearrangement,
    Reshape,
    Scaling,
    Sum,
    added,
    composed,
    folded,
)
from locallip_cuda.rounding import gamma

LIKE = torch.zeros((), dtype=torch.float64)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def matrix(function: Callable[[Tensor], Tensor], sizes: list[int]) -> Tensor:
    """(outputs, inputs) of a linear function."""
    units = int(torch.tensor(sizes).prod())
    return function(torch.eye(units, dtype=torch.float64).view(units, *sizes)).flatten(1).T


def check(found: LinearMap, expected: Tensor, *, exact: bool = True) -> None:
    assert len(expected) == int(torch.tensor(found.output_sizes).prod())
    torch.testing.assert_close(matrix(found, found.input_sizes), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(matrix(found.adjoint, found.output_sizes).T, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-12, atol=1e-13)
    absolute = matrix(found.absolute(), found.input_sizes)
    assert (absolute >= expected.abs() - 1e-13).all()
    squared = matrix(found.squared(), found.input_sizes)
    assert (squared >= expected.square() - 1e-13).all()
    if exact:
        torch.testing.assert_close(absolute, expected.abs(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(squared, expected.square(), rtol=1e-12, atol=1e-13)
    entries = matrix(found, found.input_sizes) != 0
    assert entries.sum(1).max() <= found.entries()[0] and entries.sum(0).max() <= found.entries()[1]


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, stride, dilation, padding = (
        [draw(st.integers(*limits)) for _ in range(dimensions)] for limits in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    inside = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    sizes = [groups * draw(st.integers(1, 2)), *(n + draw(st.integers(0, 3)) for n in inside)]
    weight = randn(generator(draw(st.integers(0, 99))), groups * draw(st.integers(1, 2)), sizes[0] // groups, *kernel)
    return Convolution(weight, sizes, stride, padding, dilation, groups)


@settings(max_examples=80, deadline=None)
@given(found=convolutions())
def test_convolutions(found: Convolution) -> None:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(found.stride)]
    conv = (found.stride, found.padding, found.dilation, found.groups)
    expected = matrix(lambda x: function(x, found.weight, None, *conv), found.input_sizes)
    check(found, expected)
    check(Adjoint(found), expected.T)


G = generator(0)
WEIGHT = randn(G, 5, 6)
REARRANGEMENTS: dict[str, tuple[Callable[[Tensor], Tensor], list[int], bool, bool]] = {
    "flatten": (lambda x: x.flatten(1), [2, 3, 4], True, True),
    "permute": (lambda x: x.permute(0, 3, 1, 2), [2, 3, 4], True, True),
    "slice": (lambda x: x[:, :1, 1:], [2, 3, 4], True, False),
    "flip": (lambda x: x.flip(2), [2, 3, 4], True, True),
    "zeros": (lambda x: F.pad(x, (1, 2, 0, 1)), [2, 3, 4], True, False),
    "circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), [2, 3, 4], False, False),
    "reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), [2, 4], False, False),
    "replicate": (lambda x: F.pad(x, (1, 2), mode="replicate"), [2, 4], False, False),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), [2, 3, 4], False, False),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), [4, 2, 3], True, True),
    "repeat": (lambda x: x.repeat(1, 2, 1), [2, 3], False, False),
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_rearrangements(name: str) -> None:
    function, sizes, injective, bijective = REARRANGEMENTS[name]
    found = Rearrangement(function, sizes, LIKE)
    assert (found.injective, found.bijective) == (injective, bijective)
    check(found, matrix(function, sizes))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: x + 1,
        lambda x: x.flip(0),
        lambda x: x.mean(1),
        lambda x: x.transpose(0, 1),
        lambda x: -x,
        lambda x: x[:1],
        lambda x: x + x.roll(1, 0),
        lambda x: x.roll(2, 0),
        lambda x: x.sort(2)[0],
        lambda x: x.max(2)[0],
        lambda x: x.cummax(1)[0],
        lambda x: x.topk(2)[0],
        lambda x: x.median(2)[0],
        lambda x: x.abs(),
        lambda x: x.amax(),
    ],
)
def test_what_is_no_rearrangement(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="function: got"):
        Rearrangement(function, [2, 3], LIKE)


def test_dense_scaling_and_identity() -> None:
    check(Dense(WEIGHT), WEIGHT)
    factor = randn(G, 1, 3, 1)
    check(Scaling(factor, [3, 2]), torch.diag(factor.expand(1, 3, 2).flatten()))
    check(Identity([3, 2], LIKE), torch.eye(6, dtype=torch.float64))


CONV = Convolution(randn(G, 4, 4, 3, 3), [4, 5, 5], [1, 1], [1, 1], [1, 1], 1)
GROUPED = Convolution(randn(G, 4, 2, 3, 3), [4, 5, 5], [1, 1], [2, 2], [2, 2], 2)
STRIDED = Convolution(randn(G, 4, 4, 3, 3), [4, 5, 5], [2, 2], [1, 1], [1, 1], 1)
OBLONG = Convolution(randn(G, 4, 4, 1, 5), [4, 5, 5], [1, 1], [0, 2], [1, 1], 1)
BETWEEN = Convolution(randn(G, 4, 4, 2, 2), [4, 5, 5], [1, 1], [1, 1], [2, 2], 1)
CHANNELS = Scaling(randn(G, 1, 4, 1, 1), [4, 5, 5])
PLACES = Scaling(randn(G, 1, 1, 5, 5), [4, 5, 5])
FLAT = Rearrangement(lambda x: x.flatten(1), [4, 5, 5], LIKE)
SKIP = Identity([4, 5, 5], LIKE)
POOL = Convolution(torch.full((4, 1, 2, 2), 0.25).double(), [4, 5, 5], [2, 2], [0, 0], [1, 1], 4)
POOL_OF_STRIDED = Convolution(torch.full((4, 1, 3, 1), 1 / 3).double(), [4, 3, 3], [1, 2], [0, 0], [1, 1], 4)
PADDED = Convolution(torch.full((4, 1, 2, 2), 0.25).double(), [4, 5, 5], [1, 1], [1, 1], [1, 1], 4)
SMALL = Convolution(randn(G, 3, 4, 2, 2), [4, 2, 2], [1, 1], [1, 1], [1, 1], 1)
POINTS = Convolution(randn(G, 3, 4, 1, 1), [4, 6, 6], [1, 1], [0, 0], [1, 1], 1)
TWICE = Rearrangement(lambda x: F.interpolate(x, scale_factor=2)[:, :, :5, :5], [4, 5, 5], LIKE)
PRODUCTS: dict[str, tuple[LinearMap, LinearMap, type[LinearMap], bool]] = {
    "scaled outputs": (CONV, CHANNELS, Convolution, True),
    "scaled inputs": (CHANNELS, CONV, Convolution, True),
    "scaled inputs of groups": (CHANNELS, GROUPED, Convolution, True),
    "scaled outputs of groups": (GROUPED, CHANNELS, Convolution, True),
    "two scalings": (CHANNELS, PLACES, Scaling, True),
    "scaled by place": (CONV, PLACES, Composed, True),
    "scaled by place before": (PLACES, CONV, Composed, True),
    "dense and dense": (Dense(WEIGHT), Dense(randn(G, 3, 5)), Dense, True),
    "to a wider one": (Dense(randn(G, 2, 6)), Dense(randn(G, 9, 2)), Composed, False),
    "scaled dense": (Dense(WEIGHT), Scaling(randn(G, 1, 5), [5]), Dense, True),
    "dense of scaled": (Scaling(randn(G, 6), [6]), Dense(WEIGHT), Dense, True),
    "flattened": (CONV, FLAT, Composed, True),
    "repeated inputs": (TWICE, CONV, Composed, False),
    "repeated outputs": (CONV, TWICE, Composed, True),
    "two convolutions": (CONV, STRIDED, Composed, False),
    "averages of a convolution": (CONV, POOL, Convolution, True),
    "averages of a strided one": (STRIDED, POOL_OF_STRIDED, Convolution, True),
    "averages, padded": (CONV, PADDED, Composed, False),
    "convolved averages": (POOL, SMALL, Composed, True),
    "convolved averages that overlap": (PADDED, POINTS, Composed, False),
    "reshaped twice": (Reshape([2, 3], [6], LIKE), Reshape([6], [3, 2], LIKE), Reshape, True),
    "a reshaped convolution": (CONV, Reshape([4, 5, 5], [100], LIKE), Composed, True),
    "identity first": (SKIP, CONV, Convolution, True),
    "identity last": (CONV, SKIP, Convolution, True),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    first, second, kind, exact = PRODUCTS[name]
    found = folded(composed(first, second))
    assert type(found) is kind
    expected = matrix(second, second.input_sizes) @ matrix(first, first.input_sizes)
    check(found, expected, exact=exact)
    check(composed(first, second), expected, exact=False)
    check(Adjoint(composed(first, second)), expected.T, exact=False)
    assert composed(found, Identity(found.output_sizes, LIKE)) is found
    assert folded(found) is found


SUMS: dict[str, tuple[LinearMap, LinearMap, type[LinearMap], bool]] = {
    "skip": (SKIP, CONV, Convolution, True),
    "skip, groups and dilation": (GROUPED, SKIP, Convolution, True),
    "skip, oblong": (OBLONG, SKIP, Convolution, True),
    "skip between two taps": (SKIP, BETWEEN, Sum, False),
    "two convolutions": (CONV, CONV.with_weight(randn(G, 4, 4, 3, 3)), Convolution, True),
    "convolutions of other geometry": (CONV, GROUPED, Sum, False),
    "twice": (SKIP, SKIP, Scaling, True),
    "dense": (Dense(randn(G, 6, 6)), Identity([6], LIKE), Dense, True),
    "two dense": (Dense(WEIGHT), Dense(randn(G, 5, 6)), Dense, True),
    "scaling": (CONV, PLACES, Sum, False),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    first, second, kind, exact = SUMS[name]
    found = folded(added(first, second))
    assert type(found) is kind
    check(added(first, second), matrix(first, first.input_sizes) + matrix(second, second.input_sizes), exact=False)
    check(found, matrix(first, first.input_sizes) + matrix(second, second.input_sizes), exact=exact)
    three = folded(added(found, PLACES)) if found.input_sizes == [4, 5, 5] else None
    if three is not None:
        check(three, matrix(found, found.input_sizes) + matrix(PLACES, [4, 5, 5]), exact=False)


def test_a_skip_has_the_norm_of_the_sum() -> None:
    """Not 1 + ||W||: that is what folding is for."""
    weight = -0.5 * torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1)
    conv = Convolution(weight, [4, 3, 3], [1, 1], [0, 0], [1, 1], 1)
    assert float(torch.linalg.matrix_norm(folded(added(Identity([4, 3, 3], LIKE), conv)).dense(), 2)) == 0.5


def test_gradients_reach_the_weights() -> None:
    weight, factor = randn(G, 4, 4, 3, 3).requires_grad_(), randn(G, 1, 4, 1, 1).requires_grad_()

    def norm(weight: Tensor, factor: Tensor) -> Tensor:
        block = composed(CONV.with_weight(weight), Scaling(factor, [4, 5, 5]))
        two = added(composed(block, STRIDED), composed(STRIDED, Identity([4, 3, 3], LIKE)))
        return folded(two).dense().square().sum()

    assert torch.autograd.gradcheck(norm, (weight, factor), fast_mode=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_roundings_are_within_the_terms(seed: int) -> None:
    """In float32, against float64: the products of all maps above, and of their adjoints."""
    g = generator(seed)
    for first, second, _, _ in (*PRODUCTS.values(), *SUMS.values()):
        together = composed(first, second) if first.output_sizes == second.input_sizes else added(first, second)
        for transposed in (False, True):
            found = Adjoint(together) if transposed else together
            x = torch.randn(2, *found.input_sizes, generator=g).double()
            error = (_single(found, x).double() - found(x)).abs()
            allowed = gamma(found.terms + 2) * 2.0**29 * found.absolute()(x.abs())  # 2: weights are rounded as well
            assert (error <= allowed + 1e-30).all()


def _single(found: LinearMap, x: Tensor) -> Tensor:
    """``found`` with weights, values and arithmetic in float32."""
    match found:
        case Dense():
            return Dense(found.weight.float())(x.float())
        case Convolution():
            return found.with_weight(found.weight.float())(x.float())
        case Scaling():
            return Scaling(found.factor.float(), found.input_sizes)(x.float())
        case Composed():
            for each in found.maps:
                x = _single(each, x)
            return x
        case Sum():
            return torch.stack([_single(each, x) for each in found.maps]).sum(0)
        case Adjoint(of=of):
            return _single_adjoint(of, x)
    return found(x.float())


def _single_adjoint(found: LinearMap, y: Tensor) -> Tensor:
    match found:
        case Dense():
            return Dense(found.weight.float()).adjoint(y.float())
        case Convolution():
            return found.with_weight(found.weight.float()).adjoint(y.float())
        case Scaling():
            return Scaling(found.factor.float(), found.input_sizes).adjoint(y.float())
        case Composed():
            for each in reversed(found.maps):
                y = _single_adjoint(each, y)
            return y
        case Sum():
            return torch.stack([_single_adjoint(each, y) for each in found.maps]).sum(0)
    return found.adjoint(y.float())


def test_what_is_known_of_a_function_is_kept_by_its_key() -> None:
    calls = []

    def flip(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.flip(1)

    first, again = (Rearrangement(flip, [2, 3], LIKE, ("a flip", 1)) for _ in range(2))
    assert len(calls) == 1 and again.bijective and again.output_sizes == first.output_sizes
    other = Rearrangement(lambda x: x[:, :1], [2, 3], LIKE, ("a slice", 1))
    larger = Rearrangement(flip, [4, 3], LIKE, ("a flip", 1))
    assert not other.bijective and larger.output_sizes == [4, 3] and len(calls) == 2
    unkeyed = [Rearrangement(flip, [2, 3], LIKE) for _ in range(2)]
    assert len(calls) == 4 and all(each.bijective for each in unkeyed)
