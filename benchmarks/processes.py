"""Providers in processes of their own, stepped in turns."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extrema_fast.config import Config, to_dict
from extrema_fast.errors import UsageError

from .providers import Provider

ROOT = Path(__file__).parents[1]
# untimed steps before the first measurement, and before each turn
WARMUP = {"cuda": 20, "cpu": 2}
WARM_PER_TURN = {"cuda": 3, "cpu": 0}
# seconds without an answer: a cold compilation of a large model takes minutes
PATIENCE = 1200
Say = Callable[[str], None]


class WorkerError(Exception):
    """What went wrong in a provider's process; `out_of_memory` tells the one kind with known remedies."""

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A process that answers requests (`worker.Service`); raises WorkerError when it cannot.

    Use as a context manager, or `close` it.

    environment  variables of the process on top of ours
    module       of the benchmarks, whose service answers
    """

    def __init__(
        self,
        threads: int = 0,
        patience: float = PATIENCE,
        environment: dict[str, str] | None = None,
        module: str = "worker",
    ) -> None:
        self.patience = patience
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | (environment or {}) | {"PYTHONPATH": path}
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env,
        )  # fmt: skip

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            killed = code == -9
            why = "killed (most likely out of memory)" if killed else f"ended with {code}: {self.tail()}"
            raise WorkerError(f"{do}: the process was {why}", killed)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}", answer["out_of_memory"])
        return answer

    def _line(self) -> str:
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(self.patience):
                self.process.kill()
                self.process.wait()
                raise WorkerError(f"no answer in {self.patience:.0f} s")
        return self.process.stdout.readline()

    def tail(self) -> str:
        """The last line the process wrote to standard error."""
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing was written"

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Job:
    """One row to be measured: a provider at a configuration on a device.

    key  unique name of the row
    """

    key: str
    provider: Provider
    cfg: Config
    device: str
    threads: int = 0
    sets: int = 4

    @property
    def precision(self) -> str:
        return self.provider.resolved(self.device)

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        return self.device.partition(":")[0]


def check_warmup(steps: int, kind: str) -> int:
    """`steps` if it is enough untimed steps; raises UsageError otherwise."""
    least = WARMUP[kind]
    if steps < least:
        raise UsageError(
            f"--warmup: {steps} steps are not enough on {kind}, where the first ones compile, allocate and "
            f"raise clocks; use at least {least}"
        )
    return steps


def measure(
    jobs: list[Job],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    weights: str = "",
    rates: bool = False,
    profile: Iterable[str] = (),
    together: bool = True,
    say: Say = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Times every job: warm-up, then `rounds` turns of `steps` steps, the jobs one after another in each round.

    weights     file the providers start from
    rates       also measure large products and copies in every round
    profile     keys of the jobs whose step is profiled at the end
    together    all processes stay alive and alternate; False: one after another (less memory, more drift)
    returns     (one row per job in order, with `samples_ms` or `error`; samples of the rates)
    raises      UsageError for too little warm-up
    """
    if jobs:
        check_warmup(warmup, jobs[0].kind)
    rows = {job.key: _head(job) for job in jobs}
    sampled: list[dict[str, float]] = []
    groups = [jobs] if together else [[job] for job in jobs]
    for group in groups:
        with _Bench(group, rows, say, rates) as bench:
            bench.start(weights, warmup)
            bench.alternate(rounds, steps, sampled)
            bench.finish(set(profile))
    return list(rows.values()), sampled


def _head(job: Job) -> dict[str, Any]:
    return {
        "key": job.key,
        "provider": job.provider.name,
        "family": job.provider.family,
        "about": job.provider.about,
        "precision": job.precision,
        "batch": job.cfg.train.batch_size,
        "options": job.provider.options,
        "environment": job.provider.environment,
    }


class _Bench:
    """The processes of a group of jobs; what fails leaves with an error in its row."""

    def __init__(self, jobs: list[Job], rows: dict[str, dict[str, Any]], say: Say, rates: bool) -> None:
        self.jobs, self.rows, self.say, self.with_rates = jobs, rows, say, rates
        self.workers: dict[str, Worker] = {}
        self.rates: Worker | None = None

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self.workers.values(), self.rates]:
            if worker is not None:
                worker.close()

    def ask(self, job: Job, do: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer, or None after noting the failure and ending the process."""
        try:
            return self.workers[job.key](do, **arguments)
        except WorkerError as error:
            self.rows[job.key] |= failure(job, error)
            self.say(f"{job.key}: {self.rows[job.key]['error']}")
            self.workers.pop(job.key).close()
            return None

    def alive(self) -> list[Job]:
        return [job for job in self.jobs if job.key in self.workers]

    def start(self, weights: str, warmup: int) -> None:
        if self.with_rates and self.jobs:
            first = self.jobs[0]
            self.rates = Worker(first.threads)
            precisions = sorted({job.precision for job in self.jobs})
            self.rates("rates", device=first.device, precisions=precisions, threads=first.threads)
        for job in self.jobs:
            self.workers[job.key] = Worker(job.threads, environment=job.provider.environment)
            built = self.ask(
                job, "build", provider=asdict(job.provider), config=to_dict(job.cfg), device=job.device,
                precision=job.precision, sets=job.sets, threads=job.threads, weights=weights,
            )  # fmt: skip
            ready = self.ask(job, "warmup", steps=warmup) if built else None
            if ready:
                self.rows[job.key] |= built | ready | {"samples_ms": [], "warmup": warmup}
                self.say(
                    f"{job.key}: built in {built['build_s']:.1f} s, first step {ready['first_step_s']:.1f} s"
                )

    def alternate(self, rounds: int, steps: int, sampled: list[dict[str, float]]) -> None:
        for i in range(rounds):
            if self.rates is not None:
                sampled.append(self.rates("rate"))
            jobs = self.alive()
            # another one begins each round
            for job in jobs[i % max(1, len(jobs)) :] + jobs[: i % max(1, len(jobs))]:
                answer = self.ask(job, "turn", warm=WARM_PER_TURN[job.kind], steps=steps)
                if answer:
                    self.rows[job.key]["samples_ms"] += answer["samples_ms"]
                    self.say(f"round {i + 1}/{rounds} {job.key}: {min(answer['samples_ms']):.1f} ms")

    def finish(self, profile: set[str]) -> None:
        for job in self.alive():
            self.rows[job.key] |= self.ask(job, "memory") or {}
        for job in self.alive():
            if job.key in profile:
                self.rows[job.key] |= self.ask(job, "profile") or {}


def failure(job: Job, error: WorkerError) -> dict[str, Any]:
    """What a row says instead of times; for exhausted memory the sizes and three remedies."""
    if not error.out_of_memory:
        return {"error": str(error)}
    cfg = job.cfg
    width, depth, _ = cfg.model.shape
    sizes = (
        f"{job.provider.name} with width {width}, depth {depth}, batch {cfg.train.batch_size}, "
        f"{cfg.mask.views} views of {cfg.num_keep} tokens, {job.precision} on {job.device}"
    )
    remedies = (
        f"a smaller --batch ({max(1, cfg.train.batch_size // 2)}), --ours train.recompute=norm, "
        "or train.accumulation in training"
    )
    return {"error": f"out of memory: {sizes}; try {remedies}", "out_of_memory": True}


def check_gates(jobs: list[Job], weights: Path) -> tuple[float, list[dict[str, Any]]]:
    """In a process of its own: (the first step's true loss, exact comparisons); weights go to `weights`.

    raises WorkerError
    """
    job = jobs[0]
    with Worker(job.threads) as worker:
        answer = worker(
            "gates", providers=[asdict(j.provider) for j in jobs], config=to_dict(job.cfg), device=job.device,
            threads=job.threads, weights=str(weights),
        )  # fmt: skip
    return answer["first_loss"], answer["gates"]
