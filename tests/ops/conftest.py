"""Each test of the ops begins without choices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from extrema_fast.ops import attention
from extrema_fast.ops import dispatch as ops


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("_chosen", {}), ("_logged", {}), ("_setting", "auto")):
        monkeypatch.setattr(ops, name, value)
    # a test may put another function in its place
    forget = attention.unsupported.cache_clear
    forget()
    yield
    forget()
