"""Tests of the CUDA path without a CUDA device: `make test-nullgpu`. Elsewhere they are skipped."""

from __future__ import annotations

import pytest

from tests.nullgpu import counters


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if counters.active():
        return
    for item in items:
        if item.path.parent.name == "nullgpu":
            item.add_marker(pytest.mark.skip(reason="needs the null GPU: make test-nullgpu"))
