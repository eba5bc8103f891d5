"""short_attention against its plain definition (what holds for every op: test_contract.py).

Covers: output and gradient in fp64, fp32 and fp16 at every kind of length and head_dim, with the gradient of the
projection's bias; several sequences per tile (also when they do not fill the last one);
launch settings; transposed gradients; the plain path; FLOPs; errors.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.short_attention import short_attention, short_attention_reference
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels._compare import DTYPES, assert_errors, compare, normal, with_gradients


def make(rows, n, heads, d, dtype=torch.float64):
    return normal(rows, n, 3, heads, d, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "heads", "d"),
    [
        (1, 1, 1, 16),
        (3, 7, 2, 80),
        (2, 19, 3, 64),
        (1, 39, 2, 64),
        (2, 49, 1, 80),
        (1, 64, 2, 32),
    ],
)
def test_output_and_gradient(rows, n, heads, d, dtype, poisoned):
    compare(short_attention, short_attention_reference, [make(rows, n, heads, d, dtype)], max(n, d), ["qkv"])


@pytest.mark.parametrize(
    ("rows", "n", "heads", "d", "config", "dtype"),
    [
        (3, 39, 2, 32, {"PACK": 3}, torch.float64),
        (4, 39, 1, 64, {"PACK": 1}, torch.float16),
        (5, 19, 2, 80, {"PACK": 3}, torch.float32),
        (4, 19, 1, 80, {}, torch.float16),
        (1, 7, 2, 32, {"PACK": 2}, torch.float64),
    ],
)
def test_several_sequences_per_tile_and_the_gradient_of_a_bias(rows, n, heads, d, config, dtype, poisoned):
    x, bias = make(rows, n, heads, d, dtype), normal(3 * heads * d, dtype=dtype)
    # a key's bias cancels in the softmax: exactly zero here, rounding noise in the definition
    used = torch.arange(3 * heads * d).view(3, -1)[::2].flatten()

    def projected(x, b):
        return x + bias.detach().to(x.dtype).index_put((used,), b).view(3, heads, d)

    def ours(x, b):
        whole = bias.detach().to(x.dtype).index_put((used,), b)
        return short_attention(projected(x, b.detach()), whole)

    def definition(x, b):
        return short_attention_reference(projected(x, b))

    with _launch.forced("short_attention", config):
        leaves = [x, bias.detach()[used].requires_grad_()]
        compare(ours, definition, leaves, rows * n, ["qkv", "bias"], 1e-12)
        (gradient,) = torch.autograd.grad(short_attention(x, bias).sum(), bias)
    assert not gradient.view(3, -1)[1].any() and gradient.dtype == dtype


def test_short_sequences_share_a_tile_where_they_fill_it():
    from extrema_fast.kernels.short_attention.kernel import heuristic

    assert heuristic(19, 64, 2) == {"PACK": 3, "num_warps": 4}
    assert heuristic(39, 64, 2) == {"PACK": 1, "num_warps": 4}
    assert heuristic(27, 64, 2) == {"PACK": 1, "num_warps": 2}
    assert heuristic(19, 64, 4)["PACK"] == 1


def test_the_plain_path_equals_the_kernel(monkeypatch):
    qkv, bias = make(3, 19, 2, 32, torch.float32), normal(192)
    kernel = with_gradients(short_attention, [qkv, bias])
    monkeypatch.setattr(_launch, "INTERPRET", False)
    for a, b in zip(kernel, with_gradients(short_attention, [qkv, bias]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert short_attention(qkv).is_contiguous()


def test_transposed_gradients():
    qkv = make(2, 7, 3, 16, torch.float32)
    loss = lambda f: (f(qkv).transpose(1, 2) * torch.arange(16.0)).sum()  # noqa: E731
    a, b = (torch.autograd.grad(loss(f), qkv) for f in (short_attention, short_attention_reference))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_flops():
    for bias in (None, normal(96)):
        with FlopCounterMode(display=False) as counter:
            short_attention(make(3, 7, 2, 16, torch.float32), bias).sum().backward()
        assert counter.get_total_flops() == (4 + 10) * 3 * 2 * 7 * 7 * 16


def test_errors():
    cases = [
        ((2, 7, 96), torch.float32, r"qkv: expected .*\[R, n <= 64, 3, H, d\], got float32 \[2, 7, 96\]"),
        ((2, 65, 3, 2, 16), torch.float32, "expected 1 to 64 tokens, got 65; use torch's scaled_dot"),
        ((2, 7, 3, 0, 16), torch.float32, "expected one head or more"),
        ((2, 7, 3, 2, 48), torch.float32, "head_dim 48 is not one of"),
    ]
    assert_errors(short_attention, [((torch.zeros(s, dtype=t),), {}, words) for s, t, words in cases])
    with pytest.raises(ValueError, match=r"bias: expected .*\[96\], got float32 \[32\]"):
        short_attention(torch.zeros(2, 7, 3, 2, 16), torch.zeros(32))
    with pytest.raises(TypeError, match=r"qkv: expected a tensor .*, got list"):
        short_attention([1.0])
