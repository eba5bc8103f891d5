"""The two losses and the gathering of targets.

Covers: both losses against written-out loops in float64, gradients by finite differences; no gradient into the
targets; scale invariance and range; offsets of micro-batches; bf16 inputs and autocast are computed in fp32; gathering
over two real processes, and averaged gradients equal to the global batch's.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from extrema_fast.models.extrema import SHARED, byol_loss, correlation, infonce_loss, whiten


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum().sqrt()


def byol_by_hand(q: torch.Tensor, k: torch.Tensor) -> float:
    views, b = q.shape[0] // k.shape[0], k.shape[0]
    total = 0.0
    for v in range(views):
        for i in range(b):
            total += float((unit(q[v * b + i]) - unit(k[i])).square().sum())
    return total / (views * b)


def infonce_by_hand(q: torch.Tensor, k: torch.Tensor, t: float, b: int, offset: int = 0) -> float:
    views = q.shape[0] // b
    total = 0.0
    for v in range(views):
        for i in range(b):
            logits = [float(unit(q[v * b + i]) @ unit(other)) / t for other in k]
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
            total += -2 * t * (logits[offset + i] - log_sum)
    return total / (views * b)


@pytest.mark.parametrize(("views", "b", "d"), [(1, 1, 3), (5, 4, 16)])
def test_byol_is_the_written_formula(views, b, d):
    q, k = torch.randn(views * b, d).double(), torch.randn(b, d).double()
    loss = byol_loss(q, k)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(byol_by_hand(q, k), rel=1e-12)


@pytest.mark.parametrize(("views", "b", "d"), [(1, 1, 3), (5, 4, 16)])
@pytest.mark.parametrize("t", [1.0, 0.03])
def test_infonce_is_the_written_formula(views, b, d, t):
    q, k = torch.randn(views * b, d).double(), torch.randn(b, d).double()
    assert float(infonce_loss(q, k, t, b)) == pytest.approx(infonce_by_hand(q, k, t, b), rel=1e-10, abs=1e-12)


def test_infonce_compares_with_the_queue():
    q, k, queue = torch.randn(15, 8).double(), torch.randn(3, 8).double(), torch.randn(7, 8).double()
    found = float(infonce_loss(q, k, 0.2, 3, queue=F.normalize(queue)))
    assert found == pytest.approx(infonce_by_hand(q, torch.cat([k, queue]), 0.2, 3), rel=1e-10)
    assert found > float(infonce_loss(q, k, 0.2, 3))


def test_infonce_offset_points_at_this_parts_images():
    q, k = torch.randn(6, 8).double(), torch.randn(9, 8).double()
    values = [float(infonce_loss(q, k, 0.2, 3, offset)) for offset in (0, 3, 6)]
    assert values == pytest.approx([infonce_by_hand(q, k, 0.2, 3, o) for o in (0, 3, 6)], rel=1e-10)
    assert len(set(values)) == 3


def test_perfect_predictions():
    k = torch.eye(6).double()
    q = k.repeat(3, 1)
    assert float(byol_loss(q, k)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(-q, k)) == pytest.approx(4, rel=1e-12)
    # 6 orthogonal targets: -2T log(e^(1/T) / (e^(1/T) + 5)), also when every view predicts it
    wanted = 2 * 0.5 * math.log(1 + 5 * math.exp(-2))
    assert float(infonce_loss(q, k, 0.5, 6)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("m", "d"), [(2, 5), (7, 19), (39, 16), (64, 64)])
@pytest.mark.parametrize("shrinkage", [0.1, 0.01])
def test_whitening(m, d, shrinkage):
    # variances over eight orders, far from the origin
    k = (torch.randn(m, d).double() * torch.logspace(0, -4, d).double() + 5).requires_grad_()
    got = whiten(k, shrinkage)
    u, s, v = torch.linalg.svd(k.detach() - k.detach().mean(0), full_matrices=False)
    wanted = (u * (s / (s.square() + shrinkage * s.square().mean()).sqrt())) @ v
    assert torch.allclose(unit(got.flatten()), unit(wanted.flatten()), atol=1e-12) and not got.requires_grad
    assert torch.allclose(
        whiten(k.float(), shrinkage).double(), got, rtol=0, atol=1e-4 * float(got.abs().max())
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whiten(k.float(), shrinkage), whiten(k.detach().float(), shrinkage))
        assert whiten(k.bfloat16()).dtype == torch.float32
    # all alike: no direction is made up
    assert torch.equal(whiten(torch.ones(m, d)), torch.zeros(m, d))


LOSSES = pytest.mark.parametrize(
    "loss", [byol_loss, lambda q, k: infonce_loss(q, k, 0.2, k.shape[0])], ids=["byol", "infonce"]
)


@LOSSES
def test_lengths_do_not_matter_and_gradients_are_right(loss):
    q, k = torch.randn(6, 5).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    value = loss(q, k)
    stretched = loss(q * torch.rand(6, 1).double().add(0.1), k * 1e4)
    assert torch.allclose(stretched, value, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, k.detach()), q)
    value.backward()
    assert q.grad.abs().max() > 0
    # along q itself nothing changes
    assert float((q.grad * q).sum(-1).abs().max()) < 1e-12
    assert k.grad is None


@LOSSES
def test_half_precision_inputs_are_computed_in_fp32(loss):
    q, k = torch.randn(8, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    value, exact = loss(q, k), loss(q.double(), k.double())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    # autocast must not undo it: bf16 logits would be off by 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(q.float(), k.float())
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(q.float(), k.float()))


@LOSSES
def test_a_zero_vector_gives_no_nan(loss):
    q = torch.zeros(4, 8, requires_grad=True)
    value = loss(q, torch.zeros(2, 8))
    value.backward()
    assert value.isfinite() and q.grad.isfinite().all()


def test_correlation_by_hand():
    z = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) * 3 + 5
    # one that never moves, one that repeats another
    z = torch.cat([z, torch.full((9, 1), 7.0).double(), -2 * z[:, :1]], 1).requires_grad_()
    c = z.detach().T.cov(correction=0)
    c = c / (c.diagonal() + 1e-4).sqrt().outer((c.diagonal() + 1e-4).sqrt())
    wanted = sum(c[i, j] ** 2 for i in range(6) for j in range(6) if i != j) / 6
    assert wanted > 1 / 3
    wanted += SHARED * (1 + z.detach().mean(0) ** 2 / (z.detach().var(0, correction=0) + 1e-4)).log().mean()
    assert torch.allclose(correlation(z), wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(correlation, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert correlation(z.float()).item() == pytest.approx(wanted.item(), rel=1e-4)


RANK = """
    import sys, torch, torch.distributed as dist
    from extrema_fast.models.extrema import gather_targets, infonce_loss
    torch.manual_seed(0)
    # [view, rank, image, d] and [rank, image, d]
    q, k = torch.randn(3, 2, 2, 5).double().requires_grad_(), torch.randn(2, 2, 5).double()
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    mine = k[rank].clone().requires_grad_()
    targets, offset = gather_targets(mine)
    assert not targets.requires_grad and offset == 2 * rank, offset
    assert torch.equal(targets, k.flatten(0, 1)), targets
    loss = infonce_loss(q[:, rank].flatten(0, 1), targets, 0.2, 2, offset)
    grad = torch.autograd.grad(loss, q)[0]
    dist.all_reduce(grad)
    whole = infonce_loss(q.flatten(1, 2).flatten(0, 1), k.flatten(0, 1), 0.2, 4)
    wanted = torch.autograd.grad(whole, q)[0]
    assert torch.allclose(grad / 2, wanted, rtol=1e-12, atol=1e-15)
    dist.destroy_process_group()
    print("equal")
"""


def test_two_processes_equal_the_global_batch(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = [subprocess.Popen([*command, str(r), str(tmp_path / "meet")], **pipes) for r in range(2)]
    try:
        texts = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all("equal" in text for text in texts), "\n".join(texts)
