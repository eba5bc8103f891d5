"""Linear layers in low precision, attention as products, and what the allocators are asked.

Covers: each prologue (nothing, GELU, LayerNorm), kept or made again, against fp64, outputs and all gradients, by the
rule of the kernels (at most twice the plain formula's error in the same type plus a floor); inputs of odd shapes;
one graph under torch.compile; fp32 and fp64 run the plain formula with second derivatives; layers that are not
ours; attention as products against the definition in fp64 and bf16, gradcheck, one graph; the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels.short_attention import short_attention_reference
from torch import nn

from extrema_fast.ops.linear import Linear, linear
from extrema_fast.ops.products import attention_products
from extrema_fast.training import memory

LOW = torch.bfloat16


def prologue(name: str, width: int) -> nn.Module | str | None:
    if name != "norm":
        return name or None
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    return norm


def by_definition(x, layer, before):
    u = F.gelu(x) if before == "gelu" else x if before is None else before(x)
    return F.linear(u, layer.weight, layer.bias)


def results(function, x, layer, before, upstream):
    leaves = [x, *layer.parameters(), *(before.parameters() if isinstance(before, nn.Module) else ())]
    y = function(x, layer, before)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def check(ours, plain, exact, names):
    for a, b, e, name in zip(ours, plain, exact, names, strict=True):
        assert a.shape == e.shape and a.isfinite().all()
        scale = e.abs().max()
        mine, theirs = ((t.double() - e).abs().max() / scale for t in (a, b))
        limit = 2 * theirs + torch.finfo(LOW).eps
        assert mine <= limit, f"{name}: error {mine:.2e}, torch's {theirs:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
@pytest.mark.parametrize("shape", [(5, 39, 64), (1, 1, 64), (7, 64)])
def test_against_fp64(before, again, shape):
    layer, f = Linear(64, 48), prologue(before, 64)
    nn.init.normal_(layer.bias)
    x = torch.randn(shape).to(LOW).requires_grad_()
    upstream = torch.randn(*shape[:-1], 48).to(LOW)
    with torch.autocast("cpu", LOW):
        ours = results(lambda *a: linear(*a, again), x, layer, f, upstream)
        plain = results(by_definition, x, layer, f, upstream)
    wide = layer.__class__(64, 48).double()
    wide.load_state_dict(layer.state_dict())
    g = prologue(before, 64)
    if isinstance(g, nn.Module):
        g = g.double()
        g.load_state_dict(f.state_dict())
    exact = results(by_definition, x.detach().double().requires_grad_(), wide, g, upstream.double())
    assert ours[0].dtype == LOW and all(t.dtype == torch.float32 for t in ours[2:])
    check(ours, plain, exact, ["y", "dx", "dweight", "dbias", "dgain", "dshift"][: len(ours)])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("before", ["", "gelu", "norm"])
def test_one_graph(before, again):
    layer, f = Linear(64, 48), prologue(before, 64)
    x = torch.randn(3, 5, 64).to(LOW).requires_grad_()

    def run(x):
        with torch.autocast("cpu", LOW):
            return linear(x, layer, f, again)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    upstream = torch.randn(3, 5, 48).to(LOW)
    leaves = [x, *layer.parameters()]
    a, b = (torch.autograd.grad(function(x), leaves, upstream) for function in (compiled, run))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)


def test_layers_without_gradients_or_bias():
    layer = Linear(16, 8, bias=False)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", LOW), torch.no_grad():
        assert not linear(x, layer).requires_grad
    layer.requires_grad_(False)
    x.requires_grad_()
    with torch.autocast("cpu", LOW):
        (dx,) = torch.autograd.grad(linear(x, layer, "gelu").float().sum(), x)
    assert dx.dtype == torch.float32 and dx.shape == x.shape


def test_full_precision_is_the_plain_formula():
    layer, norm = Linear(6, 5).double(), prologue("norm", 6).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for before in (None, "gelu", norm):
        assert torch.equal(linear(x, layer, before), by_definition(x, layer, before))
        assert torch.autograd.gradgradcheck(lambda x, before=before: linear(x, layer, before), (x,))


def test_other_layers_are_called():
    class Doubling(nn.Module):
        def forward(self, u):
            return 2 * u

    x = torch.randn(2, 8)
    with torch.autocast("cpu", LOW):
        assert torch.equal(linear(x, Doubling(), "gelu"), 2 * F.gelu(x))
        assert torch.equal(linear(x, Doubling(), nn.Identity()), 2 * x)


# ---- attention as products -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "n", "heads", "d"), [(1, 1, 1, 16), (3, 19, 2, 32), (2, 39, 3, 64), (1, 197, 2, 80)]
)
def test_products_against_the_definition(rows, n, heads, d):
    qkv = torch.randn(rows, n, 3, heads, d, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(rows, n, heads, d, dtype=torch.float64)
    for a, b in zip(
        *(both(f, qkv, upstream) for f in (attention_products, short_attention_reference)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    low = qkv.detach().to(LOW).requires_grad_()
    exact = both(short_attention_reference, low.detach().double().requires_grad_(), upstream)
    ours, plain = (both(f, low, upstream.to(LOW)) for f in (attention_products, short_attention_reference))
    check(ours, plain, exact, ["out", "dqkv"])
    assert ours[0].is_contiguous() and ours[1].is_contiguous()


def both(function, qkv, upstream):
    out = function(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]


def test_products_strided_expanded_and_one_graph():
    qkv = torch.randn(3, 2, 7, 2, 16, dtype=torch.float64).permute(1, 2, 0, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(attention_products, (qkv,))
    grad = torch.autograd.grad(attention_products(qkv).sum(), qkv)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(short_attention_reference(qkv).sum(), qkv)[0])
    compiled = torch.compile(attention_products, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(torch.autograd.grad(compiled(qkv).sum(), qkv)[0], grad)


# ---- allocators ------------------------------------------------------------------------------------


def test_what_the_allocators_are_asked(monkeypatch):
    environment: dict[str, str] = {}
    memory.ask_for_huge_pages(environment)
    assert environment == {memory.HUGE_PAGES: "1"}
    environment[memory.HUGE_PAGES] = "0"
    memory.ask_for_huge_pages(environment)
    assert environment[memory.HUGE_PAGES] == "0", "the user's own choice stays"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not memory.keep_freed_memory(), "nor is a malloc touched that the user has set"
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    code = """
import ctypes, resource, sys
from extrema_fast.training.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def faults(size=48 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(4)))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    counts = {}
    for how in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", code, how], env=env, capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        counts[how] = int(done.stdout)
    assert counts["keep"] < 0.1 * counts["default"], counts
