"""Pictures of what an encoder makes of images.

Covers: the files of named images, of a folder with classes, of one image and of a video, the same bytes twice; grids by
an image's proportions and pixels, also of a learned table; the patch at a pixel; frames: number, pace, transparency,
other formats; maps by each method; what is asked for and cannot be made; what is not replaced; the command line.
"""

from __future__ import annotations

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from extrema_fast.cli import main
from extrema_fast.data import frames as module
from extrema_fast.data.frames import is_video, read_frames
from extrema_fast.errors import DataError, UsageError
from extrema_fast.models.positions import resample_table
from extrema_fast.tools.search import SIDE
from extrema_fast.tools.visualize import MADE, visualize
from extrema_fast.weights.load import load_encoder
from tests.tools.conftest import random_weights

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")
tool = importlib.import_module("extrema_fast.tools.visualize")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """48 x 32 pixels, dark left and bright right."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 60, (32, 48, 3), dtype=np.uint8)
    pixels[:, 24:] += 180
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An animated GIF of 7 frames, 60 ms each."""
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    shots = [np.full((20, 30, 3), 30 * i, np.uint8) for i in range(7)]
    for i, shot in enumerate(shots):
        shot[5:12, 3 * i : 3 * i + 8] = (250, 120, 0)
    first, *others = map(Image.fromarray, shots)
    first.save(path, save_all=True, append_images=others, duration=60, loop=0)
    return path


def names(page):
    return sorted(p.name for p in page.parent.iterdir())


def test_files_of_images(weights, photo, images, tmp_path, capsys):
    other = next(images.rglob("*.png"))
    out = tmp_path / "a"
    assert (
        main(["visualize", str(weights), str(photo), str(other), "--out", str(out), "--patch", "40", "3"])
        == 0
    )
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / "index.html"), "patches.png"] and names(out / "index.html") == [
        "index.html",
        "patches.png",
    ]
    text = (out / "index.html").read_text()
    assert MADE in text and "photo.png and 1 more" in text and "the framed patch of photo.png" in text
    tokens = json.loads(text.partition('id="tokens">')[2].partition("</script>")[0])
    # 48 x 32 pixels and patches of 8: as many as there are pixels for, 6 x 4
    assert tokens["grids"][0] == [4, 6] and tokens["chosen"] == [0, 0, 5]
    # an image, two heads of two blocks, the patch, its similarity, two of components
    with Image.open(out / "patches.png") as sheet:
        assert 9 * SIDE < sheet.width < 10 * SIDE and 2 * SIDE < sheet.height < 3 * SIDE
    # a folder of earlier pictures is replaced, by the same bytes
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    visualize(weights, [photo, other], out, patch=(40, 3))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    # the page tells of what it shows
    text = visualize(weights, photo, tmp_path / "b", make=["attention"]).read_text()
    assert "Attention of the class token" in text
    assert not any(words in text for words in ("patch PCA", "PCA shows", "Cosine"))


def test_pictures_of_a_set(weights, images, tmp_path):
    page = visualize(weights, str(images), tmp_path / "set", show=3, map="pca")
    assert names(page) == ["index.html", "map.tsv", "neighbors.png", "patches.png"]
    head, *rows = (tmp_path / "set" / "map.tsv").read_text().splitlines()
    assert head.split("\t") == ["path", "class", "x", "y"] and len(rows) == 19
    assert {row.split("\t")[1] for row in rows} == {"ape", "bee"}
    assert all(np.isfinite(float(v)) for row in rows for v in row.split("\t")[2:])
    text = page.read_text()
    assert "19, the patches of 3 of them" in text
    assert text.count('class="stage"') == 3 and "the nearest of 18 others" in text
    assert re.findall("<b>(.*?)</b>", text) == ["ape/06.png", "ape/18.png", "bee/11.png"]
    # few images: only when asked
    page = visualize(weights, sorted(images.rglob("*.png"))[:4], tmp_path / "few", make=["neighbors", "map"])
    assert (
        names(page) == ["index.html", "map.tsv", "neighbors.png"] and 'class="stage"' not in page.read_text()
    )


# UMAP compiles its code at its first import
@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_maps(method):
    pytest.importorskip({"tsne": "sklearn", "umap": "umap"}[method], reason=f"{method} is not installed")
    place = {"tsne": tool._tsne, "umap": tool._umap}[method]
    # two groups stay two groups, the same twice
    x = torch.cat([torch.randn(12, 5) * 0.1 + 3, torch.randn(12, 5) * 0.1 - 3])
    y = place(x)
    assert torch.equal(place(x), y) and y.shape == (24, 2)
    near = torch.cdist(y.double(), y.double()).fill_diagonal_(torch.inf).argmin(1) // 12
    assert torch.equal(near, torch.arange(24) // 12)
    assert place(x[:4]).isfinite().all()


def test_a_video(weights, clip, tmp_path):
    page = visualize(weights, clip, tmp_path / "video", frames=4, show=2)
    assert names(page) == ["index.html", "patches.png", "pca.gif"]
    text = page.read_text()
    assert "4 frames" in text and text.count('class="stage"') == 2 and "frame 4<" in text
    with Image.open(tmp_path / "video" / "pca.gif") as made:
        # as long as the clip: 7 x 60 ms in 4 frames
        assert (
            made.n_frames == 4
            and made.info["duration"] == pytest.approx(105, abs=5)
            and made.info["loop"] == 0
        )
        assert made.size == (3 * 256 + 8, 171)


def test_frames(clip, photo, tmp_path, monkeypatch):
    assert (
        is_video(clip)
        and not is_video(photo)
        and not is_video(tmp_path)
        and not is_video(tmp_path / "no.gif")
    )
    every = read_frames(clip, 7)
    assert len(every.images) == 7 and every.milliseconds == 60
    few = read_frames(clip, 3)
    # as evenly as half of them allow, the first and the last among them
    assert [np.asarray(im)[0, 0, 0] // 30 for im in few.images] == [0, 4, 6] and few.milliseconds == 140
    assert len(read_frames(clip, 1).images) == 1
    # what is transparent is white
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.save(
        tmp_path / "clear.png", save_all=True, append_images=[Image.new("RGBA", (4, 4), (9, 9, 9, 255))]
    )
    assert [np.asarray(im)[0, 0].tolist() for im in read_frames(tmp_path / "clear.png", 5).images] == [
        [255, 255, 255],
        [9, 9, 9],
    ]
    (tmp_path / "torn.gif").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"torn\.gif"):
        read_frames(tmp_path / "torn.gif", 5)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    monkeypatch.setattr(module, "_import", lambda name: None)
    with pytest.raises(UsageError, match="PyAV"):
        read_frames(tmp_path / "clip.mp4", 5)


def test_frames_of_other_formats(clip, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (extra: visualize)")
    pytest.importorskip("imageio.v3", reason="imageio is not installed (with scikit-image)")
    shots = read_frames(clip, 7).images
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shot in shots:
            file.mux(stream.encode(av.VideoFrame.from_image(shot.resize((32, 32)))))
        file.mux(stream.encode())
    found = read_frames(tmp_path / "clip.mp4", 7)
    assert is_video(tmp_path / "clip.mp4") and len(found.images) == 7 and found.milliseconds == 40
    for ours, theirs in zip(found.images, shots, strict=True):
        # coded with losses
        assert abs(np.asarray(ours)[:8].mean() - np.asarray(theirs)[:4].mean()) < 12
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:300])
    with pytest.raises(UsageError, match=r"torn\.mp4"):
        read_frames(tmp_path / "torn.mp4", 5)


def test_grids(weights):
    eyes = tool._Eyes(weights, None, load_encoder(weights), torch.device("cpu"), None)
    # the encoder's grid is 3 x 3, its patches have 8 pixels
    assert eyes.grid(48, 32) == (4, 6)
    assert eyes.grid(10, 10) == (3, 3) and eyes.grid(10, 5) == (2, 3)
    # shown with the pixels that it has along its longer side
    assert eyes._see("tall", Image.new("RGB", (60, 400))).pixels.shape == (32 * 12, 5 * 12, 3)
    assert eyes.grid(5000, 3000) == (19, 32) and eyes.grid(100, 9000) == (32, 1)
    eyes.patches = 5
    assert eyes.grid(5000, 3000) == (3, 5)
    seen = tool.Seen("x.png", (48, 32), None, tool.Patches(torch.zeros(4, 6, 2), None))
    assert [seen.patch_at(*at) for at in ((0, 0), (47, 31), (8, 7), (7, 8))] == [
        (0, 0),
        (3, 5),
        (0, 1),
        (1, 0),
    ]
    for outside in ((48, 0), (0, 32), (-1, 0)):
        with pytest.raises(UsageError, match="--patch"):
            seen.patch_at(*outside)


def test_a_learned_table_is_resampled_from_the_file(tmp_path):
    folder = random_weights(tmp_path / "w")
    meta = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(meta | {"encoder": {"pos_embed": "learned"}}))
    table = torch.randn(1, 9, 16)
    save_file(
        load_file(folder / "teacher.safetensors") | {"pos_embed": table}, folder / "teacher.safetensors"
    )
    eyes = tool._Eyes(folder, None, load_encoder(folder), torch.device("cpu"), None)
    for grid in ((2, 5), (7, 4), (3, 3)):
        encoder = eyes._at((8 * grid[0], 8 * grid[1]))
        assert torch.equal(encoder.pos_embed, resample_table(table, (3, 3), grid))


def test_positions_of_a_finer_grid_are_between_those_of_training(weights):
    encoder = load_encoder(weights)
    tool._Eyes(weights, None, encoder, torch.device("cpu"), None)
    assert torch.equal(encoder.positions((3, 3)), load_encoder(weights).pos_embed[0])
    fine, own = encoder.positions((9, 9)).unflatten(0, (9, 9)), encoder.pos_embed[0].unflatten(0, (3, 3))
    assert torch.allclose(fine[1::3, 1::3], own, atol=1e-6)


def test_broken_images_are_left_out(weights, photo, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:60])
    page = visualize(weights, [broken, photo], tmp_path / "out")
    assert page.read_text().count('class="stage"') == 1 and "broken.png" in caplog.text
    with pytest.raises(DataError, match=r"broken\.png"):
        visualize(weights, broken, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """Weights without class attention."""
    folder = random_weights(tmp_path_factory.mktemp("w") / "weights")
    meta = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(meta | {"encoder": {"global_pool": "avg"}}))
    kept = {k: v for k, v in load_file(folder / "teacher.safetensors").items() if "_token" not in k}
    save_file(kept, folder / "teacher.safetensors")
    return folder


def test_without_class_attention(pooled, photo, tmp_path):
    text = visualize(pooled, photo, tmp_path / "out").read_text()
    assert "patch PCA" in text and "head 1" not in text and "even share" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nothing.png"], "nothing.png"),
        ([], "IMAGES"),
        (["{photo}", "nothing.png"], "nothing.png: no such file"),
        (["{photo}", "{folder}"], "one folder alone"),
        (["{photo}", "{weights}/config.json"], "no image file"),
        (["{photo}", "--patch", "48", "3"], "--patch: 48 3 is outside photo.png, 48 x 32"),
        (["{photo}", "--make", "map"], "--make map: needs at least 4 images, got 1"),
        (["{photo}", "--make", "neighbors"], "--make neighbors: needs at least 2 images, got 1"),
        (["{photo}", "--make", "colors"], "--make: expected attention"),
        (["{photo}", "--show", "0"], "--show: expected at least 1"),
        (["{clip}", "--make", "map"], "--make: neighbors and map"),
        # with imageio and PyAV, and without
        (["{torn}"], "this video cannot be read|reading this video needs imageio and PyAV"),
        (["{photo}", "--weights-without", "--make", "attention"], "no class attention"),
        (["{photo}", "--out", "{folder}"], "holds other files"),
        (["{photo}", "--out", "{photo}"], "is no folder"),
    ],
)
def test_bad_input_is_one_line(weights, pooled, photo, clip, tmp_path, capsys, options, words):
    folder, torn = tmp_path / "folder", tmp_path / "torn.mp4"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    torn.write_bytes(b"\0\0\0 ftypisom")
    places = {"photo": photo, "clip": clip, "torn": torn, "folder": folder, "weights": weights}
    given = [o.format(**places) for o in options if o != "--weights-without"]
    made = pooled if "--weights-without" in options else weights
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["visualize", str(made), *given, *out, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("extrema-fast: error: ") and any(w in line for w in words.split("|"))
    assert not (tmp_path / "out").exists() and (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(("map", "package"), [("tsne", "scikit-learn"), ("umap", "umap-learn")])
def test_maps_that_are_not_installed(weights, images, tmp_path, monkeypatch, map, package):
    for module_ in ("sklearn.manifold", "umap"):
        monkeypatch.setitem(sys.modules, module_, None)
    with pytest.raises(UsageError, match=f"--map {map}: {package}"):
        visualize(weights, str(images), tmp_path / "out", make=["map"], map=map)
    assert tool._method(None) == "pca"


def test_other_files_are_replaced_only_by_force(weights, photo, tmp_path):
    (tmp_path / "out").mkdir()
    # an empty folder is free
    visualize(weights, photo, tmp_path / "out", make=["pca"])
    (tmp_path / "out" / "index.html").write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        visualize(weights, photo, tmp_path / "out", make=["pca"])
    assert (tmp_path / "out" / "index.html").read_text() == "mine"
    visualize(weights, photo, tmp_path / "out", make=["pca"], force=True)
    assert MADE in (tmp_path / "out" / "index.html").read_text()
