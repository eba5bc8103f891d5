"""Atomic writes of files and folders, locks between processes, and robust reading of JSON and logs.

Nothing here follows a symbolic link when it writes or removes: a link is replaced, removed or rejected, and its target
stays unchanged.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import LostProcessError, StorageError, UsageError, is_storage_error, one_line

log = logging.getLogger(__name__)

# the descriptions this program reads are a few kB
MAX_JSON = 16 << 20
# of a file that is read whole
MAX_BYTES = 1 << 31
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_NEW, _OLD = ".tmp-", ".replaced-"


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path`, whole and on disk, when the block ends well.

    Raises:
        OSError: it cannot be written; an old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_NEW}{path.name}-{os.getpid()}")
    try:
        with open_new(temporary) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_torn(name: str) -> bool:
    """Whether a file of this name is what a process that was killed in `new_file` has left."""
    return bool(re.fullmatch(rf"{re.escape(_NEW)}.+-\d+", name))


def open_new(path: Path, buffering: int = -1) -> BinaryIO:
    """An empty file to write, in the place of whatever was there; raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "xb", buffering=buffering)


def open_to_append(path: Path) -> BinaryIO:
    """A file to append to and to read, unbuffered; raises OSError, for a link too."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return open(fd, "a+b", buffering=0)


def remove(path: Path) -> bool:
    """Removes a file, a link or a folder with all that is in it; whether it is gone. A failure is only logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", path, error.strerror or error)
        return False
    return True


def no_links(folder: Path, names: Iterable[str], what: str) -> None:
    """Makes sure that none of these entries of a folder is a symbolic link, before anything is written there.

    Args:
        what: the folder, as the error names it, e.g. `--out runs/x`.

    Raises:
        UsageError: names the link.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise UsageError(
                f"{what}: {name} is a symbolic link, which would be written or removed through; nothing was touched, "
                f"put a real file or folder there, or link {folder.name} as a whole"
            )


def write_file(path: Path, data: str | bytes) -> None:
    """As `new_file`, with the whole content; text is UTF-8, undecodable file names in it as they were."""
    with new_file(path) as f:
        f.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_plain(path: str | os.PathLike[str]) -> os.stat_result:
    """What a file is, before it is opened: a named pipe would wait for ever, a device has no end.

    Raises:
        OSError: it is not there, or no plain file; `strerror` says what it is.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise OSError(errno.EINVAL, f"not a plain file, but {kind}", str(path))
    return about


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """A plain file, open for reading; OSError as of `check_plain`."""
    check_plain(path)
    # another thing may have taken its name since
    f = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return f


def check_size(size: int, path: str | os.PathLike[str]) -> None:
    """OSError for a size in bytes that is not read whole, as of a sparse file."""
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes are more than the {MAX_BYTES} that are read", str(path))


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a plain file; OSError as of `check_plain` and `check_size`."""
    with open_plain(path) as f, io.TextIOWrapper(f, encoding, errors) as text:
        check_size(os.fstat(f.fileno()).st_size, path)
        return text.read()


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        default: returned when the file is missing, damaged, too large or no object; None: an error then.

    Raises:
        UsageError: names the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"{size} bytes, at most {MAX_JSON} are read")
        data = json.loads(read_text(path))
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {type(data).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        if default is not None:
            return default
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise UsageError(f"{path}: not a JSON description ({reason})") from None
    return data


def fits(value: Any, shape: Any) -> bool:
    """Whether plain data, as a file held it, has a shape.

    Args:
        shape: a type (`int`: 64 bits, `float`: any finite number, both without `bool`); a tuple of alternatives; a
            list of one shape (any number of such items) or of several (one item each); a dict of the keys that must be
            there, or may be where their name ends in `?`.
    """
    if isinstance(shape, tuple):
        return any(fits(value, s) for s in shape)
    if isinstance(shape, list):
        items = shape * len(value) if isinstance(value, list) and len(shape) == 1 else shape
        return isinstance(value, list) and len(value) == len(items) and all(map(fits, value, items))
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[key], s) if (key := name.removesuffix("?")) in value else name.endswith("?")
            for name, s in shape.items()
        )
    if shape is None:
        return value is None
    if shape is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if shape is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is shape


# a record: what is not named is a number, or null where it was not finite
_NAMED = ("kind", "step", "attempt", "text")
_RECORD = {"kind": str, "step": int, "attempt?": int, "text?": str}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, oldest first; lines cut off by a crash are left out."""
    if not path.is_file():
        return []
    return list(parse_records(path.read_text(encoding="utf-8", errors="replace").splitlines()))


def parse_records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The records that lines of a log.jsonl hold; other lines are left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if fits(record, _RECORD):
            yield {k: v for k, v in record.items() if k in _NAMED or fits(v, (float, None))}


def history(path: Path, kind: str, up_to: int) -> list[dict[str, Any]]:
    """Records of one kind up to a step, ascending; the last one of a step that was repeated."""
    found = {
        r["step"]: r for r in read_log(path) if r.get("kind") == kind and r.get("step", math.inf) <= up_to
    }
    return [found[step] for step in sorted(found)]


# ---- whole folders --------------------------------------------------------------------------------


@contextmanager
def new_folder(out: Path, check: Callable[[Path], None] = lambda out: None) -> Iterator[Path]:
    """A temporary folder next to `out` that replaces it when the block ends well, and disappears otherwise.

    What killed processes left next to `out` is removed, or put back where `out` itself had been moved away.

    Args:
        check: raises when `out` must not be replaced; called before the block and after it.

    Raises:
        StorageError: it cannot be written; an old folder is then untouched.
    """
    new = begin_folder(out, check)
    with filled_folder(new, out, check):
        yield new


def begin_folder(out: Path, check: Callable[[Path], None] = lambda out: None) -> Path:
    """The first half of `new_folder`: the temporary folder, for others to write into as well."""
    try:
        # not through a link at its end, which is replaced
        out = out.parent.resolve() / out.name
        _tidy(out)
        check(out)
        new = out.with_name(f"{_NEW}{out.name}-{os.getpid()}")
        new.mkdir(parents=True)
    # before Python 3.13 a loop of links is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{out}: cannot be written ({error})") from None
    return new


@contextmanager
def filled_folder(new: Path, out: Path, check: Callable[[Path], None] = lambda out: None) -> Iterator[None]:
    """The second half of `new_folder`: the block fills what `begin_folder` has made."""
    out = new.with_name(out.name)
    old = out.with_name(f"{_OLD}{out.name}-{os.getpid()}")
    try:
        yield
        for path in (*new.iterdir(), new):
            sync(path)
        # a long write: the place may have been taken since
        check(out)
        if os.path.lexists(out):
            os.rename(out, old)
        os.rename(new, out)
        try:
            sync(out.parent)
        except OSError as error:
            # it is there and whole
            log.warning("%s: written, but may not outlast a power failure (%s)", out, one_line(error))
    except Exception as error:
        # libraries have errors of their own for a full disk
        if is_storage_error(error):
            raise StorageError(f"{out}: cannot be written ({one_line(error)})") from None
        raise
    finally:
        if os.path.lexists(old) and not os.path.lexists(out):
            os.rename(old, out)
        for path in (new, old):
            remove(path)


def _tidy(out: Path) -> None:
    names = re.compile(rf"({re.escape(_NEW)}|{re.escape(_OLD)}){re.escape(out.name)}-(\d+)")
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        match = names.fullmatch(path.name)
        if match and not _runs(int(match[2])):
            if match[1] == _OLD and not os.path.lexists(out):
                os.rename(path, out)
            else:
                remove(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ---- locks ----------------------------------------------------------------------------------------


# how often the holder of a lock touches its file, and after how long without that, on another machine, it is gone
BEAT_S = 5.0
GONE_S = 4 * BEAT_S


@contextmanager
def lock(path: Path, name: str) -> Iterator[None]:
    """Holds the lock file `path`, which exists as long as the lock is held.

    Many file systems that machines share lock within each machine alone, or not at all. So the holder touches the file,
    and one that another machine has left is watched for `GONE_S` before it is taken over. A process that was suspended,
    or cut off from the file system, for so long ends when it finds another one in the file (exit code 6).

    Args:
        name: what is locked, as the error names it, e.g. `--out runs/x`.

    Raises:
        UsageError: another process holds it.
        OSError: it cannot be written.
    """
    # the kernel drops the lock with the process, so one left by kill -9 is free at once
    while True:
        with open_to_append(path) as f:
            known = read_json(path, {})
            if not _take(f, path) or _beats_elsewhere(path, known, name):
                raise UsageError(
                    f"{name}: another job is running here ({_owner(known)}); stop it, or write to another place"
                )
            # the holder may have removed the file between our open and our lock
            if not _is_same(path, f):
                continue
            if path.stat().st_size:
                log.info("%s: a lock left by %s is taken over", name, _owner(read_json(path, {})))
            f.truncate(0)
            mine = json.dumps(_here() | {"pid": os.getpid(), "beats": BEAT_S}).encode()
            f.write(mine)
            left = threading.Event()
            thread = threading.Thread(target=_beat, args=(f, mine, left, name), name="lock", daemon=True)
            thread.start()
            try:
                yield
            finally:
                left.set()
                # it may hang in a file system that is gone
                thread.join(BEAT_S)
                # with its folder it may have been removed, and made again by another process; or taken over
                if _is_same(path, f) and _content(f) == mine:
                    remove(path)
            return


def _beat(f: BinaryIO, mine: bytes, left: threading.Event, name: str) -> None:
    while not left.wait(BEAT_S):
        # a file system that is away for a moment; a file that has been closed
        with suppress(OSError, ValueError):
            if _content(f) not in (b"", mine):
                log.error(
                    "extrema-fast: error: %s: another job took it over while this process was stopped or cut off from "
                    "the disk; this one writes nothing more",
                    name,
                )
                os._exit(LostProcessError.exit_code)
            os.utime(f.fileno())


def _content(f: BinaryIO) -> bytes:
    return os.pread(f.fileno(), 4096, 0)


def _here() -> dict[str, str]:
    """This machine. Pods of a job bear one name on all of them, and number their processes alike."""
    found = {"host": socket.gethostname()}
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["system"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return found


def _is_here(known: dict[str, Any]) -> bool:
    # an older version knows the name alone
    return "host" in known and all(known.get(k, v) == v for k, v in _here().items())


def _beats_elsewhere(path: Path, known: dict[str, Any], name: str) -> bool:
    """Whether the file is touched, while a process of another machine stands in it; waits for that."""
    if not fits(known, {"host": str, "beats": float}) or _is_here(known):
        return False
    log.info("%s: a lock of %s; it is free if that gives no sign within %g s", name, _owner(known), GONE_S)
    first, end = _touched(path), time.monotonic() + GONE_S
    while time.monotonic() < end:
        time.sleep(min(0.5, GONE_S / 10))
        if _touched(path) != first:
            return path.exists()
    return False


def _touched(path: Path) -> int | None:
    """When a file was written or touched, by its own machine's clock; None: it is gone."""
    try:
        # network file systems look again only when a file is opened
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_mtime_ns
    except OSError:
        return None


def holder(path: Path) -> tuple[bool | None, str]:
    """Whether a process holds the lock file `path`, and which; nothing is written.

    Returns:
        True, False, or None where that cannot be told: it was taken on another machine; and `process 12 on host`.
    """
    try:
        with open_plain(path) as f:
            known = read_json(path, {})
            local = known.get("host") == socket.gethostname()
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, _owner(known)
            except OSError:
                return (_held(known) if local else None), _owner(known)
            return (None if known and not local else False), _owner(known)
    except OSError:
        return False, "no process"


def _take(f: BinaryIO, path: Path) -> bool:
    # `holder` has one that nobody holds, for a moment
    for wait in (0.02, 0.0):
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
        # a file system without flock: the recorded process decides
        except OSError:
            return not _held(read_json(path, {}))
    return False


def _is_same(path: Path, f: BinaryIO) -> bool:
    return path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat())


def _owner(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _held(holder: dict[str, Any]) -> bool:
    if not _is_here(holder):
        # without beats it is of an older version
        return bool(holder) and "beats" not in holder
    try:
        pid = int(holder["pid"])
    except (KeyError, ValueError):
        return False
    return pid != os.getpid() and _runs(pid)
