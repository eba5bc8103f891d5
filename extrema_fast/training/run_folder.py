"""The run folder: its marker, lock and status, and moving an old run aside.

    config.json  env.json  status.json  run.lock  log.jsonl  checkpoints/  latest  weights/  reports/  trackers/
    debug/

Only folders that hold the marker are ever written to or moved.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import StorageError, UsageError
from ..files import lock, no_links, read_json, write_file

log = logging.getLogger(__name__)

MARKER = ".extrema-fast-run"
LOCK = "run.lock"
# status.json; more may stand in it
STATUS = {"state?": str, "step?": int, "total_steps?": int, "reason?": (str, None), "time?": str}
# what is appended to, or holds what is replaced and removed; any other file is replaced as a whole
_NOT_LINKS = (
    MARKER,
    LOCK,
    "log.jsonl",
    "checkpoints",
    "weights",
    "reports",
    "tensorboard",
    "trackers",
    "debug",
)


def check(path: Path) -> bool:
    """True if `path` is a run folder, False if it is free; UsageError for a file, or a folder of other content."""
    if (path / MARKER).is_file():
        return True
    if path.is_dir() and not any(path.iterdir()):
        return False
    if path.exists() or path.is_symlink():
        kind = "a folder with other content" if path.is_dir() else "not a folder"
        raise UsageError(f"--out {path}: is {kind}, not a run; nothing was touched, choose another --out")
    return False


class RunFolder:
    """A run folder created or continued by this process; locked until the context is left.

    Args:
        overwrite: first moves the run that is there aside.

    Raises:
        UsageError: another job holds it, or the path is not a run.
        StorageError: it cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._held = ExitStack()
        # time before which `running` is not written, and the reason it was written with
        self._again, self._reason = 0.0, ""
        no_links(self.path, _NOT_LINKS, f"--out {self.path}")
        if check(self.path) and overwrite:
            self._move_aside()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # its existence is what counts, so that there is no moment with a half-written one
            (self.path / MARKER).touch()
            self._held.enter_context(self._lock())
        except OSError as error:
            raise StorageError(f"--out {self.path}: cannot be written ({error})") from None
        self.attempt = int(read_json(self.path / "env.json", {}).get("attempt", 0)) + 1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _lock(self) -> AbstractContextManager[None]:
        return lock(self.path / LOCK, f"--out {self.path}")

    def _move_aside(self) -> None:
        number = 1
        with self._lock():
            while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
                number += 1
        os.rename(self.path, aside)
        log.info("--overwrite: the old run is now %s", aside)

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replaces a JSON file of the folder."""
        write_file(self.path / name, json.dumps(data, indent=1) + "\n")

    def status(self, state: str, step: int, total: int, reason: str = "", code: int | None = None) -> None:
        """status.json: `running`, `complete`, `preempted` or `failed`.

        With the same reason `running` is written at most once a second, and takes at most 2 % of the time, since steps
        wait for the disk.

        Args:
            code: that the run ends with; torchrun does not pass it on.
        """
        began = time.monotonic()
        if state == "running" and reason == self._reason and began < self._again:
            return
        try:
            values = {"state": state, "step": step, "total_steps": total, "reason": reason, "time": utc_now()}
            self.write_json("status.json", values | {"exit_code": code})
        except OSError as error:
            log.warning("status.json could not be written (%s)", error)
        now = time.monotonic()
        self._again, self._reason = now + max(1.0, 50 * (now - began)), reason


def utc_now() -> str:
    """`2026-01-31T12:00:00+00:00`."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what a result can depend on."""
    names = "extrema-fast torch numpy safetensors triton pillow scikit-image"
    found = {}
    for name in (*names.split(), "nvidia-dali-cuda130", "nvidia-dali-cuda120", "xformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
