"""The preset `own`: what is chosen for which images and machine, what is given and follows, and that it stays chosen.

Covers: the rules, over sets and machines of every size; options that are given, and those that follow; folders with and
without test images; the run folder, which keeps the choice; weights to begin with; the command, with folders, wrong
words, several processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import extrema_fast
from extrema_fast import cli, distributed, train
from extrema_fast.config import Config, flatten, from_dict, preset, to_dict
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.training import own
from extrema_fast.training.own import Images, Machine, Settings, choose, run_name
from extrema_fast.weights.folder import save_weights, weights_meta

CPU = Machine("cpu", 1, 2, 8e9, "fp32")
GPU = Machine("cuda", 1, 16, 80e9, "bf16")


def images(total: int, side: int = 375, classes: int = 0, **more) -> Images:
    known = {"pixels": 1.4 * side**2, "bytes": int(4.2 * total * side**2), "holdout": 0.0, "test": ""}
    return Images(total=total, classes=classes, side=side, **(known | more))


def settle(total: int, side: int = 375, machine: Machine = CPU, **given) -> dict:
    given = {k.replace("__", "."): v for k, v in given.items()}
    return flatten(Settings(images(total, side), machine, given).settle())


def chosen(given: dict, **more) -> Config:
    return choose(given, **more)[0]


def tree(root: Path, classes: int = 2, each: int = 12, size: tuple[int, int] = (40, 36)) -> Path:
    rng = np.random.default_rng(0)
    for label, i in itertools.product(range(classes), range(each)):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")
    return root


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: 2)
    monkeypatch.setattr(own, "precision", lambda setting, kind: "fp32" if setting == "auto" else setting)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    """A folder of images named relative to the working directory."""
    tree(tmp_path / "imgs")
    monkeypatch.chdir(tmp_path)
    return "imgs"


# ---- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "side", "machine", "want"),
    [
        # hundreds of photographs, thousands of small pictures, a handful, on two cores
        (250, 375, CPU, {"model.img_size": [64, 64], "model.patch_size": 8, "train.batch_size": 32}),
        (5000, 32, CPU, {"model.img_size": [32, 32], "model.patch_size": 4, "head.loss": "infonce"}),
        (20_000, 32, CPU, {"train.batch_size": 64, "optim.base_lr": 2.8e-3}),
        (9, 100, CPU, {"train.batch_size": 4, "train.epochs": 400, "head.queue": 0, "head.norm": "layer"}),
        (3000, 32, CPU, {"head.queue": 512, "head.norm": "batch", "optim.momentum": 0.9, "mask.ratio": 0.9}),
        (250, 375, CPU._replace(cores=16), {"model.width": 192, "model.depth": 6}),
        # the paper's recipe
        (1_281_167, 375, GPU, {"model.size": "base", "train.batch_size": 512, "train.epochs": 300}),
        (1_281_167, 375, GPU._replace(processes=8), {"train.batch_size": 2048, "optim.base_lr": 1.5e-4}),
        (1_281_167, 375, GPU._replace(bytes=24e9), {"model.size": "small", "model.img_size": [224, 224]}),
        (100_000, 375, GPU, {"model.size": "small", "head.loss": "byol", "optim.warmup_epochs": 40.0}),
        # too few, or too small for it
        (10_000, 375, GPU, {"model.img_size": [128, 128], "model.patch_size": 16, "head.loss": "infonce"}),
        (50_000, 32, GPU, {"model.img_size": [32, 32], "train.batch_size": 64, "head.loss": "infonce"}),
    ],
)
def test_what_is_chosen(total, side, machine, want):
    found = settle(total, side, machine)
    assert {k: found[k] for k in want} == want


def test_a_gpu_may_wait_for_the_cpu():
    def length(total: int, side: int) -> str:
        settings = Settings(images(total, side), GPU, {})
        settings.settle()
        return settings.table()

    # a million of 17 megapixels at 1.5 gigapixels a second; what is held is decoded once
    assert "decoding on the CPU takes about 3.2 hours" in length(10_000, 3500)
    assert "decoding" not in length(10_000, 375)


def test_every_choice_can_run():
    totals, sides = (2, 17, 999, 2_000_000), (1, 33, 4000)
    machines = [CPU, CPU._replace(cores=64), CPU._replace(cores=1, processes=2), GPU, GPU._replace(bytes=6e9)]
    for total, side, machine in itertools.product(totals, sides, machines):
        settings = Settings(images(total, side), machine, {})
        cfg = settings.settle()
        seen = cfg.train.epochs * total
        assert 2 <= cfg.train.batch_size <= total and cfg.train.batch_size % machine.processes == 0
        assert cfg.num_keep >= 6 and cfg.optim.warmup_epochs < cfg.train.epochs
        assert seen >= min(15_000, 400 * total)
        assert all(line in settings.table() for parts in settings.lines for line in parts)
    # the more cores, the more is seen in the same time
    epochs = [settle(2000, machine=CPU._replace(cores=n))["train.epochs"] for n in (1, 2, 4, 7)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        (
            {"train__epochs": 5},
            {"optim.warmup_epochs": 0.294, "eval.every_epochs": 1, "ckpt.every_epochs": 1},
        ),
        ({"train__batch_size": 16}, {"optim.base_lr": 7.92e-3}),
        ({"train__batch_size": 16, "optim__base_lr": 1e-3}, {"optim.base_lr": 1e-3}),
        (
            {"model__size": "small"},
            {"model.width": 0, "model.depth": 0, "model.heads": 0, "head.hidden": 1024},
        ),
        ({"model__width": 96}, {"model.heads": 0, "model.depth": 2, "head.hidden": 512}),
        ({"model__img_size": (96, 128)}, {"model.patch_size": 16}),
        ({"model__img_size": (30, 40)}, {"model.patch_size": 5}),
        ({"model__patch_size": 14}, {"model.img_size": [112, 112]}),
        ({"mask__ratio": 0.5}, {"mask.views": 2}),
        ({"mask__keep": 30}, {"mask.views": 2}),
        ({"mask__views": 8}, {"mask.ratio": 0.875}),
        (
            {"train__accumulation": 3},
            {"train.batch_size": 24, "head.norm": "layer", "head.decorrelation": 0.0, "head.queue": 256},
        ),
        ({"head__loss": "byol"}, {"head.queue": 0, "head.norm": "batch", "model.patch_init": "xavier"}),
        ({"head__temperature": 0.2}, {"head.queue": 256, "model.patch_init": "whitened"}),
        ({"train__epochs": 500}, {"optim.momentum": 0.9677}),
    ],
)
def test_what_is_given_stands_and_the_rest_follows(given, follows):
    found = settle(2000, **given)
    assert {k: found[k] for k in follows} == follows
    assert all(
        found[k.replace("__", ".")] == (list(v) if isinstance(v, tuple) else v) for k, v in given.items()
    )


def test_a_warm_up_follows_the_epochs_of_the_papers_recipe_too():
    assert settle(100_000, machine=GPU, train__epochs=30)["optim.warmup_epochs"] == pytest.approx(4)


def test_what_cannot_be_is_said_by_its_name():
    for given, words in (
        ({"mask__ratio": 0.5, "mask__views": 5}, "use mask.views"),
        ({"train__batch_size": 1}, "train.batch_size: InfoNCE"),
        ({"model__patch_size": 0}, "model.patch_size"),
        ({"train__accumulation": 0}, "train.accumulation"),
        ({"mask__views": 0}, "mask.views"),
        ({"model__img_size": (0, 0)}, "model.img_size"),
    ):
        with pytest.raises(UsageError, match=words):
            settle(2000, **given)


def test_large_pictures_are_not_held_and_make_shorter_runs():
    small, large = settle(500, 375), settle(500, 3000)
    assert (small["data.resident"], large["data.resident"]) == ("host", "off")
    assert large["train.epochs"] < small["train.epochs"] / 2
    assert large["eval.max_train"] < small["eval.max_train"] == 2000
    settings = Settings(images(500, 3000), CPU, {})
    settings.settle()
    assert "extrema-fast pack" in settings.table()


# ---- images and run folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("imgs", "imgs"),
        ("a/imgs/", "imgs"),
        ("imgs/train", "imgs"),
        ("my list.csv", "my_list"),
        ("set/{0000..0009}.tar", "set"),
        ("packed-1.2.tar.gz", "packed-1"),
        ("..", "imgs"),
        ("/", "own"),
    ],
)
def test_runs_are_named_after_the_data(tmp_path, monkeypatch, data, name):
    (tmp_path / "imgs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "imgs" / "here")
    assert run_name(data) == name


def test_labels_are_held_out_and_parts_are_found(tmp_path, folder):
    cfg = chosen({"data.train": folder})
    assert (cfg.data.train, cfg.data.test, cfg.data.holdout, cfg.out) == ("imgs", "", 0.2, "runs/imgs")
    assert cfg.eval.k <= 12
    assert chosen({"data.train": "./imgs/"}) == cfg == chosen({"data.train": Path("imgs").name})
    # without labels nothing is, nor where no class has two
    assert chosen({"data.train": "imgs/class0"}).data.holdout == 0
    tree(tmp_path / "single", classes=8, each=1)
    assert chosen({"data.train": "single"}).data.holdout == 0
    for part in ("train", "val"):
        tree(tmp_path / "set" / part)
    cfg = chosen({"data.train": "set"})
    assert (cfg.data.train, cfg.data.test, cfg.data.holdout) == ("set/train", "set/val", 0)
    assert cfg.out == "runs/set" and chosen({"data.train": "set", "data.holdout": 0.5}).data.test == ""
    # none where none is wanted
    for option in ({"data.holdout": 0.0}, {"data.test": ""}):
        cfg = chosen({"data.train": folder, **option})
        assert (cfg.data.holdout, cfg.data.test) == (0, "") and cfg.train.batch_size == 8
    # a folder that is called as what is built in
    tree(tmp_path / "photos")
    assert chosen({"data.train": "./photos"}).data.train == "./photos"


def test_the_choice_is_made_once(tmp_path, folder, monkeypatch, caplog):
    run = extrema_fast.pretrain(data=folder, epochs=1, progress=False)
    assert run == Path("runs/imgs") and json.loads((run / "status.json").read_text())["state"] == "complete"
    begun = json.loads((run / "config.json").read_text())
    assert begun["train"]["epochs"] == 1 and begun["optim"]["warmup_epochs"] < 1
    # what was given differs from what is recorded as chosen
    made_from = json.loads((run / "env.json").read_text())["preset"]
    assert made_from == {"name": "own", "changes": {"train.epochs": preset("own").train.epochs}}
    assert choose({"data.train": folder})[1].train.epochs == preset("own").train.epochs
    # on another machine, with the same images and with more
    monkeypatch.setattr(distributed, "cores", lambda: 64)
    with caplog.at_level(logging.INFO, "extrema_fast"):
        assert to_dict(chosen({"data.train": folder})) == begun
    assert "chosen when this run was begun" in caplog.text
    assert to_dict(chosen({"data.train": folder}, overwrite=True)) != begun
    assert extrema_fast.pretrain(data=folder, progress=False) == run
    tree(tmp_path / "imgs", classes=3)
    assert to_dict(chosen({"data.train": folder})) == begun
    (run / "status.json").write_text('{"state": "preempted"}')
    with pytest.raises(UsageError, match="images"):
        extrema_fast.pretrain(data=folder, progress=False)
    # a longer run is a change that is said, as ever
    with pytest.raises(UsageError, match=r"train\.epochs: 1 -> 3"):
        extrema_fast.pretrain(data=folder, epochs=3, progress=False)
    # other images of that name
    tree(tmp_path / "other" / "imgs")
    with pytest.raises(UsageError, match=r"data\.train: 'imgs' -> 'other/imgs'"):
        extrema_fast.pretrain(data="other/imgs", progress=False)


def test_other_runs_and_folders_are_not_touched(tmp_path, folder):
    with pytest.raises(UsageError, match=r"--out imgs: is a folder with other content"):
        chosen({"data.train": folder, "out": "imgs"})
    with pytest.raises(UsageError, match="no images, and no run in runs/none"):
        chosen({"out": "runs/none"})
    with pytest.raises(UsageError, match="own: no images; name them"):
        chosen({})
    with pytest.raises(UsageError, match=r"train\.epochs: expected int, got '5'"):
        chosen({"data.train": folder, "train.epochs": "5"})
    with pytest.raises(UsageError, match=r"unknown option train\.epoch; did you mean 'train\.epochs'"):
        chosen({"data.train": folder, "train.epoch": 5})
    with pytest.raises(UsageError, match="nowhere: does not exist"):
        chosen({"data.train": "nowhere"})
    tree(tmp_path / "one", classes=1, each=1)
    with pytest.raises(UsageError, match="one: 1 image to train on; a run needs at least 2"):
        chosen({"data.train": "one"})


def test_weights_to_begin_with_bring_their_shapes(tmp_path, folder, caplog):
    shapes = {"width": 96, "depth": 3, "heads": 3, "mlp_ratio": 3.0, "pool_depth": 1}
    # `own` would take layer norm with so few images
    heads = {"hidden": 40, "out": 24, "predictor_hidden": 48, "norm": "batch"}
    begun = from_dict({"model": shapes, "head": heads}, preset("smoke"))
    save_weights(tmp_path / "run", ExtreMA(begun), weights_meta(begun, 7))
    theirs = from_dict(
        {"model": {"width": 128, "depth": 1, "patch_size": 16, "pool_depth": 3}}, preset("smoke")
    )
    torch.save(Encoder(theirs.model).state_dict(), tmp_path / "bare.pth")
    with caplog.at_level(logging.INFO, "extrema_fast"):
        cfg = chosen({"data.train": folder}, init_from="run")
    assert re.search(r"encoder +width 96, depth 3 +as run has it", caplog.text)
    assert {k: getattr(cfg.model, k) for k in shapes} == shapes and cfg.model.patch_init == "xavier"
    assert re.search(r"crop .* as run has it", caplog.text)
    assert {k: getattr(cfg.head, k) for k in heads} == heads
    assert (cfg.model.img_size, cfg.model.patch_size) == (begun.model.img_size, begun.model.patch_size)
    with caplog.at_level(logging.INFO, "extrema_fast"):
        assert (
            chosen({"data.train": folder, "model.img_size": (48, 48)}, init_from="run").model.patch_size == 8
        )
    assert re.search(r"crop +48 x 48 px, patches of 8 +given, the rest as run has it", caplog.text)
    cfg = chosen({"data.train": folder}, init_from=tmp_path / "bare.pth")
    assert cfg.model.shape == (128, 1, 2) and cfg.model.pool_depth == 3
    # another project's crops and heads are none of a run's
    assert cfg.head.hidden == 512 and cfg.model.patch_size == 4
    # what is given stands, and does not fit then
    for given in ({"model.depth": 2}, {"model.size": "small"}):
        cfg = chosen({"data.train": folder, **given}, init_from="run")
        assert cfg.model.depth == given.get("model.depth", 0)
        with pytest.raises(UsageError, match="another architecture"):
            train.pretrain(cfg, init_from="run", progress=False)
    with pytest.raises(UsageError, match="gone: no such file"):
        chosen({"data.train": folder}, init_from="gone")
    # the same command later needs the weights no more
    command = ["pretrain", folder, "--init-from", "run", "--train.epochs", "1", "--log.no-report"]
    assert cli.main(command) == 0
    shutil.rmtree(tmp_path / "run")
    assert cli.main(command) == 0 and json.loads(Path("runs/imgs/env.json").read_text())["init_from"]


def test_a_configuration_with_images_and_epochs(tmp_path, folder, monkeypatch):
    seen: list[Config] = []
    monkeypatch.setattr(train, "is_finished", lambda cfg, allow: bool(seen.append(cfg)) or True)
    smoke = preset("smoke")
    assert train.pretrain(smoke, data=tmp_path / "imgs", out=tmp_path / "x", epochs=7) == tmp_path / "x"
    want = {"data": {"train": str(tmp_path / "imgs")}, "out": str(tmp_path / "x"), "train": {"epochs": 7}}
    assert seen == [from_dict(want, smoke)] and train.pretrain(smoke) == Path(smoke.out) and seen[1] == smoke


# ---- the command ----------------------------------------------------------------------------------


def printed(capsys, *args: str) -> tuple[dict, str]:
    assert cli.main(["pretrain", *args, "--print-config"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_folder_in_the_place_of_a_preset(tmp_path, folder, capsys):
    shown, table = printed(capsys, folder, "--train.epochs", "5", "--out", "runs/x")
    assert table.startswith("settings for imgs on 2 CPU cores, into runs/x:") and "5 epochs" in table
    assert shown["config"]["data"]["holdout"] == 0.2 and shown["config"]["optim"]["warmup_epochs"] < 5
    assert shown["sources"]["train.epochs"] == "flag" and shown["sources"]["model.width"] == "preset own"
    same, _ = printed(capsys, "own", "--data.train", folder, "--train.epochs", "5", "--out", "runs/x")
    assert same["config"] == shown["config"]
    same, _ = printed(capsys, "--data.train", folder, "--train.epochs", "5", "--out", "runs/x")
    assert same["config"] == shown["config"]
    # built-in images are no one's own
    assert printed(capsys, "--data.train", "synthetic")[0]["preset"] == "photos"
    # what was printed is the same run, wherever it is read
    (tmp_path / "c.json").write_text(json.dumps(shown))
    again, _ = printed(capsys, "--config", "c.json")
    assert again["preset"] == "own" and again["config"] == shown["config"]
    (tmp_path / "c.toml").write_text("[train]\nbatch_size = 8\n")
    from_file, _ = printed(capsys, folder, "--config", "c.toml")
    assert from_file["config"]["train"]["batch_size"] == 8
    assert from_file["sources"]["train.batch_size"] == "file" and not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("nothere", "unknown preset 'nothere'"),
        ("nothere", "nor is there a file or folder"),
        ("./nothere/imgs", "no such file or folder, and no preset"),
        ("imgs.tar", "no such file or folder, and no preset"),
        ("own", "own: no images"),
        ("imgs --train.batch-size 1000", "train.batch_size: 1000 is more than the 15 images to train on"),
        ("imgs --data.train x", "images are named twice"),
        ("imgs --preset own --train.epochs 0", "train.epochs: expected at least 1, got 0"),
        ("missing/{00..09}.tar", "missing/{00..09}.tar"),
        ("https://example.org/imgs.zip", "https://example.org/imgs.zip"),
    ],
)
def test_wrong_words_are_one_line(folder, capsys, args, words):
    assert cli.main(["pretrain", *args.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err


def test_a_rehearsal_and_a_profile(folder, capsys):
    assert cli.main(["pretrain", folder, "--dry-run", "--quiet"]) == 0
    assert "images_per_s" in capsys.readouterr().out and not Path("runs").exists()


def test_the_two_commands_of_the_readme(repository, tmp_path, monkeypatch, capsys):
    text = (repository / "README.md").read_text(encoding="utf-8")
    install, start = re.search(r"## Your own images\n.*?```\n(.*?)```", text, re.S)[1].strip().splitlines()
    program, *words = start.split()
    made = subprocess.run(
        [*install.split(), "-n", f"VENV={tmp_path}/.venv"], cwd=repository, capture_output=True, text=True
    )
    assert re.search(r'-m pip install .*-e "\.\[train,', made.stdout), made.stderr
    scripts = {e.name for e in metadata.entry_points(group="console_scripts")}
    assert program.startswith(".venv/bin/") and Path(program).name in scripts
    # a run of seconds
    monkeypatch.setattr(own, "SECONDS", 0.05)
    monkeypatch.setattr(own, "LEAST_SEEN", 1)
    tree(tmp_path / words[-1], each=5)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "settings for my_images on 2 CPU cores, into runs/my_images:" in err and "5 epochs" in err
    assert list((tmp_path / "runs/my_images").glob("weights/*/*.safetensors")), out + err
    report = (tmp_path / "runs/my_images/reports/report.html").read_text(encoding="utf-8")
    assert "my_images" in report and "evaluate runs/my_images" in out + err
    assert cli.main(words) == 0 and "complete" in capsys.readouterr().err


def test_processes_share_the_batch(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = chosen({"data.train": folder})
    assert isinstance(cfg, Config) and cfg.train.batch_size % 3 == 0


def test_all_processes_take_what_the_first_has_chosen(folder, monkeypatch):
    seen: list[Config] = []
    first = to_dict(chosen({"data.train": folder, "train.epochs": 9}))
    world = SimpleNamespace(
        size=2,
        rank=1,
        is_rank_zero=False,
        waits=False,
        agree=lambda what, value, remedy: None,
        broadcast=lambda x: first if isinstance(x, dict) else x,
        rank_zero_only=lambda call: call(),
    )
    monkeypatch.setattr(train, "start", lambda device: contextlib.nullcontext(world))
    monkeypatch.setattr(train, "is_finished", lambda cfg, allow: bool(seen.append(cfg)) or True)
    train.pretrain(data=folder, epochs=5)
    assert [to_dict(cfg) for cfg in seen] == [first]


def test_channels_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / "planes" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (36, 40, 5), np.uint8))
    cfg, _ = choose({"data.train": "planes"})
    assert (cfg.model.in_chans, cfg.model.img_size) == (5, (32, 32)) and cfg.data.holdout > 0
    with pytest.raises(UsageError, match=r"use --model\.in-chans 5"):
        choose({"data.train": "planes", "model.in_chans": 3})
    run = extrema_fast.pretrain(data="planes", epochs=1, progress=False)
    begun = json.loads((run / "config.json").read_text())
    assert begun["model"]["in_chans"] == 5 and to_dict(choose({"data.train": "planes"})[0]) == begun
