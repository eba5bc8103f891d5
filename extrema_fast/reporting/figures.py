"""Figures for HTML pages: line charts as inline SVG, and pictures as inline PNG.

Charts are drawn by matplotlib; their colors are CSS variables of the page, so they follow its light or dark mode.
Pictures: what the student sees, where each pooling head attends, what patch tokens encode, nearest neighbors.
"""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..config import Config, DataConfig
from ..data.augment import normalize
from ..data.pixels import shown
from ..data.sources import ImageSource, match_classes, subset
from ..distributed import pick_device
from ..errors import UsageError
from ..evaluation.features import Embedded, cap, extract, load_batch
from ..models.masking import sample_views
from .patches import Patches, pca_colors, principal_components, read_patches, salient, similarity

if TYPE_CHECKING:
    from ..models.encoder import Encoder

MAX_POINTS = 400
# sizes of text in a chart, which is 346 units wide: about as many pixels on a phone
LABELS, LEGEND = 11, 10.5
# characters of a line in the legend of a chart
LEGEND_LINE = 40
# pixels of a side; larger pictures are averaged down to keep the report small
MAX_SIDE = 256
# pixels of a side; larger pictures are JPEG of this quality
LOSSLESS_SIDE, QUALITY = 64, 92
# training images searched for neighbors, and test images of the map, at most
BANK, MAPPED = 4000, 1000
# the map: colors, shapes (5 and 7 have no common factor: 35 pairs), and the largest classes that get a pair
COLORS, SHAPES, CLASSES = 7, 5, 28
MAP_WIDTH, MARGIN = 640, 8

# colors that matplotlib writes into the SVG, and the CSS variables put in their place
_TEXT, _GRID = "#010203", "#010204"
_CURVES = [f"#01020{5 + i}" for i in range(5)] + ["#01020a"]
_VARIABLES = {_TEXT: "--muted", _GRID: "--line"} | {c: f"--c{i}" for i, c in enumerate(_CURVES)}


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y); y None or not finite leaves a gap; `color` 0 to 5."""

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    dashed: bool = False


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a curve: means over equal runs of points; the last point stays itself."""
    if len(x) <= limit:
        return x, y
    at = np.linspace(0, len(x), limit, dtype=int)[:-1]
    counts = np.diff([*at, len(x)])
    good = np.isfinite(y)
    total, known = np.add.reduceat(np.where(good, y, 0), at), np.add.reduceat(good.astype(int), at)
    means = np.where(known > 0, total / np.maximum(known, 1), np.nan)
    return np.append(np.add.reduceat(x, at) / counts, x[-1]), np.append(means, y[-1])


def line_chart(
    title: str, series: Sequence[Series], *, percent: bool = False, zero: bool = False, xlabel: str = "step"
) -> str:
    """An `<svg>` with axes and legend; "" when no series holds a finite point.

    Args:
        title: The chart's accessible name; the page prints it above.
        series: Curves over `xlabel`.
        percent: y values are shares, shown as percentages.
        zero: The y axis starts at 0.
        xlabel: What the x axis counts.
    """
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure

    curves = []
    for s in series:
        x = np.array([p[0] for p in s.points], float)
        y = np.array([math.nan if p[1] is None else p[1] for p in s.points], float)
        y[~np.isfinite(y)] = math.nan
        if np.isfinite(y).any():
            curves.append((s, *thin(x, y)))
    if not curves:
        return ""
    # text stays text; equal input gives equal bytes
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes, labels = figure.subplots(), []
        for s, x, y in curves:
            # one point is no line
            marker = "o" if np.isfinite(y).sum() <= (1 if s.dashed else 25) else ""
            style: dict[str, Any] = {
                "linestyle": (0, (5, 4)) if s.dashed else "-",
                "linewidth": 1.3 if s.dashed else 1.8,
            }
            last = y[np.isfinite(y)][-1]
            label = f"{s.name}: {100 * last:.1f} %" if percent else f"{s.name}: {last:.4g}"
            # a browser's font is not that of the layout: lines end well before the edge
            labels.append("\n".join(textwrap.wrap(label, LEGEND_LINE)))
            axes.plot(x, y, color=_CURVES[s.color], marker=marker, markersize=3.5, **style)
        # every run begins at 0, where this curve begins later, too
        axes.update_datalim([(0, last)], updatey=False)
        axes.autoscale_view()
        if zero:
            axes.set_ylim(bottom=min(0.0, *(np.nanmin(y) for _, _, y in curves)))
        if percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=xlabel == "step"))
        axes.set_xlabel(xlabel, color=_TEXT, fontsize=LABELS)
        axes.tick_params(colors=_TEXT, labelsize=LABELS)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_TEXT)
        # long names would leave the figure in two columns
        columns = 1 if max(map(len, labels)) > LEGEND_LINE // 2 else 2
        # a legend of many rows must not shrink the axes
        rows = sum(1 + label.count("\n") for label in labels) // columns
        figure.set_figheight(3.0 + 0.21 * max(0, rows - 2))
        look = {"ncols": columns, "frameon": False, "labelcolor": _TEXT, "fontsize": LEGEND}
        legend = figure.legend(axes.lines, map(str, axes.lines), loc="outside upper left", **look)
        # as a label of matplotlib a name that starts with _ is hidden, and $ begins a formula
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set(text=label, parse_math=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """A matplotlib SVG file as part of an HTML page: no header, no metadata, CSS variables as colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    svg = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="%%">', svg, count=1
    )
    # names of groups repeat from chart to chart; what is referred to has hashed names
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("%%", safe, 1).strip()


# ---- pictures -------------------------------------------------------------------------------------


def data_uri(array: np.ndarray, quality: int = 0) -> str:
    """uint8 [H, W], [H, W, 3] or [H, W, 4] as an inline address: PNG, or with a quality JPEG."""
    from PIL import Image

    file, kind = io.BytesIO(), "jpeg" if quality else "png"
    Image.fromarray(array).save(file, kind, optimize=True, **({"quality": quality} if quality else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def photo_uri(image: np.ndarray) -> str:
    """An image of `small` as an inline address: lossless where it is tiny."""
    return data_uri(image, QUALITY if max(image.shape[:2]) > LOSSLESS_SIDE else 0)


def small(images: Tensor) -> np.ndarray:
    """uint8 [n, H, W, C] -> uint8 numpy [n, H, W, 3] (`shown`), area-averaged to at most `MAX_SIDE` pixels a side."""
    height, width = images.shape[1:3]
    factor = max(height, width) / MAX_SIDE
    if factor > 1:
        size = (max(1, round(height / factor)), max(1, round(width / factor)))
        x = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="area")
        images = x.round().to(torch.uint8).permute(0, 2, 3, 1)
    return shown(images.numpy())


def dropped(kept: np.ndarray) -> np.ndarray:
    """bool [gh, gw] -> RGBA: slate blue where a patch is dropped, clear where it is kept."""
    out = np.zeros((*kept.shape, 4), np.uint8)
    # not a gray, which would look like a part of a gray photograph
    out[~kept] = (112, 120, 156, 255)
    return out


def heat(values: np.ndarray, top: float, low: float = 0.0, alpha: float = 0.72) -> np.ndarray:
    """[gh, gw] -> RGBA of the color map viridis, `low` to `top`, partly transparent."""
    from matplotlib import colormaps

    return colormaps["viridis"]((values - low) / max(top - low, 1e-12), alpha=alpha, bytes=True)


def ramp(count: int) -> list[list[int]]:
    """`count` colors [r, g, b] of `heat`, from its lowest to its highest."""
    return heat(np.linspace(0, 1, count)[None], 1)[0, :, :3].tolist()


def gradient() -> str:
    """The colors of `heat` as those of a CSS gradient."""
    return ",".join("rgb({},{},{})".format(*color) for color in ramp(7))


def marked(grid: tuple[int, int], at: tuple[int, int] | None) -> np.ndarray:
    """RGBA [10 rows, 10 columns] of a grid of patches, clear but for a frame that marks the patch (row, column) `at`.

    In a coarse grid the frame lies on the patch, in a fine one around it, where it can still be seen.
    """
    out = np.zeros((10 * grid[0], 10 * grid[1], 4), np.uint8)
    if at is not None:
        row, column = 10 * at[0] + 5, 10 * at[1] + 5
        # white within black, to be seen on any image
        clear, white, black = (0, 3, 5) if max(grid) <= 16 else (6, 11, 15)
        for half, color in ((black, (0, 0, 0, 255)), (white, (255, 255, 255, 255)), (clear, (0, 0, 0, 0))):
            out[max(0, row - half) : row + half, max(0, column - half) : column + half] = color
    return out


class Table(NamedTuple):
    """What lies over images, a row per image: uint8 [h, w, 3 or 4] to be stretched over it; None: the image alone."""

    titles: list[str]
    rows: list[list[np.ndarray | None]]
    # the attention, in even shares, that has the brightest color; the cosine that has the darkest; None: none shown
    top: float | None = None
    low: float | None = None

    def addresses(self) -> list[list[str | None]]:
        """The rows as inline addresses."""
        return [[None if a is None else data_uri(a) for a in row] for row in self.rows]


def attention_top(maps: Sequence[np.ndarray]) -> float:
    """The attention, in even shares, of the brightest color: one for all maps, so that an undecided head is flat."""
    return max(2.0, float(np.quantile(np.concatenate([m.ravel() for m in maps]), 0.99)))


PATCH_PICTURES = ("attention", "similarity", "pca")


def patch_table(
    images: Sequence[Patches],
    make: Sequence[str] = PATCH_PICTURES,
    *,
    at: tuple[int, int] | None = None,
    colors: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None,
) -> Table:
    """Attention of each head, similarity to a patch, and principal components, of each image.

    Args:
        images: What the encoder made of them.
        make: Which of `PATCH_PICTURES`.
        at: (row, column) of the patch of the first image that patches of all images are compared to; None: of each
            image its own most attended patch (`salient`).
        colors: Of these images, by `pca_colors` of these or more; None: of these.
    """
    titles: list[str] = ["image"]
    rows: list[list[np.ndarray | None]] = [[None] for _ in images]
    top: float | None = None
    low: float | None = None
    if "attention" in make and (maps := [i.attention.numpy() for i in images if i.attention is not None]):
        top = attention_top(maps)
        blocks, heads = maps[0].shape[:2]
        both = [(p, h) for p in range(blocks) for h in range(heads)]
        titles += [f"block {p + 1}, head {h + 1}" if blocks > 1 else f"head {h + 1}" for p, h in both]
        for row, of_image in zip(rows, maps, strict=True):
            row += [heat(of_image[p, h], top) for p, h in both]
    if "similarity" in make:
        if at is None:
            chosen: list[tuple[int, int] | None] = [salient(image) for image in images]
            asked = [image.tokens[salient(image)] for image in images]
        else:
            chosen = [at] + [None] * (len(images) - 1)
            asked = [images[0].tokens[at]] * len(images)
        found = [similarity(image, token) for image, token in zip(images, asked, strict=True)]
        # nearly equal tokens must not look different
        low = min(0.9, *(float(f.min()) for f in found))
        titles += ["patch", "similar to it"]
        for row, image, mark, values in zip(rows, images, chosen, found, strict=True):
            row += [marked(image.grid, mark), heat(values, 1.0, low)]
    if "pca" in make:
        titles += ["patch PCA", "foreground PCA"]
        for row, *both_colors in zip(rows, *(colors or pca_colors(images)), strict=True):
            row += both_colors
    return Table(titles, rows, top, low)


@torch.inference_mode()
def samples(
    encoder: Encoder, initial: Encoder | None, source: ImageSource, cfg: Config, count: int
) -> dict[str, Any]:
    """`count` evenly spaced images of a source, each with what lies over it at patch resolution; nothing random.

    Args:
        encoder: The trained encoder.
        initial: The same architecture with random weights; None leaves its maps out.
        source: Test images.
        cfg: The run's configuration: its masks are shown.
        count: How many images.

    Returns:
        `images` (addresses), `size` (height, width), `views`, and two tables, `table` (masked views; attention of each
        pooling block, trained and initial) and `patches` (`patch_table`): `titles` of the columns; `rows`: per image
        its overlays in their order (None: the image alone); `top` and `low` of their colors. `gradient`.
    """
    images = load_batch(source, cfg.data, encoder.img_size, count, strict=False, resizing=encoder.resizing())
    x = normalize(images, cfg.data.mean, cfg.data.std, encoder.in_chans)
    n, (gh, gw), views = len(images), encoder.grid, cfg.mask.views
    keep = sample_views(n, gh * gw, cfg.num_keep, views, mode=cfg.mask.mode, seed=cfg.train.seed)
    mask = torch.zeros(n, views, gh * gw, dtype=torch.bool).scatter_(2, keep.long(), True)
    kept = mask.reshape(n, views, gh, gw).numpy()

    def attention(found: Sequence[Patches]) -> np.ndarray:
        # [n, blocks, gh, gw]: mean over heads; no blocks without class head
        maps = [p.attention.numpy().mean(1) for p in found if p.attention is not None]
        return np.stack(maps) if maps else np.zeros((n, 0, gh, gw))

    patches, first = read_patches(encoder, x), [] if initial is None else read_patches(initial, x)
    maps, before = attention(patches), attention(first)
    top = attention_top([maps]) if maps.size else None
    titles = ["image", *(f"view {v + 1}" for v in range(views))]
    for p in range(maps.shape[1]):
        titles += [f"attention, block {p + 1}"] + ([f"random, block {p + 1}"] if before.size else [])
    rows = []
    for i in range(n):
        over: list[np.ndarray | None] = [None, *(dropped(kept[i, v]) for v in range(views))]
        for p in range(maps.shape[1]):
            over += [heat(m[i, p], top or 1.0) for m in (maps, before) if m.size]
        rows.append(over)
    pictures = small(images)
    tables = Table(titles, rows, top), patch_table(patches)
    table, below = ({**t._asdict(), "rows": t.addresses()} for t in tables)
    return {
        "images": [photo_uri(a) for a in pictures],
        "channels": encoder.in_chans,
        "pixelated": max(pictures.shape[1:3]) <= LOSSLESS_SIDE,
        "size": pictures.shape[1:3],
        "table": table,
        "patches": below,
        "views": views,
        "gradient": gradient(),
    }


@torch.inference_mode()
def embed(encoder: Encoder, train: ImageSource, test: ImageSource, cfg: Config) -> tuple[Embedded, Embedded]:
    """(test images, training images) that `neighbors` and `embedding_map` show; the same twice without test images."""
    chosen = [cap(test, MAPPED, cfg.train.seed)]
    if test is not train:
        chosen.append(cap(train, min(BANK, cfg.eval.max_train), cfg.train.seed))
    found = []
    for source in chosen:
        device = pick_device("auto")
        features = extract(
            encoder, source, cfg.data, batch_size=cfg.eval.batch_size, device=device, strict=False
        )
        # without what cannot be decoded
        found.append(Embedded(subset(source, features.rows), features.cls))
    encoder.to("cpu")
    return found[0], found[-1]


@torch.inference_mode()
def neighbors(
    encoder: Encoder,
    test: Embedded,
    bank: Embedded,
    cfg: DataConfig,
    *,
    size: tuple[int, int] | None = None,
    queries: int = 6,
    k: int = 5,
) -> dict[str, Any]:
    """The `k` images of a bank that are nearest (cosine of class tokens) to evenly spaced test images.

    Args:
        test: Test images.
        bank: Training images; where it is `test`, an image is not its own neighbor.
        size: (height, width) of the pictures; None: those of the encoder.

    Returns:
        `rows`: per test image its row, address, class name and neighbors (row, address, class name, cosine, same class
        or None without labels); `searched`, `right` and `total`: counts; `others`: whether the bank is `test`; `size`
        (height, width); `pixelated`.
    """
    n = len(test.cls)
    count = min(queries, n)
    # offset against `samples`, so that other images are shown
    at = torch.tensor([int((j + 0.25) * n / count) for j in range(count)])
    asked = match_classes(subset(test.source, at), bank.source)
    cosine = F.normalize(test.cls[at], dim=1) @ F.normalize(bank.cls, dim=1).T
    itself = int(test is bank)
    if itself:
        cosine[torch.arange(count), at] = -math.inf
    near = cosine.topk(min(k, len(bank.cls) - itself), dim=1)
    size, resizing = size or encoder.img_size, encoder.resizing()
    nearest = subset(bank.source, near.indices.flatten())
    left, found = (
        small(load_batch(s, cfg, size, len(s), resizing=resizing)) if len(s) else np.zeros((0, *size, 3))
        for s in (asked, nearest)
    )
    labeled = asked.labels is not None and bank.source.labels is not None

    def name(labels: Tensor | None, i: int) -> str:
        return bank.source.classes[int(labels[i])] if labeled and labels is not None else ""

    rows, right = [], 0
    for i in range(count):
        row = []
        for j in range(near.indices.shape[1]):
            other = name(nearest.labels, i * near.indices.shape[1] + j)
            same = other == name(asked.labels, i) if labeled else None
            right += bool(same)
            image = photo_uri(found[i * near.indices.shape[1] + j])
            found_row = {"row": int(near.indices[i, j]), "image": image, "name": other, "same": same}
            row.append(found_row | {"cosine": float(near.values[i, j])})
        rows.append(
            {"row": int(at[i]), "image": photo_uri(left[i]), "name": name(asked.labels, i), "near": row}
        )
    return {
        "rows": rows,
        "searched": len(bank.cls) - itself,
        "right": right,
        "total": len(nearest) if labeled else 0,
        "others": bool(itself),
        "size": left.shape[1:3],
        "pixelated": max(left.shape[1:3]) <= LOSSLESS_SIDE,
    }


def embedding_map(test: Embedded, place: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """Images in a plane by their normalized class tokens.

    Args:
        test: The images; the same `MAPPED` of more.
        place: [n, D] fp32 -> [n, 2]; None: the two first principal components.

    Returns:
        `groups`: per class `name`, `images`, `color` and `shape` (numbers), `points` (x, y) in `size`, those of the
        largest classes; `others`: classes without a color, whose points come first, as a group of color None;
        `shares` of the variance, of principal components; `rows` of the images and their `places` as given, [n, 2];
        `images`; `size`.

    Raises:
        UsageError: fewer than three images.
    """
    n = len(test.cls)
    if n < 3:
        raise UsageError(f"a map needs at least 3 images, {test.source.name} has {n}")
    # a choice by a key: equal steps could leave classes out
    rows = rng.permutation(n, seed=0, epoch=0)[:MAPPED].sort().values
    x, shares = F.normalize(test.cls[rows], dim=1), list[float]()
    if place is None:
        y, shares = principal_components(x, 2)
    else:
        y = place(x).double()
    places = y.tolist()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    classes = [""]
    if test.source.labels is not None:
        labels, classes = test.source.labels[rows], test.source.classes
    # one scale for both axes, so that distances are true; the second component upwards
    low, span = y.min(0).values, (y.max(0).values - y.min(0).values).clamp_min(1e-12)
    scale = (MAP_WIDTH - 2 * MARGIN) / float(span.max())
    width, height = (scale * span + 2 * MARGIN).tolist()
    x = MARGIN + scale * (y[:, 0] - low[0])
    y = torch.stack([x, height - MARGIN - scale * (y[:, 1] - low[1])], dim=1)
    counts = torch.bincount(labels, minlength=len(classes))
    large = [int(c) for c in counts.argsort(descending=True, stable=True) if counts[c]]
    large, rest = (large, []) if len(large) <= CLASSES else (large[:CLASSES], large[CLASSES:])
    groups = []
    if rest:
        mask = torch.isin(labels, torch.tensor(rest))
        groups.append({"name": "", "color": None, "shape": 0, "points": y[mask].tolist()})
    for i, c in enumerate(sorted(large)):
        points = y[labels == c].tolist()
        groups.append({"name": classes[c], "color": i % COLORS, "shape": i % SHAPES, "points": points})
    return {
        "groups": groups,
        "others": len(rest),
        "labeled": test.source.labels is not None,
        "shares": shares,
        "rows": rows.tolist(),
        "places": places,
        "images": len(rows),
        "size": (width, height),
    }
