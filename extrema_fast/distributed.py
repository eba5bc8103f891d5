"""The processes of a run: rank and device, collectives, data parallelism, signals.

Plain `python`, torchrun and SLURM share one code path; with one process every collective returns immediately.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import logging
import os
import re
import resource
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__, errors
from .errors import ExtremaError, LostProcessError, UsageError, of_storage, one_line
from .files import fits
from .hangs import dump_stacks, where

log = logging.getLogger(__name__)
T = TypeVar("T")

# rank 0 evaluates and saves while the others wait in their next collective
WAIT_S = 3600.0
# torch's own limit, longer than ours
TIMEOUT = timedelta(seconds=WAIT_S + 600)
# for all processes to start; they may import from a slow file system
JOIN_S = 600.0
# log a wait after this time
TELL_S = 30.0
# a process is lost if it has not answered for this long while another waited for it
LOST_S = 180.0
# after an error of all processes, time for process 0 to finish writing
LEAVE_S = 10.0
# write the stacks of all processes after waiting this long
STACKS_S = 120.0
# how often a waiting process queries the others
ASK_S = 5.0
# warn about clocks that differ by more
CLOCK_S = 5.0
# time to save before a process that waits for a lost one exits
SAVE_S = 120.0


def cores() -> int:
    """Number of processors this process may use."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """Number of processes of this run on this machine, according to torchrun or SLURM."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, _number(os.environ, "LOCAL_WORLD_SIZE"))
    if _number(os.environ, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return 1
    # `8(x2)`, `8,4`: the largest, if nodes differ
    tasks = re.findall(r"(?:^|,)(\d{1,9})", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max([1, *map(int, tasks)])


def share_of_cores() -> int:
    """Processors for this process: those that SLURM bound to its task, else an equal fraction of the machine's."""
    return max(1, min(cores(), _number(os.environ, "SLURM_CPUS_ON_NODE", cores()) // processes_here()))


def wide(device: torch.device | str) -> torch.dtype:
    """The widest float of a device: float64, or float32 on MPS."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def double(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU if its device has no float64."""
    return (x if wide(x.device) == torch.float64 else x.cpu()).double()


def is_sharded(x: Any) -> bool:
    """Whether a tensor is sharded over processes (a DTensor, whose package is slow to import)."""
    return hasattr(x, "placements")


def local(x: Any) -> Tensor:
    """This process's rows of a sharded tensor, sharing memory; any other tensor unchanged. Not for autograd."""
    if not is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def whole(x: Any) -> Tensor:
    """The full tensor of a sharded one (every process must call this); any other tensor unchanged."""
    return x.detach().full_tensor() if is_sharded(x) else x


def rows_of(like: Any) -> tuple[int, int]:
    """First and last (exclusive) row of a sharded tensor on this process, as by `torch.chunk`."""
    mesh, rows = like.device_mesh, like.shape[0]
    size = -(-rows // mesh.size())
    begin = min(mesh.get_local_rank() * size, rows)
    return begin, min(begin + size, rows)


def sharded_as(rows: Tensor, like: Any) -> Tensor:
    """The tensor of which each process has its `rows`, sharded like `like`, without communication."""
    from torch.distributed.tensor import DTensor

    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True)
class World:
    """The processes of one run, as seen by one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    watch: Watch | None = field(default=None, compare=False, repr=False)

    @property
    def is_rank_zero(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def memory_gb(self) -> float:
        """Peak memory of this process in GB: the allocator's on a GPU, all of it on a CPU; on MPS what is held now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.device.type == "mps":
            # MPS keeps no peak
            return torch.mps.driver_allocated_memory() / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    @property
    def waits(self) -> bool:
        """Whether this process waits for the others now."""
        return self.watch is not None and self.watch.inside

    def waiting(self) -> AbstractContextManager[None]:
        """Context of work that waits for the other processes and does not change anything that is saved."""
        return nullcontext() if self.watch is None else self.watch.waiting()

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over all processes, in place."""
        if self.size > 1:
            with self.waiting():
                dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """True everywhere if `flag` is true on any process; waits for the processes, not for the device."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor([float(flag)])).item() > 0)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain data) on every process."""
        if self.size == 1:
            return value
        values = [value]
        with self.waiting():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The value (plain data) of each process on every process, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            with self.waiting():
                dist.all_gather_object(values, value)
        return values

    def hand_in(self, key: str, value: Any, until: Callable[[], float]) -> list[Any]:
        """Sends a value (plain data) to process 0 through the store, for threads, which must not use collectives.

        Args:
            key: The same on all processes; used once.
            until: Time (of `time.monotonic`) until which process 0 waits for the others.

        Returns:
            On process 0 the values of all, in rank order; on the others an empty list.

        Raises:
            OSError: A value did not arrive in time, or the store is gone.
        """
        if self.size == 1:
            return [value]
        from torch.distributed.distributed_c10d import _get_default_store

        keys, pause = [f"{key}/{n}" for n in range(self.size)], 0.001
        try:
            store = _get_default_store()
            store.set(keys[self.rank], json.dumps(value))
            if not self.is_rank_zero:
                return []
            while missing := [n for n, k in enumerate(keys) if not store.check([k])]:
                if time.monotonic() > until():
                    raise TimeoutError(f"nothing was heard from process {missing[0]} of {self.size}")
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
            found = [json.loads(store.get(k)) for k in keys]
            for k in keys:
                store.delete_key(k)
        except RuntimeError as error:
            raise ConnectionError(one_line(error)) from None
        return found

    def rank_zero_only(self, function: Callable[[], T]) -> T | None:
        """Runs `function()` on rank 0: its result there, None elsewhere, its ExtremaError or OSError everywhere."""
        result, failure = _tried(function) if self.is_rank_zero else (None, None)
        if failure and self.size == 1:
            raise failure from None
        failed = self.broadcast(failure and (type(failure).__name__, str(failure)))
        if failed:
            raise _of_all(*failed)
        return result

    def everywhere(self, function: Callable[[], T]) -> T:
        """Runs `function()`, in which no process waits for another, on all processes.

        Returns:
            The process's own result.

        Raises:
            ExtremaError: That of any process, on all of them; it names the process.
        """
        result, failure = _tried(function)
        if failure and self.size == 1:
            raise failure from None
        about = failure and (type(failure).__name__, str(failure), socket.gethostname())
        for rank, failed in enumerate(self.all_gather(about)):
            if failed:
                raise _of_all(failed[0], f"{failed[1]} (process {rank} on {failed[2]})")
        return result  # type: ignore[return-value]

    def rank_zero_first(self, function: Callable[[], T]) -> T:
        """Like `everywhere`, but after process 0 one process of each other machine, then the rest.

        What the first keeps on its machine, such as the index of a tar, the others find there.
        """
        found = self.rank_zero_only(function)
        first = self.is_rank_zero or detect(os.environ)[2] == 0
        found = self.everywhere(lambda: function() if first and not self.is_rank_zero else found)
        return self.everywhere(lambda: found if first else function())  # type: ignore[return-value]

    def agree(self, what: str, value: dict[str, Any], remedy: str) -> None:
        """Compares a value (plain data) between all processes.

        Args:
            what: The start of the error, e.g. `data.train`.
            remedy: The end of the error.

        Raises:
            UsageError: On all processes, for the first that differs from process 0; it has both values.
        """
        if self.size == 1:
            return
        found = self.all_gather((value, socket.gethostname()))
        if difference := _difference(*zip(*found, strict=True)):
            raise _of_all("UsageError", f"{what}: {difference}; {remedy}")

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcasts the tensors of process 0 to all processes, in place."""
        if self.size > 1:
            with self.waiting(), torch.no_grad():
                for x in tensors:
                    dist.broadcast(x, src=0)

    def wrap(self, student: nn.Module, reduce: torch.dtype = torch.float32) -> nn.Module:
        """The student under DistributedDataParallel; the module itself with one process, or if it is sharded.

        Args:
            reduce: Dtype in which gradients are summed.
        """
        if self.size == 1 or any(is_sharded(p) for p in student.parameters()):
            return student
        # NCCL is fastest with larger buckets than torch's 25 MB
        gpu: dict[str, Any] = {"device_ids": [self.device.index], "bucket_cap_mb": 100}
        options = gpu if self.device.type == "cuda" else {}
        ddp = nn.parallel.DistributedDataParallel
        # the only buffer is the constant position table: no need to send it at every step. torch 2.13 renamed this
        new = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters
        options["forward_sync_buffers" if new else "broadcast_buffers"] = False
        with self.waiting():
            wrapped = ddp(student, gradient_as_bucket_view=True, **options)
            if reduce == torch.bfloat16:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                # by its name torch registers it for GPUs only
                wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        # gloo's destructor waits for its threads, which need the GIL to release a tensor; only the destructor of the
        # group's Python object releases the GIL, so it must run last: attributes are deleted in order
        wrapped._group = dist.group.WORLD  # type: ignore[assignment]
        return wrapped

    def no_sync_unless(self, last: bool, model: nn.Module) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are all-reduced only with the last one, sharded ones with each."""
        return nullcontext() if last else getattr(model, "no_sync", nullcontext)()

    def shard(
        self, branch: nn.Module, parts: Iterable[nn.Module], dtype: torch.dtype, reduce: torch.dtype
    ) -> None:
        """Shards the parameters of a module over the processes, in place (FSDP2).

        Parameters become DTensors of the same names. The modules `parts` gather their weights only while they run,
        forward and backward; the rest of the branch while the branch runs.

        Args:
            parts: Modules of the branch that are called.
            dtype: Of the gathered weights of `parts`; the shards keep their dtype.
            reduce: Dtype in which gradients are summed.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        trained = any(p.requires_grad for p in branch.parameters())
        # fp64 in tests
        sums = next(branch.parameters()).dtype if reduce == torch.float32 else reduce
        # inputs keep their dtype: autocast decides, as without sharding
        policy = partial(MixedPrecisionPolicy, reduce_dtype=sums, cast_forward_inputs=False)
        with self.waiting():
            mesh = init_device_mesh(self.device.type, (self.size,))
            for part in parts:
                fully_shard(part, mesh=mesh, mp_policy=policy(None if dtype == torch.float32 else dtype))
            # the backward pass frees gathered weights; without one those of the first step would be used forever
            fully_shard(branch, mesh=mesh, mp_policy=policy(None), reshard_after_forward=not trained)


def _tried(function: Callable[[], T]) -> tuple[T | None, ExtremaError | None]:
    """The result of a function, or its ExtremaError or OSError."""
    try:
        return function(), None
    except (ExtremaError, OSError) as error:
        return None, of_storage(error) if isinstance(error, OSError) else error


def _of_all(kind: str, text: str) -> ExtremaError:
    """An error that all processes raise."""
    error = getattr(errors, kind, ExtremaError)(text)
    error.of_all = True
    return error


def _difference(values: Sequence[dict[str, Any]], hosts: Sequence[str]) -> str:
    """How the first different value differs from that of process 0; empty if all are equal."""
    for rank, (value, host) in enumerate(zip(values, hosts, strict=True)):
        for name in [*values[0], *value]:
            here, there = value.get(name), values[0].get(name)
            if here != there:
                return f"{name} is {here} for process {rank} on {host}, {there} for process 0 on {hosts[0]}"
    return ""


class Watch:
    """Logs which processes a process waits for, and ends it when one of them no longer answers.

    A collective waits in C, where no signal handler runs and nothing can be raised. So a thread of each process answers
    (UDP) any process that has waited for a while: how many waits its process has begun, and where it is. A process that
    is stopped or whose machine is gone does not answer. A suspended process counts no time; one that has never been
    heard, for example behind a firewall, is not considered lost.

    Attributes:
        farewell: Called with the reason before the process is ended because another is lost; returns what it has
            saved. Nothing that is saved changes meanwhile.
        debug: Folder for the stacks of a waiting process and of the others; None: nothing is written.
        addresses: (host, port) at which each process answers.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.farewell: Callable[[str], str] = lambda reason: ""
        self.debug: Path | None = None
        self._dumped = -STACKS_S
        self._count, self._inside, self._lock = 0, False, threading.Lock()
        self._main = threading.get_ident()
        # None: not heard yet
        self._others: dict[int, dict[str, Any] | None] = dict.fromkeys(n for n in range(size) if n != rank)
        self._silent = dict.fromkeys(self._others, 0.0)
        # as in `_join`: all reach process 0 there
        family, _, _, _, there = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            # sends nothing; finds which of our addresses leads there
            s.connect(there)
            mine = s.getsockname()[0], self._socket.getsockname()[1]
        if rank == 0:
            # messages without this key are ignored
            store.set("watch/key", uuid.uuid4().hex)
        store.set(f"watch/{rank}", json.dumps(mine))
        self._key = store.get("watch/key").decode()
        found = [json.loads(text) for text in store.multi_get([f"watch/{n}" for n in range(size)])]
        self.addresses: dict[int, Any] = {
            n: (host if n else there[0], port) for n, (host, port) in enumerate(found)
        }
        self._left = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Whether the process is waiting for the others now."""
        return self._inside

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The context of `World.waiting`."""
        with self._lock:
            self._count, self._inside = self._count + 1, True
        try:
            yield
        finally:
            # held while the process is being ended
            with self._lock:
                self._inside = False

    def close(self) -> None:
        """Ends the thread."""
        self._left = True
        with suppress(OSError):
            self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(2 * ASK_S)
        self._socket.close()

    def _run(self) -> None:
        waited, told, stacked, seen, before = 0.0, TELL_S / 2, False, -1, time.monotonic()
        while True:
            self._hear(ASK_S)
            if self._left:
                return
            # time during which this process was stopped does not count
            now = time.monotonic()
            passed, before = min(now - before, 2 * ASK_S), now
            count, inside = self._count, self._inside
            # on a GPU the program waits for the device, which waits for the others
            waits = (inside or self.device.type == "cuda") and count == seen
            waited, seen = waited + passed if waits else 0.0, count
            if not waited:
                told, stacked, self._silent = TELL_S / 2, False, dict.fromkeys(self._others, 0.0)
            for n, known in self._others.items():
                if waited >= ASK_S or known is None:
                    self._send(n, "?")
                    self._silent[n] += passed
            lost = [n for n, known in self._others.items() if known and self._silent[n] >= LOST_S]
            if waited and (lost or (inside and waited >= WAIT_S)):
                self._end(count, waited)
            elif inside and waited >= 2 * told:
                told = waited
                # the first of the waiting processes logs
                if all(n > self.rank for n, known in self._others.items() if self._here(n, known, count)):
                    reason = self._describe(count, waited)
                    if waited >= STACKS_S and not stacked and self.debug is not None:
                        stacked, reason = True, f"{reason}; {self._dump(reason)}"
                        for n in self._others:
                            self._send(n, "stacks")
                    log.warning("%s", reason)

    def _here(self, n: int, known: dict[str, Any] | None, count: int) -> bool:
        """Whether a process has reached the point where this one waits."""
        return known is not None and self._silent[n] < 2.5 * ASK_S and known["count"] >= count

    def _describe(self, count: int, waited: float) -> str:
        missing = [n for n, known in self._others.items() if not self._here(n, known, count)]
        about = []
        for n in missing or list(self._others):
            known = self._others[n]
            if known and self._silent[n] < 2.5 * ASK_S:
                about.append(f"process {n}, which is in {known['where']}")
            else:
                about.append(f"process {n}, which {'does not answer' if known else 'has never been heard'}")
        more = f", and {len(about) - 4} more" if len(about) > 4 else ""
        return (
            f"process {self.rank} of {self.size} has waited {waited:.0f} s in {self._where()} for "
            f"{'; '.join(about[:4])}{more}"
        )

    def _end(self, count: int, waited: float) -> None:
        """Ends this process, unless it no longer waits."""
        with self._lock:
            if self._count != count:
                return
            reason, saved = self._describe(count, waited), [""]
            if self._inside:

                def save() -> None:
                    saved[0] = self.farewell(reason)

                last = threading.Thread(target=save, daemon=True)
                last.start()
                last.join(SAVE_S)
            if self.debug is not None:
                saved[0] += f"; {self._dump(reason)}"
                for n in self._others:
                    self._send(n, "stacks")
            log.error("extrema-fast: error: %s%s; the same command continues", reason, saved[0])
            os._exit(LostProcessError.exit_code)

    def _where(self) -> str:
        return where(self._main, __file__) or "the program"

    def _dump(self, why: str) -> str:
        """Writes the stacks of this process and NCCL's last operations; returns where they are."""
        self._dumped = time.monotonic()
        told = dump_stacks(self.debug, self.rank, why)
        record = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
        if self.debug is not None and self.device.type == "cuda" and record is not None:
            # for torch's own tool: torchfrtrace DEBUG --prefix nccl_trace_rank_
            with suppress(OSError, RuntimeError):
                (self.debug / f"nccl_trace_rank_{self.rank}").write_bytes(record())
        return told

    def _hear(self, seconds: float) -> None:
        """Answers queries and receives answers for some seconds."""
        end = time.monotonic() + seconds
        while not self._left and (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                text, sender = self._socket.recvfrom(4096)
                message = json.loads(text)
            except (OSError, ValueError, RecursionError):
                continue
            if not fits(message, [str, int, str, {"count": int, "where": str}]):
                continue
            key, n, kind, known = message
            if key != self._key or n not in self._others:
                continue
            self._others[n], self._silent[n], self.addresses[n] = known, 0.0, sender
            if kind == "?":
                self._send(n, "!")
            # many may ask at the same time
            elif kind == "stacks" and self.debug and time.monotonic() - self._dumped >= STACKS_S:
                self._dump(f"asked by process {n}, which waits")

    def _send(self, n: int, kind: str) -> None:
        known = {"count": self._count, "where": self._where()}
        # the network or the name server may be unavailable for a moment
        with suppress(OSError):
            self._socket.sendto(json.dumps([self._key, self.rank, kind, known]).encode(), self.addresses[n])


def detect(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables of torchrun, else of SLURM, else (0, 1, 0).

    SLURM's count is used only inside a job step of several tasks: a plain `python` in a batch script also sees the
    job's task count, and would wait for processes that do not exist.

    Raises:
        UsageError: Invalid variables, or only one of two: each process would train alone.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    elif _number(env, "WORLD_SIZE", 1) > 1 or _number(env, "RANK", 0) > 0:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    else:
        return 0, 1, 0
    rank, size, local_rank = _number(env, names[0]), _number(env, names[1]), _number(env, names[2], 0)
    if rank >= size:
        raise UsageError(f"{names[0]}: expected less than the {size} of {names[1]}, got {rank}")
    return rank, size, local_rank


def _number(env: Mapping[str, str], name: str, default: int | None = None, most: int = 1 << 20) -> int:
    text = env.get(name, default)
    if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) and int(text) <= most:
        return int(text)
    if isinstance(text, int):
        return text
    raise UsageError(
        f"{name}: expected a whole number up to {most}, got {'nothing' if text is None else repr(text)}; launch "
        "with torchrun or srun, which set it, or unset RANK and WORLD_SIZE"
    )


def slurm_master(env: Mapping[str, str]) -> tuple[str, str]:
    """(address, port), the same for every task of a SLURM step: its first node, a port from the job id."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    # the first of `a[07-09,12]-ib,b1` is `a07-ib`
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodes)
    return host, str(20000 + _number(env, "SLURM_JOB_ID", 0, 10**9) % 20000)


def pick_device(name: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of this process for `system.device`: `auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (Apple's GPU).

    `auto` is a CUDA device, else MPS for a single process, else the CPU.

    Raises:
        UsageError: another name, or a GPU that does not exist.
    """
    if name not in ("auto", "cpu", "cuda", "mps") and not re.fullmatch(r"cuda:\d+", name):
        raise UsageError(f"system.device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if name == "mps":
        if not apple:
            raise UsageError(
                "system.device: mps needs Apple's GPU, but PyTorch finds none; use system.device cpu"
            )
        if processes > 1:
            raise UsageError(
                f"system.device: mps supports one process, not {processes}; use system.device cpu"
            )
    if name == "mps" or (name == "auto" and apple and not found and processes == 1):
        return torch.device("mps", 0)
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if ":" in name and processes > 1:
        raise UsageError(
            f"system.device: {name} would be shared by {processes} processes; use cuda, so that each takes its own GPU"
        )
    # a single visible GPU is this process's own: SLURM binds one to each task (`_check_alike` detects sharing)
    index = int(name.split(":")[1]) if ":" in name else local_rank if found > 1 else 0
    if index >= found:
        raise UsageError(f"system.device: {name} needs GPU {index}, {found} found; use system.device cpu")
    return torch.device("cuda", index)


def _join(rank: int, size: int) -> dist.Store:
    """The store of a process group, once all its processes have connected; logs which are missing.

    Raises:
        UsageError: The address is missing or invalid, or processes did not connect within `JOIN_S`.
    """
    env = os.environ
    names = ("MASTER_ADDR", "MASTER_PORT")
    if {*names} - env.keys() and ("SLURM_STEP_NODELIST" in env or "SLURM_JOB_NODELIST" in env):
        for name, value in zip(names, slurm_master(env), strict=True):
            env.setdefault(name, value)
    host = env.get("MASTER_ADDR", "")
    if not host:
        raise UsageError(
            f"MASTER_ADDR: not set, while WORLD_SIZE is {size}; launch with torchrun, or set MASTER_ADDR to the "
            "address of process 0 and MASTER_PORT to a free port"
        )
    port = _number(env, "MASTER_PORT", most=65535)
    # torchrun already has a store there
    holds = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    # the store may be that of an earlier process 0: only an answer to this process's ticket counts
    ticket, group, began = uuid.uuid4().hex, "", time.monotonic()
    missing, told, store = set(range(size)), began, None
    while not group:
        # short waits, so that signals are handled between them
        try:
            if store is None:
                if not holds:
                    # the store's own attempts log noise
                    socket.create_connection((host, port), 2.0).close()
                options: dict[str, Any] = {"timeout": timedelta(seconds=5), "wait_for_workers": False}
                store = dist.TCPStore(host, port, size, holds, multi_tenant=holds, **options)
                store.set(f"extrema-fast/{rank}", ticket)
            if rank == 0:
                missing = {n for n in missing if not store.check([f"extrema-fast/{n}"])}
                reason = f"process {', '.join(map(str, sorted(missing)[:8]))} of {size} at {where}"
                if not missing:
                    tickets = [store.get(f"extrema-fast/{n}") for n in range(size)]
                    for n, other in enumerate(tickets):
                        store.delete_key(f"extrema-fast/{n}")
                        store.set(f"extrema-fast/{other.decode()}", ticket)
            else:
                reason = f"the others of the {size} processes at {where}; see the log of process 0"
            if store.check([f"extrema-fast/{ticket}"]):
                group = store.get(f"extrema-fast/{ticket}").decode()
        except (RuntimeError, ValueError, OSError) as error:
            if holds:
                raise UsageError(
                    f"{where}: cannot be opened ({one_line(error)}); MASTER_ADDR is the address of the machine of "
                    "process 0, this one, and MASTER_PORT a port that is free on it"
                ) from None
            store, reason = None, f"process 0, which opens {where} ({one_line(error)})"
        now = time.monotonic()
        if not group and now - began > JOIN_S:
            raise UsageError(
                f"process {rank} has waited {JOIN_S:.0f} s for {reason}; find out why it did not start"
            )
        if not group and now - told > TELL_S:
            log.warning("process %d has waited %.0f s for %s", rank, now - began, reason)
            told = now
        if not group:
            time.sleep(0.02)
    assert store is not None
    store.set_timeout(TIMEOUT)
    return dist.PrefixStore(group, store)


def _check_alike(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Compares versions, GPUs and clocks of the processes before they work together.

    Raises:
        UsageError: On all of them: different versions, or a GPU that two share, which NCCL does not support.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    alike = {"WORLD_SIZE": size, "torch": torch.__version__, "extrema_fast": f"{__version__}, {_code()}"}
    store.set(f"about/{rank}", json.dumps([alike, socket.gethostname(), gpu]))
    # with a larger WORLD_SIZE than process 0, do not wait for processes that do not exist
    first = json.loads(store.get("about/0"))
    others = [f"about/{n}" for n in range(1, min(size, first[0]["WORLD_SIZE"]))]
    found = [first, *map(json.loads, store.multi_get(others) if others else [])]
    values, hosts, gpus = zip(*found, strict=True)
    wrong = _difference(values, hosts)
    if wrong:
        wrong = f"processes differ: {wrong}; start all with the same command, from the same installation"
    shared = [(gpus.index(g), n) for n, g in enumerate(gpus) if g and gpus.index(g) < n]
    if shared and not wrong:
        a, b = shared[0]
        wrong = (
            f"system.device: processes {a} and {b} share GPU {gpus[a]} of {hosts[a]}; start as many processes as "
            "there are GPUs"
        )
    # all have connected: only the clocks can differ now
    store.set(f"time/{rank}", repr(time.time()))
    if wrong:
        if rank == 0:
            # the store ends with this process
            with suppress(RuntimeError):
                store.wait([f"time/{n}" for n in range(len(found))], timedelta(seconds=ASK_S))
        raise _of_all("UsageError", wrong)
    if rank == 0:
        times = [float(t) for t in store.multi_get([f"time/{n}" for n in range(size)])]
        off = {
            host: t - times[0] for host, t in zip(hosts, times, strict=True) if abs(t - times[0]) > CLOCK_S
        }
        for host, seconds in off.items():
            log.warning(
                "the clock of %s is %.0f s %s that of %s: timestamps of logs and files will not match; set it (NTP)",
                *(host, abs(seconds), "ahead of" if seconds > 0 else "behind", hosts[0]),
            )


def _code() -> str:
    """Hash of the files of this package: checkouts of the same version may differ."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:8]


def _choose_interface(addresses: Iterable[str]) -> None:
    """Makes gloo use the interface that leads to the other machines if it would use the loopback one.

    It binds to the address of the host name, which is 127.0.1.1 on many machines.

    Args:
        addresses: Of the processes.
    """
    far = [a for a in addresses if ":" not in a and not a.startswith("127.")]
    try:
        usual = socket.gethostbyname(socket.gethostname())
    except OSError:
        usual = "127.0.0.1"
    if "GLOO_SOCKET_IFNAME" in os.environ or not far or not usual.startswith("127."):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, suppress(OSError):
        # sends nothing
        s.connect((far[0], 9))
        for _, name in socket.if_nameindex():
            # SIOCGIFADDR of Linux
            with suppress(OSError):
                found = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == s.getsockname()[0]:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    log.debug("gloo uses %s, which leads to %s", name, far[0])


# errors of gloo, NCCL and the store
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Timed out|Socket Timeout|Broken pipe|failed to recv|process group",
    re.I,
)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective means that another process has ended or does not answer."""
    return dist.is_initialized() and bool(_LOST.search(str(error)))


def lost(world: World, error: RuntimeError, saved: str = "") -> LostProcessError:
    """The error for a lost process, with what could still be saved."""
    return LostProcessError(
        f"process {world.rank} of {world.size}: another process of the run has ended or does not answer, see its "
        f"message{saved}; the same command continues the run ({one_line(error)})"
    )


@contextmanager
def start(device: str) -> Iterator[World]:
    """Context of a run: joins the process group, if there is one, and leaves it (gloo, and NCCL for GPUs).

    An existing group (of Ray, of a script) is used and not destroyed.

    Raises:
        UsageError: Invalid environment variables, processes that did not connect, or an existing group without a
            backend for the CPU.
        LostProcessError: Another process has ended or does not answer.
    """
    rank, size, local_rank = detect(os.environ)
    ours, watch = size > 1, None
    if dist.is_initialized():
        # perhaps created without these variables
        ours, rank, size = False, dist.get_rank(), dist.get_world_size()
        if size > 1 and "cpu:" not in dist.get_backend_config():
            raise UsageError(
                "torch.distributed: the process group has no backend for the CPU, which flags and messages need; "
                "create it with backend='cpu:gloo,cuda:nccl' (init_process_group; in Ray TorchConfig)"
            )
    where = pick_device(device, local_rank, size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if ours:
        # NCCL's record of its last calls, for `Watch`
        new = hasattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace")
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if new else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        backend, store = "gloo", _join(rank, size)
        _check_alike(store, rank, size, where)
        options: dict[str, Any] = {}
        if where.type == "cuda":
            # flags and objects are on the CPU and use gloo, without waiting for the GPU
            backend, options = "cpu:gloo,cuda:nccl", {"device_id": where}
        watch = Watch(rank, size, store, where)
        _choose_interface(host for host, _ in watch.addresses.values())
        with watch.waiting():
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, **options
            )
        log.info("process %d of %d on %s (%s)", rank, size, where, backend)
    world = World(where, rank, size, watch)
    try:
        yield world
    except LostProcessError:
        raise
    except ExtremaError:
        # raised on all ranks; after any other error the others may be in a collective, so the process just ends
        if ours:
            # launchers stop the rest once one process ends, and process 0 may have files to write
            with suppress(RuntimeError):
                store.set("left", "") if rank == 0 else store.wait(["left"], timedelta(seconds=LEAVE_S))
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost(world, error) from None
    finally:
        if watch is not None:
            watch.close()
    if ours:
        dist.destroy_process_group()
