"""Does it learn? Pretrains a preset over several seeds and compares with the random encoder and raw pixels.

Each seed is its own process running the product's own commands, so a record shows what a user would get:

    python -m benchmarks learning photos --seeds 0 1 2 --name photos_infonce
    python -m benchmarks learning photos --seeds 0 --name photos_byol -- --head.loss byol --optim.base-lr 2e-3
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .records import heading, new_record, parser, write_record
from .tables import Page, Table


def main(argv: list[str]) -> int:
    """Pretrains and evaluates a preset over seeds; writes records/<date>_<machine>_<name>/."""
    ours, _, overrides = (argv, [], []) if "--" not in argv else (
        argv[: argv.index("--")], None, argv[argv.index("--") + 1 :]
    )  # fmt: skip
    p = parser("learning", main.__doc__)
    p.add_argument("preset", nargs="?", default="photos")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where the run folders go")
    p.add_argument("--max-train", type=int, default=0, help="images of the evaluation's training part")
    p.add_argument("--max-test", type=int, default=0)
    # the record's name follows the preset
    p.set_defaults(name="")
    args = p.parse_args(ours)
    preset, seeds = ("smoke", [0]) if args.quick else (args.preset, args.seeds)
    if args.list:
        print(f"  {preset}, seeds {seeds}, {' '.join(overrides) or 'no overrides'}")
        return 0
    name = args.name or preset
    limits = [f"--max-{part}={n}" for part, n in (("train", args.max_train), ("test", args.max_test)) if n]
    runs = [run(preset, s, args.runs / f"{name}-seed{s}", overrides, limits) for s in seeds]
    record = new_record(
        f"learning: {preset}",
        "learning",
        argv,
        args.note,
        overrides=overrides,
        summary=summary(runs),
        runs=runs,
    )
    write_record(record, page(record), name, args.out)
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


def page(record: dict) -> Page:
    """The record to read."""
    rows = []
    for key, s in record["summary"].items():
        factor = 1 if key.startswith("seconds") else 100
        each = ", ".join(f"{v * factor:.1f}" for v in s["values"])
        rows.append(
            [key.replace(" | ", ", "), f"{s['mean'] * factor:.1f}", f"{s['stdev'] * factor:.1f}", each]
        )
    seeds = ", ".join(str(r["seed"]) for r in record["runs"])
    return [
        *heading(record),
        f"Mean ± sample deviation over seeds {seeds}; accuracies in %.",
        Table(["quantity", "mean", "±", "each seed"], rows),
    ]
