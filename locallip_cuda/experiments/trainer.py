"""The training loop of a recipe, and what makes a run resume exactly.

The order of the samples and their augmentation follow from the seed, the epoch and the step, so that a run can stop
after any step; a checkpoint then holds the weights, Adam's state, the position, the sums behind the epoch's
statistics and the random states of every process.
"""

from __future__ import annotations

import math
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..build_info import build_info
from ..propagation.training_norms import SAMPLES
from . import checkpoint, data, models
from .checkpoint import CHECKPOINT_NAME, CheckpointError
from .distributed import Workers
from .monitor import Evaluation, closeness, evaluate
from .network import build_model
from .objective import STATISTICS, Objective, bounds_at_rest, means_of, set_precision
from .progress import Pace, Progress, duration
from .recipes import Recipe
from .training_step import TrainingStep, adam

# Steps between two looks at how close the norms come, after which their iterations are chosen anew.
CONTROL_EVERY = 25

# What records of the history were called in checkpoints of earlier versions.
RENAMED = {
    "correct": "accuracy",
    "closeness_worst": "closeness_worst_sample",
    "closeness_layer": "closeness_worst_layer",
}


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the training after a whole step; the checkpoint at ``path`` holds everything."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; checkpoint: {path}")
        self.number = number
        self.path = path


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because the loss is no longer a number."""


@dataclass(frozen=True)
class Settings:
    """Where and how a recipe runs; unlike the recipe it may differ when a run is resumed.

    Attributes:
        data_root: folder of the data sets, None for a preset that needs none.   out: folder of checkpoint and logs.
        device: where to compute.   precision: fp32, tf32 (GPU only) or bf16, for the products of clean pass and bounds.
        resume: continue from the checkpoint in ``out``.   overwrite: start afresh although there is one.
    """

    out: Path
    data_root: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    resume: bool = False
    overwrite: bool = False


class _Signals:
    """Within it, SIGINT and SIGTERM are noted instead of acted on; a second one is not held back in a single process.

    Under torchrun a Ctrl-C reaches each process twice, from the terminal and from torchrun.
    """

    def __init__(self, hold_all: bool) -> None:
        self.number = 0
        self._hold_all = hold_all
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and not self._hold_all:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """One training run. Construct it, then call :meth:`run`; the state in between is that of the checkpoint.

    ValueError when the recipe and the data or the number of processes do not fit, CheckpointError when ``resume`` finds
    no checkpoint or one of another recipe, FileExistsError when ``out`` holds a run that nobody said to continue.
    """

    def __init__(self, recipe: Recipe, settings: Settings, workers: Workers | None = None) -> None:
        self.recipe = recipe
        self.settings = settings
        self.workers = workers or Workers()
        self.path = settings.out / CHECKPOINT_NAME
        if recipe.batch_size % self.workers.count:
            raise ValueError(
                f"batch_size is {recipe.batch_size}; it must be a multiple of the {self.workers.count} processes"
            )
        if self.path.exists() and not (settings.resume or settings.overwrite):
            raise FileExistsError(f"{self.path} exists; resume it, overwrite it, or choose another folder")
        set_precision(settings.precision, settings.device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False

        name = models.spec(recipe.preset).data
        self.training_set = data.load(name, settings.data_root, train=True).to(settings.device)
        self.test_set = data.load(name, settings.data_root, train=False).to(settings.device)
        self.batches = data.Batches(
            self.training_set,
            recipe.batch_size,
            device=settings.device,
            shuffle=True,
            crop=recipe.crop,
            flip=recipe.flip,
            drop_last=True,
            seed=recipe.seed,
            rank=self.workers.rank,
            world_size=self.workers.count,
        )
        self.steps = len(self.batches)

        self.model = build_model(recipe).to(settings.device)
        self.objective = Objective(self.model, recipe, settings.precision)
        torch.manual_seed(recipe.seed + self.workers.rank)
        # Under several processes the exchange of gradients stays out of graphs.
        self.capture = settings.device.type == "cuda" and self.workers.count == 1
        self.optimiser = adam(self.model.parameters(), recipe.learning_rate, capture=self.capture)
        self.epoch = self.step = 0
        self.seconds = self.look_seconds = 0.0
        self.memory = 0  # peak in bytes, of tensors on a GPU, of the process on a CPU
        self.history: list[dict[str, float]] = []
        # Asked now: the package may be installed anew while a long run goes on.
        self.versions = {"locallip_cuda": build_info()["version"], "torch": torch.__version__}
        self.totals = torch.zeros(len(STATISTICS), dtype=torch.float64, device=settings.device)
        if settings.resume:
            self._restore()

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint (process 0; the others help to gather). OSError when it cannot be stored."""
        states = {"random/cpu": torch.get_rng_state(), "progress/totals": self.totals}
        if self.settings.device.type == "cuda":
            states["random/cuda"] = torch.cuda.get_rng_state(self.settings.device)
        gathered = {name: self.workers.gather(state) for name, state in states.items()}
        if self.workers.rank:
            return
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser/{name}/{key}"] = value
        if self.objective.norms is not None:
            tensors.update({f"norms/{name}": value for name, value in self.objective.norms.state_dict().items()})
        for name, parts in gathered.items():
            tensors.update({f"{name}/{rank}": part for rank, part in enumerate(parts)})
        config = {
            "recipe": self.recipe.to_dict(),
            "position": {"epoch": self.epoch, "step": self.step},
            "seconds": self.seconds,
            "memory": self._peak_of_memory(),
            "history": self.history,
            "samples": len(self.training_set),
            "processes": self.workers.count,
            "precision": self.settings.precision,
            "device": self.settings.device.type,
            "versions": self.versions,
        }
        checkpoint.save(self.path, tensors, config)

    def _peak_of_memory(self) -> int:
        """Of all processes so far that worked at the run."""
        if self.settings.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.settings.device)
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.memory = max(self.memory, now)
        return self.memory

    def _restore(self) -> None:
        tensors, config = checkpoint.load(self.path)
        try:
            recipe = Recipe.from_dict(config["recipe"])
            position, samples = config["position"], int(config["samples"])
            self.epoch, self.step = int(position["epoch"]), int(position["step"])
            self.seconds = float(config["seconds"])
            self.history = [{RENAMED.get(k, k): v for k, v in record.items()} for record in config["history"]]
            self.memory = int(config.get("memory", 0))  # earlier versions kept none
            processes = int(config["processes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: its configuration is not a training run's ({error})") from error
        if recipe != self.recipe:
            ours, theirs = self.recipe.to_dict(), recipe.to_dict()
            other = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
            raise CheckpointError(f"{self.path}: its run has {'; '.join(other)}")
        if samples != len(self.training_set):
            raise CheckpointError(
                f"{self.path}: trained on {samples} samples, the training set here has {len(self.training_set)}"
            )
        checkpoint.load_into(self.model, checkpoint.group(tensors, "model"), self.path)
        if self.objective.norms is not None:
            checkpoint.load_into(self.objective.norms, checkpoint.group(tensors, "norms"), self.path)
        self._restore_optimiser(checkpoint.group(tensors, "optimiser"))
        # Each process takes up its own sums and random state; those of processes that are no more count in the first.
        totals, random = checkpoint.group(tensors, "progress/totals"), checkpoint.group(tensors, "random")
        for rank in range(processes):
            if rank == self.workers.rank or (rank >= self.workers.count and self.workers.rank == 0):
                self.totals += totals[str(rank)].to(self.totals)
        rank = self.workers.rank
        if f"cpu/{rank}" in random:
            torch.set_rng_state(random[f"cpu/{rank}"])
        if self.settings.device.type == "cuda" and f"cuda/{rank}" in random:
            torch.cuda.set_rng_state(random[f"cuda/{rank}"], self.settings.device)

    def _restore_optimiser(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:  # a checkpoint from before the first step
            return
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self.model.named_parameters()):
            state[index] = checkpoint.group(tensors, name)
            expected = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if {key: value.shape for key, value in state[index].items()} != expected:
                raise CheckpointError(f"{self.path}: Adam's state of {name!r} is incomplete or has another shape")
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """Train to the end, with a checkpoint after every epoch. Returns the last look at the test set.

        Interrupted after SIGINT or SIGTERM, once the checkpoint is written; TrainingError, and no checkpoint, when the
        loss or a weight is no number; OSError when a checkpoint cannot be written. The previous checkpoint is whole in
        every case.
        """
        evaluation: Evaluation | None = None
        objective: nn.Module = self.objective
        if self.workers.count > 1:
            # With one input channel two sets of strides describe the same layout; torch warns of any difference.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            device_ids = [self.settings.device] if self.settings.device.type == "cuda" else None
            objective = DistributedDataParallel(objective, device_ids=device_ids)
        update = TrainingStep(objective, self.optimiser, capture=self.capture, launches=self.objective.launches)
        checkpoint.make_folder(self.settings.out)
        with (
            _Signals(self.workers.started_by_torchrun) as signals,
            self._tensorboard() as board,
            Progress(
                self.recipe.epochs * self.steps, self.epoch * self.steps + self.step, silent=self.workers.rank > 0
            ) as progress,
        ):
            pace = Pace(self.seconds, self.epoch * self.steps + self.step)
            while self.epoch < self.recipe.epochs:
                speed = self._train_epoch(update, signals, progress, pace)
                record = self._trained(speed, progress, pace)
                evaluation = self._look(record, signals, progress, pace)
                self._finish_epoch(record, board)
                self.save()
        return evaluation

    def _stopped(self, signals: _Signals) -> bool:
        return self.workers.any(bool(signals.number))

    def _finite_means(self) -> dict[str, float]:
        """The epoch's means so far. TrainingError when the loss or a weight is no number: nothing to be saved."""
        means = means_of(self.workers.sum(self.totals).tolist())
        if not math.isfinite(means["loss"]):
            raise TrainingError(f"the loss of epoch {self.epoch + 1} is {means['loss']}; try a lower learning rate")
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            raise TrainingError(f"weights are no numbers in epoch {self.epoch + 1}; try a lower learning rate")
        return means

    def _interrupt(self, signals: _Signals) -> NoReturn:
        self._finite_means()
        self.save()
        self.workers.any(False)  # the others wait until process 0 has written it
        raise Interrupted(signals.number or signal.SIGTERM, self.path)

    def _look_is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.recipe.evaluate_every == 0 or epoch + 1 == self.recipe.epochs

    def _look(self, record: dict[str, float], signals: _Signals, progress: Progress, pace: Pace) -> Evaluation | None:
        """The look at the test set that is due after this epoch, if any. Stopped in it, a run resumes with it."""
        if not self._look_is_due(self.epoch):
            return None
        where, seen, started = f"epoch {self.epoch + 1}/{self.recipe.epochs}, test", 0, time.perf_counter()
        if progress.terminal:
            progress.show(where, f"{len(self.test_set)} samples")

        def stop() -> bool:
            nonlocal seen
            seen = min(seen + self.recipe.batch_size, len(self.test_set))
            if progress.due():
                progress.show(where, f"{seen} of {len(self.test_set)} samples{self._time_left(pace)}")
            return self._stopped(signals)

        found = evaluate(self.objective, self.test_set, self.workers, stop=stop)
        if found is None:
            self._interrupt(signals)
        self.look_seconds = time.perf_counter() - started
        record.update({f"test_{name}": value for name, value in vars(found).items()})
        progress.line(
            f"{where}: accuracy {found.accuracy:.2%}, certified (estimate) {found.certified_estimate:.2%} "
            f"at eps {self.recipe.eps:.3g}, Lipschitz (estimate) {found.lipschitz_estimate:.3g}; "
            f"{duration(self.look_seconds)} for {len(self.test_set)} samples"
        )
        return found

    def _train_epoch(self, update: TrainingStep, signals: _Signals, progress: Progress, pace: Pace) -> float:
        """The rest of the current epoch; returns the samples per second."""
        recipe, device = self.recipe, self.settings.device
        first, before, started = self.step, self.seconds, time.perf_counter()
        where = f"epoch {self.epoch + 1}/{recipe.epochs}"
        for x, y in self.batches.epoch(self.epoch, first):
            self._train_step(update, x, y)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            if progress.due():
                means = means_of(self.totals.tolist())  # waits for the GPU
                self.seconds = before + time.perf_counter() - started
                self._reach(progress, pace)
                if progress.terminal:
                    progress.show(where, f"{_short_line(means)}{self._time_left(pace)}")
                else:
                    step = f"step {self.step}/{self.steps}"
                    progress.show(f"{where}, {step}", f"{_line(means)}{self._time_left(pace)}")
            if self._stopped(signals):
                self._interrupt(signals)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds = before + time.perf_counter() - started
        self._reach(progress, pace)
        return (self.step - first) * recipe.batch_size / max(self.seconds - before, 1e-9)

    def _reach(self, progress: Progress, pace: Pace) -> None:
        done = self.epoch * self.steps + self.step
        progress.reach(done)
        pace.mark(self.seconds, done)

    def _time_left(self, pace: Pace) -> str:
        """Of the whole run: its steps at their pace, its looks at the test set as long as the last one.

        "> " where steps are to come that cost more, by another bound than those of now or by any at all.
        """
        recipe = self.recipe
        steps = pace.seconds_for((recipe.epochs - self.epoch) * self.steps - self.step)
        if steps is None:
            return ""
        looks = sum(map(self._look_is_due, range(self.epoch, recipe.epochs)))
        now = self._bound_at(self.epoch + max(self.step - 1, 0) / self.steps)
        more = "" if now == self._bound_at(recipe.epochs) else "> "
        return f", {more}{duration(steps + looks * self.look_seconds)} left"

    def _train_step(self, update: TrainingStep, x: Tensor, y: Tensor) -> None:
        now, recipe = self.epoch + self.step / self.steps, self.recipe
        self._choose_bound(now)
        if recipe.kappa(now) < 1 and (self.epoch * self.steps + self.step) % CONTROL_EVERY == 0:
            self._control_norms(x, y, recipe.radius_at(now))
        self.totals += update(x, y, recipe.radius_at(now), recipe.kappa(now), recipe.learning_rate_at(now))

    def _choose_bound(self, now: float) -> None:
        self.objective.bound = self.recipe.bound_at(now)

    def _bound_at(self, now: float) -> str | None:
        """What a step computes, None in the warm-up."""
        return None if self.recipe.kappa(now) == 1 else self.recipe.bound_at(now)

    def _control_norms(self, x: Tensor, y: Tensor, eps: float) -> None:
        """Choose the norms' iterations anew, by a look at the first samples of the first process."""
        norms = self.objective.norms
        if norms is None or self.objective.bound == "global":
            return
        x, y = x[:SAMPLES], y[:SAMPLES]
        norms.control(bounds_at_rest(self.objective, x, y, eps), y)
        norms.set_extra_state(self.workers.gather(norms.get_extra_state())[0])

    def _trained(self, speed: float, progress: Progress, pace: Pace) -> dict[str, float]:
        """The record of an epoch whose steps are done, and its line; a terminal gets that with a look at the test."""
        recipe, end = self.recipe, self.epoch + (self.steps - 1) / self.steps
        means = self._finite_means()
        self._choose_bound(end)  # as the last step, which may be of another run
        schedule = {
            "kappa": recipe.kappa(end),
            "eps": recipe.radius_at(end),
            "learning_rate": recipe.learning_rate_at(end),
        }
        record = {"epoch": self.epoch + 1.0, "seconds": self.seconds, **means, **schedule, "samples_per_second": speed}
        text = f"epoch {self.epoch + 1}/{recipe.epochs}: {_line(means)} at eps {schedule['eps']:.3g}"
        if schedule["eps"]:
            seen = closeness(self.objective, self.training_set, schedule["eps"])
            record.update(seen)
            text += (
                f"; closeness {seen['closeness_mean']:.3f}, worst sample {seen['closeness_worst_sample']:.3f}, "
                f"worst layer {seen['closeness_worst_layer']:.3f}"
            )
            if self.objective.norms is not None and self.objective.bound == "local":
                text += f", iterations {self.objective.norms.extra_repr()}"
        text += f"; learning rate {schedule['learning_rate']:.2g}, kappa {schedule['kappa']:.2f}, {speed:.0f} samples/s"
        look = self._look_is_due(self.epoch)
        if look or not progress.terminal:
            progress.line(text + self._time_left(pace) + ("; now the test set" if look else ""))
        return record

    def _finish_epoch(self, record: dict[str, float], board: Any) -> None:
        self.totals.zero_()
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append(record)
        if board is not None:
            for name, value in record.items():
                tag = f"test/{name[5:]}" if name.startswith("test_") else f"train/{name}"
                board.add_scalar(tag, value, self.epoch)

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        """A TensorBoard writer in the output folder, None without the package or in other processes than the first."""
        if self.workers.rank:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not self.settings.resume:  # it was said when the run began
                print('No TensorBoard log: tensorboard is not installed (pip install "locallip-cuda[tensorboard]").')
            yield None
            return
        # What an earlier process logged beyond its last checkpoint is dropped.
        with SummaryWriter(str(self.settings.out), purge_step=self.epoch + 1) as board:
            yield board


def _line(means: dict[str, float]) -> str:
    text = f"loss {means['loss']:.4f} (clean {means['clean']:.4f}"
    if means["robust"]:
        text += f", robust {means['robust']:.4f}"
    if means["sparsity"]:
        text += f", sparsity {means['sparsity']:.4f}"
    text += f"), accuracy {means['accuracy']:.2%}"
    return f"{text}, certified (estimate) {means['certified_estimate']:.2%}" if means["robust"] else text


def _short_line(means: dict[str, float]) -> str:
    """For a bar in 80 columns."""
    text = f"loss {means['loss']:.2f}, accuracy {means['accuracy']:.0%}"
    return f"{text}, certified (estimate) {means['certified_estimate']:.0%}" if means["robust"] else text
