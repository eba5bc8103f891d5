"""`extrema-fast index`: every image looked at once, good and bad ones written down in a manifest.

Files are decoded by processes of their own (`image_check.py`). Each finished row goes to a file beside the
manifest, `OUT.part`, and from there into the manifest, in the order of the source, when all are done. So a run
that was stopped at any moment goes on where it was, and a manifest that is made again decodes only files whose
size or time of change is another, or that could not be read.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import MAX_PIXELS
from ..data.manifest import Row, escape, is_manifest, manifest_source, read_manifest, row_line
from ..data.sources import BUILT_IN, EXTENSIONS, open_source
from ..distributed import cores
from ..errors import DataError, Preempted, StorageError, UsageError
from .check_pool import BATCH, Pool
from .image_check import OK, Verdict
from .index_rows import LABEL, STATUS, Job, append, finish, holds, known_rows, open_part, take_over
from .progress import ImageProgress

log = logging.getLogger(__name__)

# what is younger is lost when the machine, not only the program, stops
_FSYNC_SECONDS = 5.0


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
    known = {} if force else known_rows(job, job.out)
    part = open_part(job, force)
    try:
        known |= known_rows(job, job.part)
        lines, todo = take_over(job, known)
        began, decoder = time.monotonic(), ""
        if todo:
            if len(todo) < len(lines):
                log.info("%s: %d of %d images are known", job.out, len(lines) - len(todo), len(lines))
            append(part, job.head(), job)
            decoder = _look(job, part, lines, todo, threads or cores(), progress)
        seconds = time.monotonic() - began
        if todo or not holds(job, lines):
            finish(job, lines)
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
    offsets = [-1] * len(paths)
    if source.spans is not None:
        offsets = np.where(source.spans[:, 1] < 0, -1, source.spans[:, 0]).tolist()
    paths = [p.removeprefix(prefix) for p in paths]
    labels = None if source.labels is None else source.labels.tolist()
    return Job(source, where, root, paths, offsets, labels, out, strict, max_pixels, expected)


def _check_out(job: Job, force: bool) -> None:
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


# ---- looking --------------------------------------------------------------------------------------


def _look(job: Job, part: io.FileIO, lines: list[str], todo: list[int], threads: int, progress: bool) -> str:
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
                append(part, "".join(new), job)
                for row, line in zip(rows, new, strict=True):
                    lines[row] = line
                done += len(new)
                bad += sum(not line.endswith(f"\t{OK}\n") for line in new)
                if time.monotonic() - synced > _FSYNC_SECONDS:
                    append(part, "", job, sync=True)
                    synced = time.monotonic()
                bar.reached(done, f"{bad} bad" if bad else "")
            return pool.decoder
    except KeyboardInterrupt:
        raise Preempted(f"stopped; {done} of {len(files)} images looked at are kept in {job.part}") from None


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
    used = set()
    for row, line in enumerate(lines):
        fields = line.rstrip("\n").split("\t")
        if fields[STATUS] == OK:
            used.add(fields[LABEL])
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
    return Result(str(job.out), len(lines), good, bare, fresh, seconds, decoder, troubles)
