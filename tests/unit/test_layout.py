"""Imports point one way, optional packages stay optional, and torch alone is enough for the encoder.

Covers: every import statement of extrema_fast/ and kernels/ against the layers below; optional packages
only inside functions; no module without a place in the table, and in the package's own map; packages
complete (`__init__.py`); `import extrema_fast` loads nothing heavy; the encoder runs with all optional
packages blocked; the checker itself notices each kind of violation.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# a module imports modules of earlier rows only; a new module gets its place here
LAYERS = [
    ["errors", "atomic", "foreign"],
    [
        "config",
        "rng",
        "collapse",
        "svg",
        "report_style",
        "dist",
        "metrics",
        "lamb",
        "fp8",
        "graph",
        "jpeg_scan",
        "linear",
        "memory",
        "model_card",
        "positions",
        "resample",
        "safe_files",
        "trace",
    ],
    [
        "nvidia_apex",
        "products",
        "image_source",
        "image_check",
        "manifest_text",
        "progress",
        "timm_methods",
        "weights",
    ],
    ["attention", "check_pool", "dino", "new_folder"],
    ["ops", "losses", "heads", "photos", "probes", "run_folder", "manifest"],
    ["masking", "augment", "blocks", "accelerate_blocks", "folders", "mixture", "tar_index"],
    ["data_files", "data_order"],
    ["data_recover"],
    ["preprocess", "recorder", "drop_path", "embeddings", "contact_sheet", "shards", "pack_shard"],
    ["encoder", "sources", "accelerate", "pack_folder", "pack_image"],
    ["method", "data_decode", "index_rows", "timm", "architecture"],
    ["data", "index", "optim", "released"],
    ["data_feed", "features", "plan", "checkpoint", "run", "convert", "embed_parts"],
    ["step", "export_timm"],
    ["state", "export_graph"],
    ["evals", "pictures", "export"],
    ["report", "train", "embed"],
    ["dry_run", "profile", "search", "pack"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

# outside a function, only here; inside functions anywhere
OPTIONAL = {
    "triton",
    "xformers",
    "nvidia",
    "timm",
    "torchvision",
    "PIL",
    "skimage",
    "scipy",
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
    "apex",
    "amp_C",
    "pyarrow",
    "torchao",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
}
CORE = {"torch", "numpy", "safetensors", "tomli"}
KERNEL_PACKAGES = {"torch", "numpy", "triton"}
# where an implementation of an op is chosen; the keyed random numbers, defined once; the commands on kernels
KERNEL_USERS = {"ops", "attention", "rng", "augment", "cli"}


class Import(NamedTuple):
    """One imported module: absolute dotted name, line, and whether it stands inside a function."""

    name: str
    line: int
    lazy: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a file in `package` (dotted); `from a import b` counts as a.b."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parent = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parent, *filter(None, [base])])
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, lazy)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, lazy or inside)

    yield from walk(ast.parse(source), False)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one file; `module` is its dotted name in the installed package."""
    package = module if is_package else module.rpartition(".")[0]
    in_kernels = module.startswith("extrema_fast.kernels")
    own = module.split(".")[1] if "." in module else ""
    found = []
    for name, line, lazy in imports(source, package):
        parts = name.split(".")
        where = f"{module}:{line} imports {name}"
        if parts[0] == "extrema_fast":
            target = parts[1] if len(parts) > 1 else ""
            if in_kernels:
                if target != "kernels":
                    found.append(f"{where}: kernels use nothing of extrema_fast")
            elif target == "kernels":
                if own not in KERNEL_USERS:
                    found.append(f"{where}: only {', '.join(sorted(KERNEL_USERS))} may use kernels")
            elif own and target not in RANK:
                # a public name of the package, e.g. __version__
                if target != "__version__":
                    found.append(f"{where}: {target!r} has no place in LAYERS")
            elif own and own in RANK and RANK[target] >= RANK[own]:
                found.append(f"{where}: not of an earlier layer")
        elif parts[0] in ("kernels", "tests", "benchmarks"):
            found.append(f"{where}: not part of the package under that name")
        elif in_kernels:
            # a benchmark's baseline may be optional, inside a function
            allowed = KERNEL_PACKAGES | set(sys.stdlib_module_names) | ({"xformers"} if lazy else set())
            if parts[0] not in allowed:
                found.append(f"{where}: kernels use torch and triton only")
        elif parts[0] in OPTIONAL:
            if not lazy:
                found.append(f"{where}: optional, so inside a function only")
        elif parts[0] not in CORE | set(sys.stdlib_module_names) and not lazy:
            found.append(f"{where}: neither core nor standard library")
    if not in_kernels and own and own not in RANK:
        found.append(f"{module} has no place in LAYERS")
    return found


def modules(repository: Path) -> list[tuple[Path, str]]:
    """(file, dotted name when installed) of every Python file of the package."""
    found = []
    for folder, base in (("extrema_fast", "extrema_fast"), ("kernels", "extrema_fast.kernels")):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found.append((path, ".".join([base, *parts])))
    return found


def test_imports_point_one_way(repository):
    files = modules(repository)
    assert len(files) > 10
    found = []
    for path, module in files:
        found += violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


def test_every_module_has_its_place_in_the_map(repository):
    named = re.findall(
        r"`(\w+\.py)`", (repository / "extrema_fast/README.md").read_text().partition("| --- |")[2]
    )
    there = {p.name for p in (repository / "extrema_fast").glob("*.py") if not p.name.startswith("__")}
    assert sorted(named) == sorted(there)


def test_every_folder_is_a_package(repository):
    missing = {str(p.parent) for p, _ in modules(repository) if not (p.parent / "__init__.py").exists()}
    assert not missing, f"without __init__.py a wheel leaves these out: {sorted(missing)}"


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("from . import train", "extrema_fast.encoder", "not of an earlier layer"),
        ("from .method import ExtreMA", "extrema_fast.encoder", "not of an earlier layer"),
        ("def f():\n    from .train import pretrain", "extrema_fast.data", "not of an earlier layer"),
        ("import extrema_fast.train", "extrema_fast.masking", "not of an earlier layer"),
        ("from .helpers import x", "extrema_fast.train", "no place in LAYERS"),
        ("import json", "extrema_fast.helpers", "no place in LAYERS"),
        ("from .kernels.patch_gather import x", "extrema_fast.train", "may use kernels"),
        ("from ...config import Config", "extrema_fast.kernels.patch_gather.op", "nothing of extrema_fast"),
        (
            "def f():\n    import extrema_fast",
            "extrema_fast.kernels.patch_gather.op",
            "nothing of extrema_fast",
        ),
        ("import timm", "extrema_fast.kernels.tune", "torch and triton only"),
        ("import kernels", "extrema_fast.ops", "under that name"),
        ("from benchmarks import run", "extrema_fast.ops", "under that name"),
        ("try:\n    import triton\nexcept ImportError:\n    pass", "extrema_fast.ops", "inside a function"),
        ("from PIL import Image", "extrema_fast.data", "inside a function"),
        ("import pandas", "extrema_fast.data", "neither core nor standard"),
    ],
)
def test_checker_notices(source, module, words):
    found = violations(source, module)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from . import data\nfrom .errors import UsageError", "extrema_fast.train"),
        ("def f():\n    from PIL import Image\n    import tyro", "extrema_fast.data"),
        ("from .kernels.patch_gather import patch_gather_reference", "extrema_fast.ops"),
        ("import torch\nimport triton\nfrom .reference import x", "extrema_fast.kernels.patch_gather.op"),
        ("from .. import _launch", "extrema_fast.kernels.patch_gather.op"),
    ],
)
def test_checker_accepts(source, module):
    assert violations(source, module) == []


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ImportError(f"{{name}} is blocked in this test")
sys.meta_path.insert(0, Blocked())
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    code = "import sys, extrema_fast; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = set(run_python(code).split())
    assert "extrema_fast" in loaded
    assert not loaded & (OPTIONAL | {"torch"})


def test_public_names_are_not_replaced_by_modules():
    code = (
        "import importlib, types, extrema_fast\n"
        "for name, home in extrema_fast._HOME.items():\n"
        "    first = getattr(extrema_fast, name)\n"
        "    module = importlib.import_module(f'extrema_fast.{home}')\n"
        "    assert getattr(extrema_fast, name) is first is getattr(module, name), name\n"
        "    assert not isinstance(first, types.ModuleType), name\n"
    )
    run_python(code)


def test_encoder_needs_torch_alone():
    blocked = sorted(OPTIONAL)
    code = BLOCK.format(packages=blocked) + (
        "import torch, extrema_fast\n"
        "encoder = extrema_fast.create_encoder('extrema_vit_tiny_patch16_224').eval()\n"
        "images = torch.zeros(2, 3, 224, 224)\n"
        "keep = torch.arange(19).repeat(2, 5, 1)\n"
        "with torch.no_grad():\n"
        "    out, views = encoder.encode(images), encoder.encode(images, keep)\n"
        "print(tuple(out.cls.shape), tuple(out.patches.shape), tuple(views.patches.shape))\n"
    )
    assert run_python(code).strip() == "(2, 192) (2, 196, 192) (2, 5, 19, 192)"


def test_blocking_blocks():
    code = BLOCK.format(packages=["json"]) + "import json.decoder"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "json is blocked" in done.stderr
