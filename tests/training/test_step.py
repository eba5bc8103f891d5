"""The step and its modes on a CPU.

Covers: compile block, loss and step against the plain step over three steps, losses and weights, with and without
accumulation, InfoNCE; how many graphs each makes; no recompilation while rates and momentum move; modes that
cannot run together or here; low-precision copies of weights, renewed by every step and after loading; memory of
recomputation; out of memory; one recorded step's inputs.
"""

from __future__ import annotations

import pytest
import torch
from extrema_fast.kernels import _launch

from extrema_fast.config import Config, from_dict, smoke
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops.linear import Linear
from extrema_fast.train import train_step
from extrema_fast.training import step
from extrema_fast.training.graph import StepGraph
from extrema_fast.training.state import Run, build, wrap

TINY = {
    "model": {"width": 32, "depth": 3, "heads": 2, "drop_path": 0.5, "patch_size": 8},
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
    with torch._dynamo.config.patch(trace_autograd_ops=False, fail_on_recompile_limit_hit=False):
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


def key_biases(name: str) -> bool:
    # a gradient of rounding noise, which AdamW makes a full-size step of
    return name.endswith(("attn.k.bias", "attn.qkv.bias"))


def same(a: Run, b: Run, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Student, predictor and teacher of both runs."""
    theirs = b.method.state_dict()
    for name, value in a.method.state_dict().items():
        if not key_biases(name):
            torch.testing.assert_close(
                value, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- compiling -------------------------------------------------------------------------------------

GRAPHS = {"block": 6, "loss": 1, "step": 1}


@pytest.mark.parametrize("mode", ["block", "loss", "step"])
@pytest.mark.parametrize(("loss", "parts"), [("byol", 1), ("byol", 2), ("infonce", 1)])
def test_compiled_steps_equal_plain_ones(counting, mode, loss, parts):
    change = {"head": {"loss": loss}, "train": {"accumulation": parts}}
    plain = begin(**change)
    change["train"]["compile"] = mode
    compiled = begin(**change)
    expected = steps(plain, 3)
    assert steps(compiled, 3) == pytest.approx(expected, rel=1e-5)
    same(plain, compiled)
    # blocks of one shape share their code: drop-path and none in the student at most, the teacher's length
    assert 1 <= counting.graphs <= GRAPHS[mode]
    if mode != "block":
        assert counting.graphs == 1


@pytest.mark.parametrize("mode", ["block", "loss"])
def test_nothing_recompiles_while_rates_move(counting, mode):
    run = begin(train={"compile": mode, "precision": "bf16", "epochs": 1})
    steps(run, 2)
    made, first = counting.graphs, run.optimizer.param_groups[0]["lr"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(run, 20)
    assert counting.graphs == made and run.optimizer.param_groups[0]["lr"] != first


@pytest.mark.slow
def test_generated_code_equals_the_plain_step():
    torch._dynamo.reset()
    change = {
        "model": {"depth": 1},
        "head": {"hidden": 16},
        "mask": {"views": 1},
        "train": {"precision": "bf16"},
    }
    plain = begin(**change)
    change["train"]["compile"] = "loss"
    compiled = begin(**change)
    assert steps(compiled, 2) == pytest.approx(steps(plain, 2), rel=5e-3)
    torch._dynamo.reset()


# ---- what cannot be --------------------------------------------------------------------------------


def test_modes_that_exclude_each_other():
    with pytest.raises(UsageError, match=r"cuda_graph: needs a CUDA device, this run is on cpu"):
        begin(train={"cuda_graph": True})
    for mode in ("loss", "step"):
        with pytest.raises(
            UsageError, match=rf"compile {mode}: bypasses the exchange .* between 2 processes"
        ):
            step.check_modes(tiny(train={"compile": mode}), "cuda", 2)
        with pytest.raises(UsageError, match=r"InfoNCE .* 2 micro-batches .* use train\.accumulation 1"):
            begin(head={"loss": "infonce"}, train={"compile": mode, "accumulation": 2})
    with pytest.raises(UsageError, match="cuda_graph: bypasses"):
        step.check_modes(tiny(train={"cuda_graph": True}), "cuda", 2)
    with pytest.raises(UsageError, match=r"with train\.compile loss or block"):
        step.check_modes(tiny(train={"cuda_graph": True, "compile": "step"}), "cuda", 1)
    step.check_modes(tiny(train={"compile": "block"}), "cuda", 8)


def test_defaults_by_device():
    cfg = tiny()
    assert step.compile_mode(cfg, "cuda") == "block" and step.compile_mode(cfg, "cpu") == "none"
    assert step.recomputed(cfg, "cpu") == "norm" and step.recomputed(cfg, "cuda") == "none"
    bf16 = tiny(train={"precision": "bf16"})
    assert (
        step.keeps_low(bf16, "cuda") and not step.keeps_low(bf16, "cpu") and not step.keeps_low(cfg, "cuda")
    )


# ---- low-precision copies --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "adamw_ema=triton"])
def test_copies_of_weights_follow_every_step(monkeypatch, backend):
    ops.set_backend(backend)
    monkeypatch.setattr(step, "keeps_low", lambda cfg, kind: True)
    monkeypatch.setattr("extrema_fast.training.state.keeps_low", lambda cfg, kind: True)
    change = {"train": {"precision": "bf16"}}
    try:
        run = begin(**change)
    except UsageError as error:
        pytest.skip(str(error))
    # Triton's interpreter rounds bf16 wrongly: the same op in plain torch
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert isinstance(run.optimizer, ops.AdamWEma) == (backend != "auto")
    layers = [m for m in run.method.modules() if isinstance(m, Linear)]
    assert layers and all(m.shadow is not None and m.shadow.dtype == torch.bfloat16 for m in layers)
    assert not any("shadow" in name for name in run.method.state_dict())
    first = layers[0].shadow.clone()
    losses = steps(run, 3)
    for m in layers:
        assert torch.equal(m.shadow, m.weight.to(torch.bfloat16))
    assert not torch.equal(first, layers[0].shadow)
    monkeypatch.undo()
    ops.set_backend("auto")
    assert losses == pytest.approx(steps(begin(**change), 3), rel=1e-6)


def test_copies_are_renewed_after_loading(monkeypatch):
    monkeypatch.setattr("extrema_fast.training.state.keeps_low", lambda cfg, kind: True)
    run = build(tiny(train={"precision": "bf16"}), World(torch.device("cpu")), range(100))
    other = {k: v + 1 for k, v in run.method.state_dict().items()}
    run.method.load_state_dict(other)
    wrap(run)
    for m in (m for m in run.method.modules() if isinstance(m, Linear)):
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
    # depth 3, 12 rows of 4 tokens: GELU outputs are 4 D, the inputs of qkv and fc1 one D each, 2 bytes
    tokens = 3 * 12 * 4 * 32 * 2
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
