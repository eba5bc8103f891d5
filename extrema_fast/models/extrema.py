"""ExtreMA: student, EMA teacher, heads and losses, from images to loss (arXiv 2206.04667, section 3).

Shape letters: b images of this process, V views, K kept tokens, D width, d width of the projection. Rows of views
are view-major: rows i, b + i, 2b + i share image i.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..distributed import World, local
from ..ops.linear import Linear
from ..ops.optimizers import ema_
from ..ops.scope import scope, scoped
from ..ops.stock import is_stock
from .encoder import Encoder, call_block
from .layers import Block

# Newton-Schulz iterations of `whiten`: enough for directions without variance in up to 4096 dimensions
ROUNDS = 20
# blocks per compiled graph: each call costs the CPU about as much as its launches, and each block adds compile time
TOGETHER = 4
# weight of the mean shared by all class tokens, relative to the correlations in `correlation`: with 0.01 their cosines
# still grow to 1, with 1 an encoder learns less
SHARED = 0.05

# ---- heads and losses -------------------------------------------------------------------------------


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class BatchNorm(nn.Module):
    """Batch norm with the statistics of the current batch over all processes; no running statistics.

    Its parameters are not named like those of a LayerNorm, so that loading one's weights into the other fails.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, D] in the same dtype; R is the same on all processes."""
        y = _at_least_fp32(x)
        y = y - _over_processes(y.mean(0))
        y = y * (_over_processes(y.square().mean(0)) + 1e-5).rsqrt()
        return (y * self.scale + self.shift).to(x.dtype)


def mlp_head(*widths: int, norm: str = "layer") -> nn.Sequential:
    """Linear layers of the given `widths`; each but the last is followed by a norm (eps 1e-5) and GELU.

    Submodule numbers match the released checkpoints (`head.{0,1,3,4,6}`, `predictor.{0,1,3}`).

    Args:
        widths: input, hidden and output widths.
        norm: `layer` or `batch`.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            layers += [BatchNorm(fan_in) if norm == "batch" else nn.LayerNorm(fan_in, eps=1e-5), nn.GELU()]
        linear = Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_at_least_fp32(x), dim=-1)


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL loss: |q - k|^2 = 2 - 2 cos(q, k) of L2-normalized vectors, averaged over images and views.

    Args:
        prediction: [V b, d] q, view-major.
        target: [b, d] k; gets no gradient.

    Returns:
        A scalar, at least fp32.
    """
    b, d = target.shape
    q = _unit(prediction).view(-1, b, d)
    return (q - _unit(target.detach())).square().sum(-1).mean()


def whiten(targets: Tensor, shrinkage: float = 0.01) -> Tensor:
    """Centers targets over the batch and gives their principal directions about equal variance.

    `(K - mean) (C + s I)^-1/2` with the covariance C of K, and s = `shrinkage` times the mean of its min(M, d) largest
    eigenvalues; directions with less variance than s keep less. The matrix root is computed by Newton-Schulz
    iterations: only matmuls, and no GPU synchronization.

    Args:
        targets: [M, d], of the step on all processes; get no gradient.
        shrinkage: see above.

    Returns:
        [M, d], at least fp32, up to a common factor.
    """
    k = _at_least_fp32(targets.detach())
    with torch.autocast(k.device.type, enabled=False):
        k = k - k.mean(0)
        # (K K' + s I)^-1/2 K is the same: the smaller of both
        wide = k.shape[0] < k.shape[1]
        gram = k @ k.T if wide else k.T @ k
        eye = torch.eye(len(gram), dtype=k.dtype, device=k.device)
        trace = gram.diagonal().sum().clamp(min=1e-12)
        # eigenvalues in (0, 1)
        y = (gram / trace + shrinkage / len(gram) * eye) / (1 + shrinkage)
        z = eye
        for _ in range(ROUNDS):
            t = 1.5 * eye - 0.5 * z @ y
            y, z = y @ t, t @ z
        return z @ k if wide else k @ z


def infonce_loss(
    prediction: Tensor,
    targets: Tensor,
    temperature: float,
    images: int,
    offset: int = 0,
    queue: Tensor | None = None,
) -> Tensor:
    """InfoNCE loss: the mean of -2T log softmax_j(q . k_j / T) at the image's own target k.

    Args:
        prediction: [V b, d] q, view-major.
        targets: [M, d] k of the step on all processes; get no gradient.
        temperature: T.
        images: the number b of images.
        offset: row of the first of these images in `targets`.
        queue: [Q, d] unit targets of other images, as additional negatives; None: none.

    Returns:
        A scalar, at least fp32.
    """
    q, keys = _unit(prediction), _unit(targets.detach())
    if queue is not None:
        keys = torch.cat([keys, queue.to(keys.dtype)])
    # autocast would turn this matmul, the input of the softmax, into bf16
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature
    label = torch.arange(images, device=q.device) + offset
    return 2 * temperature * F.cross_entropy(logits, label.repeat(q.shape[0] // images))


def correlation(features: Tensor) -> Tensor:
    """Penalty on redundant dimensions of class tokens: squared correlations of all pairs, per dimension.

    The covariance term of VICReg (arXiv 2105.04906, equation 3) on standardized dimensions, so that it does not affect
    scale. Without it a few directions hold most of the variance of a small encoder, and dominate nearest neighbors.

    A covariance ignores the mean that all tokens share, as does batch norm in the heads, and in long runs nothing else
    would keep that mean from growing until all cosines are 1. So log(1 + mean^2 / variance) of each dimension is added,
    with a small weight (`SHARED`); unlike that of a fraction, its pull does not fade for a large mean.

    Args:
        features: [R, D] class tokens of this process; R is the same on all.

    Returns:
        A scalar over the rows of all processes, at least fp32.
    """
    z = _at_least_fp32(features)
    with torch.autocast(z.device.type, enabled=False):
        mean = _over_processes(z.mean(0))
        z = z - mean
        c = _over_processes(z.T @ z / len(z))
        # a dimension without variance has no correlations
        variance, mean = c.diagonal() + 1e-4, mean.square()
        scale = variance.rsqrt()
        c = c * scale * scale[:, None]
        off_diagonal = (c.square().sum() - c.diagonal().square().sum()) / len(c)
        return off_diagonal + SHARED * (mean / variance).log1p().mean()


class _Mean(torch.autograd.Function):
    """Mean of a tensor over processes, in the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Mean.forward(ctx, gradient)


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Context in which a process works without the others: batch statistics cover only its own rows."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _over_processes(x: Tensor) -> Tensor:
    several = not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _Mean.apply(x) if several else x


def gather_targets(target: Tensor) -> tuple[Tensor, int]:
    """All-gathers [b, d] without gradient; returns ([world b, d], the row of this process's first image)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return target, 0
    out = target.new_empty(dist.get_world_size() * target.shape[0], target.shape[1])
    # torch 2.13 renamed it
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, target.detach().contiguous())
    return out, dist.get_rank() * target.shape[0]


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Selects which guards of compiled code run at every call: those of its arguments and of torch's modes.

    A trunk block has about 150 more, for attributes of its modules and for globals, which do not change while a run
    trains; checking them would take the CPU as long as the launches.
    """
    others = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [keep and not guard.is_global for keep, guard in zip(others, guards, strict=True)]


# ---- the two networks -------------------------------------------------------------------------------


class Branch(nn.Module):
    """Encoder and heads: images in, projection and class token out; `name` labels the branch in profiles."""

    name: str
    # whether the class token returned by `forward` has a gradient
    features_learn = False

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        # blocks of each call of `stretch`, if it is compiled
        self._stretches: list[list[nn.Module]] = []

    def forward(
        self, images: Tensor, keep: Tensor | None = None, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs encoder and heads on images, or on their patches as selected by `keep`.

        Args:
            images: [b, C, H, W], or patches [V b, K, C P P].
            keep: [V, b, K] integer, or None for all tokens.
            path: drop-path factors [L, 2, V b], or None.

        Returns:
            (output of the heads [V b, d], class token [V b, D] after the final norm). The class token has a gradient
            only if `features_learn`.
        """
        with scope(f"{self.name}/embed"):
            tokens = self.embed(images, keep)
        with scope(f"{self.name}/trunk"):
            tokens = self.trunk(tokens, path)
        return self.after_trunk(tokens)

    def embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Same as `Encoder.embed`."""
        return self.encoder.embed(images, keep)

    def trunk(self, tokens: Tensor, path: Tensor | None = None) -> Tensor:
        """Same as `Encoder.trunk`; runs in stretches of blocks if these are compiled."""
        encoder, first = self.encoder, 0
        if not self._stretches:
            return encoder.trunk(tokens, path)
        path = encoder.factors(tokens, path)
        for blocks in self._stretches:
            last = first + len(blocks)
            tokens = self.stretch(blocks, tokens, None if path is None else path[first:last])
            first = last
        return tokens

    def stretch(self, blocks: Sequence[nn.Module], tokens: Tensor, path: Tensor | None) -> Tensor:
        """Runs consecutive blocks: tokens [R, n, D], path [l, 2, R] or None -> [R, n, D]."""
        for i, block in enumerate(blocks):
            factors = None if path is None else path[i]
            tokens = call_block(block, "trunk block", tokens, factors, self.encoder.grad_checkpointing)
        return tokens

    def after_trunk(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pooling and heads: tokens [V b, K, D] -> the outputs of `forward`."""
        with scope(f"{self.name}/pooling"):
            cls = self.encoder.norm(self.encoder.pool(tokens)[0])
        with scope(f"{self.name}/heads"):
            return self.heads(cls), cls if self.features_learn else cls.detach()

    def heads(self, cls: Tensor) -> Tensor:
        """Class tokens [V b, D] -> projections [V b, d]."""
        return self.projector(cls)

    def compile_regions(self, **options: Any) -> None:
        """Compiles embedding, stretches of blocks, and everything after the trunk, in place; weights keep their names.

        Stretches of the same length share a graph, with the weights as inputs. Blocks with hooks, which gather sharded
        weights, are compiled one by one, inside their hooks.
        """

        def own(f: Any) -> Any:
            # torch stores graphs with a function's code, and the remaining guards do not distinguish runs
            return types.FunctionType(
                f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__
            )

        guards: dict[str, Any] = {"guard_filter_fn": _of_arguments}

        def compiled(method: Any) -> Callable[..., Any]:
            return torch.compile(types.MethodType(own(method.__func__), self), **options, options=guards)

        blocks: list[Any] = list(self.encoder.blocks)
        if any(block._forward_pre_hooks for block in blocks):
            forward = torch.compile(own(Block.forward), **options, options=guards)
            for block in blocks:
                block.forward = types.MethodType(forward, block)
        else:
            self._stretches = [blocks[i : i + TOGETHER] for i in range(0, len(blocks), TOGETHER)]
            self.stretch = compiled(self.stretch)  # type: ignore[method-assign]
        self.embed = compiled(self.embed)  # type: ignore[method-assign]
        # the scopes inside are gone from compiled code
        name = scoped(f"{self.name}/pooling, heads")
        self.after_trunk = name(compiled(self.after_trunk))  # type: ignore[method-assign]


class StudentBranch(Branch):
    """Encoder, projector and predictor: everything with a gradient, and what data parallelism wraps."""

    name = "student"

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder, projector)
        self.predictor = predictor

    def heads(self, cls: Tensor) -> Tensor:
        """Class tokens [V b, D] -> predictions [V b, d]."""
        return self.predictor(self.projector(cls))


class TeacherBranch(Branch):
    """Encoder and projector, the moving averages of the student's; always in eval mode, never with a gradient."""

    name = "teacher"

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__(encoder, projector)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TeacherBranch:
        """Stays in eval mode, since only the student has drop-path."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Images [b, C, H, W] or patches [b, N, C P P] -> (target [b, d], class token [b, D]), from all tokens."""
        return super().forward(images)


# ---- the method -------------------------------------------------------------------------------------


class Output(NamedTuple):
    """The result of a forward pass of `ExtreMA`; everything but the loss is detached.

    Attributes:
        loss: Scalar, fp32.
        prediction: [V b, d] outputs of the predictor, view-major.
        target: [b, d] projections of the teacher.
        student_features: [V b, D] class tokens of the student, after the final norm.
        teacher_features: [b, D] class tokens of the teacher, after the final norm.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    student_features: Tensor
    teacher_features: Tensor


class StudentTeacher(nn.Module):
    """A trained network and, optionally, a moving average of it.

    Attributes:
        student_branch: everything with a gradient.
        teacher_branch: the moving average, with parameters of the same names, or fewer; None: no average.
    """

    student_branch: Any
    teacher_branch: Any

    def __init__(self) -> None:
        super().__init__()
        self._shadows: dict[Tensor, Tensor] = {}

    @property
    def student(self) -> Encoder:
        """The student's encoder."""
        return self.student_branch.encoder

    @property
    def teacher(self) -> Encoder:
        """The teacher's encoder, or the student's if there is no teacher."""
        return (self.teacher_branch or self.student_branch).encoder

    def _followers(self) -> dict[str, nn.Parameter]:
        return {} if self.teacher_branch is None else dict(self.teacher_branch.named_parameters())

    def student_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained."""
        return [(n, p) for n, p in self.student_branch.named_parameters() if p.requires_grad]

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(teacher parameters, student parameters of the same names); if sharded, the local shards."""
        student, teacher = dict(self.student_branch.named_parameters()), self._followers()
        return [local(t) for t in teacher.values()], [local(student[n]).detach() for n in teacher]

    def shard(self, world: World, dtype: torch.dtype, reduce: torch.dtype) -> None:
        """Shards both branches over processes, in place (`World.shard`), each trunk block separately."""
        for branch in filter(None, (self.student_branch, self.teacher_branch)):
            world.shard(branch, branch.encoder.blocks, dtype, reduce)

    def ema_update(self, weight: float | Tensor) -> None:
        """EMA update of the teacher, in place; `weight` is 1 - momentum (`ops.optimizers.ema_`)."""
        ema_(*self.ema_pairs(), weight)

    def add_shadow_weights(self, dtype: torch.dtype) -> None:
        """Gives each stock linear layer of student and teacher shadow weights in `dtype`, which its matmuls read.

        Code that changes weights must sync the shadows: `sync_shadow_weights`, or the fused AdamW + EMA pass.
        """
        layers = [m for m in self.modules() if isinstance(m, nn.Linear)]
        for layer in (m for m in layers if is_stock(m, nn.Linear, Linear)):
            layer.shadow = layer.weight.detach().to(dtype)
            self._shadows[layer.weight] = layer.shadow
            if layer.bias is not None:
                layer.bias_shadow = layer.bias.detach().to(dtype)
                self._shadows[layer.bias] = layer.bias_shadow

    def shadow_pairs(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """(student parameter -> its shadow, student parameter -> its teacher parameter's shadow)."""
        shadows, teacher = self._shadows, self._followers()
        named = self.student_parameters()
        return (
            {p: shadows[p] for _, p in named if p in shadows},
            {p: shadows[teacher[n]] for n, p in named if n in teacher and teacher[n] in shadows},
        )

    @torch.no_grad()
    def sync_shadow_weights(self) -> None:
        """Copies the weights to their shadows, if there are any."""
        if self._shadows:
            torch._foreach_copy_(list(self._shadows.values()), list(self._shadows))


class ExtreMA(StudentTeacher):
    """Student, EMA teacher and loss, on one process.

    `forward` computes the loss of a whole step, for small batches and tests. The training step calls
    `teacher_branch`, `student_branch` and `loss` itself, so that the teacher covers the batch before the first
    micro-batch. The initial weights depend only on `cfg.train.seed`.

    Attributes:
        queue: [head.queue, d] fp32 unit targets of earlier steps, latest first (MoCo, arXiv 1911.05722), or None. The
            same on all processes, and part of checkpoints.
    """

    queue: Tensor | None

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.head_config = cfg.head
        width, h = cfg.model.shape[0], cfg.head
        with torch.random.fork_rng(devices=[]):
            # the encoder first, so that `build_encoder(cfg.model, seed)` has the same weights
            torch.manual_seed(cfg.train.seed)
            encoder = Encoder(cfg.model)
            encoder.mean, encoder.std = cfg.data.mean, cfg.data.std
            projector = mlp_head(width, h.hidden, h.hidden, h.out, norm=h.norm)
            predictor = mlp_head(h.out, h.predictor_hidden, h.out, norm=h.norm)
            # random directions until there are targets (MoCo)
            self.register_buffer("queue", _unit(torch.randn(h.queue, h.out)) if h.queue else None)
        self.student_branch = StudentBranch(encoder, projector, predictor)
        self.student_branch.features_learn = h.decorrelation > 0
        self.teacher_branch = TeacherBranch(copy.deepcopy(encoder), copy.deepcopy(projector))
        self._byol_loss: Callable[[Tensor, Tensor], Tensor] = byol_loss

    @property
    def projector(self) -> nn.Module:
        """The student's projector."""
        return self.student_branch.projector

    @property
    def predictor(self) -> nn.Module:
        """The student's predictor."""
        return self.student_branch.predictor

    @property
    def teacher_projector(self) -> nn.Module:
        """The teacher's projector."""
        return self.teacher_branch.projector

    def compile_regions(self, **options: Any) -> None:
        """Compiles both branches (`Branch.compile_regions`) and the loss; `options` are passed to torch.compile."""
        self.student_branch.compile_regions(**options)
        self.teacher_branch.compile_regions(**options)
        self._byol_loss = torch.compile(self._byol_loss, **options)

    @scoped("loss")
    def loss(
        self,
        prediction: Tensor,
        targets: Tensor,
        images: int,
        offset: int = 0,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            prediction: [V b, d] predictor outputs, view-major.
            targets: [M, d] targets of the teacher.
            images: the number b of images.
            offset: row of the first of these images in `targets`.
            features: [V b, D] class tokens of the student; needed only for `head.decorrelation`.

        Returns:
            A scalar.
        """
        head = self.head_config
        if head.loss == "byol":
            if head.targets == "whitened":
                targets = whiten(targets)
            loss = self._byol_loss(prediction, targets[offset : offset + images])
        else:
            loss = infonce_loss(prediction, targets, head.temperature, images, offset, self.queue)
        if not head.decorrelation:
            return loss
        assert features is not None
        return loss + head.decorrelation * correlation(features)

    @torch.no_grad()
    def enqueue(self, targets: Tensor, skip: Tensor) -> None:
        """Adds the targets [M, d] of a step, from all processes, to the queue, unless the scalar `skip` is 1."""
        assert self.queue is not None
        moved = torch.cat([_unit(targets), self.queue])[: len(self.queue)]
        self.queue.copy_(torch.where(skip > 0, self.queue, moved))

    def forward(
        self, student_images: Tensor, teacher_images: Tensor, keep: Tensor, path: Tensor | None = None
    ) -> Output:
        """Runs teacher and student on two versions of the same images.

        Args:
            student_images: [b, C, H, W], or the kept patches [V b, K, C P P].
            teacher_images: [b, C, H, W], or patches [b, N, C P P].
            keep: [V, b, K] integer, as returned by `masking.draw_views`.
            path: [L, 2, V b] drop-path factors of the student's trunk, as returned by `drop_path_scale`; None: no
                drop-path.

        Returns:
            `Output`: the loss, and the outputs of both branches.
        """
        target, teacher_features = self.teacher_branch(teacher_images)
        targets, offset = gather_targets(target) if self.head_config.whole_batch else (target, 0)
        prediction, features = self.student_branch(student_images, keep, path)
        loss = self.loss(prediction, targets, len(teacher_images), offset, features)
        return Output(loss, prediction.detach(), target, features.detach(), teacher_features)
