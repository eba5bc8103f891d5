"""Two ways to carry out a plan of crops: a DALI pipeline (CPU or GPU), or PIL in threads.

Both take the same boxes and flips and give the same pictures up to rounding (mean below one grey
level; up to about 13 at the border of a crop, where the two treat the edge of the filter differently).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

# batches planned, and batches decoded, ahead of the one being used
AHEAD = 2
_ORIENTATION_TAG = 0x0112


class Work(NamedTuple):
    """What to do with the images of a batch.

    rows   [b] int64 row numbers
    boxes  [b, 4] float64 top, left, bottom, right in pixels of the (EXIF-rotated, if asked) image
    flips  [b] bool, all False where boxes are not cut out (`whole` below)
    """

    rows: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray


class Headers:
    """Paths of a source and the image sizes in their headers, read when first needed."""

    def __init__(self, paths: list[str], exif: bool) -> None:
        self.paths, self.exif = paths, exif
        self._sizes = np.zeros((len(paths), 2), np.int32)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """[b, 2] height and width; DataError naming a file without a readable header."""
        for row in rows[self._sizes[rows, 0] == 0].tolist():
            self._sizes[row] = self._read(self.paths[row])
        return self._sizes[rows]

    def _read(self, path: str) -> tuple[int, int]:
        from PIL import Image

        try:
            with Image.open(path) as im:
                w, h = im.size
                if self.exif and im.getexif().get(_ORIENTATION_TAG, 1) >= 5:
                    w, h = h, w
        # a broken file makes PIL raise nearly anything: OSError, SyntaxError, ValueError, struct.error
        except Exception as e:
            raise unreadable(path, e) from e
        return h, w


def unreadable(path: str, reason: object) -> DataError:
    """The error for a file that is no image, or a damaged one."""
    text = str(reason).replace(path, "").strip(" '\"") or type(reason).__name__
    try:
        size = f"{os.path.getsize(path)} bytes"
    except OSError:
        size = "gone"
    return DataError(
        f"{path}: cannot be decoded ({text}; {size}); remove it, or leave it out by giving a list file "
        "with one good path per line as the data"
    )


# ---- PIL ------------------------------------------------------------------------------------------


def load_rgb(path: str, exif: bool, box: tuple[int, int, int, int] | None = None) -> Any:
    """The image (or the box left, top, right, bottom of it) as an 8-bit RGB PIL image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as im:
            im.load()
            if exif:
                im = ImageOps.exif_transpose(im)
            if box is not None:
                im = im.crop(box)
            if im.mode.startswith("I"):
                # PIL's own conversion clips 16 bits at 255 instead of scaling them
                deep = np.asarray(im).astype(np.float64).clip(0, 65535)
                im = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
            return im.convert("RGB")
    except Exception as e:
        raise unreadable(path, e) from e


def pil_batches(
    plans: Iterator[Future[Work]],
    headers: Headers,
    img_size: tuple[int, int],
    *,
    threads: int,
    whole: bool,
) -> Iterator[tuple[Work, Tensor]]:
    """Yields (work, images [b, H, W, 3] uint8 on the CPU) per plan, in order.

    whole  the filter may look at pixels outside a box (resize, then crop), and nothing is flipped;
           else the box is cut out first
    """
    height, width = img_size

    def decode(row: int, box: np.ndarray, flip: bool, out: np.ndarray) -> None:
        from PIL import Image

        top, left, bottom, right = box.tolist()
        bilinear = Image.Resampling.BILINEAR
        if whole:
            im = load_rgb(headers.paths[row], headers.exif)
            box_in = (left, top, min(right, im.width), min(bottom, im.height))
            im = im.resize((width, height), bilinear, box=box_in)
        else:
            cut = (int(left), int(top), int(right), int(bottom))
            im = load_rgb(headers.paths[row], headers.exif, cut).resize((width, height), bilinear)
        pixels = np.asarray(im)
        out[:] = pixels[:, ::-1] if flip else pixels

    def part(work: Work, out: np.ndarray, start: int) -> None:
        for i in range(start, len(work.rows), threads):
            decode(int(work.rows[i]), work.boxes[i], bool(work.flips[i]), out[i])

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def start(plan: Future[Work]) -> tuple[Work, Tensor, list[Future[None]]]:
        work = plan.result()
        images = torch.empty(len(work.rows), height, width, 3, dtype=torch.uint8)
        return work, images, [pool.submit(part, work, images.numpy(), i) for i in range(threads)]

    try:
        planned = _ahead(plans, AHEAD)
        for work, images, parts in _ahead(map(start, planned), AHEAD):
            for done in parts:
                done.result()
            yield work, images
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The same items, taken from their iterator `count` items early; an error comes in its turn."""
    waiting: deque[Any] = deque()
    failed = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > count:
                yield waiting.popleft()
    except DataError as e:
        failed = e
    yield from waiting
    if failed:
        raise failed


# ---- DALI -----------------------------------------------------------------------------------------


def build_pipeline(
    feed: Callable[[], tuple[Any, ...]],
    img_size: tuple[int, int],
    *,
    batch: int,
    threads: int,
    whole: bool,
    device: torch.device,
    exif: bool,
) -> Any:
    """The DALI pipeline: read, decode (the box only, unless `whole`), resize, flip -> [b, H, W, 3] uint8.

    feed    called once per batch: (paths as uint8 arrays, starts [b, 2] fp32, ends [b, 2] fp32) with
            `whole`, else (paths, starts int32, extents int32, flips [b] int32); StopIteration at the end
    device  "cpu": no driver needed; "cuda": decoding starts on the CPU and ends on that GPU ("mixed")
    """
    import nvidia.dali as dali
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    decoder = "mixed" if on_gpu else "cpu"
    device_id = None
    if on_gpu:
        device_id = torch.cuda.current_device() if device.index is None else device.index
    pipe = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=AHEAD
    )
    with pipe:
        paths, start, extent, *flip = fn.external_source(source=feed, num_outputs=3 if whole else 4)
        encoded = fn.io.file.read(paths)
        resize = dict(size=img_size, interp_type=types.INTERP_LINEAR, antialias=True)
        if whole:
            images = fn.decoders.image(encoded, device=decoder, adjust_orientation=exif)
            images = fn.resize(images, roi_start=start, roi_end=extent, **resize)
        else:
            images = fn.decoders.image_slice(
                encoded, device=decoder, start=start, shape=extent, axis_names="HW", adjust_orientation=exif
            )
            images = fn.resize(images, **resize)
            images = fn.flip(images, horizontal=flip[0])
        pipe.set_outputs(images)
    pipe.build()
    return pipe


def dali_batches(
    plans: Iterator[Future[Work]],
    headers: Headers,
    img_size: tuple[int, int],
    *,
    batch: int,
    threads: int,
    whole: bool,
    device: torch.device,
) -> Iterator[tuple[Work, Tensor]]:
    """As `pil_batches`, decoded by DALI; images are on `device`."""
    planned = _ahead(plans, AHEAD)
    running: deque[Work] = deque()
    failed: list[Exception] = []

    def feed() -> tuple[Any, ...]:
        try:
            work = next(planned).result()
        except DataError as e:
            # an end, so that the batches before this one are still delivered
            failed.append(e)
            raise StopIteration from None
        running.append(work)
        return _arguments(work, headers, whole)

    def pipeline(source: Callable[[], tuple[Any, ...]], size: int) -> Any:
        return build_pipeline(
            source, img_size, batch=size, threads=threads, whole=whole, device=device, exif=headers.exif
        )

    pipe = pipeline(feed, batch)
    try:
        while True:
            try:
                (out,) = pipe.run()
                # DALI may use its buffers again: the copy makes the batch ours
                images = torch.from_dlpack(out.as_tensor()).clone()
            except StopIteration:
                if failed:
                    raise failed[0] from None
                return
            except RuntimeError as e:
                raise _name_the_file(e, running, headers, pipeline, whole) from e
            yield running.popleft(), images
    finally:
        del pipe


def _arguments(work: Work, headers: Headers, whole: bool) -> tuple[Any, ...]:
    paths = [np.frombuffer(os.fsencode(headers.paths[row]), np.uint8) for row in work.rows.tolist()]
    start, end = work.boxes[:, :2], work.boxes[:, 2:]
    if whole:
        return paths, start.astype(np.float32), end.astype(np.float32)
    return paths, start.astype(np.int32), (end - start).astype(np.int32), work.flips.astype(np.int32)


def _name_the_file(
    error: Exception, running: deque[Work], headers: Headers, pipeline: Callable[..., Any], whole: bool
) -> DataError:
    """DALI names neither file nor row for most kinds of damage: look for it one file at a time."""
    for work in running:
        for row in work.rows.tolist():
            try:
                load_rgb(headers.paths[row], headers.exif)
            except DataError as e:
                return e
    for work in running:
        for i, row in enumerate(work.rows.tolist()):
            one = _arguments(Work(*(field[i : i + 1] for field in work)), headers, whole)
            try:
                pipeline(_always(one), 1).run()
            except RuntimeError as e:
                reason = f"by DALI, {_dali_reason(e)}; PIL can: --data.loader pil"
                return unreadable(headers.paths[row], reason)
    return DataError(f"DALI stopped, but not because of a file: {_dali_reason(error)}; try --data.loader pil")


def _always(value: Any) -> Callable[[], Any]:
    # a closure, not a lambda with a default: DALI would pass that argument
    return lambda: value


def _dali_reason(error: Exception) -> str:
    # the operator and its traceback come first
    return " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())[:300]
