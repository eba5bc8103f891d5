"""Images per second of the data path next to the pipelines that a user would otherwise write, in turns.

python -m benchmarks loader --data imagenet/train --threads 8
python -m benchmarks loader --data imagenet/train --memory-epochs 50 --limit 500

Stages: `crop`, decoding, random crop, resize and flip; `views`, two normalized color views of each crop in addition;
`train`, that and training steps. Each way runs in its own process, all on the same cores, as many as --threads; they
take turns, and the others are stopped while one is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from extrema_fast.config import DataConfig
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import Batch, TrainLoader
from extrema_fast.data.resident import Place
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError

from . import harness
from .baselines import Inputs, Ours
from .harness import RATIO, TIMES, Record, Row, columns
from .processes import Turns, status_mb
from .step import HUGE_PAGES, MODELS, configuration

STAGES = {
    "crop": "decoding, random crop, resize, flip",
    "views": "crop, then two color views, normalized, where the step runs",
    "train": "views feeding training steps",
}
WAYS = {
    "ours": "TrainLoader, decoded by DALI on the CPU",
    "ours-gpu": "TrainLoader, decoded by DALI on the GPU",
    "ours-pil": "TrainLoader, decoded by PIL in threads",
    "ours-held": "TrainLoader, images held decoded by the CPU (data.resident host)",
    "ours-held-gpu": "TrainLoader, images held decoded by the GPU (data.resident gpu)",
    "dataloader": "PIL and torch.utils.data.DataLoader, transforms by hand",
    "torchvision": "torchvision's transforms v2 on PIL images, DataLoader",
}
# of a DataLoader's worker; torch's default
PREFETCH = 2


def missing(way: str) -> str:
    """Returns why a way cannot run here; empty when it can."""
    if way.endswith("-gpu") and not torch.cuda.is_available():
        return "needs a CUDA device"
    package = {"torchvision": "torchvision", "ours": "nvidia.dali", "ours-gpu": "nvidia.dali"}.get(way, "PIL")
    try:
        importlib.import_module(package)
    # a torchvision of another torch fails in many ways
    except Exception as error:
        return f"{package} cannot be imported: {error}"
    return ""


# ---- what a user would write ----------------------------------------------------------------------


class Photos(Dataset):
    """Images as PIL and Python make them, with torchvision's distributions.

    Items are [H, W, 3] uint8 (crop) or [2, 3, H, W] fp32: two color versions of one crop, normalized (views).
    """

    def __init__(self, cfg: DataConfig, size: tuple[int, int], stage: str) -> None:
        self.source = open_source(cfg.train, "train", limit=cfg.limit)
        self.cfg, self.size, self.stage = cfg, size, stage

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Tensor:
        from PIL import Image

        crop = self.crop(Image.open(io.BytesIO(self.source.read(row))).convert("RGB"))
        if self.stage == "crop":
            return torch.from_numpy(np.array(crop))
        return torch.stack([self.tensor(self.color(crop)) for _ in range(2)])

    def crop(self, image: Any) -> Any:
        """RandomResizedCrop and a flip."""
        from PIL import Image

        box = self.random_box(image.width, image.height)
        image = image.crop(box).resize(self.size[::-1], Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < self.cfg.flip else image

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns (left, top, right, bottom) as torchvision's RandomResizedCrop draws it."""
        low, high = map(math.log, self.cfg.ratio)
        for _ in range(10):
            area = width * height * random.uniform(*self.cfg.area)
            ratio = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height

    def color(self, image: Any) -> Any:
        """ColorJitter in random order, then RandomGrayscale."""
        from PIL import Image, ImageEnhance

        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        *strengths, hue = self.cfg.jitter
        for op in random.sample(range(4), 4) if random.random() < self.cfg.jitter_prob else []:
            if op < 3:
                x = strengths[op]
                image = enhance[op](image).enhance(random.uniform(max(0, 1 - x), 1 + x))
                continue
            h, s, v = image.convert("HSV").split()
            # 8 bits wrap around
            turned = np.array(h, dtype=np.uint8) + np.uint8(int(random.uniform(-hue, hue) * 255) % 256)
            image = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
        return image.convert("L").convert("RGB") if random.random() < self.cfg.gray_prob else image

    def tensor(self, image: Any) -> Tensor:
        """Returns [3, H, W] fp32, normalized."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.cfg.mean, self.cfg.std))
        return x.sub_(mean).div_(std)


class TorchvisionPhotos(Photos):
    """The same with torchvision's transforms v2 on PIL images."""

    def __init__(self, cfg: DataConfig, size: tuple[int, int], stage: str) -> None:
        super().__init__(cfg, size, stage)
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(*cfg.jitter)
        crop = [v2.RandomResizedCrop(size, cfg.area, cfg.ratio), v2.RandomHorizontalFlip(cfg.flip)]
        color = [v2.RandomApply([jitter], cfg.jitter_prob), v2.RandomGrayscale(cfg.gray_prob)]
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(cfg.mean, cfg.std)]
        # in place of the methods
        vars(self).update(crop=v2.Compose(crop), color=v2.Compose(color), tensor=v2.Compose(tensor))


def batches(dataset: Photos, batch: int, workers: int) -> Generator[Tensor, None, None]:
    """Yields endless shuffled batches of worker processes, which end with the generator."""
    # one endless epoch: a user's would wait for its first batches again and again
    sampler: Sampler = RandomSampler(dataset, num_samples=10**9)
    # this process was spawned, a user's program is not: its workers are forked where that is possible
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": method}
    loader = DataLoader(dataset, batch, sampler=sampler, drop_last=True, prefetch_factor=PREFETCH, **options)
    yield from loader


# ---- inside a process -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is read and made, and with how many threads (or worker processes) and cores."""

    data: DataConfig
    size: tuple[int, int]
    batch: int
    threads: int
    model: str = "tiny"
    device: str = "cpu"


class Loading:
    """One way of making batches at a stage, ready and at rest."""

    def __init__(self, way: str, stage: str, setting: Setting, warmup: int) -> None:
        self.setting, self.stack, cores = setting, ExitStack(), limit_cores(setting.threads)
        torch.set_num_threads(setting.threads)
        began = time.perf_counter()
        self.step = trainer(setting, way) if stage == "train" else None
        self.stage, self.images = stage, 0
        self.fetch, self.use = self.ours(way) if way.startswith("ours") else self.baseline(way)
        self.one()
        first = time.perf_counter() - began
        for _ in range(min(warmup, self.images // setting.batch)):
            self.one()
        self.built = {"first_batch_s": first, "cores": cores, "images": self.images}

    def baseline(self, way: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        """Returns (fetch a batch, use it); fetching is waiting, as far as training is concerned."""
        s = self.setting
        dataset = (Photos if way == "dataloader" else TorchvisionPhotos)(s.data, s.size, self.stage)
        self.images = len(dataset)
        made = self.stack.enter_context(closing(batches(dataset, s.batch, s.threads)))
        # a step takes the same time on any images: its own ones stand for the views that arrive
        images = torch.zeros(s.batch, *s.size, 3, dtype=torch.uint8, device=s.device)
        inputs = Inputs(images, torch.arange(s.batch))

        def take(views: Tensor) -> None:
            views.to(s.device, non_blocking=True)
            if self.step is not None:
                self.step.step(inputs)

        return made.__next__, take

    def ours(self, way: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        """The same of `TrainLoader`."""
        s = self.setting
        decoder: Any = "dali" if way in ("ours", "ours-gpu") else "pil"
        data = dataclasses.replace(s.data, loader=decoder, threads=s.threads)
        source = open_source(data.train, "train", limit=data.limit)
        self.images = len(source)
        device = "cuda" if way.endswith("-gpu") else "cpu"
        place: Place = "off"
        if way.startswith("ours-held"):
            place = "gpu" if device == "cuda" else "host"
        loader = TrainLoader(source, data, s.size, batch_size=s.batch, seed=0, device=device, resident=place)
        self.stack.enter_context(loader)

        def jitter(batch: Batch) -> None:
            images, index = (t.to(s.device, non_blocking=True) for t in (batch.images, batch.index))
            if self.step is not None:
                self.step.step(Inputs(images, batch.index))
            elif self.stage == "views":
                color_jitter(images, jitter_params(index, data, seed=0, epoch=batch.epoch), data)

        return loader.__next__, jitter

    def one(self) -> float:
        """Makes one batch; returns the seconds it was waited for."""
        began = time.perf_counter()
        batch = self.fetch()
        waited = time.perf_counter() - began
        self.use(batch)
        return waited

    def turn(self, warm: int, count: int) -> dict[str, list[float]]:
        """Makes `warm` untimed batches, `count` timed ones; returns ms per batch and the share of waiting."""
        for _ in range(warm):
            self.one()
        self.wait()
        began = time.perf_counter()
        waited = sum(self.one() for _ in range(count))
        self.wait()
        took = time.perf_counter() - began
        return {"samples_ms": [1000 * took / count], "waits": [waited / took]}

    def wait(self) -> None:
        """Waits for a GPU."""
        if self.setting.device.startswith("cuda"):
            torch.cuda.synchronize()

    def epochs(self, count: int) -> dict[str, Any]:
        """Makes `count` epochs: resident memory in MB at the end of each."""
        found = []
        for _ in range(count):
            for _ in range(self.images // self.setting.batch):
                self.one()
            found.append(status_mb("VmRSS"))
        return {"rss_mb": found, "peak_mb": status_mb("VmHWM")}

    def close(self) -> None:
        """Ends threads and worker processes."""
        self.stack.close()


def trainer(s: Setting, way: str) -> Ours:
    """Returns our training step at the setting's size; views that arrive finished need no color jitter."""
    sections: dict[str, Any] = {"model": {"img_size": list(s.size)}, "system": {"threads": s.threads}}
    cfg = configuration(s.model, batch=s.batch, color=way.startswith("ours"), **sections)
    return Ours(cfg, torch.device(s.device), "auto")


def limit_cores(count: int) -> int:
    """Restricts this process and its children to `count` cores (Linux); returns how many there are now."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return len(os.sched_getaffinity(0))


# ---- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Images/s of the data path, ours and what a user would write: crop, color views, training."""
    args = options(argv)
    unable = {way: why for way in args.ways if (why := missing(way))}
    if args.list:
        print("\n".join(f"  {way:12} {WAYS[way]}  {unable.get(way, '')}" for way in args.ways))
        print("  stages: " + "; ".join(f"{s}, {STAGES[s]}" for s in args.stages))
        return 0
    args.ways = [way for way in args.ways if way not in unable]
    if not args.ways:
        raise UsageError(f"--ways: none of them runs here: {unable}")
    with tempfile.TemporaryDirectory() as folder:
        data = made(Path(folder), max(128, 2 * args.batch)) if args.data == "made" else args.data
        images = len(open_source(data, "train", limit=args.limit))
        if images < args.batch:
            raise UsageError(
                f"--batch: {args.batch} is more than the {images} images of {args.data}; use fewer"
            )
        rows = measure(data, args)
    names = ("data", "img_size", "batch", "threads", "model", "device", "rounds", "memory_epochs")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"images": images, "batches_per_turn": args.steps}
    over = f" over {args.memory_epochs} epochs" if args.memory_epochs else ""
    what = f"data path{over}, {args.data}, {args.img_size} px"
    record = harness.new_record(what, "loader", argv, args.note, settings=settings, rows=rows, not_run=unable)
    record["ratios"] = ratios(rows)
    texts = [f"{r['stage']} {r['ratio']:.2f}x {r['other']}" for r in record["ratios"] if r["ours"] == "ours"]
    texts += [f"{r['way']} {r['mb_per_epoch']:+.3f} MB per epoch" for r in rows if "mb_per_epoch" in r]
    record["headline"] = "; ".join(texts)
    harness.write_record(record, page(record), args)
    return 0


def options(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; raises UsageError."""
    p = harness.parser("loader", main.__doc__)
    add = p.add_argument
    add("--data", default="photos", help="as data.train: a folder, list file, shards; `made`: JPEGs of noise")
    add("--limit", type=int, default=0, help="use only this many images")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    add("--img-size", type=int, default=224)
    add("--batch", type=int, default=32)
    add("--model", choices=MODELS, default="tiny", help="of the stage `train`")
    add("--memory-epochs", type=int, default=0, metavar="N", help="instead: resident memory over N epochs")
    args = p.parse_args(argv)
    for name in ("batch", "img_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    args.threads = args.threads or 2
    harness.settle(args)
    args.rounds, args.steps = args.rounds or (5 if args.quick else 10), args.steps or (3 if args.quick else 8)
    return args


def made(folder: Path, count: int) -> str:
    """Writes JPEGs of 500 x 375 with about the bytes and detail of photographs: noise of several scales."""
    from PIL import Image

    for i in range(count):
        generator = np.random.default_rng(i)
        total = np.full((375, 500, 3), 128.0)
        for scale in (4, 8, 16, 64, 250):
            noise = generator.normal(size=(375 // scale + 1, 500 // scale + 2, 3)) * 8 * scale**0.4
            rough = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8))
            total += np.asarray(rough.resize((500, 375), Image.Resampling.BICUBIC), float) - 128
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=92)
    return str(folder)


def measure(data: str, args: argparse.Namespace) -> list[Row]:
    """Returns one row per way and stage; the ways of a stage take turns."""
    rows: list[Row] = []
    size = (args.img_size, args.img_size)
    cfg = DataConfig(train=data, limit=args.limit)
    setting = Setting(cfg, size, args.batch, args.threads, args.model, args.device)
    for stage in ["views"] if args.memory_epochs else args.stages:
        mine = {
            w: {"key": f"{w} | {stage}", "way": w, "stage": stage, "batch": args.batch} for w in args.ways
        }
        with Turns(mine, pause=True) as turns:
            for way in args.ways:
                environment = {HUGE_PAGES: "1"} if way.startswith("ours") else {}
                warmup = 4 if args.quick else 64
                turns.start(way, Loading, way, stage, setting, warmup, environment=environment)
            if args.memory_epochs:
                turns.add("epochs", args.memory_epochs)
            else:
                # what was prepared ahead is used up before the clock starts
                ahead = 1 if stage == "train" else PREFETCH * args.threads + 4
                turns.run(args.rounds, ahead, max(1, args.steps // 4) if stage == "train" else args.steps)
        rows += mine.values()
        if turns.interrupted:
            break
    for row in rows:
        harness.speed(row)
        if "waits" in row:
            row["waited"] = float(np.median(row.pop("waits")))
        if len(row.get("rss_mb", [])) > 1:
            # slope over the last four fifths, by least squares
            late = np.arange(len(row["rss_mb"]))[len(row["rss_mb"]) // 5 :]
            row["last_mb"] = row["rss_mb"][-1]
            row["mb_per_epoch"] = float(np.polyfit(late, np.asarray(row["rss_mb"])[late], 1)[0])
    return rows


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns every way of ours against each baseline at each stage."""
    timed = [r for r in rows if "p50_ms" in r]
    return [
        {"stage": a["stage"], "ours": a["way"], "other": b["way"]}
        | harness.ratio(b["samples_ms"], a["samples_ms"])
        for a in timed
        for b in timed
        if a["stage"] == b["stage"] and a["way"].startswith("ours") and not b["way"].startswith("ours")
    ]


def page(record: Record) -> list[str]:
    """Returns the record to read."""
    s, rows = record["settings"], record["rows"]
    timed = [r for r in rows if "p50_ms" in r]
    grown = [r for r in rows if "mb_per_epoch" in r]
    growth = ("MB at the end=last_mb:.1f", "MB per epoch=mb_per_epoch:+.3f", "peak MB=peak_mb:.1f")
    speed = ("stage=stage", "way=way", *TIMES, "images/s=images_per_s:.1f", "waited=waited:.0%")
    return [
        f"{s['images']} images of {s['data']}, crops of {s['img_size']}, batch {s['batch']}, {s['threads']} decoding "
        "threads or worker processes, and as many cores for everything that a way starts.",
        *([columns(grown, "way=way", *growth), "Resident memory at the end of each epoch."] if grown else []),
        columns(record["ratios"], "stage=stage", "ours=ours", "against=other", *RATIO),
        columns(timed, *speed),
        f"{s['rounds']} turns of {s['batches_per_turn']} batches (train: a quarter of that), ms per batch; a turn is "
        "one sample, as loaders deliver in bursts. Waited: share of the time in which no batch was there.",
        "\n".join(f"* `{name}`: {about}" for name, about in (WAYS | STAGES).items()),
        f"`train` trains ViT-{s['model']} on {s['device']}.",
        *harness.lost(record),
    ]
