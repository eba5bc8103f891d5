"""A run in memory: what a step reads and changes, on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data.sources import ImageSource
from ..distributed import World
from ..models.extrema import ExtreMA
from .metrics import Counters
from .optim import Schedule


@dataclass
class Run:
    """One process's side of a run; method, optimizer, counters and step are what a checkpoint holds."""

    cfg: Config
    world: World
    source: ImageSource
    """training images"""
    method: ExtreMA
    student: nn.Module
    """method.student_branch, under DistributedDataParallel with more than one process"""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    counters: Counters
    teacher_weight: Tensor
    """0-d fp64 on the device: 1 - momentum of the move that ends the step"""
    gradients: Callable[[Run, list[Any]], Tensor] | None = None
    """adds a step's gradients and returns its loss, compiled; None: `step.gradients`"""
    compute: Callable[[list[Any]], None] | None = None
    """all of a step but its coins, recorded; None: `step.compute`"""
    step: int = 0
    """steps taken"""

    @property
    def last(self) -> bool:
        """True when all steps have been taken."""
        return self.step >= self.schedule.total_steps

    def epochs_end(self, epochs: int) -> bool:
        """True at the end of every `epochs` epochs; never for 0."""
        return epochs > 0 and self.step % (epochs * self.schedule.steps_per_epoch) == 0

    def saves(self) -> bool:
        """True where the configuration asks for a checkpoint or a milestone."""
        every = self.cfg.ckpt
        epochs = self.epochs_end(every.every_epochs) or self.epochs_end(every.milestone_epochs)
        return epochs or bool(every.every_steps and self.step % every.every_steps == 0)
