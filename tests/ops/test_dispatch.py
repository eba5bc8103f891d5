"""The switch between implementations.

Covers: what `auto` takes; the configuration's and the environment's setting and which wins; one name for all ops;
lists; the log line, once; every error; that the public functions run what was chosen; the rule for a GPU; kernels that
fail there.
"""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from extrema_fast.kernels import _launch, can_run
from extrema_fast.kernels._launch import KernelError
from extrema_fast.kernels._spec import Sizes

from extrema_fast.errors import UsageError
from extrema_fast.ops import dispatch as ops


def names() -> dict[str, str]:
    return {op: c["implementation"] for op, c in ops.choices().items()}


def test_auto_takes_something_for_every_op_and_says_why():
    assert set(ops.choices()) == set(ops.IMPLEMENTATIONS) >= {"attention", "attention_pool", "patch_gather"}
    for op, choice in ops.choices().items():
        assert choice["implementation"] in ops.IMPLEMENTATIONS[op] and choice["reason"]


def test_settings():
    usual = names()
    ops.set_backend("reference")
    # every op of the model can be run by its plain definition
    assert {op for op, name in names().items() if name != "reference"} == {"lamb"}
    ops.set_backend("absorbed")
    assert names() == usual | {"attention_pool": "absorbed"}, "ops that lack it keep their own"
    ops.set_backend("attention=reference, attention_pool=reference")
    assert names() == usual | {"attention": "reference", "attention_pool": "reference"}
    ops.set_backend("attention_pool=auto")
    assert names() == usual
    ops.set_backend("fixed")
    assert names() == usual, "on a CPU there is nothing else"
    ops.set_backend("reference")
    with pytest.raises(UsageError):
        ops.set_backend("nonsense")
    assert names()["attention_pool"] == "reference", "an error changes nothing"


def test_the_environment_wins(monkeypatch):
    for env, op, wanted in (
        (None, "attention_pool", ("absorbed", "asked for by the configuration")),
        ("attention_pool=reference", "attention_pool", ("reference", "asked for by EXTREMA_FAST_BACKEND")),
        ("", "attention_pool", ("absorbed", "asked for by the configuration")),
        ("token_gather=reference", "token_gather", ("reference", "asked for by EXTREMA_FAST_BACKEND")),
    ):
        ops.set_backend("attention_pool=absorbed")
        if env is not None:
            monkeypatch.setenv("EXTREMA_FAST_BACKEND", env)
        assert ops.choice(op) == wanted


def test_each_choice_is_logged_once(caplog):
    caplog.set_level(logging.DEBUG, "extrema_fast.ops.dispatch")
    ops.set_backend("attention_pool=reference")
    weight = torch.nn.Parameter(torch.zeros(3))
    for _ in range(3):
        ops.adamw([{"params": [weight]}], {}, lr=0.1)
        ops.choices()
    lines = [r.getMessage() for r in caplog.records]
    # of the optimizers only the one that was built; attention is logged with its plans
    assert sorted(line.split()[1].rstrip(":") for line in lines) == sorted(
        ops.IMPLEMENTATIONS.keys() - {"attention", "lamb"}
    )
    assert "op attention_pool: reference (asked for by the configuration)" in lines


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("referense", "'referense'; did you mean 'reference'"),
        ("attention=triton9000", "attention has no 'triton9000'"),
        ("attentoin=sdpa", "unknown op 'attentoin'; did you mean 'attention'"),
        ("reference,sdpa", "unknown op 'reference'"),
    ],
)
def test_errors(setting, words, monkeypatch):
    with pytest.raises(UsageError, match=words):
        ops.set_backend(setting)
    monkeypatch.setenv("EXTREMA_FAST_BACKEND", setting)
    with pytest.raises(UsageError, match=words):
        ops.choice("attention")


def test_an_index_twice_in_a_view_gets_all_its_gradients(monkeypatch):
    """Where the kernel, which does not sum them, would be taken."""
    monkeypatch.setattr(ops, "_run", lambda *args: pytest.fail("the kernel has a gradient"))
    tokens, keep = torch.randn(1, 5, 3, requires_grad=True), torch.tensor([[[2, 2, 0]]])
    ops.token_gather(tokens, keep, torch.zeros(5, 3)).sum().backward()
    assert tokens.grad.sum(-1).tolist() == [[3, 0, 6, 0, 0]]
    with pytest.raises(pytest.fail.Exception), torch.no_grad():
        ops.token_gather(tokens, keep)


@pytest.mark.parametrize("setting", ["auto", "reference"])
def test_the_public_functions_run_what_was_chosen(setting, monkeypatch):
    ops.set_backend(setting)
    called = []
    for op, impls in ops.IMPLEMENTATIONS.items():
        for name in impls:
            monkeypatch.setitem(impls, name, lambda *a, op=op, name=name, **k: called.append((op, name)))
    x = torch.zeros(1)
    ops.attention(torch.zeros(1, 1, 3, 1, 8))
    ops.attention_pool(x, x, None, 1, 1e-6)
    ops.residual_norm(x)
    ops.patch_gather(x, None, x, None, x)
    ops.token_gather(x, x)
    ops.color_views(x)
    ops.color_params(x)
    ops.sample_views(x)
    ops.drop_path(x)
    ops.crop_resize(x, x, (1, 1))
    ops.adamw([{"params": [x]}], {})
    ops.lamb([{"params": [x]}], lr=0.1)
    # attention's `auto` is a plan, which ends at a backend
    chosen = names() | ({"attention": "sdpa"} if setting == "auto" else {})
    # `ops.trunk` reads the name of `mlp`
    assert called == [(op, chosen[op]) for op in ops.IMPLEMENTATIONS if op != "mlp"]


def test_triton_where_it_cannot_run_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRET", False)
    ops.set_backend("attention_pool=triton")
    assert ops.choice("attention")[0] == "auto"
    with pytest.raises(UsageError, match=r"attention_pool=triton, but .*; use `auto`, a CUDA device"):
        ops.choice("attention_pool", "cpu")
    ops.set_backend("attention=flash")
    with pytest.raises(UsageError, match=r"attention=flash, but it needs a CUDA .*: auto, sdpa, math"):
        ops.choices()


def test_the_rule_for_a_gpu(monkeypatch, tmp_path):
    for op, names in ops.GPU_RULE.items():
        assert ops.choice(op, "cuda")[0] == names[0] and names[-1] in ops.IMPLEMENTATIONS[op]
    assert ops.choice("token_gather", "cuda")[0] == "reference"
    assert ops.choice("crop_resize", "cuda")[0] == "triton"
    # where kernels cannot run, the next, and why
    monkeypatch.setattr(ops, "can_run", lambda device: (False, "no C compiler"))
    ops.set_backend("auto")
    for op, names in ops.GPU_RULE.items():
        name, why = ops.choice(op, "cuda")
        assert name == next(n for n in names if n not in ("triton", "split"))
        assert "not triton: no C compiler" in why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops.measure, "known", lambda *args: [])
    missing = []
    monkeypatch.setattr(ops, "compiler_missing", lambda device: "".join(missing))
    (tmp_path / "file").touch()
    for folder, lacking, wanted in (
        (tmp_path, "", "compiled"),
        (tmp_path / "file", "", "plain"),
        (tmp_path, "no C compiler", "plain"),
    ):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        missing[:] = lacking
        ops.set_backend("auto")
        name, why = ops.choice("color_views", "cuda")
        assert name == wanted and lacking in why
        assert ("TORCHINDUCTOR_CACHE_DIR" in why) == (folder != tmp_path)


def test_compiled_color_views_fall_back_once(monkeypatch, caplog):
    calls = []

    def fails(*args, **options):
        calls.append("compiled")
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    run = ops._compiled(torch.add, torch.mul)
    two, three = torch.tensor(2), torch.tensor(3)
    assert [int(run(two, three)) for _ in range(2)] == [6, 6] and calls == ["compiled"]
    (record,) = caplog.records
    assert "no compiler" in record.getMessage()


def test_no_memory_is_no_reason_to_fall_back(monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with pytest.raises(torch.OutOfMemoryError):
        ops._compiled(torch.add, torch.mul)(torch.tensor(2), torch.tensor(3))


# ---- kernels that fail on a GPU ----------------------------------------------------------------------

interpreted = pytest.mark.skipif(not can_run("cpu")[0], reason="kernels cannot run here")


SIZES = Sizes(8, 2, 3, 4, width=16, heads=2, depth=12, hidden=32, patch=4, height=8, width_px=8, chans=3)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The rule for a GPU on the CPU, whose kernels run in the interpreter."""
    monkeypatch.setattr(ops, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(ops, "_broken", {})
    monkeypatch.setattr(ops, "_measured", {})
    monkeypatch.setattr(ops, "_known", lambda op, kind: None)


def failing(*args, **options):
    raise KernelError("a_kernel cannot be compiled")


@pytest.mark.parametrize("reason", ["", "QuACK is not installed (pip install quack-kernels)"])
def test_an_optional_package_is_measured_where_it_runs_and_no_rule_takes_it(like_a_gpu, monkeypatch, reason):
    monkeypatch.setattr(ops.quack, "missing", lambda device: reason)
    (mlp,) = (p for p in ops.problems(torch.device("cpu"), SIZES, "bf16", compiled=True) if p.op == "mlp")
    assert mlp.default != "quack" and ("quack" in mlp.candidates) == (not reason)
    assert ops.choice("mlp")[0] == mlp.default
    ops.set_backend("mlp=quack")
    if reason:
        with pytest.raises(UsageError, match=r"mlp=quack, but QuACK is .*pip install .*; use `auto`$"):
            ops.choice("mlp")
    else:
        assert ops.choice("mlp")[0] == "quack"


@interpreted
def test_an_op_whose_kernel_fails_runs_the_next_implementation_and_says_so_once(
    like_a_gpu, monkeypatch, caplog
):
    monkeypatch.setitem(ops.IMPLEMENTATIONS["patch_gather"], "triton", failing)
    args = torch.rand(2, 3, 8, 8), None, torch.rand(16, 3, 4, 4), None, torch.rand(4, 16)
    wanted = ops.IMPLEMENTATIONS["patch_gather"]["reference"](*args)
    for _ in range(2):
        assert torch.equal(ops.patch_gather(*args), wanted)
    name, why = ops.choice("patch_gather")
    assert name == "reference" and "not triton: a_kernel" in why
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and "patch_gather: triton is left out: a_kernel" in said[0]
    ops.set_backend("patch_gather=triton")
    with pytest.raises(UsageError, match=r"patch_gather=triton, but a_kernel"):
        ops.patch_gather(*args)


@interpreted
def test_kernels_of_a_backward_pass_that_fail_are_found_before_a_run(like_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(ops, "GPU_RULE", {op: ops.GPU_RULE[op] for op in ("residual_norm", "mlp")})
    monkeypatch.setattr(importlib.import_module("extrema_fast.kernels.mlp.kernel"), "linear_dgelu", failing)
    ops.probe(torch.device("cpu"), SIZES, "fp32")
    assert names()["mlp"] == "split" and names()["residual_norm"] == "triton"
    assert "mlp: triton is left out: a_kernel" in caplog.text and "split runs in its place" in caplog.text
    ops.set_backend("triton")
    with pytest.raises(UsageError, match=r"mlp=triton, but a_kernel"):
        ops.probe(torch.device("cpu"), SIZES, "fp32")
