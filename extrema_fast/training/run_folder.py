"""The run folder: marker, lock, status, environment, moving an old run aside.

    config.json  env.json  status.json  run.lock  log.jsonl  checkpoints/  latest  weights/  reports/

Only folders that carry our marker are ever written to or moved.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_atomically
from ..errors import StorageError, UsageError

log = logging.getLogger(__name__)

MARKER = ".extrema-fast-run"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def check(path: Path) -> bool:
    """True if `path` is a run folder of ours, False if it is free; reads only.

    raises UsageError for a file, or a folder with other content
    """
    if (path / MARKER).is_file():
        return True
    if path.is_dir() and not any(path.iterdir()):
        return False
    if path.exists() or path.is_symlink():
        kind = "a folder with other content" if path.is_dir() else "not a folder"
        raise UsageError(f"--out {path}: is {kind}, not a run; nothing was touched, choose another --out")
    return False


class RunFolder:
    """A run folder held by this process: created or taken over, locked until `close`.

    raises UsageError when another job holds it or the path is not a run, StorageError when it cannot be
    written
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._status_time = 0.0
        if check(self.path) and overwrite:
            self._move_aside()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # its existence is what counts, so that there is no moment with a half-written one
            (self.path / MARKER).touch()
            self._acquire()
        except OSError as error:
            raise StorageError(f"--out {self.path}: cannot be written ({error})") from None
        self.attempt = int(read_json(self.path / "env.json").get("attempt", 0)) + 1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            (self.path / "run.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _acquire(self) -> None:
        # flock: the kernel drops it with the process, so a lock left by kill -9 is free at once
        path = self.path / "run.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UsageError(self._held()) from None
            except OSError:  # a file system without flock: the recorded process decides
                if self._alive(read_json(path)):
                    os.close(fd)
                    raise UsageError(self._held()) from None
            # the holder may have removed the file between our open and our lock
            if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
                break
            os.close(fd)
        if os.fstat(fd).st_size:
            log.info("%s: a lock left by %s is taken over", self.path, self._owner(read_json(path)))
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        self._lock = fd

    @staticmethod
    def _owner(lock: dict[str, Any]) -> str:
        return f"process {lock.get('pid', '?')} on {lock.get('host', '?')}"

    def _held(self) -> str:
        owner = self._owner(read_json(self.path / "run.lock"))
        return f"--out {self.path}: another job is running here ({owner}); stop it, or choose another --out"

    @staticmethod
    def _alive(lock: dict[str, Any]) -> bool:
        if lock.get("host") != socket.gethostname():
            return bool(lock)
        try:
            os.kill(int(lock["pid"]), 0)
        except (ProcessLookupError, KeyError, ValueError):
            return False
        except PermissionError:
            return True
        return int(lock["pid"]) != os.getpid()

    def _move_aside(self) -> None:
        self._acquire()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.close()
        os.rename(self.path, aside)
        log.info("--overwrite: the old run is now %s", aside)

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replaces a JSON file of the folder."""
        write_atomically(self.path / name, json.dumps(data, indent=1) + "\n")

    def status(self, state: str, step: int, total: int, reason: str = "") -> None:
        """status.json: `running`, `complete`, `preempted` or `failed`; `running` at most once a second."""
        now = time.monotonic()
        if state == "running" and now - self._status_time < 1 and not reason:
            return
        self._status_time = now
        try:
            self.write_json(
                "status.json", {"state": state, "step": step, "total_steps": total, "reason": reason}
            )
        except OSError as error:
            log.warning("status.json could not be written (%s)", error)

    def write_env(self, device: torch.device, world: int, **more: Any) -> None:
        """env.json: what ran, where, with which versions."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        env = {
            "attempt": self.attempt,
            "argv": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "versions": versions(),
            "device": str(device),
            "gpu": gpu,
            "threads": torch.get_num_threads(),
            "world_size": world,
        }
        self.write_json("env.json", env | more)


def versions() -> dict[str, str]:
    """Installed versions of what a result can depend on."""
    from importlib import metadata

    names = ("torch", "numpy", "safetensors", "triton", "pillow", "scikit-image", "nvidia-dali-cuda130",
             "nvidia-dali-cuda120", "xformers")  # fmt: skip
    found = {}
    for name in ("extrema-fast", *names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
