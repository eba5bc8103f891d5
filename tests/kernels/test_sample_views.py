"""sample_views and drop_path_factors: bitwise the plain definitions.

Covers: both modes, odd numbers of patches, large rows, seeds of 64 bits, epochs; every view's law (no repeats,
disjoint); rates, depths and numbers of views; one graph; a strided index; poisoned outputs; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.sample_views import (
    drop_path_factors,
    drop_path_reference,
    sample_views,
    sample_views_reference,
)

from extrema_fast.models import drop_path, masking
from tests.kernels._compare import assert_errors

ROWS = torch.tensor([0, 1, 7, 2**31, 2**33 + 5])


@pytest.mark.parametrize(
    ("mode", "n", "kept", "views", "seed", "epoch"),
    [
        ("disjoint", 1, 1, 1, 0, 0),
        ("independent", 19, 12, 3, 2**63 - 25, 3),
        ("disjoint", 49, 12, 4, -7, 100_000),
        ("disjoint", 197, 39, 5, 2**63 - 25, 3),
        # more than a program ranks
        ("independent", 257, 19, 2, -7, 100_000),
    ],
)
def test_equal_to_the_definition(mode, n, kept, views, seed, epoch):
    options = {"mode": mode, "seed": seed, "epoch": epoch}
    rows = ROWS[-2:] if n > 64 else ROWS
    keep = sample_views(rows, n, kept, views, **options)
    expected = sample_views_reference(rows, n, kept, views, **options)
    assert torch.equal(keep, expected) and keep.dtype == torch.int32 and keep.is_contiguous()
    assert keep.sort(-1).values.diff(dim=-1).gt(0).all() and keep.min() >= 0 and keep.max() < n
    if mode == "disjoint":
        together = keep.transpose(0, 1).flatten(1).sort(-1).values
        assert together.diff(dim=-1).gt(0).all()


@pytest.mark.parametrize(("n", "path"), [(4097, "kernel"), (19, "plain")], indirect=["path"])
def test_the_definition_runs_above_4096_patches_and_without_triton(n, path):
    keep = sample_views(ROWS, n, 5, 3, seed=4)
    assert torch.equal(keep, sample_views_reference(ROWS, n, 5, 3, seed=4))


def test_training_uses_these_indices():
    ours = sample_views(ROWS, 19, 5, 3, seed=4, epoch=2)
    assert torch.equal(masking.draw_views(ROWS, 19, 5, 3, seed=4, epoch=2), ours)


@pytest.mark.parametrize(
    ("views", "depth", "rate", "seed", "epoch"),
    [(1, 1, 0.5, 0, 0), (5, 12, 0.1, 2**63 - 25, 3), (3, 32, 0.4, -7, 100_000), (2, 7, 0.3, 3, 1)],
)
def test_drop_path_is_the_definition(views, depth, rate, seed, epoch, poisoned):
    args, keys = (ROWS, views, depth, rate), {"seed": seed, "epoch": epoch}
    factors = drop_path_factors(*args, **keys)
    assert torch.equal(factors, drop_path_reference(*args, **keys))
    assert factors.shape == (depth, 2, views * len(ROWS)) and factors.is_contiguous()
    assert torch.equal(drop_path_factors(torch.stack([ROWS, ROWS], 1)[:, 0], *args[1:], **keys), factors)


def test_training_uses_these_factors():
    ours = drop_path_factors(ROWS, 5, 12, 0.1, seed=4, epoch=2)
    assert torch.equal(drop_path.drop_path_scale(ROWS, 5, 12, 0.1, seed=4, epoch=2), ours)


def test_one_graph():
    compiled = torch.compile(lambda i: sample_views(i, 19, 5, 3) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ROWS), sample_views(ROWS, 19, 5, 3) + 1)


def test_strided_index_and_poison(poisoned):
    strided = torch.stack([ROWS, ROWS], 1)[:, 0]
    one, two = sample_views(strided, 19, 5, 3), sample_views(ROWS, 19, 5, 3)
    assert torch.equal(one, two) and one.max() < 19


def test_errors(path):
    # 2^18 words are the whole stream
    assert sample_views(ROWS[:0], 64, 5, 4096, mode="independent").shape == (4096, 0, 5)
    cases = [
        ((ROWS.int(), 19, 5, 3), {}, r"index: expected int64 \[B\], got int32 \[5\]"),
        ((ROWS, 19, 5, 4), {}, "4 disjoint views of 5 need 20 tokens, there are 19"),
        ((ROWS, 19, 0, 3), {}, "num_keep: expected 1..19"),
        (
            (ROWS[:0], 64, 5, 4097),
            {"mode": "independent"},
            "at most 262144 random words .* of each view, got 4097, 64",
        ),
        ((ROWS[:0], 2**18 + 1, 5, 3), {}, "at most 262144 random words per image, .* got 3, 262145"),
        ((ROWS, 19, 5, 3), {"mode": "random"}, "mode: expected 'disjoint' or 'independent'"),
    ]
    assert_errors(sample_views, cases)
    keys = {"seed": 0, "epoch": 0}
    cases = [
        ((ROWS.int(), 5, 12, 0.1), keys, r"index: expected int64 \[B\], got int32 \[5\]"),
        ((ROWS, 5, 12, 1.0), keys, "rate: expected from 0 to below 1, got 1.0"),
        ((ROWS, 0, 12, 0.1), keys, "num_views, depth: expected at least 1"),
    ]
    assert_errors(drop_path_factors, cases)
    with pytest.raises(TypeError, match="index: expected a tensor"):
        sample_views(5, 19, 5, 3)
