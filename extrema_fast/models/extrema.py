"""ExtreMA: student, EMA teacher, heads and losses; images in, loss out (arXiv 2206.04667, section 3).

Shape letters: b images of this process, V views, K kept tokens, D width, d width of the projection. Rows of views
are view-major: rows i, b + i, 2b + i share image i.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..ops.linear import Linear
from ..ops.scope import scope, scoped
from .encoder import Encoder

# ---- heads and losses -------------------------------------------------------------------------------


def mlp_head(*widths: int) -> nn.Sequential:
    """Linear layers between `widths`; LayerNorm (eps 1e-5) and GELU after all but the last.

    Sub-module numbers are those of the released checkpoints (`head.{0,1,3,4,6}`, `predictor.{0,1,3}`).
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.LayerNorm(fan_in, eps=1e-5), nn.GELU()]
        linear = Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL: the mean of |q - k|^2 = 2 - 2 cos(q, k) of L2-normalized vectors, over images and views.

    prediction [V b, d] q, view-major; target [b, d] k, without gradient -> scalar, at least fp32.
    """
    b, d = target.shape
    q = _unit(prediction).view(-1, b, d)
    return (q - _unit(target.detach())).square().sum(-1).mean()


def infonce_loss(
    prediction: Tensor, targets: Tensor, temperature: float, images: int, offset: int = 0
) -> Tensor:
    """InfoNCE: the mean of -2T log softmax_j(q . k_j / T) at the image's own target k.

    prediction [V b, d] q of b `images`, view-major; targets [M, d] of the step on all processes, without gradient,
    `offset` the row of the first of these images -> scalar, at least fp32.
    """
    q = _unit(prediction)
    # autocast would turn this matmul, the input of the softmax, into bf16
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ _unit(targets.detach()).T / temperature
    label = torch.arange(images, device=q.device) + offset
    return 2 * temperature * F.cross_entropy(logits, label.repeat(q.shape[0] // images))


def gather_targets(target: Tensor) -> tuple[Tensor, int]:
    """All-gather of [b, d] without gradient: [world b, d], and the row of this process's first image in it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return target, 0
    out = [torch.empty_like(target) for _ in range(dist.get_world_size())]
    dist.all_gather(out, target.detach().contiguous())
    return torch.cat(out), dist.get_rank() * target.shape[0]


# ---- the two networks -------------------------------------------------------------------------------


def _class_token(
    name: str, encoder: Encoder, images: Tensor, keep: Tensor | None = None, path: Tensor | None = None
) -> Tensor:
    """[V b, D] after the final norm; `name` is that of the branch in profiles."""
    with scope(f"{name}/embed"):
        tokens = encoder.embed(images, keep)
    with scope(f"{name}/trunk"):
        tokens = encoder.trunk(tokens, path)
    with scope(f"{name}/pooling"):
        return encoder.norm(encoder.pool(tokens)[0])


class StudentBranch(nn.Module):
    """Encoder, projector and predictor: everything that has a gradient (what data parallelism wraps)."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor

    def forward(self, images: Tensor, keep: Tensor, path: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W], keep [V, b, K] -> (prediction [V b, d], class token [V b, D])."""
        cls = _class_token("student", self.encoder, images, keep, path)
        with scope("student/heads"):
            return self.predictor(self.projector(cls)), cls


class TeacherBranch(nn.Module):
    """Encoder and projector, the moving average of the student's; always in eval mode, never a gradient."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TeacherBranch:
        """Stays in eval mode: drop-path is the student's alone."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W], all tokens -> (target [b, d], class token [b, D])."""
        cls = _class_token("teacher", self.encoder, images)
        with scope("teacher/heads"):
            return self.projector(cls), cls


# ---- the method -------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What a forward pass of `ExtreMA` returns; all but the loss are detached.

    Attributes:
        loss: Scalar, fp32.
        prediction: [V b, d] predictor outputs, view-major.
        target: [b, d] projections of the teacher.
        student_features: [V b, D] class tokens after the final norm.
        teacher_features: [b, D].
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    student_features: Tensor
    teacher_features: Tensor


class ExtreMA(nn.Module):
    """Student, teacher and loss on one process.

    `forward` is the arithmetic of a whole step, for small batches and tests. The training step calls
    `teacher_branch`, `student_branch` and `loss` itself, so that the teacher covers the batch before the first
    micro-batch. The initial weights depend on `cfg.train.seed` alone.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.head_config = cfg.head
        width, h = cfg.model.shape[0], cfg.head
        with torch.random.fork_rng(devices=[]):
            # the encoder first, so that `build_encoder(cfg.model, seed)` has the same weights
            torch.manual_seed(cfg.train.seed)
            encoder = Encoder(cfg.model)
            encoder.mean, encoder.std = cfg.data.mean, cfg.data.std
            projector = mlp_head(width, h.hidden, h.hidden, h.out)
            predictor = mlp_head(h.out, h.predictor_hidden, h.out)
        self.student_branch = StudentBranch(encoder, projector, predictor)
        self.teacher_branch = TeacherBranch(copy.deepcopy(encoder), copy.deepcopy(projector))

    @property
    def student(self) -> Encoder:
        """The student's encoder."""
        return self.student_branch.encoder

    @property
    def projector(self) -> nn.Module:
        """The student's projector."""
        return self.student_branch.projector

    @property
    def predictor(self) -> nn.Module:
        """The student's predictor."""
        return self.student_branch.predictor

    @property
    def teacher(self) -> Encoder:
        """The teacher's encoder."""
        return self.teacher_branch.encoder

    @property
    def teacher_projector(self) -> nn.Module:
        """The teacher's projector."""
        return self.teacher_branch.projector

    def student_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything trained."""
        return [(n, p) for n, p in self.student_branch.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def ema_update(self, weight: float | Tensor) -> None:
        """EMA update of encoder and projector, in place: `teacher += weight (student - teacher)`.

        `weight` is 1 - momentum; a 0-d tensor is read on its device, without waiting.
        """
        student = dict(self.student_branch.named_parameters())
        names, teacher = zip(*self.teacher_branch.named_parameters(), strict=True)
        first = teacher[0]
        weight = torch.as_tensor(weight, dtype=first.dtype, device=first.device)
        torch._foreach_lerp_(teacher, [student[n].detach() for n in names], [weight] * len(teacher))

    def add_shadow_weights(self, dtype: torch.dtype) -> None:
        """Gives each linear layer of student and teacher a shadow weight in `dtype`, which its matmul reads.

        Whoever changes weights syncs the shadows: `sync_shadow_weights`, or the fused AdamW + EMA pass.
        """
        for layer in self._linears(self).values():
            layer.shadow = layer.weight.detach().to(dtype)

    def shadow_pairs(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """(student weight -> its shadow, student weight -> the shadow of the teacher's weight of that name)."""
        student, teacher = self._linears(self.student_branch), self._linears(self.teacher_branch)
        return (
            {m.weight: m.shadow for m in student.values() if m.shadow is not None},
            {student[n].weight: m.shadow for n, m in teacher.items() if m.shadow is not None},
        )

    @torch.no_grad()
    def sync_shadow_weights(self) -> None:
        """Copies the weights to their shadows, where there are any."""
        pairs = [(m.shadow, m.weight) for m in self._linears(self).values() if m.shadow is not None]
        if pairs:
            shadows, weights = zip(*pairs, strict=True)
            torch._foreach_copy_(shadows, weights)

    @staticmethod
    def _linears(module: nn.Module) -> dict[str, Linear]:
        return {n: m for n, m in module.named_modules() if isinstance(m, Linear)}

    @scoped("loss")
    def loss(self, prediction: Tensor, targets: Tensor, images: int, offset: int = 0) -> Tensor:
        """The loss of a micro-batch of b `images`, the first of which has row `offset` in `targets` [M, d]."""
        if self.head_config.loss == "byol":
            return byol_loss(prediction, targets[offset : offset + images])
        return infonce_loss(prediction, targets, self.head_config.temperature, images, offset)

    def forward(
        self, student_images: Tensor, teacher_images: Tensor, keep: Tensor, path: Tensor | None = None
    ) -> Output:
        """One pass over the two versions of the same images.

        Args:
            student_images: [b, C, H, W].
            teacher_images: [b, C, H, W].
            keep: [V, b, K] integer, as of `masking.draw_views`.
            path: drop-path factors of the student trunk, [L, 2, V b], as of `drop_path_scale`; None: no drop-path.
        """
        target, teacher_features = self.teacher_branch(teacher_images)
        targets, offset = gather_targets(target) if self.head_config.loss == "infonce" else (target, 0)
        prediction, features = self.student_branch(student_images, keep, path)
        loss = self.loss(prediction, targets, student_images.shape[0], offset)
        return Output(loss, prediction.detach(), target, features.detach(), teacher_features)
