"""Schedules and parameter groups.

Covers: learning rate at 0, inside and at the end of the warm-up, in the middle and at the end; the momentum's
course; the paper's run in steps; which parameters are decayed; a trunk's rate of its own.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.models.encoder import create_encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.training.optim import Schedule, build_optimizer, param_groups, separate_trunk, set_lr


def schedule(base: c.Config | None = None, steps_per_epoch: int = 10, **change) -> Schedule:
    return Schedule(c.from_dict(change, base or c.smoke()), steps_per_epoch)


def course(minimum: float) -> Schedule:
    """11 epochs of 10 steps, one of them warm-up, peak 2, momentum from 0.9."""
    optim = {"base_lr": 2.0, "min_lr": minimum, "warmup_epochs": 1, "momentum": 0.9}
    return schedule(optim=optim, train={"epochs": 11, "batch_size": 256})


def test_learning_rate_and_momentum_at_their_corners():
    s, above = course(0.0), course(0.5)
    assert (s.total_steps, s.warmup_steps) == (110, 10)
    for t, rate in ((0, 0), (5, 1), (10, 2), (60, 1), (35, 1 + math.cos(math.pi / 4)), (110, 0), (500, 0)):
        assert s.lr(t) == pytest.approx(rate, abs=1e-15)
        # the warm-up starts at 0 and meets the peak whatever the minimum
        assert above.lr(t) == pytest.approx(rate if t <= 10 else 0.5 + 0.75 * rate)
    rates, momenta = ([f(t) for t in range(111)] for f in (s.lr, s.momentum))
    assert all(a < b for a, b in pairwise(rates[:11])) and all(a > b for a, b in pairwise(rates[10:]))
    assert all(a < b for a, b in pairwise(momenta))
    for t, value in (
        (0, 0.9),
        (55, 0.95),
        (27.5, 1 - 0.05 * (1 + math.cos(math.pi / 4))),
        (110, 1),
        (111, 1),
    ):
        assert s.momentum(t) == pytest.approx(value, rel=1e-15)
    assert schedule(optim={"warmup_epochs": 0}).lr(0) == c.smoke().peak_lr
    assert schedule(optim={"momentum": 1.0}).momentum(3) == 1.0


def test_the_papers_run():
    s = schedule(c.preset("paper_base_80x5"), 625)
    assert (s.total_steps, s.warmup_steps) == (187_500, 25_000)
    assert s.lr(12_500) == pytest.approx(6e-4) and s.lr(25_000) == pytest.approx(1.2e-3)
    assert s.lr(25_000 + 81_250) == pytest.approx(6e-4)
    assert s.momentum(0) == pytest.approx(0.996) and s.momentum(93_750) == pytest.approx(0.998)


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
    trunk = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    token = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted = {f"encoder.blocks.{i}.{n}.weight" for i in range(2) for n in trunk}
    wanted |= {f"encoder.blocks_token.{i}.{n}.weight" for i in range(2) for n in token}
    wanted |= {f"projector.{i}.weight" for i in (0, 3, 6)} | {f"predictor.{i}.weight" for i in (0, 3)}
    wanted |= {"encoder.patch_embed.proj.weight"}
    assert decayed == wanted
    names = {"encoder.cls_token", "encoder.norm.weight", "projector.1.weight"}
    assert names | {"encoder.blocks_token.0.gamma_1"} <= plain
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


def test_a_trunk_that_rests():
    s = course(0.0)
    assert [s.trunk_share(t) for t in (0, 5, 6, 8, 10, 11, 110)] == pytest.approx([0, 0, 0.2, 0.6, 1, 1, 1])
    assert schedule(optim={"warmup_epochs": 0}).trunk_share(0) == 1


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
def test_a_trunk_with_a_rate_of_its_own(name, tensor_lr):
    cfg = c.from_dict({"optim": {"name": name}}, c.smoke())
    method = ExtreMA(cfg)
    optimizer = build_optimizer(method, cfg, tensor_lr=tensor_lr)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trunk = list(method.student.blocks.parameters())
    separate_trunk(optimizer, trunk)
    assert {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]} == decay
    before = {n: p.detach().clone() for n, p in method.student_parameters()}
    set_lr(optimizer, 0.1, 0.0)
    for p in decay:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for n, p in method.student_parameters():
        assert torch.equal(p, before[n]) == ("encoder.blocks." in n), n
    set_lr(optimizer, 0.1, 0.1)
    optimizer.step()
    assert not any(torch.equal(p, before[n]) for n, p in method.student_parameters())
