"""Oracles that owe nothing to the package: proved lower bounds of operator norms, and small networks in rationals.

Norms. ||A x|| / ||x|| is at most ||A||_2 for any x at all. Taken in extended precision with a bound on its rounding it
is a proved lower bound, and for a singular vector it agrees with the norm to 16 digits: no upper bound may be below it.

Networks. On a segment or a disc around the input, a network of piecewise linear activations is cut into its linear
pieces, in rationals throughout, with the weights as they are stored: its own `forward` runs on values that are affine
forms. What is read off the corners of the pieces (margins, features) is taken by the real function, and the Jacobians
of the pieces are Jacobians of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
import torch.nn.functional as F
from flint import arb, fmpq, fmpq_mat
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, clipped_maxmin, clipped_relu, maxmin

# --- operator norms ---------------------------------------------------------------------------------------------------

# 2^-64 on x86; where long double is no more than double, the bounds below hold all the same, 2000 times wider
UNIT = np.finfo(np.longdouble).eps / 2

# elements of a dense matrix that LAPACK decomposes within a second; above it the top singular vector is Lanczos's
DENSE = 2**19


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def operator_matrix(
    weight: Tensor,
    input_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> scipy.sparse.csr_array:
    """The operator (m, n) in float64, entry by entry from the definition; rows and columns in the order (C, H, W)."""
    values = weight.detach().double().numpy()
    if values.ndim == 2:
        return scipy.sparse.csr_array(values)
    assert input_size is not None
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    out, per_group, *kernel = values.shape
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input_size[1:], kernel, stride, padding, dilation, strict=True)
    ]
    first_channel = np.arange(out) // (out // groups) * per_group
    data, rows, columns = [], [], []
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            y, x = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
            from_y = y * stride[0] - padding[0] + a * dilation[0]
            from_x = x * stride[1] - padding[1] + b * dilation[1]
            inside = (from_y >= 0) & (from_y < input_size[1]) & (from_x >= 0) & (from_x < input_size[2])
            target = (y * sizes[1] + x)[inside]
            source = (from_y * input_size[2] + from_x)[inside]
            o, c = np.meshgrid(np.arange(out), np.arange(per_group), indexing="ij")
            shape = (out, per_group, len(target))
            data.append(np.broadcast_to(values[:, :, a, b, None], shape).ravel())
            rows.append(np.broadcast_to((o * sizes[0] * sizes[1])[..., None] + target, shape).ravel())
            plane = (first_channel[:, None] + c) * input_size[1] * input_size[2]
            columns.append(np.broadcast_to(plane[..., None] + source, shape).ravel())
    shape = (out * sizes[0] * sizes[1], int(np.prod(input_size)))
    entries = np.concatenate(data), (np.concatenate(rows), np.concatenate(columns))
    return scipy.sparse.csr_array(entries, shape=shape)


def survivors(
    matrix: scipy.sparse.csr_array, row_mask: Tensor | None, col_mask: Tensor | None
) -> scipy.sparse.csr_array:
    """The rows and columns of one sample's masks (shapes without the batch) that are True."""
    rows = slice(None) if row_mask is None else np.flatnonzero(row_mask.flatten().numpy())
    columns = slice(None) if col_mask is None else np.flatnonzero(col_mask.flatten().numpy())
    return matrix[rows][:, columns]


def quotient_below(x: np.ndarray, *maps: scipy.sparse.csr_array) -> np.longdouble:
    """At most ||A x|| / ||x|| in real arithmetic, A the product of ``maps``, the first one applied first: the quotient
    in extended precision less a bound of its rounding.

    |fl(A x) - A x| <= gamma(k) |A| |x| by components, k the most terms to a row, in any order of summation; sums of
    squares, their roots and the quotient have relative errors. Float64 squares neither overflow nor underflow here.
    """

    def gamma(k: int) -> np.longdouble:
        return k * UNIT / (1 - k * UNIT)

    x = x.astype(np.longdouble)
    image, off = x, np.zeros_like(x)
    for matrix in maps:
        terms = int(np.diff(matrix.indptr).max(initial=0))
        wide = matrix.astype(np.longdouble)
        size = abs(wide)
        image, off = wide @ image, (size @ off + gamma(terms) * (size @ abs(image))) * (1 + gamma(2 * terms + 8))
    m = len(image)
    length = np.sqrt((image * image).sum()) * (1 - gamma(m + 4))
    error = np.sqrt((off * off).sum()) * (1 + gamma(m + 8))
    below = (length - error) / (np.sqrt((x * x).sum()) * (1 + gamma(len(x) + 4))) * (1 - 8 * UNIT)
    return max(below, np.longdouble(0))


class Norm(NamedTuple):
    """``lower`` is proved to be at most the norm; ``value`` is the float64 singular value; both long double."""

    lower: np.longdouble
    value: np.longdouble


def _lanczos(matrix: scipy.sparse.csr_array) -> tuple[float, np.ndarray]:
    """Top singular value and right vector from a random start, every vector orthogonalised twice against all others."""
    rows, columns = matrix.shape
    gram = (lambda x: matrix.T @ (matrix @ x)) if columns <= rows else (lambda x: matrix @ (matrix.T @ x))
    steps = min(rows, columns, 600)
    basis = np.zeros((steps, min(rows, columns)))
    start = np.random.default_rng(0).standard_normal(basis.shape[1])
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    for k in range(steps):
        x = gram(basis[k])
        diagonal[k] = basis[k] @ x
        for _ in range(2):
            x -= basis[: k + 1].T @ (basis[: k + 1] @ x)
        beside[k] = np.linalg.norm(x)
        if k % 10 == 9 or beside[k] < 1e-12 * diagonal[0] or k == steps - 1:
            values, vectors = scipy.linalg.eigh_tridiagonal(
                diagonal[: k + 1], beside[:k], select="i", select_range=(k, k)
            )
            if beside[k] * abs(vectors[k, 0]) < 1e-10 * values[0]:
                break
        if k + 1 < steps:
            basis[k + 1] = x / beside[k]
    vector = basis[: k + 1].T @ vectors[:, 0]
    return float(np.sqrt(values[0])), vector if columns <= rows else matrix.T @ vector


def operator_norm(*maps: scipy.sparse.csr_array) -> Norm:
    """Norm of a sparse float64 matrix, or of a product of some, the first one applied first: the float64 singular
    value, and its singular vector's quotient as the proof."""
    exponent, product = 0, None
    for matrix in maps:
        largest = abs(matrix).max() if matrix.nnz and min(matrix.shape) else 0.0
        if largest == 0:
            return Norm(np.longdouble(0), np.longdouble(0))
        own = int(np.frexp(largest)[1])
        scaled = matrix.astype(np.longdouble)
        scaled.data = np.ldexp(scaled.data, -own)
        scaled = scaled.astype(np.float64)
        exponent, product = exponent + own, scaled if product is None else scaled @ product
    assert product is not None
    if product.shape[0] * product.shape[1] <= DENSE:
        _, values, right = scipy.linalg.svd(product.toarray(), full_matrices=False, check_finite=False)
        value, vector = values[0], right[0]
    else:
        value, vector = _lanczos(product)
    return Norm(quotient_below(vector, *maps), np.ldexp(np.longdouble(value), exponent))


# --- networks in rationals --------------------------------------------------------------------------------------------


def rational(value: float) -> fmpq:
    return fmpq(*value.as_integer_ratio())


def float_of(value: fmpq) -> float:
    return int(value.p) / int(value.q)


def floats(rows: Sequence[Sequence[fmpq]]) -> Tensor:
    return torch.tensor([[float_of(value) for value in row] for row in rows], dtype=torch.float64)


def rationals(t: Tensor) -> list[fmpq]:
    """The stored values, flattened; a float32 is the rational number that it is."""
    return [rational(value) for value in t.detach().double().flatten().tolist()]


# An affine form on the slice is (constant, slope, ...); a cell is the list of its corners, each (coordinate, ...).
Form = list[fmpq]
Cell = list[list[fmpq]]


def _at(form: Form, corner: list[fmpq]) -> fmpq:
    return sum((slope * coordinate for slope, coordinate in zip(form[1:], corner, strict=True)), form[0])


def _clip(cell: Cell, form: Form) -> Cell:
    """The part of a convex cell (a polygon in order, or a segment) where `form` >= 0."""
    kept: Cell = []
    values = [_at(form, corner) for corner in cell]
    for k, (corner, value) in enumerate(zip(cell, values, strict=True)):
        before, other = cell[k - 1], values[k - 1]
        if (value > 0 and other < 0) or (value < 0 and other > 0):
            share = other / (other - value)
            kept.append([b + share * (c - b) for b, c in zip(before, corner, strict=True)])
        if value >= 0:
            kept.append(corner)
    return [corner for k, corner in enumerate(kept) if corner != kept[k - 1]]


class Symbol(Tensor):
    """A value of a network on one cell: a batch of one sample, whose numbers are affine forms.

    A model runs on it by its own `forward`; what a function of torch makes of it is what `FUNCTIONS` has under it.
    """

    forms: list[Form]
    walk: Walk

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        walk = next(each.walk for each in tree_leaves((args, kwargs)) if isinstance(each, Symbol))
        return walk.call(function, args, kwargs)

    @property
    def floats(self) -> Tensor:
        """The forms (numbers, 1 + coordinates) in float64."""
        if not hasattr(self, "_floats"):
            self._floats = floats(self.forms)
        return self._floats


# what a program may ask of a value: its shape
QUESTIONS = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),
    *(Tensor.size, Tensor.dim, Tensor.__len__, Tensor.numel, Tensor.__repr__),
}


class Walk:
    """A model's runs on the cells that its comparisons cut a cell into, each a piece on which it is affine.

    A comparison that the cell does not decide cuts it. The run goes on in one half; the other waits, with the results
    of the functions up to there, which hold in it too.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], sizes: Sequence[int], dtype: torch.dtype) -> None:
        self.model, self.sizes, self.dtype = model, sizes, dtype
        self.cell: Cell = []
        self.dimension = 0
        self.step = 0
        self.results: list[Any] = []
        self.waiting: list[tuple[Cell, list[Any]]] = []
        self.fixed: dict[int, Any] = {}

    @torch.no_grad()
    def pieces(self, cell: Cell, forms: list[Form]) -> Iterator[tuple[Cell, list[Symbol], Symbol]]:
        """Of the input with the given forms: cells, all values on the way, and what the model returns."""
        value = self.symbol(forms, (1, *self.sizes))
        self.dimension, self.waiting = len(forms[0]) - 1, [(cell, [])]
        while self.waiting:
            self.cell, self.results = self.waiting.pop()
            self.step = 0
            returned = self.model(value)
            assert isinstance(returned, Symbol), "the model returns no value of its input"
            yield self.cell, [value, *tree_leaves(self.results)], returned

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.step == len(self.results):
            if function not in FUNCTIONS:
                raise NotImplementedError(f"{function} is not piecewise linear, or not known")
            self.results.append(FUNCTIONS[function](self, function, *args, **kwargs))
        self.step += 1
        return self.results[self.step - 1]

    def symbol(self, forms: list[Form], shape: Sequence[int]) -> Symbol:
        symbol = torch.empty(tuple(shape), dtype=self.dtype, device="meta").as_subclass(Symbol)
        assert len(forms) == math.prod(shape) and shape[0] == 1
        symbol.forms, symbol.walk = forms, self
        return symbol

    def once(self, made: Callable[[], Any]) -> Any:
        """What is the same in every cell, and made in the first: the matrix of a function, say."""
        if self.step not in self.fixed:
            self.fixed[self.step] = made()
        return self.fixed[self.step]

    def constant(self, value: fmpq) -> Form:
        return [value, *[fmpq(0)] * self.dimension]

    def larger(self, f: Form, g: Form) -> Form:
        """max(f, g), which is one of them in the rest of the run."""
        difference = [a - b for a, b in zip(f, g, strict=True)]
        values = [_at(difference, corner) for corner in self.cell]
        if max(values) <= 0:
            return g
        if min(values) < 0:
            self.waiting.append((_clip(self.cell, [-d for d in difference]), list(self.results)))
            self.cell = _clip(self.cell, difference)
        return f

    def smaller(self, f: Form, g: Form) -> Form:
        return g if self.larger(f, g) is f else f


# --- functions: of a walk, the function itself, and its arguments -----------------------------------------------------


def _images(function: Callable[[Tensor], Tensor], value: Symbol) -> Tensor:
    """(inputs, *output) of the unit vectors, in float64: sums of one number and zeros, which do not round."""
    count = math.prod(value.shape)
    return function(torch.eye(count, dtype=torch.float64).view(count, *value.shape[1:]))


def _matrix(images: Tensor, entry: Callable[[float], fmpq]) -> fmpq_mat:
    """(outputs, inputs)"""
    images = images.flatten(1)
    matrix = fmpq_mat(images.shape[1], images.shape[0])
    places = images.nonzero()
    for (j, i), number in zip(places.tolist(), images[tuple(places.T)].tolist(), strict=True):
        matrix[i, j] = entry(number)
    return matrix


def _product(matrix: fmpq_mat, forms: list[Form]) -> list[Form]:
    return (matrix * fmpq_mat(forms)).tolist()


def _weighted(
    walk: Walk, function: Any, value: Symbol, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Symbol:
    """A layer with weights, which are the entries of its matrix."""

    def made() -> tuple[fmpq_mat, list[int], list[fmpq]]:
        given = weight.detach().double()
        if function is F.linear and value.dim() == 2:
            images = given.T
        else:
            images = _images(lambda x: function(x, given, None, *args, **kwargs), value)
        # a bias is one number a channel; along the last dimension in F.linear
        shape = [-1] if function is F.linear else [-1, *[1] * (images.dim() - 2)]
        biases = [] if bias is None else rationals(bias.view(shape).expand(images.shape[1:]))
        return _matrix(images, rational), [1, *images.shape[1:]], biases

    matrix, shape, biases = walk.once(made)
    forms = _product(matrix, value.forms)
    for form, number in zip(forms, biases, strict=False):
        form[0] += number
    return walk.symbol(forms, shape)


def _averaged(walk: Walk, function: Any, value: Symbol, *args: Any, **kwargs: Any) -> Symbol:
    """Means of real arithmetic: 1/9 is a ninth."""

    def made() -> tuple[fmpq_mat, list[int]]:
        images = _images(lambda x: function(x, *args, **kwargs), value)
        return _matrix(images, lambda share: fmpq(1, round(1 / share))), [1, *images.shape[1:]]

    matrix, shape = walk.once(made)
    return walk.symbol(_product(matrix, value.forms), shape)


def _moved(walk: Walk, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Numbers of one value, or of several, elsewhere, and zeros: what the function makes of their places, from 1 on."""
    assert not kwargs.get("value") and not kwargs.get("training"), "numbers that are no value's"
    sources: list[Form] = []

    def places(item: Any) -> Any:
        if not isinstance(item, Symbol):
            return item
        first = len(sources) + 1
        sources.extend(item.forms)
        return torch.arange(first, first + len(item.forms), dtype=torch.float64).view(item.shape)

    given = tree_map(places, (args, kwargs))
    found = walk.once(lambda: function(*given[0], **given[1]))
    zero = walk.constant(fmpq(0))

    def chosen(result: Tensor) -> Symbol:
        return walk.symbol([sources[k - 1] if k else zero for k in result.flatten().long().tolist()], result.shape)

    return tree_map(chosen, found)


def _operand(walk: Walk, item: Any, shape: Sequence[int]) -> list[Form]:
    """A value, a tensor or a number, broadcast."""
    if isinstance(item, Symbol):
        places = torch.arange(math.prod(item.shape)).view(item.shape).expand(tuple(shape))
        return [item.forms[k] for k in places.flatten().tolist()]
    given = item if isinstance(item, Tensor) else torch.tensor(item, dtype=torch.float64)
    return [walk.constant(number) for number in rationals(given.expand(tuple(shape)))]


def _arithmetic(operation: Callable[[Form, Form, fmpq], Form]) -> Callable[..., Symbol]:
    """Of two values, or of a value and what is the same for every sample, number by number."""

    def entry(walk: Walk, function: Any, first: Any, second: Any = 0, *, alpha: float = 1) -> Symbol:
        shape = torch.broadcast_shapes(*(each.shape for each in (first, second) if isinstance(each, Tensor)))
        pairs = zip(*(_operand(walk, each, shape) for each in (first, second)), strict=True)
        return walk.symbol([operation(p, q, rational(float(alpha))) for p, q in pairs], shape)

    return entry


def _times(p: Form, q: Form) -> Form:
    p, q = (p, q) if any(p[1:]) else (q, p)
    assert not any(q[1:]), "a product of two values"
    return [q[0] * v for v in p]


def _batch_norm(
    walk: Walk,
    function: Any,
    value: Symbol,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Symbol:
    """(x - mean) / sqrt(var + eps) * weight + bias, of variances whose roots are rational."""
    assert not training

    def made() -> list[tuple[fmpq, fmpq]]:
        count = len(mean)
        given = [
            mean,
            var,
            torch.ones(count) if weight is None else weight,
            torch.zeros(count) if bias is None else bias,
        ]
        return [
            (w / _root(v + rational(eps)), b - m * w / _root(v + rational(eps)))
            for m, v, w, b in zip(*map(rationals, given), strict=True)
        ]

    scales = walk.once(made)
    each = len(value.forms) // len(scales)
    forms = [[scales[k // each][0] * v for v in form] for k, form in enumerate(value.forms)]
    for k, form in enumerate(forms):
        form[0] += scales[k // each][1]
    return walk.symbol(forms, value.shape)


def _root(value: fmpq) -> fmpq:
    if not (value.p.is_square() and value.q.is_square()):
        raise NotImplementedError(f"the root of {value} is not rational")
    return fmpq(value.p.isqrt(), value.q.isqrt())


def _between(walk: Walk, value: Symbol, low: Any, high: Any) -> Symbol:
    forms = value.forms
    if low is not None:
        forms = [walk.larger(f, g) for f, g in zip(forms, _operand(walk, low, value.shape), strict=True)]
    if high is not None:
        forms = [walk.smaller(f, g) for f, g in zip(forms, _operand(walk, high, value.shape), strict=True)]
    return walk.symbol(forms, value.shape)


def _bent(walk: Walk, value: Symbol, slopes: Any) -> Symbol:
    """max(x, slope x)"""
    slopes = _operand(walk, slopes, value.shape)
    assert all(slope[0] <= 1 for slope in slopes)
    forms = [walk.larger(form, [slope[0] * v for v in form]) for form, slope in zip(value.forms, slopes, strict=True)]
    return walk.symbol(forms, value.shape)


def _sorted(walk: Walk, value: Symbol, upper: Any = None, lower: Any = None) -> Symbol:
    """Larger and smaller ones of pairs that the halves of the channels make, at most `upper` and at least `lower`."""
    half = (1, value.shape[1] // 2, *value.shape[2:])
    pairs = list(zip(value.forms[: math.prod(half)], value.forms[math.prod(half) :], strict=True))
    high = walk.symbol([walk.larger(a, b) for a, b in pairs], half)
    low = walk.symbol([walk.smaller(a, b) for a, b in pairs], half)
    high, low = _between(walk, high, None, upper), _between(walk, low, lower, None)
    return walk.symbol(high.forms + low.forms, value.shape)


def _largest(walk: Walk, function: Any, value: Symbol, *args: Any, **kwargs: Any) -> Symbol:
    """A window has the inputs of which a unit vector's 1 is its maximum."""

    def made() -> tuple[list[list[int]], list[int]]:
        images = _images(lambda x: function(x, *args, **kwargs), value)
        return [column.nonzero()[:, 0].tolist() for column in images.flatten(1).T], [1, *images.shape[1:]]

    windows, shape = walk.once(made)
    forms = [reduce(walk.larger, [value.forms[k] for k in window]) for window in windows]
    return walk.symbol(forms, shape)


def _entries(entry: Callable[..., Any], *functions: Callable[..., Any]) -> dict[Callable[..., Any], Callable[..., Any]]:
    return dict.fromkeys(functions, entry)


# What each function makes of a value. In place makes another one, which is right where nothing reads the old one again.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **_entries(
        _weighted,
        *(F.linear, torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    ),
    **_entries(
        _averaged,
        *(torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.mean, Tensor.mean),
        *(torch.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    ),
    **_entries(
        _moved,
        *(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.__getitem__),
        *(torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.flip, Tensor.flip, Tensor.roll),
        *(torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, torch.cat, torch.stack),
        *(torch.chunk, Tensor.chunk, torch.split, Tensor.split, F.pad, F.interpolate, torch.pixel_shuffle),
        *(Tensor.contiguous, Tensor.clone, F.dropout, F.dropout2d),
    ),
    **_entries(
        _arithmetic(lambda p, q, alpha: [a + alpha * b for a, b in zip(p, q, strict=True)]),
        *(torch.add, Tensor.add, Tensor.add_),
    ),
    **_entries(
        _arithmetic(lambda p, q, alpha: [a - alpha * b for a, b in zip(p, q, strict=True)]),
        *(torch.sub, Tensor.sub, Tensor.sub_),
    ),
    **_entries(
        _arithmetic(lambda p, q, alpha: [b - alpha * a for a, b in zip(p, q, strict=True)]),
        *(torch.rsub, Tensor.__rsub__),
    ),
    **_entries(_arithmetic(lambda p, q, _: _times(p, q)), torch.mul, Tensor.mul, Tensor.mul_),
    **_entries(_arithmetic(lambda p, q, _: _times(p, [1 / q[0], *q[1:]])), torch.div, Tensor.div, Tensor.div_),
    **_entries(_arithmetic(lambda p, *_: [-a for a in p]), torch.neg, Tensor.neg),
    F.batch_norm: _batch_norm,
    **_entries(lambda walk, _, x, inplace=False: _between(walk, x, 0, None), F.relu, torch.relu, Tensor.relu),
    F.relu6: lambda walk, _, x, inplace=False: _between(walk, x, 0, 6),
    F.hardtanh: lambda walk, _, x, min_val=-1, max_val=1, inplace=False: _between(walk, x, min_val, max_val),
    **_entries(lambda walk, _, x, min=None, max=None: _between(walk, x, min, max), torch.clamp, Tensor.clamp),
    clipped_relu: lambda walk, _, x, threshold: _between(walk, x, 0, threshold),
    F.leaky_relu: lambda walk, _, x, negative_slope=0.01, inplace=False: _bent(walk, x, negative_slope),
    torch.prelu: lambda walk, _, x, slopes: _bent(walk, x, slopes.view(-1, *[1] * (x.dim() - 2))),
    **_entries(lambda walk, _, x: _bent(walk, x, -1), torch.abs, Tensor.abs),
    maxmin: lambda walk, _, x: _sorted(walk, x),
    clipped_maxmin: lambda walk, _, x, upper, lower: _sorted(walk, x, upper, lower),
    **_entries(
        _largest,
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    ),
}


# --- what is so on a slice --------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """One linear piece: its corners, and on it all values on the way and the logits."""

    cell: Cell
    values: list[Symbol]
    logits: Symbol

    def form(self, place: tuple[int, int]) -> Form:
        """Of a value's number; (-1, 0) is zero."""
        value, number = place
        return [fmpq(0)] * len(self.values[0].forms[0]) if value < 0 else self.values[value].forms[number]

    def at_corners(self, forms: list[Form]) -> list[list[fmpq]]:
        """(forms, corners)"""
        points = [[fmpq(1), *corner] for corner in self.cell]
        return (fmpq_mat(forms) * fmpq_mat(points).transpose()).tolist()


class Exact:
    """A network on a segment or a disc around one input, cut into its linear pieces.

    Attributes:
        pieces: list of Piece.   clean, clean_logits: features and logits at the input.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        eps: float | fmpq,
        directions: Tensor | None = None,
        corners: int = 24,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``x``: one sample, (*input). ``directions``: (1 or 2, *input), None for all of an input of that dimension.

        The slice is x + sum_k t_k directions_k with |t| <= eps; a disc is replaced by the polygon with that many
        corners on its edge. Directions are taken as stored and must not lengthen t.

        features: of points (B, *input) in float64, (B, h): says which numbers are meant, of those that the model has
            on the way. Nothing else is taken from it.
        """
        radius = eps if isinstance(eps, fmpq) else rational(float(eps))
        if directions is None:
            directions = torch.eye(x.numel(), dtype=torch.float64)
        axes = fmpq_mat(len(directions), x.numel(), rationals(directions)).transpose()
        gram = axes.transpose() * axes
        slack = [[fmpq(i == j) - gram[i, j] for j in range(gram.ncols())] for i in range(gram.nrows())]
        assert all(slack[i][i] >= 0 for i in range(len(slack))) and fmpq_mat(slack).det() >= 0, "directions lengthen t"
        self.dimension, self.sizes, self.features = axes.ncols(), x.shape, features
        cell = [[-radius], [radius]] if self.dimension == 1 else _polygon(radius, corners)
        start = [[value, *row] for value, row in zip(rationals(x), axes.tolist(), strict=True)]
        walk = Walk(model, x.shape, x.dtype)
        self.pieces = [Piece(*piece) for piece in walk.pieces(cell, start)]
        [self.centre] = [Piece(*piece) for piece in walk.pieces([[]], [form[:1] for form in start])]
        self.clean_logits = [form[0] for form in self.centre.logits.forms]

    def margin(self, label: int) -> fmpq:
        """The least of logit `label` minus the best other on the slice."""
        return min(margin_of(logits, label) for logits in zip(*self.logit_values, strict=True))

    @cached_property
    def corners(self) -> Tensor:
        """(N, *input) of all pieces, in float64."""
        points = [floats(piece.at_corners(piece.values[0].forms)) for piece in self.pieces]
        return torch.cat(points, 1).T.reshape(-1, *self.sizes)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Of each feature the number that agrees with it in all corners: the same function, as pieces are linear."""
        assert self.features is not None, "nobody said which numbers are features"
        named = [(-1, 0), *((i, k) for i, value in enumerate(self.centre.values) for k in range(len(value.forms)))]
        own = []
        for piece in self.pieces:
            forms = torch.cat([torch.zeros(1, 1 + self.dimension), *(value.floats for value in piece.values)])
            own.append(forms @ floats([[fmpq(1), *corner] for corner in piece.cell]).T)
        with torch.no_grad():
            wanted = self.features(self.corners).T
        nearest = torch.cdist(wanted, torch.cat(own, 1), p=math.inf).min(1)
        assert (nearest.values <= 1e-9 * (1 + wanted.abs().amax(1))).all(), "a feature is no number of the model"
        return [named[k] for k in nearest.indices.tolist()]

    @cached_property
    def clean(self) -> list[fmpq]:
        return [self.centre.form(place)[0] for place in self.places]

    @cached_property
    def feature_values(self) -> list[list[fmpq]]:
        """(features, corners of all pieces)"""
        return self._together(piece.at_corners([piece.form(at) for at in self.places]) for piece in self.pieces)

    @staticmethod
    def _together(parts: Iterable[list[list[fmpq]]]) -> list[list[fmpq]]:
        return [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)]

    @cached_property
    def constant(self) -> list[Tensor]:
        """Of each value, which numbers (*sizes) are the same on all the slice."""
        pieces = [[value.floats[:, 1:] == 0 for value in piece.values] for piece in self.pieces]
        together = [torch.stack(parts).all(2).all(0) for parts in zip(*pieces, strict=True)]
        return [flat.view(value.shape[1:]) for flat, value in zip(together, self.centre.values, strict=True)]

    def has_constant(self, chosen: Tensor) -> bool:
        """Whether some value of that shape has constants wherever `chosen` is True."""
        return any(bool(flat[chosen].all()) for flat in self.constant if flat.shape == chosen.shape)

    @cached_property
    def logit_values(self) -> list[list[fmpq]]:
        """(logits, corners of all pieces)"""
        return self._together(piece.at_corners(piece.logits.forms) for piece in self.pieces)

    @cached_property
    def feature_range(self) -> tuple[list[fmpq], list[fmpq]]:
        """The least and the largest value of every feature."""
        return [min(values) for values in self.feature_values], [max(values) for values in self.feature_values]

    @cached_property
    def moved_squared(self) -> fmpq:
        """The largest squared distance of the features from the clean ones."""
        points = zip(*self.feature_values, strict=True)
        return max(sum((v - c) ** 2 for v, c in zip(point, self.clean, strict=True)) for point in points)

    @cached_property
    def stretch_squared(self) -> arb:
        """The largest squared norm of a piece's Jacobian (features by slice coordinates), from below."""
        best = arb(0)
        for piece in self.pieces:
            forms = [piece.form(place) for place in self.places]
            slopes = [[form[k + 1] for form in forms] for k in range(self.dimension)]
            gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in slopes] for p in slopes]
            if self.dimension == 1:
                top = arb(gram[0][0])
            else:
                trace, spread = gram[0][0] + gram[1][1], (gram[0][0] - gram[1][1]) ** 2 + 4 * gram[0][1] ** 2
                top = (arb(trace) + arb(spread).sqrt()) / 2
            best = best.max(top.lower())
        return best


def _polygon(radius: fmpq, corners: int) -> Cell:
    """Rational points of the circle, in order: ((1 - t^2), 2 t) / (1 + t^2) with t the tangent of half the angle."""
    angles = np.pi * (2 * np.arange(corners) + 1 - corners) / corners
    tangents = [fmpq(int(t), 2**10) for t in np.rint(np.tan(angles / 2) * 2**10)]
    return [[radius * (1 - t * t) / (1 + t * t), radius * 2 * t / (1 + t * t)] for t in tangents]


def evaluate(model: Callable[[Tensor], Tensor], point: Tensor) -> list[fmpq]:
    """What the model makes of one sample, (*input), exactly."""
    [(_, _, result)] = Walk(model, point.shape, point.dtype).pieces([[]], [[value] for value in rationals(point)])
    return [form[0] for form in result.forms]


class Affine(NamedTuple):
    """x -> A x + b on flattened samples: A (m, n), b m numbers."""

    matrix: fmpq_mat
    bias: list[fmpq]


def affine(model: Callable[[Tensor], Tensor], sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> Affine:
    """Of a model that compares nothing: its form in all coordinates of the input."""
    count = math.prod(sizes)
    units = [[fmpq(0), *(fmpq(i == j) for j in range(count))] for i in range(count)]
    [(_, _, result)] = Walk(model, sizes, dtype).pieces([], units)
    return Affine(fmpq_mat([form[1:] for form in result.forms]), [form[0] for form in result.forms])


def margin_of(logits: Sequence[fmpq], label: int) -> fmpq:
    return logits[label] - max(value for j, value in enumerate(logits) if j != label)


def inside_ball(point: Tensor, x: Tensor, eps: float) -> bool:
    """||point - x||_2 <= eps in rationals, for stored values."""
    square = sum((p - c) ** 2 for p, c in zip(rationals(point), rationals(x), strict=True))
    return bool(square <= rational(float(eps)) ** 2)


# for a number of units
PIECEWISE_LINEAR: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda units: nn.ReLU(),
    "leaky-relu": lambda units: nn.LeakyReLU(0.3),
    "clipped-relu": lambda units: ClippedReLU(units, 0.4),
    "maxmin": lambda units: MaxMin(),
    "clipped-maxmin": lambda units: ClippedMaxMin(units // 2, 0.3, -0.3),
}


def plane_network(name: str, seed: int, inputs: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A network that is cut in a fraction of a second: two hidden layers on 1 or 2 inputs, 3 classes."""
    activation = PIECEWISE_LINEAR[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(inputs, 8), activation(8), nn.Linear(8, 6), activation(6), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype).requires_grad_(False)
