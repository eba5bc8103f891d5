"""patch_gather against its plain definition.

Covers: three image layouts, all patches and kept ones, patch sizes 4, 14, 16, gray and RGB, fp64, fp32,
fp16; weight and bias gradients; normalisation of uint8, loss-scaled fp16 gradients; images and positions
that need a gradient; a frozen weight; autocast; gradcheck; opcheck; one graph; layouts; outputs that are not
inputs; poisoned outputs; repeatability; empty batches; nothing kept; every error.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.patch_gather import gather_patches, patch_gather, patch_gather_reference

from tests.kernels._compare import assert_as_good

OPS = torch.ops.extrema_fast
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=["kernel", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(_launch, "INTERPRET", False)


def make(batch=2, grid=(2, 3), patch=4, views=2, kept=2, width=32, channels=3, dtype=torch.float64):
    n = grid[0] * grid[1]
    images = torch.randn(batch, channels, grid[0] * patch, grid[1] * patch, dtype=torch.float64).to(dtype)
    keep = (
        torch.stack([torch.randperm(n)[:kept] for _ in range(views * batch)]).view(views, batch, kept).int()
    )
    weight = (
        torch.randn(width, channels, patch, patch, dtype=torch.float64).mul(0.1).to(dtype).requires_grad_()
    )
    bias = torch.randn(width, dtype=torch.float64).to(dtype).requires_grad_()
    return images, keep, weight, bias, torch.randn(n, width, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("grid", "patch", "kept", "width", "channels"),
    [((1, 1), 4, 1, 16, 3), ((2, 3), 4, 5, 96, 1), ((4, 5), 14, 7, 100, 3), ((14, 14), 16, 39, 192, 3)],
)
def test_output_and_gradients(grid, patch, kept, width, channels, dtype, path):
    args = make(1 if grid[0] > 4 else 3, grid, patch, 2, kept, width, channels, dtype)
    exact_args = [a.detach().double() if a.is_floating_point() else a for a in args]
    for a in exact_args[2:4]:
        a.requires_grad_()
    upstream = torch.randn(2 * args[0].shape[0], kept, width, dtype=torch.float64)
    results = []
    for f, a in ((patch_gather, args), (patch_gather_reference, args), (patch_gather_reference, exact_args)):
        out = f(*a)
        results.append((out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), a[2:4])))
    length = channels * patch**2 + upstream[..., 0].numel()
    for name, a, b, c in zip(("out", "weight", "bias"), *results, strict=True):
        assert_as_good(a, b, c, length, name)


def test_all_patches_without_bias(path):
    images, _, weight, _, pos = make()
    out, expected = (
        patch_gather(images, None, weight, None, pos),
        patch_gather_reference(images, None, weight, None, pos),
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_patch_major_input(path):
    images, keep, weight, bias, pos = make()
    patches = gather_patches(images, None, 4)
    for k in (keep, None):
        torch.testing.assert_close(
            patch_gather(patches, k, weight, bias, pos), patch_gather_reference(images, k, weight, bias, pos)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("patch", [4, 16])
def test_uint8_images_are_normalised(dtype, patch, path):
    _, keep, weight, bias, pos = make(patch=patch, dtype=dtype)
    pixels = torch.randint(0, 256, (2, 2 * patch, 3 * patch, 3), dtype=torch.uint8)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    images = (pixels.permute(0, 3, 1, 2).double() / 255 - m) / s
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    exact = patch_gather_reference(images, keep, *wide, pos.double())
    same = patch_gather_reference(images.to(dtype), keep, weight, bias, pos)
    out = patch_gather(pixels, keep, weight, bias, pos, mean=MEAN, std=STD)
    assert_as_good(out, same, exact, 3 * patch**2, "out")
    upstream = torch.randn_like(exact)
    for a, b, c in zip(
        torch.autograd.grad(out, (weight, bias), upstream.to(dtype)),
        torch.autograd.grad(same, (weight, bias), upstream.to(dtype)),
        torch.autograd.grad(exact, wide, upstream),
        strict=True,
    ):
        assert_as_good(a, b, c, 3 * patch**2, "gradient")


def test_loss_scaled_fp16_gradients_of_uint8_images_stay_finite(path):
    _, keep, weight, bias, pos = make(batch=8, patch=16, kept=6, dtype=torch.float16)
    pixels = torch.randint(100, 256, (8, 32, 48, 3), dtype=torch.uint8)
    out = patch_gather(pixels, keep, weight, bias, pos, mean=MEAN, std=STD)
    upstream = torch.full_like(out, 64.0)
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    exact = patch_gather_reference(pixels, keep, *wide, pos.double(), mean=MEAN, std=STD)
    same = patch_gather_reference(pixels, keep, weight, bias, pos, mean=MEAN, std=STD)
    grads = [
        torch.autograd.grad(o, w, upstream.to(o.dtype))[0]
        for o, w in ((out, weight), (same, weight), (exact, wide[0]))
    ]
    # near fp16's end already
    assert grads[2].abs().max() > 5000
    assert_as_good(*grads, 96, "weight")


def test_positions_that_need_a_gradient_take_the_definition():
    images, keep, weight, bias, pos = make()
    pos.requires_grad_()
    a = torch.autograd.grad(patch_gather(images, keep, weight, bias, pos).sum(), pos)[0]
    b = torch.autograd.grad(patch_gather_reference(images, keep, weight, bias, pos).sum(), pos)[0]
    assert torch.equal(a, b) and a.any()


def test_a_frozen_weight_gathers_nothing_again(monkeypatch):
    images, keep, weight, bias, pos = make()
    monkeypatch.setattr(_launch, "INTERPRET", False)
    out = patch_gather(images, keep, weight.detach(), bias, pos)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    assert bias.grad.any() and not any("patch_pack" in event.key for event in profile.key_averages())


def test_fp64_is_left_alone_by_autocast(path):
    args = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_gather(*args).dtype == torch.float64


def test_fp16_images_with_an_fp32_weight(path):
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    out = patch_gather(images.half(), keep, weight, bias, pos)
    same = patch_gather(images.half().requires_grad_(), keep, weight, bias, pos)
    assert out.dtype == same.dtype == torch.float16
    torch.testing.assert_close(out, same, rtol=2e-3, atol=2e-3)


def test_images_that_need_a_gradient_take_the_definition():
    images, keep, weight, bias, pos = make()
    images.requires_grad_()
    a = torch.autograd.grad(patch_gather(images, keep, weight, bias, pos).sum(), images)[0]
    b = torch.autograd.grad(patch_gather_reference(images, keep, weight, bias, pos).sum(), images)[0]
    assert torch.equal(a, b) and a.any()


def test_autocast(plain):
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_gather(images, keep, weight, bias, pos)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_gradcheck(path):
    images, keep, weight, bias, pos = make(width=16)
    assert torch.autograd.gradcheck(
        lambda w, b: patch_gather(images, keep, w, b, pos), (weight, bias), fast_mode=True
    )


def test_opcheck():
    images, keep, weight, bias, pos = (t.detach() for t in make(dtype=torch.float32))
    flat = weight.flatten(1)
    for x in (images, images.transpose(2, 3).contiguous().transpose(2, 3)):
        for k in (keep, None):
            torch.library.opcheck(OPS.patch_gather_fwd.default, (x, k, flat, bias, pos, 4, 1))
            torch.library.opcheck(OPS.patch_pack.default, (x, k, 4, 1, torch.float16))


@pytest.mark.parametrize("layout", ["patches", "one patch", "pixels"])
def test_packing_never_returns_its_input(layout, path):
    x, number = {
        "patches": (torch.randn(2, 6, 48), 2),
        "one patch": (torch.randn(2, 3, 4, 4), 1),
        "pixels": (torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8), 0),
    }[layout]
    torch.library.opcheck(OPS.patch_pack.default, (x, None, 4, number, torch.float32))


def test_one_graph():
    def loss(images, keep, weight, bias, pos):
        return (patch_gather(images, keep, weight, bias, pos) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for kept in (2, 5):
        args = make(kept=kept)
        a, b = compiled(*args), loss(*args)
        torch.testing.assert_close(a, b)
        for x, y in zip(*(torch.autograd.grad(v, args[2:4]) for v in (a, b)), strict=True):
            torch.testing.assert_close(x, y)


def test_layouts_and_expanded_gradients():
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    expected = patch_gather(images, keep, weight, bias, pos)
    for x in (
        images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        torch.cat([images, images], 3)[..., : images.shape[3]],
        torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape),
    ):
        out = patch_gather(x, keep, weight, bias, pos)
        assert torch.equal(out, expected)
    a = torch.autograd.grad(out.sum(), weight)
    b = torch.autograd.grad(patch_gather_reference(images, keep, weight, bias, pos).sum(), weight)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    one = images[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        patch_gather(one, keep, weight, bias, pos), patch_gather_reference(one, keep, weight, bias, pos)
    )


def test_every_element_is_written_and_runs_repeat_bitwise(poisoned):
    args = make(kept=5, width=100, dtype=torch.float32)
    one, two = (patch_gather(*args) for _ in range(2))
    assert not one.isnan().any() and torch.equal(one, two)
    packed = OPS.patch_pack(args[0], args[1], 4, 1, torch.float32)
    assert not packed.isnan().any()


@pytest.mark.parametrize("kept", [0, 2])
def test_nothing_kept_and_one_graph_with_pixels(kept, path):
    _, keep, weight, bias, pos = make(kept=2)
    pixels = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)

    def loss(w, b):
        return (patch_gather(pixels, keep[..., :kept], w, b, pos, mean=MEAN, std=STD) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    a, b = (torch.autograd.grad(f(weight, bias), (weight, bias)) for f in (compiled, loss))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_an_empty_batch():
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    out = patch_gather(images[:0], keep[:, :0], weight, bias, pos)
    out.sum().backward()
    assert out.shape == (0, 2, 32) and (weight.grad == 0).all()


def test_errors():
    images, keep, weight, bias, pos = make()
    pixels = torch.zeros(2, 8, 12, 3, dtype=torch.uint8)
    for args, words in [
        ((images[0, 0], keep, weight, bias, pos), "images: expected uint8"),
        ((images[:, :2], keep, weight, bias, pos), r"images: expected .*\[B, 3, H, W\]"),
        (
            (images[..., :5], keep, weight, bias, pos),
            r"images: sides \(8, 5\) are no multiples of the patch size 4",
        ),
        ((images, keep + 6, weight, bias, pos), r"keep: expected indices in \[0, 6\)"),
        ((images, keep[:, :1], weight, bias, pos), r"keep: expected int32 \| int64 \[V, 2, K\]"),
        ((images, keep, weight[..., :2], bias, pos), "weight: expected square patches"),
        ((images, keep, weight, bias[:3], pos), r"bias: expected .*\[32\]"),
        ((images, keep, weight, bias, pos[:2]), r"pos: expected .*\[6, 32\]"),
        ((pixels, keep, weight, bias, pos), "mean, std: uint8 images need 3 numbers each, got None"),
        ((images.to("meta"), keep, weight, bias, pos), "images: expected on cpu"),
    ]:
        with pytest.raises(ValueError, match=words):
            patch_gather(*args)
    with pytest.raises(ValueError, match="only for uint8 images"):
        patch_gather(images, keep, weight, bias, pos, mean=MEAN, std=STD)
