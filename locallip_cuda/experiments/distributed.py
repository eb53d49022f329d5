"""The few things that processes started by ``torchrun`` have to tell each other."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# how long one process may be at work while the others wait for it; one that ends is noticed at once
PATIENCE = timedelta(days=7)


class Workers:
    """The processes of one run, as a context manager; a single process when ``torchrun`` did not start this one.

    Gradients travel over nccl on GPUs and gloo on CPUs (DistributedDataParallel). What is said here, flags and sums,
    travels over gloo from CPU tensors in any case, so that it never waits for the GPU. ConnectionError where another
    process has ended.

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
        self._store: Any = dist.HashStore()  # type: ignore[attr-defined]

    def connect(self, device: torch.device) -> None:
        """Join the other processes; ``device`` decides how gradients travel. Does nothing for a single process."""
        if self.count > 1:
            self._store, rank, count = next(rendezvous("env://"))
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=count)
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

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

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # whatever gloo or the store have to say
            raise ConnectionError(f"another of the {self.count} processes has ended ({error})") from error

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, on the CPU; all of them call this together."""
        value = value.detach().cpu().clone()
        if self._control is not None:
            with self._hearing():
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
        with self._hearing():
            dist.all_gather(parts, value, group=self._control)
        return parts

    def share(self, value: Any) -> list[Any]:
        """``value``, anything that JSON has, as JSON gives it back, from each process in order of rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor(len(data)))]
        parts = self.gather(torch.cat([data, data.new_zeros(max(sizes) - len(data))]))
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def count_up(self, name: str, by: int) -> int:
        """What ``name``, 0 at first, has come to with ``by`` added, over all processes; waits for none of them."""
        with self._hearing():
            return int(self._store.add(f"locallip/{name}", by))

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until all processes have come here; ``meanwhile`` is called now and then."""
        if self._control is None:
            return
        with self._hearing():
            work = dist.barrier(group=self._control, async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(0.1)
            work.wait()
