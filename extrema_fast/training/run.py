"""The state of a run in one process: built from a configuration, resumed from its folder, saved to it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    PRESETS,
    Config,
    FinetuneConfig,
    SystemConfig,
    changed_maths,
    config_hash,
    flatten,
    preset,
    to_dict,
)
from ..data.bad_images import BadRows
from ..data.image_files import ImageFiles, are_cropped, deep_range, hash_sample, read_as, replaced
from ..data.loader import TrainLoader
from ..data.order import epoch_length
from ..data.resident import Place, choose_place
from ..data.sources import BUILT_IN, ImageSource, open_source
from ..distributed import World, cores, processes_here, whole, wide
from ..errors import NonFiniteError, UsageError, counted, one_line
from ..evaluation.features import Embedded
from ..evaluation.probes import batch_spread
from ..files import fits, read_json, remove
from ..models.extrema import ExtreMA, StudentTeacher
from ..ops import dispatch as ops
from ..ops.fp8 import apply_fp8
from ..ops.measure import choose
from ..weights.folder import WHICH, method_tensors, weights_meta, write_folder
from ..weights.initial import FRESH, load_method_weights
from ..weights.released import is_sincos
from .checkpoint import (
    COMPLETE,
    IMAGES,
    Checkpoint,
    Saver,
    check_same,
    collect,
    newest,
    not_finite,
    other_shapes,
    remove_temporaries,
    restore,
    step_folders,
    unfit,
    weights_of,
)
from .counters import Arrival, Counters
from .draw import MicroBatch
from .optim import FAMILIES, Schedule, build_optimizer
from .resolve import Resolved, checkpoint_bytes, flops_per_image, resolve
from .run_folder import RunFolder, check, utc_now, versions

log = logging.getLogger(__name__)

# in what gradients are summed over processes, by `system.reduce`
REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# images of a micro-batch from which their spread means something
SPREAD_IMAGES = 8


@dataclass
class Run:
    """One process's side of a run; a checkpoint holds method, optimizer, counters and step."""

    cfg: Config
    world: World
    resolved: Resolved
    source: ImageSource
    """training images"""
    method: Any
    """`ExtreMA`, or another `StudentTeacher`"""
    student: nn.Module
    """`method.student_branch`, under DistributedDataParallel with more than one process"""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    counters: Counters
    teacher_weight: Tensor
    """0-d fp64 (fp32 on MPS) on the device: 1 - momentum of the EMA update that ends the step"""
    trained: list[nn.Parameter]
    """everything that has a gradient"""
    followed: tuple[list[Tensor], list[Tensor]]
    """(parameters of the teacher, those of the student that they follow); of a sharded run this process's part"""
    make: Callable[[Any], StudentTeacher]
    """the networks of a configuration"""
    gradients: Callable[[Run, list[Any]], Tensor] | None = None
    """adds the gradients of micro-batches, returns the loss; None: `step.gradients`, of pretraining"""
    export: Callable[[Run, int, Path, Mapping[str, Tensor]], Any] | None = None
    """writes the weights of a step, as `checkpoint.collect` names them, into a folder; None: both networks of
    pretraining. A thread calls it while the run goes on"""
    compiled_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """`step.micro_batch_loss`, compiled; None: as it is"""
    recorded: Callable[[list[MicroBatch]], None] | None = None
    """`step.compute` of this run as a CUDA graph; None: as it is"""
    outputs: list[Tensor] = field(default_factory=list)
    """predictions [V b, d] and targets [b, d] of the last micro-batch of pretraining, on the device"""
    targets: Tensor | None = None
    """[M, d] targets of the last step, on all processes where the loss takes those"""
    step: int = 0
    """steps taken"""
    embedded: tuple[Embedded, Embedded] | None = None
    """test and training images as the final weights have encoded them for the last evaluation; None: not made here"""
    told: set[str] = field(default_factory=set)
    """what evaluations have said, and need not say again"""
    made_from: dict[str, Any] | None = None
    """name of the preset that the configuration was made from, and the preset's values where it differs"""
    other_images: str = ""
    """what is said of images that are not those it began with (`--allow-config-change`)"""
    began_from: dict[str, str] | None = None
    """weights given by `--init-from`, and what was done with each part; None: random ones"""

    @property
    def flops_per_image(self) -> float:
        """FLOPs of a step per image."""
        return flops_per_image(self.cfg)

    @property
    def has_fresh_pooling(self) -> bool:
        """Whether the run began with a trained trunk and fresh pooling and heads."""
        return self.began_from is not None and self.began_from.get("pooling") == FRESH

    @property
    def last(self) -> bool:
        """True when all steps have been taken."""
        return self.step >= self.schedule.total_steps

    @cached_property
    def images(self) -> dict[str, Any]:
        """What must stay the same about the images: how many, in how many shards, which; the bytes of a few."""
        source, files = self.source, ImageFiles(self.source, self.cfg.data)
        shards = 0 if source.shards is None else len(set(source.shards.tolist()))
        known = {"images": len(source), "shards": shards, "fingerprint": source.fingerprint}
        return known | {"sample": hash_sample(files)}

    def spread(self) -> Arrival | None:
        """`batch_spread` of the last micro-batch, on its way to the CPU; None where it has too few images, or none."""
        if not self.outputs or len(self.outputs[1]) < SPREAD_IMAGES:
            return None
        return Arrival(batch_spread(*self.outputs))

    def _ends_epochs(self, epochs: int) -> bool:
        return epochs > 0 and self.step % (epochs * self.schedule.steps_per_epoch) == 0

    def evaluates(self) -> bool:
        """True after the steps at which the configuration asks for an evaluation; always at both ends."""
        epochs = self.cfg.eval.every_epochs
        return epochs > 0 and (self._ends_epochs(epochs) or self.last)

    def saves(self) -> bool:
        """True after the steps at which the configuration asks for a checkpoint or a milestone, and the last."""
        every = self.cfg.ckpt
        epochs = self._ends_epochs(every.every_epochs) or self._ends_epochs(every.milestone_epochs)
        return self.last or epochs or bool(every.every_steps and self.step % every.every_steps == 0)


# ---- building ---------------------------------------------------------------------------------------


def prepare_torch(cfg: SystemConfig) -> None:
    """Sets threads, memory and determinism of this process."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    # the first matmul of torch's backward thread finds no context there, and makes it: nothing is wrong
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> bool:
    """Makes the C library keep what a step frees for the next step, instead of returning it to the system.

    Returns:
        Whether it does: only glibc, and nothing set by the user in MALLOC_* variables.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # another C library
        return False
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: no block is mapped on its own (a threshold above 32 MB is not
    # accepted), and the heap does not shrink
    settings = {-4: 0, -1: 2**31 - 1, -2: 16 << 20}
    return all([mallopt(name, value) for name, value in settings.items()])


def open_train(cfg: Config) -> ImageSource:
    """The training images; UsageError when they do not fill one batch."""
    data = cfg.data
    source = open_source(data.train, "train", limit=data.limit, seed=cfg.train.seed, holdout=data.holdout)
    source = read_as(source, cfg.model.in_chans)
    if epoch_length(source) < cfg.train.batch_size:
        raise UsageError(
            f"train.batch_size: {cfg.train.batch_size} is more than the {epoch_length(source)} images of "
            f"{source.name}; use at most {epoch_length(source)}"
        )
    return source


def open_test(cfg: Config, train: ImageSource) -> ImageSource | None:
    """Images for the evaluations while training; None when there are none or they are switched off.

    Images of more than 8 bits have the range of those of `train`.
    """
    data = cfg.data
    if not cfg.eval.every_epochs or not (data.test or data.holdout or data.train in BUILT_IN):
        return None
    try:
        source = open_source(data.test or data.train, "test", holdout=data.holdout)
        source = read_as(source, cfg.model.in_chans)
    except UsageError as error:
        usual = [name for name in PRESETS if data.test and preset(name).data.test == data.test]
        whose = f" (the value of preset {usual[0]})" if usual else ""
        raise UsageError(
            f"data.test{whose}: {error}; for no evaluation of k-NN while training: --data.test ''"
        ) from None
    if source.labels is None:
        log.warning(
            "data.%s %s: images without labels: evaluations leave out k-NN",
            *("holdout" if data.holdout else "test", source.name),
        )
    if data.holdout:
        log.info("%s: %s held out for evaluations (data.holdout)", source.name, counted(len(source), "image"))
    return replace(source, value_range=train.value_range or source.value_range)


def build(
    cfg: Config,
    world: World,
    source: ImageSource,
    *,
    continued: bool = False,
    make: Callable[[Any], StudentTeacher] = ExtreMA,
) -> Run:
    """A run at step 0 on this process's device; `step.wrap` makes it ready for training.

    On a GPU the implementations that `auto` takes are measured first, or taken from the cache (`ops.measure`).

    Args:
        continued: a run in `cfg.out` goes on, with the implementations it was begun with.
        make: the networks of a configuration.

    Raises:
        UsageError: the configuration cannot run here (`resolve`).
    """
    recorded = partial(_recorded_ops, cfg, world.device) if continued else dict
    resolved = resolve(cfg, world.device, world.size, partial(choose, world=world, recorded=recorded))
    method = make(cfg).to(world.device).train()
    _set_attention(method, cfg)
    method.student.set_recompute(resolved.recompute)
    apply_fp8(method, cfg.train.fp8, world.device)
    if resolved.shadow_weights:
        method.add_shadow_weights(torch.bfloat16)
    return Run(
        cfg,
        world,
        resolved,
        source,
        method,
        student=method.student_branch,
        optimizer=build_optimizer(method, cfg, tensor_lr=resolved.cuda_graph),
        schedule=Schedule(cfg, epoch_length(source) // cfg.train.batch_size),
        counters=Counters(world.device),
        teacher_weight=torch.zeros((), dtype=wide(world.device), device=world.device),
        trained=[p for _, p in method.student_parameters()],
        followed=method.ema_pairs(),
        make=make,
    )


def shard(run: Run) -> None:
    """Spreads a run at its first weights over the processes, if it is to be (`system.parallel`)."""
    if not run.resolved.sharded:
        return
    method, reduce = run.method, REDUCE[run.cfg.system.reduce]
    method.shard(run.world, run.resolved.dtype, reduce)
    # of other parameters than before
    run.optimizer = build_optimizer(method, run.cfg)
    run.trained = [p for _, p in method.student_parameters()]
    run.followed = method.ema_pairs()


def gathered(run: Run) -> Any:
    """`run.method`; of a sharded run its networks as they are on one process, on rank 0.

    All processes of a sharded run call this; None on the others.
    """
    if not run.resolved.sharded:
        return run.method
    device, is_here = run.world.device, run.world.is_rank_zero
    tensors: dict[str, Tensor] = {}
    with run.world.waiting():
        for name, t in run.method.state_dict().items():
            found = whole(t)
            if is_here:
                tensors[name] = found
    if not is_here:
        return None
    with torch.device("meta"):
        method = run.make(run.cfg).train()
    method.load_state_dict(tensors, assign=True)
    method.to(device)
    _set_attention(method, run.cfg)
    method.student.crop_pct = method.teacher.crop_pct = run.method.teacher.crop_pct
    return method


def _set_attention(method: StudentTeacher, cfg: Config) -> None:
    teacher = cfg.system.attention_teacher
    method.student.set_attention(cfg.system.attention)
    method.teacher.set_attention(cfg.system.attention if teacher == "same" else teacher)


def _recorded_ops(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Implementations that a run in `cfg.out` took with the same settings on such a GPU, by `measure.Problem.name`."""
    env, config = (read_json(Path(cfg.out) / name, {}) for name in ("env.json", "config.json"))
    system, resolved = config.get("system"), env.get("resolved")
    if not isinstance(system, dict) or not isinstance(resolved, dict) or env.get("gpu") != _gpu(device):
        return {}
    if any(system.get(k) != getattr(cfg.system, k) for k in ("backend", "attention", "attention_teacher")):
        return {}
    taken = resolved.get("ops")
    found = dict(taken) if isinstance(taken, dict) else {}
    return found | {
        "attention student": resolved.get("attention"),
        "attention teacher": resolved.get("attention_teacher"),
    }


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def open_loader(run: Run, bad_rows: Path | None = None, *, on_cpu: bool = False) -> TrainLoader:
    """This process's batches from the run's step on.

    Args:
        bad_rows: file that lists the unreadable rows found by earlier starts; rank 0 keeps it up to date.
        on_cpu: the images of a batch are on the CPU, wherever the step runs.

    Raises:
        UsageError: sizes or an order that do not fit, or a missing loader.
        DataError: more unreadable images than `data.bad_budget` allows.
    """
    cfg, world = run.cfg, run.world
    bad = BadRows(run.source, cfg.data.bad_budget)
    device = torch.device("cpu") if on_cpu else world.device
    run.resolved = replace(run.resolved, resident=_place(run, bad_rows, device))
    if bad_rows is not None:
        bad.read(bad_rows, cfg.data)
        if world.is_rank_zero:
            bad.keep_in(bad_rows)
    loader = TrainLoader(
        run.source,
        cfg.data,
        cfg.model.img_size,
        batch_size=cfg.train.batch_size,
        seed=cfg.train.seed,
        rank=world.rank,
        world=world.size,
        start_step=run.step,
        device=device,
        bad=bad,
        pinned=world.device.type == "cuda",
        resident=run.resolved.resident,
    )
    # of these images
    run.resolved = replace(run.resolved, loader=loader.kind)
    return loader


def _place(run: Run, bad_rows: Path | None, device: torch.device) -> Place:
    """Where this run holds its images: the same on all processes, and held again after a restart if they were before.

    Held and decoded crops may differ by the rounding of the resize filter, so `auto` does not change a begun run.
    """
    cfg, world, setting = run.cfg.data, run.world, run.cfg.data.resident
    if setting == "auto" and bad_rows is None:
        # a rehearsal of a few steps
        return "off"
    before = None
    if setting == "auto" and bad_rows is not None and run.step:
        before = read_json(bad_rows.parent / "env.json", {}).get("resolved", {}).get("resident", "off")
    if world.broadcast(before) == "off":
        return "off"
    found = choose_place(
        setting,
        ImageFiles(run.source, cfg),
        device,
        reads=run.schedule.total_steps * run.cfg.train.batch_size / len(run.source),
        local=processes_here(),
    )
    order: tuple[Place, ...] = ("off", "host", "gpu")
    found = min(world.all_gather(found), key=order.index)
    if before and found == "off":
        log.warning(
            "the images were held in memory before, and do not fit now: crops may differ by one gray level"
        )
    return found


# ---- resuming ---------------------------------------------------------------------------------------


def is_finished(cfg: Config, allow: bool) -> bool:
    """Whether the folder holds this run, complete.

    Raises:
        UsageError: it holds a different one.
        StorageError: none of its checkpoints can be read.
    """
    out = Path(cfg.out)
    if not check(out) or read_json(out / "status.json", {}).get("state") != "complete":
        return False
    found = newest(out)
    if found is None or check_same(cfg, found.state["config"], allow, {}, {}):
        return False
    return found.step >= found.state["total_steps"]


def init_weights(run: Run, path: str | Path, overwrite: bool) -> None:
    """`--init-from`: weights only, at step 0; ignored once the run has a checkpoint."""
    if not overwrite and step_folders(Path(run.cfg.out) / "checkpoints"):
        log.info("--init-from %s is ignored: the run has a checkpoint", path)
        return
    run.began_from = {"weights": str(path), **load_method_weights(run.method, path)}
    if name := not_finite(run.method.state_dict()):
        raise NonFiniteError(f"--init-from {path}: {name} is not finite; use weights of an earlier step")


def check_shared(world: World, out: Path) -> None:
    """Makes sure that all processes write into one folder, as those of a sharded run do.

    Raises:
        UsageError: a process cannot write where process 0 does.
    """
    name, host = world.broadcast((f".tmp-shared-{uuid.uuid4().hex}", socket.gethostname()))
    folder = out / name
    world.rank_zero_only(folder.mkdir)

    def write() -> None:
        try:
            (folder / str(world.rank)).touch()
        except OSError as error:
            raise UsageError(
                f"--out {out}: with system.parallel fsdp each process writes its part of a checkpoint, and this one "
                f"cannot write where process 0 on {host} does ({one_line(error)}); put --out on a disk that all nodes "
                "share, or use --system.parallel ddp"
            ) from None

    try:
        world.everywhere(write)
    finally:
        if world.is_rank_zero:
            remove(folder)


def resume(run: Run, allow: bool) -> None:
    """Brings a run to the newest undamaged, finite checkpoint of its folder; a new run stays at step 0.

    Args:
        allow: continue although settings that change the mathematics differ.

    Raises:
        UsageError: the folder's run has other settings, images or shapes (`check_same`).
        StorageError: there are checkpoints, but none can be read.
    """
    found = run.world.rank_zero_only(lambda: _find_checkpoint(run, allow))
    where = run.world.broadcast(str(found.path) if found else "")
    if not where:
        return
    path = Path(where)
    # a node may have a folder of that name on a disk of its own
    whole, remedy = read_json(path / COMPLETE, {}), "put --out on a disk that all nodes share"
    run.world.agree(where, flatten(whole), remedy)
    there = found or Checkpoint(path, read_json(path / "state.json"))
    run.world.everywhere(lambda: go_on(run, there))
    log.info("continuing at step %d of %d (%s)", run.step, run.schedule.total_steps, where)


def go_on(run: Run, found: Checkpoint) -> None:
    """Brings a run to a checkpoint."""
    restore(found.tensors(), run.method, run.optimizer, run.counters.tensor, found.state.get("optimizer", ""))
    run.step, run.began_from = found.step, found.state.get("init_from")
    if not found.state["ema_ahead"] and not run.last:
        # a run that has been made longer: what was its last step left the EMA update out
        run.method.ema_update(1 - run.schedule.momentum(run.step))


def _find_checkpoint(run: Run, allow: bool) -> Checkpoint | None:
    out = Path(run.cfg.out)
    remove_temporaries(out)
    found = newest(out, partial(_unfit, run))
    # before the first checkpoint, config.json and env.json say what was begun here
    config = found.state["config"] if found else read_json(out / "config.json", {})
    known = found.state if found else read_json(out / "env.json", {})
    known = known if fits(known, IMAGES) else {}
    if config:
        files, sample = ImageFiles(run.source, run.cfg.data), known.get("sample", {})
        now = run.images
        # of another set no row is the same
        same = known.get("fingerprint") == now["fingerprint"]
        changed = [run.source.title(row) for row in (replaced(files, sample) if same else [])]
        for change in check_same(run.cfg, config, allow, known, now | {"replaced": changed}):
            log.warning("--allow-config-change: %s", change)
        if known.get("fingerprint") and not same:
            run.other_images = (
                "continued on other images: what is before, and k-NN of step 0, are of the first ones"
            )
        files.close()
    return found


def take_cropped_whole(run: Run) -> None:
    """Sets `crop_pct` 1 for images that are as large as the encoder's, as CIFAR's: nobody crops those again.

    It holds for the evaluations of the run and is saved with its weights.
    """
    height, width = run.cfg.model.img_size
    if are_cropped(ImageFiles(run.source, run.cfg.data), (height, width)):
        log.info(
            "%s: images have %d x %d pixels, as the encoder's: they are evaluated whole (crop_pct 1)",
            *(run.source.name, height, width),
        )
        run.method.student.crop_pct = run.method.teacher.crop_pct = 1.0


def _unfit(run: Run, found: Checkpoint) -> str:
    """Why a checkpoint of this architecture and optimizer does not fit the run; others are told by their names."""
    saved_by = found.state.get("optimizer", "")
    if saved_by and FAMILIES.get(saved_by) != FAMILIES[type(run.optimizer).__name__]:
        return ""
    changes, steps = changed_maths(found.state["config"], to_dict(run.cfg)), run.schedule.total_steps
    if other_shapes(changes):
        return ""
    if not changes and found.step > steps:
        return f"is of step {found.step}, the run has {steps}"
    return unfit(found.tensors(), found.step, run.method, run.optimizer)


def origin(run: Run) -> str:
    """What the run begins with, part by part, where that is not random."""
    if run.began_from is None or run.step:
        return ""
    parts = "".join(f"\n  {part:<16} {what}" for part, what in run.began_from.items() if part != "weights")
    rests = run.schedule.warmup_steps // 2 if run.has_fresh_pooling else 0
    rest = (
        f"\n  the trunk is frozen for {counted(rests, 'step')}, while pooling and heads are trained"
        if rests
        else ""
    )
    return f"\nbegins from {run.began_from['weights']}:{parts}{rest}"


# ---- recording --------------------------------------------------------------------------------------


def describe(run: Run, folder: RunFolder, test: ImageSource | None) -> None:
    """Writes config.json and env.json: what runs, where, with which versions, and how it was chosen."""
    device, now = run.world.device, utc_now()
    before = read_json(folder.path / "env.json", {}) if run.step else {}
    was, precision = before.get("precision"), run.resolved.precision
    if run.cfg.train.precision == "auto" and was in ("fp32", "bf16") and was != precision:
        log.warning(
            "train.precision: auto is %s on this machine and was %s before; --train.precision %s "
            "--allow-config-change keeps it",
            *(precision, was, was),
        )
    env = {
        "attempt": folder.attempt,
        "started": before.get("started") if run.step else now,
        "attempt_started": now,
        "preset": run.made_from or before.get("preset"),
        "argv": sys.argv,
        # where relative paths of the configuration start
        "cwd": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "machine": machine(),
        "code": code(),
        "versions": versions(),
        "device": str(device),
        "gpu": _gpu(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "world_size": run.world.size,
        "ops": ops.choices(device),
        "loader": run.resolved.loader,
        "precision": precision,
        "resolved": asdict(run.resolved),
        "config_hash": config_hash(run.cfg),
        "init_from": run.began_from,
        "data": {"train": _count(run.source), "test": None if test is None else _count(test)},
        **run.images,
    }
    folder.write_json("config.json", to_dict(run.cfg))
    folder.write_json("env.json", env)


def _count(source: ImageSource) -> dict[str, Any]:
    """How many images and classes there are, and the images of the smallest and the largest class."""
    found: dict[str, Any] = {"name": source.name, "images": len(source)}
    if source.labels is not None:
        sizes = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
        found |= {"classes": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
    if source.left_out:
        found["left_out"] = sum(source.left_out.values())
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in GB."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": cores()}
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*: (.*)$", text, re.M):
            found["cpu"] = model[1]
    with suppress(OSError, ValueError):
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return found


def code() -> dict[str, Any] | None:
    """The commit of this package's code, and whether files of it were changed since; None where neither is known.

    Of a checkout by git, of an installation from git by what pip has recorded.
    """
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    with suppress(OSError, subprocess.SubprocessError, UnicodeError):
        # a folder of installed packages may lie in somebody else's checkout
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    with suppress(metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        about = json.loads(metadata.distribution("extrema-fast").read_text("direct_url.json") or "{}")
        return {"commit": str(about["vcs_info"]["commit_id"]), "changed": False}
    return None


def warn_of_space(run: Run) -> None:
    """Warns once where the file system of the run has no room for two more saves."""
    size = checkpoint_bytes(run.method)
    with suppress(OSError):
        free = shutil.disk_usage(run.cfg.out).free
        if free < 2 * size:
            log.warning(
                "--out %s: %.3g GB are free, and a save takes %.3g GB, besides those that are kept (ckpt.retain %d): "
                "free some space, or use another --out",
                *(run.cfg.out, free / 1e9, size / 1e9, run.cfg.ckpt.retain),
            )


def save(run: Run, saver: Saver, attempt: int, *, must: bool) -> None:
    """Saves checkpoint and weights of this step: with `must` before it returns, else while the run goes on.

    All processes of a sharded run call this, of any other rank 0 alone, which waits for nobody. Errors as of
    `Saver.save`; weights that are not finite are never written.
    """
    state: dict[str, Any] = {
        "attempt": attempt,
        "total_steps": run.schedule.total_steps,
        # the teacher has had the update that the released code makes at the start of the next step
        "ema_ahead": not run.last or isinstance(run.cfg, FinetuneConfig),
        "config": to_dict(run.cfg),
        "config_hash": config_hash(run.cfg),
        **run.images,
        "optimizer": type(run.optimizer).__name__,
        "world_size": run.world.size,
        "versions": versions(),
        "init_from": run.began_from,
    }
    tensors = collect(run.method, run.optimizer, run.counters.tensor)
    saver.save(run.step, tensors, state, partial(run.export or _export, run, run.step), final=must)


def _export(run: Run, step: int, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    value_range, networks = deep_range(run.source, run.cfg.data), weights_of(tensors)
    meta = weights_meta(run.cfg, step, run.method.teacher.crop_pct, value_range)
    if not is_sincos(networks["teacher_branch.encoder.pos_embed"], run.cfg.model.grid):
        # another project's, kept by `--init-from`
        meta["encoder"] = {"pos_embed": "learned"}
    return write_folder(folder, meta, {which: method_tensors(networks, which) for which in WHICH})
