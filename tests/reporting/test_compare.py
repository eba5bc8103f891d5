"""The page about several runs.

Covers: runs that are finished, evaluated, continued, empty or alike in name; curves by step, epoch and minutes; the
settings that differ, alone; what cannot be compared is said, and has no row in common; balanced tags, nothing external;
what it refuses.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from extrema_fast.cli import main
from extrema_fast.config import FinetuneConfig, from_dict, smoke, to_dict
from extrema_fast.errors import UsageError
from extrema_fast.reporting import compare as module
from extrema_fast.reporting.compare import MADE, MOST, compare
from extrema_fast.training.run_folder import MARKER
from tests.reporting import test_report


def make(folder: Path, steps: int = 0, ms: float = 6000, **changes: dict) -> Path:
    """A run of `steps` steps, evaluated at both ends; its accuracy at the end is `steps` percent."""
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    cfg = from_dict(changes, smoke())
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    train = [
        {"kind": "train", "step": s, "epoch": s / 4, "attempt": 1, "loss": 1 / s, "step_ms": ms, "lr": 1e-3}
        | {"images_per_s": 100.0 + steps, "memory_gb": 2.5}
        for s in range(1, steps + 1)
    ]
    evals = [
        {"kind": "eval", "step": s, "epoch": s / 4, "attempt": 1, "knn_cls": s / 100, "knn_mean": None}
        for s in sorted({0, steps})
    ]
    if steps:
        lines = [json.dumps(r) for r in evals[:1] + train + evals[1:]]
        (folder / "log.jsonl").write_text("\n".join(lines))
        status = {"state": "complete", "step": steps, "total_steps": steps}
        (folder / "status.json").write_text(json.dumps(status))
    return folder


@pytest.fixture
def no_charts(monkeypatch):
    """Charts as the names and points that would be drawn."""
    drawn: dict[str, dict] = {}

    def line_chart(title, series, **options):
        drawn[title] = {s.name: (list(s.points), s.color, s.dashed) for s in series}
        return "<svg></svg>" if any(y is not None for s in series for _, y in s.points) else ""

    monkeypatch.setattr(module, "line_chart", line_chart)
    return drawn


def test_page(tmp_path, monkeypatch, capsys):
    a = make(tmp_path / "one <b>", 4, train={"seed": 3})
    b = make(tmp_path / "two", 8, optim={"base_lr": 0.25})
    out = tmp_path / "page.html"
    # what a chart draws is tested with the report
    monkeypatch.setattr(module, "_CHARTS", module._CHARTS[:1])
    assert main(["compare", str(a), str(b), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    html = out.read_text()
    monkeypatch.setattr(test_report, "VOID", test_report.VOID | {"input"})
    page = test_report.Reader(html)
    assert all(s.removeprefix("#") in page.ids for s in page.sources)
    assert "script" not in page.tags and "link" not in page.tags
    assert "one <b>" in page.text and page.tags.count("svg") == 3
    assert len(set(page.ids)) == len(page.ids)
    for text in ("4.0 %", "8.0 %", "4 of 4", "0.2500", "108", "0:24", "0:48", "2.50 GB", "optim.base_lr"):
        assert text in page.text
    # a tab for each x, the first is shown
    assert html.count('type="radio"') == 3 and html.count("checked=") == 1
    for x in ("step", "epoch", "minutes"):
        assert f'for="by-{x}"' in html and f'id="by-{x}"' in html and f'class="curves {x}"' in html


def test_curves(tmp_path, no_charts):
    a, b = make(tmp_path / "a", 2), make(tmp_path / "b", 4, ms=30000)
    compare([a, b], tmp_path / "page.html")
    assert no_charts["Loss by step"]["a"][0] == [(1, 1.0), (2, 0.5)]
    assert no_charts["Loss by epoch"]["a"][0] == [(0.25, 1.0), (0.5, 0.5)]
    assert no_charts["Loss by minutes"]["b"][0] == [(0.5, 1.0), (1.0, 0.5), (1.5, 1 / 3), (2.0, 0.25)]
    assert no_charts["k-NN accuracy, class token by minutes"]["b"][0] == [(0.0, 0.0), (2.0, 0.04)]
    # nobody has this one
    assert "Effective rank of class tokens" not in (tmp_path / "page.html").read_text()


def test_many_runs_are_told_apart(tmp_path, no_charts):
    runs = [make(tmp_path / f"g{i}" / "same", 1) for i in range(MOST)]
    compare(runs, tmp_path / "page.html")
    curves = no_charts["Loss by step"]
    assert list(curves) == [f"g{i}/same" for i in range(MOST)]
    assert len({(color, dashed) for _, color, dashed in curves.values()}) == MOST
    with pytest.raises(UsageError, match=f"{MOST + 1}"):
        compare([*runs, make(tmp_path / "more")], tmp_path / "page.html")


def test_what_is_missing_or_damaged(tmp_path, no_charts):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", 3)
    (b / "status.json").write_text("{")
    (b / "env.json").write_text('{"host": [], "versions": 3}')
    (b / "reports").mkdir()
    (b / "reports" / "evaluation.json").write_text('{"rows": 3}')
    html = compare([a, b], tmp_path / "page.html").read_text()
    assert "unknown" in html and "Settings that differ</h2><p>None.</p>" in re.sub(r"\n\s*", "", html)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": {"loss": "infonce"}}, "losses"),
        ({"head": {"targets": "whitened"}}, "losses"),
        ({"head": {"loss": "infonce", "queue": 8}}, "losses"),
        ({"head": {"decorrelation": 0.1}}, "losses"),
        ({"data": {"test": "elsewhere"}}, "test images"),
        ({"eval": {"k": 7}}, "k-NN"),
        ({"train": {"seed": 7}}, ""),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, no_charts, changes, words):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 1, **changes)
    html = compare([a, b], tmp_path / "page.html").read_text()
    notes = re.findall(r'<p class="warn">(.*?)</p>', html)
    assert len(notes) == bool(words) and all(words in note for note in notes)


def evaluated(run: Path, name: str, knn: float, **changes: object) -> None:
    rows = [
        {"encoder": encoder, "feature": "class token", "knn": value}
        for encoder, value in (("pretrained", knn), ("random init", 0.0321))
    ]
    result = {"metrics": ["knn"], "rows": rows, "gain": {"mean of patches": {"knn": 0.0}}, "warnings": []}
    result |= {"counts": {"train": 30, "test": 15, "classes": 3}, "which": "teacher", "step": 1, "k": 5}
    result |= {"temperature": 0.07, "seed": 0, "train": "/a/pets/train", "test": "/a/pets/test"}
    result |= {"images": {"train": "1", "test": "2"}} | changes
    (run / "reports").mkdir(exist_ok=True)
    (run / "reports" / f"evaluation{name}.json").write_text(json.dumps(result))


def test_a_row_holds_one_evaluation_alone(tmp_path, no_charts):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 1)
    evaluated(a, "-1", 0.101)
    evaluated(a, "-2", 0.102, temperature=1.0)
    evaluated(a, "-3", 0.103, seed=5)
    # the same images elsewhere; others of that name, at another path and at the same one
    evaluated(b, "-1", 0.201, train="/b/pets/train", test="/b/pets/test")
    evaluated(
        b, "-2", 0.202, train="/c/v2/pets/train", test="/c/v2/pets/test", images=dict(train="3", test="4")
    )
    evaluated(b, "-3", 0.203, images=dict(train="5", test="6"))
    # an older one of an earlier step, and the run's own, which another run has as one of others
    evaluated(b, "-4", 0.204, step=0)
    evaluated(b, "", 0.205, seed=5)
    rows = module._more([module.read_run(a), module.read_run(b)])
    assert sorted(rows.values(), key=str) == sorted(
        [["10.1 %", "20.1 %"], ["10.2 %", None], ["10.3 %", "20.5 %"], [None, "20.2 %"], [None, "20.3 %"]],
        key=str,
    )
    for words, values in (
        ("temperature 1.0", ["10.2 %", None]),
        ("seed 5", ["10.3 %", "20.5 %"]),
        ("v2/pets/test", [None, "20.2 %"]),
    ):
        assert [v for name, v in rows.items() if words in name] == [values]
    page = compare([a, b], tmp_path / "page.html").read_text()
    assert all(name in page for name in rows)


def test_final_evaluations_of_other_images_resizing_or_steps_are_said(tmp_path, no_charts):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 1)
    evaluated(a, "", 0.1)
    for change, words in (
        ({"images": dict(train="1", test="9")}, "different test images"),
        ({"crop_pct": 1.0}, "resize images by different rules"),
        ({"step": 0}, "b: its final evaluation is of step 0, the run is at step 1 now"),
        ({}, ""),
    ):
        evaluated(b, "", 0.2, **change)
        html = compare([a, b], tmp_path / "page.html").read_text()
        notes = re.findall(r'<p class="warn">(.*?)</p>', html)
        assert len(notes) == bool(words) and all(words in note for note in notes)
        assert html.count("random: 3.2 %") == 2


def test_settings_of_a_fine_tuning_among_pretrainings(tmp_path, no_charts):
    runs = [make(tmp_path / name, 1, head={"loss": loss}) for name, loss in (("a", "byol"), ("b", "infonce"))]
    runs.append(make(tmp_path / "tuned", 1))
    (runs[2] / "config.json").write_text(json.dumps(to_dict(FinetuneConfig())))
    read = [module.read_run(run) for run in runs]
    # a head that fine-tuning does not have says nothing of its loss
    assert any("different losses" in note for note in module._notes([read[0], read[2]]))
    rows = module._different(read)
    assert rows["head.loss"] == ["byol", "infonce", None]
    # one value in all that have it, and settings of one run alone
    assert not any(name.startswith(("mask.", "tune.")) for name in rows) and "head.norm" not in rows
    assert rows["train.batch_size"] == [16, 16, 1024]


def test_automatic_precision_is_compared_as_what_it_was(tmp_path):
    runs = []
    for found in ("bf16", "fp32", "fp32"):
        runs.append(
            make(tmp_path / str(len(runs)), 1, train={"precision": "fp32" if len(runs) == 2 else "auto"})
        )
        (runs[-1] / "env.json").write_text(json.dumps({"resolved": {"precision": found}}))
    read = [module.read_run(run) for run in runs]
    assert module._different(read) == {"train.precision": ["bf16", "fp32", "fp32"]}
    assert module._different(read[1:]) == {}


def test_the_runs_own_evaluation_is_listed_once(tmp_path, no_charts):
    a = make(tmp_path / "a", 1)
    for name in ("", "-1"):
        evaluated(a, name, 0.1)
    evaluated(a, "-2", 0.1, step=0)
    assert [result["step"] for result in module.read_run(a).more] == [0]


def test_refusals(tmp_path, no_charts):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 1)
    notes, page = tmp_path / "notes.html", tmp_path / "page.html"
    notes.write_text("mine")
    (tmp_path / "link.html").symlink_to(notes)
    for runs, out, words in (
        ([a], page, "2 to"),
        ([a, a / ".." / "a"], page, "twice"),
        ([a, tmp_path], page, "not a run"),
        ([a, b], notes, "notes.html"),
        ([a, b], tmp_path / "link.html", "link.html"),
        ([a, b], tmp_path, "no plain file"),
    ):
        with pytest.raises(UsageError, match=words):
            compare(runs, out)
    assert notes.read_text() == "mine" and not page.exists()
    page.write_text(MADE)
    assert compare([a, b], page) == page and page.stat().st_size > 1000
