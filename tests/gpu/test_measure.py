"""`auto` on this GPU: `make test-gpu`.

Covers: every implementation at a step's shapes in the child process, right or left out with a reason; own kernels are
right; the cache; settings tuned for a kernel are taken.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch, tune
from extrema_fast.kernels._spec import Sizes

from extrema_fast.distributed import World
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops import measure

pytestmark = pytest.mark.gpu
SIZES = Sizes(
    images=8,
    views=5,
    kept=39,
    patches=196,
    width=384,
    heads=6,
    depth=2,
    hidden=1536,
    patch=16,
    height=224,
    width_px=224,
    chans=3,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops.set_backend("auto")
    _launch.tuned.cache_clear()
    yield
    ops.set_backend("auto")
    _launch.tuned.cache_clear()


def problems(dtype: str) -> list[measure.Problem]:
    return ops.problems(torch.device("cuda", 0), SIZES, dtype, compiled=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_op_is_measured_and_own_kernels_are_right(dtype, monkeypatch):
    found = measure.choose(problems(dtype), World(torch.device("cuda", 0)))
    assert set(found) == {p.name for p in problems(dtype)}
    for name, choice in found.items():
        assert choice.implementation and not set(measure.OURS) & set(choice.out), (name, choice)
    # kept: nothing is measured a second time
    monkeypatch.setattr(measure, "run", None)
    assert measure.choose(problems(dtype), World(torch.device("cuda", 0))) == found


def test_tuned_settings_are_kept_and_taken(monkeypatch):
    nearest = tune.settings_to_try
    monkeypatch.setattr(tune, "settings_to_try", lambda *args: nearest(*args)[:2])
    found = measure.tune_and_measure(problems("bf16"), "cuda:0", ["sample_views", "attention_pool"])
    assert set(found) == {"sample_views", "attention_pool"}
    for key, config in _launch.tuned("attention_pool", "cuda:0").items():
        assert _launch.settings("attention_pool", key, torch.device("cuda", 0), {}) == config
