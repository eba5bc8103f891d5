"""Images per second of the data path beside the pipelines that a user would otherwise write, in turns.

python -m benchmarks loader --data imagenet/train --threads 8
python -m benchmarks loader --data imagenet/train --memory-epochs 50 --limit 500
python -m benchmarks loader --data imagenet/train --ways ours-gpu --stages crop --sweep 0 0.65 0.9 --threads 8 15

Stages: `decode`, whole images; `crop`, decoding, random crop, resize and flip; `views`, two normalised colour views of
each crop on top; `end to end`, that and training steps. First every way's pictures are compared with PIL's for the
same boxes and factors: nothing is concluded about one whose differ. Each way runs in a process of its own, all of them
on the same cores, as many as `--threads`; they take turns, and each is at rest while another one is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError

from . import plots
from .loader_baselines import PREFETCH
from .loader_page import page
from .loader_ways import STAGES, WAYS
from .processes import Worker, WorkerError
from .providers import PROVIDERS
from .records import new_record, parser, write_record
from .stats import percentiles, ratio, verdict

# the issue of a data path: as much faster than PIL and a DataLoader
GOAL, GOAL_STAGE = 1.3, "views"
MADE = "made"


@dataclass
class Job:
    """A way at a stage; `key` names its row."""

    way: str
    stage: str
    threads: int
    data: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def key(self) -> str:
        return " | ".join(filter(None, [self.way, self.stage, self.label]))

    @property
    def environment(self) -> dict[str, str]:
        """Ours with the memory settings of the command line, the others with the system's."""
        return next(p for p in PROVIDERS if p.name == "ours").environment if WAYS[self.way].ours else {}


def main(argv: list[str]) -> int:
    """Images/s of the data path, ours and what a user would write: decode, crop, colour views, end to end."""
    p = parser("loader", main.__doc__)
    p.add_argument("--data", default="photos",
                   help="as data.train: a folder, a list file, shards; `made`: JPEGs of noise")  # fmt: skip
    p.add_argument("--limit", type=int, default=0, help="use only this many images")
    p.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    p.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    p.add_argument("--img-size", type=int, default=224)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--batches", type=int, default=0, help="timed batches per turn")
    p.add_argument("--rounds", type=int, default=0, help="turns of every way")
    p.add_argument("--threads", type=int, nargs="+", default=[2],
                   help="decoding threads or worker processes, and cores (several: with --sweep)")  # fmt: skip
    p.add_argument(
        "--model", choices=("tiny", "small", "base", "large"), default="tiny", help="of end to end"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where `end to end` trains")
    p.add_argument("--sweep", type=float, nargs="*", metavar="LOAD",
                   help="one by one: every --threads; for ours-gpu, these shares of the hardware decoder")  # fmt: skip
    p.add_argument(
        "--memory-epochs", type=int, default=0, metavar="N", help="instead: resident memory over N epochs"
    )
    args = p.parse_args(argv)
    if args.sweep is None and len(args.threads) > 1:
        raise UsageError("--threads: several numbers need --sweep")
    for name in ("batch", "img_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if min(args.threads) < 1:
        raise UsageError(f"--threads: expected at least 1, got {min(args.threads)}")
    unable = {name: why for name in args.ways if (why := WAYS[name].missing())}
    if args.list:
        for name in args.ways:
            print(
                f"  {name:12} {WAYS[name].about}"
                + (f"  [not here: {unable[name]}]" if name in unable else "")
            )
        print("  stages: " + "; ".join(f"{s}, {STAGES[s]}" for s in args.stages))
        return 0
    able = [name for name in args.ways if name not in unable]
    if not able:
        raise UsageError(f"--ways: none of them runs here: {unable}")
    args.batches = args.batches or (3 if args.quick else 8)
    args.rounds = args.rounds or (5 if args.quick else 10)
    with tempfile.TemporaryDirectory() as folder:
        data = made(Path(folder), max(128, 2 * args.batch)) if args.data == MADE else args.data
        images = len(open_source(data, "train", limit=args.limit))
        if images < args.batch:
            raise UsageError(f"--batch: {args.batch} is more than the {images} images of {args.data}")
        record = memory(able, data, args, argv) if args.memory_epochs else run(able, data, args, argv)
    record["settings"] |= {"data": args.data, "images": images}
    record["not_run"] = unable
    write_record(record, page(record), args.name, args.out, plots.loader)
    return 1 if any(not g["passed"] for g in record["gates"]) else 0


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def made(folder: Path, count: int) -> str:
    """`count` JPEGs of 500 x 375 with about the bytes and detail of photographs: noise of several scales."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        random = np.random.default_rng(i)
        picture = np.full((375, 500, 3), 128.0)
        for scale in (4, 8, 16, 64, 250):
            noise = random.normal(size=(375 // scale + 1, 500 // scale + 2, 3)) * 8 * scale**0.4
            rough = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8))
            picture += np.asarray(rough.resize((500, 375), Image.Resampling.BICUBIC), float) - 128
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=92)
    return str(folder)


# ---- what is measured -------------------------------------------------------------------------------


def settings(data: str, args: argparse.Namespace, threads: int, own: dict[str, Any]) -> dict[str, Any]:
    """What a process is told."""
    return {
        "data": {"train": data, "limit": args.limit, "threads": threads} | own,
        "size": [args.img_size, args.img_size], "batch": args.batch, "threads": threads, "model": args.model,
        "device": args.device, "warmup": 4 if args.quick else 64,
    }  # fmt: skip


def planned(ways: list[str], args: argparse.Namespace) -> list[list[Job]]:
    """Jobs by group: those of a group take turns."""
    if args.sweep is None:
        return [[Job(way, stage, args.threads[0]) for way in ways] for stage in args.stages]
    found = []
    for stage in args.stages:
        for way in ways:
            for threads in args.threads:
                loads = args.sweep if WAYS[way].device == "cuda" else []
                jobs = [Job(way, stage, threads, {"hw_decoder_load": v}, f"{threads} threads, load {v:g}")
                        for v in loads]  # fmt: skip
                found += [[j] for j in jobs or [Job(way, stage, threads, {}, f"{threads} threads")]]
    return found


def run(ways: list[str], data: str, args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Gates, then times in turns: the record."""
    gates = check(ways, data, args)
    rows: list[dict[str, Any]] = []
    for jobs in planned(ways, args):
        rows += measure(jobs, data, args)
    record = new_record(
        f"data path, {args.data}, {args.img_size} px", "loader", argv, args.note,
        settings={"img_size": args.img_size, "batch": args.batch, "threads": args.threads, "model": args.model,
                  "device": args.device, "rounds": args.rounds, "batches_per_turn": args.batches,
                  "in_turns": args.sweep is None},
        gates=gates, rows=rows,
    )  # fmt: skip
    record["ratios"] = ratios(record)
    record["headline"] = "; ".join(
        f"{r['stage']} {r['ratio']:.2f}x {r['other']}" for r in record["ratios"] if "ratio" in r
    )
    return record


def check(ways: list[str], data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way's pictures against PIL's, in a process of their own; raises UsageError when that fails."""
    say(f"comparing the pictures of {', '.join(ways)}")
    try:
        with Worker(args.threads[0], module="loader_worker") as worker:
            return worker("gates", ways=ways, settings=settings(data, args, args.threads[0], {}))["gates"]
    except WorkerError as error:
        raise UsageError(f"the comparison of pictures failed: {error}") from None


def measure(jobs: list[Job], data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per job; what fails has an `error`."""
    rows = {
        job.key: {"key": job.key, "way": job.way, "stage": job.stage, "label": job.label, "batch": args.batch}
        for job in jobs
    }
    warm = {job.key: 1 if job.stage == "end to end" else ahead(job) + 2 for job in jobs}
    batches = max(1, args.batches // 4) if jobs[0].stage == "end to end" else args.batches
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def ask(job: Job, do: str, **arguments: Any) -> dict[str, Any]:
            try:
                return workers[job.key](do, **arguments)
            except WorkerError as error:
                rows[job.key] |= {"error": str(error)}
                workers.pop(job.key).close()
                say(f"{job.key}: {error}")
                return {}

        for job in jobs:
            worker = Worker(job.threads, environment=job.environment, module="loader_worker")
            workers[job.key] = stack.enter_context(worker)
            told = settings(data, args, job.threads, job.data)
            rows[job.key] |= ask(job, "build", way=job.way, stage=job.stage, settings=told)
        turns: dict[str, list[dict[str, Any]]] = {job.key: [] for job in jobs}
        for i in range(args.rounds):
            # another one begins each round
            for job in jobs[i % len(jobs) :] + jobs[: i % len(jobs)]:
                if job.key in workers and (found := ask(job, "turn", warm=warm[job.key], batches=batches)):
                    turns[job.key].append(found)
                    say(
                        f"round {i + 1}/{args.rounds} {job.key}: {1000 * args.batch / found['ms']:.1f} images/s"
                    )
        for job in jobs:
            if job.key in workers:
                ask(job, "finish")
                rows[job.key] |= summary(turns[job.key], args.batch, rows[job.key]["cores"])
    return list(rows.values())


def ahead(job: Job) -> int:
    """Batches that a way may have prepared when its turn begins, used up before the clock starts."""
    return 6 if WAYS[job.way].ours else PREFETCH * job.threads


def summary(turns: list[dict[str, Any]], batch: int, cores: int) -> dict[str, Any]:
    """Percentiles over turns of the milliseconds per batch, and what follows from them."""
    samples = [t["ms"] for t in turns]
    found: dict[str, Any] = {"samples_ms": samples} | percentiles(samples)
    cpu = [t["cpu_ms_per_image"] for t in turns]
    found["cpu_ms_per_image_samples"] = cpu
    found["cpu_ms_per_image"] = percentiles(cpu)["p50_ms"]
    found["images_per_s"] = 1000 * batch / found["p50_ms"]
    found["images_per_s_per_core"] = found["images_per_s"] / cores
    found["images_per_cpu_s"] = 1000 / found["cpu_ms_per_image"]
    found["waited"] = percentiles([t["waited"] for t in turns])["p50_ms"]
    return found


def ratios(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every way of ours against each baseline at each stage; refused after a failed check."""
    passed = {g["name"] for g in record["gates"] if g["passed"]}
    found = []
    for stage in dict.fromkeys(r["stage"] for r in record["rows"]):
        here = {r["way"]: r for r in record["rows"] if r["stage"] == stage and not r["label"]}
        for mine in (w for w in ("ours", "ours-gpu", "ours-pil") if w in here):
            for other in (w for w in ("dataloader", "torchvision") if w in here):
                goal = GOAL if stage == GOAL_STAGE and (mine, other) == ("ours", "dataloader") else None
                entry = {"stage": stage, "ours": mine, "other": other, "goal": goal}
                bad = [w for w in (mine, other) if w not in passed or "samples_ms" not in here[w]]
                if bad:
                    found.append(entry | {"refused": f"{', '.join(bad)}: no result to compare"})
                    continue
                entry |= ratio(here[other]["samples_ms"], here[mine]["samples_ms"])
                entry["verdict"] = verdict(entry)
                cpu = ratio(*(here[w]["cpu_ms_per_image_samples"] for w in (other, mine)))
                found.append(entry | {f"cpu_{k}": cpu[k] for k in ("ratio", "low", "high")})
    return found


# ---- memory -----------------------------------------------------------------------------------------


def memory(ways: list[str], data: str, args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Resident memory of ours at the end of each epoch, crops and colour views: the record."""
    rows = []
    for way in (w for w in ways if WAYS[w].ours):
        job = Job(way, "views", args.threads[0])
        say(f"{args.memory_epochs} epochs of {way}")
        row: dict[str, Any] = {"key": f"{way} | memory", "way": way, "stage": "memory", "label": ""}
        try:
            with Worker(job.threads, environment=job.environment, module="loader_worker") as worker:
                told = settings(data, args, job.threads, {})
                row |= worker("build", way=way, stage="views", settings=told)
                row |= growth(worker("epochs", count=args.memory_epochs))
                worker("finish")
        except WorkerError as error:
            row["error"] = str(error)
        rows.append(row)
    record = new_record(
        f"memory of the data path over {args.memory_epochs} epochs", "loader", argv, args.note,
        settings={"img_size": args.img_size, "batch": args.batch, "threads": args.threads,
                  "epochs": args.memory_epochs},
        gates=[], ratios=[], rows=rows,
    )  # fmt: skip
    record["headline"] = "; ".join(
        f"{r['way']} {r['mb_per_epoch']:+.3f} MB per epoch" for r in rows if "mb_per_epoch" in r
    )
    return record


def growth(found: dict[str, Any]) -> dict[str, Any]:
    """`mb_per_epoch`: slope of the resident memory over the last four fifths of the epochs, by least squares."""
    import numpy as np

    rss = np.asarray(found["rss_mb"])
    late = np.arange(len(rss))[len(rss) // 5 :]
    slope = float(np.polyfit(late, rss[late], 1)[0]) if len(late) > 1 else 0.0
    return found | {"mb_per_epoch": slope, "first_mb": float(rss[late[0]]), "last_mb": float(rss[-1])}
