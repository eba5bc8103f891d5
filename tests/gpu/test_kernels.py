"""What only a GPU shows of the kernels: `make test-gpu`.

Covers, for every op and case: bf16, fp16 and fp32 against the definition in fp64; bitwise repeatability; capture
in a CUDA graph, replayed on new values, the optimizer's included; QuACK's matmuls; kernels that compiled code launches
itself, at sizes that vary; tensors of more than 2^31 elements.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import AdamWEma, sample_views, short_attention, token_gather, tune
from extrema_fast.kernels._spec import OPS, spec
from extrema_fast.kernels.mlp import quack

pytestmark = pytest.mark.gpu
# the plain form of crop_resize reads the sizes of its regions
CASES = [
    pytest.param(op, case.label, marks=pytest.mark.values if op == "crop_resize" else ())
    for op in OPS
    for case in spec(op).cases(False)
]


def find(op: str, label: str):
    return next(c for c in spec(op).cases(False) if c.label == label)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("op", "label"), CASES)
def test_accuracy_and_repeatability(op, label, dtype):
    if dtype not in spec(op).dtypes:
        pytest.skip("one dtype only")
    case = find(op, label)
    torch.backends.cuda.matmul.allow_tf32 = False
    args = case.make("cuda", dtype, torch.Generator("cuda").manual_seed(0))
    correct, worst = tune.is_correct(case, args, dtype)
    assert correct, f"{worst:.1f} times the limit"
    if op == "adamw_ema":
        # a second step continues from the first
        return
    one, two = (tune.run_case(case, args, "ours") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("op", [op for op in OPS if op != "adamw_ema"])
def test_capture(op):
    case = spec(op).cases(True)[0]
    dtype = spec(op).dtypes[0]
    args = case.make("cuda", dtype, torch.Generator("cuda").manual_seed(0))
    graph, captured = tune.capture(lambda: tune.run_case(case, args, "ours"))
    with torch.no_grad():
        for a in args:
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                a.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    expected = tune.run_case(case, args, "ours")
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("label", [case.label for case in spec("mlp").cases(False)])
def test_quack(label):
    if reason := quack.missing(torch.device("cuda:0")):
        pytest.skip(reason)
    case = find("mlp", label)

    def make() -> tuple:
        return case.make("cuda", torch.bfloat16, torch.Generator("cuda").manual_seed(0))

    assert tune.fault(case, make, torch.bfloat16, "quack") == ""


def test_kernels_that_compiled_code_launches_itself():
    qkv = torch.randn(8, 39, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(3 * 4 * 64, device="cuda", requires_grad=True)

    def run(attention) -> list[torch.Tensor]:
        out = attention(qkv, bias)
        return [out.detach(), *torch.autograd.grad(out, (qkv, bias), torch.ones_like(out))]

    plain = run(short_attention)
    compiled = run(torch.compile(short_attention, fullgraph=True, dynamic=False))
    for a, b in zip(plain[:2], compiled[:2], strict=True):
        assert torch.equal(a, b)
    # the order of the sum is the compiler's
    torch.testing.assert_close(plain[2], compiled[2], rtol=1e-4, atol=1e-3)


def test_compiled_code_takes_sizes_that_vary():
    compiled = torch.compile(short_attention, fullgraph=True, dynamic=True)
    for rows, n, heads in ((4, 39, 3), (6, 20, 2)):
        qkv = torch.randn(rows, n, 3, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.testing.assert_close(compiled(qkv), short_attention(qkv))
        (gradient,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
        assert gradient.shape == qkv.shape


def test_capture_of_the_optimizer():
    """Two recorded steps equal two that ran as they are, with gradients in new storage at the recording."""
    results = []
    for recorded in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)
        params = [torch.randn(n, device="cuda", generator=generator).requires_grad_() for n in (5000, 7)]
        teacher = [p.detach().clone() for p in params]
        lr, weight = (torch.tensor(x, device="cuda", dtype=torch.float64) for x in (1e-2, 0.1))
        optimizer = AdamWEma(params, lr=lr, teacher=zip(params, teacher, strict=True))
        inputs = [torch.randn(p.shape, device="cuda", generator=generator) for p in params]

        def step(params=params, inputs=inputs, optimizer=optimizer, weight=weight):
            optimizer.zero_grad(set_to_none=True)
            sum((p * x).square().sum() for p, x in zip(params, inputs, strict=True)).backward()
            optimizer.step(momentum_weight=weight)

        if recorded:
            run = tune.capture(step, warmup=1)[0].replay
        else:
            step()
            run = step
        for rate in (1e-2, 5e-3):
            lr.fill_(rate)
            run()
        torch.cuda.synchronize()
        results.append([*(p.detach().clone() for p in params), *teacher])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_at_the_end_of_tensors_of_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    n, heads, d, width, views = 39, 12, 64, 768, 5
    rows = 2**31 // (n * 3 * heads * d) + 8
    qkv = torch.empty(rows, n, 3, heads, d, device="cuda", dtype=torch.float16).normal_()
    assert torch.equal(short_attention(qkv)[-3:], short_attention(qkv[-3:].clone()))
    del qkv
    batch = 2**31 // (views * n * width) + 8
    tokens = torch.empty(batch, 196, width, device="cuda", dtype=torch.float16).normal_()
    keep = sample_views(torch.arange(batch, device="cuda"), 196, n, views)
    out = token_gather(tokens, keep, disjoint=True)
    assert torch.equal(out[-1], tokens[-1, keep[-1, -1].long()])
