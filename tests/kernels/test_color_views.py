"""color_views against its plain definition.

Covers: every order of operations, on and off, gray; odd sizes over several tiles; black, white and gray images;
one channel; patch-major output; fp16; the form without nonzero; opcheck; one graph; layouts; poison; repeats;
empty batches; errors. (torchvision's semantics against an independent oracle: tests/unit/test_augment.py.)
"""

from __future__ import annotations

import itertools

import pytest
import torch
from extrema_fast.kernels.color_views import color_params, color_views, color_views_reference
from extrema_fast.kernels.color_views.reference import jitter
from extrema_fast.kernels.patch_gather import gather_patches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# a hundredth of an 8-bit level, normalised
LEVEL = 0.01 / 255 / min(STD)


def params(batch, on=1.0, gray=0.0):
    p = color_params(torch.arange(batch), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, seed=5, epoch=1)
    p[:, :, 0], p[:, :, 5] = on, gray
    return p


def close(a, b, tolerance=LEVEL):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.is_contiguous() == y.is_contiguous()
        assert float((x.double() - y.double()).abs().max()) <= tolerance


def test_every_order():
    orders = list(itertools.permutations(range(4)))
    p = params(12)
    p[:, :, 6:] = torch.tensor(orders, dtype=torch.float32).view(12, 2, 4)
    images = torch.randint(0, 256, (12, 9, 7, 3), dtype=torch.uint8)
    close(color_views(images, p, MEAN, STD), color_views_reference(images, p, MEAN, STD))


@pytest.mark.parametrize(("on", "gray"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(1, 1), (40, 33), (64, 48)])
def test_sizes_and_switches(size, on, gray):
    p, images = params(2, on, gray), torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    close(color_views(images, p, MEAN, STD), color_views_reference(images, p, MEAN, STD))


def test_flat_images():
    images = torch.stack([torch.full((5, 5, 3), v, dtype=torch.uint8) for v in (0, 128, 255)])
    out = color_views(images, params(3), MEAN, STD)
    close(out, color_views_reference(images, params(3), MEAN, STD))
    assert all(x.isfinite().all() for x in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_channel_patches_and_dtypes(dtype):
    images = torch.randint(0, 256, (2, 24, 32, 3), dtype=torch.uint8)
    tolerance = LEVEL if dtype == torch.float32 else 4e-3
    for channels in (1, 3):
        options = {"channels": channels, "dtype": dtype}
        out = color_views(images, params(2), MEAN, STD, **options)
        close(out, color_views_reference(images, params(2), MEAN, STD, **options), tolerance)
        patches = color_views(images, params(2), MEAN, STD, layout="patches", patch=8, **options)
        for x, y in zip(patches, out, strict=True):
            assert torch.equal(x, gather_patches(y, None, 8))


def test_the_plain_path_and_fp64(plain):
    images = torch.randint(0, 256, (3, 9, 7, 3), dtype=torch.uint8)
    a = color_views(images, params(3), MEAN, STD)
    assert all(
        torch.equal(x, y) for x, y in zip(a, color_views_reference(images, params(3), MEAN, STD), strict=True)
    )
    exact = color_views(images, params(3), MEAN, STD, dtype=torch.float64)
    close(a, exact)


def test_the_form_without_nonzero_is_the_same(monkeypatch):
    p, x = params(12), torch.rand(12, 3, 9, 7)
    rows = jitter(x, p[:, 0, 1:5], p[:, 0, 6:].long())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(jitter(x, p[:, 0, 1:5], p[:, 0, 6:].long()), rows)


def test_opcheck_and_one_graph():
    images, p = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8), params(2)
    op = torch.ops.extrema_fast.color_views.default
    for patch in (0, 4):
        torch.library.opcheck(op, (images, p, list(MEAN), list(STD), 3, torch.float32, patch))
    compiled = torch.compile(
        lambda x: color_views(x, p, MEAN, STD)[1] + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(images), color_views(images, p, MEAN, STD)[1] + 1)


def test_layouts_poison_and_repeats(poisoned):
    images, p = torch.randint(0, 256, (3, 40, 33, 3), dtype=torch.uint8), params(3)
    # one view off: its sums are never written
    p[1, 0, 0] = 0
    a = color_views(images, p, MEAN, STD)
    for x in (
        images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat([images] * 2, 2)[:, :, :33],
    ):
        assert all(torch.equal(i, j) for i, j in zip(color_views(x, p, MEAN, STD), a, strict=True))
    assert not a[0].isnan().any()


def test_an_empty_batch():
    a, b = color_views(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), params(0), MEAN, STD)
    assert a.shape == b.shape == (0, 3, 8, 8)


def test_errors():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for args, options, words in [
        ((images.float(), params(2), MEAN, STD), {}, r"images: expected uint8 \[B, H, W, 3\], got float32"),
        ((images, params(3), MEAN, STD), {}, r"params: expected float32 \[2, 2, 10\]"),
        ((images, params(2), MEAN[:1], STD), {}, "mean, std: expected three numbers"),
        ((images, params(2), MEAN, STD), {"channels": 2}, "channels: expected 1 or 3, got 2"),
        ((images, params(2), MEAN, STD), {"layout": "chw"}, "layout: expected 'nchw' or 'patches'"),
        ((images, params(2), MEAN, STD), {"layout": "patches", "patch": 3}, "patch: 3 does not divide"),
        ((images, params(2), MEAN, STD), {"dtype": torch.int8}, "dtype: expected"),
    ]:
        with pytest.raises(ValueError, match=words):
            color_views(*args, **options)
