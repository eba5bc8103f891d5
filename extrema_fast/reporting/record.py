"""The contents of a run folder, read once, for the report of one run and the comparison of several."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..config import NOT_TUNED, SIZES, Config, FinetuneConfig, differing, flatten, nearest_preset
from ..data.sources import BUILT_IN
from ..errors import UsageError, counted
from ..evaluation.classification import is_classification
from ..evaluation.result import is_result, is_segmentation, result_id
from ..evaluation.subject import run_config
from ..files import fits, read_json, read_log
from ..models.classifier import Classifier
from ..models.encoder import build_encoder
from ..progress import duration
from ..training.run_folder import STATUS
from ..weights.folder import check_name

log = logging.getLogger(__name__)

Record = dict[str, Any]
Point = tuple[float, float | None]

_COUNT = {"images": int, "classes?": int, "smallest?": int, "largest?": int, "left_out?": int}
# env.json; whatever of it has another form is left out
_ENV = {
    "argv": [str],
    "started": str,
    "attempt": int,
    "preset": {"name": str, "changes": {}},
    "init_from": {"weights": str},
    "data": {"train": _COUNT, "test": (_COUNT, None)},
    "images": int,
    "machine": {"cpu": str, "cores": int, "memory_gb?": float},
    "host": str,
    "gpu": str,
    "device": str,
    "world_size": int,
    "code": {"commit": str, "changed": bool},
    "versions": {},
    "python": str,
    "resolved": {"precision": str},
}


@dataclass(frozen=True)
class RunRecord:
    """A run folder as read; what is missing or damaged is empty.

    Attributes:
        folder: The run folder.
        cfg: Its configuration, images looked for as `run_config` does.
        env: env.json, the parts of it that have their form; `raw_env` is all of it.
        status: status.json.
        train, evals, warnings: Records of log.jsonl, ascending by step (`last_attempts`).
        result: reports/evaluation.json.
        more: Results on other images or settings: reports/evaluation-KEY.json, segmentation-KEY.json; by step.
        classified: reports/classification.json, of a fine-tuning.
    """

    folder: Path
    cfg: Config
    env: Record
    raw_env: Record
    status: Record
    train: list[Record]
    evals: list[Record]
    warnings: list[Record]
    result: Record
    more: list[Record]
    classified: Record

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step known."""
        last: int = self.train[-1]["step"] if self.train else 0
        return self.status.get("step") or last

    @property
    def precision(self) -> str:
        """What `train.precision auto` was on the run's machine."""
        chosen: str = self.env.get("resolved", {}).get("precision", self.cfg.train.precision)
        return chosen


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run folder; the run may be unfinished, old, or damaged in parts.

    Raises:
        UsageError: it is no run folder.
    """
    check_name(folder)
    path = Path(folder)
    cfg = run_config(path) if path.is_dir() else None
    if cfg is None:
        what = "not a run folder (no config.json of a run in it)" if path.exists() else "no such run folder"
        raise UsageError(f"{folder}: {what}")
    env = read_json(path / "env.json", {})
    train, evals, warnings = last_attempts(read_log(path / "log.jsonl"))
    result = _read(path / "reports" / "evaluation.json", is_result)
    return RunRecord(
        path,
        cfg,
        {k: env[k] for k, shape in _ENV.items() if k in env and fits(env[k], shape)},
        env,
        _read(path / "status.json", lambda d: fits(d, STATUS)),
        train,
        evals,
        warnings,
        result,
        _more(path / "reports", result),
        _read(path / "reports" / "classification.json", is_classification),
    )


def _more(reports: Path, own: Record) -> list[Record]:
    kinds = {"evaluation-*.json": is_result, "segmentation-*.json": is_segmentation}
    found = [_read(file, fit) for kind, fit in kinds.items() for file in sorted(reports.glob(kind))]
    # older versions kept the run's own in a second file where its images were named
    known = [(result_id(own), own["step"])] if own else []
    others = [r for r in found if r and (result_id(r), r["step"]) not in known]
    return sorted(others, key=lambda result: result["step"] or 0)


def _read(path: Path, makes_sense: Callable[[Record], bool]) -> Record:
    data = read_json(path, {})
    if data and not makes_sense(data):
        log.warning("%s: damaged, it is left out of the report", path)
        return {}
    return data


def last_attempts(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """(train, eval, warning) records, ascending by step, each step once.

    A resumed run goes back to its checkpoint: what an earlier attempt logged from the later one's first step on did
    not lead to the present weights and is dropped.
    """
    start: dict[int, int] = {}
    for r in records:
        if isinstance(r.get("step"), int) and r.get("kind") == "train":
            attempt = int(r.get("attempt") or 0)
            start[attempt] = min(start.get(attempt, r["step"]), r["step"])
    out: dict[str, dict[Any, Record]] = {"train": {}, "eval": {}, "warning": {}}
    for r in records:
        kind, step = r.get("kind"), r.get("step")
        if kind not in out or not isinstance(step, int):
            continue
        attempt = int(r.get("attempt") or 0)
        # an evaluation at the step where the later attempt begins still belongs to its weights
        if any(a > attempt and (step >= s if kind == "train" else step > s) for a, s in start.items()):
            continue
        out[kind][(step, r.get("text"))] = r
    train, evals, warnings = (sorted(found.values(), key=lambda r: r["step"]) for found in out.values())
    return train, evals, warnings


# ---- curves ---------------------------------------------------------------------------------------


def seconds(train: Sequence[Record]) -> list[float]:
    """Time spent training up to each record, without evaluations and checkpoints."""
    total, last, out = 0.0, 0, []
    for r in train:
        total += (r["step"] - last) * (r.get("step_ms") or 0) / 1000
        last = r["step"]
        out.append(total)
    return out


def curve(
    run: RunRecord, kind: str, key: str, x: Literal["step", "epoch", "minutes"] = "step"
) -> list[Point]:
    """The curve of one value: (step, epoch or minutes of training; value or None) per record that has it.

    Args:
        kind: `train` or `eval`.
        key: Name of the value in log.jsonl.
    """
    records = [r for r in (run.train if kind == "train" else run.evals) if key in r]
    if x == "minutes":
        steps = [0, *(r["step"] for r in run.train)]
        at = np.interp([r["step"] for r in records], steps, [0.0, *seconds(run.train)]) / 60
        return [(float(m), r[key]) for m, r in zip(at, records, strict=True)]
    return [(r[x], r[key]) for r in records if r.get(x) is not None]


# ---- identity -------------------------------------------------------------------------------------


def settings(run: RunRecord) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """(name of the preset, {option: (value, the preset's value)}) of what the run does not take from its preset.

    A run that has not recorded its preset is compared with the nearest one of today.
    """
    known = run.env.get("preset")
    if known is None:
        name, base = nearest_preset(run.cfg)
        return f"{name} (the nearest)", differing(run.cfg, base)
    now = flatten(run.cfg)
    return known["name"], {k: (now[k], v) for k, v in known["changes"].items() if k in now and now[k] != v}


def all_options(cfg: Config) -> dict[str, Any]:
    """Every setting by its dotted name, without those that mean nothing to a fine-tuning."""
    unused = NOT_TUNED if isinstance(cfg, FinetuneConfig) else ()
    return {name: value for name, value in flatten(cfg).items() if name not in unused}


def identity(run: RunRecord) -> list[tuple[str, list[str]]]:
    """What the run is, as (term, lines of text): preset, encoder, data, loss, command, time, machine, code."""
    rows = [
        ("preset", _preset(run)),
        ("encoder", _encoder(run)),
        ("data", _data(run)),
        ("training", _training(run)),
        ("command", _command(run.env)),
        ("time", _time(run)),
        ("machine", _machine(run.env)),
        ("code", _code(run.env)),
    ]
    return [(term, lines) for term, lines in rows if lines]


def _preset(run: RunRecord) -> list[str]:
    name, changes = settings(run)
    begun = run.env.get("init_from", {})
    parts = [f"{part}: {what}" for part, what in begun.items() if part != "weights"]
    return [
        f"{name}, {counted(len(changes), 'setting')} changed" if changes else name,
        *([f"begun from {begun['weights']}", *parts] if begun else []),
    ]


def _encoder(run: RunRecord) -> list[str]:
    cfg, m = run.cfg, run.cfg.model
    width, depth, heads = m.shape
    sizes = {
        shape: f"ViT-{'Ti' if size == 'tiny' else size[0].upper()}/{m.patch_size}"
        for size, shape in SIZES.items()
    }
    pooling = f"pooling of {counted(m.pool_depth, 'block')}"
    seen = f"{m.num_patches} tokens, {cfg.num_keep} in each of {counted(cfg.mask.views, 'view')}"
    with torch.device("meta"):
        network = build_encoder(m)
        if isinstance(cfg, FinetuneConfig):
            network = Classifier(cfg, ["class"] * run.classified.get("classes", 1)).student
            seen = f"{m.num_patches} tokens, all of them"
            pooling = "mean of the patch tokens" if cfg.tune.pool == "mean" else pooling
        parameters = sum(p.numel() for p in network.parameters())
    return [
        f"{sizes.get(m.shape, 'ViT')}: width {width}, {depth} blocks, {counted(heads, 'head')}, {pooling}; "
        f"{_size(parameters)} parameters",
        f"images of {m.img_size[0]} x {m.img_size[1]} pixels, {counted(m.in_chans, 'channel')}, patches of "
        f"{m.patch_size}: {seen}",
    ]


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n:,}"


def _data(run: RunRecord) -> list[str]:
    cfg, counts = run.cfg.data, run.env.get("data", {})
    told = run.result.get("counts", {})
    train = counts.get("train") or {k: run.env[k] for k in ("images",) if k in run.env}
    test = counts.get("test") or ({"images": told["test"]} if told else {})
    if told:
        train = {"classes": told["classes"]} | train
    name = f"held out, {100 * cfg.holdout:g} %" if cfg.holdout else cfg.test or cfg.train
    there = test or cfg.test or cfg.holdout or cfg.train in BUILT_IN
    return [
        f"training: {cfg.train}{_counts(train)}",
        f"test: {name}{_counts(test)}" if there else "no test images",
    ]


def _counts(about: Mapping[str, Any]) -> str:
    if "images" not in about:
        return ""
    text = f": {about['images']:,} {'image' if about['images'] == 1 else 'images'}"
    if "classes" in about:
        text += f" in {about['classes']:,} {'class' if about['classes'] == 1 else 'classes'}"
        low, high = about.get("smallest"), about.get("largest")
        if low is not None and high is not None:
            text += f" of {low:,}" + (f" to {high:,}" if high > low else "")
    elif "name" in about or "smallest" in about:
        text += ", without labels"
    return text + (f"; {about['left_out']:,} more files left out" if about.get("left_out") else "")


def _training(run: RunRecord) -> list[str]:
    cfg = run.cfg
    loss = f"InfoNCE, temperature {cfg.head.temperature:g}" if cfg.head.loss == "infonce" else "BYOL"
    loss += f", {cfg.head.queue:,} earlier targets" if cfg.head.queue else ""
    loss += "" if cfg.head.targets == "plain" else f", {cfg.head.targets} targets"
    loss += f", decorrelation {cfg.head.decorrelation:g}" if cfg.head.decorrelation else ""
    loss += ", batch norm in the heads" if cfg.head.norm == "batch" else ""
    if isinstance(cfg, FinetuneConfig):
        loss = f"fine-tuning, cross-entropy, layer decay {cfg.tune.layer_decay:g}"
    total = run.status.get("total_steps")
    return [
        f"{loss}; {counted(cfg.train.epochs, 'epoch')}{f' ({total:,} steps)' if total else ''}, batch "
        f"{cfg.train.batch_size:,}, {cfg.optim.name}, peak learning rate {cfg.peak_lr:.3g}, {run.precision}"
    ]


_PROGRAM = ("__main__.py", "extrema-fast")


def _command(env: Record) -> list[str]:
    argv = env.get("argv") or []
    if not argv:
        return []
    program = Path(argv[0]).name
    first = "extrema-fast" if program in _PROGRAM else f"python {shlex.quote(program)}"
    return [" ".join([first, *map(shlex.quote, argv[1:])])]


def _date(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _time(run: RunRecord) -> list[str]:
    began, ended = (_date(d.get(k, "")) for d, k in ((run.env, "started"), (run.status, "time")))
    lines = []
    if began:
        starts = run.env.get("attempt", 1)
        lines.append(f"started {began:%Y-%m-%d %H:%M %Z}" + (f", {starts} starts" if starts > 1 else ""))
    if began and ended and began.tzinfo and ended.tzinfo:
        lines[0] += f", last written after {duration((ended - began).total_seconds())}"
    if run.train:
        lines.append(f"{duration(seconds(run.train)[-1])} of training, without evaluations")
    return lines


def _machine(env: Record) -> list[str]:
    about, size = env.get("machine", {}), env.get("world_size", 1)
    cpu = f"{about['cpu']}, {counted(about['cores'], 'core')}" if about else ""
    memory = f"{about['memory_gb']:g} GB" if "memory_gb" in about else ""
    parts = [env.get("host", ""), env.get("gpu") or env.get("device", ""), cpu, memory]
    parts.append(f"{size} processes" if size > 1 else "")
    return [", ".join(p for p in parts if p)] if any(parts) else []


def _code(env: Record) -> list[str]:
    versions = {k: v for k, v in env.get("versions", {}).items() if isinstance(v, str)}
    own, code = versions.pop("extrema-fast", ""), env.get("code")
    lines = [f"extrema-fast {own}".rstrip()] if own or code else []
    if code:
        lines[0] += f", commit {code['commit'][:12]}" + (" with changed files" if code["changed"] else "")
    shown = {"Python": env["python"]} if "python" in env else {}
    text = ", ".join(f"{k} {v}" for k, v in (shown | versions).items())
    return lines + ([text] if text else [])
