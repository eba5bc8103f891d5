"""Nearest images by features.

Covers: scores and order against a plain fp64 computation, over parts, ties in row order, empty parts; the query
as an image file, a path of the index (left out of its own results, also among equal images), a folder, one
image in a list; memory by part; the picture: tiles, text, what it may replace, images that are gone or changed;
patch tokens, unfinished indexes, weights that are gone or others, moved weights, k, queries that are no images;
the command line.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast.cli import main
from extrema_fast.errors import DataError, StorageError, UsageError
from extrema_fast.tools.embed import embed
from extrema_fast.tools.search import GAP, MARGIN, SIDE, Tile, format_table, nearest, search, write_sheet
from tests.tools.conftest import SMALL as EMBED
from tests.tools.conftest import random_weights, write_images

SMALL = {**EMBED, "part_images": 3}

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `images` (13, in two classes), `weights` and `index`."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "images", 13)
    random_weights(root / "weights")
    embed(str(root / "images"), root / "index", root / "weights", **SMALL)
    return root


@pytest.fixture
def moving(made, tmp_path) -> Path:
    """A copy that a test may spoil; its index knows the copy's weights and images."""
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copytree(made / "weights", tmp_path / "weights")
    embed(str(tmp_path / "images"), tmp_path / "index", tmp_path / "weights", **SMALL)
    return tmp_path


class Bank:
    """Features in parts, as `Embeddings` gives them."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self._parts = parts

    def parts(self):
        first = 0
        for part in self._parts:
            yield first, part
            first += len(part)

    def __len__(self):
        return sum(map(len, self._parts))


# ---- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "k", "at_a_time"), [((1,), 1, 9), ((19,), 5, 9), ((7, 0, 1, 11), 5, 9), ((2, 2, 39), 5, 2)]
)
def test_nearest_is_exact(sizes, k, at_a_time, monkeypatch):
    monkeypatch.setattr(importlib.import_module("extrema_fast.tools.search"), "QUERIES", at_a_time)
    parts = [torch.randn(n, 6) for n in sizes]
    queries = torch.randn(3, 6)
    scores, places = nearest(queries, Bank(*parts), k)
    bank = torch.cat(parts).double()
    cosine = (queries.double() @ bank.T) / queries.double().norm(dim=1)[:, None] / bank.norm(dim=1)
    want, where = cosine.topk(k, dim=1)
    assert torch.equal(places, where)
    torch.testing.assert_close(scores, want.float(), rtol=0, atol=1e-6)


def test_equal_features_come_in_row_order():
    one = torch.tensor([[1.0, 0.0]])
    _, places = nearest(one, Bank(one.repeat(3, 1), torch.tensor([[0.0, 1.0]]), one.repeat(3, 1)), 5)
    assert places.tolist() == [[0, 1, 2, 4, 5]]
    # more equal ones than fit, in long parts
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(200, 1)
    for k in (7, 250):
        _, places = nearest(one, Bank(bank[:301], bank[301:]), k)
        want = [i for i in range(600) if i % 3 == 1][:k] + [i for i in range(600) if i % 3 == 2]
        assert places.tolist() == [want[:k]]
    # equal ones that all fit
    bank = torch.nn.functional.normalize(torch.rand(500, 2) + torch.tensor([0.0, 1.0]), dim=1)
    bank[::3] = one
    _, places = nearest(one, Bank(bank), 170)
    assert places[0, :167].tolist() == list(range(0, 500, 3))


# ---- queries --------------------------------------------------------------------------------------


def test_image_file(made, tmp_path):
    # the same picture in another file: found with a similarity of 1
    copy = tmp_path / "copy.png"
    shutil.copy(made / "images" / "bee" / "07.png", copy)
    (found,) = search(copy, made / "index", k=3)
    assert found["query"] == str(copy) and len(found["neighbors"]) == 3
    first = found["neighbors"][0]
    assert first["path"] == str(made / "images/bee/07.png") and first["label"] == "bee" and first["row"] == 10
    assert first["score"] == pytest.approx(1, abs=1e-5)
    scores = [n["score"] for n in found["neighbors"]]
    assert scores == sorted(scores, reverse=True) and scores[1] < 0.9999


def test_path_of_the_index(made, tmp_path, monkeypatch):
    path = str(made / "images/bee/07.png")
    copy = tmp_path / "copy.png"
    shutil.copy(path, copy)
    (found,) = search(path, made / "index", k=12)
    (from_file,) = search(copy, made / "index", k=13)
    # its own features, less itself
    assert [n["row"] for n in found["neighbors"]] == [n["row"] for n in from_file["neighbors"][1:]]
    for a, b in zip(found["neighbors"], from_file["neighbors"][1:], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
    monkeypatch.chdir(made / "images")
    assert search("bee/07.png", made / "index", k=12) == [found]
    # an index of relative paths, asked from another folder
    monkeypatch.chdir(tmp_path)
    listed = os.path.relpath(path)
    embed(os.path.relpath(made / "images"), "relative", made / "weights", **SMALL)
    monkeypatch.chdir(made)
    for query in (path, "images/bee/07.png", listed):
        (again,) = search(query, tmp_path / "relative", k=12)
        assert [n["row"] for n in again["neighbors"]] == [n["row"] for n in found["neighbors"]]


def test_path_among_equal_images(tmp_path, made):
    (tmp_path / "i").mkdir()
    for i in range(5):
        shutil.copy(made / "images/ape/00.png", tmp_path / "i" / f"{i}.png")
    embed(str(tmp_path / "i"), tmp_path / "f", made / "weights", **SMALL)
    (found,) = search(tmp_path / "i" / "4.png", tmp_path / "f", k=2)
    assert [n["row"] for n in found["neighbors"]] == [0, 1]
    (found,) = search(tmp_path / "i" / "1.png", tmp_path / "f", k=4)
    assert [n["row"] for n in found["neighbors"]] == [0, 2, 3, 4]


def test_folder_of_queries(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "images", copy)
    found = search(copy, made / "index", k=1)
    assert [f["neighbors"][0]["row"] for f in found] == list(range(13))
    assert all(f["neighbors"][0]["score"] == pytest.approx(1, abs=1e-5) for f in found)
    table = format_table(found)
    assert table.count("+1.0000  ape  ") == 7 and table.splitlines()[0] == str(copy / "ape/00.png")
    # none of those in the index is its own neighbor, of a folder as alone
    names = [str(path) for path in sorted((made / "images/ape").iterdir())]
    alone = [search(name, made / "index", k=3)[0] for name in names]
    assert search(made / "images/ape", made / "index", k=3) == alone
    assert all(i not in [n["row"] for n in one["neighbors"]] for i, one in enumerate(alone))
    # one of them, and one that is new
    shutil.move(copy / "ape/00.png", tmp_path / "new.png")
    (tmp_path / "two.tsv").write_text(f"{names[4]}\n{tmp_path / 'new.png'}\n")
    mixed = search(tmp_path / "two.tsv", made / "index", k=2)
    first = [one["neighbors"][0]["row"] for one in mixed]
    assert first == [alone[4]["neighbors"][0]["row"], 0]
    assert {len(one["neighbors"]) for one in mixed} == {2}


def test_means_and_short_types(made, tmp_path):
    for i, options in enumerate(({"tokens": "mean"}, {"dtype": "bf16", "format": "safetensors"})):
        embed(str(made / "images"), tmp_path / f"{i}", made / "weights", **options, **SMALL)
        shutil.copytree(made / "images/ape", tmp_path / "ape", dirs_exist_ok=True)
        found = search(tmp_path / "ape", tmp_path / f"{i}", k=1)
        assert [f["neighbors"][0]["row"] for f in found] == list(range(7))


# ---- refused --------------------------------------------------------------------------------------


def test_what_is_no_index(moving):
    embed(str(moving / "images"), moving / "patches", moving / "weights", tokens="patch", **SMALL)
    (moving / "index" / "features" / "00002.npy").unlink()
    for index, words in (
        ("patches", r"holds patch tokens, \[9, 16\] per image.*--tokens class"),
        ("none", "does not exist; make one with: extrema-fast embed"),
        ("weights", "is no folder of features"),
        # the two in the wrong order
        ("images/ape/00.png", "is a file; expected a folder that extrema-fast embed has written"),
        ("index", r"not finished \(4 of 5 parts\)"),
    ):
        with pytest.raises(UsageError, match=words):
            search(moving / "images/ape/00.png", moving / index)


@pytest.mark.parametrize(
    ("text", "named"),
    [("row\tpath\tlabel\n0\tx\t\n", "has fewer lines"), ("row\n0\tx\n", "line 2 is damaged")],
)
def test_damaged_rows(moving, text, named):
    shutil.copy(moving / "images/ape/00.png", moving / "query.png")
    (moving / "index" / "rows.tsv").write_text(text)
    with pytest.raises(UsageError, match=rf"rows\.tsv: {named}"):
        search(moving / "query.png", moving / "index", k=5)


def test_weights_gone_moved_or_others(moving):
    query = moving / "query.png"
    shutil.copy(moving / "images/ape/00.png", query)
    (moving / "weights").rename(moving / "elsewhere")
    with pytest.raises(UsageError, match=r"the weights of this index are gone; .*--weights PATH"):
        search(query, moving / "index", k=2)
    found = search(query, moving / "index", k=2, weights=moving / "elsewhere")
    assert found[0]["neighbors"][0]["row"] == 0
    # an image of the index needs none
    assert len(search(moving / "images/ape/00.png", moving / "index", k=2)[0]["neighbors"]) == 2
    random_weights(moving / "weights", 2)
    with pytest.raises(UsageError, match=r"other weights .* than those of the index"):
        search(query, moving / "index", k=2)


@pytest.mark.parametrize("k", [0, 13])
def test_k(made, k):
    with pytest.raises(UsageError, match=r"--k: expected 1 to 12, the other images of .*index, got"):
        search(made / "images/ape/00.png", made / "index", k=k)


def test_k_of_foreign_queries(made, tmp_path, monkeypatch):
    shutil.copy(made / "images/ape/00.png", tmp_path / "q.png")
    # nobody has to know how many images an index has
    assert len(search(tmp_path / "q.png", made / "index")[0]["neighbors"]) == 10
    monkeypatch.setattr(sys.modules["extrema_fast.tools.search"], "NEIGHBORS", 14)
    assert len(search(tmp_path / "q.png", made / "index")[0]["neighbors"]) == 13
    with pytest.raises(UsageError, match="--k: expected 1 to 13, "):
        search(tmp_path / "q.png", made / "index", k=14)


def test_queries_that_are_no_images(made, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    for name, error, words in (
        ("broken.png", DataError, r"broken\.png"),
        ("none.png", UsageError, "neither an image file nor a path in the index"),
        ("none", UsageError, "none: does not exist"),
    ):
        with pytest.raises(error, match=words):
            search(tmp_path / name, made / "index", k=1)


# ---- the picture ----------------------------------------------------------------------------------


def tile(sheet, line: int, column: int):
    """The square of a tile as an array."""
    row = (sheet.height - 2 * MARGIN + 2 * GAP) // max(1, round(sheet.height / 210))
    x, y = MARGIN + column * (SIDE + GAP) + (GAP if column else 0), MARGIN + line * row
    return np.asarray(sheet.convert("RGB").crop((x, y, x + SIDE, y + SIDE)))


def colors(folder: Path) -> list[str]:
    """Six images of one color each."""
    folder.mkdir()
    paths = []
    for i in range(6):
        paths.append(str(folder / f"{i}.png"))
        Image.new("RGB", (30, 30), (40 * i, 255 - 40 * i, 128)).save(paths[-1])
    return paths


def test_sheet_shows_query_and_found(made, tmp_path):
    paths = colors(tmp_path / "i")
    embed(str(tmp_path / "i"), tmp_path / "f", made / "weights", **SMALL)
    found = search(tmp_path / "i", tmp_path / "f", k=3, out=tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        sheet.load()
    assert sheet.width == 2 * MARGIN + 4 * (SIDE + GAP)
    for line, one in enumerate(found):
        for column, path in enumerate([paths[line], *(n["path"] for n in one["neighbors"])]):
            i = int(Path(path).stem)
            assert (tile(sheet, line, column)[SIDE // 2, SIDE // 2] == (40 * i, 255 - 40 * i, 128)).all()
    # something is written under each
    assert len(np.unique(np.asarray(sheet.convert("L"))[MARGIN + SIDE + 2 : MARGIN + SIDE + 34])) > 10


def test_what_a_sheet_may_replace(made, tmp_path):
    query, index = made / "images/ape/00.png", made / "index"
    sheet = tmp_path / "sheet.png"
    for _ in range(2):
        search(query, index, k=2, out=sheet)
    shutil.copy(query, tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "d.png").mkdir()
    (tmp_path / "file").touch()
    for name, error, words in (
        ("photo.png", UsageError, "there is another file; .*--force"),
        ("sheet.jpg", UsageError, r"expected a file that ends in \.png"),
        ("d.png", UsageError, r"expected a file that ends in \.png"),
        ("file/x.png", StorageError, "cannot be written"),
    ):
        with pytest.raises(error, match=words):
            search(query, index, k=2, out=tmp_path / name)
    assert (tmp_path / "photo.png").read_bytes() == before
    search(query, index, k=2, out=tmp_path / "photo.png", force=True)
    assert (tmp_path / "photo.png").read_bytes() == sheet.read_bytes()


@pytest.mark.parametrize("change", ["gone", "changed", "one gone"])
def test_images_that_cannot_be_shown(moving, caplog, change):
    query = moving / "query.png"
    shutil.copy(moving / "images/ape/00.png", query)
    if change == "gone":
        (moving / "images").rename(moving / "moved")
    elif change == "changed":
        Image.new("RGB", (50, 50)).save(moving / "images/ape/02.png")
    else:
        os.remove(moving / "images/ape/02.png")
    found = search(query, moving / "index", k=13, out=moving / "sheet.png")
    assert len(found[0]["neighbors"]) == 13
    assert "cannot be shown" in caplog.text or "have changed" in caplog.text
    with Image.open(moving / "sheet.png") as sheet:
        assert len(np.unique(tile(sheet, 0, 0))) > 10 and len(np.unique(tile(sheet, 0, 1))) == 3


def test_tiles(tmp_path, monkeypatch):
    data = (tmp_path / "wide.png", tmp_path / "sheet.png")
    Image.new("RGB", (90, 30), (255, 0, 0)).save(data[0])
    long = "a_very_long_file_name_that_cannot_fit_under_a_tile_0123456789.png"
    during = []
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda *a, **k: (during.extend(tmp_path.glob(".*")), save(*a, **k))[1]
    )
    write_sheet(data[1], [[Tile(data[0].read_bytes(), "query", long), Tile(b"damaged", "0.5", "x")], []])
    # a process that is killed while it draws leaves no file
    assert during == []
    with Image.open(data[1]) as sheet:
        square = tile(sheet.convert("RGB"), 0, 0)
        wide = (square == (255, 0, 0)).all(2)
        # the long name does not run into the next tile
        gap = np.asarray(sheet.convert("L"))[MARGIN + SIDE + 24, MARGIN + SIDE : MARGIN + SIDE + 8]
        assert len(np.unique(gap)) == 1
    # whole image with its own proportions
    assert wide[SIDE // 2].all() and wide.sum() == SIDE * SIDE // 3


# ---- the command line -----------------------------------------------------------------------------


def test_command(made, capsys, tmp_path):
    query = str(made / "images/bee/07.png")
    args = ["search", query, str(made / "index"), "--k", "2", "--out", str(tmp_path / "sheet.png")]
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == query and len(lines) == 3 and lines[1].split()[1] in ("ape", "bee")
    assert main([*args, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["query"] == query and lines[1].endswith(found["neighbors"][0]["path"])
    assert main([*args, "--k", "0"]) == 2 and "--k: expected 1 to 12" in capsys.readouterr().err
