"""The Python of README.md and docs/encoder.md runs as it stands, with files in the place of its example names.

Covers: every block in order, in one namespace per page; shapes that the comments promise; of 2 images in place of 8.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import extrema_fast
from extrema_fast.weights.export import export

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")


def blocks(page) -> list[str]:
    text = page.read_text(encoding="utf-8").replace("(8, ", "(2, ")
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    assert found
    return found


def test_readme(repository):
    names: dict = {}
    (code,) = blocks(repository / "README.md")
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].cls.shape == (2, 384) and names["out"].patches.shape == (2, 196, 384)
    assert names["views"].patches.shape == (2, 5, 39, 384) and names["maps"].shape == (2, 2, 6, 197)


def test_the_encoders_page(repository, tmp_path):
    # that of a run of one's own has the size of the name that torch.hub is given
    demo, weights = tmp_path / "demo.pth", tmp_path / "weights.pth"
    torch.save(extrema_fast.create_encoder("extrema_vit_small_patch16_224", depth=1).state_dict(), demo)
    torch.save(extrema_fast.create_encoder("extrema_vit_small_patch16_224").state_dict(), weights)
    # of any size, and `export` compares it in float64
    small = extrema_fast.create_encoder("extrema_vit_tiny_patch16_224", img_size=32, depth=1)
    exported = export(small, tmp_path / "exported").folder
    theirs = tmp_path / "vit_small.pth"
    torch.save(timm.create_model("vit_small_patch16_224").state_dict(), theirs)
    places = {
        "vit_small.pth": theirs,
        "runs/demo": demo,
        "runs/mine": weights,
        "EXPORTED": exported,
        "PATH": repository,
        "pictures": tmp_path / "pictures",
    }
    for i, name in enumerate(("cat.jpg", "dog.jpg")):
        places[name] = tmp_path / name
        image.new("RGB", (160, 120), (200, 90 * i, 40)).save(places[name])
    names: dict = {}
    for code in blocks(repository / "docs/encoder.md"):
        for name, path in places.items():
            code = re.sub(rf'(["\':]){name}"', lambda m, path=path: f'{m[1]}{path}"', code)
        if "mae." in code:
            # any class with the parts of a ViT
            with torch.device("meta"):
                vit = names["timm"].create_model("vit_base_patch16_224", num_classes=0)
            parts = {k: getattr(vit, k) for k in ("patch_embed", "cls_token", "pos_embed", "norm", "blocks")}
            names["mae"] = SimpleNamespace(**parts)
        exec(compile(code, "docs/encoder.md", "exec"), names)
    assert names["views"].patches.shape == (2, 2, 3, 384)
    assert (tmp_path / "pictures" / "index.html").is_file()
    assert names["latent"].shape == (2, 2, 4, 384)
    assert type(names["dino"]).__name__ == "Dino" and not names["fast"].report().called
