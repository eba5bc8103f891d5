"""Does it learn? Pretrains a preset over several seeds and compares with the random encoder and raw pixels.

Each seed is its own process running the product's own commands, so a record shows what a user would get:

python -m benchmarks learning photos --seeds 0 1 2 --name photos_infonce -- --system.threads 1

A search tries the settings of a file, one line of options each (`#` begins a comment), and adds a row to its record
after each run. Lines added meanwhile follow; started again on the same day, it continues with those that have none:

python -m benchmarks learning photos --seeds 0 --settings FILE --name photos_search -- --system.threads 1

With `--init-from` each seed is trained twice in turn, from random weights and from those, as long. Processor seconds
stand beside those of the clock: other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extrema_fast.files import read_json

from . import harness

# row of the table -> field of a run
SECONDS = {
    "seconds | pretrain": "pretrain_s",
    "processor seconds | pretrain": "pretrain_cpu_s",
    "seconds | evaluate": "evaluate_s",
}


def main(argv: list[str]) -> int:
    """Pretrains and evaluates a preset over seeds; options of `pretrain` follow after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    overrides = argv[split + 1 :]
    p = harness.parser("learning", main.__doc__, timed=False)
    p.add_argument("preset", nargs="?", default="photos")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where the run folders go")
    p.add_argument("--init-from", type=Path, help="weights that every seed also begins from")
    p.add_argument(
        "--settings", type=Path, help="a file with options of `pretrain`, one try a line: a search"
    )
    p.add_argument("--max-train", type=int, default=0, help="training images of the evaluation (0: all)")
    p.add_argument("--max-test", type=int, default=0)
    args = p.parse_args(argv[:split])
    preset, seeds = ("smoke", [0]) if args.quick else (args.preset, args.seeds)
    args.name = preset if args.name == "learning" else args.name
    if args.list:
        print(f"  {preset}, seeds {seeds}, {' '.join(overrides) or 'no overrides'}")
        return 0
    limits = [f"--max-{name}={n}" for name, n in (("train", args.max_train), ("test", args.max_test)) if n]
    if args.settings:
        return search(preset, seeds, overrides, limits, args, argv)
    record = harness.new_record(f"learning: {preset}", "learning", argv, args.note, overrides=overrides)
    runs, begun = [], []
    for s in seeds:
        out = args.runs / f"{args.name}-seed{s}"
        runs.append(run(preset, s, out, overrides, limits))
        if args.init_from:
            begin = [*overrides, "--init-from", str(args.init_from)]
            begun.append(run(preset, s, out.with_name(f"{out.name}-begun"), begin, limits))
        # also when later seeds are cut off
        text = page(record, runs, begun)
        record |= {"runs": runs, **({"begun": begun} if begun else {})}
        harness.write_record(record, text, args)
    return 0


def page(record: dict[str, Any], runs: list[dict[str, Any]], begun: list[dict[str, Any]]) -> list[str]:
    """Adds the summary of the runs to their record; returns the paragraphs of its page."""
    found = summary(runs)
    if begun:
        found |= gains(
            found, {k: v for k, v in summary(begun).items() if "random init" not in k and "raw" not in k}
        )
    record["summary"] = found
    record["headline"] = "; ".join(
        f"{name}k-NN {found[f'{key}knn | pretrained | class token']['mean']:.1%}, "
        f"probe {found[f'{key}probe | pretrained | class token']['mean']:.1%}"
        for name, key in {"": "", "begun from weights ": "begun | "}.items()
        if not key or begun
    )
    seeds = [r["seed"] for r in runs]
    text = f"Mean and standard deviation over seeds {seeds}; accuracies are shares of the test images."
    lines = [
        {"key": k} | s | {"values": ", ".join(f"{v:.3f}" for v in s["values"])} for k, s in found.items()
    ]
    return [
        text,
        harness.columns(lines, "quantity=key", "mean=mean:.3f", "deviation=stdev:.3f", "each seed=values"),
    ]


def search(
    preset: str,
    seeds: list[int],
    overrides: list[str],
    limits: list[str],
    args: argparse.Namespace,
    argv: list[str],
) -> int:
    """Tries every line of `args.settings` that has no row yet; the record is whole after each run."""
    record = harness.new_record(f"learning: search for {preset}", "learning", argv, args.note)
    record |= {"overrides": overrides, "rows": []}
    begun = read_json(harness.record_folder(record, args) / "record.json", {})
    record["rows"] = begun.get("rows", [])
    while wanted := next(untried(args.settings, seeds, record["rows"]), None):
        settings, s = wanted
        out = args.runs / f"{args.name}-{len(record['rows']):03d}"
        done = run(preset, s, out, [*overrides, *shlex.split(settings)], limits)
        record["rows"].append({"settings": settings, **row(done)})
        k, p = ([r[f"cls_{metric}"]["pretrained"] for r in record["rows"]] for metric in ("knn", "probe"))
        record["headline"] = f"runs: {len(k)}; k-NN at most {max(k):.1f}%, probe at most {max(p):.1f}%"
        harness.write_record(record, [table(record["rows"])], args)
    return 0


def untried(file: Path, seeds: list[int], rows: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """(options, seed) without a row: all lines of a seed before the next seed."""
    tried = {(r["settings"], r["seed"]) for r in rows}
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    yield from ((line, s) for s in seeds for line in filter(None, lines) if (line, s) not in tried)


def row(done: dict[str, Any]) -> dict[str, Any]:
    """One run of a search: seconds, accuracies of both features, spread of the class token at both ends, curve."""
    found: dict[str, Any] = {"seed": done["seed"], "steps": done["evaluation"]["step"]}
    found |= {key: done[key] for key in ("pretrain_cpu_s", "pretrain_s")}
    rows = {(r["encoder"], r["feature"]): r for r in done["evaluation"]["rows"]}
    for name, feature in (("cls", "class token"), ("mean", "mean of patches")):
        for metric in ("knn", "probe"):
            first, last = (100 * rows[e, feature][metric] for e in ("random init", "pretrained"))
            found[f"{name}_{metric}"] = {"random": first, "pretrained": last, "gain": last - first}
    first, last = done["curve"][0], done["curve"][-1]
    for key in ("std", "rank", "cosine"):
        found[key] = {"first": first[f"teacher_{key}"], "last": last[f"teacher_{key}"]}
        found[f"projection_{key}"] = {
            "first": first[f"teacher_proj_{key}"],
            "last": last[f"teacher_proj_{key}"],
        }
    return found | {"curve": [{k: r.get(k) for k in CURVE} for r in done["curve"]]}


CURVE = ("epoch", "knn_cls", "knn_mean", "teacher_std", "teacher_rank", "teacher_cosine", "teacher_proj_std")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of a search, accuracies in percent."""
    both = "={0}.random:.1f", "={0}.pretrained:.1f", "={0}.gain:+.1f"
    accuracies = [
        f"{title}{spec.format(field)}"
        for title, field in (("k-NN", "cls_knn"), ("probe", "cls_probe"))
        for title, spec in zip((f"{title} random", title, "gain"), both, strict=True)
    ]
    text = (
        "One run a row, accuracies of the class token in %; std, rank and cosine of it at the end of the run."
    )
    return f"{text}\n\n" + harness.columns(
        [*rows, *means(rows)],
        "settings=settings",
        "seed=seed",
        "steps=steps",
        "processor s=pretrain_cpu_s:.0f",
        *accuracies,
        "patches, k-NN gain=mean_knn.gain:+.1f",
        "std=std.last:.2f",
        "rank=rank.last:.1f",
        "cosine=cosine.last:.3f",
    )


def means(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row of means for every line of settings that more than one seed has tried."""
    for settings in dict.fromkeys(r["settings"] for r in rows):
        same = [r for r in rows if r["settings"] == settings]
        if len(same) > 1:
            yield {"settings": settings, "seed": f"mean of {len(same)}"} | {
                key: {k: statistics.mean(r[key][k] for r in same) for k in value}
                if isinstance(value, dict)
                else statistics.mean(r[key] for r in same)
                for key, value in same[0].items()
                if key not in ("settings", "seed", "curve")
            }


def run(preset: str, seed: int, out: Path, overrides: list[str], limits: list[str]) -> dict[str, Any]:
    """Pretrains and evaluates one seed; returns seconds of both, the evaluation, the curve and what it began from."""
    program = [sys.executable, "-m", "extrema_fast"]
    # an earlier run of the same name is moved aside, so that the time is that of a whole run
    train = ["pretrain", preset, "--out", str(out), "--train.seed", str(seed), *overrides, "--overwrite"]
    began, cpu_began = time.perf_counter(), cpu_seconds()
    subprocess.run([*program, *train], check=True)
    trained, cpu_trained = time.perf_counter(), cpu_seconds()
    # with limits it has a name of its own
    found = out / "reports" / "learning.json"
    subprocess.run([*program, "evaluate", str(out), "--out", str(found), *limits], check=True)
    done = time.perf_counter()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed,
        "pretrain_s": round(trained - began, 1),
        "pretrain_cpu_s": round(cpu_trained - cpu_began, 1),
        "evaluate_s": round(done - trained, 1),
        "config": json.loads((out / "config.json").read_text(encoding="utf-8")),
        "evaluation": json.loads(found.read_text(encoding="utf-8")),
        "curve": [r for r in log if r.get("kind") == "eval"],
        "init_from": json.loads((out / "env.json").read_text(encoding="utf-8")).get("init_from"),
    }


def cpu_seconds() -> float:
    """Processor time of the ended processes that this one has started."""
    times = os.times()
    return times.children_user + times.children_system


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns mean, standard deviation and values over seeds per encoder and feature, and the gain over random init."""
    values: dict[str, list[float]] = {}
    for run in runs:
        rows = {(r["encoder"], r["feature"]): r for r in run["evaluation"]["rows"]}
        for (encoder, feature), row in rows.items():
            for metric in ("knn", "probe"):
                values.setdefault(f"{metric} | {encoder} | {feature}", []).append(row[metric])
                if encoder == "pretrained":
                    gain = row[metric] - rows["random init", feature][metric]
                    values.setdefault(f"{metric} | gain over random init | {feature}", []).append(gain)
        for key, field in SECONDS.items():
            values.setdefault(key, []).append(run[field])
    return {key: spread(v) for key, v in values.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "stdev": deviation, "values": values}


def gains(scratch: dict[str, dict[str, Any]], begun: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The summary of runs that begin from given weights, and their gain over those that do not, seed by seed."""
    found = {f"begun | {key}": value for key, value in begun.items()}
    for key, value in begun.items():
        pairs = zip(value["values"], scratch[key]["values"], strict=True)
        found[f"begun, gain | {key}"] = spread([a - b for a, b in pairs])
    return found
