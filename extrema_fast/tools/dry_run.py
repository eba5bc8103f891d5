"""A dry run: a few real steps on real images, without writing anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..config import Config, local_batch
from ..data.order import epoch_length
from ..distributed import start
from ..progress import ImageProgress
from ..train import train_step
from ..training.resolve import checkpoint_bytes, derived, settle_channels
from ..training.run import build, init_weights, open_loader, open_train, prepare_torch, shard
from ..training.step import batches, wrap


def dry_run(
    cfg: Config, steps: int = 3, *, init_from: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """What `steps` real steps say about the run to come; nothing is written.

    Args:
        cfg: the run.
        steps: how many of its first ones.
        init_from: weights to start from, as in `pretrain`.
        overwrite: a run in `cfg.out` is going to be moved aside.

    Raises:
        UsageError: the run cannot start here, or not from those weights.
    """
    with start(cfg.system.device) as world:
        prepare_torch(cfg.system)
        local_batch(cfg, world.size)
        source = world.rank_zero_first(lambda: open_train(cfg))
        cfg = settle_channels(cfg, source)
        run = build(cfg, world, source)
        if init_from is not None:
            init_weights(run, init_from, overwrite)
        shard(run)
        wrap(run)
        times = []
        steps = min(steps, run.schedule.total_steps)
        with open_loader(run) as loader, ImageProgress("dry run", steps, unit="steps") as bar:
            for _ in range(steps):
                began = time.perf_counter()
                train_step(run, next(batches(run, loader)))
                run.step += 1
                # reading the counters waits for the device
                values = run.counters.read().values()
                times.append(time.perf_counter() - began)
                bar.advance(1)
        tokens = cfg.mask.views * cfg.num_keep
        begun = {f"init_from: {part}": what for part, what in (run.began_from or {}).items()}
        return derived(cfg, world.size, epoch_length(run.source)) | {
            "device": str(world.device),
            "loader": loader.kind,
            "precision": run.resolved.precision,
            "compile": run.resolved.compile,
            "recompute": run.resolved.recompute,
            "attention": [run.resolved.attention, run.resolved.attention_teacher],
            "step_ms": [round(1000 * t, 1) for t in times],
            "images_per_s": cfg.train.batch_size / min(times),
            "hours_estimated": min(times) * run.schedule.total_steps / 3600,
            "tokens_per_image": {"student": tokens, "teacher": cfg.model.num_patches},
            "loss": values["loss"],
            "skipped": values["skipped"],
            "lr": [run.schedule.lr(i) for i in range(run.step)],
            "memory_gb": world.memory_gb(),
            "checkpoint_mb": checkpoint_bytes(run.method) / 1e6,
            **begun,
        }
