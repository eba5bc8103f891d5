"""Schedules and parameter groups.

Covers: learning rate at 0, inside and at the end of the warm-up, in the middle and at the end; the momentum's
course; both as pure functions; the paper's run in steps; which parameters are decayed.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from extrema_fast import config as c
from extrema_fast.models.encoder import create_encoder
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.training.optim import Schedule, build_optimizer, learning_rate, momentum, param_groups


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
    cfg = c.preset("paper_base_80x5")
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
