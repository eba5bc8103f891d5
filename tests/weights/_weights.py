"""Tiny trained methods, files of the published layouts, and `refused`, for tests of weights in and out."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.models.extrema import ExtreMA

MODEL = {"img_size": [16, 16], "patch_size": 8, "width": 64, "depth": 2, "heads": 1, "mlp_ratio": 2.0}
CFG = c.from_dict(
    {
        "model": MODEL,
        "head": {"hidden": 24, "out": 12, "predictor_hidden": 20},
        "data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "mask": {"views": 1, "keep": 2},
        "train": {"seed": 3},
    },
    c.smoke(),
)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# encoders with everything that differs between architectures and options
ENCODERS = {
    "odd grid": lambda: Encoder(replace(CFG.model, img_size=(24, 56))),
    "one patch": lambda: Encoder(replace(CFG.model, img_size=(8, 8))),
    "gray": lambda: Encoder(replace(CFG.model, in_chans=1)),
    "five channels": lambda: Encoder(CFG.model, in_chans=5),
    "three pooling blocks": lambda: Encoder(replace(CFG.model, pool_depth=3)),
    "classes": lambda: Encoder(CFG.model, 5),
    "mean pool, classes": lambda: Encoder(CFG.model, 5, global_pool="avg"),
    "no final norm": lambda: Encoder(CFG.model, 5, final_norm=False),
    "fine-tuned": lambda: Encoder(CFG.model, 5, global_pool="avg", fc_norm=True, pos_embed="learned"),
}


def perturbed(module):
    """The module in eval mode, every parameter moved away from its start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def trained() -> ExtreMA:
    """A method whose two networks differ from each other and from their start."""
    return perturbed(ExtreMA(CFG))


def same(encoder, other) -> bool:
    """Whether two modules hold the same tensors under the same names."""
    a, b = encoder.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(call, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        call()
    text = str(error.value)
    assert error.value.exit_code == 2 and "\n" not in text
    for word in words:
        assert word in text, text
    return text


def released(method: ExtreMA, **extra) -> dict:
    """What the release's pretraining saved: wrapped modules, projector as `head`, optimizer, scaler."""
    state: dict[str, torch.Tensor] = {}
    for old, encoder, projector in (
        ("base_encoder", method.student, method.projector),
        ("momentum_encoder", method.teacher, method.teacher_projector),
    ):
        state |= {f"module.{old}.{k}": v.clone() for k, v in encoder.state_dict().items()}
        state |= {f"module.{old}.head.{k}": v.clone() for k, v in projector.state_dict().items()}
    state |= {f"module.predictor.{k}": v.clone() for k, v in method.predictor.state_dict().items()}
    optimizer = torch.optim.AdamW(method.student_branch.parameters()).state_dict()
    scaler = {"scale": 65536.0}
    data = {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": optimizer, "scaler": scaler}
    return data | extra


def fine_tuned(grid=(2, 2)) -> tuple[dict, Encoder]:
    """A checkpoint of the official fine-tuning, and the encoder that it stands for."""
    model = replace(CFG.model, img_size=(8 * grid[0], 8 * grid[1]))
    encoder = perturbed(Encoder(model, 5, global_pool="avg", fc_norm=True, pos_embed="learned"))
    # that code keeps the class token and never reads it
    state = {"cls_token": torch.randn(1, 1, 64)} | {k: v.clone() for k, v in encoder.state_dict().items()}
    args = argparse.Namespace(lr=1e-3, model="vit_base_patch16_224")
    return {"model": state, "optimizer": {"state": {}}, "epoch": 99, "args": args}, encoder


class Malicious:
    """A value whose unpickling makes a folder."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def foreign_vit(model) -> dict:
    """The state dict of a timm ViT of that shape, with class token and classifier; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = perturbed(Encoder(model, 5, global_pool="avg", pos_embed="learned"))
        first = torch.randn(1, 1, model.shape[0])
    state = {k: v.detach().clone() for k, v in encoder.state_dict().items()}
    return state | {"cls_token": first, "pos_embed": torch.cat([first, state["pos_embed"]], 1)}
