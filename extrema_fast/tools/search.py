"""`extrema-fast search`: the images of an index that are nearest to a query, as a table and as a contact sheet.

The search is exact: every feature is compared by cosine similarity, part by part, so memory does not grow with the
index.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DataConfig
from ..data.image_files import read_as
from ..data.loader import choose_loader
from ..data.pixels import is_deep, open_array, plugins, range_of, shown, to_8_bit, to_levels
from ..data.sources import EXTENSIONS, NPY, UNREAD, ImageSource, open_source
from ..distributed import World, pick_device
from ..errors import ExtremaError, StorageError, UsageError, install
from ..evaluation.subject import weights_hash
from ..files import write_file
from ..progress import ImageProgress
from ..weights import load as convert
from .embed import Job, Settings, encode_batch
from .embeddings import ROWS, Embeddings, Row, load_embeddings

log = logging.getLogger(__name__)

# found for each query by default
NEIGHBORS = 10
# queries compared at a time, and queries in one picture
QUERIES, SHEET_QUERIES = 4096, 24
# of the picture: what its metadata says, pixels, colors
SOFTWARE = "extrema-fast search"
SIDE, GAP, MARGIN, FONT = 144, 12, 16, 14
INK, GRAY, PAPER, LINE = (29, 35, 48), (98, 107, 122), (255, 255, 255), (205, 209, 217)


def search(
    query: str | Path,
    index: str | Path,
    *,
    k: int | None = None,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
) -> list[dict[str, Any]]:
    """Finds the `k` images in `index` nearest to each query, by cosine similarity of their features.

    Args:
        query: an image file; a path listed in the index's rows.tsv (its stored features are used, and it is excluded
            from its own results); or images as accepted by `open_source`.
        index: a folder written by `embed` with class tokens or mean tokens.
        k: number of neighbors; None: 10, or all if there are fewer.
        out: PNG file for a contact sheet: one row per query (at most 24), the query on the left, its neighbors to the
            right.
        weights: current location of the index's weights, if they were moved; the weights must be the same.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        force: replace `out` even if it is not an earlier contact sheet.

    Returns:
        For each query a dict with its path as "query" and its "neighbors", a list of {"path", "label", "row", "score"},
        best first.

    Raises:
        UsageError: an invalid option, or an index or weights that do not match.
        DataError: a query cannot be decoded.
    """
    embeddings = load_embeddings(index)
    if len(embeddings.shape) > 1:
        raise UsageError(
            f"{index}: holds patch tokens, {list(embeddings.shape)} per image; search needs one vector: "
            "extrema-fast embed DATA OUT --weights PATH --tokens class (or mean)"
        )
    if out is not None:
        check_target(Path(out), force)
    where = pick_device(device)
    own = _own_rows(embeddings, [str(query)])
    (named,) = own
    if named is not None:
        queries, names, images = _feature(embeddings, named[0]), [named[1].path], None
    else:
        images = _query_images(str(query))
        names = [images.title(i) for i in range(len(images))]
        own = _own_rows(embeddings, names)
    # a query that is in the index is not its own neighbor
    held = any(own)
    there = len(embeddings) - held
    if k is None:
        k = min(NEIGHBORS, there)
    if not 1 <= k <= there:
        raise UsageError(f"--k: expected 1 to {there}, the {'other ' * held}images of {index}, got {k}")
    if images is not None:
        queries = _encode(embeddings, images, weights, where)
    scores, places = nearest(queries, embeddings, k + held, where)
    if held:
        scores, places = _without(
            scores, places, torch.tensor([-1 if row is None else row[0] for row in own])
        )
    rows = _rows_at(embeddings, {int(p) for p in places.flatten()})
    result = [
        {
            "query": name,
            "neighbors": [
                {"path": rows[p].path, "label": rows[p].label, "row": rows[p].row, "score": round(s, 6)}
                for s, p in zip(found_scores, found_places, strict=True)
            ],
        }
        for name, found_scores, found_places in zip(names, scores.tolist(), places.tolist(), strict=True)
    ]
    if out is not None:
        _draw(Path(out), result, images, named, embeddings)
    return result


def nearest(
    queries: Tensor, embeddings: Embeddings, k: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosine similarity [Q, k] and feature row [Q, k] of the k nearest to each query [Q, D], on the CPU.

    The best come first; equal ones in row order.
    """
    queries = F.normalize(queries.float(), dim=1).to(device)
    best = torch.empty(len(queries), 0, device=device)
    at = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for first, part in _shown(embeddings):
        bank = F.normalize(part.float().to(device), dim=1)
        found = []
        for q, b, a in zip(queries.split(QUERIES), best.split(QUERIES), at.split(QUERIES), strict=True):
            every = q @ bank.T
            score, place = every.topk(min(k, len(bank)), dim=1)
            if ((every >= score[:, -1:]).sum(1) > score.shape[1]).any():
                # which of equal ones topk takes is not said
                score, place = (x[:, :k] for x in every.sort(dim=1, descending=True, stable=True))
            place, order = place.sort(dim=1)
            score, place = torch.cat([b, score.gather(1, order)], 1), torch.cat([a, place + first], 1)
            score, order = score.sort(dim=1, descending=True, stable=True)
            found.append((score[:, :k], place.gather(1, order)[:, :k]))
        best, at = (torch.cat(x) for x in zip(*found, strict=True))
    return best.cpu(), at.cpu()


def _shown(embeddings: Embeddings) -> Iterator[tuple[int, Tensor]]:
    """The parts that hold something; how far this is, is shown."""
    with ImageProgress("searching", len(embeddings)) as bar:
        for first, part in embeddings.parts():
            if len(part):
                yield first, part
            bar.advance(len(part))


# ---- the query ------------------------------------------------------------------------------------


def _own_rows(embeddings: Embeddings, names: list[str]) -> list[tuple[int, Row] | None]:
    """(feature row, image) that each name has in the index, literally or as the same file; None: it is not there."""
    begin = embeddings.config["data"].get("cwd", os.getcwd())
    spellings = [(n, os.path.abspath(n), os.path.relpath(n, begin)) for n in names]
    wanted = {spelling for each in spellings for spelling in each}
    found: dict[str, tuple[int, Row]] = {}
    for place, row in enumerate(embeddings.rows()):
        if row.path in wanted:
            found.setdefault(row.path, (place, row))
    return [next((found[s] for s in each if s in found), None) for each in spellings]


def _feature(embeddings: Embeddings, place: int) -> Tensor:
    for first, part in embeddings.parts():
        if place < first + len(part):
            return part[place - first][None]
    raise AssertionError("a row of rows.tsv without features")


def _query_images(query: str) -> ImageSource:
    path = Path(query).expanduser()
    if is_image_file(path):
        return ImageSource(query, [str(path)], None, [], "")
    if not path.exists() and path.suffix.lower() in (*EXTENSIONS, *UNREAD, NPY):
        raise UsageError(f"{query}: neither an image file nor a path in the index's rows.tsv")
    return open_source(query)


def is_image_file(path: str | Path) -> bool:
    """Whether a path is a file that is one image, by its ending."""
    return Path(path).is_file() and Path(path).suffix.lower() in (*EXTENSIONS, *plugins(), NPY)


def _encode(
    embeddings: Embeddings, images: ImageSource, weights: str | Path | None, device: torch.device
) -> Tensor:
    """[n, D] features of the query images, made as those of the index."""
    made = embeddings.config["weights"]
    path = Path(weights or made["path"])
    settings = Settings.from_json(embeddings.config["settings"])
    if not path.exists():
        raise UsageError(
            f"{path}: the weights of this index are gone; name where they are now with --weights PATH "
            "(a query that is an image of the index needs none)"
        )
    encoder = convert.load_encoder(path, made["which"], img_size=settings.img_size)
    if weights_hash(encoder) != made["hash"]:
        raise UsageError(
            f"{path}: other weights ({weights_hash(encoder)}) than those of the index ({made['hash']}), so features "
            "cannot be compared; give the right ones with --weights PATH, or embed again with these"
        )
    loader: Literal["auto", "dali", "pil"]
    try:
        loader = choose_loader(settings.loader)
    except UsageError:
        log.warning(
            "the index was made with the %s loader, which is not here; pixels differ by rounding",
            settings.loader,
        )
        loader = "auto"
    images = read_as(images, encoder.in_chans)
    if images.channels not in (1, 3):
        loader = "auto"
    cfg = DataConfig(loader=loader, exif=settings.exif, range=settings.range or (0.0, 0.0))
    job = Job(encoder.to(device).eval(), images, settings, cfg, 32, World(device), strict=True)
    found = []
    with ImageProgress("encoding queries", len(images)) as bar:
        for batch, index in job.images(images):
            found.append(encode_batch(job, batch, index))
            bar.advance(len(index))
    return torch.cat(found)


# ---- the result -----------------------------------------------------------------------------------


def _without(scores: Tensor, places: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The results of each query less itself (own: [Q]), or the last where it is not among them."""
    others = places != own[:, None]
    others[:, -1] &= ~others.all(1)
    return scores[others].view(len(own), -1), places[others].view(len(own), -1)


def _rows_at(embeddings: Embeddings, places: set[int]) -> dict[int, Row]:
    found = {place: row for place, row in enumerate(embeddings.rows()) if place in places}
    if len(found) < len(places):
        raise UsageError(f"{embeddings.folder / ROWS}: has fewer lines than there are features; embed again")
    return found


def _draw(
    out: Path,
    result: list[dict[str, Any]],
    images: ImageSource | None,
    own: tuple[int, Row] | None,
    embeddings: Embeddings,
) -> None:
    if len(result) > SHEET_QUERIES:
        log.warning("%s: shows the first %d of %d queries", out, SHEET_QUERIES, len(result))
    source = _index_images(embeddings)
    exif = embeddings.config["settings"]["exif"]

    def tiles() -> Iterator[list[Tile]]:
        for i, one in enumerate(result[:SHEET_QUERIES]):
            data = read_bytes(source, own[1].row) if own is not None else read_bytes(images, i)
            line = [Tile(data, "query", os.path.basename(one["query"]))]
            for found in one["neighbors"]:
                name = found["label"] or os.path.basename(found["path"])
                line.append(Tile(read_bytes(source, found["row"]), f"{found['score']:.3f}", name))
            yield line

    write_sheet(out, list(tiles()), exif=exif)


def _index_images(embeddings: Embeddings) -> ImageSource | None:
    """The images of the index, to be shown; None, with a warning, where they are not what they were."""
    d = embeddings.config["data"]
    try:
        source = open_source(d["path"], d["split"], limit=d["limit"], check=False)
    except ExtremaError as error:
        log.warning("the images of the index cannot be shown: %s", error)
        return None
    if source.fingerprint != d["fingerprint"]:
        log.warning("%s: the images have changed since the index was made, so they are not shown", d["path"])
        return None
    return source


def read_bytes(source: ImageSource | None, row: int) -> bytes | None:
    try:
        return None if source is None else source.read(row)
    except OSError:
        return None


def format_table(result: list[dict[str, Any]]) -> str:
    """The result as text: per query its path, then score, label and path of what was found."""
    lines: list[str] = []
    for one in result:
        lines += ["", one["query"]] if lines else [one["query"]]
        width = max(len(n["label"]) for n in one["neighbors"])
        for n in one["neighbors"]:
            label = f"{n['label']:<{width}}  " if width else ""
            lines.append(f"  {n['score']:+.4f}  {label}{n['path']}")
    return "\n".join(lines)


# ---- the picture ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """One image: the bytes of its file (None: not there) or itself, and the text under it, first bold in tone."""

    data: Any
    first: str
    second: str


def check_target(path: Path, force: bool) -> None:
    """UsageError unless `path` can become a PNG file: free, an earlier sheet, or any file with `force`."""
    image = _pillow()
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UsageError(f"--out {path}: expected a file that ends in .png")
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
        raise UsageError(f"pictures need Pillow, which is not installed; {install('train')}") from None
    return Image


def write_sheet(path: Path, lines: list[list[Tile]], *, exif: bool = False) -> None:
    """A PNG file with one line of tiles after the other; the first tile of each, the query, stands apart."""
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
            made = tile.data is not None and not isinstance(tile.data, bytes)
            sheet.paste(_centered(tile.data) if made else _thumbnail(tile.data, exif), (x, y))
            for n, (words, color) in enumerate(((tile.first, INK), (tile.second, GRAY))):
                draw.text((x, y + SIDE + 4 + n * (FONT + 4)), _fit(words, font), fill=color, font=font)
        x = MARGIN + SIDE + GAP
        draw.line([(x, y), (x, y + SIDE + text)], fill=LINE, width=2)
    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    # encoded before anything is on disk, where a killed process would leave it
    data = io.BytesIO()
    sheet.save(data, format="PNG", pnginfo=marks, optimize=True)
    try:
        write_file(path, data.getvalue())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from None


def _thumbnail(data: bytes | None, exif: bool) -> Any:
    """A square of SIDE pixels: the whole image, small ones enlarged, with its own proportions; gray without one."""
    image = _pillow()
    from PIL import ImageOps

    if data is None:
        return _centered()
    try:
        if array := open_array(io.BytesIO(data), None):
            values = array.values(None)
            im = image.fromarray(shown(to_levels(values, range_of(values))))
        else:
            im = image.open(io.BytesIO(data))
            im = ImageOps.exif_transpose(im) if exif else im
            if is_deep(im):
                im = to_8_bit(im, range_of(np.asarray(im)))
        im = ImageOps.contain(im.convert("RGB"), (SIDE, SIDE), image.Resampling.BICUBIC)
    except Exception:
        # nearly anything, for damaged bytes
        return _centered()
    return _centered(im)


def _centered(im: Any = None) -> Any:
    """A PIL image of at most SIDE pixels a side in the middle of a gray square."""
    square = _pillow().new("RGB", (SIDE, SIDE), (238, 240, 243))
    if im is not None:
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
