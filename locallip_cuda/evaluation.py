"""What ``locallip certify`` measures: clean, attacked and certified accuracy, Lipschitz constants, and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .attack import pgd
from .bounds import local_bounds
from .data import Dataset

# The curve of certified accuracy is sampled at these multiples of the radius.
CURVE = tuple(k / 4 for k in range(9))


@dataclass
class Measurement:
    """Figures of one network on one set at one l2 radius. Accuracies are shares of ``samples``.

    Attributes:
        clean, attacked: accuracy without attack, and under projected gradient descent within the radius.
        certified_local, certified_global: certified accuracy with the local and with the global Lipschitz bound.
        lipschitz_local: mean over the samples of the local Lipschitz constant of all layers but the last.
        lipschitz_global: the global one.
        certified_and_broken: samples that the local bound certifies and the attack misclassifies nevertheless; any
            number above 0 refutes the certificates.
        curve: rows (radius, certified_local, certified_global).
        seconds: time each measurement took.
    """

    samples: int
    eps: float
    guarantee: str
    clean: float = 0.0
    attacked: float = 0.0
    certified_local: float = 0.0
    certified_global: float = 0.0
    lipschitz_local: float = 0.0
    lipschitz_global: float = 0.0
    certified_and_broken: int = 0
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


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


class _Stages:
    """Times the stages of a measurement and shows them in one progress bar."""

    def __init__(self, samples: int, device: torch.device, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._samples = samples
        self._device = device
        self._quiet = quiet

    @contextmanager
    def __call__(self, name: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
        started = time.perf_counter()
        total = self._samples if total is None else total
        with tqdm(total=total, desc=name, unit="sample", leave=False, disable=self._quiet, dynamic_ncols=True) as bar:
            yield bar.update
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - started


def measure(
    model: nn.Sequential,
    dataset: Dataset,
    eps: float,
    *,
    radius: Literal["local", "global"] = "local",
    guarantee: str = "estimate",
    iterations: int = 50,
    batch_size: int = 256,
    limit: int | None = None,
    attack_steps: int = 100,
    seed: int = 0,
    quiet: bool = True,
) -> Measurement:
    """Measure ``model`` on the first ``limit`` samples of ``dataset`` (all by default) at l2 radius ``eps``.

    radius: how the local bound grows its boxes, see :func:`locallip_cuda.local_bounds`.   iterations: steps for the
    norms.   attack_steps: steps of size eps / 4, from a random start drawn from ``seed``.

    The curve uses that a certificate for a radius is one for every smaller radius: going up only certified samples are
    tried again, going down only those that were not.

    NotImplementedError for a guarantee that is not there yet; ValueError for bad numbers.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("iterations", iterations, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    device = next(model.parameters()).device
    dataset = dataset[:limit]
    count = len(dataset)
    stages = _Stages(count, device, quiet)
    x, y = dataset.batch(torch.arange(count), device)
    model.eval()
    last = model[-1]
    if not isinstance(last, nn.Linear):
        raise TypeError(f"model ends in {type(last).__name__}; it must end in a Linear layer")

    def bounded(at: float, progress: Callable[[int], object], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``indices`` are certified at radius ``at``, and their local Lipschitz constants."""
        certified, lipschitz = [], []
        for part in torch.split(indices, batch_size):
            bounds = local_bounds(model, x[part], at, radius=radius, iterations=iterations, guarantee=guarantee)
            certified.append(bounds.margin(y[part]) > 0)
            lipschitz.append(bounds.lipschitz)
            progress(len(part))
        return torch.cat(certified), torch.cat(lipschitz)

    everything = torch.arange(count, device=device)
    with torch.no_grad():
        with stages("clean") as progress:
            logits = []
            for part in torch.split(everything, batch_size):
                logits.append(model(x[part]))
                progress(len(part))
            clean_logits = torch.cat(logits)
            correct = clean_logits.argmax(1) == y
        with stages("global bound", 1):
            first = local_bounds(model, x[:1], eps, radius=radius, iterations=iterations, guarantee=guarantee)
            lipschitz_global = float(first.global_lipschitz)
            radii = global_radius(clean_logits, y, last.weight, lipschitz_global)
        with stages("local bound") as progress:
            certified, lipschitz = bounded(eps, progress, everything)
        certified = certified & correct

    with stages("attack") as progress:
        standing = correct.clone()
        generator = torch.Generator(device=device).manual_seed(seed)
        for part in torch.split(everything, batch_size):
            attacked = pgd(model, x[part], y[part], eps, steps=attack_steps, generator=generator)
            with torch.no_grad():
                standing[part] &= model(attacked).argmax(1) == y[part]
            progress(len(part))

    levels = {1.0: certified, 0.0: correct}
    with torch.no_grad(), stages("curve") as progress:
        for factor in [f for f in CURVE if f > 1]:
            levels[factor] = _retry(levels[max(levels)], partial(bounded, factor * eps, progress))
        below = certified
        for factor in [f for f in reversed(CURVE) if 0 < f < 1]:
            found = _retry(correct & ~below, partial(bounded, factor * eps, progress))
            levels[factor] = below = below | found

    def share(mask: Tensor) -> float:
        return mask.sum().item() / count

    return Measurement(
        samples=count,
        eps=eps,
        guarantee=guarantee,
        clean=share(correct),
        attacked=share(standing),
        certified_local=share(certified),
        certified_global=share(correct & (radii > eps)),
        lipschitz_local=lipschitz.double().mean().item(),
        lipschitz_global=lipschitz_global,
        certified_and_broken=int((certified & ~standing).sum()),
        curve=[(f * eps, share(levels[f]), share(correct & (radii > f * eps))) for f in CURVE],
        seconds=stages.seconds,
    )


def _retry(candidates: Tensor, certify: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Where among ``candidates`` (bool) ``certify``, asked for their indices, says yes."""
    found = torch.zeros_like(candidates)
    indices = candidates.nonzero()[:, 0]
    if len(indices):
        found[indices], _ = certify(indices)
    return found
