"""One self-contained HTML file about a run: curves, results, pictures, configuration.

No scripts, no external files; charts are inline SVG, pictures inline PNG. Works on a run that is
unfinished or crashed: what cannot be shown is left out, with a note saying why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, flatten
from ..data.sources import open_source
from ..errors import UsageError
from ..evaluation.evaluate import CLS, MEAN, PIXELS, PRETRAINED, RANDOM, resolve_data, run_config
from ..files import read_json, write_file
from ..training.metrics import duration, read_log
from ..weights import load as convert
from . import pictures, svg
from .style import CSS
from .svg import Series, line_chart

log = logging.getLogger(__name__)

Record = dict[str, Any]


def report(run_dir: str | Path, *, images: int = 8) -> Path:
    """Writes `reports/report.html` of a run folder and returns its path.

    images   test images shown (0: no pictures)
    raises   UsageError when `run_dir` is not a run folder
    """
    folder = Path(run_dir)
    cfg = run_config(folder) if folder.is_dir() else None
    if cfg is None:
        raise UsageError(f"{run_dir}: not a run folder (no config.json of a run in it)")
    train, evals, warnings = tidy(read_log(folder / "log.jsonl"))
    result = read_json(folder / "reports" / "evaluation.json", {})
    status, env = read_json(folder / "status.json", {}), read_json(folder / "env.json", {})
    css, shown = _pictures(folder, cfg, images)
    name = folder.resolve().name
    body = [
        _header(name, status, env, train, evals, result),
        _section("Warnings", _warnings(warnings, result)),
        _section("Results", _results(result)),
        _section("Learning", _learning(train, evals, result)),
        _section("Is it collapsing?", _collapse(evals)),
        _section("Speed and optimisation", _speed(train)),
        shown,
        _section("Configuration", _table(flatten(cfg), open_=True)),
        _section("Environment", _table(flatten(env)) if env else _note("No env.json in the run folder.")),
    ]
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: extrema_fast report</title><style>{CSS}{svg.CSS}{css}</style></head>\n"
        f"<body><main>{chr(10).join(p for p in body if p)}"
        "<footer>Written by extrema_fast from log.jsonl and reports/evaluation.json.</footer>"
        "</main></body></html>\n"
    )
    path = folder / "reports" / "report.html"
    write_file(path, html)
    return path


def tidy(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """(train, eval, warning) records, ascending by step, each step once.

    A resumed run goes back to its checkpoint: what an earlier attempt logged from the later one's first
    step on did not lead to the present weights and is dropped.
    """
    start: dict[int, int] = {}
    for r in records:
        if isinstance(r.get("step"), int) and r.get("kind") == "train":
            attempt = int(r.get("attempt") or 0)
            start[attempt] = min(start.get(attempt, r["step"]), r["step"])
    out: dict[str, dict[Any, Record]] = {"train": {}, "eval": {}, "warning": {}}
    for r in records:
        kind, step = r.get("kind"), r.get("step")
        if kind not in out or not isinstance(step, int):
            continue
        attempt = int(r.get("attempt") or 0)
        # an evaluation at the step where the later attempt begins still belongs to its weights
        if any(a > attempt and (step >= s if kind == "train" else step > s) for a, s in start.items()):
            continue
        out[kind][(step, r.get("text"))] = r
    return tuple(sorted(found.values(), key=lambda r: r["step"]) for found in out.values())


# ---- words and tables -----------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    anchor = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _row(result: Record, encoder: str, feature: str) -> Record:
    return next((r for r in result.get("rows", []) if (r["encoder"], r["feature"]) == (encoder, feature)), {})


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _header(
    name: str, status: Record, env: Record, train: list[Record], evals: list[Record], result: Record
) -> str:
    state = status.get("state", "unknown")
    kind = {"complete": "good", "failed": "bad"}.get(state, "open")
    step = status.get("step", train[-1]["step"] if train else 0)
    total = status.get("total_steps")
    where = f"step {step:,}" + (f" of {total:,}" if total else "")
    if status.get("reason"):
        where += f"; {status['reason']}"
    device = env.get("gpu") or env.get("device")
    if device:
        where += f"; {device}" + (f", {env['world_size']} processes" if env.get("world_size", 1) > 1 else "")
    cards = []
    pixels = _row(result, PIXELS, "pixels")
    for key, title in (("knn", "k-NN accuracy"), ("probe", "linear probe accuracy")):
        ours, start = _row(result, PRETRAINED, CLS).get(key), _row(result, RANDOM, CLS).get(key)
        below = [f"random init {_percent(start)}", f"raw pixels {_percent(pixels.get(key))}"]
        if ours is None and key == "knn":
            curve = [r["knn_cls"] for r in evals if r.get("knn_cls") is not None]
            ours, start = (curve[-1], curve[0]) if curve else (None, None)
            below = [f"step 0: {_percent(start)}", "measured while training"]
        if ours is not None:
            gain = "" if start is None else f"{100 * (ours - start):+.1f} points over random init"
            cards.append(_card(title, _percent(ours), [gain, *below]))
    speeds = [r["images_per_s"] for r in train if r.get("images_per_s")]
    if speeds:
        cards.append(_card("images per second", f"{np.median(speeds):,.0f}", ["median while training"]))
    spent = _seconds(train)
    if spent:
        images = train[-1].get("images")
        cards.append(
            _card(
                "training time",
                duration(spent),
                [f"{images:,} images" if images else "", "without evaluation"],
            )
        )
    return (
        f'<header><h1>{escape(name)}<span class="state {kind}">{escape(str(state))}</span></h1>'
        f'<p class="muted">{escape(where)}</p><div class="cards">{"".join(cards)}</div></header>'
    )


def _card(title: str, value: str, below: Sequence[str]) -> str:
    lines = "".join(f"<span>{escape(t)}</span>" for t in below if t)
    return f'<div class="card"><span class="name">{escape(title)}</span><b>{escape(value)}</b>{lines}</div>'


def _seconds(train: list[Record]) -> float:
    total, before = 0.0, 0
    for r in train:
        total += (r["step"] - before) * (r.get("step_ms") or 0) / 1000
        before = r["step"]
    return total


def _warnings(warnings: list[Record], result: Record) -> str:
    lines = [f"step {r['step']:,}: {r.get('text', '')}" for r in warnings]
    lines += [f"evaluation: {t}" for t in result.get("warnings", [])]
    more = f"<p>... and {len(lines) - 20} earlier ones.</p>" if len(lines) > 20 else ""
    return "".join(f'<p class="warn">{escape(t)}</p>' for t in lines[-20:]) + more


def _results(result: Record) -> str:
    if not result.get("rows"):
        return _note("Not evaluated yet: run `extrema-fast evaluate` on this folder, then the report again.")
    metrics = [(m, t) for m, t in (("knn", f"k-NN (k = {result.get('k', 20)})"), ("probe", "linear probe"))]
    metrics = [(m, t) for m, t in metrics if m in result["metrics"]]
    head = "".join(f"<th>{escape(t)}</th>" for t in ("encoder", "feature", *(t for _, t in metrics)))
    rows = []
    for row in result["rows"]:
        cells = f"<td>{escape(row['encoder'])}</td><td>{escape(row['feature'])}</td>"
        gain = result["gain"].get(row["feature"], {}) if row["encoder"] == PRETRAINED else {}
        for m, _ in metrics:
            plus = ""
            if m in gain:
                kind = "gain" if gain[m] > 0 else "loss"
                plus = f' <span class="{kind}">{100 * gain[m]:+.1f}</span>'
            bar = f'<span class="bar" style="width:{100 * row[m]:.1f}%"></span>'
            cells += f'<td class="num">{_percent(row[m])}{plus}{bar}</td>'
        strong = ' class="strong"' if row["encoder"] == PRETRAINED else ""
        rows.append(f"<tr{strong}>{cells}</tr>")
    counts = result["counts"]
    step = f" at step {result['step']:,}" if isinstance(result.get("step"), int) else ""
    text = (
        f"Frozen {result['which']} features{step}: {counts['train']:,} training and {counts['test']:,} test "
        f"images, {counts['classes']} classes. Random init is the same network before training; the coloured "
        "number is the gain over it in points."
    )
    return (
        f'<p>{escape(text)}</p><div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table(values: dict[str, Any], open_: bool = False) -> str:
    def show(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(show(v))}</td></tr>" for k, v in values.items())
    return (
        f"<details{' open' if open_ else ''}><summary>{len(values)} values</summary>"
        f'<table class="kv"><tbody>{rows}</tbody></table></details>'
    )


# ---- charts ---------------------------------------------------------------------------------------


def _points(records: list[Record], key: str) -> list[tuple[float, float | None]]:
    return [(r["step"], r.get(key)) for r in records if key in r]


def _level(name: str, value: float | None, records: list[Record], color: int) -> Series:
    ends = [records[0]["step"], records[-1]["step"]] if records else []
    return Series(name, [(x, value) for x in ends], color, dashed=True)


def _charts(charts: Sequence[str], empty: str) -> str:
    found = "".join(charts)
    return f'<div class="charts">{found}</div>' if found else _note(empty)


def _learning(train: list[Record], evals: list[Record], result: Record) -> str:
    first = evals[0] if evals and evals[0]["step"] == 0 else {}
    knn = [
        Series(CLS, _points(evals, "knn_cls"), 0),
        Series(MEAN, _points(evals, "knn_mean"), 1),
        _level(f"{CLS}, random init", first.get("knn_cls"), evals, 0),
        _level(f"{MEAN}, random init", first.get("knn_mean"), evals, 1),
        _level(f"{PIXELS} (final evaluation)", _row(result, PIXELS, "pixels").get("knn"), evals, 5),
    ]
    return _charts(
        [
            line_chart("k-NN accuracy on test images", knn, percent=True),
            line_chart(
                "Loss",
                [Series("training loss", _points(train, "loss"), 0)],
                note="A small loss alone says nothing: judge by k-NN.",
            ),
        ],
        "Nothing logged yet.",
    )


_INDICATORS = (
    ("std", "Spread: deviation per dimension", "1: isotropic, 0: collapsed"),
    ("rank", "Effective rank", "directions in use"),
    ("cosine", "Mean cosine between images", "1: all images look the same to the network"),
)
_PARTS = (
    ("teacher", "teacher class vector", 0, False),
    ("teacher_proj", "teacher projection", 1, False),
    ("student", "student class vector", 0, True),
    ("student_proj", "student projection", 1, True),
)


def _collapse(evals: list[Record]) -> str:
    charts = [
        line_chart(
            title,
            [
                Series(name, _points(evals, f"{part}_{key}"), color, dashed)
                for part, name, color, dashed in _PARTS
            ],
            zero=key != "cosine",
            note=note,
        )
        for key, title, note in _INDICATORS
    ]
    charts.append(
        line_chart(
            "Views and attention",
            [
                Series("cosine of two views' predictions", _points(evals, "view_cosine"), 2),
                Series("entropy of class attention / maximum", _points(evals, "attention_entropy"), 3),
            ],
        )
    )
    return _charts(charts, "No evaluation logged yet (eval.every_epochs sets how often).")


def _speed(train: list[Record]) -> str:
    def one(title: str, key: str, name: str, color: int, **options: Any) -> str:
        return line_chart(title, [Series(name, _points(train, key), color)], **options)

    return _charts(
        [
            one("Images per second", "images_per_s", "images/s", 2, zero=True),
            one("Time waiting for images", "data_wait", "share of step time", 3, percent=True, zero=True),
            one("Learning rate", "lr", "learning rate", 0, zero=True),
            one("Teacher momentum", "momentum", "EMA momentum", 1),
            one("Gradient norm", "grad_norm", "norm before the update", 4, zero=True),
        ],
        "No training step logged yet.",
    )


# ---- pictures -------------------------------------------------------------------------------------


def _pictures(folder: Path, cfg: Config, count: int) -> tuple[str, str]:
    """(style rules, HTML) of the picture sections; a note in place of what cannot be made."""
    if count < 1:
        return "", ""
    parts: list[str] = []
    css = ""
    # whatever is wrong with weights or images, the curves of the run must still come out
    try:
        encoder = convert.load_encoder(folder)
        specs = resolve_data(cfg, None, None)
        train, test = (open_source(s, split) for s, split in zip(specs, ("train", "test"), strict=True))
    except Exception as error:
        log.warning("report: pictures are left out (%s)", error)
        return "", _section("Test images", _note(f"Pictures are left out: {error}"))
    try:
        initial = convert.random_encoder_like(folder)
        css, html = pictures.sample_table(pictures.samples(encoder, initial, test, cfg, count))
        parts.append(_section("Test images", html))
    except Exception as error:
        log.warning("report: sample pictures are left out (%s)", error, exc_info=True)
        parts.append(_section("Test images", _note(f"Pictures are left out: {error}")))
    try:
        parts.append(
            _section(
                "Nearest neighbours", pictures.near_table(pictures.neighbours(encoder, train, test, cfg))
            )
        )
    except Exception as error:
        log.warning("report: neighbours are left out (%s)", error, exc_info=True)
        parts.append(_section("Nearest neighbours", _note(f"Left out: {error}")))
    return css, "".join(parts)
