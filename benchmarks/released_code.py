"""*released-code*: a user's own checkout of microsoft/ExtreMA, imported and stepped.

    python -m benchmarks step --released-code PATH

Changed only so that it runs on current versions, in one process: the module `torch._six` and the name `np.float`
are put back, and on a CPU the masks are drawn on the images' device (there `get_device()` is -1). The loop around
the model (main.py reads its command line when imported) is written here as the release has it.
"""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extrema_fast.config import Config
from extrema_fast.errors import UsageError

from .stepper import Inputs, Stepper, decayed
from .with_timm import mend_torchvision

# PatchEmbed 16, 196 patches: hard-coded there
SIZES = {384: "vit_small", 768: "vit_base", 1024: "vit_large"}


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Inside, `import lib` and `import vits` find the checkout, and what torch and numpy dropped is back."""
    six = types.ModuleType("torch._six")
    six.inf = math.inf  # type: ignore[attr-defined]
    put_back = "torch._six" not in sys.modules
    if put_back:
        sys.modules["torch._six"] = six
    old = "float" in vars(np)
    if not old:
        np.float = float  # type: ignore[attr-defined]
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        if put_back:
            del sys.modules["torch._six"]
        if not old:
            del np.float  # type: ignore[attr-defined]


def load_modules(path: Path) -> tuple[Any, Any, Any]:
    """(lib.builder, lib.misc, vits) of the checkout; raises UsageError saying what is missing."""
    for file in ("vits.py", "lib/builder.py", "lib/misc.py"):
        if not (path / file).is_file():
            raise UsageError(
                f"--released-code {path}: {file} is not there; give the folder of a checkout of "
                "https://github.com/microsoft/ExtreMA"
            )
    mend_torchvision()
    with importable(path.resolve()):
        try:
            import lib.builder
            import lib.misc
            import vits
        except Exception as error:
            fix = "; pip install timm" if "timm" in str(error) else ""
            raise UsageError(
                f"--released-code {path}: the checkout does not import ({type(error).__name__}: {error}){fix}"
            ) from error
        return lib.builder, lib.misc, vits


class ReleasedCode(Stepper):
    """The model and loss scaler of the checkout at `path`."""

    def __init__(self, cfg: Config, device: torch.device, precision: str, path: str = "") -> None:
        super().__init__(cfg, device, precision)
        builder, misc, vits = load_modules(Path(path))
        width, _, _ = cfg.model.shape
        if width not in SIZES or cfg.model.num_patches != 196 or cfg.mask.mode != "disjoint":
            raise UsageError(
                "--released-code: the released code has ViT-S/B/L/16 at 224 and disjoint views only"
            )
        model = partial(
            getattr(vits, SIZES[width]),
            init_values=cfg.model.layer_scale,
            class_attention_layers=cfg.model.pool_depth,
        )
        h = cfg.head
        with importable(Path(path).resolve()):
            self.net = builder.ExtreMA(
                partial(model, drop_path_rate=cfg.model.drop_path), model, h.out, h.hidden, 1.0,
                cfg.mask.ratio, cfg.mask.views, True,
            ).to(device)  # fmt: skip
        self.net.train()
        if device.type == "cpu":
            own = self.net.generate_mask
            self.net.generate_mask = lambda x, *rest: own(_OnCpu(x), *rest)
        self.optimizer = torch.optim.AdamW(
            decayed(self.student(), cfg.optim.weight_decay), lr=1.0, betas=cfg.optim.betas, eps=cfg.optim.eps
        )
        with warnings.catch_warnings():
            # on a CPU, or with fp32, its scaler switches itself off and says so
            warnings.simplefilter("ignore")
            self.scaler = misc.NativeScalerWithGradNormCount()
        self.scaler._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def _named(self, prefix: str) -> dict[str, Tensor]:
        found = {}
        for name, p in getattr(self.net, prefix).named_parameters():
            head = name.startswith("head.")
            found[f"projector.{name[5:]}" if head else f"encoder.{name}"] = p
        return found

    def student(self) -> dict[str, nn.Parameter]:
        named = {n: p for n, p in self._named("base_encoder").items() if p.requires_grad}
        return named | {f"predictor.{n}": p for n, p in self.net.predictor.named_parameters()}

    def teacher(self) -> dict[str, Tensor]:
        return {n: p for n, p in self._named("momentum_encoder").items() if not n.endswith("pos_embed")}

    def step(self, inputs: Inputs) -> None:
        x, y = self.pictures(inputs)
        if inputs.keep is not None:
            self._check_given(inputs)
        draw = self.net.generate_mask
        if inputs.keep is not None:
            views = list(inputs.keep.long())
            self.net.generate_mask = lambda x, count, ratio=0.0: views if ratio > 0 else None
        try:
            with self.autocast():
                loss = self.net([x, y], self.schedule.momentum(self.taken), "byol")
        finally:
            self.net.generate_mask = draw
        self.last_loss = loss.item()
        self.optimizer.zero_grad()
        for g in self.optimizer.param_groups:
            g["lr"] = self.schedule.lr(self.taken)
        self.grad_norm = self.scaler(loss, self.optimizer, parameters=self.net.parameters(), clip_grad=None)
        self.taken += 1

    def _check_given(self, inputs: Inputs) -> None:
        if inputs.scale is not None and not bool((inputs.scale == 1).all()):
            raise ValueError("the released code draws its own drop-path coins: compare it without drop-path")


class _OnCpu:
    """An image batch whose `get_device()` names the CPU instead of -1."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def size(self, *dim: int) -> Any:
        return self.x.size(*dim)

    def get_device(self) -> torch.device:
        return self.x.device
