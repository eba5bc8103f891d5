"""The training step on a GPU: `make test-gpu`. Bodies are functions of a device; what means something on a CPU runs
there too.

Covers: no host-device synchronisation in steady steps (torch's sync debug mode), plain, compiled, recorded,
accumulated, with InfoNCE, clipping and every optimizer, and while metrics are read; on a CPU: no op that
reads values on the host; ten recorded steps against ten plain ones, with rates that move and a step that does not
fit; ten compiled ones; gradients of every mode in bf16 against fp32; accumulation; the Triton ops; a GPU
against a CPU; a step that is not finite; memory: constant over steps, less with recomputation; data parallelism
over NCCL with one process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from extrema_fast import train
from extrema_fast.config import Config, from_dict, smoke
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.ops import dispatch as ops
from extrema_fast.training import step
from extrema_fast.training.checkpoint import Snapshot
from extrema_fast.training.draw import draw
from extrema_fast.training.run import Run, build
from extrema_fast.training.step import StepGraph, wrap

gpu, values, slow = pytest.mark.gpu, pytest.mark.values, pytest.mark.slow
BOTH = ["cpu", pytest.param("cuda", marks=gpu)]

# widths of real heads (64) at a size that compiles quickly
TINY = {
    "model": {"width": 128, "depth": 2, "heads": 2, "drop_path": 0.3, "img_size": [64, 64], "patch_size": 8},
    "mask": {"ratio": 0.75, "views": 3},
    "head": {"hidden": 64, "out": 32, "predictor_hidden": 64},
    "optim": {"base_lr": 0.01},
    # measuring is tested in test_measure.py
    "system": {"backend": "fixed"},
    "train": {
        "epochs": 4,
        "batch_size": 16,
        "compile": "none",
        "cuda_graph": "off",
        "recompute": "none",
        "precision": "fp32",
    },
}
GRAPH = {"train": {"cuda_graph": "on"}}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        # every run compiles code of its own, and sets these
        torch._dynamo.reset()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
            yield
        torch._dynamo.reset()
    else:
        yield
    ops.set_backend("auto")


def merged(a: dict, b: dict) -> dict:
    """`b` over `a`, table by table."""
    return a | {
        k: merged(a[k], v) if isinstance(a.get(k), dict) and isinstance(v, dict) else v for k, v in b.items()
    }


def tiny(*changes: dict) -> Config:
    change = TINY
    for c in changes:
        change = merged(change, c)
    return from_dict(change, smoke())


def begin(device: str, *changes: dict) -> Run:
    cfg = tiny(*changes)
    images: Any = range(1000)
    run = build(cfg, World(torch.device(device, 0) if device == "cuda" else torch.device(device)), images)
    wrap(run)
    return run


def graph_of(run: Run) -> StepGraph:
    """The recorded step, after checking that there is one."""
    assert isinstance(run.recorded, StepGraph) and not run.recorded.failed
    assert run.recorded.graph is not None
    return run.recorded


def batch_of(run: Run) -> Batch:
    """Random images where the run is, as a loader gives them; the same for every run and device."""
    b, generator = run.cfg.train.batch_size, torch.Generator().manual_seed(run.step)
    images = torch.randint(0, 256, (b, *run.cfg.model.img_size, 3), dtype=torch.uint8, generator=generator)
    return Batch(images.to(run.world.device), torch.arange(b) + b * run.step, 0, run.step)


def draw_and_step(run: Run, batch: Batch) -> None:
    drawn = draw(run.cfg, batch.images, batch.index, batch.epoch)
    train.train_step(run, batch._replace(micro_batches=drawn))


def steps(run: Run, count: int) -> list[float | None]:
    """Losses of some steps; None for one that was skipped."""
    losses = []
    for _ in range(count):
        run.counters.restart()
        draw_and_step(run, batch_of(run))
        run.step += 1
        losses.append(run.counters.read().values()["loss"])
    return losses


def weights(run: Run) -> dict[str, Tensor]:
    # biases of keys have gradients of rounding noise, which AdamW makes full-size steps of
    noise = ("attn.k.bias", "attn.qkv.bias")
    return {n: t.detach().cpu().clone() for n, t in run.method.state_dict().items() if not n.endswith(noise)}


def equal_losses(a: list[float | None], b: list[float | None], rtol: float) -> None:
    assert None not in a + b and a == pytest.approx(b, rel=rtol)


def same(a: Run, b: Run, rtol: float, atol: float) -> None:
    """Student, predictor and teacher of both runs; where they are and what they are called does not matter."""
    theirs = weights(b)
    for name, value in weights(a).items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=message)


# ---- waiting ---------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_guard_notices():
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones(3, device="cuda").sum().item()


BF16 = {"train": {"precision": "bf16"}}
MODES: dict[str, list[dict]] = {
    "plain": [{}],
    "bf16": [BF16],
    "defaults, a graph": [
        {"train": {"precision": "auto", "compile": "auto", "cuda_graph": "auto", "recompute": "auto"}}
    ],
    "block": [BF16, {"train": {"compile": "block"}}],
    "step": [BF16, {"train": {"compile": "step"}}],
    "graph": [BF16, GRAPH],
    "graph of blocks": [BF16, GRAPH, {"train": {"compile": "block"}}],
    "accumulated": [{"train": {"accumulation": 4}}],
    "accumulated graph": [GRAPH, {"train": {"accumulation": 4}}],
    "infonce": [{"head": {"loss": "infonce"}}],
    "clipped": [{"optim": {"clip_grad": 0.1}}],
    "recomputed": [BF16, {"train": {"recompute": "norm"}}],
    "no color": [{"data": {"policy": "spatial"}}],
    "lamb": [{"optim": {"name": "lamb"}}],
    "lars": [{"optim": {"name": "lars"}}],
    "triton": [BF16, {"system": {"backend": "triton"}}],
    "triton graph": [BF16, GRAPH, {"system": {"backend": "triton"}}],
}
# a GPU compiles these
COMPILING = ("defaults, a graph", "block", "step", "graph of blocks")


@gpu
@values
def test_a_snapshot_is_taken_without_waiting():
    snapshot, weight = Snapshot(), torch.ones(1 << 22, device="cuda")
    snapshot.take({"weight": weight})
    snapshot.tensors()["weight"].zero_()
    with no_waiting():
        snapshot.take({"weight": weight})
        weight += 1
    found = snapshot.tensors()["weight"]
    assert found.is_pinned() and (found == 1).all()


@gpu
@values
@pytest.mark.parametrize("mode", [pytest.param(m, marks=slow if m in COMPILING else ()) for m in MODES])
def test_no_waiting_for_the_device(mode):
    run = begin("cuda", *MODES[mode])
    # compilation, kernels' own settings, a recording
    steps(run, 6)
    batches = []
    for i in range(3):
        run.step += i > 0
        batches.append(batch_of(run))
    run.step -= 2
    readings = []
    with no_waiting():
        for batch in batches:
            draw_and_step(run, batch)
            run.step += 1
            readings.append(run.counters.read())
            readings[-1].arrived()
            run.counters.restart()
    if "graph" in mode:
        graph_of(run)
    losses = [r.values()["loss"] for r in readings]
    assert all(loss is not None and 0 < loss < 10 for loss in losses)


class HostReads(TorchDispatchMode):
    """Collects ops that would make the host wait for a device: what has to know a value, or how many there are."""

    WAIT = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen += [str(op)] * any(word in str(op) for word in self.WAIT)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode", ["plain", "bf16", "accumulated", "infonce", "clipped", "recomputed", "lamb", "lars"]
)
def test_no_host_reads_on_a_cpu_either(mode, monkeypatch):
    # read on a CPU only, and left out: how many images take an operation of painting, whether the EMA update is skipped
    monkeypatch.setattr(step, "ema_", lambda *args: None)
    run = begin("cpu", *MODES[mode], {"data": {"policy": "spatial"}})
    steps(run, 1)
    batch = batch_of(run)
    with HostReads() as reads:
        draw_and_step(run, batch)
        if mode == "plain":
            bool(run.counters.tensor.sum() > 0)
    assert reads.seen == (["aten._local_scalar_dense.default"] if mode == "plain" else [])


# ---- the same numbers in every mode -----------------------------------------------------------------


@gpu
@values
@pytest.mark.parametrize(
    "change",
    [{}, BF16, {"train": {"accumulation": 2}}, {"optim": {"clip_grad": 0.1}}, {"optim": {"name": "lamb"}}],
    ids=["fp32", "bf16", "accumulated", "clipped", "lamb"],
)
def test_ten_recorded_steps_equal_ten_plain_ones(change):
    plain, recorded = begin("cuda", change), begin("cuda", change, GRAPH)
    expected, losses = steps(plain, 10), steps(recorded, 10)
    graph_of(recorded)
    equal_losses(losses, expected, 1e-3)
    # rates and momentum have moved: a recording of the first ones would be far off
    assert plain.schedule.lr(9) != plain.schedule.lr(3)
    same(plain, recorded, rtol=1e-3, atol=1e-4)


@gpu
@values
def test_a_step_that_does_not_fit_the_recording_runs_as_it_is(monkeypatch):
    plain, recorded = begin("cuda"), begin("cuda", GRAPH)
    expected = steps(plain, 7)
    losses = steps(recorded, 5)
    with monkeypatch.context() as m:
        m.setattr(recorded.recorded, "_fits", lambda *args: False)
        losses += steps(recorded, 1)
    losses += steps(recorded, 1)
    graph_of(recorded)
    equal_losses(losses, expected, 1e-3)
    same(plain, recorded, rtol=1e-3, atol=1e-4)


@gpu
@slow
@values
@pytest.mark.parametrize("mode", ["block", "step"])
def test_ten_compiled_steps_equal_ten_plain_ones(mode):
    plain, compiled = begin("cuda"), begin("cuda", {"train": {"compile": mode}})
    expected = steps(plain, 10)
    losses = steps(compiled, 2)
    # the rate and the momentum move from here on
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += steps(compiled, 8)
    equal_losses(losses, expected, 1e-3)
    same(plain, compiled, rtol=1e-2, atol=1e-3)


def gradients(device: str, *changes: dict) -> Tensor:
    """All gradients of the first step, flat, fp64 on the CPU."""
    run = begin(device, *changes)
    steps(run, 1)
    named = [(n, p.grad) for n, p in run.method.student_parameters() if not n.endswith(".k.bias")]
    return torch.cat([g.double().cpu().flatten() for _, g in named if g is not None])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


RECOMPUTED, PLAIN_ATTENTION = {"train": {"recompute": "norm"}}, {"system": {"attention": "reference"}}
TRITON = {"system": {"backend": "triton"}}
COMPILED = [{"train": {"compile": mode}} for mode in ("block", "step")]


@values
@pytest.mark.parametrize(
    ("device", "change"),
    [
        *(("cpu", change) for change in (RECOMPUTED, PLAIN_ATTENTION)),
        *(pytest.param("cuda", c, marks=gpu) for c in (RECOMPUTED, PLAIN_ATTENTION, TRITON)),
        *(pytest.param("cuda", c, marks=(gpu, slow)) for c in COMPILED),
    ],
)
def test_bf16_gradients(device, change):
    truth = gradients(device, {})
    plain = distance(gradients(device, BF16), truth)
    other = distance(gradients(device, BF16, change), truth)
    print(f"relative error of bf16 gradients: plain {plain:.2e}, {change} {other:.2e}")
    # the kernels' rule: twice the plain form's own error, and a floor
    assert 1e-5 < plain < 0.1 and other <= 2 * plain + 2**-8


@values
@pytest.mark.parametrize(
    ("device", "common", "change", "rtol"),
    [
        *(
            pytest.param(device, {"head": {"loss": loss}}, {"train": {"accumulation": 4}}, 1e-4, marks=marks)
            for device, marks in (("cpu", ()), ("cuda", gpu))
            for loss in ("byol", "infonce")
        ),
        pytest.param("cuda", {}, TRITON, 1e-3, marks=gpu),
    ],
)
def test_accumulated_steps_and_triton_ops_equal_plain_steps(device, common, change, rtol):
    first, second = begin(device, common), begin(device, common, change)
    expected, losses = steps(first, 4), steps(second, 4)
    assert len(set(expected)) == 4
    equal_losses(losses, expected, rtol)
    same(first, second, rtol=10 * rtol, atol=rtol)


@gpu
@values
@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
def test_a_gpu_makes_the_steps_a_cpu_makes(name):
    change = {"optim": {"name": name}}
    cpu, cuda = begin("cpu", change), begin("cuda", change)
    equal_losses(steps(cuda, 5), steps(cpu, 5), 1e-3)
    same(cpu, cuda, rtol=1e-2, atol=1e-3)


# ---- a step that is not finite ----------------------------------------------------------------------


def state_bits(run: Run) -> list[bytes]:
    moments = [v for p in run.optimizer.state.values() for _, v in sorted(p.items()) if isinstance(v, Tensor)]
    low = [m.shadow for m in run.method.modules() if getattr(m, "shadow", None) is not None]
    tensors = [*run.method.state_dict().values(), *moments, *low]
    return [t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t.dim()]


@values
@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_no_bit(monkeypatch, device, precision):
    run = begin(device, {"train": {"precision": precision}})
    steps(run, 2)
    before, loss = state_bits(run), run.method.loss
    with monkeypatch.context() as m:
        m.setattr(run.method, "loss", lambda *args: loss(*args) * float("nan"))
        assert steps(run, 1) == [None]
    assert state_bits(run) == before and run.counters.read().values()["skipped"] == 1
    assert steps(run, 1) != [None] and state_bits(run) != before


# ---- memory ----------------------------------------------------------------------------------------


def peak_of_a_step(run: Run) -> int:
    torch.cuda.reset_peak_memory_stats()
    draw_and_step(run, batch_of(run))
    run.step += 1
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@gpu
@pytest.mark.parametrize("changes", [[BF16], [BF16, GRAPH]], ids=["plain", "graph"])
def test_memory_does_not_grow_with_steps(changes):
    run = begin("cuda", *changes)
    steps(run, 6)
    before, peak = torch.cuda.memory_allocated(), peak_of_a_step(run)
    steps(run, 6)
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert peak_of_a_step(run) <= peak + 2**20


@gpu
def test_recomputation_lowers_the_peak():
    # activations must outweigh the weights
    change = {"model": {"width": 256, "heads": 4, "depth": 4}, "train": {"batch_size": 256}}
    peaks = {}
    for what in ("none", "gelu", "norm"):
        run = begin("cuda", BF16, change, {"train": {"recompute": what}})
        steps(run, 2)
        peaks[what] = peak_of_a_step(run)
        del run
        torch.cuda.empty_cache()
    # [rows, tokens, 4 D] of GELU outputs and two [rows, tokens, D] of LayerNorm's per block, 2 bytes each
    unit = 4 * 256 * 3 * 16 * 256 * 2
    print({what: peak / unit for what, peak in peaks.items()})
    assert peaks["none"] - peaks["gelu"] > 2 * unit and peaks["gelu"] - peaks["norm"] > unit


# ---- data parallelism -------------------------------------------------------------------------------


@contextmanager
def one_process_group(backend: str) -> Iterator[None]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group(backend, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


@values
@pytest.mark.parametrize(
    ("device", "backend", "compiled"),
    [
        ("cpu", "gloo", "none"),
        pytest.param("cuda", "nccl", "none", marks=gpu),
        pytest.param("cuda", "nccl", "block", marks=(gpu, slow)),
    ],
)
def test_data_parallel(device, backend, compiled):
    """A student wrapped as `World.wrap` does with several processes makes the steps that a plain one makes."""
    if backend == "nccl" and not dist.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    change = {"train": {"compile": compiled}}
    plain = begin(device, change)
    expected = steps(plain, 4)
    with one_process_group(backend):
        run = begin(device, change)
        ids = [0] if device == "cuda" else None
        run.student = torch.nn.parallel.DistributedDataParallel(
            run.method.student_branch, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        losses = steps(run, 3)
        batch = batch_of(run)
        with no_waiting() if device == "cuda" else nullcontext():
            draw_and_step(run, batch)
        run.step += 1
    equal_losses(losses, expected[:3], 1e-4)
    same(plain, run, rtol=1e-3, atol=1e-4)
