"""Pretraining, read from top to bottom: `pretrain` sets up, `_loop` steps, logs, evaluates and saves.

What a step needs follows from its number alone (batch, crops, colours, masks, drop-path, schedules), so a
checkpoint holds tensors and a step; nothing draws from a global generator.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .augment import color_views
from .checkpoint import Saver, fault
from .config import Config, local_batch
from .data import Batch
from .dist import Signals, start
from .encoder import drop_path_scale
from .errors import NonFiniteError, Preempted
from .evals import collapse_warnings, online_eval
from .losses import gather_targets
from .masking import sample_views
from .metrics import Meter, memory_gb
from .ops import AdamWEma
from .plan import flops_per_image, headline, precision
from .recorder import Recorder
from .run_folder import RunFolder
from .sources import ImageSource
from .state import (
    Run,
    build,
    describe,
    init_weights,
    is_finished,
    open_loader,
    open_test,
    open_train,
    prepare_torch,
    resume,
    save,
    wrap,
)

log = logging.getLogger(__name__)


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
    progress             a bar on a terminal, else some lines on standard output
    raises  UsageError, DataError, StorageError, NonFiniteError; Preempted after SIGTERM or Ctrl-C, once
            the checkpoint is written: the same call continues
    """
    out = Path(cfg.out)
    with Signals() as signals, start(cfg.system.device) as world:
        prepare_torch(cfg.system)
        local_batch(cfg, world.size)
        if world.share(world.on_main(lambda: not overwrite and is_finished(cfg, allow_config_change))):
            log.info("%s: the run is complete, nothing to do", out)
            return out
        source = world.main_first(lambda: open_train(cfg))
        test = world.main_first(lambda: open_test(cfg))
        run = build(cfg, world, source)
        if init_from is not None:
            init_weights(run, init_from, overwrite)
        folder = world.on_main(lambda: RunFolder(out, overwrite=overwrite))
        try:
            resume(run, allow_config_change)
            wrap(run)
            _loop(run, folder, test, signals, progress)
        finally:
            if folder is not None:
                folder.close()
    return out


def _loop(
    run: Run, folder: RunFolder | None, test: ImageSource | None, signals: Signals, progress: bool
) -> None:
    cfg, world, schedule = run.cfg, run.world, run.schedule
    total, per_epoch, batch_size = schedule.total_steps, schedule.steps_per_epoch, cfg.train.batch_size
    recorder = Recorder(folder, cfg.log, run.step, total, per_epoch, progress)
    saver = Saver(Path(cfg.out), cfg.ckpt, per_epoch)
    meter, flops, stop = Meter(batch_size), flops_per_image(cfg), False
    try:
        with open_loader(run) as loader:
            if folder is not None:
                describe(run, folder, loader.kind)
                recorder.screen.say(
                    headline(cfg, world.size, len(run.source), str(world.device), loader.kind)
                )
            if run.step == 0 and cfg.eval.every_epochs:
                _evaluate(run, recorder, test)
            meter.restart()
            while not (run.last or stop):
                lr = train_step(run, meter.next(loader))
                run.step += 1
                recorder.advance(run.step)
                due = run.last or run.step % cfg.log.every_steps == 0

                # a GPU is waited for at log lines, evaluations and saves only
                if due or not run.gate_on_device:
                    _check_finite(run)
                if due or not run.gate_on_device or world.size == 1:
                    stop = world.any(signals.stop) and not run.last
                if due:
                    values = run.counters.read() | meter.read()
                    recorder.train(
                        run.step,
                        images=run.step * batch_size,
                        lr=lr,
                        momentum=schedule.momentum(run.step),
                        tflops_per_s=values["images_per_s"] * flops / 1e12,
                        memory_gb=memory_gb(world.device),
                        **values,
                    )
                    run.counters.restart()
                    meter.restart()

                began = time.perf_counter()
                if run.epochs_end(cfg.eval.every_epochs) or (run.last and cfg.eval.every_epochs):
                    _evaluate(run, recorder, test)
                wanted = run.epochs_end(cfg.ckpt.every_epochs) or run.epochs_end(cfg.ckpt.milestone_epochs)
                wanted = wanted or bool(cfg.ckpt.every_steps and run.step % cfg.ckpt.every_steps == 0)
                if wanted or run.last or stop:
                    must, attempt = run.last or stop, folder.attempt if folder else 0
                    world.on_main(partial(save, run, saver, attempt, must=must))
                meter.pause(began)
        if stop:
            raise Preempted(f"stopped by a signal after step {run.step} of {total}, saved in {cfg.out}")
    except BaseException as error:
        recorder.fail(error)
        raise
    recorder.screen.say(f"complete: {total} steps, {cfg.out}")
    recorder.close("complete")


def train_step(run: Run, batch: Batch) -> float:
    """One optimizer step on this process's part of a batch; returns the learning rate used."""
    cfg, method, device = run.cfg, run.method, run.world.device
    images, index = (x.to(device, non_blocking=True) for x in (batch.images, batch.index))
    keys = {"seed": cfg.train.seed, "epoch": batch.epoch}
    size = len(index) // cfg.train.accumulation
    parts = [slice(i, i + size) for i in range(0, size * cfg.train.accumulation, size)]
    views = [color_views(images[p], index[p], cfg.data, in_chans=cfg.model.in_chans, **keys) for p in parts]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, precision(cfg, device.type) == "bf16")

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
    if isinstance(run.optimizer, AdamWEma):
        # one pass over all parameters, gated on the device
        run.optimizer.step(momentum_weight=None if last else 1 - m, found_inf=bad)
    elif run.gate_on_device:
        # fused AdamW leaves weights, moments and step count alone where this is 1
        run.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        run.optimizer.step()
        if not last:
            run.method.update_teacher(1 - (1 - m) * (1 - bad))
    elif not bad:
        run.optimizer.step()
        if not last:
            run.method.update_teacher(m)


def _check_finite(run: Run) -> None:
    worst, limit = run.counters.worst_in_a_row(), run.cfg.train.max_nonfinite
    if worst >= limit:
        raise NonFiniteError(
            f"step {run.step}: {worst} steps in a row had a loss or gradient that is not finite "
            f"(train.max_nonfinite {limit}); they changed no weights; try a lower optim.base_lr, or fp32"
        )


def _evaluate(run: Run, recorder: Recorder, test: ImageSource | None) -> None:
    def on_rank_0() -> None:
        values = online_eval(run.method, run.source, test, run.cfg, run.world.device)
        past = recorder.eval(run.step, values)
        recorder.warn(run.step, collapse_warnings(past, run.cfg.optim.warmup_epochs))
        fault("evaluated")

    run.world.on_main(on_rank_0)
