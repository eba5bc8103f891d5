"""The command line on the null GPU, in a process of its own, from images to files.

Covers: pretrain plain, compiled by blocks and recorded in a CUDA graph, the last two from another project's trunk;
stopped by a signal, saved, continued to the end; what the run's files say of the device; machines without a C compiler,
with caches that cannot be written, with a GPU that is too old for the kernels.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from extrema_fast.config import smoke
from tests.weights._weights import foreign_vit

MODES = {
    "plain": ["--train.compile", "none", "--train.cuda-graph", "off"],
    "block": ["--train.compile", "block", "--train.cuda-graph", "off"],
    "graph": ["--train.compile", "none", "--train.cuda-graph", "on"],
}
# the loader of the smallest environment; nothing to measure; evaluations need values
COMMON = ["--data.loader", "pil", "--system.backend", "fixed", "--eval.every-epochs", "0"]
# the signal arrives during the sixth of eight steps
STOP = """
import os, signal
from extrema_fast import train
original = train.train_step
def stopping(run, batch):
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(run, batch)
train.train_step = stopping
"""


def state(out: Path) -> tuple[str, int]:
    found = json.loads((out / "status.json").read_text())
    return found["state"], found["step"]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_stopped_and_continued(mode, run_cli, tmp_path):
    out = tmp_path / "run"
    args = ["pretrain", "smoke", "--out", out, "--train.precision", "bf16", *COMMON, *MODES[mode]]
    if begun := mode != "plain":
        # of another project, in fp32 on the CPU; one of the eight steps leaves the trunk as it is
        torch.save(foreign_vit(smoke().model), tmp_path / "vit.pth")
        args += ["--init-from", tmp_path / "vit.pth"]
    (code,), text = run_cli(*args, setup=STOP)
    assert ("the trunk is frozen for 1 step," in text) == begun, text
    assert code > 0 and state(out)[1] == 6, text
    # after three plain steps
    assert ("step recorded" in text) == (mode == "graph"), text
    (code,), text = run_cli(*args)
    assert code == 0 and state(out) == ("complete", 8), text
    saved = out / "checkpoints" / "step_00000008"
    assert (saved / "COMPLETE").exists() and (
        out / "weights" / "step_00000008" / "teacher.safetensors"
    ).exists()
    environment = json.loads((out / "env.json").read_text())
    assert environment["gpu"] == "Null GPU (H100)" and environment["resolved"]["cuda_graph"] == (
        mode == "graph"
    )


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CC": "/nowhere/cc"}, "nothing is compiled: Triton cannot compile a kernel here"),
        ({"TRITON_CACHE_DIR": "/proc/nowhere"}, "a cache folder that it can write (TRITON_CACHE_DIR)"),
        (
            {"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"},
            "nothing is compiled: torch.compile cannot write its cache",
        ),
        (
            {"NULLGPU_CAPABILITY": "75"},
            "plain torch runs in place of the kernels: this GPU has compute capability 7.5",
        ),
    ],
    ids=["compiler", "triton", "inductor", "age"],
)
def test_a_machine_that_lacks_something(env, words, run_cli, tmp_path):
    out = tmp_path / "run"
    # only the last would compile
    mode = ["--train.compile", "none"] if "NULLGPU_CAPABILITY" in env else []
    # without its kernel, crops of held images are cut by sizes that the host reads, which are 0 here
    mode += ["--data.resident", "off"]
    args = ["pretrain", "smoke", "--out", out, "--train.precision", "auto", *COMMON, *mode]
    (code,), text = run_cli(*args, env={"TRITON_CACHE_DIR": str(tmp_path / "triton")} | env)
    assert code == 0 and state(out) == ("complete", 8), text
    said = [line for line in text.splitlines() if words in line and not line.startswith("op ")]
    assert len(said) == 1, text
    resolved = json.loads((out / "env.json").read_text())["resolved"]
    assert resolved["compile"] == "none"
    assert (resolved["ops"]["attention_pool"] == "triton") == ("TORCHINDUCTOR_CACHE_DIR" in env), text
