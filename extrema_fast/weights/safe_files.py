"""Files that nobody vouches for: safetensors and `torch.save` read without running anything in them.

Whatever is wrong with the bytes becomes a UsageError that names the file; memory stays in the order of the
file's own size.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError
from .foreign import name_of


def kind_of(path: Path) -> str:
    """What the first bytes say: `safetensors`, `torch`, `torchscript`, `torch-export`, `onnx` or `unknown`."""
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if head[:4] == b"PK\x03\x04":
            return _kind_of_zip(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({_line(error)})") from None
    if head[8:9] == b"{":
        return "safetensors"
    # the magic number of torch.save before its zip format is itself pickled
    if head[:1] == b"\x80":
        return "torch"
    return "onnx" if path.suffix == ".onnx" else "unknown"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "torch"
    if any(n.endswith("/constants.pkl") for n in names):
        return "torchscript"
    return "torch-export" if any(n.endswith("archive_format") for n in names) else "torch"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own; weights alone (`check_tensors`)."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or not a safetensors file ({_line(error)})") from None
    check_tensors(state, path)
    return state


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file; the tensors are not read."""
    try:
        with safe_open(path, "pt") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged or not a safetensors file ({_line(error)})") from None


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, of tensors and plain data alone (`weights_only`); tensors may be memory-mapped.

    `argparse.Namespace` is allowed: training scripts save their arguments, and it holds plain values.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _refuse_compression(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # damaged bytes fail in many ways, and torch's own text advises an unsafe load
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds code: {refused[1]}"
            if refused
            else f"damaged or not from torch.save: {type(error).__name__}"
        )
        raise UsageError(f"{path}: not a checkpoint that can be read safely ({reason})") from None


def _refuse_compression(path: Path) -> None:
    # torch stores; what is compressed could unpack to any size
    with zipfile.ZipFile(path) as z:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in z.infolist()):
            raise ValueError("compressed entries")


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Plain, dense, real floating-point tensors that are no larger than the file.

    A view can claim any shape over a few bytes; copying it would fill the memory.
    """
    for name, value in state.items():
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise UsageError(f"{path}: {name} is not a dense tensor")
        if not value.is_floating_point():
            closest = name_of(state.keys())
            raise UsageError(
                f"{path}: {name} is {value.dtype}; weights are floating-point numbers"
                + (f"; this looks like {closest}" if closest else "")
            )
        if value.device.type != "cpu":
            raise UsageError(f"{path}: {name} holds no values (device {value.device.type})")
        if value.dim() == 0:
            raise UsageError(f"{path}: {name} is a single number; weights have at least one dimension")
    claimed = sum(v.numel() * v.element_size() for v in state.values())
    # tied tensors are counted twice
    if claimed > 2 * path.stat().st_size:
        raise UsageError(
            f"{path}: its tensors claim {claimed} bytes, the file has {path.stat().st_size}; not read"
        )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + " ..."
