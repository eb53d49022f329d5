"""What ``model(x)`` runs, recorded by running it: a graph of the functions that its tensors go through.

The model is called on a :class:`Value` in place of its input, a tensor with a shape and no numbers, and every function
of torch that is called on one is noted. So what is recorded is what runs: an overridden ``forward``, a hook, a weight
that a parametrisation computes, a module that stands in the model twice, a function that somebody replaced. Shapes can
be read, and the program may depend on them; numbers cannot.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def at(path: str) -> str:
    """How messages name the module at ``path``."""
    return f"model.{path}" if path else "model"


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    # not asked while compiling, which Dynamo of torch 2.11 cannot trace: what it compiles for has autocast
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


class UntraceableError(RuntimeError):  # not a TypeError, which torch's operators take for "not implemented"
    """A model does with its values what no graph of functions can say; the message names the module's path."""


@dataclass(eq=False)
class Node:
    """One function of the graph: its arguments, in which the values that it takes stand as nodes.

    function: as torch dispatches it; None for the model's input, and for ``args[1]``, an index, of what ``args[0]``
    returns. path: of the module in whose ``forward`` it was called. shape, dtype: of its result, the batch first; of
    several results none.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    shape: torch.Size
    dtype: torch.dtype | None

    def reads(self) -> list[Node]:
        """The nodes among its arguments."""
        return list(_nodes((self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """The constants among its arguments."""
        items = (item.value if isinstance(item, Computed) else item for item in _leaves((self.args, self.kwargs)))
        return [item for item in items if isinstance(item, Tensor)]


@dataclass(eq=False)
class Computed:
    """A constant that the model computed, as by a parametrisation: its value, and of what it is which function.

    function: None for one that cannot be computed again.
    """

    value: Tensor
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def now(self) -> Tensor:
        """The value; inside torch.compile computed again, from the weights as they are then."""
        if not torch.compiler.is_compiling():
            return self.value
        if self.function is None:
            raise RuntimeError("model: computes a weight by updates in place, want none under torch.compile")
        result: Tensor = self.function(*_mapped(self.args, _now), **_mapped(self.kwargs, _now))
        return result

    def is_of_the_same(self, other: Any) -> bool:
        if not isinstance(other, Computed) or self.function is not other.function or self.function is None:
            return False
        mine, theirs = (_leaves((each.args, each.kwargs)) for each in (self, other))
        return len(mine) == len(theirs) and all(_same_constant(a, b) for a, b in zip(mine, theirs, strict=True))


def _now(item: Any) -> Any:
    return item.now() if isinstance(item, Computed) else item


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, Computed):
        return a.is_of_the_same(b)
    return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and bool(a == b))


def with_constants(arguments: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of a node with all constants of floating point as ``function`` has them."""

    def changed(item: Any) -> Any:
        item = _now(item)
        return function(item) if isinstance(item, Tensor) and item.is_floating_point() else item

    return _mapped(arguments, changed)


class _Computing(TorchFunctionMode):
    """Notes which functions made the tensors that are no values of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Computed] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or isinstance(result, Value):
            return result
        given = [item for item in _leaves((args, kwargs)) if isinstance(item, Tensor)]
        if any(item is result for item in given):  # written in place; or returned as it is
            if getattr(func, "__name__", "").endswith("_"):
                self.made[id(result)] = Computed(result, None, (), {})
        elif given:
            self.made[id(result)] = Computed(result, func, *_mapped((args, kwargs), self.of))
        return result

    def of(self, item: Any) -> Any:
        """A tensor as what it was computed as, if it was."""
        return self.made.get(id(item), item) if isinstance(item, Tensor) else item


# Read off a value without computing with it.
_READ = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cuda", "is_cpu", "is_meta"),
        *("is_nested", "is_sparse", "is_quantized", "is_mkldnn", "is_xpu", "is_mps", "is_vulkan"),
    )
} | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.storage_offset, Tensor.is_contiguous, Tensor.get_device, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
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
    """A tensor of a shape, a dtype and a device, and of no numbers; the functions called on it are recorded.

    stale: an update in place of another value that shares its memory has written over it, in which function; it may not
    be read any more. constant: it shows the memory of a tensor that is no value, and may not be written.
    """

    node: Node
    meta: Tensor
    stale: str
    constant: bool
    recorder: _Recorder

    @staticmethod
    def __new__(cls, recorder: _Recorder, node: Node, meta: Tensor, constant: bool = False) -> Value:
        value: Value = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=recorder.device
        )
        value.node, value.meta, value.stale, value.constant, value.recorder = node, meta, "", constant, recorder
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
        return value.recorder.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        value = next(_values((args, kwargs or {})))
        raise value.recorder.error(f"calls {func} below torch's functions, where it cannot be recorded")


class Trace:
    """The graph of a model: ``output`` and all nodes that it needs, in the order in which they ran."""

    def __init__(self, model: nn.Module, x: Tensor, leaves: Iterable[type[nn.Module]] = ()) -> None:
        """``leaves``: classes whose own ``forward`` is one function of the graph, and is not looked into.

        UntraceableError: by path, where ``model(x)`` is no graph of functions of its input.

        Errors of the model itself are its own. In training mode the model's counters move as in any call.
        """
        recorder = _Recorder(model, x.device)
        self.input, self.device = Node(None, (), {}, "", x.shape, x.dtype), x.device
        self._stride = x.stride()
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        with recorder, recorder.computing, _as_functions(leaves), without_autocast(x.device.type):
            output = model(Value(recorder, self.input, meta))
            if not isinstance(output, Value) or output.recorder is not recorder:
                raise UntraceableError(
                    f"model: returns {type(output).__name__}, want one tensor that its input went into"
                )
            recorder.check_not_stale([output], "")
        self.output = output.node
        needed = {id(self.output)}
        self.nodes: list[Node] = []
        for node in reversed(recorder.nodes):
            if id(node) in needed:
                self.nodes.append(node)
                needed |= {id(other) for other in _nodes((node.args, node.kwargs))}
        self.nodes.reverse()

    def runs_the_same(self, other: Trace) -> bool:
        """Whether ``other`` calls the same functions on the same values, and on constants that are the same objects."""
        if len(self.nodes) != len(other.nodes) or self.input.shape[1:] != other.input.shape[1:]:
            return False
        alike = {id(self.input): id(other.input)}
        for mine, theirs in zip(self.nodes, other.nodes, strict=True):
            mine_items, their_items = (_leaves((node.args, node.kwargs)) for node in (mine, theirs))
            if mine.function is not theirs.function or mine.shape[1:] != theirs.shape[1:]:
                return False
            if len(mine_items) != len(their_items) or mine.kwargs.keys() != theirs.kwargs.keys():
                return False
            for a, b in zip(mine_items, their_items, strict=True):
                if not (alike.get(id(a)) == id(b) if isinstance(a, Node) else _same_constant(a, b)):
                    return False
            alike[id(mine)] = id(theirs)
        return alike.get(id(self.output)) == id(other.output)

    def __call__(self, x: Tensor) -> Tensor:
        """What the recorded functions make of ``x``, laid out as what was recorded. ValueError for another shape."""
        if x.shape != self.input.shape or x.stride() != self._stride:
            raise ValueError(f"x: got shape {tuple(x.shape)}, strides {x.stride()}, want those that were recorded")
        found: dict[int, Any] = {id(self.input): x}

        def filled(item: Any) -> Any:
            return found[id(item)] if isinstance(item, Node) else _now(item)

        for node in self.nodes:
            args, kwargs = _mapped(node.args, filled), _mapped(node.kwargs, filled)
            found[id(node)] = args[0][args[1]] if node.function is None else node.function(*args, **kwargs)
        result: Tensor = found[id(self.output)]
        return result


@dataclass(frozen=True)
class Forward:
    """The ``forward`` of a class of modules as a function of the module and its arguments."""

    kind: type[nn.Module]
    function: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.function(module, *args, **kwargs)


@contextmanager
def _as_functions(kinds: Iterable[type[nn.Module]]) -> Iterator[None]:
    """Inside, calls of these classes' ``forward`` with a value are noted as one function; others are what they are.

    One thread at a time, so that each puts back what it found.
    """
    kinds = list(kinds)
    if not kinds:
        yield
        return
    with _changing_classes:
        changed: list[tuple[type[nn.Module], Any]] = []
        try:
            for kind in kinds:
                changed.append((kind, vars(kind).get("forward")))
                kind.forward = _noting(Forward(kind, kind.forward))
            yield
        finally:
            for kind, own in changed:
                if own is None:
                    del kind.forward
                else:
                    kind.forward = own


_changing_classes = threading.RLock()


def _noting(forward: Forward) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Value):
            return forward(self, *args, **kwargs)
        return args[0].recorder.call_module(forward, self, args, kwargs)

    return call


# What a module that is one function returns, by module and by sizes of what it takes.
_results: weakref.WeakKeyDictionary[nn.Module, dict[Any, Tensor]] = weakref.WeakKeyDictionary()


class _Recorder:
    """One run of a model. As a context, it raises on leaving what the model swallowed, and leaves no value behind."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.nodes: list[Node] = []
        self.alive: list[weakref.ref[Value]] = []
        self._model = model  # an id stands for a module as long as it lives
        self._paths: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._grad = torch.is_grad_enabled()
        self._open = True
        self._first_error: UntraceableError | None = None
        self.computing = _Computing()
        self._constants: list[tuple[Tensor, int, str]] = []

    def __enter__(self) -> _Recorder:
        self._before = [(module, dict(module.__dict__), dict(module._buffers)) for module in self._model.modules()]
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._open = False
        kept = ""
        for module, own, buffers in self._before:
            for now, before in ((module._buffers, buffers), (module.__dict__, own)):
                if any(_holds_a_value(name, value) for name, value in now.items()):
                    kept = kept or f"{at(self._paths[id(module)])}: keeps a value of a call for later calls"
                    now.clear()
                    now.update(before)
        if error is not None and not isinstance(error, UntraceableError) and self._first_error is not None:
            raise self._first_error from error
        if error is None:
            if self._first_error is not None:
                raise self._first_error
            if kept:
                raise UntraceableError(kept)
            for constant, version, path in self._constants:
                if constant._version != version:
                    raise UntraceableError(f"{at(path)}: takes a tensor that the model writes over afterwards")

    def error(self, what: str) -> UntraceableError:
        """The error to raise, where the model stands; it is not lost where the model swallows it."""
        error = UntraceableError(f"{at(self.path())}: {what}")
        self._first_error = self._first_error or error
        return error

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
        path, name = self.path(), getattr(func, "__name__", repr(func))
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", func), "__name__", name)
        if name == "requires_grad":
            raise self.error(
                "asks whether a value has a gradient, as a module with a full backward hook does; want none"
            )
        if func in _NUMBERS:
            raise self.error(
                f"{name} asks for the numbers of a value, so that what runs depends on them; want a program that "
                "depends on shapes alone"
            )
        if not self._open or any(value.recorder is not self for value in _values((args, kwargs))):
            raise self.error(f"{name} takes a value of another call of a model")
        if torch.is_grad_enabled() != self._grad:
            raise self.error(f"{name} is called where gradients are switched, or by a function with its own gradient")
        if torch.amp.is_autocast_available(self.device.type) and torch.is_autocast_enabled(self.device.type):
            raise self.error(f"{name} is called under autocast, want it around the model")
        self.check_not_stale(_values((args, kwargs)), name)
        written = self._written(func, name, args, kwargs)
        if written is not None:
            func = self._out_of_place(func, name)
            kwargs = {**kwargs, **({"inplace": False} if "inplace" in kwargs else {})}
        try:
            result = _shaped(func, args, kwargs, self.device)
        except NotImplementedError as error:
            raise self.error(f"{name} cannot be recorded: {error}") from error
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            own = ", ".join(f"{tuple(value.shape)} in {value.dtype}" for value in _values((args, kwargs)))
            error.add_note(f"{at(path)}: {name} of {own}")
            raise
        given = _mapped((args, kwargs), lambda item: item.node if isinstance(item, Value) else self.computing.of(item))
        for item in _leaves((args, kwargs)):
            if isinstance(item, Tensor) and not isinstance(item, Value) and not item.is_inference():
                self._constants.append((item, item._version, path))
        if isinstance(result, _Shown):
            node = self._note(func, *given, path, result.meta.shape, result.meta.dtype)
            if written is None:
                return Value(self, node, result.meta, result.constant)
            self._write(written, node, result.meta, name)
            return written
        if isinstance(result, _Several):
            several = self._note(func, *given, path, torch.Size(), None)
            values = []
            for i, item in enumerate(result.items):
                node = self._note(None, (several, i), {}, path, item.meta.shape, item.meta.dtype)
                values.append(Value(self, node, item.meta, item.constant))
            return result.kind(values)
        raise self.error(f"{name} returns what is no tensor, want functions that return tensors")

    def call_module(self, forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """A module that is one function; what it returns is seen on zeros."""
        value = args[0]
        if any(other is not value for other in _values((args, kwargs))):
            raise self.error(f"{forward.__name__} takes several values, want a module of one, as its rule is of")
        self.check_not_stale([value], forward.__name__)
        known = _results.setdefault(module, {})
        key = value.meta.shape, value.meta.dtype, module.training
        if key not in known:
            zeros = torch.zeros(value.meta.shape, dtype=value.meta.dtype, device=self.device)
            with torch.no_grad():
                result = forward(module, zeros, *args[1:], **kwargs)
            if not isinstance(result, Tensor):
                raise self.error(f"{forward.__name__} returns {type(result).__name__}, want one tensor")
            known[key] = torch.empty_like(result, device="meta")
        given = (module, value.node, *args[1:])
        path = self._paths.get(id(module), "")
        node = self._note(forward, given, kwargs, path, known[key].shape, known[key].dtype)
        return Value(self, node, torch.empty_like(known[key]))

    def check_not_stale(self, values: Iterable[Value], name: str) -> None:
        for value in values:
            if value.stale:
                raise self.error(
                    f"{name or 'it'} takes a value that {value.stale}, in place, has written over through a view, or "
                    "another value of the same memory; want that out of place"
                )

    def _note(self, *fields: Any) -> Node:
        self.nodes.append(Node(*fields))
        return self.nodes[-1]

    def _written(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Value | None:
        """The value that the call writes over."""
        if name == "__setitem__" or kwargs.get("out") is not None:
            raise self.error(f"{name} writes into a tensor, want functions that return one")
        if not (kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")) or name in _UPDATES):
            return None
        if not args or not isinstance(args[0], Value):
            raise self.error(f"{name} writes a value of the model into another tensor")
        if args[0].constant:
            raise self.error(f"{name} writes over a tensor that is no value of the model, through a view")
        return args[0]

    def _write(self, written: Value, node: Node, meta: Tensor, name: str) -> None:
        before = written.meta
        if (meta.shape, meta.dtype) != (before.shape, before.dtype):
            raise self.error(f"{name} in place makes another shape or dtype, want it out of place")
        storage = before.untyped_storage()._cdata
        self.alive = [ref for ref in self.alive if ref() is not None]
        for ref in self.alive:
            other = ref()
            if other is not None and other is not written and other.meta.untyped_storage()._cdata == storage:
                other.stale = name
        # a new memory, laid out as before
        written.node = node
        written.meta = torch.empty_strided(before.shape, before.stride(), dtype=before.dtype, device="meta")

    def _out_of_place(self, func: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function that returns what ``func`` would write."""
        if name in _UPDATES:
            other = f"__{name[3:]}"
        elif name.endswith("_"):
            other = name[:-1]
        else:
            return func  # with inplace=False
        found = next((vars(owner)[other] for owner in (torch._C.TensorBase, Tensor) if other in vars(owner)), None)
        found = found or getattr(nn.functional, other, None)
        if other in _DRAWN or not callable(found):
            raise self.error(f"{name} in place cannot be recorded, want a function that returns its result")
        return found  # type: ignore[no-any-return]


_UPDATES = {
    f"__i{name}__"
    for name in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
}

# What is drawn into a tensor is no function of it; and what is no function at all.
_DRAWN = {
    "normal",
    "bernoulli",
    "random",
    "uniform",
    "exponential",
    "geometric",
    "cauchy",
    "log_normal",
    "requires_grad",
}


@dataclass
class _Shown:
    """A result without numbers; ``constant`` where it shows the memory of a tensor that is no value."""

    meta: Tensor
    constant: bool


@dataclass
class _Several:
    """Several results, of which the function makes a tuple, a list, or one with names."""

    items: list[_Shown]
    kind: Callable[[list[Any]], Any]


# Shape, strides, dtype, offset, and which of the tensors that the function takes it shares memory with, or none.
_Facts = tuple[torch.Size, tuple[int, ...], torch.dtype, int, int | None]

# The results of functions, without numbers, by the shapes of what they take: torch's own answer takes its time.
_known: dict[Any, tuple[Any, list[_Facts]]] = {}
_KNOWN_AT_MOST = 4096


def _shaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
    """What ``func`` returns, without numbers, :class:`_Shown` or :class:`_Several`; None where that is no tensor."""
    given = [item for item in _leaves((args, kwargs)) if isinstance(item, Tensor)]
    storages = [item.meta.untyped_storage()._cdata if isinstance(item, Value) else None for item in given]
    shares = tuple(storages.index(storage) for storage in storages)
    key = func, _key(args), _key(kwargs), shares, torch.get_default_dtype(), torch.is_grad_enabled()
    known = _known.get(key)
    if known is None:
        metas = [item.meta if isinstance(item, Value) else item.detach().to("meta") for item in given]
        remaining = iter(metas)

        def on_meta(item: Any) -> Any:
            if isinstance(item, Tensor):
                return next(remaining)
            same = isinstance(item, (str, torch.device)) and str(item) in (str(device), device.type)
            return torch.device("meta") if same else item

        own_args, own_kwargs = _mapped((args, kwargs), on_meta)
        stays = func in (Tensor.cpu, Tensor.cuda) and func.__name__ == device.type
        result = own_args[0] if stays else func(*own_args, **own_kwargs)
        several = type(result) if isinstance(result, (tuple, list)) else None
        results = list(result) if several else [result]
        if not all(isinstance(each, Tensor) for each in results):
            return None
        results = [each if each.is_meta else torch.empty_like(each, device="meta") for each in results]
        memory = [meta.untyped_storage()._cdata for meta in metas]
        facts: list[_Facts] = []
        for each in results:
            own = each.untyped_storage()._cdata
            shared = memory.index(own) if own in memory else None
            facts.append((each.shape, each.stride(), each.dtype, each.storage_offset(), shared))
        fresh = [each.untyped_storage()._cdata for each, fact in zip(results, facts, strict=True) if fact[4] is None]
        plain = all(shared is None or dtype == metas[shared].dtype for _, _, dtype, _, shared in facts)
        if not plain or len(set(fresh)) < len(fresh):  # seen as another dtype, or sharing a memory of their own
            shown = [
                _Shown(each, fact[4] is not None and _is_constant(given[fact[4]]))
                for each, fact in zip(results, facts, strict=True)
            ]
            return _Several(shown, several) if several else shown[0]
        if len(_known) >= _KNOWN_AT_MOST:
            _known.clear()
        known = _known[key] = several, facts
    several, facts = known
    found = []
    for shape, stride, dtype, offset, shared in facts:
        source = None if shared is None else given[shared]
        if isinstance(source, Value):
            found.append(_Shown(torch.as_strided(source.meta, shape, stride, offset), source.constant))
        else:
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            found.append(_Shown(meta, source is not None))
    return _Several(found, several) if several else found[0]


def _is_constant(tensor: Tensor) -> bool:
    return tensor.constant if isinstance(tensor, Value) else True


def _key(item: Any) -> Any:
    """Equal for arguments of which torch's functions make results of the same shapes."""
    if isinstance(item, Value):
        return Value, item.meta.shape, item.meta.stride(), item.meta.dtype, item.meta.storage_offset()
    if isinstance(item, Tensor):
        return Tensor, item.shape, item.stride(), item.dtype, item.storage_offset()
    if isinstance(item, (tuple, list)):
        return type(item), tuple(_key(each) for each in item)
    if isinstance(item, dict):
        return tuple((name, _key(each)) for name, each in item.items())
    if isinstance(item, slice):
        bounds = (item.start, item.stop, item.step)
        return slice, *(None if bound is None else operator.index(bound) for bound in bounds)
    return type(item), item if item.__hash__ is not None else repr(item)


# What torch keeps on every module, where no value is put but by _buffers, which are looked at themselves.
_OF_TORCH = frozenset(nn.Module().__dict__)


def _holds_a_value(name: str, item: Any) -> bool:
    if isinstance(item, (tuple, list, dict)):
        return name not in _OF_TORCH and any(isinstance(each, Value) for each in _leaves(item))
    return isinstance(item, Value)


def _mapped(item: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of everything in nested tuples, lists and dicts."""
    if isinstance(item, (tuple, list)):
        return (list if isinstance(item, list) else tuple)(_mapped(each, function) for each in item)
    if isinstance(item, dict):
        return {name: _mapped(each, function) for name, each in item.items()}
    return function(item)


def _leaves(item: Any) -> list[Any]:
    """What nested tuples, lists and dicts hold, in their order."""
    found: list[Any] = []
    _collect((item,), found)
    return found


def _collect(items: Iterable[Any], found: list[Any]) -> None:
    for item in items:
        if isinstance(item, (tuple, list)):
            _collect(item, found)
        elif isinstance(item, dict):
            _collect(item.values(), found)
        else:
            found.append(item)


def _values(item: Any) -> Iterator[Value]:
    return (each for each in _leaves(item) if isinstance(each, Value))


def _nodes(item: Any) -> Iterator[Node]:
    return (each for each in _leaves(item) if isinstance(each, Node))
