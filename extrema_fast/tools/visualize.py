"""`extrema-fast visualize`: pictures of an encoder's attention and features, and a page to explore them by patch.

Images are encoded whole, each with a grid of its own aspect ratio, finer than in training if the image has the pixels:
sin-cos positions are interpolated, a learned table is resampled.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..data.augment import normalize
from ..data.frames import is_video, read_frames
from ..data.image_files import ImageFiles, read_as
from ..data.pixels import shown
from ..data.sources import ImageSource, open_source, subset
from ..distributed import pick_device
from ..errors import DataError, UsageError, cannot_import
from ..evaluation.features import Embedded, cap, extract
from ..files import new_folder, read_text, write_file
from ..models.encoder import Encoder
from ..progress import ImageProgress
from ..reporting import figures
from ..reporting.figures import PATCH_PICTURES, Table, patch_table
from ..reporting.patches import Patches, compress, flat_tokens, pca_colors, read_patches, salient
from ..reporting.report import render
from ..weights.load import load_encoder
from .search import SIDE, Tile, is_image_file, read_bytes, write_sheet

log = logging.getLogger(__name__)

# pictures of sets, and the fewest images of each; where nothing is asked, both are made of so many
OF_SETS, SET = {"neighbors": 2, "map": 4}, 12
PICTURES = (*PATCH_PICTURES, *OF_SETS)
MAPS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "the two first principal components"}
# in a page of this file, whose folder alone is replaced
MADE = "<!-- extrema_fast pictures -->"
PAGE, SHEET, NEIGHBORS, VIDEO, MAP = "index.html", "patches.png", "neighbors.png", "pca.gif", "map.tsv"
# patches along the longer side where nothing is asked, and pixels of an image as it is shown
FINE, SHOWN_SIDE, FRAME_SIDE = 32, 512, 256
# images of neighbors and of the map, and pixels of a neighbor's side as it is shown, at least
MOST, NEIGHBOR_SIDE = 4000, 128


class Seen(NamedTuple):
    """One image: its name, (width, height) in pixels, uint8 [h, w, 3] to be shown, and what the encoder makes of it."""

    name: str
    size: tuple[int, int]
    pixels: np.ndarray
    patches: Patches

    def patch_at(self, x: int, y: int) -> tuple[int, int]:
        """(row, column) of the patch that holds a pixel; UsageError outside the image."""
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"--patch: {x} {y} is outside {self.name}, {width} x {height} pixels")
        rows, columns = self.patches.grid
        return y * rows // height, x * columns // width


def visualize(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path = "pictures",
    *,
    make: Sequence[str] = (),
    patch: tuple[int, int] | None = None,
    show: int = 8,
    patches: int | None = None,
    frames: int = 48,
    map: str | None = None,
    which: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> Path:
    """Writes pictures of an encoder's attention and features on images, and a page to explore them.

    The folder gets `index.html`, which is self-contained and lets you select patches; `patches.png`, with the attention
    of each head, the similarity to a patch, and a PCA of the patch tokens as colors for each image; for a video
    `pca.gif`; for larger sets `neighbors.png` and `map.tsv`.

    Args:
        weights: Weights as accepted by `load_encoder`.
        images: Image files, a video, or images as accepted by `open_source`.
        out: The folder; earlier pictures are replaced.
        make: Pictures to make, from `PICTURES`; empty: all that are possible.
        patch: (x, y) in pixels of the first image: compare the patches of all images to the patch there; None: compare
            to each image's most attended patch.
        show: Maximum number of images whose patches are shown, evenly spaced.
        patches: Number of patches along the longer side of an image; None: 32, or fewer for small images, but at least
            as many as in training.
        frames: Maximum number of video frames, evenly spaced.
        map: `tsne`, `umap` or `pca`; None: t-SNE if scikit-learn is installed, otherwise PCA.
        which: `teacher` or `student`; None: as in `load_encoder`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        force: Replace a folder `out` that holds other files.

    Returns:
        The path of the page.

    Raises:
        UsageError: An invalid option, or one that these weights or images do not support.
        DataError: No image can be decoded.
    """
    _check(make, show, patches, frames, map)
    out, device_ = Path(out), pick_device(device)
    _check_target(out, force)
    given = [os.fspath(i) for i in ([images] if isinstance(images, (str, Path)) else images)]
    # what is missing is said before anything is computed
    render("parts.html.j2")
    with ExitStack() as held:
        encoder = load_encoder(weights, which)
        if "attention" in make and not encoder.num_prefix_tokens:
            raise UsageError(
                f"{weights}: this encoder has no class attention (global_pool {encoder.global_pool!r}); leave it out: "
                "--make similarity pca neighbors map"
            )
        source, milliseconds = _open(given, frames, held)
        source = read_as(source, encoder.in_chans)
        if milliseconds and set(make) & set(OF_SETS):
            raise UsageError("--make: neighbors and map are of images, not of the frames of a video")
        for name in make:
            if len(source) < (least := OF_SETS.get(name, 1)):
                raise UsageError(f"--make {name}: needs at least {least} images, got {len(source)}")
        is_set = not milliseconds and len(source) >= SET
        wanted = make or (PICTURES if is_set else PATCH_PICTURES)
        method = _method(map) if "map" in wanted else ""
        eyes = _Eyes(weights, which, encoder, device_, patches)
        of_patches = [name for name in PATCH_PICTURES if name in wanted]
        seen = eyes.look(source, len(source) if milliseconds else show) if of_patches else []
        page, files = _patch_pictures(seen, of_patches, patch, show, milliseconds)
        rest = [name for name in wanted if name in OF_SETS]
        if rest:
            more, these = _set_pictures(encoder, source, device_, rest, method)
            page, files = page | more, files | these
    html = render(
        "visualize.html.j2",
        made=MADE,
        title=_title(given),
        identity=_identity(weights, encoder, given, source, seen),
        **_EMPTY | page,
    )
    with new_folder(out, lambda path: _check_target(path, force)) as folder:
        write_file(folder / PAGE, (html + "\n").encode("utf-8", "replace"))
        for name, write in files.items():
            write(folder / name)
    return out / PAGE


# what a page without a picture says of it
_EMPTY: dict[str, Any] = dict.fromkeys(("tokens", "frames", "table", "neighbors", "map")) | {
    "notes": [],
    "images": [],
    "names": [],
    "ratios": [],
    "gradient": "",
    "patch": "",
    "method": "",
}
Files = dict[str, Callable[[Path], None]]


def describe(page: Path) -> str:
    """What `extrema-fast visualize` prints at its end."""
    others = sorted(p.name for p in page.parent.iterdir() if p != page)
    return "\n".join([str(page), *(f"  {name}" for name in others)])


def _check(make: Sequence[str], show: int, patches: int | None, frames: int, map: str | None) -> None:
    for name in make:
        if name not in PICTURES:
            raise UsageError(f"--make: expected {', '.join(PICTURES)}, got {name!r}")
    for option, value in (("--show", show), ("--patches", patches), ("--frames", frames)):
        if value is not None and value < 1:
            raise UsageError(f"{option}: expected at least 1, got {value}")
    if map is not None and map not in MAPS:
        raise UsageError(f"--map: expected {', '.join(MAPS)}, got {map!r}")


def _check_target(out: Path, force: bool) -> None:
    """UsageError unless `out` can become a folder of pictures: nothing, or earlier ones, or any folder with `force`."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"--out {out}: is no folder; choose another --out")
    page = out / PAGE
    ours = page.is_file() and MADE in read_text(page, errors="replace")
    if not (ours or force) and any(out.iterdir()):
        raise UsageError(
            f"--out {out}: holds other files; choose another --out, or --force to replace all of it"
        )


def _title(given: Sequence[str]) -> str:
    first = os.path.basename(os.path.normpath(given[0])) or given[0]
    return first if len(given) == 1 else f"{first} and {len(given) - 1} more"


def _identity(
    weights: str | Path, encoder: Encoder, given: Sequence[str], source: ImageSource, seen: Sequence[Seen]
) -> list[tuple[str, list[str]]]:
    width, depth, heads = encoder.config.shape
    rows, columns = encoder.grid
    about = [f"ViT: width {width}, {depth} blocks, {heads} heads, patches of {encoder.patch_size} pixels"]
    about.append(f"trained on {rows} x {columns} patches")
    shown = f", the patches of {len(seen)} of them" if 0 < len(seen) < len(source) else ""
    found = [
        ("weights", [str(weights)]),
        ("encoder", about),
        ("images", [f"{_title(given)}: {len(source):,}{shown}"]),
    ]
    if grids := list(dict.fromkeys(s.patches.grid for s in seen)):
        several = ", ..." if len(grids) > 6 else ""
        found.append(("grid", [", ".join(f"{r} x {c}" for r, c in grids[:6]) + f"{several} patches"]))
    return found


# ---- images ---------------------------------------------------------------------------------------


def _open(given: Sequence[str], frames: int, held: ExitStack) -> tuple[ImageSource, int]:
    """The images, and the milliseconds of a frame of a video (0: images)."""
    if not given:
        raise UsageError("no images given; name image files, a video, or a folder")
    if len(given) == 1 and is_video(given[0]):
        found = read_frames(given[0], frames)
        # files like any others, so that they are read like any others
        folder = Path(held.enter_context(TemporaryDirectory()))
        paths = []
        for i, im in enumerate(found.images):
            paths.append(str(folder / f"{i:04d}.png"))
            im.save(paths[-1], compress_level=1)
        names = [f"frame {i + 1}" for i in range(len(paths))]
        return ImageSource(given[0], paths, None, [], "", names=names), found.milliseconds
    paths = [os.path.expanduser(g) for g in given]
    if len(given) == 1 and not is_image_file(paths[0]):
        return open_source(given[0], "test"), 0
    for name, path in zip(given, paths, strict=True):
        if not os.path.isfile(path):
            what = "give one folder alone, or image files" if os.path.isdir(path) else "no such file"
            raise UsageError(f"{name}: {what}")
        if not is_image_file(path):
            raise UsageError(f"{name}: no image file; several arguments are image files")
    return ImageSource(_title(given), paths, None, [], "", names=list(given)), 0


class _Eyes:
    """An encoder for images of any size."""

    def __init__(
        self,
        weights: str | Path,
        which: str | None,
        encoder: Encoder,
        device: torch.device,
        patches: int | None,
    ) -> None:
        self.weights, self.which, self.encoder, self.device = weights, which, encoder.to(device), device
        self.patches = patches
        self.learned = isinstance(encoder.pos_embed, torch.nn.Parameter)
        # a finer grid has positions between those of training, not beyond them
        encoder.sincos.coords = "rescaled"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches that an image is cut into, in its proportions."""
        longer = max(width, height)
        most = min(FINE, longer // self.encoder.patch_size)
        count = max(*self.encoder.grid, most) if self.patches is None else self.patches
        return max(1, round(height * count / longer)), max(1, round(width * count / longer))

    def look(self, source: ImageSource, count: int) -> list[Seen]:
        """At most `count` evenly spaced images; one that cannot be decoded is left out, with a warning."""
        n = len(source)
        rows = [int((j + 0.5) * n / count) for j in range(count)] if n > count else list(range(n))
        cfg = DataConfig(exif=True, range=self.encoder.value_range or (0.0, 0.0))
        files, seen, problem = ImageFiles(source, cfg), [], None
        with ImageProgress("encoding patches", len(rows)) as bar:
            for row in rows:
                try:
                    im = files.image(row, np.frombuffer(files.read(row), np.uint8))
                except DataError as error:
                    log.warning("left out: %s", error)
                    problem = error
                else:
                    folder = "" if source.labels is None else f"{source.classes[int(source.labels[row])]}/"
                    seen.append(self._see(folder + os.path.basename(source.title(row)), im))
                bar.advance(1)
        files.close()
        if not seen and problem is not None:
            raise problem
        return seen

    def _see(self, name: str, im: Any) -> Seen:
        from PIL import Image

        width, height = im.size
        grid, side = self.grid(width, height), self.encoder.patch_size
        kernel = Image.Resampling[self.encoder.interpolation.upper()]

        def resized(unit: int) -> np.ndarray:
            x = np.array(im.resize((grid[1] * unit, grid[0] * unit), kernel))
            return x[..., None] if x.ndim == 2 else x

        x = torch.from_numpy(resized(side))[None].to(self.device)
        encoder = self._at((grid[0] * side, grid[1] * side))
        (patches,) = read_patches(encoder, normalize(x, encoder.mean, encoder.std, encoder.in_chans))
        # as large as it is, up to what a page shows
        unit = max(side, min(SHOWN_SIDE, max(width, height)) // max(grid))
        return Seen(name, (width, height), shown(resized(unit)), patches)

    def _at(self, size: tuple[int, int]) -> Encoder:
        """The encoder for images of a size in pixels."""
        if self.learned and size != self.encoder.img_size:
            # from the file, since a table that was resampled has lost something
            self.encoder = load_encoder(self.weights, self.which, img_size=size).to(self.device)
        return self.encoder


# ---- pictures of patches ---------------------------------------------------------------------------


def _patch_pictures(
    seen: Sequence[Seen], make: Sequence[str], patch: tuple[int, int] | None, show: int, milliseconds: int
) -> tuple[dict[str, Any], Files]:
    """What the page shows of the patches of images, and the files."""
    if not seen:
        return {}, {}
    colors = pca_colors([s.patches for s in seen]) if "pca" in make else None
    page: dict[str, Any] = {}
    files: Files = {}
    if milliseconds and colors is not None:
        animation = _animation(seen, colors, milliseconds)
        files[VIDEO] = lambda path: write_file(path, animation)
        address = "data:image/gif;base64," + base64.b64encode(animation).decode("ascii")
        page["frames"] = {"count": len(seen), "address": address}
    n = len(seen)
    at = [int((j + 0.5) * n / show) for j in range(show)] if n > show else list(range(n))
    seen = [seen[i] for i in at]
    if colors is not None:
        colors = ([colors[0][i] for i in at], [colors[1][i] for i in at])
    chosen = None if patch is None else seen[0].patch_at(*patch)
    images = [s.patches for s in seen]
    table = patch_table(images, make, at=chosen, colors=colors)
    where = f"the framed patch of {seen[0].name}" if chosen else "each image's most attended patch (framed)"
    page |= {
        "table": table._asdict() | {"rows": table.addresses()},
        "images": [figures.data_uri(s.pixels, figures.QUALITY) for s in seen],
        "names": [s.name for s in seen],
        "ratios": [s.pixels.shape[1] / s.pixels.shape[0] for s in seen],
        "gradient": figures.gradient(),
        "patch": where,
    }
    if "similarity" in make:
        small = compress(flat_tokens(images))
        log.debug("tokens of the page: %s, cosines to %.3f", list(small.codes.shape), small.error)
        page["tokens"] = {
            "codes": base64.b64encode(small.codes.tobytes()).decode("ascii"),
            "weights": [float(f"{w:.6g}") for w in small.weights],
            "grids": [image.grid for image in images],
            "colors": figures.ramp(33),
            "chosen": [0, *(chosen or salient(images[0]))],
        }
    files[SHEET] = lambda path: write_sheet(path, _tiles(seen, table))
    return page, files


def _over(pixels: np.ndarray, overlay: np.ndarray | None, side: int) -> Any:
    """A PIL image of at most `side` pixels a side: the pixels with what lies over them, patch by patch."""
    from PIL import Image

    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    im = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    if overlay is not None:
        im.alpha_composite(Image.fromarray(overlay).convert("RGBA").resize(size, Image.Resampling.NEAREST))
    return im.convert("RGB")


def _tiles(seen: Sequence[Seen], table: Table) -> list[list[Tile]]:
    """The table as tiles of a sheet."""
    lines = []
    for one, row in zip(seen, table.rows, strict=True):
        line: list[Tile] = []
        for title, overlay in zip(table.titles, row, strict=True):
            first, second = (
                (one.name, "{} x {} patches".format(*one.patches.grid)) if not line else (title, "")
            )
            line.append(Tile(_over(one.pixels, overlay, SIDE), first, second))
        lines.append(line)
    return lines


def _animation(
    seen: Sequence[Seen], colors: tuple[list[np.ndarray], list[np.ndarray]], milliseconds: int
) -> bytes:
    """A GIF file: each frame, its components as colors, and those of the foreground."""
    from PIL import Image

    frames = []
    for one, *over in zip(seen, *colors, strict=True):
        tiles = [_over(one.pixels, overlay, FRAME_SIDE) for overlay in (None, *over)]
        frame = Image.new("RGB", (3 * tiles[0].width + 8, tiles[0].height), (255, 255, 255))
        for i, tile in enumerate(tiles):
            frame.paste(tile, (i * (tile.width + 4), 0))
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file.getvalue()


# ---- pictures of sets ------------------------------------------------------------------------------


def _set_pictures(
    encoder: Encoder, source: ImageSource, device: torch.device, make: Sequence[str], method: str
) -> tuple[dict[str, Any], Files]:
    """Neighbors and map of a set of images, by their class tokens at the encoder's own size."""
    # by Pillow, as the patches: for so few images DALI starts longer than it decodes
    cfg = DataConfig(loader="pil", exif=True, range=encoder.value_range or (0.0, 0.0))
    chosen = cap(source, MOST, 0)
    features = extract(encoder, chosen, cfg, batch_size=32, device=device, strict=False)
    found = Embedded(subset(chosen, features.rows), features.cls)
    page: dict[str, Any] = {}
    files: Files = {}
    if "neighbors" in make:
        larger = -(-NEIGHBOR_SIDE // max(encoder.img_size))
        size = (larger * encoder.img_size[0], larger * encoder.img_size[1])
        shown_ = page["neighbors"] = figures.neighbors(encoder, found, found, cfg, size=size)
        lines = []
        for row in shown_["rows"]:
            line = [Tile(read_bytes(found.source, row["row"]), "query", _name(found.source, row))]
            line += [
                Tile(read_bytes(found.source, n["row"]), f"{n['cosine']:.3f}", _name(found.source, n))
                for n in row["near"]
            ]
            lines.append(line)
        files[NEIGHBORS] = lambda path: write_sheet(path, lines, exif=True)
    if "map" in make:
        place = None if method == "pca" else {"tsne": _tsne, "umap": _umap}[method]
        page["map"] = shown_ = figures.embedding_map(found, place)
        page["method"] = MAPS[method]
        lines_ = ["path\tclass\tx\ty"]
        for row, (x, y) in zip(shown_["rows"], shown_["places"], strict=True):
            labels = found.source.labels
            label = "" if labels is None else found.source.classes[int(labels[row])]
            title = found.source.title(row).replace("\t", " ").replace("\n", " ")
            lines_.append(f"{title}\t{label}\t{x:.5g}\t{y:.5g}")
        text = "\n".join(lines_) + "\n"
        files[MAP] = lambda path: write_file(path, text)
    return page, files


def _name(source: ImageSource, found: dict[str, Any]) -> str:
    return found["name"] or os.path.basename(source.title(found["row"]))


def _method(map: str | None) -> str:
    """The method of the map; t-SNE where nothing is asked, if it is installed."""
    if map == "pca":
        return map
    try:
        if map == "umap":
            import umap  # noqa: F401
        else:
            import sklearn.manifold  # noqa: F401
    except ImportError as error:
        if map is None:
            log.info("map by PCA, since scikit-learn is not installed (--map tsne, --map umap)")
            return "pca"
        package, extra = ("umap-learn", "umap") if map == "umap" else ("scikit-learn", "visualize")
        raise UsageError(f"--map {map}: {cannot_import(package, error, extra)}") from None
    return map or "tsne"


def _tsne(x: Tensor) -> Tensor:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    return torch.from_numpy(
        TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(x.numpy())
    )


def _umap(x: Tensor) -> Tensor:
    import umap

    near = min(15, len(x) - 1)
    # its spectral start needs more than a few images
    start = "spectral" if len(x) > 2 * near else "random"
    return torch.from_numpy(umap.UMAP(near, random_state=0, n_jobs=1, init=start).fit_transform(x.numpy()))
