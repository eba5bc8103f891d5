"""AdamW groups and schedules; every schedule is a pure function of the step (method.md section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import ops
from .config import Config
from .method import ExtreMA


def learning_rate(step: int, *, peak: float, total: int, warmup: int, minimum: float = 0.0) -> float:
    """Rate of step t: linear from 0 at t = 0 to `peak` at `warmup`, then a cosine to `minimum` at `total`."""
    if step < warmup:
        return peak * step / warmup
    x = (step - warmup) / max(1, total - warmup)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(x, 1.0))) / 2


def momentum(step: int, *, base: float, total: int) -> float:
    """Teacher momentum of step t: `1 - (1 - base) (1 + cos(pi t / T)) / 2`, from `base` to 1."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2


@dataclass(frozen=True)
class Schedule:
    """The schedules of one run: `steps_per_epoch` optimizer steps per epoch, `cfg.train.epochs` epochs."""

    cfg: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.cfg.train.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return int(self.cfg.optim.warmup_epochs * self.steps_per_epoch)

    def lr(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.cfg.peak_lr,
            total=self.total_steps,
            warmup=self.warmup_steps,
            minimum=self.cfg.optim.min_lr,
        )

    def momentum(self, step: int) -> float:
        return momentum(step, base=self.cfg.optim.momentum, total=self.total_steps)


def param_groups(named: list[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW groups: decay on matrices and the patch kernel; none on vectors, class token, positions."""
    decay, plain = [], []
    for name, p in named:
        (plain if p.dim() <= 1 or name.endswith(("cls_token", "pos_embed")) else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(method: ExtreMA, cfg: Config) -> torch.optim.Optimizer:
    """AdamW over the student branch; the rate is set every step.

    The state of either implementation (`ops.adamw`) continues under the other.
    """
    o = cfg.optim
    named = method.student_parameters()
    moved = dict(method.teacher_branch.named_parameters())
    # the predictor has no teacher
    teacher = {p: moved[name] for name, p in named if name in moved}
    groups = param_groups(named, o.weight_decay)
    return ops.adamw(groups, teacher, lr=cfg.peak_lr, betas=o.betas, eps=o.eps)
