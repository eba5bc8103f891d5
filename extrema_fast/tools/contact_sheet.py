"""A picture of rows of images with two lines of text under each, as `search` draws its results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import StorageError, UsageError
from ..files import new_file

SOFTWARE = "extrema-fast search"
SIDE, GAP, MARGIN, FONT = 144, 12, 16, 14
INK, GREY, PAPER, LINE = (29, 35, 48), (98, 107, 122), (255, 255, 255), (205, 209, 217)


class Tile(NamedTuple):
    """One image: the bytes of its file (None: not there), and the text under it, first bold in tone."""

    data: bytes | None
    first: str
    second: str


def check_target(path: Path, force: bool) -> None:
    """UsageError unless `path` can become a PNG file: free, an earlier sheet, or any file with `force`."""
    image = _pillow()
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a file that ends in .png, got {path}")
    if path.is_dir():
        raise UsageError(f"--out {path}: is a folder; expected a file that ends in .png")
    if not path.exists() or force:
        return
    try:
        with image.open(path) as im:
            ours = im.info.get("Software") == SOFTWARE
    except Exception:
        # whatever it is, it is no picture of ours
        ours = False
    if not ours:
        raise UsageError(f"--out {path}: there is another file; choose a new name, or --force to replace it")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(
            'pictures need Pillow, which is not installed; pip install "extrema-fast[train]"'
        ) from None
    return Image


def write_sheet(path: Path, lines: list[list[Tile]], *, exif: bool = False) -> None:
    """A PNG file with one line of tiles after the other; the first tile of each, the query, stands apart.

    exif    rotate by the EXIF tag
    raises  StorageError when the file cannot be written
    """
    image = _pillow()
    from PIL import ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    font = ImageFont.load_default(FONT)
    text = 2 * (FONT + 5)
    step, row = SIDE + GAP, SIDE + text + 2 * GAP
    width = 2 * MARGIN + max(map(len, lines)) * step - GAP + GAP
    sheet = image.new("RGB", (width, 2 * MARGIN + len(lines) * row - 2 * GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        y = MARGIN + i * row
        for j, tile in enumerate(line):
            # a wider gap and a rule between the query and what was found
            x = MARGIN + j * step + (GAP if j else 0)
            sheet.paste(_thumbnail(tile.data, exif), (x, y))
            for n, (words, colour) in enumerate(((tile.first, INK), (tile.second, GREY))):
                draw.text((x, y + SIDE + 4 + n * (FONT + 4)), _fit(words, font), fill=colour, font=font)
        x = MARGIN + SIDE + GAP
        draw.line([(x, y), (x, y + SIDE + text)], fill=LINE, width=2)
    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    try:
        with new_file(path) as f:
            sheet.save(f, format="PNG", pnginfo=marks)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from None


def _thumbnail(data: bytes | None, exif: bool) -> Any:
    """A square of SIDE pixels: the whole image, small ones enlarged, with its own proportions; grey without one."""
    image = _pillow()
    from PIL import ImageOps

    square = image.new("RGB", (SIDE, SIDE), (238, 240, 243))
    if data is None:
        return square
    try:
        with image.open(io.BytesIO(data)) as im:
            im = ImageOps.exif_transpose(im) if exif else im
            im = ImageOps.contain(im.convert("RGB"), (SIDE, SIDE), image.Resampling.BICUBIC)
    except Exception:
        # nearly anything, for damaged bytes
        return square
    square.paste(im, ((SIDE - im.width) // 2, (SIDE - im.height) // 2))
    return square


def _fit(text: str, font: Any) -> str:
    """The text, its middle replaced by an ellipsis where it is wider than a tile."""
    if font.getlength(text) <= SIDE:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
        if font.getlength(short) <= SIDE:
            return short
    return "…"
