"""Self-attention backends, the rule of `auto`, and the setting.

Covers: every backend of a CPU against float64, odd lengths and strides; which torch kernel each name forces, in which
order; what xformers is given; rows in chunks beyond launch limits; the rule on a CPU and on a GPU; precedence of
environment, encoder and configuration; errors; one graph for all blocks and no recompilation; state dicts.
"""

from __future__ import annotations

import logging
import sys
import types
from importlib.machinery import ModuleSpec
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels import _launch
from extrema_fast.kernels.short_attention import short_attention_reference

from extrema_fast import config
from extrema_fast.config import ModelConfig, from_dict, smoke
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.ops import attention
from extrema_fast.ops import dispatch as ops
from extrema_fast.training import run as run_module
from tests.kernels._compare import assert_one_graph, compare, normal, with_gradients

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32


# ---- backends -------------------------------------------------------------------------------------


def test_the_names_are_the_configurations():
    names = set(get_args(config.Attention))
    assert names == {"auto", *attention.BACKENDS}
    assert set(ops.IMPLEMENTATIONS["attention"]) == names | {"triton"}


@pytest.mark.parametrize(("rows", "n", "heads", "d"), [(3, 39, 2, 64), (1, 1, 1, 16), (1, 197, 2, 80)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", [*attention.ANYWHERE, "short", "auto", "triton"])
def test_against_float64(name, dtype, rows, n, heads, d):
    if name == "short" and n > 64:
        pytest.skip("64 tokens at most")
    if name in ("short", "triton") and dtype == BF16:
        # Triton's interpreter has no bf16
        dtype = torch.float16
    qkv = normal(rows, n, 3, heads, d, dtype=dtype)
    compare(lambda x: ops.attention(x, name), attention.BACKENDS["reference"], [qkv], n, ["dqkv"])


def test_matmul_attention_takes_any_strides_and_is_one_graph():
    run = attention.matmul_attention
    qkv = torch.randn(3, 2, 7, 2, 16, dtype=torch.float64).permute(1, 2, 0, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(run, (qkv,)) and run(qkv).is_contiguous()
    compare(run, attention.BACKENDS["reference"], [qkv], 7, ["dqkv"])
    assert_one_graph(lambda x: run(x).square().sum(), [qkv])


KERNELS = {
    "sdpa": ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"],
    "flash": ["FLASH_ATTENTION"],
    "efficient": ["EFFICIENT_ATTENTION"],
    "cudnn": ["CUDNN_ATTENTION"],
    "math": ["MATH"],
}


@pytest.mark.parametrize("name", KERNELS)
def test_torch_may_use_the_kernels_of_that_name_in_order(name, monkeypatch):
    allowed = torch.nn.attention._cur_sdpa_kernel_backends
    before, seen = allowed(with_priority=True), []
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append([b.name for b in allowed(with_priority=True)]) or v,
    )
    # no values needed, and no CPU, which has no order
    attention.BACKENDS[name](torch.randn(2, 5, 3, 2, 8, device="meta"))
    assert seen == [KERNELS[name]]
    assert allowed(with_priority=True) == before


@pytest.mark.parametrize("name", KERNELS)
def test_the_order_of_kernels_is_part_of_a_compiled_graph(name):
    """As on a GPU, where attention is compiled with the rest of its block: set, used, set back."""
    from torch._dynamo.backends.debugging import aot_eager

    orders, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        for node in graph.graph.nodes:
            if node.target is torch.nn.attention._sdpa_kernel:
                orders.append([backend.args[0] for backend in node.args[0]])
            elif node.target is F.scaled_dot_product_attention:
                orders.append("attention")
        return aot_eager(graph, inputs)

    usual = [b.name for b in torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)]
    # a CPU has no order; on `meta` the same lines run as on a GPU
    qkv = torch.empty(2, 5, 3, 2, 8, device="meta", requires_grad=True)
    try:
        out = torch.compile(attention.BACKENDS[name], backend=backend, fullgraph=True, dynamic=False)(qkv)
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    finally:
        torch.compiler.reset()
    assert len(graphs) == 1 and orders == [KERNELS[name], "attention", usual]
    assert out.shape == (2, 5, 2, 8) and gradient.shape == qkv.shape


@pytest.fixture
def xformers(monkeypatch):
    """A module of that name which computes attention, and the calls it got."""
    calls = []

    def memory_efficient_attention(query, key, value):
        calls.append((query, key, value))
        return attention.BACKENDS["reference"](torch.stack([query, key, value], 2))

    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)
    module.memory_efficient_attention = memory_efficient_attention
    lib = types.ModuleType("xformers._cpp_lib")
    lib._cpp_library_load_exception = None
    for found in (package, module, lib):
        monkeypatch.setitem(sys.modules, found.__name__, found)
    attention._xformers_missing.cache_clear()
    return calls


def test_xformers_is_given_views(xformers):
    qkv = normal(3, 19, 3, 2, 16, dtype=FP32)
    compare(attention.BACKENDS["xformers"], attention.BACKENDS["reference"], [qkv], 19, ["dqkv"])
    for i, x in enumerate(xformers[0]):
        # rows, tokens, heads, head_dim, nothing copied, the last axis dense
        assert x.shape == (3, 19, 2, 16) and x.data_ptr() == qkv[:, :, i].data_ptr() and x.stride(-1) == 1


def test_what_the_real_xformers_says():
    fmha = pytest.importorskip("xformers.ops.fmha")
    qkv = torch.randn(3, 19, 3, 2, 16)
    fmha.Inputs(*qkv.unbind(2)).validate_inputs()
    with pytest.raises(NotImplementedError, match="No operator found"):
        attention.BACKENDS["xformers"](qkv)


# ---- launch limits --------------------------------------------------------------------------------


def test_the_limits_figures():
    """Rows per call at head_dim 64."""
    for heads, short, long in ((6, 43_690, 21_845), (12, 21_845, 10_922), (16, 16_384, 8_192)):
        for n in (1, 39, 128):
            assert attention.rows_per_call("flash", n, heads, 64, True) == short
        assert attention.rows_per_call("sdpa", 196, heads, 64, True) == long
        assert attention.rows_per_call("flash", 196, heads, 64, False) == 65_535
        # other backward passes know the first limit only
        assert attention.rows_per_call("efficient", 196, heads, 64, True) == 65_535
        assert attention.rows_per_call("short", 39, heads, 64, True) > 2**40
    # a padded head_dim counts
    assert attention.rows_per_call("xformers", 39, 12, 80, True) == 2**31 // (12 * 128 * 96)


@pytest.mark.parametrize("train", [True, False])
def test_chunks_give_the_same(train, monkeypatch):
    qkv = normal(13, 19, 3, 2, 8, dtype=FP32)
    whole = with_gradients(lambda x: ops.attention(x, "sdpa"), [qkv])
    sizes, real = [], attention.BACKENDS["sdpa"]
    monkeypatch.setitem(ops.IMPLEMENTATIONS["attention"], "sdpa", lambda x: sizes.append(len(x)) or real(x))
    monkeypatch.setattr(attention, *(("MAX_PADDED", 5 * 2 * 128 * 32) if train else ("MAX_SEQUENCES", 6)))
    chunked = with_gradients(lambda x: ops.attention(x, "sdpa"), [qkv])
    assert all(torch.equal(a, b) for a, b in zip(chunked, whole, strict=True))
    assert sizes == [5, 5, 3], "as few chunks as the limit allows, of like size"
    sizes.clear()
    ops.attention(qkv[:5], "sdpa")
    assert sizes == [5], "the limit itself is allowed"


# ---- the rule -------------------------------------------------------------------------------------


def test_the_rule_on_a_cpu():
    """Its bits are those of training on a CPU: a view of `photos` has 8 tokens, its teacher 64."""
    for dtype, train, wanted in (
        (FP32, True, {4: "sdpa", 8: "reference", 39: "sdpa", 64: "sdpa", 196: "matmul", 400: "sdpa"}),
        (FP32, False, {16: "sdpa", 39: "reference", 49: "sdpa", 64: "reference", 196: "sdpa"}),
        (BF16, True, {1: "matmul", 19: "reference", 39: "matmul", 64: "reference", 196: "matmul"}),
        (BF16, False, {1: "matmul", 19: "reference", 112: "reference", 196: "matmul"}),
    ):
        plan, _ = attention.auto_plan(CPU, dtype, 64, train)
        assert {n: attention.at(plan, n) for n in wanted} == wanted
    # other sizes of head and other types
    for dtype, name in ((FP32, "sdpa"), (BF16, "matmul"), (torch.float64, "sdpa")):
        assert attention.auto_plan(CPU, dtype, 32, True)[0] == ((attention.ANY, name),)


@pytest.mark.parametrize(
    ("dtype", "lacking", "words"),
    [
        (BF16, [], "short to 64 tokens, then xformers"),
        (BF16, ["xformers"], "short to 64 tokens, then sdpa"),
        (BF16, ["short", "xformers"], "efficient to 64 tokens, then sdpa"),
        (FP32, [], "short to 32 tokens, then efficient to 64 tokens, then xformers"),
        (torch.float64, ["efficient", "xformers"], "sdpa"),
    ],
)
def test_the_rule_on_a_gpu(dtype, lacking, words, monkeypatch):
    monkeypatch.setattr(attention, "unsupported", lambda name, *_: "it is missing" if name in lacking else "")
    plan, why = attention.auto_plan(GPU, dtype, 64, True)
    assert attention.in_words(plan) == words
    assert all(f"{name}: it is missing" in why for name in lacking)


def test_a_plan_is_logged_once_with_its_reason(caplog):
    caplog.set_level(logging.DEBUG, "extrema_fast.ops.dispatch")
    for n in (39, 39, 200):
        ops.attention(torch.zeros(1, n, 3, 1, 64, dtype=BF16))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        "op attention: matmul to 9 tokens, then reference to 112 tokens, then matmul "
        "(cpu, bfloat16, head_dim 64, inference: the fastest measured on a CPU)"
    )
    assert ops.choices()["attention"]["decided"] == [line.removeprefix("op attention: ")]


# ---- the setting ----------------------------------------------------------------------------------


def test_auto_is_never_an_error(monkeypatch):
    monkeypatch.setattr(attention, "unsupported", lambda *_: "it is broken")
    assert chosen() == "sdpa"
    with pytest.raises(UsageError, match="asks for reference, but it is broken"):
        chosen("reference")


def chosen(backend="auto", n=19, d=16) -> str:
    ops._chosen.clear()
    return ops.check_attention(backend, CPU, FP32, n, d, True)


def test_precedence(monkeypatch):
    assert chosen() == "sdpa"
    ops.set_backend("reference")
    assert chosen() == "reference"
    assert chosen("sdpa") == "sdpa", "the encoder's setting before the list for all ops"
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", "attention=reference")
    assert chosen("sdpa") == "reference"
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", "attention=auto")
    assert chosen("reference") == "sdpa"
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", "attention_pool=reference")
    assert chosen("reference") == "reference", "it does not name attention"
    assert chosen() == "sdpa", "but it replaces the list for all ops"


def test_triton_is_short_where_it_fits(monkeypatch):
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", "triton")
    assert chosen(n=64) == "short" and chosen(n=65) == "sdpa"
    assert chosen(d=24) == "sdpa", "no such head_dim"
    monkeypatch.setattr(_launch, "INTERPRET", False)
    with pytest.raises(UsageError, match="EXTREMA_FAST_BACKEND asks for attention=triton, but no Triton"):
        chosen()


@pytest.mark.parametrize(
    ("way", "name"),
    [("call", "xformers"), ("configuration", "flash"), ("environment", "short")],
)
def test_a_backend_that_cannot_run_is_an_error(way, name, monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    why = "no Triton kernels on cpu" if name == "short" else "it needs a CUDA device, got cpu"
    who = "EXTREMA_FAST_BACKEND" if way == "environment" else "the configuration"
    if way == "configuration":
        ops.set_backend(f"attention={name}")
    if way == "environment":
        monkeypatch.setenv("EXTREMA_FAST_BACKEND", f"attention={name}")
    with pytest.raises(UsageError) as error:
        ops.attention(torch.zeros(1, 4, 3, 1, 16), name if way == "call" else "auto")
    text = str(error.value)
    assert f"attention: {who} asks for {name}, but {why}" in text
    assert "available here (cpu, float32, head_dim 16" in text
    assert text.endswith("auto, sdpa, math, matmul, reference")


def test_what_short_does_not_take():
    ops.attention(torch.zeros(1, 64, 3, 1, 16), "short")
    with pytest.raises(UsageError, match=r"at most 64 tokens of float32, got 65 .*system\.attention_teacher"):
        ops.attention(torch.zeros(1, 65, 3, 1, 16), "short")
    with pytest.raises(UsageError, match="it takes head_dim 16, 32, 64, 80, got 24"):
        ops.attention(torch.zeros(1, 5, 3, 1, 24), "short")
    # on a GPU, in fp32 as many as registers hold, nothing in fp64
    longest = [attention.longest("short", GPU, dtype, 64) for dtype in (BF16, FP32, torch.float64)]
    assert longest == [64, 32, 0]


def test_what_is_missing_on_a_gpu(xformers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def missing(name, dtype):
        return attention.missing(name, torch.device("cuda"), dtype, 39, 64)

    assert missing("flash", FP32) == "it takes bfloat16, float16, got float32"
    assert missing("efficient", torch.float64) == "it takes bfloat16, float16, float32, got float64"
    assert missing("xformers", BF16) == ""
    monkeypatch.setitem(sys.modules, "xformers", None)
    attention._xformers_missing.cache_clear()
    assert "not installed (pip install 'xformers>=" in missing("xformers", BF16)
    attention._xformers_missing.cache_clear()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_xformers_whose_library_does_not_load(flag, early, xformers, monkeypatch, caplog):
    """Built for CUDA 12, beside a PyTorch for CUDA 13: it refuses all operators, torch's own among them."""
    caplog.set_level(logging.INFO, "extrema_fast.ops.attention")
    lib = sys.modules["xformers._cpp_lib"]
    lib._cpp_library_load_exception = OSError("libcudart.so.12: cannot open\nmore")
    common = types.ModuleType("xformers.ops.fmha.common")
    if flag:
        lib._built_with_cuda = False
    if early:
        # somebody has imported it before
        common._built_with_cuda = False
        monkeypatch.setitem(sys.modules, common.__name__, common)
    lines = [attention._xformers_missing() for _ in range(2)]
    attention._xformers_missing.cache_clear()
    cause = "its C++ library does not load with this PyTorch (libcudart.so.12: cannot open)"
    if flag:
        assert lines == ["", ""] and lib._built_with_cuda and (common._built_with_cuda if early else True)
        assert [cause in r.getMessage() for r in caplog.records] == [True]
    else:
        assert lines == [f"xformers refuses every operator: {cause}"] * 2 and not caplog.records


def test_torchs_order_is_set_before_ours(monkeypatch):
    """torch sets its own at its first choice; inside our context it would replace the one asked for."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *qkv: chosen.append(qkv))
    monkeypatch.setattr(attention, "auto_plan", lambda *_: (((attention.ANY, "sdpa"),), "a rule"))
    monkeypatch.setattr(attention, "describe", lambda *_: "a GPU")
    monkeypatch.setattr(ops, "MEASURED_ON", ())
    attention.settle_sdpa_order.cache_clear()
    for _ in range(2):
        ops.check_attention("auto", GPU, BF16, 39, 64, True)
    attention.settle_sdpa_order.cache_clear()
    assert len(chosen) == 1


def test_unknown_names():
    for call in (make().set_attention, lambda name: ops.attention(torch.zeros(1, 1, 3, 1, 8), name)):
        with pytest.raises(UsageError, match="unknown backend 'flsh'; did you mean 'flash'"):
            call("flsh")


def test_evaluation_may_fall_back(caplog):
    caplog.set_level(logging.DEBUG, "extrema_fast.ops.dispatch")

    @ops.allow_fallback()
    def evaluate(name, n):
        return ops.attention(torch.zeros(1, n, 3, 1, 16), name)

    assert evaluate("flash", 4).shape == (1, 4, 1, 16) and evaluate("short", 196).shape == (1, 196, 1, 16)
    lines = " ".join(r.getMessage() for r in caplog.records)
    assert "asks for flash, but it needs a CUDA device" in lines and "short to 64 tokens, then sdpa" in lines
    with pytest.raises(UsageError):
        ops.attention(torch.zeros(1, 4, 3, 1, 16), "flash")


# ---- in the encoder -------------------------------------------------------------------------------


def make(depth=3) -> Encoder:
    return Encoder(ModelConfig(img_size=(8, 8), patch_size=4, width=32, heads=2, depth=depth, drop_path=0.0))


def test_an_encoders_setting_reaches_its_blocks(monkeypatch):
    encoder, other = make(), make()
    keys = list(encoder.state_dict())
    encoder.set_attention("reference")
    used = []
    for name in ("sdpa", "reference"):
        real = attention.BACKENDS[name]
        monkeypatch.setitem(
            ops.IMPLEMENTATIONS["attention"],
            name,
            lambda x, name=name, real=real: used.append(name) or real(x),
        )
    x = torch.randn(2, 3, 8, 8)
    encoder(x)
    assert used == ["reference"] * 3
    other(x)
    assert used[3:] == ["sdpa"] * 3, "another encoder is left alone"
    assert list(encoder.state_dict()) == keys
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(x), encoder(x))
    with pytest.raises(UsageError):
        encoder.set_attention("flsh")
    assert {b.attn.backend for b in encoder.blocks} == {"reference"}, "an error changes nothing"


def built(**system) -> run_module.Run:
    small = {"model": {"size": "tiny", "width": 32, "heads": 2, "depth": 2}, "system": system}
    return run_module.build(from_dict(small, smoke()), World(CPU), range(100))


def test_a_runs_settings_reach_student_and_teacher(monkeypatch):
    for system, student, teacher in (
        ({}, "auto", "auto"),
        ({"attention": "reference"}, "reference", "reference"),
        ({"attention": "short", "attention_teacher": "sdpa"}, "short", "sdpa"),
    ):
        method = built(**system).method
        assert {b.attn.backend for b in method.student.blocks} == {student}
        assert {b.attn.backend for b in method.teacher.blocks} == {teacher}
    # and are checked when it is built
    for setting in ("attention", "attention_teacher"):
        with pytest.raises(UsageError, match="asks for flash, but it needs a CUDA device"):
            built(**{setting: "flash"})
    # the teacher's whole images
    monkeypatch.setattr(attention, "MAX_TOKENS", 10)
    attention.unsupported.cache_clear()
    with pytest.raises(UsageError, match=r"at most 10 tokens of float32, got 16"):
        built(attention="short", attention_teacher="same")


def test_one_graph_for_all_blocks_and_no_recompilation():
    encoder = make()
    graphs = []

    def count(graph, inputs):
        graphs.append([n.target.__name__ for n in graph.graph.nodes if callable(n.target)])
        return graph

    x = torch.randn(2, 4, 32, requires_grad=True)
    try:
        for block in encoder.blocks:
            block.compile(backend=count, fullgraph=True, dynamic=False)
        ops._chosen.clear()
        encoder.trunk(x).sum().backward()
        assert len(graphs) == 1 and "scaled_dot_product_attention" in graphs[0]
        # plans made for other shapes and dtypes do not concern it
        ops.attention(torch.zeros(1, 3, 3, 1, 8, dtype=BF16))
        encoder.trunk(x)
        assert len(graphs) == 1
        encoder.set_attention("reference")
        encoder.trunk(x)
        assert len(graphs) == 2 and "scaled_dot_product_attention" not in graphs[1]
        # back again: both are kept
        encoder.set_attention("auto")
        encoder.trunk(x)
        assert len(graphs) == 2
        ops.set_backend("attention=reference")
        encoder.trunk(x)
        assert len(graphs) == 3 and "scaled_dot_product_attention" not in graphs[2]
    finally:
        torch.compiler.reset()


def test_a_dynamic_length_stays_dynamic():
    graphs = []
    run = torch.compile(
        ops.attention, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True
    )
    try:
        for n in (19, 39, 49):
            run(torch.randn(2, n, 3, 2, 64, requires_grad=True))
    finally:
        torch.compiler.reset()
    assert len(graphs) == 1


class _Broken(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx, qkv):
        return short_attention_reference(qkv)

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(2, 9, 3, 2, 64)


def _raises(qkv):
    raise RuntimeError("no kernel\nmore")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (attention.BACKENDS["sdpa"], ""),
        (attention.BACKENDS["matmul"], ""),
        (lambda qkv: short_attention_reference(qkv) * 1.1, "times the allowed"),
        (lambda qkv: short_attention_reference(qkv) * float("nan"), "NaN"),
        (_Broken.apply, "wrong gradient"),
        (_raises, "RuntimeError: no kernel"),
    ],
)
def test_a_backend_is_tried_against_the_plain_formula(backend, words):
    qkv = torch.randn(2, 9, 3, 2, 64)
    reason = attention.trial(backend, qkv, train=True)
    assert words in reason and bool(reason) == bool(words) and "\n" not in reason
