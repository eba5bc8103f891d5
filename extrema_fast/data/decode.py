"""Two ways to carry out a plan of crops: a DALI pipeline (CPU or GPU), or PIL in threads.

Both take the same boxes and flips and give the same pictures up to rounding (mean below one grey
level; up to about 13 at the border of a crop, where the two treat the edge of the filter differently).
With a `Mender` a row that cannot be decoded is replaced, all others of its batch stay as they were; without one it
is an error that names the file.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .bad_images import BadRows
from .files import REMEDY, Files, load_rgb

__all__ = ["Mender", "Settings", "Work", "build_pipeline", "dali_batches", "load_rgb", "pil_batches"]

log = logging.getLogger(__name__)

# batches planned, and batches decoded, ahead of the one being used
AHEAD = 2
# batches in a row that DALI may lose without a file to blame: those on their way when one failed
_LOST = AHEAD + 1


class Work(NamedTuple):
    """What to do with the images of a batch.

    rows   [b] int64 row numbers
    boxes  [b, 4] float64 top, left, bottom, right in pixels of the (EXIF-rotated, if asked) image
    flips  [b] bool, all False where boxes are not cut out (`whole` below)
    data   the bytes of each image file, [size] uint8; None: the decoder reads the files
    step   which batch this is
    """

    rows: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    data: list[np.ndarray] | None
    step: int

    def one(self, place: int) -> Work:
        """The same with one image only."""
        cut = slice(place, place + 1)
        data = None if self.data is None else self.data[cut]
        return Work(self.rows[cut], self.boxes[cut], self.flips[cut], data, self.step)


class Settings(NamedTuple):
    """How batches are decoded.

    whole   the filter may look at pixels outside a box (resize, then crop), and nothing is flipped; else the box
            is cut out first
    device  "cpu", or a GPU: decoding starts on the CPU and ends there (DALI only)
    hw      share of JPEG images for a GPU's own decoder
    pinned  CPU batches in page-locked memory, for copies that run beside the step
    """

    img_size: tuple[int, int]
    batch: int
    threads: int
    whole: bool
    device: torch.device = torch.device("cpu")
    hw: float = 0.65
    pinned: bool = False


class Mender(NamedTuple):
    """What a decoder needs to go on after a row that cannot be decoded.

    bad   the rows known to be unusable
    plan  step -> its work, with substitutes for those
    """

    bad: BadRows
    plan: Callable[[int], Work]

    def replace(self, work: Work, failed: dict[int, DataError]) -> Work:
        """The same work with substitutes in the places that failed; DataError when there are too many."""
        for place, error in sorted(failed.items()):
            self.bad.add(int(work.rows[place]), str(error))
        return self.plan(work.step)


def _replace(mender: Mender | None, work: Work, failed: dict[int, DataError]) -> Work:
    if mender is None:
        raise DataError(f"{failed[min(failed)]}; {REMEDY}")
    return mender.replace(work, failed)


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


# ---- PIL ------------------------------------------------------------------------------------------


def pil_batches(
    plans: Iterator[Future[Work]], files: Files, how: Settings, mender: Mender | None = None
) -> Iterator[tuple[Work, Tensor]]:
    """Yields (work, images [b, H, W, 3] uint8 on the CPU) per plan, in order."""
    pool = ThreadPoolExecutor(how.threads, thread_name_prefix="decode")

    def part(work: Work, out: np.ndarray, places: list[int]) -> dict[int, DataError]:
        failed = {}
        for i in places:
            try:
                out[i] = _pil_crop(files, work, i, how)
            except DataError as e:
                failed[i] = e
        return failed

    def begin(work: Work, images: Tensor, places: list[int]) -> list[Future[dict[int, DataError]]]:
        # with NumPy's writes the tensor needs no copy
        return [pool.submit(part, work, images.numpy(), places[i :: how.threads]) for i in range(how.threads)]

    def start(plan: Future[Work]) -> tuple[Work, Tensor, list[Future[dict[int, DataError]]]]:
        work = plan.result()
        images = torch.empty(len(work.rows), *how.img_size, 3, dtype=torch.uint8, pin_memory=how.pinned)
        return work, images, begin(work, images, list(range(len(work.rows))))

    try:
        for work, images, parts in _ahead(map(start, _ahead(plans, AHEAD)), AHEAD):
            while failed := {i: e for done in parts for i, e in done.result().items()}:
                old, work = work, _replace(mender, work, failed)
                if len(work.rows) == len(old.rows):
                    places = np.flatnonzero(work.rows != old.rows).tolist()
                else:
                    # left out, not replaced
                    places = list(range(len(work.rows)))
                    images = images[: len(places)]
                parts = begin(work, images, places)
            yield work, images
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pil_crop(files: Files, work: Work, place: int, how: Settings) -> np.ndarray:
    from PIL import Image

    (height, width), bilinear = how.img_size, Image.Resampling.BILINEAR
    row, data = int(work.rows[place]), None if work.data is None else work.data[place]
    top, left, bottom, right = work.boxes[place].tolist()
    if how.whole:
        im = files.rgb(row, data)
        im = im.resize(
            (width, height), bilinear, box=(left, top, min(right, im.width), min(bottom, im.height))
        )
    else:
        cut = (int(left), int(top), int(right), int(bottom))
        im = files.rgb(row, data, cut).resize((width, height), bilinear)
    pixels = np.asarray(im)
    return pixels[:, ::-1] if work.flips[place] else pixels


# ---- DALI -----------------------------------------------------------------------------------------


def build_pipeline(feed: Callable[[], tuple[Any, ...]], how: Settings, *, exif: bool, as_bytes: bool) -> Any:
    """The DALI pipeline: read, decode (the box only, unless `whole`), resize, flip -> [b, H, W, 3] uint8.

    feed      called once per batch: (files as uint8 arrays, starts [b, 2] fp32, ends [b, 2] fp32) with `whole`,
              else (files, starts int32, extents int32, flips [b] int32); StopIteration at the end
    as_bytes  the arrays hold the files themselves; else their paths
    """
    import nvidia.dali as dali
    from nvidia.dali import fn, types

    decoder: dict[str, Any] = {"device": "cpu", "adjust_orientation": exif}
    device_id = None
    if how.device.type == "cuda":
        decoder |= {"device": "mixed", "hw_decoder_load": how.hw}
        device_id = torch.cuda.current_device() if how.device.index is None else how.device.index
    pipe = dali.Pipeline(
        batch_size=how.batch, num_threads=how.threads, device_id=device_id, prefetch_queue_depth=AHEAD
    )
    with pipe:
        encoded, start, extent, *flip = fn.external_source(source=feed, num_outputs=3 if how.whole else 4)
        if not as_bytes:
            encoded = fn.io.file.read(encoded)
        resize = dict(size=how.img_size, interp_type=types.INTERP_LINEAR, antialias=True)
        if how.whole:
            images = fn.decoders.image(encoded, **decoder)
            images = fn.resize(images, roi_start=start, roi_end=extent, **resize)
        else:
            images = fn.decoders.image_slice(encoded, start=start, shape=extent, axis_names="HW", **decoder)
            images = fn.resize(images, **resize)
            images = fn.flip(images, horizontal=flip[0])
        pipe.set_outputs(images)
    pipe.build()
    return pipe


def dali_batches(
    plans: Iterator[Future[Work]], files: Files, how: Settings, mender: Mender | None = None
) -> Iterator[tuple[Work, Tensor]]:
    """As `pil_batches`, decoded by DALI; images are on `how.device`, complete and ours."""
    planned = _ahead(plans, AHEAD)
    running: deque[Work] = deque()
    again: deque[Work] = deque()
    ended: list[Exception] = []
    copies = torch.cuda.Stream(how.device) if how.device.type == "cuda" else None

    def feed() -> tuple[Any, ...]:
        try:
            work = again.popleft() if again else next(planned).result()
            while not len(work.rows):
                # all left out; DALI takes no empty batch
                work = next(planned).result()
        except DataError as e:
            # an end, so that the batches before this one are still delivered
            ended.append(e)
            raise StopIteration from None
        running.append(work)
        return _arguments(work, files, how.whole)

    def pipeline(source: Callable[[], tuple[Any, ...]], size: int) -> Any:
        return build_pipeline(source, how._replace(batch=size), exif=files.exif, as_bytes=files.as_bytes)

    def decode(work: Work) -> Tensor:
        return _ours(
            pipeline(_always(_arguments(work, files, how.whole)), len(work.rows)), copies, how.pinned
        )

    pipe, lost = pipeline(feed, how.batch), 0
    try:
        while True:
            try:
                images = _ours(pipe, copies, how.pinned)
                work, lost = running.popleft(), 0
            except StopIteration:
                if ended:
                    raise ended[0] from None
                return
            except RuntimeError as e:
                # after an error DALI calls a pipeline invalid: what it had begun goes to a new one
                pipe, lost = None, lost + 1
                if not running:
                    raise _not_a_file(e) from e
                work = running.popleft()
                again.extendleft(reversed(running))
                running.clear()
                work, images = _mended(e, work, files, how.threads, decode, mender, last=lost > _LOST)
                pipe = pipeline(feed, how.batch)
            yield work, images
    finally:
        del pipe


def _ours(pipe: Any, copies: torch.cuda.Stream | None, pinned: bool) -> Tensor:
    """The next batch in memory that DALI will not use again."""
    (out,) = pipe.run()
    if copies is None:
        images = torch.from_dlpack(out.as_tensor())
        mine = torch.empty(images.shape, dtype=images.dtype, pin_memory=pinned)
        return mine.copy_(images)
    # on a stream of its own, waited for: DALI fills its buffer again as soon as `out` is gone, and the caller's
    # stream may be a whole step behind
    with torch.cuda.stream(copies):
        mine = torch.from_dlpack(out.as_tensor()).clone()
        copies.synchronize()
    mine.record_stream(torch.cuda.current_stream(mine.device))
    return mine


def _mended(
    error: Exception,
    work: Work,
    files: Files,
    threads: int,
    decode: Callable[[Work], Tensor],
    mender: Mender | None,
    *,
    last: bool,
) -> tuple[Work, Tensor]:
    """A batch that DALI has lost, decoded again with substitutes for what cannot be decoded.

    last  the batches before were lost as well, with no file to blame
    """
    while True:
        failed = _find(work, files, threads, decode)
        if failed:
            work = _replace(mender, work, failed)
        elif last:
            break
        if not len(work.rows):
            return work, torch.empty(0)
        try:
            return work, decode(work)
        except RuntimeError as e:
            if not failed:
                break
            error = e
    raise _not_a_file(error) from error


def _not_a_file(error: Exception) -> DataError:
    return DataError(f"DALI stopped, but not because of a file: {_dali_reason(error)}; try --data.loader pil")


def _find(work: Work, files: Files, threads: int, decode: Callable[[Work], Tensor]) -> dict[int, DataError]:
    """Place -> error of the images that DALI cannot decode. For most kinds of damage it names no file itself."""
    said: dict[int, DataError] = {}
    places = range(len(work.rows))

    def ask(i: int) -> None:
        try:
            files.rgb(int(work.rows[i]), None if work.data is None else work.data[i])
        except DataError as e:
            said[i] = e

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, places))
    # what PIL cannot decode is nearly always all of it, and DALI has the last word
    for some in ([i for i in places if i in said], [i for i in places if i not in said]):
        failed = {}
        for i in some:
            try:
                decode(work.one(i))
            except RuntimeError as e:
                reason = f"by DALI, {_dali_reason(e)}; PIL can: --data.loader pil"
                failed[i] = said.get(i) or files.error(int(work.rows[i]), reason)
        if failed:
            return failed
    return {}


def _arguments(work: Work, files: Files, whole: bool) -> tuple[Any, ...]:
    data = work.data
    if data is None:
        paths = files.source.paths
        data = [np.frombuffer(os.fsencode(paths[row]), np.uint8) for row in work.rows.tolist()]
    start, end = work.boxes[:, :2], work.boxes[:, 2:]
    if whole:
        return data, start.astype(np.float32), end.astype(np.float32)
    return data, start.astype(np.int32), (end - start).astype(np.int32), work.flips.astype(np.int32)


def _always(value: Any) -> Callable[[], Any]:
    # a closure, not a lambda with a default: DALI would pass that argument
    return lambda: value


def _dali_reason(error: Exception) -> str:
    # the operator and its traceback come first
    return " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())[:300]
