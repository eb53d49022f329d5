"""A bound is about the function that `model(x)` computes, whatever the model is made of, or there is an error."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, ZOO, generator, zoo_input
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import locallip_cuda as ll
from locallip_cuda import attack, ops
from locallip_cuda.norms.linear import Dense
from locallip_cuda.propagation import agreement, rules

GUARANTEES = ["estimate", "probabilistic", "deterministic"]
every_guarantee = pytest.mark.parametrize("guarantee", GUARANTEES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def linear(seed: int, inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A Linear layer in float64 with weights near an orthogonal map's size."""
    layer = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        layer.weight.copy_(normal(seed, outputs, inputs) * scale / inputs**0.5)
        layer.bias.copy_(0.3 * normal(seed + 1, outputs))
    return layer


def assert_certificates_hold(model: nn.Module, x: Tensor, eps: float, guarantee: str) -> int:
    """The logits are `model(x)`'s and no attack on `model` breaks what is certified. How many samples are."""
    with torch.no_grad():
        clean = model(x.clone())
    bounds = ll.local_bounds(model, x, eps, iterations=100, guarantee=guarantee)
    torch.testing.assert_close(bounds.logits.detach().double(), clean.double(), rtol=1e-5, atol=1e-5)
    certificate = ll.certify(model, x, eps, guarantee=guarantee)
    held = certificate.certified
    assert torch.equal(certificate.prediction[held], clean.argmax(1)[held])
    for step_size in (eps / 2, eps / 10):
        g = torch.Generator().manual_seed(0)
        points = attack.pgd(model, x, certificate.prediction, eps, steps=30, step_size=step_size, generator=g)
        with torch.no_grad():
            answers = model(points.clone()).argmax(1)
        assert torch.equal(answers[held], certificate.prediction[held]), "a certified sample falls"
    return int(held.sum())


# --- modules used more than once --------------------------------------------------------------------------------------


@every_guarantee
def test_a_linear_layer_used_twice(guarantee: str) -> None:
    shared = linear(0, 6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), linear(2, 6, 3))
    assert ll.local_bounds(model, normal(9, 4, 6), 0.1, guarantee=guarantee).layer_norms.shape == (4, 2)
    assert 0 < assert_certificates_hold(model, normal(9, 64, 6), 0.05, guarantee) < 64


@every_guarantee
def test_an_activation_used_twice(guarantee: str) -> None:
    activation = nn.ReLU()
    model = nn.Sequential(linear(0, 6, 9), activation, linear(2, 9, 7), activation, linear(4, 7, 3))
    assert 0 < assert_certificates_hold(model, normal(9, 64, 6), 0.1, guarantee) < 64


def test_a_container_used_twice_and_gradients_of_shared_weights() -> None:
    block = nn.Sequential(linear(0, 5, 5), nn.ReLU())
    model = nn.Sequential(block, block, nn.Sequential(block, linear(2, 5, 3)))
    b = ll.local_bounds(model, normal(9, 3, 5), 0.1, iterations=50)
    assert b.layer_norms.shape == (3, 3)
    (shared,) = torch.autograd.grad(b.lipschitz.sum(), block[0].weight)
    copies = [nn.Sequential(linear(0, 5, 5), nn.ReLU()) for _ in range(3)]
    apart = nn.Sequential(*copies, linear(2, 5, 3))
    b = ll.local_bounds(apart, normal(9, 3, 5), 0.1, iterations=50)
    grads = torch.autograd.grad(b.lipschitz.sum(), [copy[0].weight for copy in copies])
    torch.testing.assert_close(shared, sum(grads))


# --- modules that compute another function than their class -----------------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


class Backwards(nn.Sequential):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return reversed(self._modules.values())


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class StandardisedBelow(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Steep(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Calls(nn.ReLU):
    def __call__(self, *args: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * super().__call__(*args)


class Threefold(ll.nn.MaxMin):
    def forward(self, z: Tensor) -> Tensor:
        return 3 * super().forward(z)


def images(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(convolution, nn.ReLU()), nn.Flatten(), linear(2, 12, 3)).double()


def changed(change, place: str = "0") -> nn.Sequential:  # type: ignore[no-untyped-def]
    model = nn.Sequential(linear(0, 6, 6), nn.Sequential(nn.ReLU()), linear(2, 6, 3))
    change(model.get_submodule(place))
    return model


def set_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)


OTHERS: dict[str, Callable[[], nn.Sequential]] = {
    "residual": lambda: nn.Sequential(Residual(linear(0, 6, 6), nn.ReLU()), linear(2, 6, 3)),
    "the whole model": lambda: Scaling(linear(0, 6, 6), nn.ReLU(), linear(2, 6, 3)),
    "another order": lambda: nn.Sequential(Backwards(nn.ReLU(), linear(0, 6, 6)), linear(2, 6, 3)),
    "cosine head": lambda: nn.Sequential(linear(0, 6, 6), nn.ReLU(), Cosine(6, 3).double()),
    "hidden cosine": lambda: nn.Sequential(Cosine(6, 6).double(), nn.ReLU(), linear(2, 6, 3)),
    "weight-standardised": lambda: images(Standardised(2, 3, 2)),
    "below forward": lambda: images(StandardisedBelow(2, 3, 2)),
    "activation": lambda: nn.Sequential(linear(0, 6, 6), Steep(), linear(2, 6, 3)),
    "call": lambda: nn.Sequential(linear(0, 6, 6), Calls(), linear(2, 6, 3)),
    "own activation": lambda: nn.Sequential(linear(0, 6, 6), Threefold(), linear(2, 6, 3)),
    "forward of an instance": lambda: changed(set_forward),
    "forward of a container": lambda: changed(set_forward, "1"),
    "forward of the model": lambda: changed(set_forward, ""),
    "hook": lambda: changed(lambda m: m.register_forward_hook(lambda module, args, out: 2 * out)),
    "pre-hook of a container": lambda: changed(
        lambda m: m.register_forward_pre_hook(lambda module, args: (2 * args[0],)), "1"
    ),
    "hook of an activation": lambda: changed(
        lambda m: m.register_forward_hook(lambda module, args, out: 2 * out), "1.0"
    ),
    "hook of the model": lambda: changed(lambda m: m.register_forward_hook(lambda module, args, out: out.flip(1)), ""),
    "backward hook": lambda: changed(lambda m: m.register_full_backward_hook(lambda module, inputs, outputs: None)),
    "the older spectral_norm": lambda: changed(torch.nn.utils.spectral_norm),
    "the older weight_norm": lambda: changed(torch.nn.utils.weight_norm),
    "pruned": lambda: changed(pruned),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.ReLU(), linear(2, 6, 3)),
}
# what no graph of these functions says
REFUSED = {
    "cosine head": r"model\.2: normalize has no bound",
    "hidden cosine": r"model\.0: normalize has no bound",
    "backward hook": r"model\.0: asks whether a value has a gradient.*backward hook",
}


def other(name: str) -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OTHERS[name]()
    size = (2, 3, 3) if any(isinstance(m, nn.Conv2d) for m in model.modules()) else (6,)
    return model, normal(9, 64, *size)


warned = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Lazy modules:UserWarning")


@warned
@every_guarantee
@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_another_function_than_its_class_is_bounded_as_it_computes(name: str, guarantee: str) -> None:
    model, x = other(name)
    if name in REFUSED:
        with pytest.raises(ll.UnsupportedModuleError, match=REFUSED[name]):
            ll.certify(model, x, 0.05, guarantee=guarantee)
        return
    model.eval()
    scale = 1e-3 if name in ("the whole model", "another order") else 0.02
    assert assert_certificates_hold(model, x, scale, guarantee) > 0


def test_the_three_wrong_functions_are_what_they_compute() -> None:
    """A skip, a forward of a subclass and a hook: radii by hand, from the singular values of what runs."""
    weight, x = linear(0, 6, 6), normal(9, 4, 6)
    skip = nn.Sequential(Residual(weight), nn.ReLU(), linear(2, 6, 3))
    matrix = weight.weight.detach() + torch.eye(6, dtype=torch.float64)
    for model, whole in (
        (skip, matrix),
        (changed(set_forward), 2 * weight.weight.detach()),
        (changed(lambda m: m.register_forward_hook(lambda module, args, out: -3 * out)), 3 * weight.weight.detach()),
    ):
        b = ll.local_bounds(model, x, 0.1, guarantee="deterministic")
        rows = b.row_masks[0].double()
        expected = torch.linalg.matrix_norm(rows.unsqueeze(2) * whole, 2)
        torch.testing.assert_close(b.lipschitz, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(b.logits, model(x).detach())


def test_a_forward_of_a_class_changed_later_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = changed(lambda module: None), normal(9, 4, 6)
    before = ll.local_bounds(model, x, 0.05, iterations=50).lipschitz
    forward = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: 3 * forward(self, x))
    b = ll.local_bounds(model, x, 0.05, iterations=50)
    torch.testing.assert_close(b.logits, model(x))
    torch.testing.assert_close(b.worst_logits(torch.zeros(4, dtype=torch.int64)).isfinite().all(), torch.tensor(True))
    assert (ll.certify(model, x, 0.05).margin <= 3.5 * before.amax()).all()


def test_global_hooks_are_what_runs() -> None:
    model, x = changed(lambda module: None), normal(9, 4, 6)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert_certificates_hold(model, x, 0.01, "deterministic")
    finally:
        handle.remove()


class OwnLinear(nn.Linear):
    """Inherits all that runs."""

    def __init__(self, seed: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.load_state_dict(linear(seed, inputs, outputs).state_dict())
        self.double()


class Block(nn.Sequential):
    def __init__(self, seed: int) -> None:
        super().__init__(OwnLinear(seed, 6, 6), nn.LeakyReLU(0.1))


@every_guarantee
def test_subclasses_that_inherit_what_runs_have_bounds(guarantee: str) -> None:
    model = nn.Sequential(Block(0), Block(2), OwnLinear(4, 6, 3))
    assert 0 < assert_certificates_hold(model, normal(9, 64, 6), 0.05, guarantee) < 64


PARAMETRISATIONS = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
}


@every_guarantee
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_parametrised_weights_have_bounds(name: str, dtype: torch.dtype, guarantee: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [PARAMETRISATIONS[name](linear(seed, 6, 6)) for seed in (0, 2)]
    shared = nn.ReLU()
    model = nn.Sequential(layers[0], shared, layers[1], shared, linear(4, 6, 3)).to(dtype).eval()
    x = normal(9, 64, 6).to(dtype)
    assert 0 < assert_certificates_hold(model, x, 0.05, guarantee) < 64
    model.train()
    loss = ll.losses.robust_cross_entropy(ll.local_bounds(model, x, 0.05), torch.zeros(64, dtype=torch.int64))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_parametrisation_that_changes_at_every_read_has_no_proof() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(linear(0, 6, 6)), nn.ReLU(), linear(2, 6, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ll.local_bounds(model, normal(9, 4, 6), 0.05)
    once = model.state_dict()
    model.load_state_dict(state)
    model(normal(9, 4, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, once[name]), "a bound reads a weight as often as a call of the model does"
    for guarantee in GUARANTEES[1:]:
        with pytest.raises(
            ll.UnsupportedModuleError, match=r"model\.0: its parametrised weight changes.*want eval mode"
        ):
            ll.certify(model, normal(9, 4, 6), 0.05, guarantee=guarantee)
    ll.certify(model.eval(), normal(9, 4, 6), 0.05)


# --- the second net ---------------------------------------------------------------------------------------------------


def twice(at: Any, value: Any, weight: Tensor, bias: Tensor | None = None) -> rules.Affine:
    return rules.Affine(Dense(2 * weight), bias)


def without_bias(at: Any, value: Any, weight: Tensor, bias: Tensor | None = None) -> rules.Affine:
    return rules.Affine(Dense(weight))


def nearly(at: Any, value: Any, weight: Tensor, bias: Tensor | None = None) -> rules.Affine:
    return rules.Affine(Dense((1 + 1e-4) * weight), bias)


WRONG = {"twice": twice, "without bias": without_bias, "nearly": nearly}


@every_guarantee
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_the_clean_logits_are_compared(
    name: str, dtype: torch.dtype, guarantee: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.RULES, nn.functional.linear, WRONG[name])
    model, x = changed(lambda module: None).to(dtype), normal(9, 64, 6).to(dtype)
    with pytest.raises(ll.UnsupportedModuleError, match=r"model: model\(x\) and the functions .* differ"):
        ll.certify(model, x, 0.05, guarantee=guarantee)


@every_guarantee
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_comparison_is_as_sharp_as_rounding(
    activation: str, guarantee: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = copy.deepcopy(trained(activation)).float()
    x = digits[0][:8].float()
    ll.certify(model, x, 0.1, guarantee=guarantee)
    monkeypatch.setitem(rules.RULES, nn.functional.linear, nearly)
    agreement._agreed.discard(model)
    with pytest.raises(ll.UnsupportedModuleError, match="more than rounding explains"):
        ll.certify(model, x, 0.1, guarantee=guarantee)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
@pytest.mark.parametrize("depth, width", [(2, 3), (3, 400), (30, 20)])
@pytest.mark.parametrize("kind", ["random", "one sign", "all alike", "cancelling"])
def test_rounding_is_not_taken_for_another_function(kind: str, depth: int, width: int, scale: float) -> None:
    model = nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(width, width), nn.LeakyReLU(0.5))], nn.Linear(width, 2)
    )
    g = generator(depth)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / width**0.5)
            if kind == "all alike":
                p.fill_(0.37)
            if kind == "one sign":
                p.abs_()
        if kind == "cancelling":
            model[0].bias.copy_(-model[0](torch.full((1, width), 10.0))[0] + model[0].bias)
        for p in (model[0].weight, model[0].bias):
            p.mul_(scale)
    x = 10 + 0.01 * torch.rand(20, width, generator=g)
    for guarantee in ("estimate", "probabilistic"):
        ll.certify(model, x, 0.0, guarantee=guarantee)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_in_float32_agrees(name: str) -> None:
    model = copy.deepcopy(ZOO[name][0]).float()
    b = ll.local_bounds(model, zoo_input(name, 4).float(), 0.1)
    torch.testing.assert_close(b.logits, model(zoo_input(name, 4).float()))


# --- activations that work in place -----------------------------------------------------------------------------------

IN_PLACE = {
    "relu": nn.ReLU,
    "leaky relu": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: nn.ELU(0.7, inplace),
}


@every_guarantee
def test_leaky_relu_in_place_by_hand(guarantee: str) -> None:
    """Class 0 leads by 0.2 - 0.1 |x| for x < 0: it does not within 1.5 of -1."""
    model = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(0.1, inplace=True), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.copy_(torch.tensor([0.2, 0.0]))
    x = torch.tensor([[-1.0]], dtype=torch.float64)
    certificate = ll.certify(model, x, 1.5, guarantee=guarantee)
    assert certificate.prediction.tolist() == [0] and model(torch.tensor([[-2.5]]).double()).argmax() == 1
    assert not certificate.certified and ll.certify(model, x, 0.9, guarantee=guarantee).certified


@every_guarantee
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_what_it_is_out_of_place(name: str, first: bool, guarantee: str) -> None:
    def build(inplace: bool) -> nn.Sequential:
        start = [nn.Identity(), IN_PLACE[name](inplace)] if first else []
        rest = [
            linear(0, 6, 8),
            IN_PLACE[name](inplace),
            nn.Linear(8, 8).double(),
            IN_PLACE[name](inplace),
            linear(2, 8, 3),
        ]
        rest[2].load_state_dict(linear(7, 8, 8).state_dict())
        return nn.Sequential(*start, *rest)

    x, y = normal(9, 16, 6), torch.arange(16) % 3
    kept = x.clone()
    apart, within = (ll.local_bounds(build(inplace), x, 0.1, guarantee=guarantee) for inplace in (False, True))
    assert torch.equal(x, kept), "the user's own x is left alone"
    for field in ("logits", "radius", "lower", "upper", "features"):
        torch.testing.assert_close(
            getattr(within, field),
            getattr(apart, field),
            rtol=1e-2 if guarantee == "probabilistic" else 1e-12,
            atol=1e-2 if guarantee == "probabilistic" else 1e-12,
        )
    if guarantee == "estimate":
        model = build(True)
        ll.losses.robust_cross_entropy(ll.local_bounds(model, x, 0.1), y).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert_certificates_hold(build(True), x, 0.05, guarantee)


# --- what torch takes too ---------------------------------------------------------------------------------------------

ONE_NUMBER = {
    "stride": lambda: nn.Conv2d(2, 4, 3, stride=(2,)),
    "padding": lambda: nn.Conv2d(2, 4, 3, padding=(1,)),
    "dilation": lambda: nn.Conv2d(2, 4, 3, dilation=(2,), padding="same"),
    "pool": lambda: nn.AvgPool2d((2,), stride=(1,), padding=(1,)),
    "integers set later": lambda: with_attributes(nn.Conv2d(2, 4, 3), stride=2, padding=1, dilation=1),
    "pool without a stride": lambda: with_attributes(nn.AvgPool2d(2), stride=()),
}


def with_attributes(module: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@every_guarantee
@pytest.mark.parametrize("name", ONE_NUMBER)
def test_one_number_where_two_are_meant(name: str, guarantee: str) -> None:
    module = ONE_NUMBER[name]()
    x = normal(9, 3, 2, 6, 6).float()
    model = nn.Sequential(module, nn.ReLU(), nn.Flatten(), nn.Linear(module(x)[0].numel(), 3))
    torch.testing.assert_close(ll.local_bounds(model, x, 0.1, guarantee=guarantee).logits.float(), model(x))


def test_ops_want_two_numbers() -> None:
    x, weight = torch.rand(1, 2, 6, 6), torch.rand(4, 2, 3, 3)
    for conv in (([2], [0, 0], [1, 1]), ([1, 1], [1], [1, 1]), ([1, 1], [0, 0], [1])):
        with pytest.raises(RuntimeError, match="want two numbers each"):
            ops.affine(x, weight, None, *conv, 1)
        with pytest.raises(RuntimeError, match="want two numbers each"):
            ops.masked_norm(weight, None, None, None, [1, 2, 6, 6], *conv, 1, 2)


@pytest.mark.parametrize("setting", ["backends.cuda.matmul", "backends", "backends.mkldnn.matmul"])
def test_precision_settings_by_backend(setting: str) -> None:
    """In a process of its own, because torch does not take the older settings any more after these."""
    program = f"""
import torch, locallip_cuda as ll
torch.{setting}.fp32_precision = "tf32"
model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
for guarantee in {GUARANTEES}:
    ll.certify(model, torch.randn(2, 6), 0.1, guarantee=guarantee)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class Temperature(nn.Sequential):
    """With a parameter that takes no part in the call, of another dtype."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.register_parameter("steps", nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False))


def test_parameters_of_no_part_and_weights_that_are_buffers() -> None:
    ll.certify(Temperature(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), normal(9, 2, 6).float(), 0.1)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    for layer in (frozen[0], frozen[2]):
        for name in ("weight", "bias"):
            value = getattr(layer, name).detach()
            delattr(layer, name)
            layer.register_buffer(name, value)
    for guarantee in GUARANTEES:
        ll.certify(frozen, normal(9, 2, 6).float(), 0.1, guarantee=guarantee)


@every_guarantee
def test_long_sums_of_equal_terms_are_rounding(guarantee: str) -> None:
    """A white image under a pooling of all its pixels, and a dense layer of all pixels alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooled = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(112), nn.Flatten(), nn.Linear(8, 9)
        )
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2))
    with torch.no_grad():
        dense[1].weight.fill_(0.1 / (3 * 224 * 224))
    if guarantee != "deterministic":  # which would take minutes for this convolution
        ll.certify(pooled, torch.ones(1, 3, 112, 112), 0.01, guarantee=guarantee)
    ll.certify(dense, torch.full((1, 3, 224, 224), 0.1), 0.05, guarantee=guarantee)


@every_guarantee
def test_underflow_is_rounding(guarantee: str) -> None:
    layers = [nn.Linear(6, 6, bias=False) for _ in range(3)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())], nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(0)) * 1e-15)
    ll.certify(model, normal(9, 16, 6).float(), 0.05, guarantee=guarantee)


# --- ways around the class --------------------------------------------------------------------------------------------


class Intercepting(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is nn.functional.linear else result


@every_guarantee
def test_a_weight_that_intercepts_its_product_is_refused(guarantee: str) -> None:
    model = nn.Sequential(linear(0, 6, 6), nn.ReLU(), linear(2, 6, 3))
    weight = model[0].weight.detach().as_subclass(Intercepting)
    del model[0].weight
    model[0].register_buffer("weight", weight)
    with pytest.raises(ll.UnsupportedModuleError, match="takes a Intercepting|differ by|cannot be recorded|no bound"):
        ll.certify(model, normal(9, 4, 6), 0.1, guarantee=guarantee)


@every_guarantee
def test_a_compiled_call_is_the_module_s_own_or_refused(guarantee: str) -> None:
    model = nn.Sequential(linear(0, 6, 6), nn.ReLU(), linear(2, 6, 3))
    model[1]._compiled_call_impl = lambda z: 2 * z.relu()
    assert_certificates_hold(model, normal(9, 4, 6), 0.1, guarantee)
    model[1]._compiled_call_impl = lambda z: z.relu() + 100 * (z - 5).relu()  # a sum of two facts
    assert_certificates_hold(model, normal(9, 4, 6), 0.01, guarantee)


def test_an_empty_comparison_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, nn.functional.linear, twice)
    model = changed(lambda module: None)
    ll.local_bounds(model, normal(9, 0, 6), 0.1)
    ll.local_bounds(model, torch.full((2, 6), torch.nan, dtype=torch.float64), 0.1)
    with pytest.raises(ll.UnsupportedModuleError, match="more than rounding explains"):
        ll.local_bounds(model, normal(9, 4, 6), 0.1)


def test_the_clean_logits_of_a_proof_are_the_network_s_however_deep() -> None:
    """Their error grows with the depth, and is stated; the values are what float64 makes of them."""
    g = generator(0)
    model = nn.Sequential(*[m for _ in range(16) for m in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (1.41 / 16 if p.dim() == 2 else 0.1))
    x = normal(9, 4, 256)
    b = ll.local_bounds(model, x, 1e-6, guarantee="probabilistic")
    torch.testing.assert_close(b.logits, model(x).detach(), rtol=1e-9, atol=1e-9)
    assert isinstance(b, ll.ProvedBounds) and (b.logit_error > 1e-9).all()


# --- random models ----------------------------------------------------------------------------------------------------

WIDTH = 6


def hooked(module: nn.Module, kind: str) -> nn.Module:
    if kind == "forward":
        module.register_forward_hook(lambda m, args, out: out * 1.5)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda m, args: (args[0] - 0.5,))
    elif kind == "harmless":
        module.register_forward_hook(lambda m, args, out: None)
    else:
        forward = module.forward
        module.forward = lambda x: forward(x).flip(1)  # type: ignore[method-assign]
    return module


@st.composite
def layer(draw: st.DrawFn) -> nn.Module:
    """Any module that maps (B, 6) to (B, 6): of the kinds that have bounds, with and without a change."""
    seed = draw(st.integers(0, 5))
    module = draw(
        st.sampled_from(
            [
                lambda: linear(seed, WIDTH, WIDTH),
                lambda: OwnLinear(seed, WIDTH, WIDTH),
                lambda: nn.ReLU(inplace=seed % 2 == 0),
                lambda: nn.LeakyReLU(0.2, inplace=seed % 2 == 0),
                lambda: nn.ELU(0.5, inplace=seed % 2 == 0),
                nn.Tanh,
                nn.Identity,
                lambda: nn.Dropout(0.5).eval(),
                ll.nn.MaxMin,
                lambda: ll.nn.ClippedReLU(WIDTH, 0.5).double(),
                lambda: ll.nn.ClippedMaxMin(WIDTH // 2, 0.4, -0.3).double(),
                lambda: ll.nn.Normalize([0.1] * WIDTH, [0.7] * WIDTH).double(),
                lambda: Cosine(WIDTH, WIDTH).double(),
                Steep,
                Calls,
                Threefold,
                *[lambda wrap=wrap: wrap(linear(seed, WIDTH, WIDTH)) for wrap in PARAMETRISATIONS.values()],
            ]
        )
    )()
    changes = ["forward", "pre", "harmless", "instance"]
    return hooked(module, draw(st.sampled_from(changes))) if draw(st.integers(0, 9)) == 0 else module


@st.composite
def random_model(draw: st.DrawFn) -> nn.Sequential:
    """Up to four layers, any of them several times, tied, in containers, behind a last layer that may be odd too."""
    pool = draw(st.lists(layer(), min_size=1, max_size=4))
    linears = [m for m in pool if type(m) is nn.Linear]
    if len(linears) > 1 and draw(st.booleans()):
        linears[1].weight = linears[0].weight
    containers = [nn.Sequential, nn.Sequential, nn.Sequential, Residual, Scaling, Backwards]
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
        if draw(st.booleans()):
            modules += parts
            continue
        block = draw(st.sampled_from(containers))(*parts)
        modules += [block] * draw(st.integers(1, 2))
    last = draw(st.sampled_from([linear, linear, linear, lambda seed, *size: Cosine(*size).double()]))(7, WIDTH, 3)
    return draw(st.sampled_from([nn.Sequential] * 5 + [Scaling]))(*modules, last).eval()


@settings(max_examples=300, deadline=None)
@given(random_model(), st.sampled_from([0.02, 0.2]), st.sampled_from(GUARANTEES), st.sampled_from([32, 64]))
def test_random_models_are_bounded_as_they_compute_or_refused(
    model: nn.Sequential, eps: float, guarantee: str, bits: int
) -> None:
    dtype = {32: torch.float32, 64: torch.float64}[bits]
    model.to(dtype)
    x = normal(9, 12, WIDTH).to(dtype)
    with torch.no_grad():
        clean = model(x.clone())
    try:
        certificate = ll.certify(model, x, eps, guarantee=guarantee)
    except ll.UnsupportedModuleError as error:
        event("refused")
        assert str(error).startswith("model") and "no bound" in str(error)
        return
    event("bounded")
    bounds = ll.local_bounds(model, x, eps, guarantee=guarantee)
    rounding = {32: 3e-3, 64: 1e-9}[bits]  # scaled by up to 10^4 on the way, with biases that cancel
    torch.testing.assert_close(bounds.logits.detach().double(), clean.double(), rtol=rounding, atol=rounding)
    held = certificate.certified
    directions = normal(3, 20, *x.shape)
    steps = eps * directions / directions.norm(dim=2, keepdim=True)
    points = [x + step.to(dtype) for step in steps]
    try:
        g = torch.Generator().manual_seed(0)
        points.append(attack.pgd(model, x, certificate.prediction, eps, steps=15, generator=g))
    except RuntimeError as error:
        assert "inplace operation" in str(error)  # torch itself has no gradient through two of them in a row
    for point in points:
        with torch.no_grad():
            answers = model(point.clone())
        margin = answers.gather(1, certificate.prediction[:, None])[:, 0] - answers.scatter(
            1, certificate.prediction[:, None], -torch.inf
        ).amax(1)
        assert (margin[held] > -rounding).all(), "a certified sample falls"


def test_random_models_are_of_both_sorts() -> None:
    """What is drawn above is neither all refused nor all bounded, and shows every kind of repetition."""
    outcomes = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(random_model())
    def draw(model: nn.Sequential) -> None:
        modules = [m for container in model.modules() for m in container._modules.values()]
        try:
            ll.certify(model.double(), normal(9, 2, WIDTH), 0.1, guarantee="estimate")
            outcomes.append(("bounded", len(modules) > len(set(modules))))
        except ll.UnsupportedModuleError:
            outcomes.append(("refused", False))

    draw()
    assert {("bounded", True), ("bounded", False), ("refused", False)} <= set(outcomes)
