"""sample_views: bitwise the plain definition.

Covers: both modes, odd numbers of patches, large rows, seeds of 64 bits, epochs; every view's law (no repeats,
disjoint); opcheck; one graph; a strided index; repeatability and poisoned outputs; empty batches; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.sample_views import sample_views, sample_views_reference

from extrema_fast.models import masking

ROWS = torch.tensor([0, 1, 7, 2**31, 2**33 + 5])


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
@pytest.mark.parametrize(
    ("n", "kept", "views"), [(1, 1, 1), (19, 5, 3), (49, 12, 4), (196, 39, 5), (197, 19, 8), (256, 51, 5)]
)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**63 - 25, 3), (-7, 100_000)])
def test_equal_to_the_definition(n, kept, views, mode, seed, epoch):
    options = {"mode": mode, "seed": seed, "epoch": epoch}
    keep = sample_views(ROWS[:2] if n > 64 else ROWS, n, kept, views, **options)
    expected = sample_views_reference(ROWS[:2] if n > 64 else ROWS, n, kept, views, **options)
    assert torch.equal(keep, expected) and keep.dtype == torch.int32 and keep.is_contiguous()
    assert keep.sort(-1).values.diff(dim=-1).gt(0).all() and keep.min() >= 0 and keep.max() < n
    if mode == "disjoint":
        together = keep.transpose(0, 1).flatten(1).sort(-1).values
        assert together.diff(dim=-1).gt(0).all()


def test_training_uses_these_indices():
    assert torch.equal(
        masking.draw_views(ROWS, 19, 5, 3, seed=4, epoch=2), sample_views(ROWS, 19, 5, 3, seed=4, epoch=2)
    )


def test_opcheck_and_one_graph():
    op = torch.ops.extrema_fast.sample_views.default
    torch.library.opcheck(op, (ROWS, 19, 5, 3, True, 1, 2))
    torch.library.opcheck(op, (ROWS, 19, 5, 3, False, 1, 2))
    compiled = torch.compile(lambda i: sample_views(i, 19, 5, 3) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ROWS), sample_views(ROWS, 19, 5, 3) + 1)


def test_strided_index_poison_and_repeats(poisoned):
    strided = torch.stack([ROWS, ROWS], 1)[:, 0]
    one, two = sample_views(strided, 19, 5, 3), sample_views(ROWS, 19, 5, 3)
    assert torch.equal(one, two) and one.max() < 19


def test_an_empty_batch():
    assert sample_views(ROWS[:0], 19, 5, 3).shape == (3, 0, 5)


def test_errors():
    for args, mode, words in [
        ((ROWS.int(), 19, 5, 3), "disjoint", r"index: expected int64 \[B\], got int32 \[5\]"),
        ((ROWS, 19, 5, 4), "disjoint", "4 disjoint views of 5 need 20 tokens, there are 19"),
        ((ROWS, 19, 0, 3), "disjoint", "num_keep: expected 1..19"),
        ((ROWS, 19, 5, 3), "random", "mode: expected 'disjoint' or 'independent'"),
    ]:
        with pytest.raises(ValueError, match=words):
            sample_views(*args, mode=mode)
    with pytest.raises(TypeError, match="index: expected a tensor"):
        sample_views(5, 19, 5, 3)
