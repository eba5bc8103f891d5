"""Decoded images kept in memory, so that a run decodes each only once: `data.resident`.

All images are stored at their original size, one after the other, in one byte buffer on the GPU (RGB only) or in CPU
memory. Rows, crops and flips are planned as for the decoding loaders. `kernels/crop_resize` crops and resizes on a
GPU, and on a CPU if images are only enlarged; otherwise Pillow does. Pixels are decoded by Pillow. Crops equal those of
the PIL loader: byte for byte on a CPU; within one gray level on a GPU if Pillow resizes the height first (from version
13 on).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..kernels.crop_resize import COLUMNS
from ..ops import dispatch as ops
from ..progress import ImageProgress
from .decode import AHEAD, Decoded, Settings, Work, take_ahead, useful_threads
from .image_files import ImageFiles, sampled_sizes
from .image_source import ImageSource

log = logging.getLogger(__name__)

Place = Literal["gpu", "host", "off"]

# share of the free memory that `auto` fills, and that a place asked for by name may need
_AUTO_SHARE, _SHARE = 0.3, 0.9
# images whose headers tell the size of all
_PROBED = 256
# decoded at a time on the way to a GPU
_STAGE_BYTES = 64 << 20
_ROWS_AT_A_TIME = 4096


class Held(NamedTuple):
    """Decoded images; a row that could not be decoded has no place."""

    # [bytes] uint8
    pixels: Tensor
    # [n] int64 byte where a row's image begins; rows of one file share it
    starts: np.ndarray
    # [n, 2] int32 height and width
    sizes: np.ndarray
    channels: int

    def image(self, row: int) -> np.ndarray:
        """[H, W, C] uint8 view of a row's image, which must be in the CPU's memory."""
        height, width = self.sizes[row].tolist()
        start = int(self.starts[row])
        shape = height, width, self.channels
        return self.pixels[start : start + self.channels * height * width].numpy().reshape(shape)


# ---- where ----------------------------------------------------------------------------------------


def choose_place(
    setting: str, files: ImageFiles, device: torch.device, *, reads: float, local: int = 1
) -> Place:
    """Where a run holds its images, by `data.resident`; says in one line what that takes.

    `auto` holds what fits into 30 % of the free memory, the GPU's first, and is read more than once; on a CPU nothing,
    since a step there takes many times as long as decoding, and DALI's bytes are others.

    Args:
        device: of the step.
        reads: how often each image will be read.
        local: processes of this machine; each holds all images.

    Raises:
        UsageError: a place asked for by name that is not there, or too small.
    """
    if setting == "off" or (setting == "auto" and (reads < 2 or device.type != "cuda")):
        return "off"
    if setting == "gpu" and device.type != "cuda":
        raise UsageError(f"data.resident: gpu needs a CUDA device, this run is on {device.type}; use host")
    if setting == "gpu" and files.read_channels != 3:
        raise UsageError(
            f"data.resident: gpu holds RGB images, {files.source.name} has {files.read_channels} channels; use host"
        )
    free: dict[Place, int] = {"host": free_on_host() // local}
    if device.type == "cuda" and files.read_channels == 3:
        free = {"gpu": torch.cuda.mem_get_info(device)[0], **free}
    wanted = estimate_bytes(files)
    share = _AUTO_SHARE if setting == "auto" else _SHARE
    places = [p for p in free if setting in ("auto", p) and wanted <= share * free[p]]
    what = f"{len(files.source)} images, about {wanted / 1e9:.3g} GB decoded"
    if places:
        log.info("%s: %s, held in the memory of the %s", files.source.name, what, _OF[places[0]])
        return places[0]
    room = ", ".join(f"{free[p] / 1e9:.3g} GB of the {_OF[p]}" for p in free if setting in ("auto", p))
    if setting != "auto":
        side = _fitting_side(files, share * free["gpu" if setting == "gpu" else "host"] / wanted)
        raise UsageError(
            f"data.resident: {setting}: {what}, are more than {_SHARE:.0%} of the free memory ({room}); use "
            f"{'host or off' if setting == 'gpu' else 'off'}, or hold smaller images: extrema-fast pack "
            f"{files.source.name} packed --size {side}"
        )
    log.info(
        "%s: %s, not held: more than %.0f %% of the free memory (%s)",
        files.source.name,
        what,
        100 * share,
        room,
    )
    return "off"


_OF = {"gpu": "GPU", "host": "CPU"}


def estimate_bytes(files: ImageFiles) -> int:
    """Bytes of all images decoded, from known sizes or from the headers of up to 256 of them."""
    own = np.flatnonzero(_first_rows(files.source) == np.arange(len(files.source)))
    if not files.sizes[own].all():
        own_probed = own[np.unique(np.linspace(0, len(own) - 1, _PROBED).astype(int))]
        files.read_headers(own_probed, with_bytes=False)
        known = files.sizes[own_probed]
        known = known[known.all(1)]
    else:
        known = files.sizes[own]
    return (
        0 if not len(known) else int(files.read_channels * known.astype(np.int64).prod(1).mean() * len(own))
    )


def _fitting_side(files: ImageFiles, room: float) -> int:
    """The short side in pixels with which images take this share of their memory."""
    sizes = np.sort(sampled_sizes(files).astype(float), axis=1)
    side = math.sqrt(room * sizes.prod(1).mean() / (sizes[:, 1] / sizes[:, 0]).mean())
    return max(1, int(side) // 16 * 16 or int(side))


def free_on_host() -> int:
    """Bytes of the CPU's memory that this process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    # a container's limit (cgroup 2, then 1)
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, left))
    return free


# ---- filling --------------------------------------------------------------------------------------


def hold(
    files: ImageFiles, left_out: np.ndarray, device: torch.device, threads: int
) -> tuple[Held, dict[int, DataError]]:
    """Decodes all images once into memory of `device`.

    Args:
        left_out: [n] bool rows that are known to be unusable.
        threads: that decode.

    Returns:
        The images, and row -> why it cannot be decoded.
    """
    began, source, channels = time.perf_counter(), files.source, files.read_channels
    first = _first_rows(source)
    todo = np.flatnonzero((first == np.arange(len(source))) & ~left_out)
    failed: dict[int, DataError] = {}
    with ImageProgress(f"headers of {source.name}", len(todo)) as bar:
        for at in range(0, len(todo), _ROWS_AT_A_TIME):
            rows = todo[at : at + _ROWS_AT_A_TIME]
            failed |= {
                int(rows[place]): e for place, e in files.read_headers(rows, with_bytes=False).failed.items()
            }
            bar.advance(len(rows))
    files.close()
    todo = todo[~np.isin(todo, list(failed))]
    threads = useful_threads(threads, files.sizes[todo])
    lengths = channels * files.sizes[todo].astype(np.int64).prod(1)
    ends = np.cumsum(lengths)
    starts = np.zeros(len(source), np.int64)
    starts[todo] = ends - lengths
    pixels = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8, device=device)
    held = Held(pixels, starts[first], files.sizes[first], channels)

    def decode(part: tuple[np.ndarray, np.ndarray, int]) -> None:
        rows, into, begin = part
        for row in rows.tolist():
            try:
                image = np.asarray(
                    files.image(row, np.frombuffer(files.read(row), np.uint8) if files.as_bytes else None)
                )
                into[starts[row] - begin :][: image.size] = image.ravel()
            except DataError as e:
                failed[row] = e
            bar.advance(1)

    # a GPU gets pieces, decoded into page-locked memory
    staged = pixels.device.type != "cpu"
    limits = np.arange(_STAGE_BYTES, len(pixels), _STAGE_BYTES) if staged else np.empty(0, np.int64)
    pieces = np.searchsorted(ends, limits, "right")
    edges = np.unique([0, *pieces, len(todo)])
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="hold") as pool,
        ImageProgress(f"decoding {source.name}", len(todo)) as bar,
    ):
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            rows, begin, end = todo[low:high], int(ends[low] - lengths[low]), int(ends[high - 1])
            target = (
                torch.empty(end - begin, dtype=torch.uint8, pin_memory=True) if staged else pixels[begin:end]
            )
            list(pool.map(decode, [(rows[i::threads], target.numpy(), begin) for i in range(threads)]))
            if staged:
                pixels[begin:end].copy_(target)
    if len(first) > len(todo):
        failed = {row: failed[f] for row, f in enumerate(first.tolist()) if f in failed}
    log.info(
        "%s: %d images decoded in %.1f s: %.3g GB",
        source.name,
        len(todo) - sum(int(row) in failed for row in todo),
        time.perf_counter() - began,
        len(pixels) / 1e9,
    )
    return held, failed


def _first_rows(source: ImageSource) -> np.ndarray:
    """[n] int64: for each row the first one with the same image; in a mixture a file may come several times."""
    if len(set(source.paths)) == len(source):
        return np.arange(len(source))
    offsets = [0] * len(source) if source.spans is None else source.spans[:, 0].tolist()
    seen: dict[tuple[str, int], int] = {}
    return np.array(
        [seen.setdefault(key, row) for row, key in enumerate(zip(source.paths, offsets, strict=True))]
    )


# ---- crops on a GPU -------------------------------------------------------------------------------


class HeldDecoder:
    """Cuts crops out of held RGB images and resizes them on the device of the step, without decoding.

    For a GPU, images held by the CPU are cut there, in a thread, and only the regions are copied. On a CPU the thread
    does all of it.
    """

    def __init__(self, held: Held, settings: Settings) -> None:
        self.held, self.settings = held, settings
        self._near = held.pixels.device.type == settings.device.type
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cut")

    def stream(self, plans: Iterator[Future[Work]]) -> Iterator[tuple[Work, Decoded]]:
        """Crops of the batches in order; only enqueues work on a GPU."""
        ahead = self._cut if self.settings.device.type == "cuda" else self.decode
        started = (
            (plan.result(), self._pool.submit(ahead, plan.result())) for plan in take_ahead(plans, AHEAD)
        )
        for work, done in take_ahead(started, AHEAD):
            made = done.result()
            yield work, made if isinstance(made, Decoded) else self._resize(*made)

    def decode(self, work: Work) -> Decoded:
        """Crops of one batch."""
        return self._resize(*self._cut(work))

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _cut(self, work: Work) -> tuple[Tensor, Tensor]:
        """(pixels, crops) as `crop_resize` takes them, in the CPU's memory unless the pixels are on the device."""
        held, boxes = self.held, work.boxes
        sizes, starts = held.sizes[work.rows].astype(np.int64), held.starts[work.rows]
        if self.settings.whole:
            # the filter may read outside the box
            top, left, regions = 0, 0, sizes
            box = np.concatenate([boxes[:, :2], np.minimum(boxes[:, 2:], sizes)], 1)
        else:
            top, left = boxes[:, :2].astype(np.int64).T
            regions = (boxes[:, 2:] - boxes[:, :2]).astype(np.int64)
            box = np.concatenate([np.zeros_like(regions), regions], 1)
        pitch = 3 * sizes[:, 1]
        starts = starts + top * pitch + 3 * left
        pixels = held.pixels
        if not self._near:
            lines, lengths = pixels.numpy(), 3 * regions.prod(1)
            ends = np.cumsum(lengths)
            pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self.settings.pinned)
            into = pixels.numpy()
            for (height, width), start, step, end in zip(
                regions.tolist(), starts.tolist(), pitch.tolist(), ends.tolist(), strict=True
            ):
                region = np.lib.stride_tricks.as_strided(lines[start:], (height, 3 * width), (step, 1))
                into[end - 3 * height * width : end].reshape(height, 3 * width)[:] = region
            starts, pitch = ends - lengths, 3 * regions[:, 1]
        crops = torch.empty(len(starts), len(COLUMNS), dtype=torch.float64, pin_memory=self.settings.pinned)
        crops.numpy()[:] = np.column_stack([starts, pitch, regions, box, work.flips])
        return pixels, crops

    def _resize(self, pixels: Tensor, crops: Tensor) -> Decoded:
        # copies from page-locked memory: the CPU does not wait
        pixels, crops = (x.to(self.settings.device, non_blocking=True) for x in (pixels, crops))
        return Decoded(ops.crop_resize(pixels, crops, self.settings.img_size), {})
