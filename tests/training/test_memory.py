"""What the allocators are asked.

Covers: huge pages and glibc's malloc, unless the user has set them; freed memory that is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from extrema_fast.training import memory


def test_what_the_allocators_are_asked(monkeypatch):
    environment: dict[str, str] = {}
    memory.ask_for_huge_pages(environment)
    assert environment == {memory.HUGE_PAGES: "1"}
    environment[memory.HUGE_PAGES] = "0"
    memory.ask_for_huge_pages(environment)
    assert environment[memory.HUGE_PAGES] == "0", "the user's own choice stays"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not memory.keep_freed_memory(), "nor is a malloc touched that the user has set"
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    code = """
import ctypes, resource, sys
from extrema_fast.training.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def faults(size=48 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(4)))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    counts = {}
    for how in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", code, how], env=env, capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        counts[how] = int(done.stdout)
    assert counts["keep"] < 0.1 * counts["default"], counts
