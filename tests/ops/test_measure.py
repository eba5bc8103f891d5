"""`auto` on a GPU: every implementation is checked and timed in a child process, the fastest right one is taken.

Covers: a candidate that crashes, hangs, raises, gives NaN, is wrong in one row, varies between runs, is slower; a child
that does not start; out of memory; the decision: gains, spread, several cases; the cache: other GPUs and versions,
damaged and unwritable; the run's record; two processes; unlike GPUs; deterministic runs, settings by name; library
calls, which never measure; a run and its continuation. Everything runs on a CPU, with given times.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from extrema_fast.kernels import _cache, _launch
from extrema_fast.kernels._spec import Case, Sizes

from extrema_fast import pretrain
from extrema_fast.distributed import World
from extrema_fast.errors import UsageError
from extrema_fast.ops import attention, measure
from extrema_fast.ops import dispatch as ops
from extrema_fast.ops.measure import Choice, Problem, Result
from extrema_fast.training import run as run_module
from tests.training.conftest import tiny

CPU = torch.device("cpu")
SIZES = Sizes(3, 2, 5, 16, 32, 2, 1, 64, 4, 16, 16, 3)
POOL = Problem("attention_pool", "", "triton", ("triton", "absorbed"), SIZES, "fp32")
MACHINE = {"gpu": "Some GPU", "torch": "2", "triton": "3", "package": "1"}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A cache and a machine of this test; measurements count on a CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "environment", lambda device: dict(MACHINE))
    monkeypatch.setattr(ops, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(attention, "left_out", {})
    monkeypatch.setattr(ops, "_measured", {})


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# ---- candidates, in the child ---------------------------------------------------------------------


def double(x):
    return x * 2


def fast(x):
    return x + x


def slow(x):
    return x * 4 / 2


def crash(x):
    os._exit(7)


def hang(x):
    time.sleep(3600)


def raises(x):
    raise RuntimeError("no kernel image\nis available")


def no_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory")


def nan(x):
    return x * 2 * float("nan")


def wrong_in_the_last_row(x):
    return torch.cat([x[:-1] * 2, x[-1:] * 2.01])


def varies(x, calls=[]):  # noqa: B006
    calls.append(0)
    return x * 2 + 1e-8 * len(calls)


US = {"double": 100.0, "fast": 50.0, "slow": 1000.0}
CANDIDATES = (double, fast, slow, crash, hang, raises, no_memory, nan, wrong_in_the_last_row, varies)
PROBLEM = replace(POOL, default="double", candidates=tuple(f.__name__ for f in CANDIDATES))


def build(problem, device):
    """One case of doubling, with given times."""
    if problem.op == "broken":
        os.kill(os.getpid(), signal.SIGSEGV)

    def sampler(call, device):
        return lambda: US[call.args[2].__name__]

    def make(device, dtype, generator):
        return (torch.randn(100, 4, generator=generator, dtype=dtype).requires_grad_(),)

    case = Case("only", make, {"reference": double}, 1, row_dims={0: 0})
    return [measure.Bench(case, torch.float32, {f.__name__: f for f in CANDIDATES}, sampler)]


BUILDER = f"{__name__}:build"


@pytest.fixture
def children(monkeypatch, repository):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    # only what hangs is silent for so long, on a machine under load, too
    monkeypatch.setattr(measure, "SILENT_S", 6.0)
    monkeypatch.setattr(measure, "TOTAL_S", 600.0)


def test_whatever_goes_wrong_takes_out_that_candidate_alone(children, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "extrema_fast.ops.measure")
    broken = replace(PROBLEM, op="broken")
    monkeypatch.setattr(measure, "folder_of", lambda op: "attention_pool")
    found = measure.measure([broken, PROBLEM], "cpu", BUILDER)
    choice = found[PROBLEM.name]
    assert choice.implementation == "fast" and choice.reason == "50 us, 2.00 times as fast as double"
    words = {
        "crash": "exit code 7",
        "hang": "it took more than 6 s",
        "raises": "RuntimeError: no kernel image is available",
        "nan": "NaN",
        "wrong_in_the_last_row": "times the allowed error",
        "varies": "two runs differ",
    }
    assert choice.out.keys() == words.keys()
    for name, text in words.items():
        assert text in choice.out[name]
        # one line each
        assert [text in line and "\n" not in line for line in warnings(caplog) if f": {name} is" in line] == [
            True
        ]
    # which is not what is wrong with it
    assert [line for line in warnings(caplog) if "memory" in line] == [
        f"ops: left out are no_memory of {PROBLEM.name}: {measure.NO_MEMORY}"
    ]
    # a problem that ends the child whatever runs is left to the rule, and tried again next time
    assert found["broken"].implementation == "" and "by signal 11" in found["broken"].reason
    assert "broken: the fixed rule holds" in caplog.text and not measure.cached([broken], "cpu")
    # kept: nothing is measured a second time
    assert measure.cached([PROBLEM], "cpu") == {PROBLEM.name: choice}
    kept = json.loads(_cache.file(PROBLEM.key("cpu")).read_text())["value"]["times"]["only"]
    # what is far behind is timed once
    assert {name: len(us) for name, us in kept.items()} == {
        "double": measure.ROUNDS + 1,
        "fast": measure.ROUNDS + 1,
        "slow": 1,
    }


def test_a_child_that_does_not_start_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (result,) = measure.run([PROBLEM], "cpu", BUILDER)
    assert "exit code 1" in result.failed
    assert measure.decide(PROBLEM, result) == Choice("", result.failed, {})
    # as where the GPU takes one process at a time
    teacher = replace(PROBLEM, op="attention", label="teacher")
    assert {c.implementation for c in measure.measure([PROBLEM, teacher], "cpu", BUILDER).values()} == {""}
    (line,) = warnings(caplog)
    assert "attention_pool, attention teacher: the fixed rule holds" in line and "exit code 1" in line
    assert "the next start measures again" in line and not measure.cached([PROBLEM, teacher], "cpu")


@pytest.mark.parametrize(
    ("no_memory", "wanted", "kept"),
    [
        (["b"], "a", True),
        # the rule's own choice: another takes its place, this time
        (["a"], "b", False),
        (["a", "b"], "", False),
    ],
)
def test_no_memory_while_measuring_is_one_line(no_memory, wanted, kept, monkeypatch, caplog):
    """Another process on the GPU: nothing is found wrong for good."""
    p = replace(POOL, default="a", candidates=("a", "b"))
    teacher = replace(p, op="attention", label="teacher")
    times = {"only": {n: steady(10) for n in p.candidates if n not in no_memory}}
    monkeypatch.setattr(
        measure, "run", lambda problems, *_: [Result(times, {}, list(no_memory)) for _ in problems]
    )
    found = measure.measure([p, teacher], "cpu")
    assert [(c.implementation, c.out) for c in found.values()] == [(wanted, {})] * 2
    (line,) = warnings(caplog)
    assert "no memory" in line and "nvidia-smi" in line and "report" not in line
    assert bool(measure.cached([p, teacher], "cpu")) == kept


def test_time_that_is_over(monkeypatch):
    monkeypatch.setattr(measure, "TOTAL_S", 0.0)
    (result,) = measure.run([PROBLEM], "cpu", BUILDER)
    assert "were over" in result.failed


# ---- the decision ---------------------------------------------------------------------------------


def steady(us: float) -> list[float]:
    return [us] * 20


@pytest.mark.parametrize(
    ("times", "out", "wanted", "words"),
    [
        ({"a": steady(100), "b": steady(50)}, {}, "b", "2.00 times as fast as a"),
        ({"a": steady(100), "b": steady(98)}, {}, "a", "b is not faster by 3%"),
        ({"a": steady(100), "b": steady(120)}, {}, "a", "1.20 times as fast as b"),
        ({"a": [100, 150] * 10, "b": steady(50)}, {}, "a", "times vary by 40%"),
        # one interruption is no spread
        ({"a": [*steady(100), 900], "b": steady(50)}, {}, "b", "2.00"),
        ({"a": steady(100), "b": steady(120)}, {"a": "wrong"}, "b", "120 us"),
        ({"b": steady(120)}, {}, "b", "120 us"),
        ({"a": steady(100)}, {"a": "wrong"}, "", "no other"),
        ({}, {}, "", "no other"),
    ],
)
def test_what_is_chosen(times, out, wanted, words):
    p = replace(POOL, default="a", candidates=("a", "b"))
    choice = measure.decide(p, Result({"only": times} if times else {}, out))
    assert choice.implementation == wanted and words in choice.reason


def test_cases_are_added_and_all_must_be_right():
    p = replace(POOL, default="a", candidates=("a", "b", "c"))
    student = {"a": steady(100), "b": steady(40), "c": steady(1)}
    teacher = {"a": steady(100), "b": steady(150)}
    choice = measure.decide(p, Result({"student": student, "teacher": teacher}))
    assert choice == Choice("b", "190 us, 1.05 times as fast as a")


# ---- the cache ------------------------------------------------------------------------------------


def keep(problem=POOL, name="absorbed") -> Path:
    key = problem.key("cpu")
    assert measure._keep(key, asdict(Choice(name, "10 us")))
    return _cache.file(key)


@pytest.mark.parametrize("part", [*MACHINE, "version", "source", "dtype", "images"])
def test_measurements_of_other_machines_versions_and_shapes_are_not_used(part, monkeypatch):
    file = keep()
    assert measure.cached([POOL], "cpu") == {POOL.name: Choice("absorbed", "10 us")}
    other = POOL
    if part in MACHINE:
        monkeypatch.setattr(_cache, "environment", lambda device: MACHINE | {part: "other"})
    elif part == "source":
        monkeypatch.setattr(_cache, "_source", lambda op: "edited")
    elif part == "version":
        monkeypatch.setattr(_cache, "spec", lambda op: replace(measure.spec(op), version=99))
    else:
        values = {"dtype": "bf16"} if part == "dtype" else {"sizes": replace(SIZES, images=4)}
        other = replace(POOL, **values)
    assert not measure.cached([other], "cpu")
    assert part in ("dtype", "images") or not measure.known("attention_pool", "cpu")
    assert file.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1, "value": {}}', "null", "[" * 5000])
def test_a_damaged_file_counts_as_absent(content):
    keep().write_text(content)
    assert not measure.cached([POOL], "cpu") and not measure.known("attention_pool", "cpu")


def test_a_choice_that_cannot_run_any_more_is_not_used():
    keep(name="triton")
    assert not measure.cached([replace(POOL, candidates=("absorbed",))], "cpu")


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    times = {"only": {"triton": steady(10), "absorbed": steady(20)}}
    monkeypatch.setattr(measure, "run", lambda problems, *_: [Result(times) for _ in problems])
    teacher = replace(POOL, op="attention", label="teacher")
    found = measure.measure([POOL, teacher], "cpu")
    assert {c.implementation for c in found.values()} == {"triton"}
    (line,) = warnings(caplog)
    assert "cannot be written" in line and "XDG_CACHE_HOME" in line


def test_launch_settings(monkeypatch):
    gpu, default = torch.device("cuda"), {"A": 1, "B": 2, "C": 3}
    key = _cache.key("cuda", "attention_pool", launch="k")
    assert measure._keep(key, {"config": {"B": 4, "C": 4}})
    _launch.tuned.cache_clear()
    with _launch.forced("attention_pool", {"C": 5}), _launch.forced("attention_pool", {"A": 9}, "other key"):
        assert _launch.settings("attention_pool", "k", gpu, default) == {"A": 1, "B": 4, "C": 5}
    assert _launch.settings("attention_pool", "k", CPU, default) == default
    assert _launch.settings("attention_pool", "other", gpu, default) == default
    # another Triton
    monkeypatch.setattr(_cache, "environment", lambda device: MACHINE | {"triton": "4"})
    _launch.tuned.cache_clear()
    assert _launch.settings("attention_pool", "k", gpu, default) == default
    _launch.tuned.cache_clear()


# ---- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """What `measure` was asked for; it chooses the last candidate of each problem."""
    asked = []

    def answer(problems, device):
        asked.append([p.name for p in problems])
        return {p.name: Choice(p.candidates[-1], "measured") for p in problems}

    monkeypatch.setattr(measure, "measure", answer)
    return asked


def test_the_record_then_the_cache_then_the_gpu(measured):
    names = ("attention_pool", "patch_gather", "sample_views", "color_views")
    problems = [replace(POOL, op=op, candidates=("triton", "reference", "absorbed")) for op in names]
    keep(problems[0], "triton")
    keep(problems[1], "triton")
    # a name that is gone is measured anew
    recorded = {"attention_pool": "reference", "sample_views": "gone"}
    found = measure.choose(problems, World(CPU), lambda: recorded)
    assert {n: c.implementation for n, c in found.items()} == {
        "attention_pool": "reference",
        "patch_gather": "triton",
        "sample_views": "absorbed",
        "color_views": "absorbed",
    }
    assert measured == [["sample_views", "color_views"]]
    # one that is alone needs no measuring
    alone = replace(POOL, dtype="bf16", candidates=("triton",))
    assert measure.choose([alone], World(CPU)) == {} and len(measured) == 1


def test_unlike_gpus_take_the_rule(measured, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "extrema_fast.ops.measure")
    monkeypatch.setattr(World, "all_gather", lambda self, value: ["A", "B"])
    assert measure.choose([POOL], World(CPU, 0, 2)) == {} and not measured
    assert "unlike GPUs (A, B)" in caplog.text


def test_two_processes_choose_alike(monkeypatch):
    barrier, told, asked = threading.Barrier(2, timeout=60), {}, []

    class Thread(World):
        """A process of two, as a thread."""

        def all_gather(self, value):
            told[self.rank] = value
            barrier.wait()
            values = [told[0], told[1]]
            barrier.wait()
            return values

        def broadcast(self, value):
            return self.all_gather(value)[0]

    def answer(problems, device):
        asked.append(problems)
        return {p.name: Choice("absorbed", "on rank 0", {"triton": "x"}) for p in problems}

    monkeypatch.setattr(measure, "measure", answer)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: measure.choose([POOL], Thread(CPU, rank, 2)), (0, 1)))
    assert found[0] == found[1] == {POOL.name: Choice("absorbed", "on rank 0", {"triton": "x"})}
    assert asked == [[POOL]]


def problems(**options) -> list[Problem]:
    return ops.problems(CPU, SIZES, "fp32", compiled=False, **options)


def test_what_there_is_to_choose():
    assert [p.name for p in problems()] == [
        "attention student",
        "attention teacher",
        *filter(measure.has_cases, ops.GPU_RULE),
    ]
    assert not {"color_views", "adamw_ema"} & {p.op for p in problems(unused={"color_views", "adamw_ema"})}
    for p in problems():
        assert p.default == p.candidates[0] and not {"math", "xformers"} & set(p.candidates)
    # what takes long to compile comes last
    compiled = [p.compiled for p in ops.problems(CPU, SIZES, "fp32", compiled=True)]
    assert compiled == sorted(compiled) and any(compiled) and not all(compiled)
    # what is asked for by name is not measured
    assert "attention student" not in {p.name for p in problems(attention=("sdpa", "auto"))}
    ops.set_backend("attention_pool=absorbed,patch_gather=fixed")
    assert not {"attention_pool", "patch_gather"} & {p.op for p in problems()}
    ops.set_backend("fixed")
    assert problems() == []


def test_choices_are_used(monkeypatch):
    taken = {"attention student": "matmul", "attention teacher": "reference", "attention_pool": "absorbed"}
    ops.use(problems(), {name: Choice(impl, "measured") for name, impl in taken.items()})
    assert ops.choice("attention_pool", "cpu") == ("absorbed", "measured")
    assert ops.choice("sample_views", "cpu") == ("triton", "the fixed rule for a GPU")
    assert ops.check_attention("auto", CPU, torch.float32, 5, 16, True) == "matmul"
    assert ops.check_attention("auto", CPU, torch.float32, 6, 16, True) == "sdpa"
    assert ops.check_attention("auto", CPU, torch.float32, 16, 16, False) == "reference"
    # what was wrong is not used, here or by the rule
    outs = {"triton": "wrong", "short": "wrong"}
    ops.use(problems(), {n: Choice("", "", outs) for n in ("sample_views", "attention student")})
    assert ops.choice("sample_views", "cpu") == ("reference", "the fixed rule for a GPU; not triton: wrong")
    assert attention.unsupported("short", CPU, torch.float32, 5, 16, True) == "wrong"
    assert not attention.unsupported("short", CPU, torch.float32, 5, 16, False)
    # by name it is an error
    with pytest.raises(UsageError, match="asks for short, but wrong"):
        ops.check_attention("short", CPU, torch.float32, 5, 16, True)
    ops.set_backend("attention_pool=reference")
    assert ops.choice("attention_pool", "cpu")[0] == "reference"
    ops.set_backend("fixed")
    ops.use(problems(), {"attention_pool": Choice("absorbed", "measured")})
    assert ops.choice("attention_pool", "cpu")[0] == "triton"


def test_a_library_call_uses_what_the_cache_agrees_on():
    assert ops.choice("attention_pool", "cpu")[0] == "triton"
    keep()
    ops.set_backend("auto")
    assert ops.choice("attention_pool", "cpu") == ("absorbed", "measured here before")
    keep(replace(POOL, dtype="bf16"), "triton")
    ops.set_backend("auto")
    assert ops.choice("attention_pool", "cpu")[0] == "triton"
    student = replace(POOL, op="attention", label="student", candidates=("matmul", "reference"))
    keep(student, "matmul")
    assert ops.check_attention("auto", CPU, torch.float32, 5, 16, True) == "matmul"
    keep(replace(student, sizes=replace(SIZES, images=9)), "reference")
    ops.set_backend("auto")
    assert ops.check_attention("auto", CPU, torch.float32, 5, 16, True) == "sdpa"


def test_a_run_measures_and_its_continuation_takes_the_same(measured, monkeypatch, tmp_path):
    cfg = tiny(tmp_path / "run", {"train": {"epochs": 1}})
    pretrain(cfg, progress=False)
    record = json.loads((tmp_path / "run" / "env.json").read_text())["resolved"]
    asked = ["attention student", "attention teacher", *filter(measure.has_cases, ops.GPU_RULE)]
    assert measured == [
        [name for name in asked if name != "color_views" or cfg.data.policy == "spatial+color"]
    ]
    assert record["ops"]["attention_pool"] == "absorbed" and record["attention"] == "matmul"

    def implementations(cfg, **options) -> dict:
        run = run_module.build(cfg, World(CPU), run_module.open_train(cfg), **options)
        return run.resolved.ops | {"attention": run.resolved.attention}

    # another best by now, which the cache knows of
    monkeypatch.setattr(measure, "measure", lambda problems, device: {})
    keep(name="triton")
    same = record["ops"] | {"attention": "matmul"}
    assert implementations(cfg, continued=True) == same
    # a new run, another setting, or another GPU have nothing to continue
    assert implementations(cfg) != same
    other = replace(cfg, system=replace(cfg.system, backend="attention_pool=triton"))
    assert implementations(other, continued=True)["attention_pool"] == "triton"
    monkeypatch.setattr(run_module, "_gpu", lambda device: "another")
    assert implementations(cfg, continued=True) != same


def test_a_deterministic_run_takes_the_rule():
    keep()
    torch.use_deterministic_algorithms(True)
    try:
        assert problems() == [] and ops.choice("attention_pool", "cpu")[0] == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_with_another_choice():
    plan = ((64, "short"), (attention.ANY, "sdpa"))
    for n, name, words in (
        (39, "short", "short to 64 tokens, then sdpa"),
        (39, "flash", "short to 38 tokens, then flash to 39 tokens, then short to 64 tokens, then sdpa"),
        (64, "flash", "short to 63 tokens, then flash to 64 tokens, then sdpa"),
        (65, "flash", "short to 64 tokens, then flash to 65 tokens, then sdpa"),
        (1, "flash", "flash to 1 tokens, then short to 64 tokens, then sdpa"),
    ):
        changed = attention.with_choice(plan, n, name)
        assert attention.in_words(changed) == words
        assert [attention.at(changed, i) for i in (n - 1, n, n + 1) if i] == [
            name if i == n else attention.at(plan, i) for i in (n - 1, n, n + 1) if i
        ]
