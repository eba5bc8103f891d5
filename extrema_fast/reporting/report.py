"""One self-contained HTML page about a run: summary, results, curves, pictures, settings.

No scripts and no external files: charts are inline SVG, pictures inline PNG or JPEG (`figures.py`); the template is
`report.html.j2`. Works on unfinished or crashed runs: what cannot be shown is left out, with a note that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, FinetuneConfig, flatten
from ..data.image_files import read_as
from ..data.sources import open_source
from ..errors import UsageError, cannot_import, one_line
from ..evaluation.features import Embedded
from ..evaluation.result import CLS, MEAN, PIXELS, PRETRAINED, RANDOM, summaries
from ..evaluation.subject import resolve_data, run_data
from ..files import no_links, write_file
from ..progress import duration
from ..weights import load as convert
from . import figures
from .figures import Series, line_chart
from .record import Record, RunRecord, all_options, curve, identity, read_run, seconds, settings

log = logging.getLogger(__name__)

# in a run folder
REPORT = Path("reports/report.html")


def render(template: str, **values: Any) -> str:
    """A page of this folder's template.

    Raises:
        UsageError: jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"report: {cannot_import('jinja2 or matplotlib', error, 'train')}") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def report(
    run_dir: str | Path,
    *,
    images: int = 8,
    data: str | None = None,
    embedded: tuple[Embedded, ...] | None = None,
) -> Path:
    """Writes `reports/report.html` of a run folder.

    If the pictures cannot be made, an existing report with pictures is kept, and the new report goes to
    `report-without-pictures.html`.

    Args:
        run_dir: The run folder; the run may be unfinished.
        images: Number of test images shown; 0: no pictures.
        data: Folder with train/ and test/, if the run's images have moved; None: they have not.
        embedded: Test and training images encoded by the final weights (`figures.embed`). Empty: leave out what needs
            them; None: encode them.

    Returns:
        The path of the file.

    Raises:
        UsageError: `run_dir` is not a run folder, or jinja2 or matplotlib is missing.
    """
    if images < 0:
        raise UsageError(f"images: expected at least 0, got {images}")
    run = read_run(run_dir)
    folder = run.folder
    no_links(folder, ["reports"], str(run_dir))
    # what is missing is said before pictures are made
    render("parts.html.j2")
    # the pictures tell of pretraining
    tuned = isinstance(run.cfg, FinetuneConfig)
    pictures = _pictures(folder, run.cfg, 0 if tuned else images, data, embedded)
    preset, changes = settings(run)
    html = render(
        "report.html.j2",
        name=run.name,
        state=str(run.status.get("state", "unknown")),
        where=_where(run),
        identity=identity(run),
        cards=_cards(run),
        warnings=[f"step {r['step']:,}: {r.get('text', '')}" for r in run.warnings]
        + [f"evaluation: {t}" for t in run.result.get("warnings", [])],
        result={"rows": []} | run.result,
        lacks=_lacks(run),
        tuned=tuned,
        more=summaries(run.more, run.step),
        classified=run.classified,
        classes=_classes(run.classified or run.result),
        step=run.step,
        learning=_learning(run),
        collapse=_collapse(run),
        speed=_speed(run),
        preset=preset,
        changes=changes,
        config=all_options(run.cfg),
        env=flatten(run.raw_env),
        **pictures,
    )
    path = folder / REPORT
    if pictures["samples_note"] and path.is_file() and MADE_WITH_PICTURES in path.read_bytes():
        kept, path = path, path.with_name("report-without-pictures.html")
        log.warning("%s: stays, since it has pictures; this report is %s", kept, path)
    # a file may hold half a surrogate pair, which is no text
    write_file(path, (html + "\n").encode("utf-8", "replace"))
    return path


# in a page with pictures, of this version and of older ones
MADE_WITH_PICTURES = b'<img alt="" src="data:'


# ---- the top of the page ---------------------------------------------------------------------------


def row_of(result: Record, encoder: str, feature: str) -> Record:
    return next((r for r in result.get("rows", []) if (r["encoder"], r["feature"]) == (encoder, feature)), {})


def _where(run: RunRecord) -> str:
    total = run.status.get("total_steps")
    where = f"step {run.step:,}" + (f" of {total:,}" if total else "")
    # the last warning is the reason that a complete run gives, and is listed as such
    reason = run.status.get("reason") if run.status.get("state") != "complete" else ""
    return f"{where}; {reason}" if reason else where


def _lacks(run: RunRecord) -> str:
    """In words what `evaluate` needs and the run's own images lack; empty where nothing is known to be missing."""
    counts = [c for c in run.env.get("data", {}).values() if c]
    # a count with a name and without classes is of images without labels
    if any("name" in c and "classes" not in c for c in counts):
        return "The run's images have no labels"
    return "" if len(counts) > 1 or run_data(run.cfg) else "The run has no test images"


def _beginning(run: RunRecord) -> str:
    """What the encoder of step 0 is; where other weights were begun from, it is not random."""
    return "step 0" if run.env.get("init_from") else "random init"


def _cards(run: RunRecord) -> list[Record]:
    cards, train, result = [], run.train, run.result

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    def card(title: str, value: str, *lines: str) -> None:
        cards.append({"title": title, "value": value, "lines": lines})

    if found := run.classified:
        top5 = "" if found["top5"] is None else f"{percent(found['top5'])} among the first five"
        card("test accuracy", percent(found["accuracy"]), f"{found['images']:,} test images", top5)
    pixels = row_of(result, PIXELS, "pixels")
    for key, title in (("knn", "k-NN accuracy"), ("probe", "linear probe accuracy")):
        ours, start = row_of(result, PRETRAINED, CLS).get(key), row_of(result, RANDOM, CLS).get(key)
        base, second = "random init", f"raw pixels {percent(pixels.get(key))}"
        if ours is None and key == "knn":
            known = {r["step"]: r["knn_cls"] for r in run.evals if r.get("knn_cls") is not None}
            ours, start = (known[max(known)], known.get(0)) if known else (None, None)
            base, second = _beginning(run), "measured while training"
        if ours is not None:
            gain = "" if start is None else f"{100 * (ours - start):+.1f} points over {base}"
            card(title, percent(ours), gain, f"{base} {percent(start)}", second)
    if speeds := [r["images_per_s"] for r in train if r.get("images_per_s")]:
        card("images per second", f"{np.median(speeds):,.0f}", "median while training")
    if spent := seconds(train)[-1:]:
        images = train[-1].get("images")
        card(
            "training time", duration(spent[0]), f"{images:,} images" if images else "", "without evaluation"
        )
    return cards


# ---- charts ---------------------------------------------------------------------------------------


def _figures(*charts: tuple[str, list[Series], str, dict[str, Any]]) -> list[Record]:
    drawn = [
        {"title": title, "svg": line_chart(title, series, **options), "note": note}
        for title, series, note, options in charts
    ]
    return [f for f in drawn if f["svg"]]


def _learning(run: RunRecord) -> list[Record]:
    evals, result = run.evals, run.result
    first = evals[0] if evals and evals[0]["step"] == 0 else {}

    def level(name: str, value: float | None, color: int) -> Series:
        ends = [evals[0]["step"], evals[-1]["step"]] if evals else []
        return Series(name, [(x, value) for x in ends], color, dashed=True)

    accuracy = [
        Series(CLS, curve(run, "eval", "knn_cls"), 0),
        Series(MEAN, curve(run, "eval", "knn_mean"), 1),
        level(f"{CLS}, {_beginning(run)}", first.get("knn_cls"), 0),
        level(f"{MEAN}, {_beginning(run)}", first.get("knn_mean"), 1),
        level(f"{PIXELS} (final evaluation)", row_of(result, PIXELS, "pixels").get("knn"), 5),
    ]
    points = curve(run, "train", "loss")
    loss = [Series("training loss", points, 0)]
    if any(r.get("spike") for r in run.train):
        marked = [(x, y if r.get("spike") else None) for (x, y), r in zip(points, run.train, strict=True)]
        loss.append(Series("spike", marked, 5))
    if isinstance(run.cfg, FinetuneConfig):
        loss.append(Series("test loss", curve(run, "eval", "test_loss"), 1))
        tested = [Series("test accuracy", curve(run, "eval", "accuracy"), 0)]
        most, all_ = run.cfg.eval.max_test, run.classified.get("images", 0)
        note = f"On {most:,} test images; the last point is of all {all_:,}." if 0 < most < all_ else ""
        smooth = "The training loss is that of mixed and smoothed labels, where these are on."
        return _figures(
            ("Accuracy on test images", tested, note, {"percent": True}), ("Loss", loss, smooth, {})
        )
    note, few, all_ = "", evals[-1].get("images") if evals else None, result.get("counts", {}).get("test")
    if isinstance(few, int) and isinstance(all_, int) and few < all_:
        note = f"On {few:,} test images, as training evaluates; the results above are of all {all_:,}."
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


def _collapse(run: RunRecord) -> list[Record]:
    charts: list[tuple[str, list[Series], str, dict[str, Any]]] = []
    for key, title, note in _INDICATORS:
        series = [
            Series(name, curve(run, "eval", f"{out}_{key}"), c, dashed) for out, name, c, dashed in _OUTPUTS
        ]
        charts.append((title, series, note, {"zero": key != "cosine"}))
    more = [
        Series("cosine of two views' predictions", curve(run, "eval", "view_cosine"), 2),
        Series("entropy of class attention / maximum", curve(run, "eval", "attention_entropy"), 3),
    ]
    return _figures(*charts, ("Views and attention", more, "", {}))


def _speed(run: RunRecord) -> list[Record]:
    def one(title: str, key: str, name: str, color: int, **options: bool) -> tuple:
        return title, [Series(name, curve(run, "train", key), color)], "", options

    tune = run.cfg.tune if isinstance(run.cfg, FinetuneConfig) else None
    charts = [
        one("Images per second", "images_per_s", "images/s", 2, zero=True),
        one("Time waiting for images", "data_wait", "share of step time", 3, percent=True, zero=True),
        one("Learning rate", "lr", "learning rate", 0, zero=True),
        one("Gradient norm", "grad_norm", "norm before the update", 4, zero=True),
    ]
    # a fine-tuning may have no average
    if tune is None or tune.ema:
        averaged = "Teacher" if tune is None else "Average"
        charts.append(one(f"{averaged} momentum", "momentum", "EMA momentum", 1))
    return _figures(*charts)


# ---- results of classes -----------------------------------------------------------------------------


def _classes(result: Record) -> Record:
    """`rows` (name, images, accuracy by metric), the hardest first;
    `confusions` by metric: (class, taken for, images, of how many)."""
    found = result.get("per_class", {})
    if not found:
        return {"rows": [], "confusions": {}}
    metrics = [m for m in ("knn", "probe", "accuracy") if m in found]
    names, images = found["names"], found["images"]
    rows = [
        {"name": names[i], "images": n} | {m: found[m][i] for m in metrics} for i, n in enumerate(images) if n
    ]
    rows.sort(key=lambda r: tuple(r[m] or 0 for m in metrics))
    confusions = {
        m: [(names[a], names[b], n, images[a]) for a, b, n in found["confusions"][m]] for m in metrics
    }
    return {"rows": rows, "confusions": confusions, "feature": found.get("feature"), "metrics": metrics}


# ---- pictures -------------------------------------------------------------------------------------

WORDS = {"samples": "images", "neighbors": "nearest neighbors", "map": "map of the embeddings"}


def _pictures(
    folder: Path, cfg: Config, count: int, data: str | None, embedded: tuple[Embedded, ...] | None
) -> Record:
    """`samples`, `neighbors` and `map` of figures.py, each with a note in its place when it cannot be made."""
    shown: Record = {"of": "test"} | dict.fromkeys(WORDS) | {f"{name}_note": "" for name in WORDS}
    if count < 1:
        return shown

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        # whatever is wrong with weights or images, the curves of the run must still come out
        try:
            return make()
        except Exception as error:
            reason = one_line(error, 1000) or type(error).__name__
            log.warning("report: %s left out (%s)", WORDS[name], reason)
            log.debug("report: %s", WORDS[name], exc_info=True)
            shown[f"{name}_note"] = f"Left out: {reason}"
            return None

    def open_all() -> tuple:
        encoder = convert.load_encoder(folder)
        try:
            given = resolve_data(cfg, data, None)
        except UsageError:
            if cfg.data.test or cfg.data.holdout:
                raise
            # a run without test images shows those it was trained on
            given = ((data or cfg.data.train, 0.0),) * 2
            shown["of"] = "training"
        try:
            sources = [
                open_source(s, split, holdout=share)
                for (s, share), split in zip(given, ("train", "test"), strict=True)
            ]
        except UsageError as error:
            raise UsageError(f"{error}; if they are elsewhere: report {folder} --data FOLDER") from None
        first, second = (read_as(s, encoder.in_chans) for s in sources)
        return encoder, first, second if shown["of"] == "test" else first

    if (opened := attempt("samples", open_all)) is None:
        return shown
    encoder, train, test = opened
    if encoder.value_range:
        cfg = replace(cfg, data=replace(cfg.data, range=encoder.value_range))
    initial = convert.random_encoder_like
    shown["samples"] = attempt("samples", lambda: figures.samples(encoder, initial(folder), test, cfg, count))
    if embedded is None:
        embedded = attempt("neighbors", lambda: figures.embed(encoder, train, test, cfg))
    if embedded == ():
        shown["map_note"] = f"Left out for time; made by: extrema-fast report {folder}"
    elif embedded is not None:
        near, bank = embedded
        shown["neighbors"] = attempt("neighbors", lambda: figures.neighbors(encoder, near, bank, cfg.data))
        shown["map"] = attempt("map", lambda: figures.embedding_map(near))
    return shown
