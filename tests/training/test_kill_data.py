"""Runs over tar shards that die: the samples of the finished run are those of one that nothing happened to.

Covers: death at random moments of three epochs, global and by shards, with a broken image in a shard; every step's
samples, none lost, repeated or changed by a restart; bad_rows.tsv; other data, order or window refused by name; files
that break under a run and its evaluation; the budget.
"""

from __future__ import annotations

import io
import json
import random
import signal
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from extrema_fast.files import read_log
from tests.training.conftest import final_hash, status, tiny

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

# 43 images: 8 steps an epoch, three rows left out each time
RUN = {
    "data": {"limit": 0, "bad_budget": 0.1},
    "model": {"depth": 1},
    "train": {"epochs": 3, "batch_size": 5},
    "ckpt": {"every_steps": 3},
    "log": {"every_steps": 4},
}
STEPS, BAD = 24, 17

# a line per step: its number, rows, sum of pixels; written before the step. At DIES = 7.4 the process dies
# without any cleaning up 0.4 of a step's processor time after step 7 began, or when step 8 begins
LOG_SAMPLES = """
import json, os, signal, time
from extrema_fast import train
original, moment, began = train.train_step, float(os.environ.get("DIES", "inf")), []
def logging_samples(run, batch):
    with open(run.cfg.out + ".samples", "a") as f:
        f.write(json.dumps([run.step, batch.index.tolist(), int(batch.images.long().sum())]) + "\\n")
    began.append(time.process_time())
    if run.step == moment // 1 and len(began) > 1:
        signal.setitimer(signal.ITIMER_PROF, max(1e-3, moment % 1 * (began[-1] - began[-2])))
    if run.step == moment // 1 + 1:
        os.kill(os.getpid(), signal.SIGPROF)
    return original(run, batch)
train.train_step = logging_samples
"""


def png(row: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(row).integers(0, 256, (34, 40, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_shards(folder: Path, counts=(19, 1, 13, 10)) -> None:
    folder.mkdir()
    rows = iter(range(sum(counts)))
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in islice(rows, count):
                content = png(row)[:1500] if row == BAD else png(row)
                info = tarfile.TarInfo(f"{row:04d}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def pretrain(command, tmp_path):
    """`pretrain(folder, *flags, ...)` -> (exit code, output, folder); trains on four shards of 43 images."""
    write_shards(tmp_path / "shards")

    def run(name: str, *flags: str, data: Path | None = None, extra: str = "", **options):
        cfg = tiny(tmp_path / name, RUN, data={"train": str(data or tmp_path / "shards")})
        (code,), text = command(cfg, *flags, setup=LOG_SAMPLES + extra, **options)
        return code, text, tmp_path / name

    return run


def samples(out: Path) -> list[list]:
    return [json.loads(line) for line in out.with_suffix(".samples").read_text().splitlines()]


def by_step(out: Path) -> dict[int, list]:
    """step -> [rows, sum of pixels]; a step that was repeated must have been the same."""
    found: dict[int, list] = {}
    for step, *what in samples(out):
        assert found.setdefault(step, what) == what, f"step {step} was another after a restart"
    return found


@pytest.mark.parametrize("order", ["global", "shards"])
def test_killed_at_random_moments(pretrain, request, order):
    flags = ("--data.order", order, "--data.window", "2")
    code, text, straight = pretrain("straight", *flags)
    assert code == 0, text
    want = by_step(straight)
    assert sorted(want) == list(range(STEPS))
    for epoch in range(3):
        rows = [r for step in range(8 * epoch, 8 * epoch + 8) for r in want[step][0]]
        assert len(rows) == 40 == len(set(rows)) and BAD not in rows
    # each run dies twice, the second time no earlier than the first
    moments = random.Random(f"{order}{request.config.getoption('try_seed') or ''}")
    for number in range(2 * request.config.getoption("tries")):
        for dies in sorted(moments.uniform(0, STEPS - 1) for _ in range(2)):
            code, text, out = pretrain(f"run{number}", *flags, env={"DIES": str(dies)})
            assert code == -signal.SIGPROF, text
        code, text, out = pretrain(f"run{number}", *flags)
        assert code == 0, text
        assert by_step(out) == want and final_hash(out, STEPS) == final_hash(straight, STEPS)
        rows = (out / "bad_rows.tsv").read_text().splitlines()[2:]
        assert [line.split("\t")[0] for line in rows] == [str(BAD)]


def test_the_table_of_unusable_rows_is_no_part_of_the_result(pretrain):
    code, text, straight = pretrain("straight")
    assert code == 0, text
    code, text, out = pretrain("run", env={"EXTREMA_FAULT": "renamed:2"})
    assert code == -9, text
    (out / "bad_rows.tsv").unlink()
    code, text, out = pretrain("run")
    assert code == 0 and "continuing at step 6 of 24" in text, text
    assert by_step(out) == by_step(straight) and final_hash(out, STEPS) == final_hash(straight, STEPS)
    records = [r for r in read_log(out / "log.jsonl") if r["kind"] == "train"]
    assert records[-1]["bad_images"] == 1 and all("data_wait" in r for r in records)


def test_what_must_not_change_is_named(pretrain, tmp_path):
    code, text, _ = pretrain("run", env={"EXTREMA_FAULT": "renamed:1"})
    assert code == -9, text
    flags = "--data.order shards --data.window 3 --data.exif --train.batch-size 6 --train.seed 9"
    code, text, _ = pretrain("run", *flags.split())
    assert code == 2, text
    for said in (
        "data.order: 'global' -> 'shards'",
        "data.window: 16 -> 3",
        "data.exif: False -> True",
        "train.batch_size: 5 -> 6",
        "train.seed: 0 -> 9",
    ):
        assert said in text
    (tmp_path / "shards").rename(tmp_path / "before")
    write_shards(tmp_path / "shards", (19, 1, 13))
    code, text, _ = pretrain("run")
    assert code == 2 and "data fingerprint: " in text, text
    assert "images: 43 -> 33" in text and "shards: 4 -> 3" in text


BREAK_TWO = """
from extrema_fast import train
before = train._step
def breaking(run, *args):
    if run.step == 3:
        for row in (5, 6):
            open(run.source.paths[row], "wb").close()
    return before(run, *args)
train._step = breaking
"""


def test_files_that_break_under_a_run_and_its_evaluation(pretrain, tmp_path):
    folder = tmp_path / "images"

    def write_images() -> None:
        for row in range(44):
            path = folder / "ab"[row % 2] / f"{row:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(row))

    write_images()
    flags = ("--data.test", str(folder), "--eval.every-epochs", "1", "--eval.k", "99")
    code, text, out = pretrain("run", *flags, data=folder, extra=BREAK_TWO)
    assert code == 0 and text.count("left out from now on") == 2, text
    # by the first of three evaluations alone
    assert text.count("2 of 44 images cannot be decoded and are left out") == 1
    assert text.count("eval.k: 99, and k-NN has 44 images") == 1
    evals = [r for r in read_log(out / "log.jsonl") if r["kind"] == "eval"]
    assert [r["images"] for r in evals] == [44, 42, 42, 42]
    assert not {5, 6} & {r for line in samples(out)[8:] for r in line[1]}
    # a budget of one row, which is the default for so few
    write_images()
    flags += ("--data.bad-budget", "1e-4")
    code, text, out = pretrain("strict", *flags, data=folder, extra=BREAK_TWO)
    assert code == 4 and "2 of 44 images cannot be used, data.bad_budget allows 1" in text, text
    assert "--data.train M.tsv" in status(out)["reason"]
    # repaired, the same command goes on
    write_images()
    code, text, out = pretrain("strict", *flags, data=folder)
    assert code == 0 and text.count("can be decoded again") == 2, text
