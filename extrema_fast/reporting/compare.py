"""One self-contained HTML page that compares several runs: results, overlaid curves, differing settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..config import Config, FinetuneConfig
from ..errors import UsageError
from ..evaluation.result import CLS, MEAN, PRETRAINED, RANDOM, TOKENS, result_id, summaries
from ..files import read_text, write_file
from ..progress import duration
from .figures import Series, line_chart
from .record import Record, RunRecord, all_options, curve, identity, read_run, seconds
from .report import render, row_of

# twice the colors of a chart: full and dashed lines
MOST = 12
COLORS = 6
# in a page of this file, which alone is replaced
MADE = "<!-- extrema_fast comparison -->"
X = Literal["step", "epoch", "minutes"]


def compare(run_dirs: Sequence[str | Path], out: str | Path = "comparison.html") -> Path:
    """Writes a page that compares runs, finished or not.

    Args:
        run_dirs: Run folders, 2 to `MOST`.
        out: The file; an earlier comparison is replaced.

    Returns:
        Its path.

    Raises:
        UsageError: not two runs, too many, one twice, a folder that is no run, another file in `out`.
    """
    path = Path(out)
    folders = [Path(d).resolve() for d in run_dirs]
    if twice := [d for d, f in zip(run_dirs, folders, strict=True) if folders.count(f) > 1]:
        raise UsageError(f"{twice[0]}: named twice; name different runs")
    if not 2 <= len(folders) <= MOST:
        raise UsageError(f"compare: expected 2 to {MOST} runs, got {len(folders)}")
    _check_target(path)
    runs = [read_run(d) for d in run_dirs]
    names = _names(folders)
    keys = [{"name": n, "color": i % COLORS, "dashed": i >= COLORS} for i, n in enumerate(names)]
    html = render(
        "compare.html.j2",
        made=MADE,
        runs=keys,
        rows=[_results(run) for run in runs],
        tuned=any(isinstance(run.cfg, FinetuneConfig) for run in runs),
        more=_more(runs),
        notes=_notes(runs),
        charts={x: _charts(runs, names, x) for x in get_args(X)},
        changes=_different(runs),
        identities=[identity(run) for run in runs],
    )
    write_file(path, (html + "\n").encode("utf-8", "replace"))
    return path


def _check_target(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"--out {path}: is no plain file; nothing was touched, choose another --out")
    if path.exists() and MADE not in read_text(path, errors="replace"):
        raise UsageError(
            f"--out {path}: was not written by compare; nothing was touched, choose another --out"
        )


def _names(folders: Sequence[Path]) -> list[str]:
    """The runs' names; as much of their paths as tells them apart where two are equal."""
    names = [f.name for f in folders]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(folders))
    return [str(f.relative_to(common)) for f in folders]


def _different(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """{option: [value per run]} of what is not the same in all that have it; None: a run of the other kind."""
    # `auto` precision differs between machines
    all_ = [all_options(run.cfg) | {"train.precision": run.precision} for run in runs]
    found = {k: [a[k] for a in all_ if k in a] for k in dict.fromkeys(k for a in all_ for k in a)}
    names = [k for k, values in found.items() if k != "out" and any(v != values[0] for v in values)]
    return {k: [a.get(k) for a in all_] for k in names}


def _more(runs: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """{evaluation and metric: [value per run]} of what was measured besides the run's own evaluation."""
    others = {result_id(result) for run in runs for result in run.more}
    # the run's own evaluation, too, where another run has it as one of these
    shown = [[r for r in (*run.more, run.result) if r and result_id(r) in others] for run in runs]
    lines = iter(summaries([result for of_run in shown for result in of_run]))
    names: dict[tuple[str, str], str] = {}
    found: list[dict[tuple[str, str], str]] = []
    for of_run in shown:
        values, steps = dict[tuple[str, str], str](), dict[str, int]()
        for result in of_run:
            line, of, step = next(lines), result_id(result), result["step"] or 0
            # of the same evaluation that of the last step
            if step < steps.get(of, 0):
                continue
            steps[of] = step
            # which feature is best differs from run to run
            feature = "" if line["feature"] in (CLS, TOKENS) else f", {line['feature']}"
            for v in line["scores"].values():
                names.setdefault((of, v["title"]), f"{line['what']}: {v['title']}")
                values[of, v["title"]] = v["text"] + feature
        found.append(values)
    return {name: [of_run.get(row) for of_run in found] for row, name in names.items()}


def _notes(runs: Sequence[RunRecord]) -> list[str]:
    """What cannot be compared."""
    notes = [
        f"{run.name}: its final evaluation is of step {run.result['step']:,}, the run is at step {run.step:,} now."
        for run in runs
        if run.result.get("step") not in (None, run.step)
    ]
    if len({_loss(run.cfg) for run in runs}) > 1:
        notes.append("The runs have different losses, whose values say nothing about one another.")
    tests = {(r.cfg.data.test or r.cfg.data.train, r.cfg.data.holdout, r.cfg.eval.max_test) for r in runs}
    rules = {(r.cfg.eval.k, r.cfg.eval.temperature, r.cfg.eval.max_train) for r in runs}
    results = [r.result for r in runs if r.result]
    # of what was at one path at different times, too
    hashes = {r["images"]["test"] for r in results if "images" in r}
    if len(tests) > 1 or len(hashes) > 1:
        notes.append("The runs are evaluated on different test images: their accuracies cannot be compared.")
    elif len(rules) > 1:
        notes.append(
            "k-NN follows different rules (eval.*): small differences in accuracy may come from that."
        )
    if len({(r.get("crop_pct"), r.get("interpolation")) for r in results}) > 1:
        notes.append(
            "Final evaluations resize images by different rules (crop fraction): differences may come from that."
        )
    if len({(r.env.get("gpu") or r.env.get("device"), r.env.get("host")) for r in runs}) > 1:
        notes.append(
            "The runs were made on different machines: images per second and minutes tell of these, too."
        )
    return notes


def _loss(cfg: Config) -> tuple[Any, ...]:
    """What the values of a training loss depend on."""
    if isinstance(cfg, FinetuneConfig):
        return cfg.tune.smoothing, cfg.tune.mixup, cfg.tune.cutmix
    h = cfg.head
    return h.loss, h.targets, h.temperature * (h.loss == "infonce"), h.queue, h.decorrelation


def _results(run: RunRecord) -> Record:
    """A row of the table of results; None: not known."""
    known = [r for r in run.evals if r.get("knn_cls") is not None]
    losses = [r["loss"] for r in run.train if r.get("loss") is not None]
    speeds = [r["images_per_s"] for r in run.train if r.get("images_per_s")]
    spent = seconds(run.train)[-1:]
    row, random = (row_of(run.result, encoder, CLS) for encoder in (PRETRAINED, RANDOM))
    memory = [r["memory_gb"] for r in run.train if r.get("memory_gb")]
    return {
        "state": str(run.status.get("state", "unknown")),
        "step": run.step,
        "total": run.status.get("total_steps"),
        "knn": known[-1]["knn_cls"] if known else None,
        "start": known[0]["knn_cls"] if known and known[0]["step"] == 0 else None,
        "final_knn": row.get("knn"),
        "random_knn": random.get("knn"),
        "probe": row.get("probe"),
        "random_probe": random.get("probe"),
        "accuracy": run.classified.get("accuracy"),
        "loss": losses[-1] if losses else None,
        "images_per_s": float(np.median(speeds)) if speeds else None,
        "time": duration(spent[0]) if spent else None,
        "memory_gb": max(memory) if memory else None,
    }


_CHARTS: list[tuple[str, str, str, dict[str, bool]]] = [
    (f"k-NN accuracy, {CLS}", "eval", "knn_cls", {"percent": True}),
    (f"k-NN accuracy, {MEAN}", "eval", "knn_mean", {"percent": True}),
    ("Test accuracy", "eval", "accuracy", {"percent": True}),
    ("Loss", "train", "loss", {}),
    ("Effective rank of class tokens", "eval", "teacher_rank", {}),
    ("Learning rate", "train", "lr", {"zero": True}),
    ("Images per second", "train", "images_per_s", {"zero": True}),
]


def _charts(runs: Sequence[RunRecord], names: Sequence[str], x: X) -> list[Record]:
    drawn = []
    for title, kind, key, options in _CHARTS:
        series = [
            Series(name, curve(run, kind, key, x), i % COLORS, i >= COLORS)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        svg = line_chart(f"{title} by {x}", series, xlabel=x, **options)
        drawn.append({"title": title, "svg": svg, "note": ""})
    return [d for d in drawn if d["svg"]]
