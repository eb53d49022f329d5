"""Run by torchrun from test_train.py, in every process: gradients of a step, and a run that is stopped and resumed.

Each process takes its share of the global batch; the gradients are those DistributedDataParallel leaves behind.
"""

import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

from locallip_cuda.experiments import data
from locallip_cuda.experiments.distributed import Workers
from locallip_cuda.experiments.network import build_model
from locallip_cuda.experiments.objective import Objective
from locallip_cuda.experiments.recipes import Recipe, recipe
from locallip_cuda.experiments.trainer import Interrupted, Settings, Trainer

# Enough iterations that the norms do not depend on where a sample stands in its batch, and thresholds that units reach.
NUMBERS = recipe("digits").replace(iterations=60, sparse=0.1, threshold_init=0.02)
SHORT = recipe("digits").replace(epochs=2, batch_size=64)
KAPPAS = (1.0, 0.25)


def gradients(objective: torch.nn.Module, workers: Workers, numbers: Recipe, kappa: float) -> dict[str, torch.Tensor]:
    batches = data.Batches(
        data.load("digits", train=True),
        numbers.batch_size,
        shuffle=True,
        crop=1,
        rank=workers.rank,
        world_size=workers.count,
    )
    x, y = next(batches.epoch())
    objective.zero_grad()
    loss, _ = objective(x, y, numbers.eps_train, kappa)
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in objective.named_parameters()}


def write_gradients(path: Path, workers: Workers) -> None:
    objective = DistributedDataParallel(Objective(build_model(NUMBERS), NUMBERS))
    found = {}
    for kappa in KAPPAS:
        for name, gradient in gradients(objective, workers, NUMBERS, kappa).items():
            found[f"{kappa}/{name}"] = gradient.clone()
    if workers.rank == 0:
        safetensors.torch.save_file(found, path)


def stop_and_resume(out: Path, workers: Workers) -> None:
    """A run that a signal to the second process stops after two steps, continued to its end."""
    original, steps = Trainer._train_step, 0

    def stop_after_two(self: Trainer, *inputs: object) -> None:
        nonlocal steps
        original(self, *inputs)
        steps += 1
        if steps == 2 and workers.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._train_step = stop_after_two
    trainer = Trainer(SHORT, Settings(out=out), workers)
    try:
        trainer.run()
    except Interrupted:
        assert trainer.step == 2, trainer.step
        Trainer(SHORT, Settings(out=out, resume=True), workers).run()
    else:
        raise AssertionError("the signal did not stop the run")


def main(out: Path, workers: Workers) -> None:
    write_gradients(out / "gradients", workers)
    stop_and_resume(out / "resumed", workers)


if __name__ == "__main__":
    with Workers() as workers:
        workers.connect(torch.device("cpu"))
        main(Path(sys.argv[1]), workers)
