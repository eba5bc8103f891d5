"""short_attention against its plain definition (what holds for every op: test_contract.py).

Covers: output and gradient in fp64, fp32 and fp16 at every kind of length and head_dim; several sequences per tile
(also when they do not fill the last one; neighbors do not leak into each other); heads split over programs; the launch
settings of packed tiles; transposed gradients; the plain path; FLOPs; errors.
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
        (3, 39, 2, 32, {"PACK": 3, "HEADS": 2}, torch.float64),
        (4, 39, 1, 64, {"PACK": 3}, torch.float16),
        (5, 19, 2, 80, {"PACK": 3, "HEADS": 1}, torch.float32),
        (1, 7, 2, 32, {"PACK": 2}, torch.float64),
        (2, 19, 4, 32, {"HEADS": 2}, torch.float64),
        # 2 does not divide 3: all heads in one program
        (2, 7, 3, 32, {"HEADS": 2}, torch.float64),
    ],
)
def test_several_sequences_per_tile_and_heads_over_programs(rows, n, heads, d, config, dtype, poisoned):
    with _launch.forced("short_attention", config):
        compare(
            short_attention, short_attention_reference, [make(rows, n, heads, d, dtype)], 64, ["qkv"], 1e-12
        )


def test_sequences_of_one_tile_do_not_see_each_other():
    qkv = make(3, 7, 2, 16)
    other = qkv.detach().clone()
    other[1] *= 100
    with _launch.forced("short_attention", {"PACK": 3}):
        before = with_gradients(short_attention, [qkv])
        after = with_gradients(short_attention, [other.requires_grad_()])
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])


def test_backward_of_128_token_tiles_takes_one_head_per_program():
    from extrema_fast.kernels.short_attention.kernel import heuristic

    # in a loop over heads it spills
    assert heuristic("bwd", 39, 12, 64, 2, pack=3)["HEADS"] == 1
    assert heuristic("bwd", 19, 12, 64, 2, pack=3)["HEADS"] == 12
    assert heuristic("fwd", 39, 12, 64, 2, pack=3)["HEADS"] == 12


def test_the_plain_path_equals_the_kernel(monkeypatch):
    qkv = make(3, 19, 2, 32, torch.float32)
    kernel = with_gradients(short_attention, [qkv])
    monkeypatch.setattr(_launch, "INTERPRET", False)
    for a, b in zip(kernel, with_gradients(short_attention, [qkv]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert short_attention(qkv).is_contiguous()


def test_transposed_gradients():
    qkv = make(2, 7, 3, 16, torch.float32)
    loss = lambda f: (f(qkv).transpose(1, 2) * torch.arange(16.0)).sum()  # noqa: E731
    a, b = (torch.autograd.grad(loss(f), qkv) for f in (short_attention, short_attention_reference))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        short_attention(make(3, 7, 2, 16, torch.float32)).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 3 * 2 * 7 * 7 * 16


def test_errors():
    cases = [
        ((2, 7, 96), torch.float32, r"qkv: expected .*\[R, n <= 64, 3, H, d\], got float32 \[2, 7, 96\]"),
        ((2, 65, 3, 2, 16), torch.float32, "expected 1 to 64 tokens, got 65; use torch's scaled_dot"),
        ((2, 7, 3, 0, 16), torch.float32, "expected one head or more"),
        ((2, 7, 3, 2, 48), torch.float32, "head_dim 48 is not one of"),
    ]
    assert_errors(short_attention, [((torch.zeros(s, dtype=t),), {}, words) for s, t, words in cases])
    with pytest.raises(TypeError, match=r"qkv: expected a tensor .*, got list"):
        short_attention([1.0])
