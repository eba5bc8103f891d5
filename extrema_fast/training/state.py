"""The state of a run: built from a configuration, found again in a folder, saved."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import Config, SystemConfig, config_hash, to_dict
from ..data.bad_images import BadRows
from ..data.loader import TrainLoader
from ..data.order import epoch_length
from ..data.sources import BUILT_IN, ImageSource, open_source
from ..distributed import World
from ..errors import UsageError
from ..files import read_json
from ..models.extrema import ExtreMA
from ..ops import dispatch as ops
from ..ops.fp8 import apply_fp8
from ..weights.folder import save_weights, weights_meta
from ..weights.load import load_method_weights
from .checkpoint import Checkpoint, Saver, check_same, collect, newest, remove_temporaries, restore
from .graph import StepGraph
from .memory import keep_freed_memory
from .metrics import Counters
from .optim import Schedule, build_optimizer
from .plan import precision
from .run import Run
from .run_folder import RunFolder, check, versions
from .step import check_modes, compile_run, compute, keeps_low, recomputed

log = logging.getLogger(__name__)


def prepare_torch(cfg: SystemConfig) -> None:
    """Threads, determinism and the choice of op implementations of this process."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    ops.set_backend(cfg.backend)


def open_train(cfg: Config) -> ImageSource:
    """The training images; raises UsageError when they do not fill one batch."""
    source = open_source(cfg.data.train, "train", limit=cfg.data.limit, seed=cfg.train.seed)
    if epoch_length(source) < cfg.train.batch_size:
        raise UsageError(
            f"train.batch_size: {cfg.train.batch_size} is more than the {epoch_length(source)} images of "
            f"{source.name}; use at most {epoch_length(source)}"
        )
    return source


def open_test(cfg: Config) -> ImageSource | None:
    """Images for the evaluations while training; None when there are none or they are switched off."""
    if not cfg.eval.every_epochs or not (cfg.data.test or cfg.data.train in BUILT_IN):
        return None
    return open_source(cfg.data.test or cfg.data.train, "test")


def build(cfg: Config, world: World, source: ImageSource) -> Run:
    """A run at step 0 on this process's device; nothing is compiled, and the student is not wrapped yet.

    raises UsageError for modes of the step that cannot run here or together
    """
    kind = world.device.type
    check_modes(cfg, kind, world.size)
    method = ExtreMA(cfg).to(world.device).train()
    set_attention(method, cfg, kind)
    method.student.set_recompute(recomputed(cfg, kind))
    apply_fp8(method, cfg.train.fp8, world.device)
    if keeps_low(cfg, kind):
        method.add_shadow_weights(torch.bfloat16)
    return Run(
        cfg,
        world,
        source,
        method,
        student=method.student_branch,
        optimizer=build_optimizer(method, cfg, tensor_lr=cfg.train.cuda_graph),
        schedule=Schedule(cfg, epoch_length(source) // cfg.train.batch_size),
        counters=Counters(world.device),
        teacher_weight=torch.zeros((), dtype=torch.float64, device=world.device),
    )


def set_attention(method: ExtreMA, cfg: Config, kind: str) -> None:
    """Backends of `cfg.system`, decided now for a step's lengths; UsageError where one cannot run there."""
    s, dtype = cfg.system, torch.bfloat16 if precision(cfg, kind) == "bf16" else torch.float32
    teacher = s.attention if s.attention_teacher == "same" else s.attention_teacher
    method.student.set_attention(s.attention, tokens=cfg.num_keep, dtype=dtype)
    method.teacher.set_attention(teacher, tokens=cfg.model.num_patches, dtype=dtype)


def open_loader(run: Run, file: Path | None = None) -> TrainLoader:
    """This process's batches from the run's step on.

    file  where rows that cannot be used were listed by an earlier start; rank 0 writes them there
    raises UsageError; DataError when there are too many of them
    """
    cfg, world = run.cfg, run.world
    bad = BadRows(run.source, cfg.data.bad_budget)
    if file is not None:
        bad.read(file, cfg.data)
        if world.is_rank_zero:
            bad.keep_in(file)
    return TrainLoader(
        run.source,
        cfg.data,
        cfg.model.img_size,
        batch_size=cfg.train.batch_size,
        seed=cfg.train.seed,
        rank=world.rank,
        world=world.size,
        start_step=run.step,
        device=world.device,
        bad=bad,
        pinned=world.device.type == "cuda",
    )


def wrap(run: Run) -> None:
    """What comes after the weights are in place: their copies, compiling, data parallelism, recording."""
    run.method.sync_shadow_weights()
    compile_run(run)
    run.student = run.world.wrap(run.method.student_branch)
    if run.cfg.train.cuda_graph:
        run.compute = StepGraph(partial(compute, run), run.world.device)


def is_finished(cfg: Config, allow: bool) -> bool:
    """Whether the folder holds this run, complete; raises UsageError when it holds a different one."""
    out = Path(cfg.out)
    if not check(out) or read_json(out / "status.json", {}).get("state") != "complete":
        return False
    found = newest(out)
    if found is None or check_same(out, found.state["config"], None, cfg, "", allow):
        return False
    return found.step >= found.state["total_steps"]


def init_weights(run: Run, path: str | Path, overwrite: bool) -> None:
    """`--init-from`: weights only, at step 0; left alone once the run has a checkpoint."""
    if not overwrite and any(Path(run.cfg.out).glob("checkpoints/step_*")):
        log.info("--init-from %s is ignored: the run has a checkpoint", path)
        return
    load_method_weights(run.method, path)
    log.info("initial weights from %s", path)


def resume(run: Run, allow: bool) -> None:
    """Brings a run to the newest valid checkpoint of its folder, if there is one.

    raises UsageError when the folder's run has other settings, images or shapes (`check_same`)
    """
    found = run.world.rank_zero_only(lambda: _resumable(run, allow))
    where = run.world.broadcast(str(found.path) if found else "")
    if not where:
        if run.world.is_rank_zero and any(Path(run.cfg.out).glob("checkpoints/step_*")):
            log.warning("no checkpoint in %s can be read; starting from step 0", run.cfg.out)
        return
    path = Path(where)
    found = found or Checkpoint(path, read_json(path / "state.json", {}))
    restore(found.tensors(), run.method, run.optimizer, run.counters.tensor, found.state.get("optimizer", ""))
    run.step = found.step
    if not found.state["ema_ahead"] and not run.last:
        # a run that has been made longer: its last step had left the teacher's move out
        run.method.ema_update(1 - run.schedule.momentum(run.step))
    log.info("continuing at step %d of %d (%s)", run.step, run.schedule.total_steps, where)


def _resumable(run: Run, allow: bool) -> Checkpoint | None:
    out = Path(run.cfg.out)
    remove_temporaries(out)
    found = newest(out)
    # before the first checkpoint, config.json says what was begun here
    config = found.state["config"] if found else read_json(out / "config.json", {})
    known = found.state if found else read_json(out / "env.json", {})
    if config:
        fingerprint = known.get("fingerprint")
        held = data_set(run.source)
        more = [
            f"{k}: {known[k]} -> {held[k]}" for k in ("images", "shards") if known.get(k, held[k]) != held[k]
        ]
        for change in check_same(out, config, fingerprint, run.cfg, run.source.fingerprint, allow, more):
            log.warning("--allow-config-change: %s", change)
    return found


def describe(run: Run, folder: RunFolder, loader: str) -> None:
    """Writes config.json and env.json: what runs, on what, and how it was chosen."""
    folder.write_json("config.json", to_dict(run.cfg))
    folder.write_env(
        run.world.device,
        run.world.size,
        ops=ops.choices(run.world.device),
        loader=loader,
        precision=precision(run.cfg, run.world.device.type),
        config_hash=config_hash(run.cfg),
        **data_set(run.source),
    )


def data_set(source: ImageSource) -> dict[str, Any]:
    """What must not change about the images of a run: how many, in how many shards, and which."""
    shards = 0 if source.shards is None else len(set(source.shards.tolist()))
    return {"images": len(source), "shards": shards, "fingerprint": source.fingerprint}


def save(run: Run, saver: Saver, attempt: int, *, must: bool) -> None:
    """Checkpoint and weights of this step (rank 0); `must`: failing is an error, not a warning."""
    if saver.last_step == run.step:
        return
    state: dict[str, Any] = {
        "attempt": attempt,
        "total_steps": run.schedule.total_steps,
        # the teacher has made the move the released code makes at the start of the next step
        "ema_ahead": not run.last,
        "config": to_dict(run.cfg),
        "config_hash": config_hash(run.cfg),
        **data_set(run.source),
        "optimizer": type(run.optimizer).__name__,
        "world_size": run.world.size,
        "versions": versions(),
    }
    tensors = collect(run.method, run.optimizer, run.counters.tensor)
    meta = weights_meta(run.cfg, run.step)
    saver.save(run.step, tensors, state, lambda folder: save_weights(folder, run.method, meta), final=must)
