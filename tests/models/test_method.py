"""Student, teacher and heads as one object.

Covers: head layers; the step written out by hand for both losses; view-major rows; the teacher has no
gradient, never trains and never drops paths; its update; initial weights from the seed alone; every trained
parameter gets a gradient; micro-batches equal the whole batch, gradients included.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from extrema_fast.kernels.patch_gather import gather_patches

from extrema_fast import config as c
from extrema_fast.models.drop_path import drop_path_scale
from extrema_fast.models.encoder import build_encoder
from extrema_fast.models.extrema import ExtreMA, correlation, mlp_head
from extrema_fast.models.masking import draw_views


def tiny(loss: str = "byol", targets: str = "plain", **train) -> c.Config:
    model = {"img_size": [16, 24], "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "drop_path": 0.0}
    head = {"loss": loss, "targets": targets, "hidden": 24, "out": 12, "predictor_hidden": 20}
    options = {"model": model, "head": head, "mask": {"views": 3, "keep": 2}, "train": train}
    return c.from_dict(options, c.smoke())


def batch(cfg: c.Config, b: int = 4):
    keep = draw_views(b, cfg.model.num_patches, cfg.num_keep, cfg.mask.views, seed=1)
    a, t = (torch.randn(b, 3, *cfg.model.img_size, dtype=torch.float64) for _ in range(2))
    return a, t, keep


def apart(method: ExtreMA) -> ExtreMA:
    """A float64 method whose student has moved away from its teacher."""
    method = method.double()
    with torch.no_grad():
        for p in method.student_branch.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return method


@pytest.mark.parametrize("loss", ["byol", "infonce"])
def test_patches_in_place_of_images_give_the_same_bits(loss):
    cfg = tiny(loss)
    method, (a, t, keep) = apart(ExtreMA(cfg)), batch(cfg)
    patches = gather_patches(a, keep, 8), gather_patches(t, None, 8)
    results = []
    for student, teacher in ((a, t), patches):
        method.zero_grad()
        out = method(student, teacher, keep)
        out.loss.backward()
        grads = [p.grad.clone() for _, p in method.student_parameters() if p.grad is not None]
        results.append((out.loss, out.prediction, out.target, *grads))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- heads ----------------------------------------------------------------------------------------


def test_head_layers():
    head = mlp_head(8, 16, 24, 4)
    assert " ".join(type(m).__name__ for m in head) == "Linear LayerNorm GELU Linear LayerNorm GELU Linear"
    assert set(head.state_dict()) == {f"{i}.{x}" for i in (0, 1, 3, 4, 6) for x in ("weight", "bias")}
    assert head[1].eps == head[4].eps == 1e-5 and head[2].approximate == "none"
    assert set(mlp_head(8, 16, 4).state_dict()) == {f"{i}.{x}" for i in (0, 1, 3) for x in ("weight", "bias")}
    for m in (head[0], head[3], head[6]):
        bound = (6 / (m.in_features + m.out_features)) ** 0.5
        assert 0.9 * bound < m.weight.detach().abs().max() <= bound and not m.bias.any()


def test_batch_norm():
    head = mlp_head(8, 16, 4, norm="batch").double()
    assert head[1].state_dict().keys() == {"scale", "shift"}
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head[1].scale.normal_()
        head[1].shift.normal_()

    def torchs(x, scale, shift):
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = head[1].float()(x.to(dtype)) if dtype != torch.float64 else head[1](x)
        assert out.dtype == dtype
        expected = torchs(x, *(p.double() for p in head[1].parameters()))
        assert torch.allclose(
            out.double(), expected, **{torch.float64: {"rtol": 1e-12}}.get(dtype, {"atol": 0.05})
        )
    head.double()
    weights = [x, *head[1].parameters()]
    weight = torch.randn(5, 16, dtype=torch.float64)
    own = torch.autograd.grad((head[1](x) * weight).sum(), weights)
    theirs = torch.autograd.grad((torchs(*weights) * weight).sum(), weights)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(own, theirs, strict=True))


def test_heads_with_batch_norm():
    cfg = c.from_dict({"head": {"norm": "batch"}}, tiny())
    method = ExtreMA(cfg)
    kinds = [
        [type(m).__name__ for m in head]
        for head in (method.projector, method.teacher_projector, method.predictor)
    ]
    assert [k.count("BatchNorm") for k in kinds] == [2, 2, 1] and not any("LayerNorm" in k for k in kinds)


# ---- one step -------------------------------------------------------------------------------------


def whitened(k: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.linalg.svd(k - k.mean(0), full_matrices=False)
    return (u * (s / (s.square() + 0.01 * s.square().sum() / len(s)).sqrt())) @ v


LOSSES = pytest.mark.parametrize(
    ("loss", "targets"), [("byol", "plain"), ("byol", "whitened"), ("infonce", "plain")]
)


@LOSSES
def test_a_step_by_hand(loss, targets):
    cfg = tiny(loss, targets)
    method = apart(ExtreMA(cfg))
    student_images, teacher_images, keep = batch(cfg)
    out = method(student_images, teacher_images, keep)
    target = method.teacher_projector(method.teacher.encode(teacher_images).cls)
    assert torch.allclose(out.target, target, atol=1e-12)
    assert out.prediction.shape == (12, 12) and out.student_features.shape == (12, 32)
    total = 0.0
    k = target
    if targets == "whitened":
        k = whitened(k)
    k = F.normalize(k, dim=-1)
    for v in range(3):
        cls = method.student.encode(student_images, keep[v]).cls
        assert torch.allclose(out.student_features[4 * v : 4 * v + 4], cls, atol=1e-12)
        q = method.predictor(method.projector(cls))
        assert torch.allclose(out.prediction[4 * v : 4 * v + 4], q, atol=1e-12)
        cos = F.normalize(q, dim=-1) @ k.T
        if loss == "byol":
            total += (2 - 2 * cos.diagonal()).mean() / 3
        else:
            total += -2 * 0.2 * torch.log_softmax(cos / 0.2, -1).diagonal().mean() / 3
    assert torch.allclose(out.loss, total, rtol=1e-12)
    assert not any(x.requires_grad for x in out[1:]) and out.loss.requires_grad


@pytest.mark.parametrize("loss", ["byol", "infonce"])
def test_decorrelation(loss):
    outs = []
    for weight in (0.0, 0.3):
        cfg = c.from_dict({"head": {"decorrelation": weight}}, tiny(loss))
        torch.manual_seed(0)
        method = apart(ExtreMA(cfg))
        outs.append(method(*batch(cfg)))
        outs[-1].loss.backward()
        outs.append(method.student.cls_token.grad)
    plain, gradient, out, other = outs
    assert torch.allclose(out.loss, plain.loss + 0.3 * correlation(out.student_features), rtol=1e-12)
    assert not torch.allclose(gradient, other)
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("loss", ["byol", "infonce"])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(loss):
    cfg = tiny(loss)
    method = apart(ExtreMA(cfg))
    method(*batch(cfg)).loss.backward()
    for name, p in method.student_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith("attn.k.bias"):
            assert p.grad.abs().max() > 0, name
    for name, p in method.teacher_branch.named_parameters():
        assert not p.requires_grad and p.grad is None, name
    named = {n for n, _ in method.student_parameters()}
    assert {"encoder.cls_token", "projector.6.weight", "predictor.3.bias"} <= named
    assert len(named) == len(list(method.student_branch.parameters()))


def test_the_teacher_never_trains_and_never_drops_paths():
    cfg = c.from_dict({"model": {"drop_path": 0.9}}, tiny())
    method = ExtreMA(cfg)
    method.train()
    assert method.student.training
    assert not any(m.training for m in method.teacher_branch.modules())
    images = torch.randn(4, 3, 16, 24)
    first, second = method.teacher_branch(images), method.teacher_branch(images)
    assert torch.equal(first[0], second[0])
    # the student draws new numbers at every pass
    keep = draw_views(4, 6, 2, 3)
    assert not torch.equal(method.student_branch(images, keep)[1], method.student_branch(images, keep)[1])
    method.eval()
    assert torch.equal(method.teacher_branch(images)[0], first[0])


def test_path_factors_reach_the_student_alone():
    cfg = tiny()
    method = apart(ExtreMA(cfg))
    a, t, keep = batch(cfg)
    scale = drop_path_scale(torch.arange(4), 3, 2, 0.5, seed=0, epoch=0)
    plain, dropped = method(a, t, keep), method(a, t, keep, scale)
    assert torch.equal(plain.target, dropped.target)
    rows = (scale != 1).any(0).any(0)
    assert rows.any() and torch.equal(plain.student_features[~rows], dropped.student_features[~rows])
    assert (plain.student_features[rows] != dropped.student_features[rows]).any(-1).all()


# ---- the teacher's update -------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.0, 0.3, 0.996, 1.0])
def test_update_is_the_moving_average_of_encoder_and_projector(m):
    method = apart(ExtreMA(tiny()))
    other = apart(ExtreMA(tiny()))
    other.load_state_dict(method.state_dict())
    before = {n: p.clone() for n, p in method.teacher_branch.named_parameters()}
    student = {n: p.detach().clone() for n, p in method.student_branch.named_parameters()}
    addresses = [p.data_ptr() for p in method.teacher_branch.parameters()]
    method.ema_update(1 - m)
    # a tensor, which a captured graph reads, gives the same
    other.ema_update(torch.tensor(1 - m, dtype=torch.float64))
    twin = dict(other.teacher_branch.named_parameters())
    assert {n.split(".")[0] for n in before} == {"encoder", "projector"}
    for n, p in method.teacher_branch.named_parameters():
        assert torch.allclose(p, m * before[n] + (1 - m) * student[n], rtol=1e-12, atol=1e-15), n
        assert not p.requires_grad and torch.equal(p, twin[n])
        if m in (0.0, 1.0):
            # exactly: the ends must not drift by rounding
            assert torch.equal(p, before[n] if m else student[n]), n
    # in place, so that captured graphs and optimizers keep their pointers
    assert [p.data_ptr() for p in method.teacher_branch.parameters()] == addresses
    assert all(torch.equal(p, student[n]) for n, p in method.student_branch.named_parameters())


def test_the_first_update_changes_nothing():
    method = ExtreMA(tiny())
    for name, p in method.teacher_branch.named_parameters():
        assert torch.equal(p, dict(method.student_branch.named_parameters())[name])
    before = [p.clone() for p in method.teacher_branch.parameters()]
    method.ema_update(1 - 0.996)
    assert all(torch.equal(a, b) for a, b in zip(before, method.teacher_branch.parameters(), strict=True))
    # a copy, not a second name for the student
    with torch.no_grad():
        method.student.cls_token.add_(1)
    assert not torch.equal(method.student.cls_token, method.teacher.cls_token)


# ---- initial weights ------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = ExtreMA(tiny(seed=5)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(11)
    b, other = ExtreMA(tiny(seed=5)).state_dict(), ExtreMA(tiny(seed=6)).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for key in ("encoder.cls_token", "projector.0.weight", "predictor.3.weight"):
        assert not torch.equal(a[f"student_branch.{key}"], other[f"student_branch.{key}"])
    # an encoder alone has the same weights
    cfg = tiny(seed=5)
    method, encoder = ExtreMA(cfg), build_encoder(cfg.model, 5)
    for mine in (method.student, method.teacher):
        assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in mine.state_dict().items())
    assert method.student.mean == cfg.data.mean and method.teacher.std == cfg.data.std


# ---- micro-batches --------------------------------------------------------------------------------


@LOSSES
def test_micro_batches_equal_the_whole_batch(loss, targets):
    cfg = tiny(loss, targets)
    method = apart(ExtreMA(cfg))
    student_images, teacher_images, keep = batch(cfg, 8)
    scale = drop_path_scale(torch.arange(8), 3, 2, 0.5, seed=0, epoch=0)
    whole = method(student_images, teacher_images, keep, scale).loss
    whole.backward()
    wanted = {n: p.grad.clone() for n, p in method.student_parameters()}
    method.zero_grad()

    size, total = 2, 0.0
    targets = torch.cat([method.teacher_branch(teacher_images[i : i + size])[0] for i in range(0, 8, size)])
    for i in range(0, 8, size):
        rows = torch.arange(i, i + size)
        part_scale = drop_path_scale(rows, 3, 2, 0.5, seed=0, epoch=0)
        prediction, _ = method.student_branch(student_images[rows], keep[:, rows], part_scale)
        part = method.loss(prediction, targets, size, i) / 4
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, p in method.student_parameters():
        assert (p.grad - wanted[name]).abs().max() <= 1e-12 * largest, name
