"""Self-attention backends on a GPU: `make test-gpu`.

Covers, for `auto` and every backend that can run here: bf16, fp16 and fp32 against float64, forward and gradients, at
1 to 196 tokens; that a name forces its kernel; more rows than one launch takes, and rows around FlashAttention-2's
limit, against the plain formula; compiled into one graph; captured in a CUDA graph; no waiting for the device; errors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from extrema_fast.errors import UsageError
from extrema_fast.ops import attention
from extrema_fast.ops import dispatch as ops

pytestmark = pytest.mark.gpu
SIZES = [1, 19, 39, 49, 64, 196]
NAMES = [name for name in attention.BACKENDS if name != "reference"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(ops, "_setting", "auto")
    monkeypatch.delenv("EXTREMA_FAST_BACKEND", raising=False)
    # not by monkeypatch, whose undoing deletes the attribute
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def require(
    name: str, device: torch.device, dtype: torch.dtype, n: int, d: int = 64, train: bool = True
) -> None:
    why = "" if name == "auto" else attention.unsupported(name, device, dtype, n, d, train)
    if why:
        pytest.skip(f"{name}: {why}")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def with_gradient(function, qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]


def assert_as_good(got: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """At most twice the plain formula's own error in this dtype, and a floor."""
    for ours, same, wanted in zip(got, plain, exact, strict=True):
        assert ours.shape == wanted.shape and ours.dtype == same.dtype
        mine, theirs = ((x.double() - wanted).abs().max() / wanted.abs().max() for x in (ours, same))
        limit = 2 * theirs + torch.finfo(ours.dtype).eps + 1e-6
        assert mine <= limit, f"{mine:.1e}, limit {limit:.1e}"


def plain(qkv: Tensor) -> Tensor:
    return attention.BACKENDS["reference"](qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_against_float64(name, n, dtype, device):
    require(name, device, dtype, n)
    qkv, upstream = randn(33, n, 3, 6, 64, dtype=dtype), randn(33, n, 6, 64, dtype=dtype)
    exact = with_gradient(plain, qkv.double(), upstream)
    assert_as_good(
        with_gradient(lambda x: ops.attention(x, name), qkv, upstream),
        with_gradient(plain, qkv, upstream),
        exact,
    )
    with torch.no_grad():
        assert_as_good((ops.attention(qkv, name),), (plain(qkv),), exact[:1])


@pytest.mark.parametrize(
    ("name", "node"),
    [("flash", "FlashAttention"), ("efficient", "EfficientAttention"), ("cudnn", "CudnnAttention")],
)
def test_a_name_forces_its_kernel(name, node, device):
    require(name, device, torch.bfloat16, 39)
    out = ops.attention(randn(4, 39, 3, 6, 64).requires_grad_(), name)
    names, todo = [], [out.grad_fn]
    while todo:
        f = todo.pop()
        names.append(f.name())
        todo += [x for x, _ in f.next_functions if x is not None]
    assert any(node in n for n in names), names


def compare_some(name: str, rows: int, n: int, heads: int) -> None:
    """All rows run; the first, the last and those around the middle are compared."""
    qkv, upstream = randn(rows, n, 3, heads, 64), randn(rows, n, heads, 64)
    some = torch.cat(
        [torch.arange(8), torch.arange(rows // 2 - 8, rows // 2 + 8), torch.arange(rows - 8, rows)]
    )
    got = with_gradient(lambda x: ops.attention(x, name), qkv, upstream)
    few, up = qkv[some], upstream[some]
    assert_as_good(
        tuple(x[some] for x in got),
        with_gradient(plain, few, up),
        with_gradient(plain, few.double(), up),
    )
    assert all(bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize("rows", [65_535, 65_536, 131_080])
@pytest.mark.parametrize("name", NAMES)
def test_more_sequences_than_a_launch_takes(name, rows, device):
    require(name, device, torch.bfloat16, 4)
    compare_some(name, rows, 4, 1)


@pytest.mark.parametrize("rows", [16_384, 16_385])
@pytest.mark.parametrize("name", NAMES)
def test_around_the_limit_of_flash_attentions_backward_pass(name, rows, device):
    """rows * 16 heads * 128 padded tokens * head_dim 64 = 2**31 at 16,384 rows."""
    require(name, device, torch.bfloat16, 8)
    compare_some(name, rows, 8, 16)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_the_whole(name, device, monkeypatch):
    require(name, device, torch.bfloat16, 39)
    qkv, upstream = randn(50, 39, 3, 6, 64), randn(50, 39, 6, 64)
    whole = with_gradient(lambda x: ops.attention(x, name), qkv, upstream)
    monkeypatch.setattr(attention, "MAX_SEQUENCES", 16)
    chunks = with_gradient(lambda x: ops.attention(x, name), qkv, upstream)
    assert torch.equal(chunks[0], whole[0])
    torch.testing.assert_close(chunks[1], whole[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_compiled_into_one_graph(name, device):
    require(name, device, torch.bfloat16, 39)
    qkv, upstream = randn(16, 39, 3, 6, 64), randn(16, 39, 6, 64)
    wanted = with_gradient(lambda x: ops.attention(x, name), qkv, upstream)
    try:
        compiled = torch.compile(lambda x: ops.attention(x * 1.0, name), fullgraph=True, dynamic=False)
        got = with_gradient(compiled, qkv, upstream)
    finally:
        torch.compiler.reset()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph_and_without_waiting(name, device):
    require(name, device, torch.bfloat16, 39)
    qkv, upstream = randn(16, 39, 3, 6, 64).requires_grad_(), randn(16, 39, 6, 64)

    def step():
        out = ops.attention(qkv, name)
        return out, torch.autograd.grad(out, qkv, upstream)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "dtype", "n", "words"),
    [
        ("flash", torch.float32, 39, "it takes bfloat16, float16, got float32"),
        ("cudnn", torch.float64, 39, "got float64"),
        ("short", torch.bfloat16, 65, "takes at most 64 tokens of bfloat16, got 65"),
    ],
)
def test_errors_say_what_is_available(name, dtype, n, words):
    with pytest.raises(UsageError) as error:
        ops.attention(randn(2, n, 3, 2, 64, dtype=dtype), name)
    assert words in str(error.value) and torch.cuda.get_device_name() in str(error.value)
    assert "sdpa, " in str(error.value).rsplit("auto, ", 1)[1]
