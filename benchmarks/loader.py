"""Images per second of the data path: decoding, decoding and cropping, and training end to end.

python -m benchmarks loader --data imagenet/train --threads 8

Three separate numbers, as decoding, the data path and training are three separate limits. `decode`: whole images,
nothing else. `crop`: what training reads, random crops of 224 (the loader alone). `end to end`: the loader feeding
training steps of a model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch

from extrema_fast.config import Config, DataConfig, from_dict
from extrema_fast.data import ImageSource, TrainLoader, choose_loader, open_source
from extrema_fast.data_decode import load_rgb
from extrema_fast.dist import World, pick_device
from extrema_fast.errors import UsageError
from extrema_fast.state import build, wrap
from extrema_fast.train import train_step

from .providers import configuration
from .records import heading, new_record, parser, write_record
from .stats import percentiles
from .tables import Page, Table

STAGES = ("decode", "crop", "end to end")
LOADERS = ("dali", "pil")


def main(argv: list[str]) -> int:
    """Images/s of DALI and PIL: decoding, decoding and cropping, training end to end."""
    p = parser("loader", main.__doc__)
    p.add_argument("--data", default="photos", help="as data.train: a folder, a list file, or `photos`")
    p.add_argument("--limit", type=int, default=0, help="use only this many images")
    p.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    p.add_argument("--img-size", type=int, default=224)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--batches", type=int, default=0, help="timed batches per round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--model", choices=("tiny", "small", "base", "large"), default="tiny", help="of end to end"
    )
    p.add_argument("--threads", type=int, default=2, help="decoding threads")
    p.add_argument("--device", default="cpu", help="where DALI decodes and the model trains")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    batches = args.batches or (4 if args.quick else 20)
    if args.list:
        print(f"  {', '.join(args.stages)} with {', '.join(args.loaders)} of {args.data}")
        return 0
    source = open_source(args.data, "train", limit=args.limit)
    if len(source) < args.batch:
        raise UsageError(f"--batch: {args.batch} is more than the {len(source)} images of {args.data}")
    cfg = from_dict({"model": {"img_size": [args.img_size, args.img_size]}},
                    configuration(args.model, batch=args.batch))  # fmt: skip
    rows = []
    for loader in args.loaders:
        try:
            choose_loader(loader)
        except UsageError as error:
            rows.append({"key": loader, "error": str(error)})
            continue
        data = DataConfig(train=args.data, loader=loader, threads=args.threads)  # type: ignore[arg-type]
        for stage in args.stages:
            key = f"{loader} | {stage}"
            print(key, file=sys.stderr, flush=True)
            with opened(stage, source, data, cfg, device) as step:
                step()
                samples = [_clock(step, device) for _ in range(args.rounds * batches)]
            rows.append(
                {"key": key, "loader": loader, "stage": stage, "batch": args.batch, "samples_ms": samples}
                | percentiles(samples)
            )  # fmt: skip
            rows[-1]["images_per_s"] = 1000 * args.batch * len(samples) / sum(samples)
    record = new_record(
        f"data path, {source.name}", "loader", argv, args.note,
        settings={"data": args.data, "images": len(source), "img_size": args.img_size, "batch": args.batch,
                  "threads": args.threads, "device": str(device), "model": args.model},
        rows=rows,
    )  # fmt: skip
    record["headline"] = "; ".join(
        f"{r['key']} {r['images_per_s']:.0f}/s" for r in rows if "images_per_s" in r
    )
    write_record(record, page(record), args.name, args.out)
    return 0


def _clock(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


@contextmanager
def opened(
    stage: str, source: ImageSource, data: DataConfig, cfg: Config, device: torch.device
) -> Iterator[Callable[[], None]]:
    """A function that does one batch of a stage's work."""
    if stage == "decode":
        decoder = _pil_decoder if data.loader == "pil" else _dali_decoder
        with closing(decoder(source, data.threads, cfg.train.batch_size, device)) as batches:
            yield lambda: next(batches)
        return
    where = "cpu" if data.loader == "pil" else device
    with TrainLoader(
        source, data, cfg.model.img_size, batch_size=cfg.train.batch_size, seed=0, device=where
    ) as loader:
        if stage == "crop":
            yield lambda: next(loader)
            return
        run = build(cfg, World(device), source)
        wrap(run)

        def train() -> None:
            train_step(run, next(loader))
            run.step += 1

        yield train


def _rows(count: int, batch: int) -> Iterator[list[int]]:
    start = 0
    while True:
        yield [(start + i) % count for i in range(batch)]
        start += batch


def _pil_decoder(source: ImageSource, threads: int, batch: int, device: torch.device) -> Iterator[None]:
    with ThreadPoolExecutor(threads) as pool:
        for rows in _rows(len(source), batch):
            list(pool.map(lambda row: load_rgb(source.paths[row], False), rows))
            yield


def _dali_decoder(source: ImageSource, threads: int, batch: int, device: torch.device) -> Iterator[None]:
    import nvidia.dali as dali
    from nvidia.dali import fn

    rows = _rows(len(source), batch)

    def feed() -> list[np.ndarray]:
        return [np.frombuffer(source.paths[row].encode(), np.uint8) for row in next(rows)]

    gpu = device.type == "cuda"
    pipe = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=(device.index or 0) if gpu else None
    )
    with pipe:
        encoded = fn.io.file.read(fn.external_source(source=feed))
        pipe.set_outputs(fn.decoders.image(encoded, device="mixed" if gpu else "cpu"))
    pipe.build()
    while True:
        pipe.run()
        yield


def page(record: dict[str, Any]) -> Page:
    """The record to read."""
    s = record["settings"]
    out = heading(record)
    out.append(
        f"{s['images']} images of {s['data']}, crops of {s['img_size']}, batch {s['batch']}, {s['threads']} decoding "
        f"threads, {s['device']}; end to end trains ViT-{s['model']}."
    )
    rows = [r for r in record["rows"] if "images_per_s" in r]
    out.append(
        Table(
            ["loader", "stage", "images/s", "p20 ms", "p50 ms", "p80 ms"],
            [
                [
                    r["loader"],
                    r["stage"],
                    f"{r['images_per_s']:.1f}",
                    *(f"{r[f'p{q}_ms']:.1f}" for q in (20, 50, 80)),
                ]
                for r in rows
            ],
        )
    )
    out.append(
        "images/s: all timed batches together, as loaders deliver in bursts; percentiles: milliseconds of a batch."
    )
    lost = [f"* {r['key']}: {r['error']}" for r in record["rows"] if "error" in r]
    return [*out, "\n".join(lost)] if lost else out
