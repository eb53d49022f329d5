"""Exported networks are torch alone and compute the same bits; networks from ONNX compute what the file says."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import locallip_cuda as ll

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")


class Own(nn.Module):
    """A forward of one's own: functions of this package, a skip, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.threshold = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = ll.nn.maxmin(self.stem(x))
        x = ll.nn.clipped_relu(x + self.conv(x), self.threshold)
        return self.head(F.avg_pool2d(self.conv(x), 2).flatten(1))


def sequential() -> nn.Module:
    return nn.Sequential(
        ll.nn.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        ll.nn.ClippedReLU((8, 3, 3), 0.5 * torch.rand(8, 3, 3)),
        nn.Flatten(),
        nn.Linear(72, 16),
        ll.nn.MaxMin(),
        parametrizations.weight_norm(nn.Linear(16, 16)),
        ll.nn.ClippedMaxMin(8, 0.3 * torch.rand(8), -0.3 * torch.rand(8)),
        nn.Linear(16, 4),
    ).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"sequential": sequential, "own": Own}
X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]()


def test_exported_is_the_same_function(model: nn.Module) -> None:
    plain = ll.export(model)
    assert torch.equal(plain(X), model(X)) and plain.training == model.training
    assert torch.equal(plain(X.double().float()[:1]), model(X[:1]))


def test_exported_is_of_torch_alone(model: nn.Module) -> None:
    plain = ll.export(model)
    assert all(type(module).__module__.startswith("torch.") for module in list(plain.modules())[1:])
    assert isinstance(plain, torch.fx.GraphModule) and "locallip" not in plain.code


def test_exported_loads_without_the_package(model: nn.Module, tmp_path: Path) -> None:
    torch.save((ll.export(model), X, model(X)), tmp_path / "plain.pt")
    program = (
        "import sys; sys.modules['locallip_cuda'] = None; import torch; torch.set_num_threads(1)\n"
        "plain, x, y = torch.load('plain.pt', weights_only=False); assert torch.equal(plain(x), y)"
    )
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_state_goes_in_and_out() -> None:
    torch.manual_seed(0)
    model, other = Own(), Own()
    plain = ll.export(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    plain.load_state_dict(other.state_dict())
    assert torch.equal(plain(X), other(X))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(X), other(X))


def test_exported_is_a_copy(model: nn.Module) -> None:
    before = model(X)
    plain = ll.export(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "model: got a forward that torch.fx cannot record"),
        (lambda x: foreign(x), r"model: calls \S*test_interchange.foreign, want functions of torch alone"),
    ],
)
def test_what_cannot_be_exported_is_an_error(forward: Callable[[Tensor], Tensor], message: str) -> None:
    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    with pytest.raises(ValueError, match=message):
        ll.export(Program())


def foreign(x: Tensor) -> Tensor:
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(foreign, (x,), x)  # type: ignore[no-any-return]
    return x


# ---- ONNX ----


def to_onnx(model: nn.Module, x: Tensor, path: Path, *, dynamo: bool = False) -> None:
    """With the batch of ``x``, which files that torch writes of a graph module fix."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.onnx.export(model, (x,), str(path), dynamo=dynamo, input_names=["x"], verbose=False)


def by_reference(path: Path, x: Tensor) -> Tensor:
    (found,) = reference.ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_network_is_an_onnx_file(model: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    to_onnx(ll.export(model), X, tmp_path / "model.onnx", dynamo=dynamo)
    torch.testing.assert_close(by_reference(tmp_path / "model.onnx", X), model(X).detach())


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_file_comes_back_with_the_same_bounds(model: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    model = model.eval()
    if isinstance(model, nn.Sequential):
        model = model[:7].append(nn.Linear(16, 4))  # clipped MaxMin comes back as what it is of, without bounds
    to_onnx(ll.export(model), X[:2], tmp_path / "model.onnx", dynamo=dynamo)
    again = ll.from_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(again(X), model(X))
    one, other = (ll.local_bounds(each, X, 0.05, iterations=30) for each in (model, again))
    torch.testing.assert_close(other.lipschitz, one.lipschitz, rtol=1e-3, atol=0)
    torch.testing.assert_close(other.margin(), one.margin(), rtol=1e-2, atol=1e-3)
    proved = ll.certify(again, X[:2], 0.01, guarantee="deterministic")
    assert proved.margin.isfinite().all()


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
    "grouped": nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "transposed": nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "average pool": nn.AvgPool2d(3, 2, 1),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "global average": nn.AdaptiveAvgPool2d(1),
    "mean": Function(lambda x: x.mean((2, 3))),
    "sum": Function(lambda x: x.sum(3)),
    "view": Function(lambda x: x.view(x.size(0), -1)),
    "reshape": Function(lambda x: x.reshape(x.shape[0], 6, -1)),
    "permute": Function(lambda x: x.permute(0, 2, 3, 1)),
    "padded": nn.ZeroPad2d((1, 0, 2, 1)),
    "split": Function(lambda x: torch.cat(torch.split(x, [1, 2], 1)[::-1], 1)),
    "sliced": Function(lambda x: x[:, 1:, ::2, :-3]),
    "squeezed": Function(lambda x: x.unsqueeze(2).squeeze(2)),
    "clamped": Function(lambda x: x.clamp(-0.5, 0.7)),
    "clipped": Function(lambda x: torch.clamp(torch.relu(x), max=torch.full((3, 1, 1), 0.3))),
    "scaled": Function(lambda x: (x - torch.full((3, 1, 1), 0.5)) / torch.full((3, 1, 1), 2.0) + 2 * x),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "leaky": nn.LeakyReLU(0.2),
    "elu": nn.ELU(0.7),
    "celu": nn.CELU(1.5),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "abs": Function(torch.abs),
    "hardswish": nn.Hardswish(),
    "negative": Function(lambda x: -x),
    "batch norm": nn.BatchNorm2d(3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_operators_are_what_the_file_says_and_have_bounds(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flat = LAYERS[name](X).flatten(1).shape[1]
    model = nn.Sequential(LAYERS[name], nn.Flatten(), nn.Linear(flat, 3)).eval()
    path = tmp_path / "model.onnx"
    to_onnx(model, X[:2], path)
    again = ll.from_onnx(path)
    torch.testing.assert_close(again(X[:2]), by_reference(path, X[:2]))
    bounds = ll.local_bounds(again, X, 0.01)
    torch.testing.assert_close(bounds.logits, model(X))


def graph(nodes: list[Any], initializers: dict[str, Tensor], inputs: int = 1, opset: int = 18) -> bytes:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in initializers.items()]
    given = [helper.make_tensor_value_info(f"x{i}" if i else "x", kind, ["batch", 4]) for i in range(inputs)]
    result = helper.make_tensor_value_info("y", kind, ["batch", None])
    made = helper.make_graph(nodes, "graph", given, [result], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


NODE = onnx.helper.make_node


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing of the kind", "path: got .*, which is no valid ONNX file"),
        (graph([NODE("Sin", ["x"], ["y"])], {}), r"node 'y' \(Sin\): got an operator that is not read, want one of Ab"),
        (graph([NODE("Gemm", ["x", "w"], ["y"], transA=1)], {"w": torch.ones(4, 4)}), "transA: got 1, want 0"),
        (graph([NODE("Flatten", ["x"], ["y"], axis=0)], {}), "axis: got 0, want 1"),
        (graph([NODE("Transpose", ["x"], ["y"], perm=[1, 0])], {}), r"perm: got \[1, 0\], want one that leaves"),
        (graph([NODE("Add", ["x", "x1"], ["y"])], {}, inputs=2), "path: got 2 inputs and 1 outputs, want one of each"),
    ],
)
def test_what_cannot_be_read_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ll.from_onnx(tmp_path / "model.onnx")


def test_convolution_of_uneven_padding(tmp_path: Path) -> None:
    weight = torch.rand(2, 1, 3)
    nodes = [
        NODE("Unsqueeze", ["x", "axes"], ["z"]),
        NODE("Conv", ["z", "w"], ["c"], pads=[2, 1]),
        NODE("Flatten", ["c"], ["y"]),
    ]
    (tmp_path / "model.onnx").write_bytes(graph(nodes, {"w": weight, "axes": torch.tensor([1])}))
    x = torch.rand(3, 4)
    again = ll.from_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(again(x), by_reference(tmp_path / "model.onnx", x))
    assert ll.certify(again, x, 0.1, guarantee="deterministic").margin.isfinite().all()


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([NODE("Gelu", ["x"], ["y"])], {}),
        ([NODE("Gelu", ["x"], ["y"], approximate="tanh")], {}),
        ([NODE("Mish", ["x"], ["y"])], {}),
        ([NODE("Sum", ["x", "z", "x"], ["y"]), NODE("Relu", ["x"], ["z"])][::-1], {}),
        ([NODE("MatMul", ["x", "w"], ["y"])], {"w": torch.rand(4, 3)}),
        ([NODE("Relu", ["x"], ["z"]), NODE("Min", ["z", "t"], ["y"])], {"t": torch.tensor([0.5, 0.1, 0.0, 0.3])}),
        ([NODE("Relu", ["x"], ["z"]), NODE("Min", ["t", "z"], ["y"])], {"t": torch.tensor([0.5, -0.1, 0.0, 0.3])}),
        ([NODE("Max", ["x", "t"], ["y"])], {"t": torch.tensor([0.5, -0.1, 0.0, 0.3])}),
        ([NODE("Clip", ["x", "", "t"], ["y"])], {"t": torch.tensor(0.3)}),
        ([NODE("Identity", ["x"], ["z"]), NODE("Dropout", ["z"], ["y"])], {}),
    ],
)
def test_operators_by_hand(nodes: list[Any], constants: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(nodes, constants, opset=20))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    again = ll.from_onnx(path)
    torch.testing.assert_close(again(x), by_reference(path, x))
    torch.testing.assert_close(ll.local_bounds(again, x, 0.1).logits, again(x))


def test_gemm_with_factors_and_a_batch_that_the_file_fixes(tmp_path: Path) -> None:
    weight, bias = torch.rand(4, 6), torch.rand(1)
    shape = torch.tensor([1, -1])
    nodes = [NODE("Gemm", ["x", "w", "b"], ["z"], alpha=0.5, beta=3.0), NODE("Reshape", ["z", "s"], ["y"])]
    (tmp_path / "model.onnx").write_bytes(graph(nodes, {"w": weight, "b": bias, "s": shape}))
    x = torch.rand(3, 4)
    torch.testing.assert_close(ll.from_onnx(tmp_path / "model.onnx")(x), 0.5 * x @ weight + 3 * bias)


def test_a_missing_file_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        ll.from_onnx(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "locallip-cuda\[onnx\]"'):
        ll.from_onnx(tmp_path / "none.onnx")
    assert torch.equal(ll.export(nn.ReLU())(X), X.relu())  # which needs no onnx


def test_weights_from_a_file_are_parameters_under_its_names(tmp_path: Path) -> None:
    nodes = [NODE("Gemm", ["x", "layer.weight", "layer.bias"], ["y"], transB=1)]
    content = graph(nodes, {"layer.weight": torch.rand(6, 4), "layer.bias": torch.rand(6)})
    (tmp_path / "model.onnx").write_bytes(content)
    model = ll.from_onnx(tmp_path / "model.onnx")
    assert {"layer_weight"} <= {name for name, _ in model.named_parameters()}
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    ll.local_bounds(model, torch.rand(2, 4), 0.1).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("least", [0.0, -0.1])
def test_min_behind_relu_is_a_clipped_relu_where_it_can_be(least: float, tmp_path: Path) -> None:
    nodes = [NODE("Relu", ["x"], ["z"]), NODE("Min", ["z", "t"], ["y"])]
    (tmp_path / "model.onnx").write_bytes(graph(nodes, {"t": torch.tensor([0.5, least, 0.2, 0.3])}))
    called = {node.target for node in ll.from_onnx(tmp_path / "model.onnx").graph.nodes}
    assert (ll.nn.clipped_relu in called) == (least >= 0) and (torch.clamp in called) == (least < 0)
