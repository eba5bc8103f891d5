"""The step and its modes on a CPU.

Covers: compile block and step against the plain step (losses, weights; accumulation, InfoNCE), graphs made and none
made again while rates move; what `auto` means on each device, and on a GPU that lacks something; modes that exclude
each other; the old value `loss`; shadow weights synced by every step and after loading; memory of recomputation;
inputs of a recorded step.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from extrema_fast.kernels import _launch

from extrema_fast.config import Config, FinetuneConfig, from_dict, preset, smoke
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models import extrema
from extrema_fast.ops import dispatch as ops
from extrema_fast.train import train_step
from extrema_fast.training import step
from extrema_fast.training.resolve import resolve
from extrema_fast.training.run import Run, build
from extrema_fast.training.step import StepGraph, wrap

TINY = {
    "model": {"width": 32, "depth": 2, "heads": 2, "drop_path": 0.5, "patch_size": 8},
    "mask": {"ratio": 0.75, "views": 3},
    "head": {"hidden": 32, "out": 16, "predictor_hidden": 32},
    "optim": {"base_lr": 0.02},
    "train": {"epochs": 2, "batch_size": 4},
}


class Counting:
    """A backend without code generation that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _default_backend():
    yield
    ops.set_backend("auto")


@pytest.fixture
def counting(monkeypatch):
    torch._dynamo.reset()
    backend = Counting()
    monkeypatch.setattr(step, "BACKEND", backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield backend
    torch._dynamo.reset()


def tiny(**change) -> Config:
    return from_dict(change, from_dict(TINY, smoke()))


def begin(**change) -> Run:
    run = build(tiny(**change), World(torch.device("cpu")), range(100))
    wrap(run)
    return run


def steps(run: Run, count: int) -> list[float]:
    """Losses of some steps on random images, the same for every run."""
    losses, generator = [], torch.Generator().manual_seed(0)
    b, size = run.cfg.train.batch_size, run.cfg.model.img_size
    for _ in range(count):
        images = torch.randint(0, 256, (b, *size, 3), dtype=torch.uint8, generator=generator)
        index = torch.arange(b) + b * run.step
        before = run.counters.tensor[0].item()
        train_step(run, *step.batches(run, [Batch(images, index, 0, run.step)]))
        run.step += 1
        losses.append(run.counters.tensor[0].item() - before)
    return losses


def same(a: Run, b: Run, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Student, predictor and teacher of both runs."""
    theirs = b.method.state_dict()
    for name, value in a.method.state_dict().items():
        # gradients of rounding noise, which AdamW turns into full-size steps
        if not name.endswith(("attn.k.bias", "attn.qkv.bias")):
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=name)


# ---- compiling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "step"])
@pytest.mark.parametrize(("loss", "accumulation"), [("byol", 2), ("infonce", 1)])
def test_compiled_steps_equal_plain_ones(counting, mode, loss, accumulation, monkeypatch):
    # stretches of two blocks and of one
    monkeypatch.setattr(extrema, "TOGETHER", 2)
    # InfoNCE with the class token in the loss, and batch norm
    head = {"loss": loss}
    if loss == "infonce":
        head |= {"decorrelation": 0.1, "norm": "batch", "queue": 12}
    depth = {"block": 5, "step": 2}[mode]
    change = {"head": head, "train": {"accumulation": accumulation}, "model": {"depth": depth}}
    plain = begin(**change)
    change["train"]["compile"] = mode
    compiled = begin(**change)
    expected = steps(plain, 3)
    assert steps(compiled, 3) == pytest.approx(expected, rel=1e-5)
    same(plain, compiled)
    # each branch: embedding, stretches, those of one length as one, and what follows them; BYOL's loss
    made = {"block": 8 + (loss == "byol"), "step": 1}[mode]
    assert counting.graphs == made
    # none is made again while rates move
    rate = compiled.optimizer.param_groups[0]["lr"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(compiled, 10)
    assert counting.graphs == made and compiled.optimizer.param_groups[0]["lr"] != rate


def test_runs_of_one_process_have_graphs_of_their_own(counting):
    # what differs is in the modules alone, whose guards are left out
    for heads in (2, 4):
        change = {"model": {"heads": heads, "drop_path": 0.0, "depth": 1, "pool_depth": 1}}
        plain, compiled = begin(**change), begin(**change, train={"compile": "block"})
        assert steps(compiled, 1) == pytest.approx(steps(plain, 1), rel=1e-5)
    assert counting.graphs == 13


def test_blocks_of_full_width_stay_whole_under_data_parallelism(counting):
    # a block of this width is larger than a bucket of gradients, where torch would cut its graph
    wide = {"model": {"width": 768, "heads": 12, "depth": 1, "pool_depth": 1}, "mask": {"views": 1}}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            # one process that takes itself for one of two
            cfg = tiny(**wide, train={"compile": "block", "precision": "bf16"})
            run = build(cfg, World(torch.device("cpu"), 0, 2), range(100))
            wrap(run)
            assert isinstance(run.student, torch.nn.parallel.DistributedDataParallel)
            steps(run, 1)
    finally:
        dist.destroy_process_group()
    assert counting.graphs == 7 and all(p.grad is not None for p in run.trained)


@pytest.mark.slow
def test_generated_code_equals_the_plain_step():
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    change = {"model": {"depth": 1, "pool_depth": 1, "drop_path": 0.0}, "mask": {"views": 1}}
    plain, compiled = begin(**change), begin(**change, train={"compile": "step"})
    # the same kernels in one source file per graph: parsing torch's headers for each of 36 takes most of the time
    with inductor.patch(cpp_wrapper=True):
        assert steps(compiled, 2) == pytest.approx(steps(plain, 2), rel=1e-4)
    torch._dynamo.reset()


# ---- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "device", "processes", "words"),
    [
        ({"train": {"cuda_graph": "on"}}, "cpu", 1, r"train\.cuda_graph: needs a CUDA device"),
        ({"train": {"cuda_graph": "on"}}, "cuda", 2, r"train\.cuda_graph: .* between 2 processes"),
        ({"train": {"compile": "step"}}, "cuda", 2, r"train\.compile step: .* between 2 processes"),
        (
            {"train": {"compile": "step", "accumulation": 2}, "head": {"loss": "infonce"}},
            "cpu",
            1,
            r"InfoNCE .* 2 micro-batches .* use train\.accumulation 1",
        ),
    ],
)
def test_modes_that_exclude_each_other(change, device, processes, words):
    with pytest.raises(UsageError, match=words):
        resolve(tiny(**change), torch.device(device), processes)


def test_auto_is_settled_by_device(monkeypatch):
    monkeypatch.setattr(ops, "check_attention", lambda backend, *args: backend)
    cpu, cuda = (resolve(tiny(train={"precision": "bf16"}), torch.device(d), 8) for d in ("cpu", "cuda"))
    assert (cpu.compile, cpu.recompute, cpu.shadow_weights) == ("none", "norm", False)
    assert (cuda.compile, cuda.recompute, cuda.shadow_weights) == ("block", "none", True)
    assert not resolve(tiny(), torch.device("cuda")).shadow_weights
    teacher = {"attention": "short", "attention_teacher": "sdpa"}
    found = resolve(tiny(system=teacher), torch.device("cpu"))
    assert (found.attention, found.attention_teacher) == ("short", "sdpa")


def test_short_steps_are_recorded_on_one_gpu(monkeypatch):
    monkeypatch.setattr(ops, "check_attention", lambda backend, *args: backend)
    cuda, small, base = torch.device("cuda"), *(preset(f"paper_{size}_80x5") for size in ("small", "base"))
    for optimizer in ("fused", "triton"):
        chosen = {"adamw_ema": {"implementation": optimizer}}
        monkeypatch.setattr(ops, "choices", lambda device, chosen=chosen: chosen)
        assert resolve(tiny(), cuda).cuda_graph == (optimizer == "triton")
        assert resolve(tiny(train={"cuda_graph": "on"}), cuda).cuda_graph
    for cfg, processes in (
        (tiny(), 2),
        (tiny(train={"cuda_graph": "off"}), 1),
        (tiny(optim={"name": "lamb"}), 1),
        (FinetuneConfig(), 1),
        (replace(base, train=replace(base.train, batch_size=256)), 1),
    ):
        assert not resolve(cfg, cuda, processes).cuda_graph
    assert resolve(replace(small, train=replace(small.train, batch_size=256)), cuda).cuda_graph
    assert not resolve(tiny(), torch.device("cpu")).cuda_graph


@pytest.mark.parametrize(
    ("lacking", "mode", "kernels", "words"),
    [
        ("age", "block", False, "compute capability 7.5; the kernels need one of 8.0"),
        ("compiler", "none", False, "Failed to find C compiler); it needs a C compiler (gcc)"),
        ("triton", "none", False, "Triton is not installed (pip install triton)"),
        ("cache", "none", True, "set TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_a_gpu_that_cannot_run_everything(lacking, mode, kernels, words, monkeypatch, tmp_path, caplog):
    """Training starts with what can run, and one line says why; by name it is an error."""
    gpu = torch.device("cuda", 0)
    old, probe = lacking == "age", importlib.import_module("extrema_fast.kernels._probe")

    def run(device):
        if lacking == "compiler":
            raise RuntimeError("Failed to find C compiler")

    for name, value in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_capability", (7, 5) if old else (9, 0)),
        ("is_bf16_supported", not old),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(probe, "run", run)
    monkeypatch.setattr(_launch, "HAS_TRITON", lacking != "triton")
    monkeypatch.setattr(ops.measure, "known", lambda *args: [])
    monkeypatch.setattr(ops, "check_attention", lambda backend, *args: backend)
    monkeypatch.setattr(ops.optimizers, "find_apex", lambda *args: (None, "no apex"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / ("file" if lacking == "cache" else "cache")))
    for f in (_launch._too_old, _launch.compiler_missing):
        f.cache_clear()
    try:
        found = resolve(tiny(train={"precision": "auto"}), gpu)
        assert (found.compile, found.precision) == (mode, "fp32" if old else "bf16")
        assert {op for op, name in found.ops.items() if name == "triton"} == (
            set(ops.GPU_RULE) if kernels else set()
        )
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert words in line and "\n" not in line
        if not kernels:
            with pytest.raises(UsageError, match="asks for attention=triton"):
                resolve(tiny(system={"backend": "triton"}), gpu)
    finally:
        for f in (_launch._too_old, _launch.compiler_missing):
            f.cache_clear()


def test_the_old_name_of_a_compile_mode():
    data = {"train": {"compile": "loss"}}
    with pytest.raises(UsageError, match=r"train\.compile: 'loss' is called 'step' now"):
        from_dict(data)
    assert from_dict(data, recorded=True).train.compile == "step"


# ---- shadow weights ---------------------------------------------------------------------------------


@pytest.fixture
def with_shadows(monkeypatch):
    """Runs keep bf16 copies of their weights, as with bf16 on a GPU."""
    monkeypatch.setattr(
        "extrema_fast.training.run.resolve", lambda *args: replace(resolve(*args), shadow_weights=True)
    )
    return monkeypatch


def linear_layers(run):
    return [m for m in run.method.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("backend", ["auto", "adamw_ema=triton"])
def test_shadow_weights_follow_every_step(with_shadows, backend):
    change = {"system": {"backend": backend}, "train": {"precision": "bf16"}}
    try:
        run = begin(**change)
    except UsageError as error:
        pytest.skip(str(error))
    # Triton's interpreter rounds bf16 wrongly: the same op in plain torch
    with_shadows.setattr(_launch, "INTERPRET", False)
    assert isinstance(run.optimizer, ops.AdamWEma) == (backend != "auto")
    layers = linear_layers(run)
    shadows = [s for m in layers for s in (m.shadow, m.bias_shadow)]
    assert layers and all(s is not None and s.dtype == torch.bfloat16 for s in shadows)
    assert not any("shadow" in name for name in run.method.state_dict())
    first = layers[0].shadow.clone()
    losses = steps(run, 3)
    for m in layers:
        assert torch.equal(m.shadow, m.weight.to(torch.bfloat16))
        assert torch.equal(m.bias_shadow, m.bias.to(torch.bfloat16))
    assert not torch.equal(first, layers[0].shadow)
    with_shadows.undo()
    assert losses == pytest.approx(steps(begin(train={"precision": "bf16"}), 3), rel=1e-6)


def test_shadow_weights_are_synced_after_loading(with_shadows):
    run = build(tiny(), World(torch.device("cpu")), range(100))
    run.method.load_state_dict({k: v + 1 for k, v in run.method.state_dict().items()})
    wrap(run)
    for m in linear_layers(run):
        assert torch.equal(m.shadow, m.weight.to(torch.bfloat16))


# ---- recomputation ---------------------------------------------------------------------------------


def saved_bytes(run: Run) -> tuple[int, list[torch.Tensor]]:
    """Bytes kept for the backward pass of one student pass, and its gradients."""
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(4, dtype=torch.int32).expand(3, 4, 4).contiguous()
    run.method.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            out = run.method.student_branch(images, keep, torch.ones(3, 2, 12))[0]
    out.float().square().sum().backward()
    return sum(seen.values()), [p.grad.clone() for _, p in run.method.student_parameters()]


def test_recomputation_keeps_less_and_changes_no_bit():
    results = {w: saved_bytes(begin(train={"recompute": w})) for w in ("none", "gelu", "norm")}
    assert results["none"][0] > results["gelu"][0] > results["norm"][0]
    for what in ("gelu", "norm"):
        for a, b in zip(results["none"][1], results[what][1], strict=True):
            assert torch.equal(a, b), what
    # depth 2, 12 rows of 4 tokens: GELU outputs are 4 D, the inputs of qkv and fc1 one D each, 2 bytes
    tokens = 2 * 12 * 4 * 32 * 2
    assert results["none"][0] - results["gelu"][0] >= 4 * tokens
    assert results["gelu"][0] - results["norm"][0] >= 2 * tokens


# ---- recording -------------------------------------------------------------------------------------


def test_a_recording_takes_inputs_of_its_own_shapes_only():
    graph = StepGraph.__new__(StepGraph)
    flatten = torch.utils._pytree.tree_flatten
    graph.inputs, graph.spec = flatten([(torch.zeros(2, 3), None, [torch.zeros(4)])])
    assert graph._fits(*flatten([(torch.ones(2, 3), None, [torch.ones(4)])]))
    assert not graph._fits(*flatten([(torch.ones(2, 4), None, [torch.ones(4)])]))
    assert not graph._fits(*flatten([(torch.ones(2, 3), None, torch.ones(4))]))
    assert not graph._fits(*flatten([(torch.ones(2, 3).half(), None, [torch.ones(4)])]))
