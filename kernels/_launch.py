"""What every launch needs: may Triton run here, output buffers, the device guard, tuned configurations."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Triton decides at its import whether kernels are interpreted, so later changes of the variable are ignored
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        # an import hook may refuse it
        return False


HAS_TRITON = _installed("triton")

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


# the oldest architecture that the kernels are compiled and checked for (aot.py)
OLDEST = (8, 0)


@functools.cache
def _too_old(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return (
        "" if (major, minor) >= OLDEST else f"compute capability {major}.{minor}; kernels need 8.0 or newer"
    )


def can_run(device: torch.device | str) -> tuple[bool, str]:
    """(may Triton kernels run on tensors of `device`?, the reason)."""
    if not HAS_TRITON:
        return False, "Triton is not installed"
    device = torch.device(device)
    kind, index = device.type, device.index
    if kind == "cuda":
        # traced code must not ask for a device's properties
        if index is None and not torch.compiler.is_compiling() and torch.cuda.is_available():
            index = torch.cuda.current_device()
        old = "" if index is None or torch.compiler.is_compiling() else _too_old(index)
        return not old, old or "Triton on a CUDA device"
    if kind == "cpu" and INTERPRET:
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    return False, f"no Triton kernels on {kind}"


def use_triton(x: Tensor) -> bool:
    """Whether an op's implementation launches its kernel for `x`; else it runs its plain definition."""
    return can_run(x.device)[0]


def checking() -> bool:
    """EXTREMA_FAST_CHECK=1: indices are checked (a GPU is waited for) and outputs start as NaN."""
    return os.environ.get("EXTREMA_FAST_CHECK", "0") not in ("", "0")


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output buffer, contiguous, on the device of `like`; poisoned when `checking()`."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if checking():
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
    return out


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """These numbers on a device; filled there, since a copy from the host waits and no CUDA graph holds one."""
    if torch.device(device).type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.cat([torch.full((1,), v, dtype=dtype, device=device) for v in values])


def rows_ready(x: Tensor) -> Tensor:
    """`x`, copied unless its last axis is dense, no axis is expanded and its address is a multiple of 16.

    Gradients of sums arrive with stride 0, slices with odd addresses; kernels see neither.
    """
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    dense = x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1
    return (
        x
        if dense and not expanded and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **kwargs: Any) -> None:
    """Runs `kernel[grid]` on the device of `like`; an empty grid is no launch.

    The long axis comes first in the grid: the second and third hold at most 65,535 programs.
    """
    if 0 in grid:
        return
    guard = torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        # a default that Triton is about to change
        compiled = kernel[grid](*args, enable_fp_fusion=True, **kwargs)
    if _watched is not None:
        _watched.append(compiled)


_watched: list[Any] | None = None


@contextlib.contextmanager
def watched():
    """Inside, a list of what every launch ran: Triton's compiled kernels (None in the interpreter)."""
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


# ---- configurations -------------------------------------------------------------------------------


def device_name(device: torch.device | str) -> str:
    """The name of a configuration file: `nvidia-h200`."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def config_key(direction: str, dtype: torch.dtype, **sizes: int) -> str:
    """`bwd|bf16|D768|H12|n64`: the entry of a configuration file."""
    return "|".join([direction, DTYPE_NAMES[dtype], *(f"{k}{v}" for k, v in sizes.items())])


@functools.cache
def _entries(op: str, device: str, extra: str) -> dict[str, dict]:
    folders = [Path(__file__).parent / op / "configs", *([Path(extra) / op] if extra else [])]
    found: dict[str, dict] = {}
    for folder in folders:
        file = folder / f"{device}.json"
        if file.is_file():
            found |= read_entries(file)
    return found


def read_entries(file: Path) -> dict[str, dict]:
    """The entries of a configuration file; ValueError naming the file when it is none."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return {key: {**entry, "config": dict(entry["config"])} for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: no file of launch settings ({type(error).__name__}: {error}); delete it, or write it "
            "again with `extrema-fast tune`"
        ) from None


def tuned(op: str, key: str, device: torch.device) -> dict[str, int]:
    """Blocks, warps and stages measured for this GPU (`kernels/OP/configs/DEVICE.json`), or nothing.

    EXTREMA_FAST_CONFIG_DIR names one more folder (OP/DEVICE.json), whose entries win.
    """
    if device.type != "cuda":
        return {}
    return entries(op, device_name(device)).get(key, {}).get("config", {})


def entries(op: str, device: str) -> dict[str, dict]:
    """Measured entries of an op for the GPU called `device`, those of EXTREMA_FAST_CONFIG_DIR among them."""
    return _entries(op, device, os.environ.get("EXTREMA_FAST_CONFIG_DIR", ""))


_override: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def forced(op: str, config: dict[str, int]):
    """Inside, every launch of `op` takes these settings: what tuning and its tests try out."""
    before = _override.get(op)
    _override[op] = config
    try:
        yield
    finally:
        if before is None:
            del _override[op]
        else:
            _override[op] = before


def settings(
    op: str, key: str, device: torch.device, heuristic: Callable[[], dict[str, int]]
) -> dict[str, int]:
    """Launch settings of one shape: the heuristic's, overridden by the tuned entry, by `forced`."""
    return heuristic() | tuned(op, key, device) | _override.get(op, {})
