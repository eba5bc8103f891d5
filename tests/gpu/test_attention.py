"""Self-attention backends on a GPU: `make test-gpu`.

Covers, for `auto` and every backend that can run here: bf16, fp16 and fp32 against float64, forward and gradients, at
1 to 196 tokens; that a name forces its kernel; more rows than one launch takes, and rows around FlashAttention-2's
limit, against the plain formula; compiled into one graph; captured in a CUDA graph; no waiting for the device; errors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from extrema_fast.errors import UsageError
from extrema_fast.ops import attention
from extrema_fast.ops import dispatch as ops
from tests.kernels._compare import assert_as_good, with_gradients

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
    return with_gradients(function, [qkv.detach().clone().requires_grad_()], upstream)


def plain(qkv: Tensor) -> Tensor:
    return attention.BACKENDS["reference"](qkv)


def compare(name: str, qkv: Tensor, upstream: Tensor, some: Tensor | slice = slice(None)) -> None:
    """All rows run; `some` of them are compared, by the rule of the kernels."""
    got = with_gradient(lambda x: ops.attention(x, name), qkv, upstream)
    same = with_gradient(plain, qkv[some], upstream[some])
    exact = with_gradient(plain, qkv[some].double(), upstream[some])
    for ours, theirs, wanted in zip(got, same, exact, strict=True):
        assert bool(ours.isfinite().all())
        # of one token the definition is exact; kernels take exponentials of 2, to 2e-6
        assert_as_good(ours[some], theirs, wanted, 1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_against_float64(name, n, dtype, device):
    require(name, device, dtype, n)
    qkv, upstream = randn(33, n, 3, 6, 64, dtype=dtype), randn(33, n, 6, 64, dtype=dtype)
    compare(name, qkv, upstream)
    with torch.no_grad():
        assert_as_good(ops.attention(qkv, name), plain(qkv), plain(qkv.double()), 1024)


@pytest.mark.parametrize(
    ("name", "node"),
    [("flash", "FlashAttention"), ("efficient", "EfficientAttention"), ("cudnn", "CudnnAttention")],
)
def test_a_name_forces_its_kernel(name, node, device):
    require(name, device, torch.bfloat16, 39)
    out = ops.attention(randn(4, 39, 3, 6, 64).requires_grad_(), name)
    names: list[str] = []
    todo: list[Any] = [out.grad_fn]
    while todo:
        f = todo.pop()
        names.append(f.name())
        todo += [x for x, _ in f.next_functions if x is not None]
    assert any(node in n for n in names), names


@pytest.mark.parametrize(
    ("rows", "n", "heads"),
    [
        # around the most sequences of a launch
        (65_535, 4, 1),
        (65_536, 4, 1),
        (131_080, 4, 1),
        # around FlashAttention-2's limit: rows * 16 heads * 128 padded tokens * head_dim 64 = 2**31 at 16,384 rows
        (16_384, 8, 16),
        (16_385, 8, 16),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_around_the_limits_of_a_launch(name, rows, n, heads, device):
    require(name, device, torch.bfloat16, n)
    some = torch.cat([torch.arange(i, i + 16) for i in (0, rows // 2 - 8, rows - 16)])
    compare(name, randn(rows, n, 3, heads, 64), randn(rows, n, heads, 64), some)


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
