"""What ``locallip audit`` does: derives the deterministic certificates of a witness again, by a path of its own.

Nothing of what made the bounds is used: no propagation, no norms, no compiled op. Taken are the network's modules and
weights, and from the witness what was certified and, as claims, the masks, the norm bounds and the margin. In balls of
FLINT's (Arb) with 128 bits, which hold the real numbers that the derivation speaks of, for every sample:

1. clean values v, and a box of the pre-activations over the l2 ball: v_i +- r ||W_i diag(c)||, cut with the image of
   the box below, W m +- |W| h of its middle m and half-width h. r is the radius at the layer's input, c the claimed
   column mask there.
2. Claimed masks keep every pre-activation that can change the activation's output on the box, and every output that
   can vary on it. They may keep more.
3. The claimed bound of ||diag(rows) W diag(c)|| is proved in whole numbers (:mod:`.exact_norms`), and r grows by it.
4. Behind the last layer logit j gains on the label's at most, for every t > 0,
   sum_i max_{l_i <= delta <= h_i} (d_i delta - delta^2 / 2t) + r^2 / 2t, d = w_j - w_y. t is found in float64,
   whatever it is worth; the sum is taken in balls. The clean gap less the largest gain is at least the claimed margin.

docs/guarantees.md says why these steps prove a certificate.
"""

from __future__ import annotations

import copy
import enum
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from flint import arb, arb_mat, ctx
from numpy.typing import NDArray
from torch import nn

from ..nn import ClippedMaxMin, ClippedReLU, MaxMin
from . import exact_norms
from .data import Dataset
from .exact_norms import Finding
from .progress import counting
from .sequential import Step, steps
from .witness import Witness, WitnessError, input_digest, weights_digest

PRECISION = 128  # bits
STAGES = ("boxes and masks", "norms", "margin")

_Mask = NDArray[np.bool_]
_AtMost = Callable[[arb, arb], bool]


class Verdict(enum.Enum):
    """Of a sample, or of what was noted on one; from the best to the worst."""

    CONFIRMED = "confirmed"
    OPEN = "not confirmed"
    REFUTED = "refuted"


@dataclass
class Audited:
    """What the audit of one certificate gave.

    Attributes:
        index, label, eps, claimed: of the certificate; claimed is its margin.
        margin: a lower bound of the margin, as derived here from the claimed masks and norms.
        notes: what is not confirmed or refuted, with the step, the layer and the unit; empty where all is confirmed.
        seconds: by stage.
    """

    index: int
    label: int
    eps: float
    claimed: float
    margin: float = -math.inf
    notes: list[tuple[Verdict, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def verdict(self) -> Verdict:
        order = list(Verdict)
        return max((verdict for verdict, _ in self.notes), key=order.index, default=Verdict.CONFIRMED)


class _Affine:
    """An affine map as a matrix (outputs, terms) that every pixel's terms are multiplied by; a Linear has one pixel.

    sources: (terms, pixels) which input each is, -1 for padding.   signed, sizes, squares: the matrix, its absolute
    value and its squares, entries exact.   bias: of each unit, in the order of the tensor, as all lists here.
    """

    def __init__(self, step: Step) -> None:
        linear, units = step.linear, math.prod(step.input_shape)
        if isinstance(linear, nn.Conv2d):
            numbered = torch.arange(1, units + 1, dtype=torch.float64).view(1, *step.input_shape)
            geometry = (linear.kernel_size, linear.dilation, linear.padding, linear.stride)
            self.sources = F.unfold(numbered, *geometry)[0].long().numpy() - 1  # type: ignore[arg-type]
        else:
            self.sources = np.arange(units)[:, None]
        self.shape = step.input_shape
        self.weight = linear.weight.detach().double().flatten(1).numpy()
        # squares of float32 numbers are float64 numbers
        self.signed, self.sizes, self.squares = (
            arb_mat(matrix.tolist()) for matrix in (self.weight, abs(self.weight), self.weight**2)
        )
        bias = np.zeros(len(self.weight)) if linear.bias is None else linear.bias.detach().double().numpy()
        self.bias = [arb(value) for value in np.repeat(bias, self.sources.shape[1]).tolist()]

    def images(self, matrix: arb_mat, vectors: list[list[arb]]) -> list[list[arb]]:
        """What a matrix of the map's shape makes of each vector."""
        padded, pixels = [[*vector, arb(0)] for vector in vectors], self.sources.shape[1]
        terms = [[vector[i] for vector in padded for i in row] for row in self.sources.tolist()]
        rows = (matrix * arb_mat(terms)).tolist()
        return [[v for row in rows for v in row[k * pixels : (k + 1) * pixels]] for k in range(len(vectors))]

    def row_norms(self, columns: _Mask) -> list[arb]:
        """Of what ``columns`` leave of every row, from above."""
        [squares] = self.images(self.squares, [[arb(int(kept)) for kept in columns.tolist()]])
        return [square.abs_upper().sqrt() for square in squares]

    def operator(self) -> tuple[exact_norms.Matrix, NDArray[np.int64], NDArray[np.int64]]:
        """(units, inputs) in float64, pixel by pixel, and which units and inputs its rows and columns are."""
        outputs, (terms, pixels) = len(self.weight), self.sources.shape
        inputs = np.arange(math.prod(self.shape)).reshape(self.shape[0], -1).T.ravel()
        units = np.arange(outputs * pixels).reshape(outputs, pixels).T.ravel()
        place = np.argsort(inputs)  # of each input, its column
        shape = (pixels, outputs, terms)
        rows = np.broadcast_to((np.arange(pixels)[:, None] * outputs + np.arange(outputs))[:, :, None], shape)
        columns = np.broadcast_to(np.where(self.sources < 0, -1, place[self.sources]).T[:, None], shape)
        values, inside = np.broadcast_to(self.weight, shape), columns >= 0
        entries = (values[inside], (rows[inside], columns[inside]))
        return scipy.sparse.csr_array(entries, shape=(len(units), len(inputs))), units, inputs


class _Bend:
    """An activation. high, low: of each unit, or of each pair of units, what clips it; None for nothing."""

    def __init__(self, activation: nn.Module) -> None:
        def numbers(t: torch.Tensor) -> list[arb]:
            return [arb(value) for value in t.detach().double().flatten().tolist()]

        self.paired = isinstance(activation, (MaxMin, ClippedMaxMin))
        self.high = self.low = None
        if isinstance(activation, ClippedReLU):
            self.high = numbers(activation.threshold)
        elif isinstance(activation, ClippedMaxMin):
            self.high, self.low = numbers(activation.upper), numbers(activation.lower)

    def __call__(self, values: list[arb]) -> list[arb]:
        """Also of the end points of a box, since it rises in every unit."""
        if not self.paired:
            risen = [value.max(arb(0)) for value in values]
            return risen if self.high is None else [v.min(h) for v, h in zip(risen, self.high, strict=True)]
        half = len(values) // 2
        pairs = list(zip(values[:half], values[half:], strict=True))
        top, bottom = [a.max(b) for a, b in pairs], [a.min(b) for a, b in pairs]
        if self.high is not None and self.low is not None:
            top = [v.min(h) for v, h in zip(top, self.high, strict=True)]
            bottom = [v.max(low) for v, low in zip(bottom, self.low, strict=True)]
        return top + bottom

    def is_constant(self, kind: str, i: int, lower: list[arb], upper: list[arb], at_most: _AtMost) -> bool:
        """Whether on a box output ``i`` (kind "columns") does not vary, or pre-activation ``i`` ("rows") changes none.

        It is a sum of products of comparisons ``at_most``: with one that is True in doubt it is True in doubt.
        """
        if not self.paired:
            return at_most(upper[i], arb(0)) or (self.high is not None and at_most(self.high[i], lower[i]))
        half = len(lower) // 2
        a, b = i % half, i % half + half
        top = self.high is not None and any(at_most(self.high[a], lower[k]) for k in (a, b))
        bottom = self.low is not None and any(at_most(upper[k], self.low[a]) for k in (a, b))
        if kind == "columns":
            return top if i < half else bottom
        other = b if i < half else a
        is_top, is_bottom = at_most(upper[other], lower[i]), at_most(upper[i], lower[other])
        return (is_top and top) or (is_bottom and bottom) or (top and bottom)


def _certainly(a: arb, b: arb) -> bool:
    return bool(a <= b)


def _possibly(a: arb, b: arb) -> bool:
    return not a > b


class Auditor:
    """Audits certificates of one network.

    WitnessError, or ValueError by module, where the witness is not of this network or the network is not covered.
    """

    def __init__(self, model: nn.Module, witness: Witness, dataset: Dataset | None = None) -> None:
        """dataset: the test set, for the inputs and labels to be compared with; None to take them as they are."""
        own = weights_digest(model)
        if own != witness.weights:
            raise WitnessError(f"checkpoint: got weights with SHA-256 {own}, want the witness's, {witness.weights}")
        self.model, self.witness, self.dataset = copy.deepcopy(model).double(), witness, dataset
        *self.hidden, self.last = steps(model, witness.arrays["x"].shape[1:])
        if witness.layers != len(self.hidden):
            raise WitnessError(
                f"norms: got {witness.layers} a sample, want those of the {len(self.hidden)} hidden maps"
            )
        with ctx.workprec(PRECISION):
            self.maps = [_Affine(step) for step in (*self.hidden, self.last)]
            self.bends = [_Bend(step.activation) for step in self.hidden if step.activation is not None]
        self.operators = [each.operator() for each in self.maps[:-1]]
        self.findings: dict[tuple[int, bytes, bytes, float], Finding] = {}

    def audit(self, sample: int) -> Audited:
        """Of the witness's certificate number ``sample``."""
        arrays = self.witness.arrays
        done = Audited(*(arrays[name][sample].item() for name in ("index", "label", "eps", "margin")))
        x = arrays["x"][sample]
        self._check_input(done, x, sample)
        with ctx.workprec(PRECISION):
            values, box = [arb(value) for value in x.astype(np.float64).ravel().tolist()], None
            radius, columns = arb(done.eps), np.ones(len(values), dtype=np.bool_)
            for layer, (step, affine, bend) in enumerate(zip(self.hidden, self.maps, self.bends, strict=False)):
                with _timed(done, "boxes and masks"):
                    values, lower, upper = _reached(affine, values, box, radius, columns)
                    units = len(values)
                    masks = {kind: self.witness.mask(kind, layer, sample, units) for kind in ("rows", "columns")}
                    for kind, mask in masks.items():
                        done.notes += _dropped(step.path, bend, kind, mask, lower, upper)
                    values, box = bend(values), (bend(lower), bend(upper))
                norm = arrays["norms"][sample, layer].item()
                with _timed(done, "norms"):
                    finding = self._examined(layer, masks["rows"], columns, norm)
                if finding is not Finding.CONFIRMED:
                    verdict = Verdict.REFUTED if finding is Finding.REFUTED else Verdict.OPEN
                    done.notes.append((verdict, f"norm of layer {step.path!r}: claimed {norm!r}: {finding.value}"))
                radius, columns = radius * arb(norm), masks["columns"]
            with _timed(done, "margin"):
                self._check_margin(done, x, values, box, radius)
        return done

    def _check_input(self, done: Audited, x: NDArray[np.float32], sample: int) -> None:
        digest = input_digest(x)
        if digest != self.witness.arrays["x_sha256"][sample].tobytes():
            done.notes.append((Verdict.REFUTED, "input: its SHA-256 is not the one in the witness"))
        if self.dataset is None:
            return
        if not 0 <= done.index < len(self.dataset):
            done.notes.append((Verdict.REFUTED, f"input: {self.dataset.name} has no test sample {done.index}"))
            return
        own, label = self.dataset.batch(torch.tensor([done.index]))
        if digest != input_digest(own[0].numpy()):
            done.notes.append((Verdict.REFUTED, f"input: not test sample {done.index} of {self.dataset.name}"))
        if int(label[0]) != done.label:
            note = f"label: claimed {done.label}, {self.dataset.name} has {int(label[0])}"
            done.notes.append((Verdict.REFUTED, note))

    def _examined(self, layer: int, rows: _Mask, columns: _Mask, norm: float) -> Finding:
        """Layers that lose nothing to masks are the same for many samples: what was found is kept."""
        key = (layer, rows.tobytes(), columns.tobytes(), norm)
        if key not in self.findings:
            operator, units, inputs = self.operators[layer]
            masked = operator[np.flatnonzero(rows[units])][:, np.flatnonzero(columns[inputs])]
            self.findings[key] = exact_norms.examined(masked, norm)
        return self.findings[key]

    def _check_margin(
        self,
        done: Audited,
        x: NDArray[np.float32],
        values: list[arb],
        box: tuple[list[arb], list[arb]] | None,
        radius: arb,
    ) -> None:
        last, label = self.maps[-1], done.label
        if not 0 <= label < len(last.weight):
            done.notes.append((Verdict.REFUTED, f"label: claimed {label}, want one of {len(last.weight)} classes"))
            return
        [products] = last.images(last.signed, [values])
        logits = [product + bias for product, bias in zip(products, last.bias, strict=True)]
        with torch.no_grad():
            own = self.model(torch.from_numpy(x[None]).double())[0].numpy()
        middle = np.array([float(logit) for logit in logits])
        if not np.allclose(own, middle, rtol=1e-9, atol=1e-9):
            done.notes.append((Verdict.OPEN, f"logits: derived {middle}, and model(x) is {own}"))
        if box is None:
            box = [v - radius for v in values], [v + radius for v in values]
        moved = [[end - v for end, v in zip(ends, values, strict=True)] for ends in box]
        rivals = [j for j in range(len(logits)) if j != label]
        gaps = [logits[label] - logits[j] for j in rivals]
        margins = [
            gap - _gain(last.weight[j], last.weight[label], moved[0], moved[1], radius)
            for j, gap in zip(rivals, gaps, strict=True)
        ]
        done.margin = min(math.nextafter(float(margin.lower()), -math.inf) for margin in margins)
        claimed = arb(done.claimed)
        derived = f"margin: claimed {done.claimed!r}, derived {done.margin!r}"
        if done.claimed <= 0 or any(claimed > gap for gap in gaps):
            done.notes.append((Verdict.REFUTED, f"{derived}; not in (0, clean gap]"))
        elif not all(claimed <= margin for margin in margins):
            done.notes.append((Verdict.OPEN, derived))


@contextmanager
def _timed(done: Audited, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    done.seconds[stage] += time.perf_counter() - started


def _reached(
    affine: _Affine, values: list[arb], box: tuple[list[arb], list[arb]] | None, radius: arb, columns: _Mask
) -> tuple[list[arb], list[arb], list[arb]]:
    """Clean pre-activations, and the ends of their box; ``box`` of the inputs, None for the ball alone."""
    [products] = affine.images(affine.signed, [values])
    clean = [v + b for v, b in zip(products, affine.bias, strict=True)]
    reach = [radius * norm for norm in affine.row_norms(columns)]
    lower, upper = ([v + sign * far for v, far in zip(clean, reach, strict=True)] for sign in (-1, 1))
    if box is not None:
        middle, half = ([(high + sign * low) / 2 for low, high in zip(*box, strict=True)] for sign in (1, -1))
        [centre], [spread] = affine.images(affine.signed, [middle]), affine.images(affine.sizes, [half])
        for i, (c, s, b) in enumerate(zip(centre, spread, affine.bias, strict=True)):
            lower[i], upper[i] = lower[i].max(c + b - s), upper[i].min(c + b + s)
    return clean, lower, upper


def _dropped(
    path: str, bend: _Bend, kind: str, mask: _Mask, lower: list[arb], upper: list[arb]
) -> list[tuple[Verdict, str]]:
    """A note on the worst unit that ``mask`` leaves out and must not."""
    found: list[tuple[Verdict, str]] = []
    for i in np.flatnonzero(~mask).tolist():
        if not bend.is_constant(kind, i, lower, upper, _certainly):
            doubtful = bend.is_constant(kind, i, lower, upper, _possibly)
            note = f"{kind} of layer {path!r}: unit {i} is left out, and {'may' if doubtful else 'can'} vary"
            found.append((Verdict.OPEN if doubtful else Verdict.REFUTED, note))
            if not doubtful:
                return found[-1:]
    return found[:1]


def _gain(rival: NDArray[np.float64], label: NDArray[np.float64], low: list[arb], high: list[arb], radius: arb) -> arb:
    """At least (rival - label) . delta for low <= delta <= high and ||delta|| <= radius: the smaller one of the dual
    and of the box's own."""
    d = [arb(a) - arb(b) for a, b in zip(rival.tolist(), label.tolist(), strict=True)]
    gain = sum(((di * a).max(di * b) for di, a, b in zip(d, low, high, strict=True)), start=arb(0))
    least, most = (np.array([float(v) for v in ends]) for ends in (low, high))
    t = _multiplier(rival - label, least, most, float(radius))
    if math.isfinite(t):
        twice = 2 * arb(t)
        dual = radius * radius / twice
        for di, a, b in zip(d, low, high, strict=True):
            delta = (di * arb(t)).max(a).min(b)
            dual += di * delta - delta * delta / twice
        gain = gain.min(dual)
    return gain


def _multiplier(d: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], radius: float) -> float:
    """Near the t at which clip(d t, low, high) is as long as the radius; infinite where no t makes it so long."""
    length = float(np.linalg.norm(d))
    shortest = radius / length if length else 0.0
    if not shortest or np.linalg.norm(np.where(d > 0, high, np.where(d < 0, low, 0.0))) <= radius:
        return math.inf
    longest = 2 * shortest
    while np.linalg.norm(np.clip(d * longest, low, high)) < radius and math.isfinite(longest):
        longest *= 2
    for _ in range(60):
        middle = (shortest + longest) / 2
        if np.linalg.norm(np.clip(d * middle, low, high)) < radius:
            shortest = middle
        else:
            longest = middle
    return longest


def audited(auditor: Auditor, limit: int | None = None, *, quiet: bool = True) -> list[Audited]:
    """The audits of the first ``limit`` certificates, all by default. ValueError where there is none to audit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if not len(auditor.witness):
        raise ValueError("witness: got 0 certificates, want at least 1")
    chosen = range(len(auditor.witness))[:limit]
    with counting("auditing", len(chosen), silent=quiet) as count_up:
        results = []
        for k in chosen:
            results.append(auditor.audit(k))
            count_up(1)
    return results


def table(results: list[Audited], title: str) -> str:
    """The audits as plain text: verdicts, what is behind those that are not confirmed, and seconds a sample."""
    seconds = [*((stage, [done.seconds[stage] for done in results]) for stage in STAGES)]
    seconds.append(("all", [sum(done.seconds.values()) for done in results]))
    rows = [f"{verdict.value:<32}{sum(done.verdict is verdict for done in results):>9}" for verdict in Verdict]
    times = [f"{name:<32}{sum(own) / len(own):>9.3f}{max(own):>9.3f}" for name, own in seconds]
    heads = [f"{'verdict':<32}{'samples':>9}", f"{'seconds a sample':<32}{'mean':>9}{'most':>9}"]
    rule = "-" * max(map(len, (title, *times)))
    notes = [f"sample {done.index}: {verdict.value}: {note}" for done in results for verdict, note in done.notes]
    return "\n".join([title, rule, heads[0], rule, *rows, rule, heads[1], rule, *times, rule, *notes])


def values(results: list[Audited]) -> list[dict[str, Any]]:
    """The audits as plain JSON values."""
    return [
        {
            **{"index": done.index, "label": done.label, "eps": done.eps, "verdict": done.verdict.value},
            **{"margin_claimed": done.claimed, "margin_derived": done.margin},
            **{"notes": [f"{verdict.value}: {note}" for verdict, note in done.notes], "seconds": done.seconds},
        }
        for done in results
    ]
