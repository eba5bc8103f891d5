"""The structural scan of JPEG and PNG files: good ones of every make pass, each kind of damage is named.

Covers: encoders' options (progressive, gray, CMYK, subsampling, restart markers, Exif, comments, padding), odd
sizes; each rule with a file that breaks it; random damage never raises; the catch rate of random bytes; every
flipped bit of a PNG that matters; the words of libjpeg-turbo that mean damage.
"""

from __future__ import annotations

import io
import random
import re
import tarfile
import zlib

import numpy as np
import pytest

from extrema_fast.tools.image_check import damage_in, kind_of, png_scan
from extrema_fast.tools.jpeg_scan import scan
from tests.data.conftest import picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")


def encoded(height=39, width=49, mode="RGB", kind="JPEG", seed=0, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def start_of_data(data: bytes) -> int:
    """Where the compressed data of a baseline file begins."""
    at = data.rindex(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


OPTIONS = [
    {},
    {"mode": "L"},
    {"mode": "CMYK"},
    {"progressive": True},
    {"progressive": True, "mode": "L", "optimize": True},
    {"subsampling": 0, "quality": 100},
    {"subsampling": 1, "quality": 5},
    {"restart_marker_blocks": 1},
    {"restart_marker_blocks": 3, "subsampling": 2},
    {"restart_marker_rows": 1, "subsampling": 0},
    {"restart_marker_blocks": 2, "progressive": True},
    {"restart_marker_rows": 2, "mode": "L", "progressive": True},
    {"comment": b"\xff\xd9\xff\xda inside a comment"},
    {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 400), (19, 39), (64, 48)])
def test_good_files_pass(options, size):
    assert scan(encoded(*size, **options)) is None


def test_padding_and_trailing_bytes_pass():
    data = encoded()
    assert scan(data + b"anything \xff\xd8 at all") is None
    # FF before a marker is padding, also at the end of the compressed data
    assert scan(data[:-2] + b"\xff\xff\xff\xd9") is None
    # the height once more, after the data
    assert scan(data[:-2] + b"\xff\xdc\x00\x04\x00\x27" + data[-2:]) is None
    at = data.index(b"\xff\xdb")
    assert scan(data[:at] + b"\xff\xff" + data[at:]) is None


def test_photographs_pass(odd_images):
    photos = odd_images.parent / "imagenet-photos-250.tar"
    if not photos.is_file():
        pytest.skip(f"no photographs at {photos}")
    with tarfile.open(photos) as tar:
        files = [tar.extractfile(m).read() for m in tar if m.isfile()]
    assert len(files) == 250
    assert [f for f in map(scan, files) if f] == []


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def broken(name: str) -> bytes:
    data = encoded()
    data_at, frame = start_of_data(data), data.index(b"\xff\xc0")
    restarts = encoded(restart_marker_blocks=2)
    first, second = restarts.index(b"\xff\xd0"), restarts.index(b"\xff\xd1")
    last = max(m.start() for m in re.finditer(rb"\xff[\xd0-\xd7]", restarts))
    return {
        "no start": data[2:],
        "cut in the data": data[: data_at + 30],
        "cut in a segment": data[: frame + 6],
        "cut after a segment": data[:frame],
        "cut in padding": data[:frame] + b"\xff\xff",
        "only the start": data[:2],
        "no picture": data[:frame] + b"\xff\xd9",
        "no marker": replaced(data, frame, b"\x00"),
        "forbidden marker": replaced(data, data_at + 20, b"\xff\x01"),
        "lossless frame": replaced(data, frame, b"\xff\xc3"),
        "long segment": replaced(data, frame + 2, b"\xff\xf0"),
        "short segment": replaced(data, frame + 2, b"\x00\x01"),
        "two frames": data[:frame] + data[frame : frame + 19] + data[frame:],
        "no frame": data[:frame] + data[frame + 19 :],
        "no height": replaced(data, frame + 5, b"\x00\x00"),
        "components": replaced(data, frame + 9, b"\x09"),
        "sampling": replaced(data, frame + 11, b"\x00"),
        "unknown component": replaced(data, data.index(b"\xff\xda") + 5, b"\x77"),
        "Huffman": replaced(data, data.index(b"\xff\xc4") + 5, b"\x07"),
        "Huffman length": replaced(data, data.index(b"\xff\xc4") + 20, b"\xc8"),
        "quantization": replaced(data, data.index(b"\xff\xdb") + 4, b"\x10"),
        "restart without interval": replaced(data, data_at + 20, b"\xff\xd0"),
        "restart out of turn": replaced(restarts, second, b"\xff\xd3"),
        "restart missing": replaced(restarts, first, b"\x11\x11"),
        "last restart missing": replaced(restarts, last, b"\x11\x11"),
        "interval": replaced(restarts, restarts.index(b"\xff\xdd") + 2, b"\x00\x03"),
        "two restarts too many": restarts[:-2] + b"\xff" + bytes([(restarts[last + 1] - 0xD0 + 1) % 8 + 0xD0])
        + b"\xff" + bytes([(restarts[last + 1] - 0xD0 + 2) % 8 + 0xD0]) + restarts[-2:],
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no start", "no start of image"),
        ("cut in the data", "the file is cut"),
        ("cut in a segment", "segment of marker C0 ends outside the file"),
        ("cut after a segment", "the file is cut"),
        ("cut in padding", "the file is cut"),
        ("only the start", "the file is cut"),
        ("no picture", "end of image before any picture data"),
        ("no marker", "no marker where one has to be"),
        ("forbidden marker", "marker 01 where it may not be"),
        ("lossless frame", "marker C3 where it may not be"),
        ("long segment", "segment of marker C0 ends outside the file"),
        ("short segment", "segment of marker C0 ends outside the file"),
        ("two frames", "a second frame"),
        ("no frame", "picture data before the frame"),
        ("no height", "a frame of 49 x 0 pixels"),
        ("components", "a frame of 15 bytes for 9 components"),
        ("sampling", "impossible components"),
        ("unknown component", "a scan of unknown components"),
        ("Huffman", "an impossible Huffman table"),
        ("Huffman length", "Huffman table"),
        ("quantization", "quantization table that ends outside"),
        ("restart without interval", "restart marker D0 out of turn"),
        ("restart out of turn", "restart marker D3 out of turn"),
        ("restart missing", "restart marker D1 out of turn"),
        ("last restart missing", r"\d+ restart markers instead of \d+"),
        ("interval", "a restart interval of 1 bytes"),
        ("two restarts too many", r"\d+ restart markers instead of \d+"),
    ],
)
def test_damage_is_named(name, words):
    assert re.search(words, scan(broken(name)) or "nothing found")


def test_random_bytes_are_caught():
    """2 kB of noise hold about eight markers that may not be there."""
    noise, caught = random.Random(0), 0
    for seed in range(20):
        data = encoded(120, 160, seed=seed, quality=95)
        at = noise.randrange(start_of_data(data), len(data) - 2050)
        caught += scan(replaced(data, at, noise.randbytes(2048))) is not None
    assert caught == 20


def test_nothing_raises():
    noise = random.Random(1)
    files = [encoded(19, 39, **options) for options in OPTIONS]
    results = set()
    for _ in range(4000):
        data = bytearray(noise.choice(files))
        for _ in range(noise.randrange(1, 9)):
            data[noise.randrange(len(data))] = noise.choice([0, 255, 0xD9, noise.randrange(256)])
        results.add(scan(bytes(data[: noise.randrange(len(data)) if noise.random() < 0.3 else None])))
    assert None in results and len(results) > 50


def test_every_flipped_bit_of_a_png_is_caught():
    data = encoded(5, 7, kind="PNG")
    assert png_scan(data) is None and png_scan(data + b"trailing") is None
    flips = [replaced(data, i // 8, bytes([data[i // 8] ^ 1 << i % 8])) for i in range(64, 8 * len(data))]
    passed = [i for i, flipped in enumerate(flips, 64) if png_scan(flipped) is None]
    # the bit that makes a chunk one that may be ignored: left to the decoder
    assert passed == [8 * data.index(b"IHDR") + 5, 8 * data.index(b"IDAT") + 5]
    assert "is cut" in png_scan(data[:-1]) and "is cut" in png_scan(data[:60])


def test_a_wrong_checksum_that_may_be_ignored_is():
    data = encoded(5, 7, kind="PNG")
    text = b"tEXtwrong checksum"
    chunk = (len(text) - 4).to_bytes(4, "big") + text + (zlib.crc32(text) ^ 1).to_bytes(4, "big")
    assert png_scan(data[:33] + chunk + data[33:]) is None
    assert "wrong checksum of chunk 'IDAT'" in png_scan(data.replace(b"IDATx", b"IDATy"))


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
