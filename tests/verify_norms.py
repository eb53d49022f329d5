"""Upper bounds of masked norms against verified lower bounds, on random and adversarial operators: the check at scale.

Operators are weights of one layer, or those of several in a row with masks between them.

    python -m tests.verify_norms --count 10000 --seed 0 --out bench/results/norms.json

Every masked operator is compared with the norm of its surviving rows and columns: LAPACK's largest singular value
(above 2^19 entries that of a Lanczos iteration), whose singular vector's quotient ||A x|| / ||x||, in extended
precision and less its rounding, is a proved lower bound of the norm (tests/exact.py). An upper bound below it is a
violation. The relative excess over the singular value says how tight a bound is; it is not asked of norms among the
denormal numbers.

Exit status 1 after a violation, or where a bound is looser than the limits printed. Operator INDEX of a run is
`operator_at(seed, INDEX)`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import locallip_cuda as ll
from locallip_cuda.norms.linear import Convolution, Dense, LinearMap, Masking, Reshape, composed, is_of_even_size
from locallip_cuda.norms.linear_bound import Stage, absolute_norm, converged_norm, proved_chain_norm, proved_norm
from locallip_cuda.ops.reference import pseudo_random
from tests.exact import Norm, operator_matrix, operator_norm, survivors

LARGEST = 512  # rows and columns of a dense operator
CHANNELS, PIXELS = 32, 16
MOST_MASKS = 3  # per weight: the most

# (median, worst) relative excess
LIMITS = {"deterministic": (1e-6, 1e-3), "probabilistic": (5e-3, 5e-3)}


@dataclass
class MaskedOperators:
    """One weight and the masks of B samples; ``kind`` says how it was made."""

    kind: str
    weight: Tensor
    row_mask: Tensor | None
    col_mask: Tensor | None
    input_size: tuple[int, ...] | None = None
    conv: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return max((len(mask) for mask in (self.row_mask, self.col_mask) if mask is not None), default=1)

    def bound(self, guarantee: str, device: str = "cpu") -> Tensor:
        """(B,) or (1,)"""
        weight, *masks = (None if t is None else t.to(device) for t in (self.weight, self.row_mask, self.col_mask))
        size = None if self.col_mask is not None else self.input_size
        found = ll.masked_norm_bound(weight, *masks, input_size=size, guarantee=guarantee, **self.conv)
        assert found.guarantee == guarantee
        return found.upper

    def norms(self) -> list[Norm]:
        """Of every sample, by the oracle."""
        whole = operator_matrix(self.weight, self.input_size, **self.conv)
        found = []
        for sample in range(len(self)):
            masks = [None if mask is None else mask[sample] for mask in (self.row_mask, self.col_mask)]
            found.append(operator_norm(survivors(whole, *masks)))
        return found

    @property
    def limited(self) -> bool:
        """Whether the excess of its bounds is to be below the limit."""
        return True


@dataclass
class MaskedChains:
    """Weights in a row, the first one applied first, with a mask (B, *) before, between and behind them.

    maps: of each its weight, the size of its input, and how it strides.
    """

    kind: str
    maps: list[tuple[Tensor, tuple[int, ...], dict[str, Any]]]
    masks: list[Tensor]

    def __len__(self) -> int:
        return len(self.masks[0])

    @property
    def linears(self) -> list[LinearMap]:
        return [_map_of(weight.double(), size, conv) for weight, size, conv in self.maps]

    def chain(self, linears: list[LinearMap]) -> LinearMap:
        linear = linears[0]
        for each, mask in zip(linears[1:], self.masks[1:-1], strict=True):
            linear = composed(composed(linear, Masking(mask, each.like)), each)
        return linear

    def bound(self, guarantee: str, device: str = "cpu") -> Tensor:
        """(B,)"""
        here = MaskedChains(
            self.kind,
            [(weight.to(device), size, conv) for weight, size, conv in self.maps],
            [mask.to(device) for mask in self.masks],
        )
        linears, masks = here.linears, here.masks
        whole = here.chain(linears)
        if guarantee == "estimate":
            return converged_norm(whole, masks[-1], masks[0], len(self))
        stages = []
        for linear, before, behind in zip(linears, masks, masks[1:], strict=False):
            norm = proved_norm(linear, behind, before, len(self), guarantee, 1e-9)
            stages.append(Stage(linear, norm, absolute_norm(linear, None, None, 1)))
        return proved_chain_norm(whole, masks[-1], masks[0], stages, guarantee, 1e-9)

    def norms(self) -> list[Norm]:
        """Of every sample, by the oracle."""
        wholes = [operator_matrix(weight, size, **conv) for weight, size, conv in self.maps]
        found = []
        for sample in range(len(self)):
            own = [mask[sample] for mask in self.masks]
            parts = zip(wholes, own, own[1:], strict=False)
            found.append(operator_norm(*(survivors(whole, behind, before) for whole, before, behind in parts)))
        return found

    @property
    def limited(self) -> bool:
        """Of far apart sizes, and below 2^-150, it is the product of norms; and rounding shows where masks and product
        leave next to nothing of the maps."""
        linears = self.linears
        if not is_of_even_size(self.chain(linears)):
            return False
        products, absolute = np.ones(len(self), dtype=np.longdouble), np.longdouble(1)
        for linear, (weight, size, conv), before, behind in zip(
            linears, self.maps, self.masks, self.masks[1:], strict=False
        ):
            own = MaskedOperators("", weight, behind, before, size, conv).norms()
            products *= np.array([norm.value for norm in own])
            absolute *= float(absolute_norm(linear, None, None, 1))
        least = max(np.longdouble(2.0**-150), 1e-5 * absolute)
        return all(product == 0 or norm.value >= least for norm, product in zip(self.norms(), products, strict=True))


Operators = MaskedOperators | MaskedChains


def _map_of(weight: Tensor, size: tuple[int, ...], conv: dict[str, Any]) -> LinearMap:
    if weight.dim() == 2:
        return Dense(weight) if len(size) == 1 else composed(Reshape(size, (math.prod(size),), weight), Dense(weight))
    pairs = [[conv[name]] * 2 for name in ("stride", "padding", "dilation")]
    return Convolution(weight, size, *pairs, conv["groups"])


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _uniform(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def _sizes(g: torch.Generator, *largest: int) -> list[int]:
    """Log-uniform between 1 and the largest; in one operator of seven all of them are the largest."""
    if _uniform(g, 0, 1) < 1 / 7:
        return list(largest)
    return [round(math.exp(_uniform(g, 0, math.log(most)))) for most in largest]


def _choice(g: torch.Generator, options: list[Any]) -> Any:
    return options[int(torch.randint(len(options), (), generator=g))]


def with_values(g: torch.Generator, m: int, n: int, values: Tensor) -> Tensor:
    """A random m x n matrix with the first min(m, n) of the singular values."""
    values = values[: min(m, n)].double()
    u, v = (torch.linalg.qr(_normal(g, size, len(values)))[0] for size in (m, n))
    return (u * values) @ v.T


def hidden_from_the_start(g: torch.Generator, n: int, top: float) -> Tensor:
    """n x n: values 1 to 0 and one of `top`, whose singular vector is orthogonal to the start of the package's solver.

    Rounding alone shows it the direction, and among so many close values that takes hundreds of iterations.
    """
    start = pseudo_random([1, n], 0, torch.zeros(1, dtype=torch.float64))[0]
    basis = _normal(g, n, n)
    basis[:, 0] -= start * (start @ basis[:, 0]) / (start @ start)
    right = torch.linalg.qr(basis)[0]
    values = torch.linspace(1, 0, n, dtype=torch.float64)
    values[0] = top
    return (right * values) @ right.T


def _steps(*counts_and_values: tuple[int, float], then: int = 512) -> Tensor:
    """The given values, each so many times, and a linear decay from half the last of them."""
    head = [torch.full((count,), value, dtype=torch.float64) for count, value in counts_and_values]
    return torch.cat([*head, torch.linspace(counts_and_values[-1][1] / 2, 0, then, dtype=torch.float64)])


def _magnitudes(g: torch.Generator, m: int, n: int, spread: float) -> Tensor:
    """Rows and columns scaled by powers of ten, up to 10^spread apart."""
    rows, columns = (10 ** (spread * (torch.rand(size, generator=g).double() - 0.5)) for size in (m, n))
    return _normal(g, m, n) * rows[:, None] * columns


def _diagonal(m: int, n: int, values: Tensor) -> Tensor:
    out = torch.zeros(m, n, dtype=torch.float64)
    out.diagonal().copy_(values)
    return out


def _arrow(m: int, n: int) -> Tensor:
    """Ones in the first row and column: absolute row and column sums say nothing of its norm."""
    out = torch.zeros(m, n, dtype=torch.float64)
    out[0], out[:, 0] = 1, 1
    return out


def _signs(m: int, n: int) -> Tensor:
    """Part of a Hadamard matrix: the norm of |A| is a multiple of the norm of A."""
    i, j = torch.arange(m)[:, None], torch.arange(n)
    common = i & j
    parity = sum((common >> bit) & 1 for bit in range(10)) % 2
    return 1.0 - 2.0 * parity.double()


HIDDEN = "hidden from the start"
DENSE: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "Gaussian": _normal,
    "positive": lambda g, m, n: torch.rand(m, n, generator=g).double(),
    "low rank and noise": lambda g, m, n: _normal(g, m, 2) @ _normal(g, 2, n) + 1e-3 * _normal(g, m, n),
    "rank one": lambda g, m, n: _normal(g, m, 1) @ _normal(g, 1, n),
    "ones": lambda g, m, n: torch.ones(m, n, dtype=torch.float64),
    "identity": lambda g, m, n: _diagonal(m, n, torch.ones(min(m, n))),
    "signs": lambda g, m, n: _signs(m, n),
    "arrow": lambda g, m, n: _arrow(m, n),
    "sparse": lambda g, m, n: _normal(g, m, n) * (torch.rand(m, n, generator=g) < 0.05),
    "repeated top value": lambda g, m, n: with_values(g, m, n, _steps((7, 1.0))),
    "clustered top values": lambda g, m, n: with_values(g, m, n, 1 - 1e-7 * torch.arange(512, dtype=torch.float64)),
    "tiny gap": lambda g, m, n: with_values(g, m, n, _steps((1, 1.0), (1, 1 - 1e-9), (1, 1 - 1e-6))),
    "a bump on a plateau": lambda g, m, n: with_values(g, m, n, _steps((1, 1.002), (511, 1.0))),
    "dense spectrum": lambda g, m, n: with_values(g, m, n, torch.linspace(1, 0, 512)),
    "graded diagonal": lambda g, m, n: _diagonal(m, n, 2.0 ** -torch.arange(min(m, n), dtype=torch.float64)),
    "row and column scales": lambda g, m, n: _magnitudes(g, m, n, 12),
    "wild row and column scales": lambda g, m, n: _magnitudes(g, m, n, 60),
    "two blocks": lambda g, m, n: (
        F.pad(_normal(g, m - m // 2, n - n // 2), (n // 2, 0, m // 2, 0))
        + F.pad(_normal(g, m // 2, n // 2) * 3, (0, n - n // 2, 0, m - m // 2))
    ),
    HIDDEN: lambda g, m, n: hidden_from_the_start(g, n, 1.01),
}


def _separable(g: torch.Generator, shape: list[int]) -> Tensor:
    return torch.einsum("o,i,h,w->oihw", *(_normal(g, size) for size in shape))


def _shift(g: torch.Generator, shape: list[int]) -> Tensor:
    out = torch.zeros(shape, dtype=torch.float64)
    for channel in range(min(shape[:2])):
        out[channel, channel, shape[2] // 2, 0] = 1
    return out


CONVOLUTIONS: dict[str, Callable[[torch.Generator, list[int]], Tensor]] = {
    "Gaussian": lambda g, shape: _normal(g, *shape),
    "smoothing": lambda g, shape: torch.ones(shape, dtype=torch.float64),
    "positive": lambda g, shape: torch.rand(shape, generator=g).double(),
    "separable": _separable,
    "shift": _shift,
    "repeated channels": lambda g, shape: _normal(g, 1, *shape[1:]).expand(shape).contiguous(),
    "channel scales": lambda g, shape: _normal(g, *shape) * 10 ** (12 * torch.rand(shape[0], 1, 1, 1, generator=g)),
}


def _mask(g: torch.Generator, batch: int, shape: list[int]) -> Tensor | None:
    """None, all, none, one bit, whole channels, or random bits of some density; but for "none" never empty."""
    kind = _choice(g, [*["absent", "all", "channels"] * 4, "empty", *["one"] * 3, *["bits"] * 24])
    if kind == "absent":
        return None
    if kind in ("all", "empty"):
        return torch.full((batch, *shape), kind == "all")
    size = math.prod(shape)
    one = F.one_hot(torch.randint(size, (batch,), generator=g), size).bool().view(-1, *shape)
    if kind == "one":
        return one
    if kind == "channels":
        return one | (torch.rand(batch, shape[0], *[1] * (len(shape) - 1), generator=g) < 0.5)
    return one | (torch.rand(batch, *shape, generator=g) < _choice(g, [0.02, 0.1, 0.3, 0.5, 0.8, 0.98]))


def _stored(g: torch.Generator, weight: Tensor) -> Tensor:
    """Scaled, half of the time by up to 10^±30, some with entries among the denormal numbers; float32 or float64."""
    dtype = _choice(g, [torch.float32, torch.float64])
    weight = weight / (float(weight.abs().max()) or 1.0)
    if _uniform(g, 0, 1) < 0.5:
        weight = weight * 10 ** _uniform(g, -30, 30)
    if _uniform(g, 0, 1) < 0.1:
        denormal = torch.rand(weight.shape, generator=g) < 0.3
        weight = torch.where(denormal, weight.sign() * 5 * torch.finfo(dtype).smallest_normal / 64, weight)
    return weight.to(dtype)


def dense_operators(g: torch.Generator, largest: int = LARGEST) -> MaskedOperators:
    kind = _choice(g, list(DENSE))
    m, n = _sizes(g, largest, largest)
    if kind == HIDDEN:  # a mask, or single precision, would show it
        return MaskedOperators(
            f"dense: {kind}", hidden_from_the_start(g, largest, 1 + 10 ** _uniform(g, -4, -1)), None, None
        )
    weight = _stored(g, DENSE[kind](g, m, n))
    batch = 1 + int(torch.randint(MOST_MASKS, (), generator=g))
    masks = [_mask(g, batch, [size]) for size in weight.shape]
    return MaskedOperators(f"dense: {kind}", weight, *masks)


def convolution_operators(g: torch.Generator, channels: int = CHANNELS, pixels: int = PIXELS) -> MaskedOperators:
    kind = _choice(g, list(CONVOLUTIONS))
    groups = _choice(g, [1, 1, 1, 2])
    cin, cout, *size = _sizes(g, channels // groups, channels // groups, pixels, pixels)
    cin, cout = cin * groups, cout * groups
    stride, dilation = (_choice(g, options) for options in ([1, 1, 1, 2, 3], [1, 1, 1, 2]))
    padding = _choice(g, [0, 1, 1, 2])
    kernel = []
    for pixel in size:  # a dilated kernel fits in the padded input, and may be larger than the input itself
        most = min((pixel + 2 * padding - 1) // dilation + 1, 5)
        kernel.append(1 + int(torch.randint(most, (), generator=g)))
    weight = _stored(g, CONVOLUTIONS[kind](g, [cout, cin // groups, *kernel]))
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    out = F.conv2d(torch.zeros(1, cin, *size, dtype=weight.dtype), weight, None, **conv).shape[1:]
    batch = 1 + int(torch.randint(MOST_MASKS, (), generator=g))
    row_mask, col_mask = _mask(g, batch, list(out)), _mask(g, batch, [cin, *size])
    return MaskedOperators(f"convolution: {kind}", weight, row_mask, col_mask, (cin, *size), conv)


def chain_operators(g: torch.Generator, largest: int = 96, channels: int = 8, pixels: int = 9) -> MaskedChains:
    """Two to four layers: convolutions, then dense ones."""
    count = 2 + int(torch.randint(3, (), generator=g))
    convolutions = _choice(g, [0, 0, 1, 2, count])
    batch = 1 + int(torch.randint(MOST_MASKS, (), generator=g))
    maps: list[tuple[Tensor, tuple[int, ...], dict[str, Any]]] = []
    kinds = []
    size = tuple(_sizes(g, *([channels, pixels, pixels] if convolutions else [largest])))
    masks = [size]
    for k in range(count):
        if k < convolutions:
            kinds.append(_choice(g, list(CONVOLUTIONS)))
            kernel = [1 + int(torch.randint(min(n + 2, 4), (), generator=g)) for n in size[1:]]
            conv = {"stride": _choice(g, [1, 1, 2]), "padding": 1, "dilation": 1, "groups": 1}
            weight = _stored(g, CONVOLUTIONS[kinds[-1]](g, [*_sizes(g, channels), size[0], *kernel]))
            out = tuple(F.conv2d(torch.zeros(1, *size, dtype=weight.dtype), weight, None, **conv).shape[1:])
        else:
            kinds.append(_choice(g, [kind for kind in DENSE if kind != HIDDEN]))
            conv, out = {}, tuple(_sizes(g, largest))
            weight = _stored(g, DENSE[kinds[-1]](g, *out, math.prod(size)))
        maps.append((weight, size, conv))
        masks.append(out)
        size = out
    found = [_mask(g, batch, list(each)) for each in masks]
    full = [
        torch.ones(batch, *each, dtype=torch.bool) if mask is None else mask
        for mask, each in zip(found, masks, strict=True)
    ]
    return MaskedChains("chain: " + ", ".join(kinds), maps, full)


def operator_at(seed: int, index: int, share_of_convolutions: float = 0.4, share_of_chains: float = 0.2) -> Operators:
    """Operator number `index` of a run: it depends on nothing else."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + index)
    drawn = _uniform(g, 0, 1)
    if drawn < share_of_convolutions:
        return convolution_operators(g)
    return chain_operators(g) if drawn > 1 - share_of_chains else dense_operators(g)


@dataclass
class Tally:
    """What became of one guarantee's bounds: those below the proved norm, and the others' relative excess.

    Operators of norm 0 are counted apart: their bound is to be 0. So are norms among the denormal numbers, whose excess
    is that of the rounding of the bound itself.
    """

    limit: float = math.inf  # of the excess
    violations: list[dict[str, Any]] = field(default_factory=list)
    loose: list[dict[str, Any]] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)
    empty: int = 0
    not_zero: int = 0
    seconds: float = 0.0

    def add(self, where: dict[str, Any], upper: Tensor, norms: list[Norm], limited: bool = True) -> None:
        """limited: whether an excess counts, and whether bounds of 0 are to be 0."""
        smallest = torch.finfo(upper.dtype).smallest_normal / torch.finfo(upper.dtype).eps
        for sample, (bound, norm) in enumerate(zip(upper.double().tolist(), norms, strict=True)):
            if not np.longdouble(bound) >= norm.lower:
                self.violations.append({**where, "sample": sample, "bound": bound, "norm": float(norm.value)})
            elif norm.value == 0:
                self.empty += 1
                self.not_zero += limited and bound > 0
            elif norm.value >= smallest and limited:
                self.excess.append(float(np.longdouble(bound) / norm.value - 1))
                if self.excess[-1] > self.limit:
                    self.loose.append({**where, "sample": sample, "excess": self.excess[-1]})

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.excess) or [0.0]
        return {
            "violations": self.violations,
            "loose": self.loose,
            "median_excess": ordered[len(ordered) // 2],
            "worst_excess": ordered[-1],
            "compared": len(self.excess),
            "empty_operators": self.empty,
            "empty_operators_with_a_bound_above_0": self.not_zero,
            "seconds": self.seconds,
        }


def verify(
    operators: Iterable[tuple[int, Operators]], guarantees: list[str], device: str = "cpu"
) -> tuple[dict[str, Tally], float]:
    """The tally of every guarantee, and the oracle's own worst disagreement: singular value by proved lower bound."""
    tallies = {guarantee: Tally(LIMITS.get(guarantee, (0, math.inf))[1]) for guarantee in guarantees}
    disagreement = 0.0
    for index, problem in operators:
        norms, limited = problem.norms(), problem.limited
        for norm in norms:
            if norm.value > 0 and limited:
                disagreement = max(disagreement, abs(float(norm.lower / norm.value - 1)))
        for guarantee, tally in tallies.items():
            start = time.perf_counter()
            upper = problem.bound(guarantee, device).expand(len(problem))
            tally.seconds += time.perf_counter() - start
            tally.add({"index": index, "kind": problem.kind}, upper, norms, limited)
    return tallies, disagreement


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify_norms", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="masked operators (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convolutions", type=float, default=0.4, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--chains", type=float, default=0.2, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="of the bounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the results go as JSON")
    arguments = parser.parse_args()
    done = 0

    def operators() -> Iterator[tuple[int, Operators]]:
        nonlocal done
        index = 0
        with tqdm(total=arguments.count, unit="operator") as bar:
            while done < arguments.count:
                problem = operator_at(arguments.seed, index, arguments.convolutions, arguments.chains)
                yield index, problem
                index, done = index + 1, done + len(problem)
                bar.update(len(problem))

    guarantees = ["estimate", "probabilistic", "deterministic"]
    tallies, disagreement = verify(operators(), guarantees, arguments.device)
    result = {
        "command": {**vars(arguments), "out": str(arguments.out)},
        "masked_operators": done,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "oracle_disagreement": disagreement,
        "guarantees": {guarantee: tally.summary() for guarantee, tally in tallies.items()},
    }
    for guarantee in LIMITS:
        for found in ("violations", "loose"):
            for entry in getattr(tallies[guarantee], found):
                print(f"{guarantee}, {found}: {entry}")
    print(f"{done} masked operators; the proved norm within {disagreement:.1e} of the float64 singular value")
    print(f"{'guarantee':14} {'below the norm':>14} {'median excess':>14} {'worst excess':>14} {'ms each':>9}")
    failed = False
    for guarantee, tally in tallies.items():
        row = tally.summary()
        print(
            f"{guarantee:14} {len(tally.violations):14d} {row['median_excess']:14.1e} {row['worst_excess']:14.1e} "
            f"{1e3 * tally.seconds / done:9.1f}"
        )
        if guarantee in LIMITS:
            median, worst = LIMITS[guarantee]
            failed |= bool(tally.violations or tally.loose) or row["median_excess"] > median
            print(f"{'at most':14} {0:14d} {median:14.1e} {worst:14.1e}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
