"""Where the time of a step goes: traces read, real steps profiled, the command.

Covers: own time of nested ops, ranges, backward by sequence number, the trunk's split, accumulation, compiled
regions, matmuls and their FLOPs; kernels by their launches (other threads, memory copies, graph replays, fused
kernels), overlapping streams; FLOPs of a real step against torch's counter;
every component found in real steps and adding up to them; ranges on and off; files; the
command's errors, its fallback without a data set, its output.
"""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from extrema_fast import cli, train
from extrema_fast.config import from_dict, preset
from extrema_fast.data.loader import Batch
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops.scope import PREFIX, recording, scope, scoped
from extrema_fast.tools import profile, trace
from extrema_fast.training import step
from extrema_fast.training.run import build

TINY = from_dict(
    {
        "model": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "img_size": [32, 32],
            "patch_size": 8,
            "drop_path": 0.1,
        },
        "head": {"hidden": 24, "out": 8, "predictor_hidden": 24},
        "train": {"batch_size": 6, "precision": "fp32", "compile": "none"},
        "system": {"attention": "reference", "device": "cpu"},
        "data": {"policy": "spatial+color"},
    },
    preset("smoke"),
)


class Recorded:
    """A trace put together by hand: `op` opens an event inside the one before, with its own microseconds."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self.now = 100.0

    def add(self, name, cat, start, dur, tid=1, **args):
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": dur, "pid": 7, "tid": tid, "args": args}
        )

    def op(self, name, own=0.0, *inside, cat="cpu_op", tid=1, **args):
        """Callables in `inside` run within; `own` microseconds of the op itself come first."""
        start = self.now
        self.now += own
        for call in inside:
            call()
        self.add(name, cat, start, self.now - start, tid, **args)

    def range(self, name, *inside, tid=1):
        self.op("extrema:" + name, 0, *inside, cat="user_annotation", tid=tid)


def rows(found: trace.Breakdown) -> dict[tuple[str, str], trace.Row]:
    return {(r.branch, r.component): r for r in found.rows}


def events(folder) -> list[dict]:
    return json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]


def seq(number: int, thread: int = 0) -> dict:
    return {"Sequence number": number, "Fwd thread id": thread}


def node(t: Recorded, name: str, number: int, *inside) -> None:
    t.op(f"autograd::engine::evaluate_function: {name}", 1, *inside, **seq(number, 1))


def test_own_time_and_backward_by_sequence_number():
    t = Recorded()
    mm = {"Input Dims": [[4, 3], [3, 5]]}
    addmm = {"Input Dims": [[5], [4, 3], [3, 5]]}

    def one_step():
        t.range("teacher/trunk", lambda: t.op("aten::gelu", 11, **seq(6)))
        t.range(
            "student/trunk",
            lambda: t.op(
                "aten::linear",
                1,
                lambda: t.op("aten::addmm", 20, lambda: t.op("aten::copy_", 3), **seq(5), **addmm),
            ),
            lambda: t.op("aten::scaled_dot_product_attention", 7, **seq(6)),
            lambda: t.op("aten::gelu", 9, **seq(7)),
        )
        t.range("loss", lambda: t.op("aten::mul", 2, **seq(8)))
        node(t, "MulBackward0", 8, lambda: t.op("aten::mul", 4))
        node(t, "GeluBackward0", 7, lambda: t.op("aten::gelu_backward", 6))
        node(t, "ScaledDotProductBackward0", 6, lambda: t.op("aten::copy_", 8))
        node(t, "AddmmBackward0", 5, lambda: t.op("aten::mm", 30, **mm), lambda: t.op("aten::t", 2))
        node(t, "torch::autograd::AccumulateGrad", -1, lambda: t.op("aten::add_", 5))
        t.range(
            "optimizer and EMA",
            lambda: t.op("Optimizer.step", 3, lambda: t.op("aten::_fused_adamw_", 12), cat="user_annotation"),
        )
        t.op("aten::isfinite", 1)
        t.now += 10

    t.range("STEP", one_step)
    # a loader's thread runs beside the step
    t.add("aten::sort", "cpu_op", 110.0, 50.0, tid=2)
    found = trace.Breakdown(t.events)
    got = {k: (r.forward_us, r.backward_us) for k, r in rows(found).items()}
    assert got == {
        ("teacher", trace.REST): (11, 0),
        ("student", trace.LINEARS): (24, 33),
        ("student", trace.ATTENTION): (7, 9),
        ("student", trace.REST): (9, 7),
        ("", "loss"): (2, 5),
        ("", trace.ACCUMULATE): (0, 6),
        ("", "optimizer and EMA"): (15, 0),
        ("", "other"): (1, 0),
        ("", trace.OUTSIDE): (10, 0),
    }
    assert found.wall_us == sum(r.us for r in found.rows) == 139 and found.busy_us == 129
    assert not found.on_device and found.steps == 1
    linears = rows(found)["student", trace.LINEARS]
    assert (linears.matmul_us, linears.flop) == (20 + 3 + 30, 2 * 2 * 4 * 3 * 5)
    assert sum(r.matmul_us for r in found.rows) == linears.matmul_us
    assert max(found.ops, key=found.ops.get) == ("student trunk linears", "aten::mm")


def test_compiled_regions():
    t = Recorded()
    fused = "graph_0_cpp_fused_native_layer_norm_addmm_3"

    def region(number):
        t.op(
            "Torch-Compiled Region: 0/0",
            1,
            lambda: t.op(
                "CompiledFunction",
                1,
                lambda: t.op("aten::addmm", 10),
                lambda: t.op(fused, 5),
                lambda: t.op("aten::_scaled_dot_product_flash_attention_for_cpu", 4),
                **seq(number),
            ),
        )

    def one_step():
        t.range("student/trunk", lambda: region(3))
        region(4)
        for number in (4, 3):
            node(
                t,
                "CompiledFunctionBackward",
                number,
                lambda: t.op("aten::mm", 20),
                lambda: t.op("graph_0_cpp_fused_gelu_backward_1", 6),
                lambda: t.op("cpp_fused_softmax_2", 2),
            )

    t.range("STEP", one_step)
    got = {k: (r.forward_us, r.backward_us) for k, r in rows(trace.Breakdown(t.events)).items()}
    # inside the trunk's range a region is split as the trunk is; elsewhere it is a component of its own
    assert got == {
        ("student", trace.LINEARS): (10, 20),
        ("student", trace.ATTENTION): (4, 2),
        ("student", trace.REST): (5 + 2, 6 + 1),
        (trace.COMPILED, trace.MATMUL): (10, 20),
        (trace.COMPILED, trace.ATTENTION): (4, 2),
        (trace.COMPILED, trace.FUSED): (5 + 2, 6 + 1),
        ("", trace.OUTSIDE): (0, 0),
    }


class OnDevice(Recorded):
    """A trace with kernels: `launch` queues one, which runs behind the CPU on its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = {0: 1000.0, 1: 1000.0}
        self.count = 0

    def launch(self, kernel, us, stream=0, by="cudaLaunchKernel", cat="kernel", tid=1, kernels=1):
        self.count += 1
        self.add(by, "cuda_runtime", self.now, 1.0, tid, correlation=self.count)
        self.now += 1
        for _ in range(kernels):
            self.add(kernel, cat, self.stream[stream], us, f"stream {stream}", correlation=self.count)
            self.stream[stream] += us


def test_kernels_by_their_launches():
    t = OnDevice()
    mm, addmm = {"Input Dims": [[4, 3], [3, 5]]}, {"Input Dims": [[5], [4, 3], [3, 5]]}

    def one_step():
        t.launch("Memcpy HtoD (Pinned -> Device)", 3, by="cudaMemcpyAsync", cat="gpu_memcpy")
        t.launch("decode", 5, tid=99)
        t.range("masks", lambda: t.launch("_sample_views_kernel", 2, by="cuLaunchKernelEx"))
        t.range(
            "student/trunk",
            lambda: t.op(
                "aten::addmm",
                1,
                lambda: t.launch("nvjet_tst_128x256", 40),
                lambda: t.launch("splitKreduce_kernel", 1),
                **seq(3),
                **addmm,
            ),
            lambda: t.op(
                "extrema_fast::short_attention_fwd", 1, lambda: t.launch("_fwd_kernel", 6), **seq(4)
            ),
            lambda: t.launch("triton_poi_fused_gelu_0", 7),
        )
        t.op("aten::isfinite", 1, lambda: t.launch("elementwise", 1))

    t.range("STEP", one_step)
    # the engine has a thread of its own, while the step waits for it
    start, end = t.events[-1]["ts"], t.now

    def backward():
        t.op(
            "AddmmBackward0",
            1,
            lambda: t.op("aten::mm", 1, lambda: t.launch("nvjet_b", 80, tid=5), tid=5, **mm),
            tid=5,
        )

    t.now = end
    t.op("autograd::engine::evaluate_function: AddmmBackward0", 1, backward, tid=5, **seq(3, 1))
    t.events = [e | ({"dur": t.now - start} if e["name"] == trace.STEP else {}) for e in t.events]
    # a kernel launched after the step, e.g. by an evaluation, is none of it
    t.now += 50
    t.launch("later", 1000)
    found = trace.Breakdown(t.events)
    assert found.on_device
    got = {k: (r.forward_us, r.backward_us) for k, r in rows(found).items()}
    assert got == {
        ("", trace.DATA): (8, 0),
        ("", "masks"): (2, 0),
        ("student", trace.LINEARS): (41, 80),
        ("student", trace.ATTENTION): (6, 0),
        ("student", trace.REST): (7, 0),
        ("", "other"): (1, 0),
    }
    linears = rows(found)["student", trace.LINEARS]
    assert (linears.matmul_us, linears.flop) == (121, 2 * 2 * 4 * 3 * 5)
    assert found.wall_us == found.busy_us == 145


def test_launches_from_threads_with_other_names():
    t = OnDevice()
    mm = {"Input Dims": [[4, 3], [3, 5]], "External id": 17}

    def one_step():
        t.range("student/trunk", lambda: t.op("aten::mm", 5, **mm))
        t.launch("nvjet_tst", 40, tid=-123456)
        t.events[-1]["args"]["External id"] = 17
        t.launch("decode", 3, tid=-123456)
        t.events[-1]["args"]["External id"] = 99

    t.range("STEP", one_step)
    found = rows(trace.Breakdown(t.events))
    assert found["student", trace.LINEARS].matmul_us == 40 and found["student", trace.LINEARS].flop == 120
    assert found["", trace.DATA].us == 3


def test_streams_overlap_and_wait():
    t = OnDevice()

    def one_step():
        t.range("loss", lambda: t.launch("a", 10), lambda: t.launch("b", 6, stream=1))
        t.stream[0] += 5
        t.range("loss", lambda: t.launch("c", 4))

    t.range("STEP", one_step)
    found = trace.Breakdown(t.events)
    assert rows(found)["", "loss"].us == 20
    assert (found.wall_us, found.busy_us) == (19, 14)


def test_a_replayed_graph_is_split_by_its_kernels():
    t = OnDevice()

    def one_step():
        for kernel, us in (
            ("sm90_xmma_gemm_bf16", 50),
            ("fmha_cutlassF_bf16", 20),
            ("vectorized_elementwise", 9),
        ):
            t.launch(kernel, us, by="cudaGraphLaunch", kernels=2)

    t.range("STEP", one_step)
    got = {k: (r.us, r.matmul_us, r.flop) for k, r in rows(trace.Breakdown(t.events)).items()}
    assert got == {
        (trace.GRAPH, trace.MATMUL): (100, 100, 0),
        (trace.GRAPH, trace.ATTENTION): (40, 0, 0),
        (trace.GRAPH, trace.FUSED): (18, 0, 0),
    }


@pytest.mark.parametrize(
    ("name", "dims", "flop"),
    [
        ("aten::baddbmm", [[1], [7, 4, 3], [7, 3, 5]], 840),
        ("aten::_scaled_mm", [[4, 3], [3, 5], [], []], 120),
        ("mkldnn::_linear_pointwise", [[2, 2, 3], [5, 3], [5]], 120),
        ("aten::mm", [], 0),
        ("aten::mul", [[4, 3], [4, 3]], 0),
    ],
)
def test_flop(name, dims, flop):
    assert trace.Event(name, "cpu_op", 0, 1, 1, {"Input Dims": dims}).flop == flop


# ---- real steps -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def plain_choices():
    yield
    ops.set_backend("auto")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[dict, object]:
    """(result, folder) of a small run on pictures from memory."""
    folder = tmp_path_factory.mktemp("profile")
    return profile.profile(TINY, folder / "out", steps=3, warmup=1, synthetic=True), folder


def test_every_component_is_found_and_they_add_up(profiled):
    result, _ = profiled
    found = {(r["branch"], r["component"]): r for r in result["rows"]}
    compiled = (trace.COMPILED, trace.GRAPH)
    expected = {k for k in trace.ORDER if k[0] not in compiled and k[1] != "pooling, heads"}
    assert set(found) == expected
    assert all(r["ms"] > 0 for r in found.values())
    for branch, component in expected:
        has_backward = branch == "student" or component in ("loss", trace.ACCUMULATE)
        assert (found[branch, component]["backward_ms"] > 0) == has_backward or component == "other"
    assert sum(r["ms"] for r in result["rows"]) == pytest.approx(result["traced_step_ms"], rel=1e-3)
    assert sum(r["share"] for r in result["rows"]) == pytest.approx(1, rel=1e-3)
    for part in ("embed", trace.LINEARS, trace.ATTENTION, "pooling", "heads"):
        assert found["student", part]["matmul_ms"] > 0 < found["teacher", part]["matmul_ms"]
    assert found["student", trace.REST]["matmul_ms"] == 0


def test_matmuls_are_those_torch_counts(profiled, monkeypatch):
    # its hooks for all modules would have each part called, pooling in more matmuls
    monkeypatch.setattr(ModuleTracker, "__enter__", lambda self: self)
    monkeypatch.setattr(ModuleTracker, "__exit__", lambda *_: None)
    result, _ = profiled
    run = build(TINY, World(torch.device("cpu")), range(1000))
    step.wrap(run)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        train.train_step(run, *step.batches(run, [Batch(images, torch.arange(6), 0, 0)]))
    assert result["matmul"]["tflop"] == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-9)


def test_files(profiled):
    result, folder = profiled
    assert [p.name for p in folder.iterdir()] == ["out"]
    names = ["profile.json", "profile.txt", "trace.json.gz"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == names
    assert json.loads((folder / "out/profile.json").read_text()) == result
    text = (folder / "out/profile.txt").read_text()
    assert text == profile.describe(result) + "\n"
    for words in ("student trunk linears", "teacher pooling", "optimizer and EMA", "images from memory"):
        assert words in text
    assert len(events(folder / "out")) > 1000


def test_ranges_are_off_outside_a_profile_and_in_compiled_code():
    @scoped("inner")
    def inner(x):
        return x * 2

    def outer(x):
        with scope("student/outer"):
            return inner(x) + 1

    def names(function):
        with torch.profiler.profile() as profiler:
            assert function(torch.ones(3)).tolist() == [3, 3, 3]
        return [e.name for e in profiler.events() if e.name.startswith(PREFIX)]

    compiled = torch.compile(outer, fullgraph=True, backend="eager")
    assert names(outer) == names(compiled) == []
    with recording():
        assert names(outer) == ["extrema:student/outer", "extrema:inner"] and names(compiled) == []
    assert names(outer) == []


@pytest.mark.slow
def test_compiled_blocks_are_split_too(monkeypatch, tmp_path):
    def only_the_blocks(self, **options):
        self.teacher_branch.encoder.blocks[0].compile(**options)
        # C++ of forward and backward takes half a minute; the names of regions are the same without
        self.student_branch.encoder.blocks[0].compile(**options | {"backend": "aot_eager"})

    # pooling, heads and loss would take as long again
    monkeypatch.setattr(ExtreMA, "compile_regions", only_the_blocks)
    cfg = from_dict({"train": {"compile": "block"}, "model": {"depth": 1}}, TINY)
    result = profile.profile(cfg, tmp_path, steps=1, warmup=1, synthetic=True)
    found = {(r["branch"], r["component"]): r for r in result["rows"]}
    for branch in ("teacher", "student"):
        assert found[branch, trace.LINEARS]["matmul_ms"] > 0
        assert found[branch, trace.REST]["ms"] > 0 and found[branch, trace.ATTENTION]["ms"] > 0
    for part in (trace.LINEARS, trace.REST, trace.ATTENTION):
        assert found["student", part]["backward_ms"] > 0
    fused = {component for component, op in trace.Breakdown(events(tmp_path)).ops if "_fused_" in op}
    assert f"teacher {trace.REST}" in fused
    assert not any(r["branch"] == trace.COMPILED for r in result["rows"])


# ---- the command ------------------------------------------------------------------------------------

SMALL = "--model.width 16 --model.depth 1 --train.batch-size 4 --steps 1 --warmup 1"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("smoke --stesp 3", "unknown option --stesp; did you mean --steps?"),
        ("smoke --steps 0", "--steps: expected at least 1, got 0"),
        ("smoke --warmup 0", "--warmup: expected at least 1, got 0"),
        ("smoke --mask.ratio 1.5", "mask.ratio: "),
        ("smoke --out taken", "--out taken: is a file"),
        # a place the user names is not replaced by noise
        ("paper_small_80x5 --data.train nowhere", "nowhere: does not exist"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert cli.main(["profile", *args.split(), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_several_processes_are_refused(monkeypatch, tmp_path):
    two = World(torch.device("cpu"), 0, 2)
    monkeypatch.setattr(profile, "start", lambda device: nullcontext(two))
    with pytest.raises(UsageError, match="one process only, this is one of 2"):
        profile.profile(TINY, tmp_path)


def test_real_images(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "smoke", *SMALL.split(), "--quiet", "--data.loader", "pil"]) == 0
    out = capsys.readouterr().out
    assert "images synthetic" in out and "student trunk linears" in out and "trace.json.gz" in out
    assert (tmp_path / "runs/profile_smoke/trace.json.gz").is_file()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["profile_smoke"]


def test_without_the_presets_data_set(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = (
        "--model.img-size 32 32 --model.heads 1 --head.hidden 8 --head.predictor-hidden 8 --mask.ratio 0.5"
    )
    small += " --mask.views 2 --system.device cpu --train.compile none --json --out here"
    assert cli.main(["profile", "paper-small-80x5", *SMALL.split(), *small.split()]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == "from memory" and "no images at imagenet/train" in err
    assert (tmp_path / "here/profile.json").is_file()
