"""For every test: one thread, a printed seed, and none of the user's caches or settings."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch: several test processes and their children share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a developer's own settings must not decide a test; these two only say where test files are
KEPT = ("EXTREMA_FAST_PARITY", "EXTREMA_FAST_SHARED")
for _name in [n for n in os.environ if n.startswith("EXTREMA_FAST_") and n not in KEPT]:
    del os.environ[_name]

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    try:
        found = importlib.util.find_spec("extrema_fast.kernels")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise pytest.UsageError("extrema_fast is not installed for this Python; run `make install`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # one cache for all test processes: built-in images are written once, and never into the user's home
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed from the test's own name: torch starts from it, and a failing test shows it."""
    import torch

    value = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {value}")
    torch.manual_seed(value)
    return value
