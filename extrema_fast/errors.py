"""Errors that a user can fix, each with the exit code of the command line."""

from __future__ import annotations

import errno
import os
import re
import shlex
from importlib import metadata
from typing import Any

# characters of a message
LONGEST = 3000


class ExtremaError(Exception):
    """Base class of the errors below.

    Attributes:
        exit_code: exit code of the command line.
        of_all: whether all processes of the run raise it, so that only the first has to report it.
    """

    exit_code = 1
    of_all = False

    def __str__(self) -> str:
        # a damaged file may put anything into a message; what to do stands at its end
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 600]} [...] {text[-500:]}"


class UsageError(ExtremaError, ValueError):
    """An invalid value, option, file or combination that the user can correct (exit code 2)."""

    exit_code = 2


class UnknownArgumentError(UsageError, TypeError):
    """A keyword that a function does not accept (exit code 2); also a TypeError, which callers such as timm expect."""


class OutOfMemoryError(UsageError):
    """A step needs more memory than is available (exit code 2); the message gives the sizes and remedies."""


class NonFiniteError(ExtremaError):
    """Non-finite values in weights, or in too many steps in a row (exit code 3)."""

    exit_code = 3


class DataError(ExtremaError):
    """Images that cannot be read (exit code 4)."""

    exit_code = 4


class StorageError(ExtremaError):
    """A file that cannot be written, or a checkpoint that cannot be read (exit code 5).

    Attributes:
        result: the data that could not be written, if it was expensive to compute; else None.
    """

    exit_code = 5
    result: Any = None


class LostProcessError(ExtremaError):
    """Another process of the run has exited or does not respond, or this one is stuck (exit code 6)."""

    exit_code = 6


class Preempted(ExtremaError):
    """Stopped by a signal after saving a checkpoint; the same command continues the run (exit code 75)."""

    exit_code = 75


def counted(n: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 classes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{n} {noun}{'' if n == 1 else plural}"


def one_line(error: BaseException, length: int = 200) -> str:
    """An exception's text on one line of at most `length` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor, or cannot be encoded, as `\\x1b` and the like.

    File names come from strangers, and may hold any byte.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    return ascii(c)[1:-1]


def install(extra: str) -> str:
    """The command that installs what an extra of this project brings: the packages by their own names.

    It is right for a checkout and for an installation from git alike, wherever it is run.
    """
    try:
        lines = metadata.requires("extrema-fast") or []
    except metadata.PackageNotFoundError:
        # run from its folder without being installed
        lines = []
    mark = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    packages = [line.partition(";")[0].strip() for line in lines if mark.search(line)]
    return (
        f"pip install {shlex.join(packages)}" if packages else f'pip install -e ".[{extra}]" in the checkout'
    )


def cannot_import(package: str, error: Exception, extra: str) -> str:
    """Why an optional package cannot be imported, and what helps; `extra` of this project brings it."""
    remedy = install(extra)
    if "torchvision::" in str(error) or "custom C++ ops" in str(error):
        remedy = "torchvision was built for another torch; install both from the same index"
    return f"{package} cannot be imported ({one_line(error)}); {remedy}"


# torch and CUDA; torch on a CPU; DALI and its decoders
_NO_MEMORY = (
    *("out of memory", "can't allocate", "cannot allocate memory", "bad_alloc"),
    *("cuda allocation failed", "allocator_failure", "alloc_failed"),
)


def of_storage(error: OSError) -> ExtremaError:
    """An error of the system in a line: a UsageError for a path that is not what it should be, else a StorageError."""
    # a path that somebody gave; what is computed here exists
    wrong = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return (UsageError if wrong else StorageError)(f"{name}{error.strerror or error}")


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception says that a file cannot be written; libraries in C++ and Rust have their own."""
    if isinstance(error, OSError):
        return True
    text = str(error)
    # safetensors; torch
    known = "I/O error" in text or "PytorchStreamWriter failed writing" in text
    return known or any(os.strerror(n) in text for n in _STORAGE)


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted, on a GPU or a CPU."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)
