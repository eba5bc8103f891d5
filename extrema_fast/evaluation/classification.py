"""Evaluation of a classifier: accuracy, loss, accuracy per class, and which classes are confused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DataConfig
from ..data.augment import normalize
from ..data.bad_images import BadRows
from ..data.loader import EvalLoader
from ..data.sources import ImageSource
from ..errors import NonFiniteError
from ..files import fits
from ..models.encoder import Encoder
from ..ops import dispatch as ops
from ..progress import ImageProgress
from .result import per_class

# classes up to which a result holds the whole table of confusions
MATRIX = 30


class Classified(NamedTuple):
    """Predictions for images.

    Attributes:
        predicted: [n] int64 on the CPU.
        labels: [n] int64, the true classes.
        top5: how many have their class among the first five.
        loss: mean cross-entropy.
    """

    predicted: Tensor
    labels: Tensor
    top5: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the images that are right."""
        return float((self.predicted == self.labels).double().mean())


@ops.allow_fallback()
@torch.inference_mode()
def classify(
    encoder: Encoder,
    source: ImageSource,
    cfg: DataConfig,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    told: set[str] | None = None,
) -> Classified:
    """Classes of all images that can be read, by an encoder with a head; its training flags are restored.

    Args:
        encoder: on `device`.
        source: images with labels, numbered as the head's outputs are.
        cfg: how they are read and normalized.
        told: of `BadRows.tell`: names of images that the log need not say again.

    Raises:
        NonFiniteError: logits that are not finite.
        DataError: no image can be read.
    """
    assert source.labels is not None
    modes = [(m, m.training) for m in encoder.modules()]
    encoder.eval()
    bad = BadRows(source, 1.0, warn=False)
    predicted, rows, total, top5 = [], [], 0.0, 0
    loader = EvalLoader(
        source,
        cfg,
        encoder.img_size,
        batch_size=batch_size,
        device=device,
        bad=bad,
        resizing=encoder.resizing(),
    )
    try:
        with ImageProgress(f"classifying {source.name}", len(source)) as bar:
            for images, index in loader:
                logits = (
                    encoder(normalize(images.to(device), cfg.mean, cfg.std, encoder.in_chans)).float().cpu()
                )
                if not logits.isfinite().all():
                    raise NonFiniteError(
                        f"{source.name}: logits are not finite; the weights have diverged: go back to an earlier "
                        "checkpoint, or lower optim.base_lr"
                    )
                labels = source.labels[index]
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                first = logits.topk(min(5, logits.shape[1])).indices
                predicted.append(first[:, 0])
                top5 += int((first == labels[:, None]).sum())
                rows.append(index)
                bar.advance(len(index))
    finally:
        for module, mode in modes:
            module.training = mode
    bad.tell(told)
    truth = source.labels[torch.cat(rows)]
    return Classified(torch.cat(predicted), truth, top5, total / len(truth))


def describe(found: Classified, classes: list[str], step: int) -> dict[str, Any]:
    """The result as plain data: accuracies (shares), loss, and by class."""
    n, images = len(classes), len(found.labels)
    result: dict[str, Any] = {
        "format": 1,
        "step": step,
        "images": images,
        "classes": n,
        "accuracy": found.accuracy,
        "top5": found.top5 / images if n > 5 else None,
        "loss": found.loss,
        "per_class": per_class({"accuracy": found.predicted}, found.labels, classes),
    }
    if n <= MATRIX:
        counts = torch.bincount(n * found.labels + found.predicted, minlength=n * n)
        result["confusion"] = counts.view(n, n).tolist()
    return result


_RESULT = {
    "step": int,
    "images": int,
    "classes": int,
    "accuracy": float,
    "top5": (float, None),
    "loss": float,
    "per_class": {
        "names": [str],
        "images": [int],
        "accuracy": [(float, None)],
        "confusions": {"accuracy": [[int, int, int]]},
    },
    "confusion?": [[int]],
}


def is_classification(data: Any) -> bool:
    """Whether plain data from a file has the shape of what `describe` returns."""
    if not fits(data, _RESULT):
        return False
    n, found = data["classes"], data["per_class"]
    sizes = {len(found[k]) for k in ("names", "images", "accuracy")} | {
        len(r) for r in data.get("confusion", ())
    }
    right = all(0 <= c < n for pair in found["confusions"]["accuracy"] for c in pair[:2])
    return sizes == {n} and len(data.get("confusion", found["names"])) == n and right


def format_classes(result: dict[str, Any]) -> str:
    """The result as plain text: accuracy, then the classes, the hardest first, twenty at most."""
    found = result["per_class"]
    top5 = "" if result["top5"] is None else f", {100 * result['top5']:.1f} % among the first five"
    lines = [f"accuracy {100 * result['accuracy']:.1f} % on {result['images']} test images{top5}"]
    rows = sorted(
        (a, name, n)
        for a, name, n in zip(*(found[k] for k in ("accuracy", "names", "images")), strict=True)
        if n
    )
    width = max(len(name) for _, name, _ in rows)
    lines += [f"  {name:<{width}}  {100 * a:5.1f} % of {n}" for a, name, n in rows[:20]]
    return "\n".join(lines + (["  ..."] if len(rows) > 20 else []))
