"""A folder that appears whole or not at all, and in place of nothing but an earlier import or export."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic import sync
from ..errors import StorageError, UsageError
from .files import FORMAT, own_part
from .safe_files import read_json

# what a folder made by `import` or `export` may hold; with anything else --force does not replace it
OWN_FILES = (
    "config.json", "README.md", "preprocessor_config.json", "teacher.safetensors", "student.safetensors",
    "model.safetensors", "model.onnx", "model.onnx.data", "model.pt2", "model.ts",
)  # fmt: skip


@contextmanager
def new_folder(out: str | Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and disappears otherwise.

    force   replace an earlier import or export; anything else is never replaced
    raises  UsageError when `out` exists (without force) or holds other things, StorageError when it cannot be
            written
    """
    out = Path(out)
    try:
        _tidy(out.resolve())
        check_free(out, force)
        out = out.resolve()
        new, old = (out.with_name(f"{prefix}{out.name}-{os.getpid()}") for prefix in (_NEW, _OLD))
        new.mkdir(parents=True)
    # before Python 3.13 a loop of links is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{out}: cannot be written ({error})") from None
    try:
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        # a long write: the place may have been taken since
        check_free(out, force)
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
        sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error})") from None
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


_NEW, _OLD = ".tmp-", ".replaced-"


def _tidy(out: Path) -> None:
    """Ends what a killed process left beside `out`: half-written folders go, one just moved aside comes back."""
    names = re.compile(rf"(\.tmp-|\.replaced-){re.escape(out.name)}-(\d+)")
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        match = names.fullmatch(path.name)
        if match and not _runs(int(match[2])):
            if match[1] == _OLD and not out.exists():
                os.rename(path, out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def check_free(out: Path, force: bool = False) -> None:
    """raises UsageError unless `out` is free (or empty), or an earlier import or export that `force` replaces."""
    try:
        _check_free(out, force)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error})") from None


def _check_free(out: Path, force: bool) -> None:
    if out.is_symlink():
        raise UsageError(f"{out}: is a symbolic link; name the folder itself, or another one")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder; choose another one")
    inside = sorted(p.name for p in out.iterdir())
    if not inside:
        return
    if not force:
        raise UsageError(f"{out}: exists and is not empty; choose another folder, or --force to replace it")
    foreign = [name for name in inside if name not in OWN_FILES or not (out / name).is_file()]
    if foreign:
        raise UsageError(f"{out}: --force replaces an import or an export only, and here is {foreign[0]}")
    try:
        meta = own_part(read_json(out / "config.json"))
    except UsageError:
        meta = {}
    if meta.get("format") != FORMAT or not ({"source", "export"} & meta.keys()):
        raise UsageError(f"{out}: --force replaces an import or an export only, and this is neither")
