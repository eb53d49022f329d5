"""The recorded graph computes what the model computes, gradients included; or there is an error by path."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, Normalize
from locallip_cuda.propagation.trace import Trace, UntraceableError


class Program(nn.Module):
    """A module whose forward is a function of itself and of x."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DenseBlock(nn.Module):
    """As torchvision's: it looks at what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        features.append(F.relu(self.first(torch.cat(features, 1))))
        return self.second(torch.cat(features, 1))


class ByShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3 and x.dim() == 4 and x.dtype == torch.float64 and len(x) == 2 and not x.is_cuda:
            x = x.mean((2, 3))
        for _ in range(x.size(1)):
            x = x / 2
        return x.view(x.size(0), -1)


def hooked(module: nn.Module, hook: str = "forward") -> nn.Module:
    if hook == "forward":
        module.register_forward_hook(lambda module, args, output: output * 3)
    else:
        module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return module


def with_own_forward() -> nn.Module:
    module = nn.Linear(8, 8)
    module.forward = lambda x: F.linear(x, module.weight).neg()  # type: ignore[method-assign]
    return module


def tied() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh(), layer)


def updates(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    kept = h + 0
    h.mul_(2)
    h += kept
    h.sub_(1).neg_()
    F.leaky_relu(h, 0.5, inplace=True)
    return h - kept


def u_net(self: Any, x: Tensor) -> Tensor:
    down = F.silu(self.down(x))
    up = self.up(F.gelu(self.bottom(down)))
    return torch.cat([up, x], dim=1).flatten(1)


def split(self: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    c, d = torch.split(a, [1, 3], dim=1)
    return torch.cat([b[:, :2], d.abs(), c, -b[:, 2:]], 1)


def unused(self: Any, x: Tensor) -> Tensor:
    self.a(x).relu()
    return x.clone()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            Normalize([0.5] * 3, [0.2] * 3),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(4).eval(),
            ClippedReLU((4, 8, 8)),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding="same", groups=2),
            ClippedMaxMin((2, 4, 4), 0.5, -0.5),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout().eval(),
            nn.Linear(16, 5),
        ),
        (3, 8, 8),
    ),
    "residual": (lambda: Residual(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)), (3, 6, 6)),
    "dense block": (DenseBlock, (3, 5, 5)),
    "u-net": (
        lambda: Program(
            u_net,
            down=nn.Conv2d(2, 4, 2, stride=2),
            bottom=nn.Conv2d(4, 4, 1),
            up=nn.ConvTranspose2d(4, 3, 2, stride=2),
        ),
        (2, 6, 6),
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Mish(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        (2, 9),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Softplus(), nn.MaxPool3d(2), nn.Flatten()),
        (2, 5, 5, 5),
    ),
    "layout": (
        lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), nn.PixelShuffle(2)),
        (3, 4, 4),
    ),
    "by shape": (ByShape, (3, 4, 4)),
    "tied": (tied, (8,)),
    "own forward": (with_own_forward, (8,)),
    "subclass": (lambda: Doubled(8, 3), (8,)),
    "forward hook": (lambda: hooked(nn.Linear(8, 3)), (8,)),
    "forward pre-hook": (lambda: hooked(nn.Linear(8, 3), "pre"), (8,)),
    "hook on the parent": (lambda: hooked(nn.Sequential(nn.Linear(8, 3), nn.ReLU())), (8,)),
    "in place": (lambda: Program(updates, a=nn.Linear(8, 8)), (8,)),
    "parts": (lambda: Program(split), (8,)),
    "unused": (lambda: Program(unused, a=nn.Linear(8, 8)), (8,)),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU()), (8,)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 5, 5)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)).eval(), (8,)),
    "older weight norm": (lambda: torch.nn.utils.weight_norm(nn.Linear(8, 8)), (8,)),
    "functional": (
        lambda: Program(
            lambda self, x: torch.einsum("bi,oi->bo", x, self.a.weight) @ self.a.weight.T, a=nn.Linear(8, 8)
        ),
        (8,),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_the_graph_computes_what_the_model_computes(name: str) -> None:
    build, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    Trace(model, torch.zeros(2, *sizes, dtype=torch.float64))
    trace = Trace(model, torch.zeros(2, *sizes, dtype=torch.float64))  # by shapes that are known from the first
    x = torch.randn(2, *sizes, dtype=torch.float64, requires_grad=True)
    expected, found = model(x), trace(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert trace.output.shape == expected.shape
    inputs = [x, *model.parameters()]
    grads = [torch.autograd.grad(y.sum(), inputs, allow_unused=True) for y in (found, expected)]
    for grad, wanted in zip(*grads, strict=True):
        assert (grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_nodes_name_the_module_and_leave_out_what_is_unused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8), nn.ReLU()))
    trace = Trace(model, torch.zeros(3, 8))
    assert [node.path for node in trace.nodes] == ["0", "1.0", "1.1", "1"]
    assert [node.shape for node in trace.nodes] == [(3, 8)] * 4
    assert trace.nodes[3].args == (trace.nodes[0], trace.nodes[2])
    unused_too = Trace(Program(unused, a=nn.Linear(8, 8)), torch.zeros(3, 8))
    assert len(unused_too.nodes) == 1


def test_a_change_of_the_model_is_in_its_next_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU()).eval()
    assert Trace(model, torch.zeros(1, 4)).nodes[1].kwargs["training"] is False
    model.train()
    assert Trace(model, torch.zeros(1, 4)).nodes[1].kwargs["training"] is True
    model[2].register_forward_hook(lambda module, args, output: output + 1)
    assert Trace(model, torch.zeros(1, 4)).nodes[-1].function.__name__ == "add"


def below(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.relu(x)


def through_a_view(x: Tensor) -> Tensor:
    view = x.flatten(1)
    view.relu_()
    return x.sum(2)


def assigned(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


OUTSIDE = torch.zeros(2, 3, 4)
ERRORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a branch on numbers": (lambda x: x if x.sum() > 0 else -x, "model.part: __bool__ asks for the numbers"),
    "item": (lambda x: x * x.max().item(), "model.part: item asks for the numbers"),
    "a list": (lambda x: x * x.tolist()[0], "model.part: tolist asks for the numbers"),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), "model.part: numpy asks for the numbers"),
    "an int": (lambda x: x * int(x.max()), "model.part: __int__ asks for the numbers"),
    "a view written over": (
        through_a_view,
        "model.part: sum takes a value that relu_, in place, has written over",
    ),
    "an assignment": (assigned, "model.part: __setitem__ writes into a tensor"),
    "out": (lambda x: torch.add(x, x, out=OUTSIDE), "model.part: add writes into a tensor"),
    "into another tensor": (lambda x: OUTSIDE.add_(x), "model.part: add_ writes a value of the model into another"),
    "below torch's functions": (below, "model.part: calls aten.relu.* below torch's functions"),
    "two results": (lambda x: (x, x), "model: returns tuple, want one tensor"),
    "a constant": (lambda x: torch.zeros(2, 3), "model: returns Tensor, want one tensor that its input went into"),
    "nonzero": (lambda x: x[x > 0], "model.part: __getitem__ cannot be recorded|numbers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_no_graph_is_an_error_by_path(name: str) -> None:
    function, message = ERRORS[name]
    part = Program(lambda self, x: function(x))
    with pytest.raises(UntraceableError, match=re.compile(message)):
        Trace(Program(lambda self, x: self.part(x), part=part), torch.zeros(2, 3, 4))


STEPS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.relu(),
    lambda x: x.relu_(),
    lambda x: x.mul_(0.5),
    lambda x: x.flip(1),
    lambda x: x.transpose(1, 2),
    lambda x: x[:, :2].repeat(1, 2, 1)[:, : x.shape[1]],
    lambda x: x.view(x.shape),
    lambda x: F.leaky_relu(x, 0.1, inplace=True),
    lambda x: F.pad(x, (1, 0))[..., 1:],
    lambda x: x.contiguous(),
)


@settings(max_examples=150, deadline=None)
@given(program=st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 5), st.booleans()), max_size=10))
def test_random_programs(program: list[tuple[int, int, bool]]) -> None:
    """Values are kept, used again, added and written over; where a view of what is written over lives, an error."""

    def run(self: Any, x: Tensor) -> Tensor:
        values = [x * 1]
        for step, index, adds in program:
            value = STEPS[step](values[index % len(values)])
            values.append(value + values[-1] if adds and value.shape == values[-1].shape else value)
        return torch.stack([value.flatten(1) for value in values]).sum(0)

    model, x = Program(run), torch.randn(2, 4, 4, dtype=torch.float64)
    try:
        expected = model(x)
    except RuntimeError:  # a view that its strides do not allow
        with pytest.raises(RuntimeError):
            Trace(model, x)
        return
    for _ in range(2):
        try:
            trace = Trace(model, x)
        except UntraceableError as error:
            assert "in place, has written over" in str(error)
            continue
        torch.testing.assert_close(trace(x), expected, rtol=0, atol=0)


class Average(nn.Module):
    """Its state is a value of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return x - self.mean


def written(update: Callable[[Tensor], Any], view: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """An update in place of a view, whose base is read afterwards."""

    def run(x: Tensor) -> Tensor:
        h = x * 1
        shown = view(h)
        shown = shown[0] if isinstance(shown, tuple) else shown
        update(shown)
        return h

    return run


def updated(shown: Tensor) -> None:
    shown += 1


def accumulated(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape)
    alias = total
    total += x
    return alias + 0 * x


def through_a_constant(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape)
    alias = total.view_as(x)
    alias.add_(x)
    return total + 0 * x


def counted(x: Tensor) -> Tensor:
    t = torch.zeros(())
    for _ in range(3):
        x = x + t
        t += 1
    return x


def filled(x: Tensor) -> Tensor:
    mask = torch.zeros(3, 4)
    shifted = x + mask
    mask[:, :2] = 1
    return shifted * mask


def swallowed(x: Tensor) -> Tensor:
    try:
        return x * int(x.sum())
    except Exception:
        return x


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = x.softmax(1)
    return weight * x


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ torch.full((4, 4), 1 / 3)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def in_place(update: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        h = x * 1
        update(h)
        return h + x

    return run


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "an operator that updates a view": written(updated, lambda h: h.flatten(1)),
    "an operator that updates a part": written(updated, lambda h: h.chunk(2, 2)),
    "a sum in a constant": accumulated,
    "a constant through a view": through_a_constant,
    "a comparison in place": in_place(lambda h: h.gt_(0)),
    "another dtype in place": in_place(lambda h: h.add_(torch.ones(4, dtype=torch.float64))),
    "another shape in place": in_place(lambda h: h.transpose_(1, 2)),
    "noise in place": in_place(lambda h: h.normal_(0, 1)),
    "requires_grad_": in_place(lambda h: h.requires_grad_()),
    "a constant that counts": counted,
    "a constant that is filled later": filled,
    "an error that is swallowed": swallowed,
    "a block without gradients": without_gradients,
    "autocast": under_autocast,
    "a function with its own gradient": Straight.apply,
    "requires_grad": lambda x: x if x.requires_grad else x + 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_recorded_wrongly_is_an_error(name: str) -> None:
    with pytest.raises(UntraceableError, match="^model: "):
        Trace(Program(lambda self, x: REFUSED[name](x)), torch.zeros(2, 3, 4))


def through_branches(x: Tensor) -> Tensor:
    h = torch.fft.fft(x).real
    return F.conv1d(h.abs() if h.is_complex() else h, torch.ones(2, 3, 1))


def flag(x: Tensor) -> Tensor:
    k = x > 0
    k &= x < 1
    return x * k


def flattened(self: Any, x: Tensor) -> Tensor:
    h = torch.flatten(self.a(x), 1)
    return self.r(h)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "real parts": lambda: Program(lambda self, x: through_branches(x)),
    "and in place": lambda: Program(lambda self, x: flag(x)),
    "flattened, then in place": lambda: Program(flattened, a=nn.Linear(4, 4), r=nn.ReLU(inplace=True)),
    "in sequence": lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True))).eval(),
    "to its own device": lambda: Program(lambda self, x: x.cpu().to(x.device).to("cpu", torch.float32) * 2),
    "zeros beside": lambda: Program(lambda self, x: x + x.new_zeros(x.shape, device=x.device) + torch.ones_like(x)),
    "named tuples": lambda: Program(lambda self, x: torch.cat([*x.aminmax(dim=1), torch.stack(x.max(1)[:1])[0]], 1)),
    "a constant shown": lambda: Program(lambda self, x: torch.ones(4).expand_as(x) * x),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_has_to_be_recorded(name: str) -> None:
    model, x = RIGHT[name](), torch.randn(2, 3, 4)
    for _ in range(2):
        found, expected = Trace(model, x.clone())(x.clone()), model(x.clone())
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_shapes_of_one_model_are_not_those_of_another() -> None:
    constant = torch.zeros(2, 3, 4)
    Trace(Program(lambda self, x: constant.view_as(x) + x), torch.zeros(2, 3, 4))
    with pytest.raises(UntraceableError, match="has written over"):
        Trace(Program(lambda self, x: written(lambda v: v.add_(1), lambda h: h.view_as(x))(x)), torch.zeros(2, 3, 4))

    number = torch.tensor(2)
    model = Program(lambda self, x: x[:, :, :number] / 1)
    for size in (2, 3):
        number.fill_(size)
        assert Trace(model, torch.zeros(2, 3, 4)).output.shape == (2, 3, size)


def test_no_value_is_left_behind() -> None:
    model = nn.Sequential(Average())
    with pytest.raises(UntraceableError, match="model.0: keeps a value of a call for later calls"):
        Trace(model, torch.zeros(2, 3, 4))
    assert torch.equal(model[0].mean, torch.zeros(4)) and type(model(torch.ones(2, 3, 4))) is Tensor
    kept: list[Tensor] = []

    def keep(self: Any, x: Tensor) -> Tensor:
        kept.append(x)
        return kept[0] + 1

    model = Program(keep)
    Trace(model, torch.zeros(1, 4))
    for again in (lambda: Trace(model, torch.zeros(1, 4)), lambda: kept[0] + 1):
        with pytest.raises(UntraceableError, match="takes a value of another call"):
            again()


def test_another_layout_than_recorded_is_an_error() -> None:
    trace = Trace(nn.ReLU(), torch.zeros(2, 3, 4))
    for x in (torch.zeros(2, 4, 3), torch.zeros(2, 4, 3).mT):
        with pytest.raises(ValueError, match=r"x: got shape .*, want those that were recorded"):
            trace(x)
