"""The plain PyTorch definitions that every kernel is measured against.

Covers, in float64 and at odd sizes: class attention in its two forms against each other and against torch's
own attention, outputs, probabilities and all gradients, gradcheck, the shift invariance of the key bias;
patch_gather against a convolution over the whole image followed by a gather, gradients included; self-
attention against torch's.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels.attention_pool import attention_pool_absorbed, attention_pool_reference
from extrema_fast.kernels.attention_pool.reference import PoolWeights
from extrema_fast.kernels.patch_gather import gather_patches, patch_gather_reference
from extrema_fast.kernels.short_attention import short_attention_reference

from extrema_fast.ops import dispatch as ops

pytestmark = pytest.mark.plain
SIZES = [1, 7, 19, 39, 49, 196, 197]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def pool_weights(d: int) -> PoolWeights:
    shapes = [(d,), (d,)] + [(d, d), (d,)] * 4
    return PoolWeights(*(randn(*s).detach().mul(d**-0.5).requires_grad_() for s in shapes))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- attention_pool -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("width", "heads"), [(24, 1), (24, 3), (10, 5)])
def test_absorbed_pooling_equals_the_definition_and_so_do_all_gradients(n, width, heads):
    tokens, cls, w = randn(3, n, width), randn(3, width), pool_weights(width)
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


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("pool", [attention_pool_reference, attention_pool_absorbed])
def test_pooling_against_torchs_attention(n, pool):
    width, heads = 24, 3
    tokens, cls, w = randn(2, n, width), randn(2, width), pool_weights(width)
    u = F.layer_norm(torch.cat([cls[:, None], tokens], 1), (width,), w.norm_weight, w.norm_bias, 1e-6)
    stacked = torch.cat([w.wq, w.wk, w.wv]), torch.cat([w.bq, w.bk, w.bv])
    out, p = F.multi_head_attention_forward(
        u[:, :1].transpose(0, 1), u.transpose(0, 1), u.transpose(0, 1), width, heads, *stacked,
        None, None, False, 0.0, w.wo, w.bo, training=False, average_attn_weights=False,
    )  # fmt: skip
    got, probabilities = pool(tokens, cls, w, heads)
    assert close(got, out[0]) and close(probabilities, p[:, :, 0])


@pytest.mark.parametrize("pool", [attention_pool_reference, attention_pool_absorbed])
def test_pooling_by_finite_differences(pool):
    tokens, cls, w = randn(2, 3, 4), randn(2, 4), pool_weights(4)
    assert torch.autograd.gradcheck(
        lambda t, c, *rest: pool(t, c, PoolWeights(*rest), 2), (tokens, cls, *w), fast_mode=True
    )


def test_the_class_row_is_one_of_the_keys():
    # identical tokens: every column has the same weight only if the class row is like them
    width, w = 8, pool_weights(8)
    row = randn(1, width)
    _, p = attention_pool_absorbed(row[:, None].expand(1, 4, width), row, w, 2)
    assert close(p, torch.full((1, 2, 5), 0.2, dtype=torch.float64))


def test_pooling_uses_the_eps_given():
    tokens, cls, w = randn(1, 3, 8), randn(1, 8), pool_weights(8)
    for pool in (attention_pool_reference, attention_pool_absorbed):
        assert not close(pool(tokens, cls, w, 2, 1e-6)[0], pool(tokens, cls, w, 2, 0.5)[0], 1e-6)
    a, b = (pool(tokens, cls, w, 2, 0.5)[0] for pool in (attention_pool_reference, attention_pool_absorbed))
    assert close(a, b)


# ---- patch_gather ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "kept"),
    [
        ((1, 1), 1),
        ((1, 7), 7),
        ((7, 1), 1),
        ((5, 8), 19),
        ((8, 5), 39),
        ((7, 7), 49),
        ((14, 14), 49),
        ((14, 14), 196),
    ],
)
@pytest.mark.parametrize(("views", "channels", "patch"), [(1, 3, 4), (3, 1, 2), (2, 5, 3)])
def test_gather_equals_embedding_everything_first(grid, kept, views, channels, patch):
    (gh, gw), b, width = grid, 2, 6
    x, weight, bias = (
        randn(b, channels, gh * patch, gw * patch),
        randn(width, channels, patch, patch),
        randn(width),
    )
    pos = randn(gh * gw, width)
    keep = torch.stack(
        [torch.stack([torch.randperm(gh * gw)[:kept] for _ in range(b)]) for _ in range(views)]
    ).int()
    out = patch_gather_reference(x, keep, weight, bias, pos)
    every = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2) + pos
    wanted = torch.cat([every[torch.arange(b)[:, None], view.long()] for view in keep])
    assert out.shape == (views * b, kept, width)
    assert close(out, wanted)
    upstream = torch.randn_like(out)
    inputs = (x, weight, bias, pos)
    for name, a, g in zip(
        ("images", "weight", "bias", "pos"),
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        assert close(a, g), name


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14)])
def test_no_keep_means_all_patches_in_row_major_order(grid):
    (gh, gw), p = grid, 4
    x, weight, pos = randn(2, 3, gh * p, gw * p), randn(6, 3, p, p), randn(gh * gw, 6)
    every = F.conv2d(x, weight, None, stride=p).flatten(2).transpose(1, 2) + pos
    assert close(patch_gather_reference(x, None, weight, None, pos), every)
    index = torch.arange(gh * gw).expand(1, 2, -1)
    assert close(patch_gather_reference(x, index, weight, None, pos), every)


def test_repeated_patches_and_channels_last_images():
    x, weight, bias, pos = randn(2, 3, 8, 12), randn(6, 3, 4, 4), randn(6), randn(6, 6)
    keep = torch.tensor([[[5, 5, 0], [1, 1, 1]]])
    out = patch_gather_reference(x, keep, weight, bias, pos)
    assert close(out[:, 0][1], out[:, 2][1]) and close(out[0, 0], out[0, 1])
    last = x.detach().contiguous(memory_format=torch.channels_last)
    assert close(patch_gather_reference(last, keep, weight, bias, pos), out)
    # a batch read through a stride
    wide = torch.cat([x.detach(), x.detach()], 3)[:, :, :, 12:]
    assert close(patch_gather_reference(wide, keep, weight, bias, pos), out)


def test_layout_of_a_patch_is_channel_row_column():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    cell = gather_patches(x, torch.tensor([[[4]]]), 2)
    assert torch.equal(cell[0, 0], x[0, :, 2:4, 2:4].flatten())
    assert torch.equal(gather_patches(x, None, 2)[0, 4], cell[0, 0])


def test_gather_by_finite_differences():
    keep = torch.tensor([[[3, 0], [1, 1]], [[2, 3], [0, 2]]])
    inputs = randn(2, 1, 4, 4), randn(3, 1, 2, 2), randn(3), randn(4, 3)
    assert torch.autograd.gradcheck(lambda x, *w: patch_gather_reference(x, keep, *w), inputs, fast_mode=True)


# ---- short_attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("heads", "d"), [(1, 5), (3, 8)])
def test_self_attention_against_torchs(n, heads, d):
    qkv = randn(2, n, 3, heads, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    upstream = torch.randn_like(wanted)
    gradient = torch.autograd.grad(wanted, qkv, upstream, retain_graph=True)[0]
    # the others need a GPU; `short` takes other head dims (test_short_attention.py)
    for name in ("auto", "sdpa", "matmul", "reference", "triton"):
        f = ops.IMPLEMENTATIONS["attention"][name]
        out = f(qkv)
        assert out.shape == (2, n, heads, d) and close(out, wanted)
        assert close(torch.autograd.grad(out, qkv, upstream)[0], gradient)


def test_self_attention_by_finite_differences():
    assert torch.autograd.gradcheck(short_attention_reference, randn(1, 3, 3, 2, 2), fast_mode=True)


@pytest.mark.parametrize("n", [1, 19])
def test_rows_do_not_see_each_other(n):
    qkv = randn(3, n, 3, 2, 4)
    assert close(short_attention_reference(qkv)[1], short_attention_reference(qkv[1:2])[0])
