"""patch_gather against its plain definition (what holds for every op: test_contract.py).

Covers: uint8 and float images, all patches and kept ones, no positions, patch sizes 4, 14, 16, gray and RGB, from 1
to 197 patches, fp64, fp32, fp16; weight and bias gradients; normalization of uint8, loss-scaled fp16 gradients;
images and positions that need a gradient; a frozen weight; autocast; patches in place of images; one graph of uint8
images; layouts of these; nothing kept; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels.patch_gather import gather_patches, patch_gather, patch_gather_reference

from tests.kernels._compare import DTYPES, assert_as_good, assert_errors, compare, draw_keep, normal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(batch=2, grid=(2, 3), patch=4, views=2, kept=2, width=32, channels=3, dtype=torch.float64):
    """(images, keep, weight, bias, pos)."""
    n = grid[0] * grid[1]
    images = normal(batch, channels, grid[0] * patch, grid[1] * patch, dtype=dtype).detach()
    weight = normal(width, channels, patch, patch, dtype=dtype, scale=0.1)
    pos = normal(n, width, dtype=dtype).detach()
    return images, draw_keep(batch, n, views, kept), weight, normal(width, dtype=dtype), pos


def pixels(batch=2, height=8, width=12, low=0):
    return torch.randint(low, 256, (batch, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "patch", "kept", "width", "channels"),
    [
        ((1, 1), 4, 1, 16, 3),
        ((2, 3), 4, 5, 192, 1),
        ((4, 5), 14, 7, 100, 3),
        ((7, 7), 16, 24, 64, 3),
        ((1, 197), 4, 98, 96, 3),
    ],
)
def test_output_and_gradients(grid, patch, kept, width, channels, dtype, poisoned):
    batch = 3 if grid[0] * grid[1] < 39 else 1
    images, keep, weight, bias, pos = make(batch, grid, patch, 2, kept, width, channels, dtype)
    compare(
        lambda w, b: patch_gather(images, keep, w, b, pos),
        lambda w, b: patch_gather_reference(images.to(w), keep, w, b, pos.to(w)),
        [weight, bias],
        channels * patch**2 + 2 * batch * kept,
        ["weight", "bias"],
        1e-12,
    )


def test_all_patches_without_bias(path):
    images, _, weight, _, pos = make()
    out = patch_gather(images, None, weight, None, pos)
    exact = patch_gather_reference(images, None, weight, None, pos)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["float", "uint8", "patches"])
def test_without_positions(kind, kept, path):
    images, keep, weight, bias, _ = make()
    keep = keep if kept else None
    options = {"mean": MEAN, "std": STD} if kind == "uint8" else {}
    if kind != "float":
        images = pixels() if kind == "uint8" else gather_patches(images, keep, 4)
    compare(
        lambda w, b: patch_gather(images, keep, w, b, None, **options),
        lambda w, b: patch_gather_reference(images, keep, w, b, None, **options),
        [weight, bias],
        48,
        ["weight", "bias"],
    )


@pytest.mark.parametrize(("patch", "dtype"), [(4, torch.float64), (4, torch.float32), (16, torch.float16)])
def test_uint8_images_are_normalized(dtype, patch, path):
    _, keep, weight, bias, pos = make(patch=patch, dtype=dtype)
    images = pixels(2, 2 * patch, 3 * patch)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    normalized = (images.permute(0, 3, 1, 2).double() / 255 - m) / s
    compare(
        # in float64: the definition of normalized images, whatever the images were
        lambda w, b: patch_gather(images, keep, w, b, pos, mean=MEAN, std=STD),
        lambda w, b: patch_gather_reference(normalized.to(w), keep, w, b, pos.to(w)),
        [weight, bias],
        3 * patch**2,
        ["weight", "bias"],
    )


def test_loss_scaled_fp16_gradients_of_uint8_images_stay_finite(path):
    _, keep, weight, bias, pos = make(batch=8, patch=16, kept=6, dtype=torch.float16)
    images, exact_weight = pixels(8, 32, 48, low=100), weight.detach().double().requires_grad_()
    grads = []
    for f, w in (
        (patch_gather, weight),
        (patch_gather_reference, weight),
        (patch_gather_reference, exact_weight),
    ):
        out = f(images, keep, w, bias.detach().to(w), pos.to(w), mean=MEAN, std=STD)
        grads.append(torch.autograd.grad(out, w, torch.full_like(out, 64.0))[0])
    # near fp16's end already
    assert grads[2].abs().max() > 5000
    assert_as_good(*grads, 96, "weight")


@pytest.mark.parametrize("which", ["images", "positions"])
def test_images_and_positions_that_need_a_gradient_take_the_definition(which):
    images, keep, weight, bias, pos = make()
    leaf = (images if which == "images" else pos).requires_grad_()
    a, b = (
        torch.autograd.grad(f(images, keep, weight, bias, pos).sum(), leaf)[0]
        for f in (patch_gather, patch_gather_reference)
    )
    assert torch.equal(a, b) and a.any()


def test_a_frozen_weight_keeps_no_patches():
    images, keep, weight, bias, pos = make()
    out = patch_gather(images, keep, weight.detach(), bias, pos)
    assert not out.grad_fn.next_functions[0][0].saved_tensors
    out.sum().backward()
    assert bias.grad.any()


def test_dtypes_of_images_weight_and_autocast(path):
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    half = patch_gather(images.half(), keep, weight, bias, pos)
    same = patch_gather(images.half().requires_grad_(), keep, weight, bias, pos)
    assert half.dtype == same.dtype == torch.float16
    torch.testing.assert_close(half, same, rtol=2e-3, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        low, double = patch_gather(images, keep, weight, bias, pos), patch_gather(*make())
    assert low.dtype == torch.bfloat16 and double.dtype == torch.float64
    low.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("all_patches", [True, False])
def test_picked_patches_are_as_their_images(all_patches, path):
    images, keep, weight, bias, pos = make(dtype=torch.float32)
    keep = None if all_patches else keep
    patches = gather_patches(images, keep, 4)
    results = []
    for x in (images, patches, torch.stack([patches, patches], -1)[..., 0]):
        out = patch_gather(x, keep, weight, bias, pos)
        results.append((out, *torch.autograd.grad(out.square().sum(), (weight, bias))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_uint8_images_in_other_layouts_in_one_graph_and_with_nothing_kept():
    _, keep, weight, bias, pos = make(dtype=torch.float32)
    images = pixels()

    def f(x, k):
        return patch_gather(x, k, weight, bias, pos, mean=MEAN, std=STD)

    wanted = f(images, keep)
    turned = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    offset = torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape)
    for same in (turned, offset, torch.cat([images] * 2, 2)[:, :, :12]):
        assert torch.equal(f(same, keep), wanted)
    for k in (keep, keep[..., :0]):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=False)(images, k)
        torch.testing.assert_close(compiled, wanted[:, : k.shape[-1]])
        a, b = (torch.autograd.grad(out.square().sum(), weight)[0] for out in (compiled, f(images, k)))
        torch.testing.assert_close(a, b)


def test_errors():
    images, keep, weight, bias, pos = make()
    norm = {"mean": MEAN, "std": STD}
    cases = [
        ((images[0, 0], keep, weight, bias, pos), {}, r"images: expected .*\[B, 3, H, W\].* or uint8"),
        ((images[..., :5], keep, weight, bias, pos), {}, r"images: sides \(8, 5\) are no multiples of .* 4"),
        ((images, keep + 6, weight, bias, pos), {}, r"keep: expected indices in \[0, 6\)"),
        ((images, keep, weight[..., :2], bias, pos), {}, "weight: expected square patches"),
        ((images, keep, weight, bias[:3], pos), {}, r"bias: expected .*\[32\]"),
        ((images, keep, weight, bias, pos[:2]), {}, r"pos: expected .*\[6, 32\]"),
        ((pixels(), keep, weight, bias, pos), {}, "mean, std: uint8 images need 3 numbers each, got None"),
        ((images, keep, weight, bias, pos), norm, "mean, std: only for uint8 images"),
        ((images[:, 0], keep, weight, bias, pos), {}, r"images: expected .*\[4, 2, 48\].*kept patches"),
        ((images[:, 0], None, weight, bias, pos), {}, r"images: expected .*\[B, 6, 48\]"),
    ]
    assert_errors(patch_gather, cases)
