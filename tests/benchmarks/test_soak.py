"""What a long run's readings come to: the table's parts and the verdict.

Covers: a run of many readings, one that was ended after a few; memory that grows, descriptors that are left open.
"""

from __future__ import annotations

import pytest

from benchmarks import soak


def readings(count, **last):
    found = [{"step": 50 * i, "rss_mb": 100.0, "threads": 3, "descriptors": 9} for i in range(1, count + 1)]
    for one in found[2 * count // 3 :]:
        one.update(last)
    return found


@pytest.mark.parametrize(("count", "parts"), [(100, soak.WINDOWS), (9, 9)])
def test_parts_of_a_run(count, parts):
    rows = soak.windows(readings(count))
    assert len(rows) == parts and sum(r["readings"] for r in rows) == count
    assert rows[-1]["key"].endswith(f"to {50 * count}") and all(g["passed"] for g in soak.gates(rows))


@pytest.mark.parametrize(
    ("last", "failed"),
    [({"rss_mb": 100.9}, []), ({"rss_mb": 101.1}, ["rss_mb"]), ({"descriptors": 10}, ["descriptors"])],
)
def test_what_grows_is_found(last, failed):
    found = soak.gates(soak.windows(readings(60, **last)))
    assert [g["name"] for g in found if not g["passed"]] == failed
