"""A user's own checkout of microsoft/ExtreMA, imported and stepped: `python -m benchmarks step --released-code DIR`.

Changed only so that it runs in one process on current versions: the module `torch._six` and the name `np.float` are
put back, on a CPU the masks are drawn on the images' device, and masks and drop-path factors can be given. The loop
around the model (main.py reads its command line when imported) is written here as the release has it.
"""

from __future__ import annotations

import importlib.util
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

from .baselines import Inputs, Stepper
from .processes import import_torchvision

FILES = ("vits.py", "lib/builder.py", "lib/misc.py")
# width -> its function; ViT/16 with 196 patches is hard-coded there
SIZES = {384: "vit_small", 768: "vit_base", 1024: "vit_large"}


def check(path: Path, cfg: Config) -> None:
    """Raises UsageError where the checkout cannot be stepped, before anything is built."""
    for file in FILES:
        if not (path / file).is_file():
            raise UsageError(
                f"--released-code {path}: {file} is not there; give the folder of a checkout of "
                "https://github.com/microsoft/ExtreMA"
            )
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"--released-code {path}: it imports timm, which is not installed; pip install timm")
    if cfg.model.shape[0] not in SIZES or cfg.model.num_patches != 196 or cfg.mask.mode != "disjoint":
        raise UsageError(
            f"--released-code: its models are ViT-S, B and L/16 at 224, got {cfg.model.size}; use --model small"
        )


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Inside, `import lib` and `import vits` find the checkout, and what torch and numpy dropped is there."""
    six = types.ModuleType("torch._six")
    six.inf = math.inf  # type: ignore[attr-defined]
    added = [name for name in ("torch._six",) if name not in sys.modules]
    sys.modules.setdefault("torch._six", six)
    without_float = "float" not in vars(np)
    if without_float:
        np.float = float  # type: ignore[attr-defined]
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in added:
            del sys.modules[name]
        if without_float:
            del np.float  # type: ignore[attr-defined]


class ReleasedCode(Stepper):
    """The model and loss scaler of the checkout at `path`."""

    def __init__(self, cfg: Config, device: torch.device, precision: str, path: str) -> None:
        super().__init__(cfg, device, precision)
        import_torchvision()
        with importable(Path(path).resolve()):
            try:
                import lib.builder
                import lib.misc
                import vits
            except Exception as error:
                raise UsageError(
                    f"--released-code {path}: it does not import ({type(error).__name__}: {error}); see the "
                    "requirements of its README"
                ) from error
            model, h = cfg.model, cfg.head
            encoder = partial(
                getattr(vits, SIZES[model.shape[0]]),
                init_values=model.layer_scale,
                class_attention_layers=model.pool_depth,
            )
            student = partial(encoder, drop_path_rate=model.drop_path)
            # temperature 1.0 is that of its InfoNCE, not used here; True: disjoint views
            self.net = lib.builder.ExtreMA(
                student, encoder, h.out, h.hidden, 1.0, cfg.mask.ratio, cfg.mask.views, True
            ).to(device)
            with warnings.catch_warnings():
                # its scaler warns where there is no GPU
                warnings.simplefilter("ignore")
                self.scaler = lib.misc.NativeScalerWithGradNormCount()
        self.net.train()
        self.draw_masks = self.net.generate_mask
        self.paths = [_DropPath(block) for block in self.net.base_encoder.blocks]
        self.optimizer = self.adamw()
        self.scaler._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def _named(self, branch: nn.Module) -> dict[str, Any]:
        return {
            f"projector.{n[5:]}" if n.startswith("head.") else f"encoder.{n}": p
            for n, p in branch.named_parameters()
        }

    def student(self) -> dict[str, nn.Parameter]:
        named = {n: p for n, p in self._named(self.net.base_encoder).items() if p.requires_grad}
        return named | {f"predictor.{n}": p for n, p in self.net.predictor.named_parameters()}

    def teacher(self) -> dict[str, Tensor]:
        return {
            n: p for n, p in self._named(self.net.momentum_encoder).items() if not n.endswith("pos_embed")
        }

    def masks(self, given: Tensor | None, x: Tensor, count: int, ratio: float = 0.0) -> list[Tensor] | None:
        """In place of its `generate_mask`: the given masks, or its own."""
        if given is not None and ratio > 0:
            return list(given.long())
        return self.draw_masks(_OnDevice(x), count, ratio)

    def step(self, inputs: Inputs) -> None:
        x, y = self.views(inputs)
        self.net.generate_mask = partial(self.masks, inputs.keep)
        for i, path in enumerate(self.paths):
            path.factors = [] if inputs.scale is None else list(inputs.scale[i])
        with self.autocast():
            loss = self.net([x, y], self.schedule.momentum(self.taken), "byol")
        self.last_loss = loss.item()
        self.optimizer.zero_grad()
        self.set_rate()
        self.scaler(loss, self.optimizer, parameters=self.net.parameters(), clip_grad=None)


class _DropPath(nn.Module):
    """Takes the place of a block's drop-path: given factors for its two branches, or its own random ones."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.own, self.factors = block.drop_path, list[Tensor]()
        block.drop_path = self

    def forward(self, branch: Tensor) -> Tensor:
        if not self.factors:
            return self.own(branch)
        return branch * self.factors.pop(0).to(branch.dtype)[:, None, None]


class _OnDevice:
    """An image batch whose `get_device()` also works on a CPU, where torch's answers -1."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def size(self, *dim: int) -> Any:
        return self.x.size(*dim)

    def get_device(self) -> torch.device:
        return self.x.device
