"""LAMB and LARS: the papers' formulas, and steps a device can refuse.

Covers: both forms of LAMB and LARS against the formulas in float64, several groups and odd shapes, over steps
with a changing rate; ratios where a norm is 0; no scaling without decay; momentum 0; a refused step (bits, also
those of -0.0) and the steps after it; rates in tensors; nothing read by the host; gradients with other
strides; parameters and gradients that are refused; whole runs: learning, and stopped and continued
bit for bit; a step with a gradient that is not finite.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import Tensor

from extrema_fast import train
from extrema_fast.config import from_dict, smoke
from extrema_fast.errors import Preempted
from extrema_fast.ops.lamb import ForeachAdamW, Lamb, Lars
from extrema_fast.training.metrics import history

SHAPES = [(49, 39), (1, 19), (7,), (3, 2, 5), (1,)]
DECAY = [0.1, 0.0, 0.02]
BETAS, EPS = (0.9, 0.95), 1e-8
MAKE = {
    "lamb": lambda groups, lr: Lamb(groups, lr=lr, betas=BETAS, eps=EPS),
    "lamb plain": lambda groups, lr: Lamb(groups, lr=lr, betas=BETAS, eps=EPS, foreach=False),
    "lars": lambda groups, lr: Lars(groups, lr=lr, momentum=0.9, trust=0.02),
}


def parameters(dtype: torch.dtype) -> list[dict]:
    """A group per decay with every shape, some of them all zeros."""
    torch.manual_seed(1)
    groups = []
    for decay in DECAY:
        params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]
        with torch.no_grad():
            params[1].zero_()
        groups.append({"params": params, "weight_decay": decay})
    return groups


def every(groups: list[dict]) -> list[torch.nn.Parameter]:
    return [p for g in groups for p in g["params"]]


def give_gradients(groups: list[dict], step: int) -> None:
    torch.manual_seed(100 + step)
    for i, p in enumerate(every(groups)):
        g = torch.randn(p.shape, dtype=torch.float64).to(p)
        # a tensor that never has a gradient other than 0
        p.grad = torch.zeros_like(p) if i % len(SHAPES) == 3 else g


def formula(name: str, groups: list[dict], rates: list[float]) -> list[Tensor]:
    """The module's formulas in float64, one tensor after the other."""
    first, second = ({id(p): 0.0 for p in every(groups)} for _ in range(2))
    x = {id(p): p.detach().double() for p in every(groups)}
    for t, lr in enumerate(rates, start=1):
        give_gradients(groups, t)
        for group in groups:
            d = group["weight_decay"]
            for p in group["params"]:
                k, g = id(p), p.grad.double()
                if name.startswith("lamb"):
                    first[k] = BETAS[0] * first[k] + (1 - BETAS[0]) * g
                    second[k] = BETAS[1] * second[k] + (1 - BETAS[1]) * g**2
                    m, v = first[k] / (1 - BETAS[0] ** t), second[k] / (1 - BETAS[1] ** t)
                    u = m / (v.sqrt() + EPS) + d * x[k]
                    top, bottom = float(x[k].norm()), float(u.norm())
                    if d and top and bottom:
                        u = u * (top / bottom)
                    x[k] = x[k] - lr * u
                else:
                    u, top, bottom = g + d * x[k], float(x[k].norm()), float(g.norm())
                    if d:
                        u = u * (0.02 * top / (bottom + d * top) if top and bottom else 1.0)
                    first[k] = 0.9 * first[k] + u
                    x[k] = x[k] - lr * first[k]
    return list(x.values())


RATES = [0.01, 0.03, 0.02, 0.005]


def take_steps(optimizer: torch.optim.Optimizer, groups: list[dict], rates: list[float] = RATES) -> None:
    for t, lr in enumerate(rates, start=1):
        give_gradients(groups, t)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        optimizer.step()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", MAKE)
def test_follows_the_formula(name, dtype, limit, tensor):
    groups = parameters(dtype)
    wanted = formula(name, parameters(dtype), RATES)
    optimizer = MAKE[name](groups, torch.tensor(0.0) if tensor else 0.0)
    take_steps(optimizer, groups)
    # a rate in a tensor has fp32's digits
    limit = max(limit, 1e-8) if tensor else limit
    for p, x in zip(every(groups), wanted, strict=True):
        assert float((p.detach() - x).abs().max()) <= limit * max(1.0, float(x.abs().max())), (name, p.shape)
    moved = [
        float((p - q).detach().abs().max())
        for p, q in zip(every(groups), every(parameters(dtype)), strict=True)
    ]
    assert sum(m > 0 for m in moved) >= len(moved) - len(DECAY)


@pytest.mark.parametrize("name", ["lamb", "lamb plain"])
def test_without_decay_lamb_is_adam(name):
    groups, others = ([{"params": every(parameters(torch.float64)), "weight_decay": 0.0}] for _ in range(2))
    take_steps(MAKE[name](groups, 0.0), groups)
    take_steps(torch.optim.AdamW(others, lr=0.0, betas=BETAS, eps=EPS), others)
    for a, b in zip(every(groups), every(others), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_lars_without_momentum():
    groups = parameters(torch.float64)
    before = [p.detach().clone() for p in every(groups)]
    optimizer = Lars(groups, lr=0.5, momentum=0.0, trust=0.02)
    give_gradients(groups, 1)
    optimizer.step()
    p, x, g = every(groups)[0], before[0], every(groups)[0].grad
    u = 0.02 * x.norm() / (g.norm() + 0.1 * x.norm()) * (g + 0.1 * x)
    torch.testing.assert_close(p.detach(), x - 0.5 * u, rtol=1e-13, atol=0)
    assert not any(optimizer.state.values())


# ---- refused steps ---------------------------------------------------------------------------------


def bits(groups: list[dict], optimizer: torch.optim.Optimizer) -> list[bytes]:
    found = [p.detach() for p in every(groups)]
    found += [v for p in every(groups) for _, v in sorted(optimizer.state.get(p, {}).items())]
    return [t.numpy().tobytes() for t in found]


@pytest.mark.parametrize("name", MAKE)
def test_a_refused_step_changes_no_bit(name):
    groups, others = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = MAKE[name](groups, 0.0), MAKE[name](others, 0.0)
    take_steps(optimizer, groups)
    take_steps(other, others)
    p = every(groups)[0]
    with torch.no_grad():
        for q in (p, every(others)[0]):
            q[0, :3] = -0.0
    for key, value in optimizer.state[p].items():
        if key != "step":
            value[1, :3] = other.state[every(others)[0]][key][1, :3] = -0.0
    before = bits(groups, optimizer)
    for bad in (float("nan"), float("inf"), 1.0):
        give_gradients(groups, 9)
        for q in every(groups):
            q.grad.fill_(bad)
        for flag in (torch.ones(()), torch.tensor(2.0, dtype=torch.float64)):
            optimizer.found_inf = flag
            optimizer.step()
            assert bits(groups, optimizer) == before, bad
    # the next good step is the one it would have been
    optimizer.found_inf = torch.zeros(())
    take_steps(optimizer, groups)
    take_steps(other, others)
    assert bits(groups, optimizer) == bits(others, other) != before


@pytest.mark.parametrize("name", MAKE)
def test_the_first_step_can_be_refused(name):
    groups, others = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = MAKE[name](groups, 0.0), MAKE[name](others, 0.0)
    give_gradients(groups, 1)
    for q in every(groups):
        q.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.found_inf = torch.zeros(())
    take_steps(optimizer, groups)
    take_steps(other, others)
    assert bits(groups, optimizer) == bits(others, other)


@pytest.mark.parametrize("name", MAKE)
def test_the_host_reads_nothing(name):
    """On tensors without values every read by the host raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with torch.library._scoped_library("aten", "IMPL") as library, FakeTensorMode():
        # torch describes every op used here but this one
        library.impl("_fused_sgd_.tensor_lr", lambda *_, **__: None, "Meta")
        lr = torch.empty(())
        with pytest.raises(DataDependentOutputException):
            bool(lr > 0)
        params = [torch.nn.Parameter(torch.empty(s)) for s in SHAPES]
        groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
        optimizer = MAKE[name](groups, lr)
        optimizer.found_inf = torch.empty(())
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()


# ---- what it is given ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_gradients_in_another_order(name):
    results = []
    for turned in (False, True):
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = MAKE[name]([{"params": [p], "weight_decay": 0.1}], 0.1)
        g = torch.linspace(-1, 2, 12).view(3, 4)
        p.grad = g.t().contiguous().t() if turned else g
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("cls", [Lamb, Lars])
def test_what_is_refused(cls):
    for p in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 3).t()):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            cls([torch.nn.Parameter(p)])
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = cls([p, torch.nn.Parameter(torch.ones(1))])
    p.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match=r"grad of \[2, 2\]: expected dense"):
        optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_without_gradients_and_with_a_closure(name):
    groups = parameters(torch.float32)
    optimizer = MAKE[name](groups, 0.1)
    before = bits(groups, optimizer)
    optimizer.step()
    assert bits(groups, optimizer) == before
    p = every(groups)[0]

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and bits(groups, optimizer) != before


def test_foreach_adamw_takes_a_rate_in_a_tensor_on_a_cpu():
    groups, others = parameters(torch.float64), parameters(torch.float64)
    lr = torch.tensor(0.0, dtype=torch.float64)
    optimizer = ForeachAdamW(groups, lr, betas=BETAS, eps=EPS)
    take_steps(optimizer, groups)
    assert all(g["lr"] is lr for g in optimizer.param_groups)
    take_steps(torch.optim.AdamW(others, lr=0.0, betas=BETAS, eps=EPS, foreach=True), others)
    for a, b in zip(every(groups), every(others), strict=True):
        assert torch.equal(a, b)


# ---- whole runs ------------------------------------------------------------------------------------

STEPS = 8


def config(out, name: str, **change):
    rate = {"lamb": 0.1, "lars": 20.0}[name]
    tiny = {"model": {"width": 16, "depth": 1}, "head": {"hidden": 16, "out": 8, "predictor_hidden": 16}}
    cfg = from_dict(tiny | {"out": str(out), "optim": {"name": name, "base_lr": rate}}, smoke())
    return from_dict({"eval": {"every_epochs": 0}} | change, cfg)


def final_hash(run) -> str:
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    return json.loads((folder / "COMPLETE").read_text())["state.safetensors"]["sha256"]


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_run_learns_and_continues_bit_for_bit(name, tmp_path, monkeypatch):
    train.pretrain(config(tmp_path / "straight", name), progress=False)
    loss = [r["loss"] for r in history(tmp_path / "straight" / "log.jsonl", "train", STEPS)]
    assert len(loss) == STEPS and loss[-1] < loss[0]
    saved = json.loads(
        (tmp_path / "straight" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text()
    )
    assert saved["optimizer"] == name.capitalize()

    step = train.train_step

    def stopping(run, batch):
        if run.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopping)
        with pytest.raises(Preempted):
            train.pretrain(config(tmp_path / "stopped", name), progress=False)
    train.pretrain(config(tmp_path / "stopped", name), progress=False)
    assert final_hash(tmp_path / "stopped") == final_hash(tmp_path / "straight")


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_run_passes_over_a_bad_step(name, tmp_path, monkeypatch):
    step, seen = train.train_step, []

    def poisoned(run, batch):
        handle = None
        if run.step == 2:
            p = run.method.student_parameters()[0][1]
            handle = p.register_hook(lambda g: g * float("nan"))
        before = [p.detach().clone() for p in run.method.parameters()]
        lr = step(run, batch)
        if handle is not None:
            handle.remove()
        seen.append(all(torch.equal(a, b) for a, b in zip(before, run.method.parameters(), strict=True)))
        return lr

    monkeypatch.setattr(train, "train_step", poisoned)
    train.pretrain(config(tmp_path / "run", name), progress=False)
    # at the first step the rate is 0, and the teacher has nothing to follow
    assert seen == [True, False, True, *[False] * (STEPS - 3)]
