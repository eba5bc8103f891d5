"""The folder of a packed set: whose it is, what it was made with, and who is writing into it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..data.image_source import ImageSource
from ..errors import UsageError
from ..files import write_file
from .pack_shard import WORK

log = logging.getLogger(__name__)

FORMAT = "extrema-fast pack 1"
ABOUT = "pack.json"


def refuse_overlap(out: Path, source: ImageSource) -> None:
    inside = os.path.realpath(out) + os.sep
    folders = {os.path.dirname(p) for p in source.paths}
    if any((os.path.realpath(folder) + os.sep).startswith(inside) for folder in folders):
        raise UsageError(f"{out}: the images are in there; give another folder for the packed set")


def prepare(out: Path, about: dict[str, Any], force: bool) -> bool:
    """Whether the set is there already; UsageError for a folder that holds anything else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder for the shards")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if force:
        aside = _aside(out)
        with locked(out) if (out / WORK).is_dir() else nullcontext():
            out.rename(aside)
        log.info("%s: what was there is now in %s", out, aside)
        return False
    return check_same(out, about)


def _aside(out: Path) -> Path:
    number, out = 1, Path(os.path.abspath(out))
    while (place := out.with_name(f"{out.name}.before{number if number > 1 else ''}")).exists():
        number += 1
    return place


def check_same(out: Path, about: dict[str, Any]) -> bool:
    """Whether a finished set of this source and these settings is there; UsageError when it is of others."""
    old = read_about(out)
    if old is None:
        if {p.name for p in out.iterdir()} - {WORK}:
            raise UsageError(
                f"{out}: holds other files; give a new folder, or --force to move them to {_aside(out).name}"
            )
        return False
    changes = [f"{k} {old.get(k)} -> {v}" for k, v in about.items() if old.get(k) != v and k != "source"]
    if old.get("source") != about["source"]:
        changes.append("the images (names, sizes or labels)")
    if changes:
        state = "finished" if old.get("complete") else "unfinished"
        raise UsageError(
            f"{out}: holds a packed set ({state}) that differs: {'; '.join(changes)}; give another folder, or --force "
            f"to move it to {_aside(out).name}"
        )
    if not old.get("complete"):
        return False
    broken = [
        n for n, size in old["files"].items() if not (out / n).is_file() or (out / n).stat().st_size != size
    ]
    if broken:
        raise UsageError(
            f"{out}: the packed set was finished, but {len(broken)} of its files are gone or changed, first: "
            f"{broken[0]}; --force packs again"
        )
    return True


def read_about(out: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and about.get("format") == FORMAT else None


def begin(out: Path, about: dict[str, Any], pillow: str) -> None:
    before = (read_about(out) or {}).get("pillow", pillow)
    if before != pillow:
        log.warning("%s: begun with Pillow %s, goes on with %s: bytes may differ", out, before, pillow)
    write_file(out / ABOUT, as_json({**about, "pillow": pillow, "complete": False}))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from packing into the same folder."""
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another process is packing into it; wait for it to end") from None
        except OSError as e:
            log.warning("%s: cannot be locked (%s); start no second pack of it", out, e.strerror)
        yield
    finally:
        os.close(lock)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"
