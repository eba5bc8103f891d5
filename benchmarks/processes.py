"""Processes that take turns, and what is measured inside one: time, memory, matmul and copy rates, matmul share.

Each provider runs in its own process: peak memory is its own, and its failure is no other's. The processes
alternate, so that a change of clock rate or load meets all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .harness import Row, say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# seconds without an answer; a cold compilation of a large model takes minutes
PATIENCE = 1200.0
_libraries: list[torch.library.Library] = []


class WorkerError(Exception):
    """What went wrong in a provider's process; `out_of_memory` marks exhausted memory."""

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A process that holds one object, whose methods are called from here.

    Args:
        factory: a class or function of a module; called in the process with `args`.
        args: picklable arguments.
        environment: variables of the process in addition to ours.
        patience: seconds to wait for an answer.
        group: the process leads its own group, so that it can be stopped together with its children.

    `built` is the object's attribute of that name, a dictionary, once it exists.

    Raises:
        WorkerError: the object cannot be built, a call fails, or the process ends or does not answer.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *args: Any,
        environment: dict[str, str] | None = None,
        patience: float = PATIENCE,
        group: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.patience = patience
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, factory, args, group))
        with _environment(environment or {}):
            self.process.start()
        theirs.close()
        try:
            self.built: dict[str, Any] = self._receive("start")
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the object and returns its result."""
        with contextlib.suppress(OSError):
            self.pipe.send((method, args, options))
        return self._receive(method)

    def _receive(self, method: str) -> Any:
        try:
            if not self.pipe.poll(self.patience):
                self.process.kill()
                raise WorkerError(f"{method}: no answer in {self.patience:g} s")
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(30)
            code = self.process.exitcode
            killed = code == -signal.SIGKILL
            why = "was killed (most likely out of memory)" if killed else f"ended with code {code}"
            raise WorkerError(f"{method}: the process {why}", killed) from None
        if kind != "ok":
            raise WorkerError(f"{method}: {answer}", kind == "memory")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, factory: Callable[..., Any], args: tuple, group: bool) -> None:
    # Ctrl-C is the parent's; what is printed here must not mix with its standard output
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if group:
        os.setpgid(0, 0)
    os.dup2(2, 1)
    served: Any = None
    options: dict[str, Any] = {}
    method, arguments = "", args
    while True:
        try:
            if served is None:
                served = factory(*arguments)
                answer = getattr(served, "built", {})
            else:
                answer = getattr(served, method)(*arguments, **options)
            pipe.send(("ok", answer))
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
            exhausted = (
                isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
            )
            pipe.send(("memory" if exhausted else "error", text))
            if served is None:
                return
        try:
            method, arguments, options = pipe.recv()
        except EOFError:
            break
    getattr(served, "close", lambda: None)()


class Turns:
    """Workers by key that take turns; one that fails leaves, with the reason as `error` in its row.

    Args:
        rows: rows of the record by key; answers are added to them.
        pause: stop each process and its children while it is not its turn: they would work ahead.
    """

    def __init__(self, rows: dict[str, Row], pause: bool = False) -> None:
        self.rows, self.pause = rows, pause
        self.workers: dict[str, Worker] = {}
        self.interrupted = False

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for key, worker in self.workers.items():
            self._signal(key, signal.SIGCONT)
            worker.close()

    def start(
        self, key: str, factory: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None
    ) -> None:
        """Starts a worker; `built` goes to its row."""
        try:
            self.workers[key] = Worker(factory, *args, environment=environment, group=self.pause)
            self.rows[key] |= self.workers[key].built
            self._signal(key, signal.SIGSTOP)
        except WorkerError as error:
            self._failed(key, error)

    def ask(self, key: str, method: str, *args: Any) -> dict[str, Any]:
        """Calls a method of a worker; empty after a failure or without that worker."""
        if key not in self.workers:
            return {}
        try:
            self._signal(key, signal.SIGCONT)
            return self.workers[key](method, *args)
        except WorkerError as error:
            self._failed(key, error)
            return {}
        finally:
            self._signal(key, signal.SIGSTOP)

    def _signal(self, key: str, number: int) -> None:
        pid = self.workers[key].process.pid if key in self.workers else None
        if self.pause and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def _failed(self, key: str, error: WorkerError) -> None:
        self.rows[key] |= {"error": str(error)} | ({"out_of_memory": True} if error.out_of_memory else {})
        say(f"{key}: {error}")
        if key in self.workers:
            self.workers.pop(key).close()

    def add(self, method: str, *args: Any) -> None:
        """Calls a method of every worker, one after another; the answers go to their rows."""
        for key in list(self.workers) if not self.interrupted else ():
            self.rows[key] |= self.ask(key, method, *args)

    def run(self, rounds: int, *args: Any, before: Callable[[], object] | None = None) -> None:
        """Calls `turn(*args)` of every worker in each round; another one begins each round.

        Lists in the answers are appended to those of the row. Ctrl-C ends the rounds and keeps what was measured.

        Args:
            rounds: number of rounds.
            args: arguments of `turn`.
            before: called at the beginning of each round.
        """
        try:
            for i in range(rounds):
                if before is not None:
                    before()
                keys = list(self.workers)
                first = i % max(1, len(keys))
                for key in keys[first:] + keys[:first]:
                    for name, values in self.ask(key, "turn", *args).items():
                        self.rows[key].setdefault(name, []).extend(values)
                say(f"round {i + 1} of {rounds}")
        except KeyboardInterrupt:
            self.interrupted = True
            say("interrupted: the record holds the rounds so far")


# ---- inside a process -----------------------------------------------------------------------------


def prepare(device: str, threads: int, precision: str = "") -> torch.device:
    """Sets CPU threads, and whole fp32 where that is measured; returns the device."""
    if threads:
        torch.set_num_threads(threads)
    if precision == "fp32":
        # convolutions would use TF32
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


def import_torchvision() -> None:
    """Imports torchvision, which timm needs, also where its operators are built for another torch.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # nothing here runs these operators; kept alive, the definitions would go with the library object
        _libraries.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def clock(function: Callable[[], object], device: str | torch.device, calls: int = 1) -> list[float]:
    """Returns the milliseconds of each call; by events on a GPU, without waiting between calls."""
    if torch.device(device).type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    samples = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        samples.append(1000 * (time.perf_counter() - began))
    return samples


class Memory:
    """Memory of this process in MB: allocated by torch on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def now(self) -> float:
        """Memory at this moment."""
        return torch.cuda.memory_allocated() / 2**20 if self.gpu else status_mb("VmRSS")

    def peak(self) -> float:
        """The most since the last `reset`."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.gpu else status_mb("VmHWM")

    def reset(self) -> None:
        """Forgets the peak."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")


def status_mb(key: str) -> float:
    """Returns a field of /proc/self/status in MB; 0 without /proc. (ru_maxrss would hold the parent's peak.)"""
    file = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+)", file.read_text(), re.M) if file.is_file() else None
    return int(found[1]) / 1024 if found else 0.0


class Rates:
    """Rates of large matmuls (a linear layer, n x n x n) and copies on this machine."""

    def __init__(self, device: str, precisions: list[str], threads: int = 0) -> None:
        self.device = prepare(device, threads)
        gpu = self.device.type == "cuda"
        self.side = 8192 if gpu else 3072
        generator = torch.Generator(device).manual_seed(0)
        factors = torch.randn(2, self.side, self.side, generator=generator, device=device)
        self.factors = {p: factors.to(DTYPES[p]) for p in precisions}
        size = (2**30 if gpu else 2**28,)
        self.source = torch.randint(1, 255, size, dtype=torch.uint8, generator=generator, device=device)
        self.target = torch.empty_like(self.source)
        for _ in range(3 if gpu else 1):
            self.sample()

    @torch.no_grad()
    def sample(self) -> dict[str, float]:
        """Measures each once: `{"products_bf16_tflops": ..., "copy_gb_per_s": (read + write)}`."""
        found = {}
        for name, (a, b) in self.factors.items():
            (ms,) = clock(lambda a=a, b=b: F.linear(a, b), self.device)
            found[f"products_{name}_tflops"] = 2 * self.side**3 / ms / 1e9
        (ms,) = clock(lambda: self.target.copy_(self.source), self.device)
        return found | {"copy_gb_per_s": 2 * self.source.numel() / ms / 1e6}


_MATMUL_OP = re.compile(r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm|_addmm_activation)$|_linear_pointwise")
_MATMUL_KERNEL = re.compile(r"gemm|nvjet|cutlass|triton_tem|wgmma|xmma", re.IGNORECASE)


def matmul_share(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profiles one step.

    Returns:
        `step_ms`, and of its matmuls `ms`, `share` and `tflops` (None where shapes are unknown: a replayed graph).
    """
    from torch.profiler import ProfilerActivity, profile

    # without the tracer's own lines on standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

    gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    # the first profile pays for starting the tracer
    with profile(activities=kinds):
        step()
    with profile(activities=kinds, record_shapes=True, with_flops=True) as profiler:
        (step_ms,) = clock(step, device)
    events = profiler.key_averages()
    flops = sum(e.flops for e in events if e.flops and _MATMUL_OP.search(e.key))
    if gpu:
        times = {e.key: e.self_device_time_total for e in events if str(e.device_type).endswith("CUDA")}
        us = sum(t for name, t in times.items() if _MATMUL_KERNEL.search(name))
    else:
        us = sum(e.self_cpu_time_total for e in events if _MATMUL_OP.search(e.key))
    tflops = flops / us / 1e6 if flops and us else None
    return {"step_ms": step_ms, "ms": us / 1000, "share": us / 1000 / step_ms, "tflops": tflops}
