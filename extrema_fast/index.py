"""`extrema-fast index`: every image looked at once, good and bad ones written down in a manifest.

Files are decoded by processes of their own (`image_check.py`). Each finished row goes to a file beside the
manifest, `OUT.part`, and from there into the manifest, in the order of the source, when all are done. So a run
that was stopped at any moment goes on where it was, and a manifest that is made again decodes only files whose
size or time of change is another, or that could not be read.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import sys
import time
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .check_pool import BATCH, Pool
from .errors import DataError, Preempted, StorageError, UsageError
from .image_check import MAX_PIXELS, OK, Verdict
from .image_source import ImageSource
from .manifest import (
    COLUMNS,
    MAGIC,
    Row,
    escape,
    header_lines,
    is_manifest,
    manifest_source,
    parse_header,
    read_manifest,
    root_folder,
    root_for,
    row_line,
    write_lines,
)
from .progress import ImageProgress
from .sources import BUILT_IN, EXTENSIONS, open_source

log = logging.getLogger(__name__)

# what is younger is lost when the machine, not only the program, stops
_FSYNC_SECONDS = 5.0

_PATH, _OFFSET, _BYTES, _MTIME, _CRC32, _WIDTH, _HEIGHT, _LABEL, _STATUS = (
    COLUMNS.index(c)
    for c in ("path", "offset", "bytes", "mtime_ns", "crc32", "width", "height", "label", "status")
)
# path and offset as they stand in a line -> the line
Known = dict[tuple[str, str], str]


class Trouble(NamedTuple):
    """Rows with one kind of trouble: how many, and the first of them."""

    what: str
    count: int
    title: str
    details: str

    def status(self) -> str:
        """The first one's status."""
        return f"{self.what}: {self.details}" if self.details else self.what


class Result(NamedTuple):
    """What `index` found.

    fresh  rows looked at now, in `seconds`; the others were known
    bare   classes without a good image
    """

    out: str
    rows: int
    good: int
    bare: list[str]
    fresh: int
    seconds: float
    decoder: str
    troubles: list[Trouble]


class _Job(NamedTuple):
    source: ImageSource
    data: str
    """DATA as an absolute path, or the name of a built-in set"""
    root: str
    paths: list[str]
    """relative to the root, where they lie below it"""
    offsets: list[int]
    labels: list[int] | None
    out: Path
    strict: bool
    max_pixels: int
    expected: list[int] | None
    """the checksums that the rows should have; None: not known"""

    @property
    def part(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    def head(self) -> str:
        data = self.data if self.data in BUILT_IN else root_for(self.out, self.data)
        notes = {"data": data, "strict": self.strict, "max_pixels": self.max_pixels}
        return header_lines(root_for(self.out, self.root), self.source.classes, notes)

    def label(self, row: int) -> str:
        return "" if self.labels is None else self.source.classes[self.labels[row]]


def index(
    data: str,
    out: str | os.PathLike[str],
    *,
    strict: bool = False,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    force: bool = False,
    progress: bool = True,
) -> Result:
    """Decodes every image of `data` once and writes the manifest `out`.

    data        whatever `open_source` takes, but a mixture; of a manifest its good rows, whose checksums are
                compared
    strict      Pillow, too, has to decode each image where nvImageCodec is there
    threads     processes that decode; None: as many as there are cores
    max_pixels  images of more (width times height) are not decoded, and not good
    force       replaces `out` when it is no manifest of `data`, and looks at every image again
    raises      UsageError: wrong arguments, or `out` is something else; DataError: no image is good;
                StorageError: `out` cannot be written; Preempted after Ctrl-C. What is done is kept.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads: expected 1 or more, got {threads}")
    if max_pixels < 1:
        raise UsageError(f"--max-pixels: expected 1 or more, got {max_pixels}")
    job = _plan(data, Path(out).expanduser(), strict, max_pixels)
    _check_out(job, force)
    known = {} if force else _known_rows(job, job.out)
    part = _open_part(job, force)
    try:
        known |= _known_rows(job, job.part)
        lines, todo = _match(job, known)
        began, decoder = time.monotonic(), ""
        if todo:
            if len(todo) < len(lines):
                log.info("%s: %d of %d images are known", job.out, len(lines) - len(todo), len(lines))
            _write(part, job.head(), job)
            decoder = _look(job, part, lines, todo, threads or _cores(), progress)
        seconds = time.monotonic() - began
        if todo or not _holds(job, lines):
            _finish(job, lines)
        else:
            log.info("%s: complete, and no file has changed since; nothing to decode", job.out)
        job.part.unlink(missing_ok=True)
    finally:
        part.close()
    result = _result(job, lines, len(todo), seconds, decoder)
    if not result.good:
        first = result.troubles[0]
        raise DataError(
            f"{data}: none of the {result.rows} images is good, first: {first.title} ({first.status()}); "
            f"{job.out} lists them all"
        )
    return result


def describe(result: Result) -> str:
    """What was found, as text: a line on the whole, a table of the troubles."""
    bad = result.rows - result.good
    share = f"{result.good} of {result.rows} images are good" + (f", {bad} are not:" if bad else "")
    lines = [f"{result.out}: {share}"]
    if bad:
        table = [("images", "what is wrong", "first")]
        table += [
            (str(t.count), t.what, f"{t.title}{t.details and ': '}{t.details}") for t in result.troubles
        ]
        widths = [max(len(row[c]) for row in table) for c in (0, 1)]
        lines += [f"  {n:>{widths[0]}}  {what:<{widths[1]}}  {first}" for n, what, first in table]
    if result.bare:
        lines.append(f"no good image in {len(result.bare)} classes, first: {result.bare[0]}")
    if result.fresh:
        rate = result.fresh / max(result.seconds, 1e-9)
        lines.append(f"looked at {result.fresh} images by {result.decoder}, {rate:.0f} images/s")
    return "\n".join([*lines, f"train on the good ones: extrema-fast pretrain --data.train {result.out}"])


# ---- what there is --------------------------------------------------------------------------------


def _plan(data: str, out: Path, strict: bool, max_pixels: int) -> _Job:
    path, expected = os.path.expanduser(data), None
    if data in BUILT_IN:
        source, where = open_source(data, check=False), data
    else:
        where = str(Path(os.getcwd(), path))
        if path.lower().endswith(".toml") and os.path.isfile(path):
            raise UsageError(f"{data}: is a mixture; index each of its sources, and name the manifests in it")
        if is_manifest(path):
            source, old = manifest_source(path, check=False), read_manifest(path)
            expected = old.crc32[old.good()].tolist()
        else:
            source = open_source(data, check=False)
    paths = [os.path.join(os.getcwd(), p) for p in source.paths]
    root = where if os.path.isdir(where) else os.path.commonpath({os.path.dirname(p) for p in paths})
    prefix = root.rstrip(os.sep) + os.sep
    offsets = [-1] * len(paths)
    if source.spans is not None:
        offsets = np.where(source.spans[:, 1] < 0, -1, source.spans[:, 0]).tolist()
    paths = [p.removeprefix(prefix) for p in paths]
    labels = None if source.labels is None else source.labels.tolist()
    return _Job(source, where, root, paths, offsets, labels, out, strict, max_pixels, expected)


def _check_out(job: _Job, force: bool) -> None:
    """Refuses an `out` that is something else, and makes its folder."""
    out = job.out
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name the manifest, as in {out / 'manifest.tsv'}")
    if out.suffix.lower() in (*EXTENSIONS, ".tar"):
        raise UsageError(f"--out {out}: is the name of an image or shard; name a manifest, as in images.tsv")
    if os.path.realpath(out) == os.path.realpath(job.data):
        raise UsageError(f"--out {out}: is what is to be indexed; choose another --out")
    if out.exists() and not force and not is_manifest(out):
        raise UsageError(
            f"--out {out}: exists and is no manifest; choose another --out, or --force replaces it"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"--out {out}: its folder cannot be made ({e.strerror})") from e


def _open_part(job: _Job, force: bool) -> io.FileIO:
    """The file that finished rows are added to, locked, and cut after its last whole line."""
    try:
        part = io.FileIO(os.open(job.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as e:
        raise StorageError(f"{job.part}: cannot be written ({e.strerror})") from e
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        part.close()
        raise UsageError(f"--out {job.out}: another `index` is writing it; wait for it, or stop it") from None
    except OSError:
        # a file system without locks
        pass
    size = part.seek(0, os.SEEK_END)
    part.seek(max(0, size - (1 << 20)))
    tail = part.read()
    part.truncate(0 if force else size - len(tail) + tail.rfind(b"\n") + 1)
    part.seek(0, os.SEEK_END)
    return part


def _known_rows(job: _Job, path: Path) -> Known:
    """The rows in a manifest, or a beginning of one, that were looked at as this run would.

    raises UsageError when it is of other images
    """
    known: Known = {}
    if not path.exists():
        return known
    fits, limit = False, None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        for line in f:
            # every run that was stopped has begun with a header of its own
            if line.startswith(MAGIC):
                columns = f.readline()
                if columns:
                    fits, limit = _settings(job, parse_header(line, columns, str(path)), path)
                continue
            fields = line.split("\t")
            # what a power cut leaves of a line is not a row
            if not fits or len(fields) != len(COLUMNS) or not line.endswith("\n"):
                continue
            if limit is None or _pixels(fields) <= limit:
                known[fields[_PATH], fields[_OFFSET]] = line
    return known


def _settings(job: _Job, header: dict[str, Any], path: Path) -> tuple[bool, int | None]:
    """Whether rows below this header can be used, and up to how many pixels; None: any number."""
    data = header.get("data")
    there = data if data in BUILT_IN else os.path.realpath(root_folder(path, str(data)))
    here = job.data if job.data in BUILT_IN else os.path.realpath(job.data)
    if data is None or there != here:
        of = "other images" if data is None else there
        raise UsageError(
            f"--out {job.out}: {path.name} is of {of}, not of {here}; choose another --out, or --force replaces it"
        )
    pixels = header.get("max_pixels")
    limit = min(pixels, job.max_pixels) if isinstance(pixels, int) else 0
    limit = None if pixels == job.max_pixels else limit
    return bool(header.get("strict")) or not job.strict, limit


def _pixels(fields: list[str]) -> int:
    try:
        return int(fields[_WIDTH]) * int(fields[_HEIGHT])
    except ValueError:
        return sys.maxsize


def _match(job: _Job, known: Known) -> tuple[list[str], list[int]]:
    """The line of each row that is known and unchanged, "" for the others, and the rows of these."""
    lines, todo, about = [], [], ("", (-1, -1))
    spans = None if job.source.spans is None else job.source.spans[:, 1].tolist()
    for row, path in enumerate(job.source.paths):
        line = known.get((escape(job.paths[row]), str(job.offsets[row])), "")
        if line:
            # the rows of a shard have one file
            about = about if about[0] == path else (path, _size_and_time(path))
            size, mtime_ns = about[1]
            size = size if spans is None or spans[row] < 0 else spans[row]
            line = _still(line.split("\t"), size, mtime_ns, job, row)
        lines.append(line)
        if not line:
            todo.append(row)
    return lines, todo


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return about.st_size, about.st_mtime_ns


def _still(fields: list[str], size: int, mtime_ns: int, job: _Job, row: int) -> str:
    """The line, with the label of today; "" when the file is not what it was."""
    # what could not be read has time 0, so it is tried again
    if fields[_BYTES] != str(size) or fields[_MTIME] != str(mtime_ns):
        return ""
    if job.expected is not None and fields[_CRC32] != f"{job.expected[row]:08x}":
        return ""
    fields[_LABEL] = escape(job.label(row))
    return "\t".join(fields)


def _finish(job: _Job, lines: list[str]) -> None:
    try:
        write_lines(job.out, job.head(), lines)
    except StorageError as e:
        raise StorageError(
            f"{e}; what was found is kept in {job.part}, and the same command continues"
        ) from e


def _holds(job: _Job, lines: list[str]) -> bool:
    """Whether the manifest is there with just these lines."""
    if not job.out.exists():
        return False
    with open(job.out, encoding="utf-8", errors="replace", newline="\n") as f:
        return all(a == b for a, b in zip_longest(f, chain(job.head().splitlines(True), lines)))


# ---- looking --------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _look(job: _Job, part: io.FileIO, lines: list[str], todo: list[int], threads: int, progress: bool) -> str:
    """Fills in the lines of the rows in `todo`, keeping each batch in `part`; the decoder's name."""
    lengths = [-1] * len(lines) if job.source.spans is None else job.source.spans[:, 1].tolist()
    files = [(job.source.paths[r], max(job.offsets[r], 0), lengths[r]) for r in todo]
    processes = min(threads, -(-len(files) // BATCH))
    done, bad, synced = 0, 0, time.monotonic()
    try:
        with (
            Pool(processes, strict=job.strict, max_pixels=job.max_pixels) as pool,
            ImageProgress("looking", len(files), progress) as bar,
        ):
            for verdicts in pool.check(files):
                rows = todo[done : done + len(verdicts)]
                new = [_line(job, row, v) for row, v in zip(rows, verdicts, strict=True)]
                _write(part, "".join(new), job)
                for row, line in zip(rows, new, strict=True):
                    lines[row] = line
                done += len(new)
                bad += sum(not line.endswith(f"\t{OK}\n") for line in new)
                if time.monotonic() - synced > _FSYNC_SECONDS:
                    _write(part, "", job, sync=True)
                    synced = time.monotonic()
                bar.reached(done, f"{bad} bad" if bad else "")
            return pool.decoder
    except KeyboardInterrupt:
        raise Preempted(f"stopped; {done} of {len(files)} images looked at are kept in {job.part}") from None


def _line(job: _Job, row: int, verdict: Verdict) -> str:
    if job.expected is not None and verdict.bytes and verdict.crc32 != job.expected[row]:
        was = f"its crc32 is {verdict.crc32:08x}, {os.path.basename(job.data)} has {job.expected[row]:08x}"
        verdict = verdict._replace(status=f"changed: {was}")
    title, path = job.source.title(row), job.source.paths[row]
    member = title.removeprefix(f"{path}:") if job.offsets[row] >= 0 else ""
    return row_line(Row(job.paths[row], member, job.offsets[row], label=job.label(row), **verdict._asdict()))


def _write(part: io.FileIO, text: str, job: _Job, *, sync: bool = False) -> None:
    data = text.encode()
    try:
        while data:
            data = data[part.write(data) :]
        if sync:
            os.fsync(part)
    except OSError as e:
        raise StorageError(
            f"{job.part}: cannot be written ({e.strerror}); what it holds is kept, and the same command continues"
        ) from e


def _result(job: _Job, lines: list[str], fresh: int, seconds: float, decoder: str) -> Result:
    count: Counter[str] = Counter()
    first: dict[str, tuple[int, str]] = {}
    used = set()
    for row, line in enumerate(lines):
        fields = line.rstrip("\n").split("\t")
        if fields[_STATUS] == OK:
            used.add(fields[_LABEL])
            continue
        what, _, details = fields[_STATUS].partition(": ")
        count[what] += 1
        first.setdefault(what, (row, details))
    troubles = [
        Trouble(what, n, escape(job.source.title(first[what][0])), first[what][1])
        for what, n in count.most_common()
    ]
    bare = [c for c in job.source.classes if escape(c) not in used]
    good = len(lines) - count.total()
    return Result(str(job.out), len(lines), good, bare, fresh, seconds, decoder, troubles)
