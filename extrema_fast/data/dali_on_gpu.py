"""Checks what DALI decodes correctly on this GPU, before a run relies on it."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import DataConfig
from ..files import fits, write_file
from ..kernels import _cache
from .decode import AHEAD, PACKAGES, DaliDecoder, PilDecoder, Settings, Work, reason_of, version
from .image_files import ImageFiles, sampled_sizes
from .sources import open_source

_WAYS = ("regions", "whole images")
# seconds until a process that tries them counts as hanging
_TRY_S = 180.0
# share of the GPU's memory for images that are being decoded
_MEMORY = 0.2
# begins the line that it prints, for libraries may print, too
_SIGN = "decoding: "


class OnGpu(NamedTuple):
    """How DALI decodes on a GPU."""

    # the fastest of the ways that are right: `regions` of images alone (as in `Settings`), `whole images`, or none
    way: str
    # why those before it, or all, are out
    reason: str = ""


@functools.cache
def decoding_on(device: torch.device, hw: float) -> OnGpu:
    """What DALI decodes right on a GPU, found with a batch of small JPEG files of every kind and kept in the cache.

    In a process of its own: nvImageCodec 0.9.0 was seen to end one by SIGSEGV when it decodes regions on an H100 (its
    issue 55), and a DALI of another CUDA than the driver's fails as it likes.
    """
    key = None
    if torch.cuda.is_available():
        versions = {name: version(*names) for name, names in PACKAGES.items()}
        index = torch.cuda.current_device() if device.index is None else device.index
        key = {"op": "decoding", **_cache.environment(f"cuda:{index}"), **versions, "hw": hw}
        found = _cache.find(key)
        if found and fits(found, {"way": str, "reason": str}) and found["way"] in _WAYS:
            return OnGpu(**found)
    reasons = []
    for skip in range(len(_WAYS)):
        way, reason, crashed = _try_apart(device, hw, skip)
        reasons += [reason] if reason else []
        if way or not crashed:
            break
    result = OnGpu(way, "; ".join(reasons))
    if key and way:
        with suppress(OSError):
            write_file(_cache.file(key), _cache.text(key, result._asdict()))
    return result


def most_images(files: ImageFiles, device: torch.device, area: float) -> int:
    """How many images a batch may have whose decoding, with those ahead of it, takes a fifth of the GPU's memory.

    Args:
        area: share of an image that is decoded, on average.
    """
    sizes = sampled_sizes(files).astype(np.int64)
    a_batch_each = 3 * area * sizes.prod(1).mean() * (AHEAD + 2)
    return int(_MEMORY * torch.cuda.get_device_properties(device).total_memory / a_batch_each)


def release_memory() -> None:
    """Gives back what DALI keeps on the GPU for later batches."""
    importlib.import_module("nvidia.dali.backend").ReleaseUnusedMemory()


def _try_apart(device: torch.device, hw: float, skip: int) -> tuple[str, str, bool]:
    """`try_ways` in another process: (way, reason, whether that process died)."""
    code = f"from {__name__} import try_ways; try_ways({str(device)!r}, {hw}, {skip})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRY_S,
        )
    except subprocess.TimeoutExpired:
        return "", f"{_WAYS[skip]}: it hangs", True
    lines = [line[len(_SIGN) :] for line in done.stdout.splitlines() if line.startswith(_SIGN)]
    if not lines:
        how = f"signal {-done.returncode}" if done.returncode < 0 else " ".join(done.stderr.split())[-300:]
        return "", f"{_WAYS[skip]}: ended by {how}", True
    way, _, reason = lines[0].partition("|")
    return way, reason, False


def try_ways(device: str, hw: float, skip: int = 0) -> None:
    """Prints the first way, after so many skipped ones, whose images are Pillow's, and why others are out."""
    found, reasons = "", dict[str, str]()
    for way in _WAYS[skip:]:
        try:
            wrong = _wrong(torch.device(device), hw, way == _WAYS[0])
        except Exception as error:
            wrong = reason_of(error)
        if not wrong:
            found = way
            break
        reasons.setdefault(wrong, way)
    # of a GPU that does not work at all the ways do not matter
    told = [f"{way}: {wrong}" if found or len(reasons) > 1 else wrong for wrong, way in reasons.items()]
    print(f"{_SIGN}{found}|{'; '.join(told)}", flush=True)


def write_jpegs(folder: str, count: int) -> None:
    """Writes JPEG files of odd sizes: chroma of every kind, gray, some progressive."""
    from PIL import Image

    for i in range(count):
        y, x = np.mgrid[0 : 200 + 7 * (i % 32), 0 : 231 + 5 * (i % 32)] / 29
        pixels = (127 + 100 * np.stack([np.sin(y + i), np.sin(x), np.sin(x + y)], -1)).astype(np.uint8)
        image = Image.fromarray(pixels).convert("L" if i % 4 == 3 else "RGB")
        options: dict[str, Any] = {"subsampling": i % 4} if i % 4 < 3 else {}
        image.save(Path(folder, f"{i:03d}.jpg"), quality=90, progressive=i % 8 > 4, **options)


def _wrong(device: torch.device, hw: float, regions: bool) -> str:
    """What is wrong with crops that DALI decodes of JPEG files of every kind; empty: nothing."""
    # more than nvImageCodec decodes image by image
    count, places = 32, np.arange(32)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, count)
        files = ImageFiles(open_source(folder), DataConfig())
        try:
            sizes = files.read_headers(places, with_bytes=False).sizes
            boxes = np.concatenate([sizes // 7, sizes - sizes // 5], 1).astype(np.float64)
            work = Work(places, boxes, places % 2 == 1, None, 0)
            settings = Settings((64, 64), count, 4, False, device, hw, False, regions=regions)
            got = DaliDecoder(files, settings)._decode(work).cpu()
            pil = PilDecoder(files, settings._replace(device=torch.device("cpu")))
            want = pil.decode(work).images
            pil.close()
        finally:
            files.close()
    gap = (got.int() - want.int()).abs().float().mean((1, 2, 3)).max()
    return f"images differ from Pillow's by {gap:.0f} gray levels" if gap > 8 else ""
