"""Keep indices of views.

Covers: the released count of kept tokens; disjointness, uniqueness and uniformity; shapes and dtypes; keyed
by sample, epoch and seed, so equal for any order, split or dtype of the batch; independent mode; paper
settings; every error; `keep_from_mask`.
"""

from __future__ import annotations

import pytest
import torch

from extrema_fast.errors import UsageError
from extrema_fast.models.masking import keep_count, keep_from_mask, sample_views


@pytest.mark.parametrize(
    ("n", "ratio", "wanted"),
    # 100 x 0.8: the exact floor is 20, the released expression gives 19
    [
        (196, 0.8, 39),
        (196, 0.9, 19),
        (196, 0.75, 49),
        (100, 0.8, 19),
        (64, 0.8, 12),
        (196, 0.0, 196),
        (4, 0.9, 0),
    ],
)
def test_keep_count_is_the_released_expression(n, ratio, wanted):
    assert keep_count(n, ratio) == wanted


@pytest.mark.parametrize(
    ("n", "keep", "views"), [(196, 39, 5), (196, 19, 8), (196, 49, 4), (7, 1, 7), (7, 7, 1), (64, 12, 5)]
)
def test_disjoint_views_share_no_token(n, keep, views):
    out = sample_views(16, n, keep, views, seed=3, epoch=1)
    assert out.shape == (views, 16, keep) and out.dtype == torch.int32 and out.is_contiguous()
    assert out.min() >= 0 and out.max() < n
    for image in out.transpose(0, 1).reshape(16, -1):
        assert image.unique().numel() == views * keep


def test_independent_views_are_each_without_repeats_and_overlap_by_chance():
    out = sample_views(200, 49, 20, 4, mode="independent", seed=1)
    assert out.shape == (4, 200, 20)
    for row in out.reshape(-1, 20):
        assert row.unique().numel() == 20
    # two fresh draws of 20 out of 49 share 20 * 20 / 49 = 8.2 on average
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(out[0], out[1], strict=True)]
    assert abs(sum(shared) / 200 - 400 / 49) < 0.6
    # more tokens than the image has, over all views, are allowed here
    assert sample_views(2, 10, 10, 3, mode="independent").shape == (3, 2, 10)


def test_the_first_independent_view_is_not_the_disjoint_permutation_for_all_views():
    out = sample_views(8, 49, 12, 3, mode="independent", seed=1)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
def test_every_token_is_kept_equally_often_in_every_view_and_place(mode):
    n, keep, views, images = 20, 5, 4, 4000
    out = sample_views(images, n, keep, views, mode=mode, seed=11)
    for view in out:
        counts = torch.bincount(view.flatten(), minlength=n).double()
        # 19 degrees of freedom; drawn without replacement, so below the multinomial law
        assert float((counts - 1000).square().sum() / 1000) < 43.8
    for place in range(keep):
        counts = torch.bincount(out[1, :, place], minlength=n).double()
        assert float((counts - 200).square().sum() / 200) < 43.8
    # and every pair of tokens: 190 pairs, each in a view with probability 20 / 380
    chosen = torch.nn.functional.one_hot(out[0].long(), n).sum(1).double()
    pairs = (chosen.T @ chosen)[torch.triu_indices(n, n, 1).unbind()]
    wanted = images * keep * (keep - 1) / (n * (n - 1))
    assert float((pairs - wanted).square().sum() / wanted) < 260


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
def test_a_sample_has_the_same_views_in_any_batch(mode):
    index = torch.tensor([7, 0, 1 << 33, 999, 12])
    keys = {"mode": mode, "seed": 5, "epoch": 4}
    whole = sample_views(index, 49, 9, 5, **keys)
    assert torch.equal(sample_views(index.flip(0), 49, 9, 5, **keys).flip(1), whole)
    parts = [sample_views(part, 49, 9, 5, **keys) for part in (index[:1], index[1:3], index[3:])]
    assert torch.equal(torch.cat(parts, 1), whole)
    small = torch.tensor([7, 0, 999])
    assert torch.equal(sample_views(small.int(), 49, 9, 5, **keys), sample_views(small, 49, 9, 5, **keys))
    # a batch size stands for the rows 0 .. B - 1
    assert torch.equal(sample_views(6, 49, 9, 5, **keys), sample_views(torch.arange(6), 49, 9, 5, **keys))
    # the other modules' generators have no say
    torch.manual_seed(0)
    torch.rand(3)
    assert torch.equal(sample_views(index, 49, 9, 5, **keys), whole)


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
def test_keyed_by_seed_and_epoch(mode):
    base = sample_views(32, 49, 9, 5, mode=mode, seed=5, epoch=4)
    for seed, epoch in ((6, 4), (5, 5), (5 + (1 << 32), 4)):
        other = sample_views(32, 49, 9, 5, mode=mode, seed=seed, epoch=epoch)
        # equal entries by chance: 1 in 49
        assert (base == other).float().mean() < 0.06
    # nor do two images of one batch share a permutation
    assert (base[:, :16] == base[:, 16:]).float().mean() < 0.06


@pytest.mark.parametrize(
    ("arguments", "mode", "words"),
    [
        ((4, 49, 0, 2), "disjoint", ["num_keep", "1..49", "got 0"]),
        ((4, 49, -1, 2), "disjoint", ["num_keep", "got -1"]),
        ((4, 49, 50, 1), "independent", ["num_keep", "got 50"]),
        ((4, 49, 10, 0), "disjoint", ["num_views", "got 0"]),
        ((4, 49, 10, 5), "disjoint", ["5 disjoint views of 10", "50", "49", "independent"]),
        ((4, 49, 10, 4), "disjunct", ["mode", "disjunct", "independent"]),
    ],
)
def test_errors_name_value_and_remedy(arguments, mode, words):
    with pytest.raises(UsageError) as error:
        sample_views(*arguments, mode=mode)
    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value)


def test_keep_from_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()
    keep = keep_from_mask(mask)
    assert keep.dtype == torch.int32 and keep.tolist() == [[1, 2, 4], [0, 1, 4]]
    assert keep_from_mask(mask[None]).shape == (1, 2, 3)
    # back and forth, with views
    views = sample_views(3, 20, 6, 3, seed=2)
    mask = torch.zeros(3, 3, 20, dtype=torch.bool).scatter_(-1, views.long(), True)
    assert torch.equal(keep_from_mask(mask), views.sort(-1).values)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[True, False], [True, True]]), "1 to 2"),
        (torch.zeros(2, 3, dtype=torch.bool), "at least 1"),
        (torch.tensor([[0, 1, 1]]), "expected bool"),
    ],
)
def test_keep_from_mask_errors(mask, words):
    with pytest.raises(UsageError, match=words):
        keep_from_mask(mask)
