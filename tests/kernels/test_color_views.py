"""color_views and color_params against their plain definitions (torchvision's semantics: tests/data/test_augment.py).

Covers: every order of operations, color jitter on, off and absent, gray, hues up to half a turn; odd sizes over
several tiles; patches, kept ones and all; the error against fp64 by the rule of all ops; black, white and gray
images; one channel; two crops of each image; fp16; the form without nonzero; one graph; layouts; poison; empty
batches; parameters bit by bit; errors.
The form for CPUs against the definition in fp64: sizes below, at and above a piece, every order, factors of 0, hues
up to half a turn, flat images, switches, channels, dtypes; where it is taken; that it computes on one thread.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from extrema_fast.kernels.color_views import (
    color_params,
    color_params_reference,
    color_views,
    color_views_by_image,
    color_views_plain,
    color_views_reference,
    reference,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels._compare import assert_as_good, assert_errors, draw_keep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# a hundredth of an 8-bit level, normalized
LEVEL = 0.01 / 255 / min(STD)
ORDERS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float32)


def params(batch):
    """Jittered, gray, neither or both: by image."""
    p = color_params(torch.arange(batch), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, seed=5, epoch=1)
    p[:, :, 0] = (torch.arange(batch) % 4 % 3 == 0).float()[:, None]
    p[:, :, 5] = (torch.arange(batch) % 4 > 1).float()[:, None]
    return p


def wild_params(batch):
    """Every order, on twice as often as off, factors from 0 to 2.5, hues up to half a turn either way."""
    p = color_params(torch.arange(batch), (1.5, 1.5, 1.5, 0.5), 0.67, 0.3, seed=7, epoch=0)
    p[:, :, 6:] = ORDERS[torch.arange(2 * batch) % 24].view(batch, 2, 4)
    p[:: batch // 4 + 1, :, 1:4] = 0
    p[1:4, :, 4] = torch.tensor([[0.5, -0.5], [1 / 6, -1 / 6], [1 / 3, 0.0]])[: len(p[1:4])]
    return p


def draw(batch, height, width):
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)


def close(a, b, tolerance=LEVEL):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.is_contiguous() == y.is_contiguous()
        assert float((x.double() - y.double()).abs().max()) <= tolerance


def agree(images, p, tolerance=LEVEL, **options):
    out = color_views(images, p, MEAN, STD, **options)
    close(out, color_views_reference(images, p, MEAN, STD, **options), tolerance)
    return out


def test_every_order():
    p = params(12)
    p[:, :, 0], p[:, :, 5], p[:, :, 6:] = 1, 0, ORDERS.view(12, 2, 4)
    agree(draw(12, 9, 7), p)


@pytest.mark.parametrize("size", [(1, 1), (40, 33)])
def test_sizes_and_switches(size):
    agree(draw(4, *size), params(4))


@pytest.mark.parametrize(
    ("size", "patch", "kept", "given"),
    [
        ((32, 48), 16, 2, params(4)),
        ((32, 48), 16, 2, None),
        ((24, 40), 8, 0, wild_params(4)),
        ((28, 42), 14, 4, wild_params(4)),
        ((8, 12), 4, 0, None),
        ((40, 40), 0, 0, wild_params(4)),
    ],
)
def test_patches_and_the_error_against_fp64(size, patch, kept, given, poisoned):
    images = draw(4, *size)
    keep = draw_keep(4, size[0] * size[1] // patch**2, 2, kept) if kept else None

    def views(f, dtype):
        return f(images, given, MEAN, STD, dtype=dtype, patch=patch, keep=keep)

    for a, b, c in zip(
        views(color_views, torch.float32),
        views(color_views_reference, torch.float32),
        views(color_views_reference, torch.float64),
        strict=True,
    ):
        assert_as_good(a, b, c, size[0] * size[1], "view")


@pytest.mark.parametrize("seed", [0, 2**63 - 25, -7])
def test_parameters_are_the_definitions(seed, poisoned):
    index = torch.tensor([0, 1, 7, 2**31, 2**33 + 5, *range(100, 300)])
    for strength, probabilities in (((0.4, 0.4, 0.2, 0.1), (0.8, 0.2)), ((1.5, 0.7, 0.0, 0.5), (0.3, 1.0))):
        keys = {"seed": seed, "epoch": 3, "streams": (2, 3)}
        ours = color_params(index, strength, *probabilities, **keys)
        assert torch.equal(ours, color_params_reference(index, strength, *probabilities, **keys))


def test_flat_images():
    images = torch.stack([torch.full((5, 5, 3), v, dtype=torch.uint8) for v in (0, 128, 255)])
    assert all(x.isfinite().all() for x in agree(images, params(3)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_channel_and_dtypes(dtype, channels):
    out = agree(
        draw(4, 9, 32), params(4), LEVEL if dtype == torch.float32 else 4e-3, channels=channels, dtype=dtype
    )
    assert out[0].dtype == dtype


def test_other_channels_are_normalized_alone():
    images = torch.randint(0, 256, (2, 8, 12, 5), dtype=torch.uint8)
    mean, std = torch.rand(5).tolist(), (0.1 + torch.rand(5)).tolist()
    m, s = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    wanted = ((images.double() / 255 - m) / s).permute(0, 3, 1, 2).contiguous()
    close(color_views(images, None, mean, std, channels=5), (wanted, wanted))
    keep = torch.tensor([[[4, 0], [2, 5]], [[1, 3], [3, 0]]], dtype=torch.int32)
    student, teacher = color_views(images, None, mean, std, channels=5, patch=4, keep=keep)
    cut = wanted.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 6, -1)
    kept = torch.stack([cut[b][keep[v, b].long()] for v in range(2) for b in range(2)])
    close((student, teacher), (kept, cut))


def separate(function, images, p, **options):
    """What two crops of each image give is what each alone gives."""
    found = function(images, p, MEAN, STD, **options)
    for view in range(2):
        alone = function(images[:, view].contiguous(), p, MEAN, STD, **options)[view]
        assert torch.equal(found[view], alone)


@pytest.mark.parametrize(
    ("size", "patch", "kept", "given", "channels"),
    [
        ((16, 48), 16, 2, params(4), 3),
        ((16, 24), 8, 0, wild_params(4), 1),
        ((28, 14), 14, 1, None, 3),
        # two tiles
        ((40, 33), 0, 0, wild_params(4), 3),
    ],
)
def test_two_crops_of_each_image(size, patch, kept, given, channels, poisoned):
    images = draw(8, *size).view(4, 2, *size, 3)
    keep = draw_keep(4, size[0] * size[1] // patch**2, 2, kept) if kept else None
    options = {"patch": patch, "keep": keep, "channels": channels}
    separate(color_views, images, given, **options)
    separate(color_views_reference, images, given, **options)
    agree(images, given, **options)


def test_two_crops_of_other_channels():
    images = torch.randint(0, 256, (2, 2, 8, 12, 5), dtype=torch.uint8)
    found = color_views(images, None, [0.5] * 5, [0.2] * 5, channels=5)
    for view in range(2):
        alone = color_views(images[:, view], None, [0.5] * 5, [0.2] * 5, channels=5)[view]
        assert torch.equal(found[view], alone)


def test_the_plain_path_and_fp64(plain):
    images = draw(3, 9, 7)
    a, b = color_views(images, params(3), MEAN, STD), color_views_plain(images, params(3), MEAN, STD)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    close(a, color_views(images, params(3), MEAN, STD, dtype=torch.float64))


def test_the_form_without_nonzero_is_the_same(monkeypatch):
    p, x = params(12), torch.rand(12, 3, 9, 7)
    rows = reference.jitter(x, p[:, 0, 1:5], p[:, 0, 6:].long())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(reference.jitter(x, p[:, 0, 1:5], p[:, 0, 6:].long()), rows)


def test_one_graph():
    images, p = draw(2, 8, 8), params(2)
    f = lambda x: color_views(x, p, MEAN, STD)[1] + 1  # noqa: E731
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(images), f(images))


def test_layouts_and_poison(poisoned):
    # the second image is off: its sums are never written
    images, p = draw(2, 40, 33), params(2)
    a = color_views(images, p, MEAN, STD)
    turned = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for x in (turned, torch.cat([images] * 2, 2)[:, :, :33]):
        assert all(torch.equal(i, j) for i, j in zip(color_views(x, p, MEAN, STD), a, strict=True))
    assert not a[0].isnan().any()


def test_errors():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    cases = [
        ((images.float(), params(2), MEAN, STD), {}, r"images: expected uint8 \[B, H, W, 3\], got float32"),
        ((images, params(3), MEAN, STD), {}, r"params: expected float32 \[2, 2, 10\]"),
        ((images[:, None], params(2), MEAN, STD), {}, r"images: expected uint8 \[B, 2, H, W, 3\]"),
        ((images, params(2), MEAN[:1], STD), {}, "mean, std: expected 3 numbers"),
        ((images, params(2), MEAN, STD), {"channels": 0}, "channels: expected at least 1, got 0"),
        ((images, None, MEAN, STD), {"channels": 2}, "images: expected uint8 .B, H, W, 2"),
        ((images.repeat(1, 1, 1, 2), params(2), MEAN * 2, STD * 2), {"channels": 6}, "params: .* RGB, got 6"),
        ((images, params(2), MEAN, STD), {"dtype": torch.int8}, "dtype: expected"),
        ((images, params(2), MEAN, STD), {"patch": 3}, "patch: expected 0 or a divisor of 8 and 8, got 3"),
        ((images, params(2), MEAN, STD), {"keep": draw_keep(2, 4, 1, 2)}, "keep: needs `patch`"),
    ]
    assert_errors(color_views, cases)
    for keep, words in ((draw_keep(2, 4, 1, 2) + 4, r"in \[0, 4\)"), (draw_keep(2, 4, 1, 0), "K from 1")):
        assert_errors(color_views, [((images, params(2), MEAN, STD), {"patch": 4, "keep": keep}, words)])
    keys = {"seed": 0, "epoch": 0}
    assert_errors(color_params, [((torch.arange(2), (0.4,), 0.8, 0.2), keys, "strength: expected four")])


# ---- the form for CPUs -----------------------------------------------------------------------------


@pytest.mark.plain
@pytest.mark.parametrize("size", [(1, 1), (50, 33), (181, 181), (181, 182), (131, 501)])
def test_image_by_image_is_the_definition(size):
    batch = 96 if size[0] < 100 else 12
    images, p = draw(batch, *size), wild_params(batch)
    # saturated corners of the color cube and gray pixels
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
def test_image_by_image_of_two_crops():
    images = draw(8, 48, 64).view(4, 2, 48, 64, 3)
    separate(color_views_by_image, images, wild_params(4), patch=16)
    # what a CPU takes for images of this size
    found, taken = (f(images, params(4), MEAN, STD) for f in (color_views_by_image, color_views_plain))
    assert all(torch.equal(a, b) for a, b in zip(found, taken, strict=True))


@pytest.mark.plain
@pytest.mark.parametrize("channels", [1, 3])
def test_image_by_image_switches_channels_and_dtypes(channels):
    images, p = draw(4, 48, 64), params(4)
    wanted = color_views_reference(images, p, MEAN, STD, channels=channels)
    for dtype, tolerance in ((torch.float32, LEVEL), (torch.bfloat16, 2.0**-7), (torch.float16, 4e-3)):
        found = color_views_by_image(images, p, MEAN, STD, dtype=dtype, channels=channels)
        assert found[0].dtype == dtype
        close(found, wanted, tolerance * 2.7)
    turned = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    again = color_views_by_image(turned, p, MEAN, STD, dtype=torch.float16, channels=channels)
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@pytest.mark.plain
def test_image_by_image_flat_and_empty():
    images = torch.stack([torch.full((7, 9, 3), v, dtype=torch.uint8) for v in (0, 1, 128, 255)] * 12)
    found = color_views_by_image(images, wild_params(48), MEAN, STD)
    close(found, color_views_reference(images, wild_params(48), MEAN, STD))
    assert color_views_by_image(images[:0], params(0), MEAN, STD)[1].shape == (0, 3, 7, 9)


@pytest.mark.plain
def test_where_image_by_image_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(reference, "color_views_by_image", lambda *a, **k: taken.append("image"))
    monkeypatch.setattr(reference, "color_views_reference", lambda *a, **k: taken.append("batch"))
    for side in (47, 48):
        color_views_plain(draw(2, side, side), params(2), MEAN, STD)
    # its arithmetic would break a graph
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    color_views_plain(draw(2, 48, 48), params(2), MEAN, STD)
    assert taken == ["batch", "image", "batch"]


@pytest.mark.plain
def test_no_operation_is_split_over_threads():
    # torch splits what is larger than a piece; an image of 224 pixels is
    assert reference.PIECE == 32768
    sizes: dict[str, int] = {}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            sizes[name] = max(sizes.get(name, 0), args[0].numel() if isinstance(args[0], torch.Tensor) else 0)
            return func(*args, **(kwargs or {}))

    with Watched():
        color_views_by_image(draw(8, 224, 224), wild_params(8), MEAN, STD)
    for name in ("mul", "add_", "sum", "clamp", "minimum", "copysign", "sub_", "copy_"):
        assert sizes[name] == 224 * 224 // 2, name
