"""AdamWEma against torch.optim.AdamW, clip_grad_norm_ and lerp.

Covers: ten steps in fp32 and fp64, several groups, odd sizes around a chunk, clipping, gradient scale, bf16
gradients; a tensor learning rate; tensors without gradient, without teacher, with copies; a bad step changes
nothing, bitwise; state dicts both ways; new gradient storage; unaligned tensors; repeatability; opcheck; errors.
"""

from __future__ import annotations

import copy

import pytest
import torch
from extrema_fast.kernels import _launch
from extrema_fast.kernels.adamw_ema import AdamWEma

SIZES = [(1,), (3,), (4095,), (4096,), (4097,), (100, 101), (2, 3, 5)]


def make(dtype=torch.float32, sizes=SIZES):
    params = [torch.nn.Parameter(torch.randn(*s, dtype=dtype)) for s in sizes]
    return params, [p.detach().clone() + 0.1 for p in params]


def groups(params):
    return [
        {"params": params[:3], "weight_decay": 0.1},
        {"params": params[3:], "weight_decay": 0.0, "lr": 3e-3},
    ]


def set_grads(*lists, scale=1.0, dtype=None):
    for row in zip(*lists, strict=True):
        g = torch.randn_like(row[0]) * scale
        for p in row:
            p.grad = g.clone() if dtype is None else g.to(dtype).to(p.dtype)


@pytest.fixture(params=["kernel", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(_launch, "INTERPRET", False)
    return request.param


OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_ten_steps(dtype, tolerance, max_norm, path):
    a, teacher_a = make(dtype)
    b, teacher_b = copy.deepcopy(a), [t.clone() for t in teacher_a]
    # the last two have no teacher
    pairs = dict(list(zip(a, teacher_a, strict=True))[:-2])
    ours, torchs = AdamWEma(groups(a), teacher=pairs, **OPTIONS), torch.optim.AdamW(groups(b), **OPTIONS)
    untouched = [t.clone() for t in teacher_a[-2:]]
    for step in range(10):
        set_grads(a, b)
        for optimizer in (ours, torchs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        ours.step(momentum_weight=0.05 + step / 100, max_norm=max_norm)
        norm = torch.nn.utils.clip_grad_norm_(b, max_norm or 1e9)
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6) and float(ours.skipped) == 0
        torchs.step()
        for t, p in zip(teacher_b[:-2], b[:-2], strict=True):
            t.lerp_(p.detach(), 0.05 + step / 100)
    for x, y in zip((*a, *teacher_a[:-2]), (*b, *teacher_b[:-2]), strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=tolerance, atol=tolerance)
    for x, y in zip(a, b, strict=True):
        assert ours.state[x]["step"] == torchs.state[y]["step"] == 10
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                ours.state[x][key], torchs.state[y][key], rtol=10 * tolerance, atol=tolerance
            )
    assert all(torch.equal(x, y) for x, y in zip(teacher_a[-2:], untouched, strict=True))


def test_gradient_scale_and_bf16_gradients(path):
    a, _ = make()
    b = copy.deepcopy(a)
    ours, torchs = AdamWEma(a, **OPTIONS), torch.optim.AdamW(b, weight_decay=1e-2, **OPTIONS)
    for _ in range(3):
        set_grads(a, b)
        for x in a:
            x.grad = x.grad * 128
        ours.step(grad_scale=torch.tensor(1 / 128))
        torchs.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_learning_rate_on_the_device_is_read_every_step(path):
    a, _ = make(sizes=[(5,)])
    b = copy.deepcopy(a)
    rate = torch.tensor(0.0)
    ours, torchs = AdamWEma(a, lr=rate), torch.optim.AdamW(b, lr=0.0)
    for value in (0.1, 0.01, 0.5):
        set_grads(a, b)
        rate.fill_(value)
        torchs.param_groups[0]["lr"] = value
        ours.step(), torchs.step()
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)


def test_a_bad_step_changes_nothing(path):
    a, teacher = make()
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in a}
    ours = AdamWEma(a, teacher=dict(zip(a, teacher, strict=True)), shadow=copies, **OPTIONS)
    set_grads(a)
    ours.step(momentum_weight=0.1)

    def everything():
        state = [v for p in a for v in ours.state[p].values()]
        return [x.detach().clone() for x in (*a, *teacher, *copies.values(), *state)]

    before = everything()
    for value in (float("nan"), float("inf")):
        set_grads(a)
        a[3].grad[7] = value
        ours.step(momentum_weight=0.1, max_norm=1.0)
        assert float(ours.skipped) == 1
        assert all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
    set_grads(a)
    ours.step(momentum_weight=0.1, found_inf=torch.tensor(1.0))
    assert all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
    ours.step(momentum_weight=0.1, found_inf=torch.tensor(0.0))
    assert not torch.equal(a[0], before[0]) and float(ours.skipped) == 0


def test_state_dicts_are_those_of_torch(path):
    a, _ = make()
    b = copy.deepcopy(a)
    ours, torchs = AdamWEma(groups(a), **OPTIONS), torch.optim.AdamW(groups(b), **OPTIONS)
    for _ in range(2):
        set_grads(a, b)
        ours.step(), torchs.step()
    # each continues from the other's
    ours2, torchs2 = AdamWEma(groups(b), **OPTIONS), torch.optim.AdamW(groups(a), **OPTIONS)
    ours2.load_state_dict(copy.deepcopy(torchs.state_dict()))
    torchs2.load_state_dict(copy.deepcopy(ours.state_dict()))
    set_grads(a, b)
    ours2.step(), torchs2.step()
    for x, y in zip(a, b, strict=True):
        assert ours2.state[y]["step"] == torchs2.state[x]["step"] == 3
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_copies_are_the_cast_of_the_new_values(path):
    a, teacher = make()
    low = [{p: torch.full_like(p, 9, dtype=torch.float16) for p in a} for _ in range(2)]
    ours = AdamWEma(
        a, teacher=dict(zip(a, teacher, strict=True)), shadow=low[0], teacher_shadow=low[1], **OPTIONS
    )
    set_grads(a)
    ours.step(momentum_weight=0.3)
    for p, t in zip(a, teacher, strict=True):
        assert torch.equal(low[0][p], p.detach().half()) and torch.equal(low[1][p], t.half())
    before = [t.clone() for t in teacher]
    ours.step()
    assert all(torch.equal(x, y) for x, y in zip(teacher, before, strict=True))


def test_without_gradient_nothing_moves_and_new_storage_is_seen(path):
    a, _ = make(sizes=[(5,), (6,)])
    ours = AdamWEma(a, **OPTIONS)
    a[0].grad = torch.ones(5)
    before = a[1].detach().clone()
    ours.step()
    assert torch.equal(a[1], before) and a[1] not in ours.state
    b = torch.nn.Parameter(a[0].detach().clone())
    other = AdamWEma([b], **OPTIONS)
    saved = copy.deepcopy(ours.state_dict()["state"][0])
    other.load_state_dict({"state": {0: saved}, "param_groups": other.state_dict()["param_groups"]})
    a[0].grad, b.grad = torch.full((5,), 2.0), torch.full((5,), 2.0)
    ours.step(), other.step()
    assert torch.equal(a[0], b)


def test_unaligned_tensors_and_strided_gradients():
    base = torch.randn(5001)
    p, q = torch.nn.Parameter(base[1:]), torch.nn.Parameter(base[1:].clone())
    assert p.data_ptr() % 16
    ours, torchs = AdamWEma([p], **OPTIONS), torch.optim.AdamW([q], **OPTIONS)
    g = torch.randn(5000, 2)[:, 0]
    p.grad, q.grad = g, g.clone()
    ours.step(), torchs.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    p.grad = torch.ones(1).expand(5000)
    ours.step()


def test_runs_repeat_bitwise():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        a, teacher = make()
        ours = AdamWEma(a, teacher=dict(zip(a, teacher, strict=True)), **OPTIONS)
        for _ in range(3):
            set_grads(a)
            ours.step(momentum_weight=0.1, max_norm=0.5)
        results.append([*a, *teacher])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_opcheck():
    a, teacher = make(sizes=[(5,), (7, 3)])
    ps = [p.detach() for p in a]
    zeros = [[torch.zeros_like(p) for p in ps] for _ in range(2)]
    steps = [torch.zeros(()) for _ in ps]
    settings = torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]], dtype=torch.float64)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (1.0, 0.0, 0.1)]
    lists = (teacher[:1], [], [])
    args = (
        ps,
        [p + 1 for p in ps],
        *zeros,
        steps,
        *lists,
        [0, -1],
        [-1, -1],
        [-1, -1],
        [0, 0],
        settings,
        *numbers,
    )
    torch.library.opcheck(
        torch.ops.extrema_fast.adamw_ema.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_errors():
    a, teacher = make(sizes=[(5,)])
    with pytest.raises(ValueError, match="params: expected contiguous float32, got bfloat16"):
        AdamWEma([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"teacher: expected contiguous \[5\], got float32 \[4\]"):
        AdamWEma(a, teacher={a[0]: torch.zeros(4)})
    with pytest.raises(ValueError, match="teacher: expected torch.float32, got torch.bfloat16"):
        AdamWEma(a, teacher={a[0]: torch.zeros(5, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="is no parameter of this optimizer"):
        AdamWEma(a, teacher={torch.zeros(5): torch.zeros(5)})
    with pytest.raises(ValueError, match="shadow: expected one of bfloat16, float16"):
        AdamWEma(a, shadow={a[0]: torch.zeros(5)})
    with pytest.raises(ValueError, match="teacher_shadow: bfloat16"):
        AdamWEma(a, teacher_shadow={a[0]: torch.zeros(5, dtype=torch.bfloat16)})
