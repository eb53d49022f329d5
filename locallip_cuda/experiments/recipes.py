"""Training recipes: every number of a run, the presets, and the schedule that follows from them.

The presets ``mnist-4c3f``, ``cifar10-4c3f``, ``cifar10-6c2f`` and ``tinyimagenet-8c2f`` are the recipes of "Training
Certifiably Robust Neural Networks with Efficient Local Lipschitz Bounds" (Huang et al., NeurIPS 2021,
arXiv:2111.01395) as its published scripts run them, but for the norms' iterations: theirs are 1 to 5, from vectors kept
for every sample. ``digits`` is a small one for scikit-learn's bundled digits; ``cifar10-liresnet-s`` and
``cifar10-liresnet`` are residual.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .models import ACTIVATIONS, MODELS

LOSSES = ("bcp", "gloro", "lmt", "emma", "crm")
RADII = ("local", "global")


def _number(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run.

    Lengths of time are in epochs and may be fractions: the schedule moves at every step. Distances (``eps``,
    ``eps_train``) are l2 distances between images with values in [0, 1].
    """

    preset: str
    model: str = field(
        metadata={"help": "a network of yours in place of the preset's, from a function of no arguments"}
    )
    activation: str = _number("activation of every hidden layer", choices=ACTIVATIONS)
    loss: str = _number(
        "certified loss: bcp, cross entropy of the worst logits in the ball; gloro, cross entropy with one more class "
        "that stands for 'not certified'; lmt, Lipschitz margin training; emma, bcp with "
        "no logit raised above the label's; crm, certified radius maximisation, up to 1.4 times the training radius",
        choices=LOSSES,
    )
    radius: Literal["local", "global"] = _number("which norms the local bound's boxes are grown with", choices=RADII)
    eps: float = _number("l2 radius at which the test set is certified")
    eps_train: float = _number("l2 radius of training after the ramp-up")
    epochs: int = _number("passes over the training set; a new number here scales the four below in proportion")
    warmup_epochs: float = _number("epochs of plain cross entropy at first (kappa 1, radius 0)")
    rampup_epochs: float = _number(
        "epochs after those, in which kappa falls from 1 to 0 and the radius grows to eps_train"
    )
    global_epochs: float = _number(
        "epochs, from the first, in which the certified loss takes the plain global bound: a cheap start, or a baseline"
    )
    constant_epochs: float = _number("epochs with the first learning rate, before it decays exponentially")
    batch_size: int = _number("samples a step, over all processes together")
    learning_rate: float = _number("first learning rate of Adam")
    final_learning_rate: float = _number("learning rate at the end of the last epoch")
    iterations: int = _number(
        "steps of the iteration for the operator norms in training; 0: as many a layer as keep the norms close"
    )
    window: int = _number(
        "maps in a row that are composed before a norm is taken, in training and where the network is certified; 1: "
        "none, the paper's product of norms"
    )
    sparse: float = _number("weight of the sparsity loss, which pushes bounds past the thresholds")
    threshold_weight: float = _number("weight, within the sparsity loss, of the upper thresholds of clipped-relu")
    threshold_init: float = _number("clipped-relu: first threshold of every unit")
    clip_init_first: float = _number("clipped-maxmin: first thresholds, plus and minus this, of the layer at the input")
    clip_init_last: float = _number("clipped-maxmin: the same for the last hidden layer; linear between the two")
    crop: int = _number("augmentation: pixels of zero padding before a random crop; 0 for none")
    flip: bool = _number("augmentation: random horizontal flips")
    seed: int = _number("seed of the weights, of the order of the samples and of the augmentation")
    evaluate_every: int = _number("epochs between two looks at the test set (and one after the last epoch)")

    def __post_init__(self) -> None:
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("loss", LOSSES),
            ("radius", RADII),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.window > 1 and self.radius == "global":
            raise ValueError(f"window is {self.window} and radius 'global'; it must be 1, or the radius 'local'")
        for name in ("epochs", "batch_size", "evaluate_every", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "final_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")
        for name in (
            "eps",
            "eps_train",
            "warmup_epochs",
            "rampup_epochs",
            "global_epochs",
            "constant_epochs",
            "sparse",
            "threshold_weight",
            "threshold_init",
            "clip_init_first",
            "clip_init_last",
            "crop",
            "iterations",
            "seed",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a finite number, 0 or above")

    def kappa(self, epoch: float) -> float:
        """Weight of the clean loss at ``epoch`` (a fraction within an epoch): 1 in the warm-up, then linearly to 0."""
        if epoch < self.warmup_epochs:
            return 1.0
        if epoch >= self.warmup_epochs + self.rampup_epochs:
            return 0.0
        return 1.0 - (epoch - self.warmup_epochs) / self.rampup_epochs

    def radius_at(self, epoch: float) -> float:
        """Training radius at ``epoch``: 0 in the warm-up, then linearly to ``eps_train``."""
        return self.eps_train * (1.0 - self.kappa(epoch))

    def learning_rate_at(self, epoch: float) -> float:
        """Learning rate at ``epoch``: constant, then exponential to ``final_learning_rate`` at the end of the run."""
        if epoch <= self.constant_epochs:
            return self.learning_rate
        done = (epoch - self.constant_epochs) / (self.epochs - self.constant_epochs)
        return float(self.learning_rate * (self.final_learning_rate / self.learning_rate) ** min(done, 1.0))

    def bound_at(self, epoch: float) -> Literal["local", "global"]:
        """Which bound the certified loss takes at ``epoch``."""
        return "global" if epoch < self.global_epochs else "local"

    @property
    def network(self) -> str:
        """What titles call it."""
        return self.model or f"{self.preset}, {self.activation}"

    def replace(self, **changes: Any) -> Recipe:
        """A copy with ``changes``; a new ``epochs`` scales the four lengths within it."""
        if "epochs" in changes and changes["epochs"] >= 1:
            scale = changes["epochs"] / self.epochs
            for name in ("warmup_epochs", "rampup_epochs", "global_epochs", "constant_epochs"):
                changes.setdefault(name, getattr(self, name) * scale)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote. ValueError when a field is missing, unknown or out of range."""
        names = {f.name for f in dataclasses.fields(cls)}
        values = {"global_epochs": 0.0, "model": "", "window": 1, **values}  # earlier versions had none
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise ValueError(f"recipe with missing fields {missing} and unknown fields {unknown}")
        return cls(**values)


def _decay_start(epochs: int) -> float:
    return epochs / 2 + 25


def _thresholds(preset: str) -> dict[str, Any]:
    spec = MODELS[preset]
    return {"threshold_init": spec.threshold, "clip_init_first": spec.clip[0], "clip_init_last": spec.clip[1]}


_CIFAR10 = Recipe(
    preset="cifar10-6c2f",
    model="",
    activation="clipped-relu",
    loss="bcp",
    radius="local",
    eps=36 / 255,
    eps_train=0.1551,
    epochs=800,
    warmup_epochs=20,
    rampup_epochs=400,
    global_epochs=0,
    constant_epochs=_decay_start(800),
    batch_size=256,
    learning_rate=1e-3,
    final_learning_rate=1e-6,
    iterations=0,
    window=1,
    sparse=0.0,
    threshold_weight=0.1,
    **_thresholds("cifar10-6c2f"),
    crop=4,
    flip=True,
    seed=0,
    evaluate_every=10,
)

_TINYIMAGENET = dataclasses.replace(
    _CIFAR10,
    preset="tinyimagenet-8c2f",
    eps_train=0.16,
    epochs=250,
    warmup_epochs=0,
    rampup_epochs=125,
    constant_epochs=_decay_start(250),
    batch_size=128,
    learning_rate=2.5e-4,
    final_learning_rate=5e-7,
    sparse=0.01,
    **_thresholds("tinyimagenet-8c2f"),
)


def _lengths(epochs: int) -> dict[str, Any]:
    return {"warmup_epochs": epochs / 60, "rampup_epochs": epochs / 2, "constant_epochs": epochs / 2}


# Not published numbers: those of GloRo's loss with the schedule of the other presets.
_LIRESNET = dataclasses.replace(
    _CIFAR10,
    preset="cifar10-liresnet",
    activation="maxmin",
    loss="gloro",
    epochs=300,
    **_lengths(300),
    **_thresholds("cifar10-liresnet"),
)

_PRESETS: dict[str, Recipe] = {
    "digits": dataclasses.replace(
        _CIFAR10,
        preset="digits",
        loss="bcp",
        eps=0.3,
        eps_train=0.33,
        epochs=100,
        warmup_epochs=2,
        rampup_epochs=50,
        constant_epochs=60,
        batch_size=64,
        learning_rate=2e-3,
        final_learning_rate=5e-5,
        **_thresholds("digits"),
        crop=0,
        flip=False,
        evaluate_every=10,
    ),
    "mnist-4c3f": dataclasses.replace(
        _CIFAR10,
        preset="mnist-4c3f",
        loss="gloro",
        eps=1.58,
        eps_train=1.75,
        epochs=300,
        warmup_epochs=0,
        rampup_epochs=150,
        constant_epochs=_decay_start(300),
        final_learning_rate=5e-6,
        **_thresholds("mnist-4c3f"),
        crop=0,
        flip=False,
        evaluate_every=5,
    ),
    "cifar10-4c3f": dataclasses.replace(_CIFAR10, preset="cifar10-4c3f", **_thresholds("cifar10-4c3f")),
    "cifar10-6c2f": _CIFAR10,
    "tinyimagenet-8c2f": _TINYIMAGENET,
    "cifar10-liresnet-s": dataclasses.replace(_LIRESNET, preset="cifar10-liresnet-s", epochs=60, **_lengths(60)),
    "cifar10-liresnet": _LIRESNET,
}

# What the clipped MaxMin recipes change; the MaxMin without clipping takes the same numbers.
_MAXMIN_CHANGES: dict[str, dict[str, Any]] = {"tinyimagenet-8c2f": {"learning_rate": 1e-4}}

PRESETS = tuple(_PRESETS)

# The presets whose numbers another network of the same data set trains by.
OF_DATA = {
    "digits": "digits", "mnist": "mnist-4c3f", "cifar10": "cifar10-6c2f", "tinyimagenet": "tinyimagenet-8c2f",
}  # fmt: skip


def recipe(preset: str, activation: str | None = None) -> Recipe:
    """The recipe of ``preset`` for ``activation`` (default: the preset's own, clipped-relu).

    ValueError for an unknown preset or activation.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    base = _PRESETS[preset]
    if activation is None or activation == base.activation:
        return base
    changes = _MAXMIN_CHANGES.get(preset, {}) if activation.endswith("maxmin") else {}
    return dataclasses.replace(base, activation=activation, **changes)
