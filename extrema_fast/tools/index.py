"""`extrema-fast index`: decodes every image once, and lists good and bad ones in a manifest.

Decoding runs in child processes (`verify.py`). Finished rows are written to the folder `OUT.part` every few seconds,
and at the end to the manifest, in the order of the source. Updating an existing manifest decodes only files whose size
or modification time has changed, or that could not be read.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import MAX_PIXELS, DataConfig
from ..data.image_files import measure_statistics
from ..data.image_source import ImageSource, among, left_out
from ..data.manifest import (
    COLUMNS,
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
    statistics,
    value_range,
    write_lines,
)
from ..data.pixels import array_channels
from ..data.sources import BUILT_IN, EXTENSIONS, NPY, open_source, subset
from ..distributed import cores
from ..errors import DataError, StorageError, UsageError, counted, install
from ..progress import ImageProgress
from .verify import BATCH, OK, Pool, Verdict
from .work import Work

log = logging.getLogger(__name__)

# rows are kept at least so often
KEEP_SECONDS = 3.0
PATH, OFFSET, BYTES, MTIME, CRC32, KIND, WIDTH, HEIGHT, LABEL, STATUS = (
    COLUMNS.index(c)
    for c in ("path", "offset", "bytes", "mtime_ns", "crc32", "kind", "width", "height", "label", "status")
)


# mean and standard deviation of each channel
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
# images whose pixels are measured
MEASURED = 1024


class Trouble(NamedTuple):
    """Rows with one kind of trouble: how many, and the first of them."""

    what: str
    # the name of a method of tuples
    count: int  # type: ignore[assignment]
    title: str
    details: str


class Result(NamedTuple):
    """What `index` found."""

    out: str
    rows: int
    good: int
    bare: list[str]
    """classes without a good image"""
    fresh: int
    """rows decoded now, in `seconds`; the others were known"""
    seconds: float
    decoder: str
    troubles: list[Trouble]
    value_range: tuple[float, ...] | None = None
    """of the images of more than 8 bits (`pixels.Range`); None: the usual 0 to 65535 or 0 to 1, or no such images"""
    statistics: Statistics | None = None
    """mean and standard deviation of each channel, in 0..1; None: the images are not arrays"""


class Job(NamedTuple):
    """The images, where their manifest goes and how closely they are checked."""

    source: ImageSource
    data: str
    """DATA as an absolute path, or the name of a built-in set"""
    root: str
    paths: list[str]
    """relative to the root, where they lie below it"""
    offsets: list[int]
    lengths: list[int]
    out: Path
    strict: bool
    max_pixels: int
    expected: list[int] | None
    """the checksums that the rows should have; None: not known"""

    @property
    def part(self) -> Path:
        return self.out.with_name(self.out.name + ".part")

    def head(self, measured: Statistics | None = None) -> str:
        data = self.data if self.data in BUILT_IN else root_for(self.out, self.data)
        notes: dict[str, Any] = {"data": data, "strict": self.strict, "max_pixels": self.max_pixels}
        if measured:
            notes |= {"mean": measured[0], "std": measured[1]}
        return header_lines(root_for(self.out, self.root), self.source.classes, notes)

    def label(self, row: int) -> str:
        labels = self.source.labels
        return "" if labels is None else self.source.classes[int(labels[row])]


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

    Args:
        data: whatever `open_source` takes, but a mixture; of a manifest its good rows, whose checksums are compared.
        strict: Pillow, too, has to decode each image where nvImageCodec is there.
        threads: processes that decode; None: as many as there are cores.
        max_pixels: images of more (width times height) are not decoded, and not good.
        force: replaces `out` when it is no manifest of `data`, and decodes every image again.

    Raises:
        UsageError: wrong arguments, or `out` is something else.
        DataError: no image is good.
        StorageError: `out` cannot be written.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads: expected 1 or more, got {threads}")
    if max_pixels < 1:
        raise UsageError(f"--max-pixels: expected 1 or more, got {max_pixels}")
    job = _plan(data, Path(out).expanduser(), strict, max_pixels)
    _check_out(job, force)
    about = f"{counted(len(job.source), 'image')}{among(job.source.classes)}", left_out(job.source)
    log.info("%s: %s", data, "; ".join(filter(None, about)))
    work = Work(job.part)
    try:
        if force and job.part.is_file():
            job.part.unlink()
        target = Path(os.path.realpath(job.out))
        with work.locked(f"--out {job.out}", target.with_name(glob.escape(target.name))):
            if force:
                work.clear()
            result = _index(job, work, force, threads or cores(), progress)
            work.remove()
    except OSError as e:
        raise StorageError(
            f"{job.part}: cannot be written ({e.strerror}); what it holds is kept, and the same command continues"
        ) from e
    if not result.good:
        first = result.troubles[0]
        raise DataError(
            f"{data}: none of the {result.rows} images is good, first: {first.title} "
            f"({first.what}{first.details and ': '}{first.details}); "
            f"{job.out} lists them all"
        )
    return result


def _index(job: Job, work: Work, force: bool, processes: int, progress: bool) -> Result:
    known: dict[tuple[str, str], str] = {}
    if job.out.exists() and not force:
        with open(job.out, encoding="utf-8", errors="replace", newline="\n") as f:
            known = _known_rows(job, f, job.out.name)
    kept = work.finished()
    for record in kept.values():
        known |= _known_rows(job, record.get("lines", []), job.part.name)
    lines, todo = _take_over(job, known, progress)
    began, decoder = time.monotonic(), ""
    if todo:
        if len(todo) < len(lines):
            log.info("%s: %d of %d images are known", job.out, len(lines) - len(todo), len(lines))
        decoder = _decode(job, work, max(kept, default=-1) + 1, lines, todo, processes, progress)
    seconds = time.monotonic() - began
    measured = (None if todo else _measured_before(job)) or _measure(job, lines)
    head = job.head(measured)
    if todo or not _holds(job, head, lines):
        try:
            # through a link that the user has named, so that it stays one
            write_lines(os.path.realpath(job.out), head, lines)
        except StorageError as e:
            raise StorageError(
                f"{e}; what was found is kept in {job.part}, and the same command continues"
            ) from e
    else:
        log.info("%s: complete, and no file has changed since; nothing to decode", job.out)
    return _result(job, lines, len(todo), seconds, decoder)._replace(statistics=measured)


def _measured_before(job: Job) -> Statistics | None:
    if not job.out.exists():
        return None
    with open(job.out, encoding="utf-8", errors="replace", newline="\n") as f:
        return statistics(parse_header(f.readline(), f.readline(), job.out.name))


def _measure(job: Job, lines: list[str]) -> Statistics | None:
    """Mean and standard deviation of each channel of a set of arrays, with the range that its values have."""
    fields = [line.rstrip("\n").split("\t") for line in lines]
    good = [row for row, f in enumerate(fields) if f[STATUS] == OK]
    kinds = Counter(fields[row][KIND] for row in good)
    # arrays with most of the images
    counts: Counter[int] = Counter()
    for kind, n in kinds.items():
        counts[array_channels(kind)] += n
    channels, _ = counts.most_common(1)[0] if counts else (0, 0)
    if not channels:
        return None
    source = subset(job.source, torch.tensor(good))
    source = dataclasses.replace(source, channels=channels, value_range=value_range(kinds), headers=None)
    try:
        return measure_statistics(source, DataConfig(max_pixels=job.max_pixels), MEASURED)
    except DataError as e:
        log.warning("%s: mean and standard deviation are not known: %s", job.out, e)
        return None


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
    if result.value_range:
        black, white = result.value_range[::2], result.value_range[1::2]
        each = [f"{b:g} is black and {w:g} is white" for b, w in zip(black, white, strict=True)]
        lines.append(
            ("images of more than 8 bits: " if len(each) == 1 else "channels: ")
            + ", ".join(each)
            + ", by their smallest and largest values; data.range changes that"
        )
    if result.statistics:
        mean, std = ([f"{v:g}" for v in values] for values in result.statistics)
        lines.append(f"mean {' '.join(mean)}, standard deviation {' '.join(std)} of the channels, in 0..1")
    if result.fresh:
        rate = result.fresh / max(result.seconds, 1e-9)
        lines.append(f"decoded {result.fresh} images by {result.decoder}, {rate:.0f} images/s")
        if "nvImageCodec" not in result.decoder:
            lines.append(
                "not checked without DALI: JPEG data that decoders repair silently (zeros, flipped bits, another "
                f"image's data); {install('dali-cuda13')}"
            )
    options = ""
    if result.statistics:
        channels = len(mean)
        options = f" --model.in-chans {channels}"
        if channels in (1, 3):
            # there ImageNet's are the default
            options += f" --data.mean {' '.join(mean)} --data.std {' '.join(std)}"
    return "\n".join([*lines, f"train on the good ones: extrema-fast pretrain {result.out}{options}"])


# ---- what there is --------------------------------------------------------------------------------


def _plan(data: str, out: Path, strict: bool, max_pixels: int) -> Job:
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
    is_folder = data not in BUILT_IN and os.path.isdir(where)
    root = where if is_folder else os.path.commonpath({os.path.dirname(p) for p in paths})
    prefix = root.rstrip(os.sep) + os.sep
    offsets, lengths = [-1] * len(paths), [-1] * len(paths)
    if source.spans is not None:
        lengths = source.spans[:, 1].tolist()
        offsets = np.where(source.spans[:, 1] < 0, -1, source.spans[:, 0]).tolist()
    paths = [p.removeprefix(prefix) for p in paths]
    return Job(source, where, root, paths, offsets, lengths, out, strict, max_pixels, expected)


def _check_out(job: Job, force: bool) -> None:
    """Raises UsageError for an `out` that is something else, and makes its folder."""
    out = job.out
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name the manifest, as in {out / 'manifest.tsv'}")
    if out.suffix.lower() in (*EXTENSIONS, NPY, ".tar"):
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


# ---- what is known --------------------------------------------------------------------------------


def _known_rows(job: Job, lines: Iterable[str], name: str) -> dict[tuple[str, str], str]:
    """(path, offset) -> line, of the rows in a manifest's lines that were checked at least as closely as now.

    Raises:
        UsageError: it is of other images.
    """
    known: dict[tuple[str, str], str] = {}
    given: Iterator[str] = iter(lines)
    first = next(given, "")
    if not first:
        return known
    header = parse_header(first, next(given, ""), name)
    data = header.get("data")
    there = data if data in BUILT_IN else os.path.realpath(root_folder(job.out, str(data)))
    here = job.data if job.data in BUILT_IN else os.path.realpath(job.data)
    if data is None or there != here:
        of = "other images" if data is None else there
        raise UsageError(
            f"--out {job.out}: {name} is of {of}, not of {here}; choose another --out, or --force replaces it"
        )
    if job.strict and not header.get("strict"):
        return known
    for line in given:
        fields = line.split("\t")
        if len(fields) == len(COLUMNS) and line.endswith("\n"):
            if header.get("max_pixels") == job.max_pixels or _is_within(fields, job.max_pixels):
                known[fields[PATH], fields[OFFSET]] = line
    return known


def _is_within(fields: list[str], max_pixels: int) -> bool:
    """Whether a row says the same with this limit, having been made with another."""
    try:
        pixels = int(fields[WIDTH]) * int(fields[HEIGHT])
    except ValueError:
        return False
    return pixels <= max_pixels and not fields[STATUS].startswith("too large")


def _take_over(job: Job, known: dict[tuple[str, str], str], progress: bool) -> tuple[list[str], list[int]]:
    """The line of each row that is known and unchanged, "" for the others, and the rows of these."""
    lines, todo = [], []
    # the rows of a shard have one file
    size_and_time = lru_cache(maxsize=1)(_size_and_time)
    with ImageProgress("looking for changes", len(job.paths), progress) as bar:
        for row, path in enumerate(job.source.paths):
            line = known.get((escape(job.paths[row]), str(job.offsets[row])), "")
            if line:
                size, mtime_ns = size_and_time(path)
                size = size if job.lengths[row] < 0 else job.lengths[row]
                line = _unchanged(line.split("\t"), size, mtime_ns, job, row)
                if row % 1000 == 0:
                    bar.reached(row)
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


def _unchanged(fields: list[str], size: int, mtime_ns: int, job: Job, row: int) -> str:
    """The line, with the label of today; "" when the file is not what it was."""
    # what could not be read has time 0, so it is tried again
    if fields[BYTES] != str(size) or fields[MTIME] != str(mtime_ns):
        return ""
    if job.expected is not None and fields[CRC32] != f"{job.expected[row]:08x}":
        return ""
    fields[LABEL] = escape(job.label(row))
    return "\t".join(fields)


def _holds(job: Job, head: str, lines: list[str]) -> bool:
    """Whether the manifest is there with just these lines."""
    if not job.out.exists():
        return False
    with open(job.out, encoding="utf-8", errors="replace", newline="\n") as f:
        return all(a == b for a, b in zip_longest(f, chain(head.splitlines(True), lines)))


# ---- decoding -------------------------------------------------------------------------------------


def _decode(
    job: Job, work: Work, number: int, lines: list[str], todo: list[int], processes: int, progress: bool
) -> str:
    """Fills in the lines of the rows in `todo`, keeping them in `work` from `number` on; the decoder's name."""
    files = [(job.source.paths[r], max(job.offsets[r], 0), job.lengths[r]) for r in todo]
    processes = min(processes, -(-len(files) // BATCH))
    done, bad, head = 0, 0, job.head().splitlines(True)
    waiting: list[str] = []
    kept_at = time.monotonic()

    def keep() -> None:
        nonlocal number, kept_at
        if waiting:
            work.finish(number, {"lines": head + waiting})
            waiting.clear()
            number, kept_at = number + 1, time.monotonic()

    with (
        Pool(processes, strict=job.strict, max_pixels=job.max_pixels) as pool,
        ImageProgress("decoding", len(files), progress) as bar,
    ):
        try:
            for verdicts in pool.check(files):
                for row, verdict in zip(todo[done : done + len(verdicts)], verdicts, strict=True):
                    lines[row] = _line(job, row, verdict)
                    waiting.append(lines[row])
                    bad += not lines[row].endswith(f"\t{OK}\n")
                done += len(verdicts)
                if time.monotonic() - kept_at >= KEEP_SECONDS:
                    keep()
                bar.reached(done, f"{bad} bad" if bad else "")
        finally:
            keep()
    return pool.decoder


def _line(job: Job, row: int, verdict: Verdict) -> str:
    if job.expected is not None and verdict.bytes and verdict.crc32 != job.expected[row]:
        was = f"its crc32 is {verdict.crc32:08x}, {os.path.basename(job.data)} has {job.expected[row]:08x}"
        verdict = verdict._replace(status=f"changed: {was}")
    title, path = job.source.title(row), job.source.paths[row]
    member = title.removeprefix(f"{path}:") if job.offsets[row] >= 0 else ""
    return row_line(Row(job.paths[row], member, job.offsets[row], label=job.label(row), **verdict._asdict()))


def _result(job: Job, lines: list[str], fresh: int, seconds: float, decoder: str) -> Result:
    count: Counter[str] = Counter()
    first: dict[str, tuple[int, str]] = {}
    used, kinds = set(), set()
    for row, line in enumerate(lines):
        fields = line.rstrip("\n").split("\t")
        if fields[STATUS] == OK:
            used.add(fields[LABEL])
            kinds.add(fields[KIND])
            continue
        what, _, details = fields[STATUS].partition(": ")
        count[what] += 1
        first.setdefault(what, (row, details))
    troubles = [
        Trouble(what, n, escape(job.source.title(first[what][0])), first[what][1])
        for what, n in count.most_common()
    ]
    bare = [c for c in job.source.classes if escape(c) not in used]
    good = len(lines) - count.total()
    return Result(str(job.out), len(lines), good, bare, fresh, seconds, decoder, troubles, value_range(kinds))
