"""Kernels run in Triton's interpreter here; the variable counts only before Triton's first import."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from extrema_fast.kernels import _launch
from extrema_fast.kernels.mlp import quack

from tests.kernels import _quack


@pytest.fixture(autouse=True)
def _needs_interpreter(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("plain") is None and not _launch.can_run("cpu")[0]:
        pytest.skip(f"kernels cannot run: {_launch.can_run('cpu')[1]}")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' plain definitions, as on a machine without Triton."""
    monkeypatch.setattr(_launch, "INTERPRET", False)


@pytest.fixture(params=["kernel", "plain"])
def path(request: pytest.FixtureRequest) -> str:
    """Both: the kernel in the interpreter, and the plain definition."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element no program writes is found."""
    monkeypatch.setenv("EXTREMA_FAST_CHECK", "1")


@pytest.fixture
def fake_quack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for QuACK that computes on a CPU."""
    _quack.install(monkeypatch)
    monkeypatch.setattr(quack, "_missing", lambda device: "")
    quack.functions.cache_clear()
    yield
    quack.functions.cache_clear()
