"""Rules of users: for functions and classes, what check_rule finds in wrong ones, and functions known by a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.nn import maxmin
from locallip_cuda.propagation.rules import RULES

GUARANTEES = ["estimate", "probabilistic", "deterministic"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The table as it was, after the test."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Gain(nn.Module):
    """A scaling that no trace goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[2.0, -3.0, 0.5]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError
        return x * self.gain


def of_gain(at: ll.rules.Site, module: Gain) -> ll.rules.Affine:
    return ll.rules.Affine(ll.rules.Scaling(module.gain, at.input_sizes))


def model_with(module: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), module, nn.ReLU(), nn.Linear(3, 2)).double()


def test_a_class_without_a_rule_is_an_error_and_with_one_a_function() -> None:
    model, x = model_with(Gain()), normal(1, 5, 4)
    with pytest.raises(ll.UnsupportedModuleError, match=r"model\.1: isnan|model\.1: any|model\.1: __bool__|numbers"):
        ll.certify(model, x, 0.1)
    ll.rule(Gain)(of_gain)
    ll.testing.check_rule(Gain(), (3,))
    for guarantee in GUARANTEES:
        b = ll.local_bounds(model, x, 0.1, guarantee=guarantee)
        torch.testing.assert_close(b.logits, model(x).detach().to(b.logits))
        matrix = model[1].gain.detach().T * model[0].weight.detach()
        expected = torch.linalg.matrix_norm(b.row_masks[0].unsqueeze(2) * matrix, 2)
        torch.testing.assert_close(b.lipschitz.detach(), expected, rtol=5e-3, atol=1e-30)
    loss = ll.local_bounds(model, x, 0.1).radius.sum()
    assert torch.autograd.grad(loss, model[1].gain)[0].any()


def test_rules_follow_what_runs() -> None:
    """A subclass with a forward of its own, a hook and a forward on the instance are what they compute."""
    ll.rule(Gain)(of_gain)

    class Twice(Gain):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = normal(1, 5, 4)
    hooked = Gain()
    hooked.register_forward_hook(lambda module, args, out: -3 * out)
    own = Gain()
    own.forward = lambda x: x * 5  # type: ignore[method-assign]
    for module in (Twice(), hooked, own):
        model = model_with(module)
        b = ll.local_bounds(model, x, 0.1, guarantee="deterministic")
        torch.testing.assert_close(b.logits, model(x).detach())
    assert torch.equal(Gain()(torch.ones(1, 3)), Gain().gain.detach()), "the class is as it was"


def test_classes_are_as_they_were_after_threads_and_errors() -> None:
    ll.rule(Gain)(of_gain)

    class Inherits(Gain):
        """Without a forward of its own."""

    ll.rule(Inherits)(of_gain)
    forward = Gain.forward
    models = [model_with(module) for module in (Gain(), Inherits())]

    def bound(i: int) -> Tensor:
        if i % 5 == 4:
            with pytest.raises(ValueError):
                ll.local_bounds(models[i % 2], normal(1, 5, 3), 0.1)
        return ll.local_bounds(models[i % 2], normal(1, 5, 4), 0.1).logits.detach()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(bound, range(20)))
    assert all(torch.equal(logits, found[i % 2]) for i, logits in enumerate(found))
    assert Gain.forward is forward and "forward" not in vars(Inherits)


def own_function(x: Tensor) -> Tensor:
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(own_function, (x,), x)  # type: ignore[no-any-return]
    return x.sin()


def test_functions() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return own_function(x)

    model, x = model_with(Sine()), normal(1, 5, 4)
    with pytest.raises(ll.UnsupportedModuleError, match=r"model\.1: own_function has no bound"):
        ll.certify(model, x, 0.1)

    @ll.rule(own_function)
    def _(at: ll.rules.Site, value: None) -> ll.rules.Lipschitz:
        return ll.rules.Lipschitz(own_function, 1.0, error=1e-15)

    ll.testing.check_rule(Sine(), (3,))
    assert ll.certify(model, x, 0.01).margin.isfinite().all()
    with pytest.raises(TypeError, match="of: got 3, want functions or classes"):
        ll.rule(3)  # type: ignore[arg-type]


class Block(nn.Module):
    """An SDP-based Lipschitz layer (Araujo et al., ICLR 2023), of constant 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3, width, width) / width**0.5)
        self.bias = nn.Parameter(normal(4, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.T @ self.weight).abs().sum(1)
        return x - 2 * (torch.relu(x @ self.weight + self.bias) / scale) @ self.weight.T


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_block_of_a_known_constant(guarantee: str) -> None:
    @ll.rule(Block)
    def _(at: ll.rules.Site, module: Block) -> ll.rules.Lipschitz:
        return ll.rules.Lipschitz(module, 1.0, error=1e-13)

    ll.testing.check_rule(Block(6), (6,))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Block(6), Block(6), nn.Linear(6, 3)).double()
    x = normal(2, 6, 4)
    b = ll.local_bounds(model, x, 0.2, guarantee=guarantee, iterations=50)
    torch.testing.assert_close(b.logits, model(x).detach().to(b.logits))
    for seed in range(40):
        step = normal(seed, *x.shape)
        point = x + 0.2 * step / step.norm(dim=1, keepdim=True)
        features = model[:-1](point)
        assert ((features - b.features).norm(dim=1) <= b.radius * (1 + 1e-9)).all()
        assert (features >= b.lower - 1e-9).all() and (features <= b.upper + 1e-9).all()
    if guarantee == "estimate":
        gradients = torch.autograd.grad(b.upper.sum() + b.radius.sum(), list(model[:-1].parameters()))
        assert all(g.isfinite().all() and g.any() for g in gradients)


def test_a_constant_without_an_error_has_no_proof() -> None:
    ll.rule(Block)(lambda at, module: ll.rules.Lipschitz(module, 1.0))
    model, x = nn.Sequential(nn.Linear(4, 6), Block(6), nn.Linear(6, 3)).double(), normal(2, 6, 4)
    ll.local_bounds(model, x, 0.1)
    with pytest.raises(ll.UnsupportedModuleError, match=r"model\.1: .*no proof, because its rule does not say"):
        ll.certify(model, x, 0.1)


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "another factor": (
        F.linear,
        lambda at, value, w, b=None: ll.rules.Affine(ll.rules.Dense(1.01 * w), b),
        "module's values",
    ),
    "another bias": (F.linear, lambda at, value, w, b=None: ll.rules.Affine(ll.rules.Dense(w)), "module's values"),
    "a constant too small": (F.gelu, lambda at, value: ll.rules.Activation(F.gelu, 1.1, -0.75179), "lipschitz"),
    "no valley": (F.silu, lambda at, value, **more: ll.rules.Activation(F.silu, 1.1), "interval"),
    "slopes too small": (
        F.relu,
        lambda at, value, **more: ll.rules.Activation(F.relu, slopes=(0.5, 1.0)),
        "slopes: two",
    ),
    "slopes of a sort": (maxmin, lambda at, value: ll.rules.Activation(maxmin, slopes=(0.0, 1.0)), "slopes: "),
    "slope above": (F.silu, lambda at, value, **more: ll.rules.Lipschitz(F.silu, 1.09), "lipschitz: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_found(name: str) -> None:
    function, build, message = WRONG[name]
    module: nn.Module = nn.Linear(4, 4) if function is F.linear else Called(function)
    ll.testing.check_rule(copy.deepcopy(module), (4,))
    ll.rule(function)(build)
    with pytest.raises(AssertionError, match=message):
        ll.testing.check_rule(module, (4,), samples=512)


def test_a_wrong_adjoint_and_wrong_sizes_are_found() -> None:
    class Wrong(ll.rules.Dense):
        def adjoint(self, y: Tensor) -> Tensor:
            return 2 * super().adjoint(y)

    class Small(ll.rules.Dense):
        def squared(self) -> ll.rules.Dense:
            return ll.rules.Dense(self.weight.square() / 9)

    class Less(ll.rules.Dense):
        def absolute(self) -> ll.rules.Dense:
            return ll.rules.Dense(self.weight.relu())

    for kind, message in ((Wrong, "adjoint"), (Small, "squared"), (Less, "absolute")):
        ll.rule(F.linear)(lambda at, value, w, b=None, kind=kind: ll.rules.Affine(kind(w), b))
        with pytest.raises(AssertionError, match=message):
            ll.testing.check_rule(nn.Linear(4, 4), (4,))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"), nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Mish(),
        nn.Hardswish(), nn.SiLU(), nn.PReLU(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.CELU(2.0), nn.Hardtanh(),
        nn.Tanh(), nn.Hardsigmoid(), nn.Upsample(scale_factor=2), nn.PixelShuffle(1), nn.AdaptiveMaxPool2d(2),
        ll.nn.MaxMin(), ll.nn.ClippedReLU((2, 6, 6), 0.4), ll.nn.ClippedMaxMin((1, 6, 6), 0.3, -0.2),
    ],
    ids=str,
)  # fmt: skip
def test_the_rules_here_pass(module: nn.Module) -> None:
    ll.testing.check_rule(module.eval(), (2, 6, 6))


def test_the_reference_is_untouched() -> None:
    """check_rule works on a copy."""
    module = nn.Linear(3, 2)
    before = copy.deepcopy(module.state_dict())
    ll.testing.check_rule(module, (3,))
    assert module.weight.dtype == torch.float32 and all(
        torch.equal(value, before[key]) for key, value in module.state_dict().items()
    )
