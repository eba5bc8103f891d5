"""Symbolic links inside the folders that are written: what they point to stays as it is.

Covers: every file and folder inside a run, a folder of features, of shards and the record of an index, each replaced by
a link to a foreign file or folder (there, or missing), then continued, replaced by force, evaluated and reported; names
with control characters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extrema_fast import train
from extrema_fast.cli import main
from extrema_fast.evaluation.evaluate import evaluate
from extrema_fast.reporting.report import report
from extrema_fast.tools.embed import embed
from extrema_fast.tools.index import index
from extrema_fast.tools.pack import pack
from extrema_fast.training.checkpoint import Saver

QUIET = {"loader": "pil", "progress": False, "device": "cpu"}
# more entries that are written, though a finished folder does not hold them
MORE = {
    "run": (
        "run.lock",
        "tensorboard",
        "trackers",
        "bad_rows.tsv",
        ".tmp-latest",
        "weights/.tmp-x",
        "checkpoints/step_00000008",
    ),
    "features": (".parts", ".parts/lock", "broken.tsv", ".tmp-config"),
    "packed": (".pack", "shard-000001.tar", "bad.tsv"),
}


def continue_run(s: Any) -> None:
    cfg = s.config(train={"epochs": 2})
    train.pretrain(cfg, progress=False, allow_config_change=True)


def write_run(s: Any) -> None:
    evaluate(s.run, device="cpu", force=True)
    report(s.run, images=0)


def again(s: Any) -> None:
    embed(str(s.images), s.features, s.run, batch_size=3, part_images=6, **QUIET)


def by_force(s: Any) -> None:
    embed(str(s.images), s.features, s.run, batch_size=3, part_images=6, tokens="mean", force=True, **QUIET)


# folder -> what is done to it
ACTIONS: dict[str, tuple[Callable[[Any], object], ...]] = {
    "run": (continue_run, write_run),
    "features": (again, by_force),
    "packed": (
        lambda s: pack(str(s.images), s.packed, progress=False),
        lambda s: pack(str(s.images), s.packed, progress=False, force=True, size=20),
    ),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entries(folder: Path, name: str) -> list[str]:
    found = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*"))]
    return [*found, *(m for m in MORE[name] if m not in found)]


@pytest.mark.parametrize("name", ACTIONS)
def test_links_are_not_followed(originals, tries, tmp_path, name):
    places = [(e, a) for e in entries(getattr(originals, name), name) for a in ACTIONS[name]]
    if tries.factor == 1:
        # an evaluation takes as long as all others
        places = [(e, a) for e, a in places if a is not write_run]
        places = [places[i] for i in tries.rng.permutation(len(places))[: {"run": 1}.get(name, 3)]]
    for entry, act in places:
        s = originals.copy(tmp_path / "s")
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        place, target = getattr(s, name) / entry, foreign / "target"
        there = bool(tries.rng.random() < 0.8)
        if place.is_dir():
            place.rename(target)
        elif place.is_file():
            shutil.copy(place, target)
            place.unlink()
        elif there:
            # as what is made there would be
            target.mkdir() if "." not in place.name[1:] and place.name != "lock" else target.write_text(
                "mine"
            )
        if not there:
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(target)
        before = snapshot(foreign)
        tries.judge(f"{entry}, {act.__name__}", lambda act=act, s=s: act(s))
        changed = {k for k in before | snapshot(foreign) if before.get(k) != snapshot(foreign).get(k)}
        tries.expect(f"{entry}, {act.__name__}: what it points to", not changed, sorted(changed))
        shutil.rmtree(s.root)
        shutil.rmtree(foreign)


def test_links_in_the_record_of_an_index(things, tries, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "000000.json").write_text('{"lines": []}')
    (foreign / "mine.txt").write_text("mine")
    before = snapshot(foreign)
    part = things.root / "new.tsv.part"
    places = (part, part / "lock", part / ".tmp-000000.json-1", part / "000000.json")
    for place in places if tries.factor > 1 else places[1:3]:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink() if part.is_symlink() else None
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(foreign if place == part else foreign / "mine.txt")
        for force in (False, True):
            tries.judge(place.name, lambda force=force: make_index(things, force))
            tries.expect(place.name, snapshot(foreign) == before, snapshot(foreign).keys())


def make_index(s: Any, force: bool) -> None:
    (s.root / "new.tsv").unlink(missing_ok=True)
    index(str(s.images), s.root / "new.tsv", progress=False, threads=1, force=force)


def test_pruning_removes_the_link_alone(originals, tmp_path):
    s = originals.copy(tmp_path / "s")
    foreign = tmp_path / "foreign"
    (s.checkpoint).rename(foreign)
    s.checkpoint.symlink_to(foreign)
    before = snapshot(foreign)
    saver = Saver(s.run, s.config(ckpt={"retain": 2}).ckpt, 4, resumed=4)
    for step in (5, 6):
        shutil.copytree(foreign, s.run / "checkpoints" / f"step_{step:08d}")
        saver._usable[step] = True
    saver._usable[2] = True
    saver._prune(6)
    assert not s.checkpoint.is_symlink() and snapshot(foreign) == before


def test_names_with_control_characters(originals, tries, tmp_path, capsys):
    s = originals.copy(tmp_path / "s")
    evil = "\x1b[2J\x1b]0;owned\x07\u202e"
    good = next(s.images.rglob("*.png"))
    folder = s.images / f"a{evil}"
    folder.mkdir()
    for i in range(3):
        shutil.copy(good, folder / f"{evil}{i}.png")
    (folder / f"{evil}broken.png").write_bytes(good.read_bytes()[:60])
    os.link(folder / f"{evil}broken.png", os.fsencode(folder) + b"/\xff.png")
    out = tmp_path / f"out{evil}"
    new = ["--train.epochs", "1", "--data.bad-budget", "0.5", "--data.test", str(s.images)]
    table = (
        ["index", str(s.images), "--out", str(out) + ".tsv", "--threads", "1"],
        ["embed", str(s.images), str(out), "--weights", str(s.run), "--loader", "pil", "--device", "cpu"],
        ["search", str(folder / f"{evil}0.png"), str(out)],
        ["pack", str(s.images), f"{out}packed", "--max-bad", "0.5"],
        ["evaluate", str(s.run), "--train", str(s.images), "--test", str(s.images), "--device", "cpu"],
        [
            "pretrain",
            "smoke",
            "--data.train",
            str(s.images),
            "--out",
            f"{out}run",
            "--data.loader",
            "pil",
            *new,
        ],
        ["report", f"{out}run"],
        ["evaluate", f"{out}nowhere"],
        ["encoders", evil],
        [evil],
        ["report", "--images", evil],
    )
    for args in table if tries.factor > 1 else (table[0], *table[-4:]):
        main(args)
        shown = "".join(capsys.readouterr())
        tries.expect(args[0], not any(c in shown for c in "\x1b\x07\u202e"), repr(shown[:400]))
