"""Per-sample operator norms of masked layers: argument checks and the solver's policy over :mod:`locallip_cuda.ops`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import ops
from ..rounding import TINY, exponent_of, power_of_two, rescaled, rounded_up, textbook_products, up
from .cholesky import proved_norms
from .lanczos import absolute_norms, check_entropy, probable_norms
from .operator import Geometry, described, masked_operator


class NormBound(NamedTuple):
    """What :func:`masked_norm_bound` returns: ``upper`` and ``estimate`` of shape (B,), and what ``upper`` is worth.

    ``failure_probability`` is the chance that one ``upper`` is too small: 0 for a proof, 1 for an estimate, and 1 where
    a ``seed`` was given, which voids the promise.
    """

    upper: Tensor
    estimate: Tensor
    guarantee: str
    failure_probability: float
    seed: int | None = None


# enough for a converged value on every operator but those with a minute gap, where the value is as good
ESTIMATE_ITERATIONS = 100

# units of all samples that the solver's 16 vectors are held for at a time
ESTIMATE_CHUNK = 2**24

# relative width of a probabilistic bound
TIGHTNESS = 5e-3

# failure probability, relative width and seed of the run whose estimate a deterministic bound starts from: where that
# has not converged a factorisation fails, which costs more than the steps
SEARCH = (1e-9, 1e-3, 0)

GUARANTEES = ("estimate", "probabilistic", "deterministic")


def check_input(x: Tensor) -> None:
    """TypeError or ValueError where ``x`` is no batch (B, ...) that bounds are computed for."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: got {described(x)}, want a torch.float32 or torch.float64 tensor")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (B, ...)")


def check_guarantee(guarantee: str, failure_probability: float, seed: int | None = None) -> None:
    """ValueError or TypeError for an unknown guarantee, a number that is no probability, or no possible one, or a seed
    that is no integer or would not be used."""
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee: got {guarantee!r}, want one of {', '.join(map(repr, GUARANTEES))}")
    if isinstance(failure_probability, bool) or not isinstance(failure_probability, (int, float)):
        raise TypeError(f"failure_probability: got {described(failure_probability)}, want a number in (0, 1)")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability: got {failure_probability}, want a number in (0, 1)")
    if guarantee == "probabilistic":
        check_entropy(failure_probability)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: got {described(seed)}, want an int or None")
    if seed is not None and guarantee != "probabilistic":
        raise ValueError(f"seed: got {seed} under guarantee {guarantee!r}, want None: nothing in it is random")


def stated_failure_probability(guarantee: str, failure_probability: float, seed: int | None) -> float:
    """What a result under ``guarantee`` says of itself: a proof never fails; an estimate, and one whose random numbers
    somebody knew, may always."""
    probable = failure_probability if seed is None else 1.0
    return {"estimate": 1.0, "probabilistic": probable, "deterministic": 0.0}[guarantee]


def values_are_at_hand(t: Tensor) -> bool:
    """Whether a check may look at the values of ``t``: not on a GPU, which it would wait for, nor in a traced graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


@overload
def masked_norm(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    *,
    input_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    iterations: int = 4,
    start: Tensor | None = None,
    return_vectors: Literal[False] = False,
) -> Tensor: ...


@overload
def masked_norm(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    *,
    input_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    iterations: int = 4,
    start: Tensor | None = None,
    return_vectors: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def masked_norm(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    *,
    input_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    iterations: int = 4,
    start: Tensor | None = None,
    return_vectors: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Operator norms ``sigma_b = ||diag(row_mask_b) W diag(col_mask_b)||_2`` of one weight under a batch of masks.

    The value is the largest singular value of the masked operator on a Krylov space of A^T A with ``iterations + 1``
    dimensions (Golub-Kahan-Lanczos with full orthogonalisation, restarted past 16 dimensions), so it is never above the
    true norm but for rounding. It is an estimate for training, not a certificate: that is :func:`masked_norm_bound`.
    Long vectors of at most 15 iterations, and all in kernels that stay on a GPU's chip, are orthogonalised against the
    last one alone: the same but for rounding. On a GPU that is TF32's for float32 weights, about 1e-3, where
    ``torch.backends.cuda.matmul.allow_tf32`` or ``torch.set_float32_matmul_precision`` asks for it. Under autocast to
    bfloat16 a CPU that has instructions for it, and a GPU, find the right singular vectors in bfloat16, and their
    values, which may be a thousandth lower for it and no higher, by a product in float32; but of convolutions on a
    GPU's chip values are those of bfloat16 too, right to about 1e-3 and to 1e-2 in any case that is tested.

    Args:
        weight: (m, n), or (Cout, Cin/groups, *kernel) for a zero-padded convolution over one to three dimensions;
            float32 or float64. One over three is taken as one over two, with the first of them unrolled into channels.
        row_mask: bool (B, m) or (B, Cout, *output), True where a row stays; None keeps all rows.
        col_mask: bool (B, n) or (B, Cin, *input), True where a column stays; None keeps all columns.
        input_size: (Cin, *input); needed for a convolution without ``col_mask``.
        stride, padding, dilation, groups: of the convolution, as in :func:`torch.nn.functional.conv2d`.
        transposed: a transposed convolution, as in :func:`torch.nn.functional.conv_transpose2d`, with a weight
            (Cin, Cout/groups, *kernel). Its output is as large as ``row_mask`` where that is given, and as without
            ``output_padding`` where it is not.
        iterations: how many times A^T A enters the Krylov space; each costs one application of W and one of W^T. For
            a dense weight with at most 16 rows the space is exhausted, whatever the number.
        start: right vectors to start from, (*input) or (B, *input); a small fixed pseudo-random vector is always
            added, so that no start is without a component on the top singular vector. None starts pseudo-randomly.
        return_vectors: also return the unit right and left singular vectors u (B, *input), v (B, *output).

    Returns:
        sigma (B,) in weight's dtype, B = 1 where both masks are None. Differentiable in ``weight``:
        d sigma = v^T diag(row) dW diag(col) u. An empty mask gives exactly 0, zero vectors and a zero gradient.
        On a GPU, NaN or infinite weights give NaN.

    Raises:
        TypeError: a mask that is not bool, a weight that is not float32 or float64.
        ValueError: shapes, devices or convolution arguments that do not fit; on a CPU, NaN or infinite weights.
    """
    operator = masked_operator(weight, row_mask, col_mask, input_size, stride, padding, dilation, groups, transposed)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: got {iterations!r}, want an integer >= 0")
    sigma, right, left = ops.masked_norm(*operator.arguments(start), iterations)
    if values_are_at_hand(weight) and bool(sigma.isnan().any()):
        raise ValueError("weight: got NaN or infinite values, want finite ones")
    return (sigma, *operator.vectors(right, left)) if return_vectors else sigma


def masked_norm_bound(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    *,
    input_size: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    guarantee: str = "probabilistic",
    failure_probability: float = 1e-9,
    tightness: float = TIGHTNESS,
    seed: int | None = None,
) -> NormBound:
    """Upper bounds of masked operator norms, of the weights as they are stored, that name their guarantee.

    Shapes and errors as :func:`masked_norm`; no gradient. The arithmetic is float64 and its rounding is accounted for;
    docs/guarantees.md has the derivations.

    Args:
        guarantee: "probabilistic": right with probability 1 - failure_probability for each sample, over random vectors
            from the operating system's entropy (:mod:`.lanczos`). "deterministic": proved by a Cholesky
            factorisation (:mod:`.cholesky`), on the CPU, usually within 1e-6 of the norm; for large
            convolutions it takes seconds a sample. "estimate": ``upper`` repeats the estimate and proves nothing.
        failure_probability: in [2^-96, 1), of the probabilistic guarantee for one sample.
        tightness: relative width of the probabilistic bound; half of it takes at most 1.4 times the steps.
        seed: repeats the random vectors of the probabilistic guarantee, and voids it: whoever knew the seed can have
            chosen weights for which the bound is wrong. The result says so.

    Returns:
        NormBound: ``upper`` (B,) in weight's dtype, rounded up, exactly 0 for an empty mask; ``estimate`` (B,);
        the guarantee; the failure probability: 0 for "deterministic", 1 for "estimate" and with a seed; the seed.
    """
    check_guarantee(guarantee, failure_probability, seed)
    if isinstance(tightness, bool) or not isinstance(tightness, (int, float)) or not 1e-6 <= tightness < math.inf:
        raise ValueError(f"tightness: got {tightness!r}, want a number >= 1e-6")
    operator = masked_operator(weight, row_mask, col_mask, input_size, stride, padding, dilation, groups, transposed)
    upper, estimate = norm_bound(
        operator.weight,
        operator.row_mask,
        operator.col_mask,
        operator.input_shape,
        operator.geometry,
        guarantee,
        failure_probability,
        tightness,
        seed,
    )
    return NormBound(
        estimate.to(weight.dtype) if guarantee == "estimate" else rounded_up(upper, weight.dtype),
        estimate.to(weight.dtype),
        guarantee,
        stated_failure_probability(guarantee, failure_probability, seed),
        seed,
    )


@torch.no_grad()
def norm_bound(
    weight: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    input_shape: Sequence[int],
    geometry: Geometry,
    guarantee: str,
    failure_probability: float,
    tightness: float = TIGHTNESS,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(upper, estimate), float64 (B,): :func:`masked_norm_bound` without its checks of shapes."""
    largest = weight.detach().abs().amax().double().cpu()
    if not bool(largest.isfinite()):
        raise ValueError("weight: got NaN or infinite values, want finite ones")
    # a power of two away from overflow and underflow of squares: exact, but for entries 2^1000 below the largest
    exponent = exponent_of(largest) if largest > 0 else torch.tensor(0, device="cpu")
    power = power_of_two(exponent)
    scaled = weight.detach().double() * power_of_two(-exponent).item()
    arguments = (row_mask, col_mask, input_shape, *geometry)
    with textbook_products(weight.device.type):
        if guarantee == "estimate":
            estimate = _estimates(scaled.to(weight.dtype), row_mask, col_mask, input_shape, geometry)
            return estimate * power.item(), estimate * power.item()
        if guarantee == "deterministic":  # the same random vectors at every call: nothing depends on them but the width
            failure_probability, tightness, seed = SEARCH
        upper, estimate = probable_norms(scaled, *arguments, failure_probability, tightness, seed)
        if guarantee == "deterministic":
            rows, cols = (None if mask is None else mask.cpu() for mask in (row_mask, col_mask))
            upper = proved_norms(
                scaled.cpu(),
                rows,
                cols,
                estimate.cpu(),
                input_shape,
                *geometry,
                cap=lambda: _proved_global_norm(scaled.cpu(), input_shape, geometry),
            ).to(weight.device)
        if not torch.equal(scaled * power.item(), weight.detach().double()):
            size = math.sqrt(weight[0].numel() * weight[:, 0].numel() * geometry[3])
            touched = absolute_norms((weight != 0).double(), *arguments) > 0
            upper = torch.where(touched, up(upper + size * 2 * TINY), upper)
    return rescaled(upper, power.item()), estimate * power.item()


def _estimates(
    weight: Tensor, row_mask: Tensor | None, col_mask: Tensor | None, input_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """Converged norms (B,) in float64, a few samples at a time: the solver holds 16 vectors of each."""
    chunk = max(ESTIMATE_CHUNK // math.prod(input_shape[1:]), 1)
    parts = []
    for first in range(0, input_shape[0], chunk):
        rows, cols = (None if mask is None else mask[first : first + chunk] for mask in (row_mask, col_mask))
        shape = [min(chunk, input_shape[0] - first), *input_shape[1:]]
        parts.append(ops.masked_norm(weight, rows, cols, None, shape, *geometry, ESTIMATE_ITERATIONS)[0])
    return torch.cat(parts).double() if parts else weight.new_empty(0, dtype=torch.float64)


GLOBAL_NORMS_AT_MOST = 1024
_global_norms: dict[tuple[Any, ...], float] = {}


def _proved_global_norm(scaled: Tensor, input_shape: Sequence[int], geometry: Geometry) -> float:
    """The deterministic bound without masks, proved once. Kept by the weight's content: an identity can go stale."""
    content = hashlib.sha256(scaled.contiguous().numpy().tobytes()).digest()
    key = (content, tuple(scaled.shape), tuple(input_shape[1:]), str(geometry))
    if key not in _global_norms:
        if len(_global_norms) >= GLOBAL_NORMS_AT_MOST:
            _global_norms.clear()
        arguments = (None, None, [1, *input_shape[1:]], *geometry)
        _, estimate = probable_norms(scaled, *arguments, *SEARCH)
        _global_norms[key] = float(proved_norms(scaled, None, None, estimate, *arguments[2:]))
    return _global_norms[key]
