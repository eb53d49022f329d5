"""What a benchmark is: a case, the variants that do its work, and the setting by which its sizes go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Random:
    """Random tensors on a device, from a fixed seed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=self.device)

    def uniform(self, *sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=self.generator, device=self.device)

    def integers(self, below: int, *sizes: int) -> Tensor:
        return torch.randint(below, sizes, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Setting:
    """tiny: toy sizes, whatever a case's name says, and the variants of a CPU's run and of a GPU's."""

    device: torch.device = DEVICE
    tiny: bool = False

    @property
    def cpu(self) -> bool:
        """Whether what only a CPU's run has is wanted."""
        return self.tiny or self.device.type == "cpu"

    @property
    def gpu(self) -> bool:
        return self.tiny or self.device.type == "cuda"

    def batch(self, on_a_cpu: int) -> int:
        return 2 if self.tiny else 256 if self.gpu else on_a_cpu

    @property
    def repeats(self) -> int:
        """How often every variant of a case has its turn, so that what else the machine does hits all alike."""
        return 2 if self.tiny else 5

    @property
    def seconds(self) -> float:
        """Of timed calls in one turn; at least one call, whatever it takes."""
        return 0.001 if self.tiny else 0.02 if self.gpu else 0.5

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")


@dataclass
class Variant:
    """One way to do a case's work.

    call: does it once.   samples: that one call serves.   flops, bytes: what a call must do and move at least, where
    counted.   check: facts about what a call returned, and whether it is right (None: not known).   capture: as a CUDA
    graph too.   peak: measures a call's peak memory on a CPU.
    """

    call: Callable[[], Any]
    samples: int
    flops: float | None = None
    bytes: float | None = None
    check: Callable[[Any], tuple[dict[str, float], bool | None]] | None = None
    capture: bool = True
    peak: Callable[[], int] | None = None


@dataclass
class Case:
    """labels: which of the variants run; "NAME" for forward and backward, or "NAME, forward", "NAME, backward".

    build: makes the inputs and the variants, by label.   iterations: of a norm, for the time of one.   launch: whether
    a profiler is to see it.
    """

    op: str
    name: str
    labels: Sequence[str]
    build: Callable[[], dict[str, Variant]]
    precision: str = "float32"
    iterations: int | None = None
    launch: bool = False

    @property
    def title(self) -> str:
        return self.name if self.precision == "float32" else f"{self.name}, {self.precision}"


def is_compiled(label: str) -> bool:
    """A torch.compile baseline: slow the first time, and it may fail, for it needs a compiler on the machine."""
    return "compiled" in label


def no_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(call)
