"""Runs over tar shards that die: the samples of the finished run are those of one that nothing happened to.

Covers: SIGKILL at points spread over a run of three epochs, global and by shards, with a broken image in a shard;
every step's samples in the log of samples, none lost, repeated or changed by a restart; bad_rows.tsv after it; other
data, order or window refused by name; files that break under a run and its evaluation; the budget from the command
line.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from extrema_fast.training.logging import read_log

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

TINY = {
    "data": {"loader": "pil", "threads": 1, "bad_budget": 0.1},
    "model": {"width": 16, "depth": 1, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
    # 43 images: 8 steps per epoch, three rows left out each time
    "train": {"epochs": 3, "batch_size": 5},
    "ckpt": {"every_epochs": 0, "every_steps": 3},
    "eval": {"every_epochs": 0},
    "log": {"every_steps": 4},
}
STEPS, BAD = 24, 17

# a line per step and process: step, rank, rows, sum of pixels, processor seconds; written before the step
LOG_SAMPLES = """
import json, os, time
from extrema_fast import train
original = train.train_step
def logging_samples(run, batch):
    line = [run.step, run.world.rank, batch.index.tolist(), int(batch.images.long().sum()), time.process_time()]
    with open(os.environ["SAMPLES"], "a") as f:
        f.write(json.dumps(line) + "\\n")
    return original(run, batch)
train.train_step = logging_samples
"""


def write_shards(folder: Path, counts=(19, 1, 13, 10)) -> None:
    folder.mkdir()
    row = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for _ in range(count):
                data = io.BytesIO()
                pixels = np.random.default_rng(row).integers(0, 256, (34, 40, 3), np.uint8)
                Image.fromarray(pixels).save(data, "PNG")
                content = data.getvalue() if row != BAD else data.getvalue()[:1500]
                info = tarfile.TarInfo(f"{row:04d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                row += 1


@pytest.fixture
def pretrain(run_cli, tmp_path):
    """`pretrain(folder, *flags, ...)` -> (exit codes, output, folder); trains on four shards of 43 images."""
    write_shards(tmp_path / "shards")

    def run(name: str, *flags: str, data: Path | None = None, extra: str = "", env=None, **options):
        config, out = tmp_path / "config.json", tmp_path / name
        config.write_text(json.dumps(TINY))
        env = {"SAMPLES": str(tmp_path / f"{name}.samples"), **(env or {})}
        codes, text = run_cli(
            "pretrain", "smoke", "--config", config, "--data.train", data or tmp_path / "shards", "--out", out,
            *flags, setup=LOG_SAMPLES + extra, env=env, **options,
        )  # fmt: skip
        return codes, text, out

    return run


def samples(out: Path) -> list[list]:
    return [json.loads(line) for line in out.with_suffix(".samples").read_text().splitlines()]


def by_step(lines: list[list]) -> dict[int, list]:
    """step -> [rows, sum of pixels]; a step that was repeated must have been the same."""
    found: dict[int, list] = {}
    for step, _, *what, _ in lines:
        assert found.setdefault(step, what) == what, f"step {step} was another after a restart"
    return found


def final_hash(out: Path) -> str:
    done = out / "checkpoints" / f"step_{STEPS:08d}" / "COMPLETE"
    return json.loads(done.read_text())["state.safetensors"]["sha256"]


def check_epochs(want: dict[int, list]) -> None:
    """Each epoch of 43 images has 40, no one twice, the broken one not at all."""
    assert sorted(want) == list(range(STEPS))
    for epoch in range(3):
        rows = [r for step in range(8 * epoch, 8 * epoch + 8) for r in want[step][0]]
        assert len(rows) == 40 == len(set(rows)) and BAD not in rows


def die_and_continue(pretrain, moments: int, *flags: str) -> int:
    """Kills a run at `moments` random moments, each time a run of its own; returns how many were hit."""
    codes, text, straight = pretrain("straight", *flags)
    assert codes == [0], text
    want = by_step(samples(straight))
    check_epochs(want)
    spent = [line[4] for line in samples(straight)]
    draw, hit = random.Random(" ".join(flags)), 0
    for number in range(moments):
        name, seconds = f"run{number}", draw.uniform(spent[0], spent[-1])
        codes, text, out = pretrain(name, *flags, cpu_seconds=seconds)
        hit += codes != [0]
        if codes != [0]:
            assert codes[0] < 0, text
            codes, text, out = pretrain(name, *flags)
        assert codes == [0], text
        assert by_step(samples(out)) == want, f"killed after {seconds:.2f} s of processor time"
        assert final_hash(out) == final_hash(straight)
        rows = (out / "bad_rows.tsv").read_text().splitlines()[2:]
        assert [line.split("\t")[0] for line in rows] == [str(BAD)]
    return hit


@pytest.mark.parametrize("flags", [(), ("--data.order", "shards", "--data.window", "2")])
def test_killed_at_random_moments(pretrain, flags):
    # a moment may come too late on a machine of another speed; not both
    assert die_and_continue(pretrain, 2, *flags) >= 1


@pytest.mark.slow
def test_killed_at_twenty_random_moments(pretrain):
    assert die_and_continue(pretrain, 20, "--data.order", "shards", "--data.window", "2") >= 12


def test_the_table_of_unusable_rows_is_no_part_of_the_result(pretrain):
    codes, text, straight = pretrain("straight")
    assert codes == [0], text
    codes, text, out = pretrain("run", env={"EXTREMA_FAULT": "renamed:2"})
    assert codes == [-9], text
    (out / "bad_rows.tsv").unlink()
    codes, text, out = pretrain("run")
    assert codes == [0] and "continuing at step 6 of 24" in text, text
    assert by_step(samples(out)) == by_step(samples(straight)) and final_hash(out) == final_hash(straight)
    records = [r for r in read_log(out / "log.jsonl") if r["kind"] == "train"]
    assert records[-1]["bad_images"] == 1 and all("data_wait" in r for r in records)


def test_what_must_not_change_is_named(pretrain, tmp_path):
    codes, text, out = pretrain("run", env={"EXTREMA_FAULT": "renamed:1"})
    assert codes == [-9], text
    for flags, said in (
        (("--data.order", "shards"), "data.order: 'global' -> 'shards'"),
        (("--data.window", "3"), "data.window: 16 -> 3"),
        (("--data.exif",), "data.exif: False -> True"),
        (("--train.batch-size", "6"), "train.batch_size: 5 -> 6"),
        (("--train.seed", "9"), "train.seed: 0 -> 9"),
    ):
        codes, text, _ = pretrain("run", *flags)
        assert codes == [2] and said in text, text
    write_shards(tmp_path / "other", (19, 1, 13))
    for name in ("0.tar", "1.tar", "2.tar", "3.tar"):
        (tmp_path / "shards" / name).unlink()
    for name in ("0.tar", "1.tar", "2.tar"):
        (tmp_path / "other" / name).rename(tmp_path / "shards" / name)
    codes, text, _ = pretrain("run")
    assert codes == [2] and "data fingerprint: " in text and "images: 43 -> 33" in text, text
    assert "shards: 4 -> 3" in text


BREAK_ONE = """
from extrema_fast import train
before = train._step
def breaking(run, batch):
    if run.step == 3:
        for row in (5, 6):
            open(run.source.paths[row], "wb").close()
    return before(run, batch)
train._step = breaking
"""


def test_files_that_break_under_a_run_and_its_evaluation(pretrain, run_cli, tmp_path):
    folder = tmp_path / "images"
    for row in range(44):
        path = folder / "ab"[row % 2] / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (34, 40, 3), np.uint8)).save(path)
    flags = ("--data.test", str(folder), "--eval.every-epochs", "1", "--eval.k", "3")
    before = [p.read_bytes() for p in sorted(folder.rglob("*.png"))]
    codes, text, out = pretrain("run", *flags, data=folder, extra=BREAK_ONE)
    assert codes == [0], text
    assert (
        text.count("left out from now on") == 2
        and "2 of 44 images cannot be decoded and are left out" in text
    )
    evals = [r for r in read_log(out / "log.jsonl") if r["kind"] == "eval"]
    assert [r["images"] for r in evals] == [44, 42, 42, 42]
    rows = [r for line in samples(out)[8:] for r in line[2]]
    assert not {5, 6} & set(rows)
    # a budget of one row, which is the default for so few
    for path, data in zip(sorted(folder.rglob("*.png")), before, strict=True):
        path.write_bytes(data)
    codes, text, out = pretrain("strict", *flags, "--data.bad-budget", "1e-4", data=folder, extra=BREAK_ONE)
    assert codes == [4] and "2 of 44 images cannot be used, data.bad_budget allows 1" in text, text
    assert "--data.train M.tsv" in json.loads((out / "status.json").read_text())["reason"]
    # mended, the same command goes on
    for path, data in zip(sorted(folder.rglob("*.png")), before, strict=True):
        path.write_bytes(data)
    codes, text, out = pretrain("strict", *flags, "--data.bad-budget", "1e-4", data=folder)
    assert codes == [0] and text.count("can be decoded again") == 2, text
