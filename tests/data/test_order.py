"""The order of an epoch.

Covers: no row lost or repeated, global and by shards, odd shard sizes and windows; reads stay within the window; a
window of all shards; the order of earlier versions; mixtures with parts of an epoch; substitutes; errors; what a loader
reads from files, shards and both.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from extrema_fast import rng
from extrema_fast.config import DataConfig
from extrema_fast.data.image_source import ImageSource
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.order import Order, epoch_length
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


def source_of(sizes=(), rows=0, parts=()) -> ImageSource:
    """Rows without files: in shards of the given sizes, or `rows` of them."""
    shards = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes) if sizes else None
    n = rows or sum(sizes)
    return ImageSource("x", [str(i) for i in range(n)], None, [], "f", shards=shards, parts=parts)


def epoch(source, number=0, batch=1, seed=0, **cfg) -> np.ndarray:
    order = Order(source, DataConfig(**cfg), batch, seed)
    try:
        steps = range(number * order.steps, (number + 1) * order.steps)
        return np.concatenate([order(step)[1] for step in steps])
    finally:
        order.close()


SIZES = (39, 1, 19, 49, 7, 1, 23)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_by_shards_no_row_is_lost_or_repeated(window):
    source = source_of(SIZES)
    orders = [epoch(source, e, order="shards", window=window) for e in range(3)]
    for rows in orders:
        assert np.array_equal(np.sort(rows), np.arange(sum(SIZES)))
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    other = epoch(source, order="shards", window=window, seed=1)
    assert not np.array_equal(orders[0], other)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_rows_come_from_a_window_of_shards(window):
    source = source_of((40,) * 20)
    shards = source.shards[epoch(source, order="shards", window=window)]
    opened = list(dict.fromkeys(shards.tolist()))
    # between first and last row of a shard at most `window` shards are passed; the first ones wrap around the end
    for at, shard in enumerate(opened):
        places = np.flatnonzero(shards == shard)
        if places.max() - places.min() < 400:
            others = set(shards[places.min() : places.max() + 1].tolist())
            assert len(others) <= 2 * window - 1 + (window > 1) and at < 20
    starts = shards[:120]
    assert len(set(starts.tolist())) <= 3 + window
    if window > 1:
        # mixed from the very first rows on, not one shard alone
        assert len(set(shards[:20].tolist())) >= 2


def test_a_window_of_all_shards_shuffles_like_global():
    source = source_of((25,) * 8)
    places = np.stack([np.argsort(epoch(source, e, order="shards", window=8)) for e in range(60)])
    # the mean place of a shard's rows, over 60 epochs: 99.5 with a spread of 57.7 / sqrt(60 * 25) = 1.5
    means = places.reshape(60, 8, 25).mean((0, 2))
    assert np.abs(means - 99.5).max() < 8
    # neighbors in the table are as far apart as any two: 200 / 3
    apart = np.abs(np.diff(places, axis=1)).mean()
    assert abs(apart - 200 / 3) < 4


def test_the_global_order_is_that_of_earlier_versions():
    source = source_of(rows=103)
    assert np.array_equal(epoch(source, 2, seed=5), rng.permutation(103, seed=5, epoch=2).numpy())
    assert rng.permutation(7, seed=3, epoch=1).tolist() == [2, 0, 6, 3, 5, 1, 4]
    # drawn in pieces: nothing changes at their edges
    w = rng.words(torch.arange(70_001), 2, seed=9, epoch=0, stream=rng.ORDER)
    whole = torch.argsort((w[:, 0] << 31) ^ w[:, 1], stable=True)
    assert torch.equal(rng.permutation(70_001, seed=9, epoch=0), whole)


@pytest.mark.parametrize("order", ["global", "shards"])
def test_parts_of_a_mixture_come_once_in_so_many_epochs(order):
    # 40 rows each epoch, 25 rows in a half each: 12 of them, 9 rows once in three epochs
    parts = ((0, 40, 1.0), (40, 65, 0.5), (65, 74, 1 / 3))
    source = source_of((40, 20, 14), parts=parts)
    assert epoch_length(source) == 40 + 12 + 3
    seen = [epoch(source, e, order=order, window=2) for e in range(25)]
    for rows in seen:
        assert np.array_equal(np.sort(rows[rows < 40]), np.arange(40))
        assert ((rows >= 40) & (rows < 65)).sum() == 12 and (rows >= 65).sum() == 3
    counts = np.bincount(np.concatenate(seen), minlength=74)
    # 25 epochs of 12 are 12 whole passes over 25 rows
    assert (counts[:40] == 25).all() and (counts[40:65] == 12).all()
    for start in range(0, 24, 3):
        assert sorted(r for rows in seen[start : start + 3] for r in rows if r >= 65) == list(range(65, 74))
    if order == "global":
        # mixed, not one part after the other
        assert 0 < np.flatnonzero(seen[0] >= 40)[0] < 30


def test_substitutes_are_left_over_rows_first():
    order = Order(source_of(rows=103), DataConfig(), 10, seed=4)
    rows = np.concatenate([order(step)[1] for step in range(10)])
    left_over = set(range(103)) - set(rows.tolist())
    chosen = order.substitutes(3, 7)
    assert len(left_over) == 3 and set(chosen[:4].tolist()) <= left_over
    assert len(set(chosen[4:].tolist())) > 30
    assert not np.array_equal(chosen, order.substitutes(3, 8))
    assert not np.array_equal(chosen, order.substitutes(13, 7))
    # the same after the order has gone on, and for another start
    order(25)
    again = Order(source_of(rows=103), DataConfig(), 10, seed=4)
    assert np.array_equal(chosen, order.substitutes(3, 7))
    assert np.array_equal(chosen, again.substitutes(3, 7))
    order.close()
    again.close()


def test_errors():
    with pytest.raises(
        UsageError, match=r"data\.order: shards needs images in tar shards .*--data\.order global"
    ):
        Order(source_of(rows=9), DataConfig(order="shards"), 2, 0)
    with pytest.raises(UsageError, match=r"batch_size: 7 is more than the 6 images of x; use at most 6"):
        Order(source_of(rows=12, parts=((0, 12, 0.5),)), DataConfig(), 7, 0)


# ---- with images ------------------------------------------------------------------------------------


def test_files_and_shards_in_one_source(tree, shards, config, kind):
    files, packed = open_source(str(tree)), open_source(str(shards))
    whole = np.tile(np.array([[0, -1]]), (23, 1))
    both = dataclasses.replace(
        packed,
        paths=packed.paths + files.paths,
        spans=np.concatenate([packed.spans, whole]),
        labels=None,
        names=None,
        headers=None,
        shards=None,
    )
    images = torch.cat([im for im, _ in EvalLoader(both, config(loader=kind), (24, 32), batch_size=9)])
    assert torch.equal(images[:23], images[23:])


def test_sizes_from_headers_are_turned_with_the_image(tmp_path, config, kind):
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=tag)
    source = open_source(str(tmp_path))
    known = dataclasses.replace(source, headers=np.array([[40, 80, 6]], np.int32))
    for exif in (False, True):
        cfg = config(loader=kind, exif=exif)
        (a,), (b,) = (list(EvalLoader(s, cfg, (16, 32))) for s in (source, known))
        assert torch.equal(a[0], b[0])
        with TrainLoader(known, cfg, (16, 16), batch_size=1, seed=0) as loader:
            next(loader)
