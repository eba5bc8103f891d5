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

# rank 0 evaluates and saves alone while the others wait in their next collective
WAIT_S = 3600.0
# torch's own limit, behind ours
TIMEOUT = timedelta(seconds=WAIT_S + 600)
# until all processes have started; they may import from a slow file system
JOIN_S = 600.0
# a wait is told after this time
TELL_S = 30.0
# a process that has not answered for so long, while another waited for it, is lost
LOST_S = 180.0
# within that, after an error of all, process 0 has ended what it was writing
LEAVE_S = 10.0
# after this time its stacks are written, and those of the others
STACKS_S = 120.0
# how often one that waits asks the others
ASK_S = 5.0
# clocks that are further apart are told
CLOCK_S = 5.0
# what is left to save before a process that waits for a lost one is ended
SAVE_S = 120.0


def cores() -> int:
    """Number of processors this process may use."""
    # macOS has no affinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """Processes of this run on this machine, as torchrun or SLURM says."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, _number(os.environ, "LOCAL_WORLD_SIZE"))
    if _number(os.environ, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return 1
    # `8(x2)`, `8,4`: of nodes that differ the largest
    tasks = re.findall(r"(?:^|,)(\d{1,9})", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max([1, *map(int, tasks)])


def share_of_cores() -> int:
    """Processors for this process alone: what SLURM has bound to its task, else its part of what all share."""
    return max(1, min(cores(), _number(os.environ, "SLURM_CPUS_ON_NODE", cores()) // processes_here()))


def wide(device: torch.device | str) -> torch.dtype:
    """The widest float of a device: float64, or float32 on MPS, which has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def double(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none."""
    return (x if wide(x.device) == torch.float64 else x.cpu()).double()


def is_sharded(x: Any) -> bool:
    """Whether a tensor is spread over processes (a DTensor, whose package takes long to import)."""
    return hasattr(x, "placements")


def local(x: Any) -> Tensor:
    """This process's part of a sharded tensor, the same memory; any other tensor as it is. Not for autograd."""
    if not is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def whole(x: Any) -> Tensor:
    """All of a sharded tensor, for which every process calls this; any other tensor as it is."""
    return x.detach().full_tensor() if is_sharded(x) else x


def rows_of(like: Any) -> tuple[int, int]:
    """First and last (exclusive) row of a sharded tensor that are on this process: `torch.chunk`'s."""
    mesh, rows = like.device_mesh, like.shape[0]
    size = -(-rows // mesh.size())
    begin = min(mesh.get_local_rank() * size, rows)
    return begin, min(begin + size, rows)


def sharded_as(rows: Tensor, like: Any) -> Tensor:
    """The tensor of which each process has its `rows`, sharded as `like` is; nothing is sent."""
    from torch.distributed.tensor import DTensor

    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True)
class World:
    """The processes of one run, from the point of view of one of them."""

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
            # which keeps no peak
            return torch.mps.driver_allocated_memory() / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    @property
    def waits(self) -> bool:
        """Whether this process waits for the others now."""
        return self.watch is not None and self.watch.inside

    def waiting(self) -> AbstractContextManager[None]:
        """Context of work that waits for the other processes and changes nothing that is saved."""
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
        """Gives a value (plain data) to process 0 by the store, for threads, which have no collectives.

        Args:
            key: the same on all processes; used once.
            until: time (of `time.monotonic`) to which process 0 waits for the others.

        Returns:
            On process 0 the values of all, in rank order; elsewhere nothing.

        Raises:
            OSError: process 0 has waited in vain, or the store is gone.
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
        """Runs `function()`, in which no process waits for another, on all of them.

        Returns:
            The process's own result.

        Raises:
            ExtremaError: of any process, on all of them; it names the process.
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
        """As `everywhere`, but after process 0 one process of each other machine, then the rest.

        What the first keeps on its machine, such as the index of a tar, the others find there.
        """
        found = self.rank_zero_only(function)
        first = self.is_rank_zero or detect(os.environ)[2] == 0
        found = self.everywhere(lambda: function() if first and not self.is_rank_zero else found)
        return self.everywhere(lambda: found if first else function())  # type: ignore[return-value]

    def agree(self, what: str, value: dict[str, Any], remedy: str) -> None:
        """Compares a value (plain data) of all processes.

        Args:
            what: begins the error, e.g. `data.train`.
            remedy: ends it.

        Raises:
            UsageError: on all processes, for the first that differs from process 0: what differs, who has which.
        """
        if self.size == 1:
            return
        found = self.all_gather((value, socket.gethostname()))
        if difference := _difference(*zip(*found, strict=True)):
            raise _of_all("UsageError", f"{what}: {difference}; {remedy}")

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives the tensors of all processes the values of process 0's, in place."""
        if self.size > 1:
            with self.waiting(), torch.no_grad():
                for x in tensors:
                    dist.broadcast(x, src=0)

    def wrap(self, student: nn.Module, reduce: torch.dtype = torch.float32) -> nn.Module:
        """The student under DistributedDataParallel; the module itself with one process, or if it is sharded.

        Args:
            reduce: dtype in which gradients are summed.
        """
        if self.size == 1 or any(is_sharded(p) for p in student.parameters()):
            return student
        # NCCL is at its best with larger buckets than torch's 25 MB
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

                # under its name torch registers it for GPUs alone
                wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        # gloo's destructor waits for its threads, and they for the GIL when they release a tensor; only the group's
        # Python object lets go of the GIL for it, so it must be what is released last: attributes go in order
        wrapped._group = dist.group.WORLD  # type: ignore[assignment]
        return wrapped

    def no_sync_unless(self, last: bool, model: nn.Module) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are all-reduced with the last one only, those of shards with each."""
        return nullcontext() if last else getattr(model, "no_sync", nullcontext)()

    def shard(
        self, branch: nn.Module, parts: Iterable[nn.Module], dtype: torch.dtype, reduce: torch.dtype
    ) -> None:
        """Spreads the parameters of a module, in place: each process keeps a part of every one (FSDP2).

        Parameters become DTensors of the same names. A part has its weights only while it runs, forward and backward;
        the rest of the branch has them while the branch runs.

        Args:
            parts: modules of the branch that are called.
            dtype: of the parts' weights while they are whole; what is kept, and updated, stays as it is.
            reduce: dtype in which gradients are summed.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        trained = any(p.requires_grad for p in branch.parameters())
        # tests keep fp64
        sums = next(branch.parameters()).dtype if reduce == torch.float32 else reduce
        # inputs keep their dtype: autocast decides, as without shards
        policy = partial(MixedPrecisionPolicy, reduce_dtype=sums, cast_forward_inputs=False)
        with self.waiting():
            mesh = init_device_mesh(self.device.type, (self.size,))
            for part in parts:
                fully_shard(part, mesh=mesh, mp_policy=policy(None if dtype == torch.float32 else dtype))
            # without a backward pass, which frees them, the weights of the last step would be used for ever
            fully_shard(branch, mesh=mesh, mp_policy=policy(None), reshard_after_forward=not trained)


def _tried(function: Callable[[], T]) -> tuple[T | None, ExtremaError | None]:
    """The result of a function, or its error of ours or of the system."""
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
    """What the first value that is not process 0's has instead, `` where all are the same."""
    for rank, (value, host) in enumerate(zip(values, hosts, strict=True)):
        for name in [*values[0], *value]:
            here, there = value.get(name), values[0].get(name)
            if here != there:
                return f"{name} is {here} for process {rank} on {host}, {there} for process 0 on {hosts[0]}"
    return ""


class Watch:
    """Tells whom a process waits for, and ends it when one of them does not answer any more.

    A collective waits in C, where no handler of a signal runs and nothing can be raised. So a thread of each process
    answers (UDP) whoever has waited for a while: how far its process has come, and where it is. One whose machine is
    gone, or that is stopped, does not answer. A suspended process counts no time; one that has never been heard, behind
    a firewall, is not taken for lost.

    Attributes:
        farewell: called before the process is ended for want of another, with the reason; returns what it has saved.
            Nothing that is saved changes meanwhile.
        debug: folder for the stacks of a process that waits, and of the others; None: nothing is written.
        addresses: (host, port) at which each process answers.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.farewell: Callable[[str], str] = lambda reason: ""
        self.debug: Path | None = None
        self._dumped = -STACKS_S
        self._count, self._inside, self._lock = 0, False, threading.Lock()
        self._main = threading.get_ident()
        # waits come from the thread that made this; None: not heard yet
        self._others: dict[int, dict[str, Any] | None] = dict.fromkeys(n for n in range(size) if n != rank)
        self._silent = dict.fromkeys(self._others, 0.0)
        # as in `_join`: all reach process 0 there
        family, _, _, _, there = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            # sends nothing: it asks which of our addresses leads there
            s.connect(there)
            mine = s.getsockname()[0], self._socket.getsockname()[1]
        if rank == 0:
            # strangers are not answered
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
        """Whether the process waits for the others now."""
        return self._inside

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of what `World.waiting` says."""
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
            # a process that was stopped for a while has not waited for that time
            now = time.monotonic()
            passed, before = min(now - before, 2 * ASK_S), now
            count, inside = self._count, self._inside
            # on a GPU the program waits for the device, in which the others are waited for
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
                # of those that wait the first speaks
                if all(n > self.rank for n, known in self._others.items() if self._here(n, known, count)):
                    reason = self._describe(count, waited)
                    if waited >= STACKS_S and not stacked and self.debug is not None:
                        stacked, reason = True, f"{reason}; {self._dump(reason)}"
                        for n in self._others:
                            self._send(n, "stacks")
                    log.warning("%s", reason)

    def _here(self, n: int, known: dict[str, Any] | None, count: int) -> bool:
        """Whether a process has come to where this one waits."""
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
        """Ends this process, unless what it waited for has come."""
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
        """Writes the stacks of this process, and what NCCL has done last; says where they are."""
        self._dumped = time.monotonic()
        told = dump_stacks(self.debug, self.rank, why)
        record = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
        if self.debug is not None and self.device.type == "cuda" and record is not None:
            # for torch's own tool: torchfrtrace DEBUG --prefix nccl_trace_rank_
            with suppress(OSError, RuntimeError):
                (self.debug / f"nccl_trace_rank_{self.rank}").write_bytes(record())
        return told

    def _hear(self, seconds: float) -> None:
        """Answers questions and takes answers for a time."""
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
            # many may ask at once
            elif kind == "stacks" and self.debug and time.monotonic() - self._dumped >= STACKS_S:
                self._dump(f"asked by process {n}, which waits")

    def _send(self, n: int, kind: str) -> None:
        known = {"count": self._count, "where": self._where()}
        # a network that is away for a moment, or a name that cannot be found
        with suppress(OSError):
            self._socket.sendto(json.dumps([self._key, self.rank, kind, known]).encode(), self.addresses[n])


def detect(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables of torchrun, else of SLURM, else (0, 1, 0).

    SLURM's count only inside a job step of several tasks: a plain `python` in a batch script sees the job's
    task count too, and would wait for processes that do not exist.

    Raises:
        UsageError: variables that make no sense, or one of two: each process would train alone.
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
    """(address, port) that every task of a SLURM step agrees on: its first node, a port from the job id."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    # of `a[07-09,12]-ib,b1` the first is `a07-ib`
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
                "system.device: mps needs Apple's GPU, and this PyTorch sees none; use system.device cpu"
            )
        if processes > 1:
            raise UsageError(f"system.device: mps takes one process, not {processes}; use system.device cpu")
    if name == "mps" or (name == "auto" and apple and not found and processes == 1):
        return torch.device("mps", 0)
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if ":" in name and processes > 1:
        raise UsageError(
            f"system.device: {name} would be shared by {processes} processes; use cuda, each takes its own"
        )
    # the only GPU a process sees is its own: SLURM binds one to each task (`_check_alike` finds shared ones)
    index = int(name.split(":")[1]) if ":" in name else local_rank if found > 1 else 0
    if index >= found:
        raise UsageError(f"system.device: {name} needs GPU {index}, {found} found; use system.device cpu")
    return torch.device("cuda", index)


def _join(rank: int, size: int) -> dist.Store:
    """The store of a process group, once all its processes have come to it; tells which are waited for.

    Raises:
        UsageError: the address is missing or no address, or processes did not come within `JOIN_S`.
    """
    env = os.environ
    names = ("MASTER_ADDR", "MASTER_PORT")
    if {*names} - env.keys() and ("SLURM_STEP_NODELIST" in env or "SLURM_JOB_NODELIST" in env):
        for name, value in zip(names, slurm_master(env), strict=True):
            env.setdefault(name, value)
    host = env.get("MASTER_ADDR", "")
    if not host:
        raise UsageError(
            f"MASTER_ADDR: not set, while WORLD_SIZE is {size}; launch with torchrun, or give the address of the first "
            "process in MASTER_ADDR and a free port in MASTER_PORT"
        )
    port = _number(env, "MASTER_PORT", most=65535)
    # torchrun has a store of its own there
    holds = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    # a process may find the store of an earlier run of process 0: only an answer to its own ticket counts
    ticket, group, began = uuid.uuid4().hex, "", time.monotonic()
    missing, told, store = set(range(size)), began, None
    while not group:
        # in short waits, so that signals are heard between them
        try:
            if store is None:
                if not holds:
                    # quieter than the store's own attempts
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
                reason = f"the others of the {size} processes at {where}; process 0 knows which"
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
                f"process {rank} has waited {JOIN_S:.0f} s in vain for {reason}; see why it did not start"
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
    """Compares what the processes run and on which GPUs, and their clocks, before they work together.

    Raises:
        UsageError: on all of them: other versions, or a GPU that two have, which NCCL cannot use.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    alike = {"WORLD_SIZE": size, "torch": torch.__version__, "extrema_fast": f"{__version__}, {_code()}"}
    store.set(f"about/{rank}", json.dumps([alike, socket.gethostname(), gpu]))
    # one that counts more processes must not wait for those that do not exist
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
    # all have come: what differs now is the clocks
    store.set(f"time/{rank}", repr(time.time()))
    if wrong:
        if rank == 0:
            # the store is gone with this process
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
                "the clock of %s is %.0f s %s that of %s: times in logs and of files will not fit; set it (NTP)",
                *(host, abs(seconds), "ahead of" if seconds > 0 else "behind", hosts[0]),
            )


def _code() -> str:
    """Hash over the files of this package: checkouts may differ under one version."""
    package, found = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:8]


def _choose_interface(addresses: Iterable[str]) -> None:
    """Makes gloo use the interface that leads to the other machines, where it would take the loopback one.

    It binds to what the name of the machine resolves to, which is 127.0.1.1 on many.

    Args:
        addresses: of the processes.
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


# what gloo, NCCL and the store say
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Timed out|Socket Timeout|Broken pipe|failed to recv|process group",
    re.I,
)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process has ended or does not answer."""
    return dist.is_initialized() and bool(_LOST.search(str(error)))


def lost(world: World, error: RuntimeError, saved: str = "") -> LostProcessError:
    """The error for that, with what could still be saved."""
    return LostProcessError(
        f"process {world.rank} of {world.size}: another process of the run has ended or does not answer, see its "
        f"message{saved}; the same command continues ({one_line(error)})"
    )


@contextmanager
def start(device: str) -> Iterator[World]:
    """Context of a run: joins the process group, if there is one, and leaves it (gloo, and NCCL for GPUs).

    A group that somebody else has made (Ray, a script) is used, and left to them.

    Raises:
        UsageError: variables of the environment that make no sense, processes that did not come, or another's group
            without a backend for the CPU.
        LostProcessError: another process has ended, or does not answer.
    """
    rank, size, local_rank = detect(os.environ)
    ours, watch = size > 1, None
    if dist.is_initialized():
        # made without these variables, perhaps
        ours, rank, size = False, dist.get_rank(), dist.get_world_size()
        if size > 1 and "cpu:" not in dist.get_backend_config():
            raise UsageError(
                "torch.distributed: the process group has no backend for the CPU, by which flags and messages go; make "
                "it with backend='cpu:gloo,cuda:nccl' (init_process_group; of Ray TorchConfig)"
            )
    where = pick_device(device, local_rank, size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if ours:
        # what NCCL remembers of its last calls, for `Watch`
        new = hasattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace")
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if new else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        backend, store = "gloo", _join(rank, size)
        _check_alike(store, rank, size, where)
        options: dict[str, Any] = {}
        if where.type == "cuda":
            # flags and objects are on the CPU, and go by gloo without waiting for the GPU
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
        # raised on all ranks; after any other error the others may be in a collective: let the process end
        if ours:
            # launchers stop what is left once one has ended, and process 0 has files to write
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
