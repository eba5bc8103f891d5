"""What only a GPU shows of the optimizers and of FP8: `make test-gpu`.

Covers: LAMB, LARS, torch's fused AdamW and the project's: no waiting for the device, a gated step,
a step in a CUDA graph replayed with other rates; the EMA update; apex's optimizers where apex is found; FP8 matmuls on
GPUs that have them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels.adamw_ema import AdamWEma

from extrema_fast.config import from_dict, smoke
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops.fp8 import CAPABILITY, apply_fp8
from extrema_fast.ops.optimizers import Lamb, Lars, apex_optimizer, ema_, find_apex

pytestmark = pytest.mark.gpu

SHAPES = [(49, 39), (1, 19), (7,), (768, 64), (1,)]
MAKE = {
    "lamb": lambda groups, lr: Lamb(groups, lr=lr, betas=(0.9, 0.95)),
    "lars": lambda groups, lr: Lars(groups, lr=lr),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True, capturable=True),
    "adamw_ema": lambda groups, lr: AdamWEma(groups, lr=lr),
}


def begin(name: str) -> tuple[list[torch.nn.Parameter], Any, torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s).cuda()) for s in SHAPES]
    lr = torch.tensor(0.01, device="cuda")
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}]
    optimizer = MAKE[name](groups, lr)
    optimizer.found_inf = torch.zeros((), device="cuda")
    for p in params:
        p.grad = torch.randn(p.shape).cuda()
    return params, optimizer, lr


def values(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [v for p in params for _, v in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in (*params, *state)]


@pytest.mark.parametrize("weight", [0.0, 0.004, 0.7])
def test_the_ema_update_is_that_of_lerp(weight):
    params, *_ = begin("adamw")
    student = [p.detach() for p in params]
    teacher = [torch.randn_like(p) for p in student]
    expected = [t.lerp(s, weight) for t, s in zip(teacher, student, strict=True)]
    ema_(teacher, student, torch.tensor(weight, dtype=torch.float64, device="cuda"))
    for t, e in zip(teacher, expected, strict=True):
        # two roundings of numbers up to 4
        torch.testing.assert_close(t, e, rtol=1e-6, atol=5e-7)
    # of a skipped step
    before = [t.clone() for t in teacher]
    ema_(
        teacher,
        [s * math.inf for s in student],
        torch.tensor(weight, device="cuda"),
        torch.ones((), device="cuda"),
    )
    assert all(map(torch.equal, teacher, before))


@pytest.mark.parametrize("name", MAKE)
def test_no_waiting_and_a_gated_step(name):
    params, optimizer, lr = begin(name)
    optimizer.step()
    bad, rate = torch.ones((), device="cuda"), torch.tensor(0.02, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            lr.copy_(rate)
            optimizer.step()
        before = values(params, optimizer)
        optimizer.found_inf.copy_(bad)
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], float("nan"))
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = values(params, optimizer)
    assert all(
        a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes() for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("name", MAKE)
def test_a_step_in_a_cuda_graph(name):
    results = []
    for captured in (False, True):
        params, optimizer, lr = begin(name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(3):
            lr.fill_(0.01 * (i + 1))
            # the second of them is gated
            optimizer.found_inf.fill_(float(i == 1))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        results.append(values(params, optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["FusedAdam", "FusedLAMB"])
def test_apex_where_it_is_found(name):
    found, why = find_apex(name, "cuda")
    if found is None:
        pytest.skip(why)
    p = torch.nn.Parameter(torch.ones(5, 3, device="cuda"))
    optimizer = apex_optimizer(
        name, [{"params": [p], "weight_decay": 0.1}], lr=0.1, betas=(0.9, 0.95), eps=1e-8
    )
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert p.isfinite().all() and float(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize("mode", ["teacher", "trunk"])
def test_fp8_matmuls(mode):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this GPU has no FP8 matmuls")
    cfg = from_dict({"model": {"drop_path": 0.0}}, smoke())
    images = torch.randn(5, 3, 32, 32, device="cuda")
    keep = torch.stack([torch.randperm(16)[:8].view(2, 4) for _ in range(5)], 1).cuda()
    outputs = []
    for wanted in ("off", mode):
        method = ExtreMA(cfg).cuda()
        apply_fp8(method, wanted, "cuda")
        for block in (*method.student.blocks, *method.teacher.blocks):
            block.compile(fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            out = method(images, images.flip(-1), keep)
        out.loss.backward()
        grads = [p.grad for n, p in method.student_parameters() if n.endswith("mlp.fc1.weight")]
        outputs.append([out.target, out.prediction, *grads])
    for a, b in zip(*outputs, strict=True):
        assert F.cosine_similarity(a.float().flatten(), b.float().flatten(), 0) > 0.95
