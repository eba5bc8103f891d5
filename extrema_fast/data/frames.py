"""Frames of a short video: GIF, animated PNG or WebP through Pillow, others through imageio with PyAV or FFmpeg."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, install, one_line

# what Pillow reads, where a file has more than one frame
ANIMATED = (".apng", ".gif", ".png", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# of frames, where a file does not say
_MILLISECONDS = 100.0


class Frames(NamedTuple):
    """Evenly spaced frames (PIL images, RGB), and how long each is shown."""

    images: list[Any]
    milliseconds: int


def is_video(path: str | Path) -> bool:
    """Whether a file is a video by its ending, or an image file with more than one frame."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() in VIDEOS:
        return True
    if path.suffix.lower() not in ANIMATED:
        return False
    try:
        from PIL import Image

        with Image.open(path) as im:
            return getattr(im, "n_frames", 1) > 1
    # no image: its reader says so
    except Exception:
        return False


def read_frames(path: str | Path, most: int) -> Frames:
    """At most `most` evenly spaced frames of a video; no more than twice as many are in memory.

    Raises:
        UsageError: it cannot be read, or what reads it is not installed.
    """
    path, kept, step, count, total = Path(path), [], 1, 0, 0.0
    try:
        for im, milliseconds in _frames(path):
            if count % step == 0:
                kept.append(im)
            count, total = count + 1, total + milliseconds
            if len(kept) > 2 * most:
                kept, step = kept[::2], 2 * step
    except UsageError:
        raise
    # nearly anything, for a damaged file
    except Exception as error:
        raise UsageError(f"{path}: this video cannot be read ({one_line(error)}); is it whole?") from None
    if not kept:
        raise UsageError(f"{path}: this video has no frames")
    if len(kept) > most:
        kept = [kept[round(i * (len(kept) - 1) / max(1, most - 1))] for i in range(most)]
    return Frames(kept, max(20, round(total / len(kept))))


def _frames(path: Path) -> Iterator[tuple[Any, float]]:
    """(PIL image, milliseconds) of every frame."""
    if path.suffix.lower() in ANIMATED:
        from PIL import Image, ImageSequence

        with Image.open(path) as im:
            for frame in ImageSequence.Iterator(im):
                shown = frame.convert("RGBA")
                flat = Image.new("RGB", shown.size, (255, 255, 255))
                flat.paste(shown, mask=shown.getchannel("A"))
                yield flat, float(frame.info.get("duration") or _MILLISECONDS)
        return
    from PIL import Image

    imageio = _import("imageio.v3")
    readers = {"av": "pyav", "imageio_ffmpeg": "FFMPEG"}
    plugin = next((plugin for module, plugin in readers.items() if _import(module) is not None), None)
    if imageio is None or plugin is None:
        raise UsageError(f"{path}: reading this video needs imageio and PyAV; {install('visualize')}")
    milliseconds = 1000 / (imageio.immeta(path, plugin=plugin).get("fps") or 1000 / _MILLISECONDS)
    for frame in imageio.imiter(path, plugin=plugin):
        yield Image.fromarray(frame).convert("RGB"), milliseconds


def _import(name: str) -> Any:
    """An optional module; None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None
