"""Two processes and images that cannot be decoded.

Covers: broken files among good ones, five epochs, one process and two see the same rows, every good row once;
the list holds what either has found; over the budget both stop with one message, also when only one has found
anything and before a checkpoint is written.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from extrema_fast.files import read_log

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

TINY = {
    "data": {"loader": "pil", "threads": 1},
    "model": {"width": 16, "depth": 1, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
    "train": {"epochs": 5, "batch_size": 8},
    "ckpt": {"every_epochs": 0, "every_steps": 3},
    "eval": {"every_epochs": 0},
    "log": {"every_steps": 5},
}
ROWS, BAD = 40, (3, 14, 25)

LOG_SAMPLES = """
import json, os
from extrema_fast import train
original = train.train_step
def logging_samples(run, batch):
    line = [run.step, run.world.rank, batch.index.tolist(), int(batch.images.long().sum())]
    with open(os.environ["SAMPLES"] + str(run.world.rank), "a") as f:
        f.write(json.dumps(line) + "\\n")
    return original(run, batch)
train.train_step = logging_samples
"""


@pytest.fixture
def pretrain(run_cli, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(ROWS):
        pixels = np.random.default_rng(row).integers(0, 256, (34, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:02d}.png")

    def run(name: str, *flags: str, **options):
        config, out = tmp_path / "config.json", tmp_path / name
        config.write_text(json.dumps(TINY))
        args = ["pretrain", "smoke", "--config", config, "--data.train", folder, "--out", out, *flags]
        codes, text = run_cli(*args, setup=LOG_SAMPLES, env={"SAMPLES": str(out) + "."}, **options)
        return codes, text, out

    run.folder = folder
    return run


def rows_by_step(out: Path, processes: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for rank in range(processes):
        for line in Path(f"{out}.{rank}").read_text().splitlines():
            step, _, rows, _ = json.loads(line)
            found.setdefault(step, []).extend(rows)
    return found


def test_one_process_and_two_over_broken_files(pretrain):
    for row in BAD:
        path = pretrain.folder / f"{row:02d}.png"
        path.write_bytes(path.read_bytes()[:1500])
    seen = []
    for processes in (1, 2):
        codes, text, out = pretrain(f"run{processes}", "--data.bad-budget", "0.1", processes=processes)
        assert codes == [0] * processes, text
        seen.append(rows_by_step(out, processes))
        table = (out / "bad_rows.tsv").read_text().splitlines()[2:]
        assert [int(line.split("\t")[0]) for line in table] == list(BAD)
        assert read_log(out / "log.jsonl")[-1]["bad_images"] == 3
    assert seen[0] == seen[1]
    for epoch in range(5):
        rows = [r for step in range(5 * epoch, 5 * epoch + 5) for r in seen[0][step]]
        counts = np.bincount(rows, minlength=ROWS)
        assert counts.sum() == 40 and (counts[list(BAD)] == 0).all()
        assert (np.delete(counts, BAD) >= 1).all()


@pytest.mark.parametrize("places", [(1, 6), (4, 5, 6, 7)], ids=["one each", "all of one"])
def test_over_the_budget_both_stop_alike(pretrain, places):
    """Neither has found more than the one that is allowed, or one cannot continue; together they stop."""
    # of the first batch: places 0 to 3 are one process's, 4 to 7 the other's
    codes, text, out = pretrain("clean", "--train.epochs", "1", processes=2)
    assert codes == [0, 0], text
    first = rows_by_step(out, 2)[0]
    for row in (first[place] for place in places):
        (pretrain.folder / f"{row:02d}.png").write_bytes(b"nothing of an image")
    codes, text, out = pretrain("run", processes=2)
    assert codes == [4, 4], text
    assert "of 40 images cannot be used, data.bad_budget allows 1" in text
    assert "cannot be used" in json.loads((out / "status.json").read_text())["reason"]
    # noticed after step 3, whose images were all replaced: it is saved
    assert [p.name for p in out.glob("checkpoints/step_*")] == ["step_00000003"]
    assert len((out / "bad_rows.tsv").read_text().splitlines()) >= 4
