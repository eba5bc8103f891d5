"""The two built-in image sets, written once as image files into the cache folder.

`photos`: grayscale crops of the photographs that scikit-image ships inside its package (nothing is downloaded). Each
photograph is a class; training crops come from its left half and test crops from its right half, at random positions,
scales, flips and brightness. `synthetic`: generated textures, to test that a run works. Both are ordinary folders of
class folders.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import rng
from ..errors import StorageError, UsageError, install
from ..files import new_folder, read_json

log = logging.getLogger(__name__)

TEXTURES = ("blobs", "checks", "rings", "stripes")
# What decides the files of a set, and with them the name of its folder: raise `version` whenever the same recipe would
# give other files. `size` is the side of the stored square images in pixels; `scale` the side of a crop as a share of
# the short side of its half photograph (evaluation uses the central 7/8 of it, 0.25 to 0.6 of that side); each crop is
# multiplied by a number from [1 - brightness, 1 + brightness].
PHOTOS_RECIPE: dict[str, Any] = {
    "set": "photos",
    "version": 1,
    # photographs and micrographs inside the scikit-image wheel. Left out: drawings and masks, the second
    # stereo image of the motorcycle (a near copy of the first) and the 102-pixel microaneurysms
    "photos": [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "page.png",
        "retina.jpg",
        "rocket.jpg",
        "text.png",
    ],
    "size": 48,
    "counts": {"train": 120, "test": 60},
    "scale": [0.29, 0.69],
    "brightness": 0.5,
    "seed": 0,
}
SYNTHETIC_RECIPE: dict[str, Any] = {
    "set": "synthetic",
    "version": 1,
    "size": 48,
    "counts": {"train": 24, "test": 12},
    "seed": 0,
}
MARKER = "COMPLETE.json"


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/extrema_fast`, or `~/.cache/extrema_fast`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "extrema_fast"


def write_photos(recipe: dict[str, Any] = PHOTOS_RECIPE) -> Path:
    """Writes the `photos` set on the first call, and finds it again on later ones.

    Returns:
        The folder with `train/<photo>/NNNN.png` and `test/<photo>/NNNN.png`.

    Raises:
        UsageError: scikit-image or one of its photographs is missing, or the folder is damaged.
        StorageError: the cache folder cannot be written.
    """

    def write(root: Path) -> None:
        for number, path in enumerate(_photo_files(recipe["photos"])):
            halves = dict(zip(("train", "test"), _halves(path), strict=True))
            for epoch, (split, half) in enumerate(halves.items()):
                for u, file in _files(root / split / path.stem, recipe, number, epoch, 5, "png"):
                    _crop(half, u.tolist(), recipe).save(file, compress_level=1)

    return _write_once(recipe, write)


def write_synthetic(recipe: dict[str, Any] = SYNTHETIC_RECIPE) -> Path:
    """Writes generated colored textures as JPEG files in four classes, as `write_photos` does its set."""

    def write(root: Path) -> None:
        image = _pillow()
        for number, name in enumerate(TEXTURES):
            for epoch, split in enumerate(("train", "test")):
                for u, file in _files(root / split / name, recipe, number, epoch, 10, "jpg"):
                    image.fromarray(_texture(name, u, recipe["size"]).numpy()).save(file, quality=95)

    return _write_once(recipe, write)


def _files(
    folder: Path, recipe: dict[str, Any], number: int, epoch: int, numbers: int, suffix: str
) -> list[tuple[torch.Tensor, Path]]:
    """(random numbers [numbers], file) of each image of a class; the folder is made."""
    folder.mkdir(parents=True)
    index = torch.arange(recipe["counts"][folder.parent.name]) + (number << 32)
    drawn = rng.uniform(index, numbers, seed=recipe["seed"], epoch=epoch, stream=rng.CROP)
    return [(u, folder / f"{row:04d}.{suffix}") for row, u in enumerate(drawn)]


def _photo_files(names: list[str]) -> list[Path]:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError(
            "photos: the built-in images come with scikit-image, which is not installed; "
            f"{install('train')}, or give --data.train a folder of images"
        )
    data = Path(spec.origin).parent / "data"
    missing = [name for name in names if not (data / name).is_file()]
    if missing:
        raise UsageError(
            f"photos: {len(missing)} of {len(names)} photographs are not in {data}, first: {missing[0]}; "
            'this scikit-image packs other files: pip install "scikit-image>=0.25,<0.27"'
        )
    return [data / name for name in names]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise UsageError(f"the built-in images need Pillow: {install('train')}") from e
    return Image


def _halves(path: Path) -> tuple[Any, Any]:
    # separate images: a crop of one half cannot reach a pixel of the other, not even when resizing
    with _pillow().open(path) as im:
        gray = im.convert("L")
    # the color profile of the original is wrong for it, and libpng complains at every read
    gray.info.clear()
    w, h = gray.size
    return gray.crop((0, 0, w // 2, h)), gray.crop((w - w // 2, 0, w, h))


def _crop(half: Any, u: list[float], recipe: dict[str, Any]) -> Any:
    image = _pillow()
    (w, h), size, (low, high) = half.size, recipe["size"], recipe["scale"]
    side = max(1, round(min(w, h) * (low + (high - low) * u[0])))
    x, y = int(u[1] * (w - side + 1)), int(u[2] * (h - side + 1))
    crop = half.crop((x, y, x + side, y + side)).resize((size, size), image.Resampling.BILINEAR)
    if u[3] < 0.5:
        crop = crop.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    gain = 1 + recipe["brightness"] * (2 * u[4] - 1)
    return crop.point([min(255, round(v * gain)) for v in range(256)])


def _texture(name: str, u: torch.Tensor, size: int) -> torch.Tensor:
    """[size, size, 3] uint8: a pattern of period, angle and phase from `u`, between two colors."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, period = 2 * torch.pi * u[0], 2 * torch.pi * (3 + 5 * u[1])
    a = x * torch.cos(angle) + y * torch.sin(angle)
    b = y * torch.cos(angle) - x * torch.sin(angle)
    phase = 2 * torch.pi * u[2]
    if name == "stripes":
        wave = torch.sin(period * a + phase)
    elif name == "checks":
        wave = torch.sign(torch.sin(period * a + phase) * torch.sin(period * b + phase))
    elif name == "rings":
        wave = torch.sin(period * (a * a + b * b).sqrt() + phase)
    else:
        wave = (torch.sin(period * a + phase) + torch.cos(period * b - phase)) / 2
    mix = (wave + 1)[..., None] / 2
    first, second = u[4:7] * 0.6, 0.4 + u[7:10] * 0.6
    return ((first + (second - first) * mix) * 255).round().clamp(0, 255).to(torch.uint8)


class _Complete(Exception):
    pass


def _write_once(recipe: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of a recipe, filled by `write` unless it is complete.

    The marker inside holds the recipe and the number of files: a folder without a marker or with files missing is
    never taken for the data set.
    """
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    root = cache_root() / f"{recipe['set']}-{key}"

    def check(root: Path) -> None:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            wanted = read_json(root / MARKER, {}).get("files", "those of the set")
            present = sum(1 for p in root.rglob("*") if p.is_file() and p.name != MARKER)
            if present != wanted:
                raise UsageError(
                    f"{recipe['set']}: {root} holds {present} files instead of {wanted}; delete it, it is written "
                    "again by the next start"
                )
            raise _Complete

    try:
        with new_folder(root, check) as work:
            write(work)
            files = sum(1 for p in work.rglob("*") if p.is_file())
            (work / MARKER).write_text(json.dumps({**recipe, "files": files}, indent=1) + "\n")
        log.info("%s: wrote %d images to %s", recipe["set"], files, root)
    except StorageError as e:
        raise StorageError(f"{recipe['set']}: {e}; set XDG_CACHE_HOME to a writable folder") from e
    except _Complete:
        pass
    return root
