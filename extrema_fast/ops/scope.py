"""Named ranges around the components of the method, for `extrema-fast profile`; no-ops unless profiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

# what the names begin with in a trace
PREFIX = "extrema:"
_recording = False
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def recording() -> Iterator[None]:
    """Switches the ranges on for as long as the block lasts."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def scope(name: str) -> AbstractContextManager[object]:
    """A range of a profile: `name` is a component, or `student/` or `teacher/` and a component.

    Compiled code has none: a range inside would cut its graph.
    """
    if torch.compiler.is_compiling() or not _recording:
        return nullcontext()
    return record_function(PREFIX + name)


def scoped(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every call of the function is a range, as `scope`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            with scope(name):
                return function(*args, **kwargs)

        return inner

    return decorate
