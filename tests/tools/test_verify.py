"""Single images: what is found in bytes, and what a decoder's own words mean.

Covers: kinds by their first bytes; damaged JPEG and PNG files with and without nvImageCodec's warnings; every
flipped bit of a PNG; checksums that may be wrong; libjpeg-turbo's messages; processes that end with their pool.
"""

from __future__ import annotations

import io
import os
import zlib

import numpy as np
import pytest

from extrema_fast.tools.verify import Pool, check, damage_in, kind_of, pillow, png_damage
from tests.data.conftest import picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


def encoded(height=39, width=49, mode="RGB", kind="JPEG", seed=0, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


JPEG, PNG = encoded(240, 320, quality=95), encoded(240, 320, kind="PNG")
# in the compressed data
AT = JPEG.rindex(b"\xff\xda") + 500


@pytest.mark.parametrize(
    ("data", "status", "with_pillow"),
    [
        (JPEG, "ok", "ok"),
        (JPEG + b"trailing", "ok", "ok"),
        (b"", "empty: 0 bytes", "empty: 0 bytes"),
        (JPEG[:20], "broken header: ", "broken header: "),
        (JPEG[: len(JPEG) // 2], "cannot be decoded: ", "cannot be decoded: "),
        (JPEG[: len(JPEG) // 2] + b"\xff\xd9", "damaged: ", "ok"),
        (replaced(JPEG, AT, bytes(4096)), "damaged: ", "ok"),
        (replaced(JPEG, AT, JPEG[AT + 5000 : AT + 7000]), "damaged: ", "ok"),
        (replaced(JPEG, AT, np.random.default_rng(0).bytes(2000)), "damaged: ", "cannot be decoded: "),
        (PNG[: len(PNG) // 2], "damaged: no end of image", "damaged: no end of image"),
        (replaced(PNG, 2000, bytes(9)), "damaged: wrong checksum", "damaged: wrong checksum"),
        (encoded(kind="GIF"), "ok", "ok"),
        (encoded(kind="GIF")[:-99], "cannot be decoded: ", "cannot be decoded: "),
        (encoded(kind="ICO"), "kind not read: ico", "kind not read: ico"),
        (b"some text", "not an image: begins with 'some text'", "not an image: begins with 'some text'"),
    ],
)
def test_damage(data, status, with_pillow, tmp_path):
    assert check(data, pillow, 10**6).status.startswith(with_pillow)
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed (comes with DALI)")
    (tmp_path / "f").write_bytes(data)
    with Pool(1, strict=False, max_pixels=10**6) as pool:
        ((found,),) = pool.check([(str(tmp_path / "f"), 0, -1)])
    assert found.status.startswith(status) and found.bytes == len(data) and found.crc32 == zlib.crc32(data)


def test_every_flipped_bit_of_a_png_is_found():
    data = encoded(5, 7, kind="PNG")
    assert png_damage(data) is None and png_damage(data + b"trailing") is None
    flips = [replaced(data, i // 8, bytes([data[i // 8] ^ 1 << i % 8])) for i in range(64, 8 * len(data))]
    passed = [i for i, flipped in enumerate(flips, 64) if png_damage(flipped) is None]
    # the bit that makes a chunk one that may be ignored: left to the decoder
    assert passed == [8 * data.index(b"IHDR") + 5, 8 * data.index(b"IDAT") + 5]


def test_a_wrong_checksum_that_may_be_ignored_is():
    data = encoded(5, 7, kind="PNG")
    text = b"tEXtwrong checksum"
    chunk = (len(text) - 4).to_bytes(4, "big") + text + (zlib.crc32(text) ^ 1).to_bytes(4, "big")
    assert png_damage(data[:33] + chunk + data[33:]) is None


def test_kinds():
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"):
        assert kind_of(encoded(kind=kind)) == kind.lower()
    assert kind_of(encoded(kind="PPM")) == kind_of(encoded(kind="PPM", mode="L")) == "pnm"
    assert kind_of(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 12) == "heic"
    assert kind_of(b"\x00\x00\x00\x20ftypavif" + b"\x00" * 12) == "avif"
    assert kind_of(b"") == kind_of(b"this is text") == kind_of(np.arange(64, dtype=np.uint8).tobytes()) == ""


@pytest.mark.parametrize(
    ("text", "damage"),
    [
        ("", None),
        ("libpng warning: iCCP: known incorrect sRGB profile\n", None),
        ("Unknown Adobe color transform code 2\n", None),
        ("Corrupt JPEG data: 2 extraneous bytes before marker 0xd9\n", None),
        ("Corrupt JPEG data: 16 extraneous bytes before marker 0xd9\n", None),
        (
            "Corrupt JPEG data: 17 extraneous bytes before marker 0xd9\n",
            "17 extraneous bytes before marker 0xd9",
        ),
        (
            "Corrupt JPEG data: 2 extraneous bytes before marker 0xd3\n",
            "2 extraneous bytes before marker 0xd3",
        ),
        ("note\nCorrupt JPEG data: bad Huffman code\nmore\n", "bad Huffman code"),
        ("Unsupported marker type 0x1e\n", "Unsupported marker type 0x1e"),
    ],
)
def test_what_a_decoder_prints(text, damage):
    assert damage_in(text) == damage


def test_processes_end_with_their_pool(tmp_path):
    files = []
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(encoded(5 + n, 7, kind="PNG"))
        files.append((str(tmp_path / f"{n}.png"), 0, -1))
    with Pool(2, strict=False, max_pixels=10**6) as pool:
        verdicts = [v for batch in pool.check(files) for v in batch]
        processes = [p for e in pool._executors for p in e._processes]
    assert [v.height for v in verdicts] == list(range(5, 45)) and len(processes) == 2
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
