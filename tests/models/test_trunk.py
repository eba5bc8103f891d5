"""A trunk block on fused passes (`ops.trunk`) against the plain block: only rounding differs.

Covers: output and every gradient with each combination of kernels, drop-path, what the backward pass recomputes, and
checkpointing, in fp64; one compiled graph for all blocks; bf16 with shadow weights (plain residual, library matmuls);
blocks that must run as they are: hooks, replaced layers, norms without parameters, other parametrisations.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch
from torch._dynamo.testing import CompileCounterWithBackend

from extrema_fast.models.encoder import create_encoder
from extrema_fast.models.layers import Block
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops import trunk

PATH = torch.tensor([[[0.0, 1.2, 1.2], [1.0, 1.0, 0.0]], [[1.3, 0.0, 1.1], [1.0, 2.0, 1.0]]])
KERNELS = ("triton", "residual_norm=triton", "mlp=split", "mlp=triton,attention=short,residual_norm=triton")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    if not _launch.can_run("cpu")[0]:
        pytest.skip(_launch.can_run("cpu")[1])
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(ops, "_setting", "auto")
    torch.manual_seed(0)


def make(depth=1):
    shape = {"width": 32, "heads": 2, "mlp_ratio": 2.0, "pool_depth": 1}
    encoder = create_encoder("extrema_vit_tiny_patch16_224", img_size=64, depth=depth, **shape)
    for p in encoder.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, std=0.5)
    return encoder.double()


def results(encoder, backend, path=PATH[:1]):
    """Tokens, the gradient of the input, those of all weights of the blocks by name."""
    ops.set_backend(backend)
    x = torch.linspace(-2, 2, 3 * 5 * 32, dtype=torch.float64).sin().view(3, 5, 32).requires_grad_()
    out = encoder.trunk(x, path)
    named = dict(encoder.blocks.named_parameters())
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, 32)).sum(), (x, *named.values()))
    return {"out": out, **dict(zip(("x", *named), grads, strict=True))}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        # the gradient of the keys' bias is rounding noise
        torch.testing.assert_close(x, b[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", KERNELS)
def test_output_and_gradients(backend):
    encoder = make()
    assert_same(results(encoder, backend), results(encoder, "reference"))
    if backend == "triton":
        assert_same(results(encoder, backend, None), results(encoder, "reference", None))


@pytest.mark.parametrize(
    ("backend", "recompute", "checkpointing"),
    [
        ("triton", "gelu", False),
        ("triton", "norm", True),
        ("residual_norm=triton", "norm", False),
        ("mlp=split", "norm", False),
    ],
)
def test_recomputing(backend, recompute, checkpointing):
    encoder = make()
    plain = results(encoder, "reference")
    encoder.set_recompute(recompute)
    encoder.set_grad_checkpointing(checkpointing)
    assert_same(results(encoder, backend), plain)


def test_recomputing_keeps_less():
    kept = {}
    for recompute in ("none", "gelu", "norm"):
        encoder = make(1)
        encoder.set_recompute(recompute)
        ops.set_backend("triton")
        saved = {}

        def pack(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            encoder.trunk(torch.randn(2, 5, 32, dtype=torch.float64))
        kept[recompute] = sum(s.nbytes() for s in saved.values()) / (8 * 2 * 5 * 32)
    # GELU is 2 wide here, the two norms 1 each
    assert kept["none"] - kept["gelu"] == 2
    # less the norms' vectors
    assert kept["gelu"] - kept["norm"] == pytest.approx(2, abs=0.25)


def test_one_graph_for_all_blocks():
    encoder = make(2)
    encoder.set_recompute("norm")
    plain = results(encoder, "reference", PATH)
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for block in encoder.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=count)
    # not the matmuls, which the interpreter is slow at
    assert_same(results(encoder, "residual_norm=triton,mlp=split", PATH), plain)
    assert count.frame_count == 1


def test_bf16_reads_the_shadows():
    block = Block(32, 2, 4.0)
    layers = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        torch.nn.init.normal_(layer.bias)
        layer.shadow, layer.bias_shadow = layer.weight.detach().bfloat16(), layer.bias.detach().bfloat16()
    x, path = torch.randn(2, 5, 32), torch.ones(2, 2)
    ops.set_backend("reference")
    outs = []
    for run in (block.forward, block._fused):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(run(x, path))
    assert (outs[0] - outs[1]).norm() < 0.01 * outs[0].norm()
    grads = torch.autograd.grad(outs[1].sum(), list(block.parameters()))
    assert all(g.dtype == torch.float32 and g.any() for g in grads)
    # the shadows are what is read
    layers[-1].shadow.zero_()
    layers[0].shadow.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(block._fused(x, path), outs[1])


def changed(block, how):
    if how == "hook":
        block.mlp.register_forward_hook(lambda module, args, out: out * 0)
    elif how == "no norm":
        block.norm2 = torch.nn.Identity()
    elif how == "norm without parameters":
        block.norm1 = torch.nn.LayerNorm(32, elementwise_affine=False)
    elif how == "another layer":
        block.mlp.fc1 = torch.nn.Sequential(block.mlp.fc1)
    elif how == "no bias":
        block.attn.qkv.bias = None
    elif how == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(block.attn.proj)
    return block


@pytest.mark.parametrize(
    "how", ["hook", "no norm", "norm without parameters", "another layer", "no bias", "parametrised"]
)
def test_a_changed_block_runs_as_it_is(how, monkeypatch):
    encoder = make(1)
    changed(encoder.blocks[0], how).double()
    monkeypatch.setattr(trunk, "residual_norm", None)
    assert_same(results(encoder, "triton"), results(encoder, "reference"))
