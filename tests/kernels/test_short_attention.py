"""short_attention against its plain definition.

Covers: output and gradient in fp64, fp32 and fp16 at odd lengths and every head_dim; several sequences per
tile (also when they do not fill the last one; neighbours must not leak into each other); heads split over
programs; the launch settings of packed tiles; gradcheck; opcheck; one graph under torch.compile; strided,
expanded and offset inputs and gradients; poisoned outputs; repeatability; empty batches; the plain path
alone and against the kernel; FLOPs; every error.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.short_attention import short_attention, short_attention_reference
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels._compare import assert_as_good

OPS = torch.ops.extrema_fast


def make(rows, n, heads, d, dtype=torch.float64):
    return torch.randn(rows, n, 3, heads, d, dtype=torch.float64).to(dtype).requires_grad_()


def both(f, qkv, upstream):
    out = f(qkv)
    return out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), qkv)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "n", "heads", "d"),
    [(1, 1, 1, 16), (3, 7, 2, 32), (2, 19, 3, 64), (1, 39, 2, 80), (3, 49, 1, 64), (1, 64, 2, 32)],
)
@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_output_and_gradient(rows, n, heads, d, dtype, path, request):
    if path == "plain":
        request.getfixturevalue("plain")
    qkv = make(rows, n, heads, d, dtype)
    upstream = torch.randn(rows, n, heads, d, dtype=torch.float64)
    exact = both(short_attention_reference, qkv.detach().double().requires_grad_(), upstream)
    same = both(short_attention_reference, qkv, upstream)
    for name, a, b, c in zip(("out", "dqkv"), both(short_attention, qkv, upstream), same, exact, strict=True):
        assert a.is_contiguous()
        assert_as_good(a, b, c, max(n, d), name)


@pytest.mark.parametrize(
    ("rows", "n", "heads", "d", "config"),
    [
        (3, 39, 2, 32, {"PACK": 3, "HEADS": 2}),
        (4, 39, 1, 32, {"PACK": 3}),
        (7, 19, 1, 32, {"PACK": 6}),
        (5, 19, 2, 80, {"PACK": 3, "HEADS": 1}),
        (1, 7, 2, 32, {"PACK": 2, "HEADS": 1}),
        (2, 19, 4, 32, {"HEADS": 2}),
        # 2 does not divide 3: all heads in one program
        (2, 7, 3, 32, {"HEADS": 2}),
    ],
)
def test_several_sequences_per_tile_and_heads_over_programs(rows, n, heads, d, config, poisoned):
    qkv = make(rows, n, heads, d)
    upstream = torch.randn(rows, n, heads, d, dtype=torch.float64)
    with _launch.forced("short_attention", config):
        packed = both(short_attention, qkv, upstream)
    for a, b in zip(packed, both(short_attention_reference, qkv, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_tiles_in_the_input_type(dtype):
    qkv = make(4, 39, 1, 64, dtype)
    upstream = torch.randn(4, 39, 1, 64, dtype=torch.float64)
    exact = both(short_attention_reference, qkv.detach().double().requires_grad_(), upstream)
    same = both(short_attention_reference, qkv, upstream)
    with _launch.forced("short_attention", {"PACK": 3}):
        packed = both(short_attention, qkv, upstream)
    for name, a, b, c in zip(("out", "dqkv"), packed, same, exact, strict=True):
        assert_as_good(a, b, c, 64, name)


def test_sequences_of_one_tile_do_not_see_each_other():
    qkv, upstream = make(3, 7, 2, 16), torch.randn(3, 7, 2, 16, dtype=torch.float64)
    other = qkv.detach().clone()
    other[1] *= 100
    with _launch.forced("short_attention", {"PACK": 3}):
        before = both(short_attention, qkv, upstream)
        after = both(short_attention, other.requires_grad_(), upstream)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])


def test_backward_of_128_token_tiles_takes_one_head_per_program():
    from extrema_fast.kernels.short_attention.kernel import heuristic

    # in a loop over heads it spills
    assert heuristic("bwd", 39, 12, 64, 2, pack=3)["HEADS"] == 1
    assert heuristic("bwd", 19, 12, 64, 2, pack=3)["HEADS"] == 12
    assert heuristic("fwd", 39, 12, 64, 2, pack=3)["HEADS"] == 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_plain_path_equals_the_kernel(dtype, monkeypatch):
    qkv, upstream = make(3, 19, 2, 32, dtype), torch.randn(3, 19, 2, 32, dtype=torch.float64)
    kernel = both(short_attention, qkv, upstream)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    for a, b in zip(kernel, both(short_attention, qkv, upstream), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)


def test_gradcheck(monkeypatch):
    qkv = make(2, 5, 2, 16)
    assert torch.autograd.gradcheck(short_attention, qkv, fast_mode=True)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert torch.autograd.gradcheck(short_attention, qkv, fast_mode=True)


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows):
    qkv, dout = torch.randn(rows, 5, 3, 2, 16), torch.randn(rows, 5, 2, 16)
    for x in (qkv, torch.randn(5, rows, 3, 2, 16).transpose(0, 1)):
        torch.library.opcheck(OPS.short_attention_fwd.default, (x,))
        torch.library.opcheck(OPS.short_attention_bwd.default, (x, dout))


def test_one_graph_forward_and_backward():
    def loss(qkv):
        return (short_attention(qkv * 2) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for rows, n in ((3, 7), (2, 19)):
        qkv = make(rows, n, 2, 16)
        a, b = compiled(qkv), loss(qkv)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, qkv), torch.autograd.grad(b, qkv))


LAYOUTS = {
    "rows of a wider tensor": lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads before q, k, v": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "offset base": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    qkv = make(2, 7, 3, 16, torch.float32)
    strided = LAYOUTS[layout](qkv)
    expected, out = short_attention(qkv), short_attention(strided)
    assert torch.equal(out, expected)
    # stride 0, and transposed
    for loss in (lambda x: x.sum(), lambda x: (x.transpose(1, 2) * torch.arange(16.0)).sum()):
        a, b = torch.autograd.grad(loss(out), qkv, retain_graph=True), None
        b = torch.autograd.grad(loss(short_attention_reference(qkv)), qkv)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_expanded_rows():
    qkv = make(1, 7, 2, 16, torch.float32)
    torch.testing.assert_close(short_attention(qkv.expand(3, -1, -1, -1, -1))[2], short_attention(qkv)[0])


def test_every_element_is_written_and_runs_repeat_bitwise(poisoned):
    qkv = make(3, 19, 2, 80, torch.float32)
    one, two = (both(short_attention, qkv, torch.ones(3, 19, 2, 80)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


def test_an_empty_batch():
    qkv = make(0, 7, 2, 16)
    out = short_attention(qkv)
    out.sum().backward()
    assert out.shape == (0, 7, 2, 16) and qkv.grad.shape == qkv.shape


def test_flops():
    qkv = make(3, 7, 2, 16, torch.float32)
    with FlopCounterMode(display=False) as counter:
        short_attention(qkv).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 3 * 2 * 7 * 7 * 16


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 7, 96), torch.float32, r"qkv: expected .*\[R, n <= 64, 3, H, d\], got float32 \[2, 7, 96\]"),
        ((2, 7, 2, 2, 16), torch.float32, r"got float32 \[2, 7, 2, 2, 16\]"),
        ((2, 7, 3, 2, 16), torch.int32, "got int32"),
        ((2, 65, 3, 2, 16), torch.float32, "expected 1 to 64 tokens, got 65; use torch's scaled_dot"),
        ((2, 0, 3, 2, 16), torch.float32, "expected 1 to 64 tokens, got 0"),
        ((2, 7, 3, 2, 48), torch.float32, "head_dim 48 is not one of"),
    ],
)
def test_errors(shape, dtype, words):
    with pytest.raises(ValueError, match=words):
        short_attention(torch.zeros(shape, dtype=dtype))


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"qkv: expected a tensor .*, got list"):
        short_attention([1.0])
