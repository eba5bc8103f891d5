"""Optional packages stay optional, kernels stand alone, and torch is enough for the encoder.

Covers: every import statement of extrema_fast/ and kernels/ (that rooms import earlier rooms only is import-linter's
contract, `make lint`); packages complete (`__init__.py`); `import extrema_fast` loads nothing heavy; no module bears a
public name; the encoder runs with all optional packages blocked; the checker notices violations.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import extrema_fast

# where an implementation of an op is chosen; keyed random numbers, defined once; the command `kernels`
KERNEL_USERS = {"ops", "rng", "data", "cli"}
CORE = {"torch", "numpy", "safetensors", "tomli"} | set(sys.stdlib_module_names)
HEAVY = {"torch", "numpy", "triton", "nvidia", "timm", "torchvision", "PIL", "rich", "matplotlib"}
HEAVY |= {
    "jinja2",
    "skimage",
    "scipy",
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "pyarrow",
    "transformers",
    "onnx",
    "xformers",
}


def imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, inside a function) of every import in a file of the package `module`."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = module.split(".")[: len(module.split(".")) - child.level] if child.level else []
                base = [*parents, *filter(None, [child.module])]
                yield from ((".".join([*base, alias.name]), lazy) for alias in child.names)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, lazy or inside)

    yield from walk(ast.parse(source), False)


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file; `module` is its dotted name in the installed package."""
    room = [*module.split("."), ""][1]
    found = []
    for name, lazy in imports(source, module):
        top, second = [*name.split("."), ""][:2]
        if top in ("kernels", "tests", "benchmarks"):
            found.append(f"{module}: {name} is not part of the package under that name")
        elif room == "kernels" and top == "extrema_fast" and second != "kernels":
            found.append(f"{module}: kernels import nothing of extrema_fast, and here is {name}")
        elif room not in KERNEL_USERS | {"kernels", ""} and f"{top}.{second}" == "extrema_fast.kernels":
            found.append(f"{module}: only {sorted(KERNEL_USERS)} may import kernels, and here is {name}")
        elif top not in CORE | {"extrema_fast"} and not lazy and (room, top) != ("kernels", "triton"):
            found.append(f"{module}: {name} is optional, so inside a function only")
    return found


def modules(repository: Path) -> list[tuple[Path, str]]:
    """(file, dotted name when installed, packages with their __init__) of every Python file of the package."""
    found = []
    for folder, base in (("extrema_fast", "extrema_fast"), ("kernels", "extrema_fast.kernels")):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            found.append((path, ".".join([base, *parts])))
    return found


def test_imports(repository):
    files = modules(repository)
    assert len(files) > 10
    found = [v for path, module in files for v in violations(path.read_text(encoding="utf-8"), module)]
    assert not found, "\n" + "\n".join(found)


def test_every_folder_is_a_package(repository):
    missing = {str(p.parent) for p, _ in modules(repository) if not (p.parent / "__init__.py").exists()}
    assert not missing, f"without __init__.py a wheel leaves these out: {sorted(missing)}"


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("from .kernels.patch_gather import x", "extrema_fast.train", "may import kernels"),
        ("from ...config import Config", "extrema_fast.kernels.patch_gather.op", "nothing of extrema_fast"),
        ("import timm", "extrema_fast.kernels.tune", "inside a function"),
        ("import kernels", "extrema_fast.ops.dispatch", "under that name"),
        ("try:\n    import triton\nexcept ImportError:\n    pass", "extrema_fast.ops.x", "inside a function"),
        (
            "from .loader import x\nfrom ..errors import y\ndef f():\n    import PIL",
            "extrema_fast.data.x",
            "",
        ),
    ],
)
def test_checker(source, module, words):
    found = violations(source, module)
    assert len(found) == bool(words) and all(words in f for f in found), found


BLOCK = """
import sys
# as if they were not installed, also for importlib.util.find_spec
sys.modules.update(dict.fromkeys({packages!r}))
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
