"""The benchmark of ops. Covers: what was measured is on disk after each case, also when the rest is cut off."""

from __future__ import annotations

import pytest

from benchmarks import kernels
from benchmarks.harness import read_record


def test_a_record_that_is_cut_off_holds_the_cases_so_far(tmp_path, monkeypatch):
    measure, calls = kernels.measure, []

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    class Rates:
        def __init__(self, *args):
            pass

        def sample(self):
            return {"copy_gb_per_s": 10.0 * (1 + len(calls))}

    monkeypatch.setattr(kernels, "measure", cut_off)
    monkeypatch.setattr(kernels, "Rates", Rates)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(
            ["--op", "token_gather", "sample_views", "color_views", "--dtype", "fp32", "--device", "cpu"]
            + ["--quick", "--rounds", "1", "--out", str(tmp_path)]
        )
    (folder,) = tmp_path.glob("*_kernels")
    record = read_record(folder)
    assert {(row["op"], row["case"]) for row in record["rows"]} == {
        (op, case.label) for op, case, _ in calls[:2]
    }
    assert record["unfinished"].startswith("2 of ") and record["rates"] == {"copy_gb_per_s": 20.0}
