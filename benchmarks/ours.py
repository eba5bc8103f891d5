"""*ours*: the product's own step, through the calls its training loop makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from extrema_fast.config import Config, from_dict
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.train import train_step
from extrema_fast.training.state import build, prepare_torch, wrap
from extrema_fast.training.step import batches

from .stepper import IMAGES, Inputs, Stepper


class Ours(Stepper):
    """`extrema_fast.train.train_step` with the configuration's defaults.

    settings  dotted options on top: `{"train.compile": "loss"}`
    """

    def __init__(self, cfg: Config, device: torch.device, precision: str, **settings: Any) -> None:
        cfg = with_settings(cfg, {"train.precision": precision} | settings)
        super().__init__(cfg, device, precision)
        prepare_torch(cfg.system)
        self.run = build(cfg, World(device), range(IMAGES))  # type: ignore[arg-type]
        wrap(self.run)

    def step(self, inputs: Inputs) -> None:
        # its masks and coins are functions of seed, row and epoch; `Inputs.keep` of the others follows them
        train_step(
            self.run, *batches(self.run, [Batch(inputs.images, inputs.index, epoch=0, step=self.run.step)])
        )
        self.run.step += 1

    def loss(self) -> float:
        value = self.run.counters.read().values()["loss"]
        self.run.counters.restart()
        return float("nan") if value is None else value

    def student(self) -> dict[str, nn.Parameter]:
        return dict(self.run.method.student_parameters())

    def teacher(self) -> dict[str, Tensor]:
        return dict(self.run.method.teacher_branch.named_parameters())


def with_settings(cfg: Config, settings: dict[str, Any]) -> Config:
    """`cfg` with dotted options replaced; raises UsageError for an unknown one."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    return from_dict(nested, cfg)
