"""The commands `kernels` (what runs here) and `tune`; nothing is tuned while training.

For every measured case of an op, each setting of its `space` is first compared with the plain definition in fp64
and refused if its kernels spill registers, then timed inside a CUDA graph. The fastest goes to
kernels/<op>/configs/<device>.json, or to FOLDER/<op>/<device>.json (read through EXTREMA_FAST_CONFIG_DIR).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _launch
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
            "torch_ops": [f"extrema_fast::{op}" for op in s.torch_ops],
            "public": list(s.public),
            "runs": runs,
            "reason": why,
            "tuned": len(_launch.entries(s.name, _launch.device_name(device))) if on_gpu else 0,
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
    """Outputs of a provider, then the gradients of every argument that wants one, of a fixed upstream.

    Args:
        provider: its name, or a function of `args`.
        rows: indices of the rows to return; the upstream is zero elsewhere. None: all.
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
    first = outs[0]
    outs = tuple(o.detach() if at is None else o.detach()[at] for o in outs)
    if not (case.backward and leaves):
        return outs
    upstream = torch.linspace(-1, 1, outs[0].numel(), device=first.device).view(outs[0].shape).to(first.dtype)
    if at is not None:
        upstream = torch.zeros_like(first).index_copy_(0, at, upstream)
    # a bias of keys cancels: torch sends noise, the kernel zero; `allow_unused` for none at all
    grads = torch.autograd.grad(first, [args[i] for i in leaves], upstream, allow_unused=True)
    picked = [
        g if at is None or i not in case.row_dims else g.index_select(case.row_dims[i], rows)  # type: ignore[arg-type]
        for i, g in zip(leaves, grads, strict=True)
        if g is not None
    ]
    return (*outs, *picked)


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
        self.torchs = [r.double() for r in run_case(case, some, "reference")]
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

    def worst(self, results: tuple[Tensor, ...]) -> float:
        """The largest error as a share of what is allowed: twice torch's in this dtype plus a floor."""
        exact = [e.detach().double() for e in self.exact]
        largest = max((float(e.abs().max()) for e in exact[1:] if e.numel()), default=0.0)
        worst = 0.0
        for i, (a, b, e) in enumerate(zip(results, self.torchs, exact, strict=True)):
            if not e.numel():
                continue
            # a gradient that is zero in exact arithmetic is compared with the size of the others
            scale = max(float(e.abs().max()), 1e-3 * largest if i else 0.0, 1e-30)
            errors = [float((x.double() - e).abs().max()) / scale for x in (a, b)]
            limit = 2 * errors[1] + torch.finfo(self.dtype).eps + 2e-6
            # NaN is wrong
            worst = max(worst, errors[0] / limit if errors[0] == errors[0] else float("inf"))
        return worst


def _pick(x: Any, dim: int | None, rows: Tensor) -> Any:
    return x if dim is None else x.detach().index_select(dim, rows).requires_grad_(x.requires_grad)


def is_correct(
    case: Case, args: tuple, dtype: torch.dtype, provider: str | Callable[..., Any] = "ours"
) -> tuple[bool, float]:
    """(Whether a provider's error against fp64 is within twice torch's in `dtype` plus a floor, its share of that)."""
    check = _Check(case, args, dtype)
    worst = check.worst(check.run(provider))
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

    It runs twice, the second time in memory that is likely to hold NaN; outputs of this project's kernels start as
    NaN both times. Both results must have the same bits, their errors against fp64 must be within the rule of
    `is_correct`, and no kernel may spill registers.

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
        return "two runs differ, or give NaN"
    worst = check.worst(second)
    return "" if worst <= 1 else f"its error is {worst:.2g} times the allowed"


def capture(function: Callable[[], Any], warmup: int = 3, calls: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of some calls of a function, after `warmup` calls that run as they are; and its last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, result = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = function()
    return graph, result


def time_us(function: Callable[[], object], repeats: int = 30) -> list[float]:
    """Microseconds per call, each a CUDA graph of 10 calls."""
    graph, _ = capture(function, calls=10)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    out = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) * 100)
    return out


# ---- tuning ---------------------------------------------------------------------------------------


def settings_to_try(s: Spec, key: str) -> list[dict[str, int]]:
    """The settings of an op's `space` for a key such as `bwd|bf16|D768|H12`."""
    sizes = {name: int(size) for name, size in re.findall(r"\|([A-Za-z])(\d+)", key)}
    return s.space(key.partition("|")[0], sizes) if s.space else []


def tune(
    s: Spec, dtype: torch.dtype, device: str, timer: Callable[[Callable[[], object]], list[float]]
) -> dict[str, dict]:
    """The fastest settings that are correct and do not spill; `timer` gives microseconds of several calls."""
    entries: dict[str, dict] = {}
    for case in s.cases(device == "cpu"):
        args = case.make(device, dtype, torch.Generator(device).manual_seed(0))
        with _launch.recording() as first:
            run_case(case, args, "ours")
        keys = dict.fromkeys(key for op, key in first.keys if op == s.name)
        for key, config in [(k, config) for k in keys for config in settings_to_try(s, k)]:
            try:
                with _launch.forced(s.name, config, key):
                    with _launch.recording() as tried:
                        correct, _ = is_correct(case, args, dtype)
                    if not correct or any(getattr(x.compiled, "n_spills", 0) for x in tried.launches):
                        continue
                    p50 = statistics.median(timer(partial(run_case, case, args, "ours")))
            except Exception as error:
                # a setting that does not compile or fit is no candidate
                print(f"  {key} {config}: {type(error).__name__}", file=sys.stderr)
                continue
            if key not in entries or p50 < entries[key]["p50_us"]:
                entries[key] = {"config": config, "p50_us": round(p50, 3), "case": case.label}
    return entries


def write(s: Spec, entries: dict[str, dict], device: str, out: Path | None) -> Path:
    """Merges the entries into the device's file of settings and returns its path."""
    import triton

    file = _launch.settings_file(s.name, device, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    old = _launch.read_entries(file) if file.is_file() else {}
    content = {
        "device": device,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "entries": old | entries,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def main(argv: list[str] | None = None) -> int:
    """The command `tune`; 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="extrema-fast tune",
        description="Measures launch settings on this GPU and writes them as JSON.",
        epilog="example: extrema-fast tune --op short_attention attention_pool --dtype bf16",
    )
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, help="another folder than the package's")
    parser.add_argument("--dry-run", action="store_true", help="only list the cases and the files")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "tune: needs a CUDA device, and this PyTorch sees none; --dry-run lists the cases",
            file=sys.stderr,
        )
        return 2
    device = "<device>" if args.dry_run else _launch.device_name("cuda")
    for s in map(spec, args.op):
        if s.space is None:
            print(f"{s.name}: nothing to tune")
        elif args.dry_run:
            labels = ", ".join(case.label for case in s.cases(False))
            print(f"{s.name} -> {_launch.settings_file(s.name, device, args.out)}\n  {labels}")
        elif entries := tune(s, DTYPES[args.dtype], "cuda", time_us):
            print(f"{s.name}: {len(entries)} entries in {write(s, entries, device, args.out)}")
        else:
            print(f"{s.name}: no setting is correct")
    return 0


if __name__ == "__main__":
    sys.exit(main())
