"""From a picture to the encoder's input.

Covers: resizing and cropping against PIL; sizes, also tiny, huge and non-square ones; pictures that already
fit; modes; one channel; the numbers of the weights; errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from extrema_fast.config import ModelConfig
from extrema_fast.data.preprocess import Preprocess, resize_crop
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import create_encoder

NAME = "extrema_vit_tiny_patch16_224"
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def picture(h: int, w: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    waves = torch.stack([(9 * x).sin(), (7 * y).cos(), (5 * (x + y)).sin()], -1)
    # with detail that a resize without antialiasing would turn into false patterns
    return ((waves + 1) * 100 + 50 * torch.rand(h, w, 1)).to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "scaled", "result"),
    [
        ((300, 400), (256, 341), (224, 224)),
        ((400, 300), (341, 256), (224, 224)),
        ((100, 100), (256, 256), (224, 224)),
        ((2000, 500), (1024, 256), (224, 224)),
        # the long side is cut, not rounded
        ((300, 431), (256, 367), (224, 224)),
        ((96, 96), (36, 36), (32, 32)),
        # of exactly the size, too
        ((32, 32), (36, 36), (32, 32)),
        ((32, 96), (36, 109), (32, 96)),
        ((90, 90), (109, 109), (32, 96)),
    ],
)
def test_against_pil(size, scaled, result):
    pytest.importorskip("PIL")
    from PIL import Image

    image = picture(*size)
    wanted = Image.fromarray(image.numpy()).resize(scaled[::-1], Image.Resampling.BILINEAR)
    top, left = (round((s - r) / 2) for s, r in zip(scaled, result, strict=True))
    wanted = np.asarray(wanted.crop((left, top, left + result[1], top + result[0])), dtype=np.int16)
    out = resize_crop(image, result)
    assert out.dtype == torch.uint8 and out.shape == (*result, 3)
    assert np.abs(out.numpy() - wanted).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 900), (31, 32), (33, 33)])
def test_odd_sizes(size):
    assert resize_crop(picture(*size), (32, 32)).shape == (32, 32, 3)


def test_preprocess_of_an_encoder():
    pytest.importorskip("PIL")
    from PIL import Image

    encoder = create_encoder(NAME, img_size=(32, 64))
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (0.5, 0.5, 0.25)
    f = encoder.preprocess()
    assert f.metadata == {
        "input_size": (3, 32, 64),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.5, 0.25),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    image = picture(32, 64)
    assert not torch.equal(f(image), encoder.preprocess(crop_pct=1)(image))
    f = encoder.preprocess(crop_pct=1)
    assert f.metadata["crop_pct"] == 1 == encoder.resizing(1).crop_pct
    out = f(image)
    assert out.shape == (3, 32, 64) and out.dtype == torch.float32
    wanted = (image.double() / 255 - torch.tensor(f.mean).double()) / torch.tensor(f.std).double()
    assert torch.allclose(out.double(), wanted.permute(2, 0, 1), atol=1e-5)
    assert torch.equal(f(Image.fromarray(image.numpy())), out)
    assert encoder(f(picture(200, 300))[None]).shape == (1, 192)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_kind_of_pil_image(mode):
    pytest.importorskip("PIL")
    from PIL import Image

    f = Preprocess((16, 16), 3, **PLAIN)
    image = Image.fromarray(picture(40, 30).numpy()).convert(mode)
    assert torch.equal(f(image), f(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(16, 16, 3), "float32 [16, 16, 3]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "[3, 16, 16]"),
        (torch.zeros(16, 16, dtype=torch.uint8), "[16, 16]"),
        (np.zeros((16, 16, 3), complex), "complex128 [16, 16, 3]"),
        ("photo.jpg", "got str"),
    ],
)
def test_errors(image, words):
    with pytest.raises(UsageError) as error:
        Preprocess((16, 16), 3, **PLAIN)(image)
    assert words in str(error.value)


def test_gray_is_the_gray_value_of_rgb_or_one_channel_as_it_is():
    mean, std = (0.1, 0.2, 0.6), (0.5, 0.4, 0.3)
    f, image = Preprocess((16, 16), 1, mean, std, crop_pct=1), picture(16, 16)
    assert f.metadata["mean"] == (pytest.approx(0.3),) and f.metadata["std"] == (pytest.approx(0.4),)
    gray = (image.double() / 255) @ torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    assert torch.allclose(f(image)[0].double(), (gray - 0.3) / 0.4, atol=1e-3)
    one = image[..., :1]
    assert torch.allclose(f(one)[0].double(), (one[..., 0].double() / 255 - 0.3) / 0.4, atol=1e-3)
    # numbers of one channel, as timm keeps them
    assert torch.allclose(Preprocess((16, 16), 1, (0.3,), (0.4,), crop_pct=1)(image), f(image), atol=1e-6)


def test_more_channels_than_an_image_has():
    pytest.importorskip("PIL")
    from PIL import Image

    assert ModelConfig().in_chans == 3
    encoder = create_encoder(NAME, img_size=16, in_chans=5)
    with pytest.raises(UsageError, match=r"takes 5 channels, mean has 3 entries; set encoder\.mean to 5"):
        encoder.preprocess()
    encoder.mean, encoder.std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5,) * 5
    f, pixels = encoder.preprocess(crop_pct=1), (torch.rand(16, 16, 5) * 255).to(torch.uint8)
    wanted = (pixels.double() / 255 - torch.tensor(encoder.mean).double()) / 0.5
    assert torch.allclose(f(pixels).double(), wanted.permute(2, 0, 1), atol=1e-5)
    assert f((torch.rand(40, 30, 5) * 255).to(torch.uint8)).shape == (5, 16, 16)
    assert encoder(f(pixels)[None]).shape == (1, 192)
    # one number for all channels
    one, five = (Preprocess((16, 16), 5, (0.3,) * n, (0.5,) * n) for n in (1, 5))
    assert torch.equal(one(pixels), five(pixels)) and one.metadata == five.metadata
    with pytest.raises(UsageError, match=r"takes 5 channels, .* got uint8 \[16, 16, 3\]"):
        f(Image.fromarray(picture(16, 16).numpy()))
    with pytest.raises(UsageError, match=r"expected uint8 \[H, W, 5\]"):
        f(picture(16, 16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interpolation": "nearest"}, "'bilinear' or 'bicubic', got 'nearest'"),
        ({"crop_pct": 1.2}, "got 1.2"),
    ],
)
def test_numbers_that_cannot_be(options, words):
    with pytest.raises(UsageError, match=words):
        Preprocess((16, 16), 3, **PLAIN, **options)
    encoder = create_encoder(NAME, img_size=16)
    encoder.interpolation, encoder.crop_pct = "bicubic", 1.0
    assert encoder.preprocess().metadata["crop_pct"] == 1.0
    image = picture(24, 24)
    wanted = torch.nn.functional.interpolate(
        image.permute(2, 0, 1)[None].float(), size=(16, 16), mode="bicubic", antialias=True
    )
    assert torch.equal(
        resize_crop(image, (16, 16), "bicubic", 1.0), wanted[0].round().clamp(0, 255).byte().permute(1, 2, 0)
    )


def test_another_default_device():
    apply = create_encoder(NAME, depth=1).preprocess()
    pixels = picture(300, 400)
    # as torch.set_default_device does in a script
    with torch.device("meta"):
        found = apply(pixels)
    assert torch.equal(found, apply(pixels))
