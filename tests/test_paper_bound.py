"""The paper's bound (Huang et al., NeurIPS 2021) with converged norms against ours, on the same trained networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, masked_matrices, matrix
from torch import Tensor, nn

import locallip_cuda as ll
from bench import paper_method
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU

SAMPLES = 12
EPS = [0.05, 0.2]


@dataclass
class Paper:
    radius: Tensor
    lower: Tensor
    upper: Tensor
    lipschitz: Tensor
    global_lipschitz: float


def largest_singular_value(matrices: Tensor) -> Tensor:
    """(B,) through the eigenvalues of the smaller Gram matrix: in float64 half of the digits are enough here."""
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()


def conv_arguments(layer: nn.Conv2d) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}


def paper_bound(model: nn.Sequential, x: Tensor, eps: float) -> Paper:
    """The published method once more, in float64 with the norms from singular values: plain, slow and exact.

    Ball radii grow by the global norms; a row's norm is that of its whole kernel; ReLU and clipped ReLU drop rows and
    columns, clipped MaxMin columns alone; the local norms enter only in the final product.
    """
    mu, lower, upper = x, x - eps, x + eps
    radius, local, columns = eps, torch.ones(len(x), dtype=x.dtype), None
    first, dense, shape = True, None, x.shape[1:]
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight, shape = layer.weight.detach(), mu.shape[1:]

            def linear(value: Tensor, w: Tensor, b: Tensor | None, layer: nn.Module = layer) -> Tensor:
                if isinstance(layer, nn.Linear):
                    return F.linear(value, w, b)
                assert isinstance(layer, nn.Conv2d)
                return F.conv2d(value, w, b, **conv_arguments(layer))

            dense = matrix(weight, tuple(shape), **(conv_arguments(layer) if isinstance(layer, nn.Conv2d) else {}))
            centre, half = (
                linear((lower + upper) / 2, weight, layer.bias),
                linear((upper - lower) / 2, weight.abs(), None),
            )
            mu = linear(mu, weight, layer.bias)
            reach = radius * weight.flatten(1).norm(dim=1).view(-1, *[1] * (mu.dim() - 2))
            lower, upper = torch.maximum(centre - half, mu - reach), torch.minimum(centre + half, mu + reach)
            radius = radius * float(largest_singular_value(dense))
            first = False
        elif isinstance(layer, nn.Flatten):
            mu, lower, upper = mu.flatten(1), lower.flatten(1), upper.flatten(1)
            columns = None if columns is None else columns.flatten(1)
        else:
            assert dense is not None and not first
            rows = None
            new_columns = None
            if isinstance(layer, nn.ReLU):
                rows = new_columns = upper > 0
            elif isinstance(layer, ClippedReLU):
                rows = new_columns = (upper > 0) & (lower < layer.threshold)
            elif isinstance(layer, ClippedMaxMin):
                (la, lb), (ua, ub) = lower.chunk(2, 1), upper.chunk(2, 1)
                new_columns = torch.cat([torch.maximum(la, lb) < layer.upper, torch.minimum(ua, ub) > layer.lower], 1)
            local = local * largest_singular_value(masked_matrices(dense, rows, columns))
            columns = new_columns
            ball = layer(mu - radius), layer(mu + radius)
            lower, upper, mu = torch.maximum(layer(lower), ball[0]), torch.minimum(layer(upper), ball[1]), layer(mu)
    return Paper(local * eps, lower, upper, local, radius / eps)


CASES = [(name, eps) for name in ("relu", "clipped-relu", "clipped-maxmin", "maxmin") for eps in EPS]


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def case(
    request: pytest.FixtureRequest, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> tuple[str, float, nn.Sequential, Tensor, Paper]:
    activation, eps = request.param
    model, x = trained(activation), digits[0][:SAMPLES]
    return activation, eps, model, x, paper_bound(model, x, eps)


@pytest.mark.parametrize("device", DEVICES)
def test_global_radius_is_the_papers_bound(case: tuple[str, float, nn.Sequential, Tensor, Paper], device: str) -> None:
    activation, eps, model, x, paper = case
    if activation != "maxmin":
        assert paper.lipschitz.max() < 0.999 * paper.global_lipschitz, "columns must go, or this test checks little"
    b = ll.local_bounds(copy.deepcopy(model).to(device), x.to(device), eps, radius="global", iterations=100)
    torch.testing.assert_close(b.radius.cpu(), paper.radius, rtol=1e-3, atol=0)
    torch.testing.assert_close(b.lipschitz.cpu(), paper.lipschitz, rtol=1e-3, atol=0)
    torch.testing.assert_close(b.global_lipschitz.cpu().item(), paper.global_lipschitz, rtol=1e-3, atol=0)
    # the box on the last layer's input too, and with it the margins
    scale = float((paper.upper - paper.lower).max())
    torch.testing.assert_close(b.lower.cpu(), paper.lower, rtol=0, atol=1e-3 * scale)
    torch.testing.assert_close(b.upper.cpu(), paper.upper, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_local_radius_is_never_above_the_papers(
    case: tuple[str, float, nn.Sequential, Tensor, Paper], device: str
) -> None:
    _, eps, model, x, paper = case
    b = ll.local_bounds(copy.deepcopy(model).to(device), x.to(device), eps, iterations=100)
    assert (b.radius.cpu() <= paper.radius * (1 + 1e-6)).all()
    assert (b.lower.cpu() >= paper.lower - 1e-6).all() and (b.upper.cpu() <= paper.upper + 1e-6).all()


@pytest.mark.parametrize("activation", ["relu", "clipped-relu", "clipped-maxmin"])
def test_both_writings_of_the_papers_method_agree(
    activation: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> None:
    """The one above and the benchmarks' baseline; power iteration approaches the norms from below."""
    model, x = trained(activation), digits[0][:8]
    expected, got = paper_bound(model, x, 0.1), paper_method.paper_bounds(model, x, 0.1, 800)
    torch.testing.assert_close(got.radius, expected.radius, rtol=5e-3, atol=0)
    torch.testing.assert_close(got.lower, expected.lower, rtol=0, atol=2e-3)
    torch.testing.assert_close(got.upper, expected.upper, rtol=0, atol=2e-3)
