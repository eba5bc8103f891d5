"""Builds the null GPU: an environment with the CUDA build of torch, and a libcuda.so.1 for it.

python tests/nullgpu/build.py .venv-nullgpu [--torch 2.13.0]

Runs on the standard library alone. Needs gcc and nm, and about 5 GB for the environment; repeated, it is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE = HERE / "nullgpu.c"
# 3.12 first: where pip prefers wheels without CUDA, those are usually for the system's Python
PYTHONS = ("python3.12", "python3.13", "python3.11")
PACKAGES = ("pytest", "pytest-timeout")

# ---- the environment ------------------------------------------------------------------------------


def find_python() -> str:
    """Returns a Python 3.11 to 3.13 that can create environments; NULLGPU_PYTHON names one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [os.environ.get("NULLGPU_PYTHON", ""), *PYTHONS]
    found[2:2] = [str(p) for p in sorted(pyenv.glob("3.12*/bin/python3.12"))]
    for python in filter(None, found):
        # a version manager's command can be on the path without the version
        if (
            shutil.which(python)
            and not subprocess.run([python, "-c", "import venv"], capture_output=True).returncode
        ):
            return python
    sys.exit(
        "Python 3.12 was not found; install it (Debian: apt-get install python3.12-venv) or set NULLGPU_PYTHON"
    )


def site_of(venv: Path) -> Path:
    """Returns the folder that holds the environment's torch; of the environment, where torch is missing."""
    # not from the environment's own name: its packages may lie elsewhere
    code = "import site; from importlib.util import find_spec; s = find_spec('torch');"
    code += "print(s.origin if s else site.getsitepackages()[0])"
    done = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    return found.parents[1] if found.suffix else found


def versions(venv: Path) -> tuple[str, str]:
    """Returns the versions of the environment's torch and of its CUDA; empty where it is missing or has none."""
    file = site_of(venv) / "torch/version.py"
    text = file.read_text() if file.exists() else ""
    torch, cuda = ("".join(re.findall(rf"^{n}\b.*= '([^'+]+)", text, re.M)) for n in ("__version__", "cuda"))
    return torch, cuda


def install(venv: Path, torch: str) -> None:
    """Creates the environment, where it is missing, with that version of torch and this project, editable."""
    python = venv / "bin/python"
    if not python.exists():
        subprocess.run([find_python(), "-m", "venv", venv], check=True)
    if versions(venv)[0] == torch and versions(venv)[1]:
        return
    print(f"installing torch {torch} with CUDA into {venv} (5 GB, minutes)", flush=True)
    # the versions this project is tested with; those that follow from torch's only for its own version
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    if f"torch=={torch}" not in pins:
        pins = [f"torch=={torch}", *(p for p in pins if not p.startswith(("torch", "triton")))]
    constraints = venv / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    words: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        constraints,
        f"torch=={torch}",
        *PACKAGES,
    ]
    words += ["-e", f"{ROOT}[train]"]
    subprocess.run(words, check=True)
    if not versions(venv)[1]:
        sys.exit(
            f"pip gave a torch without CUDA for {python}; remove {venv} and name another Python: NULLGPU_PYTHON=..."
        )


# ---- the library ----------------------------------------------------------------------------------

LIBRARIES = (
    "torch_cuda",
    "c10_cuda",
    "torch_python",
    "torch_cpu",
    "torch_cuda_linalg",
    "torch_nvshmem",
    "caffe2_nvrtc",
)
NAMES = re.compile(r"(__)?cuda[A-Z]|cu[A-Z]|cublas|cudnn|cusparse|cusolver|cufft|nccl[A-Z]")
LAUNCHES = re.compile(
    r"[Gg]emm|Matmul$|[Gg]emv|dot|axpy|[Tt]rsm|geqrf|getrf|nccl(All|Reduce|Bcast|Broadcast|Send|Recv)"
)
# functions whose result is more than "success", by name or pattern
ANSWERS = {
    "cublasGetStatusString": 'const char *f(int status) { return "cuBLAS"; }',
    "cublasGetVersion_v2": "int f(void *handle, int *version) { *version = 130100; return 0; }",
    "cublasLtGetVersion": "unsigned long f(void) { return 130100; }",
    # one algorithm, which needs no workspace
    "cublasLtMatmulAlgoGetHeuristic": "int f(void *handle, void *operation, void *a, void *b, void *c, void *d, "
    "void *preference, int wanted, void *results, int *found) { *found = 1; memset(results, 0, 96); return 0; }",
    "cudnnBackendCreateDescriptor": "int f(int type, void **made) { *made = calloc(1, 256); return 0; }",
    "cudnnGetCudartVersion": "unsigned long f(void) { return 13000; }",
    "cudnnGetErrorString": 'const char *f(int status) { return "cuDNN"; }',
    "cudnnGetVersion": "unsigned long f(void) { return 90000; }",
    # eigenvalues of symmetric matrices need no workspace
    r"cusolverDn[SD]syevj?d?(Batched)?_bufferSize": "int f(void *handle, int vectors, int upper, int n, "
    "void *a, int lda, void *w, int *bytes) { *bytes = 0; return 0; }",
    r"cusolverDnXsyev(d|Batched)_bufferSize": "int f(void *handle, void *options, int vectors, int upper, "
    "long n, int type, void *a, long lda, int type_w, void *w, int compute, size_t *device, size_t *host) "
    "{ *device = *host = 0; return 0; }",
    "cusparseGetErrorName": 'const char *f(int status) { return "cuSPARSE"; }',
    "cusparseGetErrorString": 'const char *f(int status) { return "cuSPARSE"; }',
    # as if every process had the same, which is what data parallelism checks at its start
    "ncclAllGather": "int f(const char *from, char *to, size_t count, int type, int *ranks, void *stream) { "
    'static struct kernel k = {"ncclAllGather"}; static const char sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; '
    "size_t bytes = count * sizes[type]; null_library_launch(&k); "
    "for (int i = 0; i < *ranks && bytes < 1 << 20; i++) memmove(to + i * bytes, from, bytes); return 0; }",
    "ncclCommGetAsyncError": "int f(void *communicator, int *error) { *error = 0; return 0; }",
    "ncclCommInitRankConfig": "int f(int **made, int ranks) { *made = calloc(1, 4096); **made = ranks; return 0; }",
    "ncclGetErrorString": 'const char *f(int status) { return "NCCL"; }',
    "ncclGetLastError": 'const char *f(void *communicator) { return ""; }',
    "ncclGetVersion": "int f(int *version) { *version = 22800; return 0; }",
}
HEAD = """// Written by build.py: what torch's libraries import of CUDA's and nullgpu.c does not define.
#include <stdlib.h>
#include <string.h>
struct kernel { const char *name; int registers, local_bytes; long launches; int listed; struct kernel *next; };
void null_library_launch(struct kernel *);
#define API __attribute__((visibility("default")))
"""


def imported(library: Path) -> set[str]:
    """Returns the names of CUDA's functions that a shared library takes from others."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = (line.split()[-1].split("@")[0] for line in done.stdout.splitlines())
    return {n for n in names if NAMES.match(n)}


def stub(name: str) -> str:
    """Returns the C definition of one function: it answers, launches, makes a handle or only succeeds."""
    answer = ANSWERS.get(name) or next((a for n, a in ANSWERS.items() if re.fullmatch(n, name)), None)
    if answer:
        return "API " + re.sub(r"\bf\(", f"{name}(", answer, count=1)
    if LAUNCHES.search(name) and "Create" not in name:
        body = f'static struct kernel k = {{"{name}"}}; null_library_launch(&k); return 0;'
        return f"API int {name}(void) {{ {body} }}"
    if "Create" in name and not name.startswith("ncclComm"):
        return f"API int {name}(void **made) {{ if (made) *made = calloc(1, 256); return 0; }}"
    return f"API int {name}(void) {{ return 0; }}"


def compile_library(venv: Path) -> Path:
    """Compiles VENV/nullgpu/libcuda.so.1 for the environment's torch; returns its path."""
    site = site_of(venv)
    folder = venv / "nullgpu"
    folder.mkdir(exist_ok=True)
    library, stubs = folder / "libcuda.so.1", folder / "stubs.c"
    text = SOURCE.read_text()
    defined = set(re.findall(r"^API [\w\s*]*?(\w+)\(", text, re.M))
    paths = [site / f"torch/lib/lib{name}.so" for name in LIBRARIES]
    names = set().union(*(imported(p) for p in paths if p.exists())) - defined
    written = HEAD + "\n".join(stub(n) for n in sorted(names)) + "\n"
    newest = max(SOURCE.stat().st_mtime, Path(__file__).stat().st_mtime)
    if (
        library.exists()
        and stubs.exists()
        and stubs.read_text() == written
        and library.stat().st_mtime > newest
    ):
        return library
    stubs.write_text(written)
    # the runtime's headers come with torch's libraries, the driver's with Triton, next to an older runtime's
    runtime = next((site / "nvidia").rglob("cuda_runtime_api.h")).parent
    include = [f"-I{runtime}", f"-I{site / 'triton/backends/nvidia/include'}"]
    flags = [
        "-O2",
        "-g",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wno-unused-parameter",
        "-Wno-builtin-declaration-mismatch",
    ]
    subprocess.run(["gcc", *flags, *include, "-o", library, SOURCE, stubs, "-ldl", "-lpthread"], check=True)
    return library


def main() -> None:
    """Builds what is missing or older than its sources."""
    p = argparse.ArgumentParser(prog="build.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "venv", type=Path, help="the environment's folder; one that has torch with CUDA is used as it is"
    )
    p.add_argument(
        "--torch", default="2.13.0", metavar="VERSION", help="version of torch (default: %(default)s)"
    )
    args = p.parse_args()
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} was not found; install it (Debian: apt-get install gcc binutils)")
    install(args.venv.absolute(), args.torch)
    library = compile_library(args.venv.absolute())
    print(f"null GPU: {library}, torch {' for CUDA '.join(versions(args.venv))}")


if __name__ == "__main__":
    main()
