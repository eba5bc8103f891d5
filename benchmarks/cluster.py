"""What a run on 8 to 512 GPUs sends, waits for and reads, by arithmetic: counted bytes and FLOPs, stated hardware.

python -m benchmarks cluster
python -m benchmarks cluster --images 128 --ports 1 --utilization 0.35

No figure is measured on a GPU. Parameters and FLOPs are counted from the model; what a process sends is checked in
`tests/benchmarks/test_cluster.py` against the bytes on the sockets of four (DDP) and two (FSDP2) processes. Bandwidths
and peak are the published ones of an H100 SXM in a node of eight; utilization, latency and the size of an image are
options.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch

from extrema_fast.config import from_dict, preset
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.training.resolve import flops_per_image

from . import harness
from .harness import Record, Row, columns

GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8
# published: bf16 products without sparsity; NVLink in one direction; HBM3
PEAK, NVLINK, MEMORY = 989e12, 450e9, 3.35e12
# of the images of ImageNet's training set
IMAGENET = 1_281_167
# of DistributedDataParallel on a GPU (extrema_fast.distributed)
BUCKET = 100e6
# read and written by AdamW and the teacher's average, per parameter: weight, two moments, average; the gradient is read
UPDATE = 36
MODELS: dict[str, dict[str, Any]] = {
    "base/16": {"size": "base"},
    "large/16": {"size": "large"},
    "huge/14": {"size": "huge", "patch_size": 14},
    "giant/14": {"size": "giant", "patch_size": 14},
}
# name -> bytes of a weight that is gathered, of a gradient that is summed
WAYS = {"ddp fp32": (0, 4), "ddp bf16": (0, 2), "fsdp fp32": (2, 4), "fsdp bf16": (2, 2)}


@dataclass(frozen=True)
class Size:
    """What a model gives to send and to compute."""

    student: int
    """parameters that are trained"""
    teacher: int
    trunk: int
    """of them in the blocks of each trunk"""
    depth: int
    flops: float
    """of a step, per image"""


@dataclass(frozen=True)
class Hardware:
    """What the times follow from, in FLOP/s, bytes/s and seconds."""

    utilization: float
    ports: int
    """of the network, per node"""
    port: float
    latency: float

    def ring(self, gpus: int, sent: float, collectives: int) -> float:
        """Seconds of ring collectives in which each process sends `sent` bytes."""
        slowest = NVLINK if gpus <= NODE else min(NVLINK, self.ports * self.port)
        return sent / slowest + collectives * self.latency


def sent(weight: int, gradient: int, size: Size, gpus: int) -> float:
    """Bytes that one process sends in a step.

    An all-gather or a reduce-scatter of S bytes on a ring sends S (G - 1) / G from each of G processes, an all-reduce
    both (Patarasu and Yuan, 2009). DDP all-reduces the gradients. FSDP2 gathers the blocks for each pass, twice for the
    student and once for the teacher, the rest of both once in fp32, and reduce-scatters the gradients.

    Args:
        weight, gradient: bytes of one, as in `WAYS`.
    """
    return sum(bytes_ for bytes_ in passes(weight, gradient, size)) * (gpus - 1) / gpus


def passes(weight: int, gradient: int, size: Size) -> tuple[float, float, float]:
    """Bytes of teacher, student forward and student backward, on endlessly many processes."""
    if not weight:
        return 0, 0, 2 * gradient * size.student
    blocks = weight * size.trunk
    rest = (4 * (n - size.trunk) for n in (size.teacher, size.student))
    teacher, student = (blocks + r for r in rest)
    return teacher, student, blocks + gradient * size.student


def state_bytes(way: str, size: Size, gpus: int) -> float:
    """Bytes of weights, gradients, moments and average on one GPU, with the bf16 copies of DDP."""
    whole = 16 * size.student + 4 * size.teacher
    return whole / gpus if way.startswith("fsdp") else whole + 2 * (size.student + size.teacher)


def step(way: str, size: Size, gpus: int, images: float, machine: Hardware) -> dict[str, float]:
    """Times of a step in seconds: computing, sending, and what of the latter nothing hides.

    The teacher's forward pass, the student's and its backward pass take a quarter, a quarter and half of the FLOPs,
    since the views together have about as many tokens as the image. Sending hides behind the passes that it goes with,
    but for its first or last piece.
    """
    compute = size.flops * images / (PEAK * machine.utilization)
    update = UPDATE * size.student / MEMORY / (gpus if way.startswith("fsdp") else 1)
    sharded = bool(WAYS[way][0])
    pieces = size.depth if sharded else max(1, math.ceil(4 * size.student / BUCKET))
    shares, collectives = (compute / 4, compute / 4, compute / 2), (1, 1, 2) if sharded else (0, 0, 1)
    bytes_sent = (bytes_ * (gpus - 1) / gpus for bytes_ in passes(*WAYS[way], size))
    sending, waiting = 0.0, 0.0
    for during, bytes_, count in zip(shares, bytes_sent, collectives, strict=True):
        time = machine.ring(gpus, bytes_, count * pieces)
        sending += time
        waiting += max(time / pieces, time - during * (1 - 1 / pieces))
    return {"compute": compute, "update": update, "sending": sending, "waiting": waiting}


def count(model: dict[str, Any]) -> Size:
    """Parameters and FLOPs of a model in the paper's recipe of five views of 20 %."""
    cfg = from_dict({"model": model}, preset("paper_base_80x5"))
    with torch.device("meta"):
        method = ExtreMA(cfg)
    student = sum(p.numel() for _, p in method.student_parameters())
    teacher = sum(p.numel() for p in method.teacher_branch.parameters())
    trunk = sum(p.numel() for p in method.student.blocks.parameters())
    return Size(student, teacher, trunk, cfg.model.shape[1], flops_per_image(cfg))


# ---- the command ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Traffic, times and reads of a step on 8 to 512 H100, by arithmetic."""
    p = harness.parser("cluster", main.__doc__, timed=False)
    p.add_argument("--batch", type=int, default=2048, help="global batch (default: %(default)s)")
    p.add_argument(
        "--images", type=int, default=64, help="per GPU, where the batch grows (default: %(default)s)"
    )
    p.add_argument(
        "--utilization", type=float, default=0.4, help="share of the peak (default: %(default)s, assumed)"
    )
    p.add_argument(
        "--ports", type=int, nargs="+", default=[1, 8], help="of the network, per node (default: 1 and 8)"
    )
    p.add_argument("--gbit", type=float, default=400.0, help="of a port, per second (default: %(default)s)")
    p.add_argument(
        "--latency", type=float, default=30.0, help="of a collective, in µs (default: %(default)s, assumed)"
    )
    p.add_argument(
        "--kilobytes", type=float, default=108.0, help="of an image (default: %(default)s, ImageNet's)"
    )
    p.add_argument(
        "--per-core", type=float, default=393.0, help="crops a second (default: %(default)s, a record's)"
    )
    p.add_argument("--storage", type=float, default=10.0, help="reads, GB/s (default: %(default)s)")
    args = p.parse_args(argv)
    check(args)
    if args.list:
        print("\n".join(f"{model} {way} {gpus} GPUs" for model in MODELS for way in WAYS for gpus in GPUS))
        return 0
    sizes = {name: count(model) for name, model in MODELS.items()}
    rows = [
        row(name, size, way, gpus, ports, images, args) | {"fixed": fixed}
        for ports in args.ports
        for name, size in sizes.items()
        for way in WAYS
        for gpus in GPUS
        for fixed, images in ((True, args.batch / gpus), (False, float(args.images)))
        if images >= 1
    ]
    what = "a run on 8 to 512 H100, by arithmetic: bytes sent, times, reads"
    models = [{"model": n, **vars(s), "gflops": s.flops / 1e9} for n, s in sizes.items()]
    record = harness.new_record(what, "cluster", argv, args.note, rows=rows, models=models)
    # the same on every machine
    record["machine"]["short"] = ""
    record["headline"] = headline(rows, args)
    harness.write_record(record, page(record, args), args)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for an option that is not above 0, or otherwise out of its range."""
    for name in ("batch", "images", "utilization", "gbit", "kilobytes", "per_core", "storage"):
        if getattr(args, name) <= 0:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(args, name)}"
            )
    if args.batch < 64:
        raise UsageError(f"--batch: expected at least an image for each of 64 GPUs, got {args.batch}")
    if args.utilization > 1 or args.latency < 0 or min(args.ports) < 1:
        raise UsageError(
            f"--utilization: expected at most 1, --latency: at least 0, --ports: at least 1, got {args.utilization}, "
            f"{args.latency}, {min(args.ports)}"
        )


def row(
    name: str, size: Size, way: str, gpus: int, ports: int, images: float, args: argparse.Namespace
) -> Row:
    """One case: a model, a way, a number of GPUs, a network, a number of images per GPU."""
    machine = Hardware(args.utilization, ports, args.gbit * 1e9 / 8, args.latency / 1e6)
    times = step(way, size, gpus, images, machine)
    busy = times["compute"] + times["update"]
    rate = gpus * images / (busy + times["waiting"])
    return {
        "model": name,
        "way": way,
        "gpus": gpus,
        "ports": ports,
        "images": images,
        "state_gb": state_bytes(way, size, gpus) / 1e9,
        "sent_mb": sent(*WAYS[way], size, gpus) / 1e6,
        **{f"{key}_ms": 1000 * seconds for key, seconds in times.items()},
        "efficiency": times["compute"] / (busy + times["waiting"]),
        "rate": rate,
        "hours": 300 * IMAGENET / rate / 3600,
        "read_gb_s": rate * args.kilobytes / 1e6,
        "cores": rate / args.per_core / gpus,
    }


def headline(rows: list[Row], args: argparse.Namespace) -> str:
    """The two figures for the index."""
    found = {(r["model"], r["way"], r["gpus"], r["ports"], r["fixed"]): r for r in rows}
    base = found["base/16", "ddp fp32", 64, max(args.ports), True]
    giant = [found["giant/14", way, 64, max(args.ports), False] for way in ("ddp fp32", "fsdp fp32")]
    return (
        f"by arithmetic, on 64 GPUs: ViT-base with a batch of {args.batch} computes {100 * base['efficiency']:.0f} % "
        f"of the time; ViT-giant with {args.images} images per GPU {100 * giant[0]['efficiency']:.0f} % with DDP and "
        f"{100 * giant[1]['efficiency']:.0f} % with FSDP2"
    )


def page(record: Record, args: argparse.Namespace) -> list[str]:
    """The record to read."""
    rows = record["rows"]
    out = [
        f"Nothing here was measured on a GPU. Counted: parameters, FLOPs, bytes sent. Published, of an H100 SXM: "
        f"{PEAK / 1e12:.0f} TFLOP/s in bf16, {NVLINK / 1e9:.0f} GB/s of NVLink in one direction, "
        f"{MEMORY / 1e12} TB/s of memory. Assumed: {args.utilization:.0%} of the peak, which few images per GPU hardly "
        f"reach, {args.latency:g} µs for a collective. "
        f"The network has {args.gbit:g} Gbit/s per port, a node {NODE} GPUs. Recipe: five views of 20 %.",
        columns(
            record["models"],
            "model=model",
            "trained parameters=student:,",
            "teacher's=teacher:,",
            "in blocks=trunk:,",
            "GFLOP per image=gflops:.0f",
        ),
        "## MB that one GPU sends in a step",
        grid(rows, "sent_mb", ".0f", args.ports[0], True),
        "Weights of blocks are gathered in bf16, others in fp32; fp32 and bf16 are those of the gradients.",
        "## GB of weights, gradients, moments and averages on one GPU",
        grid(rows, "state_gb", ".2f", args.ports[0], True),
    ]
    for ports in args.ports:
        network = f"{ports} port{'s' if ports > 1 else ''} per node"
        out += [
            f"## Share of the time that computes, batch {args.batch}, {network}",
            grid(rows, "efficiency", ".0%", ports, True),
            f"## Share of the time that computes, {args.images} images per GPU, {network}",
            grid(rows, "efficiency", ".0%", ports, False),
        ]
    ports = max(args.ports)
    near = [r for r in rows if r["ports"] == ports and r["fixed"] and r["way"] == best(r)]
    out += [
        f"## Time and reads, batch {args.batch}, {ports} ports per node",
        f"300 epochs of {IMAGENET:,} images without evaluations; {args.kilobytes:g} kB read for an image; processor "
        f"cores per GPU for crops at {args.per_core:g} images a second and core, measured on an AMD EPYC (record "
        "loader_photos). Base and large with DDP, the others with FSDP2, gradients in fp32.",
        columns(
            near,
            "model=model",
            "GPUs=gpus",
            "images per GPU=images:.0f",
            "compute ms=compute_ms:.1f",
            "update ms=update_ms:.1f",
            "sending ms=sending_ms:.1f",
            "not hidden ms=waiting_ms:.1f",
            "images/s=rate:,.0f",
            "hours=hours:.1f",
            "reads GB/s=read_gb_s:.2f",
            "cores per GPU=cores:.1f",
        ),
    ]
    full = [saturation(near, name, args.storage) for name in MODELS]
    return [
        *out,
        f"## Where storage of {args.storage:g} GB/s is full",
        columns(full, "model=model", "GPUs=gpus"),
    ]


def best(r: Row) -> str:
    """The way of a model in the table of times."""
    return "ddp fp32" if r["model"] in ("base/16", "large/16") else "fsdp fp32"


def saturation(rows: list[Row], model: str, storage: float) -> Row:
    """The first number of GPUs whose images are more than the storage gives."""
    full = [r["gpus"] for r in rows if r["model"] == model and r["read_gb_s"] > storage]
    return {"model": model, "gpus": full[0] if full else f"not up to {GPUS[-1]}"}


def grid(rows: list[Row], field: str, form: str, ports: int, fixed: bool) -> str:
    """A table of one figure: a line per model and way, a column per number of GPUs."""
    lines: dict[str, Row] = {}
    for r in rows:
        if r["ports"] == ports and r["fixed"] == fixed:
            lines.setdefault(f"{r['model']}, {r['way']}", {})[str(r["gpus"])] = r[field]
    found = [{"key": key, **values} for key, values in lines.items()]
    return columns(found, "GPUs=key", *(f"{n}={n}:{form}" for n in GPUS))
