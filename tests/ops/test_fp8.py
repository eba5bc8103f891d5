"""FP8 matmuls in the trunk.

Covers: errors (no torchao, no GPU, an old GPU, odd widths), which change nothing; off; with torchao, emulated: which
layers change in either mode, names and parameters that stay, closeness to bf16 forward and backward, that the matmuls
are rounded, no gradient in the teacher, whole graphs, a checkpoint across the setting, a training step.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from extrema_fast import train
from extrema_fast.config import from_dict, smoke
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops.fp8 import LAYERS, apply_fp8
from extrema_fast.training import step
from extrema_fast.training.counters import LOSS
from extrema_fast.training.run import build
from tests.kernels._compare import draw_keep

CFG = from_dict({"model": {"drop_path": 0.0}, "optim": {"warmup_epochs": 0.0}}, smoke())
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao (pip install torchao)"
)


def kinds(method: ExtreMA) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in method.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("mode", "device", "emulate", "width", "words"),
    [
        ("teacher", "cpu", False, 64, "train.fp8=teacher: needs an NVIDIA GPU, the device is cpu"),
        ("trunk", "cuda:0", False, 64, r"A100 \(sm_80\) has no FP8 matmuls, they begin with sm_89"),
        ("teacher", "cpu", True, 64, r"needs torchao \(.*pip install 'torchao"),
        ("trunk", "cpu", True, 40, "blocks.0.attn.qkv is 40 x 120, FP8 matmuls need multiples of 16"),
    ],
)
def test_errors_change_nothing(mode, device, emulate, width, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    method = ExtreMA(from_dict({"model": {"width": width, "heads": 1}}, CFG))
    before = kinds(method)
    assert apply_fp8(method, "off", device) == 0
    with pytest.raises(UsageError, match=words):
        apply_fp8(method, mode, device, emulate=emulate)
    assert kinds(method) == before


@needs_torchao
@pytest.mark.parametrize(("mode", "branches"), [("teacher", ["teacher"]), ("trunk", ["teacher", "student"])])
def test_only_the_named_layers_change(mode, branches):
    method = ExtreMA(CFG)
    state, params = method.state_dict(keep_vars=True), dict(method.named_parameters())
    before = kinds(method)
    expected = {
        f"{b}_branch.encoder.blocks.{i}.{name}" for b in branches for i in range(2) for name in LAYERS
    }
    assert apply_fp8(method, mode, "cpu", emulate=True) == len(expected) == 8 * len(branches)
    after = kinds(method)
    assert {n for n in after if after[n] == "Float8Linear"} == expected
    assert all(after[n] == before[n] for n in before if n not in expected)
    now = method.state_dict(keep_vars=True)
    assert list(now) == list(state) and all(
        now[n] is t and t.dtype == torch.float32 for n, t in state.items()
    )
    # the very parameters, so that an optimizer may exist already
    assert all(
        p is params[n] and p.requires_grad == n.startswith("student") for n, p in method.named_parameters()
    )


@needs_torchao
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_close_to_the_usual_matmuls(precision):
    plain, fp8 = ExtreMA(CFG), ExtreMA(CFG)
    apply_fp8(fp8, "trunk", "cpu", emulate=True)
    # an odd number of rows: the backward pass sums over them
    images, keep = torch.randn(3, 3, 32, 32), draw_keep(3, 16, 2, 4, disjoint=True)
    results = []
    for method in (plain, fp8):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = method(images, images.flip(-1), keep)
        out.loss.backward()
        results.append((out.target, out.prediction, out.student_features))
    for x, y in zip(*results, strict=True):
        assert F.cosine_similarity(x.float(), y.float()).min() > 0.99
        # not the same numbers: matmuls of bf16 differ by far less than three bits of mantissa do
        assert float((x.float() - y.float()).norm() / x.float().norm()) > 3e-3
    for (name, p), (_, q) in zip(plain.student_parameters(), fp8.student_parameters(), strict=True):
        # the gradient of a key's bias is rounding noise
        if p.dim() > 1 and "attn.k" not in name:
            assert q.grad.dtype == torch.float32
            assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.95, name
    assert all(p.grad is None for p in fp8.teacher_branch.parameters())


@needs_torchao
def test_a_block_is_still_one_graph():
    method = ExtreMA(CFG)
    apply_fp8(method, "trunk", "cpu", emulate=True)
    x = torch.randn(3, 5, 64)
    wanted = method.student.blocks[0](x)
    block = torch.compile(method.student.blocks[0], backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(block(x), wanted, rtol=1e-5, atol=1e-6)
    block(x).sum().backward()
    assert method.student.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


@needs_torchao
@pytest.mark.parametrize("mode", ["teacher", "trunk"])
def test_training_steps(mode):
    losses = []
    for wanted in ("off", mode):
        run = build(CFG, World(torch.device("cpu")), range(64))
        apply_fp8(run.method, wanted, "cpu", emulate=True)
        step.wrap(run)
        torch.manual_seed(0)
        images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
        for _ in range(3):
            train.train_step(run, *step.batches(run, [Batch(images, torch.arange(16), 0, run.step)]))
            run.step += 1
        losses.append(run.counters.tensor[LOSS].item())
        saved = run.method.state_dict()
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    # weights written with FP8 are read without
    ExtreMA(CFG).load_state_dict(saved)
