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
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F

from .harness import Row, say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# seconds without an answer; a cold compilation of a large model takes minutes
PATIENCE = 1200.0


class WorkerError(Exception):
    """What went wrong in a provider's process."""


class Worker:
    """A process that holds one object, whose methods are called from here.

    `built` is the object's attribute of that name, a dictionary.

    Args:
        factory: a class or function of a module; called in the process with `args`.
        args: picklable arguments.
        environment: variables of the process in addition to ours.
        group: the process leads its own group, so that it can be stopped together with its children.
        wait: until the object is built; else `ready` does.

    Raises:
        WorkerError: the object cannot be built, a call fails, or the process ends or does not answer.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *args: Any,
        environment: dict[str, str] | None = None,
        group: bool = False,
        wait: bool = True,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, factory, args, group))
        with patch.dict(os.environ, environment or {}):
            self.process.start()
        theirs.close()
        self.built: dict[str, Any] = {}
        if wait:
            self.ready()

    def ready(self) -> None:
        """Waits until the object is built; raises as building it here would."""
        try:
            self.built = self._receive("start")
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str, *args: Any) -> Any:
        """Calls a method of the object and returns its result."""
        with contextlib.suppress(OSError):
            self.pipe.send((method, args))
        return self._receive(method)

    def _receive(self, method: str) -> Any:
        try:
            if not self.pipe.poll(PATIENCE):
                self.process.kill()
                raise WorkerError(f"{method}: no answer in {PATIENCE:g} s")
            error, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(30)
            code = self.process.exitcode
            why = (
                "was killed (most likely out of memory)"
                if code == -signal.SIGKILL
                else f"ended with code {code}"
            )
            raise WorkerError(f"{method}: the process {why}") from None
        if error:
            raise WorkerError(f"{method}: {error}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(30)
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, factory: Callable[..., Any], args: tuple, group: bool) -> None:
    # Ctrl-C is the parent's; what is printed here must not mix with its standard output
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if group:
        os.setpgid(0, 0)
    os.dup2(2, 1)

    def send(
        function: Callable[..., Any], args: tuple, result: Callable[[Any], Any] = lambda found: found
    ) -> Any:
        try:
            found = function(*args)
            pipe.send(("", result(found)))
            return found
        except Exception as error:
            traceback.print_exc()
            pipe.send((f"{type(error).__name__}: {error}".splitlines()[0][:400], None))

    served = send(factory, args, lambda found: getattr(found, "built", {}))
    with contextlib.suppress(EOFError):
        while served is not None:
            method, args = pipe.recv()
            send(getattr(served, method), args)
    if hasattr(served, "close"):
        served.close()


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
        self,
        key: str,
        factory: Callable[..., Any],
        *args: Any,
        environment: dict[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Starts a worker; `built` goes to its row, with `wait` false when `ready` is called."""
        say(f"starting {key}")
        self.workers[key] = Worker(factory, *args, environment=environment, group=self.pause, wait=False)
        if wait:
            self.ready(key)

    def ready(self, key: str) -> None:
        """Waits for a worker that was started without waiting."""
        try:
            self.workers[key].ready()
            self.rows[key] |= self.workers[key].built
        except WorkerError as error:
            self._failed(key, error)
        self._signal(key, signal.SIGSTOP)

    def ask(self, key: str, method: str, *args: Any) -> dict[str, Any]:
        """Calls a method of a worker; empty after a failure or without that worker."""
        if key not in self.workers:
            return {}
        self._signal(key, signal.SIGCONT)
        try:
            return self.workers[key](method, *args)
        except WorkerError as error:
            self._failed(key, error)
            return {}
        finally:
            self._signal(key, signal.SIGSTOP)

    def _signal(self, key: str, number: int) -> None:
        if self.pause and key in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.workers[key].process.pid or 0, number)

    def _failed(self, key: str, error: WorkerError) -> None:
        self.rows[key]["error"] = str(error)
        say(f"{key}: {error}")
        if key in self.workers:
            self.workers.pop(key).close()

    def add(self, method: str, *args: Any) -> None:
        """Calls a method of every worker, one after another; the answers go to their rows."""
        for key in list(self.workers) if not self.interrupted else ():
            self.rows[key] |= self.ask(key, method, *args)

    def run(self, rounds: int, *args: Any, before: Callable[[], object] = lambda: None) -> None:
        """Calls `turn(*args)` of every worker in each round, after `before()`; another one begins each round.

        Lists in the answers are appended to those of the row. Ctrl-C ends the rounds and keeps what was measured.
        """
        try:
            for i in range(rounds):
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
    # convolutions would use TF32
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.device(device)


def clock(function: Callable[[], object], device: torch.device, calls: int = 1) -> list[float]:
    """Returns the milliseconds of each call; by events on a GPU, without waiting between calls."""
    if device.type == "cuda":
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


def status_mb(key: str) -> float:
    """Returns a field of /proc/self/status in MB; 0 without /proc. (ru_maxrss would hold the parent's peak.)"""
    file = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+)", file.read_text(), re.M) if file.is_file() else None
    return int(found[1]) / 1024 if found else 0.0


def memory_mb(device: torch.device, *, peak: bool = False) -> float:
    """Returns this process's memory (on a GPU torch's, on a CPU resident), or the most since `reset_peak`."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    return status_mb("VmHWM" if peak else "VmRSS")


def reset_peak(device: torch.device) -> None:
    """Makes `memory_mb(peak=True)` begin here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class Rates:
    """Rates of large matmuls (a linear layer, n x n x n) and copies on this machine."""

    # n and bytes copied
    sizes: ClassVar = {"cuda": (8192, 2**30), "cpu": (3072, 2**28)}

    def __init__(self, device: str, precisions: list[str], threads: int = 0) -> None:
        self.device = prepare(device, threads)
        gpu = self.device.type == "cuda"
        self.side, size = self.sizes[self.device.type]
        generator = torch.Generator(device).manual_seed(0)
        factors = torch.randn(2, self.side, self.side, generator=generator, device=device)
        self.factors = {p: factors.to(DTYPES[p]) for p in precisions}
        self.source = torch.randint(1, 255, (size,), dtype=torch.uint8, generator=generator, device=device)
        self.target = torch.empty_like(self.source)
        for _ in range(3 if gpu else 1):
            self.sample()

    @torch.no_grad()
    def sample(self) -> dict[str, float]:
        """Measures each once: `{"products_bf16_tflops": ..., "copy_gb_per_s": (read + write)}`."""
        found = {}
        for name, (a, b) in self.factors.items():
            (ms,) = clock(lambda a=a, b=b: F.linear(a, b), self.device)  # type: ignore[misc]
            found[f"products_{name}_tflops"] = 2 * self.side**3 / ms / 1e9
        (ms,) = clock(lambda: self.target.copy_(self.source), self.device)
        return found | {"copy_gb_per_s": 2 * self.source.numel() / ms / 1e6}


_MATMUL_OP = re.compile(r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm|_addmm_activation)$|_linear_pointwise")
# fused attention is not one, although its kernels are named fmha_cutlassF..., cudnn_generated_..._sdpa_..._wgmma_...,
# pytorch_flash::...<cutlass::bfloat16_t>
_MATMUL_KERNEL = re.compile(
    r"^(?!.*(fmha|sdpa|flash)).*(gemm|nvjet|cutlass|triton_tem|wgmma|xmma)", re.IGNORECASE
)


def matmul_share(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Profiles one step: `step_ms`, and of its matmuls `ms`, `share` and `tflops` (0 in a replayed graph)."""
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
        kernels = [e for e in events if str(e.device_type).endswith("CUDA") and _MATMUL_KERNEL.search(e.key)]
        ms = sum(e.self_device_time_total for e in kernels) / 1000
    else:
        ms = sum(e.self_cpu_time_total for e in events if _MATMUL_OP.search(e.key)) / 1000
    return {"step_ms": step_ms, "ms": ms, "share": ms / step_ms, "tflops": flops / ms / 1e9 if ms else 0}
