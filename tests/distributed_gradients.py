"""Run by torchrun from test_train.py: the gradients of one step on two batches, written by the first process.

Each process takes its share of the global batch; the gradients are those DistributedDataParallel leaves behind.
"""

import sys

import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

from locallip_cuda import data, train
from locallip_cuda.distributed import Workers
from locallip_cuda.presets import Recipe, recipe


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


def numbers() -> Recipe:
    # Enough iterations that the norms do not depend on where a sample stands in its batch, and low thresholds that
    # some units reach.
    return recipe("digits").replace(iterations=60, sparse=0.1, threshold_init=0.2)


if __name__ == "__main__":
    with Workers() as workers:
        workers.connect(torch.device("cpu"))
        objective = DistributedDataParallel(train.Objective(train.build_model(numbers()), numbers()))
        found = {}
        for kappa in (1.0, 0.25):
            for name, gradient in gradients(objective, workers, numbers(), kappa).items():
                found[f"{kappa}/{name}"] = gradient.clone()
        if workers.rank == 0:
            safetensors.torch.save_file(found, sys.argv[1])
