"""The few things that data-parallel processes started by ``torchrun`` have to tell each other."""

from __future__ import annotations

import gc
import os
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The processes of one run, as a context manager; a single process when ``torchrun`` did not start this one.

    Gradients travel over nccl on GPUs and gloo on CPUs (DistributedDataParallel). What is said here, flags and sums,
    travels over gloo from CPU tensors in any case, so that it never waits for the GPU.

    Attributes:
        rank: number of this process, 0 writes files and the terminal.   local_rank: its number on this machine.
        count: number of processes.   started_by_torchrun: whether ``torchrun`` started this process.
    """

    def __init__(self) -> None:
        self.started_by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ["RANK"]) if self.started_by_torchrun else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.started_by_torchrun else 0
        self.count = int(os.environ["WORLD_SIZE"]) if self.started_by_torchrun else 1
        self._control: dist.ProcessGroup | None = None

    def connect(self, device: torch.device) -> None:
        """Join the other processes; ``device`` decides how gradients travel. Does nothing for a single process."""
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._control = dist.new_group(backend="gloo")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not dist.is_initialized():
            return
        # Gloo's threads let go of Python objects when a collective is done. One that does so while the interpreter
        # shuts down aborts the process, so the groups and what still refers to them have to be gone before.
        gc.collect()
        if error is None:
            dist.barrier()
        self._control = None
        dist.destroy_process_group()
        gc.collect()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, on the CPU; all of them call this together."""
        value = value.detach().cpu().clone()
        if self._control is not None:
            dist.all_reduce(value, group=self._control)
        return value

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; all of them call this together."""
        return flag if self._control is None else bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Tensor) -> list[Tensor]:
        """``value``, of one shape everywhere, from each process in order of rank, on the CPU."""
        value = value.detach().cpu().contiguous()
        if self._control is None:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value, group=self._control)
        return parts
