"""Schedules, parameter groups and the optimizers that are built.

Covers: learning rate at 0, inside and at the end of the warm-up, in the middle and at the end; the
momentum's course; both as pure functions; the paper's run in steps; who is decayed; for every optimizer and
implementation: its options, rates as numbers and tensors, its answer to a refused step; that all
implementations of one optimizer take the same steps and continue each other's checkpoints; other families
refused; layer-wise rates without decay refused.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.errors import UsageError
from extrema_fast.models.encoder import create_encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import dispatch as ops
from extrema_fast.training.checkpoint import collect, restore
from extrema_fast.training.metrics import Counters
from extrema_fast.training.optim import (
    FAMILIES,
    Schedule,
    build_optimizer,
    gates_on_device,
    learning_rate,
    momentum,
    param_groups,
    set_lr,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(ops, "_setting", "auto")


def test_learning_rate_at_its_corners():
    def rate(t: int, minimum: float = 0.0) -> float:
        return learning_rate(t, peak=2.0, total=110, warmup=10, minimum=minimum)

    assert rate(0) == 0.0
    assert rate(5) == 1.0
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(35) == pytest.approx(2 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(0.0, abs=1e-15)
    assert rate(500) == pytest.approx(0.0, abs=1e-15)
    assert rate(110, 0.5) == pytest.approx(0.5)
    assert rate(60, 0.5) == pytest.approx(1.25)
    # the warm-up starts at 0 and meets the peak whatever the minimum
    assert rate(0, 0.5) == 0 and rate(10, 0.5) == 2.0
    values = [rate(t) for t in range(111)]
    assert all(a < b for a, b in pairwise(values[:11]))
    assert all(a > b for a, b in pairwise(values[10:]))


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, peak=3.0, total=10, warmup=0) == 3.0


def test_momentum_at_its_corners():
    assert momentum(0, base=0.996, total=100) == pytest.approx(0.996, rel=1e-15)
    assert momentum(50, base=0.996, total=100) == pytest.approx(0.998, rel=1e-15)
    assert momentum(100, base=0.996, total=100) == 1.0
    assert momentum(101, base=0.996, total=100) == 1.0
    assert momentum(25, base=0.9, total=100) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)
    values = [momentum(t, base=0.9, total=64) for t in range(65)]
    assert all(a < b for a, b in pairwise(values))
    assert momentum(3, base=1.0, total=10) == 1.0


def test_the_papers_run():
    cfg = c.paper_base_80x5()
    s = Schedule(cfg, 625)
    assert (s.total_steps, s.warmup_steps) == (187_500, 25_000)
    assert s.lr(0) == 0
    assert s.lr(12_500) == pytest.approx(6e-4)
    assert s.lr(25_000) == pytest.approx(1.2e-3)
    assert s.lr(25_000 + 81_250) == pytest.approx(6e-4)
    assert s.lr(187_500) == pytest.approx(0, abs=1e-18)
    assert s.momentum(0) == pytest.approx(0.996) and s.momentum(93_750) == pytest.approx(0.998)


def test_a_schedule_uses_every_option():
    cfg = c.from_dict(
        {
            "optim": {"base_lr": 1e-2, "min_lr": 1e-4, "warmup_epochs": 0.5, "momentum": 0.9},
            "train": {"epochs": 4, "batch_size": 512},
        },
        c.smoke(),
    )
    s = Schedule(cfg, 10)
    assert (s.total_steps, s.warmup_steps) == (40, 5)
    assert s.lr(5) == pytest.approx(2e-2) and s.lr(40) == pytest.approx(1e-4)
    assert s.momentum(0) == pytest.approx(0.9) and s.momentum(40) == 1
    # a value depends on its step alone
    assert [s.lr(t) for t in (7, 3, 7)] == [s.lr(7), s.lr(3), Schedule(cfg, 10).lr(7)]


def group_names(named: list[tuple[str, torch.nn.Parameter]], decay: float = 0.1) -> tuple[set[str], set[str]]:
    groups = param_groups(named, decay)
    assert [g["weight_decay"] for g in groups] == [decay, 0.0]
    names = {id(p): n for n, p in named}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in groups)
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(named) == len(decayed | plain)
    return decayed, plain


def test_decay_is_for_matrices_only():
    method = ExtreMA(c.smoke())
    decayed, plain = group_names(method.student_parameters())
    wanted = {
        f"encoder.blocks.{i}.{n}.weight"
        for i in range(2)
        for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    wanted |= {
        f"encoder.blocks_token.{i}.{n}.weight"
        for i in range(2)
        for n in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    wanted |= {
        "encoder.patch_embed.proj.weight",
        "projector.0.weight",
        "projector.3.weight",
        "projector.6.weight",
    }
    wanted |= {"predictor.0.weight", "predictor.3.weight"}
    assert decayed == wanted
    assert {
        "encoder.cls_token",
        "encoder.blocks_token.0.gamma_1",
        "encoder.norm.weight",
        "projector.1.weight",
    } <= plain
    # the position table is neither: a buffer is not optimised
    assert not any("pos_embed" in n for n in decayed | plain)


def test_a_learned_position_table_is_not_decayed():
    encoder = create_encoder("extrema_vit_tiny_patch16_224", img_size=32, pos_embed="learned")
    assert "pos_embed" in group_names(list(encoder.named_parameters()))[1]


def test_the_optimizer_trains_the_student_alone():
    cfg = c.from_dict({"optim": {"betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.3}}, c.smoke())
    method = ExtreMA(cfg)
    optimizer = build_optimizer(method, cfg)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in method.student_branch.parameters()}
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-7, decay)


def test_one_fused_step_is_decoupled_adamw():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]).double())
    p.grad = torch.tensor([[0.5, 3.0]]).double()
    optimizer = torch.optim.AdamW(
        param_groups([("w", p)], 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    optimizer.step()
    # at the first step the two moments cancel to the sign of the gradient
    wanted = torch.tensor([[1.0, -2.0]]).double() * (1 - 0.01 * 0.1) - 0.01 * torch.sign(p.grad)
    assert torch.allclose(p.detach(), wanted, rtol=1e-7)


# ---- every optimizer ---------------------------------------------------------------------------------

# (optim.name, system.backend): class, decides on the device
OPTIMIZERS = {
    ("adamw", "auto"): ("AdamW", True),
    ("adamw", "adamw_ema=fused"): ("AdamW", True),
    ("adamw", "adamw_ema=foreach"): ("ForeachAdamW", False),
    ("adamw", "adamw_ema=reference"): ("AdamW", False),
    ("adamw", "adamw_ema=triton"): ("AdamWEma", True),
    ("lamb", "auto"): ("Lamb", True),
    ("lamb", "lamb=foreach"): ("Lamb", True),
    ("lamb", "lamb=reference"): ("Lamb", True),
    ("lars", "auto"): ("Lars", True),
}
TINY = {
    "model": {"width": 16, "depth": 1},
    "head": {"hidden": 8, "out": 8, "predictor_hidden": 8},
    "optim": {"betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3, "base_lr": 0.1},
}


def built(name: str, backend: str, **options) -> tuple[ExtreMA, torch.optim.Optimizer]:
    cfg = c.from_dict({"optim": {"name": name}}, c.from_dict(TINY, c.smoke()))
    ops.set_backend(backend)
    method = ExtreMA(cfg)
    return method, build_optimizer(method, cfg, **options)


def take_steps(method: ExtreMA, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    for t in range(start, end):
        torch.manual_seed(t)
        for _, p in method.student_parameters():
            p.grad = torch.randn_like(p)
        set_lr(optimizer, 0.01 * (t + 1))
        optimizer.step()


def saved(method: ExtreMA, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in collect(method, optimizer, Counters().tensor).items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], rtol: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize(("name", "backend"), OPTIMIZERS)
def test_the_optimizer_of_a_configuration(name, backend):
    method, optimizer = built(name, backend)
    wanted, on_device = OPTIMIZERS[name, backend]
    assert type(optimizer).__name__ == wanted and gates_on_device(optimizer) is on_device
    assert FAMILIES[wanted] == name
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in method.student_branch.parameters()}
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert group["weight_decay"] == decay and group["lr"] == pytest.approx(0.1 * 16 / 256)
        if name == "lars":
            assert (group["momentum"], group["trust"]) == (0.8, 1e-3)
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)


@pytest.mark.parametrize(("name", "backend"), OPTIMIZERS)
def test_a_rate_in_a_tensor(name, backend):
    one, two = built(name, backend), built(name, backend, tensor_lr=True)
    rates = [g["lr"] for g in two[1].param_groups]
    assert rates[0] is rates[1] and (rates[0].dtype, rates[0].dim()) == (torch.float32, 0)
    assert float(rates[0]) == pytest.approx(0.1 * 16 / 256)
    for method, optimizer in (one, two):
        take_steps(method, optimizer, 0, 3)
    assert float(rates[0]) == pytest.approx(0.03)
    assert_same(saved(*one), saved(*two), 1e-6)
    # a rate that is a tensor sets either kind
    for _, optimizer in (one, two):
        set_lr(optimizer, torch.tensor(0.25))
        assert [float(g["lr"]) for g in optimizer.param_groups] == [0.25, 0.25]
    assert type(one[1].param_groups[0]["lr"]) is float
    # and the tensor is still that one after a checkpoint has been read
    restore(saved(*one), two[0], two[1], Counters().tensor)
    assert all(g["lr"] is rates[0] for g in two[1].param_groups)


@pytest.mark.parametrize(("name", "backend"), [k for k, (_, on_device) in OPTIMIZERS.items() if on_device])
def test_a_step_refused_on_the_device(name, backend):
    method, optimizer = built(name, backend)
    take_steps(method, optimizer, 0, 2)
    before = saved(method, optimizer)
    optimizer.found_inf = torch.ones(())
    for _, p in method.student_parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    after = saved(method, optimizer)
    assert all(before[n].numpy().tobytes() == t.numpy().tobytes() for n, t in after.items())
    optimizer.found_inf = torch.zeros(())
    take_steps(method, optimizer, 2, 3)
    assert any(not torch.equal(before[n], t) for n, t in saved(method, optimizer).items())


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
def test_implementations_continue_each_others_checkpoints(name):
    backends = [b for n, b in OPTIMIZERS if n == name and (b != "auto" or n == "lars")]
    results = []
    # each continues its neighbour's
    for first, second in zip(backends, backends[1:] + backends[:1], strict=True):
        one, two = built(name, first), built(name, second)
        take_steps(*one, 0, 2)
        # another run's state must leave no trace
        take_steps(*two, 7, 8)
        restore(saved(*one), *two, Counters().tensor, type(one[1]).__name__)
        assert_same(saved(*one), saved(*two), 0)
        take_steps(*two, 2, 4)
        results.append(saved(*two))
    straight = built(name, backends[0])
    take_steps(*straight, 0, 4)
    for result in results:
        assert_same(saved(*straight), result, 1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [("AdamW", "lamb"), ("FusedLAMB", "adamw"), ("Lars", "lamb"), ("Lamb", "lars"), ("Adafactor", "adamw")],
)
def test_another_optimizers_checkpoint_is_refused(old, new):
    one, two = built(FAMILIES.get(old, "adamw"), "auto"), built(new, "auto")
    take_steps(*one, 0, 1)
    before = saved(*two)
    with pytest.raises(
        UsageError, match=f"its optimizer is {old}, this run's is {type(two[1]).__name__}"
    ) as error:
        restore(saved(*one), *two, Counters().tensor, old)
    known = old in FAMILIES
    assert (f"use --optim.name {FAMILIES.get(old)}, or another --out" in str(error.value)) is known
    assert "another --out with --init-from" in str(error.value)
    assert_same(before, saved(*two), 0)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layer_wise_rates_without_decay_are_refused(name):
    cfg = c.from_dict({"optim": {"name": name, "weight_decay": 0.0}}, c.smoke())
    with pytest.raises(
        UsageError, match=rf"optim.weight_decay: 0 .* optim.name={name} off; use a small value"
    ):
        build_optimizer(ExtreMA(cfg), cfg)
