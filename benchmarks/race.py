"""Who learns fastest? Ours against lightly's implementations of other methods, each given the same minutes.

Same images, same size of ViT, same batch, same cores or GPU; k-NN on frozen features at fixed minutes, on one rule for
all. On a CPU a minute is one of processor time, which other work on the machine changes little; on a GPU one of the
clock, compiling included. Training and augmentation count; decoding and evaluation do not, and all images lie decoded
in memory. Every schedule (warm-up, learning rate, weight decay, momentum) follows the share of the minutes that has
passed, so that each method ends its own schedule with its last minute.

Others race with each of `--settings`, and the best counts; from the second seed on, only that of the first seed races:

* published: as in lightly's benchmarks or the authors' configuration (`published`), by their rule for the batch size;
* short: optimizer, learning rate, weight decay, warm-up, first momentum and crops of our preset, no color augmentation,
  few small crops;
* whitened: published, with the patch kernel of our `model.patch_init whitened`; only where it is asked for.

python -m benchmarks race cifar10 --minutes 4 --seeds 0 1 2 -- --data.train cifar10/train --data.test cifar10/test

Each finished run is kept in a file: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extrema_fast import cli
from extrema_fast.config import Config, did_you_mean, from_dict, nested, to_dict
from extrema_fast.data.image_files import ImageFiles, are_cropped, load_image
from extrema_fast.data.preprocess import CROP_PCT, Resizing
from extrema_fast.distributed import World, pick_device
from extrema_fast.errors import NonFiniteError, UsageError, install
from extrema_fast.evaluation.features import cap, extract, labeled, raw_pixels
from extrema_fast.evaluation.probes import knn
from extrema_fast.files import read_json, write_file
from extrema_fast.models.layers import whiten_kernel
from extrema_fast.train import train_step
from extrema_fast.training.run import build, open_loader, open_test, open_train, prepare_torch
from extrema_fast.training.step import batches, wrap

from . import harness

FIGURE = "race.svg"
SETTINGS = ("published", "short", "whitened")
# ours, by name: what differs from the preset
OURS: dict[str, dict[str, Any]] = {
    "extrema_infonce": {"head.loss": "infonce"},
    "extrema_byol": {"head.loss": "byol"},
}


def main(argv: list[str]) -> int:
    """Races methods on the images and the ViT of a preset; options of `pretrain` follow after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    p = harness.parser("race", main.__doc__, timed=False)
    p.add_argument("preset", nargs="?", default="photos")
    p.add_argument("--methods", nargs="+", default=[*OURS, *THEIRS], metavar="NAME", help="default: all")
    p.add_argument(
        "--settings", nargs="+", default=list(SETTINGS[:2]), choices=SETTINGS, help="of the others"
    )
    p.add_argument("--minutes", type=float, default=4.0, help="of training per run (default: %(default)s)")
    p.add_argument("--points", type=int, default=4, help="evaluations after the first (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--max-train", type=int, default=5000, help="images of the k-NN bank (0: all)")
    p.add_argument("--max-test", type=int, default=2000, help="test images (0: all)")
    p.add_argument("--runs", type=Path, default=Path("runs/race"), help="where finished runs are kept")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = p.parse_args(argv[:split])
    if args.quick:
        args.preset, args.minutes, args.points, args.seeds = "smoke", 0.003, 1, [0]
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"matplotlib is not installed, which draws the figure: {install('race')}")
    if args.minutes <= 0 or args.points < 1 or args.threads < 1:
        raise UsageError("--minutes, --points, --threads: expected more than 0")
    for name in args.methods:
        if name not in OURS and name not in THEIRS:
            raise UsageError(f"--methods: unknown {name!r}{did_you_mean(name, [*OURS, *THEIRS])}")
    missing = [m for m in ("lightly", "timm", "torchvision") if importlib.util.find_spec(m) is None]
    entries = [(m, s) for m in args.methods for s in (("preset",) if m in OURS else args.settings)]
    not_run = {
        m: f"{missing[0]} is not installed: {install('race')}" for m, _ in entries if m in THEIRS and missing
    }
    entries = [e for e in entries if e[0] not in not_run]
    if args.list:
        print("\n".join(f"  {m} ({s}), seeds {args.seeds}, {args.minutes:g} minutes" for m, s in entries))
        return 0
    torch.set_num_threads(args.threads)
    cfg = configure(args.preset, argv[split + 1 :], args)
    ring = Ring(cfg, args)
    folder = args.runs / (args.preset if args.name == "race" else args.name)
    rows = []
    for seed in args.seeds:
        rows += [ring.run(m, s, seed, folder) for m, s in entries]
        entries = better(rows, entries)
    record = harness.new_record(f"race: {args.preset}", "race", argv, args.note)
    record |= ring.facts() | {"rows": rows, "not_run": not_run}
    standings(record)
    draw(record, harness.write_record(record, page(record), args) / FIGURE)
    return 0


def better(rows: list[harness.Row], entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of the settings of each method that have raced so far, the best ones."""
    last = {
        (r["method"], r["settings"]): r["points"][-1][r["feature"]] if "points" in r else -1.0 for r in rows
    }
    best = {m: max((s for n, s in entries if n == m), key=lambda s: last[m, s]) for m, _ in entries}
    return list(best.items())


def configure(preset: str, overrides: list[str], args: Any) -> Config:
    """The configuration that `pretrain PRESET overrides` would have, on this device."""
    with redirect_stdout(StringIO()) as printed:
        code = cli.main(["pretrain", preset, *overrides, "--print-config", "--quiet"])
    if code:
        # which has been said
        raise SystemExit(code)
    cfg = from_dict(json.loads(printed.getvalue())["config"])
    system = {"system.device": args.device, "system.threads": args.threads, "data.threads": args.threads}
    if cfg.model.in_chans != 3:
        raise UsageError(f"model.in_chans: the race is for RGB images, got {cfg.model.in_chans}; use 3")
    return from_dict(nested(system | {"data.resident": "host"}), cfg)


class Ring:
    """Where all race: images, evaluation, clock."""

    def __init__(self, cfg: Config, args: Any) -> None:
        self.cfg, self.args = cfg, args
        self.device = pick_device(args.device)
        prepare_torch(cfg.system)
        self.source = open_train(cfg)
        test = open_test(cfg, self.source)
        if test is None:
            raise UsageError("data.test: the race needs labeled test images; give --data.test after --")
        self.test = cap(labeled(self.source, test), args.max_test, 0)
        self.bank = cap(self.source, args.max_train, 0)
        whole = are_cropped(ImageFiles(self.source, cfg.data), cfg.model.img_size)
        self.resizing = Resizing(1.0 if whole else CROP_PCT)
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        pixels = [
            raw_pixels(s, cfg.data, cfg.model.img_size, resizing=self.resizing)
            for s in (self.bank, self.test)
        ]
        self.pixels = _accuracy(*pixels, "cls", cfg)
        self._images: list[Any] = []

    @property
    def images(self) -> list[Any]:
        """All training images as PIL images, decoded once."""
        if not self._images:
            exif, source = self.cfg.data.exif, self.source
            self._images = [load_image(BytesIO(source.read(i)), exif) for i in range(len(source))]
        return self._images

    def facts(self) -> dict[str, Any]:
        """What a record says of the race as a whole."""
        return {
            "config": to_dict(self.cfg),
            "minutes": self.args.minutes,
            "seconds_of": "processor time" if self.device.type == "cpu" else "the clock",
            "images": {"train": len(self.source), "bank": len(self.bank), "test": len(self.test)},
            "raw_pixels": self.pixels,
        }

    def run(self, method: str, settings: str, seed: int, folder: Path) -> harness.Row:
        """Trains and evaluates one entry, or returns what an equal earlier run has left in `folder`."""
        key, file = f"{method} {settings}", folder / f"{method}-{settings}-{seed}.json"
        asked = json.loads(harness.dumps(self.facts() | {"points": self.args.points}))
        earlier = read_json(file, {})
        if earlier.get("asked") == asked:
            return earlier["row"]
        row: harness.Row = {"key": key, "method": method, "settings": settings, "seed": seed}
        racer = Ours(self, method, seed) if method in OURS else Theirs(self, method, settings, seed)
        row |= {"feature": racer.feature, "parameters": racer.parameters}
        try:
            row |= self._train(racer, f"{key}, seed {seed}")
        except NonFiniteError as error:
            row["error"] = f"seed {seed}: {error}"
        finally:
            racer.close()
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, harness.dumps({"asked": asked, "row": row}) + "\n")
        return row

    def _train(self, racer: Racer, name: str) -> dict[str, Any]:
        """Steps until the minutes are over; evaluates at the beginning and `points` times."""
        total = 60 * self.args.minutes
        spent = fetched = 0.0
        steps, began = 0, time.perf_counter()
        points = [{"minutes": 0.0, "steps": 0, **self._evaluate(racer.encoder)}]
        for i in range(1, self.args.points + 1):
            mark = total * i / self.args.points
            while spent < mark:
                start = self.clock()
                batch = racer.fetch()
                middle = self.clock()
                racer.step(batch, spent / total)
                if self.device.type != "cpu":
                    torch.accelerator.synchronize()
                spent += self.clock() - start
                fetched += middle - start
                steps += 1
            points.append({"minutes": spent / 60, "steps": steps, **self._evaluate(racer.encoder)})
            last = points[-1]
            harness.say(f"{name}: {last['minutes']:.2f} min, {steps} steps, k-NN {last[racer.feature]:.1%}")
        return {
            "points": points,
            "epochs": steps * self.cfg.train.batch_size / len(self.source),
            "images_per_s_trained": steps * self.cfg.train.batch_size / spent,
            "share_of_augmentation": fetched / spent,
            "clock_s": round(time.perf_counter() - began, 1),
        }

    def _evaluate(self, encoder: Any) -> dict[str, float]:
        """k-NN accuracy of class token and mean of patch tokens; draws no random numbers."""
        rule = self.cfg.eval
        a, b = (
            extract(
                encoder,
                s,
                self.cfg.data,
                batch_size=rule.batch_size,
                device=self.device,
                resizing=self.resizing,
            )
            for s in (self.bank, self.test)
        )
        return {name: _accuracy(a, b, name, self.cfg) for name in ("cls", "mean")}


def _accuracy(bank: Any, test: Any, field: str, cfg: Config) -> float:
    x, y = getattr(bank, field), getattr(test, field)
    return knn(x, bank.labels, y, test.labels, cfg.eval.k, cfg.eval.temperature)


class Racer:
    """One method in training.

    Attributes:
        encoder: what `extract` takes: the weights that the method's authors evaluate.
        feature: `cls` or `mean`: the feature that they evaluate.
    """

    encoder: Any
    feature = "cls"
    fed: Iterator[Any]

    @property
    def parameters(self) -> int:
        """Of the encoder."""
        return sum(p.numel() for p in self.encoder.parameters())

    def fetch(self) -> Any:
        """The next batch, augmented, where that is not a part of the step."""
        return next(self.fed)

    def step(self, batch: Any, progress: float) -> None:
        """One optimizer step; `progress`: share of the minutes that has passed."""

    def close(self) -> None:
        """Ends what makes batches."""


class Ours(Racer):
    """`train_step`, as `pretrain` runs it."""

    def __init__(self, ring: Ring, method: str, seed: int) -> None:
        cfg = from_dict(nested(OURS[method] | {"train.seed": seed}), ring.cfg)
        run = self.run = build(cfg, World(ring.device), ring.source)
        wrap(run)
        self.encoder = run.method.teacher
        loader = open_loader(run)
        self.fed, self.close = batches(run, loader), loader.close
        # the first decodes all images
        next(self.fed)

    def step(self, batch: Any, progress: float) -> None:
        total = self.run.schedule.total_steps
        # the last step of a run leaves the EMA update out
        self.run.step = min(int(progress * total), total - 2)
        train_step(self.run, batch)


# ---- other people's methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a method is trained.

    Attributes:
        rate: peak learning rate.
        decay: weight decay at the beginning and the end, a cosine between them; none on biases and norms.
        warmup: share of the run in which the rate rises from 0; a cosine to 0 follows.
        momentum: of the teacher at the beginning; a cosine to 1 follows.
        clip: largest norm of the gradient; 0: any.
        views: arguments of the method's transform.
    """

    rate: float
    decay: tuple[float, float]
    warmup: float
    momentum: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    lars: bool = False
    clip: float = 0.0
    views: dict[str, Any] = field(default_factory=dict)


def published(method: str, cfg: Config) -> Rule:
    """Settings of lightly's benchmarks, or the authors' own; no blur at 32 pixels, as in lightly's CIFAR-10 benchmark.

    Small crops are as large as 96 pixels are to 224, rounded to patches.
    """
    batch, size, patch = cfg.train.batch_size, cfg.model.img_size[0], cfg.model.patch_size
    small = max(2, round(size * 96 / 224 / patch)) * patch
    blur = size > 64
    rules = {
        # facebookresearch/mae, PRETRAIN.md: 40 of 800 epochs of warm-up
        "mae": Rule(
            1.5e-4 * batch / 256, (0.05, 0.05), 40 / 800, betas=(0.9, 0.95), views={"min_scale": 0.2}
        ),
        # lightly benchmarks/imagenet/resnet50/simclr.py
        "simclr": Rule(
            0.075 * math.sqrt(batch),
            *((1e-6, 1e-6), 10 / 100),
            lars=True,
            views={"cj_strength": 1.0 if blur else 0.5, "gaussian_blur": 0.5 * blur},
        ),
        # lightly benchmarks/imagenet/resnet50/byol.py
        "byol": Rule(0.45 * batch / 256, (1e-6, 1e-6), 10 / 100, 0.99, lars=True, views={"blur": blur}),
        # lightly benchmarks/imagenet/vitb16/dino.py; the authors clip
        "dino": Rule(
            5e-4 * batch / 256,
            *((0.04, 0.4), 10 / 100, 0.996),
            clip=3.0,
            views={
                **{"local_crop_size": small, "n_local_views": 8, "local_crop_scale": (0.05, 0.4)},
                "gaussian_blur": (1.0, 0.1, 0.5) if blur else (0.0, 0.0, 0.0),
            },
        ),
        # facebookresearch/msn configs/pretrain/msn_vits16.yaml: batch 1024, 15 of 800 epochs of warm-up
        "msn": Rule(
            1e-3 * batch / 1024,
            *((0.04, 0.4), 15 / 800, 0.996),
            clip=3.0,
            views={
                **{"focal_size": small, "focal_views": 10, "cj_strength": 0.5},
                "gaussian_blur": 0.5 * blur,
            },
        ),
        # lightly benchmarks/imagenet/vitb16/lejepa.py: one rate for every batch, 1 of 100 epochs of warm-up
        "lejepa": Rule(
            5e-4,
            *((0.05, 0.05), 1 / 100),
            views={
                "global_crop_scale": (0.3, 1.0),
                **{"local_crop_size": small, "n_local_views": 6, "local_crop_scale": (0.05, 0.3)},
                "gaussian_blur": (0.5, 0.5, 0.5) if blur else (0.0, 0.0, 0.0),
            },
        ),
    }
    return rules[method]


def short(method: str, cfg: Config) -> Rule:
    """The settings that our preset has been tuned to, for another method."""
    o, decay, least = cfg.optim, cfg.optim.weight_decay, cfg.data.area[0]
    plain: dict[str, Any] = {"cj_prob": 0.0, "random_gray_scale": 0.0}
    if cfg.data.policy == "spatial+color":
        strength = dict(zip(("cj_bright", "cj_contrast", "cj_sat", "cj_hue"), cfg.data.jitter, strict=True))
        plain = {
            "cj_prob": cfg.data.jitter_prob,
            "random_gray_scale": cfg.data.gray_prob,
            "cj_strength": 1.0,
            **strength,
        }
    few = published(method, cfg).views
    views: dict[str, dict[str, Any]] = {
        "mae": {"min_scale": least},
        "simclr": {**plain, "min_scale": least, "gaussian_blur": 0.0},
        "byol": {**plain, "min_scale": least, "blur": False, "solarization_prob": 0.0},
        "msn": {**few, **plain, "random_crop_scale": (least, 1.0), "focal_views": 2, "gaussian_blur": 0.0},
    }
    small = {
        **few,
        **plain,
        "global_crop_scale": (least, 1.0),
        "n_local_views": 2,
        "gaussian_blur": (0.0, 0.0, 0.0),
        "solarization_prob": 0.0,
    }
    warmup = o.warmup_epochs / cfg.train.epochs
    return Rule(cfg.peak_lr, (decay, decay), warmup, o.momentum, o.betas, views=views.get(method, small))


class Parts(NamedTuple):
    """What an adapter gives: the modules to train, the pairs (student, teacher) of an EMA, the encoder, the loss."""

    trained: list[nn.Module]
    followed: list[tuple[nn.Module, nn.Module]]
    vit: Any
    # (views [B, 3, H, W] each, progress) -> scalar
    loss: Callable[[list[Tensor], float], Tensor]


def vit(cfg: Config, drop_path: float = 0.0) -> Any:
    """lightly's wrapper of timm's ViT, of the preset's size, with a class token and fixed sine positions."""
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = cfg.model.shape
    size = {"img_size": cfg.model.img_size, "patch_size": cfg.model.patch_size}
    shape = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": cfg.model.mlp_ratio}
    return MaskedVisionTransformerTIMM(
        VisionTransformer(**size, **shape, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path)
    )


def twin(module: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A teacher: another module of the same weights, without gradients."""
    teacher = make()
    teacher.load_state_dict(module.state_dict())
    return teacher.requires_grad_(False)


def whiten(parts: Parts) -> None:
    """Whitens the patch kernels of students, and equally those of teachers."""
    from timm.layers import PatchEmbed

    for module in (*parts.trained, *(teacher for _, teacher in parts.followed)):
        for part in module.modules():
            if isinstance(part, PatchEmbed):
                part.proj.weight.data.copy_(whiten_kernel(part.proj.weight))


def mae(cfg: Config) -> Parts:
    """With a decoder of two thirds of the encoder's width and depth, as for ViT-B, and normalized pixels as targets."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM

    width, depth, _ = cfg.model.shape
    inner = 32 * round(width * 2 / 3 / 32)
    encoder, patch = vit(cfg), cfg.model.patch_size
    decoder = MaskedVisionTransformerDecoderTIMM(
        cfg.model.num_patches, inner, round(depth * 2 / 3), inner // 32
    )
    narrow, pixels = nn.Linear(width, inner), nn.Linear(inner, 3 * patch**2)

    def loss(views: list[Tensor], progress: float) -> Tensor:
        images, length = views[0], encoder.sequence_length
        keep, hidden = utils.random_token_mask((len(images), length), 0.75, device=images.device)
        tokens = narrow(encoder.encode(images, idx_keep=keep))
        x = utils.repeat_token(decoder.mask_token, (len(images), length)).to(tokens.dtype)
        x = decoder(utils.set_at_index(x, keep, tokens))
        # the class token has no pixels
        target = utils.get_at_index(utils.patchify(images, patch), hidden - 1)
        return F.mse_loss(pixels(utils.get_at_index(x, hidden)), utils.normalize_mean_var(target))

    return Parts([encoder, decoder, narrow, pixels], [], encoder, loss)


def simclr(cfg: Config) -> Parts:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    encoder = vit(cfg)
    head = SimCLRProjectionHead(cfg.model.shape[0], cfg.head.hidden, 128)
    criterion = NTXentLoss(temperature=0.1)
    return Parts(
        [encoder, head], [], encoder, lambda views, _: criterion(*head(encoder(torch.cat(views))).chunk(2))
    )


def byol(cfg: Config) -> Parts:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    student = nn.Sequential(vit(cfg), BYOLProjectionHead(cfg.model.shape[0], cfg.head.hidden, 256))
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = BYOLPredictionHead(256, cfg.head.predictor_hidden, 256)
    criterion = NegativeCosineSimilarity()

    def loss(views: list[Tensor], progress: float) -> Tensor:
        with torch.no_grad():
            targets = [teacher(v) for v in views]
        own = [predictor(student(v)) for v in views]
        return 2 * (criterion(targets[0], own[1]) + criterion(targets[1], own[0]))

    return Parts([student, predictor], [(student, teacher)], student[0], loss)


def dino(cfg: Config) -> Parts:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    def branch(drop_path: float = 0.0) -> nn.Sequential:
        # lightly's example for small images
        head = DINOProjectionHead(cfg.model.shape[0], cfg.head.hidden, 64, 2048, norm_last_layer=False)
        return nn.Sequential(vit(cfg, drop_path), head)

    student = branch(0.1)
    teacher: Any = twin(student, branch)
    criterion = DINOLoss(2048, warmup_teacher_temp=0.04, teacher_temp=0.04)

    def loss(views: list[Tensor], progress: float) -> Tensor:
        # for the first of 100 epochs
        student[1].last_layer.requires_grad_(progress >= 0.01)
        with torch.no_grad():
            targets = teacher(torch.cat(views[:2])).chunk(2)
        own = [*student(torch.cat(views[:2])).chunk(2), *student(torch.cat(views[2:])).chunk(len(views) - 2)]
        return criterion(list(targets), own)

    return Parts([student], [(student, teacher)], teacher[0], loss)


def msn(cfg: Config) -> Parts:
    from lightly.loss import MSNLoss
    from lightly.models import utils
    from lightly.models.modules.heads import MSNProjectionHead

    anchor = nn.ModuleList([vit(cfg), MSNProjectionHead(cfg.model.shape[0], cfg.head.hidden, 256)])
    target: Any = copy.deepcopy(anchor).requires_grad_(False)
    prototypes = nn.Linear(256, 1024, bias=False)
    criterion = MSNLoss()

    def of(views: Tensor) -> Tensor:
        tokens = 1 + (views.shape[-1] // cfg.model.patch_size) ** 2
        keep, _ = utils.random_token_mask((len(views), tokens), 0.15, device=views.device)
        return anchor[1](anchor[0](views, idx_keep=keep))

    def loss(views: list[Tensor], progress: float) -> Tensor:
        with torch.no_grad():
            targets = target[1](target[0](views[0]))
        return criterion(torch.cat([of(views[1]), of(torch.cat(views[2:]))]), targets, prototypes.weight)

    return Parts([anchor, prototypes], [(anchor, target)], target[0], loss)


def lejepa(cfg: Config) -> Parts:
    from lightly.loss import LeJEPALoss
    from lightly.models.modules import LeJEPAProjectionHead

    encoder = vit(cfg, 0.1)
    head, criterion = LeJEPAProjectionHead(cfg.model.shape[0], cfg.head.hidden, 64), LeJEPALoss()

    def loss(views: list[Tensor], progress: float) -> Tensor:
        both = [head(encoder(torch.cat(v))).view(len(v), len(v[0]), -1) for v in (views[:2], views[2:])]
        return criterion(global_proj=both[0], local_proj=both[1])

    return Parts([encoder, head], [], encoder, loss)


THEIRS: dict[str, Callable[[Config], Parts]] = {
    "mae": mae,
    "simclr": simclr,
    "byol": byol,
    "dino": dino,
    "msn": msn,
    "lejepa": lejepa,
}


def transform(method: str, cfg: Config, views: dict[str, Any]) -> Callable[[Any], list[Tensor]]:
    """lightly's transform of a method: a PIL image to its views [3, H, W]."""
    from lightly import transforms as T

    size, normalize = cfg.model.img_size[0], {"mean": list(cfg.data.mean), "std": list(cfg.data.std)}
    if method == "byol":
        views = dict(views)
        blur, own = views.pop("blur"), {"input_size": size, "normalize": normalize}
        first = {k: v for k, v in views.items() if k != "solarization_prob"}
        return T.BYOLTransform(
            T.BYOLView1Transform(gaussian_blur=1.0 * blur, **own, **first),
            T.BYOLView2Transform(gaussian_blur=0.1 * blur, **own, **views),
        )
    make, name = {
        "mae": (T.MAETransform, "input_size"),
        "simclr": (T.SimCLRTransform, "input_size"),
        "dino": (T.DINOTransform, "global_crop_size"),
        "msn": (T.MSNTransform, "random_size"),
        "lejepa": (T.DINOTransform, "global_crop_size"),
    }[method]
    return make(**{name: size}, normalize=normalize, **views)


class Held(torch.utils.data.Dataset):
    """Images in memory, and the views of one by its row."""

    def __init__(self, images: list[Any], views: Callable[[Any], list[Tensor]]) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.views(self.images[row])


class TheirEncoder(nn.Module):
    """What `extract` asks of an encoder, of a ViT of lightly's."""

    in_chans = 3

    def __init__(self, vit: Any, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.vit, self.img_size = vit, img_size

    def encode(self, images: Tensor) -> Any:
        tokens = self.vit.encode(images)
        return SimpleNamespace(cls=tokens[:, 0], patches=tokens[:, 1:])


class Theirs(Racer):
    """A method of lightly's."""

    def __init__(self, ring: Ring, method: str, settings: str, seed: int) -> None:
        from lightly.models import utils
        from lightly.utils.lars import LARS

        cfg = ring.cfg
        self.device = ring.device
        self.rule = rule = (short if settings == "short" else published)(method, cfg)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        # losses hold tensors, too
        with ring.device:
            parts = self.parts = THEIRS[method](cfg)
        if settings == "whitened":
            whiten(parts)
        self.encoder = TheirEncoder(parts.vit, cfg.model.img_size)
        decayed, plain = utils.get_weight_decay_parameters(parts.trained)
        self.trained = [p for p in (*decayed, *plain) if p.requires_grad]
        groups = [
            {"params": decayed, "weight_decay": rule.decay[0]},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer = (
            LARS(groups, lr=rule.rate, momentum=0.9)
            if rule.lars
            else torch.optim.AdamW(groups, lr=rule.rate, betas=rule.betas)
        )
        gpu = ring.device.type == "cuda"
        loader = torch.utils.data.DataLoader(
            Held(ring.images, transform(method, cfg, rule.views)),
            batch_size=cfg.train.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=os.cpu_count() or 1 if gpu else 0,
            persistent_workers=gpu,
            pin_memory=gpu,
        )
        self.fed = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(self, batch: Any, progress: float) -> None:
        from lightly.models.utils import update_momentum

        rule = self.rule
        cosine = (1 + math.cos(math.pi * progress)) / 2
        for student, teacher in self.parts.followed:
            update_momentum(student, teacher, 1 - (1 - rule.momentum) * cosine)
        after = (progress - rule.warmup) / (1 - rule.warmup)
        share = progress / rule.warmup if after < 0 else (1 + math.cos(math.pi * after)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rule.rate * share
        self.optimizer.param_groups[0]["weight_decay"] = (
            rule.decay[1] + (rule.decay[0] - rule.decay[1]) * cosine
        )
        views = [v.to(self.device, non_blocking=True) for v in batch]
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.parts.loss(views, progress)
        loss.backward()
        if rule.clip:
            nn.utils.clip_grad_norm_(self.trained, rule.clip)
        self.optimizer.step()


# ---- the record --------------------------------------------------------------------------------------


def standings(record: harness.Record) -> None:
    """Adds `standings`, one entry per method and settings, the best first, and the headline."""
    groups: dict[str, list[harness.Row]] = {}
    for row in record["rows"]:
        if "points" in row:
            groups.setdefault(row["key"], []).append(row)
    found, best = [], set()
    for key, rows in groups.items():
        first = rows[0]
        last = [r["points"][-1] for r in rows]
        entry = {
            "key": key,
            "method": first["method"],
            "settings": first["settings"],
            "feature": first["feature"],
        }
        entry["seeds"] = [r["seed"] for r in rows]
        entry["curve"] = [
            {"minutes": statistics.mean(p["minutes"] for p in at)}
            | _spread([p[first["feature"]] for p in at])
            for at in zip(*(r["points"] for r in rows), strict=True)
        ]
        entry |= {name: statistics.mean(p[name] for p in last) for name in ("cls", "mean", "steps")}
        entry |= {
            n: statistics.mean(r[n] for r in rows) for n in ("epochs", "share_of_augmentation", "clock_s")
        }
        entry["first"], entry["last"] = entry["curve"][0]["mean"], entry["curve"][-1]["mean"]
        entry["parameters"] = first["parameters"]
        found.append(entry)
    found.sort(key=lambda e: -e["last"])
    # settings that all seeds have tried, before those that one has
    for entry in sorted(found, key=lambda e: -len(e["seeds"])):
        entry["counts"] = entry["method"] not in best
        best.add(entry["method"])
    record["standings"] = found
    if found:
        shown = [f"{e['method']} {e['last']:.1%}" for e in found if e["counts"]]
        record["headline"] = f"k-NN after {record['minutes']:g} minutes: {', '.join(shown)}"


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}


def page(record: harness.Record) -> list[str]:
    """Paragraphs of the record's page."""
    model, images = record["config"]["model"], record["images"]
    lines = []
    for entry in record["standings"]:
        end = entry["curve"][-1]
        curve = ", ".join(f"{100 * p['mean']:.1f}" for p in entry["curve"])
        lines.append(
            entry
            | {
                "final": f"{100 * end['mean']:.1f}"
                + (f" ± {100 * end['stdev']:.1f}" if len(entry["seeds"]) > 1 else ""),
                "course": curve,
                "both": f"{100 * entry['cls']:.1f} / {100 * entry['mean']:.1f}",
                "n": len(entry["seeds"]),
                "augmentation": f"{entry['share_of_augmentation']:.0%}",
            }
        )
    table = harness.columns(
        lines,
        *("method=method", "settings=settings", "k-NN, %=final", "class token / mean of patches=both"),
        *("course=course", "seeds=n", "steps=steps:.0f", "epochs=epochs:.1f"),
        *("augmentation=augmentation", "clock, s=clock_s:.0f", "parameters=parameters:,"),
    )
    return [
        f"![k-NN against minutes]({FIGURE})",
        f"Each run trains for {record['minutes']:g} minutes of {record['seconds_of']}. {images['train']} training "
        f"images; k-NN compares {images['test']} test images with {images['bank']} training images: raw pixels "
        f"{100 * record['raw_pixels']:.1f} %. ViT of width {model['width']}, depth {model['depth']}, patch "
        f"{model['patch_size']}; ours has two blocks of class attention on top, the others a class token in the trunk. "
        "Mean and deviation over seeds. Course: at the beginning, which is a random encoder, and at equal distances. "
        "Augmentation: share of the time that makes views, where that is not a part of the step. Clock: seconds from "
        "beginning to end, evaluation included; where they differ much, other work ran beside, which slows a step too.",
        table,
        *harness.lost(record),
    ]


LABELS = {
    "extrema_infonce": "ours, InfoNCE",
    "extrema_byol": "ours, BYOL",
    "mae": "MAE",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "dino": "DINO",
    "msn": "MSN",
    "lejepa": "LeJEPA",
}
_COLORS = ["#b40426", "#e8743b", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f"]


def draw(record: harness.Record, path: Path) -> None:
    """Draws k-NN against minutes: the better settings of each method, mean and deviation over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [e for e in record["standings"] if e["counts"]]
    # text stays text: small, and as large as the page's
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "race", "font.size": 11}):
        figure = Figure(figsize=(5, 5), layout="constrained", facecolor="white")
        ax = figure.subplots()
        for entry in shown:
            x, y, s = ([p[k] for p in entry["curve"]] for k in ("minutes", "mean", "stdev"))
            y, s, own = 100 * np.array(y), 100 * np.array(s), entry["method"] in OURS
            color = _COLORS[list(LABELS).index(entry["method"])]
            label = f"{LABELS[entry['method']]}: {y[-1]:.1f}"
            ax.plot(x, y, color=color, linewidth=3 if own else 1.5, marker="o", markersize=3, label=label)
            ax.fill_between(x, y - s, y + s, color=color, alpha=0.15, linewidth=0)
        # each curve begins at its own random encoder; the line is that of the best, which most are compared with
        for name, value, style in (
            ("raw pixels", record["raw_pixels"], ":"),
            *(("random encoder", e["first"], "--") for e in shown[:1]),
        ):
            label = f"{name}: {100 * value:.1f}"
            ax.axhline(100 * value, color="black", linewidth=1, linestyle=style, label=label)
        ax.set_xlabel(f"minutes of training ({record['seconds_of']})")
        ax.set_ylabel("k-NN accuracy, %")
        ax.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        figure.savefig(path, metadata={"Date": None})
