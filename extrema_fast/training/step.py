"""One optimizer step: draw coins, augment, teacher, student, loss, backward, update. Compiled or recorded if asked.

    draw        everything random of a batch, per micro-batch (`Part`); all of it small
    compute     all the rest, on the device alone: what a CUDA graph records (`graph.StepGraph`)
    update      optimizer, then the teacher's move, then low-precision copies; nothing moves in a bad step

The host never waits for the device here, except for optimizers that cannot skip a step by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data.augment import color_jitter, jitter_params
from ..data.loader import Batch
from ..data.prefetch import prefetch
from ..errors import UsageError
from ..models.drop_path import drop_path_scale
from ..models.extrema import ExtreMA, gather_targets
from ..models.masking import draw_views
from ..ops import dispatch as ops
from ..ops.dispatch import AdamWEma
from ..ops.scope import scope, scoped
from .optim import gates_on_device, set_lr
from .plan import precision
from .run import Run

# torch.compile's backend; tests that count graphs take one without code generation
BACKEND = "inductor"


class Part(NamedTuple):
    """One micro-batch on the device.

    images  [b, H, W, 3] uint8
    colors  [b, 2, 10] colour coins, or None
    keep    [V, b, K] int32 kept tokens
    path    drop-path factors of the student trunk, [L, 2, V b], or None
    """

    images: Tensor
    colors: Tensor | None
    keep: Tensor
    path: Tensor | None


# ---- what is chosen by default ----------------------------------------------------------------------


def compile_mode(cfg: Config, kind: str) -> str:
    """`train.compile`; `auto`: `block` on a GPU, none on a CPU.

    On a CPU inductor's code for it is no faster, larger, and takes a minute to compile (record `modes`).
    """
    mode = cfg.train.compile
    return ("block" if kind == "cuda" else "none") if mode == "auto" else mode


def recomputed(cfg: Config, kind: str) -> str:
    """`train.recompute`; `auto`: `norm` on a CPU, none on a GPU, where it has not been measured."""
    what = cfg.train.recompute
    return ("norm" if kind == "cpu" else "none") if what == "auto" else what


def keeps_low(cfg: Config, kind: str) -> bool:
    """Whether layers keep low-precision copies of their weights: with bf16 on a GPU.

    On a CPU a cast in the forward pass costs what renewing a copy costs, without its memory.
    """
    return kind == "cuda" and precision(cfg, kind) == "bf16"


def check_modes(cfg: Config, kind: str, processes: int) -> None:
    """Raises UsageError for modes that cannot run together, or not on `kind` (`cpu`, `cuda`)."""
    mode = compile_mode(cfg, kind)
    if cfg.train.cuda_graph and kind != "cuda":
        raise UsageError(
            f"train.cuda_graph: needs a CUDA device, this run is on {kind}; use train.compile instead"
        )
    if processes > 1:
        for name, on in (("cuda_graph", cfg.train.cuda_graph), (f"compile {mode}", mode in ("loss", "step"))):
            if on:
                raise UsageError(
                    f"train.{name}: bypasses the exchange of gradients between {processes} processes; "
                    "use train.compile block"
                )
    if mode in ("loss", "step") and cfg.head.loss == "infonce" and cfg.train.accumulation > 1:
        raise UsageError(
            f"train.compile {mode}: with InfoNCE the teacher must cover all {cfg.train.accumulation} micro-batches "
            "before the first student pass; use train.accumulation 1, or train.compile block"
        )
    if mode == "step" and cfg.train.cuda_graph:
        raise UsageError(
            "train.cuda_graph: records the backward pass itself; use it with train.compile loss or block"
        )


# ---- draw ------------------------------------------------------------------------------------------


def slices(size: int, parts: int) -> list[slice]:
    """`parts` equal slices of `size` rows."""
    each = size // parts
    return [slice(i, i + each) for i in range(0, each * parts, each)]


def draw(run: Run, images: Tensor, index: Tensor, epoch: int) -> list[Part]:
    """The micro-batches of this process's part of a batch, with their coins.

    images: [B, H, W, 3] uint8, on the device;  index: [B] int64 sample rows, on the CPU
    """
    cfg, device = run.cfg, run.world.device
    mask, model = cfg.mask, cfg.model
    keys = {"seed": cfg.train.seed, "epoch": epoch}
    there = index.to(device, non_blocking=True)
    parts = []
    for p in slices(len(index), cfg.train.accumulation):
        keep = draw_views(there[p], model.num_patches, cfg.num_keep, mask.views, mode=mask.mode, **keys)
        path = drop_path_scale(there[p], mask.views, model.shape[1], model.drop_path, **keys)
        parts.append(Part(images[p], jitter_params(there[p], cfg.data, **keys), keep, path))
    return parts


def batches(run: Run, loader: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches on the run's device, ready for `train_step`."""
    return prefetch(loader, partial(draw, run), run.world.device)


# ---- compute ---------------------------------------------------------------------------------------


def autocast(cfg: Config, kind: str) -> torch.autocast:
    """The context of the matrix products: bf16, or nothing."""
    # a recorded cast would be replayed, its cached result would not be renewed
    return torch.autocast(
        kind, torch.bfloat16, precision(cfg, kind) == "bf16", cache_enabled=not cfg.train.cuda_graph
    )


def compute(run: Run, parts: list[Part]) -> None:
    """Gradients of all micro-batches, then the update; loss and norms go to `run.counters`."""
    run.optimizer.zero_grad(set_to_none=True)
    loss = (run.gradients or gradients)(run, parts)
    params = [p for _, p in run.method.student_parameters()]
    with scope("gradient norm, accumulation"):
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if run.cfg.optim.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(params, run.cfg.optim.clip_grad, norm)
    # one process's bad step is everybody's
    bad = 1 - (loss.isfinite() & norm.isfinite()).double()
    bad, loss = run.world.sum(torch.stack([bad, loss.double()]))
    bad, loss = (bad > 0).double(), loss / run.world.size
    update(run, bad)
    run.counters.add(loss, norm, bad)


def gradients(run: Run, parts: list[Part]) -> Tensor:
    """Adds the gradients of all micro-batches to the student's; returns the loss, a detached scalar."""
    cfg, method, device = run.cfg, run.method, run.world.device
    views = [color_jitter(p.images, p.colors, cfg.data, cfg.model.in_chans) for p in parts]
    context = partial(autocast, cfg, device.type)
    # the teacher sees the whole batch before the first student pass: InfoNCE compares with every target
    with context():
        targets, offset = torch.cat([method.teacher_branch(teacher)[0] for _, teacher in views]), 0
    if cfg.head.loss == "infonce":
        targets, offset = gather_targets(targets)
    loss = torch.zeros((), device=device)
    size = len(parts[0].images)
    for i, (part, (student, _)) in enumerate(zip(parts, views, strict=True)):
        with run.world.no_sync_unless(i + 1 == len(parts), run.student):
            with context():
                prediction, _ = run.student(student, part.keep, part.path)
            one = method.loss(prediction, targets, size, offset + i * size) / len(parts)
            one.backward()
        loss += one.detach()
    return loss


def loss_of_part(
    method: ExtreMA,
    cfg: Config,
    kind: str,
    student: Tensor,
    teacher: Tensor,
    keep: Tensor,
    path: Tensor | None,
) -> Tensor:
    """Teacher, student and loss of one micro-batch, the unit of `train.compile loss`; images [b, C, H, W]."""
    with autocast(cfg, kind):
        targets, _ = method.teacher_branch(teacher)
        prediction, _ = method.student_branch(student, keep, path)
    return method.loss(prediction, targets, len(student))


def compile_run(run: Run) -> None:
    """Puts compiled code in place, as `train.compile` asks; nothing is compiled before the first step."""
    cfg, kind = run.cfg, run.world.device.type
    mode = compile_mode(cfg, kind)
    check_modes(cfg, kind, run.world.size)
    if mode == "none":
        return
    # decided now: a choice made inside compiled code would compile it once more
    ops.choices(run.world.device)
    # a recompilation at every step would otherwise end in silent eager execution
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
    if mode == "block":
        for block in (*run.method.student.blocks, *run.method.teacher.blocks):
            # in place: the names of the weights stay
            block.compile(**options)
        return
    loss = partial(loss_of_part, run.method, cfg, kind)
    if mode == "step":
        torch._dynamo.config.trace_autograd_ops = True
        params = [p for _, p in run.method.student_parameters()]

        def loss_and_gradients(*args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
            value = loss(*args)
            return value.detach(), torch.autograd.grad(value, params)

        run.gradients = partial(_gradients_compiled, torch.compile(loss_and_gradients, **options), params)
    else:
        run.gradients = partial(_gradients_of_graph, torch.compile(loss, **options))


def _gradients_of_graph(loss_fn: Callable[..., Tensor], run: Run, parts: list[Part]) -> Tensor:
    """As `gradients`, with teacher, student and loss as one compiled graph and its backward as another."""
    total = torch.zeros((), device=run.world.device)
    for p in parts:
        student, teacher = color_jitter(p.images, p.colors, run.cfg.data, run.cfg.model.in_chans)
        loss = loss_fn(student, teacher, p.keep, p.path)
        (loss / len(parts)).backward()
        total += loss.detach() / len(parts)
    return total


def _gradients_compiled(function: Callable, params: list[Tensor], run: Run, parts: list[Part]) -> Tensor:
    """As `gradients`, forward and backward as one compiled graph."""
    total = torch.zeros((), device=run.world.device)
    for p in parts:
        student, teacher = color_jitter(p.images, p.colors, run.cfg.data, run.cfg.model.in_chans)
        loss, grads = function(student, teacher, p.keep, p.path)
        for param, grad in zip(params, grads, strict=True):
            grad = grad / len(parts) if len(parts) > 1 else grad
            param.grad = grad if param.grad is None else param.grad + grad
        total += loss / len(parts)
    return total


# ---- update ----------------------------------------------------------------------------------------


def set_schedule(run: Run) -> float:
    """Sets this step's learning rate and the teacher's weight for the move that ends it; returns the rate."""
    lr, last = run.schedule.lr(run.step), run.step + 1 == run.schedule.total_steps
    set_lr(run.optimizer, lr)
    # the released code moves the teacher at the start of the next step, so the last step has no move
    run.teacher_weight.fill_(0.0 if last else 1 - run.schedule.momentum(run.step + 1))
    return lr


@scoped("optimizer and EMA")
def update(run: Run, bad: Tensor) -> None:
    """Optimizer, then the teacher's move with the momentum of the next step; neither when `bad`.

    The released code moves the teacher at the start of a step with the weights the previous one left; here
    the same move ends the step.
    """
    weight, optimizer = run.teacher_weight, run.optimizer
    if isinstance(optimizer, AdamWEma):
        # one pass over all parameters, gated on the device, copies included
        optimizer.step(momentum_weight=weight, found_inf=bad)
        return
    if gates_on_device(optimizer):
        # weights, moments and step count are left alone where this is 1
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad:
        optimizer.step()
    run.method.ema_update(weight * (1 - bad))
    run.method.sync_shadow_weights()
