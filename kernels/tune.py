"""The commands `kernels` (what runs here) and `tune`; nothing is tuned while training.

For every measured case of an op, each setting of its `space` is first compared with the plain definition in fp64
and refused if its kernels spill registers, then timed inside a CUDA graph. The fastest goes to
kernels/<op>/configs/<device>.json, or to FOLDER/<op>/<device>.json (read through EXTREMA_FAST_CONFIG_DIR).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import _launch
from ._spec import OPS, Case, Spec, spec

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


def run_case(case: Case, args: tuple, provider: str) -> tuple[torch.Tensor, ...]:
    """Outputs of a provider, then the gradients of every argument that wants one (of a fixed upstream)."""
    out = case.providers[provider](*args)
    outs = out if isinstance(out, tuple) else (out,)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not (case.backward and leaves):
        return outs
    upstream = torch.linspace(-1, 1, outs[0].numel(), device=outs[0].device).view(outs[0].shape)
    # a bias of keys cancels: torch sends noise, the kernel zero; `allow_unused` for none at all
    grads = torch.autograd.grad(outs[0], leaves, upstream.to(outs[0].dtype), allow_unused=True)
    return (*outs, *(g for g in grads if g is not None))


def is_correct(case: Case, args: tuple, dtype: torch.dtype) -> tuple[bool, float]:
    """(Whether the error of ours against fp64 is within twice torch's in `dtype` plus a floor, its share of that)."""
    exact_args = tuple(
        a.detach().double().requires_grad_(a.requires_grad)
        if case.backward and isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    )
    exact = run_case(case, exact_args, "reference")
    ours = run_case(case, args, "ours")
    # without gradients the definition ran in this dtype already, and an optimizer's step must not run twice
    same = run_case(case, args, "reference") if case.backward else exact
    largest = max((float(e.detach().abs().max()) for e in exact[1:]), default=0.0)
    worst = 0.0
    for i, (a, b, e) in enumerate(zip(ours, same, exact, strict=True)):
        # a gradient that is zero in exact arithmetic is compared with the size of the others
        scale = max(float(e.detach().abs().max()), 1e-3 * largest if i else 0.0, 1e-30)
        errors = [float((x.detach().double() - e.detach().double()).abs().max()) / scale for x in (a, b)]
        limit = 2 * errors[1] + torch.finfo(dtype).eps + 2e-6
        # NaN is wrong
        worst = max(worst, errors[0] / limit if errors[0] == errors[0] else float("inf"))
    return worst <= 1, worst


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
