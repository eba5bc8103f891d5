"""Evaluation during training: k-NN and collapse indicators on fixed subsets."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..data.augment import normalize
from ..data.sources import ImageSource, subset
from ..errors import UsageError
from ..models.extrema import ExtreMA, alone
from ..models.masking import sample_views
from ..ops import dispatch as ops
from .features import Embedded, cap, extract, labeled, load_batch
from .probes import attention_entropy, indicators, knn

log = logging.getLogger(__name__)

STUDENT_IMAGES = 512
VIEW_IMAGES = 256


class OnlineEval(NamedTuple):
    """What an evaluation while training has measured, and the images it has encoded for that."""

    values: dict[str, float | int]
    test: Embedded
    bank: Embedded
    """the training images that k-NN compared with; without k-NN the test images"""


@ops.allow_fallback()
@alone()
@torch.inference_mode()
def online_eval(
    method: ExtreMA,
    train_source: ImageSource | None,
    test_source: ImageSource | None,
    cfg: Config,
    device: str | torch.device = "cpu",
    told: set[str] | None = None,
) -> OnlineEval:
    """k-NN and collapse indicators of student and teacher on fixed subsets; draws no random numbers.

    One teacher pass over `eval.max_train` + `eval.max_test` images; the student sees at most 512.

    Args:
        method: The student and teacher; their training flags are restored.
        train_source: Training images, the k-NN bank; without labels on both sides k-NN is left out.
        test_source: Test images; None: the indicators use training images.
        cfg: The run's configuration.
        device: Where to compute.
        told: What the log need not say again, for the evaluations of a run; what is said is added.

    Returns:
        `values`: knn_cls, knn_mean; {teacher,teacher_proj,student,student_proj}_{std,rank,cosine}; view_cosine,
        attention_entropy; images, dim, proj_dim.

    Raises:
        NonFiniteError: NaN or infinite features.
    """
    held = test_source if test_source is not None else train_source
    if held is None:
        raise UsageError("online evaluation: neither training nor test images were given")
    told = set() if told is None else told
    seed, size = cfg.train.seed, cfg.model.img_size
    modes = [(m, m.training) for m in method.modules()]
    method.eval()
    try:
        test = cap(held, cfg.eval.max_test, seed)
        # a file that breaks while training does not end the run
        args: dict[str, Any] = {"batch_size": cfg.eval.batch_size, "device": device, "strict": False}
        args["told"] = told
        features = extract(method.teacher, test, cfg.data, **args)
        if len(features.rows) < 2:
            raise UsageError(
                f"eval.max_test: an evaluation needs at least 2 images, {held.name} gives {len(features.rows)}; take "
                "more, or leave evaluations out with --eval.every-epochs 0"
            )
        out: dict[str, float | int] = {}
        shown = Embedded(subset(test, features.rows), features.cls)
        known = shown
        both = [s for s in (train_source, test_source) if s is not None and s.labels is not None]
        if len(both) == 2:
            labels = labeled(both[0], test).labels
            compared = cap(both[0], cfg.eval.max_train, seed)
            bank = extract(method.teacher, compared, cfg.data, **args)
            known = Embedded(subset(compared, bank.rows), bank.cls)
            if len(bank.rows) < cfg.eval.k and "eval.k" not in told:
                told.add("eval.k")
                log.warning(
                    "eval.k: %d, and k-NN has %d images: all of them vote", cfg.eval.k, len(bank.rows)
                )
            for name in ("cls", "mean"):
                a, b = (getattr(f, name).to(device) for f in (bank, features))
                assert labels is not None and bank.labels is not None
                truth = labels[features.rows]
                out[f"knn_{name}"] = knn(a, bank.labels, b, truth, cfg.eval.k, cfg.eval.temperature)
        few = subset(test, torch.arange(len(test))[:: -(-len(test) // STUDENT_IMAGES)])
        student = extract(method.student, few, cfg.data, **args).cls
        for name, x, head in (
            ("teacher", features.cls, method.teacher_projector),
            ("student", student, method.projector),
        ):
            projection = head(x.to(device))
            out |= {f"{name}_{key}": value for key, value in indicators(x.to(device)).items()}
            out |= {f"{name}_proj_{key}": value for key, value in indicators(projection).items()}
        resizing = method.teacher.resizing()
        images = load_batch(test, cfg.data, size, VIEW_IMAGES, strict=False, resizing=resizing).to(device)
        x = normalize(images, cfg.data.mean, cfg.data.std, cfg.model.in_chans)
        out["view_cosine"] = _view_cosine(method, x, cfg)
        out["attention_entropy"] = attention_entropy(method.teacher.get_attention(x))
        out |= {
            "images": len(features.cls),
            "dim": features.cls.shape[1],
            "proj_dim": projection.shape[1],
        }
        return OnlineEval(out, shown, known)
    finally:
        for module, mode in modes:
            module.training = mode


def _view_cosine(method: ExtreMA, images: Tensor, cfg: Config) -> float:
    """Mean cosine between the predictions of two views of the same images, with fixed masks."""
    n, k = cfg.model.num_patches, cfg.num_keep
    mode = "disjoint" if 2 * k <= n else "independent"
    index = torch.arange(len(images), device=images.device)
    keep = sample_views(index, n, k, 2, mode=mode, seed=cfg.train.seed)
    cls = method.student.encode(images, keep).cls
    q = F.normalize(method.predictor(method.projector(cls)).float(), dim=-1)
    return float((q[:, 0] * q[:, 1]).sum(-1).mean())
