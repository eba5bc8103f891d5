"""The report: charts, pictures, the HTML file of finished, resumed, crashed and empty runs.

Covers: gaps, thinning and colors of charts; pictures read back; repeated steps after a resume; a whole report: balanced
tags, no script, nothing external, every section, below 5 MB, deterministic, escaped; missing pieces leave a note.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from extrema_fast import train
from extrema_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    TrainConfig,
    from_dict,
    smoke,
    to_dict,
)
from extrema_fast.data.sources import ImageSource
from extrema_fast.errors import UsageError
from extrema_fast.evaluation import evaluate as evals
from extrema_fast.evaluation import probes
from extrema_fast.evaluation.features import Embedded
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.reporting import figures
from extrema_fast.reporting import report as module
from extrema_fast.reporting.figures import (
    Series,
    data_uri,
    dropped,
    embedding_map,
    heat,
    line_chart,
    photo_uri,
    small,
    thin,
)
from extrema_fast.reporting.record import curve, identity, last_attempts, read_run, settings
from extrema_fast.reporting.report import report
from extrema_fast.signals import Stopped
from extrema_fast.train import pretrain
from extrema_fast.weights.folder import save_weights, weights_meta

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced; collects tags, addresses, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.buttons: list[str] = []
        self.pictures = self.described = 0
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [
            v for k, v in attrs if k in ("src", "href", "data", "xlink:href", "action", "poster", "srcset")
        ]
        self.ids += [v for k, v in attrs if k == "id"]
        named = dict(attrs)
        if tag == "button":
            self.buttons.append(named["popovertarget"])
            self.labeled = bool(named["aria-label"].strip())
        if tag == "img" or named.get("role") == "img":
            self.pictures += 1
            said = named.get("alt") or named.get("aria-label") or (self.open[-1] == "button" and self.labeled)
            self.described += bool(said)
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


# ---- charts and pictures ----------------------------------------------------------------------------


def test_chart_is_self_contained_and_follows_the_page():
    series = [Series("a & b", [(0, 1.0), (10, 2.0)]), Series("flat", [(0, 1.5), (10, 1.5)], 1, True)]
    svg = line_chart("A <title>", series)
    page = Reader(svg)
    assert "a & b: 2" in page.text and "flat: 1.5" in page.text and "step" in page.text
    assert 'aria-label="A &lt;title>"' in svg and "viewBox" in svg
    assert "var(--c0)" in svg and "var(--c1)" in svg and "var(--muted)" in svg
    # no color of its own, no header, no address; the same bytes again
    assert not re.search("#[0-9a-f]{6}", svg) and "http" not in svg and "<?xml" not in svg
    assert line_chart("A <title>", series) == svg


def test_text_of_a_chart_is_readable_on_a_phone():
    svg = line_chart("t", [Series("s", [(0, 1.0), (10, 2.0)])])
    # 390 pixels less the margins of the page
    scale = 358 / float(re.search(r'viewBox="0 0 (\S+)', svg)[1])
    sizes = [scale * float(s) for s in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert len(sizes) > 5 and min(sizes) > 10.5


def test_chart_leaves_gaps():
    nan, inf = float("nan"), float("inf")
    svg = line_chart(
        "t", [Series("s", [(0, 1.0), (1, None), (2, nan), (3, 3.0), (4, 4.0), (5, inf), (6, 0.5)])]
    )
    path, _legend = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c0\)', svg)
    assert path.count("M") == 3 and path.count("L") == 1


def test_charts_of_few_values():
    for points in ([], [(0, None)], [(0, float("nan")), (1, None)]):
        assert line_chart("t", [Series("s", points)]) == ""
    for points in ([(5, 0.25)], [(0, 0.0), (1, 0.0)]):
        assert "s: " in Reader(line_chart("t", [Series("s", points)], percent=True, zero=True)).text


def test_legends_show_every_name_whole():
    names = ["_hidden", "lr$1$", r"a$\frac$", "long_" * 30]
    svg = line_chart("t", [Series(name, [(90, 0.5)], i, i > 1) for i, name in enumerate(names)], percent=True)
    lines = re.findall("<text[^>]*>([^<]*)", svg)
    assert all(f"{name}:50.0%" in "".join(lines).replace(" ", "") for name in names)
    # a long one in several lines, none of which is cut off at the edge
    assert max(map(len, lines)) <= figures.LEGEND_LINE
    # one point is drawn, also of a dashed curve, and so is that of the legend; the axis begins at 0
    assert ["0", *(len(re.findall(f"<use .*var\\(--c{i}\\)", svg)) for i in range(4))] == [
        lines[0],
        2,
        2,
        2,
        2,
    ]


def test_long_curves_are_thinned_to_means():
    x, y = np.arange(100_000.0), np.arange(100_000) % 2.0
    y[:5000] = np.nan
    a, b = thin(x, y, 100)
    assert len(a) == len(b) == 100 and (a[-1], b[-1]) == (x[-1], y[-1])
    assert np.isnan(b[:4]).all() and (abs(b[6:-1] - 0.5) < 0.01).all() and (np.diff(a) > 0).all()
    assert len(line_chart("t", [Series("s", list(zip(x, y, strict=True)))])) < 30_000


def test_large_photographs_are_jpeg():
    assert photo_uri(np.zeros((64, 64, 3), np.uint8)).startswith("data:image/png")
    kind, _, data = photo_uri(np.full((65, 64, 3), 90, np.uint8)).partition(",")
    with pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(data))) as file:
        assert kind == "data:image/jpeg;base64" and abs(np.asarray(file).astype(int) - 90).max() <= 1


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 3), (6, 4, 3), (3, 9, 4)])
def test_pictures_keep_every_value(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    kind, _, data = data_uri(image).partition(",")
    with pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(data))) as file:
        assert kind == "data:image/png;base64" and np.array_equal(np.asarray(file), image)


def test_dropped_patches_are_hidden_attention_has_its_scale_and_large_images_are_averaged():
    kept = np.array([[True, False], [False, True]])
    assert (dropped(kept)[..., 3] == np.where(kept, 0, 255)).all()
    over = heat(np.array([[0.0, 2.0, 9.0]]), top=2.0)
    assert over.dtype == np.uint8 and np.array_equal(over[0, 1], over[0, 2])
    assert not (over[0, 0] == over[0, 1]).all()
    x = torch.arange(2 * 8 * 6 * 3, dtype=torch.uint8).reshape(2, 8, 6, 3)
    assert np.array_equal(small(x), x.numpy())
    assert small(torch.full((1, 1024, 512, 3), 7, dtype=torch.uint8)).shape == (1, 256, 128, 3)


def embedded(x, labels=None, classes=()):
    names = [str(i) for i in range(len(x))]
    return Embedded(ImageSource("set", names, labels, list(classes), "f"), x)


def test_map_keeps_distances_in_its_plane():
    # four directions near one another, in a plane: what PCA shows is their true shape
    x = torch.tensor([[1, 0.0, 0], [1, 0.1, 0], [1, 0, 0.05], [1, -0.1, -0.05]])
    found = embedding_map(embedded(x, torch.tensor([0, 1, 1, 0]), ["a", "b"]))
    at = torch.tensor([p for g in found["groups"] for p in g["points"]])[[0, 2, 3, 1]]
    true = torch.nn.functional.normalize(x.double(), dim=1)
    ratio = torch.pdist(at.double()) / torch.pdist(true)
    assert ratio.max() / ratio.min() < 1.01 and sum(found["shares"]) == pytest.approx(1, abs=1e-3)
    assert [g["name"] for g in found["groups"]] == ["a", "b"] and found["others"] == 0
    assert (at >= 0).all() and (at <= torch.tensor(found["size"])).all()
    with pytest.raises(UsageError, match="at least 3 images"):
        embedding_map(embedded(x[:2]))
    assert [g["name"] for g in embedding_map(embedded(x))["groups"]] == [""]
    # collapsed
    assert len(embedding_map(embedded(torch.ones(3, 4)))["groups"][0]["points"]) == 3


def test_map_of_many_classes_and_images():
    labels = torch.arange(28).repeat(100).index_fill(0, torch.arange(0, 2800, 9), 28)
    labels[labels == 28] = 28 + torch.arange(312) % 20
    x = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    found = embedding_map(embedded(x, labels, [f"c{i}" for i in range(48)]))
    rest, *shown = found["groups"]
    # the largest have colors
    assert [g["name"] for g in shown] == sorted((f"c{i}" for i in range(28)), key=lambda c: int(c[1:]))
    assert found["others"] == 20 and rest["color"] is None and len(rest["points"]) > 60
    assert len({(g["color"], g["shape"]) for g in shown}) == 28
    assert sum(len(g["points"]) for g in found["groups"]) == found["images"] == 1000


# ---- log ------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_last_attempt_of_each_step():
    records = [{"kind": "train", "step": s, "attempt": 1, "loss": 1.0} for s in (10, 20, 30, 40)]
    records += [{"kind": "eval", "step": s, "attempt": 1, "knn_cls": 0.1} for s in (0, 20, 40)]
    records += [{"kind": "warning", "step": 40, "attempt": 1, "text": "gone"}]
    records += [{"kind": "train", "step": s, "attempt": 2, "loss": 2.0} for s in (30, 35)]
    records += [
        {"kind": "warning", "step": 30, "attempt": 2, "text": "kept"},
        {"kind": "other"},
        {"step": None},
    ]
    train, evaluations, warnings = last_attempts(records)
    # step 40 of the first attempt lies beyond what the second has reached and belongs to lost weights
    assert [(r["step"], r["loss"]) for r in train] == [(10, 1.0), (20, 1.0), (30, 2.0), (35, 2.0)]
    assert [r["step"] for r in evaluations] == [0, 20]
    assert [r["text"] for r in warnings] == ["kept"]
    assert last_attempts([]) == ([], [], [])


# ---- the file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # of the probe, which is tested elsewhere
        patch.setattr(probes, "EPOCHS", 14)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tree of two classes, bright and dark, in train/ and test/."""
    image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    root, g = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, low in (("bright", 120), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                array = g.integers(low, low + 120, (32, 32, 3), dtype=np.uint8)
                image.fromarray(array).save(root / split / name / f"{i:02d}.png")
    return root


def config(images) -> Config:
    cfg = smoke()
    data = DataConfig(train=str(images / "train"), test=str(images / "test"), loader="pil")
    return dataclasses.replace(
        cfg, data=data, train=TrainConfig(epochs=1, batch_size=8, precision="fp32"), eval=EvalConfig(k=5)
    )


def fabricate(folder, cfg, *, records=(), status=True, weights=True):
    folder.mkdir(parents=True)
    log = "".join(json.dumps(r) + "\n" for r in records) + '{"kind": "train", "st'
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    (folder / "log.jsonl").write_text(log)
    if status:
        env = {"versions": {"torch": "2"}, "device": "cpu", "world_size": 1}
        (folder / "status.json").write_text('{"state": "complete", "step": 40, "total_steps": 40}')
        (folder / "env.json").write_text(json.dumps(env))
    if weights:
        save_weights(folder / "weights" / "step_00000040", ExtreMA(cfg), weights_meta(cfg, 40))
    return folder


def log_records():
    out = []
    for attempt, steps in ((1, (10, 20, 30)), (2, (30, 40))):
        for s in steps:
            row = {"kind": "train", "step": s, "attempt": attempt, "images": 8 * s, "loss": 2 - s / 40}
            row |= {"lr": 1e-3 * s / 40, "momentum": 0.99, "grad_norm": 1.0, "images_per_s": 100.0}
            out.append(row | {"step_ms": 80.0, "data_wait": 0.1})
    for s in (0, 20, 40):
        row = {"kind": "eval", "step": s, "attempt": 1 + (s > 20), "knn_cls": 0.2 + s / 100, "knn_mean": 0.3}
        for part in ("teacher", "teacher_proj", "student", "student_proj"):
            row |= {f"{part}_std": 0.5, f"{part}_rank": 5 + s, f"{part}_cosine": 0.4}
        out.append(row | {"view_cosine": 0.9, "attention_entropy": 0.97})
    return [*out, {"kind": "warning", "step": 20, "attempt": 1, "text": "k-NN <b>fell</b>"}]


@pytest.fixture(scope="module")
def run(images, cache, tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("runs") / "a & b", config(images), records=log_records())


@pytest.fixture
def no_charts(monkeypatch):
    """For a test of words: drawing takes most of a report's time."""
    monkeypatch.setattr(module, "line_chart", lambda *_args, **_options: "")


def test_identity_of_a_recorded_run(run, images):
    env = {
        "argv": ["/usr/bin/extrema-fast", "pretrain", "smoke", "--out", "a & b"],
        "started": "2026-01-31T12:00:00+00:00",
        "attempt": 2,
        "preset": {"name": "own", "changes": {"train.epochs": 7, "eval.k": 5, "gone": 1}},
        "init_from": {"weights": "mae.pth", "trunk": "kept"},
        "data": {
            "train": {"name": "x", "images": 24, "classes": 2, "smallest": 12, "largest": 12, "left_out": 3},
            "test": None,
        },
        "machine": {"cpu": "Fast CPU", "cores": 2, "memory_gb": 8.0},
        "code": {"commit": "0123456789abcdef", "changed": True},
        "host": 7,
    }
    folder = shutil.copytree(run, run.parent / "recorded")
    (folder / "env.json").write_text(json.dumps(env))
    status = {"state": "complete", "step": 40, "total_steps": 40, "time": "2026-01-31T12:10:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    told = dict(identity(read_run(folder)))
    assert settings(read_run(folder)) == ("own", {"train.epochs": (1, 7)})
    assert told["preset"] == ["own, 1 setting changed", "begun from mae.pth", "trunk: kept"]
    assert told["encoder"][0].startswith("ViT: width 64, 2 blocks, 1 head, pooling of 2 blocks; 0.2 M")
    assert told["data"] == [
        f"training: {images / 'train'}: 24 images in 2 classes of 12; 3 more files left out",
        f"test: {images / 'test'}",
    ]
    assert told["command"] == ["extrema-fast pretrain smoke --out 'a & b'"]
    assert told["time"][0] == "started 2026-01-31 12:00 UTC, 2 starts, last written after 10:00"
    assert told["machine"] == ["Fast CPU, 2 cores, 8 GB"]
    assert told["code"] == ["extrema-fast, commit 0123456789ab with changed files"]


def test_a_run_without_a_record_is_compared_with_the_nearest_preset(run):
    name, changes = settings(read_run(run))
    assert name == "smoke (the nearest)" and changes["eval.k"] == (5, 20) and "out" not in changes
    assert dict(identity(read_run(run)))["time"] == ["0:03 of training, without evaluations"]


def test_curves_over_steps_and_minutes(run):
    read = read_run(run)
    assert curve(read, "eval", "knn_cls") == [(0, 0.2), (20, 0.4), (40, 0.6000000000000001)]
    assert curve(read, "eval", "knn_cls", "minutes")[2][0] == pytest.approx(40 * 0.08 / 60)
    assert curve(read, "train", "loss", "minutes")[0] == (pytest.approx(10 * 0.08 / 60), 1.75)


def check_self_contained(text: str) -> Reader:
    page = Reader(text)
    assert "http" not in text and "<script" not in text and "@import" not in text
    # pictures are in the file; charts refer to their own marks only
    inside = ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
    assert all(s.startswith(inside) for s in page.sources)
    assert all(u.startswith(inside) for u in re.findall(r"url\(([^)]*)\)", text))
    # a picture says what it shows, or lies on one that does; a button enlarges what it lies in
    assert page.pictures == page.described
    assert set(page.buttons) <= set(page.ids) and len(page.buttons) == len(set(page.buttons))
    assert all(s[1:] in page.ids for s in page.sources if s.startswith("#"))
    assert len(text.encode()) < 5_000_000
    return page


def test_report_of_a_complete_run(run):
    result, path = evals.evaluate(run, device="cpu"), report(run, images=3)
    assert path == run / "reports" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert len(set(page.ids)) == len(page.ids)
    assert [i for i in page.ids if not re.fullmatch("[mp][0-9a-f]{10}", i)] == [
        "warnings",
        "results",
        "classes",
        "learning",
        "map",
        *(f"shape{i}" for i in range(5)),
        "images",
        *(f"{table}{i}-{j}" for table in ("image", "patches") for i in range(3) for j in range(7)),
        "nearest-neighbors",
        *(name for i in range(6) for name in (f"query{i}", *(f"near{i}-{j}" for j in range(5)))),
        "is-it-collapsing",
        "speed-and-optimization",
        "settings",
    ]
    assert "a & b" in page.text and "complete" in page.text and "0:03" in page.text
    assert "k-NN <b>fell</b>" in page.text
    for title in ("Loss", "Learning rate", "Teacher momentum", "Effective rank", "Images per second"):
        assert title in page.text
    for row in result["rows"]:
        assert f"{100 * row['knn']:.1f} %" in page.text
    assert "class token, random init: 20.0 %" in page.text and "training loss: 1" in page.text
    assert "raw pixels (final evaluation)" in page.text
    assert "mask.ratio" in page.text and "versions.torch" in page.text
    assert "24 training images" in page.text and "30 neighbors shown" in page.text
    assert "12 test images in the plane" in page.text and len(re.findall("<use href=.#shape", text)) == 12 + 2
    # in the order of their accuracy, the hardest first
    rows = sorted(zip(result["per_class"]["knn"], ["bright", "dark"], strict=True))
    assert re.findall(r"<tr><td>(bright|dark)</td><td>6</td>", text) == [name for _, name in rows]
    for a, b, n in result["per_class"]["confusions"]["knn"]:
        assert f"{['bright', 'dark'][a]} taken for {['bright', 'dark'][b]}: {n} of 6" in page.text
    # a second call replaces the file by the same one and leaves no temporary behind
    assert report(run, images=3).read_text(encoding="utf-8") == text
    assert sorted(p.name for p in (run / "reports").iterdir()) == ["evaluation.json", "report.html"]


def test_a_report_with_pictures_is_not_replaced_by_a_poorer_one(images, cache, tmp_path, caplog, no_charts):
    here = shutil.copytree(images, tmp_path / "here")
    folder = fabricate(tmp_path / "run", config(here))
    good = report(folder, images=2)
    text = good.read_text()
    here.rename(tmp_path / "there")
    poor = report(folder, images=2)
    assert poor.name == "report-without-pictures.html" and good.read_text() == text
    assert f"report {folder} --data FOLDER" in caplog.text
    assert "img" in Reader(report(folder, images=2, data=str(tmp_path / "there")).read_text()).tags
    # asked for without pictures
    assert report(folder, images=0) == good


def test_report_of_a_run_that_has_only_begun_and_of_gone_images(images, cache, tmp_path):
    folder = fabricate(tmp_path / "run", config(images), status=False, weights=False)
    page = check_self_contained(report(folder).read_text(encoding="utf-8"))
    for note in ("Not evaluated", "Nothing logged", "No evaluation logged", "No env.json", "has not saved"):
        assert note in page.text
    (folder / "log.jsonl").unlink()
    report(folder)
    folder = fabricate(tmp_path / "gone", config(tmp_path / "nowhere"), records=log_records())
    page = check_self_contained(report(folder).read_text())
    assert "Left out:" in page.text and "Loss" in page.text


@pytest.mark.parametrize(("begun", "first"), [(None, "random init"), ({"weights": "mae.pth"}, "step 0")])
def test_what_training_has_measured_is_compared_with_its_beginning(images, cache, tmp_path, begun, first):
    folder = fabricate(tmp_path / "run", config(images), records=log_records(), weights=False)
    if begun:
        (folder / "env.json").write_text(json.dumps({"init_from": begun}))
    text = Reader(report(folder, images=0).read_text()).text
    assert f"+40.0 points over {first}" in text and f"{first} 20.0 %" in text
    assert f"class token, {first}: 20.0 %" in text and ("random init" in text) == (first == "random init")


def test_report_of_a_fine_tuning(cache, tmp_path):
    for ema in (0.99, 0.0):
        cfg = from_dict({"tune": {"ema": ema}}, FinetuneConfig())
        folder = fabricate(tmp_path / f"tuned {ema}", cfg, records=log_records(), weights=False)
        charts = [chart["title"] for chart in module._speed(read_run(folder))]
        # without an average it has no momentum
        assert charts[4:] == (["Average momentum"] if ema else [])
    page = check_self_contained(report(folder).read_text())
    # what means nothing to it is no setting
    assert "tune.layer_decay" in page.text and "head.loss" not in page.text


def test_report_without_pictures_and_of_unlabeled_images(images, cache, tmp_path, no_charts):
    cfg = config(images)
    flat = str(images / "test" / "dark")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=flat, test=flat))
    folder = fabricate(tmp_path / "run", cfg)
    assert "img" not in Reader(report(folder, images=0).read_text()).tags
    page = check_self_contained(report(folder, images=2).read_text())
    assert "nearest-neighbors" in page.ids and "neighbors shown" not in page.text
    assert "6 test images in the plane" in page.text and "nearest of 6 training images" in page.text
    # without test images: those it was trained on, none of which is its own neighbor
    (folder / "config.json").write_text(json.dumps(to_dict(cfg) | {"data": to_dict(cfg.data) | {"test": ""}}))
    text = report(folder, images=2).read_text()
    page = check_self_contained(text)
    assert "6 training images in the plane" in page.text and "nearest of 5 others" in page.text
    images = [
        re.findall(r"base64,([^\"]*)\"", row) for row in re.findall("<td class=.query.*?</tr>", text, re.S)
    ]
    assert len(images) == 6 and all(len(row) == 6 and row[0] not in row[1:] for row in images)


@pytest.mark.parametrize("lacking", ["labels", "test images", ""])
def test_what_evaluate_would_refuse_is_not_advised(images, cache, tmp_path, no_charts, lacking):
    cfg = config(images)
    cfg = dataclasses.replace(cfg, log=dataclasses.replace(cfg.log, report=False))
    if lacking == "labels":
        flat = {split: str(images / split / "dark") for split in ("train", "test")}
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **flat))
    if lacking == "test images":
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, test=""))
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "run"))
    folder = pretrain(cfg, progress=False)
    text = report(folder, images=0).read_text()
    (note,) = re.findall(r'<p class="note">([^<]*).*?evaluate', text)
    if not lacking:
        assert note.startswith("Not evaluated yet")
        return
    assert f"no {lacking}: with labeled images" in note
    assert "evaluate RUN --data FOLDER" in text
    with pytest.raises(UsageError):
        evals.evaluate(folder, device="cpu")
    # what it advises works, and is not advised any more
    evals.evaluate(folder, str(images), device="cpu")
    text = report(folder, images=0).read_text()
    assert "--data FOLDER" not in text and "Not evaluated" not in text and "More evaluations" in text


def test_broken_images_take_no_others_out(images, cache, tmp_path, no_charts):
    copy = shutil.copytree(images, tmp_path / "images")
    cfg = config(copy)
    folder = fabricate(tmp_path / "run", cfg)
    for split in ("train", "test"):
        for file in sorted((copy / split).rglob("0[0-3].png")):
            file.write_bytes(file.read_bytes()[:150])
    page = check_self_contained(report(folder, images=4).read_text())
    assert "Left out:" not in page.text
    # four of each dozen are broken
    assert {"images", "nearest-neighbors", "map"} <= set(page.ids) and "16 training images" in page.text


def test_nothing_is_written_through_a_link(images, cache, tmp_path):
    folder, foreign = fabricate(tmp_path / "run", config(images)), tmp_path / "foreign"
    foreign.mkdir()
    (folder / "reports").symlink_to(foreign)
    for write in (lambda: report(folder, images=0), lambda: evals.evaluate(folder, device="cpu")):
        with pytest.raises(UsageError, match="reports is a symbolic link"):
            write()
    assert list(foreign.iterdir()) == []


def test_report_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- at the end of a run --------------------------------------------------------------------------


def no_encoding(*_args, **_options):
    raise AssertionError("encoded again")


def test_a_complete_run_has_its_report(images, cache, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "extrema_fast")
    cfg = dataclasses.replace(config(images), out=str(tmp_path / "a run"))
    monkeypatch.setattr(figures, "embed", no_encoding)
    pretrain(cfg, preset=("smoke", smoke()), progress=False)
    page = check_self_contained((tmp_path / "a run" / "reports" / "report.html").read_text())
    # what the last evaluation has encoded
    assert "12 test images in the plane" in page.text and "nearest of 24 training images" in page.text
    assert "Left out:" not in page.text and "smoke, " in page.text
    assert "24 images in 2 classes of 12" in page.text and "12 images in 2 classes of 6" in page.text
    assert f"report: {tmp_path}/a run/reports/report.html" in caplog.text
    assert f"next: extrema-fast evaluate '{tmp_path}/a run'" in caplog.text
    env = json.loads((tmp_path / "a run" / "env.json").read_text())
    assert env["preset"]["name"] == "smoke" and env["preset"]["changes"]["train.epochs"] == 2
    assert env["machine"]["cores"] >= 1 and set(env["code"] or {}) <= {"commit", "changed"}
    # ended while it was written: the same command writes it, and only then
    (tmp_path / "a run" / "reports" / "report.html").unlink()
    monkeypatch.undo()
    pretrain(cfg, progress=False)
    assert (tmp_path / "a run" / "reports" / "report.html").is_file()
    monkeypatch.setattr(train, "report", no_encoding)
    pretrain(cfg, progress=False)


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), MemoryError(), Stopped(15, False)]
)
def test_no_report_ends_no_run(images, cache, tmp_path, monkeypatch, caplog, problem):
    caplog.set_level("INFO", "extrema_fast")

    def fail(*_args, **options):
        # without evaluations nothing is encoded for it
        assert options == {"embedded": ()}
        raise problem

    monkeypatch.setattr(train, "report", fail)
    cfg = dataclasses.replace(config(images), out=str(tmp_path / "run"), eval=EvalConfig(every_epochs=0))
    assert pretrain(cfg, progress=False) == tmp_path / "run"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    if not isinstance(problem, Stopped):
        (line,) = [r.getMessage() for r in caplog.records if "no report" in r.getMessage()]
        assert (str(problem) or "MemoryError") in line and f"extrema-fast report {tmp_path / 'run'}" in line
    no_report = dataclasses.replace(cfg, log=dataclasses.replace(cfg.log, report=False))
    pretrain(no_report, overwrite=True, progress=False)
