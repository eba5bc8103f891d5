"""Lets timm be imported where torchvision's compiled operators do not load.

timm imports torchvision, and a torchvision built for CUDA next to a CPU build of torch fails with
`operator torchvision::nms does not exist`. Only the schemas are missing: no test runs these operators.
"""

from __future__ import annotations

import importlib.util
import sys

_library = None


def define_torchvision_operators() -> None:
    """Defines the two schemas when torchvision does not import without them; else does nothing."""
    global _library
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        import torch

        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # held in a global: the schemas go when the library object does
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
