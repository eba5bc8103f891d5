"""The repository of the kernels for Hugging Face's Kernel Hub, built into a temporary folder.

Covers: layout, metadata and digests; what its files import, and that Python 3.9 reads them; two versions in one
process, each with a namespace; the folder for older versions of `kernels`; the benchmark script;
`kernels.get_local_kernel` where that package is installed; a folder that is not empty.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from extrema_fast.kernels import package
from extrema_fast.kernels._spec import OPS, spec

from extrema_fast import kernels
from tests.kernels._compare import normal


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder, its variants: CUDA, CPU)."""
    folder = tmp_path_factory.mktemp("hub") / "extrema-kernels"
    return folder, package.build(folder)


def metadata(variant):
    return json.loads((variant / "metadata.json").read_text(encoding="utf-8"))


def load(variant, name=None, file="__init__.py"):
    """As `kernels` imports a variant."""
    name = name or metadata(variant)["id"]
    found = importlib.util.spec_from_file_location(name, variant / file)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.plain
def test_layout_and_metadata(hub):
    folder, variants = hub
    assert [v.relative_to(folder).as_posix() for v in variants] == ["build/torch-cuda", "build/torch-cpu"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: kernels" in card and all(f"`{n}`" in card for op in OPS for n in spec(op).public)
    for variant, backend in zip(variants, ("cuda", "cpu"), strict=True):
        found = metadata(variant)
        assert found["id"].isidentifier() and found["id"].startswith(f"_extrema_kernels_{backend}_")
        assert found["name"] == "extrema-kernels" and found["license"] == "apache-2.0"
        assert found["backend"] == {"type": backend} | ({"archs": ["8.0+PTX"]} if backend == "cuda" else {})
        files = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*") if p.is_file()}
        del files["metadata.json"]
        digests = {
            k: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for k, p in files.items()
        }
        assert found["digest"] == {"algorithm": "sha256", "files": digests}
        assert {f"{op}/kernel.py" for op in OPS} < set(files) and not {"aot.py", "tune.py"} & set(files)


@pytest.mark.plain
def test_files_import_torch_triton_and_each_other_and_are_python_3_9(hub):
    _, variants = hub
    for file in sorted(variants[0].rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, feature_version=(3, 9))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{file}: {name}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":
                assert not node.keywords, f"{file}: {ast.unparse(node)}"
        # unions outside of annotations are computed
        values = [n.value for n in tree.body if isinstance(n, ast.Assign)]
        unions = [n for v in values for n in ast.walk(v) if isinstance(n, ast.BinOp)]
        for node in unions:
            sides = [ast.unparse(x) for x in (node.left, node.right)]
            typed = isinstance(node.op, ast.BitOr) and any("[" in s or s == "None" for s in sides)
            assert not typed, f"{file}: {ast.unparse(node)}"


def test_two_versions_in_one_process(hub, repository, tmp_path):
    _, (_, variant) = hub
    changed = shutil.copytree(
        repository / "kernels", tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (changed / "_philox.py").open("a", encoding="utf-8") as file:
        file.write("\n# another version\n")
    modules = [load(variant), load(package.build(tmp_path / "other", changed)[1])]
    assert modules[0].__name__ != modules[1].__name__
    qkv = normal(2, 19, 3, 2, 16, dtype=torch.float32)
    for module in modules:
        assert sorted(module.__all__) == sorted(kernels.__all__)
        registered = getattr(torch.ops, module.__name__).short_attention_fwd
        out = module.short_attention(qkv)
        assert torch.equal(out, registered(qkv))
        torch.testing.assert_close(out, kernels.short_attention(qkv), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
        assert gradient.any()
    # one folder under the name that older clients look for: the same module
    again = load(variant, "any_other_name", "extrema_kernels/__init__.py")
    assert again.short_attention is modules[0].short_attention and again.__all__ == modules[0].__all__


def test_the_benchmark_script(hub, monkeypatch):
    folder, (_, variant) = hub
    stub = ModuleType("kernels.benchmark")
    stub.Benchmark = type("Benchmark", (), {"seed": None, "device": "cpu"})
    monkeypatch.setitem(sys.modules, "kernels.benchmark", stub)
    script = load(folder, "benchmark_module", "benchmarks/benchmark.py")
    classes = {k: v for k, v in vars(script).items() if isinstance(v, type) and issubclass(v, stub.Benchmark)}
    del classes["Benchmark"]
    assert set(classes) == set(OPS) - {"adamw_ema"}
    assert all(c.__module__ == "benchmark_module" for c in classes.values())
    kernel = sys.modules.get(metadata(variant)["id"]) or load(variant)
    for op, workload in (
        ("short_attention", "n7"),
        ("sample_views", "drop_path_3"),
        ("residual_norm", "3x7"),
    ):
        assert hasattr(classes[op], f"verify_{workload}")
        run = classes[op]()
        run.kernel = kernel
        getattr(run, f"setup_{workload}")()
        getattr(run, f"benchmark_{workload}")()
        assert torch.allclose(getattr(run, f"verify_{workload}")(), run.out, atol=1e-2)
        run.result = run.result + 1
        assert not torch.allclose(getattr(run, f"verify_{workload}")(), run.out, atol=1e-2)


def test_the_client_loads_it(hub, tmp_path):
    folder, (_, variant) = hub
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels (pip install kernels)")
    program = (
        "import pathlib, sys, kernels, torch\n"
        "module = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))\n"
        "qkv = torch.randn(2, 7, 3, 2, 16)\n"
        "ops = getattr(torch.ops, module.__name__)\n"
        "assert torch.equal(module.short_attention(qkv), ops.short_attention_fwd(qkv))\n"
        "print(module.__name__)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == metadata(variant)["id"], done.stderr


@pytest.mark.plain
def test_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert package.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: not empty" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
