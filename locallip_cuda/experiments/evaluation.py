"""What ``locallip certify`` measures: accuracy, plain, under attack and certified, Lipschitz constants, their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attack import pgd
from ..bounds import LocalBounds, global_bounds, local_bounds
from ..norms.masked_norm import check_guarantee, stated_failure_probability
from ..propagation.composition import check_window
from ..propagation.global_proof import ProvedNorms
from ..propagation.graph import lowered, traced
from ..propagation.proof import check_provable
from .data import Dataset
from .journal import Journal
from .progress import Pace, Progress
from .witness import Recorder

# The curve of certified accuracy is sampled at these multiples of the radius.
CURVE = tuple(k / 4 for k in range(9))

# samples of a batch that are put to a proof at a time: it holds more of each than an estimate does
PROOF_BATCH = 16


@dataclass
class Certified:
    """What one guarantee gave, over all samples measured.

    Attributes:
        accuracy: share that is certified for its label within the radius, of samples that `model(x)` classifies
            correctly.
        tried: how many samples were put to it. Where the boxes grow by local norms, a proof is tried where the estimate
            certifies: with the same boxes and no norm below the estimate's but for rounding it fails on the others.
            Where they grow by global norms the estimate takes looser row norms, the paper's, and a proof is tried on
            all correct ones.
        by_global: how many of those the proved global bound certifies, by the norms of the window: it comes first, and
            what it certifies is put to no other.
        seconds: time it took for those, summed over the processes. That of the global bound counts with the product.
        failure_probability: of the statement on one sample; 1 for an estimate, which states nothing, and for a proof
            whose random vectors were given by a seed.
        broken: samples certified that the attack misclassifies nevertheless; above 0 this refutes the guarantee.
        other_class: samples put to it whose clean logits, in its arithmetic, have another class on top than `model(x)`
            in the network's: within rounding of a decision boundary.
    """

    accuracy: float
    tried: int
    by_global: int
    seconds: float
    failure_probability: float
    broken: int
    other_class: int


@dataclass
class Measurement:
    """Figures of one network on one set at one l2 radius. Accuracies are shares of ``samples``.

    Attributes:
        accuracy, attacked_accuracy: without attack, and under projected gradient descent within the radius.
        bound: "local", or "global" where no local bound was asked for: what is said to be local below is then the
            global bound's, by the product and with composed norms.
        window: how many maps in a row were composed in ``composed``; 1 for none.
        execution: "real", or the type in which the proofs speak of what ``model(x)`` computes, too.
        certified: what each guarantee gave, with the local Lipschitz bound as a product of norms, on samples that its
            estimate certifies; "estimate" is always there.
        composed: the same with composed norms, which were tried on samples that the product did not certify, and count
            those that it did. Empty where ``window`` is 1.
        global_certified_estimate: certified accuracy with the global Lipschitz bound.
        lipschitz_estimate: mean over the samples of the local Lipschitz constant of all layers but the last.
        global_lipschitz_estimate: the global one.
        curve_estimate: rows (radius, certified accuracy with the local bound, with the global bound).
        curve_composed: certified accuracy with composed norms at the same radii, an estimate too; empty for none.
        seconds: time each stage took, summed over the processes that worked on it, in all runs.
        seed: of the random vectors of the attack.
        proof_seed: of those of the proofs, if it was given; it voids the probabilistic guarantee.
        per_sample: index, label, prediction (of `model(x)`, as the accuracy counts), whether the attack failed,
            largest radius of the curve certified by the estimate, with composed norms too, and under "guarantees" and
            "composed", for every guarantee tried, the bound that decided ("global", "product" or "composed"), its
            margin of the label, Lipschitz constant, verdict, and the prediction that it speaks of: a proof's is that of
            the network in real arithmetic.
    """

    samples: int
    eps: float
    bound: str
    window: int
    execution: str
    accuracy: float
    attacked_accuracy: float
    certified: dict[str, Certified]
    composed: dict[str, Certified]
    global_certified_estimate: float
    lipschitz_estimate: float
    global_lipschitz_estimate: float
    curve_estimate: list[tuple[float, float, float]]
    curve_composed: list[float]
    seconds: dict[str, float]
    seed: int
    proof_seed: int | None
    per_sample: list[dict[str, Any]]


def global_radius(logits: Tensor, y: Tensor, weight: Tensor, lipschitz: float) -> Tensor:
    """Radius (B,) up to which a global Lipschitz constant certifies class ``y``; 0 or below where it is misclassified.

    Logit y minus logit j moves by at most ||w_y - w_j|| * lipschitz * eps, with w the rows of the last layer's
    ``weight`` (K, h) and ``lipschitz`` the constant of the layers before it (Leino et al., ICML 2021). In float64.
    """
    logits, weight = logits.double(), weight.double()
    gap = logits.gather(1, y[:, None]) - logits
    distance = torch.linalg.vector_norm(weight[y][:, None, :] - weight[None, :, :], dim=2)
    radius: Tensor = gap / (lipschitz * distance)  # where the distance is 0: +inf or -inf by the gap, NaN for y itself
    radius = radius.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return radius.scatter(1, y[:, None], torch.inf).amin(1)


@dataclass
class _Batch:
    """One batch under measurement."""

    indices: list[int]
    x: Tensor
    y: Tensor


class _Found:
    """What a bound says of a batch with the labels ``y``."""

    def __init__(self, name: str, bounds: LocalBounds, y: Tensor) -> None:
        self.name = name
        self.margin, self.lipschitz, self.prediction = bounds.margin(y), bounds.lipschitz, bounds.logits.argmax(1)

    def verdict(self, i: int, certified: Tensor) -> dict[str, Any]:
        return {
            "bound": self.name,
            "certified": bool(certified[i]),
            "margin": float(self.margin[i]),
            "lipschitz": float(self.lipschitz[i]),
            "prediction": int(self.prediction[i]),
        }


class _Examiner:
    """Measures batches of samples; what each gives depends on its own samples and the seed alone."""

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        bound: Literal["local", "global"],
        radius: Literal["local", "global"],
        window: int,
        proofs: Sequence[str],
        execution: str,
        failure_probability: float,
        iterations: int,
        attack_steps: int,
        seed: int,
        proof_seed: int | None,
        seconds: dict[str, float],
        witness: Recorder | None,
    ) -> None:
        self.witness = witness
        self.model, self.eps, self.radius, self.proofs = model, eps, radius, proofs
        self.bound, self.window, self.execution = bound, window, execution
        self.failure_probability, self.iterations, self.attack_steps = failure_probability, iterations, attack_steps
        self.seed, self.proof_seed, self.seconds = seed, proof_seed, seconds
        self.global_norms = ProvedNorms()
        self.stage = ""  # what it is at

    def __call__(self, batch: _Batch) -> list[dict[str, Any]]:
        x, y = batch.x, batch.y
        with self._stage("clean", x), torch.no_grad():
            logits = self.model(x)
        correct = logits.argmax(1) == y
        with self._stage("estimate", x):
            estimate = self._estimated(x, y, self.eps)
        certified = correct & (estimate.margin > 0)
        certified_composed = certified
        if self.window > 1:
            left = correct & ~certified
            with self._stage("composed estimate", x):
                composed = self._estimated(x[left], y[left], self.eps, self.window)
            certified_composed = certified.masked_scatter(left, composed.margin > 0)
        with self._stage("attack", x):
            generator = torch.Generator(x.device).manual_seed(self.seed + batch.indices[0])
            attacked = pgd(self.model, x, y, self.eps, steps=self.attack_steps, generator=generator)
            with torch.no_grad():
                standing = correct & (self.model(attacked).argmax(1) == y)
        with self._stage("curve", x):
            reach = self._reach(x, y, correct, certified)
            if self.window > 1:
                far = torch.maximum(reach, self._reach(x, y, correct, certified_composed, self.window))
        found: list[dict[str, Any]] = [
            {
                "label": int(y[i]),
                "prediction": int(logits[i].argmax()),
                "logits": logits[i].tolist(),
                "attack_failed": bool(standing[i]),
                "curve_estimate": float(reach[i]),
                "guarantees": {"estimate": estimate.verdict(i, certified)},
            }
            for i in range(len(y))
        ]
        if self.window > 1:
            for i in range(len(y)):
                found[i] |= {"curve_composed": float(far[i]), "composed": {}}
            for k, i in enumerate(left.nonzero()[:, 0].tolist()):
                found[i]["composed"]["estimate"] = composed.verdict(k, composed.margin > 0)
        candidates = certified if self.radius == "local" else correct
        for guarantee in self.proofs:
            self._prove(found, batch, guarantee, candidates, candidates | certified_composed)
        return found

    def _prove(
        self,
        found: list[dict[str, Any]],
        batch: _Batch,
        guarantee: str,
        candidates: Tensor,
        all_candidates: Tensor,
    ) -> None:
        """The verdicts into ``found``: by the global bound, by the product on what that leaves of ``candidates``, by
        composed norms on what is left of all. The global one counts where the next one would have."""
        x, y, left = batch.x, batch.y, all_candidates.clone()

        def judge(samples: Tensor, name: str, stage: str, bound: Callable[[str, Tensor], LocalBounds]) -> None:
            with self._stage(stage, x):
                bounds = bound(guarantee, x[samples])
                proof = _Found(name, bounds, y[samples])
            sure = proof.margin > 0
            left[samples] = ~sure
            for k, i in enumerate(samples.tolist()):
                if sure[k] or name != "global" or self.bound == "global":
                    how = "guarantees" if candidates[i] and name != "composed" else "composed"
                    found[i][how][guarantee] = proof.verdict(k, sure)
            if self.witness is not None and guarantee == "deterministic" and name != "composed":
                self.witness.keep([batch.indices[i] for i in samples.tolist()], x[samples], y[samples], bounds)

        if left.any():
            judge(left.nonzero()[:, 0], "global", f"global {guarantee}", self._proved_globally)
        if self.bound == "global":
            return
        local = [(candidates, 1, "product", guarantee)]
        if self.window > 1:
            local.append((all_candidates, self.window, "composed", f"composed {guarantee}"))
        for tried, window, name, stage in local:
            for part in torch.split((left & tried).nonzero()[:, 0], PROOF_BATCH):
                if len(part):
                    judge(part, name, stage, partial(self._proved, window))

    @contextmanager
    def _stage(self, name: str, x: Tensor) -> Iterator[None]:
        self.stage = name
        started = time.perf_counter()
        yield
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @torch.no_grad()
    def _estimated(self, x: Tensor, y: Tensor, eps: float, window: int = 1) -> _Found:
        how: dict[str, Any] = {"iterations": self.iterations, "window": window}
        if self.bound == "global":
            return _Found("global", global_bounds(self.model, x, eps, **how), y)
        bounds = local_bounds(self.model, x, eps, radius=self.radius, **how)
        return _Found("product" if window == 1 else "composed", bounds, y)

    def _worth(self, guarantee: str) -> dict[str, Any]:
        """Of each proof that a sample may be put to: the global bound, the product, composed norms."""
        share = self.failure_probability / (2 if self.window == 1 else 3)
        seed = self.proof_seed if guarantee == "probabilistic" else None
        return {"guarantee": guarantee, "failure_probability": share, "seed": seed, "execution": self.execution}

    def _proved_globally(self, guarantee: str, x: Tensor) -> LocalBounds:
        worth, norms = self._worth(guarantee), self.global_norms
        window = self.window if self.witness is None else 1  # a witness is of products of norms
        return global_bounds(self.model, x, self.eps, **worth, norms=norms, window=window)

    def _proved(self, window: int, guarantee: str, x: Tensor) -> LocalBounds:
        return local_bounds(self.model, x, self.eps, radius=self.radius, **self._worth(guarantee), window=window)

    def _reach(self, x: Tensor, y: Tensor, correct: Tensor, certified: Tensor, window: int = 1) -> Tensor:
        """The largest factor of CURVE at which each sample is certified by the estimate, -1 where it is misclassified.

        A certificate for a radius is one for every smaller radius: going up only certified samples are tried again,
        going down only those that were not.
        """
        reach = torch.where(correct, 0.0, -1.0)
        reach[certified] = 1.0
        rising = certified
        for factor in [f for f in CURVE if f > 1]:
            rising = self._retry(x, y, rising, factor, window)
            reach[rising] = factor
        falling = correct & ~certified
        for factor in [f for f in reversed(CURVE) if 0 < f < 1]:
            found = self._retry(x, y, falling, factor, window)
            reach[found] = factor
            falling = falling & ~found
        return reach

    def _retry(self, x: Tensor, y: Tensor, candidates: Tensor, factor: float, window: int) -> Tensor:
        found = torch.zeros_like(candidates)
        if candidates.any():
            found[candidates] = self._estimated(x[candidates], y[candidates], factor * self.eps, window).margin > 0
        return found


def measure(
    model: nn.Module,
    dataset: Dataset,
    eps: float,
    journal: Journal,
    *,
    bound: Literal["local", "global"] = "local",
    radius: Literal["local", "global"] = "local",
    window: int = 1,
    guarantees: Sequence[str] = (),
    execution: str = "real",
    failure_probability: float = 1e-9,
    iterations: int = 50,
    batch_size: int = 64,
    limit: int | None = None,
    attack_steps: int = 100,
    proof_seed: int | None = None,
    witness: Recorder | None = None,
    quiet: bool = True,
) -> Measurement:
    """Measure ``model`` on the first ``limit`` samples of ``dataset`` (all by default) at l2 radius ``eps``.

    All processes of ``journal.workers`` call this together: each takes the next batch that none has taken. What a
    sample gives depends on its batch and the seeds, and not on the process, so that all of them return the same.

    journal: what is done already, and where results are kept, batch by batch; its seed is the attack's.
    bound: "global" leaves the local bounds out.   radius: how the local bound grows its boxes, see
    :func:`locallip_cuda.local_bounds`.   window: how many maps in a row are composed, beside the
    product of norms; 1 for none.   guarantees: those to prove, beside the estimate.   execution: of what the
    proofs speak, as for :func:`locallip_cuda.local_bounds`.
    failure_probability: of the probabilistic one, for one sample.   iterations: steps for the
    estimated norms.   attack_steps: steps of size eps / 4.   proof_seed: repeats the proofs' random vectors, and voids
    the probabilistic guarantee.   witness: what takes down the deterministic proofs by the product of norms.

    ConnectionError where another process ended; what is done is kept. ValueError for bad numbers;
    UnsupportedModuleError for a network without bounds, or without the proof asked for.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("iterations", iterations, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    check_window(window)
    if window > 1 and radius == "global":
        raise ValueError(f"window is {window} and radius 'global'; one must be 1, or the other 'local'")
    for guarantee in guarantees:
        check_guarantee(guarantee, failure_probability)
    proofs = [guarantee for guarantee in guarantees if guarantee != "estimate"]
    model.eval()
    device = next(model.parameters()).device
    dataset = dataset[:limit]
    one, _ = dataset.batch(torch.arange(1), device)
    trace = traced(model, one)
    if proofs:
        check_provable(model, trace, lowered(trace, torch.float64))
    count, workers = len(dataset), journal.workers
    batches = [list(range(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]
    left = [indices for indices in batches if len(journal.batches.get(indices[0], ())) < len(indices)]
    before = done = count - sum(map(len, left))
    pace = Pace(time.perf_counter(), done)
    examine = _Examiner(
        model,
        eps,
        bound,
        radius,
        window,
        proofs,
        execution,
        failure_probability,
        iterations,
        attack_steps,
        journal.seed,
        proof_seed,
        journal.seconds,
        witness,
    )

    def now() -> tuple[str, str]:
        return f"{done}/{count} samples", examine.stage + pace.left(count - done)

    def count_up(more: int = 0) -> None:
        nonlocal done
        done = before + workers.count_up("samples", more)
        pace.mark(time.perf_counter(), done)
        progress.reach(done)

    with Progress(count, done, silent=quiet or workers.rank > 0) as progress, progress.showing(now):
        while (taken := workers.count_up("batches", 1) - 1) < len(left):
            indices = left[taken]
            journal.batches[indices[0]] = examine(_Batch(indices, *dataset.batch(torch.tensor(indices), device)))
            journal.save()
            count_up(len(indices))
        examine.stage = "waiting for the other processes"
        workers.wait(count_up)
    seconds = journal.merged()
    results = [
        {"index": i, **result} for own in batches for i, result in zip(own, journal.batches[own[0]], strict=False)
    ]
    with torch.no_grad():
        started = time.perf_counter()
        first_bounds = local_bounds(model, one, eps, radius=radius, iterations=iterations)
        lipschitz_global = float(first_bounds.global_lipschitz)
        seconds["global bound"] = time.perf_counter() - started
    return _summary(
        results,
        journal.seed,
        seconds,
        eps,
        bound,
        window,
        execution,
        proofs,
        failure_probability,
        proof_seed,
        first_bounds.last_weight,
        lipschitz_global,
    )


def _summary(
    results: list[dict[str, Any]],
    seed: int,
    seconds: dict[str, float],
    eps: float,
    bound: str,
    window: int,
    execution: str,
    proofs: Sequence[str],
    failure_probability: float,
    proof_seed: int | None,
    last_weight: Tensor,
    lipschitz_global: float,
) -> Measurement:
    count = len(results)
    logits = torch.tensor([r.pop("logits") for r in results])
    labels = torch.tensor([r["label"] for r in results])
    radii = global_radius(logits, labels, last_weight.detach().cpu(), lipschitz_global)
    correct = torch.tensor([r["prediction"] == r["label"] for r in results])
    reach = torch.tensor([r["curve_estimate"] for r in results])

    def share(mask: Tensor) -> float:
        return mask.sum().item() / count

    def certified(guarantee: str, how: str = "guarantees") -> Certified:
        tried = [r for r in results if guarantee in r[how]]
        ways = {"guarantees", how}
        yes = [r for r in results if any(r[way].get(guarantee, {}).get("certified") for way in ways)]
        stages = [guarantee, f"global {guarantee}"] if how == "guarantees" else [f"composed {guarantee}"]
        return Certified(
            accuracy=len(yes) / count,
            tried=len(tried),
            by_global=sum(r[how][guarantee]["bound"] == "global" for r in tried),
            seconds=sum(seconds.get(stage, 0.0) for stage in stages),
            failure_probability=stated_failure_probability(guarantee, failure_probability, proof_seed),
            broken=sum(not r["attack_failed"] for r in yes),
            other_class=sum(r[how][guarantee]["prediction"] != r["prediction"] for r in tried),
        )

    far = torch.tensor([r["curve_composed"] for r in results]) if window > 1 else None

    return Measurement(
        samples=count,
        eps=eps,
        accuracy=share(correct),
        attacked_accuracy=sum(r["attack_failed"] for r in results) / count,
        bound=bound,
        window=window,
        execution=execution,
        certified={guarantee: certified(guarantee) for guarantee in ("estimate", *proofs)},
        composed={guarantee: certified(guarantee, "composed") for guarantee in ("estimate", *proofs) if window > 1},
        global_certified_estimate=share(correct & (radii > eps)),
        lipschitz_estimate=sum(r["guarantees"]["estimate"]["lipschitz"] for r in results) / count,
        global_lipschitz_estimate=lipschitz_global,
        curve_estimate=[(f * eps, share(correct & (reach >= f)), share(correct & (radii > f * eps))) for f in CURVE],
        curve_composed=[] if far is None else [share(correct & (far >= f)) for f in CURVE],
        seconds=seconds,
        seed=seed,
        proof_seed=proof_seed,
        per_sample=results,
    )
