"""What every op has: files, registration with a fake, documentation, cases, variants, tests.

Covers: the registry against the folders; public names exported and documented; schemas registered; README sections and
examples; every kernel in a compiled variant; forbidden constructs, masked loads, 64-bit program numbers; the quick
cases, ours against the plain definition through the interpreter; the listing; tuning with an injected timer; the order
of launch settings; tuning without a GPU.
"""

from __future__ import annotations

import ast
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from extrema_fast.kernels import _launch, tune
from extrema_fast.kernels._spec import OPS, Case, Spec, spec

from extrema_fast import kernels


@pytest.mark.plain
def test_the_registry_lists_every_folder_and_the_package_every_public_name(repository):
    assert {p.parent.name for p in (repository / "kernels").glob("*/reference.py")} == set(OPS)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    assert {"attention_pool", "patch_gather", "token_gather", "short_attention"} <= set(kernels.__all__)


@pytest.mark.plain
@pytest.mark.parametrize("op", OPS)
def test_files_names_and_registration(op, repository):
    s, folder = spec(op), repository / "kernels" / op
    assert s.name == op and s.version >= 1 and s.summary
    for file in ("__init__.py", "reference.py", "kernel.py", "op.py", "spec.py", "README.md"):
        assert (folder / file).is_file(), file
    assert (repository / "tests/kernels" / f"test_{op}.py").is_file()
    package = importlib.import_module(f"extrema_fast.kernels.{op}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in s.public:
        assert name in package.__all__ and name in text, name
        assert getattr(package, name).__doc__, name
    for words in ("## When not to use it", "```python", "yte", "GPU"):
        assert words in text, words
    for name in (f"extrema_fast::{op}" for op in s.torch_ops):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.plain
@pytest.mark.parametrize("op", OPS)
def test_the_readme_example_runs(op, repository, plain):
    text = (repository / "kernels" / op / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, object] = {}
    exec(compile(code, f"kernels/{op}/README.md", "exec"), names)
    assert any(name in names for name in spec(op).public)


@pytest.mark.plain
@pytest.mark.parametrize("op", OPS)
def test_source_rules(op, repository):
    source = (repository / "kernels" / op / "kernel.py").read_text(encoding="utf-8")
    for word in ("autotune", "make_block_ptr", "atomic_", "triton.heuristics"):
        assert word not in source, word
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in calls:
        given = {k.arg for k in node.keywords}
        # a masked load without `other` is undefined on a GPU and zero in the interpreter
        if ast.unparse(node.func) == "tl.load":
            assert "mask" not in given or "other" in given, ast.unparse(node)
        if ast.unparse(node.func) == "tl.dot":
            assert "input_precision" in given, ast.unparse(node)
    # the first axis counts rows, whose offsets pass 2^31
    first = [n for n in calls if ast.unparse(n) == "tl.program_id(0)"]
    widened = [n for n in calls if ast.unparse(n) == "tl.program_id(0).to(tl.int64)"]
    assert len(first) == len(widened)


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_compiled_ahead_of_time(op):
    variants = spec(op).variants()
    names = [v.name for v in variants]
    assert len(set(names)) == len(names) >= 2
    module = importlib.import_module(f"extrema_fast.kernels.{op}.kernel")
    launched = {k for k in vars(module) if k.endswith("_kernel")}
    assert launched == {v.launch.kernel.fn.__name__ for v in variants}


@pytest.mark.parametrize("op", OPS)
def test_quick_cases_agree_with_the_definition(op):
    s = spec(op)
    for case in s.cases(True):
        args = case.make("cpu", torch.float32, torch.Generator().manual_seed(0))
        assert {"ours", "reference"} <= set(case.providers) and case.bytes_fwd > 0
        correct, worst = tune.is_correct(case, args, torch.float32)
        assert correct, f"{case.label}: {worst:.1f} times the limit"
    labels = [c.label for c in s.cases(False)]
    assert len(set(labels)) == len(labels) >= 1


# ---- commands -------------------------------------------------------------------------------------


@pytest.mark.plain
def test_listing(monkeypatch):
    assert [r["op"] for r in tune.describe("cpu")] == list(OPS)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    assert not tune.describe("cpu")[0]["runs"] and "do not run on cpu" in tune.headline("cpu")


def fake_spec() -> Spec:
    """An op whose result is wrong under one setting, that spills under another, and whose time is its setting."""

    def ours(x):
        key = _launch.config_key("fwd", x.dtype, D=8)
        b = _launch.settings("fake", key, x.device, {"B": 1})["B"]
        # what a launch of a compiled kernel returns
        compiled = SimpleNamespace(n_spills=8 if b == 2 else 0)
        _launch.launch({(1,): lambda *args, **options: compiled}, (1,), x)
        return x * 2 if b != 3 else x * 2.5

    providers = {"ours": ours, "reference": lambda x: x * 2}
    case = Case("only", lambda d, t, g: (torch.ones(8, dtype=t),), providers, 1, backward=False)
    space = lambda direction, sizes: [{"B": b} for b in (3, 9, 4, 2, sizes["D"] - 1)]  # noqa: E731
    return Spec("fake", 1, "", (), (), lambda: [], lambda quick: [case], space)


def test_tuning_takes_the_fastest_settings_that_are_correct_and_do_not_spill(tmp_path):
    timed = []

    def timer(call):
        timed.append(_launch.settings("fake", "fwd|fp32|D8", torch.device("cpu"), {})["B"])
        return [float(timed[-1])]

    entries = tune.tune(fake_spec(), torch.float32, "cpu", timer)
    assert timed == [9, 4, 7] and entries["fwd|fp32|D8"]["config"] == {"B": 4}
    file = tune.write(fake_spec(), entries, "some-gpu", tmp_path)
    tune.write(fake_spec(), {"other": {"config": {}}}, "some-gpu", tmp_path)
    content = json.loads(file.read_text())
    assert set(content["entries"]) == {"fwd|fp32|D8", "other"} and content["triton"]
    assert _launch._entries("fake", "some-gpu", str(tmp_path))["fwd|fp32|D8"]["config"] == {"B": 4}
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"some-gpu\.json: no file of launch settings .* delete it"):
        _launch.read_entries(file)


def test_settings_are_overridden_in_order(monkeypatch, tmp_path):
    gpu, default = torch.device("cuda"), {"A": 1, "B": 2, "C": 3}
    monkeypatch.setattr(_launch, "device_name", lambda device: "some-gpu")
    assert _launch.settings("x", "k", gpu, default) == default
    tune.write(
        Spec("x", 1, "", (), (), list, list), {"k": {"config": {"B": 4, "C": 4}}}, "some-gpu", tmp_path
    )
    monkeypatch.setenv("EXTREMA_FAST_CONFIG_DIR", str(tmp_path))
    with (
        _launch.forced("x", {"C": 5}),
        _launch.forced("x", {"A": 9}, "other key"),
        _launch.forced("y", {"A": 9}),
    ):
        assert _launch.settings("x", "k", gpu, default) == {"A": 1, "B": 4, "C": 5}
    assert _launch.settings("x", "k", gpu, default) == {"A": 1, "B": 4, "C": 4}
    assert _launch.settings("x", "k", torch.device("cpu"), default) == default


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err
    assert tune.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "attention_pool -> " in out and "B n39" in out and "adamw_ema: nothing to tune" in out
