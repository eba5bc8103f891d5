"""Measures launch settings on this GPU and writes them as JSON; nothing is tuned while training.

python -m extrema_fast.kernels.tune [--op NAME ...] [--dtype bf16] [--out FOLDER] [--dry-run]

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path

import torch

from . import _launch
from ._spec import OPS, Case, Spec, spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@contextmanager
def recorded(op: str) -> Iterator[list[str]]:
    """Inside, the keys under which launches of `op` look for settings."""
    keys: list[str] = []
    real = _launch.settings

    def settings(name, key, device, heuristic):
        if name == op and key not in keys:
            keys.append(key)
        return real(name, key, device, heuristic)

    _launch.settings = settings
    try:
        yield keys
    finally:
        _launch.settings = real


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


def wide(args: tuple) -> tuple:
    """The same arguments in float64."""
    return tuple(
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    )


def is_correct(case: Case, args: tuple, dtype: torch.dtype) -> tuple[bool, float]:
    """(ours is within twice torch's error plus a floor, worst ratio); errors relative to the largest value."""
    exact = run_case(case, wide(args), "reference") if case.backward else run_case(case, args, "reference")
    ours = run_case(case, args, "ours")
    # without gradients the definition ran in this dtype already, and an optimizer's step must not run twice
    same = run_case(case, args, "reference") if case.backward else exact
    largest = max(float(e.detach().abs().max()) for e in exact[1:]) if len(exact) > 1 else 0.0
    worst = 0.0
    for i, (a, b, e) in enumerate(zip(ours, same, exact, strict=True)):
        # a gradient that is zero in exact arithmetic is judged beside the others
        scale = max(float(e.detach().abs().max()), 1e-3 * largest if i else 0.0, 1e-30)
        errors = [float((x.detach().double() - e.detach().double()).abs().max()) / scale for x in (a, b)]
        limit = 2 * errors[1] + torch.finfo(dtype).eps + 2e-6
        # `not <=`: NaN is wrong
        worst = max(worst, errors[0] / limit if errors[0] == errors[0] else float("inf"))
    return worst <= 1, worst


def time_us(function: Callable[[], object], repeats: int = 30) -> list[float]:
    """Microseconds per call, each a CUDA graph of 10 calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    out = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) * 100)
    return out


def tries(s: Spec, keys: list[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """(key, settings) of everything to try for the keys that a case's launches asked for."""
    for key in keys:
        parts = key.split("|")
        sizes = {m[1]: int(m[2]) for p in parts[2:] if (m := re.fullmatch(r"([A-Za-z]+)(\d+)", p))}
        dtype = next((d for d, n in _launch.DTYPE_NAMES.items() if len(parts) > 1 and n == parts[1]), None)
        for config in s.space(parts[0], dtype, sizes):
            yield key, config


def plan(s: Spec, dtype: torch.dtype, out: Path | None) -> str:
    """What tuning would try: settings per launch of every case, and where the fastest would go."""
    lines = []
    for case in s.cases(False):
        counts = {d: len(s.space(d, dtype, sizes)) for d, sizes in case.sizes.items()}
        if counts:
            lines.append(f"  {case.label}: " + ", ".join(f"{d} {n} settings" for d, n in counts.items()))
    if not lines:
        return f"{s.name}: nothing to tune"
    return "\n".join([f"{s.name} -> {_file(s, '<device>', out)}", *lines])


def _file(s: Spec, device: str, out: Path | None) -> Path:
    return (out / s.name if out else Path(__file__).parent / s.name / "configs") / f"{device}.json"


def tune(
    s: Spec, dtype: torch.dtype, device: str, timer: Callable[[Callable[[], object]], list[float]]
) -> dict[str, dict]:
    """Entries of a configuration file: the fastest settings per key that are correct and do not spill."""
    entries: dict[str, dict] = {}
    for case in s.cases(device == "cpu"):
        generator = torch.Generator(device).manual_seed(0)
        args = case.make(device, dtype, generator)
        with recorded(s.name) as keys:
            run_case(case, args, "ours")
        for key, config in tries(s, keys):
            with only(s.name, key, config):
                try:
                    with _launch.watched() as launched:
                        correct, _ = is_correct(case, args, dtype)
                    if not correct or any(getattr(k, "n_spills", 0) for k in launched):
                        continue
                    p50 = statistics.median(timer(partial(run_case, case, args, "ours")))
                except Exception as error:
                    # a setting that does not compile or fit is no candidate
                    print(f"  {key} {config}: {type(error).__name__}", file=sys.stderr)
                    continue
            best = entries.get(key)
            if best is None or p50 < best["p50_us"]:
                entries[key] = {"config": config, "p50_us": round(p50, 3), "case": case.label}
    return entries


@contextmanager
def only(op: str, key: str, config: dict[str, int]) -> Iterator[None]:
    """Inside, launches of `op` under `key` take `config`; its other launches are left alone."""
    real = _launch.settings

    def settings(name, wanted, device, heuristic):
        found = real(name, wanted, device, heuristic)
        return found | config if (name, wanted) == (op, key) else found

    _launch.settings = settings
    try:
        yield
    finally:
        _launch.settings = real


def write(s: Spec, entries: dict[str, dict], device: str, out: Path | None) -> Path:
    """Merges the entries into the device's file."""
    import triton

    file = _file(s, device, out)
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
    """The command; 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="extrema-fast tune",
        description=__doc__.split("\n")[0],
        epilog="example: extrema-fast tune --op short_attention attention_pool --dtype bf16",
    )
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out", type=Path, help="another folder than the package's")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be tried")
    args = parser.parse_args(argv)
    if args.dry_run:
        for op in args.op:
            print(plan(spec(op), DTYPES[args.dtype], args.out))
        return 0
    if not torch.cuda.is_available():
        print(
            "tune: needs a CUDA device, and this PyTorch sees none; --dry-run lists the cases",
            file=sys.stderr,
        )
        return 2
    device = _launch.device_name("cuda")
    for op in args.op:
        s = spec(op)
        entries = tune(s, DTYPES[args.dtype], "cuda", time_us)
        if entries:
            print(f"{op}: {len(entries)} entries in {write(s, entries, device, args.out)}")
        else:
            print(f"{op}: nothing to tune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
