"""Self-attention backends, the plan of `auto`, and the setting.

Covers: every backend of a CPU against float64, forward and gradients; which torch kernel each name forces and in
which order; what xformers is given, dense and packed; FlashAttention-3 active for one call, forward and backward;
sequences of different lengths against a block-diagonal mask; rows in parts beyond launch limits; the limits' figures;
the shipped table against its records; nearest tokens, gaps, unavailable winners; precedence of environment, encoder
and configuration; errors; one graph for all blocks, none anew; state dicts.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import types
from typing import ClassVar, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention as bench
from extrema_fast import config
from extrema_fast.config import ModelConfig, from_dict, smoke
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import Encoder
from extrema_fast.ops import attention
from extrema_fast.ops import dispatch as ops
from extrema_fast.training import state

CPU = torch.device("cpu")
SIZES = [1, 19, 39, 49, 64, 196]
GPU_ONLY = ["xformers", "flash", "efficient", "cudnn", "fa3"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(ops, "_setting", "auto")
    monkeypatch.delenv("EXTREMA_FAST_BACKEND", raising=False)
    attention.why_not.cache_clear()
    attention.device_name.cache_clear()
    yield
    attention.why_not.cache_clear()


def definition(qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64, one head and row at a time."""
    out = torch.empty(qkv.shape[0], qkv.shape[1], qkv.shape[3], qkv.shape[4], dtype=torch.float64)
    for r in range(qkv.shape[0]):
        for h in range(qkv.shape[3]):
            q, k, v = (qkv[r, :, i, h].double() for i in range(3))
            scores = q @ k.T / qkv.shape[-1] ** 0.5
            out[r, :, h] = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    return out


def with_gradient(function, qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]


def assert_as_good(function, qkv: Tensor) -> None:
    """At most twice the plain formula's own error in this dtype, and a floor (kernels.md section 8)."""
    upstream = torch.randn(qkv.shape[:2] + qkv.shape[3:])
    wanted = with_gradient(definition, qkv.double(), upstream)
    plain = with_gradient(attention.BACKENDS["reference"], qkv, upstream)
    for got, same, exact in zip(with_gradient(function, qkv, upstream), plain, wanted, strict=True):
        assert got.shape == exact.shape and got.dtype == qkv.dtype
        ours, theirs = ((x.double() - exact).abs().max() / exact.abs().max() for x in (got, same))
        limit = 2 * theirs + torch.finfo(qkv.dtype).eps + 6e-8 * qkv.shape[1] ** 0.5
        assert ours <= limit, f"{ours:.1e}, limit {limit:.1e}"


# ---- sequences of one length ----------------------------------------------------------------------


def test_the_names_are_the_configurations():
    names = set(get_args(config.Attention))
    assert names == {"auto", *attention.BACKENDS}
    assert set(ops.IMPLEMENTATIONS["attention"]) == names | {"triton"}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["sdpa", "products", "reference", "short", "auto", "triton"])
def test_against_float64(name, n):
    if name == "short" and n > 64:
        pytest.skip("64 tokens at most")
    assert_as_good(lambda x: ops.attention(x, name), torch.randn(2, n, 3, 2, 16))


@pytest.mark.parametrize("name", ["sdpa", "products", "auto"])
def test_bf16_against_float64(name):
    assert_as_good(lambda x: ops.attention(x, name), torch.randn(3, 39, 3, 2, 64).bfloat16())


KERNELS = {"flash": ["FLASH_ATTENTION"], "efficient": ["EFFICIENT_ATTENTION"], "cudnn": ["CUDNN_ATTENTION"]}


@pytest.mark.parametrize("name", ["sdpa", *KERNELS])
def test_torch_is_left_the_kernels_of_that_name_in_order(name, monkeypatch):
    backends = torch.nn.attention._cur_sdpa_kernel_backends
    before, seen = backends(with_priority=True), []

    def record(q, k, v):
        seen.append([b.name for b in backends(with_priority=True)])
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    # no values needed, and no CPU, which has no order
    attention.BACKENDS[name](torch.randn(2, 5, 3, 2, 8, device="meta"))
    assert seen == [KERNELS.get(name, ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])]
    assert backends(with_priority=True) == before


def test_the_backward_pass_is_the_chosen_kernels_own():
    """Outside the block that chose it: no order is needed there."""
    for kernel, node in (("FLASH_ATTENTION", "FlashAttentionForCpu"), ("MATH", "Unsafe")):
        run = attention._sdpa([getattr(torch.nn.attention.SDPBackend, kernel)])
        out = run(torch.randn(2, 19, 3, 2, 8, requires_grad=True))
        names, todo = set(), [out.grad_fn]
        while todo:
            f = todo.pop()
            names.add(f.name())
            todo += [x for x, _ in f.next_functions if x is not None]
        assert any(node in name for name in names), names
        assert ("FlashAttentionForCpu" in str(names)) == (kernel == "FLASH_ATTENTION")


# ---- xformers -------------------------------------------------------------------------------------


class FakeMask:
    """What `BlockDiagonalMask.from_seqlens` is given."""

    made: ClassVar[list[FakeMask]] = []

    def __init__(self, lengths, device):
        self.lengths, self.device = lengths, device

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list) and kv_seqlen is None
        cls.made.append(cls(q_seqlen, device))
        return cls.made[-1]


@pytest.fixture
def xformers(monkeypatch):
    """A module of that name which computes what it is asked for, and the calls it got."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None):
        calls.append((query, key, value, attn_bias))
        x = torch.stack([query, key, value], 2)
        if attn_bias is None:
            return attention.BACKENDS["reference"](x)
        parts = x[0].split(attn_bias.lengths)
        return torch.cat([attention.BACKENDS["reference"](p[None]) for p in parts], 1)

    module, fmha = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha")
    module.memory_efficient_attention, fmha.BlockDiagonalMask = memory_efficient_attention, FakeMask
    for name, value in (("xformers", types.ModuleType("xformers")), ("xformers.ops", module)):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    # as if it had a kernel for the CPU
    missing = attention.missing
    monkeypatch.setattr(
        attention, "missing", lambda name, *a: "" if name == "xformers" else missing(name, *a)
    )
    monkeypatch.setattr(FakeMask, "made", [])
    return calls


def test_xformers_is_given_views(xformers):
    qkv = torch.randn(3, 19, 3, 2, 16)
    assert_as_good(lambda x: ops.attention(x, "xformers"), qkv)
    xformers.clear()
    ops.attention(qkv, "xformers")
    ((q, k, v, mask),) = xformers
    for i, x in enumerate((q, k, v)):
        # rows, tokens, heads, head_dim, nothing copied, the last axis dense
        assert x.shape == (3, 19, 2, 16) and torch.equal(x, qkv[:, :, i])
        assert x.data_ptr() == qkv[:, :, i].data_ptr() and x.stride(-1) == 1
    assert mask is None


LENGTHS = [5, 5, 5, 12, 12, 3]


def blocks(lengths: list[int]) -> Tensor:
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return which[:, None] == which


def test_xformers_packed_is_given_one_batch_and_a_mask(xformers):
    packing = ops.Packing(LENGTHS)
    qkv = torch.randn(42, 3, 2, 16)
    out = ops.attention_packed(qkv, packing, "xformers")
    ((q, _, v, mask),) = xformers
    assert q.shape == (1, 42, 2, 16) and q.data_ptr() == qkv.data_ptr() and torch.equal(v[0], qkv[:, 2])
    assert mask.lengths == LENGTHS and mask.device == CPU
    assert out.shape == (42, 2, 16)
    ops.attention_packed(qkv, packing, "xformers")
    assert len(FakeMask.made) == 1, "a packing keeps its mask"


def test_packed_parts_beyond_the_limit(xformers, monkeypatch):
    qkv = torch.randn(42, 3, 2, 16)
    whole = ops.attention_packed(qkv, LENGTHS, "xformers")
    monkeypatch.setattr(attention, "MAX_SEQUENCES", 4)
    FakeMask.made.clear()
    assert torch.equal(ops.attention_packed(qkv, ops.Packing(LENGTHS), "xformers"), whole)
    assert [m.lengths for m in FakeMask.made] == [[5, 5, 5, 12], [12, 3]]
    # the backward pass's limit: 300 padded tokens, a sequence counting 128 more than it has
    monkeypatch.setattr(attention, "MAX_PADDED", 300 * 2 * 32)
    FakeMask.made.clear()
    leaf = qkv.clone().requires_grad_()
    assert torch.equal(ops.attention_packed(leaf, ops.Packing(LENGTHS), "xformers"), whole)
    assert [m.lengths for m in FakeMask.made] == [[5, 5], [5, 12], [12, 3]]


def test_what_the_real_xformers_says():
    fmha = pytest.importorskip("xformers.ops.fmha")
    qkv = torch.randn(3, 19, 3, 2, 16)
    fmha.Inputs(*qkv.unbind(2)).validate_inputs()
    packing = ops.Packing(LENGTHS)
    packed = torch.randn(42, 3, 2, 16)
    fmha.Inputs(*packed[None].unbind(2), attn_bias=packing.mask).validate_inputs()
    assert packing.mask.q_seqinfo.seqstart_py == packing.offsets.tolist()
    for call in (
        lambda: attention.BACKENDS["xformers"](qkv),
        lambda: attention.PACKED["xformers"](packed, packing),
    ):
        with pytest.raises(NotImplementedError, match="No operator found"):
            call()


# ---- FlashAttention-3 -----------------------------------------------------------------------------


@pytest.fixture
def fa3(monkeypatch):
    """torch's registry with implementations that only note when they come and go; plain formulas as kernels."""
    from torch.nn import attention as torchs

    registry = pytest.importorskip("torch.nn.attention._registry")
    events = []

    class Handle:
        def remove(self):
            events.append(None)

    for name in ("FA3", "FA4"):
        monkeypatch.setitem(
            registry._FLASH_ATTENTION_IMPLS, name, lambda name=name: events.append(name) or Handle()
        )
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", None)
    active = torchs.current_flash_attention_impl

    def forward(qkv):
        assert active() == "FA3"
        return attention.BACKENDS["reference"](qkv).transpose(1, 2), qkv.new_zeros(
            qkv.shape[0], 2, qkv.shape[1]
        )

    def backward(grad, qkv, out, lse):
        assert active() == "FA3" and grad.shape == out.shape == (qkv.shape[0], 2, qkv.shape[1], 8)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        p = torch.softmax(q @ k.mT * 8**-0.5, -1)
        dp = grad @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * 8**-0.5
        return ds @ k, ds.mT @ q, p.mT @ grad

    monkeypatch.setattr(attention, "_flash_forward", forward)
    monkeypatch.setattr(attention, "_flash_backward", backward)
    return events


def test_fa3_is_active_for_its_own_calls_only(fa3):
    assert_as_good(attention.BACKENDS["fa3"], torch.randn(2, 19, 3, 2, 8))
    assert fa3 == ["FA3", None] * 2, "once forward, once backward"


def test_fa3_gives_back_what_was_active(fa3):
    from torch.nn import attention as torchs

    torchs.activate_flash_attention_impl("FA4")
    with pytest.raises(ZeroDivisionError), attention.fa3_active():
        1 / 0  # noqa: B018
    assert fa3 == ["FA4", None, "FA3", None, "FA4"]
    fa3.clear()
    with attention.fa3_active(), attention.fa3_active():
        pass
    assert fa3 == [None, "FA3", None, "FA4"], "not switched twice"


def test_fa3_is_an_opaque_op(fa3):
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    torch.library.opcheck(attention._fa3_op, (qkv,), test_utils=("test_schema", "test_faketensor"))
    run = torch.compile(attention.BACKENDS["fa3"], backend="aot_eager", fullgraph=True)
    try:
        wanted, got = (torch.autograd.grad(f(qkv).square().sum(), qkv)[0] for f in (attention._fa3, run))
    finally:
        torch.compiler.reset()
    assert torch.equal(got, wanted)


# ---- different lengths ----------------------------------------------------------------------------


def of_blocks(qkv: Tensor, lengths: list[int]) -> Tensor:
    return definition(qkv[None], blocks(lengths))[0]


@pytest.mark.parametrize("name", ["auto", "sdpa", "products", "reference", "short", "xformers", "triton"])
def test_packed_against_a_block_diagonal_mask(name, xformers):
    lengths = [19, 19, 39, 1, 64, 7, 7]
    qkv = torch.randn(sum(lengths), 3, 2, 16)
    upstream = torch.randn(sum(lengths), 2, 16)
    wanted = with_gradient(lambda x: of_blocks(x, lengths), qkv.double(), upstream)
    got = with_gradient(lambda x: ops.attention_packed(x, lengths, name), qkv, upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_views_and_teacher_rows_in_one_call():
    student, teacher = torch.randn(10, 9, 3, 2, 8), torch.randn(2, 49, 3, 2, 8)
    qkv = torch.cat([student.flatten(0, 1), teacher.flatten(0, 1)])
    out = ops.attention_packed(qkv, ops.Packing([9] * 10 + [49] * 2))
    assert torch.equal(out[:90].view(10, 9, 2, 8), ops.attention(student))
    assert torch.equal(out[90:].view(2, 49, 2, 8), ops.attention(teacher))


def test_what_varlen_attn_is_given(monkeypatch):
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def record(*args, **kwargs):
        a = signature.bind(*args, **kwargs).arguments
        assert a["cu_seq_q"] is a["cu_seq_k"] and a["max_q"] == a["max_k"] == 12
        assert a["cu_seq_q"].dtype == torch.int32 and a["cu_seq_q"].tolist() == [0, 5, 10, 15, 27, 39, 42]
        x = torch.stack([a["query"], a["key"], a["value"]], 1)
        assert x.shape == (42, 3, 2, 16)
        return of_blocks(x, LENGTHS).float()

    monkeypatch.setattr(varlen, "varlen_attn", record)
    qkv = torch.randn(42, 3, 2, 16)
    torch.testing.assert_close(
        attention.PACKED["flash"](qkv, ops.Packing(LENGTHS)), of_blocks(qkv, LENGTHS).float()
    )


def test_auto_packs_many_runs_where_something_can(xformers):
    lengths = [3, 4] * 6
    qkv = torch.randn(sum(lengths), 3, 2, 16)
    out = ops.attention_packed(qkv, lengths)
    assert [c[3].lengths for c in xformers] == [lengths]
    torch.testing.assert_close(out, of_blocks(qkv, lengths).float())
    ops.attention_packed(qkv[:7], lengths[:2])
    assert len(xformers) == 1, "few runs take one dense call each"


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_impossible_lengths(lengths):
    with pytest.raises(UsageError, match="lengths: expected one or more sequences of at least one token"):
        ops.Packing(lengths)
    with pytest.raises(UsageError, match="the lengths sum to 8, qkv has 7 tokens"):
        ops.attention_packed(torch.zeros(7, 3, 1, 8), [8])


def test_packed_compiles_into_one_graph():
    packing = ops.Packing([5, 5, 9])
    qkv = torch.randn(19, 3, 2, 8)
    run = torch.compile(ops.attention_packed, backend="eager", fullgraph=True)
    try:
        assert torch.equal(run(qkv, packing), ops.attention_packed(qkv, packing))
    finally:
        torch.compiler.reset()


# ---- launch limits --------------------------------------------------------------------------------


def test_the_limits_figures():
    """step.md section 2: rows per call at head_dim 64."""
    for heads, short, long in ((6, 43_690, 21_845), (12, 21_845, 10_922), (16, 16_384, 8_192)):
        for n in (1, 39, 128):
            assert attention.rows_per_call("flash", n, heads, 64, True) == short
        assert attention.rows_per_call("sdpa", 196, heads, 64, True) == long
        assert attention.rows_per_call("flash", 196, heads, 64, False) == 65_535
        # other backward passes know the first limit only
        assert attention.rows_per_call("efficient", 196, heads, 64, True) == 65_535
        assert attention.rows_per_call("short", 39, heads, 64, True) > 2**40
    # a padded head_dim counts
    assert attention.rows_per_call("fa3", 39, 12, 80, True) == 2**31 // (12 * 128 * 96)


@pytest.mark.parametrize("train", [True, False])
def test_parts_give_the_same(train, monkeypatch):
    qkv = torch.randn(13, 19, 3, 2, 8)
    upstream = torch.randn(13, 19, 2, 8)
    whole = with_gradient(lambda x: ops.attention(x, "sdpa"), qkv, upstream)
    sizes, real = [], attention.BACKENDS["sdpa"]

    def record(x):
        sizes.append(len(x))
        return real(x)

    monkeypatch.setitem(ops.IMPLEMENTATIONS["attention"], "sdpa", record)
    if train:
        monkeypatch.setattr(attention, "MAX_PADDED", 5 * 2 * 128 * 32)
    else:
        monkeypatch.setattr(attention, "MAX_SEQUENCES", 6)
    for got, wanted in zip(
        with_gradient(lambda x: ops.attention(x, "sdpa"), qkv, upstream), whole, strict=True
    ):
        assert torch.equal(got, wanted)
    assert sizes == [5, 5, 3], "as few parts as the limit allows, of like size"
    sizes.clear()
    ops.attention(qkv[:5], "sdpa")
    assert sizes == [5], "the limit itself is allowed"


@pytest.mark.parametrize("name", ["reference", "short"])
def test_without_limit_in_one_part(name, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SEQUENCES", 2)
    monkeypatch.setattr(attention, "MAX_PADDED", 1)
    rows = []
    monkeypatch.setitem(ops.IMPLEMENTATIONS["attention"], name, lambda x: rows.append(len(x)))
    ops.attention(torch.randn(7, 5, 3, 2, 16, requires_grad=True), name)
    assert rows == [7]


# ---- the table ------------------------------------------------------------------------------------


def row(n: int, *, device="cpu", dtype="float32", mode="train", **ms: float) -> dict:
    shape = {"rows": 1, "heads": 1, "ms": ms}
    return {
        "device": device,
        "dtype": dtype,
        "head_dim": 64,
        "mode": mode,
        "n": n,
        "record": "r",
        "shapes": [shape],
    }


@pytest.fixture
def rows(monkeypatch):
    found: list[dict] = []
    monkeypatch.setattr(attention, "table", lambda: found)
    return found


def steps(dtype=torch.float32, train=True) -> list[tuple[int, str]]:
    plan = attention.plan(CPU, dtype, 64, train)[0]
    return [(n if n < attention.ANY else 0, name) for n, name in plan]


def test_the_shipped_table_is_made_of_committed_records(repository):
    content = json.loads((repository / "extrema_fast/attention_table.json").read_text(encoding="utf-8"))
    assert content["rows"]
    for name in {r["record"] for r in content["rows"]}:
        file = repository / "benchmarks/records" / name / "record.json"
        made = bench.table_rows(json.loads(file.read_text(encoding="utf-8")), name)
        for r in (r for r in content["rows"] if r["record"] == name):
            assert r in made
    keys = [(r["device"], r["dtype"], r["head_dim"], r["mode"], r["n"]) for r in content["rows"]]
    assert len(set(keys)) == len(keys)


def test_cpu_rows_of_the_shipped_table():
    """fp32: torch's kernel at a view's lengths; bf16: never torch's kernel, which takes 2 to 8 times as long."""
    _, why = attention.plan(CPU, torch.float32, 64, True)
    assert "_cpu1_attention" in why
    for n in (39, 64):
        assert ops.check_attention("auto", CPU, torch.float32, n, 64, True) == "sdpa"
    for n in (1, 12, 39, 196, 400):
        assert ops.check_attention("auto", CPU, torch.bfloat16, n, 64, True) in ("products", "reference")


def test_a_row_counts_only_beside_what_runs_without_it(rows):
    rows.append(row(16, dtype="bfloat16", sdpa=2, reference=1))
    plan, why = attention.plan(CPU, torch.bfloat16, 64, True)
    assert plan == ((attention.ANY, "products"),) and "no timings of these beside it" in why
    rows.append(row(39, dtype="bfloat16", sdpa=3, products=2, reference=1))
    assert steps(torch.bfloat16) == [(19, "products"), (78, "reference"), (0, "products")]


def test_the_nearest_length_by_ratio_and_no_further_than_two(rows):
    rows += [row(16, sdpa=2, reference=1), row(36, sdpa=1, reference=2), row(400, sdpa=2, reference=1)]
    # sqrt(16 * 36) = 24; below 8, and from 73 to 199 and above 800 nothing was measured: sdpa
    assert steps() == [(7, "sdpa"), (24, "reference"), (199, "sdpa"), (800, "reference"), (0, "sdpa")]
    assert ops._at(attention.plan(CPU, torch.float32, 64, True)[0], 24) == "reference"
    assert ops._at(attention.plan(CPU, torch.float32, 64, True)[0], 25) == "sdpa"


def test_short_takes_what_its_tiles_hold_on_a_gpu():
    """In bf16 64 tokens; in fp32 as many as registers hold; nothing in fp64."""
    gpu = torch.device("cuda", 0)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    assert [attention.longest("short", gpu, dtype, 64) for dtype in dtypes] == [64, 32, 0]
    assert attention.longest("short", CPU, torch.float64, 64) == 64


@pytest.mark.parametrize("other", [{"device": "NVIDIA H200"}, {"dtype": "float16"}, {"mode": "inference"}])
def test_rows_of_something_else_do_not_count(rows, other):
    rows.append(row(16, sdpa=2, reference=1, **other))
    plan, why = attention.plan(CPU, torch.float32, 64, True)
    assert plan == ((attention.ANY, "sdpa"),)
    assert "no timings of these" in why and "`python -m benchmarks attention --write-table`" in why
    assert attention.plan(CPU, torch.bfloat16, 64, False)[0] == ((attention.ANY, "products"),)


def test_the_next_fastest_where_the_fastest_cannot_run(rows):
    rows.append(row(39, flash=1, reference=2, sdpa=3))
    plan, why = attention.plan(CPU, torch.float32, 64, True)
    assert ops._at(plan, 39) == "reference" and "flash: it needs a CUDA device" in why


def test_a_winner_counts_to_its_longest_sequence(rows):
    rows.append(row(49, short=1, reference=2, sdpa=3))
    assert steps() == [(24, "sdpa"), (64, "short"), (98, "reference"), (0, "sdpa")]


def test_noise_is_no_win(rows):
    shapes = [{"ms": {"sdpa": 1.0, "reference": 0.98}}, {"ms": {"sdpa": 1.0, "reference": 0.99}}]
    assert attention.ranking(shapes, "sdpa") == ["sdpa", "reference"]
    shapes[0]["ms"]["reference"] = 0.5
    assert attention.ranking(shapes, "sdpa") == ["reference", "sdpa"]
    # measured in one shape only: no candidate
    shapes[1]["ms"]["short"] = 0.1
    assert attention.ranking(shapes, "sdpa") == ["reference", "sdpa"]


def test_a_plan_is_logged_once_with_its_reason(rows, caplog):
    caplog.set_level(logging.INFO, "extrema_fast.ops.dispatch")
    rows.append(row(39, sdpa=2, reference=1))
    for n in (39, 39, 200):
        ops.attention(torch.zeros(1, n, 3, 1, 64, requires_grad=True))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        "op attention: sdpa to 19 tokens, then reference to 78 tokens, then sdpa "
        "(cpu, float32, head_dim 64, training: the fastest measured: r)"
    )
    assert ops.choices()["attention"]["decided"] == [line.removeprefix("op attention: ")]


# ---- the setting ----------------------------------------------------------------------------------


def chosen(backend="auto", n=19) -> str:
    ops._chosen.clear()
    return ops.check_attention(backend, CPU, torch.float32, n, 16, True)


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
    ops._chosen.clear()
    assert ops.check_attention("auto", CPU, torch.float32, 19, 24, True) == "sdpa", "no such head_dim"
    monkeypatch.setattr(ops.kernels._launch, "INTERPRET", False)
    with pytest.raises(
        UsageError, match="EXTREMA_FAST_BACKEND asks for attention=triton, but no Triton kernels"
    ):
        chosen()


@pytest.mark.parametrize("name", [*GPU_ONLY, "short"])
@pytest.mark.parametrize("way", ["call", "configuration", "environment", "encoder"])
def test_a_backend_that_cannot_run_is_an_error(name, way, monkeypatch):
    monkeypatch.setattr(ops.kernels._launch, "INTERPRET", False)
    why = "no Triton kernels on cpu" if name == "short" else "it needs a CUDA device, got cpu"
    who = "EXTREMA_FAST_BACKEND" if way == "environment" else "the configuration"
    if way == "configuration":
        ops.set_backend(f"attention={name}")
    if way == "environment":
        monkeypatch.setenv("EXTREMA_FAST_BACKEND", f"attention={name}")
    with pytest.raises(UsageError) as error:
        if way == "encoder":
            make().set_attention(name, tokens=4)
        else:
            ops.attention(torch.zeros(1, 4, 3, 1, 16), name if way == "call" else "auto")
    text = str(error.value)
    assert f"attention: {who} asks for {name}, but {why}" in text
    assert "available here (cpu, float32, head_dim 16" in text and text.endswith(
        "auto, sdpa, products, reference"
    )


def test_too_long_for_short():
    ops.attention(torch.zeros(1, 64, 3, 1, 16), "short")
    with pytest.raises(
        UsageError,
        match=r"takes at most 64 tokens of float32, got 65 .*65 tokens\): auto, sdpa, products, reference",
    ):
        ops.attention(torch.zeros(1, 65, 3, 1, 16), "short")
    with pytest.raises(UsageError, match="it takes head_dim 16, 32, 64, 80, got 24"):
        ops.attention(torch.zeros(1, 5, 3, 1, 24), "short")


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("flash", torch.float32, "it takes bfloat16, float16, got float32"),
        ("efficient", torch.float64, "it takes bfloat16, float16, float32, got float64"),
        ("xformers", torch.bfloat16, r"not installed (pip install 'extrema-fast[xformers]')"),
        ("fa3", torch.bfloat16, "module flash_attn_interface"),
    ],
)
def test_what_is_missing_on_a_gpu(name, dtype, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_installed", lambda module: False)
    assert words in attention.missing(name, torch.device("cuda"), dtype, 39, 64, True)
    monkeypatch.setattr(attention, "_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "capability 9.0, got 10.0" in attention.missing("fa3", torch.device("cuda"), dtype, 39, 64, True)


def test_unknown_names():
    for call in (make().set_attention, lambda name: ops.attention(torch.zeros(1, 1, 3, 1, 8), name)):
        with pytest.raises(UsageError, match="unknown backend 'flsh'; did you mean 'flash'"):
            call("flsh")


def test_evaluation_may_differ(caplog):
    caplog.set_level(logging.INFO, "extrema_fast.ops.dispatch")

    @ops.lenient_attention()
    def evaluate(name, n):
        return ops.attention(torch.zeros(1, n, 3, 1, 16), name)

    assert evaluate("flash", 4).shape == evaluate("short", 196).shape[:1] + (4, 1, 16)
    lines = " ".join(r.getMessage() for r in caplog.records)
    assert "asks for flash, but it needs a CUDA device" in lines and "short to 64 tokens, then sdpa" in lines
    with pytest.raises(UsageError):
        ops.attention(torch.zeros(1, 4, 3, 1, 16), "flash")


# ---- in the encoder -------------------------------------------------------------------------------


def make(depth=3) -> Encoder:
    config = ModelConfig(img_size=(8, 8), patch_size=4, width=32, heads=2, depth=depth, drop_path=0.0)
    return Encoder(config)


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


def test_a_refused_setting_changes_nothing():
    encoder = make()
    encoder.set_attention("reference")
    with pytest.raises(UsageError):
        encoder.set_attention("flash", tokens=4)
    assert {b.attn.backend for b in encoder.blocks} == {"reference"}


def built(**system) -> state.Run:
    small = {"model": {"size": "tiny", "width": 32, "heads": 2, "depth": 2}, "system": system}
    return state.build(from_dict(small, smoke()), World(CPU), range(100))


def test_a_runs_settings_reach_student_and_teacher():
    for system, student, teacher in (
        ({}, "auto", "auto"),
        ({"attention": "reference"}, "reference", "reference"),
        ({"attention": "short", "attention_teacher": "sdpa"}, "short", "sdpa"),
    ):
        method = built(**system).method
        assert {b.attn.backend for b in method.student.blocks} == {student}
        assert {b.attn.backend for b in method.teacher.blocks} == {teacher}


def test_a_runs_settings_are_checked_when_it_is_built(monkeypatch):
    with pytest.raises(UsageError, match="asks for flash, but it needs a CUDA device"):
        built(attention="flash")
    with pytest.raises(UsageError, match="asks for cudnn"):
        built(attention_teacher="cudnn")
    # the teacher's whole images
    monkeypatch.setattr(attention, "MAX_TOKENS", 10)
    attention.why_not.cache_clear()
    with pytest.raises(
        UsageError,
        match=r"takes at most 10 tokens of float32, got 16 \(a teacher's .* system\.attention_teacher",
    ):
        built(attention="short", attention_teacher="same")


def test_one_graph_for_all_blocks_and_none_anew(monkeypatch):
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
        ops.attention(torch.zeros(1, 3, 3, 1, 8, dtype=torch.bfloat16))
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


def test_a_dynamic_length_stays_dynamic(rows):
    rows += [row(n, sdpa=1, reference=1) for n in (16, 32, 64)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(ops.attention, backend=count, fullgraph=True, dynamic=True)
    try:
        for n in (19, 39, 49):
            run(torch.randn(2, n, 3, 2, 64, requires_grad=True))
    finally:
        torch.compiler.reset()
    assert len(graphs) == 1


# ---- the benchmark --------------------------------------------------------------------------------


def test_the_benchmark_measures_what_is_right_and_only_that(monkeypatch):
    shape = bench.Shape("S", 2, 19, 2)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", lambda x: attention.BACKENDS["reference"](x) * 1.001)
    for mode in ("train", "inference"):
        got = bench.measure(shape, torch.float32, mode, CPU, repeats=2)
        assert set(got["ms"]) == {"products", "reference", "short"} and got["wrong"] == ["sdpa"]
        assert all(len(v) == 2 and min(v) > 0 for v in got["samples_ms"].values())
        assert set(got["unavailable"]) == set(GPU_ONLY)


def test_the_benchmark_writes_rows_over_those_of_the_same_key(tmp_path):
    file = tmp_path / "table.json"
    record = {"machine": {"gpu": "NVIDIA H200"}}
    record["rows"] = [
        {"dtype": "bfloat16", "mode": "inference", "n": 196, "rows": r, "heads": h, "head_dim": 64, "ms": ms}
        for r, h, ms in [
            (8, 6, {"sdpa": 2.0, "cudnn": 1.0, "xformers packed": 0.5}),
            (8, 12, {"sdpa": 3, "cudnn": 2}),
        ]
    ]
    bench.write_table([*bench.table_rows(record, "old"), row(39, reference=1)], file)
    bench.write_table(bench.table_rows(record, "new"), file)
    written = json.loads(file.read_text(encoding="utf-8"))["rows"]
    (new,) = [r for r in written if r["device"] == "NVIDIA H200"]
    assert len(written) == 2 and new["record"] == "new" and new["backend"] == "cudnn"
    assert [s["ms"] for s in new["shapes"]] == [{"sdpa": 2.0, "cudnn": 1.0}, {"sdpa": 3, "cudnn": 2}]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--write-table", "--quick"], "takes no --quick measurements"),
        (["--record", "x"], "only with --write-table"),
        (["--write-table", "--out", "x"], "must be committed"),
        (["--repeats", "2"], "at least 5, got 2"),
        (["--write-table", "--record", "elsewhere"], "takes records of benchmarks/records only"),
    ],
)
def test_the_benchmark_refuses(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/record.json").write_text('{"what": "", "rows": []}')
    with pytest.raises(UsageError, match=words):
        bench.main(argv)


def test_every_shape_is_there():
    got = {(s.model, s.n): s.rows for s in bench.shapes(["S", "B", "L"], 256)}
    assert {n for _, n in got} == {19, 39, 49, 64, 196} and len(got) == 15
    assert got["B", 39] == 5 * 256 and got["L", 196] == 256
