"""ExtreMA: student, EMA teacher and heads; images in, loss out (paper section 3; method.md sections 3, 4)."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import Config
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

    def forward(
        self, images: Tensor, keep: Tensor, path_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W], keep [V, b, K] -> (prediction [V*b, d], class token [V*b, D])."""
        tokens = self.encoder.trunk(self.encoder.embed(images, keep), path_scale)
        cls = self.encoder.norm(self.encoder.pool(tokens)[0])
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
        cls = self.encoder.norm(self.encoder.pool(self.encoder.trunk(self.encoder.embed(images)))[0])
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

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """`teacher <- m teacher + (1 - m) student` over encoder and projector (method.md section 3)."""
        student = dict(self.student_branch.named_parameters())
        teacher = dict(self.teacher_branch.named_parameters())
        weight = 1 - momentum
        if isinstance(weight, Tensor):
            for name, p in teacher.items():
                p.lerp_(student[name].detach(), weight.to(p))
        else:
            torch._foreach_lerp_(list(teacher.values()), [student[n].detach() for n in teacher], weight)

    def loss(self, prediction: Tensor, targets: Tensor, images: int, offset: int = 0) -> Tensor:
        """Loss of one micro-batch.

        prediction: [V*b, d], b = `images`;  targets: [M, d] of the whole step
        offset      row of the micro-batch's first image in `targets`
        """
        if self.head_config.loss == "byol":
            return byol_loss(prediction, targets[offset : offset + images])
        return infonce_loss(prediction, targets, self.head_config.temperature, images, offset)

    def forward(
        self, student_images: Tensor, teacher_images: Tensor, keep: Tensor, path_scale: Tensor | None = None
    ) -> Output:
        """Both images [b, C, H, W]; keep [V, b, K] integer; path_scale [L, 2, V*b] or None."""
        target, teacher_features = self.teacher_branch(teacher_images)
        targets, offset = gather_targets(target) if self.head_config.loss == "infonce" else (target, 0)
        prediction, features = self.student_branch(student_images, keep, path_scale)
        loss = self.loss(prediction, targets, student_images.shape[0], offset)
        return Output(loss, prediction.detach(), target, features.detach(), teacher_features)
