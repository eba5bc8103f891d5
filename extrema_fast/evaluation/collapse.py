"""Warnings about a collapsing run, from its evaluations and from the outputs of its batches so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

PARTS = {
    "teacher": "teacher class token",
    "teacher_proj": "teacher projection",
    "student": "student class token",
    "student_proj": "student projection",
}
ADVICE = "lower optim.base_lr, raise optim.momentum (a slower teacher), or lengthen optim.warmup_epochs"

# what a check of a batch records, in the order of `probes.batch_spread`
OUTPUTS = ("prediction_spread", "prediction_dims", "target_spread", "target_dims")
# steps from one check to the next in the first 400 steps, and later; checks that are averaged
EARLY_STEPS, STEPS, AVERAGED = 20, 100, 3
# collapsed: this share of the largest spread so far, and of the directions beyond the first at the start; so few
# directions; a spread that is constant to rounding
LEAST_SPREAD, LEAST_DIMS, FEW_DIMS, CONSTANT = 0.4, 0.25, 1.25, 1e-5


def checks_spread(step: int) -> bool:
    """Whether the outputs of this step's batch are checked."""
    return step == 1 or step % (EARLY_STEPS if step <= 400 else STEPS) == 0


def spread_warning(history: Sequence[dict[str, Any]], loss: str = "infonce") -> str:
    """What the outputs of the latest batches say about collapse, with what to try; empty while healthy.

    A batch is small and each has other images, so the mean of three checks counts.

    Args:
        history: Records of `OUTPUTS` by step, oldest first, the first of step 1.
        loss: `head.loss` of the run.
    """
    first, means = {}, {}
    for key in OUTPUTS:
        values = [r[key] for r in history if r.get(key) is not None]
        if len(values) < AVERAGED:
            return ""
        first[key] = values[0]
        means[key] = [sum(values[i : i + AVERAGED]) / AVERAGED for i in range(len(values) - AVERAGED + 1)]
    found = []
    for who in ("prediction", "target"):
        spread = means[f"{who}_spread"]
        # a random encoder may be nearly constant: what is more than that is not collapsed
        least = min(LEAST_SPREAD * max(spread), first[f"{who}_spread"])
        if spread[-1] < max(least, CONSTANT):
            found.append(f"spread of the {who}s {spread[-1]:.2g} (at most {max(spread):.2g} before)")
    names = ("prediction_dims", "target_dims")
    now, start = [means[n][-1] for n in names], [first[n] for n in names]
    if all(b < FEW_DIMS and b - 1 < LEAST_DIMS * (a - 1) for a, b in zip(start, now, strict=True)):
        found.append(
            f"directions in use by predictions and targets {now[0]:.2f} and {now[1]:.2f} "
            f"(step {history[0]['step']}: {start[0]:.2f} and {start[1]:.2f})"
        )
    if not found:
        return ""
    return f"outputs of different images become alike: {', '.join(found)}; {advice(loss)}"


def advice(loss: str) -> str:
    """What to try against collapse."""
    return f"{ADVICE}{'; or use head.loss infonce' if loss == 'byol' else ''}"


def collapse_warnings(
    history: Sequence[dict[str, Any]], warmup_epochs: float = 0.0, loss: str = "infonce"
) -> list[str]:
    """What the latest evaluation says about collapse, one sentence per broken rule; the first says what to try.

    Args:
        history: Results of `online_eval`, oldest first. history[0] is step 0, mostly a random encoder, the yardstick:
            a random encoder alone looks nearly collapsed (cosine .99), so an absolute limit counts only where the run
            has not moved away from its start.
        warmup_epochs: Rules for the end of warm-up wait for it.
        loss: `head.loss` of the run.

    Returns:
        [] while healthy, and for a history of one.
    """
    if len(history) < 2:
        return []
    first, last = history[0], history[-1]
    warnings = []

    def broken(key: str, rule: Any) -> str:
        found = []
        for part, words in PARTS.items():
            a, b = first.get(f"{part}_{key}"), last.get(f"{part}_{key}")
            if a is not None and b is not None and rule(a, b, part):
                found.append(f"{words} {b:.4g} (step 0: {a:.4g})")
        return ", ".join(found)

    def rank_broken(start: float, now: float, part: str) -> bool:
        peak = max(r.get(f"{part}_rank") or 0.0 for r in history)
        dim = last.get("proj_dim" if part.endswith("proj") else "dim")
        full = min(dim, last.get("images", dim)) if dim else 0
        # a projector of batch norm begins with a high rank; in healthy runs it falls to 0.4 while k-NN rises
        least = 1 / 3 if part.endswith("proj") else 0.5
        return now < least * peak or (now < 0.05 * full and now <= start)

    found = broken("std", lambda a, b, _: b < 0.5 * a or (b < 0.2 and b < 0.9 * a))
    if found:
        warnings.append(f"features are contracting, standard deviation per dimension: {found}")
    # passing 0.9 counts for a run that began below it; 0.998 unless the spread has doubled since
    found = broken("cosine", lambda a, b, _: b > 0.9 > a or (b > 0.998 and 1 - b < 2 * (1 - a)))
    if found:
        warnings.append(f"features of different images point the same way, mean cosine: {found}")
    found = broken("rank", rank_broken)
    # the student's alone falls early in healthy runs of BYOL, and comes back
    if "teacher" in found:
        warnings.append(f"features use few directions, effective rank: {found}")
    warm = last.get("epoch", math.inf) >= warmup_epochs
    view = last.get("view_cosine")
    if view is not None and not warm and view > 0.99 > (first.get("view_cosine") or 1.0):
        warnings.append(
            f"predictions of two views agree at cosine {view:.4g} before warm-up ends: the task has "
            "become trivial"
        )
    warnings += _knn_warnings(history, warm)
    if warnings:
        warnings[0] += f"; {advice(loss)}"
    entropy = last.get("attention_entropy")
    if entropy is not None and warm and not 0.01 < entropy < 0.9999:
        state = "looks at one token only" if entropy < 0.5 else "is uniform: pooling learns nothing"
        warnings.append(
            f"attention of the class token {state} (entropy {entropy:.4g} of 1); lower optim.base_lr "
            "or raise model.layer_scale"
        )
    return warnings


def _knn_warnings(history: Sequence[dict[str, Any]], warm: bool) -> list[str]:
    warnings = []
    for key, words in (("knn_cls", "class token"), ("knn_mean", "mean of patches")):
        curve = [r[key] for r in history if r.get(key) is not None]
        if len(curve) < 2 or history[-1].get(key) is None:
            continue
        # one point, or 1.5 standard errors on few test images, is noise
        p, images = curve[0], history[-1].get("images") or math.inf
        noise = max(0.01, 1.5 * math.sqrt(p * (1 - p) / images))
        if warm and curve[-1] < curve[0] - noise:
            warnings.append(f"k-NN of the {words} is {curve[-1]:.1%}, below the {curve[0]:.1%} it began with")
        tail = curve[-4:]
        falling = len(tail) == 4 and all(b < a for a, b in itertools.pairwise(tail))
        if falling and tail[0] - tail[-1] > noise:
            path = ", ".join(f"{v:.1%}" for v in tail)
            warnings.append(f"k-NN of the {words} fell three evaluations in a row ({path})")
    return warnings
