"""Training, to be read from top to bottom: `pretrain` or `finetune` sets up; `_loop` steps, logs, evaluates and saves.

Everything random or scheduled in a step (batch, crops, color jitter, masks, drop-path, learning rate) follows from its
number, so a checkpoint holds only tensors and a step number; nothing draws from a global generator.
"""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .config import Config, FinetuneConfig, differing, flatten, from_dict, local_batch, nested, to_dict
from .data.bad_images import BAD_ROWS
from .data.image_source import left_out
from .data.loader import Batch, TrainLoader
from .data.order import epoch_length
from .data.regularize import needs_cpu
from .data.sources import BUILT_IN, ImageSource, split_folders
from .distributed import World, is_lost, lost, start
from .errors import (
    DataError,
    LostProcessError,
    NonFiniteError,
    OutOfMemoryError,
    Preempted,
    StorageError,
    UsageError,
    is_out_of_memory,
    one_line,
)
from .evaluation.collapse import collapse_warnings
from .evaluation.features import Embedded
from .evaluation.online import online_eval
from .hangs import Watchdog
from .reporting.report import REPORT, report
from .signals import Signals, Stopped
from .training import tuning
from .training.capture import DEBUG, capture
from .training.checkpoint import Saver, fault
from .training.logging import TrainLog
from .training.own import choose
from .training.resolve import headline, settle_channels
from .training.run import (
    Run,
    build,
    check_shared,
    describe,
    gathered,
    init_weights,
    is_finished,
    open_loader,
    open_test,
    open_train,
    origin,
    prepare_torch,
    resume,
    save,
    shard,
    take_cropped_whole,
    warn_of_space,
)
from .training.run_folder import RunFolder
from .training.step import StepStats, batches, memory_remedy, train_step, wrap
from .training.trackers import Trackers, check_installed

__all__ = ["finetune", "pretrain", "train_step"]

log = logging.getLogger(__name__)
T = TypeVar("T")

# steps between two collections of Python's garbage
COLLECT_STEPS = 20


class _Task(NamedTuple):
    """What differs between pretraining and fine-tuning."""

    open_train: Callable[[Config], ImageSource]
    open_test: Callable[[Config, ImageSource], ImageSource | None]
    build: Callable[..., Run]
    # fills a run with the weights it begins from, unless one in its folder goes on
    begin: Callable[[Run, bool], None]
    init_from: str
    batches: Callable[[Run, TrainLoader], Iterator[Batch]]
    # the images of a batch are needed on the CPU
    on_cpu: bool
    # what is logged, on rank 0, of the run's networks
    evaluate: Callable[[Run, Any, ImageSource | None], dict[str, float | int]]
    # warnings, from all evaluations so far
    judge: Callable[[Sequence[dict[str, Any]], Config], list[str]]
    headline: Callable[[Run], str]
    next_command: Callable[[Run], str]


def pretrain(
    cfg: Config | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    preset: tuple[str, Config] | None = None,
    init_from: str | Path | None = None,
    overwrite: bool = False,
    allow_config_change: bool = False,
    progress: bool = True,
) -> Path:
    """Pretrains an encoder, or continues the run in `cfg.out`.

    `pretrain(data="imgs")` chooses settings for those images and this machine, like `extrema-fast pretrain imgs`.

    Args:
        cfg: configuration of the run; None: chosen for `data` (`training.own.choose`).
        data: training images; overrides `cfg.data.train`.
        out: run folder; overrides `cfg.out`. Without `cfg` the default is `runs/<name of data>`.
        epochs: overrides `cfg.train.epochs`.
        preset: name and configuration of the preset that `cfg` is based on, for the run's record; None: unknown.
        init_from: weights to start from at step 0. Without `cfg` they also determine the encoder's architecture.
            Ignored once the run has a checkpoint.
        overwrite: move an existing run in `cfg.out` aside and start a new one.
        allow_config_change: continue a run even if settings that affect what is learned have changed.
        progress: show a progress bar on a terminal, or some lines on standard output otherwise.

    Returns:
        The run folder.

    Raises:
        UsageError: the configuration cannot run here, or does not match the run in the folder.
        DataError: images cannot be read.
        StorageError: a checkpoint cannot be written, or none of the run's checkpoints can be read.
        NonFiniteError: too many steps in a row had a non-finite loss or gradient, or the final weights are not finite.
        Preempted: stopped by a signal (`signals.STOPPING`), or because the reader of standard output has exited, after
            writing a checkpoint; the same call continues the run.
        Stopped: stopped immediately by a second signal.
    """
    named = {"data.train": data and str(data), "out": out and str(out), "train.epochs": epochs}
    options = {name: value for name, value in named.items() if value is not None}
    if cfg is None:
        cfg, chosen = choose(options, overwrite=overwrite, init_from=init_from)
        preset = "own", chosen
    else:
        cfg = from_dict(nested(options), cfg)
    return _train(
        cfg,
        task_of(cfg, init_from),
        preset,
        overwrite,
        allow_config_change=allow_config_change,
        progress=progress,
    )


def finetune(
    weights: str | Path | None = None,
    cfg: FinetuneConfig | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    preset: tuple[str, Config] | str = "small",
    overwrite: bool = False,
    allow_config_change: bool = False,
    progress: bool = True,
) -> Path:
    """Fine-tunes a classifier, with all its layers, from pretrained weights, or continues the run in `cfg.out`.

    `load_encoder` on the run folder returns the classifier: images in, logits out, class names in `classes`.

    Args:
        weights: initial weights of the trunk, anything that `load_encoder` reads, or `none` for random weights. Leave
            it out with `cfg`, whose `tune.weights` names them.
        cfg: configuration of the run; None: the preset, with the architecture of `weights`
            (`training.tuning.begin_config`).
        data: a folder that holds `train`, and `test` or `val`, with one folder per class in each; or training images.
            Overrides `cfg.data.train` and, if it has test images, `cfg.data.test`.
        out: run folder; overrides `cfg.out`.
        epochs: overrides `cfg.train.epochs`.
        preset: `small` or `paper`; with `cfg`, name and configuration of the preset that it is based on.
        overwrite: as in `pretrain`.
        allow_config_change: as in `pretrain`.
        progress: as in `pretrain`.

    Returns:
        The run folder; `reports/classification.json` holds the accuracy, overall and per class.

    Raises:
        UsageError: as in `pretrain`; also missing labels, a single class, test images of other classes, or weights of
            another architecture.
        DataError, StorageError, NonFiniteError, Preempted, Stopped: as in `pretrain`.
    """
    named: dict[str, Any] = {"out": out and str(out), "train.epochs": epochs}
    if data is not None:
        below, test = split_folders(str(data))
        named |= {"data.train": below, "data.test": test or None}
    options = {name: value for name, value in named.items() if value is not None}
    if cfg is None:
        if weights is None:
            raise UsageError("weights: nothing to begin from; give a run, weights, or 'none' for random ones")
        name = preset if isinstance(preset, str) else preset[0]
        base = tuning.begin_config(weights, name, out)
        preset, cfg = (name, base), base
    elif weights is not None and str(weights) != cfg.tune.weights:
        raise UsageError(
            f"weights: {weights}, but tune.weights of cfg is {cfg.tune.weights!r}; leave out weights"
        )
    cfg = from_dict(nested(options), cfg)  # type: ignore[assignment]
    made_from = None if isinstance(preset, str) else preset
    return _train(
        cfg,
        task_of(cfg),
        made_from,
        overwrite,
        allow_config_change=allow_config_change,
        progress=progress,
    )


def _pretraining(init_from: str | Path | None) -> _Task:
    def begin(run: Run, overwrite: bool) -> None:
        if init_from is not None:
            init_weights(run, init_from, overwrite)

    def evaluate(run: Run, method: Any, test: ImageSource | None) -> dict[str, float | int]:
        found = online_eval(method, run.source, test, run.cfg, run.world.device, run.told)
        run.embedded = (found.test, found.bank) if run.last else None
        return found.values

    def title(run: Run) -> str:
        return headline(run.cfg, run.resolved, run.world.size, epoch_length(run.source), run.source.classes)

    return _Task(
        open_train,
        open_test,
        build,
        begin,
        str(init_from or ""),
        batches,
        False,
        evaluate,
        lambda past, cfg: collapse_warnings(past, cfg.optim.warmup_epochs, cfg.head.loss),
        title,
        lambda run: _next_command(run.cfg, run.source),
    )


def _finetuning(cfg: FinetuneConfig) -> _Task:
    return _Task(
        tuning.open_train,
        tuning.open_test,
        tuning.build,
        tuning.begin,
        "",
        tuning.batches,
        needs_cpu(cfg),
        tuning.evaluate,
        lambda past, cfg: [],
        tuning.headline,
        lambda run: tuning.next_command(run.cfg),
    )


def task_of(cfg: Config, init_from: str | Path | None = None) -> _Task:
    """What the loop does for a configuration; `init_from`: weights that a pretraining begins with."""
    return _finetuning(cfg) if isinstance(cfg, FinetuneConfig) else _pretraining(init_from)


def _train(
    cfg: Config,
    task: _Task,
    preset: tuple[str, Config] | None,
    overwrite: bool,
    *,
    allow_config_change: bool,
    progress: bool,
) -> Path:
    """Sets a run up, runs it, and says what came out of it."""
    out = Path(cfg.out)
    with (
        Signals() as signals,
        _nothing_to_save(signals),
        start(cfg.system.device) as world,
        Watchdog(lambda: world.waits, world.rank) as dog,
    ):
        # several processes agree: one that left alone would keep the others waiting
        signals.raises = world.size == 1
        if world.size > 1:
            given = flatten(cfg) | {"--init-from": task.init_from, "--overwrite": overwrite}
            if preset is not None and preset[0] == "own":
                # chosen for images and machine: process 0's choice
                given = {name: given[name] for name in ("out", "data.train", "--init-from", "--overwrite")}
            world.agree("settings differ", given, "start all processes with the same command")
            cfg = from_dict(world.broadcast(to_dict(cfg)), cfg)
        prepare_torch(cfg.system)
        world.rank_zero_only(lambda: local_batch(cfg, world.size))
        world.rank_zero_only(lambda: check_installed(cfg.log.trackers))
        settled = _settled(cfg, world, None, overwrite)
        finished = world.rank_zero_only(lambda: not overwrite and is_finished(settled, allow_config_change))
        if world.broadcast(finished):
            log.info("%s: the run is complete, nothing to do", out)
            if cfg.log.report and world.is_rank_zero and not (out / REPORT).is_file():
                # ended while it was written
                with signals.interruptible():
                    _report(out, None)
            return out
        source = world.rank_zero_first(lambda: task.open_train(settled))
        settled = _settled(settled, world, source, overwrite)
        test = world.rank_zero_first(lambda: task.open_test(settled, source))
        run = task.build(settled, world, source, continued=not overwrite)
        if world.size > 1:
            same = flatten(
                run.images | {"sample": {source.title(int(r)): h for r, h in run.images["sample"].items()}}
            )
            world.agree("data.train", same, "give all nodes the same images")
        if preset is not None:
            changes = {option: old for option, (_, old) in differing(settled, preset[1]).items()}
            run.made_from = {"name": preset[0], "changes": changes}
        task.begin(run, overwrite)
        with (
            world.rank_zero_only(lambda: RunFolder(out, overwrite=overwrite)) or nullcontext() as folder,
            Trackers(folder, cfg.log) as trackers,
        ):
            # random ones may differ by rounding between processors
            world.share(run.method.state_dict().values())
            shard(run)
            if run.resolved.sharded:
                check_shared(world, out)
            resume(run, allow_config_change)
            wrap(run)
            signals.raises = False
            dog.debug = out / DEBUG
            if world.watch is not None:
                world.watch.debug = out / DEBUG
            train_log = TrainLog(run, folder, progress, trackers.wake, dog)
            try:
                try:
                    with train_log, open_loader(run, out / BAD_ROWS, on_cpu=task.on_cpu) as loader:
                        _loop(run, task, loader, train_log, test, signals)
                finally:
                    # how it ends stands in status.json, and is so
                    signals.ended = True
            except Stopped as error:
                # a second signal came before that
                train_log.interrupted(str(error), 128 + error.number)
                raise
            if folder is not None:
                # a signal ends this at once: the run is complete
                with suppress(Stopped), signals.interruptible():
                    _tell(run, task)
    return out


def _settled(cfg: Config, world: World, source: ImageSource | None, overwrite: bool) -> Config:
    settle = partial(settle_channels, cfg, source, continued=not overwrite)
    return world.broadcast(world.rank_zero_only(settle))


def _tell(run: Run, task: _Task) -> None:
    """Writes the report of a run that is complete and says what comes next."""
    cfg = run.cfg
    if cfg.log.report:
        # without an evaluation of the last step what needs one is left out, since it may take long
        _report(Path(cfg.out), run.embedded or ())
    log.info("%s", task.next_command(run))


def _report(out: Path, embedded: tuple[Embedded, ...] | None) -> None:
    """Writes the report of a complete run; what goes wrong with it is a line."""
    try:
        path = report(out, embedded=embedded)
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        log.warning(
            "no report (%s); the run is complete; for another try: extrema-fast report %s", reason, out
        )
    else:
        log.info("report: %s", path)


def _next_command(cfg: Config, source: ImageSource) -> str:
    """What to do with a complete pretraining."""
    out = shlex.quote(str(cfg.out))
    python = f"; in Python: extrema_fast.load_encoder({str(cfg.out)!r})"
    test = cfg.data.test or cfg.data.holdout or cfg.data.train in BUILT_IN
    if test and source.labels is not None and len(source.classes) > 1:
        return (
            f"next: extrema-fast evaluate {out} (k-NN and linear probe on all images), then extrema-fast report {out}"
            f"{python}"
        )
    return (
        f"next: extrema-fast embed IMAGES FEATURES --weights {out} (for search), or with labeled images in "
        f"FOLDER/train and FOLDER/test extrema-fast evaluate {out} --data FOLDER{python}"
    )


@contextmanager
def _nothing_to_save(signals: Signals) -> Iterator[None]:
    """Context in which a signal ends the run at once, until `signals.raises` is taken back."""
    signals.raises = True
    try:
        yield
    except Stopped as error:
        if error.forced:
            raise
        raise Preempted("stopped by a signal before a step was taken: nothing to save") from None


def _loop(
    run: Run,
    task: _Task,
    loader: TrainLoader,
    train_log: TrainLog,
    test: ImageSource | None,
    signals: Signals,
) -> None:
    folder, world = train_log.folder, run.world
    together = world if run.resolved.sharded else None
    saver = Saver(Path(run.cfg.out), run.cfg.ckpt, run.schedule.steps_per_epoch, run.step, together)
    text = "\n".join(filter(None, (task.headline(run), left_out(run.source)))) + origin(run)
    train_log.start(text, loader.remedy())
    if run.other_images:
        train_log.warn([run.other_images])
    queue, images = run.cfg.head.queue, len(run.source)
    if queue > images // 4 and world.is_rank_zero:
        log.warning(
            "head.queue: %d earlier targets of %d images: many are an image's own; take at most a quarter",
            *(queue, images),
        )
    world.rank_zero_only(lambda: describe(run, folder, test) if folder else None)
    world.rank_zero_only(lambda: warn_of_space(run))
    # evaluations and weights are made there
    world.rank_zero_only(lambda: take_cropped_whole(run))
    signals.farewell = train_log.interrupted
    train_log.on_skipped = partial(capture, run, folder, loader)
    if folder is not None and world.watch is not None:
        world.watch.farewell = partial(_farewell, run, saver, train_log)
    if folder is not None:
        train_log.dog.farewell = partial(_farewell, run, saver, train_log)
    stop = signals.stop_agreed(world)
    if not stop and run.evaluates():
        stop = not _evaluate(run, task, train_log, test, signals)
    if stop:
        raise Preempted(f"stopped by a signal at step {run.step}, before another was taken: nothing to save")
    try:
        with saver, _collecting() as collect:
            _steps(run, task, loader, train_log, test, signals, saver, collect)
    except DataError as error:
        if loader.bad.failed:
            raise
        # raised on all processes: what was learned is kept
        where = _by_writers(run, partial(_save_first, run, saver, folder))
        raise DataError(f"{error}{world.broadcast(where)}") from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost(world, error, _save_alone(run, saver, folder) if folder else "") from None


def _farewell(run: Run, saver: Saver, train_log: TrainLog, reason: str, still: bool = True) -> str:
    """Records why a run ends that does not go on; saves before, where nothing changes meanwhile (`still`)."""
    saved = _save_alone(run, saver, train_log.folder) if still else ""
    train_log.interrupted(f"{reason}{saved}", LostProcessError.exit_code)
    return saved


def _save_alone(run: Run, saver: Saver, folder: RunFolder | None) -> str:
    """Saves before a run ends for want of another process (on rank 0); says where."""
    if run.resolved.sharded:
        return "; not saved: the weights were spread over the processes"
    try:
        return _save_first(run, saver, folder)
    # a GPU may be lost with the other process
    except RuntimeError as error:
        return f"; not saved: {one_line(error)}"


def _by_writers(run: Run, function: Callable[[], T]) -> T | None:
    """Calls what saves: on all processes of a sharded run, each of which writes its part, else on rank 0."""
    return function() if run.resolved.sharded else run.world.rank_zero_only(function)


def _save_first(run: Run, saver: Saver, folder: RunFolder | None) -> str:
    """Saves before a run ends for want of images or of a process, unless its last steps were skipped; says where."""
    try:
        if not run.step or run.counters.in_a_row():
            return ""
        save(run, saver, folder.attempt if folder else 0, must=True)
    except (StorageError, NonFiniteError) as error:
        return f"; not saved: {one_line(error)}"
    return f"; step {run.step} is saved in {run.cfg.out}"


@contextmanager
def _collecting() -> Iterator[Callable[[int], None]]:
    """Context that gives what collects Python's garbage, called after each step: at the same steps on all processes.

    Objects that are there after the first steps, some 300,000 of torch, are not looked through again until the end: a
    collection takes less than a millisecond instead of a quarter of a second, for which all processes would wait.
    """
    begun = False

    def collect(step: int) -> None:
        nonlocal begun
        if step % COLLECT_STEPS == 0:
            gc.collect()
            if not begun:
                gc.freeze()
            begun = True

    try:
        yield collect
    finally:
        gc.unfreeze()


def _steps(
    run: Run,
    task: _Task,
    loader: TrainLoader,
    train_log: TrainLog,
    test: ImageSource | None,
    signals: Signals,
    saver: Saver,
    collect: Callable[[int], None],
) -> None:
    folder, world, postponed = train_log.folder, run.world, False
    fed = task.batches(run, loader)
    while not run.last:
        stats = _step(run, fed, train_log.dog)
        run.step += 1
        collect(run.step)
        signals.stop |= train_log.progress.broken or saver.failed
        stop = signals.stop_agreed(world, train_log.due()) and not run.last
        saves = run.saves() or stop or postponed
        if train_log.due() or run.evaluates() or saves:
            # all processes learn of unreadable images, or end together when there are too many
            train_log.bad_images = loader.agree(world)
        train_log.step(stats)
        if run.evaluates() and not _evaluate(run, task, train_log, test, signals):
            # made when the run continues
            stop = saves = True
        if saves:
            with train_log.paused():
                must, attempt = run.last or stop, folder.attempt if folder else 0
                # the counters are the same on all processes
                waits = not must and run.counters.in_a_row() > 0
                if not waits:
                    _by_writers(run, partial(save, run, saver, attempt, must=must))
                elif not postponed and world.is_rank_zero:
                    log.warning("step %d was skipped: the checkpoint waits for a good step", run.step)
                postponed = waits
        if stop:
            total = run.schedule.total_steps
            raise Preempted(f"stopped by a signal after step {run.step} of {total}, saved in {run.cfg.out}")


def _step(run: Run, fed: Iterator[Batch], dog: Watchdog) -> StepStats:
    try:
        with dog.still():
            batch = next(fed)
        return train_step(run, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error)
    # outside the handler, whose traceback would keep the step's tensors
    raise OutOfMemoryError(
        f"step {run.step + 1} ran out of memory on {run.world.device}: {memory_remedy(run)} ({reason})"
    )


def _evaluate(run: Run, task: _Task, train_log: TrainLog, test: ImageSource | None, signals: Signals) -> bool:
    """Evaluates on rank 0, unless this step has been; False on all processes when a signal ended it."""

    def on_rank_zero() -> bool:
        if train_log.is_evaluated():
            return True
        try:
            # each of its many shapes would be compiled
            with signals.interruptible(), torch.compiler.set_stance("force_eager"):
                values = task.evaluate(run, method, test)
        except Stopped as error:
            if error.forced:
                raise
            return False
        if values:
            train_log.warn(task.judge(train_log.eval(values), run.cfg))
        fault("evaluated")
        return True

    with train_log.paused():
        method = gathered(run)
        return bool(run.world.broadcast(run.world.rank_zero_only(on_rank_zero)))
