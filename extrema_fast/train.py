"""Pretraining, read from top to bottom: `pretrain` sets up, `_loop` steps, logs, evaluates and saves.

What a step needs follows from its number alone (batch, crops, colours, masks, drop-path, schedules), so a
checkpoint holds tensors and a step; nothing draws from a global generator.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .config import Config, local_batch
from .data.bad_images import BAD_ROWS
from .data.loader import Batch
from .data.order import epoch_length
from .data.sources import ImageSource
from .distributed import Signals, start
from .errors import NonFiniteError, OutOfMemoryError, Preempted
from .evaluation.evaluate import collapse_warnings, online_eval
from .training.checkpoint import Saver, fault
from .training.memory import is_out_of_memory
from .training.metrics import Meter, Reading, WaitWatch, memory_gb
from .training.plan import flops_per_image, headline, precision
from .training.recorder import Recorder
from .training.run_folder import RunFolder
from .training.state import (
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
from .training.step import batches, compute, recomputed, set_schedule

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
        if world.broadcast(
            world.rank_zero_only(lambda: not overwrite and is_finished(cfg, allow_config_change))
        ):
            log.info("%s: the run is complete, nothing to do", out)
            return out
        source = world.rank_zero_first(lambda: open_train(cfg))
        test = world.rank_zero_first(lambda: open_test(cfg))
        run = build(cfg, world, source)
        if init_from is not None:
            init_weights(run, init_from, overwrite)
        folder = world.rank_zero_only(lambda: RunFolder(out, overwrite=overwrite))
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
    # reading a CPU costs nothing
    on_cpu, meter, stop = world.device.type == "cpu", Meter(batch_size), False
    line: Line | None = None
    try:
        with open_loader(run, Path(cfg.out) / BAD_ROWS) as loader:
            given, watch = batches(run, loader), WaitWatch(loader.remedy())
            if folder is not None:
                describe(run, folder, loader.kind)
                recorder.screen.say(
                    headline(cfg, world.size, epoch_length(run.source), str(world.device), loader.kind)
                )
            if run.step == 0 and cfg.eval.every_epochs:
                _evaluate(run, recorder, test)
            meter.restart()
            while not (run.last or stop):
                lr = _step(run, meter.next(given))
                run.step += 1
                recorder.advance(run.step)
                due = run.last or run.step % cfg.log.every_steps == 0
                if due or on_cpu or world.size == 1:
                    stop = world.any(signals.stop) and not run.last
                evaluates = run.epochs_end(cfg.eval.every_epochs) or bool(run.last and cfg.eval.every_epochs)
                saves = run.last or stop or run.saves()
                if due or evaluates or saves:
                    bad = loader.agree(world)

                # numbers are written when they have come from the device: a GPU is not waited for between saves
                if line and (due or line.reading.arrived()):
                    line = _write(line, recorder, run)
                if due:
                    spent = meter.read()
                    line = Line(run.step, lr, schedule.momentum(run.step), run.counters.read(), spent, bad)
                    if slow := watch.look(spent["data_wait"], meter.seconds):
                        recorder.note(run.step, slow)
                    run.counters.restart()
                    meter.restart()
                if line and (evaluates or saves or line.reading.arrived()):
                    line = _write(line, recorder, run)
                if on_cpu:
                    _check_finite(run.step, run.counters.worst_in_a_row(), cfg)

                began = time.perf_counter()
                if evaluates:
                    _evaluate(run, recorder, test)
                if saves:
                    must, attempt = run.last or stop, folder.attempt if folder else 0
                    world.rank_zero_only(partial(save, run, saver, attempt, must=must))
                meter.pause(began)
        if stop:
            raise Preempted(f"stopped by a signal after step {run.step} of {total}, saved in {cfg.out}")
    except BaseException as error:
        recorder.fail(error)
        raise
    recorder.screen.say(f"complete: {total} steps, peak memory {memory_gb(world.device):.2f} GB, {cfg.out}")
    recorder.close("complete")


def train_step(run: Run, batch: Batch) -> float:
    """One optimizer step on this process's part of a batch (from `step.batches`); returns the learning rate used."""
    lr = set_schedule(run)
    if run.compute is None:
        compute(run, batch.micro_batches)
    else:
        # recorded
        run.compute(batch.micro_batches)
    return lr


def _step(run: Run, batch: Batch) -> float:
    try:
        return train_step(run, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
    # outside the handler, whose traceback would keep the step's tensors
    raise OutOfMemoryError(
        f"step {run.step + 1} ran out of memory on {run.world.device}: {too_large(run)} ({reason})"
    )


def too_large(run: Run) -> str:
    """The sizes of a step and what makes it smaller."""
    cfg, kind = run.cfg, run.world.device.type
    images, parts = local_batch(cfg, run.world.size), cfg.train.accumulation
    width, depth, _ = cfg.model.shape
    remedies = [f"--train.accumulation {2 * parts} (the same result, half the activations)"]
    if recomputed(cfg, kind) != "norm":
        remedies.append("--train.recompute norm (a quarter less of the trunk's)")
    remedies.append(f"--train.batch-size {max(1, cfg.train.batch_size // 2)}")
    remedies.append(f"more processes (torchrun --nproc-per-node {2 * run.world.size})")
    if precision(cfg, kind) == "fp32":
        remedies.append("--train.precision bf16")
    return (
        f"{images} images per process and micro-batch, {cfg.mask.views} views of {cfg.num_keep} tokens and the "
        f"teacher's {cfg.model.num_patches}, width {width}, depth {depth}, {precision(cfg, kind)}, peak "
        f"{memory_gb(run.world.device):.1f} GB; try {', '.join(remedies[:-1])}, or {remedies[-1]}"
    )


class Line(NamedTuple):
    """A log line whose numbers may still be on their way."""

    step: int
    lr: float
    momentum: float
    reading: Reading
    meter: dict[str, float]
    bad: int


def _write(line: Line, recorder: Recorder, run: Run) -> None:
    values = line.reading.values()
    _check_finite(line.step, values.pop("skipped_in_a_row"), run.cfg)
    recorder.train(
        line.step,
        images=line.step * run.cfg.train.batch_size,
        lr=line.lr,
        momentum=line.momentum,
        tflops_per_s=line.meter["images_per_s"] * flops_per_image(run.cfg) / 1e12,
        memory_gb=memory_gb(run.world.device),
        bad_images=line.bad,
        **values,
        **line.meter,
    )


def _check_finite(step: int, worst: int, cfg: Config) -> None:
    if worst >= cfg.train.max_nonfinite:
        raise NonFiniteError(
            f"step {step}: {worst} steps in a row had a loss or gradient that is not finite "
            f"(train.max_nonfinite {cfg.train.max_nonfinite}); they changed no weights; try a lower "
            "optim.base_lr, or fp32"
        )


def _evaluate(run: Run, recorder: Recorder, test: ImageSource | None) -> None:
    def on_rank_0() -> None:
        # its many shapes would each be compiled
        with torch.compiler.set_stance("force_eager"):
            values = online_eval(run.method, run.source, test, run.cfg, run.world.device)
        past = recorder.eval(run.step, values)
        recorder.warn(run.step, collapse_warnings(past, run.cfg.optim.warmup_epochs))
        fault("evaluated")

    run.world.rank_zero_only(on_rank_0)
