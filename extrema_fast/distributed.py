"""Processes: who am I, wrapping the student, agreement between ranks, signals.

One code path for plain `python`, torchrun and SLURM. With one process every method below returns at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
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
    """Processors this process may use."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """The processes of one run, seen from one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True everywhere if `flag` is true on any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def share(self, value: Any) -> Any:
        """Rank 0's value (plain JSON data) on every process."""
        return value if self.size == 1 else self._from(0, value)

    def gather(self, value: Any) -> list[Any]:
        """Each process's value (plain JSON data) on every process, in the order of ranks."""
        return [value] if self.size == 1 else [self._from(rank, value) for rank in range(self.size)]

    def _from(self, rank: int, value: Any) -> Any:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([data.numel()], device=self.device)
        dist.broadcast(length, rank)
        if self.rank != rank:
            data = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, rank)
        return json.loads(bytes(data.cpu().tolist()))

    def on_main(self, function: Callable[[], T]) -> T | None:
        """`function()` run on rank 0 only: its result there, None elsewhere; its ExtremaError everywhere."""
        if self.size == 1:
            return function()
        result, failure = None, None
        if self.main:
            try:
                result = function()
            except ExtremaError as error:
                failure = [type(error).__name__, str(error)]
        failure = self.share(failure)
        if failure:
            raise getattr(errors, failure[0], ExtremaError)(failure[1])
        return result

    def main_first(self, function: Callable[[], T]) -> T:
        """`function()` on rank 0, then on the others; each process has its own result."""
        result = self.on_main(function)
        return result if self.main else function()  # type: ignore[return-value]

    def wrap(self, student: nn.Module) -> nn.Module:
        """The student under DistributedDataParallel; the module itself with one process."""
        if self.size == 1:
            return student
        ids = [self.device.index] if self.device.type == "cuda" else None
        # the only buffer is the fixed position table: sending it every step would be waste
        return nn.parallel.DistributedDataParallel(
            student, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def sync_only_if(self, last: bool, model: nn.Module) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients are exchanged with the last one only."""
        return nullcontext() if last or self.size == 1 else model.no_sync()


def detect(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, processes, rank on this machine) from torchrun's variables, else SLURM's, else (0, 1, 0).

    SLURM counts only inside a job step of several tasks: a plain `python` in a batch script sees the job's
    task count too, and would wait for partners that do not exist.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def slurm_master(env: Mapping[str, str]) -> tuple[str, str]:
    """(address, port) every task of a SLURM step derives alike: its first node, a port from the job id."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    host = (first[1] + (first[2] or "")) if first else nodes
    return host, str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)


def pick_device(name: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device of this process.

    raises UsageError for another name, or for a GPU that is not there
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
    """Joins the process group (if there is one) and leaves it again; gloo on CPU, nccl on GPU."""
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
        # raised on every rank alike; anything else may leave partners in a collective: let the process end
        if ours:
            dist.destroy_process_group()
        raise
    if ours:
        dist.destroy_process_group()


class Signals:
    """SIGTERM and SIGINT set a flag, nothing else: the loop ends its step, saves and leaves.

    A second Ctrl-C raises KeyboardInterrupt at once. Inactive outside the main thread.
    """

    def __init__(self) -> None:
        self.stop = False
        self.name = ""
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
        self.stop, self.name = True, signal.Signals(number).name
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
