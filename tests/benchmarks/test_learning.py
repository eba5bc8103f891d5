"""What `learning` says of runs that begin from given weights: gains are taken seed by seed."""

from __future__ import annotations

from benchmarks.learning import gains, spread


def test_gains_are_of_the_same_seed():
    found = gains({"knn": spread([0.1, 0.5]), "seconds": spread([1.0, 1.0])}, {"knn": spread([0.3, 0.6])})
    assert found["begun | knn"]["values"] == [0.3, 0.6]
    gain = found["begun, gain | knn"]
    assert [round(v, 6) for v in gain["values"]] == [0.2, 0.1] and round(gain["mean"], 6) == 0.15
    assert len(found) == 2
