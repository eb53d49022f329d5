"""ONNX graphs as functions of torch: what each operator is, by name, in terms of functions that have rules."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import onnx
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from .nn import clipped_relu, maxmin

_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Sizes(list[Any]):
    """A list of sizes: numbers, or nodes of numbers."""


# What an input of a node can be: a tensor of the graph, a constant, sizes, or one that is left out.
Given = fx.Node | Tensor | _Sizes | None
Operator = Callable[["_Reader", list[Given], dict[str, Any]], Any]
OPERATORS: dict[str, Operator] = {}


def read(model: onnx.ModelProto) -> nn.Module:
    """The graph of ``model`` as a module, in eval mode. ValueError, by node, for what cannot be read."""
    proto = onnx.shape_inference.infer_shapes(model).graph
    constants = {each.name: _tensor(each) for each in proto.initializer}
    inputs = [each.name for each in proto.input if each.name not in constants]
    if len(inputs) != 1 or len(proto.output) != 1:
        raise ValueError(f"path: got {len(inputs)} inputs and {len(proto.output)} outputs, want one of each")
    shapes = {each.name: each.type.tensor_type for each in (*proto.input, *proto.value_info, *proto.output)}
    reader = _Reader({id(tensor): name for name, tensor in constants.items()})
    values: dict[str, Given] = {"": None, **constants, inputs[0]: reader.graph.placeholder("x")}

    def known(name: str, value: Given) -> None:
        values[name] = value
        if isinstance(value, fx.Node) and name in shapes and shapes[name].HasField("shape"):
            reader.shapes[value] = [each.dim_value for each in shapes[name].shape.dim]

    known(inputs[0], values[inputs[0]])
    for node in proto.node:
        given = [values[each] for each in node.input]
        values.update(dict.fromkeys(node.output))  # of several, those that have no counterpart stay without a value
        if given and all(isinstance(each, Tensor) for each in given):
            evaluator = ReferenceEvaluator(node, opsets={each.domain: each.version for each in model.opset_import})
            found = evaluator.run(None, {name: _constant(values[name], name).numpy() for name in node.input})
            values.update(zip(node.output, (torch.from_numpy(numpy.array(each)) for each in found), strict=True))
            continue
        where = f"node {node.name or node.output[0]!r} ({node.op_type})"
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise ValueError(f"{where}: got an operator that is not read, want one of {', '.join(sorted(OPERATORS))}")
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        try:
            results = OPERATORS[node.op_type](reader, given, attributes)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from error
        for name, value in zip(node.output, results if isinstance(results, tuple) else (results,), strict=False):
            known(name, value)
    reader.graph.output(reader.tensor(values[proto.output[0].name]))
    return fx.GraphModule(reader.root, reader.graph, class_name="FromOnnx").eval()


def _tensor(proto: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())


class _Reader:
    """The graph under construction, and the module that its weights are parameters of."""

    def __init__(self, names: dict[int, str]) -> None:
        """``names``: of constants, by their ids."""
        self.graph, self.root = fx.Graph(), nn.Module()
        self.shapes: dict[fx.Node, list[int]] = {}  # 0 for sizes that are open
        self._names = names
        self._kept: dict[int, tuple[Tensor, fx.Node]] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, tuple(self.tensor(a) if isinstance(a, Tensor) else a for a in args))

    def rank(self, value: fx.Node) -> int:
        if value not in self.shapes:
            raise ValueError("got a value of which the file does not say how many dimensions it has, want it to")
        return len(self.shapes[value])

    def sizes(self, value: fx.Node) -> list[Any]:
        """Numbers, where the file says them, and nodes; of the batch always a node."""
        known = [0, *self.shapes[value][1:]] if self.rank(value) else []
        return [size or self.graph.call_method("size", (value, axis)) for axis, size in enumerate(known)]

    def tensor(self, value: Given, *, learned: bool = True) -> fx.Node:
        """A tensor of the graph; a constant becomes a parameter, or a buffer if it is no weight or no float."""
        if isinstance(value, fx.Node):
            return value
        if not isinstance(value, Tensor):
            raise ValueError("got sizes, or nothing, for a tensor, want one")
        if id(value) not in self._kept:
            name = re.sub(r"\W", "_", self._names.get(id(value), f"constant{len(self._kept)}"))
            name = name if not hasattr(self.root, name) else f"{name}_{len(self._kept)}"
            if learned and value.is_floating_point():
                self.root.register_parameter(name, nn.Parameter(value))
            else:
                self.root.register_buffer(name, value)
            self._kept[id(value)] = value, self.graph.get_attr(name)
        return self._kept[id(value)][1]


def _operator(*names: str) -> Callable[[Operator], Operator]:
    def registered(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return registered


def _value(given: Given) -> fx.Node:
    if not isinstance(given, fx.Node):
        raise ValueError("got a constant for its first input, want a value of the network")
    return given


def _constant(given: Given, name: str) -> Tensor:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: got a value that is computed from the input, want a constant")
    return given


def _numbers(given: Given, name: str) -> list[int]:
    return [int(each) for each in _constant(given, name).flatten().tolist()]


def _axes(inputs: list[Given], attributes: dict[str, Any], at: int = 1) -> list[int]:
    """An attribute in older files, an input in newer ones."""
    if "axes" in attributes:
        return list(attributes["axes"])
    return _numbers(inputs[at], "axes") if len(inputs) > at else []


# ---- linear ----


@_operator("Gemm")
def _gemm(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if attributes.get("transA", 0):
        raise ValueError("transA: got 1, want 0")
    weight = _constant(inputs[1], "B")
    weight = weight if attributes.get("transB", 0) else weight.T
    weight = weight if attributes.get("alpha", 1.0) == 1.0 else weight * attributes["alpha"]
    if len(inputs) < 3 or inputs[2] is None:
        return r.call(F.linear, _value(inputs[0]), weight.contiguous())
    bias = _constant(inputs[2], "C")
    bias = bias if attributes.get("beta", 1.0) == 1.0 else bias * attributes["beta"]
    if bias.numel() not in (1, len(weight)):
        raise ValueError(f"C: got shape {tuple(bias.shape)}, want one number for each of the {len(weight)} outputs")
    return r.call(F.linear, _value(inputs[0]), weight.contiguous(), bias.reshape(-1).expand(len(weight)).clone())


@_operator("MatMul")
def _matmul(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    weight = _constant(inputs[1], "B")
    if weight.dim() != 2:
        raise ValueError(f"B: got {weight.dim()} dimensions, want 2")
    return r.call(F.linear, _value(inputs[0]), weight.T.contiguous())


def _padding(attributes: dict[str, Any], count: int) -> tuple[list[int], list[int]]:
    """Of each dimension at its begin and at its end."""
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad: got {automatic}, want NOTSET and pads")
    pads = list(attributes.get("pads", [0] * 2 * count))
    return pads[:count], pads[count:]


def _symmetric(attributes: dict[str, Any], count: int) -> list[int]:
    begin, end = _padding(attributes, count)
    if begin != end:
        raise ValueError(f"pads: got {begin + end}, want the same on both sides")
    return begin


@_operator("Conv")
def _conv(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x, weight = _value(inputs[0]), _constant(inputs[1], "W")
    count = weight.dim() - 2
    begin, end = _padding(attributes, count)
    if begin != end:
        x = r.call(F.pad, x, _interleaved(begin, end))
        begin = [0] * count
    strides, dilations = (list(attributes.get(name, [1] * count)) for name in ("strides", "dilations"))
    bias = _constant(inputs[2], "B") if len(inputs) > 2 and inputs[2] is not None else None
    return r.call(_CONVOLUTIONS[count], x, weight, bias, strides, begin, dilations, attributes.get("group", 1))


def _interleaved(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """As F.pad takes them, from the last dimension to the first."""
    return [number for pair in zip(reversed(begin), reversed(end), strict=True) for number in pair]


@_operator("ConvTranspose")
def _conv_transpose(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    weight = _constant(inputs[1], "W")
    count = weight.dim() - 2
    if "output_shape" in attributes:
        raise ValueError("output_shape: got some, want output_padding and pads")
    strides, dilations = (list(attributes.get(name, [1] * count)) for name in ("strides", "dilations"))
    extra = list(attributes.get("output_padding", [0] * count))
    bias = _constant(inputs[2], "B") if len(inputs) > 2 and inputs[2] is not None else None
    numbers = (strides, _symmetric(attributes, count), extra, attributes.get("group", 1), dilations)
    return r.call(_TRANSPOSED[count], _value(inputs[0]), weight, bias, *numbers)


@_operator("BatchNormalization")
def _batch_normalization(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if attributes.get("training_mode", 0):
        raise ValueError("training_mode: got 1, want 0")
    scale, shift, mean, variance = (_constant(each, "statistics") for each in inputs[1:5])
    eps = attributes.get("epsilon", 1e-5)
    statistics = (r.tensor(each, learned=False) for each in (mean, variance))
    return r.call(F.batch_norm, _value(inputs[0]), *statistics, scale, shift, False, 0.0, eps)


@_operator("AveragePool")
def _average_pool(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    kernel = list(attributes["kernel_shape"])
    if any(number != 1 for number in attributes.get("dilations", [])):
        raise ValueError(f"dilations: got {attributes['dilations']}, want ones")
    padding = _symmetric(attributes, len(kernel))
    counted = bool(attributes.get("count_include_pad", 0)) or not any(padding)
    strides, ceil = list(attributes.get("strides", [1] * len(kernel))), bool(attributes.get("ceil_mode", 0))
    return r.call(_AVERAGES[len(kernel)], _value(inputs[0]), kernel, strides, padding, ceil, counted)


@_operator("MaxPool")
def _max_pool(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    kernel = list(attributes["kernel_shape"])
    strides, dilations = (list(attributes.get(name, [1] * len(kernel))) for name in ("strides", "dilations"))
    padding, ceil = _symmetric(attributes, len(kernel)), bool(attributes.get("ceil_mode", 0))
    return r.call(_MAXIMA[len(kernel)], _value(inputs[0]), kernel, strides, padding, dilations, ceil)


@_operator("GlobalAveragePool")
def _global_average_pool(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x = _value(inputs[0])
    return r.call(torch.mean, x, list(range(2, r.rank(x))), True)


@_operator("ReduceMean")
def _reduce_mean(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    return r.call(torch.mean, _value(inputs[0]), _axes(inputs, attributes), bool(attributes.get("keepdims", 1)))


@_operator("ReduceSum")
def _reduce_sum(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    return r.call(torch.sum, _value(inputs[0]), _axes(inputs, attributes), bool(attributes.get("keepdims", 1)))


def _binary(function: Callable[..., Any]) -> Operator:
    def build(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
        return r.call(function, *(r.tensor(each) for each in inputs))

    return build


OPERATORS.update(Add=_binary(torch.add), Sub=_binary(torch.sub), Mul=_binary(torch.mul), Div=_binary(torch.div))
OPERATORS.update(Neg=_binary(torch.neg))


@_operator("Sum")
def _sum(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    total = r.tensor(inputs[0])
    for each in inputs[1:]:
        total = r.call(torch.add, total, r.tensor(each))
    return total


# ---- activations ----


def _activation(function: Callable[..., Any], **defaults: float) -> Operator:
    """``defaults``: of the attributes that the function takes, in its order."""

    def build(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
        return r.call(function, _value(inputs[0]), *(attributes.get(name, own) for name, own in defaults.items()))

    return build


OPERATORS.update(
    Relu=_activation(F.relu),
    LeakyRelu=_activation(F.leaky_relu, alpha=0.01),
    Elu=_activation(F.elu, alpha=1.0),
    Celu=_activation(F.celu, alpha=1.0),
    Sigmoid=_activation(torch.sigmoid),
    Tanh=_activation(torch.tanh),
    Softplus=_activation(F.softplus),
    HardSwish=_activation(F.hardswish),
    Mish=_activation(F.mish),
    Abs=_activation(torch.abs),
)


@_operator("Gelu")
def _gelu(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    # by its name, which F.gelu takes alone
    return r.graph.call_function(
        F.gelu, (_value(inputs[0]),), {"approximate": attributes.get("approximate", b"none").decode()}
    )


@_operator("Clip")
def _clip(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x = _value(inputs[0])
    given = [inputs[at] if len(inputs) > at else None for at in (1, 2)]
    low, high = (None if each is None else _constant(each, "limit") for each in given)
    low = torch.tensor(attributes["min"]) if "min" in attributes else low
    high = torch.tensor(attributes["max"]) if "max" in attributes else high
    if low is not None and high is not None and float(low) == 0 and float(high) >= 0:
        return r.call(clipped_relu, x, high)
    return r.call(torch.clamp, x, None if low is None else float(low), None if high is None else float(high))


def _extremum(limit: str, function: Callable[..., Any]) -> Operator:
    def build(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
        constants = [each for each in inputs if isinstance(each, Tensor)]
        values = [_value(each) for each in inputs if not isinstance(each, Tensor)]
        if len(inputs) != 2 or not values:
            raise ValueError(f"got {len(values)} values and {len(constants)} constants, want two, one a value")
        if not constants:
            return r.call(function, *values)
        of_relu = values[0].target is F.relu
        if limit == "max" and of_relu and bool((constants[0] >= 0).all()):  # min(relu(z), t), with the masks of both
            return r.call(clipped_relu, values[0].args[0], constants[0])
        return r.graph.call_function(torch.clamp, (values[0],), {limit: r.tensor(constants[0])})

    return build


OPERATORS.update(Min=_extremum("max", torch.minimum), Max=_extremum("min", torch.maximum))


# ---- rearrangements ----


@_operator("Identity", "Dropout")
def _identity(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    return inputs[0]


@_operator("Constant")
def _constant_node(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if "value" in attributes:
        return _tensor(attributes["value"])
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if name in attributes:
            return torch.tensor(attributes[name])
    raise ValueError(f"got {', '.join(attributes)}, want a tensor or numbers")


@_operator("Flatten")
def _flatten(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if attributes.get("axis", 1) != 1:
        raise ValueError(f"axis: got {attributes['axis']}, want 1")
    return r.call(torch.flatten, _value(inputs[0]), 1)


@_operator("Shape")
def _shape(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x = _value(inputs[0])
    sizes = r.sizes(x)
    return _Sizes(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))])


@_operator("Gather")
def _gather(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    sizes, at = inputs[0], _constant(inputs[1], "indices")
    if not isinstance(sizes, _Sizes):
        raise ValueError("got a value of the network, want sizes")
    found = [sizes[each] for each in at.flatten().tolist()]
    return torch.tensor(found).view(at.shape) if all(isinstance(each, int) for each in found) else _Sizes(found)


@_operator("Reshape")
def _reshape(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x, given = _value(inputs[0]), inputs[1]
    shape: list[Any] = list(given) if isinstance(given, _Sizes) else _numbers(given, "shape")
    if not attributes.get("allowzero", 0):
        shape = [r.graph.call_method("size", (x, at)) if size == 0 else size for at, size in enumerate(shape)]
    if len(shape) < 2:
        raise ValueError(f"shape: got {shape}, want the batch and something behind it")
    # a batch that the file fixes, or leaves to be found, is the batch; where it is not, the sizes do not fit
    shape[0] = r.graph.call_method("size", (x, 0))
    return r.call(torch.reshape, x, tuple(shape))


@_operator("Transpose")
def _transpose(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    order = list(attributes.get("perm", []))
    if not order or order[0] != 0:
        raise ValueError(f"perm: got {order or 'none'}, want one that leaves the batch first")
    return r.call(torch.permute, _value(inputs[0]), order)


@_operator("Squeeze")
def _squeeze(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    axes = _axes(inputs, attributes)
    if not axes:
        raise ValueError("axes: got none, want some")
    return r.call(torch.squeeze, _value(inputs[0]), tuple(axes))


@_operator("Unsqueeze")
def _unsqueeze(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    axes = _axes(inputs, attributes)
    if isinstance(inputs[0], _Sizes):  # a number as a list of one
        return inputs[0]
    value = _value(inputs[0])
    for axis in sorted(axes):
        value = r.call(torch.unsqueeze, value, axis)
    return value


@_operator("Concat")
def _concat(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    axis = attributes["axis"]
    if any(isinstance(each, _Sizes) for each in inputs):
        return _Sizes([n for each in inputs for n in (each if isinstance(each, _Sizes) else _numbers(each, "sizes"))])
    values = [_value(each) for each in inputs]
    if axis == 1 and [each.target for each in values] == [torch.maximum, torch.minimum]:
        (one, first), (other, second) = (_half(r, each) for each in values[0].args)
        if values[0].args == values[1].args and one is other is not None and (first, second) == (0, 1):
            return r.call(maxmin, one)
    return r.call(torch.cat, values, axis)


def _half(r: _Reader, value: Any) -> tuple[fx.Node | None, int]:
    """Of what ``value`` is the first or second half of the channels, and which; or of nothing."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None, 0
    whole: Any
    at: Any
    whole, at = value.args
    if isinstance(at, int):
        whole, parts, axis = whole.args
        equal = parts == 2 if isinstance(parts, int) else len(parts) == 2 and parts[0] == parts[1]
        return (whole, at) if equal and axis == 1 else (None, 0)
    channels = r.shapes.get(whole, [0, 0])[1]
    if len(at) == 2 and channels and at[1].step == 1:
        for which, half in enumerate((range(channels // 2), range(channels // 2, channels))):
            if range(*at[1].indices(channels)) == half:
                return whole, which
    return None, 0


@_operator("Slice")
def _slice(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if "starts" in attributes:  # of older files
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = _numbers(inputs[1], "starts"), _numbers(inputs[2], "ends")
        axes = _numbers(inputs[3], "axes") if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
        steps = _numbers(inputs[4], "steps") if len(inputs) > 4 else [1] * len(starts)
    if min(steps) < 1 or min(axes) < 1:
        raise ValueError(f"axes, steps: got {axes} and {steps}, want axes behind the batch and steps forward")
    chosen = [slice(None)] * (max(axes) + 1)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen[axis] = slice(start, end, step)
    return r.call(operator.getitem, _value(inputs[0]), tuple(chosen))


@_operator("Split")
def _split(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    x, axis = _value(inputs[0]), attributes.get("axis", 0)
    if "num_outputs" in attributes:
        count = attributes["num_outputs"]
        parts = r.call(torch.chunk, x, count, axis)
    else:
        sizes = list(attributes["split"]) if "split" in attributes else _numbers(inputs[1], "split")
        count, parts = len(sizes), r.call(torch.split, x, sizes, axis)
    return tuple(r.call(operator.getitem, parts, k) for k in range(count))


@_operator("Pad")
def _pad(r: _Reader, inputs: list[Given], attributes: dict[str, Any]) -> Any:
    if attributes.get("mode", b"constant") != b"constant" or len(inputs) > 3:
        raise ValueError("mode, axes: got others, want a constant one of all dimensions")
    pads = list(attributes["pads"]) if "pads" in attributes else _numbers(inputs[1], "pads")
    given = _constant(inputs[2], "value") if len(inputs) > 2 and inputs[2] is not None else torch.zeros(())
    if float(given) or attributes.get("value", 0.0):
        raise ValueError("value: got another than 0, want 0")
    rank = len(pads) // 2
    if pads[0] or pads[rank]:
        raise ValueError("pads: got some of the batch, want none")
    return r.call(F.pad, _value(inputs[0]), _interleaved(pads[1:rank], pads[rank + 1 :]))
