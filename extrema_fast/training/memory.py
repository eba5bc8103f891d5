"""What a training process asks of the memory allocators; the operating system's defaults suit small programs.

A step on a CPU allocates and frees the same gigabytes again and again. By default the C library gives large blocks
back and gets them anew, each page cleared at its first touch, and pages are 4 KB.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

# read by torch at its first allocation, so it must be there before torch is imported: CPU tensors on huge pages
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# glibc's numbers of mallopt
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted, on a GPU or a CPU."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def ask_for_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before torch is imported: tensors on a CPU use huge pages where the system offers them."""
    environment.setdefault(HUGE_PAGES, "1")


def keep_freed_memory() -> bool:
    """The C library keeps what a step frees for the next one; whether it does (glibc, nothing set by the user)."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # another C library
        return False
    # no block is mapped on its own (a threshold of more than 32 MB is not taken), and the heap does not shrink
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 16 << 20}
    return all([mallopt(name, value) for name, value in settings.items()])
