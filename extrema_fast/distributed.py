"""The processes of a run: rank and device, collectives, data parallelism, signals.

One code path for plain `python`, torchrun and SLURM; with one process every collective returns at once.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import errors
from .errors import ExtremaError, UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")

# rank 0 evaluates and saves alone while the others wait in their next collective
TIMEOUT = timedelta(minutes=60)


def cores() -> int:
    """Number of processors this process may use."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """The processes of one run, from the point of view of one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def memory_gb(self) -> float:
        """Peak memory of this process in GB: the allocator's on a GPU, all of it on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True everywhere if `flag` is true on any process; waits for the device."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The value (plain data) of each process on every process, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def rank_zero_only(self, function: Callable[[], T]) -> T | None:
        """Runs `function()` on rank 0: its result there, None elsewhere, its ExtremaError everywhere."""
        if self.size == 1:
            return function()
        result, failure = None, None
        if self.is_rank_zero:
            try:
                result = function()
            except ExtremaError as error:
                failure = [type(error).__name__, str(error)]
        failure = self.broadcast(failure)
        if failure:
            raise getattr(errors, failure[0], ExtremaError)(failure[1])
        return result

    def rank_zero_first(self, function: Callable[[], T]) -> T:
        """Runs `function()` on rank 0, then on the other processes; each has its own result."""
        result = self.rank_zero_only(function)
        return result if self.is_rank_zero else function()  # type: ignore[return-value]

    def wrap(self, student: nn.Module) -> nn.Module:
        """The student under DistributedDataParallel; the module itself with one process."""
        if self.size == 1:
            return student
        ids = [self.device.index] if self.device.type == "cuda" else None
        # the only buffer is the constant position table: no need to send it at every step
        wrapped = nn.parallel.DistributedDataParallel(
            student, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        # gloo's destructor waits for its threads, and they for the GIL when they release a tensor; only the group's
        # Python object lets go of the GIL for it, so it must be what is released last: attributes go in order
        wrapped._group = dist.group.WORLD  # type: ignore[assignment]
        return wrapped

    def no_sync_unless(self, last: bool, model: nn.Module) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are all-reduced with the last one only."""
        return nullcontext() if last or self.size == 1 else model.no_sync()  # type: ignore[operator]


def detect(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables of torchrun, else of SLURM, else (0, 1, 0).

    SLURM's count only inside a job step of several tasks: a plain `python` in a batch script sees the job's
    task count too, and would wait for processes that do not exist.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def slurm_master(env: Mapping[str, str]) -> tuple[str, str]:
    """(address, port) that every task of a SLURM step agrees on: its first node, a port from the job id."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    host = (first[1] + (first[2] or "")) if first else nodes
    return host, str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)


def pick_device(name: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of this process for `system.device`: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: another name, or a GPU that does not exist.
    """
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UsageError(f"system.device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if ":" in name and processes > 1:
        raise UsageError(
            f"system.device: {name} would be shared by {processes} processes; use cuda, each takes its own"
        )
    index = int(name.split(":")[1]) if ":" in name else local_rank
    if index >= found:
        raise UsageError(f"system.device: {name} needs GPU {index}, {found} found; use system.device cpu")
    return torch.device("cuda", index)


@contextmanager
def start(device: str) -> Iterator[World]:
    """Context of a run: joins the process group, if there is one, and leaves it (gloo on a CPU, NCCL on a GPU)."""
    rank, size, local_rank = detect(os.environ)
    where = pick_device(device, local_rank, size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    ours = size > 1 and not dist.is_initialized()
    if ours:
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm_master(os.environ)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
        log.info("process %d of %d on %s (%s)", rank, size, where, backend)
    try:
        yield World(where, rank, size)
    except ExtremaError:
        # raised on all ranks; after any other error the others may be in a collective: let the process end
        if ours:
            dist.destroy_process_group()
        raise
    if ours:
        dist.destroy_process_group()


class Signals:
    """Context in which SIGTERM and SIGINT only set a flag: the loop finishes its step, saves and stops.

    A second Ctrl-C raises KeyboardInterrupt at once. No effect outside the main thread.
    """

    def __init__(self) -> None:
        self.stop = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def stop_agreed(self, world: World, log_line_due: bool) -> bool:
        """True on all processes alike once any of them got a signal.

        Args:
            log_line_due: several GPUs ask only then, because asking waits for the device.
        """
        if world.size > 1 and world.device.type == "cuda" and not log_line_due:
            return False
        return world.any(self.stop)
