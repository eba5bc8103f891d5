"""Checks that both loaders can read an image file, by decoding it once in full, in processes that may crash.

In 250 photographs with 4 kB of their data zeroed, Pillow detects no damage, and nvImageCodec (installed with DALI)
detects 247, by libjpeg-turbo's warning "Corrupt JPEG data", which Pillow suppresses. With one flipped bit nvImageCodec
detects 31 (Pillow 3). Neither flags undamaged files. (Counted once, without a record.) This module imports no torch, so
that processes start quickly.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np

from ..config import MAX_CHANS
from ..data.pixels import Array, deep_kind, is_deep, open_array, plugins, tiff_shape
from ..data.zips import read_range
from ..errors import ExtremaError, UsageError, install
from ..files import open_plain

# what Pillow and DALI read, and what Pillow alone does
READ, READ_BY_PILLOW = ("jpeg", "png", "bmp", "webp", "tiff", "pnm"), ("gif", "npy")
_PLUGINS = {"avif": ".avif", "heic": ".heic", "jpeg2000": ".jp2"}
_MAGIC = [
    ("jpeg", rb"\xff\xd8"),
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("bmp", rb"BM"),
    ("webp", rb"RIFF....WEBP"),
    ("tiff", rb"II[*+]\x00|MM\x00[*+]"),
    ("pnm", rb"P[1-6]\s"),
    ("gif", rb"GIF8"),
    ("npy", rb"\x93NUMPY"),
    ("avif", rb"....ftypavi[fs]"),
    ("heic", rb"....ftyp(?:hei|hev|mif|msf)"),
    ("jpeg2000", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    ("jpegxl", rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    ("ico", rb"\x00\x00[\x01\x02]\x00"),
    ("psd", rb"8BPS"),
    ("svg", rb"\s*<(?:\?xml|svg)"),
    ("pdf", rb"%PDF"),
]
_KINDS = [(kind, re.compile(magic, re.DOTALL)) for kind, magic in _MAGIC]
# libjpeg-turbo, as nvImageCodec has it print them, means damage by these; its other warnings are harmless
_DAMAGE = re.compile(r"(Corrupt JPEG data: .*|Unsupported marker type .*|Premature end of JPEG file.*)")
# a few bytes too many at the very end, after all of the picture: some encoders leave them
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_ORIENTATION_TAG = 0x0112

OK = "ok"

# path, offset, length (-1: the whole file)
File = tuple[str, int, int]
# bytes of a file -> why it cannot be decoded, None when it can
Decode = Callable[[bytes], "str | None"]


class Verdict(NamedTuple):
    """What is in a file and whether it can be used; the fields as in a manifest.

    status: `ok`, or the kind of trouble, then often a colon and the details.
    """

    bytes: int = 0
    mtime_ns: int = 0
    crc32: int = 0
    kind: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    status: str = OK


# ---- one image ------------------------------------------------------------------------------------


def kind_of(data: bytes) -> str:
    """What the first bytes say: jpeg, png, ...; "" when they say nothing."""
    return next((kind for kind, magic in _KINDS if magic.match(data)), "")


def check(data: bytes, decode: Decode, max_pixels: int) -> Verdict:
    """Whether these bytes are an image that both loaders read, decoded in full."""
    found = Verdict(bytes=len(data), crc32=zlib.crc32(data), kind=kind_of(data))
    if not data:
        return found._replace(status="empty: 0 bytes")
    by_pillow = found.kind in READ_BY_PILLOW or _PLUGINS.get(found.kind) in plugins()
    if found.kind not in READ and not by_pillow:
        what = f"kind not read: {found.kind}; convert it to JPEG or PNG" if found.kind else ""
        return found._replace(status=what or f"not an image: begins with {_shown(data[:16])}")
    try:
        if array := open_array(io.BytesIO(data), None):
            return _check_array(array, found, max_pixels)
        width, height, orientation = header(data)
    except UsageError as e:
        return found._replace(status=f"not read: {e}")
    # a broken file makes Pillow raise nearly anything: OSError, SyntaxError, ValueError, struct.error
    except Exception as e:
        return found._replace(status=f"broken header: {reason(e)}")
    found = found._replace(width=width, height=height, orientation=orientation)
    if width * height > max_pixels:
        return _too_large(found, max_pixels)
    damage = png_damage(data) if found.kind == "png" else None
    problem = f"damaged: {damage}" if damage else (pillow if by_pillow else decode)(data)
    if not problem and found.kind in ("png", "tiff", "pnm"):
        problem, found = _depth(data, found)
    return found._replace(status=problem) if problem else found


def _too_large(found: Verdict, max_pixels: int) -> Verdict:
    size = f"{found.width} x {found.height} = {found.width * found.height} pixels, the limit is {max_pixels}"
    return found._replace(status=f"too large: {size} (--max-pixels)")


def _check_array(array: Array, found: Verdict, max_pixels: int) -> Verdict:
    """The verdict on numbers, with those of each channel in the kind; all of them are read."""
    height, width, channels = array.sizes(None)
    found = found._replace(width=width, height=height)
    if width * height > max_pixels:
        return _too_large(found, max_pixels)
    if channels > MAX_CHANS:
        return found._replace(status=f"not read: {channels} channels, at most {MAX_CHANS} are read")
    try:
        return found._replace(kind=deep_kind(found.kind, array.values(None)))
    except Exception as e:
        return found._replace(status=f"cannot be decoded: {reason(e)}")


def _depth(data: bytes, found: Verdict) -> tuple[str | None, Verdict]:
    """Notes the values of an image of more than 8 bits in its kind; a TIFF must be decoded by Pillow to be good."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as im:
            if not is_deep(im) and found.kind != "tiff":
                return None, found
            # other decoders fill the damaged strips of a TIFF with black
            im.load()
            if not is_deep(im):
                return None, found
            return None, found._replace(kind=deep_kind(found.kind, np.asarray(im)))
    except Exception as e:
        return f"cannot be decoded: {reason(e)}", found


def _shown(start: bytes) -> str:
    text = start.decode("latin-1")
    return repr(text) if text.isascii() and text.isprintable() else f"bytes {start.hex()}"


def header(data: bytes) -> tuple[int, int, int]:
    """Width and height as stored, and the EXIF orientation; 1 for TIFF, always rotated; raises what Pillow raises."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as im:
        if im.format == "TIFF":
            return *tiff_shape(im)[:2], 1
        width, height = im.size
        try:
            orientation = im.getexif().get(_ORIENTATION_TAG, 1)
        # the picture is good without it
        except Exception:
            orientation = 1
    return width, height, orientation if orientation in range(1, 9) else 1


def png_damage(data: bytes) -> str | None:
    """What is wrong with the chunks of a PNG file (their lengths, checksums, the end); None when nothing is."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if end > len(data):
            break
        wrong = zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")
        # a chunk whose name begins with a small letter may be ignored, and some programs get its checksum wrong
        if wrong and not name[0] & 0x20:
            return f"wrong checksum of chunk {name.decode('latin-1')!r} at byte {at}"
        if name == b"IEND":
            return None
        at = end
    return "no end of image: the file is cut"


def reason(error: BaseException) -> str:
    """An error in one line, without the address of an object in it."""
    text = " ".join(str(error).split())[:200]
    unnamed = "cannot identify image file" in text
    return "not recognized" if unnamed else text.strip(" '\"") or type(error).__name__


# ---- decoders -------------------------------------------------------------------------------------


def pillow(data: bytes) -> str | None:
    """Decodes with Pillow: why it fails, None when it does not."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as im:
            im.load()
    except Exception as e:
        return f"cannot be decoded: {reason(e)}"
    return None


def nvimagecodec(printed: Callable[[], str]) -> Decode:
    """A decoder by nvImageCodec on the CPU; `printed` gives what is new on standard error."""
    from nvidia import nvimgcodec

    cpu = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
    decoder = nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=cpu)
    rgb = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(data: bytes) -> str | None:
        printed()
        try:
            image = decoder.decode([nvimgcodec.CodeStream(data)], params=rgb)[0]
        except RuntimeError:
            image = None
        if image is None:
            return pillow(data) or "cannot be decoded: by nvImageCodec, which DALI uses; Pillow can"
        warning = damage_in(printed())
        return f"damaged: {warning}" if warning else None

    return decode


def damage_in(text: str) -> str | None:
    """The first warning of libjpeg-turbo in `text` that means damage; None without one."""
    for found in _DAMAGE.finditer(text):
        left_over = _LEFT_OVER.search(found[0])
        if not (left_over and int(left_over[1]) <= 16):
            return found[0].removeprefix("Corrupt JPEG data: ")
    return None


# ---- a process that decodes -----------------------------------------------------------------------


class _Decoder(NamedTuple):
    name: str
    decode: Decode
    max_pixels: int


_decoder: _Decoder | None = None


def _start(strict: bool, max_pixels: int) -> None:
    """Makes a new process ready: the best decoder here; with `strict` Pillow has to agree."""
    global _decoder
    # a session to itself: Ctrl-C is for the process that started this one, and this one ends with it
    os.setsid()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    printed = _catch_stderr()
    import PIL
    from PIL import Image

    plugins()
    # sizes are compared with the limit before anything is decoded
    Image.MAX_IMAGE_PIXELS = None
    name = f"Pillow {PIL.__version__}"
    decode: Decode = pillow
    try:
        from nvidia import nvimgcodec

        first = nvimagecodec(printed)
        better = f"nvImageCodec {nvimgcodec.__version__}"
    except (ImportError, OSError, RuntimeError, AttributeError):
        pass
    else:
        name = f"{better} and {name}" if strict else better
        decode = (lambda data: first(data) or pillow(data)) if strict else first
    _decoder = _Decoder(name, decode, max_pixels)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _catch_stderr() -> Callable[[], str]:
    """Standard error goes to a file from here on; the result gives what is new in it."""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

    def printed() -> str:
        size = os.fstat(2).st_size
        if not size:
            return ""
        text = os.pread(2, size, 0).decode("utf-8", "replace")
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        return text

    return printed


def _name() -> str:
    assert _decoder is not None
    return _decoder.name


def _check_files(files: Sequence[File]) -> list[Verdict]:
    return [_check_file(*file) for file in files]


def _check_file(path: str, offset: int, length: int) -> Verdict:
    assert _decoder is not None
    try:
        data, mtime_ns = _read(path, offset, length)
    # ValueError: a name with a zero byte
    except (OSError, ValueError) as e:
        why = "gone" if isinstance(e, FileNotFoundError) else getattr(e, "strerror", None) or str(e)
        # of what is no file, a manifest does not say what it is
        return Verdict(status=f"cannot be read: {why.partition(', but')[0]}")
    return check(data, _decoder.decode, _decoder.max_pixels)._replace(mtime_ns=mtime_ns)


def _read(path: str, offset: int, length: int) -> tuple[bytes, int]:
    """The bytes of a file, or of a part of it as of `read_range`, and its mtime in ns."""
    with open_plain(path) as file:
        return read_range(file, offset, length, path), os.fstat(file.fileno()).st_mtime_ns


# ---- many of them ---------------------------------------------------------------------------------

BATCH = 16
# batches given out per process, so that none waits for the slowest
_AHEAD = 4
# the result of a batch (None: its process had died), and the place of the executor
_Given = tuple["Future[list[Verdict]] | None", int]


class Pool:
    """Checks many files at once, in processes; a context manager.

    Each process has an executor to itself, so the death of one (a decoder crashed, or memory was short) breaks no
    other. It is replaced, and its files are tried one by one: the one it dies of again is to blame.
    """

    def __init__(self, processes: int, *, strict: bool, max_pixels: int) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise UsageError(f"reading images needs Pillow: {install('train')}") from None
        self._arguments = strict, max_pixels
        self._executors = [self._start() for _ in range(processes)]
        names = [executor.submit(_name) for executor in self._executors]
        try:
            self.decoder = names[0].result()
        except BrokenProcessPool:
            raise ExtremaError(
                "a process that decodes images died at its start; check that PIL and nvidia.nvimgcodec can be "
                'imported (a script that calls `index` has to do so below `if __name__ == "__main__":`)'
            ) from None

    def _start(self) -> ProcessPoolExecutor:
        # a forked process would share the locks of threads
        return ProcessPoolExecutor(1, get_context("spawn"), _start, self._arguments)

    def check(self, files: Sequence[File]) -> Iterator[list[Verdict]]:
        """Verdicts in the order of `files`, some at a time."""
        batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
        waiting: deque[_Given] = deque()
        for number, batch in enumerate(batches):
            until = min(len(batches), number + _AHEAD * len(self._executors))
            for ahead in range(number + len(waiting), until):
                waiting.append(self._submit(batches[ahead], waiting))
            yield self._result(*waiting.popleft(), batch)

    def _submit(self, files: Sequence[File], waiting: Iterable[_Given]) -> _Given:
        """Gives a batch to the process that has the least to do."""
        busy = {place: 0 for place in range(len(self._executors))}
        for future, place in waiting:
            busy[place] += future is not None and not future.done()
        place = min(busy, key=busy.__getitem__)
        try:
            return self._executors[place].submit(_check_files, files), place
        # its process has died, which is dealt with where the result is asked for
        except BrokenProcessPool:
            return None, place

    def _result(
        self, future: Future[list[Verdict]] | None, place: int, files: Sequence[File]
    ) -> list[Verdict]:
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            pass
        return [self._alone(place, file) for file in files]

    def _alone(self, place: int, file: File) -> Verdict:
        # the first attempt may find the process dead already
        for _ in range(2):
            try:
                return self._executors[place].submit(_check_files, [file]).result()[0]
            except BrokenProcessPool:
                self._executors[place] = self._start()
        return Verdict(status="crashes the decoder: its process died")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)
