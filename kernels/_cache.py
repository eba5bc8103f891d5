"""What was measured on this machine's GPU, kept in the user's cache folder: one JSON file per key.

    $XDG_CACHE_HOME/extrema_fast/gpu/HASH.json      {"key": {...}, "value": {...}}

A key names the GPU, its driver, the versions of CUDA, torch, Triton and this package, the op's code and what was
measured. Files of other GPUs or versions are left alone and not used; one that cannot be read counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ._spec import spec

Key = dict[str, Any]


def folder() -> Path:
    """`$XDG_CACHE_HOME/extrema_fast/gpu`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "extrema_fast" / "gpu"


@functools.cache
def environment(device: str) -> Key:
    """The part of a key that every measurement on a GPU (`cuda:0`) shares."""
    gpu = torch.cuda.get_device_properties(device)
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    driver = re.search(r"\d+\.\d+(\.\d+)?", text)
    return {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver[0] if driver else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "package": _version("extrema-fast"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _source(op: str) -> str:
    """Digest of an op's code: faster kernels, or settings of other names, are measured again."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (here / "_launch.py", *sorted((here / op).glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def key(device: str, op: str, **what: Any) -> Key:
    """The key of a measurement of an op (a folder of kernels)."""
    return {**environment(device), "op": op, "version": spec(op).version, "source": _source(op), **what}


def file(key: Key) -> Path:
    """Where the measurement of a key is kept."""
    text = json.dumps(key, sort_keys=True)
    return folder() / f"{key['op']}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def text(key: Key, value: Key) -> str:
    """The content of `file(key)`."""
    return json.dumps({"key": key, "value": value}, indent=1) + "\n"


def find(key: Key) -> Key | None:
    """The value kept for a key; None when there is none."""
    found = _read(file(key))
    return found[1] if found and found[0] == key else None


def entries(device: str, op: str) -> list[tuple[Key, Key]]:
    """(key, value) of everything kept of an op for this GPU and these versions."""
    wanted = key(device, op)
    try:
        files = sorted(folder().glob(f"{op}-*.json"))
    except OSError:
        return []
    read = [found for found in map(_read, files) if found]
    return [(k, v) for k, v in read if all(k.get(name) == x for name, x in wanted.items())]


def _read(path: Path) -> tuple[Key, Key] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        key, value = content["key"], content["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, value) if isinstance(key, dict) and isinstance(value, dict) else None
