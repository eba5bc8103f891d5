"""One optimizer step: color jitter, teacher, student, loss, backward, update; optionally compiled or CUDA-graphed.

Nothing here waits for a GPU, except optimizers that cannot skip a step by themselves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..config import FinetuneConfig, local_batch
from ..data.augment import color_jitter
from ..data.loader import Batch
from ..data.prefetch import prefetch
from ..distributed import local
from ..models.extrema import ExtreMA, gather_targets
from ..ops.dispatch import AdamWEma
from ..ops.optimizers import ema_
from ..ops.scope import scope, scoped
from .draw import MicroBatch, draw
from .optim import gates_on_device, separate_trunk, set_lr
from .run import REDUCE, Run

log = logging.getLogger(__name__)

# backend of torch.compile; tests that count graphs replace it by one without code generation
BACKEND = "inductor"
# steps before a CUDA graph is recorded, so that kernels, plans and compiled code exist
EAGER_STEPS = 3


class StepStats(NamedTuple):
    """What is known of a step without waiting for the device; loss and gradient norm are in `run.counters`."""

    lr: float
    waited_s: float
    """how long the step waited for its images"""


def batches(run: Run, loader: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches on the run's device with their random parameters, ready for `train_step`."""
    return prefetch(loader, partial(draw, run.cfg), run.world.device)


def train_step(run: Run, batch: Batch) -> StepStats:
    """Takes one optimizer step on this process's part of a batch, which comes from `batches`."""
    lr, last = run.schedule.lr(run.step), run.step + 1 == run.schedule.total_steps
    set_lr(run.optimizer, lr, lr * run.schedule.trunk_share(run.step))
    # the released code updates the teacher at the start of the next step, so the last step has no update; an average of
    # fine-tuned weights has all of them
    last &= not isinstance(run.cfg, FinetuneConfig)
    run.teacher_weight.fill_(0.0 if last else 1 - run.schedule.momentum(run.step + 1))
    (run.recorded or partial(compute, run))(batch.micro_batches)
    return StepStats(lr, batch.waited)


def compute(run: Run, micro_batches: list[MicroBatch]) -> None:
    """Gradients of all micro-batches, then the update; all of it on the device, so that it can be recorded."""
    for p in run.trained:
        p.grad = None
    with run.world.waiting():
        loss = (run.gradients or gradients)(run, micro_batches)
    # one pass over all parameters does all that follows
    whole = run.optimizer if isinstance(run.optimizer, AdamWEma) else None
    good = loss.isfinite()
    limit = run.cfg.optim.clip_grad
    if whole is None:
        with scope("gradient norm, accumulation"):
            norms = torch._foreach_norm([local(p.grad) for p in run.trained if p.grad is not None])
            norm = torch.linalg.vector_norm(torch.stack(norms))
        good &= norm.isfinite()
    # a step that is bad on one process is skipped on all
    dtype = run.counters.tensor.dtype
    shared = [1 - good.to(dtype), loss.to(dtype)]
    if run.resolved.sharded:
        # each process has the norm of its part
        shared.append(norm.to(dtype).square())
    bad, loss, *squares = run.world.sum(torch.stack(shared))
    bad, loss = (bad > 0).to(dtype), loss / run.world.size
    if whole is None:
        if squares:
            norm = squares[0].sqrt().to(norm.dtype)
        if limit:
            torch.nn.utils.clip_grads_with_norm_(run.trained, limit, norm)
        update(run, bad)
    else:
        with scope("optimizer and EMA"):
            # all processes have the same gradients, and so the same norm
            whole.step(momentum_weight=run.teacher_weight, found_inf=bad, max_norm=limit or math.inf)
            assert whole.grad_norm is not None and whole.skipped is not None
            norm, bad = whole.grad_norm, whole.skipped
    if run.targets is not None and run.cfg.head.queue:
        run.method.enqueue(run.targets, bad)
    run.counters.add(loss, norm, bad)


def gradients(run: Run, micro_batches: list[MicroBatch]) -> Tensor:
    """Adds the gradients of all micro-batches to the student's; returns the loss, a detached scalar."""
    cfg, count = run.cfg, len(micro_batches)
    loss_of = run.compiled_loss or _loss_of(run)
    views = [color_views(run, m) for m in micro_batches]
    others: dict[str, Any] = {}
    run.outputs.clear()
    if cfg.head.whole_batch and (count > 1 or run.world.size > 1):
        # the loss of each image takes the targets of the whole batch
        with run.resolved.autocast():
            own = torch.cat([run.method.teacher_branch(teacher)[0] for _, teacher in views])
        others["targets"], first = gather_targets(own)
    total = torch.zeros((), device=run.world.device)
    for i, (m, (student, teacher)) in enumerate(zip(micro_batches, views, strict=True)):
        if others:
            others["offset"] = first + i * len(m.images)
        with run.world.no_sync_unless(i + 1 == count, run.student):
            loss, *outputs = loss_of(student, teacher, m.keep, m.drop_path, **others)
            loss = loss / count
            loss.backward()
        total += loss.detach()
    run.outputs += outputs
    # of the whole batch, where the loss takes those
    run.targets = others.get("targets", outputs[1])
    return total


def color_views(run: Run, m: MicroBatch) -> tuple[Tensor, Tensor]:
    """Patches of the student's version [V b, K, C P P], kept ones only, and of the teacher's [b, N, C P P]."""
    data, model = run.cfg.data, run.cfg.model
    return color_jitter(
        m.images,
        m.jitter,
        data,
        model.in_chans,
        patch=model.patch_size,
        keep=m.keep,
        dtype=run.resolved.dtype,
    )


def micro_batch_loss(
    method: ExtreMA,
    student: nn.Module,
    autocast: Callable[[], torch.autocast],
    student_patches: Tensor,
    teacher_patches: Tensor,
    keep: Tensor,
    drop_path: Tensor | None,
    targets: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher, student and loss of one micro-batch; with `train.compile step` one graph.

    Returns:
        The loss; predictions [V b, d] and targets [b, d] of these images, without a gradient.

    Args:
        student: `method.student_branch`, possibly under data parallelism.
        student_patches: [V b, K, C P P], the kept ones.
        teacher_patches: [b, N, C P P].
        keep: [V, b, K] int32.
        drop_path: [L, 2, V b] or None.
        targets: [M, d] teacher's projections of the whole batch; None: those of these images, computed here.
        offset: row in `targets` of the first image.
    """
    with autocast():
        if targets is None:
            targets, _ = method.teacher_branch(teacher_patches)
        prediction, features = student(student_patches, keep, drop_path)
    images = len(teacher_patches)
    loss = method.loss(prediction, targets, images, offset, features)
    return loss, prediction.detach(), targets[offset : offset + images]


@scoped("optimizer and EMA")
def update(run: Run, bad: Tensor) -> None:
    """Optimizer, then the teacher's EMA update with the momentum of the next step; neither when `bad` is 1.

    The released code updates the teacher at the start of a step, with the weights that the step before left;
    here the same update ends that step.
    """
    optimizer, skip = run.optimizer, bad.float()
    if gates_on_device(optimizer):
        # where this is 1, weights, moments and step count keep their bits
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()
    if run.followed[0]:
        ema_(*run.followed, run.teacher_weight, skip)
    run.method.sync_shadow_weights()


def wrap(run: Run) -> None:
    """Makes a run ready for training once its weights are in place: shadow weights, compiling, data parallelism.

    Nothing is compiled or recorded before the first steps.
    """
    run.method.sync_shadow_weights()
    if run.has_fresh_pooling:
        encoder = run.method.student
        separate_trunk(run.optimizer, [*encoder.patch_embed.parameters(), *encoder.blocks.parameters()])
    mode = run.resolved.compile
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
    if mode != "none":
        log.info("train.compile %s: the first step waits for the compiler", mode)
        # otherwise recompiling at every step would end in silent eager execution
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # a block is one graph: torch would cut it where the buckets of gradients end
        torch._dynamo.config.optimize_ddp = False
        # Triton's own launcher takes twice as long as inductor's
        torch._inductor.config.static_launch_user_defined_triton_kernels = True
    if mode == "block":
        run.method.compile_regions(**options)
    run.student = run.world.wrap(run.method.student_branch, REDUCE[run.cfg.system.reduce])
    if mode == "step":
        run.compiled_loss = torch.compile(_loss_of(run), **options)
    if run.resolved.cuda_graph:
        run.recorded = StepGraph(partial(compute, run), run.world.device)


def _loss_of(run: Run) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return partial(micro_batch_loss, run.method, run.student, run.resolved.autocast)


def memory_remedy(run: Run) -> str:
    """The sizes of a step, and what makes it smaller."""
    cfg, r = run.cfg, run.resolved
    images, count = local_batch(cfg, run.world.size), cfg.train.accumulation
    width, depth, _ = cfg.model.shape
    remedies = [f"--train.accumulation {2 * count} (the same result, half the activations)"]
    if r.resident == "gpu":
        remedies.append("--data.resident host (the images leave the GPU)")
    if r.recompute != "norm":
        remedies.append("--train.recompute norm (a quarter less of the trunk's)")
    remedies.append(f"--train.batch-size {max(1, cfg.train.batch_size // 2)}")
    if run.world.size > 1 and not r.sharded:
        remedies.append("--system.parallel fsdp (weights and moments are spread over the processes)")
    remedies.append(f"more processes (torchrun --nproc-per-node {2 * run.world.size})")
    if r.precision == "fp32":
        remedies.append("--train.precision bf16")
    return (
        f"{images} images per process and micro-batch, {cfg.mask.views} views of {cfg.num_keep} tokens and the "
        f"teacher's {cfg.model.num_patches}, width {width}, depth {depth}, {r.precision}, peak "
        f"{run.world.memory_gb():.1f} GB; try {', '.join(remedies[:-1])}, or {remedies[-1]}"
    )


class StepGraph:
    """Calls `function(inputs)`, recorded as a CUDA graph: the first steps as it is, then a replay.

    Inputs of another structure or shape run as they are. If recording fails, that is logged once and all later
    steps run as they are.

    Args:
        function: reads `inputs` (tensors, nested) and tensors that stay in place, writes only the latter, and never
            waits for the device.
    """

    def __init__(self, function: Callable[[Any], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Any] = []
        self.spec: Any = None
        self.steps, self.failed = 0, False

    def __call__(self, inputs: Any) -> None:
        """One step; recording executes nothing, so the step that records is replayed as all later ones."""
        tensors, spec = pytree.tree_flatten(inputs)
        self.steps += 1
        if self.failed or self.steps <= EAGER_STEPS or not (self.graph or self._record(tensors, spec)):
            self._on_side_stream(inputs)
        elif not self._fits(tensors, spec):
            self.function(inputs)
        else:
            for buffer, given in zip(self.inputs, tensors, strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(given, non_blocking=True)
            self.graph.replay()  # type: ignore[union-attr]

    def _fits(self, tensors: list[Any], spec: Any) -> bool:
        return spec == self.spec and all(
            a.shape == b.shape and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
            for a, b in zip(self.inputs, tensors, strict=True)
        )

    def _on_side_stream(self, inputs: Any) -> None:
        # what warms up must have run on a stream that can be recorded
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.function(inputs)
        current.wait_stream(self.stream)

    def _record(self, tensors: list[Any], spec: Any) -> bool:
        self.inputs = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
        self.spec, graph = spec, torch.cuda.CUDAGraph()
        try:
            # decoding threads may allocate meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function(pytree.tree_unflatten(self.inputs, spec))
        except RuntimeError as error:
            self.failed, self.inputs = True, []
            log.warning("train.cuda_graph: the step cannot be recorded (%s); it runs as it is", error)
            return False
        self.graph = graph
        log.info("train.cuda_graph: step recorded after %d plain ones", self.steps - 1)
        return True
