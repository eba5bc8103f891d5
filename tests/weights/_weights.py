"""Tiny trained methods, files of the published layouts, and `refused`, for tests of weights in and out."""

from __future__ import annotations

import os

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA

CFG = c.from_dict(
    {
        "model": {
            "img_size": [16, 16],
            "patch_size": 8,
            "width": 64,
            "depth": 2,
            "heads": 1,
            "mlp_ratio": 2.0,
        },
        "head": {"hidden": 24, "out": 12, "predictor_hidden": 20},
        "data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "mask": {"views": 1, "keep": 2},
        "train": {"seed": 3},
    },
    c.smoke(),
)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained() -> ExtreMA:
    """A method whose two networks differ from each other and from their start."""
    method = ExtreMA(CFG)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return method


def refused(call, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        call()
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text
    for word in words:
        assert word in text, text
    return text


def released(method: ExtreMA, **extra) -> dict:
    """What the release's training script saved: wrapped modules, projector as `head`, optimizer, scaler."""
    state = {}
    for old, encoder, projector in (
        ("base_encoder", method.student, method.projector),
        ("momentum_encoder", method.teacher, method.teacher_projector),
    ):
        state |= {f"module.{old}.{k}": v.clone() for k, v in encoder.state_dict().items()}
        state |= {f"module.{old}.head.{k}": v.clone() for k, v in projector.state_dict().items()}
    state |= {f"module.predictor.{k}": v.clone() for k, v in method.predictor.state_dict().items()}
    optimizer = torch.optim.AdamW(method.student_branch.parameters())
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
    } | extra


class Malicious:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
