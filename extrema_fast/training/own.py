"""The preset `own`: settings for any images, chosen from their number and sizes and from the machine.

`choose` settles them once, when a run starts. The run's `config.json` stores them, and the same command later reads
them from there. There are two recipes: the paper's, for large sets of photographs on a GPU, and otherwise a short one
that learns in minutes (record 2026-11-27_cpu1_own_search). Settings given by the user are kept, and others adapt to
them.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import Config, from_dict, keep_count, nested, preset, typed
from ..data.image_files import ImageFiles, find_channels, read_as, sampled_sizes
from ..data.order import epoch_length
from ..data.resident import estimate_bytes, free_on_host
from ..data.sources import BUILT_IN, ImageSource, open_source, split_folders
from ..distributed import detect, pick_device, processes_here, share_of_cores
from ..errors import UsageError, counted
from ..files import fits, read_json
from ..weights.folder import model_config
from ..weights.load import open_weights
from .resolve import flops_per_image, precision
from .run_folder import check

log = logging.getLogger(__name__)

# images and their short side from which a GPU trains by the paper's recipe; images and memory from which ViT-B
LONG_IMAGES, LONG_SIDE = 50_000, 160
BASE_IMAGES, BASE_BYTES = 500_000, 40e9
# memory of a step per image (record 2026-11-26_step_bytes: 16.9 GiB for 256 of ViT-B), and the share that it may fill
STEP_BYTES, STEP_SHARE = {"small": 30e6, "base": 60e6}, 0.7
# the short recipe: patches down and across, images seen on a GPU, images seen and epochs at least, epochs at most
GRID, GPU_SEEN, LEAST_SEEN, LEAST_EPOCHS, MOST_EPOCHS = 8, 1_000_000, 15_000, 5, 400
# tokens of a view at least
LEAST_KEPT = 6
# images from which a batch says how the dimensions of tokens vary; targets of earlier steps to compare with, at most
ENOUGH, QUEUE = 64, 1024
# on a CPU: seconds of a run, FLOP/s of a core in steps of such sizes (bf16: 88e9 and 102e9 in the records; fp32: 38e9
# on a busy machine), pixels of JPEG files that it decodes in a second; further cores add less, in the end nothing
SECONDS, CORE_FLOPS, CORE_PIXELS = 480, {"bf16": 90e9, "fp32": 40e9}, 150e6
SCALING, MOST_CORES = 0.6, 16
# from this many on, a larger encoder
MANY_CORES = 8
# peak learning rate of the short recipe at batches of 32 and 64
PEAK_LR = 7e-4
# share of the free memory that decoded images may take
HELD = 0.3


class Images(NamedTuple):
    """What the settings depend on, of the images."""

    # that train
    total: int
    # 0: no labels
    classes: int
    # median of the shorter sides in pixels, mean pixels of an image, bytes of all decoded
    side: int
    pixels: float
    bytes: int
    # share to hold out
    holdout: float
    # where test images come from
    test: str
    channels: int = 3


class Machine(NamedTuple):
    """What the settings depend on, of the machine."""

    # `cpu` or `cuda`
    kind: str
    # of the run, on all machines
    processes: int
    # of this process
    cores: int
    # of the GPU, else what is free of the CPU's for this process
    bytes: float
    # `fp32` or `bf16`
    precision: str

    @property
    def flops(self) -> float:
        """FLOP/s of this process on a CPU, estimated."""
        return CORE_FLOPS[self.precision] * self._cores

    @property
    def pixels(self) -> float:
        """Pixels of JPEG files decoded in a second, estimated."""
        return CORE_PIXELS * self._cores

    @property
    def _cores(self) -> float:
        n = min(self.cores, MOST_CORES)
        return 1 + SCALING * (n - 1)

    def __str__(self) -> str:
        what = (
            f"{self.bytes / 1e9:.0f} GB of GPU memory"
            if self.kind == "cuda"
            else counted(self.cores, "CPU core")
        )
        return f"{self.processes} processes of {what}" if self.processes > 1 else what


# options that say how images are read
_READING = ("train.seed", "model.in_chans")


def choose(
    given: Mapping[str, Any], *, overwrite: bool = False, init_from: str | Path | None = None
) -> tuple[Config, Config]:
    """The configuration of a run on one's own images; logs what was chosen and why.

    Args:
        given: options by dotted name that stand as they are; `data.train` names the images, a folder that may hold
            `train` and `test` (or `val`).
        overwrite: a run that is in the folder does not count.
        init_from: weights that the run begins with: the encoder is theirs.

    Returns:
        The configuration, and the same without what is given. Where a run was begun in the folder they are that
        run's, the first changed by `given`.

    Raises:
        UsageError: no images, not what is expected, options that do not fit, or weights that cannot be read.
        DataError: images that cannot be read.
    """
    given = typed(given)
    if data := given.get("data.train"):
        given["data.train"], test = split_folders(_plain(data))
        if test and not given.get("data.holdout"):
            given.setdefault("data.test", test)
    elif "out" not in given:
        raise UsageError(
            "own: no images; name them in its place (extrema-fast pretrain FOLDER) or by --data.train"
        )
    out = given.setdefault("out", f"runs/{run_name(data or '')}")
    begun = {} if overwrite or not check(Path(out)) else read_json(Path(out) / "config.json", {})
    if begun:
        before = from_dict(begun, preset("own"), recorded=True)
        if data and _same(data, before.data.train):
            given["data.train"] = before.data.train
        log.info("%s: settings chosen when this run was begun (config.json); --overwrite chooses again", out)
        made_from = read_json(Path(out) / "env.json", {}).get("preset")
        changes = made_from["changes"] if made_from and fits(made_from, {"changes": dict}) else {}
        return from_dict(nested(given), before), _valid(changes, before)
    if not data:
        raise UsageError(f"own: no images, and no run in {out} that names them; add --data.train FOLDER")
    theirs = _shapes_of(init_from, given) if init_from else {}
    rank, processes, local = detect(os.environ)
    simple = {k: v for k, v in given.items() if k.startswith(("data.", "system.")) or k in _READING}
    asked = from_dict(nested(simple), preset("own"))
    device = pick_device(asked.system.device, local, processes)
    # none, where that is what is asked for
    splits = not {"data.test", "data.holdout"} & given.keys()
    images = _probe(asked, splits, given.get("model.in_chans"))
    if images.total < 2:
        raise UsageError(
            f"{asked.data.train}: {counted(images.total, 'image')} to train on; a run needs at least 2"
        )
    machine = Machine(
        device.type,
        processes,
        asked.system.threads or share_of_cores(),
        _memory(device),
        precision(given.get("train.precision", "auto"), device.type),
    )
    settings = Settings(images, machine, given, theirs, str(init_from or ""))
    cfg = settings.settle()
    if rank == 0:
        log.info("%s\n%s", f"settings for {cfg.data.train} on {machine}, into {out}:", settings.table())
    return cfg, _valid(settings.chosen | {k: given[k] for k in ("data.train", "out")}, preset("own"), cfg)


def _shapes_of(weights: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options, where they are not given, with which an encoder, and a run's crops and heads, fit some weights."""
    meta = open_weights(weights, num_heads=given.get("model.heads") or None).meta
    model, head = model_config(meta), meta.get("head", {})
    shapes: dict[str, Any] = {"model.mlp_ratio": model.mlp_ratio, "model.pool_depth": model.pool_depth}
    if "model.size" not in given:
        shapes |= dict(zip(("model.width", "model.depth", "model.heads"), model.shape, strict=True))
    if fits(head, {"hidden": int, "out": int, "predictor_hidden": int}):
        # a run's networks go on as they are
        shapes |= {"model.img_size": model.img_size, "model.patch_size": model.patch_size}
        shapes |= {f"head.{k}": head[k] for k in ("hidden", "out", "predictor_hidden")}
        # of another norm they have other parameters; of older runs it was this one
        shapes["head.norm"] = head.get("norm", "layer")
    return {k: v for k, v in shapes.items() if k not in given}


def _valid(options: Mapping[str, Any], base: Config, otherwise: Config | None = None) -> Config:
    """`base` with other options, for comparison; where these do not fit together, `otherwise` or `base`."""
    try:
        return from_dict(nested(typed(options)), base, recorded=True)
    except UsageError:
        return otherwise or base


# ---- what there is --------------------------------------------------------------------------------


def run_name(data: str) -> str:
    """Name of the run folder of a data set: that of its folder or file, without what says `train`."""
    path = Path(os.path.abspath(os.path.expanduser(data)))
    if any(c in path.name for c in "*?[{") or path.name.lower() == "train":
        path = path.parent
    name = path.name if path.is_dir() else path.name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "own"


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return counted(max(1, round(minutes)), "minute") if minutes < 100 else f"{minutes / 60:.2g} hours"


def _plain(data: str) -> str:
    """A path without what makes two spellings of one: `imgs/` and `./imgs` are `imgs`."""
    path = data if data in BUILT_IN or "://" in data else os.path.normpath(data)
    return data if path in BUILT_IN else path


def _same(data: str, before: str) -> bool:
    try:
        return os.path.samefile(os.path.expanduser(data), os.path.expanduser(before))
    except OSError:
        return False


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_on_host() / processes_here()


def _probe(asked: Config, splits: bool, channels: int | None) -> Images:
    """Opens the training images and reads some headers; what is wrong with the set is said when it is trained on."""
    data, seed = asked.data, asked.train.seed

    def opened(holdout: float) -> ImageSource:
        found = open_source(data.train, "train", limit=data.limit, seed=seed, holdout=holdout)
        return read_as(found, channels or find_channels(found))

    with _unheard():
        source = opened(data.holdout)
        sizes = np.bincount(np.zeros(0, np.int64) if source.labels is None else source.labels.numpy())
        holdout, test = data.holdout, data.test or ("built in" if data.train in BUILT_IN else "")
        if splits and not test and np.count_nonzero(sizes) > 1 and sizes.max() > 1:
            # enough to count by, and no more than a tenth or 10,000
            holdout = round(min(0.2 if len(source) < 1000 else 0.1, 10_000 / len(source)), 4)
            source = opened(holdout)
        files = ImageFiles(source, data)
        try:
            heights, widths = sampled_sizes(files).T
            decoded = estimate_bytes(files)
        finally:
            files.close()
    return Images(
        epoch_length(source),
        len(source.classes),
        int(np.median(np.minimum(heights, widths))),
        float(np.mean(heights.astype(np.int64) * widths)),
        decoded,
        holdout,
        test,
        source.channels,
    )


@contextmanager
def _unheard() -> Iterator[None]:
    """Context in which warnings about images are not shown; opening them for training shows them."""
    logger = logging.getLogger("extrema_fast.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- the rules ------------------------------------------------------------------------------------


class Settings:
    """Settles option after option; one that is given stands, and those after it follow from it.

    Args:
        given: options by dotted name, typed.
        theirs: others that the weights have which the run begins with, and the name of these; empty: none.
    """

    def __init__(
        self,
        images: Images,
        machine: Machine,
        given: Mapping[str, Any],
        theirs: Mapping[str, Any] | None = None,
        weights: str = "",
    ) -> None:
        self.theirs, self.weights = theirs or {}, weights
        self.images, self.machine, self.given = images, machine, {**self.theirs, **given}
        self.chosen: dict[str, Any] = {}
        self.lines: list[tuple[str, str, str]] = []
        self.long = machine.kind == "cuda" and images.total >= LONG_IMAGES and images.side >= LONG_SIDE

    def settle(self) -> Config:
        """The configuration; UsageError where what is given does not fit."""
        self._test()
        tokens = self._crop()
        self._views(tokens)
        self._encoder()
        self._loss()
        batch = self._batch()
        epochs = self._length(batch)
        self._cadence(epochs, epochs * max(1, self.images.total // batch))
        return self._config({})

    def table(self) -> str:
        """What was chosen and why, a line each."""
        first, second = (max(len(line[i]) for line in self.lines) for i in (0, 1))
        return "\n".join(f"  {a:<{first}}  {b:<{second}}  {c}" for a, b, c in self.lines)

    def _pick(self, name: str, value: Any) -> Any:
        if name in self.given:
            return self.given[name]
        self.chosen[name] = value
        return value

    def _say(self, setting: str, value: str, reason: str, *names: str) -> None:
        if names and all(name in self.given for name in names):
            theirs, has = [name in self.theirs for name in names], f"as {self.weights} has it"
            reason = has if all(theirs) else f"given, the rest {has}" if any(theirs) else "given"
        self.lines.append((setting, value, reason))

    def _config(self, rest: Mapping[str, Any]) -> Config:
        options = {**self.chosen, **self.given, **rest}
        return from_dict(nested(options), preset("own"))

    @property
    def _so_far(self) -> Config:
        """What is settled, with a length of one epoch, and any batch until that is settled."""
        rest: dict[str, Any] = {"train.epochs": 1, "optim.warmup_epochs": 0.0}
        if "train.batch_size" not in {**self.chosen, **self.given}:
            rest["train.batch_size"] = 2 * max(1, self.given.get("train.accumulation", 1))
        return self._config(rest)

    def _test(self) -> None:
        images = self.images
        if images.holdout:
            held = self._pick("data.holdout", images.holdout)
            self._say("test images", f"{held:.0%} of all", "labels, no data.test: held out", "data.holdout")
        elif images.test:
            self._say("test images", images.test, "k-NN while training")
        else:
            why = ("no labels", "one class", "no class has two images")[min(images.classes, 2)]
            why = "given" if {"data.test", "data.holdout"} & self.given.keys() else why
            self._say("test images", "none", f"{why}: no k-NN, collapse is watched on training images")

    def _crop(self) -> int:
        most = 16 if self.machine.kind == "cuda" else 8
        patch = 16 if self.long else min(max(self.images.side // GRID, 4), most)
        if sides := self.given.get("model.img_size"):
            # the divisor of both that makes the nearest number of patches
            near = min(sides) / (14 if self.long else GRID)
            divisors = [p for p in range(1, min(sides) + 1) if all(s % p == 0 for s in sides)]
            patch = min(divisors, key=lambda p: abs(math.log(p / near)), default=1)
        patch = self._pick("model.patch_size", patch)
        channels = self._pick("model.in_chans", self.images.channels)
        side = patch * max(1, round(224 / max(patch, 1)) if self.long else GRID)
        height, width = self._pick("model.img_size", (side, side))
        why = (
            "as in the paper"
            if self.long
            else f"the short side is {self.images.side} px; few tokens, short steps"
        )
        value = f"{height} x {width} px, patches of {patch}" + f", {channels} channels" * (channels != 3)
        self._say("crop", value, why, "model.img_size", "model.patch_size")
        return (height // max(patch, 1)) * (width // max(patch, 1))

    def _views(self, tokens: int) -> None:
        keep, ratio = self.given.get("mask.keep", 0), self.given.get("mask.ratio")
        kept = keep or (LEAST_KEPT if ratio is None else keep_count(tokens, ratio))
        views = self._pick("mask.views", min(5, max(1, tokens // max(kept, 1))))
        wanted = 0.8 if self.long else 0.9
        fits = views <= 5 and keep_count(tokens, wanted) >= LEAST_KEPT
        ratio = self._pick("mask.ratio", wanted if fits else 1 - 1 / max(views, 1))
        value = f"{views} of {keep or keep_count(tokens, ratio)} of {tokens} tokens"
        why = "the paper's 80 % x 5" if fits and self.long else f"at least {LEAST_KEPT} tokens each"
        self._say("views", value, why, "mask.views", "mask.ratio")

    def _encoder(self) -> None:
        images, machine = self.images, self.machine
        large = self.long and images.total >= BASE_IMAGES and machine.bytes >= BASE_BYTES
        self._pick("model.size", "base" if large else "small" if self.long else "tiny")
        few = machine.kind == "cpu" and machine.cores < MANY_CORES
        width, depth, heads = (128, 2, 2) if few else (192, 12 if machine.kind == "cuda" else 6, 3)
        of_size = self.long or "model.size" in self.given
        if of_size:
            width = depth = heads = 0
        self._pick("model.width", width)
        self._pick("model.depth", depth)
        self._pick("model.mlp_ratio", 2.0 if few and not of_size else 4.0)
        # of a width that is given: 64 each
        self._pick("model.heads", 0 if "model.width" in self.given else heads)
        self._pick("model.drop_path", 0.1 if self.long else 0.0)
        # on `photos` BYOL learns next to nothing with a whitened kernel (record 2026-11-27_cpu1_photos_byol90)
        contrastive = not self.long and self.given.get("head.loss", "infonce") == "infonce"
        self._pick("model.patch_init", "whitened" if contrastive and not self.weights else "xavier")
        width, depth, _ = self._so_far.model.shape
        hidden = 4096 if self.long else 512 if width <= 128 else 1024
        self._pick("head.hidden", hidden)
        self._pick("head.predictor_hidden", hidden)
        self._pick("head.out", 256 if self.long else 128)
        why = f"{counted(images.total, 'image')}, {machine}"
        names = ("model.width", "model.depth") if "model.width" in self.theirs else ("model.size",)
        self._say("encoder", f"width {width}, depth {depth}", why, *names)

    def _loss(self) -> None:
        images = self.images
        loss = self._pick("head.loss", "byol" if self.long else "infonce")
        self._pick("head.temperature", 0.2 if self.long else 0.1)
        self._pick("data.policy", "spatial+color" if self.long else "spatial")
        self._pick("data.area", (0.2, 1.0) if self.long else (0.4, 1.0))
        # statistics of a step, whose rows must be there at once
        at_once = self.given.get("train.accumulation", 1) == 1 and images.total >= ENOUGH and not self.long
        self._pick("head.norm", "batch" if at_once else "layer")
        self._pick("head.decorrelation", 0.03 if at_once else 0.0)
        # a quarter of the images: an image's own earlier target is no other image
        earlier = min(QUEUE, 2 ** int(math.log2(images.total / 4))) if images.total >= ENOUGH else 0
        queue = self._pick("head.queue", earlier if loss == "infonce" and not self.long else 0)
        value = f"{loss}, beside {queue} earlier targets" if queue else loss
        why = (
            "as in the paper"
            if self.long
            else "in short runs more than BYOL; no jitter, for colors may count"
        )
        self._say("loss", value, why, "head.loss")

    def _batch(self) -> int:
        images, machine, cfg = self.images, self.machine, self._so_far
        if self.long:
            per_step = STEP_BYTES.get(cfg.model.size, STEP_BYTES["base"])
            most = min(2048, images.total / 64, machine.processes * STEP_SHARE * machine.bytes / per_step)
            why = "as many as fit in memory, at most the paper's 2048"
        else:
            most = min(32 if images.total < 10_000 else 64, max(2, images.total / 2))
            why = "small batches learn most per image in short runs"
        # a power of two for each process and micro-batch
        parts = machine.processes * cfg.train.accumulation
        batch = self._pick("train.batch_size", parts * 2 ** max(0, math.floor(math.log2(most / parts))))
        if batch > images.total:
            raise UsageError(
                f"train.batch_size: {batch} is more than the {counted(images.total, 'image')} to train on"
            )
        if self.long:
            self._pick("optim.base_lr", 1.5e-4)
        else:
            scale = math.sqrt(min(batch, 32) / 32 * max(batch, 64) / 64)
            self._pick("optim.base_lr", float(f"{PEAK_LR * scale * 256 / max(batch, 1):.3g}"))
        value = f"{batch}, peak learning rate {self._so_far.peak_lr:.2g}"
        self._say("batch", value, why, "train.batch_size", "optim.base_lr")
        return batch

    def _length(self, batch: int) -> int:
        images, machine = self.images, self.machine
        seconds, decoded, flops = 0.0, images.pixels / machine.pixels, flops_per_image(self._so_far)
        if machine.kind == "cpu":
            fits = images.bytes <= HELD * machine.bytes
            if self._pick("data.resident", "host" if fits else "off") != "off":
                decoded = 0.0
            seconds = (flops / machine.flops + decoded) / machine.processes
        wanted = SECONDS / seconds if seconds else GPU_SEEN
        fitting = math.ceil(max(wanted, LEAST_SEEN) / images.total)
        epochs = self._pick(
            "train.epochs", 300 if self.long else min(MOST_EPOCHS, max(LEAST_EPOCHS, fitting))
        )
        share = 40 / 300 if self.long else 2 / 34
        self._pick("optim.warmup_epochs", float(f"{share * epochs:.3g}"))
        steps = max(1, epochs * (images.total // max(batch, 1)))
        self._pick("optim.momentum", 0.996 if self.long else round(min(0.996, max(0.9, 1 - 1000 / steps)), 4))
        seen = epochs * images.total
        if seconds:
            why = f"about {_time(seen * seconds)}: an estimate from {flops * seen / 1e12:.3g} TFLOP and decoding"
            if decoded > flops / machine.flops:
                why += "; packed smaller, they are read faster: extrema-fast pack"
        else:
            why = f"{flops * seen:.2g} FLOP; the time was never measured on a GPU"
            # held images are decoded once
            if images.bytes > HELD * machine.bytes:
                time = _time(seen * decoded / machine.processes)
                why += f"; decoding on the CPU takes about {time}, of packed images less"
        self._say("length", f"{counted(epochs, 'epoch')} of {steps // max(epochs, 1)} steps", why)
        return epochs

    def _cadence(self, epochs: int, steps: int) -> None:
        self._pick("eval.every_epochs", 10 if self.long else max(1, -(-epochs // 5)))
        if not self.long:
            # decoded in 20 s
            most = max(200, min(2000, int(20 * self.machine.pixels / self.images.pixels)))
            self._pick("eval.max_train", most)
            self._pick("eval.max_test", most // 2)
            if self.images.classes:
                # no more votes than a class has images
                self._pick("eval.k", max(1, min(20, self.images.total // self.images.classes)))
            self._pick("log.every_steps", max(1, steps // 50))
        self._pick("ckpt.every_epochs", 1 if self.long else max(1, epochs // 20))
