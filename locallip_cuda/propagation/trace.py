"""What ``model(x)`` runs, recorded by running it: a graph of the functions that its tensors go through.

The model is called on a :class:`Value` in place of its input, a tensor with a shape and no numbers, and every function
of torch that is called on one is noted. So what is recorded is what runs: an overridden ``forward``, a hook, a weight
that a parametrisation computes, a module that stands in the model twice, a function that somebody replaced. Shapes can
be read, and the program may depend on them; numbers cannot.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


class UntraceableError(TypeError):
    """A model does with its values what no graph of functions can say; the message names the module's path."""


@dataclass(eq=False)
class Node:
    """One function of the graph: its arguments, in which the values that it takes stand as nodes.

    function: as torch dispatches it; None for the model's input, and for ``args[1]``, an index, of what ``args[0]``
    returns. path: of the module in whose ``forward`` it was called. shape: of its result, the batch first.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    shape: torch.Size


# Read off a value without computing with it.
_READ = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "grad_fn")
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.get_device,
    Tensor.element_size,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}

# Would need the numbers.
_NUMBERS = {
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.data_ptr,
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
}


class Value(Tensor):
    """A tensor of a shape, a dtype and a device, and of no numbers; the functions called on it are recorded."""

    node: Node
    _recorder: _Recorder
    _meta: Tensor

    @staticmethod
    def __new__(cls, recorder: _Recorder, node: Node, meta: Tensor) -> Value:
        value: Value = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=recorder.device
        )
        value.node, value._recorder, value._meta = node, recorder, meta
        recorder.alive.append(weakref.ref(value))
        return value

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Value(shape={tuple(self.node.shape)}, path={self.node.path!r})"

    def __len__(self) -> int:
        return self.node.shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        value = next(v for v in _values((args, kwargs or {})))
        return value._recorder.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        value = next(_values((args, kwargs or {})), None)
        path = "" if value is None else value._recorder.path()
        raise UntraceableError(f"{_at(path)}: calls {func} below torch's functions, where it cannot be recorded")


class Trace:
    """The graph of a model: ``output`` and all nodes that it needs, in the order in which they ran."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        """TypeError, UntraceableError: by path, where ``model(x)`` is no graph of functions of its input."""
        recorder = _Recorder(model, x.device)
        self.input = Node(None, (), {}, "", x.shape)
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        output = model(Value(recorder, self.input, meta))
        if not isinstance(output, Value):
            raise UntraceableError(f"model: returns {type(output).__name__}, want one tensor that its input went into")
        self.output = output.node
        needed = {id(self.output)}
        self.nodes: list[Node] = []
        for node in reversed(recorder.nodes):
            if id(node) in needed:
                self.nodes.append(node)
                needed |= {id(other) for other in _nodes((node.args, node.kwargs))}
        self.nodes.reverse()

    def __call__(self, x: Tensor) -> Tensor:
        """What the recorded functions make of ``x``, of the shape that was recorded."""
        found: dict[int, Any] = {id(self.input): x}

        def filled(item: Any) -> Any:
            return found[id(item)] if isinstance(item, Node) else item

        for node in self.nodes:
            args, kwargs = _mapped(node.args, filled), _mapped(node.kwargs, filled)
            found[id(node)] = args[0][args[1]] if node.function is None else node.function(*args, **kwargs)
        result: Tensor = found[id(self.output)]
        return result


class _Recorder:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.nodes: list[Node] = []
        self.alive: list[weakref.ref[Value]] = []
        self._paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._modules = model  # an id stands for a module as long as it lives

    def path(self) -> str:
        """Of the innermost module whose method is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            own = id(frame.f_locals.get("self"))
            if own in self._paths:
                return self._paths[own]
            frame = frame.f_back
        return ""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path()
        if func in _NUMBERS:
            raise UntraceableError(
                f"{_at(path)}: {func.__name__} asks for the numbers of a value, so that what runs depends on them; "
                "want a program that depends on shapes alone"
            )
        if any(value._recorder is not self for value in _values((args, kwargs))):
            raise UntraceableError(f"{_at(path)}: {func.__name__} takes a value of another call of a model")
        written = self._written(func, args, kwargs)
        if written is not None:
            func, kwargs = _out_of_place(func, path), {**kwargs, **({"inplace": False} if "inplace" in kwargs else {})}
            self._check_alone(written, func, path)
        try:
            result = _shaped(func, args, kwargs)
        except NotImplementedError as error:
            raise UntraceableError(f"{_at(path)}: {func.__name__} cannot be recorded: {error}") from error
        given = _mapped((args, kwargs), lambda item: item.node if isinstance(item, Value) else item)
        if isinstance(result, Tensor):
            node = self._note(func, *given, path, result.shape)
            if written is None:
                return Value(self, node, result)
            written.node, written._meta = node, result
            return written
        if isinstance(result, (tuple, list)) and all(isinstance(item, Tensor) for item in result):
            several = self._note(func, *given, path, result[0].shape)
            return type(result)(
                Value(self, self._note(None, (several, i), {}, path, item.shape), item) for i, item in enumerate(result)
            )
        raise UntraceableError(f"{_at(path)}: {func.__name__} returns {type(result).__name__}, want tensors")

    def _note(self, *fields: Any) -> Node:
        self.nodes.append(Node(*fields))
        return self.nodes[-1]

    def _written(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | None:
        """The value that the call writes over."""
        name = func.__name__
        in_place = kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__"))
        if in_place or (name.startswith("__i") and name in _IN_PLACE_OPERATORS):
            if isinstance(args[0], Value):
                return args[0]
            raise UntraceableError(f"{_at(self.path())}: {name} writes a value of the model into another tensor")
        if name == "__setitem__" or kwargs.get("out") is not None:
            raise UntraceableError(f"{_at(self.path())}: {name} writes into a tensor, want functions that return one")
        return None

    def _check_alone(self, written: Value, func: Callable[..., Any], path: str) -> None:
        """Nothing else that lives may show what is written over ``written``."""
        storage = written._meta.untyped_storage()._cdata
        self.alive = [ref for ref in self.alive if ref() is not None]
        for ref in self.alive:
            other = ref()
            if other is not None and other is not written and other._meta.untyped_storage()._cdata == storage:
                raise UntraceableError(
                    f"{_at(path)}: {func.__name__} in place writes over a tensor that a view, or another value, shows "
                    "too; want it out of place"
                )


_IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow", "matmul")}


def _out_of_place(func: Callable[..., Any], path: str) -> Callable[..., Any]:
    """The function that returns what ``func`` would write."""
    name = func.__name__
    if name in _IN_PLACE_OPERATORS:
        name = f"__{name[3:]}"
    elif name.endswith("_"):
        name = name[:-1]
    else:
        return func  # with inplace=False
    found = getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(nn.functional, name, None)
    if found is None:
        raise UntraceableError(f"{_at(path)}: {func.__name__} has no form that is not in place, want one")
    return found  # type: ignore[no-any-return]


def _meta_of(item: Tensor) -> Tensor:
    return item._meta if isinstance(item, Value) else item.detach()


# The results of functions, without numbers, by the shapes of what they take: torch's own answer takes its time.
_known: dict[Any, tuple[type | None, list[tuple[torch.Size, tuple[int, ...], torch.dtype, int, int]]]] = {}
_KNOWN_AT_MOST = 4096


def _shaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` returns, on torch's device without numbers; a view shares the storage of what it is a view of."""
    given = [_meta_of(item) for item in _leaves((args, kwargs)) if isinstance(item, Tensor)]
    storages = [each.untyped_storage()._cdata if each.is_meta else None for each in given]
    key = func, _key(args), _key(kwargs), tuple(storages.index(storage) for storage in storages)
    if key not in _known:
        remaining = iter(given)
        metas = _mapped((args, kwargs), lambda item: next(remaining).to("meta") if isinstance(item, Tensor) else item)
        result = func(*metas[0], **metas[1])
        several = type(result) if isinstance(result, (tuple, list)) else None
        results = list(result) if several else [result]
        if not all(isinstance(each, Tensor) and each.is_meta for each in results):
            return result
        facts = []
        for each in results:
            own = each.untyped_storage()._cdata
            shared = storages.index(own) if own in storages else -1
            facts.append((each.shape, each.stride(), each.dtype, each.storage_offset(), shared))
        if len(_known) >= _KNOWN_AT_MOST:
            _known.clear()
        if sum(fact[4] < 0 for fact in facts) > 1 and len({e.untyped_storage()._cdata for e in results}) < len(results):
            return result  # they share a storage of their own
        _known[key] = several, facts
    kind, facts = _known[key]
    found = []
    for shape, stride, dtype, offset, shared in facts:
        if shared < 0:
            found.append(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
        else:
            found.append(torch.as_strided(given[shared], shape, stride, offset))
    return found[0] if kind is None else kind(found)


def _key(item: Any) -> Any:
    """Equal for arguments of which torch's functions make results of the same shapes."""
    if isinstance(item, Tensor):
        meta = _meta_of(item)
        return Tensor, meta.shape, meta.stride(), meta.dtype, meta.storage_offset()
    if isinstance(item, (tuple, list)):
        return type(item), tuple(_key(each) for each in item)
    if isinstance(item, dict):
        return tuple((name, _key(each)) for name, each in item.items())
    if isinstance(item, slice):
        return slice, item.start, item.stop, item.step
    return type(item), item if item.__hash__ is not None else repr(item)


def _at(path: str) -> str:
    return f"model.{path}" if path else "model"


def _mapped(item: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of everything in nested tuples, lists and dicts."""
    if isinstance(item, (tuple, list)) and type(item) in (tuple, list):
        return type(item)(_mapped(each, function) for each in item)
    if isinstance(item, dict):
        return {name: _mapped(each, function) for name, each in item.items()}
    return function(item)


def _leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, (tuple, list)):
        for each in item:
            yield from _leaves(each)
    elif isinstance(item, dict):
        yield from _leaves(list(item.values()))
    else:
        yield item


def _values(item: Any) -> Iterator[Value]:
    return (each for each in _leaves(item) if isinstance(each, Value))


def _nodes(item: Any) -> Iterator[Node]:
    return (each for each in _leaves(item) if isinstance(each, Node))
