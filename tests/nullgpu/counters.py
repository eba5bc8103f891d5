"""Counters of the null GPU in this process."""

from __future__ import annotations

import ctypes

_library = ctypes.CDLL(None)


def active() -> bool:
    """Returns whether this process runs on the null GPU."""
    return hasattr(_library, "null_reset")


def reset() -> None:
    """Sets all counters to 0."""
    _library.null_reset()


def counts() -> dict[str, int]:
    """Returns every counter since `reset`; nullgpu.c says what each counts."""
    name, get = _library.null_counter, _library.null_get
    name.restype, get.restype = ctypes.c_char_p, ctypes.c_long
    found, i = {}, 0
    while (text := name(i)) is not None:
        found[text.decode()] = get(text)
        i += 1
    return found


def kernels() -> dict[str, int]:
    """Returns how often each kernel was launched since `reset`, the most frequent first; Triton's as `triton:NAME`."""
    kernel = _library.null_kernel
    kernel.restype = ctypes.c_char_p
    found: dict[str, int] = {}
    launches, i = ctypes.c_long(), 0
    while (text := kernel(i, ctypes.byref(launches))) is not None:
        if launches.value:
            found[text.decode()] = found.get(text.decode(), 0) + launches.value
        i += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
