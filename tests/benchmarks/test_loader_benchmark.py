"""The benchmark of the data path, with few and small pictures and no time that matters.

Covers: what each way makes at each stage; every way's pictures pass the comparison, a wrong one does not; the
baseline's boxes follow torchvision's law, also where they cannot; training on ready views is training on crops;
processor time of children that run and that have ended; which ways take turns; rates, ratios and when they are
refused; growth of memory; pages and pictures; a whole run in processes, with one that fails; errors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    gpu_suite,
    loader,
    loader_baselines,
    loader_gates,
    loader_page,
    loader_ways,
    loader_worker,
    plots,
)
from benchmarks.__main__ import main
from benchmarks.loader_ways import STAGES, WAYS, Setting
from benchmarks.tables import markdown
from extrema_fast.config import DataConfig
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import Batch, TrainLoader, random_boxes
from extrema_fast.data.sources import open_source
from extrema_fast.training import step as step_module

pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
HERE = [name for name, way in WAYS.items() if not way.missing()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return loader.made(tmp_path_factory.mktemp("made"), 6)


@pytest.fixture
def setting(folder: str) -> Setting:
    data = DataConfig(train=folder, threads=1)
    return Setting(open_source(folder, "train"), data, (48, 64), 4, 1)


# ---- ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "end to end"])
@pytest.mark.parametrize("name", HERE)
def test_every_way_makes_batches(name, stage, setting):
    with loader_ways.opened(WAYS[name], stage, setting) as (fetch, use):
        batches = [fetch() for _ in range(3)]
        use(batches[0])
    if not WAYS[name].ours:
        shape = {"decode": (4, 2), "crop": (4, 48, 64, 3), "views": (4, 2, 3, 48, 64)}[stage]
        assert all(b.shape == shape for b in batches)
        if stage == "views":
            assert all(b.std() > 0.1 and b.dtype == torch.float32 for b in batches)
    elif stage != "decode":
        assert all(b.images.shape == (4, 48, 64, 3) for b in batches)


def test_every_ways_pictures_are_the_products(setting):
    gates = loader_gates.pictures(HERE, setting)
    assert [g.name for g in gates] == HERE and all(g.passed for g in gates), gates


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        (
            "jitter_params",
            lambda *a, **k: torch.tensor([1.0, 1.4, 1.4, 1.2, 0.1, 0, 0, 1, 2, 3]).expand(6, 2, -1),
        ),
        ("random_boxes", lambda s, *a, **k: (np.tile([0.0, 0, 99, 99], (len(s), 1)), np.zeros(len(s), bool))),
    ],
)
def test_wrong_pictures_are_caught(what, wrong, setting, monkeypatch):
    monkeypatch.setattr(loader_gates, what, wrong)
    assert [g.passed for g in loader_gates.pictures(["ours-pil"], setting)] == [False]


def test_boxes_of_the_baseline_follow_the_products_law(setting):
    stats = pytest.importorskip("scipy.stats")
    photos = loader_baselines.Photos(setting.source, setting.data, (8, 8), "crop")
    loader_baselines.random.seed(1)
    theirs = np.array([photos.random_box(500, 375) for _ in range(3000)], float)
    ours, _ = random_boxes(np.tile([375, 500], (3000, 1)), np.arange(3000), setting.data, seed=1, epoch=0)
    ours = ours[:, [1, 0, 3, 2]]
    for law in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert stats.ks_2samp(law(theirs), law(ours)).pvalue > 1e-3
    assert photos.random_box(7, 4000) == (0, 1995, 7, 2004) and photos.random_box(1, 1) == (0, 0, 1, 1)


def test_training_on_ready_views_is_training_on_crops(setting, monkeypatch):
    # `_train_on_views` replaces it for its process
    monkeypatch.setattr(step_module, "color_jitter", step_module.color_jitter)
    setting = Setting(setting.source, setting.data, (64, 64), 4, torch.get_num_threads())
    runs = []
    build = loader_ways.build
    monkeypatch.setattr(loader_ways, "build", lambda *a: runs.append(build(*a)) or runs[-1])
    with TrainLoader(setting.source, setting.data, (64, 64), batch_size=4, seed=0, device="cpu") as made:
        batch = next(made)
    torch.manual_seed(0)
    loader_ways._train_on_crops(setting, setting.data)(batch)
    params = jitter_params(batch.index, setting.data, seed=runs[0].cfg.train.seed, epoch=batch.epoch)
    views = color_jitter(batch.images, params, setting.data)
    torch.manual_seed(0)
    ready = loader_ways._train_on_views(setting)
    # masks and drop-path follow the rows, which are not told: the same ones
    monkeypatch.setattr(loader_ways, "Batch", lambda v, i, **k: Batch(v, batch.index, epoch=0, step=0))
    ready(torch.stack(views, 1))
    losses = [run.counters.read().values()["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and runs[1].step == 1


# ---- processor time ---------------------------------------------------------------------------------

WORK = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_processor_time_holds_that_of_children():
    before = loader_worker.cpu_s()
    subprocess.run([sys.executable, "-S", "-c", WORK], check=True)
    assert loader_worker.cpu_s() - before >= 0.25
    wait = WORK + "print(flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        child.stdout.readline()
        if sys.platform == "linux":
            assert child.pid in loader_worker._descendants(loader_worker.os.getpid())
            assert loader_worker._ticks(child.pid) >= 0.25
        child.communicate("\n")
    assert loader_worker._ticks(child.pid) == 0


# ---- what follows from the times --------------------------------------------------------------------


def options(**more) -> argparse.Namespace:
    given = {"sweep": None, "threads": [2], "stages": ["crop", "views"]}
    return argparse.Namespace(**given | more)


def test_who_takes_turns():
    groups = loader.planned(["ours", "dataloader"], options())
    assert [[j.key for j in g] for g in groups] == [
        ["ours | crop", "dataloader | crop"],
        ["ours | views", "dataloader | views"],
    ]
    groups = loader.planned(["ours", "ours-gpu"], options(sweep=[0.0, 0.9], threads=[3, 8], stages=["crop"]))
    assert [[j.key for j in g] for g in groups] == [
        ["ours | crop | 3 threads"], ["ours | crop | 8 threads"],
        ["ours-gpu | crop | 3 threads, load 0"], ["ours-gpu | crop | 3 threads, load 0.9"],
        ["ours-gpu | crop | 8 threads, load 0"], ["ours-gpu | crop | 8 threads, load 0.9"],
    ]  # fmt: skip
    assert groups[3][0].data == {"hw_decoder_load": 0.9} and groups[4][0].threads == 8


def row(way: str, stage: str = "views", ms: float = 100.0, cpu: float = 4.0, **more) -> dict:
    turns = [{"ms": ms + i, "waited": 0.1 * i, "cpu_ms_per_image": cpu} for i in range(5)]
    head = {"key": f"{way} | {stage}", "way": way, "stage": stage, "label": "", "batch": 32, "cores": 2}
    return head | loader.summary(turns, 32, 2) | more


def record(rows: list[dict], bad: tuple[str, ...] = ()) -> dict:
    found = {
        "what": "data path", "benchmark": "loader", "command": "c", "date": "2026-01-01", "note": "",
        "machine": {"gpu": None, "cpu": "c", "threads": 2, "torch": "t", "python": "p", "short": "s"},
        "settings": {"data": "d", "images": 250, "img_size": 224, "batch": 32, "threads": [2], "rounds": 5,
                     "batches_per_turn": 8, "in_turns": True, "model": "tiny", "device": "cpu"},
        "gates": [{"name": w, "passed": w not in bad, "found": "f"} for w in WAYS],
        "not_run": {"ours-gpu": "needs a CUDA device"}, "rows": rows,
    }  # fmt: skip
    return found | {"ratios": loader.ratios(found)}


def test_rates():
    r = row("ours", ms=100.0)
    assert r["images_per_s"] == pytest.approx(32 * 1000 / 102) and r["waited"] == pytest.approx(0.2)
    assert r["images_per_s_per_core"] == pytest.approx(r["images_per_s"] / 2)
    assert r["images_per_cpu_s"] == 250 and len(r["samples_ms"]) == 5


def test_ratios_and_the_goal():
    rows = [row("ours", ms=50, cpu=3), row("ours-pil", ms=60), row("dataloader", ms=104, cpu=6),
            row("ours", "crop"), row("dataloader", "crop")]  # fmt: skip
    found = record(rows)["ratios"]
    assert [(r["stage"], r["ours"], r["other"], r["goal"]) for r in found] == [
        ("views", "ours", "dataloader", loader.GOAL),
        ("views", "ours-pil", "dataloader", None),
        ("crop", "ours", "dataloader", None),
    ]
    assert found[0]["ratio"] == pytest.approx(106 / 52) and found[0]["verdict"] == "faster"
    assert found[0]["cpu_ratio"] == 2
    text = markdown(loader_page.page(record(rows)))
    assert "**2.04x**" in text and "| yes |" in text and "needs a CUDA device" in text


def test_no_ratio_after_a_failed_check_or_without_a_time():
    for bad in ("ours", "dataloader"):
        (found,) = record([row("ours"), row("dataloader")], (bad,))["ratios"]
        assert bad in found["refused"] and "ratio" not in found
    broken = {k: v for k, v in row("dataloader").items() if k in ("key", "way", "stage", "label", "batch")}
    made = record([row("ours"), broken | {"error": "no memory"}])
    assert "dataloader" in made["ratios"][0]["refused"]
    text = markdown(loader_page.page(made))
    assert "**not compared**" in text and "dataloader | views: no memory" in text


def test_growth_of_memory():
    # the first epochs fill caches
    rss = [100.0, 200.0, *np.arange(300, 308, 0.5)]
    found = loader.growth({"rss_mb": rss})
    assert found["mb_per_epoch"] == pytest.approx(0.5) and found["last_mb"] == 307.5
    assert loader.growth({"rss_mb": [5.0]})["mb_per_epoch"] == 0


@pytest.mark.parametrize("name", ["loader.png", "memory.png"])
def test_pictures(name, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("ours"), row("dataloader"), row("ours", "crop")]
    if name == "memory.png":
        rows = [{"way": "ours", "stage": "memory", "label": "", "rss_mb": [1.0, 2.0]}]
    assert plots.loader(record(rows), tmp_path) == [name]
    assert 1000 < (tmp_path / name).stat().st_size < 100_000


# ---- the command ------------------------------------------------------------------------------------


def run(folder: str, out: Path, *more: str) -> dict:
    common = ["loader", "--data", folder, "--quick", "--img-size", "32", "--batch", "2", "--rounds", "1",
              "--batches", "1", "--threads", "1", "--out", str(out)]  # fmt: skip
    assert main([*common, *more]) == 0
    (file,) = out.glob("*/record.json")
    return json.loads(file.read_text())


def test_a_whole_run_with_a_way_that_fails(folder, tmp_path, capsys, monkeypatch):
    settings: Callable = loader.settings
    # what a process cannot know fails there
    monkeypatch.setattr(
        loader, "settings",
        lambda *a: settings(*a) | ({"data": {"nonsense": 1}} if a[3] else {}),
    )  # fmt: skip
    monkeypatch.setattr(loader, "planned", lambda ways, args: [
        [loader.Job("ours-pil", "crop", 1), loader.Job("dataloader", "crop", 1, {"x": 1})]
    ])  # fmt: skip
    found = run(folder, tmp_path, "--ways", "ours-pil", "dataloader", "--stages", "crop")
    good, bad = found["rows"]
    assert good["images_per_s"] > 0 and good["cpu_ms_per_image"] > 0 and good["cores"] == 1
    assert "nonsense" in bad["error"] and "refused" in found["ratios"][0]
    assert [g["passed"] for g in found["gates"]] == [True, True]
    assert "not compared" in capsys.readouterr().out


def test_memory_over_epochs(folder, tmp_path):
    found = run(folder, tmp_path, "--memory-epochs", "3", "--ways", "ours-pil")
    (only,) = found["rows"]
    assert len(only["rss_mb"]) == 3 and min(only["rss_mb"]) > 10 and only["steps_per_epoch"] == 3


def test_list(capsys):
    assert main(["loader", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*WAYS, *STAGES))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threads", "1", "2"], "--threads: several numbers need --sweep"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--batch", "7"], "--batch: 7 is more than the 6 images"),
        (["--img-size", "0"], "--img-size: expected at least 1"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_errors(options, words, folder, capsys):
    assert main(["loader", "--data", folder, *options]) == 2
    assert words in capsys.readouterr().err


def test_nothing_that_runs_here(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["loader", "--ways", "ours-gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_gpu_visits_summary_tells_the_rates():
    lines = gpu_suite.of_record(record([row("ours", ms=98), row("dataloader")]))
    assert "ours | views: 320 images/s, 4.00 ms CPU each" in lines and len(lines) == 3
