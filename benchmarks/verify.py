"""Correctness of everything that is timed; nothing is timed here.

python -m benchmarks verify [--device cuda] [--model small]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from extrema_fast.kernels._spec import OPS, spec
from extrema_fast.kernels.tune import is_correct

from extrema_fast.config import Config
from extrema_fast.distributed import pick_device

from . import attention, encoders
from .gates import Gate, exact
from .providers import chosen, configuration
from .rates import DTYPES
from .tables import Table, show
from .worker import whole_fp32

TINY = {"img_size": [48, 64], "patch_size": 8, "width": 64, "depth": 2, "heads": 2}
TINY_HEAD = {"hidden": 48, "out": 24, "predictor_hidden": 40}


def main(argv: list[str]) -> int:
    """Runs the checks of every provider of the step and every op; 1 when one fails."""
    p = argparse.ArgumentParser(prog="python -m benchmarks verify", description=main.__doc__)
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--model", choices=("tiny", "small", "base", "large"), help="a real size (default: a tiny one)"
    )
    p.add_argument("--released-code", default="", metavar="PATH", help="also a checkout of microsoft/ExtreMA")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    size = args.model or ("small" if args.released_code else "")
    cfg = configuration(size, batch=2) if size else tiny()
    gates = [*steps(cfg, device, args.released_code), *ops(device), *attentions(device), *encodings(device)]
    show(
        [
            Table(
                ["checked", "passed", "found"],
                [[g.name, "yes" if g.passed else "NO", g.found] for g in gates],
            )
        ]
    )
    bad = [g.name for g in gates if not g.passed]
    print(f"{len(gates)} checks on {device}: " + (f"FAILED: {', '.join(bad)}" if bad else "all passed"))
    return 1 if bad else 0


def tiny(batch: int = 2) -> Config:
    """A model of seconds: 48 patches, not square, heads of 32."""
    return configuration("tiny", 0.8, 5, batch, model=TINY, head=TINY_HEAD)


def steps(cfg: Config, device: torch.device, released_code: str = "") -> list[Gate]:
    """fp32 loss and gradients of every provider of the step that runs here, without compilation."""
    whole_fp32(torch)
    able, _ = chosen(["all"], str(device))
    if released_code:
        able += chosen(["released"], str(device), released_code=released_code)[0]
    # options that change nothing without compilation are the same check twice
    seen, different = set(), []
    for p in able:
        identity = p.build, str(sorted(p.eager().options.items()))
        if p.family != "yardstick" and identity not in seen:
            seen.add(identity)
            different.append(p)
    with tempfile.TemporaryDirectory() as folder:
        return exact(different, cfg, device, Path(folder))


def ops(device: torch.device) -> Iterator[Gate]:
    """Every op of the project against its definition, forward and backward, in what the device multiplies."""
    gpu = device.type == "cuda"
    for name in OPS:
        for dtype in ("bf16", "fp32") if gpu else ("fp32",):
            worst, count = 0.0, 0
            for case in spec(name).cases(not gpu):
                args = case.make(device.type, DTYPES[dtype], torch.Generator(device).manual_seed(0))
                worst, count = max(worst, is_correct(case, args, DTYPES[dtype])[1]), count + 1
            yield Gate(
                f"op {name} {dtype}", worst <= 1, f"{count} shapes, largest error {worst:.2f} of the allowed"
            )


def attentions(device: torch.device) -> Iterator[Gate]:
    """Every self-attention backend that runs here against float64, forward and gradients."""
    for dtype in ("bfloat16", "float32"):
        # a backend is timed only when it is right, and a few calls are soon made
        rows = [
            attention.measure(attention.Shape("check", 8, n, 2), getattr(torch, dtype), mode, device, 2)
            for n in (19, 39, 196)
            for mode in ("train", "inference")
        ]
        for name in dict.fromkeys(name for row in rows for name in row["relative_error"]):
            mine = [row for row in rows if name in row["relative_error"]]
            worst = max(row["relative_error"][name] / row["limit"] for row in mine)
            wrong = any(name in row["wrong"] for row in mine)
            yield Gate(
                f"attention {name} {dtype}",
                not wrong,
                f"{len(mine)} shapes, largest error {worst:.2f} of the allowed",
            )


def encodings(device: torch.device) -> Iterator[Gate]:
    """Every encoder of `encode` that runs here, eager, dense and masked, against its definition in float64."""
    for p in encoders.PROVIDERS:
        if p.compiled or p.environment or p.missing(str(device)):
            continue
        for dtype in encoders.DTYPES:
            encoding = encoders.Encoding(p.name, "tiny", 48, 2, dtype, device)
            found = []
            for kept in (0, 1, 4):
                encoding.choose(kept)
                found.append(encoding.check())
            # a NaN is larger than any error
            worst = max((f["error_of"] for f in found), key=lambda e: (e != e, e))
            passed = all(f["error_of"] <= f["limit"] for f in found)
            yield Gate(f"encode {p.name} {dtype}", passed, f"off float64 by {worst:.1e}")
