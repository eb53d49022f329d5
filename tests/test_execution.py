"""Proofs of the network as it runs: what floating point computes stays within its bound, and decides no certificate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import ZOO, generator, zoo_input
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_graphs import ACTIVATIONS, RandomGraph, graphs
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.propagation.execution import COMPUTED_ERROR

EPS = 0.1


def in_float32(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float().eval().requires_grad_(False)


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """The real network's logits, but for 1e-13 or so of them."""
    return copy.deepcopy(model).double()(x.double())


def proved(model: nn.Module, x: Tensor, eps: float, execution: str, **more: object) -> ll.ProvedBounds:
    bounds = ll.local_bounds(model, x, eps, guarantee="deterministic", execution=execution, **more)  # type: ignore[arg-type]
    assert isinstance(bounds, ll.ProvedBounds)
    return bounds


def inside(x: Tensor, eps: float, count: int, seed: int) -> list[Tensor]:
    """Numbers of the type in the ball, near its sphere."""
    g, found = generator(seed), []
    for _ in range(count):
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        step /= step.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
        found.append((x.double() + 0.999 * eps * step).to(x.dtype))
    return found


def check(model: nn.Module, x: Tensor, bounds: ll.ProvedBounds, among: list[Tensor]) -> float:
    """That no point's logits are further from the real ones than proved; the largest share of that reached."""
    assert bounds.execution_error is not None
    reached = 0.0
    for point in among:
        real, logits = exact(model, point), model(point)
        off = (logits.double() - real).abs()
        slack = 1e-12 * (1 + real.abs())
        assert (off <= bounds.execution_error + slack).all()
        safe, own = bounds.margin() > 0, bounds.logits.argmax(1)
        assert (logits.argmax(1) == own)[safe].all()
        reached = max(reached, float((off / bounds.execution_error).nan_to_num(0).max()))
    return reached


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_runs_stays_within_its_bound(name: str) -> None:
    model, x = in_float32(ZOO[name][0]), zoo_input(name, 3).float()
    if any(isinstance(module, nn.Softplus) for module in model.modules()):
        pytest.skip("Softplus has no proof")
    for execution in ("float32", "float64"):
        bounds = proved(model, x, EPS, execution)
        assert bounds.execution == execution and bounds.execution_error is not None
        assert bounds.execution_error.isfinite().all()
        run, at = (model, x) if execution == "float32" else (copy.deepcopy(model).double(), x.double())
        among = inside(at, EPS, 10, 1)
        check(run, at, bounds, among)
        whole = ll.global_bounds(model, x, EPS, guarantee="deterministic", execution=execution)
        assert isinstance(whole, ll.ProvedBounds) and (whole.margin() <= bounds.margin() + 1e-5).all()
        check(run, at, whole, among)


@settings(max_examples=40, deadline=None)
@given(
    graphs(sorted(ACTIVATIONS)),
    st.integers(0, 99),
    st.sampled_from([1e-15, 1e-3, 1.0, 30.0, 1e6]),
    st.sampled_from([0.0, 1e3, 1e6]),
    st.sampled_from([1, math.inf]),
)
def test_random_graphs(steps: list[tuple[object, ...]], seed: int, scale: float, offset: float, window: float) -> None:
    model = RandomGraph(steps, seed).eval().requires_grad_(False)
    for conv in model.convs.values():  # large biases cancel in the layers behind
        conv.weight *= scale
        conv.bias += offset * torch.randn(conv.bias.shape, generator=generator(seed), dtype=torch.float64)
    model = in_float32(model)
    x = torch.rand(3, 2, 4, 4, generator=generator(seed), dtype=torch.float64).float()
    bounds = proved(model, x, EPS, "float32", window=window)
    assert (bounds.margin() <= proved(model, x, EPS, "real", window=window).margin() + 1e-6).all()
    check(model, x, bounds, inside(x, EPS, 10, seed))


class Offset(nn.Module):
    """Logits (d, -d), d the sum of the inputs, through a layer whose bias takes the last digits away."""

    def __init__(self, size: float, inputs: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, 1), nn.Linear(1, 2)
        with torch.no_grad():
            self.up.weight.fill_(1.0)
            self.up.bias.fill_(size)
            self.down.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.down.bias.copy_(torch.tensor([-size, size]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_float32_disagrees_inside_a_ball_that_the_real_network_is_certified_for() -> None:
    model, found = Offset(2.0**20).eval(), 0
    for seed in range(60):
        x = torch.randn(1, 4, generator=generator(seed)) * 0.1
        eps = 0.9 * float(x.sum().abs()) / 2
        real = ll.certify(model, x, eps, guarantee="deterministic")
        runs = [model(point).argmax(1) for point in inside(x, eps, 20, seed)]
        if not all(bool((run == real.prediction).all()) for run in runs):
            found += int(real.certified)
            assert not ll.certify(model, x, eps, guarantee="deterministic", execution="float32").certified
        in64 = ll.certify(model, x, eps, guarantee="deterministic", execution="float64")
        assert bool(in64.certified) == bool(real.certified)
    assert found > 5


def test_what_is_lost_early_grows_with_the_layers_behind() -> None:
    layers: list[nn.Module] = [Offset(2.0**20)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(2, 2)]
        with torch.no_grad():
            layers[-1].weight.copy_(30 * torch.eye(2))  # type: ignore[union-attr]
            layers[-1].bias.zero_()  # type: ignore[union-attr]
    model, x = nn.Sequential(*layers).eval(), torch.full((1, 4), 0.02)
    for window in (1, math.inf):
        bounds = proved(model, x, 0.05, "float32", window=window)
        assert check(model, x, bounds, inside(x, 0.05, 30, 0)) > 1e-3


class Off(nn.Module):
    """A unit that is off in the real network, and in float32 on where its sum of 2^20 + x is rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.shift = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.up.weight.fill_(1.0)
            self.up.bias.fill_(2.0**20)
            self.down.weight.fill_(1.0)
            self.down.bias.fill_(-(2.0**20))
            self.shift.weight.fill_(1.0)
            self.shift.bias.fill_(-0.09375)
            self.head.weight.copy_(torch.tensor([[0.0, 1.0], [1e3, 0.0]]))
            self.head.bias.copy_(torch.tensor([0.0, -0.1]))

    def forward(self, x: Tensor) -> Tensor:
        near = torch.relu(self.down(torch.relu(self.up(x[:, :1]))))
        unit = torch.relu(self.shift(near))
        return self.head(torch.cat([unit, x[:, 1:]], 1))


def test_a_unit_that_only_rounding_turns_on() -> None:
    model, x = Off().eval(), torch.tensor([[2.0**-4, 0.5]])
    eps = 2.0**-7
    assert ll.certify(model, x, eps, guarantee="deterministic").certified
    assert any(bool(model(x + torch.tensor([[t, 0.0]])).argmax() == 1) for t in torch.linspace(-eps, eps, 101))
    assert not ll.certify(model, x, eps, guarantee="deterministic", execution="float32").certified


def test_a_deviation_that_float32_cannot_divide_by() -> None:
    """1 / 1e-45 is no float32: what runs is NaN."""
    model = nn.Sequential(ll.nn.Normalize([0.0], [1.0]), nn.Flatten(), nn.Linear(4, 2)).eval()
    normalize = model[0]
    normalize.std.fill_(1e-45)
    with torch.no_grad():
        model[2].weight.copy_(1e-6 * torch.tensor([[1.0], [-1.0]]).expand(2, 4))
        model[2].bias.zero_()
    x = torch.full((1, 1, 2, 2), 0.5)
    assert not model(x).isfinite().all()
    assert ll.certify(model, x, 0.1, guarantee="deterministic").certified
    in32 = proved(model, x, 0.1, "float32")
    assert in32.margin().item() == -math.inf and in32.execution_error is not None
    assert in32.execution_error.isinf().all()
    assert ll.certify(model, x, 0.1, guarantee="deterministic", execution="float64").certified


def settings_of_torch() -> dict[str, Callable[[nn.Module, Tensor], Tensor]]:
    def by_samples(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([model(one) for one in x.split(1)])

    def channels_last(model: nn.Module, x: Tensor) -> Tensor:
        return copy.deepcopy(model).to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )

    def one_thread(model: nn.Module, x: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            return model(x)
        finally:
            torch.set_num_threads(threads)

    def without_onednn(model: nn.Module, x: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return model(x)

    def compiled(model: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(model)(x)

    return {f.__name__: f for f in (by_samples, channels_last, one_thread, without_onednn, compiled)}


@pytest.mark.parametrize("how", settings_of_torch())
def test_however_it_runs(how: str) -> None:
    g = generator(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), ll.nn.MaxMin(),
        nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval().requires_grad_(False)  # fmt: skip
    x = torch.rand(4, 3, 16, 16, generator=g)
    bounds = proved(model, x, 0.05, "float32")
    assert bounds.execution_error is not None
    for point in inside(x, 0.05, 3, 1):
        off = (settings_of_torch()[how](model, point).double() - exact(model, point)).abs()
        assert (off <= bounds.execution_error).all()
    assert bounds.execution_error.max() < 0.05


def test_more_digits_cost_less() -> None:
    model, x = in_float32(ZOO["dense, clipped-relu"][0]), zoo_input("dense, clipped-relu", 3).float()
    real, in64, in32 = (proved(model, x, EPS, execution).margin() for execution in ("real", "float64", "float32"))
    assert (in32 < in64).all() and (in64 < real).all()
    torch.testing.assert_close(in64, real, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(in32, real, rtol=1e-2, atol=1e-2)


def test_bytes_have_the_ball_of_their_quotients() -> None:
    model = in_float32(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    image = torch.randint(256, (3, 3, 2, 2), generator=generator(0), dtype=torch.uint8)
    bounds = proved(model, image, EPS, "real")
    x = image.float() / 255
    off = (image.double() / 255 - x.double()).flatten(1).norm(dim=1)
    assert (bounds.eps >= EPS + off).all() and (bounds.eps <= EPS + 1e-6).all()
    torch.testing.assert_close(bounds.margin(), proved(model, x, EPS, "real").margin(), rtol=1e-5, atol=1e-5)
    assert ll.certified_radius(model, image, max_eps=0.1).dtype == torch.float64
    estimate = ll.local_bounds(model, image, EPS)
    assert estimate.logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"execution": "bf16"}, r"execution: got 'bf16', want one of 'real', 'float64', 'float32'"),
        ({"execution": "float32", "guarantee": "estimate"}, r"execution: got 'float32' with guarantee='estimate'"),
    ],
)
def test_errors(more: dict[str, str], message: str) -> None:
    model = in_float32(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=message):
        ll.certify(model, torch.rand(2, 4), EPS, **more)  # type: ignore[arg-type]


def test_a_network_in_float64_does_not_run_in_float32() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match=r"execution: got 'float32' and a network in torch.float64, want model.float"):
        ll.certify(model, torch.rand(2, 4).double(), EPS, execution="float32")


def test_rules_of_ones_own_speak_of_float64_alone() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (1 + x.abs())

    @ll.rule(Half)
    def _(at: ll.rules.Site, module: nn.Module) -> ll.rules.Lipschitz:
        return ll.rules.Lipschitz(module, error=1e-14)

    try:
        model = nn.Sequential(nn.Linear(4, 3), Half(), nn.Linear(3, 2)).eval()
        x = torch.rand(2, 4)
        assert ll.certify(model, x, 1e-3, execution="float64").execution == "float64"
        with pytest.raises(ll.UnsupportedModuleError, match=r"what float64 does to it, not torch.float32"):
            ll.certify(model, x, 1e-3, execution="float32")
    finally:
        del ll.rules.RULES[Half]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh, torch.sigmoid, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.mish, F.elu,
        lambda x: F.celu(x, 0.7), F.hardswish, F.hardsigmoid, lambda x: F.leaky_relu(x, 0.3),
        lambda x: F.hardtanh(x, -0.3, 0.1), lambda x: x.clamp(-0.7, 0.1),
    ],
    ids=lambda f: getattr(f, "__name__", "a function").strip("<>"),
)  # fmt: skip
def test_activations_in_float32_are_as_right_as_assumed(function: Callable[[Tensor], Tensor]) -> None:
    g = generator(0)
    sizes = 2.0 ** (torch.rand(10**6, generator=g) * 60 - 40)
    x = torch.cat([sizes, -sizes, torch.linspace(-30, 30, 10**6)])
    real = function(x.double())
    off = (function(x).double() - real).abs()
    assert (off <= COMPUTED_ERROR * 2.0**-24 * (1 + real.abs())).all()


@pytest.mark.parametrize("bounds", [ll.local_bounds, ll.global_bounds])
@pytest.mark.parametrize("execution", ["float64", "float32"])
def test_no_samples_and_no_radius(execution: str, bounds: Callable[..., ll.ProvedBounds]) -> None:
    model = in_float32(ZOO["dense, clipped-relu"][0])
    more = {"guarantee": "deterministic", "execution": execution}
    assert bounds(model, torch.rand(0, 6), EPS, **more).margin().shape == (0,)
    x = torch.cat([torch.zeros(1, 6), zoo_input("dense, clipped-relu", 3).float()])
    point, real = bounds(model, x, 0.0, **more), exact(model, x)
    clean = real.topk(2, 1).values
    gap = clean[:, 0] - clean[:, 1]
    assert (point.margin() < gap).all()
    torch.testing.assert_close(point.margin(), gap, rtol=1e-3, atol=1e-4)
