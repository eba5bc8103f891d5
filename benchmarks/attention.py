"""Self-attention implementations side by side, forward and backward: which one `auto` should take.

python -m benchmarks attention --name cpu --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import date

import torch

from extrema_fast import ops

from .records import machine, write_record

# (rows, tokens, heads) at head_dim 64: the demo's student and teacher, and paper-like views and whole images
SHAPES = [(320, 12, 2), (256, 19, 3), (128, 39, 6), (64, 64, 2), (16, 196, 6), (8, 196, 12)]
PROVIDERS = ("sdpa", "reference")


def main(argv: list[str]) -> int:
    """Times self-attention (sdpa, reference) over dtypes and lengths, interleaved; CPU or CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--name", default="attention")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, device, args.repeats)]
    record = {
        "what": "self-attention, forward + backward",
        "command": "python -m benchmarks attention " + " ".join(argv),
        "date": date.today().isoformat(),
        "note": f"sdpa against the plain formula on {device}",
        "machine": machine(),
        "rows": rows,
    }
    write_record(record, page(record), args.name)
    return 0


def measure(dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    """One row per shape: median milliseconds per provider; no time where the results disagree."""
    out = []
    for rows, n, heads in SHAPES:
        qkv = torch.randn(rows, n, 3, heads, 64, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, n, heads, 64, device=device, dtype=dtype)
        exact = ops.IMPLEMENTATIONS["attention"]["reference"](qkv.detach().double())
        times: dict[str, list[float]] = {p: [] for p in PROVIDERS}
        worst = {}
        for _ in range(repeats + 2):
            for name in PROVIDERS:
                ms, result = once(ops.IMPLEMENTATIONS["attention"][name], qkv, grad)
                times[name].append(ms)
                worst[name] = float((result.double() - exact).abs().max() / exact.abs().max())
        if max(worst.values()) > (2e-2 if dtype == torch.bfloat16 else 1e-5):
            raise SystemExit(f"results disagree at {rows}x{n}x{heads} {dtype}: {worst}; no time is reported")
        medians = {p: statistics.median(t[2:]) for p, t in times.items()}
        out.append(
            {
                "dtype": str(dtype)[6:],
                "rows": rows,
                "n": n,
                "heads": heads,
                "ms": medians,
                "samples_ms": times,
                "relative_error": worst,
            }
        )
    return out


def once(function, qkv: torch.Tensor, grad: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(milliseconds of forward and backward, result)."""
    qkv.grad = None
    if qkv.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function(qkv)
    result.backward(grad)
    if qkv.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3, result.detach()


def page(record: dict) -> str:
    """The record as a page to read."""
    m, runs = record["machine"], len(record["rows"][0]["samples_ms"]["sdpa"]) - 2
    lines = [
        f"# {record['what']}",
        "",
        f"{record['date']}, {m['gpu'] or m['cpu']}, {m['threads']} CPU threads, torch {m['torch']}. "
        f"Median of {runs} interleaved runs after two warm-ups, head_dim 64.",
        "",
        "```",
        record["command"],
        "```",
        "",
        "| dtype | rows x tokens x heads | sdpa ms | reference ms | sdpa / reference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        a, b = r["ms"]["sdpa"], r["ms"]["reference"]
        shape = f"{r['rows']} x {r['n']} x {r['heads']}"
        lines.append(f"| {r['dtype']} | {shape} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    return "\n".join(lines) + "\n"
