"""Images with segmentation masks, in the folder layouts of VOC and ADE20K, or a plain one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.image_source import ImageSource
from ..data.sources import EXTENSIONS, SPLITS, subset
from ..errors import UsageError, counted
from ..files import read_text

# of pixels that belong to no class, in every layout
IGNORED = 255
_VOC = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
VOC = _VOC.split(", ")
ADE_CLASSES = 150
# where archives unpack to
_VOC_ROOTS = ("", "VOC2012", "VOCdevkit/VOC2012", "VOC2007", "VOCdevkit/VOC2007")
_ADE_ROOTS = ("", "ADEChallengeData2016")
_EXPECTED = (
    "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt (VOC); images/ and annotations/ with "
    "training/ and validation/ (ADE20K); or images/ and masks/ with train/ and val/ or test/"
)


class MaskSet(NamedTuple):
    """Images and the mask of each.

    Attributes:
        source: The images, without labels.
        masks: PNG files of class numbers, one for each image.
        layout: `voc`, `ade20k` or `plain`.
        classes: Names, as far as the layout knows them; empty: as many as the masks show.
    """

    source: ImageSource
    masks: list[str]
    layout: str
    classes: list[str]

    def state(self) -> tuple[str, list[str], list[tuple[int, int]]]:
        """Layout, classes, and size and time of each mask's file: of masks that were changed another one."""
        return self.layout, self.classes, [(s.st_size, s.st_mtime_ns) for s in map(os.stat, self.masks)]

    def only(self, rows: Tensor) -> MaskSet:
        """The given rows ([k] int64)."""
        return self._replace(source=subset(self.source, rows), masks=[self.masks[r] for r in rows.tolist()])

    def mask(self, row: int, size: Sequence[int] | None = None) -> np.ndarray:
        """The class numbers of a row's image, [H, W] uint8; pixels of no class are `IGNORED`.

        Raises:
            UsageError: The mask is not of the image's `size` (height, width; None: not checked), not of class numbers,
                or has classes that the layout lacks.
        """
        from PIL import Image

        file = self.masks[row]
        try:
            with Image.open(file) as opened:
                mode, values = opened.mode, np.array(opened)
        except OSError as error:
            raise UsageError(f"{file}: cannot be read as a mask ({error})") from None
        if values.ndim != 2 or mode not in ("P", "L"):
            raise UsageError(
                f"{file}: an image of mode {mode}; a mask has one class number per pixel (8 bits, gray or palette)"
            )
        if size is not None and tuple(values.shape) != tuple(size):
            raise UsageError(
                f"{file}: {values.shape[0]} x {values.shape[1]} pixels, its image {self.source.title(row)} has "
                f"{size[0]} x {size[1]}; a mask has the size of its image"
            )
        if self.layout == "ade20k":
            # 0 is no class there: uint8 wraps it to 255
            values = values - np.uint8(1)
        if self.classes:
            largest = int(values[values != IGNORED].max(initial=0))
            if largest >= len(self.classes):
                raise UsageError(
                    f"{file}: class number {largest}, but {self.layout} has {len(self.classes)} classes"
                )
        return values


def open_masks(folder: str) -> tuple[MaskSet, MaskSet]:
    """Training and test images with masks below a folder, whose layout is found out.

    Raises:
        UsageError: None of the layouts, a split without images, or images without a mask (named).
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one that holds {_EXPECTED}")
    for below in _VOC_ROOTS:
        if (root / below / "SegmentationClass").is_dir():
            return _voc(folder, root / below, "train"), _voc(folder, root / below, "val")
    for below in _ADE_ROOTS:
        if (root / below / "annotations").is_dir():
            return tuple(_tree(folder, root / below, "annotations", s) for s in ("train", "test"))  # type: ignore
    if (root / "masks").is_dir():
        return tuple(_tree(folder, root, "masks", s) for s in ("train", "test"))  # type: ignore
    raise UsageError(f"{folder}: no masks; expected a folder that holds {_EXPECTED}")


def _voc(name: str, root: Path, split: str) -> MaskSet:
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not file.is_file():
        raise UsageError(
            f"{file}: does not exist; it names the images of {name} that are {split}, one in each line"
        )
    stems = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    return _paired(f"{name} {split}", images, root / "SegmentationClass", "voc", VOC)


def _tree(name: str, root: Path, masks: str, split: str) -> MaskSet:
    names = (*SPLITS[split], "training" if split == "train" else "validation")
    found = next((n for n in names if (root / "images" / n).is_dir()), None)
    if found is None:
        raise UsageError(
            f"{root / 'images'}: no {split} images; expected one of the folders {', '.join(names)}"
        )
    folder = root / "images" / found
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
    if not (root / masks / found).is_dir():
        raise UsageError(f"{root / masks / found}: does not exist; it holds the masks of {folder}")
    ade = masks == "annotations"
    return _paired(
        f"{name} {found}", images, root / masks / found, "ade20k" if ade else "plain", _ade_names(root) * ade
    )


def _ade_names(root: Path) -> list[str]:
    """Names of ADE20K's classes, where its table is there: the first of each list of synonyms."""
    table, names = root / "objectInfo150.txt", [str(i + 1) for i in range(ADE_CLASSES)]
    if table.is_file():
        lines = read_text(table).splitlines()[1 : ADE_CLASSES + 1]
        names[: len(lines)] = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    return names


def _paired(name: str, images: list[Path], masks: Path, layout: str, classes: list[str]) -> MaskSet:
    if not images:
        raise UsageError(f"{name}: no images")
    files = [masks / f"{image.stem}.png" for image in images]
    for what, paths in (("images", images), ("masks", files)):
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UsageError(
                f"{name}: {counted(len(missing), 'file')} of {len(paths)} {what} missing, first: {missing[0]}; each "
                "image needs a mask of its name in .png"
            )
    digest = hashlib.sha256()
    for path in (*images, *files):
        digest.update(f"{path.parent.name}/{path.name} {os.stat(path).st_size}\n".encode())
    source = ImageSource(name, [str(p) for p in images], None, [], digest.hexdigest())
    return MaskSet(source, [str(f) for f in files], layout, list(classes))


def shares(mask: np.ndarray, grid: tuple[int, int], classes: int) -> Tensor:
    """[rows * columns, classes] fp32: which share of the pixels of each patch of a grid is of each class.

    Pixels of no class count in the whole, so a row's sum is the share that has one.
    """
    rows, columns = grid
    y, x = (
        ((np.arange(n) + 0.5) * g / n).astype(np.int64)
        for n, g in zip(mask.shape, (rows, columns), strict=True)
    )
    patch = y[:, None] * columns + x
    labeled = mask != IGNORED
    counts = np.bincount(
        patch[labeled] * classes + mask[labeled].astype(np.int64), minlength=rows * columns * classes
    ).reshape(-1, classes)
    pixels = np.bincount(patch.ravel(), minlength=rows * columns)
    return torch.from_numpy(counts / np.maximum(pixels, 1)[:, None]).float()


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> Tensor:
    """[classes, classes] int64: pixels of each true class (rows) by predicted class, without those of no class."""
    labeled = truth != IGNORED
    pairs = truth[labeled].astype(np.int64) * classes + predicted[labeled].astype(np.int64)
    return torch.from_numpy(np.bincount(pairs, minlength=classes * classes)).view(classes, classes)


def intersection_over_union(counts: Tensor) -> list[float | None]:
    """IoU of each class from its confusion [classes, classes]; None: neither there nor predicted."""
    inter, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return [i / u if u else None for i, u in zip(inter.tolist(), union.tolist(), strict=True)]


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that are there or predicted."""
    known = [v for v in intersection_over_union(counts) if v is not None]
    return sum(known) / len(known) if known else 0.0
