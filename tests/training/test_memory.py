"""Memory of a training process on a CPU.

Covers: glibc's malloc keeps freed memory, unless the user has set it or there is another C library.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from extrema_fast.training.run import keep_freed_memory


def test_malloc_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    code = """
import ctypes, resource, sys
if sys.argv[1] == "keep":
    from extrema_fast.training.run import keep_freed_memory
    if not keep_freed_memory():
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
