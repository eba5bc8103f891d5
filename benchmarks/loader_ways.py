"""Ways of making batches, by name, and what each does at a stage of the data path."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extrema_fast.config import Config, DataConfig, from_dict
from extrema_fast.data.augment import color_jitter, jitter_params
from extrema_fast.data.loader import Batch, TrainLoader
from extrema_fast.data.sources import ImageSource
from extrema_fast.distributed import World
from extrema_fast.train import train_step
from extrema_fast.training import step as step_module
from extrema_fast.training.state import build, prepare_torch, wrap

from . import loader_baselines as baselines

STAGES = {
    "decode": "whole images",
    "crop": "decoding, random crop, resize, flip",
    "views": "crop, then two colour views, normalised, where the step runs",
    "end to end": "views feeding training steps",
}


@dataclass(frozen=True)
class Way:
    """One way of making batches.

    ours    the product's loader, else a baseline's
    device  where ours decodes
    """

    name: str
    about: str
    ours: bool = True
    kind: str = "dali"
    device: str = "cpu"

    def missing(self) -> str:
        """Why it cannot run here; empty when it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device"
        if self.ours and self.kind == "dali" and importlib.util.find_spec("nvidia.dali") is None:
            return "DALI is not installed (extras dali-cuda13, dali-cuda12)"
        if importlib.util.find_spec("PIL") is None:
            return "Pillow is not installed (extra: train)"
        return baselines.missing_torchvision() if self.name == "torchvision" else ""


WAYS = {
    w.name: w
    for w in (
        Way("ours", "TrainLoader, decoded by DALI on the CPU"),
        Way("ours-gpu", "TrainLoader, decoded by DALI on the GPU (mixed)", device="cuda"),
        Way("ours-pil", "TrainLoader, decoded by PIL in threads", kind="pil"),
        Way("dataloader", "PIL and torch.utils.data.DataLoader, transforms by hand", ours=False),
        Way("torchvision", "torchvision's transforms v2 on PIL images, DataLoader", ours=False),
    )
}


@dataclass(frozen=True)
class Setting:
    """What is read and made: the source, the data settings, sizes, threads, and where training runs."""

    source: ImageSource
    data: DataConfig
    size: tuple[int, int]
    batch: int
    threads: int
    model: str = "tiny"
    device: str = "cpu"


# decodes one batch, and uses it: the time of the first is waiting, as far as training is concerned
Fetch, Use = Callable[[], Any], Callable[[Any], None]


@contextmanager
def opened(way: Way, stage: str, setting: Setting) -> Iterator[tuple[Fetch, Use]]:
    """(fetch a batch, use it) of a way at a stage."""
    if not way.ours:
        dataset = baselines.DATASETS[way.name](
            setting.source, setting.data, setting.size, "views" if stage == "end to end" else stage
        )
        with closing(baselines.batches(dataset, setting.batch, setting.threads)) as made:
            use = {"views": _move(setting), "end to end": None}.get(stage, _nothing)
            yield made.__next__, use or _train_on_views(setting)
        return
    if stage == "decode":
        decoder = _pil_decoder if way.kind == "pil" else _dali_decoder
        with closing(decoder(setting, way.device)) as made:
            yield made.__next__, _nothing
        return
    data = dataclasses.replace(setting.data, loader=way.kind, threads=setting.threads)
    with TrainLoader(
        setting.source, data, setting.size, batch_size=setting.batch, seed=0, device=way.device
    ) as loader:
        use = {"crop": _nothing, "views": _color(data, setting.device), "end to end": None}[stage]
        yield loader.__next__, use or _train_on_crops(setting, data)


def _nothing(batch: Any) -> None:
    pass


def _move(setting: Setting) -> Use:
    def use(views: Tensor) -> None:
        views.to(setting.device, non_blocking=True)

    return use


def _color(data: DataConfig, device: str) -> Use:
    def use(batch: Batch) -> None:
        images, index = (t.to(device, non_blocking=True) for t in (batch.images, batch.index))
        color_jitter(images, jitter_params(index, data, seed=0, epoch=batch.epoch), data)

    return use


# ---- training --------------------------------------------------------------------------------------


def _run(setting: Setting, policy: str) -> Any:
    from .providers import configuration

    settings = {
        "data": {"policy": policy}, "model": {"img_size": list(setting.size)}, "system": {"threads": setting.threads},
    }  # fmt: skip
    cfg: Config = from_dict(settings, configuration(setting.model, batch=setting.batch))
    prepare_torch(cfg.system)
    run = build(cfg, World(torch.device(setting.device)), setting.source)
    wrap(run)
    return run


def _train_on_crops(setting: Setting, data: DataConfig) -> Use:
    run = _run(setting, "spatial+color")

    def use(batch: Batch) -> None:
        train_step(run, *step_module.batches(run, [batch]))
        run.step += 1

    return use


def _train_on_views(setting: Setting) -> Use:
    run = _run(setting, "spatial")
    # the product's step, but its views come ready from the workers
    step_module.color_jitter = lambda views, *_: tuple(v.contiguous() for v in views.unbind(1))  # type: ignore[assignment]

    def use(views: Tensor) -> None:
        views = views.to(setting.device, non_blocking=True)
        batch = Batch(views, torch.arange(len(views)), epoch=0, step=run.step)
        train_step(run, *step_module.batches(run, [batch]))
        run.step += 1

    return use


# ---- decoding alone ---------------------------------------------------------------------------------


def _rows(count: int, batch: int) -> Iterator[list[int]]:
    start = 0
    while True:
        yield [(start + i) % count for i in range(batch)]
        start += batch


def _pil_decoder(setting: Setting, device: str) -> Iterator[None]:
    pictures = baselines.Photos(setting.source, setting.data, setting.size, "decode")
    with ThreadPoolExecutor(setting.threads) as pool:
        for rows in _rows(len(setting.source), setting.batch):
            list(pool.map(pictures.__getitem__, rows))
            yield


def _dali_decoder(setting: Setting, device: str) -> Iterator[None]:
    import nvidia.dali as dali
    from nvidia.dali import fn

    source, rows = setting.source, _rows(len(setting.source), setting.batch)

    def feed() -> list[np.ndarray]:
        return [np.frombuffer(source.read(row), np.uint8) for row in next(rows)]

    gpu = device == "cuda"
    load = {"hw_decoder_load": getattr(setting.data, "hw_decoder_load", 0.65)} if gpu else {}
    pipe = dali.Pipeline(
        batch_size=setting.batch, num_threads=setting.threads,
        device_id=torch.cuda.current_device() if gpu else None, prefetch_queue_depth=2,
    )  # fmt: skip
    with pipe:
        encoded = fn.external_source(source=feed)
        pipe.set_outputs(fn.decoders.image(encoded, device="mixed" if gpu else "cpu", **load))
    pipe.build()
    while True:
        pipe.run()
        yield
