"""Color jitter: two jittered copies of one crop.

Covers: chains of all operations in all 24 orders against PIL's 8-bit chain, also on photographs, and against a plain
loop; flat images; the distribution of all random parameters, and that parameters,
views and neighboring samples are independent; keyed by sample, epoch, seed and view, so equal for any split of the
batch; normalization; one channel; policies without color.
"""

from __future__ import annotations

import colorsys
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from extrema_fast.kernels.color_views import reference
from extrema_fast.kernels.color_views.reference import BRIGHTNESS, CONTRAST, HUE, SATURATION, jitter

from extrema_fast import rng
from extrema_fast.config import DataConfig
from extrema_fast.data.augment import color_jitter, jitter_params, normalize
from extrema_fast.ops import dispatch as ops

ORDERS = list(itertools.permutations(range(4)))


def color_views(images, index, cfg, *, seed, epoch, in_chans=3):
    return color_jitter(images, jitter_params(index, cfg, seed=seed, epoch=epoch), cfg, in_chans)


def color_params(index: torch.Tensor, cfg: DataConfig, *, seed: int, epoch: int, stream: int) -> dict:
    """The parameters of one view by name."""
    p = reference.color_params_reference(
        index, cfg.jitter, cfg.jitter_prob, cfg.gray_prob, seed=seed, epoch=epoch, streams=(stream, stream)
    )[:, 0]
    return {
        "on": p[:, reference.ON] > 0,
        "factors": p[:, reference.FACTORS],
        "order": p[:, reference.ORDER].long(),
        "gray": p[:, reference.GRAY_ON] > 0,
    }


SHARED = Path(os.environ.get("EXTREMA_FAST_SHARED", Path(__file__).parents[3] / "shared"))
PLAIN = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def pictures(b: int = 4, h: int = 24, w: int = 32) -> torch.Tensor:
    """uint8 [b, h, w, 3]: smooth colors, noise, and saturated corners."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    smooth = torch.stack([x, y, (x + y) / 2], -1) * torch.rand(b, 1, 1, 3) * 255
    out = (smooth + 30 * torch.randn(b, h, w, 3)).clamp(0, 255).to(torch.uint8)
    corners = torch.tensor(list(itertools.product((0, 255), repeat=3)), dtype=torch.uint8)
    out[:, 0, :8] = corners
    return out


def unit(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).double() / 255


# ---- operations -----------------------------------------------------------------------------------


def pil_chain(picture, factors: list[float], order: list[int]):
    """What torchvision does to a PIL image: 8 bits after each operation, hue in PIL's 8-bit HSV."""
    from PIL import Image, ImageEnhance

    for op in order:
        if op == HUE:
            h, s, v = picture.convert("HSV").split()
            turned = (np.asarray(h, dtype=np.int16) + int(factors[HUE] * 255)) % 256
            picture = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")
        else:
            picture = getattr(ImageEnhance, ("Brightness", "Contrast", "Color")[op])(picture).enhance(
                factors[op]
            )
    return picture


def against_pil_chain(given: list) -> np.ndarray:
    """Absolute differences in levels, all 24 orders and drawn factors; both views, as training makes them."""
    images = torch.stack([torch.from_numpy(np.array(p)) for p in given])
    drawn = reference.color_params_reference(torch.arange(24), PLAIN.jitter, 1.0, 0.0, seed=4, epoch=0)
    drawn[..., reference.ORDER] = torch.tensor(ORDERS)[:, None].float()
    found = []
    for i, view in itertools.product(range(24), range(2)):
        which = (i * 2 + view) % len(images)
        ours = ops.color_views(images[which : which + 1], drawn[i : i + 1], PLAIN.mean, PLAIN.std)[view][0]
        row = drawn[i, view]
        wanted = pil_chain(given[which], row[reference.FACTORS].tolist(), list(ORDERS[i]))
        found.append(
            np.abs((ours * 255).round().permute(1, 2, 0).numpy() - np.asarray(wanted, dtype=np.float64))
        )
    return np.stack(found)


@pytest.mark.parametrize("which", ["pale", "photographs"])
def test_chains_against_pil(which):
    Image = pytest.importorskip("PIL.Image")
    if which == "photographs":
        archive = SHARED / "data/imagenet-photos-250.tar"
        if not archive.is_file():
            pytest.skip(f"no photographs at {archive} (EXTREMA_FAST_SHARED)")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile()][:48]
            images = [Image.open(tar.extractfile(m)).convert("RGB").resize((120, 90)) for m in members]
    else:
        # as pale as photographs: one of PIL's 255 hue steps is 6 levels of a saturated color
        pale = (pictures(5, 57, 91).float() * 0.5 + 64).to(torch.uint8)
        images = [Image.fromarray(p.numpy()) for p in pale]
    difference = against_pil_chain(images)
    assert difference.mean() <= 2 and difference.max() <= 13


def slow_jitter(x: torch.Tensor, factors: list[float], order: list[int]) -> torch.Tensor:
    """One image [3, H, W] in float64, one operation after the other."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    for op in order:
        f, gray = factors[op], (x * weights).sum(0, keepdim=True)
        if op == BRIGHTNESS:
            x = f * x
        elif op == CONTRAST:
            x = f * x + (1 - f) * gray.mean()
        elif op == SATURATION:
            x = f * x + (1 - f) * gray
        else:
            turned = [
                colorsys.hsv_to_rgb((h + f) % 1.0, s, v)
                for h, s, v in (colorsys.rgb_to_hsv(*p) for p in x.flatten(1).T.tolist())
            ]
            x = torch.tensor(turned, dtype=torch.float64).T.reshape(x.shape)
        x = x.clamp(0, 1)
    return x


def test_all_orders_mixed_in_one_batch():
    images = unit(pictures(24, 6, 9))
    factors = torch.tensor([0.6, 0.6, 0.8, -0.1]) + torch.rand(24, 4) * torch.tensor([0.8, 0.8, 0.4, 0.2])
    out = jitter(images, factors, torch.tensor(ORDERS))
    single = jitter(images.float(), factors, torch.tensor(ORDERS))
    for i, order in enumerate(ORDERS):
        wanted = slow_jitter(images[i], factors[i].double().tolist(), list(order))
        assert (out[i] - wanted).abs().max() < 1e-9, order
        assert (single[i] - wanted).abs().max() * 255 < 0.01, order


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_images(value):
    images = torch.full((24, 4, 5, 3), value, dtype=torch.uint8)
    factors = torch.tensor([1.0, 0.7, 1.2, 0.07]).repeat(24, 1)
    out = jitter(unit(images).float(), factors, torch.tensor(ORDERS))
    # flat and colorless: nothing but brightness can change it
    assert out.isfinite().all() and (out * 255 - value).abs().max() < 1e-3
    cfg = DataConfig(jitter_prob=1.0, gray_prob=0.5)
    for view in color_views(images, torch.arange(24), cfg, seed=0, epoch=0):
        assert view.isfinite().all()


# ---- random parameters ----------------------------------------------------------------------------------------


def params(count: int = 20_000, cfg: DataConfig | None = None, **keys) -> dict[str, torch.Tensor]:
    keys = {"seed": 1, "epoch": 0, "stream": rng.COLOR_STUDENT} | keys
    return color_params(torch.arange(count), cfg or DataConfig(), **keys)


@pytest.mark.parametrize("stream", [rng.COLOR_STUDENT, rng.COLOR_TEACHER])
def test_parameters_have_the_papers_distribution(stream):
    stats = pytest.importorskip("scipy.stats")
    p = params(stream=stream)
    for name, chance in (("on", 0.8), ("gray", 0.2)):
        assert stats.binomtest(int(p[name].sum()), 20_000, chance).pvalue > 1e-3, name
    low, high = np.array([0.6, 0.6, 0.8, -0.1]), np.array([1.4, 1.4, 1.2, 0.1])
    for i in range(4):
        f = p["factors"][:, i].double().numpy()
        assert low[i] - 1e-6 <= f.min() and f.max() <= high[i] + 1e-6
        assert stats.kstest(f, "uniform", (low[i], high[i] - low[i])).pvalue > 1e-3, i
    assert torch.equal(p["order"].sort(1).values, torch.arange(4).expand(20_000, 4))
    _, counts = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_parameters_of_views_and_of_neighboring_samples_are_independent():
    stats = pytest.importorskip("scipy.stats")
    student, teacher = params(), params(stream=rng.COLOR_TEACHER)

    def columns(p):
        number = (p["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_inverse=True)[1]
        factors = [(f.argsort().argsort() * 8 // len(f)) for f in p["factors"].unbind(1)]
        return [c.long().numpy() for c in (p["on"], p["gray"], number, *factors)]

    mine, theirs = columns(student), columns(teacher)
    pairs = [(a, b) for a in mine for b in theirs]
    pairs += [(a[:-1], a[1:]) for a in mine] + list(itertools.combinations(mine, 2))
    for a, b in pairs:
        table = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(table, (a, b), 1)
        # 77 pairs: one chance in a thousand each would fail in one of 13 seeds
        assert stats.chi2_contingency(table).pvalue > 1e-5


def test_the_last_order_is_the_last_of_the_table(monkeypatch):
    # the largest number must not round up to a 25th order
    monkeypatch.setattr(reference, "uniform", lambda *a, **k: torch.full((1, 8), 1 - 2**-24))
    assert params(1)["order"].tolist() == [[3, 2, 1, 0]]


def test_strengths_come_from_the_configuration():
    p = params(cfg=DataConfig(jitter=(1.5, 0.0, 0.3, 0.5), jitter_prob=1.0, gray_prob=0.0))
    assert p["on"].all() and not p["gray"].any()
    # never below 0: a negative brightness has no meaning
    assert 0 <= p["factors"][:, 0].min() < 0.01 and p["factors"][:, 0].max() == pytest.approx(2.5, abs=0.01)
    assert (p["factors"][:, 1] == 1).all()
    assert p["factors"][:, 3].abs().max() == pytest.approx(0.5, abs=0.01)
    off = params(cfg=DataConfig(jitter_prob=0.0, gray_prob=1.0))
    assert not off["on"].any() and off["gray"].all()


def test_parameters_belong_to_sample_epoch_seed_and_view():
    base = params(200)["factors"]
    for change in ({"seed": 2}, {"epoch": 1}, {"stream": rng.COLOR_TEACHER}):
        assert (params(200, **change)["factors"] == base).float().mean() < 0.01


# ---- views ----------------------------------------------------------------------------------------


def test_views_follow_their_parameters():
    images, index = pictures(32, 8, 8), torch.arange(32) + 100
    for stream, view in zip(
        (rng.COLOR_STUDENT, rng.COLOR_TEACHER),
        color_views(images, index, PLAIN, seed=3, epoch=2),
        strict=True,
    ):
        assert view.shape == (32, 3, 8, 8) and view.dtype == torch.float32 and view.is_contiguous()
        p = color_params(index, PLAIN, seed=3, epoch=2, stream=stream)
        assert p["on"].any() and not p["on"].all() and p["gray"].any()
        for i in range(32):
            wanted = unit(images)[i]
            if p["on"][i]:
                wanted = slow_jitter(wanted, p["factors"][i].double().tolist(), p["order"][i].tolist())
            if p["gray"][i]:
                wanted = (
                    (wanted * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1))
                    .sum(0)
                    .expand(3, -1, -1)
                )
            assert (view[i] - wanted).abs().max() * 255 < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_for_any_split_and_order_of_the_batch(channels):
    images, index = pictures(12), torch.tensor([5, 1, 8, 0, 1 << 33, 2, 77, 3, 4, 6, 7, 9])
    keys = {"seed": 1, "epoch": 2, "in_chans": channels}
    whole = color_views(images, index, DataConfig(), **keys)
    for cuts in ([slice(0, 1), slice(1, 7), slice(7, 12)], [slice(i, i + 1) for i in range(12)]):
        parts = [color_views(images[c], index[c], DataConfig(), **keys) for c in cuts]
        for view in range(2):
            assert torch.equal(torch.cat([p[view] for p in parts]), whole[view])
    turned = color_views(images.flip(0), index.flip(0), DataConfig(), **keys)
    assert all(torch.equal(a.flip(0), b) for a, b in zip(turned, whole, strict=True))


@pytest.mark.parametrize("policy", ["spatial", "centercrop"])
def test_without_color_both_networks_see_one_tensor(policy):
    images = pictures(3)
    cfg = DataConfig(policy=policy)
    student, teacher = color_views(images, torch.arange(3), cfg, seed=0, epoch=0)
    assert student is teacher
    assert torch.equal(student, normalize(images, cfg.mean, cfg.std))


# ---- normalization --------------------------------------------------------------------------------


def test_normalize():
    images, mean, std = pictures(2), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    out = normalize(images, mean, std)
    assert out.shape == (2, 3, 24, 32) and out.dtype == torch.float32 and out.is_contiguous()
    wanted = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    assert torch.allclose(out.double(), wanted.permute(0, 3, 1, 2), atol=1e-5)
    gray = normalize(images, mean, std, in_chans=1)
    luma = (images.double() / 255 * torch.tensor([0.299, 0.587, 0.114]).double()).sum(-1)
    assert gray.shape == (2, 1, 24, 32)
    assert torch.allclose(gray[:, 0].double(), (luma - 0.2) / (0.875 / 3), atol=1e-5)
