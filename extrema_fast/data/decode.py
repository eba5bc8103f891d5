"""Decoding of batches: a DALI pipeline (CPU or GPU), or PIL in threads.

Both apply the same crops and flips and give the same images up to rounding (mean difference below one gray level; up to
about 13 at the border of a crop, where their resize filters treat edges differently). An image that cannot be decoded
is marked as failed in its batch; the loader decides what to do about it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .image_files import ImageFiles
from .pixels import as_image

# batches planned, and batches decoded, ahead of the one being used
AHEAD = 2
# batches in a row that DALI may lose without a broken file: those in the pipeline when one failed
_MAX_LOST = AHEAD + 1
# images that DALI alone cannot decode, one after the other, until it is the cause and not they
_ALL_FAIL = 4
# what DALI says when memory or the GPU is at fault, not an image
_DEVICE_ERROR = re.compile(
    r"CUDA (runtime |driver )?(API )?error|CUDA allocation failed|cudaError|CUDA_ERROR|out of memory|bad_alloc"
    r"|Can't allocate \d+ bytes|Cannot allocate memory|ALLOCATOR_FAILURE|ALLOC_FAILED",
    re.IGNORECASE,
)


class Work(NamedTuple):
    """A batch to decode."""

    # [b] int64 row numbers
    rows: np.ndarray
    # [b, 4] float64 top, left, bottom, right in pixels of the (EXIF-rotated, if asked) image
    boxes: np.ndarray
    # [b] bool, all False with `Settings.whole`
    flips: np.ndarray
    # the bytes of each image, [size] uint8; None: the decoder reads the files
    data: list[np.ndarray] | None
    step: int

    def only(self, places: Sequence[int]) -> Work:
        """The batch of some of its images."""
        data = None if self.data is None else [self.data[i] for i in places]
        some = list(places)
        return Work(self.rows[some], self.boxes[some], self.flips[some], data, self.step)


class Decoded(NamedTuple):
    """A decoded batch."""

    # [b, H, W, C] uint8; not to be used when a place has failed
    images: Tensor
    # place in the batch -> why it cannot be decoded
    failed: dict[int, DataError]


class Settings(NamedTuple):
    """How batches are decoded."""

    img_size: tuple[int, int]
    batch: int
    threads: int
    # the resize filter may read pixels outside a box (resize, then crop), and nothing is flipped; else it is cut first
    whole: bool
    # the CPU, or a GPU: decoding starts on the CPU and ends there (DALI only)
    device: torch.device
    # share of JPEG images for a GPU's hardware decoder
    hw: float
    # CPU batches in page-locked memory, for copies that overlap with the step
    pinned: bool
    # `bilinear` or `bicubic`
    interpolation: str = "bilinear"
    # DALI decodes only the boxes; else whole images, of which it then cuts them
    regions: bool = True


def useful_threads(threads: int, sizes: np.ndarray) -> int:
    """How many of `threads` decode images of these sizes ([n, 2]) with Pillow no slower than fewer.

    About 0.1 ms of an image is Python, which one thread runs at a time; what others run meanwhile is 0.01 us a pixel.
    With 16 threads, 32 x 32 pixels take several times as long as with one.
    """
    pixels = float(sizes.astype(np.int64).prod(1).mean()) if len(sizes) else 0.0
    return min(threads, 1 + int(pixels / 10_000))


def take_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The same items, taken from their iterator `count` items early; an error comes after the items before it."""
    waiting: deque[Any] = deque()
    failed = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > count:
                yield waiting.popleft()
    except Exception as e:
        failed = e
    yield from waiting
    if failed:
        raise failed


class PilDecoder:
    """Decodes with PIL in threads, on the CPU.

    Args:
        held: row -> [H, W, C] uint8, its image decoded before; None: images are read and decoded.
    """

    def __init__(
        self, files: ImageFiles, settings: Settings, held: Callable[[int], np.ndarray] | None = None
    ) -> None:
        self.files, self.settings, self.held = files, settings, held
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")

    def stream(self, plans: Iterator[Future[Work]]) -> Iterator[tuple[Work, Decoded]]:
        """Decodes the batches in order, `AHEAD` batches ahead."""
        started = ((plan.result(), self._start(plan.result())) for plan in take_ahead(plans, AHEAD))
        for work, finish in take_ahead(started, AHEAD):
            yield work, finish()

    def decode(self, work: Work) -> Decoded:
        """Decodes one batch now."""
        return self._start(work)()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, work: Work) -> Callable[[], Decoded]:
        count, s = len(work.rows), self.settings
        shape = (count, *s.img_size, self.files.read_channels)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=s.pinned)
        # with NumPy's writes the tensor needs no copy
        pixels = images.numpy()

        def decode(places: range) -> dict[int, DataError]:
            failed = {}
            for i in places:
                try:
                    pixels[i] = self._crop(work, i)
                except DataError as e:
                    failed[i] = e
            return failed

        threads = useful_threads(s.threads, self.files.sizes[work.rows])
        running = [self._pool.submit(decode, range(i, count, threads)) for i in range(threads)]
        return lambda: Decoded(images, {i: e for done in running for i, e in done.result().items()})

    def _crop(self, work: Work, place: int) -> np.ndarray:
        from PIL import Image

        height, width = self.settings.img_size
        kernel = Image.Resampling[self.settings.interpolation.upper()]
        row, data = int(work.rows[place]), None if work.data is None else work.data[place]
        top, left, bottom, right = work.boxes[place].tolist()
        if self.settings.whole:
            im = as_image(self.held(row)) if self.held else self.files.image(row, data)
            box = (left, top, min(right, im.width), min(bottom, im.height))
            im = im.resize((width, height), kernel, box=box)
        else:
            region = (int(left), int(top), int(right), int(bottom))
            if self.held:
                # only the region is copied
                im = as_image(self.held(row)[region[1] : region[3], region[0] : region[2]])
            else:
                im = self.files.image(row, data, region)
            im = im.resize((width, height), kernel)
        pixels = np.asarray(im)
        return pixels[:, ::-1] if work.flips[place] else pixels


class _DaliError(Exception):
    """DALI failed to decode a batch, perhaps because of an image."""


class DaliDecoder:
    """Decodes with DALI, on `settings.device`.

    DALI cannot skip an image: one that fails takes the pipeline, and the batches in it, with it.
    """

    def __init__(self, files: ImageFiles, settings: Settings) -> None:
        self.files, self.settings = files, settings

    def stream(self, plans: Iterator[Future[Work]]) -> Iterator[tuple[Work, Decoded]]:
        """Decodes the batches in order, `AHEAD` batches ahead."""
        planned = take_ahead(plans, AHEAD)
        running: deque[Work] = deque()
        unfinished: deque[Work] = deque()
        error: Exception | None = None

        def feed() -> tuple[Any, ...]:
            nonlocal error
            try:
                while unfinished or not error:
                    if unfinished:
                        work = unfinished.popleft()
                    elif plan := next(planned, None):
                        work = plan.result()
                    else:
                        break
                    arguments = self._arguments(work)
                    running.append(work)
                    # DALI takes no empty batch
                    if len(work.rows):
                        return arguments
            # of any kind: DALI must not take it for its own failure, and the batches before it are still delivered
            except Exception as e:
                error = e
            raise StopIteration

        pipe, lost = self._pipeline(feed, self.settings.batch), 0
        try:
            while True:
                failure, ended = None, False
                try:
                    images, sizes = self._run(pipe)
                except StopIteration:
                    ended = True
                except _DaliError as e:
                    # without its traceback, which would keep the pipeline
                    failure = _not_a_file(e)
                while running and not len(running[0].rows):
                    yield running.popleft(), Decoded(torch.empty(0), {})
                if ended:
                    if error:
                        raise error
                    return
                if failure is None:
                    lost = 0
                    work = running.popleft()
                    yield work, Decoded(images, self._of_other_size(work, sizes))
                    continue
                # after an error DALI calls a pipeline invalid: what it had begun goes to a new one
                pipe, lost = None, lost + 1
                if not running:
                    raise failure
                work = running.popleft()
                unfinished.extendleft(reversed(running))
                running.clear()
                decoded = self.decode(work)
                if not decoded.failed and lost > _MAX_LOST:
                    raise failure
                pipe = self._pipeline(feed, self.settings.batch)
                yield work, decoded
        finally:
            del pipe

    def decode(self, work: Work) -> Decoded:
        """Decodes one batch now; DataError where DALI fails although it can decode every image."""
        if not len(work.rows):
            return Decoded(torch.empty(0), {})
        try:
            images, sizes = self._run_once(work)
            return Decoded(images, self._of_other_size(work, sizes))
        except _DaliError as e:
            failed = self._find_failed(work)
            if not failed:
                raise _not_a_file(e) from e
            return Decoded(torch.empty(0), failed)

    def close(self) -> None:
        """Nothing to end: pipelines end with `stream`."""

    def _decode(self, work: Work) -> Tensor:
        return self._run_once(work)[0]

    def _run_once(self, work: Work) -> tuple[Tensor, np.ndarray]:
        arguments = self._arguments(work)
        # a lambda without defaults: DALI would pass those
        return self._run(self._pipeline(lambda: arguments, len(work.rows)))

    def _of_other_size(self, work: Work, sizes: np.ndarray) -> dict[int, DataError]:
        """The places whose images are not as large ([b, 2] `sizes`) as their boxes were planned for."""
        failed: dict[int, DataError] = {}
        for i in np.flatnonzero((sizes != self.files.sizes[work.rows]).any(1)).tolist():
            row, (height, width) = int(work.rows[i]), sizes[i].tolist()
            try:
                self.files.image(row, None if work.data is None else work.data[i])
                # as of a rotation that DALI does not follow
                reason = (
                    f"{width} x {height} pixels by DALI, which PIL reads as another size; --data.loader pil"
                )
                failed[i] = self.files.error(row, reason)
            except DataError as e:
                failed[i] = e
        return failed

    def _find_failed(self, work: Work) -> dict[int, DataError]:
        """The places that DALI cannot decode; for most kinds of damage it names no file itself."""

        def try_pil(i: int) -> DataError | None:
            try:
                self.files.image(int(work.rows[i]), None if work.data is None else work.data[i])
            except DataError as e:
                return e
            return None

        with ThreadPoolExecutor(self.settings.threads) as pool:
            by_pil = list(pool.map(try_pil, range(len(work.rows))))
        failed: dict[int, DataError] = {}
        decoded = False

        def search(places: list[int]) -> None:
            nonlocal decoded
            if not places:
                return
            try:
                self._decode(work.only(places))
                decoded = True
            except _DaliError as e:
                if len(places) > 1:
                    half = len(places) // 2
                    search(places[:half])
                    search(places[half:])
                    return
                (i,) = places
                reason = f"by DALI, {reason_of(e)}; PIL can: --data.loader pil"
                failed[i] = by_pil[i] or self.files.error(int(work.rows[i]), reason)
                if len(failed) == _ALL_FAIL and not decoded and not any(by_pil):
                    raise _not_a_file(e) from e

        # what PIL cannot decode is nearly always all of it, and DALI has the last word
        search([i for i, error in enumerate(by_pil) if error])
        if not failed:
            search([i for i, error in enumerate(by_pil) if not error])
        return failed

    def _arguments(self, work: Work) -> tuple[Any, ...]:
        """(files or their paths as uint8 arrays, starts, ends) with `whole`, else (files, starts, sizes, flips)."""
        data = work.data
        if data is None:
            paths = self.files.source.paths
            data = [np.frombuffer(os.fsencode(paths[row]), np.uint8) for row in work.rows.tolist()]
        start, end = work.boxes[:, :2], work.boxes[:, 2:]
        if self.settings.whole:
            return data, start.astype(np.float32), end.astype(np.float32)
        return data, start.astype(np.int32), (end - start).astype(np.int32), work.flips.astype(np.int32)

    def _pipeline(self, feed: Callable[[], tuple[Any, ...]], batch: int) -> Any:
        """Reads, decodes (the box only, unless `whole`), resizes and flips what `feed` returns: `_arguments`."""
        # without the types of DALI, which know little of its operators
        fn, math, types, dali = (
            importlib.import_module(f"nvidia.dali{n}") for n in (".fn", ".math", ".types", "")
        )
        s = self.settings
        decoder: dict[str, Any] = {"device": "cpu", "adjust_orientation": self.files.exif}
        gpu = None
        if s.device.type == "cuda":
            decoder |= {
                "device": "mixed",
                "hw_decoder_load": s.hw,
                "jpeg_fancy_upsampling": _chroma_as_on_cpu(),
            }
            gpu = torch.cuda.current_device() if s.device.index is None else s.device.index
        pipe = dali.Pipeline(
            batch_size=batch, num_threads=s.threads, device_id=gpu, prefetch_queue_depth=AHEAD
        )
        with pipe:
            encoded, start, extent, *flip = fn.external_source(source=feed, num_outputs=3 if s.whole else 4)
            if not self.files.as_bytes:
                encoded = fn.io.file.read(encoded)
            # a box outside of the image ends the process: a file may have changed since its box was planned
            size = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=self.files.exif)[0:2]
            start = math.min(start, size - 1)
            kernel = types.INTERP_CUBIC if s.interpolation == "bicubic" else types.INTERP_LINEAR
            resize = dict(size=s.img_size, interp_type=kernel, antialias=True)
            if s.whole:
                images = fn.decoders.image(encoded, **decoder)
                images = fn.resize(images, roi_start=start, roi_end=math.min(extent, size), **resize)
            else:
                box = dict(start=start, shape=math.min(extent, size - start), axis_names="HW")
                if s.regions:
                    images = fn.decoders.image_slice(encoded, **box, **decoder)
                else:
                    images = fn.slice(fn.decoders.image(encoded, **decoder), **box)
                images = fn.resize(images, **resize)
                images = fn.flip(images, horizontal=flip[0])
            pipe.set_outputs(images, size)
        pipe.build()
        return pipe

    def _run(self, pipe: Any) -> tuple[Tensor, np.ndarray]:
        """The next batch, and [b, 2] height and width of its files; on a GPU the current stream waits, not the CPU.

        DALI's default executor leaves a batch's memory alone as long as a tensor holds it; on a GPU it then belongs
        to the stream of this call.
        """
        device = self.settings.device
        try:
            stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
            out, sizes = pipe.run(*stream)
            sizes = np.array(sizes.as_array())
        except RuntimeError as e:
            if _DEVICE_ERROR.search(str(e)):
                raise
            raise _DaliError(str(e)) from e
        images = torch.from_dlpack(out.as_tensor())
        if not self.settings.pinned or device.type == "cuda":
            return images, sizes
        return torch.empty(images.shape, dtype=images.dtype, pin_memory=True).copy_(images), sizes


# what decodes, by the CUDA it is built for
PACKAGES = {
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "nvjpeg": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
}


def version(*packages: str) -> str:
    """Of the first of these packages that is installed; empty: none."""
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


@functools.cache
def _chroma_as_on_cpu() -> bool:
    """Whether a GPU makes a CPU's chroma in regions: nvJPEG before 13.2 does not, and leaves such images to the CPU."""
    numbers = re.findall(r"\d+", version(*PACKAGES["nvjpeg"]))
    return tuple(map(int, numbers[:2])) >= (13, 2)


def _not_a_file(error: Exception) -> DataError:
    return DataError(f"DALI stopped, but not because of a file: {reason_of(error)}; try --data.loader pil")


def reason_of(error: Exception) -> str:
    # the operator and its traceback come first
    return " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())[:300]
