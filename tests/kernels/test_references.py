"""The plain PyTorch definitions that every kernel is measured against.

Covers, in float64 and at odd sizes: class attention in its two forms against each other and against torch's own
attention, outputs, probabilities and all gradients; patch_gather against a convolution over the whole image followed
by a gather, gradients included; self-attention against torch's; the layout of a patch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels.attention_pool import attention_pool_absorbed, attention_pool_reference
from extrema_fast.kernels.attention_pool.reference import PoolWeights
from extrema_fast.kernels.patch_gather import gather_patches, patch_gather_reference
from extrema_fast.kernels.short_attention import short_attention_reference

from tests.kernels._compare import draw_keep, normal

pytestmark = pytest.mark.plain


def pool_weights(d: int) -> PoolWeights:
    shapes = [(d,), (d,)] + [(d, d), (d,)] * 4
    return PoolWeights(*(normal(*s, scale=d**-0.5) for s in shapes))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- attention_pool -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width", "heads"), [(1, 24, 1), (19, 24, 3), (197, 10, 5)])
def test_absorbed_pooling_equals_the_definition_and_so_do_all_gradients(n, width, heads):
    tokens, cls, w = normal(3, n, width), normal(3, width), pool_weights(width)
    upstream = torch.randn(3, width, dtype=torch.float64), torch.randn(3, heads, n + 1, dtype=torch.float64)
    results = []
    for pool in (attention_pool_reference, attention_pool_absorbed):
        out, p = pool(tokens, cls, w, heads)
        assert out.shape == (3, width) and p.shape == (3, heads, n + 1)
        assert close(p.sum(-1), torch.ones(3, heads).double())
        grads = torch.autograd.grad((out * upstream[0]).sum() + (p * upstream[1]).sum(), (tokens, cls, *w))
        results.append((out, p, *grads))
    largest = max(float(g.detach().abs().max()) for g in results[0][2:])
    names = ("out", "probabilities", "tokens", "cls", *PoolWeights._fields)
    for name, a, b in zip(names, *results, strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-12 * max(1.0, largest), name
        if name == "bk":
            # it cancels in the softmax: zero up to rounding, in both forms
            assert float(a.abs().max()) <= 1e-13 * largest


@pytest.mark.parametrize("n", [1, 39])
def test_pooling_against_torchs_attention(n):
    width, heads = 24, 3
    tokens, cls, w = normal(2, n, width), normal(2, width), pool_weights(width)
    # not the default: the one given is used
    u = F.layer_norm(torch.cat([cls[:, None], tokens], 1), (width,), w.norm_weight, w.norm_bias, 0.5)
    stacked = torch.cat([w.wq, w.wk, w.wv]), torch.cat([w.bq, w.bk, w.bv])
    queries, keys = u[:, :1].transpose(0, 1), u.transpose(0, 1)
    options = {"training": False, "average_attn_weights": False}
    last = (None, None, False, 0.0, w.wo, w.bo)
    out, p = F.multi_head_attention_forward(queries, keys, keys, width, heads, *stacked, *last, **options)
    for pool in (attention_pool_reference, attention_pool_absorbed):
        got, probabilities = pool(tokens, cls, w, heads, 0.5)
        assert close(got, out[0]) and close(probabilities, p[:, :, 0])
        assert not close(got, pool(tokens, cls, w, heads)[0], 1e-6)


# ---- patch_gather ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "kept", "views", "channels", "patch"),
    [
        ((1, 1), 1, 1, 3, 4),
        ((7, 1), 1, 2, 5, 3),
        ((5, 8), 19, 3, 1, 2),
        # all patches in row-major order
        ((3, 5), None, 1, 3, 4),
    ],
)
def test_gather_equals_embedding_everything_first(grid, kept, views, channels, patch):
    (gh, gw), b, width = grid, 2, 6
    x, weight = normal(b, channels, gh * patch, gw * patch), normal(width, channels, patch, patch)
    bias, pos = normal(width), normal(gh * gw, width)
    keep = None if kept is None else draw_keep(b, gh * gw, views, kept)
    out = patch_gather_reference(x, keep, weight, bias, pos)
    every = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2) + pos
    chosen = [slice(None)] if keep is None else [(torch.arange(b)[:, None], view.long()) for view in keep]
    wanted = torch.cat([every[at] for at in chosen])
    assert out.shape == (views * b, kept or gh * gw, width) and close(out, wanted)
    upstream, inputs = torch.randn_like(out), (x, weight, bias, pos)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (out, wanted))
    for name, a, g in zip(("images", "weight", "bias", "pos"), *gradients, strict=True):
        assert close(a, g), name


def test_repeated_patches_and_images_in_other_layouts():
    x, weight, bias, pos = normal(2, 3, 8, 12), normal(6, 3, 4, 4), normal(6), normal(6, 6)
    keep = torch.tensor([[[5, 5, 0], [1, 1, 1]]])
    out = patch_gather_reference(x, keep, weight, bias, pos)
    assert close(out[:, 0][1], out[:, 2][1]) and close(out[0, 0], out[0, 1])
    last = x.detach().contiguous(memory_format=torch.channels_last)
    strided = torch.cat([x.detach(), x.detach()], 3)[:, :, :, 12:]
    for other in (last, strided):
        assert close(patch_gather_reference(other, keep, weight, bias, pos), out)


def test_layout_of_a_patch_is_channel_row_column():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    cell = gather_patches(x, torch.tensor([[[4]]]), 2)
    assert torch.equal(cell[0, 0], x[0, :, 2:4, 2:4].flatten())
    assert torch.equal(gather_patches(x, None, 2)[0, 4], cell[0, 0])


# ---- short_attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 5), (39, 3, 8)])
def test_self_attention_against_torchs(n, heads, d):
    qkv = normal(2, n, 3, heads, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    upstream = torch.randn_like(wanted)
    gradient = torch.autograd.grad(wanted, qkv, upstream, retain_graph=True)[0]
    # every other backend is compared with this one (tests/ops/test_attention.py)
    out = short_attention_reference(qkv)
    assert close(out, wanted) and close(torch.autograd.grad(out, qkv, upstream)[0], gradient)
