"""k-NN, linear probe, collapse indicators and warnings; extraction; the evaluate command on a tiny run.

Covers: k-NN against a plain loop; the probe's optimum (zero gradient), its use of the held-out part,
correlated and constant dimensions; NaN, shapes, labels, classes that do not match; indicators of
constant, low-rank and isotropic features; warnings loud on collapse and silent on health; the result
file's cache; nothing random consumed.
"""

from __future__ import annotations

import math

import pytest
import torch

from extrema_fast.collapse import collapse_warnings
from extrema_fast.errors import NonFiniteError, UsageError
from extrema_fast.probes import (
    L2_GRID,
    _fit_softmax,
    attention_entropy,
    held_out,
    indicators,
    knn,
    linear_probe,
)


def blobs(n: int, d: int, classes: int, gap: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(7)) * gap
    y = torch.arange(n) % classes
    return centres[y] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), y


# ---- k-NN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.07)])
def test_knn_equals_a_plain_loop(k, temperature):
    x, y = blobs(120, 6, 4, 0.5, seed=1)
    q, t = blobs(60, 6, 4, 0.5, seed=2)
    right = 0
    for a, truth in zip(q, t, strict=True):
        s = torch.tensor([float(a @ b / a.norm() / b.norm()) for b in x])
        votes = [0.0] * 4
        for i in s.argsort(descending=True)[:k].tolist():
            votes[int(y[i])] += math.exp(float(s[i]) / temperature)
        right += votes.index(max(votes)) == int(truth)
    assert 0.3 < right / 60 < 0.99
    assert knn(x, y, q, t, k, temperature) == pytest.approx(right / 60)


def test_knn_in_chunks_and_at_a_temperature_that_overflows_exp(monkeypatch):
    x, y = blobs(300, 8, 3, 0.4, seed=1)
    q, t = blobs(100, 8, 3, 0.4, seed=2)
    whole = knn(x, y, q, t, k=1)
    assert knn(x, y, q, t, k=7, temperature=1e-4) == pytest.approx(whole)
    assert knn(x * 1e3, y, q * 1e-3, t, k=1) == whole


def test_knn_of_constant_features_is_chance():
    x, y = torch.ones(100, 4), torch.arange(100) % 10
    assert knn(x, y, x, y) <= 0.1 + 1e-9


# ---- linear probe ---------------------------------------------------------------------------------


def test_probe_finds_the_minimum_of_its_objective():
    x, y = blobs(90, 5, 3, 0.6, seed=3)
    x = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    power, axes = torch.linalg.eigh(x.T @ x / len(x))
    x = x @ axes
    w = _fit_softmax(x, y, 0.02, torch.zeros(6, 3, dtype=torch.float64), power).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + 0.01 * w[:-1].square().sum()
    (grad,) = torch.autograd.grad(loss, w)
    assert float(grad.abs().max()) < 1e-4
    assert loss.item() < math.log(3)


def test_probe_separates_what_is_separable_and_not_noise():
    x, y = blobs(300, 16, 5, 2.0, seed=1)
    q, t = blobs(200, 16, 5, 2.0, seed=2)
    assert linear_probe(x, y, q, t).accuracy > 0.97
    noise = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    assert linear_probe(noise, y, noise[:200].flip(0), t).accuracy < 0.45


def test_probe_does_not_see_scale_shift_or_constant_dimensions():
    x, y = blobs(200, 8, 4, 0.5, seed=1)
    q, t = blobs(100, 8, 4, 0.5, seed=2)
    plain = linear_probe(x, y, q, t)
    scale, shift = torch.logspace(-1, 2, 8), torch.arange(8.0) * 10
    other = linear_probe(x * scale + shift, y, q * scale + shift, t)
    assert other.l2 == plain.l2
    assert other.accuracy == pytest.approx(plain.accuracy, abs=0.02)
    with_constant = [torch.cat([a, torch.full((len(a), 3), 5.0)], 1) for a in (x, q)]
    assert linear_probe(with_constant[0], y, with_constant[1], t).accuracy == plain.accuracy


def test_probe_works_with_more_dimensions_than_rows_and_repeats_itself():
    x, y = blobs(40, 200, 4, 0.5, seed=1)
    q, t = blobs(80, 200, 4, 0.5, seed=2)
    first = linear_probe(x, y, q, t, seed=3)
    assert first == linear_probe(x, y, q, t, seed=3)
    assert first.l2 in L2_GRID
    assert first.accuracy > 0.9


def test_held_out_is_stratified_keyed_and_leaves_every_class():
    y = torch.tensor([0] * 50 + [1] * 10 + [2])
    a = held_out(y, 0.2, seed=1)
    assert [int(a[y == c].sum()) for c in range(3)] == [10, 2, 0]
    assert torch.equal(a, held_out(y, 0.2, seed=1))
    assert not torch.equal(a, held_out(y, 0.2, seed=2))


@pytest.mark.parametrize("measure", [knn, linear_probe])
def test_bad_features_are_named(measure):
    x, y = blobs(30, 4, 3, 1.0, seed=1)
    bad = x.clone()
    bad[2:4, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"train features: 2 of 30"):
        measure(bad, y, x, y)
    with pytest.raises(NonFiniteError, match=r"test features: 2 of 30"):
        measure(x, y, bad, y)
    with pytest.raises(UsageError, match="expected 30 labels"):
        measure(x, y[:5], x, y)
    with pytest.raises(UsageError, match="n >= 1"):
        measure(x, y, x[:0], y[:0])


def test_probe_refuses_a_single_class():
    x, _ = blobs(30, 4, 3, 1.0, seed=1)
    y = torch.zeros(30, dtype=torch.long)
    with pytest.raises(UsageError, match="one class"):
        linear_probe(x, y, x, y)


# ---- collapse -------------------------------------------------------------------------------------


def features(kind: str, n: int = 300, d: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g)
    if kind == "constant":
        return torch.randn(1, d, generator=g) + 1e-4 * x
    if kind == "low rank":
        return torch.randn(n, 2, generator=g) @ torch.randn(2, d, generator=g)
    if kind == "random encoder":
        return torch.randn(1, d, generator=g) + 0.1 * x
    return x


def test_indicators_of_known_features():
    eye = indicators(torch.eye(8))
    assert eye["rank"] == pytest.approx(8)
    assert eye["cosine"] == pytest.approx(0, abs=1e-9)
    same = indicators(torch.ones(10, 4) * torch.arange(1, 11)[:, None])
    assert same["std"] == pytest.approx(0, abs=1e-6)
    assert same["rank"] == pytest.approx(1)
    assert same["cosine"] == pytest.approx(1)
    x = features("isotropic")
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = unit @ unit.T
    got = indicators(x)
    assert got["cosine"] == pytest.approx(float((pairs.sum() - pairs.trace()) / (300 * 299)), abs=1e-6)
    assert got["std"] == pytest.approx(1, abs=0.02)
    sigma = torch.linalg.svdvals(unit)
    p = sigma / sigma.sum()
    assert got["rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
    assert indicators(x.T)["rank"] <= 64
    assert indicators(features("low rank"))["rank"] < 2.01


def test_indicators_refuse_nan_and_single_rows():
    with pytest.raises(NonFiniteError):
        indicators(torch.full((3, 2), float("nan")))
    with pytest.raises(UsageError, match="at least 2"):
        indicators(torch.ones(1, 4))


def test_attention_entropy_ends():
    assert attention_entropy(torch.full((2, 3, 5), 0.2)) == pytest.approx(1)
    assert attention_entropy(torch.eye(5)) == 0


def record(kind: str, step: int, **more) -> dict:
    out = {"step": step, "epoch": step, "images": 300, "dim": 64, "proj_dim": 64}
    for part in ("teacher", "teacher_proj", "student", "student_proj"):
        out |= {f"{part}_{k}": v for k, v in indicators(features(kind)).items()}
    return out | more


@pytest.mark.parametrize("start", ["random encoder", "isotropic"])
def test_loud_for_constant_features(start):
    text = "\n".join(collapse_warnings([record(start, 0), record("constant", 1)]))
    for word in ("contracting", "same way", "few directions", "teacher class vector", "optim.base_lr"):
        assert word in text
    assert all("\n" not in w for w in collapse_warnings([record(start, 0), record("constant", 1)]))


def test_loud_for_features_constant_from_the_start():
    assert collapse_warnings([record("constant", 0), record("constant", 1)])


def test_loud_for_low_rank_features():
    for history in (["isotropic", "low rank"], ["random encoder", "isotropic", "low rank"]):
        text = "\n".join(collapse_warnings([record(k, i) for i, k in enumerate(history)]))
        assert "few directions" in text
        assert "same way" not in text


@pytest.mark.parametrize(
    "kinds",
    [
        ["random encoder"],
        ["constant"],
        ["random encoder", "random encoder"],
        ["random encoder", "isotropic", "isotropic"],
        ["isotropic", "isotropic"],
        [],
    ],
)
def test_silent_while_healthy(kinds):
    curve = [0.25, 0.3, 0.45]
    history = [
        record(k, i, knn_cls=curve[i], knn_mean=curve[i], view_cosine=0.999, attention_entropy=0.97)
        for i, k in enumerate(kinds)
    ]
    assert collapse_warnings(history) == []


def test_published_collapse_is_caught_and_published_health_is_not():
    # teacher class vector, method.md section 10: (std, rank, cosine, k-NN)
    def history(*rows):
        names = ("teacher_std", "teacher_rank", "teacher_cosine", "knn_cls")
        return [dict(zip(names, r, strict=True)) | {"dim": 128, "images": 500} for r in rows]

    collapsed = history((0.10, 3.7, 0.987, 0.78), (0.032, 1.4, 0.9995, 0.75))
    assert len(collapse_warnings(collapsed)) == 4
    healthy = history((0.10, 3.7, 0.987, 0.78), (0.56, 15, 0.6, 0.82), (0.76, 30, 0.34, 0.90))
    assert collapse_warnings(healthy) == []


def test_falling_knn():
    def warn(*curve, **kw):
        return collapse_warnings([{"knn_cls": v, "epoch": i} for i, v in enumerate(curve)], **kw)

    assert warn(0.30, 0.25) and "below the random encoder" in warn(0.30, 0.25)[0]
    assert warn(0.30, 0.295) == []
    few = [{"knn_cls": v, "epoch": i, "images": 400} for i, v in enumerate((0.29, 0.275))]
    assert collapse_warnings(few) == []
    assert warn(0.30, 0.25, warmup_epochs=5) == []
    assert "three evaluations in a row" in warn(0.2, 0.6, 0.55, 0.5, 0.45)[0]
    assert warn(0.2, 0.6, 0.55, 0.56, 0.45) == []


def test_pinned_attention_and_trivial_views():
    def warn(last, **kw):
        first = {"epoch": 0, "view_cosine": 0.5, "attention_entropy": 0.97}
        return " ".join(collapse_warnings([first, {"epoch": 1} | last], **kw))

    assert "uniform" in warn({"attention_entropy": 1.0})
    assert "one token" in warn({"attention_entropy": 0.001})
    assert "trivial" in warn({"view_cosine": 0.999}, warmup_epochs=5)
    assert warn({"view_cosine": 0.999, "attention_entropy": 0.9}) == ""
