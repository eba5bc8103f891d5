"""crop_resize: byte for byte what Pillow makes, by the kernel and by the plain definition.

Covers: enlarging, reducing, one axis each way, sides equal, images of one pixel, boxes with fractions, sizes that are
no whole tiles, flips; images of different sizes in one buffer; poisoned outputs; a large result;
errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels._spec import meta
from extrema_fast.kernels.crop_resize import crop_resize

from tests.kernels._compare import assert_errors, assert_repeats

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


def held(shapes) -> tuple[torch.Tensor, list[np.ndarray], list[int]]:
    """(buffer, images, where they begin in it)."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    starts = np.cumsum([0, *(image.size for image in images)])[:-1]
    return torch.from_numpy(np.concatenate([image.ravel() for image in images])), images, starts.tolist()


def by_pillow(image, region, box, flip, size):
    top, left, height, width = region
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    y0, x0, y1, x1 = box
    # Pillow 13 resizes strong reductions of the height first, and rounds in between then
    wide = part.resize((size[1], height), Image.Resampling.BILINEAR, box=(x0, 0, x1, height))
    pixels = np.asarray(wide.resize(size[::-1], Image.Resampling.BILINEAR, box=(0, y0, size[1], y1)))
    return torch.from_numpy(pixels[:, ::-1].copy() if flip else pixels.copy())


# image's size, region (top, left, height, width), box in the region or None: all of it
CROPS = [
    ((32, 32), (3, 5, 19, 21), None),
    ((33, 57), (0, 0, 33, 57), None),
    ((45, 41), (7, 0, 36, 41), None),
    ((1, 1), (0, 0, 1, 1), None),
    ((24, 40), (0, 0, 24, 40), None),
    ((30, 50), (0, 0, 30, 50), (3.3, 4.75, 27.1, 46.2)),
    ((60, 6), (1, 1, 59, 3), None),
]


def test_the_bytes_of_pillow(path):
    # several tiles, none of them whole but the first
    size = (9, 33)
    pixels, images, starts = held([shape for shape, _, _ in CROPS])
    rows, wanted = [], []
    for i, (image, start, (shape, region, box)) in enumerate(zip(images, starts, CROPS, strict=True)):
        top, left, height, width = region
        box, pitch = box or (0, 0, height, width), 3 * shape[1]
        rows.append([start + top * pitch + 3 * left, pitch, height, width, *box, i % 2])
        wanted.append(by_pillow(image, region, box, i % 2, size))
    crops = torch.tensor(rows, dtype=torch.float64)
    made = crop_resize(pixels, crops, size)
    assert made.dtype == torch.uint8 and made.is_contiguous()
    for one, want, crop in zip(made, wanted, CROPS, strict=True):
        assert torch.equal(one, want), (crop, (one.int() - want.int()).abs().max())


def test_any_box_of_an_image(plain):
    """Many sizes, by the plain definition alone, which is fast enough for them."""
    ((image,), generator) = held([(97, 83)])[1], np.random.default_rng(1)
    for _ in range(60):
        height, width = int(generator.integers(1, 98)), int(generator.integers(1, 84))
        top, left = int(generator.integers(0, 98 - height)), int(generator.integers(0, 84 - width))
        size = tuple(generator.integers(1, 70, 2).tolist())
        crop = [3 * (83 * top + left), 3 * 83, height, width, 0, 0, height, width, 0]
        made = crop_resize(torch.from_numpy(image.ravel()), torch.tensor([crop], dtype=torch.float64), size)
        want = by_pillow(image, (top, left, height, width), (0, 0, height, width), 0, size)
        assert torch.equal(made[0], want), (crop, size)


def example():
    pixels, _, _ = held([(9, 11)])
    return pixels, torch.tensor([[0, 33, 9, 11, 0, 0, 9, 11, f] for f in (0, 1)], dtype=torch.float64)


def test_every_pixel_is_written(poisoned):
    pixels, crops = example()
    assert_repeats(lambda: (crop_resize(pixels, crops, (33, 8)),))


def test_a_large_result_fits_on_the_grid(monkeypatch):
    from extrema_fast.kernels.crop_resize import kernel

    grids = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    kernel.resize(meta(torch.uint8, 288), meta(torch.float64, 3, 9), 4096, 4096)
    # at most 65,535 on the second and third axis
    assert grids == [(3, 512, 128)]


def test_errors():
    pixels, crops = example()
    cases = [
        ((pixels.float(), crops, (8, 8)), {}, r"pixels: expected uint8 \[bytes\], got float32"),
        ((pixels, crops.float(), (8, 8)), {}, r"crops: expected float64 \[B, 9\], got float32 \[2, 9\]"),
        ((pixels, crops[:, :8], (8, 8)), {}, r"crops: expected float64 \[B, 9\], got float64 \[2, 8\]"),
        ((pixels, crops, (0, 8)), {}, r"size: expected \(height, width\)"),
        ((pixels[::2], crops, (8, 8)), {}, "pixels: expected contiguous"),
    ]
    assert_errors(crop_resize, cases)
