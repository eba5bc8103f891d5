"""One self-contained HTML file about a run: curves, results, pictures, configuration.

No scripts, no external files: charts are inline SVG, pictures inline PNG (`figures.py`), the page is
`report.html.j2`. Works on a run that is unfinished or crashed: what cannot be shown is left out, with a note why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, flatten
from ..data.sources import open_source
from ..errors import UsageError, cannot_import
from ..evaluation.evaluate import CLS, MEAN, PIXELS, PRETRAINED, RANDOM, is_result, resolve_data, run_config
from ..files import fits, no_links, read_json, write_file
from ..progress import duration
from ..training.logging import read_log
from ..training.run_folder import STATUS
from ..weights import load as convert
from . import figures
from .figures import Series, line_chart

log = logging.getLogger(__name__)

Record = dict[str, Any]


def report(run_dir: str | Path, *, images: int = 8, data: str | None = None) -> Path:
    """Writes `reports/report.html` of a run folder.

    A report with pictures is not replaced by one whose pictures cannot be made: that is `report-without-pictures.html`.

    Args:
        run_dir: The run folder; the run may be unfinished.
        images: Test images shown; 0: no pictures.
        data: Folder with train/ and test/ where the run's images are now; None: where they were.

    Returns:
        The path of the file.

    Raises:
        UsageError: `run_dir` is not a run folder, or jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"report: {cannot_import('jinja2 or matplotlib', error, 'train')}") from error
    if images < 0:
        raise UsageError(f"images: expected at least 0, got {images}")
    folder = Path(run_dir)
    cfg = run_config(folder) if folder.is_dir() else None
    if cfg is None:
        raise UsageError(f"{run_dir}: not a run folder (no config.json of a run in it)")
    no_links(folder, ["reports"], str(run_dir))
    train, evals, warnings = last_attempts(read_log(folder / "log.jsonl"))
    result = _read(folder / "reports" / "evaluation.json", is_result)
    status = _read(folder / "status.json", lambda d: fits(d, STATUS))
    env = _read(folder / "env.json", lambda d: fits(d, _ENV))
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.j2")
    pictures = _pictures(folder, cfg, images, data)
    html = page.render(
        name=folder.resolve().name,
        state=str(status.get("state", "unknown")),
        where=_where(status, env, train),
        cards=_cards(train, evals, result),
        warnings=[f"step {r['step']:,}: {r.get('text', '')}" for r in warnings]
        + [f"evaluation: {t}" for t in result.get("warnings", [])],
        result={"rows": []} | result,
        learning=_learning(train, evals, result),
        collapse=_collapse(evals),
        speed=_speed(train),
        config=flatten(cfg),
        env=flatten(env),
        **pictures,
    )
    path = folder / "reports" / "report.html"
    if pictures["samples_note"] and path.is_file() and b'<img alt="" src="data:' in path.read_bytes():
        kept, path = path, path.with_name("report-without-pictures.html")
        log.warning("%s: stays, since it has pictures; this report is %s", kept, path)
    # a file may hold half a surrogate pair, which is no text
    write_file(path, (html + "\n").encode("utf-8", "replace"))
    return path


_ENV = {"gpu?": (str, None), "device?": (str, None), "world_size?": int}


def _read(path: Path, makes_sense: Callable[[Record], bool]) -> Record:
    data = read_json(path, {})
    if data and not makes_sense(data):
        log.warning("%s: damaged, it is left out of the report", path)
        return {}
    return data


def last_attempts(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """(train, eval, warning) records, ascending by step, each step once.

    A resumed run goes back to its checkpoint: what an earlier attempt logged from the later one's first step on did
    not lead to the present weights and is dropped.
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
    train, evals, warnings = (sorted(found.values(), key=lambda r: r["step"]) for found in out.values())
    return train, evals, warnings


# ---- the top of the page ---------------------------------------------------------------------------


def _row(result: Record, encoder: str, feature: str) -> Record:
    return next((r for r in result.get("rows", []) if (r["encoder"], r["feature"]) == (encoder, feature)), {})


def _where(status: Record, env: Record, train: list[Record]) -> str:
    step, total = status.get("step", train[-1]["step"] if train else 0), status.get("total_steps")
    parts = [f"step {step:,}" + (f" of {total:,}" if total else ""), str(status.get("reason") or "")]
    if device := env.get("gpu") or env.get("device"):
        size = env.get("world_size", 1)
        parts.append(device + (f", {size} processes" if size > 1 else ""))
    return "; ".join(p for p in parts if p)


def _cards(train: list[Record], evals: list[Record], result: Record) -> list[Record]:
    cards = []

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    def card(title: str, value: str, *lines: str) -> None:
        cards.append({"title": title, "value": value, "lines": lines})

    pixels = _row(result, PIXELS, "pixels")
    for key, title in (("knn", "k-NN accuracy"), ("probe", "linear probe accuracy")):
        ours, start = _row(result, PRETRAINED, CLS).get(key), _row(result, RANDOM, CLS).get(key)
        below = [f"random init {percent(start)}", f"raw pixels {percent(pixels.get(key))}"]
        if ours is None and key == "knn":
            curve = [r["knn_cls"] for r in evals if r.get("knn_cls") is not None]
            ours, start = (curve[-1], curve[0]) if curve else (None, None)
            below = [f"step 0: {percent(start)}", "measured while training"]
        if ours is not None:
            gain = "" if start is None else f"{100 * (ours - start):+.1f} points over random init"
            card(title, percent(ours), gain, *below)
    if speeds := [r["images_per_s"] for r in train if r.get("images_per_s")]:
        card("images per second", f"{np.median(speeds):,.0f}", "median while training")
    steps = np.diff([0, *(r["step"] for r in train)])
    if spent := float(sum(n * (r.get("step_ms") or 0) / 1000 for n, r in zip(steps, train, strict=True))):
        images = train[-1].get("images")
        card("training time", duration(spent), f"{images:,} images" if images else "", "without evaluation")
    return cards


# ---- charts ---------------------------------------------------------------------------------------


def _points(records: list[Record], key: str) -> list[tuple[float, float | None]]:
    return [(r["step"], r.get(key)) for r in records if key in r]


def _figures(*charts: tuple[str, list[Series], str, dict[str, bool]]) -> list[Record]:
    drawn = [
        {"title": title, "svg": line_chart(title, series, **options), "note": note}
        for title, series, note, options in charts
    ]
    return [f for f in drawn if f["svg"]]


def _learning(train: list[Record], evals: list[Record], result: Record) -> list[Record]:
    first = evals[0] if evals and evals[0]["step"] == 0 else {}

    def level(name: str, value: float | None, color: int) -> Series:
        ends = [evals[0]["step"], evals[-1]["step"]] if evals else []
        return Series(name, [(x, value) for x in ends], color, dashed=True)

    accuracy = [
        Series(CLS, _points(evals, "knn_cls"), 0),
        Series(MEAN, _points(evals, "knn_mean"), 1),
        level(f"{CLS}, random init", first.get("knn_cls"), 0),
        level(f"{MEAN}, random init", first.get("knn_mean"), 1),
        level(f"{PIXELS} (final evaluation)", _row(result, PIXELS, "pixels").get("knn"), 5),
    ]
    loss = [Series("training loss", _points(train, "loss"), 0)]
    note, few, all_ = "", evals[-1].get("images") if evals else None, result.get("counts", {}).get("test")
    if isinstance(few, int) and isinstance(all_, int) and few < all_:
        note = f"On {few} test images, as training evaluates; the results above are of all {all_}, so numbers differ."
    return _figures(
        ("k-NN accuracy on test images, while training", accuracy, note, {"percent": True}),
        ("Loss", loss, "A small loss alone says nothing: judge by k-NN.", {}),
    )


_INDICATORS = (
    ("std", "Spread: standard deviation per dimension", "1: isotropic, 0: collapsed"),
    ("rank", "Effective rank", "directions in use"),
    ("cosine", "Mean cosine between images", "1: all images look the same to the network"),
)
_OUTPUTS = (
    ("teacher", "teacher class token", 0, False),
    ("teacher_proj", "teacher projection", 1, False),
    ("student", "student class token", 0, True),
    ("student_proj", "student projection", 1, True),
)


def _collapse(evals: list[Record]) -> list[Record]:
    charts: list[tuple[str, list[Series], str, dict[str, bool]]] = []
    for key, title, note in _INDICATORS:
        series = [
            Series(name, _points(evals, f"{out}_{key}"), c, dashed) for out, name, c, dashed in _OUTPUTS
        ]
        charts.append((title, series, note, {"zero": key != "cosine"}))
    more = [
        Series("cosine of two views' predictions", _points(evals, "view_cosine"), 2),
        Series("entropy of class attention / maximum", _points(evals, "attention_entropy"), 3),
    ]
    return _figures(*charts, ("Views and attention", more, "", {}))


def _speed(train: list[Record]) -> list[Record]:
    def one(title: str, key: str, name: str, color: int, **options: bool) -> tuple:
        return title, [Series(name, _points(train, key), color)], "", options

    return _figures(
        one("Images per second", "images_per_s", "images/s", 2, zero=True),
        one("Time waiting for images", "data_wait", "share of step time", 3, percent=True, zero=True),
        one("Learning rate", "lr", "learning rate", 0, zero=True),
        one("Teacher momentum", "momentum", "EMA momentum", 1),
        one("Gradient norm", "grad_norm", "norm before the update", 4, zero=True),
    )


# ---- pictures -------------------------------------------------------------------------------------


def _pictures(folder: Path, cfg: Config, count: int, data: str | None) -> Record:
    """`samples` and `neighbors` of figures.py, each with a note in its place when it cannot be made."""
    shown: Record = {"samples": None, "samples_note": "", "neighbors": None, "neighbors_note": ""}
    if count < 1:
        return shown

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        # whatever is wrong with weights or images, the curves of the run must still come out
        try:
            return make()
        except Exception as error:
            log.warning(
                "report: %s are left out (%s)", name, error, exc_info=not isinstance(error, UsageError)
            )
            shown[f"{name}_note"] = f"Pictures are left out: {error}"
            return None

    def open_all() -> tuple:
        given = resolve_data(cfg, data, None)
        try:
            sources = [
                open_source(s, split, holdout=share)
                for (s, share), split in zip(given, ("train", "test"), strict=True)
            ]
        except UsageError as error:
            raise UsageError(f"{error}; if they are elsewhere: report {folder} --data FOLDER") from None
        return convert.load_encoder(folder), *sources

    if (opened := attempt("samples", open_all)) is None:
        return shown
    encoder, train, test = opened
    initial = convert.random_encoder_like
    shown["samples"] = attempt("samples", lambda: figures.samples(encoder, initial(folder), test, cfg, count))
    shown["neighbors"] = attempt("neighbors", lambda: figures.neighbors(encoder, train, test, cfg))
    return shown
