"""Linear-probe protocols on cached features: the paper's, and two current ones.

`paper` uses one learning rate and selects nothing. `grid` (DINOv2's linear evaluation) trains heads with many learning
rates on all kinds of features at once. `logistic` (the low-label protocol of DINOv2 and MSN) is L2-regularized logistic
regression by L-BFGS, which has neither a learning rate nor a sample order. The latter two select on a fifth of the
training images, never on test images, and then retrain the selected setting on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import rng
from ..data.sources import ImageSource
from ..distributed import double
from ..errors import UsageError, counted
from ..files import read_text
from ..progress import ImageProgress
from .probes import PAPER_RATE, Heads, accuracy, check_pair, probe_predictions, train_heads

# at a batch of 256, below and above DINOv2's 1e-5 to 0.1, whose features are not standardized
RATES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# scikit-learn's C; DINOv2, without standardizing, goes on to 1e5
STRENGTHS = tuple(10.0**e for e in range(-6, 2))
# no epoch of training has these numbers
_LABELS_EPOCH, _VALIDATION_EPOCH = 2**32 - 2, 2**32 - 3


class Probed(NamedTuple):
    """What a probe says of the test images: [m] int64; and what it has chosen, with the accuracy that it chose by."""

    predicted: Tensor
    chosen: float | None = None
    validation: float | None = None


def probe(
    protocol: str,
    train: Mapping[str, Tensor],
    train_y: Tensor,
    test: Mapping[str, Tensor],
    test_y: Tensor,
    seed: int = 0,
) -> dict[str, Probed]:
    """Linear probe of each kind of features.

    Args:
        protocol: `paper`, `grid` or `logistic`.
        train, test: [n, d] and [m, d] float of each kind, on one device.
        train_y, test_y: [n] and [m] int64.
        seed: Decides order, first weights and which images validate.

    Returns:
        For each kind its predictions, and for `grid` the rate, for `logistic` C. Where no class has two training
        images, nothing can be chosen: the paper's rate, or C = 1, and `validation` is None.

    Raises:
        NonFiniteError: NaN or infinite features.
        UsageError: Shapes that do not fit, or a single class.
    """
    if protocol == "paper":
        return {
            kind: Probed(probe_predictions(x, train_y, test[kind], test_y, seed)) for kind, x in train.items()
        }
    for kind, x in train.items():
        check_pair(x, train_y, test[kind], test_y)
    if len(train_y.unique()) < 2:
        raise UsageError("linear probe: the training labels hold one class only; it needs two or more")
    classes = int(max(train_y.max(), test_y.max())) + 1
    kept, held = split(train_y, seed)
    values, usual = (RATES, PAPER_RATE) if protocol == "grid" else (STRENGTHS, 1.0)

    def fit(features: Sequence[Tensor], y: Tensor, tried: Sequence[float], what: str) -> list[Heads]:
        if protocol == "grid":
            return train_heads(features, y, classes, tried, seed, what=what)
        return [logistic(x, y, classes, tried) for x in features]

    choices: list[tuple[float, float | None]] = [(usual, None)] * len(train)
    if len(held):
        tried = fit([x[kept] for x in train.values()], train_y[kept], values, "probe, all rates")
        choices = [
            _best(values, heads(x[held]).argmax(2), train_y[held])
            for heads, x in zip(tried, train.values(), strict=True)
        ]
    out = {}
    for (kind, x), (chosen, validation) in zip(train.items(), choices, strict=True):
        (final,) = fit([x], train_y, (chosen,), "linear probe")
        out[kind] = Probed(final(test[kind])[:, 0].argmax(1).cpu(), chosen, validation)
    return out


def _best(values: Sequence[float], predicted: Tensor, truth: Tensor) -> tuple[float, float]:
    """(the value whose predictions [m, values] are right most often, the share); the smallest of equal ones."""
    right = [accuracy(p, truth) for p in predicted.T]
    best = max(range(len(values)), key=lambda i: right[i])
    return values[best], right[best]


def split(labels: Tensor, seed: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows to validate on) of [n] int64 labels, a share of each class, keyed by the seed.

    A class of one image only trains; any other gives one image at least.
    """
    held = _of_each_class(labels, seed, _VALIDATION_EPOCH, lambda n: 0 if n < 2 else max(1, round(share * n)))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[held] = True
    return (~mask).nonzero()[:, 0], held


def _of_each_class(labels: Tensor, seed: int, epoch: int, count: Callable[[int], int]) -> Tensor:
    """Sorted rows: of each class the first `count(its size)` in an order keyed by seed and epoch."""
    order = rng.permutation(len(labels), seed=seed, epoch=epoch)
    labels = labels.cpu()[order]
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique().tolist()]
    return order[torch.cat([r[: count(len(r))] for r in rows])].sort().values


# ---- logistic regression ---------------------------------------------------------------------------


@torch.no_grad()
def logistic(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], iterations: int = 300) -> Heads:
    """Multinomial logistic regression on standardized features, as scikit-learn's `LogisticRegression` minimizes it.

    0.5 |W|^2 + C * (sum of the cross-entropies), bias free of penalty, by L-BFGS in fp64 from zero; each strength
    starts at the solution of the one before.

    Args:
        x: [n, d] float.
        y: [n] int64.
        strengths: C, ascending.
        iterations: Of L-BFGS, at most, for each strength.

    Returns:
        A classifier for each strength.
    """
    x = double(x)
    y = y.to(x.device)
    var, mean = torch.var_mean(x, dim=0, correction=0)
    # a constant feature stays 0, as in scikit-learn's StandardScaler
    inv_std = torch.where(var > 0, var, torch.ones_like(var)).rsqrt()
    inputs = torch.cat([(x - mean) * inv_std, torch.ones_like(x[:, :1])], 1)
    weights = torch.zeros(inputs.shape[1], classes, dtype=x.dtype, device=x.device)
    found = []
    with ImageProgress("logistic regression", len(strengths), unit="strengths") as bar:
        for strength in strengths:
            _minimize(weights, inputs, y, 1 / (len(x) * strength), iterations)
            found.append(weights.clone())
            bar.advance(1)
    return Heads(mean, inv_std, torch.stack(found, 1).flatten(1), len(strengths))


def _minimize(weights: Tensor, inputs: Tensor, y: Tensor, penalty: float, iterations: int) -> None:
    """Brings weights [d + 1, classes] to the least mean cross-entropy plus 0.5 `penalty` |W without bias|^2."""
    every = torch.arange(len(inputs), device=inputs.device)

    def loss() -> Tensor:
        logs = (inputs @ weights).log_softmax(1)
        error = logs.exp()
        error[every, y] -= 1
        penalized = weights.clone()
        penalized[-1] = 0
        weights.grad = inputs.T @ error / len(inputs) + penalty * penalized
        return 0.5 * penalty * penalized.square().sum() - logs[every, y].mean()

    torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    ).step(loss)


# ---- few labels ------------------------------------------------------------------------------------


def few_labels(source: ImageSource, labels: str, seeds: Sequence[int]) -> list[Tensor]:
    """The rows whose labels a low-label evaluation uses, for each seed: [k] int64, ascending.

    Args:
        source: Training images with labels.
        labels: A share above 0 and below 1: that of each class, one image at least; with the same seed a smaller share
            is part of a larger one. Or a text file that names an image in each line (ImageNet's lists of 1 % and
            10 %), by its last parts and with or without an ending: the same rows for every seed.
        seeds: Of the choice.

    Raises:
        UsageError: Neither a share nor a file, names that fit no image or several, or a single class.
    """
    assert source.labels is not None
    try:
        share = float(labels)
    except ValueError:
        rows = _listed(source, labels)
        if len(source.labels[rows].unique()) < 2:
            raise UsageError(
                f"labels: {labels} names images of one class only; a probe needs two or more"
            ) from None
        return [rows] * len(seeds)
    if not 0 < share < 1:
        raise UsageError(f"labels: expected a share above 0 and below 1, or a file, got {labels}")
    return [
        _of_each_class(source.labels, seed, _LABELS_EPOCH, lambda n: max(1, round(share * n)))
        for seed in seeds
    ]


def _listed(source: ImageSource, file: str) -> Tensor:
    if not Path(file).is_file():
        raise UsageError(
            f"labels: expected a share (0.01) or a text file that names an image in each line, got {file!r}, which is "
            "neither"
        )
    wanted = [Path(line.strip()) for line in read_text(Path(file)).splitlines() if line.strip()]
    if not wanted:
        raise UsageError(f"labels: {file} is empty; expected the name of an image in each line")
    # by name without its ending: packed images may have another
    of_stem: dict[str, list[int]] = {}
    for row in range(len(source)):
        of_stem.setdefault(Path(source.title(row)).stem, []).append(row)
    rows, missing = set(), []
    for name in wanted:
        above = name.parts[:-1]
        fit = [
            r
            for r in of_stem.get(name.stem, [])
            if not above or Path(source.title(r)).parts[-len(above) - 1 : -1] == above
        ]
        if len(fit) > 1:
            raise UsageError(
                f"labels: {file}: {name} fits {len(fit)} images, as {source.title(fit[0])}; name the class folder, too"
            )
        if not fit:
            missing.append(name)
        rows.update(fit)
    if missing:
        raise UsageError(
            f"labels: {counted(len(missing), 'name')} of {len(wanted)} in {file} fit no image of {source.name}, "
            f"first: {missing[0]}; give the images that the list was made for"
        )
    return torch.tensor(sorted(rows))
