"""A step of a run computed again.

Covers: what a run keeps of skipped steps, and how many; the module named for values that are not finite in weights,
activations, gradients, loss and norm, forward and backward, with the images that cause it; any step of a run from its
checkpoints or its start, with the loss that the log has, fine-tuning too; unusable images; what cannot be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from extrema_fast import train
from extrema_fast.cli import main
from extrema_fast.config import FINETUNE_PRESETS, from_dict
from extrema_fast.errors import NonFiniteError, UsageError
from extrema_fast.files import history
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.models.layers import Mlp
from extrema_fast.tools.replay import describe, replay
from extrema_fast.training import capture
from tests.training.conftest import TINY, tiny

INF = float("inf")


def in_mlp(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Changes what the MLP of the student's block 1 gives, from step 4 on."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        original = Mlp.forward

        def forward(self, x, *args):
            out = original(self, x, *args)
            return change(out) if self.label == "blocks.1.mlp" and x.requires_grad else out

        patch.setattr(Mlp, "forward", forward)

    return spoil


def in_loss(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    original = ExtreMA.loss
    return lambda patch: patch.setattr(ExtreMA, "loss", lambda self, *args: change(original(self, *args)))


def hooked(x: torch.Tensor) -> torch.Tensor:
    """`x`, whose gradient becomes infinite."""
    y = x * 1
    y.register_hook(lambda grad: grad * INF)
    return y


def spoil_one(out: torch.Tensor) -> torch.Tensor:
    # the second view of the image in place 3 of 8
    out = out.clone()
    out[8 + 3, 0, 0] = float("nan")
    return out


# what spoils steps from the fourth on, the pass, module and images that are named
CASES = {
    "one image": (in_mlp(spoil_one), "forward", "student_branch.encoder.blocks.1.mlp", [3]),
    "gradient of an MLP": (in_mlp(hooked), "backward", "student_branch.encoder.blocks.1.mlp", None),
    "loss": (in_loss(lambda x: x * float("nan")), "forward", "the loss", []),
    "gradient of the loss": (in_loss(hooked), "backward", "the loss", None),
    # every gradient is finite, their squares are not
    "norm": (in_loss(lambda x: x * 1e25), "backward", "the norm of all gradients, the largest of ", []),
}
RUN = {"ckpt": {"every_steps": 2}, "log": {"every_steps": 1}, "train": {"max_nonfinite": 2}}


def begin_at_step_4(patch: pytest.MonkeyPatch, spoil: Callable[..., None]) -> None:
    original = train.train_step

    def step(run, batch):
        if run.step == 3:
            spoil(patch)
        return original(run, batch)

    patch.setattr(train, "train_step", step)


@pytest.mark.parametrize("case", CASES)
def test_the_module_is_named(tmp_path, monkeypatch, case):
    spoil, direction, module, places = CASES[case]
    begin_at_step_4(monkeypatch, spoil)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=rf"extrema-fast replay {out}"):
        train.pretrain(tiny(out, RUN), progress=False)
    assert [p.name for p in (out / "debug").iterdir()] == ["step_00000004"]
    told = [r["text"] for r in history(out / "log.jsonl", "warning", 9)]
    assert len(told) == 1 and f"extrema-fast replay {out}/debug/step_00000004" in told[0]
    found = replay(out)
    first = found["first"]
    assert (found["step"], found["begins"], found["images"], found["same_rows"]) == (4, "capture", 8, True)
    assert first["pass"] == direction and first["module"].startswith(module)
    assert first["values"]["not_finite"] > 0
    assert found["as_run"]["bad_gradients"] == found["reference"]["bad_gradients"]
    kept = json.loads((out / "debug" / "step_00000004" / "capture.json").read_text())
    assert found["as_run"]["bad_gradients"] == kept["gradients_not_finite"]
    if places is not None:
        assert [i["row"] for i in first["images"]] == [kept["rows"][place] for place in places]
    text = describe(found)
    assert f"first not finite, in the {direction} pass: {module}" in text
    assert all(i["name"] in text for i in first["images"])


def test_weights_that_overflow(tmp_path, monkeypatch, capsys):
    def overflow(run, batch):
        if run.step == 3:
            with torch.no_grad():
                run.method.student.blocks[1].mlp.fc1.weight[0] = 3e38
        return original(run, batch)

    original, out = train.train_step, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", overflow)
        with pytest.raises(NonFiniteError):
            train.pretrain(tiny(out, RUN), progress=False)
    # nothing is patched any more: the weights are what was kept
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(["replay", str(out / "debug" / "step_00000004"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = found["first"]
    assert first["module"] == "student_branch.encoder.blocks.1.mlp.fc1" and first["class"] == "Linear"
    assert first["weights"]["high"] == pytest.approx(3e38) and first["images_count"] == 8
    # from the checkpoint before, which has none of them, the step is fine
    (out / "debug").rename(tmp_path / "debug")
    again = replay(out, 4)
    assert again["first"] is None and again["begins"].endswith("checkpoints/step_00000002")
    assert "all values are finite" in describe(again)
    (tmp_path / "debug").rename(out / "debug")
    assert before.keys() == {p: 0 for p in out.rglob("*")}.keys()
    with pytest.raises(UsageError, match="remove the folder"):
        (out / "debug" / "step_00000004" / "weights.safetensors").write_bytes(b"x")
        replay(out)


def test_any_step_of_a_run(tmp_path):
    # each micro-batch takes the targets of all
    cfg = tiny(tmp_path / "run", RUN, head={"loss": "infonce"}, train={"accumulation": 2})
    out = train.pretrain(cfg, progress=False)
    logged = {r["step"]: r for r in history(out / "log.jsonl", "train", 6)}
    # checkpoints 4 and 6 are there
    for step, begins in ((2, "step 0"), (6, "step_00000004")):
        found = replay(out, step)
        assert found["begins"].endswith(begins) and found["first"] is None
        # the log has what the step computed, to the bit
        assert found["as_run"]["loss"] == logged[step]["loss"]
        assert found["reference"]["loss"] == pytest.approx(logged[step]["loss"], rel=1e-5)
        assert found["as_run"]["grad_norm"] == pytest.approx(logged[step]["grad_norm"], rel=1e-5)
    for options, words in (
        ({"step": 7}, "--step: expected 1 to 6, the steps of"),
        ({"step": 6, "rank": 1}, r"--rank: expected 0 to 0 \(processes of the run: 1\), got 1"),
        ({}, "--step N"),
    ):
        with pytest.raises(UsageError, match=words):
            replay(out, **options)
    for step in (None, 1):
        with pytest.raises(UsageError, match="not a run folder"):
            replay(tmp_path, step)


def test_a_batch_that_several_processes_shared(tmp_path):
    head = {"loss": "infonce", "decorrelation": 0.1, "norm": "batch"}
    out = train.pretrain(tiny(tmp_path / "run", RUN, head=head), progress=False)
    env = json.loads((out / "env.json").read_text())
    (out / "env.json").write_text(json.dumps(env | {"world_size": 2}))
    # statistics over their rows: it stays whole
    loss = history(out / "log.jsonl", "train", 6)[1]["loss"]
    assert replay(out, 2)["as_run"]["loss"] == loss
    with pytest.raises(UsageError, match=r"--rank: head\.decorrelation needs the whole batch"):
        replay(out, 2, rank=1)


def test_a_fine_tuning(tmp_path, monkeypatch):
    def spoil_one(out):
        out = out.clone()
        out[3, 0, 0] = INF
        return out

    begin_at_step_4(monkeypatch, in_mlp(spoil_one))
    given = {
        **{k: TINY[k] for k in ("optim", "train", "ckpt", "eval", "log")},
        "out": str(tmp_path / "run"),
        "data": {**TINY["data"], "train": "synthetic", "test": ""},
        "model": {**TINY["model"], "heads": 1},
        "tune": {"weights": "none"},
    }
    cfg = from_dict(RUN, from_dict(given, FINETUNE_PRESETS["small"]()))
    with pytest.raises(NonFiniteError):
        train.finetune(None, cfg, progress=False)
    found = replay(tmp_path / "run")
    first, kept = found["first"], capture.read(tmp_path / "run" / "debug" / "step_00000004")
    assert first["module"] == "student_branch.encoder.blocks.1.mlp"
    assert [i["row"] for i in first["images"]] == [kept.state["rows"][3]]


def test_few_are_kept(tmp_path, monkeypatch):
    original, calls = ExtreMA.loss, []

    def every_other(self, *args):
        calls.append(1)
        return original(self, *args) * (float("nan") if len(calls) % 2 else 1)

    monkeypatch.setattr(ExtreMA, "loss", every_other)
    monkeypatch.setattr(capture, "MOST", 2)
    out = train.pretrain(tiny(tmp_path / "run"), progress=False)
    assert sorted(capture.captured(out)) == [1, 3]
