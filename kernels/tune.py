"""Is an implementation right, how fast is it, and with which launch settings of its kernel is it faster?"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _launch
from ._ops import NAMESPACE
from ._spec import OPS, Case, Spec, spec

# rows compared at the beginning, in the middle and at the end
SOME = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def headline(device: str) -> str:
    """One line: whether kernels run on a device, and why."""
    runs, why = _runs(device)
    version = ""
    if _launch.HAS_TRITON:
        import triton

        version = f"Triton {triton.__version__}; "
    return f"{version}kernels {'run' if runs else 'do not run'} on {device}: {why}"


def describe(device: str) -> list[dict]:
    """One row per op: `op`, `version`, `summary`, `torch_ops`, `public`, `runs`, `reason`, `tuned` (entries)."""
    runs, why = _runs(device)
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return [
        {
            "op": s.name,
            "version": s.version,
            "summary": s.summary,
            "torch_ops": [f"{NAMESPACE}::{op}" for op in s.torch_ops],
            "public": list(s.public),
            "runs": runs,
            "reason": why,
            "tuned": len(_launch.tuned(s.name, device)) if on_gpu else 0,
        }
        for s in map(spec, OPS)
    ]


def _runs(device: str) -> tuple[bool, str]:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return False, "this PyTorch sees no CUDA device"
    return _launch.can_run(device)


# ---- correct, and how fast ------------------------------------------------------------------------


def run_case(
    case: Case,
    args: tuple,
    provider: str | Callable[..., Any],
    rows: Tensor | None = None,
    batch: int | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of a provider, then the gradients of every argument that requires one, for fixed upstream gradients.

    Args:
        provider: its name, or a function of `args`.
        rows: indices of the rows to return; the upstreams are zero elsewhere. None: all.
        batch: with `rows`, how many rows `args` have; None: `args` have these rows only.
    """
    function = case.providers[provider] if isinstance(provider, str) else provider
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    with torch.set_grad_enabled(case.backward):
        out = function(*args)
    outs = out if isinstance(out, tuple) else (out,)
    at = None
    if rows is not None and batch is not None:
        at = torch.cat([rows + batch * view for view in range(case.views)])
    whole = outs
    outs = tuple(o.detach() if at is None else o.detach()[at] for o in outs)
    if not (case.backward and leaves):
        return outs
    upstreams = [_upstream(o.shape, o.dtype, o.device, i) for i, o in enumerate(outs)]
    if at is not None:
        upstreams = [torch.zeros_like(o).index_copy_(0, at, g) for o, g in zip(whole, upstreams, strict=True)]
    # a bias of keys cancels: torch sends noise, the kernel zero; `allow_unused` for none at all
    grads = torch.autograd.grad(whole, [args[i] for i in leaves], upstreams, allow_unused=True)
    picked = [
        g if at is None or i not in case.row_dims else g.index_select(case.row_dims[i], rows)  # type: ignore[arg-type]
        for i, g in zip(leaves, grads, strict=True)
        if g is not None
    ]
    return (*outs, *picked)


@functools.lru_cache(maxsize=2)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device, which: int) -> Tensor:
    # made once: on a GPU it took longer than several of the ops that are timed; not the same for two outputs
    return torch.linspace(-1, 1 + which, shape.numel(), device=device).view(shape).to(dtype)


class _Check:
    """The errors of providers of a case against fp64, on its first, middle and last rows."""

    def __init__(self, case: Case, args: tuple, dtype: torch.dtype) -> None:
        self.case, self.args, self.dtype = case, args, dtype
        self.rows: Tensor | None = None
        self.batch: int | None = None
        some = args
        if case.row_dims:
            (arg, dim), *_ = case.row_dims.items()
            n = self.batch = args[arg].shape[dim]
            starts = (0, max(0, n // 2 - SOME // 2), max(0, n - SOME))
            picked = sorted({i for start in starts for i in range(start, min(n, start + SOME))})
            self.rows = torch.tensor(picked, device=args[arg].device)
            some = tuple(_pick(a, case.row_dims.get(i), self.rows) for i, a in enumerate(args))
        # sums over all rows are less exact than those over some, which fp32 shows: torch makes them all, too
        whole = dtype == torch.float32 and args[0].device.type == "cuda"
        theirs = self.run("reference") if whole and not case.stateful else run_case(case, some, "reference")
        self.torchs = [r.double() for r in theirs]
        if case.exact is None:
            some = tuple(
                a.detach().double().requires_grad_(a.requires_grad)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in some
            )
        self.exact = run_case(case, some, case.exact or "reference")

    def run(self, provider: str | Callable[..., Any]) -> tuple[Tensor, ...]:
        """Its outputs and gradients on these rows."""
        return run_case(self.case, self.args, provider, self.rows, self.batch)

    def worst(self, results: tuple[Tensor, ...]) -> tuple[float, str]:
        """The largest error as a share of what is allowed, twice torch's in this dtype plus a floor; and of what."""
        exact = [e.detach().double() for e in self.exact]
        gradients = sum(isinstance(a, Tensor) and a.requires_grad for a in self.args) * self.case.backward
        largest = max((float(e.abs().max()) for e in exact[1:] if e.numel()), default=0.0)
        worst, where = 0.0, 0
        for i, (a, b, e) in enumerate(zip(results, self.torchs, exact, strict=True)):
            if not e.numel():
                continue
            # a gradient that is zero in exact arithmetic is compared with the size of the others
            scale = max(float(e.abs().max()), 1e-3 * largest if i else 0.0, 1e-30)
            errors = [float((x.double() - e).abs().max()) / scale for x in (a, b)]
            limit = 2 * errors[1] + torch.finfo(self.dtype).eps + 2e-6
            # NaN is wrong
            share = errors[0] / limit if errors[0] == errors[0] else float("inf")
            if share > worst:
                worst, where = share, i
        return worst, "output" if where < len(exact) - gradients else "gradient"


def _pick(x: Any, dim: int | None, rows: Tensor) -> Any:
    return x if dim is None else x.detach().index_select(dim, rows).requires_grad_(x.requires_grad)


def is_correct(
    case: Case, args: tuple, dtype: torch.dtype, provider: str | Callable[..., Any] = "ours"
) -> tuple[bool, float]:
    """(Whether a provider's error against fp64 is within twice torch's in `dtype` plus a floor, its share of that)."""
    check = _Check(case, args, dtype)
    worst, _ = check.worst(check.run(provider))
    return worst <= 1, worst


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    before = os.environ.get("EXTREMA_FAST_CHECK")
    os.environ["EXTREMA_FAST_CHECK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EXTREMA_FAST_CHECK"]
        else:
            os.environ["EXTREMA_FAST_CHECK"] = before


def fault(
    case: Case, make: Callable[[], tuple], dtype: torch.dtype, provider: str | Callable[..., Any] = "ours"
) -> str:
    """Why a provider must not be used for a case; empty when it is right.

    After a first run it runs twice, the second time in memory that is likely to hold NaN; outputs of this project's
    kernels start as NaN both times, except in compiled code. Both results must have the same bits, their errors
    against fp64 must be within the rule of `is_correct`, and no kernel may spill registers.

    Args:
        make: the arguments, equal at every call.
    """
    check = _Check(case, make(), dtype)
    made: list[Tensor] = []
    function = case.providers[provider] if isinstance(provider, str) else provider

    def run(*args: Any) -> Any:
        out = function(*args)
        made.extend(o.detach() for o in (out if isinstance(out, tuple) else (out,)))
        return out

    # torch.compile compiles here: later it would compile the filling with NaN too, which would then be timed
    check.run(run)
    made.clear()
    if case.stateful:
        check.args = make()
    with _poisoned(), _launch.recording() as recorded:
        first = [r.clone() for r in check.run(run)]
        if case.stateful:
            check.args = make()
        # gradients have the shapes of the arguments
        shapes = [(x.shape, x.dtype) for x in (*made, *check.args) if isinstance(x, Tensor)]
        made.clear()
        poison = [
            torch.full(s, float("nan"), dtype=t, device=first[0].device)
            for s, t in shapes
            if t.is_floating_point
        ]
        del poison
        second = check.run(run)
    if any(getattr(x.compiled, "n_spills", 0) for x in recorded.launches):
        return "a kernel spills registers"
    # NaN differs from NaN
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return "two runs differ, or its result has NaN"
    worst, what = check.worst(second)
    return "" if worst <= 1 else f"wrong {what}: {worst:.2g} times the allowed error"


def capture(function: Callable[[], Any], warmup: int = 3, calls: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of some calls of a function, after `warmup` calls that run as they are; and its last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, result = torch.cuda.CUDAGraph(), None
    # the stream of the warm-up: autograd's nodes of the arguments remember it
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            result = function()
    return graph, result


def sampler(function: Callable[[], object], device: torch.device, calls: int = 10) -> Callable[[], float]:
    """A function that gives the microseconds of a call; on a GPU of one of `calls` in a CUDA graph.

    A function that cannot be captured is called as it is, so that its time has that of Python in it.
    """
    if device.type != "cuda":

        def sample() -> float:
            began = time.perf_counter()
            function()
            return 1e6 * (time.perf_counter() - began)

        function()
        return sample

    def repeat() -> None:
        for _ in range(calls):
            function()

    try:
        replay = capture(function, calls=calls)[0].replay
    except Exception:
        torch.cuda.synchronize(device)
        replay = repeat
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / calls

    replayed()
    return replayed


# ---- tuning ---------------------------------------------------------------------------------------


def forget() -> None:
    """Makes launches reread the settings from the cache."""
    _launch.tuned.cache_clear()


def settings_to_try(s: Spec, key: str, current: dict[str, int]) -> list[dict[str, int]]:
    """Those settings of an op's `space` for a key such as `bwd|bf16|D768|H12` that are nearest to the current ones."""
    sizes = {name: int(size) for name, size in re.findall(r"\|([A-Za-z])(\d+)", key)}
    space = s.space(key.partition("|")[0], sizes) if s.space else []
    changes = [sum(current.get(name) != value for name, value in config.items()) for config in space]
    nearest = min((n for n in changes if n), default=0)
    return [config for config, n in zip(space, changes, strict=True) if n == nearest]


def tune(
    s: Spec,
    case: Case,
    dtype: torch.dtype,
    device: str,
    clock: Callable[[Callable[[], object]], float],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Looks for faster launch settings of a case, changing one at a time as long as that helps.

    Args:
        clock: gives the microseconds of a call.
        say: is told of settings that fail.

    Returns:
        For each `config_key` that its launches read: `config`, its `us`, and `default_us`. Every setting is checked by
        `fault`; those that gain less than 3 % stay as they are.
    """

    def make() -> tuple:
        return case.make(device, dtype, torch.Generator(device).manual_seed(0))

    args = make()
    ours = partial(run_case, case, args, "ours")
    with _launch.recording() as first:
        ours()
    found: dict[str, dict[str, Any]] = {}
    tried: set[tuple] = set()
    for key, default in {key: config for op, key, config in first.keys if op == s.name}.items():
        best, best_us = default, clock(ours)
        default_us = best_us
        while True:
            before = best
            for config in settings_to_try(s, key, best):
                if (key, *config.items()) in tried:
                    continue
                tried.add((key, *config.items()))
                try:
                    with _launch.forced(s.name, config, key):
                        why = fault(case, make, dtype)
                        us = float("inf") if why else clock(ours)
                # a setting that does not compile or fit is no candidate
                except Exception as error:
                    why, us = type(error).__name__, float("inf")
                if why:
                    say(f"{key} {config}: {why}")
                if us < best_us:
                    best, best_us = config, us
            if best is before:
                break
        if best_us < 0.97 * default_us:
            found[key] = {"config": best, "us": round(best_us, 3), "default_us": round(default_us, 3)}
    return found
