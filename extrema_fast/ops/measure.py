"""Finds the fastest implementation of each op on the user's own GPU, before the first step of a run.

Every candidate is first checked against fp64 at the run's own shapes (`kernels.tune.fault`); then all correct ones are
timed in turns. This happens in a child process with a time limit, because an illegal access ends the CUDA context, and
a kernel may hang on a GPU where it was never tried. Whatever goes wrong there removes that candidate, with one log
line, and the run starts. Results are stored in the user's cache folder (`kernels/_cache.py`).

The child writes one JSON list per line: `at` (what it is about to do), `out` (a candidate that is wrong), `no memory`
(one that needs too much memory), `times`, `end` (of a problem, and why it was not measured), `restart`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch

from ..distributed import World
from ..errors import is_out_of_memory, one_line
from ..files import write_file
from ..kernels import _cache, tune
from ..kernels._launch import KernelError
from ..kernels._spec import OPS, Case, Sizes, spec
from ..progress import ImageProgress
from . import attention

log = logging.getLogger(__name__)

# seconds until a child begins, without a sign of life (compiling one candidate), and of all measurements of a run
START_S, SILENT_S, TOTAL_S = 60.0, 90.0, 120.0
# samples of each candidate; one that takes longer than SLOW times the fastest gets one
ROUNDS, SLOW = 25, 2.0
# the rule's choice stays unless another is faster by this share, and where times vary by more than that
GAIN, SPREAD = 0.03, 0.10
# slow by counting and slow to compile: tried where no other implementation is right
FALLBACKS = ("compiled", "plain")
# names of this project's kernels
OURS = ("triton", "split", "short")
NO_MEMORY = "the GPU has no memory left for it (nvidia-smi shows who uses it; a smaller batch needs less)"


@dataclass(frozen=True)
class Problem:
    """One choice: an op of `dispatch.IMPLEMENTATIONS` as a training step calls it."""

    op: str
    # the case of the op's spec, for attention, which is chosen for student and teacher; empty: all of them together
    label: str
    # what the fixed rule takes, and all that can run
    default: str
    candidates: tuple[str, ...]
    sizes: Sizes
    # bf16 | fp32
    dtype: str
    # whether `train.compile` compiles the op with what is around it
    compiled: bool = False

    @property
    def name(self) -> str:
        """`attention student`, `color_views`."""
        return f"{self.op} {self.label}".strip()

    @property
    def train(self) -> bool:
        """Whether there is a backward pass."""
        return self.label != "teacher"

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens of a sequence, head_dim) of attention."""
        s = self.sizes
        return s.kept if self.train else s.patches, s.width // s.heads

    def key(self, device: str) -> dict[str, Any]:
        """Its key in the cache."""
        what = {"label": self.label, "dtype": self.dtype, "compiled": self.compiled, **asdict(self.sizes)}
        # a package that was installed since is measured
        what["candidates"] = list(self.candidates)
        return _cache.key(device, folder_of(self.op), choice=self.op, **what)


@dataclass(frozen=True)
class Choice:
    """What was chosen for a problem (empty: what the fixed rule takes), why, and what is not used and why."""

    implementation: str
    reason: str
    out: dict[str, str] = field(default_factory=dict)


Choices = dict[str, Choice]


@dataclass
class Result:
    """What the child found: case -> candidate -> microseconds; candidate -> why it is out; those without memory."""

    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    out: dict[str, str] = field(default_factory=dict)
    no_memory: list[str] = field(default_factory=list)
    # why nothing could be measured
    failed: str = ""


def folder_of(op: str) -> str:
    """The folder of kernels, whose spec has the cases of an op."""
    return "short_attention" if op == "attention" else op


def has_cases(op: str) -> bool:
    """Whether there is something to measure: the op's folder says how a training step calls it."""
    return folder_of(op) in OPS and spec(folder_of(op)).step_cases is not None


# ---- choosing -------------------------------------------------------------------------------------


def choose(
    problems: list[Problem], world: World, recorded: Callable[[], Mapping[str, Any]] = dict
) -> Choices:
    """A choice for every problem, by name, the same on all processes.

    In this order: what the run's record says, what is in the cache, what is measured now, all of it on rank 0. GPUs
    that differ get the fixed rule.

    Args:
        recorded: gives the implementations of the run that is continued, by the problems' names.
    """
    device = f"{world.device.type}:{world.device.index or 0}"
    gpus = sorted(set(world.all_gather(_cache.environment(device)["gpu"])))
    if len(gpus) > 1:
        if world.is_rank_zero:
            log.info("ops: nothing is measured on unlike GPUs (%s); the fixed rule holds", ", ".join(gpus))
        return {}

    def on_rank_zero() -> dict[str, dict[str, Any]]:
        record = recorded()
        found = {
            p.name: Choice(n, "as before") for p in problems if (n := record.get(p.name)) in p.candidates
        }
        found |= cached([p for p in problems if p.name not in found], device)
        if rest := [p for p in problems if p.name not in found and len(p.candidates) > 1]:
            found |= measure(rest, device)
        return {name: asdict(choice) for name, choice in found.items()}

    choices = world.broadcast(world.rank_zero_only(on_rank_zero))
    return {name: Choice(**choice) for name, choice in choices.items()}


def cached(problems: Iterable[Problem], device: str) -> Choices:
    """The choices that are in the cache."""
    found = ((p, _cache.find(p.key(device))) for p in problems)
    return {p.name: c for p, value in found if value and (c := _read(p, value))}


def describe(device: str, ops: Iterable[str]) -> list[str]:
    """A line for everything in the cache about these ops."""
    lines = []
    for op in ops:
        for p, choice in known(op, device):
            s = p.sizes
            shape = f"{s.images} images, {s.views} x {s.kept} of {s.patches} tokens, width {s.width}"
            lines.append(
                f"{p.name} ({p.dtype}, {shape}): {choice.implementation or 'the rule'}, {choice.reason}"
            )
    return lines


def known(op: str, device: str) -> list[tuple[Problem, Choice]]:
    """All choices of an op in the cache, at whatever shapes."""
    found = []
    for key, value in _cache.entries(device, folder_of(op)):
        if key.get("choice") == op:
            # keys that this version wrote; others have another version in them
            sizes = Sizes(**{f.name: key[f.name] for f in fields(Sizes)})
            name = str(value.get("implementation"))
            p = Problem(op, key["label"], name, (name,), sizes, key["dtype"], key["compiled"])
            if choice := _read(p, value):
                found.append((p, choice))
    return found


def _read(p: Problem, value: Mapping[str, Any]) -> Choice | None:
    name, why, out = (value.get(key) for key in ("implementation", "reason", "out"))
    if name not in ("", *p.candidates) or not isinstance(why, str) or not isinstance(out, dict):
        return None
    return Choice(name, why, out)


def measure(problems: list[Problem], device: str, builder: str = f"{__name__}:build") -> Choices:
    """Measures now, logs what was found and keeps it in the cache; problems without a result are left out.

    Args:
        builder: `module:function`, called in the child with a problem and a device; returns its `Bench`es.
    """
    names = ", ".join(p.name for p in problems)
    log.info("measuring on this GPU, once for these versions and shapes: %s", names)
    began, choices, writable = time.monotonic(), {}, True
    # reason -> problems: what one cause does to many ops is one line
    by_rule: dict[str, list[str]] = {}
    large: list[str] = []
    for p, result in zip(problems, run(problems, device, builder), strict=True):
        for name, why in result.out.items():
            ours = "; please report it with what `extrema-fast kernels` prints" * (name in OURS)
            log.warning("op %s: %s is left out: %s%s", p.name, name, why, ours)
        choice = choices[p.name] = decide(p, result)
        # memory may be free next time
        kept = not result.failed and p.default not in result.no_memory
        if not choice.implementation:
            again = "; the next start measures again, with `--system.backend fixed` none does"
            by_rule.setdefault(choice.reason + again * (not kept), []).append(p.name)
        elif result.no_memory:
            large.append(f"{', '.join(result.no_memory)} of {p.name}")
        if kept:
            writable = writable and _keep(p.key(device), asdict(choice) | {"times": result.times})
    if large:
        log.warning("ops: left out are %s: %s", "; ".join(large), NO_MEMORY)
    for reason, ops in by_rule.items():
        log.warning("op %s: the fixed rule holds: %s", ", ".join(ops), reason)
    log.info("measured in %.0f s", time.monotonic() - began)
    return choices


def tune_and_measure(problems: list[Problem], device: str, ops: Collection[str] = ()) -> Choices:
    """Looks for faster launch settings of the kernels first, in this process, then measures; all of it anew.

    Args:
        ops: folders of kernels to do this for; empty: all.
    """
    problems = [p for p in problems if not ops or folder_of(p.op) in ops]

    def clock(function: Callable[[], object]) -> float:
        sample = tune.sampler(function, torch.device(device))
        return statistics.median(sample() for _ in range(ROUNDS))

    for p in problems:
        s = spec(folder_of(p.op))
        dtype = tune.DTYPES[p.dtype] if tune.DTYPES[p.dtype] in s.dtypes else s.dtypes[0]
        if s.space is None or not s.step_cases or not set(OURS) & set(p.candidates):
            continue
        for case in s.step_cases(p.sizes):
            if p.label not in ("", case.label):
                continue
            log.info("tuning %s, %s", s.name, case.label)
            for key, found in tune.tune(s, case, dtype, device, clock, log.info).items():
                log.info(
                    "%s: %s, %s us in place of %s", key, *(found[k] for k in ("config", "us", "default_us"))
                )
                _keep(_cache.key(device, s.name, launch=key), found)
            tune.forget()
    return measure(problems, device)


def _keep(key: dict[str, Any], value: dict[str, Any]) -> bool:
    try:
        write_file(_cache.file(key), _cache.text(key, value))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s), so this is measured again next time; set XDG_CACHE_HOME to a folder of yours",
            _cache.folder(),
            error.strerror or error,
        )
        return False
    return True


def decide(p: Problem, result: Result) -> Choice:
    """The fastest candidate that is right everywhere; the rule's where none is clearly faster."""
    tables = list(result.times.values())
    right = [n for n in p.candidates if n not in result.out and tables and all(t.get(n) for t in tables)]
    if result.failed or not right:
        why = NO_MEMORY if result.no_memory else "no other implementation is right here"
        return Choice("", result.failed or why, dict(result.out))
    us = {n: sum(statistics.median(t[n]) for t in tables) for n in right}
    best = min(right, key=us.__getitem__)
    others = sorted((u, n) for n, u in us.items() if n != best)
    chosen, note = best, ""
    if p.default in right and best != p.default:
        spread = max(_spread(t[n]) for t in tables for n in (best, p.default))
        if spread > SPREAD:
            chosen, note = p.default, f"; times vary by {spread:.0%}: is another process on this GPU?"
        elif us[best] > (1 - GAIN) * us[p.default]:
            chosen, note = p.default, f"; {best} is not faster by {GAIN:.0%}"
    words = f"{us[chosen]:.0f} us"
    if chosen == best and others and us[best]:
        words += f", {others[0][0] / us[best]:.2f} times as fast as {others[0][1]}"
    return Choice(chosen, words + note, dict(result.out))


def _spread(samples: list[float]) -> float:
    # the middle 80 %: one interruption is no spread
    ordered, cut = sorted(samples), len(samples) // 10
    middle = ordered[cut : len(ordered) - cut]
    return (middle[-1] - middle[0]) / (statistics.median(ordered) or float("inf"))


# ---- the parent's side ----------------------------------------------------------------------------


def run(problems: list[Problem], device: str, builder: str) -> list[Result]:
    """Has a child measure all problems, and another one what is left after one that died or was silent for too long."""
    results = [Result() for _ in problems]
    todo, end = set(range(len(problems))), time.monotonic() + TOTAL_S
    with ImageProgress("measuring", len(problems), unit="ops") as bar:
        while todo:
            bar.reached(len(problems) - len(todo))
            request = {
                "builder": builder,
                "device": device,
                "problems": [
                    [i, asdict(problems[i]), [*results[i].out, *results[i].no_memory]] for i in sorted(todo)
                ],
            }
            # (problem, candidate) that the child is at
            at: tuple[int, str] | None = None
            why, restart = "", False
            with _child(request) as read:
                while todo and not restart:
                    line, why = read(min(SILENT_S if at else START_S, end - time.monotonic()))
                    if line is None:
                        break
                    word, i, *what = line
                    if word == "at":
                        at = i, what[0]
                    elif word == "out":
                        results[i].out[what[0]] = what[1]
                    elif word == "no memory":
                        results[i].no_memory.append(what[0])
                    elif word == "times":
                        results[i].times[what[0]] = what[1]
                    elif word == "end":
                        results[i].failed = what[0]
                        todo.discard(i)
                        bar.reached(len(problems) - len(todo))
                    else:
                        restart = True
            if not todo or restart:
                continue
            if at and at[1] and time.monotonic() < end:
                results[at[0]].out[at[1]] = why
                continue
            if time.monotonic() >= end:
                why, at = f"the {TOTAL_S:.0f} s for measuring were over", None
            for i in [at[0]] if at else list(todo):
                results[i].failed = why
                todo.discard(i)
    return results


@contextlib.contextmanager
def _child(request: dict[str, Any]) -> Iterator[Callable[[float], tuple[list | None, str]]]:
    """A child at work on a request; a function that waits so many seconds for its next line: (line or None, why)."""
    lines: queue.Queue[bytes] = queue.Queue()

    def pump(pipe: Any) -> None:
        for line in pipe:
            lines.put(line)
        lines.put(b"")

    with tempfile.TemporaryFile() as errors:
        # a session of its own: Ctrl-C is for the parent, which then ends it
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import child; child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        reader = threading.Thread(target=pump, args=(process.stdout,), daemon=True)
        reader.start()

        def read(seconds: float) -> tuple[list | None, str]:
            try:
                line = lines.get(timeout=max(0.0, seconds))
            except queue.Empty:
                return None, f"it took more than {seconds:.0f} s"
            if line:
                return json.loads(line), ""
            code = process.wait()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return None, f"its process ended {how}{f' ({last})' if last else ''}"

        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError), process.stdin:
                process.stdin.write(json.dumps(request).encode())
            yield read
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()


# ---- the child's side -----------------------------------------------------------------------------


@dataclass
class Bench:
    """A case of a problem and the functions of its arguments that are candidates."""

    case: Case
    dtype: torch.dtype
    candidates: Mapping[str, Callable[..., Any]]
    sampler: Callable[[Callable[[], object], torch.device], Callable[[], float]] = tune.sampler
    # what compiled candidates were made of: checked too, since outputs start as NaN and spills are counted there alone
    plain: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def build(p: Problem, device: torch.device) -> list[Bench]:
    """The cases of a problem from the op's spec; the candidates as the step calls them."""
    s = spec(folder_of(p.op))
    assert s.step_cases is not None
    dtype = tune.DTYPES[p.dtype] if tune.DTYPES[p.dtype] in s.dtypes else s.dtypes[0]
    benches = []
    if p.op == "attention":
        attention.settle_sdpa_order(device)
        for n in p.candidates:
            # xformers has to be prepared for a PyTorch that it was not built for
            attention.missing(n, device, dtype, *p.shape)
    for case in s.step_cases(p.sizes):
        if p.label not in ("", case.label):
            continue
        if p.op == "attention":
            run_as: dict[str, Callable[..., Any]] = {
                n: partial(attention.run, n, attention.BACKENDS[n], train=case.backward) for n in p.candidates
            }
        else:
            # the last resort of a rule has no case
            provided = {"triton" if n == "ours" else n: f for n, f in case.providers.items()}
            run_as = {n: provided[n] for n in p.candidates if n in provided}
        plain = {n: f for n, f in run_as.items() if p.compiled and n in OURS}
        if p.compiled:
            run_as = {n: torch.compile(f, fullgraph=True, dynamic=False) for n, f in run_as.items()}
        benches.append(Bench(case, dtype, run_as, plain=plain))
    return benches


def failure(p: Problem, device: torch.device) -> str:
    """Runs a problem's only candidate once, uncompiled; why that fails, empty when it does not."""
    (name,) = p.candidates
    try:
        for b in build(p, device):
            args = b.case.make(device, b.dtype, torch.Generator(device).manual_seed(0))
            tune.run_case(b.case, args, b.candidates[name])
    except KernelError as error:
        return error.reason
    except Exception as error:
        # memory may be there when the run needs it
        return "" if is_out_of_memory(error) else _reason(error)
    return ""


def child() -> None:
    """Measures what standard input asks for; see the module."""
    request = json.load(sys.stdin)
    # what libraries print goes to standard error
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(*line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    module, _, name = request["builder"].partition(":")
    builder = getattr(importlib.import_module(module), name)
    for i, values, out in request["problems"]:
        p = Problem(
            **(values | {"sizes": Sizes(**values["sizes"]), "candidates": tuple(values["candidates"])})
        )
        say("at", i, "")
        try:
            # no name here holds what one problem needs while the next is measured
            _measure(i, [n for n in p.candidates if n not in out], builder(p, device), device, say)
            failed = ""
        # whatever it is, the run starts without it
        except Exception as error:
            failed = _reason(error)
        say("end", i, failed)
        if p.compiled:
            torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    i: int, names: list[str], benches: list[Bench], device: torch.device, say: Callable[..., None]
) -> None:
    def attempt(name: str, function: Callable[[], Any], wrong: bool = False) -> Any:
        """The result of a candidate's function; None, and the candidate is out, when it fails or says what is wrong."""
        say("at", i, name)
        try:
            result = function()
            why = result if wrong else ""
        except Exception as error:
            result, why = None, _reason(error)
        if why:
            say(*(("no memory", i, name) if why == NO_MEMORY else ("out", i, name, why)))
            names.remove(name)
            _restart_if_broken(i, device, say)
        return result

    def make(b: Bench) -> tuple:
        return b.case.make(device, b.dtype, torch.Generator(device).manual_seed(0))

    def check(some: list[str]) -> None:
        for b in benches:
            for name, function in [*b.plain.items(), *b.candidates.items()]:
                if name in some and name in names:
                    fault = partial(tune.fault, b.case, partial(make, b), b.dtype, function)
                    attempt(name, fault, wrong=True)

    names[:] = [n for n in names if all(n in b.candidates for b in benches)]
    last = [n for n in names if n in FALLBACKS]
    names[:] = [n for n in names if n not in last]
    check(list(names))
    if not names:
        names += last
        check(last)
    for b in benches:
        args, samplers = make(b), {}
        for name in list(names):
            call = partial(tune.run_case, b.case, args, b.candidates[name])
            samplers[name] = attempt(name, partial(b.sampler, call, device))
        times = {name: [us] for name in list(names) if (us := attempt(name, samplers[name])) is not None}
        fast = [n for n, (us,) in times.items() if us <= SLOW * min(times.values())[0]]
        for name in fast * ROUNDS:
            if name in names and (us := attempt(name, samplers[name])) is not None:
                times[name].append(us)
        say("times", i, b.case.label, times)


def _restart_if_broken(i: int, device: torch.device, say: Callable[..., None]) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        # after an illegal access every later call fails
        say("restart", i)
        os._exit(1)


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return NO_MEMORY
    return f"{type(error).__name__}: {one_line(error)}"
