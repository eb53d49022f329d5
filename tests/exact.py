"""Oracles that owe nothing to the package: proved lower bounds of operator norms, and small networks in rationals.

Norms. ||A x|| / ||x|| is at most ||A||_2 for any x at all. Taken in extended precision with a bound on its rounding it
is a proved lower bound, and for a singular vector it agrees with the norm to 16 digits: no upper bound may be below it.

Networks. On a segment or a disc around the input, a network of piecewise linear activations is cut into its linear
pieces, in rationals throughout, with the weights as they are stored. What is read off the corners of the pieces
(margins, features) is taken by the real function, and the Jacobians of the pieces are Jacobians of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from flint import arb, fmpq, fmpq_mat
from torch import Tensor, nn

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize

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


def quotient_below(matrix: scipy.sparse.csr_array, x: np.ndarray) -> np.longdouble:
    """At most ||A x|| / ||x|| in real arithmetic: the quotient in extended precision less a bound of its rounding.

    |fl(A x) - A x| <= gamma(k) |A| |x| by components, k the most terms to a row, in any order of summation; sums of
    squares, their roots and the quotient have relative errors. Float64 squares neither overflow nor underflow here.
    """

    def gamma(k: int) -> np.longdouble:
        return k * UNIT / (1 - k * UNIT)

    m, n = matrix.shape
    terms = int(np.diff(matrix.indptr).max(initial=0))
    x = x.astype(np.longdouble)
    wide = matrix.astype(np.longdouble)
    image, size = wide @ x, abs(wide) @ abs(x)
    length = np.sqrt((image * image).sum()) * (1 - gamma(m + 4))
    error = gamma(terms) * np.sqrt((size * size).sum()) * (1 + gamma(m + terms + 8))
    below = (length - error) / (np.sqrt((x * x).sum()) * (1 + gamma(n + 4))) * (1 - 8 * UNIT)
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


def operator_norm(matrix: scipy.sparse.csr_array) -> Norm:
    """Norm of a sparse float64 matrix: the float64 singular value, and its singular vector's quotient as the proof."""
    largest = abs(matrix).max() if matrix.nnz and min(matrix.shape) else 0.0
    if largest == 0:
        return Norm(np.longdouble(0), np.longdouble(0))
    exponent = int(np.frexp(largest)[1])
    scaled = matrix.astype(np.longdouble)
    scaled.data = np.ldexp(scaled.data, -exponent)
    scaled = scaled.astype(np.float64)
    if matrix.shape[0] * matrix.shape[1] <= DENSE:
        _, values, right = scipy.linalg.svd(scaled.toarray(), full_matrices=False, check_finite=False)
        value, vector = values[0], right[0]
    else:
        value, vector = _lanczos(scaled)
    return Norm(quotient_below(matrix, vector), np.ldexp(np.longdouble(value), exponent))


# --- networks in rationals --------------------------------------------------------------------------------------------


def rational(value: float) -> fmpq:
    return fmpq(*value.as_integer_ratio())


def float_of(value: fmpq) -> float:
    return int(value.p) / int(value.q)


def rationals(t: Tensor) -> list[fmpq]:
    """The stored values, flattened; a float32 is the rational number that it is."""
    return [rational(value) for value in t.detach().double().flatten().tolist()]


class Affine(NamedTuple):
    """x -> A x + b on flattened samples: A (m, n), b (m, 1)."""

    matrix: fmpq_mat
    bias: fmpq_mat


def _affine(matrix: scipy.sparse.csr_array, bias: list[fmpq], unit: fmpq | None = None) -> Affine:
    exact = fmpq_mat(*matrix.shape)
    coordinates = matrix.tocoo()
    for i, j, value in zip(coordinates.row.tolist(), coordinates.col.tolist(), coordinates.data.tolist(), strict=True):
        exact[i, j] = rational(value) * (unit or 1)
    return Affine(exact, fmpq_mat(len(bias), 1, bias))


def _convolution(module: nn.Conv2d, sizes: Sequence[int]) -> Affine:
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = (reach[0], reach[1]) if padding == "same" else (0, 0)
    matrix = operator_matrix(module.weight, sizes, module.stride, padding, module.dilation, module.groups)
    bias = [fmpq(0)] * module.out_channels if module.bias is None else rationals(module.bias)
    pixels = matrix.shape[0] // module.out_channels
    return _affine(matrix, [b for b in bias for _ in range(pixels)])


def _average_pool(module: nn.AvgPool2d, sizes: Sequence[int]) -> Affine:
    """The mean of real arithmetic: 1/9 is a ninth."""
    kernel = _pair(module.kernel_size)
    ones = torch.ones(sizes[0], 1, *kernel, dtype=torch.float64)
    stride = module.kernel_size if module.stride is None else module.stride
    matrix = operator_matrix(ones, sizes, stride, module.padding, 1, sizes[0])
    share = fmpq(1, module.divisor_override or kernel[0] * kernel[1])
    return _affine(matrix, [fmpq(0)] * matrix.shape[0], share)


def _normalize(module: Normalize, sizes: Sequence[int]) -> Affine:
    """(x - mean) / std of real arithmetic."""
    units, pixels = int(np.prod(sizes)), int(np.prod(sizes[1:]))
    mean, std = (rationals(t.expand(sizes[0])) for t in (module.mean, module.std))
    matrix = fmpq_mat(units, units)
    for i in range(units):
        matrix[i, i] = 1 / std[i // pixels]
    return Affine(matrix, fmpq_mat(units, 1, [-mean[i // pixels] / std[i // pixels] for i in range(units)]))


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    elif not isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        yield module


Layer = Affine | nn.Module  # an activation stays the module it is


@torch.no_grad()
def layers_of(model: nn.Sequential, input_size: Sequence[int]) -> list[Layer]:
    """The network on flattened samples, affine layers exact; the sizes between them come from running it."""
    layers: list[Layer] = []
    value = torch.zeros(1, *input_size, dtype=next((p.dtype for p in model.parameters()), torch.float64))
    for module in _leaves(model):
        sizes = value.shape[1:]
        match module:
            case nn.Linear():
                bias = [fmpq(0)] * module.out_features if module.bias is None else rationals(module.bias)
                layers.append(_affine(operator_matrix(module.weight), bias))
            case nn.Conv2d():
                layers.append(_convolution(module, sizes))
            case nn.AvgPool2d():
                layers.append(_average_pool(module, sizes))
            case Normalize():
                layers.append(_normalize(module, sizes))
            case nn.ReLU() | nn.LeakyReLU() | ClippedReLU() | MaxMin() | ClippedMaxMin():
                layers.append(module)
            case nn.Flatten():
                pass
            case _:
                raise NotImplementedError(f"{module} is not piecewise linear")
        value = module(value)
    return layers


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


def _larger(cell: Cell, f: Form, g: Form) -> list[tuple[Cell, Form]]:
    """max(f, g) on a cell: the parts on which it is one of them, with the one that it is."""
    difference = [a - b for a, b in zip(f, g, strict=True)]
    values = [_at(difference, corner) for corner in cell]
    if min(values) >= 0:
        return [(cell, f)]
    if max(values) <= 0:
        return [(cell, g)]
    return [(_clip(cell, difference), f), (_clip(cell, [-d for d in difference]), g)]


def _smaller(cell: Cell, f: Form, g: Form) -> list[tuple[Cell, Form]]:
    return [(part, f if form is g else g) for part, form in _larger(cell, f, g)]


def _outputs(module: nn.Module, forms: list[Form], cell: Cell) -> list[tuple[Cell, list[Form]]]:
    """An activation on one cell: the pieces it is cut into, with the outputs' forms on each."""

    def constant(value: fmpq) -> Form:
        return [value] + [fmpq(0)] * (len(forms[0]) - 1)

    half = len(forms) // 2
    pieces: list[tuple[Cell, list[Form]]] = [(cell, [])]
    if isinstance(module, (nn.ReLU, nn.LeakyReLU, ClippedReLU)):
        slope = rational(module.negative_slope) if isinstance(module, nn.LeakyReLU) else fmpq(0)
        for k, form in enumerate(forms):
            low = [slope * value for value in form]
            pieces = [(c, [*done, out]) for part, done in pieces for c, out in _larger(part, form, low)]
            if isinstance(module, ClippedReLU):
                top = constant(rational(float(module.threshold.flatten()[k])))
                pieces = [(c, [*done[:-1], out]) for part, done in pieces for c, out in _smaller(part, done[-1], top)]
        return pieces
    for k in range(half):
        a, b = forms[k], forms[k + half]
        both = [p + q for p, q in zip(a, b, strict=True)]
        pieces = [
            (c, [*done, high, [s - h for s, h in zip(both, high, strict=True)]])
            for part, done in pieces
            for c, high in _larger(part, a, b)
        ]
        if isinstance(module, ClippedMaxMin):
            top, bottom = (constant(rational(float(t.flatten()[k]))) for t in (module.upper, module.lower))
            pieces = [
                (c, [*done[:-2], high, low])
                for whole, done in pieces
                for part, high in _smaller(whole, done[-2], top)
                for c, low in _larger(part, done[-1], bottom)
            ]
    return [(c, done[0::2] + done[1::2]) for c, done in pieces]


@dataclass
class Piece:
    """One linear piece: its corners, and on it the features (last layer's input) and the logits as affine forms."""

    cell: Cell
    features: fmpq_mat
    logits: fmpq_mat

    def at_corners(self, forms: fmpq_mat) -> fmpq_mat:
        """(units, corners)"""
        points = [[fmpq(1), *corner] for corner in self.cell]
        return forms * fmpq_mat(points).transpose()


class Exact:
    """A network on a segment or a disc around one input, cut into its linear pieces.

    Attributes:
        clean: features at the input. pieces: list of Piece.
    """

    def __init__(
        self, model: nn.Sequential, x: Tensor, eps: float | fmpq, directions: Tensor | None = None, corners: int = 24
    ) -> None:
        """``x``: one sample, (*input). ``directions``: (1 or 2, *input), None for all of an input of that dimension.

        The slice is x + sum_k t_k directions_k with |t| <= eps; a disc is replaced by the polygon with that many
        corners on its edge. Directions are taken as stored and must not lengthen t.
        """
        radius = eps if isinstance(eps, fmpq) else rational(float(eps))
        if directions is None:
            directions = torch.eye(x.numel(), dtype=torch.float64)
        axes = fmpq_mat(len(directions), x.numel(), rationals(directions)).transpose()
        gram = axes.transpose() * axes
        slack = [[fmpq(i == j) - gram[i, j] for j in range(gram.ncols())] for i in range(gram.nrows())]
        assert all(slack[i][i] >= 0 for i in range(len(slack))) and fmpq_mat(slack).det() >= 0, "directions lengthen t"
        self.dimension = axes.ncols()
        cell = [[-radius], [radius]] if self.dimension == 1 else _polygon(radius, corners)
        origin = rationals(x)
        start = fmpq_mat([[origin[i], *(axes[i, k] for k in range(self.dimension))] for i in range(len(origin))])
        layers = with_one_last_layer(layers_of(model, x.shape))
        self.pieces = [Piece(*piece) for piece in _pieces(layers, cell, start)]
        self.clean = evaluate(layers[:-1], origin)
        self.clean_logits = evaluate(layers[-1:], self.clean)

    def margin(self, label: int) -> fmpq:
        """The least of logit `label` minus the best other on the slice."""
        least = []
        for piece in self.pieces:
            values = piece.at_corners(piece.logits)
            others = [j for j in range(values.nrows()) if j != label]
            least += [min(values[label, k] - values[j, k] for j in others) for k in range(values.ncols())]
        return min(least)

    def feature_range(self) -> tuple[list[fmpq], list[fmpq]]:
        """The least and the largest value of every feature."""
        columns = [piece.at_corners(piece.features).tolist() for piece in self.pieces]
        units = [[value for values in columns for value in values[i]] for i in range(len(columns[0]))]
        return [min(values) for values in units], [max(values) for values in units]

    def moved_squared(self) -> fmpq:
        """The largest squared distance of the features from the clean ones."""
        moved = []
        for piece in self.pieces:
            values = piece.at_corners(piece.features)
            for k in range(values.ncols()):
                moved.append(sum((values[i, k] - c) ** 2 for i, c in enumerate(self.clean)))
        return max(moved)

    def stretch_squared(self) -> arb:
        """The largest squared norm of a piece's Jacobian (features by slice coordinates), from below."""
        best = arb(0)
        for piece in self.pieces:
            slopes = [[piece.features[i, k + 1] for i in range(piece.features.nrows())] for k in range(self.dimension)]
            gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in slopes] for p in slopes]
            if self.dimension == 1:
                top = arb(gram[0][0])
            else:
                trace, spread = gram[0][0] + gram[1][1], (gram[0][0] - gram[1][1]) ** 2 + 4 * gram[0][1] ** 2
                top = (arb(trace) + arb(spread).sqrt()) / 2
            best = best.max(top.lower())
        return best


def with_one_last_layer(layers: Sequence[Layer]) -> list[Layer]:
    """Affine layers at the end as the one that they are: features are what an activation, or nothing, returns."""
    *rest, last = layers
    while rest and isinstance(rest[-1], Affine) and isinstance(last, Affine):
        first = rest.pop()
        last = Affine(last.matrix * first.matrix, last.matrix * first.bias + last.bias)
    return [*rest, last]


def _polygon(radius: fmpq, corners: int) -> Cell:
    """Rational points of the circle, in order: ((1 - t^2), 2 t) / (1 + t^2) with t the tangent of half the angle."""
    angles = np.pi * (2 * np.arange(corners) + 1 - corners) / corners
    tangents = [fmpq(int(t), 2**10) for t in np.rint(np.tan(angles / 2) * 2**10)]
    return [[radius * (1 - t * t) / (1 + t * t), radius * 2 * t / (1 + t * t)] for t in tangents]


def _pieces(layers: Sequence[Layer], cell: Cell, forms: fmpq_mat) -> Iterator[tuple[Cell, fmpq_mat, fmpq_mat]]:
    layer, *rest = layers
    if isinstance(layer, Affine):
        image = layer.matrix * forms
        for i in range(image.nrows()):
            image[i, 0] += layer.bias[i, 0]
        if rest:
            yield from _pieces(rest, cell, image)
        else:
            yield cell, forms, image
    else:
        for part, outputs in _outputs(layer, forms.tolist(), cell):
            yield from _pieces(rest, part, fmpq_mat(outputs))


def evaluate(layers: Sequence[Layer], point: Sequence[fmpq]) -> list[fmpq]:
    """What the layers make of one flattened input, exactly."""
    value = list(point)
    for layer in layers:
        if isinstance(layer, Affine):
            value = [row[0] for row in (layer.matrix * fmpq_mat(len(value), 1, value) + layer.bias).tolist()]
        else:
            # on the cell that is one point nothing is cut
            [(_, outputs)] = _outputs(layer, [[v] for v in value], [[]])
            value = [form[0] for form in outputs]
    return value


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
