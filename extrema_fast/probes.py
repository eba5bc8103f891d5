"""Measures of a feature matrix: k-NN, linear probe, collapse indicators (method.md sections 7 and 10).

Functions of tensors only; nothing here knows about encoders, images or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from .errors import NonFiniteError, UsageError

L2_GRID = (0.3, 0.03, 3e-3, 3e-4, 3e-5, 3e-6)
"""Strengths the probe tries, strong to weak: coefficient of |W|^2 / 2 beside the mean cross-entropy."""


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy in 0..1 and the L2 strength the held-out part chose."""

    accuracy: float
    l2: float


def _check_features(name: str, x: Tensor, y: Tensor | None = None) -> None:
    if x.ndim != 2 or not len(x):
        raise UsageError(f"{name}: expected features [n, d] with n >= 1, got {tuple(x.shape)}")
    bad = int((~x.isfinite()).any(1).sum())
    if bad:
        raise NonFiniteError(
            f"{name}: {bad} of {len(x)} feature rows are not finite; the weights have diverged: "
            "go back to an earlier checkpoint, or lower optim.base_lr"
        )
    if y is not None and (y.ndim != 1 or len(y) != len(x)):
        raise UsageError(f"{name}: expected {len(x)} labels, one per row, got {tuple(y.shape)}")


@torch.no_grad()
def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Weighted k-nearest-neighbour accuracy: cosine similarity s, vote exp(s / temperature).

    train_x, test_x: [n, d] any float dtype, on one device; train_y, test_y: [n] int64
    k is lowered to the size of the training set when that is smaller
    returns accuracy in 0..1
    raises  NonFiniteError for NaN or infinite features, UsageError for shapes that do not fit
    """
    _check_features("train features", train_x, train_y)
    _check_features("test features", test_x, test_y)
    if k < 1 or temperature <= 0:
        raise UsageError(f"k-NN: expected k >= 1 and temperature > 0, got k={k}, temperature={temperature}")
    bank = F.normalize(train_x.float(), dim=1)
    queries = F.normalize(test_x.float(), dim=1)
    labels, truth = train_y.to(bank.device), test_y.to(bank.device)
    classes = int(max(labels.max(), truth.max())) + 1
    # 16 M similarities at a time: 64 MB
    chunk = max(1, (1 << 24) // len(bank))
    right = 0
    for q, t in zip(queries.split(chunk), truth.split(chunk), strict=True):
        top, index = (q @ bank.T).topk(min(k, len(bank)), dim=1)
        # the shift keeps exp finite at any temperature and cancels in the comparison
        weight = ((top - top[:, :1]) / temperature).exp()
        votes = torch.zeros(len(q), classes, device=q.device).scatter_add_(1, labels[index], weight)
        right += int((votes.argmax(1) == t).sum())
    return right / len(queries)


def held_out(labels: Tensor, share: float = 0.2, seed: int = 0) -> Tensor:
    """[n] bool: a keyed, stratified part; every class keeps at least one row outside it."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    order = rng.permutation(len(labels), seed=seed, epoch=0)
    shuffled = labels.cpu()[order]
    for c in shuffled.unique():
        rows = order[shuffled == c]
        held[rows[: min(len(rows) - 1, round(len(rows) * share))]] = True
    return held


def _fit_softmax(x: Tensor, y: Tensor, l2: float, start: Tensor, power: Tensor) -> Tensor:
    """Minimises mean cross-entropy + l2 |W|^2 / 2 by L-BFGS; the last row of W, the bias, is free.

    x: [n, d] with uncorrelated columns of mean square `power` [d]; start, result: [d + 1, classes]
    """
    n, classes = len(x), start.shape[1]
    # The Hessian is about diag(power / classes + l2) in this basis. Dividing by its root makes every
    # direction equally curved, so that L-BFGS needs tens of steps even on highly correlated features.
    scale = torch.cat([(power / classes + l2).rsqrt(), power.new_full((1,), math.sqrt(classes))])[:, None]
    decay = torch.full_like(scale, l2)
    decay[-1] = 0
    v = start / scale
    v.grad = torch.zeros_like(v)
    optimizer = torch.optim.LBFGS(
        [v],
        max_iter=150,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> float:
        w = v * scale
        logits = torch.addmm(w[-1], x, w[:-1])
        logp = F.log_softmax(logits, dim=1)
        loss = F.nll_loss(logp, y) + 0.5 * (decay * w * w).sum()
        error = logp.exp()
        error[torch.arange(n, device=x.device), y] -= 1
        grad = torch.cat([x.T @ error, error.sum(0, keepdim=True)]) / n + decay * w
        v.grad.copy_(grad * scale)
        return float(loss)

    optimizer.step(closure)
    return (v * scale).detach()


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0
) -> ProbeResult:
    """Multinomial logistic regression on standardised features, fitted until the loss stands still.

    train_x, test_x: [n, d] float; train_y, test_y: [n] int64
    Each dimension is standardised with the training set's statistics (a BatchNorm without affine
    part). The strength of L2 is chosen among `L2_GRID` on a stratified fifth of the training set
    keyed by `seed`, then all of it is fitted. Deterministic; fp64 for small problems, else fp32.
    raises  NonFiniteError for NaN or infinite features, UsageError for shapes that do not fit or
            a single class
    """
    _check_features("train features", train_x, train_y)
    _check_features("test features", test_x, test_y)
    dtype = torch.float64 if train_x.numel() <= 2e7 else torch.float32
    x, y = train_x.to(dtype), train_y.to(train_x.device)
    classes = int(max(train_y.max(), test_y.max())) + 1
    if len(train_y.unique()) < 2:
        raise UsageError("linear probe: the training labels hold one class only; it needs two or more")
    var, mean = torch.var_mean(x, dim=0, correction=0)
    inv_std = (var + 1e-6).rsqrt()
    x = (x - mean) * inv_std
    # rotate to principal axes; the null space carries no weight under L2 and is dropped exactly
    n, d = x.shape
    if d <= n:
        power, axes = torch.linalg.eigh(x.T @ x / n)
    else:
        power, axes = torch.linalg.eigh(x @ x.T / n)
        axes = x.T @ axes * (n * power).clamp_min(1e-30).rsqrt()
    used = power > power[-1].clamp_min(1e-30) * (1e-12 if dtype == torch.float64 else 1e-6)
    power, axes = power[used], axes[:, used]
    x = x @ axes

    held = held_out(train_y, seed=seed).to(x.device)
    weights = x.new_zeros(x.shape[1] + 1, classes)
    best, best_accuracy, chosen = weights, -1.0, L2_GRID[2]
    if held.any():
        fit_x, fit_y, val_x, val_y = x[~held], y[~held], x[held], y[held]
        for l2 in L2_GRID:
            weights = _fit_softmax(fit_x, fit_y, l2, weights, power)
            accuracy = _accuracy(val_x, val_y, weights)
            # a tie stays with the stronger, earlier one; well past the peak the rest is not worth its time
            if accuracy > best_accuracy:
                best, best_accuracy, chosen = weights, accuracy, l2
            elif accuracy < best_accuracy - 0.02:
                break
    weights = _fit_softmax(x, y, chosen, best, power)
    test = (test_x.to(dtype) - mean) * inv_std @ axes
    return ProbeResult(_accuracy(test, test_y.to(x.device), weights), chosen)


def _accuracy(x: Tensor, y: Tensor, weights: Tensor) -> float:
    return float((torch.addmm(weights[-1], x, weights[:-1]).argmax(1) == y).double().mean())


@torch.no_grad()
def indicators(x: Tensor) -> dict[str, float]:
    """Is a set of features collapsed? (method.md section 10)

    x: [n, d] float, n >= 2; rows are L2-normalised first
    returns std     sqrt(d) times the mean deviation per dimension: 1 isotropic, 0 constant
            rank    exp(entropy of the singular values as shares): 1 .. min(n, d)
            cosine  mean over pairs of different rows: 1 constant, about 0 isotropic
    raises  NonFiniteError for NaN or infinite features, UsageError for fewer than two rows
    """
    _check_features("features", x)
    n, d = x.shape
    if n < 2:
        raise UsageError(f"features: collapse indicators need at least 2 rows, got {n}")
    x = F.normalize(x.double(), dim=1)
    gram = x.T @ x if d <= n else x @ x.T
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum().clamp_min(1e-300)
    off_diagonal = x.sum(0).square().sum() - x.square().sum()
    return {
        "std": float(math.sqrt(d) * x.std(0, correction=0).mean()),
        "rank": float(torch.special.entr(p).sum().exp()),
        "cosine": float(off_diagonal / (n * (n - 1))),
    }


def attention_entropy(attention: Tensor) -> float:
    """Mean entropy of attention rows over its maximum, in 0..1; attention: [..., n] probabilities."""
    return float(torch.special.entr(attention.float()).sum(-1).mean() / math.log(attention.shape[-1]))
