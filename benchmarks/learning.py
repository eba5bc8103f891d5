"""Does it learn? Pretrains a preset over several seeds and compares with the random encoder and raw pixels.

Each seed is its own process running the product's own commands, so a record shows what a user would get:

    python -m benchmarks learning photos --seeds 0 1 2 --name photos_infonce
    python -m benchmarks learning photos --seeds 0 --name photos_byol -- --head.loss byol --optim.base-lr 2e-3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from .records import machine, write_record


def main(argv: list[str]) -> int:
    """Pretrains and evaluates a preset over seeds; writes records/<date>_<machine>_<name>/."""
    ours, _, overrides = (argv, [], []) if "--" not in argv else (
        argv[: argv.index("--")], None, argv[argv.index("--") + 1 :]
    )  # fmt: skip
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning", description=main.__doc__)
    parser.add_argument("preset", nargs="?", default="photos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="", help="name of the record (default: the preset)")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where the run folders go")
    parser.add_argument("--max-train", type=int, default=0, help="images of the evaluation's training part")
    parser.add_argument("--max-test", type=int, default=0)
    parser.add_argument("--note", default="", help="a line for the record's page")
    args = parser.parse_args(ours)
    name = args.name or args.preset
    limits = [f"--max-{part}={n}" for part, n in (("train", args.max_train), ("test", args.max_test)) if n]
    runs = [run(args.preset, s, args.runs / f"{name}-seed{s}", overrides, limits) for s in args.seeds]
    record = {
        "what": f"learning: {args.preset}",
        "command": "python -m benchmarks learning " + " ".join(argv),
        "date": date.today().isoformat(),
        "note": args.note,
        "machine": machine(),
        "overrides": overrides,
        "summary": summary(runs),
        "runs": runs,
    }
    write_record(record, page(record), name)
    return 0


def run(preset: str, seed: int, out: Path, overrides: list[str], limits: list[str]) -> dict:
    """One seed: pretrain, evaluate; wall-clock seconds of both, and the evaluation."""
    program = [sys.executable, "-m", "extrema_fast"]
    started = time.perf_counter()
    # an earlier run of the same name is moved aside, so that the time is that of a whole run
    subprocess.run(
        [
            *program,
            "pretrain",
            preset,
            "--out",
            str(out),
            "--train.seed",
            str(seed),
            *overrides,
            "--overwrite",
        ],
        check=True,
    )
    trained = time.perf_counter()
    subprocess.run([*program, "evaluate", str(out), *limits], check=True)
    done = time.perf_counter()
    result = json.loads((out / "reports" / "evaluation.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed,
        "pretrain_s": round(trained - started, 1),
        "evaluate_s": round(done - trained, 1),
        "config": json.loads((out / "config.json").read_text(encoding="utf-8")),
        "evaluation": result,
        "curve": [r for r in log if r.get("kind") == "eval"],
    }


def rows_of(run: dict) -> dict[tuple[str, str], dict]:
    """{(encoder, feature): row} of one run's evaluation."""
    return {(r["encoder"], r["feature"]): r for r in run["evaluation"]["rows"]}


def summary(runs: list[dict]) -> dict:
    """Mean, sample deviation and values over seeds; per encoder and feature, and as gain over random init."""
    out: dict[str, dict] = {}

    def add(key: str, values: list[float]) -> None:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        out[key] = {"mean": statistics.mean(values), "stdev": spread, "values": values}

    tables = [rows_of(r) for r in runs]
    for encoder, feature in tables[0]:
        for metric in ("knn", "probe"):
            add(f"{metric} | {encoder} | {feature}", [t[encoder, feature][metric] for t in tables])
            if encoder == "pretrained":
                gains = [t[encoder, feature][metric] - t["random init", feature][metric] for t in tables]
                add(f"{metric} | gain over random init | {feature}", gains)
    add("seconds | pretrain", [r["pretrain_s"] for r in runs])
    add("seconds | evaluate", [r["evaluate_s"] for r in runs])
    return out


def page(record: dict) -> str:
    """The record as a page to read."""
    m, seeds = record["machine"], ", ".join(str(r["seed"]) for r in record["runs"])
    lines = [
        f"# {record['what']}",
        "",
        f"{record['date']}, {m['gpu'] or m['cpu']}, {m['threads']} CPU threads, torch {m['torch']}, "
        f"Python {m['python']}, extrema-fast {m['extrema_fast']}.",
        "",
        *([record["note"], ""] if record["note"] else []),
        "```",
        record["command"],
        "```",
        "",
        f"Mean ± sample deviation over seeds {seeds}; accuracies in %.",
        "",
        "| quantity | mean | ± | each seed |",
        "| --- | --- | --- | --- |",
    ]
    for key, s in record["summary"].items():
        factor = 1 if key.startswith("seconds") else 100
        each = ", ".join(f"{v * factor:.1f}" for v in s["values"])
        label = key.replace(" | ", ", ")
        lines.append(f"| {label} | {s['mean'] * factor:.1f} | {s['stdev'] * factor:.1f} | {each} |")
    return "\n".join(lines) + "\n"
