"""color_views against its plain definition.

Covers: every order of operations, on and off, gray; odd sizes over several tiles; black, white and gray images;
one channel; patch-major output; fp16; the form without nonzero; opcheck; one graph; layouts; poison; repeats;
empty batches; errors. (torchvision's semantics against an independent oracle: tests/data/test_augment.py.)

The form for CPUs against the same definition in fp64: sizes below, at and above a piece, every order, factors of 0,
hues up to half a turn, flat images, switches, channels, layouts, dtypes; where it is taken; that it leaves its input
alone and computes on one thread.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from extrema_fast.kernels.color_views import (
    by_image,
    color_params,
    color_views,
    color_views_by_image,
    color_views_plain,
    color_views_reference,
)
from extrema_fast.kernels.color_views import op as color_op
from extrema_fast.kernels.color_views.reference import jitter
from extrema_fast.kernels.patch_gather import gather_patches
from torch.utils._python_dispatch import TorchDispatchMode

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
        torch.equal(x, y) for x, y in zip(a, color_views_plain(images, params(3), MEAN, STD), strict=True)
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


# ---- the form for CPUs -----------------------------------------------------------------------------


def wild_params(batch: int) -> torch.Tensor:
    """Every order, on twice as often as off, factors from 0 to 2.5, hues up to half a turn either way."""
    p = color_params(torch.arange(batch), (1.5, 1.5, 1.5, 0.5), 0.67, 0.3, seed=7, epoch=0)
    orders = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float32)
    p[:, :, 6:] = orders[torch.arange(2 * batch) % 24].view(batch, 2, 4)
    p[:: batch // 4 + 1, :, 1:4] = 0
    p[1:4, :, 4] = torch.tensor([[0.5, -0.5], [1 / 6, -1 / 6], [1 / 3, 0.0]])[: len(p[1:4])]
    return p


@pytest.mark.plain
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (50, 33), (181, 181), (181, 182), (131, 501)])
def test_image_by_image_is_the_definition(size):
    batch = 96 if size[0] < 100 else 12
    images, p = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8), wild_params(batch)
    # saturated corners of the colour cube and gray pixels
    few = min(12, size[0] * size[1])
    corners = torch.tensor([*itertools.product((0, 255), repeat=3), *[(v,) * 3 for v in (1, 77, 128, 254)]])
    images.view(batch, -1, 3)[:, :few] = corners[:few].to(torch.uint8)
    before = images.clone()
    exact = color_views_reference(images, p, MEAN, STD, dtype=torch.float64)
    close(color_views_by_image(images, p, MEAN, STD, dtype=torch.float64), exact, 1e-9)
    found = color_views_by_image(images, p, MEAN, STD)
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in found)
    close(found, exact)
    assert torch.equal(images, before)


@pytest.mark.plain
@pytest.mark.parametrize(("on", "gray"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("options", [{}, {"channels": 1}, {"layout": "patches", "patch": 8}], ids=str)
def test_image_by_image_switches_and_layouts(on, gray, options):
    images = torch.randint(0, 256, (4, 48, 64, 3), dtype=torch.uint8)
    for dtype, tolerance in ((torch.float32, LEVEL), (torch.bfloat16, 2.0**-7), (torch.float16, 4e-3)):
        wanted = color_views_reference(images, params(4, on, gray), MEAN, STD, **options)
        found = color_views_by_image(images, params(4, on, gray), MEAN, STD, dtype=dtype, **options)
        assert found[0].dtype == dtype
        close(found, wanted, tolerance * 2.7)
    turned = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    again = color_views_by_image(turned, params(4, on, gray), MEAN, STD, dtype=torch.float16, **options)
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@pytest.mark.plain
def test_image_by_image_flat_and_empty():
    images = torch.stack([torch.full((7, 9, 3), v, dtype=torch.uint8) for v in (0, 1, 128, 255)] * 12)
    found = color_views_by_image(images, wild_params(48), MEAN, STD)
    close(found, color_views_reference(images, wild_params(48), MEAN, STD))
    assert color_views_by_image(images[:0], params(0), MEAN, STD)[1].shape == (0, 3, 7, 9)


@pytest.mark.plain
def test_where_image_by_image_is_taken(monkeypatch):
    seen = []
    monkeypatch.setattr(color_op, "color_views_by_image", lambda *a, **k: seen.append("image"))
    monkeypatch.setattr(color_op, "color_views_reference", lambda *a, **k: seen.append("batch"))
    for side in (47, 48):
        color_views_plain(torch.zeros(2, side, side, 3, dtype=torch.uint8), params(2), MEAN, STD)
    # the arithmetic below would break a graph
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    color_views_plain(torch.zeros(2, 48, 48, 3, dtype=torch.uint8), params(2), MEAN, STD)
    assert seen == ["batch", "image", "batch"]


@pytest.mark.plain
def test_no_operation_is_split_over_threads():
    # torch splits what is larger than a piece; an image of 224 pixels is
    assert by_image.PIECE == 32768
    sizes: dict[str, int] = {}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            sizes[name] = max(sizes.get(name, 0), args[0].numel() if isinstance(args[0], torch.Tensor) else 0)
            return func(*args, **(kwargs or {}))

    images, p = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8), wild_params(8)
    with Watched():
        color_views_by_image(images, p, MEAN, STD)
    for name in ("mul", "add_", "sum", "clamp", "minimum", "copysign", "sub_", "copy_"):
        assert sizes[name] == 224 * 224 // 2, name
