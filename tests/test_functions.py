"""Functions that a graph could read as others: right, or an error by path. Each was wrong, or a raw error, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from torch import Tensor, nn

import locallip_cuda as ll

GUARANTEES = ["estimate", "deterministic"]
every_guarantee = pytest.mark.parametrize("guarantee", GUARANTEES)


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


A, W, V = normal(1, 4, 4), normal(2, 3, 4), normal(3, 3, 2)
ONE = normal(4, 3, 1)
X = normal(0, 3, 4)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "maximum": (lambda x: F.linear(F.linear(x, A).max(1, keepdim=True)[0].relu(), ONE), "max has no bound"),
    "named maximum": (lambda x: F.linear(x.max(1, keepdim=True).values, ONE), "max has no bound"),
    "sorted": (lambda x: F.linear(x.sort(1)[0], W), "sort has no bound"),
    "largest": (lambda x: F.linear(x.topk(2, 1)[0], V), "topk has no bound"),
    "running maximum": (lambda x: F.linear(x.cummax(1)[0], W), "cummax has no bound"),
    "median": (lambda x: F.linear(x.median(1, keepdim=True)[0], ONE), "median has no bound"),
    "clamp that repeats": (
        lambda x: F.linear(x[:, :1].clamp(max=torch.full((4,), 9.0, dtype=torch.float64)), W),
        r"clamp has no bound: its rule makes \(1,\)",
    ),
    "alpha of a constant's sum": (
        lambda x: F.linear(torch.add(torch.zeros(4, dtype=torch.float64), x, alpha=3), W),
        "add has no bound",
    ),
    "rolled batch": (lambda x: F.linear(F.linear(x, A).relu().roll(2, 0), W), "roll has no bound: dims=0"),
    "rolled everything": (lambda x: F.linear(F.linear(x, A).relu().roll(8), W), "roll has no bound: dims=None"),
    "turned batch": (lambda x: F.linear(x.flip(0), W), "flip has no bound"),
    "chosen samples": (lambda x: F.linear(x[torch.tensor([1, 2, 0])], W), "__getitem__ has no bound"),
    "two dimensions pooled as one": (
        lambda x: F.linear(F.avg_pool2d(x.view(3, 2, 2), 2).mean((1, 2), keepdim=True).flatten(1), ONE),
        "avg_pool2d has no bound|avg_pool2d makes",
    ),
    "pool of no channels": (lambda x: F.linear(F.max_pool1d(x, 2), V), "max_pool1d has no bound"),
    "bits": (lambda x: F.linear(x.view(torch.int64).abs().view(torch.float64), W), r"view makes .* in torch.int64"),
    "complex": (
        lambda x: F.linear((x * torch.tensor([1 + 1j])).abs(), W),
        r"mul makes .* in torch.complex128",
    ),
    "indices of a pool": (
        lambda x: F.linear(F.max_pool1d(x.unsqueeze(1), 2, return_indices=True)[1].squeeze(1) * 1.0, V),
        r"max_pool1d.* makes .* in torch.int64",
    ),
    "single precision": (lambda x: F.linear(x.float().double(), W), "float makes .* in torch.float32"),
    "a weight of one dimension": (lambda x: F.linear(x, W[0]).unsqueeze(1), "linear has no bound: a weight or bias"),
    "a bias of the batch": (lambda x: F.linear(x, W, normal(5, 3, 3)), "linear has no bound: a weight or bias"),
    "thresholds of the batch": (
        lambda x: F.linear(ll.nn.clipped_relu(x, torch.rand(3, 4, dtype=torch.float64)), W),
        "clipped_relu has no bound: a threshold of shape",
    ),
    "windows in the padding": (
        lambda x: F.linear(F.max_pool1d(x[:, :1].unsqueeze(1), 2, 1, 1, 2).flatten(1), ONE),
        "max_pool1d has no bound: windows that lie in the padding",
    ),
    "no numbers": (lambda x: F.linear(torch.cat([x[:, :0].relu(), x], 1), W), r"__getitem__ makes \(3, 0\)"),
    "one number's activation": (lambda x: x[:, 0].relu().unsqueeze(1) * ONE.T, r"of one number \(B,\)"),
    "BatchNorm of a denormal factor": (
        lambda x: F.linear(F.batch_norm(x, X[0] * 0, X[0] * 0 + 1e40, X[0] * 0 + 3e-300), W),
        r"batch_norm has no bound: a factor outside \[2\^-960",
    ),
}


@every_guarantee
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_as_another_function_is_an_error(name: str, guarantee: str) -> None:
    function, message = REFUSED[name]
    if name == "BatchNorm of a denormal factor" and guarantee == "estimate":
        return  # of proofs alone
    with pytest.raises(ll.UnsupportedModuleError, match=f"model: {message}|{message}"):
        ll.local_bounds(Called(function), X, 0.1, guarantee=guarantee)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled channels": lambda x: F.linear(F.linear(x, A).relu().roll(2, 1), W),
    "columns": lambda x: F.linear(torch.stack([x[:, i] for i in range(4)], 1).relu(), W),
    "one column": lambda x: F.linear(x[:, 0].unsqueeze(1), ONE),
    "unbound": lambda x: F.linear(torch.stack(x.unbind(1)[::-1], 1).relu(), W),
    "other": lambda x: F.linear(torch.add(x, other=x.relu()), W),
    "other with alpha": lambda x: F.linear(torch.add(x, x.relu(), alpha=-2.5), W),
    "constants on the left": lambda x: F.linear(A[0] - (A[1] * (A[0] + x)), W),
    "maxima of a pool with indices": lambda x: F.linear(
        F.max_pool1d(x.unsqueeze(1), 2, return_indices=True)[0].squeeze(1), V
    ),
    "one threshold": lambda x: F.linear(ll.nn.clipped_relu(x, torch.tensor(0.3, dtype=torch.float64)), W),
    "thresholds of one half": lambda x: F.linear(ll.nn.clipped_maxmin(x, torch.ones(2), -torch.ones(2)), W),
    "the same type": lambda x: F.linear(x.to(torch.float64).cpu().expand(3, 4), W),
    "sums and repeats": lambda x: F.linear(x.view(3, 2, 2).sum(2).repeat(1, 2).relu(), W),
    "means along an axis": lambda x: F.linear(x.view(3, 2, 2).mean(axis=2).relu(), V),
    "transposed": lambda x: F.linear(x.view(3, 2, 2).mT.flatten(1).relu(), W),
    "a number in all its digits": lambda x: F.linear(0.1 - x * 0.3 + 0.7, W).relu(),
    "three dimensions": lambda x: F.linear(F.relu(F.linear(x.view(3, 2, 2), V)).flatten(1), normal(6, 3, 6)),
    "steps of chunks": lambda x: F.linear(torch.cat([a.relu() - b for a, b in [x.chunk(2, 1)]], 1), V),
    "tiny and huge": lambda x: F.linear(F.linear(F.linear(x, 1e-170 * A), 1e170 * A).relu(), W),
}


@every_guarantee
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right(name: str, guarantee: str) -> None:
    function, eps = RIGHT[name], 0.3
    b = ll.local_bounds(Called(function), X, eps, guarantee=guarantee, iterations=60)
    torch.testing.assert_close(b.logits, function(X), rtol=1e-9, atol=1e-9)
    prediction = b.logits.argmax(1)
    gains = b.worst_logits(prediction) - b.logits.gather(1, prediction.unsqueeze(1))
    for seed in range(60):
        step = normal(100 + seed, *X.shape)
        point = X + eps * step / step.norm(dim=1, keepdim=True)
        features = ll.global_bounds(Called(function), point, 0.0, iterations=0).features
        assert ((features - b.features).norm(dim=1) <= b.radius * (1 + 1e-9) + 1e-12).all()
        assert (features >= b.lower - 1e-9).all() and (features <= b.upper + 1e-9).all()
        logits = function(point)
        assert (logits - logits.gather(1, prediction.unsqueeze(1)) <= gains + 1e-9).all()


def test_products_that_leave_the_format_are_not_composed() -> None:
    eye = torch.eye(4, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        tiny = torch.add(F.linear(x, 0 * eye), F.linear(x, 1e-200 * A), alpha=1e-300)
        return F.linear(F.linear(tiny, 1e20 * eye) * 1e180, eye)

    x = 1e300 * X
    b = ll.local_bounds(Called(function), x, 0.0, guarantee="deterministic")
    assert isinstance(b, ll.ProvedBounds)
    assert function(x).abs().max() > 0.1
    assert ((b.logits - function(x)).abs() <= b.logit_error + 1e-12).all()


def test_torchscript_is_named() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 2).double(), X)
    with pytest.raises(ll.UnsupportedModuleError, match=r"model\.0: TorchScript has no bound"):
        ll.local_bounds(nn.Sequential(scripted), X, 0.1)
