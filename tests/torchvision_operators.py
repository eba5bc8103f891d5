"""Lets timm be imported where torchvision's compiled operators do not load.

timm imports torchvision, and a torchvision built for CUDA next to a CPU build of torch fails with
`operator torchvision::nms does not exist`. Only the names of two operators are missing, and timm's transformers call
neither: defined, they raise torchvision's own error when they are called. `make` puts this file into an environment for
which it finds no torchvision that fits, with a .pth file that calls the function below. Nothing is imported before
torchvision is.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_libraries: list[Any] = []


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing: it sees that torchvision has tried its operators, and is about to need their names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in ("torchvision._autograd_registrations", "torchvision._meta_registrations"):
            import torch

            missing = [n for n in ("nms", "qnms") if not hasattr(torch.ops.torchvision, n)]
            # held: the names go when the library object does
            _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            for operator in missing:
                _libraries[-1].define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


def define_torchvision_operators() -> None:
    """Defines the names of operators that are missing, when torchvision is imported from now on."""
    if not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
