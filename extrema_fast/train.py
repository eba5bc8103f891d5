"""Pretraining, read from top to bottom: `pretrain` sets up, `_loop` steps, logs, evaluates and saves.

What a step needs follows from its number alone (batch, crops, colours, masks, drop-path, schedules), so a
checkpoint holds tensors and a step; nothing draws from a global generator.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .augment import color_views
from .checkpoint import Checkpoint, Saver, check_same, collect, fault, newest, remove_temporaries, restore
from .config import Config, SystemConfig, config_hash, local_batch, to_dict
from .convert import load_initial, save_weights
from .data import Batch, TrainLoader
from .dist import Signals, World, start
from .encoder import drop_path_scale
from .errors import NonFiniteError, Preempted
from .evals import collapse_warnings, online_eval
from .losses import gather_targets
from .masking import sample_views
from .method import ExtreMA
from .metrics import Counters, Meter, memory_gb
from .optim import Schedule, build_optimizer
from .plan import checkpoint_bytes, derived, flops_per_image
from .recorder import Recorder
from .run_folder import RunFolder, check, read_json, versions
from .sources import BUILT_IN, ImageSource, open_source

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One process's side of a run; method, optimizer, counters and step are what a checkpoint holds."""

    cfg: Config
    world: World
    method: ExtreMA
    student: nn.Module
    """method.student_branch, under DistributedDataParallel with more than one process"""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    counters: Counters
    gate_on_device: bool
    """a skipped step is decided without reading the device (CUDA)"""
    step: int = 0

    def every(self, epochs: int) -> bool:
        """True at the end of every `epochs` epochs; never for 0."""
        return epochs > 0 and self.step % (epochs * self.schedule.steps_per_epoch) == 0


def pretrain(
    cfg: Config,
    *,
    init_from: str | Path | None = None,
    overwrite: bool = False,
    allow_config_change: bool = False,
    progress: bool = True,
) -> Path:
    """Pretrains, or continues the run in `cfg.out`; returns that folder.

    init_from            weights to start from at step 0; ignored once the run has a checkpoint
    overwrite            moves a run in `cfg.out` aside and starts anew
    allow_config_change  continues although settings that change the mathematics differ
    raises  UsageError, DataError, StorageError, NonFiniteError; Preempted after SIGTERM or Ctrl-C, once
            the checkpoint is written: the same call continues
    """
    out = Path(cfg.out)
    with Signals() as signals, start(cfg.system.device) as world:
        prepare_torch(cfg.system)
        local_batch(cfg, world.size)
        if world.share(world.on_main(lambda: not overwrite and _finished(cfg, allow_config_change))):
            log.info("%s: the run is complete, nothing to do", out)
            return out
        train = world.main_first(lambda: open_source(cfg.data.train, "train", limit=cfg.data.limit, seed=cfg.train.seed))
        test = world.main_first(lambda: _open_test(cfg))
        run = build(cfg, world, train)
        if init_from is not None and (overwrite or not any(out.glob("checkpoints/step_*"))):
            load_initial(run.method, init_from)

        folder = world.on_main(lambda: RunFolder(out, overwrite=overwrite))
        try:
            found = world.on_main(lambda: _resumable(cfg, train, allow_config_change))
            where = world.share(str(found.path) if found else "")
            if where:
                state = _resume(run, found or Checkpoint(Path(where), read_json(Path(where) / "state.json")))
                log.info("continuing at step %d of %d (%s)", run.step, run.schedule.total_steps, where)
                if init_from is not None:
                    log.info("--init-from %s is ignored: the run has a checkpoint", init_from)
                if not state["ema_ahead"] and run.step < run.schedule.total_steps:
                    run.method.update_teacher(run.schedule.momentum(run.step))
            compile_blocks(run)
            run.student = world.wrap(run.method.student_branch)
            _loop(run, folder, train, test, signals, progress)
        finally:
            if folder is not None:
                folder.close()
    return out


def prepare_torch(cfg: SystemConfig) -> None:
    """Threads, determinism and the choice of op implementations of this process."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    ops.set_backend(cfg.backend)


def _open_test(cfg: Config) -> ImageSource | None:
    if not cfg.eval.every_epochs or not (cfg.data.test or cfg.data.train in BUILT_IN):
        return None
    return open_source(cfg.data.test or cfg.data.train, "test")


def build(cfg: Config, world: World, train: ImageSource) -> Run:
    """A run at step 0 on this process's device; the student is not wrapped yet."""
    method = ExtreMA(cfg).to(world.device).train()
    schedule = Schedule(cfg, len(train) // cfg.train.batch_size)
    return Run(
        cfg, world, method, method.student_branch, build_optimizer(method, cfg), schedule,
        Counters(world.device), gate_on_device=world.device.type == "cuda",
    )  # fmt: skip


def compile_blocks(run: Run) -> None:
    """torch.compile of each trunk block, in place: the names of the weights stay."""
    if run.cfg.train.compile == "block":
        for block in (*run.method.student.blocks, *run.method.teacher.blocks):
            block.compile(dynamic=False)


def _finished(cfg: Config, allow: bool) -> bool:
    out = Path(cfg.out)
    if not check(out) or read_json(out / "status.json").get("state") != "complete":
        return False
    found = newest(out)
    if found is None or check_same(out, found.state["config"], None, cfg, "", allow):
        return False
    return found.step >= found.state["total_steps"]


def _resumable(cfg: Config, train: ImageSource, allow: bool) -> Checkpoint | None:
    out = Path(cfg.out)
    remove_temporaries(out)
    found = newest(out)
    # before the first checkpoint, config.json says what was begun here
    state = found.state if found else read_json(out / "env.json")
    config = found.state["config"] if found else read_json(out / "config.json")
    if config:
        for change in check_same(out, config, state.get("fingerprint"), cfg, train.fingerprint, allow):
            log.warning("--allow-config-change: %s", change)
    return found


def _resume(run: Run, found: Checkpoint) -> dict[str, Any]:
    restore(found.tensors(), run.method, run.optimizer, run.counters.tensor)
    run.step = found.step
    return found.state


def _loop(
    run: Run, folder: RunFolder | None, train: ImageSource, test: ImageSource | None, signals: Signals, progress: bool
) -> None:
    cfg, world, schedule = run.cfg, run.world, run.schedule
    total = schedule.total_steps
    recorder = Recorder(
        folder, cfg, step=run.step, total=total, steps_per_epoch=schedule.steps_per_epoch, progress=progress
    )
    saver = Saver(Path(cfg.out), cfg.ckpt, schedule.steps_per_epoch)
    flops = flops_per_image(cfg)
    try:
        with TrainLoader(
            train, cfg.data, cfg.model.img_size, batch_size=cfg.train.batch_size, seed=cfg.train.seed,
            rank=world.rank, world=world.size, start_step=run.step, device=world.device,
        ) as loader:  # fmt: skip
            if folder is not None:
                _describe(run, folder, train, loader.kind)
            if run.step == 0 and cfg.eval.every_epochs:
                _evaluate(run, recorder, train, test)
            meter, stop = Meter(cfg.train.batch_size), False
            while run.step < total and not stop:
                lr = train_step(run, meter.next(loader))
                run.step += 1
                recorder.screen.advance(run.step)
                last, due = run.step == total, run.step % cfg.log.every_steps == 0 or run.step == total

                # the only places where a GPU is waited for: log lines, evaluations, saves
                if due or not run.gate_on_device:
                    _check_finite(run, recorder)
                if due or not run.gate_on_device or world.size == 1:
                    stop = world.any(signals.stop) and not last
                if due:
                    values = run.counters.read() | meter.read()
                    values["tflops_per_s"] = values["images_per_s"] * flops / 1e12
                    recorder.train(
                        run.step, images=run.step * cfg.train.batch_size, lr=lr, memory_gb=memory_gb(world.device),
                        momentum=schedule.momentum(run.step), **values,
                    )  # fmt: skip
                    run.counters.restart()
                    meter.restart()
                began = time.perf_counter()
                if run.every(cfg.eval.every_epochs) or (last and cfg.eval.every_epochs):
                    _evaluate(run, recorder, train, test)
                steps = cfg.ckpt.every_steps
                epoch_end = run.every(cfg.ckpt.every_epochs) or run.every(cfg.ckpt.milestone_epochs)
                if epoch_end or (steps and run.step % steps == 0) or last or stop:
                    world.on_main(lambda: _save(run, saver, recorder, train, must=last or stop))  # noqa: B023
                meter.pause(began)
        if stop:
            raise Preempted(f"stopped by {signals.name or 'a signal'} after step {run.step} of {total}, saved in {cfg.out}")
    except Preempted as reason:
        recorder.close("preempted", str(reason))
        raise
    except BaseException as error:
        recorder.fail(error)
        raise
    recorder.screen.say(f"complete: {total} steps in {cfg.out}")
    recorder.close("complete")


def train_step(run: Run, batch: Batch) -> float:
    """One optimizer step on this process's part of a batch; returns the learning rate used."""
    cfg, method, device = run.cfg, run.method, run.world.device
    images, index = (x.to(device, non_blocking=True) for x in (batch.images, batch.index))
    keys = {"seed": cfg.train.seed, "epoch": batch.epoch}
    size = len(index) // cfg.train.accumulation
    parts = [slice(i, i + size) for i in range(0, size * cfg.train.accumulation, size)]
    views = [color_views(images[p], index[p], cfg.data, in_chans=cfg.model.in_chans, **keys) for p in parts]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, cfg.train.precision == "bf16")

    # the teacher sees the whole batch before the first student pass: InfoNCE compares with every target
    with autocast():
        targets, offset = torch.cat([method.teacher_branch(teacher)[0] for _, teacher in views]), 0
    if cfg.head.loss == "infonce":
        targets, offset = gather_targets(targets)

    run.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for p, (student, _) in zip(parts, views, strict=True):
        mask, model = cfg.mask, cfg.model
        keep = sample_views(index[p], model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, **keys)
        scale = drop_path_scale(index[p], mask.views, model.shape[1], model.drop_path, **keys)
        with run.world.sync_only_if(p is parts[-1], run.student):
            with autocast():
                prediction, _ = run.student(student, keep, scale)
            part = method.loss(prediction, targets, size, offset + p.start) / len(parts)
            part.backward()
        loss += part.detach()

    params = [p for _, p in method.student_parameters()]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if cfg.optim.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(params, cfg.optim.clip_grad, norm)
    # one process's bad step is everybody's
    bad = 1 - (loss.isfinite() & norm.isfinite()).double()
    bad, loss = run.world.sum(torch.stack([bad, loss.double()]))
    bad, loss = (bad > 0).double(), loss / run.world.size
    lr = run.schedule.lr(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    update(run, bad)
    run.counters.add(loss, norm, bad)
    return lr


def update(run: Run, bad: Tensor) -> None:
    """AdamW, then the teacher's move with the momentum of the next step; neither when `bad`.

    The released code moves the teacher at the start of a step with the weights the previous one left; here
    the same move ends the step, so it is skipped after the last one.
    """
    m, last = run.schedule.momentum(run.step + 1), run.step + 1 == run.schedule.total_steps
    if run.gate_on_device:
        # fused AdamW leaves weights, moments and step count alone where this is 1
        run.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        run.optimizer.step()
        if not last:
            run.method.update_teacher(1 - (1 - m) * (1 - bad))
    elif not bad:
        run.optimizer.step()
        if not last:
            run.method.update_teacher(m)
