"""What a provider of the training step is: built once, stepped many times, compared with the others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from extrema_fast.config import Config
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.training.optim import Schedule

# length of the imagined training set: with it every provider has the same schedules
IMAGES = 100_000


class Inputs(NamedTuple):
    """One step's data, on the device except `index`.

    images  [B, H, W, 3] uint8;  index [B] int64 on the CPU
    keep    [V, B, K] int32 and scale [L, 2, V*B] fp32: masks and drop-path factors to use instead of the
            provider's own coins, for comparisons; None while timing
    """

    images: Tensor
    index: Tensor
    keep: Tensor | None = None
    scale: Tensor | None = None


class Stepper:
    """One optimizer step after another on given images; subclasses write `step`.

    cfg        model, masks, heads, optimizer, batch size
    device     where it runs
    precision  `fp32`, `bf16` or `fp16` of the matrix products
    """

    def __init__(self, cfg: Config, device: torch.device, precision: str) -> None:
        self.cfg, self.device, self.precision = cfg, device, precision
        self.schedule = Schedule(cfg, IMAGES // cfg.train.batch_size)
        self.taken = 0
        self.last_loss: Tensor | float = float("nan")

    # ---- for subclasses --------------------------------------------------------------------------

    def step(self, inputs: Inputs) -> None:
        """One whole optimizer step: masks, both networks, loss, backward pass, optimizer, teacher."""
        raise NotImplementedError

    def student(self) -> dict[str, nn.Parameter]:
        """Trained parameters by the names of `extrema_fast.models.extrema.StudentBranch`."""
        raise NotImplementedError

    def teacher(self) -> dict[str, Tensor]:
        """The teacher's, by the same names; empty without one."""
        return {}

    def flops_per_image(self) -> float | None:
        """FLOPs of a step per image where they differ from the method's; None: `plan.flops_per_image`."""
        return None

    # ---- for everyone ----------------------------------------------------------------------------

    def loss(self) -> float:
        """The last step's loss; waits for the device."""
        return float(self.last_loss)

    def load(self, file: Path) -> None:
        """Starts student and teacher from weights under the student's names (safetensors)."""
        student, teacher = self.student(), self.teacher()
        with safe_open(file, "pt") as weights, torch.no_grad():
            for name in weights.keys():  # noqa: SIM118
                value = weights.get_tensor(name)
                if name in student:
                    student[name].copy_(value)
                if name in teacher:
                    teacher[name].copy_(value)

    def autocast(self) -> AbstractContextManager:
        """Autocast in the provider's precision; does nothing in fp32."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, self.precision != "fp32")

    def pictures(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) normalised fp32 [B, C, H, W]; the same tensor without colour jitter."""
        index = inputs.index.to(self.device)
        cfg = self.cfg
        params = jitter_params(index, cfg.data, seed=cfg.train.seed, epoch=0)
        return color_jitter(inputs.images, params, cfg.data, cfg.model.in_chans)


def decayed(named: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Two optimizer groups: decay on matrices and the patch kernel, none on vectors and the class token."""
    plain = [p for n, p in named.items() if p.dim() <= 1 or n.endswith("cls_token")]
    kept = {id(p) for p in plain}
    return [
        {"params": [p for p in named.values() if id(p) not in kept], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
