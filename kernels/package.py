"""Builds these kernels as a repository for Hugging Face's Kernel Hub, on this machine; nothing is uploaded.

    python -m extrema_fast.kernels.package FOLDER

    FOLDER/build/torch-cuda/      this folder's ops and their READMEs; metadata.json with a digest of every file
    FOLDER/build/torch-cpu/       the same, which runs plain PyTorch there
    FOLDER/benchmarks/            for `kernels benchmark`
    FOLDER/README.md              the card

Requirements: https://huggingface.co/docs/kernels/kernel-requirements. The name of a build's module and of its namespace
in `torch.ops` holds a hash of the sources, so that several versions can be loaded by one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from ._spec import OPS, spec

HERE = Path(__file__).resolve().parent
NAME = "extrema-kernels"
# 0 is the Hub's number of what has not been proven yet: nobody else has run these kernels
VERSION = 0
# Triton compiles for whatever GPU it finds, from this compute capability on
BACKENDS: dict[str, dict[str, Any]] = {"cuda": {"archs": ["8.0+PTX"]}, "cpu": {}}
# commands of this repository
LEFT_OUT = ("aot.py", "tune.py", "package.py")

# the Hub's kernels import nothing but torch and Triton
WITHOUT_QUACK = '''"""QuACK's matmuls are no part of this build."""

from __future__ import annotations

import torch


def missing(device: torch.device) -> str:
    """Why it cannot be used on a device."""
    return "QuACK is no part of this build"
'''

COMPATIBLE = '''"""The same names, for versions of `kernels` that look for a folder of the repository's name."""

import importlib.util
import sys
from pathlib import Path

_name = "{id}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).resolve().parent.parent / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = sys.modules[_name].__all__
globals().update({{name: getattr(sys.modules[_name], name) for name in __all__}})
'''

BENCHMARK = '''"""Every op at its measured shapes, forward and backward, next to its plain PyTorch definition.

On a GPU sizes of ViT-S and ViT-B in bf16; on a CPU, where plain PyTorch runs in any case, small ones in fp32.
"""

import importlib

import torch
from kernels.benchmark import Benchmark

# op -> cases on a GPU, on a CPU
CASES = {cases}
ON_GPU = torch.cuda.is_available()


class _Case(Benchmark):
    seed = 0

    def start(self, op, label):
        spec = importlib.import_module(self.kernel.__name__ + "._spec").spec(op)
        self.case = next(case for case in spec.cases(not ON_GPU) if case.label == label)
        dtype = torch.bfloat16 if ON_GPU and torch.bfloat16 in spec.dtypes else torch.float32
        self.args = self.case.make(self.device, dtype, torch.Generator(self.device).manual_seed(0))

    def run(self, provider):
        with torch.set_grad_enabled(self.case.backward):
            out = self.case.providers[provider](*self.args)
        outs = out if isinstance(out, tuple) else (out,)
        leaves = [x for x in self.args if isinstance(x, torch.Tensor) and x.requires_grad]
        if self.case.backward and leaves:
            torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)
        return outs[-1].detach()

    def compare(self):
        # the runner allows 0.01: here of the largest value
        wanted = self.run("reference").float()
        largest = wanted.abs().max().clamp_min(1e-30)
        self.out = self.result.float() / largest
        return wanted / largest


def _methods(op, label, name):
    def setup(self):
        self.start(op, label)

    def benchmark(self):
        self.result = self.run("ours")

    def verify(self):
        return self.compare()

    return {{"setup_" + name: setup, "benchmark_" + name: benchmark, "verify_" + name: verify}}


for _op, _labels in CASES.items():
    _members = {{}}
    for _name, _label in _labels[0 if ON_GPU else 1].items():
        _members.update(_methods(_op, _label, _name))
    globals()[_op] = type(_op, (_Case,), dict(_members, __module__=__name__))
# the runner takes every class of this file that is a Benchmark
del _Case
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# {name}

Triton kernels of masked training with few kept patches (ExtreMA, arXiv 2206.04667), each next to its plain PyTorch
definition, which runs where Triton cannot. They need a GPU of compute capability 8.0 or newer. `kernels benchmark`
times them on yours, next to these definitions.

```python
from kernels import get_kernel

module = get_kernel("ORGANIZATION/{name}", version={version}, trust_remote_code=True)
out = module.short_attention(qkv)
```

| function | |
| --- | --- |
{functions}

Arguments, results and errors are in their docstrings.
"""


def build(target: Path, source: Path = HERE) -> list[Path]:
    """Writes the repository.

    Args:
        target: a folder that is absent or empty.
        source: the kernels' folder; another one is another version.

    Returns:
        The folders of the variants, one per backend.

    Raises:
        FileExistsError: there is something in the folder.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target}: not empty; name another folder")
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.suffix in (".py", ".md") and path.name not in LEFT_OUT
    }
    files["mlp/quack.py"] = WITHOUT_QUACK.encode()
    content = hashlib.sha256(json.dumps({k: v.decode() for k, v in files.items()}).encode()).hexdigest()[:10]
    module = NAME.replace("-", "_")
    variants = []
    for backend, supported in BACKENDS.items():
        name = f"_{module}_{backend}_{content}"
        written = files | {
            "_ops.py": f'"""The namespace of this build\'s ops."""\n\nNAMESPACE = "{name}"\n'.encode(),
            f"{module}/__init__.py": COMPATIBLE.format(id=name).encode(),
        }
        metadata = {
            "name": NAME,
            "id": name,
            "version": VERSION,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend, **supported},
            "digest": {"algorithm": "sha256", "files": {k: _digest(v) for k, v in sorted(written.items())}},
        }
        variants.append(target / "build" / f"torch-{backend}")
        written["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        for path, text in written.items():
            file = variants[-1] / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
    _write_texts(target)
    return variants


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _write_texts(target: Path) -> None:
    # a step of an optimizer changes what it is compared with
    measured = [s for s in map(spec, OPS) if not any(case.stateful for case in s.cases(True))]
    cases = {
        s.name: [
            {re.sub(r"\W+", "_", case.label): case.label for case in s.cases(quick)}
            for quick in (False, True)
        ]
        for s in measured
    }
    (target / "benchmarks").mkdir()
    text = BENCHMARK.format(cases=json.dumps(cases, indent=4))
    (target / "benchmarks" / "benchmark.py").write_text(text, encoding="utf-8")
    functions = "\n".join(f"| `{name}` | {s.summary} |" for s in map(spec, OPS) for name in s.public)
    card = CARD.format(name=NAME, version=VERSION, functions=functions)
    (target / "README.md").write_text(card, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 2 when the folder is not empty."""
    parser = argparse.ArgumentParser(
        prog="python -m extrema_fast.kernels.package", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where to write; absent or empty")
    try:
        variants = build(parser.parse_args(argv).folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    for variant in variants:
        print(f"{variant}: {json.loads((variant / 'metadata.json').read_text(encoding='utf-8'))['id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
