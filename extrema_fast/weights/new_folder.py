"""A folder that appears whole or not at all, and in place of nothing but an earlier import or export."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from .. import files
from ..errors import StorageError, UsageError
from .files import FORMAT, own_part

# what a folder made by `import` or `export` may hold; with anything else --force does not replace it
OWN_FILES = (
    "config.json", "README.md", "preprocessor_config.json", "teacher.safetensors", "student.safetensors",
    "model.safetensors", "model.onnx", "model.onnx.data", "model.pt2", "model.ts",
)  # fmt: skip


def new_folder(out: str | Path, force: bool = False) -> AbstractContextManager[Path]:
    """A folder for weights, whole or not there (`files.new_folder`).

    force   replace an earlier import or export; anything else is never replaced
    raises  UsageError when `out` exists (without force) or holds other things, StorageError when it cannot be
            written
    """
    return files.new_folder(Path(out), partial(_check_free, force=force))


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
        meta = own_part(files.read_json(out / "config.json"))
    except UsageError:
        meta = {}
    if meta.get("format") != FORMAT or not ({"source", "export"} & meta.keys()):
        raise UsageError(f"{out}: --force replaces an import or an export only, and this is neither")
