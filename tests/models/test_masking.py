"""Keep indices of random views and from masks.

Covers: the released count; disjoint and independent views without repeats, uniform over patches, places and pairs;
keyed by sample, seed and epoch whatever the batch; the view-major layout of training; errors; `keep_from_mask`;
`mae_mask` against the masking of MAE.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from extrema_fast.config import keep_count
from extrema_fast.errors import UsageError
from extrema_fast.models.masking import draw_views, keep_from_mask, mae_mask, sample_views
from tests.torchvision_operators import define_torchvision_operators

# the last three: a truncated float64 product, not the exact floor; nothing masked; nothing kept
COUNTS = [(196, 0.75, 49), (196, 0.8, 39), (196, 0.9, 19), (100, 0.8, 19), (196, 0.0, 196), (4, 0.9, 0)]


def test_keep_count_is_the_released_expression():
    assert [keep_count(n, ratio) for n, ratio, _ in COUNTS] == [wanted for _, _, wanted in COUNTS]


@pytest.mark.parametrize(("n", "keep", "views"), [(196, 39, 5), (196, 49, 4), (7, 1, 7), (7, 7, 1)])
def test_disjoint_views_share_no_token(n, keep, views):
    out = sample_views(16, n, keep, views, seed=3, epoch=1)
    assert out.shape == (16, views, keep) and out.dtype == torch.int32 and out.is_contiguous()
    assert out.min() >= 0 and out.max() < n
    for image in out.flatten(1):
        assert image.unique().numel() == views * keep
    # training draws the same, view-major
    drawn = draw_views(16, n, keep, views, seed=3, epoch=1)
    assert drawn.is_contiguous() and torch.equal(drawn.transpose(0, 1), out)


def test_independent_views_have_no_repeats_and_overlap_by_chance():
    out = sample_views(200, 49, 20, 4, mode="independent", seed=1)
    for row in out.reshape(-1, 20):
        assert row.unique().numel() == 20
    # two fresh draws of 20 out of 49 share 20 * 20 / 49 = 8.2 on average
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in out[:, :2]]
    assert abs(sum(shared) / 200 - 400 / 49) < 0.6
    # more tokens than the image has, over all views, are allowed here
    assert sample_views(2, 10, 10, 3, mode="independent").shape == (2, 3, 10)


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
def test_every_token_is_kept_equally_often_in_every_view_and_place(mode):
    n, keep, views, images = 20, 5, 4, 4000
    out = sample_views(images, n, keep, views, mode=mode, seed=11)
    for v in range(views):
        counts = torch.bincount(out[:, v].flatten(), minlength=n).double()
        # 19 degrees of freedom; drawn without replacement, so below the multinomial law
        assert float((counts - 1000).square().sum() / 1000) < 43.8
    for place in range(keep):
        counts = torch.bincount(out[:, 1, place], minlength=n).double()
        assert float((counts - 200).square().sum() / 200) < 43.8
    # and every pair of tokens: 190 pairs, each in a view with probability 20 / 380
    chosen = torch.nn.functional.one_hot(out[:, 0].long(), n).sum(1).double()
    pairs = (chosen.T @ chosen)[torch.triu_indices(n, n, 1).unbind()]
    wanted = images * keep * (keep - 1) / (n * (n - 1))
    assert float((pairs - wanted).square().sum() / wanted) < 260


@pytest.mark.parametrize("mode", ["disjoint", "independent"])
def test_keyed_by_sample_seed_and_epoch(mode):
    index = torch.tensor([7, 0, 1 << 33, 999, 12])
    keys = {"mode": mode, "seed": 5, "epoch": 4}
    whole = sample_views(index, 49, 9, 5, **keys)
    assert torch.equal(sample_views(index.flip(0), 49, 9, 5, **keys).flip(0), whole)
    parts = [sample_views(part, 49, 9, 5, **keys) for part in (index[:1], index[1:3], index[3:])]
    assert torch.equal(torch.cat(parts), whole)
    small = torch.tensor([7, 0, 999])
    assert torch.equal(sample_views(small.int(), 49, 9, 5, **keys), sample_views(small, 49, 9, 5, **keys))
    # a batch size stands for the rows 0 .. B - 1
    base = sample_views(32, 49, 9, 5, **keys)
    assert torch.equal(base, sample_views(torch.arange(32), 49, 9, 5, **keys))
    # the global generator has no influence
    torch.rand(3)
    assert torch.equal(sample_views(index, 49, 9, 5, **keys), whole)
    # equal entries by chance: 1 in 49
    for other in ({"seed": 6}, {"epoch": 5}, {"seed": 5 + (1 << 32)}):
        assert (base == sample_views(32, 49, 9, 5, **keys | other)).float().mean() < 0.06
    assert (base[:16] == base[16:]).float().mean() < 0.06


@pytest.mark.parametrize(
    ("arguments", "mode", "name"),
    [
        ((4, 49, 0, 2), "disjoint", "num_keep"),
        ((4, 49, 50, 1), "independent", "num_keep"),
        ((4, 49, 10, 0), "disjoint", "num_views"),
        ((4, 49, 10, 5), "disjoint", "5 disjoint views of 10"),
        ((4, 49, 10, 4), "disjunct", "mode"),
    ],
)
def test_errors_of_sample_views(arguments, mode, name):
    with pytest.raises(UsageError, match=name):
        sample_views(*arguments, mode=mode)


def test_keep_from_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()
    keep = keep_from_mask(mask)
    assert keep.dtype == torch.int32 and keep.tolist() == [[1, 2, 4], [0, 1, 4]]
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
def test_errors_of_keep_from_mask(mask, words):
    with pytest.raises(UsageError, match=f"mask: .*{words}"):
        keep_from_mask(mask)


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (7, 7), (49, 12), (196, 49)])
def test_mae_mask_is_that_of_mae(n, kept):
    x, noise = torch.randn(3, n, 5), torch.rand(3, n)
    # random_masking of models_mae.py
    ids_shuffle = noise.argsort(1)
    restore, keep = ids_shuffle.argsort(1), ids_shuffle[:, :kept]
    mask = torch.ones(3, n)
    mask[:, :kept] = 0
    mask = mask.gather(1, restore)
    ours, ids_restore = mae_mask(keep.int(), n)
    assert torch.equal(ours, mask)
    # its order of what is dropped is random, of equal mask tokens
    assert torch.equal(torch.where(mask == 0, ids_restore, -1), torch.where(mask == 0, restore, -1))
    assert torch.equal(ids_restore.sort(1).values, torch.arange(n).expand(3, -1))
    tokens = torch.cat([x.gather(1, keep[..., None].expand(-1, -1, 5)), torch.zeros(3, n - kept, 5)], 1)
    restored = tokens.gather(1, ids_restore[..., None].expand(-1, -1, 5))
    assert torch.equal(restored, x * (1 - mask)[..., None])


def test_mae_mask_of_views_and_as_noise_of_another_mae():
    views = sample_views(2, 20, 5, 3, seed=2)
    mask, restore = mae_mask(views, 20)
    assert mask.shape == restore.shape == (2, 3, 20)
    assert all(torch.equal(mask[:, v], mae_mask(views[:, v], 20)[0]) for v in range(3))
    define_torchvision_operators()
    modeling = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    other, x = SimpleNamespace(config=SimpleNamespace(mask_ratio=0.75)), torch.randn(2, 20, 4)
    kept, its_mask, its_restore = modeling.ViTMAEEmbeddings.random_masking(other, x, restore[:, 1])
    assert torch.equal(kept, x.gather(1, views[:, 1, :, None].long().expand(-1, -1, 4)))
    assert torch.equal(its_mask, mask[:, 1]) and torch.equal(its_restore, restore[:, 1])


@pytest.mark.parametrize(("keep", "words"), [([[0, 4]], "0 to 4"), ([[1, 1]], "twice")])
def test_errors_of_mae_mask(keep, words):
    with pytest.raises(UsageError, match=f"keep: .*{words}"):
        mae_mask(torch.tensor(keep), 4)
