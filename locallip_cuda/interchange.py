"""Networks out of this package and into it: :func:`export` to plain torch, and :func:`from_onnx`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize, clipped_maxmin, clipped_relu, maxmin


def export(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that runs where this package is not installed: a ``torch.fx.GraphModule`` of modules of
    ``torch.nn`` and functions of torch.

    It computes what ``model`` does, bit for bit, in the mode that ``model`` is in. Thresholds of activations and
    numbers of ``Normalize`` keep their names, so that ``state_dict()`` goes from either one to the other, but for what
    ``forward`` does not use. Parametrised weights become what they are now. ``torch.save`` and ``torch.onnx.export``
    take it.

    Raises:
        ValueError: ``forward`` depends on the numbers of its input, calls functions that are not torch's, or has hooks.
    """
    own = copy.deepcopy(model)
    for name, module in own.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"model{'.' * bool(name)}{name}: has hooks, want none: they are no functions of torch")
        if parametrize.is_parametrized(module):
            _as_it_is(module)
    try:
        recorded = _PlainTracer().trace(own)
    except (fx.proxy.TraceError, TypeError, AttributeError) as error:
        raise ValueError(f"model: got a forward that torch.fx cannot record ({error}), want one that it can") from error
    graph = fx.Graph()  # one that does not know by whom it was recorded
    graph.output(graph.graph_copy(recorded, {}))
    for node in graph.nodes:
        node.type = None  # an annotation in the model's program, which may be of a name that is its own
        origin = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and origin.split(".")[0] not in ("torch", "_operator", "builtins", "math", ""):
            raise ValueError(f"model: calls {origin}.{node.target.__name__}, want functions of torch alone")
    return fx.GraphModule(own, graph, class_name="Exported").train(model.training)


def _as_it_is(module: nn.Module) -> None:
    """Parameters in place of parametrised ones. torch's own removal changes the class, which a copy has in common."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module._load_state_dict_pre_hooks.clear()  # of weight_norm, for the names of its older form
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _plain_clipped_relu(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.clamp(torch.relu(z), max=threshold)


def _plain_maxmin(z: Tensor) -> Tensor:
    a, b = _halves(z)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def _plain_clipped_maxmin(z: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    a, b = _halves(z)
    high = torch.clamp(torch.maximum(a, b), max=upper)
    return torch.cat([high, torch.clamp(torch.minimum(a, b), min=lower)], dim=1)


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    halves = torch.chunk(z, 2, dim=1)
    return halves[0], halves[1]


def _normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    per_channel = (-1,) + (1,) * (x.dim() - 2)
    return (x - mean.view(per_channel)) / std.view(per_channel)


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    clipped_relu: _plain_clipped_relu,
    maxmin: _plain_maxmin,
    clipped_maxmin: _plain_clipped_maxmin,
}


class _PlainTracer(fx.Tracer):
    """Records this package's modules and functions as what they are in torch's."""

    proxy_buffer_attributes = True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, ClippedReLU):
            return _plain_clipped_relu(args[0], m.threshold)
        if isinstance(m, MaxMin):
            return _plain_maxmin(args[0])
        if isinstance(m, ClippedMaxMin):
            return _plain_clipped_maxmin(args[0], m.upper, m.lower)
        if isinstance(m, Normalize):
            return _normalized(args[0], m.mean, m.std)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> Any:
        if kind == "call_function" and target in _PLAIN:
            return _PLAIN[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *more, **others)


def from_onnx(path: str | PathLike[str]) -> nn.Module:
    """The network of an ONNX file as a module that has bounds: of functions of torch, its weights parameters.

    One input with the batch first, one output. Read are the operators of feed-forward networks: Gemm, MatMul, Conv,
    ConvTranspose, BatchNormalization, pools, ReLU and other activations, Clip, Min and Max with constants, sums,
    concatenations, reshapes and the like. A batch that the file fixes may be of any size. What a certificate speaks of
    is the module that is returned; another runtime of the file may round otherwise. Needs ``onnx``.

    Raises:
        ImportError: onnx is not installed.   OSError: no such file.
        ValueError: no ONNX file, or an operator, or arguments of one, that are not read; by the node's name.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError('from_onnx: needs onnx, which is missing: pip install "locallip-cuda[onnx]"') from error
    from .onnx_nodes import read

    try:
        loaded = onnx.load(path)
        onnx.checker.check_model(loaded)
    except OSError:
        raise
    except Exception as error:  # of protobuf and of onnx, which have no base of their own
        raise ValueError(f"path: got {path!s}, which is no valid ONNX file ({error}), want one") from error
    return read(loaded)
