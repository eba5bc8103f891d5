"""Does a run that collapses say so, and does a run that learns stay silent?

Trains a small encoder on the built-in photographs with settings that collapse and with the recipes of the presets, by
the product's own `pretrain`, and notes the first warning of collapse. Minutes of one CPU thread:

python -m benchmarks collapse --name collapse

One that was cut off goes on with the settings that are left, on the same day.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

from extrema_fast.config import Config, from_dict, nested, preset, typed
from extrema_fast.errors import UsageError, install
from extrema_fast.files import read_json, read_log
from extrema_fast.train import pretrain

from . import harness

# a warning counts up to this step
IN_TIME = 200
CURVES = "curves.png"
COLORS = {"collapses": "#c0392b", "healthy": "#2a78d6", "not counted": "#888888"}

# what all have in common: 67 steps per epoch, 268 in all
SMALL: dict[str, Any] = {
    "data.train": "photos",
    "data.test": "",
    "data.limit": 0,
    "data.threads": 1,
    "data.resident": "host",
    "mask.views": 5,
    "mask.keep": 3,
    "model.img_size": (32, 32),
    "model.patch_size": 8,
    "model.width": 64,
    "model.depth": 2,
    "model.heads": 2,
    "head.hidden": 128,
    "head.out": 64,
    "head.predictor_hidden": 128,
    "optim.warmup_epochs": 0.5,
    "train.epochs": 4,
    "train.batch_size": 32,
    "train.precision": "fp32",
    "ckpt.every_epochs": 0,
    "ckpt.every_steps": 0,
    "ckpt.milestone_epochs": 0,
    "eval.every_epochs": 4,
    "eval.max_train": 1080,
    "eval.max_test": 540,
    "log.every_steps": 20,
    "log.report": False,
    "system.threads": 1,
}


class Setting(NamedTuple):
    """One run: what `base` (a preset) is changed by after `SMALL`, and whether its outputs collapse.

    None: it fails in another way, and is shown without being counted.
    """

    name: str
    base: str
    collapses: bool | None
    changes: dict[str, Any]


BYOL = {"head.loss": "byol"}
# a rate that BYOL with a slow teacher bears here: peak 1.4e-4; the paper's, with the root of the batch, is 1.5e-4
GENTLE = {"optim.base_lr": 1.1e-3}
SETTINGS = [
    Setting("photos", "photos", False, {}),
    Setting("cifar10", "cifar10", False, {}),
    Setting("own", "own", False, {}),
    Setting("smoke", "smoke", False, {"data.policy": "spatial+color"}),
    Setting("paper_base_80x5", "paper_base_80x5", False, {"optim.base_lr": 1.2e-3}),
    Setting(
        "paper_base_90x8",
        "paper_base_90x8",
        False,
        {"optim.base_lr": 1.2e-3, "mask.views": 8, "mask.keep": 2},
    ),
    Setting("paper_large_80x5, layer scale 1e-5", "paper_large_80x5", False, {"optim.base_lr": 1.2e-3}),
    Setting("InfoNCE, layer scale 1e-5", "photos", False, {"model.layer_scale": 1e-5}),
    Setting("InfoNCE, rate x 30", "photos", None, {"optim.base_lr": 0.168}),
    Setting("BYOL, EMA .99, rate 1.4e-4", "photos", False, BYOL | GENTLE | {"optim.momentum": 0.99}),
    Setting("BYOL, EMA 0, rate 1e-3", "photos", True, BYOL | {"optim.momentum": 0.0, "optim.base_lr": 8e-3}),
    Setting(
        "BYOL, EMA 0, rate 4e-3", "photos", True, BYOL | {"optim.momentum": 0.0, "optim.base_lr": 3.2e-2}
    ),
    Setting("BYOL, EMA .9, rate 2e-2", "photos", True, BYOL | {"optim.momentum": 0.9, "optim.base_lr": 0.16}),
    Setting(
        "BYOL, EMA .99, rate 2e-2", "photos", True, BYOL | {"optim.momentum": 0.99, "optim.base_lr": 0.16}
    ),
    Setting(
        "BYOL, predictor of one unit",
        "photos",
        True,
        BYOL | GENTLE | {"optim.momentum": 0.99, "head.predictor_hidden": 1},
    ),
    Setting("InfoNCE, predictor of one unit", "photos", True, {"head.predictor_hidden": 1}),
]


def config(setting: Setting, seed: int, out: Path) -> Config:
    """The run of a setting; it has all of a preset's settings that its size allows."""
    base = dataclasses.replace(preset(setting.base), out=str(out))
    return from_dict(nested(typed({**SMALL, **setting.changes, "train.seed": seed})), base)


def main(argv: list[str]) -> int:
    """Runs settings that collapse and settings that do not; notes when each is warned of."""
    p = harness.parser("collapse", main.__doc__, timed=False)
    p.add_argument("--only", nargs="+", default=[], help="beginnings of the names of settings")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--runs", type=Path, default=Path("runs/collapse"), help="where the run folders go")
    args = p.parse_args(argv)
    chosen = [s for s in SETTINGS if not args.only or s.name.startswith(tuple(args.only))]
    chosen = chosen[-1:] if args.quick else chosen
    if args.list:
        print("\n".join(f"  {s.name}" for s in chosen))
        return 0
    if not chosen:
        raise UsageError(f"--only {' '.join(args.only)}: no setting begins so; --list shows them")
    record = harness.new_record("collapse: what is warned of, and when", "collapse", argv, args.note, rows=[])
    # one that was cut off, on the same day
    before = read_json(harness.record_folder(record, args) / "record.json", {})
    done = {r["key"]: r for r in before.get("rows", [])} if "unfinished" in before else {}
    for i, setting in enumerate(chosen):
        row = done.get(setting.name) or run(setting, args.seed, args.runs / f"{i:02d}")
        record["rows"].append(row)
        harness.save_record(record, args, f"{len(chosen) - i - 1} of {len(chosen)} settings")
    record["headline"] = headline(record["rows"])
    folder = harness.save_record(record, args)
    page = [record["headline"] + ".", table(record["rows"])]
    if draw(record["rows"], folder / CURVES):
        page.append(f"![spread and directions of the targets over steps]({CURVES})")
    harness.write_record(record, page, args)
    return int(any(r["right"] is False for r in record["rows"]))


def run(setting: Setting, seed: int, out: Path) -> dict[str, Any]:
    """Trains one setting; returns its checks of outputs, evaluations and warnings of collapse."""
    began = time.process_time()
    pretrain(config(setting, seed, out), overwrite=True, progress=False)
    log = read_log(out / "log.jsonl")
    checks, evals = ([r for r in log if r["kind"] == kind] for kind in ("spread", "eval"))
    told = [
        (r["step"], r["text"]) for r in log if r["kind"] == "warning" and "wait for images" not in r["text"]
    ]
    step = told[0][0] if told else None
    in_time = step is not None and step <= IN_TIME
    expected, right = {
        True: ("collapses", in_time),
        False: ("healthy", not told),
        None: ("not counted", None),
    }[setting.collapses]
    names = ("prediction_spread", "prediction_dims", "target_spread", "target_dims")
    return {
        "key": setting.name,
        "preset": setting.base,
        "changes": setting.changes,
        "expected": expected,
        "warned_at": step,
        "right": right,
        "knn": [100 * r["knn_cls"] for r in evals],
        "rank": [r["teacher_rank"] for r in evals],
        "ends": {n: [checks[0][n], sum(r[n] for r in checks[-3:]) / 3] for n in names},
        "steps": [r["step"] for r in checks],
        "checks": {n: [r[n] for r in checks] for n in names},
        "warnings": [f"step {s}: {text}" for s, text in told],
        "cpu_s": round(time.process_time() - began, 1),
    }


def headline(rows: list[dict[str, Any]]) -> str:
    """How many of both kinds are told apart."""
    bad, good = ([r for r in rows if r["expected"] == kind] for kind in ("collapses", "healthy"))
    return (
        f"{sum(r['right'] for r in bad)} of {len(bad)} settings that collapse are warned of within {IN_TIME} steps, "
        f"{sum(not r['right'] for r in good)} of {len(good)} others are"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A line per setting."""

    def ends(row: dict[str, Any]) -> dict[str, Any]:
        out = {f"{n}_{end}": v for n, both in row["ends"].items() for end, v in zip("ab", both, strict=True)}
        return {**row, **out, "knn_a": row["knn"][0], "knn_b": row["knn"][-1]}

    return harness.columns(
        map(ends, rows),
        "setting=key",
        "outputs=expected",
        "warned at step=warned_at",
        "spread of targets, step 1=target_spread_a:.3f",
        "at the end=target_spread_b:.3f",
        "directions, step 1=target_dims_a:.2f",
        "at the end=target_dims_b:.2f",
        "k-NN, step 0=knn_a:.1f",
        "at the end=knn_b:.1f",
    )


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """Curves of the targets' spread and directions, a cross where the warning came; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        harness.say(f"no curves: matplotlib is not installed: {install('report')}")
        return False
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    titles = {"target_spread": "Spread of the targets", "target_dims": "Directions of the targets in use"}
    for ax, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row in rows:
            color = COLORS[row["expected"]]
            ax.plot(row["steps"], row["checks"][key], color=color, linewidth=1.2, alpha=0.8)
            if row["warned_at"] in row["steps"]:
                at = row["steps"].index(row["warned_at"])
                ax.plot(row["warned_at"], row["checks"][key][at], "x", color=color, markersize=8)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
    handles = [(figure.axes[0].plot([], [], color=c)[0], n) for n, c in COLORS.items()]
    figure.axes[0].legend(*zip(*handles, strict=True), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    return True
