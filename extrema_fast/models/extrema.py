"""ExtreMA: student, EMA teacher and heads; images in, loss out (paper section 3; method.md sections 3, 4)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..ops.linear import Linear
from ..ops.scope import scope, scoped
from .encoder import Encoder
from .heads import mlp_head
from .losses import byol_loss, gather_targets, infonce_loss


class Output(NamedTuple):
    """What one forward pass of the method returns; all but the loss are detached."""

    loss: Tensor
    """scalar fp32"""
    prediction: Tensor
    """[V*b, d] predictor output q, view-major"""
    target: Tensor
    """[b, d] teacher's projection k"""
    student_features: Tensor
    """[V*b, D] class token after the final norm"""
    teacher_features: Tensor
    """[b, D]"""


class StudentBranch(nn.Module):
    """Encoder, projector and predictor: everything that has a gradient (what data parallelism wraps)."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor

    def forward(self, images: Tensor, keep: Tensor, path: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W], keep [V, b, K] -> (prediction [V*b, d], class token [V*b, D])."""
        with scope("student/embed"):
            tokens = self.encoder.embed(images, keep)
        with scope("student/trunk"):
            tokens = self.encoder.trunk(tokens, path)
        with scope("student/pooling"):
            cls = self.encoder.norm(self.encoder.pool(tokens)[0])
        with scope("student/heads"):
            return self.predictor(self.projector(cls)), cls


class TeacherBranch(nn.Module):
    """Encoder and projector that follow the student by moving average; never a gradient."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TeacherBranch:
        # drop-path is the student's alone
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W] (all N tokens) -> (target [b, d], class token [b, D])."""
        with scope("teacher/embed"):
            tokens = self.encoder.embed(images)
        with scope("teacher/trunk"):
            tokens = self.encoder.trunk(tokens)
        with scope("teacher/pooling"):
            cls = self.encoder.norm(self.encoder.pool(tokens)[0])
        with scope("teacher/heads"):
            return self.projector(cls), cls


class ExtreMA(nn.Module):
    """The method on one process.

    `forward` is a whole step's arithmetic for small batches and tests; the training loop calls its three
    parts (`teacher_branch`, `student_branch`, `loss`) so that the teacher covers the batch before the first
    micro-batch. The initial weights are a function of `cfg.train.seed` alone.
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
        return self.student_branch.encoder

    @property
    def projector(self) -> nn.Module:
        return self.student_branch.projector

    @property
    def predictor(self) -> nn.Module:
        return self.student_branch.predictor

    @property
    def teacher(self) -> Encoder:
        return self.teacher_branch.encoder

    @property
    def teacher_projector(self) -> nn.Module:
        return self.teacher_branch.projector

    def student_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything trained."""
        return [(n, p) for n, p in self.student_branch.named_parameters() if p.requires_grad]

    def _moved(self) -> tuple[list[Tensor], list[Tensor]]:
        """(teacher's parameters, the student's of the same names)."""
        student = dict(self.student_branch.named_parameters())
        teacher = dict(self.teacher_branch.named_parameters())
        return list(teacher.values()), [student[n].detach() for n in teacher]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """`teacher <- m teacher + (1 - m) student` over encoder and projector (method.md section 3)."""
        torch._foreach_lerp_(*self._moved(), 1 - momentum)

    @torch.no_grad()
    def move_teacher(self, weight: Tensor) -> None:
        """`teacher <- teacher + w (student - teacher)`; weight: 0-d tensor w = 1 - m, read on the device."""
        teacher, student = self._moved()
        torch._foreach_lerp_(teacher, student, [weight.to(teacher[0])] * len(teacher))

    # ---- low-precision copies of the weights ---------------------------------------------------------

    def keep_low(self, dtype: torch.dtype) -> None:
        """Gives every linear layer of student and teacher a copy of its weight in `dtype` (`linear.Linear.low`).

        Products then read the copies; whoever changes weights renews them (`refresh_low`, or AdamWEma's pass).
        """
        for layer in self._linears():
            layer.low = layer.weight.detach().to(dtype)

    def _linears(self) -> list[Linear]:
        return [m for m in self.modules() if isinstance(m, Linear)]

    def low_pairs(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """(student weight -> its copy, student weight -> the copy of the teacher's weight of that name)."""
        own = {n: m for n, m in self.student_branch.named_modules() if isinstance(m, Linear)}
        others = {n: m for n, m in self.teacher_branch.named_modules() if isinstance(m, Linear)}
        return (
            {m.weight: m.low for m in own.values() if m.low is not None},
            {own[n].weight: m.low for n, m in others.items() if m.low is not None},
        )

    @torch.no_grad()
    def refresh_low(self) -> None:
        """Renews all copies; nothing without copies."""
        kept = [m for m in self._linears() if m.low is not None]
        if kept:
            torch._foreach_copy_([m.low for m in kept], [m.weight for m in kept])

    @scoped("loss")
    def loss(self, prediction: Tensor, targets: Tensor, images: int, offset: int = 0) -> Tensor:
        """Loss of one micro-batch.

        prediction: [V*b, d], b = `images`;  targets: [M, d] of the whole step
        offset      row of the micro-batch's first image in `targets`
        """
        if self.head_config.loss == "byol":
            return byol_loss(prediction, targets[offset : offset + images])
        return infonce_loss(prediction, targets, self.head_config.temperature, images, offset)

    def forward(
        self, student_images: Tensor, teacher_images: Tensor, keep: Tensor, path: Tensor | None = None
    ) -> Output:
        """Both images [b, C, H, W]; keep [V, b, K] integer; path as of `drop_path_scale`, or None."""
        target, teacher_features = self.teacher_branch(teacher_images)
        targets, offset = gather_targets(target) if self.head_config.loss == "infonce" else (target, 0)
        prediction, features = self.student_branch(student_images, keep, path)
        loss = self.loss(prediction, targets, student_images.shape[0], offset)
        return Output(loss, prediction.detach(), target, features.detach(), teacher_features)
