"""The two built-in image sets, written once as image files into a cache folder.

`photos`: grayscale crops of the photographs that scikit-image ships inside its package (nothing is
downloaded). Class = photograph; training crops come from its left half, test crops from its right
half, each at a random place, scale, flip and brightness. `synthetic`: generated textures, for runs
that only have to run. Both are ordinary class-folder trees, so the usual reader path serves them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import rng
from ..errors import StorageError, UsageError

log = logging.getLogger(__name__)

# photographs and micrographs inside the scikit-image wheel. Left out: drawings and masks, the second
# stereo image of the motorcycle (a near copy of the first) and the 102-pixel microaneurysms
PHOTOS = (
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
)
TEXTURES = ("blobs", "checks", "rings", "stripes")
MARKER = "COMPLETE.json"

# part of the cache key: raise it whenever the same parameters would give other files
_VERSION = 1
_STALE_SECONDS = 3600


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/extrema_fast`, or `~/.cache/extrema_fast`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "extrema_fast"


def write_photos(
    folder: str | Path | None = None,
    *,
    size: int = 48,
    train_per_photo: int = 120,
    test_per_photo: int = 60,
    scale: tuple[float, float] = (0.29, 0.69),
    brightness: float = 0.5,
    seed: int = 0,
) -> Path:
    """The `photos` set; written on the first call, found again on later ones.

    folder      data set root; None: a cache folder named by the parameters
    size        side of the stored square PNG files in pixels
    scale       side of a crop as a share of the short side of the half it is taken from; evaluation sees the
                central 7/8 of it, 0.25 to 0.6 of that side
    brightness  each crop is multiplied by a number from [1 - brightness, 1 + brightness]
    returns     the root, holding `train/<photo>/NNNN.png` and `test/<photo>/NNNN.png`
    raises      UsageError: scikit-image or one of its photographs is missing, a value is out of range,
                or `folder` holds something else; StorageError: the folder cannot be written
    """
    counts = {"train": train_per_photo, "test": test_per_photo}
    _require_positive("photos", size=size, train_per_photo=train_per_photo, test_per_photo=test_per_photo)
    _require(0 < scale[0] <= scale[1] <= 1, f"photos: scale: expected 0 < low <= high <= 1, got {scale}")
    _require(0 <= brightness < 1, f"photos: brightness: expected [0, 1), got {brightness}")
    recipe = {
        "set": "photos",
        "version": _VERSION,
        "photos": list(PHOTOS),
        "size": size,
        "counts": counts,
        "scale": list(scale),
        "brightness": brightness,
        "seed": seed,
    }

    def write(root: Path) -> None:
        for number, path in enumerate(photo_files()):
            left, right = _halves(path)
            for epoch, (split, half) in enumerate((("train", left), ("test", right))):
                index = torch.arange(counts[split]) + (number << 32)
                coins = rng.uniform(index, 5, seed=seed, epoch=epoch, stream=rng.CROP).tolist()
                target = root / split / path.stem
                target.mkdir(parents=True)
                for row, u in enumerate(coins):
                    crop = _crop(half, u, size, scale, brightness)
                    crop.save(target / f"{row:04d}.png", compress_level=1)

    return _write_once(folder, recipe, write)


def photo_files() -> list[Path]:
    """Where the photographs are; raises UsageError naming what is missing."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError(
            "photos: the built-in images come with scikit-image, which is not installed; "
            'pip install "extrema-fast[train]", or give --data.train a folder of images'
        )
    data = Path(spec.origin).parent / "data"
    missing = [name for name in PHOTOS if not (data / name).is_file()]
    if missing:
        raise UsageError(
            f"photos: {len(missing)} of {len(PHOTOS)} photographs are not in {data}, first: {missing[0]}; "
            'this scikit-image packs other files: pip install "scikit-image>=0.25,<0.27"'
        )
    return [data / name for name in PHOTOS]


def write_synthetic(
    folder: str | Path | None = None,
    *,
    size: int = 48,
    train_per_class: int = 24,
    test_per_class: int = 12,
    seed: int = 0,
) -> Path:
    """Generated coloured textures as JPEG files, four classes; written once, like `write_photos`.

    returns  the root, holding `train/<texture>/NNNN.jpg` and `test/<texture>/NNNN.jpg`
    raises   as `write_photos`; scikit-image is not needed
    """
    counts = {"train": train_per_class, "test": test_per_class}
    _require_positive("synthetic", size=size, train_per_class=train_per_class, test_per_class=test_per_class)
    recipe = {"set": "synthetic", "version": _VERSION, "size": size, "counts": counts, "seed": seed}

    def write(root: Path) -> None:
        image = _pillow()
        for number, name in enumerate(TEXTURES):
            for epoch, split in enumerate(counts):
                index = torch.arange(counts[split]) + (number << 32)
                coins = rng.uniform(index, 10, seed=seed, epoch=epoch, stream=rng.CROP)
                target = root / split / name
                target.mkdir(parents=True)
                for row, u in enumerate(coins):
                    pixels = _texture(name, u, size).numpy()
                    image.fromarray(pixels).save(target / f"{row:04d}.jpg", quality=95)

    return _write_once(folder, recipe, write)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UsageError(message)


def _require_positive(name: str, **values: int) -> None:
    for key, value in values.items():
        _require(value >= 1, f"{name}: {key}: expected at least 1, got {value}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise UsageError('the built-in images need Pillow: pip install "extrema-fast[train]"') from e
    return Image


def _halves(path: Path) -> tuple[Any, Any]:
    # separate images: a crop of one half cannot reach a pixel of the other, not even when resizing
    with _pillow().open(path) as im:
        gray = im.convert("L")
    # the colour profile of the original is wrong for it, and libpng complains at every read
    gray.info.clear()
    w, h = gray.size
    return gray.crop((0, 0, w // 2, h)), gray.crop((w - w // 2, 0, w, h))


def _crop(half: Any, u: list[float], size: int, scale: tuple[float, float], brightness: float) -> Any:
    image = _pillow()
    w, h = half.size
    side = max(1, round(min(w, h) * (scale[0] + (scale[1] - scale[0]) * u[0])))
    x, y = int(u[1] * (w - side + 1)), int(u[2] * (h - side + 1))
    crop = half.crop((x, y, x + side, y + side)).resize((size, size), image.Resampling.BILINEAR)
    if u[3] < 0.5:
        crop = crop.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    gain = 1 + brightness * (2 * u[4] - 1)
    return crop.point([min(255, round(v * gain)) for v in range(256)])


def _texture(name: str, u: torch.Tensor, size: int) -> torch.Tensor:
    """[size, size, 3] uint8: a pattern of period, angle and phase from `u`, between two colours."""
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
        wave = torch.sin(period * a + phase) + torch.cos(period * b - phase)
        wave = wave / 2
    mix = (wave + 1)[..., None] / 2
    first, second = u[4:7] * 0.6, 0.4 + u[7:10] * 0.6
    return ((first + (second - first) * mix) * 255).round().clamp(0, 255).to(torch.uint8)


def _write_once(folder: str | Path | None, recipe: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Runs `write` on a temporary sibling of `folder` and renames it; a finished folder is kept.

    The marker inside holds the recipe and the number of files: a folder with another recipe, without
    a marker, or with files missing is never taken for the data set.
    """
    name = recipe["set"]
    if folder is None:
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        root = cache_root() / f"{name}-{key}"
    else:
        root = Path(folder)
    if _is_complete(root, recipe):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
    except OSError as e:
        raise StorageError(
            f"{name}: cannot write {root}: {e.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from e
    try:
        write(work)
        work.chmod(0o755)
        files = sum(1 for p in work.rglob("*") if p.is_file())
        (work / MARKER).write_text(json.dumps({**recipe, "files": files}, indent=1) + "\n")
        try:
            # replaces an empty folder, and fails on one that another process finished meanwhile
            work.rename(root)
        except OSError:
            if not _is_complete(root, recipe):
                raise
        else:
            log.info("%s: wrote %d images to %s", name, files, root)
    except OSError as e:
        raise StorageError(f"{name}: cannot write {root}: {e.strerror or e}; is the disk full?") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def _is_complete(root: Path, recipe: dict[str, Any]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        found = {}
    if {k: v for k, v in found.items() if k != "files"} != recipe:
        raise UsageError(
            f"{recipe['set']}: {root} exists and holds something else; delete it or choose another folder"
        )
    present = sum(1 for p in root.rglob("*") if p.is_file() and p.name != MARKER)
    if present != found["files"]:
        raise UsageError(
            f"{recipe['set']}: {root} holds {present} files instead of {found['files']}; delete it, "
            "it is written again by the next start"
        )
    return True


def _remove_stale(root: Path) -> None:
    # what a killed process left; a young one may still be written by another process
    for old in root.parent.glob(f".{root.name}.*.tmp"):
        if time.time() - old.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
