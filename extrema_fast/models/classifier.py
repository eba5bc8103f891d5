"""The classifier of a fine-tuning: the encoder with a linear head, and optionally a moving average of both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FinetuneConfig
from .encoder import Encoder
from .extrema import Branch, StudentTeacher


class ClassifierBranch(Branch):
    """Images in, logits out; the whole encoder is trained, including its position table."""

    name = "classifier"

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, nn.Identity())

    def forward(self, images: Tensor, path: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """images [b, C, H, W], path [L, 2, b] or None -> [b, classes]."""
        return super().forward(images, None, path)[0]

    def after_trunk(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [b, N, D] -> (logits, the same)."""
        encoder = self.encoder
        if encoder.global_pool == "token":
            tokens = encoder.pool(tokens)[0][:, None]
        logits = encoder.forward_head(encoder.norm(tokens))
        return logits, logits


class Average(ClassifierBranch):
    """Moving average of a `ClassifierBranch`; always in eval mode, never with a gradient."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Average:
        """Stays in eval mode."""
        return super().train(False)


class Classifier(StudentTeacher):
    """The network that fine-tuning trains, and its average (`tune.ema`); initialized from `train.seed` alone."""

    def __init__(self, cfg: FinetuneConfig, classes: Sequence[str]) -> None:
        super().__init__()
        pool = {"mean": "avg", "class": "token"}[cfg.tune.pool]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.train.seed)
            encoder = Encoder(
                cfg.model, len(classes), global_pool=pool, fc_norm=pool == "avg", pos_embed="learned"
            )
        encoder.mean, encoder.std, encoder.classes = cfg.data.mean, cfg.data.std, list(classes)
        self.student_branch = ClassifierBranch(encoder)
        self.teacher_branch = None
        if cfg.tune.ema:
            self.teacher_branch = Average(copy.deepcopy(encoder))

    def follow(self) -> None:
        """Starts the average at the current weights."""
        if self.teacher_branch is not None:
            self.teacher_branch.load_state_dict(self.student_branch.state_dict())

    def compile_regions(self, **options: Any) -> None:
        """Compiles the trained branch (`Branch.compile_regions`)."""
        self.student_branch.compile_regions(**options)


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter for layer-wise learning rates, as timm numbers it for this encoder.

    0: patch embedding and positions; i + 1: block i; `depth`: also pooling and final norm, which read the last block's
    tokens; `depth` + 1: the norm after pooling, and the classifier.
    """
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth if name.startswith(("cls_token", "blocks_token.", "norm.")) else depth + 1
