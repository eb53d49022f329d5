"""Every rule against the function it is of: affine maps exactly, activations on a grid, and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.propagation.rules import RULES, Activation, Affine, Site
from locallip_cuda.propagation.trace import Node, Trace


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def only_node(function: Callable[[Tensor], Any], sizes: list[int], batch: int) -> tuple[Node, Trace]:
    module = function if isinstance(function, nn.Module) else Call(function)
    trace = Trace(module.double(), torch.zeros(batch, *sizes, dtype=torch.float64))
    (node,) = trace.nodes
    return node, trace


def rule_of(function: Callable[[Tensor], Any], sizes: list[int], batch: int = 3) -> Affine | Activation:
    node, _ = only_node(function, sizes, batch)
    site = Site(sizes, list(node.shape[1:]), torch.empty(0, dtype=torch.float64))
    return RULES[node.function](site, *node.args, **node.kwargs)  # type: ignore[index]


torch.manual_seed(0)
NORM = nn.BatchNorm2d(4)
NORM.load_state_dict({**NORM.state_dict(), "running_mean": torch.randn(4), "running_var": torch.rand(4) + 0.1})
with torch.no_grad():
    NORM.weight.normal_(), NORM.bias.normal_()
NORM.eval()
SIZES = [4, 6, 6]
AFFINE: dict[str, tuple[Callable[[Tensor], Any], list[int]]] = {
    "linear": (nn.Linear(5, 3), [5]),
    "linear without a bias": (nn.Linear(5, 3, bias=False), [5]),
    "linear on the last of three": (nn.Linear(6, 3), SIZES),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1), groups=2), SIZES),
    "same": (nn.Conv2d(4, 2, (3, 5), padding="same", dilation=2), SIZES),
    "valid": (nn.Conv2d(4, 2, 2, padding="valid"), SIZES),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2), [2, 8]),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), [2, 3, 4, 3]),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), SIZES),
    "transposed1d": (nn.ConvTranspose1d(2, 3, 3, stride=3, dilation=2), [2, 5]),
    "transposed3d": (nn.ConvTranspose3d(2, 1, 2, stride=2, bias=False), [2, 2, 3, 2]),
    "batch norm": (NORM, SIZES),
    "batch norm of vectors": (nn.BatchNorm1d(5).eval(), [5]),
    "batch norm without weights": (nn.BatchNorm2d(4, affine=False).eval(), SIZES),
    "average": (nn.AvgPool2d(3, stride=2, padding=1), SIZES),
    "average by another number": (nn.AvgPool2d(2, divisor_override=3), SIZES),
    "average1d": (nn.AvgPool1d(2), [2, 8]),
    "average3d": (nn.AvgPool3d(2), [2, 4, 4, 4]),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 1)), SIZES),
    "adaptive1d": (nn.AdaptiveAvgPool1d(2), [2, 8]),
    "adaptive3d": (nn.AdaptiveAvgPool3d(1), [2, 3, 2, 2]),
    "mean": (lambda x: x.mean((2, 3)), SIZES),
    "mean of channels": (lambda x: torch.mean(x, 1, keepdim=True), SIZES),
    "mean from behind": (lambda x: x.mean(-1), SIZES),
    "times a number": (lambda x: 3 * x, SIZES),
    "times a tensor": (lambda x: x * torch.arange(6.0), SIZES),
    "divided": (lambda x: x / 3, SIZES),
    "minus": (lambda x: -x, SIZES),
    "plus": (lambda x: x + torch.ones(1, 4, 1, 1), SIZES),
    "plus a multiple": (lambda x: torch.add(x, 3, alpha=2), SIZES),
    "less": (lambda x: x - 2, SIZES),
    "from": (lambda x: 2 - x, SIZES),
    "flatten": (nn.Flatten(), SIZES),
    "flatten some": (lambda x: x.flatten(2), SIZES),
    "view": (lambda x: x.view(x.size(0), -1), SIZES),
    "unflatten": (nn.Unflatten(1, (2, 2)), SIZES),
    "unsqueeze": (lambda x: x.unsqueeze(1), SIZES),
    "permute": (lambda x: x.permute(0, 2, 3, 1), SIZES),
    "transpose": (lambda x: x.transpose(1, 3), SIZES),
    "slice": (lambda x: x[:, ::2, 1:, -1], SIZES),
    "flip": (lambda x: x.flip(-1), SIZES),
    "shuffle": (nn.PixelShuffle(2), SIZES),
    "unshuffle": (nn.PixelUnshuffle(2), SIZES),
    "channels": (nn.ChannelShuffle(2), SIZES),
    "zeros": (nn.ZeroPad2d((1, 2, 0, 1)), SIZES),
    "reflection": (nn.ReflectionPad2d(2), SIZES),
    "replication": (nn.ReplicationPad2d(1), SIZES),
    "circular": (nn.CircularPad2d(1), SIZES),
    "upsample": (nn.Upsample(scale_factor=2), SIZES),
    "upsample to a size": (nn.Upsample(size=(12, 18)), SIZES),
    "dropout": (nn.Dropout().eval(), SIZES),
    "dropout of channels": (nn.Dropout2d().eval(), SIZES),
    "contiguous": (lambda x: x.contiguous(), SIZES),
}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_affine_functions(name: str, batch: int) -> None:
    function, sizes = AFFINE[name]
    found = rule_of(function, sizes, batch)
    assert isinstance(found, Affine)
    x = torch.randn(batch, *sizes, dtype=torch.float64)
    expected = function(x)
    result = found.linear(x)
    assert found.linear.output_sizes == list(expected.shape[1:]) == list(result.shape[1:])
    result = result if found.bias is None else result + found.bias
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    y = torch.randn_like(expected)
    torch.testing.assert_close((found.linear(x) * y).sum(), (x * found.linear.adjoint(y)).sum())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.ReLU(),
    "relu of torch": torch.relu,
    "relu6": nn.ReLU6(),
    "leaky relu": nn.LeakyReLU(0.3),
    "prelu": nn.PReLU(4, 0.7),
    "elu": nn.ELU(0.5),
    "celu": nn.CELU(2.0),
    "hardtanh": nn.Hardtanh(-2, 3),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(2.0, 30),
    "abs": torch.abs,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """The constant is at least every slope and hardly above the largest; the interval holds, and is tight."""
    found = rule_of(ACTIVATIONS[name], [4])
    assert isinstance(found, Activation)
    grid = torch.linspace(-12, 12, 2**18, dtype=torch.float64).view(-1, 4)
    values = ACTIVATIONS[name](grid).detach()
    assert torch.equal(found.function(grid).detach(), values)
    line = grid.flatten()
    by_place = torch.cat([line.unsqueeze(1)] * 4, 1)
    image = found.function(by_place).detach()[:, 0]
    at = by_place.clone().requires_grad_()
    slopes = torch.autograd.grad(found.function(at).sum(), at)[0].abs().max()
    assert slopes <= found.lipschitz * (1 + 1e-14)
    if name not in ("hardswish", "abs"):  # the largest slope is on the grid, nearly
        assert found.lipschitz <= slopes * (1 + 2e-7)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        first, last = sorted(torch.randint(0, len(line), (2,), generator=g).tolist())
        low, high = (t.detach()[0, 0] for t in found.interval(by_place[first : first + 1], by_place[last : last + 1]))
        part = image[first : last + 1]
        assert low <= part.min() + 1e-15 and high >= part.max() - 1e-15
        assert low >= part.min() - 1e-4 and high <= part.max() + 1e-4


REFUSED: dict[str, tuple[Callable[[Tensor], Any], list[int], str]] = {
    "batch statistics": (nn.BatchNorm2d(4), SIZES, "batch statistics, want eval mode"),
    "dropout": (nn.Dropout(), SIZES, "training mode, want eval mode"),
    "an uneven padding": (nn.Conv2d(4, 2, 2, padding="same"), SIZES, "an uneven 'same' padding"),
    "a count of places": (nn.AvgPool2d(3, padding=1, count_include_pad=False), SIZES, "different numbers of places"),
    "a ceiling": (nn.AvgPool2d(4, ceil_mode=True), SIZES, "different numbers of places"),
    "sizes that do not divide": (nn.AdaptiveAvgPool2d(4), SIZES, "want sizes that divide"),
    "a mean of samples": (lambda x: x.mean(0), SIZES, "holds the batch"),
    "a mean of all": (lambda x: x.mean(), SIZES, "a mean over the batch"),
    "a constant by sample": (lambda x: x * torch.ones(3, 1, 1, 1), SIZES, "the same for every sample"),
    "a floor": (lambda x: torch.div(x, 2, rounding_mode="floor"), SIZES, "rounding_mode='floor', want None"),
    "a reshape across samples": (lambda x: x.reshape(-1, 2), [4], "want each sample whole"),
    "samples in another order": (lambda x: x.flip(0), SIZES, "function: got"),
    "a transpose with the batch": (lambda x: x.transpose(0, 1), [3, 4], "function: got"),
    "padding with ones": (nn.ConstantPad2d(1, 1.0), SIZES, "padding with 1.0, want zeros"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), SIZES, "mode='bilinear', want 'nearest'"),
    "a broken factor": (nn.Upsample(size=(8, 12)), SIZES, "want an integer factor"),
    "a steep slope": (nn.LeakyReLU(2.0), SIZES, "negative_slope=2.0, want one in"),
    "a negative slope": (nn.PReLU(1, -0.5), SIZES, "slopes in .*, want them in"),
    "a steep elu": (nn.ELU(2.0), SIZES, "alpha=2.0, want 0 < alpha <= 1"),
    "a jump": (nn.Softplus(threshold=5), SIZES, "threshold=5.*, want"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_says_what_it_would_have_to_be(name: str) -> None:
    function, sizes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        rule_of(function, sizes)


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.Softmax(1), nn.SELU(), nn.RReLU().eval()])
def test_other_functions_have_none(module: nn.Module) -> None:
    node, _ = only_node(module, SIZES, 3)
    assert node.function not in RULES
