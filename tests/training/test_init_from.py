"""A run that begins from the trunk of another project's vision transformer.

Covers: what is printed and recorded; the trunk is frozen while pooling and heads warm up; stopped and continued is
bit-equal; the weights it saves keep a learned table; a dry run begins as the run does. (Two processes:
tests/dist/test_two_processes.py.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extrema_fast import train
from extrema_fast.errors import Preempted
from extrema_fast.files import history
from extrema_fast.tools.dry_run import dry_run
from extrema_fast.weights.load import load_encoder
from tests.training.conftest import final_hash, tiny
from tests.training.test_resume import stop_at
from tests.weights._weights import foreign_vit

# 3 steps an epoch
RUN = {
    "model": {"width": 64, "depth": 2, "mlp_ratio": 2.0},
    "optim": {"warmup_epochs": 2},
    "train": {"epochs": 3},
    "ckpt": {"every_steps": 1, "retain": 20},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(foreign_vit(tiny("unused", RUN).model), path)
    return path


def pretrain(out: Path, file: Path | None) -> Path:
    return train.pretrain(tiny(out, RUN), init_from=file)


def weights(run: Path, step: int, which: str = "student") -> dict:
    return load_file(run / "weights" / f"step_{step:08d}" / f"{which}.safetensors")


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_from_a_trunk(tmp_path, monkeypatch, capsys, file, stop):
    straight, state = pretrain(tmp_path / "straight", file), torch.load(file)
    said = capsys.readouterr().out
    assert (
        "begins from" in said
        and said.count("the trunk is frozen for 3 steps") == 1
        and "predictor        fresh" in said
    )
    env = json.loads((straight / "env.json").read_text())
    assert env["init_from"]["weights"] == str(file) and env["init_from"]["pooling"] == "fresh"
    # the rate of everything is 0 at step 0, that of the trunk to step 3
    key, head = "blocks.0.attn.qkv.weight", "blocks_token.0.attn.q.weight"
    assert torch.equal(weights(straight, 4)[key], state[key])
    assert not torch.equal(weights(straight, 5)[key], state[key])
    assert not torch.equal(weights(straight, 2)[head], weights(straight, 1)[head])
    # stopped while it rests, and when it is trained
    with monkeypatch.context() as m:
        stop_at(stop, m)
        with pytest.raises(Preempted):
            pretrain(tmp_path / "run", file)
    # the file is not needed any more
    run = pretrain(tmp_path / "run", None)
    assert final_hash(run, 9) == final_hash(straight, 9)
    assert json.loads((run / "env.json").read_text())["init_from"] == env["init_from"]
    for which in ("student", "teacher"):
        encoder = load_encoder(run, which)
        assert isinstance(encoder.pos_embed, torch.nn.Parameter)
        assert torch.equal(encoder.pos_embed, state["pos_embed"][:, 1:])


def test_a_dry_run_begins_as_the_run_does(tmp_path, file):
    values = dry_run(tiny(tmp_path / "run", RUN), 1, init_from=file)
    assert values["init_from: trunk"].startswith("kept: 2 blocks") and values["init_from: pooling"] == "fresh"
    assert not list(tmp_path.iterdir())
    change = {"train": {"epochs": 1}, "optim": {"warmup_epochs": 0.5}, "log": {"every_steps": 1}}
    run = train.pretrain(tiny(tmp_path / "run", RUN, change), init_from=file)
    assert values["loss"] == history(run / "log.jsonl", "train", 9)[0]["loss"]
    # a checkpoint is there: a run would begin from that
    assert "init_from: trunk" not in dry_run(tiny(run, RUN), 1, init_from=file)
    assert "init_from: trunk" in dry_run(tiny(run, RUN), 1, init_from=file, overwrite=True)
