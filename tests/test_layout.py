"""Imports point one way, optional packages stay optional, and torch alone is enough for the encoder.

Covers: every import statement of extrema_fast/ and kernels/ against the rooms below; optional packages only
inside functions; packages complete (`__init__.py`); `import extrema_fast` loads nothing heavy; no public name
is hidden by a module; the encoder runs with all optional packages blocked; the checker notices violations.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import extrema_fast

# a room imports earlier rooms only; within a room imports are free
ROOMS = [
    ["errors"],
    ["rng", "files", "distributed"],
    ["config"],
    ["ops"],
    ["data"],
    ["models"],
    ["timm"],
    ["weights"],
    ["evaluation"],
    ["training"],
    ["train"],
    ["reporting", "tools"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, row in enumerate(ROOMS) for name in row}
# where an implementation of an op is chosen; keyed random numbers, defined once; the command `kernels`
KERNEL_USERS = {"ops", "rng", "data", "cli"}
CORE = {"torch", "numpy", "safetensors", "tomli"}
HEAVY = {"torch", "numpy", "triton", "nvidia", "timm", "torchvision", "PIL", "tyro", "rich", "matplotlib"}
HEAVY |= {"jinja2", "skimage", "scipy", "tensorboard", "pyarrow", "transformers", "onnx", "xformers"}


def imports(source: str, package: str) -> Iterator[tuple[str, int, bool]]:
    """(absolute dotted name, line, inside a function) of every import; `from a import b` counts as a.b."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parent = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parent, *filter(None, [base])])
                yield from ((f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, lazy or inside)

    yield from walk(ast.parse(source), False)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one file; `module` is its dotted name in the installed package."""
    package = module if is_package else module.rpartition(".")[0]
    room = module.split(".")[1] if "." in module else ""
    found = []
    for name, line, lazy in imports(source, package):
        parts = name.split(".")
        where = f"{module}:{line} imports {name}"
        if parts[0] == "extrema_fast":
            target = parts[1] if len(parts) > 1 else ""
            if room == "kernels":
                if target != "kernels":
                    found.append(f"{where}: kernels import nothing of extrema_fast")
            elif target == "kernels":
                if room not in KERNEL_USERS:
                    found.append(f"{where}: only {', '.join(sorted(KERNEL_USERS))} may import kernels")
            elif room and target in RANK and target != room and RANK[target] >= RANK[room]:
                found.append(f"{where}: not of an earlier room")
        elif parts[0] in ("kernels", "tests", "benchmarks"):
            found.append(f"{where}: not part of the package under that name")
        elif parts[0] not in CORE | set(sys.stdlib_module_names):
            if not lazy and not (room == "kernels" and parts[0] == "triton"):
                found.append(f"{where}: optional, so inside a function only")
    if room not in RANK and room not in ("", "kernels"):
        found.append(f"{module} is in no room")
    return found


def modules(repository: Path) -> list[tuple[Path, str]]:
    """(file, dotted name when installed) of every Python file of the package."""
    found = []
    for folder, base in (("extrema_fast", "extrema_fast"), ("kernels", "extrema_fast.kernels")):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            found.append((path, ".".join([base, *parts]).removesuffix(".__init__")))
    return found


def test_imports_point_one_way(repository):
    files = modules(repository)
    assert len(files) > 10
    found = []
    for path, module in files:
        found += violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


def test_every_folder_is_a_package(repository):
    missing = {str(p.parent) for p, _ in modules(repository) if not (p.parent / "__init__.py").exists()}
    assert not missing, f"without __init__.py a wheel leaves these out: {sorted(missing)}"


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("from .. import train", "extrema_fast.models.encoder", "not of an earlier room"),
        ("from ..models.encoder import Encoder", "extrema_fast.data.loader", "not of an earlier room"),
        ("def f():\n    from ..train import pretrain", "extrema_fast.data.loader", "not of an earlier room"),
        ("import extrema_fast.train", "extrema_fast.models.masking", "not of an earlier room"),
        ("import json", "extrema_fast.helpers", "is in no room"),
        ("from .kernels.patch_gather import x", "extrema_fast.train", "may import kernels"),
        ("from ...config import Config", "extrema_fast.kernels.patch_gather.op", "nothing of extrema_fast"),
        ("import timm", "extrema_fast.kernels.tune", "inside a function"),
        ("import kernels", "extrema_fast.ops.dispatch", "under that name"),
        ("try:\n    import triton\nexcept ImportError:\n    pass", "extrema_fast.ops.x", "inside a function"),
        ("from PIL import Image", "extrema_fast.data.loader", "inside a function"),
    ],
)
def test_checker_notices(source, module, words):
    found = violations(source, module)
    assert len(found) == 1 and words in found[0], found


def test_checker_accepts():
    source = "from .loader import x\nfrom ..errors import y\ndef f():\n    from PIL import Image"
    assert violations(source, "extrema_fast.data.prefetch") == []


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
    assert not loaded & HEAVY


def test_no_module_bears_a_public_name(repository):
    assert {p.stem for p in (repository / "extrema_fast").iterdir()} & set(extrema_fast.__all__) == set()
    for name in extrema_fast.__all__:
        assert callable(getattr(extrema_fast, name)), name


def test_encoder_needs_torch_alone():
    code = BLOCK.format(packages=sorted(HEAVY - {"torch", "numpy"})) + (
        "import torch, extrema_fast\n"
        "encoder = extrema_fast.create_encoder('extrema_vit_tiny_patch16_224').eval()\n"
        "images = torch.zeros(2, 3, 224, 224)\n"
        "keep = torch.arange(19).repeat(2, 5, 1)\n"
        "with torch.no_grad():\n"
        "    out, views = encoder.encode(images), encoder.encode(images, keep)\n"
        "print(tuple(out.cls.shape), tuple(out.patches.shape), tuple(views.patches.shape))\n"
    )
    assert run_python(code).strip() == "(2, 192) (2, 196, 192) (2, 5, 19, 192)"
