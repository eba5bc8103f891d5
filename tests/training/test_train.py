"""The training loop and what surrounds it, on one process.

Covers: the loop against the released order of a step, written out; accumulation equals the whole batch (both
losses); a non-finite step moves nothing, by either gate, and too many end the run; signals; logs,
evaluations, warnings, unlabeled images; precision, compile, dry run; counters, torn log, progress lines,
FLOPs; processes and devices.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from extrema_fast import distributed as dist
from extrema_fast import train
from extrema_fast.config import from_dict, preset
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import TrainLoader
from extrema_fast.data.sources import open_source
from extrema_fast.distributed import World
from extrema_fast.errors import NonFiniteError, OutOfMemoryError, UsageError
from extrema_fast.files import history, read_log
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.models.masking import draw_views
from extrema_fast.tools.dry_run import dry_run
from extrema_fast.training import logging as train_logging
from extrema_fast.training import step
from extrema_fast.training.counters import LOSS, Counters
from extrema_fast.training.optim import Schedule, build_optimizer
from extrema_fast.training.resolve import Resolved, flops_per_image, headline
from extrema_fast.training.run import Run, build, open_loader, open_train
from tests.training.conftest import final_hash, status, tiny


def begin(**change) -> tuple[Run, TrainLoader]:
    cfg = tiny(**change)
    run = build(cfg, World(torch.device("cpu")), open_train(cfg))
    return run, open_loader(run)


def steps(run: Run, loader: TrainLoader, count: int) -> None:
    for _ in range(count):
        train.train_step(run, next(step.batches(run, loader)))
        run.step += 1


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Everything a step can change."""
    out = {k: v.clone() for k, v in run.method.state_dict().items()}
    for name, p in run.method.student_parameters():
        out |= {f"{name}/{k}": v.clone() for k, v in run.optimizer.state.get(p, {}).items()}
    return out


def logged(run: Path, kind: str) -> list[dict]:
    return [r for r in read_log(run / "log.jsonl") if r["kind"] == kind]


# ---- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["byol", "infonce"])
def test_same_as_the_released_order(loss):
    """EMA update with the weights that the step before left, then loss and AdamW."""
    run, loader = begin(head={"loss": loss})
    cfg, source = run.cfg, run.source
    method = ExtreMA(cfg)
    optimizer, schedule = build_optimizer(method, cfg), Schedule(cfg, 3)
    args = {"batch_size": 8, "seed": cfg.train.seed}
    with loader, TrainLoader(source, cfg.data, cfg.model.img_size, **args) as again:
        for t in range(schedule.total_steps):
            before = run.counters.tensor.clone()
            steps(run, loader, 1)
            got = (run.counters.tensor - before)[LOSS].item()

            batch, keys = next(again), {"seed": cfg.train.seed, "epoch": t // 3}
            student, teacher = color_jitter(
                batch.images, jitter_params(batch.index, cfg.data, **keys), cfg.data
            )
            keep = draw_views(batch.index, 4, 2, 2, mode="disjoint", **keys)
            scale = drop_path_scale(batch.index, 2, 2, 0.2, **keys)
            method.ema_update(1 - schedule.momentum(t))
            out = method(student, teacher, keep, scale)
            optimizer.zero_grad()
            out.loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(t)
            optimizer.step()
            assert got == pytest.approx(out.loss.item(), rel=1e-6), t
    assert schedule.total_steps == 6 and run.last
    for name, value in method.state_dict().items():
        torch.testing.assert_close(run.method.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "head", [{"loss": "byol"}, {"loss": "byol", "targets": "whitened"}, {"loss": "infonce"}]
)
def test_accumulation_equals_the_whole_batch(head):
    results = []
    for parts in (1, 4):
        run, loader = begin(head=head, train={"accumulation": parts})
        with loader:
            # the rate is 0 at step 0: both meet the second batch with the same weights
            steps(run, loader, 2)
        grads = {name: p.grad for name, p in run.method.student_parameters()}
        results.append((grads, run.counters.read().values()))
    (a, one), (b, four) = results
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6 * one["grad_norm"], msg=name)


def test_a_queue_of_an_images_own_targets_is_said(tmp_path, caplog):
    for queue, said in ((4, False), (12, True)):
        change = {
            "out": str(tmp_path / str(queue)),
            "data": {"limit": 24},
            "train": {"epochs": 1, "batch_size": 8},
        }
        change |= {"head": {"loss": "infonce", "queue": queue}, "eval": {"every_epochs": 0}}
        change |= {"optim": {"warmup_epochs": 0.0}}
        train.pretrain(from_dict(change | {"log": {"report": False}}, preset("smoke")), progress=False)
        assert ("head.queue: 12 earlier targets of 24 images" in caplog.text) == said


@pytest.mark.parametrize("parts", [1, 2])
def test_the_queue_holds_the_latest_targets(monkeypatch, parts):
    head = {"loss": "infonce", "queue": 20}
    run, loader = begin(head=head, train={"accumulation": parts})
    plain, _ = begin(head={"loss": "infonce"})
    first, seen = run.method.queue.clone(), []
    torch.testing.assert_close(first.norm(dim=1), torch.ones(20))
    for name, value in plain.method.state_dict().items():
        assert torch.equal(run.method.state_dict()[name], value), name
    original = ExtreMA.enqueue
    monkeypatch.setattr(ExtreMA, "enqueue", lambda self, t, skip: (seen.append(t), original(self, t, skip)))
    with loader:
        for kept in (12, 4):
            steps(run, loader, 1)
            latest = torch.cat([torch.nn.functional.normalize(t) for t in reversed(seen)])
            torch.testing.assert_close(run.method.queue, torch.cat([latest, first[:kept]]))
        before = run.method.queue.clone()
        # a step that is not finite leaves it alone
        loss = ExtreMA.loss
        monkeypatch.setattr(ExtreMA, "loss", lambda self, *args: loss(self, *args) * float("nan"))
        steps(run, loader, 1)
    assert len(seen) == 3 and torch.equal(run.method.queue, before)
    assert all(len(t) == 8 for t in seen)


@pytest.mark.parametrize("policy", ["spatial", "spatial+color"])
def test_separate_crops(policy):
    """The student learns from its crops and the teacher sees its own, with micro-batches too."""
    found = []
    for parts in (1, 2):
        run, loader = begin(
            data={"crop": "separate", "policy": policy},
            model={"drop_path": 0.0},
            train={"accumulation": parts},
        )
        with (
            loader,
            TrainLoader(
                run.source, run.cfg.data, run.cfg.model.img_size, batch_size=8, seed=run.cfg.train.seed
            ) as again,
        ):
            batch, method, data = next(again), ExtreMA(run.cfg), run.cfg.data
            params = jitter_params(batch.index, data, seed=run.cfg.train.seed, epoch=0)
            crops = batch.images.unbind(1)
            student, teacher = (color_jitter(crop, params, data)[i] for i, crop in enumerate(crops))
            assert not torch.equal(student, teacher)
            keep = draw_views(batch.index, 4, 2, 2, mode="disjoint", seed=run.cfg.train.seed, epoch=0)
            wanted = method(student, teacher, keep).loss.item()
            steps(run, loader, 1)
            values = run.counters.read().values()
            assert values["loss"] == pytest.approx(wanted, rel=1e-5)
            found.append(values["grad_norm"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_gradient_clipping():
    run, loader = begin(optim={"clip_grad": 1e-3})
    with loader:
        steps(run, loader, 1)
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in run.method.student_parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    # the log has the norm before clipping
    assert run.counters.read().values()["grad_norm"] > 2e-3


@pytest.mark.parametrize("gate_on_device", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_moves_nothing(monkeypatch, gate_on_device, where):
    run, loader = begin()
    if not gate_on_device:
        monkeypatch.setattr(step, "gates_on_device", lambda optimizer: False)
    with loader:
        steps(run, loader, 2)
        before = weights(run)
        original = ExtreMA.loss

        def bad(self, *args):
            loss = original(self, *args)
            if where == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("inf"))
            return loss

        with monkeypatch.context() as m:
            m.setattr(ExtreMA, "loss", bad)
            steps(run, loader, 1)
        after = weights(run)
        assert before.keys() == after.keys() and any(k.endswith("/step") for k in after)
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
        assert run.counters.read().values()["skipped"] == 1 and run.counters.worst_in_a_row() == 1
        steps(run, loader, 1)
    assert not all(torch.equal(before[k], v) for k, v in weights(run).items())
    assert run.counters.read().values()["loss"] is not None


def test_both_gates_take_the_same_good_steps(monkeypatch):
    results = []
    for gate in (False, True):
        run, loader = begin()
        monkeypatch.setattr(step, "gates_on_device", lambda optimizer, gate=gate: gate)
        with loader:
            steps(run, loader, 3)
        results.append(weights(run))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_names_sizes_and_remedies(tmp_path, monkeypatch, error):
    def full(run, batch):
        raise error

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(OutOfMemoryError) as caught:
        train.pretrain(tiny(tmp_path / "run", train={"recompute": "none"}), progress=False)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and "step 1 ran out of memory on cpu: 8 images" in text
    for words in ("2 views of 2", "--train.accumulation 2", "--train.recompute norm", "--train.batch-size 4"):
        assert words in text
    assert status(tmp_path / "run")["state"] == "failed"


def test_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ExtreMA, "loss", lambda self, q, *args: q.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="step 2: 2 steps in a row") as error:
        train.pretrain(tiny(tmp_path / "run", train={"max_nonfinite": 2}), progress=False)
    assert error.value.exit_code == 3
    end = status(tmp_path / "run")
    assert end["state"] == "failed" and "not finite" in end["reason"] and end["step"] == 2
    assert logged(tmp_path / "run", "train")[0]["loss"] is None
    # this run is in fp32 already
    assert "fp32" not in end["reason"]


def test_many_skipped_steps_are_said_once(tmp_path, monkeypatch, caplog, capsys):
    original, calls = ExtreMA.loss, itertools.count()

    def every_other(self, *args):
        return original(self, *args) * (float("nan") if next(calls) % 2 else 1.0)

    monkeypatch.setattr(ExtreMA, "loss", every_other)
    cfg = tiny(tmp_path / "run", train={"epochs": 8}, log={"every_steps": 2})
    train.pretrain(cfg)
    assert caplog.text.count("steps were skipped so far") == 1
    assert " skipped), peak memory" in "".join(capsys.readouterr())


# ---- the run ---------------------------------------------------------------------------------------


def test_log_and_evaluations(tmp_path, capsys):
    cfg = tiny(tmp_path / "run", log={"every_steps": 2}, eval={"every_epochs": 1}, train={"epochs": 3})
    out = train.pretrain(cfg)
    records = logged(out, "train")
    assert [r["step"] for r in records] == [2, 4, 6, 8, 9]
    schedule = Schedule(cfg, 3)
    for r in records:
        assert r["lr"] == schedule.lr(r["step"] - 1) and r["images"] == 8 * r["step"] and r["attempt"] == 1
        assert 0 <= r["data_wait"] <= 1 and r["images_per_s"] > 0 and r["step_ms"] > 0 and r["memory_gb"] > 0
        assert r["epoch"] == pytest.approx(r["step"] / 3, abs=1e-5)
    evals = logged(out, "eval")
    assert [r["step"] for r in evals] == [0, 3, 6, 9]
    assert all({"knn_cls", "knn_mean", "teacher_std", "view_cosine"} <= r.keys() for r in evals)
    screen = capsys.readouterr().out
    assert "eval step 9: k-NN class token" in screen and "(step 0: " in screen
    assert "24 images in 4 classes (blobs, checks, rings, stripes), 3 epochs of 3 steps" in screen
    assert "batch 8 (processes x micro-batches x images = 1 x 1 x 8), peak learning rate 0.000625" in screen
    env = json.loads((out / "env.json").read_text())
    assert env["resolved"]["compile"] == "none" and env["resolved"]["recompute"] == "norm"
    assert env["loader"] == "pil" and env["ops"]["attention"]["implementation"] and env["versions"]["torch"]
    assert from_dict(json.loads((out / "config.json").read_text())) == cfg
    assert json.loads((out / "weights" / "step_00000009" / "config.json").read_text())["step"] == 9


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_unlabeled_images_have_indicators_only(tmp_path, holdout, caplog, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(open_source("synthetic").paths[:16]):
        shutil.copy(path, flat / f"{i}{Path(path).suffix}")
    (flat / "notes.txt").touch()
    change = {"train": str(flat), "limit": 0, "holdout": holdout}
    cfg = tiny(tmp_path / "run", data=change, eval={"every_epochs": 5})
    out = train.pretrain(cfg)
    assert "\nleft out 1 file: .txt 1\n" in capsys.readouterr().out
    evals = logged(out, "eval")
    held = len(open_source(str(flat), "test", holdout=0.3))
    assert [r["step"] for r in evals] == [0, 2 if holdout else 4]
    assert [r["images"] for r in evals] == 2 * [held if holdout else 16] and 2 <= held < 8
    assert json.loads((out / "env.json").read_text())["images"] == 16 - bool(holdout) * held
    assert ("data.holdout" in caplog.text) == bool(holdout)
    assert all("teacher_rank" in r and "knn_cls" not in r for r in evals)


def test_missing_test_images_name_the_option_and_the_preset(tmp_path):
    cfg = tiny(tmp_path / "run", data={"test": preset("cifar10").data.test}, eval={"every_epochs": 1})
    with pytest.raises(UsageError, match=r"data\.test \(the value of preset cifar10\): .*does not exist"):
        train.pretrain(cfg, progress=False)


def test_warnings_are_loud(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        train, "collapse_warnings", lambda past, warmup, loss: ["it shrinks"] * (len(past) > 1)
    )
    out = train.pretrain(tiny(tmp_path / "run", eval={"every_epochs": 1}), progress=False)
    assert [(r["step"], r["text"]) for r in logged(out, "warning")] == [(3, "it shrinks"), (6, "it shrinks")]
    assert status(out)["reason"] == "it shrinks"
    assert caplog.text.count("WARNING step") == 2


def test_a_spike_is_told(tmp_path, monkeypatch):
    original, calls = ExtreMA.loss, itertools.count(1)

    def spiked(self, *args):
        return original(self, *args) * (6 if next(calls) in (13, 14) else 1)

    monkeypatch.setattr(ExtreMA, "loss", spiked)
    cfg = tiny(tmp_path / "run", train={"epochs": 6}, log={"every_steps": 1})
    out = train.pretrain(cfg, progress=False)
    assert [r["step"] for r in logged(out, "train") if r.get("spike")] == [13]
    assert [r["step"] for r in logged(out, "warning") if "a spike: loss " in r["text"]] == [13]
    # what an earlier start has logged counts
    past = history(out / "log.jsonl", "train", 12)
    watch, last = train_logging.SpikeWarning(past), past[-1]
    assert not watch.check(last) and not watch.check({"loss": None, "grad_norm": None})
    assert "grad_norm" in watch.check(last | {"grad_norm": 9 * last["grad_norm"]})


# the loss of `photos`; one that rises; one that is level and noisy; one that falls to nothing
CALM = {
    "falls": [0.293, 0.198, 0.169, 0.151, 0.143, 0.138, 0.138, 0.135, 0.13, 0.128, 0.128, 0.123, 0.12, 0.116],
    "rises": [0.01] * 12 + [0.01 * 1.1**i for i in range(20)],
    "is noisy": [1.9, 1.7, 2.0, 1.8, 1.6, 2.1, 1.9, 1.8, 2.2, 1.7, 1.6, 2.2, 1.9, 2.3, 1.7, 2.0],
    "falls to nothing": [2.0**-i for i in range(30)],
}


@pytest.mark.parametrize("what", CALM)
def test_what_is_no_spike(what):
    watch = train_logging.SpikeWarning()
    assert not any(watch.check({"loss": v, "grad_norm": 10 * v}) for v in CALM[what])


def test_bf16(tmp_path):
    out = train.pretrain(tiny(tmp_path / "run", train={"precision": "bf16"}), progress=False)
    fp32 = train.pretrain(tiny(tmp_path / "fp32"), progress=False)
    a, b = logged(out, "train")[0]["loss"], logged(fp32, "train")[0]["loss"]
    assert a != b and a == pytest.approx(b, rel=0.02)


@pytest.mark.parametrize(("loss", "threads"), [("byol", 1), ("infonce", 1), ("infonce", 2)])
def test_deterministic_runs_are_bit_equal(tmp_path, monkeypatch, loss, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    hashes = []
    change = {
        "system": {"deterministic": True, "threads": threads},
        "head": {"loss": loss, "targets": "whitened" if loss == "byol" else "plain"},
        "train": {"precision": "bf16", "accumulation": 2, "epochs": 1},
        "data": {"policy": "spatial+color"},
    }
    if threads > 1:
        # one step, large enough that torch cuts its work into parts; processes that share cores wait long at each
        large = {"width": 64, "depth": 1, "patch_size": 4}
        change |= {"model": large, "data": {"policy": "spatial+color", "limit": 8}}
    try:
        for name in "ab":
            out = train.pretrain(tiny(tmp_path / name, change), progress=False)
            env = json.loads((out / "env.json").read_text())
            assert env["deterministic"] and env["threads"] == threads
            hashes.append(final_hash(out, 3 if threads == 1 else 1))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert hashes[0] == hashes[1]


def test_compile_keeps_the_names_of_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run, loader = begin(train={"compile": "block"})
    loader.close()
    names = set(run.method.state_dict())
    step.wrap(run)
    branches = run.method.student_branch, run.method.teacher_branch
    for branch in branches:
        assert [b for blocks in branch._stretches for b in blocks] == list(branch.encoder.blocks)
    assert set(run.method.state_dict()) == names


def test_dry_run_writes_nothing(tmp_path):
    values = dry_run(tiny(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
    assert len(values["step_ms"]) == 3 and values["lr"] == [0.0, values["peak_lr"] / 1, values["lr"][2]]
    assert values["total_steps"] == 6 and values["loss"] > 0 and values["skipped"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"batch_size": 32}}, r"train\.batch_size: 32 is more than the 24 images"),
        ({"data": {"train": "nowhere"}}, "nowhere"),
    ],
)
def test_too_few_images_leave_no_folder(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        train.pretrain(tiny(tmp_path / "run", change), progress=False)
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_is_recorded(tmp_path, monkeypatch):
    def broken(run, batch):
        raise ZeroDivisionError("what is this")

    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(ZeroDivisionError):
        train.pretrain(tiny(tmp_path / "run"), progress=False)
    end = status(tmp_path / "run")
    assert end["state"] == "failed" and "ZeroDivisionError: what is this" in end["reason"]
    assert not (tmp_path / "run" / "run.lock").exists()


# ---- counters, log, progress, FLOPs, processes ---------------------------------------------


def test_counters():
    c = Counters()
    for loss, bad in ((1.0, 0), (float("nan"), 1), (float("inf"), 1), (3.0, 0)):
        c.add(torch.tensor(loss), torch.tensor(2 * loss), torch.tensor(float(bad)))
    reading, two = c.read(), {"skipped": 2, "skipped_in_a_row": 2, "since_skipped": 1}
    assert c.worst_in_a_row() == 2
    c.restart()
    # what was read stays as it was
    assert reading.arrived() and reading.values() == {"loss": 2.0, "grad_norm": 4.0} | two
    none = {"loss": None, "grad_norm": None, "skipped": 2, "skipped_in_a_row": 0, "since_skipped": None}
    assert c.read().values() == none and c.worst_in_a_row() == 0
    c.add(torch.tensor(0.0), torch.tensor(0.0), torch.ones(()))
    c.restart()
    c.add(torch.tensor(0.0), torch.tensor(0.0), torch.ones(()))
    assert c.worst_in_a_row() == 2, "a row that began before the log line"


def test_a_torn_log_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    log = train_logging.JsonLog(path)
    log.write({"kind": "train", "step": 1, "loss": float("nan")})
    log.write({"kind": "train", "step": 2, "loss": 0.1})
    log.close()
    assert [r["step"] for r in read_log(path)] == [1, 1, 2]
    assert history(path, "train", 1) == [{"kind": "train", "step": 1, "loss": None}]


def test_flops_of_the_paper_recipe():
    # ViT-B, 5 x 39 tokens seen three times over and 196 once, trunk alone: 24 C^2 + 4 n C per token
    width, depth = 768, 12
    trunk = depth * (3 * 5 * 39 * (24 * width**2 + 4 * 39 * width) + 196 * (24 * width**2 + 4 * 196 * width))
    total = flops_per_image(preset("paper_base_80x5"))
    assert trunk < total < 1.15 * trunk
    resolved = Resolved("cuda", "bf16", True, "block", False, "none", "short", "sdpa", {}, "dali", 16, 8)
    text = headline(preset("paper_base_80x5"), resolved, 8, 1_281_167)
    assert "8 x 1 x 256" in text and "peak learning rate 0.0012" in text and "625 steps" in text
    assert "bf16 on cuda, dali loader" in text and "attention short (student) sdpa (teacher)" in text


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, (2, 4, 0)),
        # torchrun inside a SLURM step; a plain python inside a batch script of several tasks
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (1, 2, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1, 0)),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, (2, 4, 0)),
        ({"RANK": "0"}, (0, 1, 0)),
    ],
)
def test_processes_are_detected(env, want):
    assert dist.detect(env) == want


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 30}, "WORLD_SIZE"),
        # one of two: each process would train alone
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::", "MASTER_PORT": "99999"}, "MASTER_PORT"),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_JOB_NODELIST": "a",
                "SLURM_JOB_ID": "?",
            },
            "SLURM_JOB_ID",
        ),
        # what is given holds, beside what SLURM says
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_JOB_NODELIST": "a",
                "MASTER_PORT": "99999",
            },
            "MASTER_PORT",
        ),
    ],
)
def test_variables_that_make_no_sense(monkeypatch, env, name):
    for variable in [v for v in os.environ if v.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(variable)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=rf"^{name}: "), dist.start("cpu"):
        pass


def test_a_process_group_of_somebody_else(monkeypatch):
    """It says how many processes there are, whatever the variables do."""
    found = {"is_initialized": True, "get_rank": 1, "get_world_size": 2, "get_backend_config": "cuda:nccl"}
    for name in found:
        monkeypatch.setattr(torch.distributed, name, lambda name=name: found[name])
    with pytest.raises(UsageError, match="no backend for the CPU"), dist.start("cpu"):
        pass
    found["get_backend_config"] = "cpu:gloo,cuda:nccl"
    with dist.start("cpu") as world:
        assert (world.rank, world.size) == (1, 2)


def test_gloo_does_not_take_the_loopback_interface(monkeypatch):
    monkeypatch.setattr(dist.socket, "gethostbyname", lambda name: "127.0.1.1")
    addresses = {"lo": "127.0.0.1", "ib0": "10.0.0.7", "eth0": "192.168.0.7"}
    asked = {n.encode().ljust(256, b"\0"): socket.inet_aton(a) for n, a in addresses.items()}
    monkeypatch.setattr(dist.socket, "if_nameindex", lambda: list(enumerate([*addresses, "down"])))
    monkeypatch.setattr(dist.fcntl, "ioctl", lambda fd, what, name: bytes(20) + asked.get(name, b"1234"))
    monkeypatch.setattr(dist.socket.socket, "connect", lambda s, to: None)
    monkeypatch.setattr(dist.socket.socket, "getsockname", lambda s: ("192.168.0.7", 5))
    for given, found, want in (
        (None, ["127.0.0.1", "192.168.0.8"], "eth0"),
        ("ib0", ["192.168.0.8"], "ib0"),
        (None, ["127.0.0.1", "127.0.1.1", "::1"], None),
    ):
        # set first, so that what is chosen does not stay
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
        if not given:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        dist._choose_interface(found)
        assert os.environ.get("GLOO_SOCKET_IFNAME") == want


def test_slurm_master():
    job = {"SLURM_JOB_ID": "12345"}
    names = {"node[003-007,9]": "node003", "a1,b2": "a1", "gpu7": "gpu7"}
    names |= {"n[07-09,12]-ib.local,m1": "n07-ib.local", "r[1-2]n[3,5]-gpu,x": "r1n3-gpu"}
    for nodes, host in names.items():
        assert dist.slurm_master(job | {"SLURM_STEP_NODELIST": nodes}) == (host, "32345")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dist.pick_device("auto", 1, 2) == torch.device("cuda", 1)
    assert dist.pick_device("cuda:1") == torch.device("cuda", 1)
    assert dist.pick_device("cpu", 1, 2) == torch.device("cpu")
    bad = (("cuda:0", 0, 2), ("cuda", 2, 3), ("cuda:5", 0, 1), ("gpu", 0, 1), ("cuda:x", 0, 1))
    for name, rank, processes in bad:
        with pytest.raises(UsageError, match=r"system\.device"):
            dist.pick_device(name, rank, processes)
    # SLURM shows each of its tasks one GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert dist.pick_device("cuda", 1, 2) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="0 found"):
        dist.pick_device("cuda")
