"""What the tests of training share: a tiny run, in this process or as a command, and its results."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from extrema_fast import train
from extrema_fast.config import Config, from_dict, smoke, to_dict
from extrema_fast.training.checkpoint import Checkpoint, Stored

TINY = {
    "data": {"loader": "pil", "threads": 1, "limit": 24},
    "model": {"width": 16, "depth": 2, "drop_path": 0.2, "patch_size": 16},
    "mask": {"ratio": 0.5},
    "head": {"hidden": 16, "out": 8, "predictor_hidden": 16},
    "optim": {"base_lr": 0.02},
    # 3 steps an epoch
    "train": {"epochs": 2, "batch_size": 8},
    "ckpt": {"every_epochs": 0, "every_steps": 0},
    "eval": {"every_epochs": 0},
    "log": {"report": False},
}


def tiny(out: Path | str = "unused", *changes: dict, **change) -> Config:
    """The tiny run in a folder, changed."""
    cfg = from_dict(TINY | {"out": str(out)}, smoke())
    for c in (*changes, change):
        cfg = from_dict(c, cfg)
    return cfg


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def final_hash(run: Path, step: int) -> str:
    """sha256 of a checkpoint's tensors: weights, teacher, moments, counters."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    done, state = (json.loads((folder / name).read_text()) for name in ("COMPLETE", "state.json"))
    parts = [mark["sha256"] for mark in state.get("parts", {}).values()]
    return " ".join([done["state.safetensors"]["sha256"], *parts])


def saved(run: Path, step: int) -> Stored:
    """The tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return Checkpoint(folder, json.loads((folder / "state.json").read_text())).tensors()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM arrives during that step."""
    original = train.train_step

    def stopping(run, batch):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    monkeypatch.setattr(train, "train_step", stopping)


@pytest.fixture
def command(run_cli, tmp_path):
    """`command(cfg, *flags, ...)` -> (exit codes, output) of `extrema-fast pretrain` in processes of their own."""

    def run(cfg: Config, *flags: object, **options):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(to_dict(cfg)))
        return run_cli("pretrain", "smoke", "--config", file, *flags, **options)

    return run
