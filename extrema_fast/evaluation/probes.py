"""Metrics of a feature matrix: k-NN, linear probe, collapse indicators.

Pure functions of tensors, independent of encoders, images and files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import double
from ..errors import NonFiniteError, UsageError
from ..progress import ImageProgress

# of the linear probe, as in the paper
EPOCHS, WARMUP_EPOCHS, PAPER_RATE = 90, 10, 0.1


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


def check_pair(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raises what `knn_predictions` does of features that cannot be used or are not of one model."""
    _check_features("train features", train_x, train_y)
    _check_features("test features", test_x, test_y)
    if train_x.shape[1] != test_x.shape[1]:
        raise UsageError(
            f"test features: {test_x.shape[1]} numbers per image, train features have {train_x.shape[1]}: they are "
            "of different models; compute both with the same weights"
        )


@torch.no_grad()
def knn(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in 0..1 of `knn_predictions`, whose arguments and errors these are."""
    return accuracy(knn_predictions(train_x, train_y, test_x, test_y, k, temperature), test_y)


@torch.no_grad()
def knn_predictions(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Weighted k-nearest-neighbor classification: cosine similarity s, vote exp(s / temperature).

    Args:
        train_x, train_y: [n, d] any float dtype, [n] int64.
        test_x, test_y: [m, d] and [m], on the device of `train_x`.
        k: Lowered to the size of the training set when that is smaller.
        temperature: Of the votes.

    Returns:
        [m] int64, the class of each test image, on the CPU.

    Raises:
        NonFiniteError: NaN or infinite features.
        UsageError: Shapes that do not fit.
    """
    check_pair(train_x, train_y, test_x, test_y)
    if k < 1 or temperature <= 0:
        raise UsageError(f"k-NN: expected k >= 1 and temperature > 0, got k={k}, temperature={temperature}")
    bank = F.normalize(train_x.float(), dim=1)
    queries = F.normalize(test_x.float(), dim=1)
    labels = train_y.to(bank.device)
    classes = int(max(train_y.max(), test_y.max())) + 1
    # 16 M similarities at a time: 64 MB
    chunk = max(1, (1 << 24) // len(bank))
    predicted = []
    with ImageProgress("k-NN", len(queries)) as bar:
        for q in queries.split(chunk):
            top, index = (q @ bank.T).topk(min(k, len(bank)), dim=1)
            # the shift keeps exp finite at any temperature and cancels in the comparison
            weight = ((top - top[:, :1]) / temperature).exp()
            votes = torch.zeros(len(q), classes, device=q.device).scatter_add_(1, labels[index], weight)
            predicted.append(votes.argmax(1).cpu())
            bar.advance(len(q))
    return torch.cat(predicted)


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of equal entries of two [m] int64."""
    return int((predicted.cpu() == truth.cpu()).sum()) / len(truth)


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> float:
    """Accuracy in 0..1 of `probe_predictions`, whose arguments and errors these are."""
    return accuracy(probe_predictions(train_x, train_y, test_x, test_y, seed), test_y)


def probe_predictions(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0
) -> Tensor:
    """What a linear classifier on frozen features says, trained by the paper's rule (`train_heads`, one rate).

    Unlike the paper's, the features are those of one center crop per image, computed once.

    Args:
        train_x, train_y: [n, d] float, [n] int64.
        test_x, test_y: [m, d] float, [m] int64.
        seed: Decides order and first weights.

    Returns:
        [m] int64, the class of each test image, on the CPU.

    Raises:
        NonFiniteError: NaN or infinite features.
        UsageError: Shapes that do not fit, or a single class.
    """
    check_pair(train_x, train_y, test_x, test_y)
    if len(train_y.unique()) < 2:
        raise UsageError("linear probe: the training labels hold one class only; it needs two or more")
    classes = int(max(train_y.max(), test_y.max())) + 1
    (heads,) = train_heads([train_x], train_y, classes, (PAPER_RATE,), seed)
    return heads(test_x)[:, 0].argmax(1).cpu()


class Heads(NamedTuple):
    """Linear classifiers of one kind of features, one for each learning rate.

    Attributes:
        mean, inv_std: [d], of the training features.
        weights: [d + 1, rates * classes]; the last row is the bias.
        rates: How many there are.
    """

    mean: Tensor
    inv_std: Tensor
    weights: Tensor
    rates: int

    def __call__(self, x: Tensor) -> Tensor:
        """[m, d] features to [m, rates, classes] logits."""
        x = (x.to(self.mean) - self.mean) * self.inv_std
        return torch.addmm(self.weights[-1], x, self.weights[:-1]).view(len(x), self.rates, -1)


@torch.no_grad()
def train_heads(
    features: Sequence[Tensor],
    targets: Tensor,
    classes: int,
    rates: Sequence[float] = (PAPER_RATE,),
    seed: int = 0,
    *,
    what: str = "linear probe",
) -> list[Heads]:
    """Trains linear classifiers on several kinds of features and at several learning rates at once.

    The paper's rule: features are standardized with the training set's statistics (a BatchNorm without affine part);
    weights start at N(0, 0.01); SGD with momentum 0.9 and no decay, `rate * batch / 256`, 10 epochs of warm-up, cosine
    to 0 over 90 epochs. The batch is the paper's 4096, or an eighth of a smaller set. All classifiers see the same
    batches; those of one kind of features are the columns of one matmul.

    Args:
        features: [n, d] float of each kind, rows of the same images.
        targets: [n] int64 classes, or [n, classes] float: a share for each class, whose sum is the row's weight.
        classes: How many there are.
        rates: Learning rates at a batch of 256.
        seed: Decides order and first weights.

    Returns:
        The classifiers of each kind of features.
    """
    device, n = features[0].device, len(features[0])
    generator = torch.Generator().manual_seed(seed)
    heads, inputs = [], []
    for x in features:
        var, mean = torch.var_mean(x.float(), dim=0, correction=0)
        inv_std = (var + 1e-5).rsqrt()
        inputs.append((x.float() - mean) * inv_std)
        first = torch.zeros(x.shape[1] + 1, classes)
        first[:-1] = torch.randn(x.shape[1], classes, generator=generator) * 0.01
        heads.append(Heads(mean, inv_std, first.repeat(1, len(rates)).to(device), len(rates)))
    velocities = [torch.zeros_like(h.weights) for h in heads]
    targets = targets.to(device)
    batch = min(4096, max(1, n // 8))
    per_epoch = n // batch
    every = torch.arange(batch, device=device)
    with ImageProgress(what, EPOCHS, unit="epochs") as bar:
        for epoch in range(EPOCHS):
            order = torch.randperm(n, generator=generator).to(device)
            for i in range(per_epoch):
                rows = order[i * batch : (i + 1) * batch]
                now = [_probe_rate(rate * batch / 256, epoch + i / per_epoch) for rate in rates]
                step = torch.tensor(now, dtype=torch.float32).repeat_interleave(classes).to(device)
                target = targets[rows]
                for head, x, velocity in zip(heads, inputs, velocities, strict=True):
                    batch_x = x[rows]
                    # gradient of the mean cross-entropy: softmax minus target
                    logits = torch.addmm(head.weights[-1], batch_x, head.weights[:-1])
                    error = logits.view(batch, len(rates), classes).softmax(2)
                    if target.ndim == 1:
                        error[every, :, target] -= 1
                    else:
                        error = error * target.sum(1)[:, None, None] - target[:, None]
                    error = error.flatten(1) / batch
                    velocity.mul_(0.9).add_(torch.cat([batch_x.T @ error, error.sum(0, keepdim=True)]))
                    head.weights.sub_(step * velocity)
            bar.advance(1)
    return heads


def _probe_rate(peak: float, epoch: float) -> float:
    if epoch < WARMUP_EPOCHS:
        return peak * epoch / WARMUP_EPOCHS
    return peak * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS))) / 2


@torch.no_grad()
def indicators(x: Tensor) -> dict[str, float]:
    """Is a set of features collapsed?

    Args:
        x: [n, d] float, n >= 2; rows are L2-normalized first.

    Returns:
        std: sqrt(d) times the mean standard deviation per dimension: 1 isotropic, 0 constant.
        rank: exp(entropy of the singular values as shares), 1 to min(n, d).
        cosine: mean over pairs of different rows: 1 constant, about 0 isotropic.

    Raises:
        NonFiniteError: NaN or infinite features.
        UsageError: Fewer than two rows.
    """
    _check_features("features", x)
    n, d = x.shape
    if n < 2:
        raise UsageError(f"features: collapse indicators need at least 2 rows, got {n}")
    x = F.normalize(double(x), dim=1)
    gram = x.T @ x if d <= n else x @ x.T
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum().clamp_min(1e-300)
    off_diagonal = x.sum(0).square().sum() - x.square().sum()
    return {
        "std": float(math.sqrt(d) * x.std(0, correction=0).mean()),
        # not torch.special.entr, which compiles code for a GPU
        "rank": float((-torch.xlogy(p, p).sum()).exp()),
        "cosine": float(off_diagonal / (n * (n - 1))),
    }


def batch_spread(prediction: Tensor, target: Tensor) -> Tensor:
    """How much the outputs of a training batch differ between its images; for a GPU without waiting for it.

    Args:
        prediction: [V b, d] of the student, view-major, b >= 2.
        target: [b, d] of the teacher.

    Returns:
        [4] fp32: spread and dimensions of the predictions, of one view after another, then of the targets. Spread:
        the root of 1 - the mean cosine of two images, 0 constant and 1 isotropic. Dimensions: the participation
        ratio (sum of the variances of the principal directions)^2 / sum of their squares, 1 to b - 1.
    """
    out = []
    for x in (prediction.float().view(-1, *target.shape), target.float()[None]):
        x = F.normalize(x, dim=-1)
        x = x - x.mean(1, keepdim=True)
        # [V, b, b]: its non-zero eigenvalues are the covariance's
        gram = x @ x.mT
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        out += [(trace / (x.shape[1] - 1)).sqrt().mean(), (trace.square() / gram.square().sum((1, 2))).mean()]
    return torch.stack(out)


def attention_entropy(attention: Tensor) -> float:
    """Mean entropy of attention rows over its maximum, in 0..1; attention: [..., n] probabilities."""
    return float(torch.special.entr(attention.float()).sum(-1).mean() / math.log(attention.shape[-1]))
