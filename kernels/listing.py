"""What there is: every op, its version, and whether its kernel can run on a device."""

from __future__ import annotations

import torch

from . import _launch
from ._spec import specs


def _runs(device: str) -> tuple[bool, str]:
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return False, "this PyTorch sees no CUDA device"
    return _launch.can_run(device)


def headline(device: str) -> str:
    """One line: can kernels run there, and why."""
    runs, why = _runs(device)
    version = ""
    if _launch.HAS_TRITON:
        import triton

        version = f"Triton {triton.__version__}; "
    return f"{version}kernels {'run' if runs else 'do not run'} on {device}: {why}"


def describe(device: str) -> list[dict]:
    """One row per op: `op`, `version`, `summary`, `torch_ops`, `public`, `runs`, `reason`, `tuned` entries."""
    runs, why = _runs(device)
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    name = _launch.device_name(device) if on_gpu else ""
    return [
        {
            "op": s.name,
            "version": s.version,
            "summary": s.summary,
            "torch_ops": [f"extrema_fast::{op}" for op in s.torch_ops],
            "public": list(s.public),
            "runs": runs,
            "reason": why,
            "tuned": len(_launch.entries(s.name, name)) if name else 0,
        }
        for s in specs()
    ]
