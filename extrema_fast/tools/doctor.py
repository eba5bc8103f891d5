"""Checks what is installed, what works on this machine, and how to fix what does not.

A check is a function in this file that returns a `Finding`. Everything that imports third-party libraries runs in a
child process (`main`), which may hang or crash without affecting the other checks.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import platform
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ExtremaError, StorageError, UsageError, cannot_import, install, one_line

# of a check in a child; a compiler, or a library on a network disk, takes its time
LIMIT_S = 90.0
# what a small run may need, and what is too little for comfort
FREE_BYTES, FREE_FILES = 2 << 30, 2000
SHARED_BYTES, OPEN_FILES = 256 << 20, 1024


class Finding(NamedTuple):
    """What a check has found."""

    name: str
    state: Literal["ok", "missing", "warning", "error"]
    """`missing`: optional and not installed; `warning`: something does not work, runs can start all the same;
    `error`: they cannot"""
    text: str
    fix: str = ""
    """what to do, in a line; empty where nothing needs to be done"""
    exit_code: int = 0
    """of an error"""


def doctor(out: str | Path = "runs", names: Sequence[str] | None = None) -> Iterator[Finding]:
    """Looks at this machine, check by check.

    Args:
        out: Folder that runs will be written to.
        names: Of the checks; None: all.

    Yields:
        What each check has found, as soon as it has.
    """
    wanted = [*HERE, *(name for group in CHILDREN for name in group)] if names is None else names
    for name in HERE:
        if name in wanted:
            yield _guarded(name, lambda name=name: HERE[name](Path(out)))  # type: ignore[misc]
    for group in CHILDREN:
        for finding in _in_children([name for name in group if name in wanted]):
            yield finding
            if finding.name == "torch" and finding.state == "error":
                # everything that follows needs it
                return


def problem(findings: Sequence[Finding]) -> ExtremaError | None:
    """The error to end with; None when a run can start."""
    wrong = [f for f in findings if f.state == "error"]
    if not wrong:
        return None
    error: ExtremaError = (StorageError if wrong[0].exit_code == StorageError.exit_code else UsageError)(
        "no run can start here: " + "; ".join(f"{f.name}: {f.text}{'; ' * bool(f.fix)}{f.fix}" for f in wrong)
    )
    error.exit_code = wrong[0].exit_code or UsageError.exit_code
    return error


def describe(finding: Finding) -> str:
    """A finding as one line, and one for the fix."""
    line = f"{finding.state:<8} {finding.name}: {finding.text}"
    return f"{line}\n{'':<8} -> {finding.fix}" if finding.fix else line


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Whatever a check raises is a finding."""
    try:
        return check()
    except ExtremaError as error:
        return _failed(name, one_line(error, 500), error.exit_code)
    except Exception as error:
        return _failed(name, f"{type(error).__name__}: {one_line(error, 300)}")


# what helps when a check fails in a way that it does not know
FIXES = {
    "torch": "install PyTorch again: pytorch.org, 'Get started'",
    "device": "--system.device cpu, or another GPU: --system.device cuda:N",
    "pillow": "pip install --force-reinstall pillow",
    "decoding": "--data.loader pil",
    "compiler": "--train.compile none",
    "torchvision": "install it again with torch, from one index; no run needs it",
    "timm": "pip install --force-reinstall --no-deps timm; no run needs it",
    "xformers": "pip uninstall xformers; no run needs it",
    "kernels": "install torch and triton again, from one index; without kernels plain PyTorch runs, slower",
}
# without these no run starts
NEEDED = ("torch", "pillow", "self-test")


def _failed(name: str, text: str, exit_code: int = UsageError.exit_code) -> Finding:
    if name in NEEDED:
        return Finding(name, "error", text, FIXES.get(name, ""), exit_code)
    return Finding(name, "warning", text, FIXES.get(name, ""))


# ---- checks in this process: nothing of theirs can hang ----------------------------------------------


def _machine(out: Path) -> Finding:
    # without torch, as `distributed.cores` needs it
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    text = (
        f"Python {platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}, "
        f"{count} cores{_memory()}"
    )
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding(
            "machine", "warning", text, "tested with Python 3.10 to 3.13: make PYTHON=python3.12 install"
        )
    limit = _cpu_limit()
    if limit and limit < count:
        most = max(1, int(limit))
        fix = f"--system.threads {most} --data.threads {most}"
        return Finding("machine", "warning", f"{text}; this container may use {limit:g} cores", fix)
    return Finding("machine", "ok", text)


def _memory() -> str:
    """`, 16 GB memory, 12 GB free`; empty where the system does not say."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, free = known["MemTotal"], known["MemAvailable"]
        with suppress(OSError, ValueError):
            total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
            free = min(free, total - int(Path("/sys/fs/cgroup/memory.current").read_text()))
        return f", {total / 1e9:.1f} GB memory, {max(0, free) / 1e9:.1f} GB free"
    return ""


def _cpu_limit() -> float:
    """Cores that a container may use; 0: no limit."""
    with suppress(OSError, ValueError):
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(most) / int(period)
    return 0.0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# extras for the work on this project, and those with a check of their own
_OTHERS = {"dev", "tools", "bench", "docs", "race", "dali-cuda12", "dali-cuda13", "xformers"}


def _packages(out: Path) -> Finding:
    """Versions of what this package requires, and of its extras."""
    found, missing = {}, {}
    for line in metadata.requires("extrema-fast") or []:
        name, extra = re.split(r"[^\w.-]", line, maxsplit=1)[0], re.search(r"extra == .([\w-]+)", line)
        if ("platform_system" in line and platform.system() != "Linux") or (extra and extra[1] in _OTHERS):
            continue
        if version := _version(name):
            found[name] = version
        elif not ("python_version" in line and name == "tomli"):
            missing[name] = extra[1] if extra else ""
    text = f"extrema-fast {_version('extrema-fast')} in {Path(__file__).parent.parent}; "
    text += ", ".join(f"{name} {version}" for name, version in found.items())
    if missing:
        rest = (f"{name} ({extra})" if extra else name for name, extra in missing.items())
        text += f"; not installed: {', '.join(rest)}"
    if needed := {"", "train"} & set(missing.values()):
        fix = install("train") if "train" in needed else "install this package again, see the README"
        return Finding("packages", "warning", text, fix)
    return Finding("packages", "ok", text)


def _names(out: Path) -> Finding:
    """Packages whose names others have taken; nothing of them is imported."""
    kernels = importlib.util.find_spec("kernels")
    if kernels is not None and _version("kernels"):
        folder = Path(kernels.origin or "").parent
        if (folder / "patch_gather").is_dir():
            text = f"`import kernels` finds {folder}, not the installed package, which transformers imports"
            return Finding("names", "warning", text, "start elsewhere than in the top folder of the checkout")
    apex = importlib.util.find_spec("apex")
    folders = [] if apex is None else list(apex.submodule_search_locations or [])
    if apex is not None and not any((Path(f) / "optimizers").is_dir() for f in folders):
        text = f"apex in {', '.join(folders)} is not NVIDIA's and is not used"
        fix = "pip uninstall apex; NVIDIA's is built from source, github.com/NVIDIA/apex"
        return Finding("names", "warning", text, fix)
    return Finding("names", "ok", "`kernels` and `apex` find no package of another project")


def _space(path: Path) -> tuple[str, bool]:
    """What is free where `path` is or will be, and whether that is enough; OSError where nothing can be written."""
    path = path.absolute()
    while not path.is_dir():
        # a file, or a link to nothing
        if os.path.lexists(path):
            raise NotADirectoryError(errno.ENOTDIR, f"{path} is not a folder")
        path = path.parent
    with tempfile.TemporaryFile(dir=path):
        pass
    about = os.statvfs(path)
    free = about.f_bavail * about.f_frsize
    # some file systems count no inodes
    few = bool(about.f_files) and about.f_favail < FREE_FILES
    text = f"{free / 1e9:.1f} GB" + (f" and {about.f_favail} files" if few else "")
    return f"{text} free", free >= FREE_BYTES and not few


def _runs(out: Path) -> Finding:
    try:
        text, enough = _space(out)
    except OSError as error:
        text = f"{out}: cannot be written ({error.strerror})"
        return Finding("runs", "error", text, "give a folder of yours: --out FOLDER", StorageError.exit_code)
    if enough:
        return Finding("runs", "ok", f"{out}: {text}")
    return Finding("runs", "warning", f"{out}: only {text}", "make room, or write elsewhere: --out FOLDER")


def _caches(out: Path) -> Finding:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # torch.compile's is in the folder for temporary files
    folders = {
        "XDG_CACHE_HOME": home / "extrema_fast",
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"),
        "TMPDIR": Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()),
    }
    texts = []
    for variable, folder in folders.items():
        fix = f"set {variable} to a folder of yours"
        try:
            text, enough = _space(folder)
        except OSError as error:
            return Finding("caches", "warning", f"{folder}: cannot be written ({error.strerror})", fix)
        if not enough:
            return Finding("caches", "warning", f"{folder}: only {text}", f"make room, or {fix}")
        texts.append(f"{folder}: {text}")
    return Finding("caches", "ok", ", ".join(texts))


def _limits(out: Path) -> Finding:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = "any number of" if files == resource.RLIM_INFINITY else files
    text, fix, shared = f"{count} open files", "", Path("/dev/shm")
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        fix = f"ulimit -n {OPEN_FILES}"
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        text += f", {size / 1e9:.2f} GB of shared memory"
        if size < SHARED_BYTES:
            fix = "several GPUs exchange gradients through shared memory: docker run --shm-size 8g"
    return Finding("limits", "warning" if fix else "ok", text, fix)


def _driver() -> str:
    """Version of NVIDIA's driver; empty without one."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\d+\.\d+(\.\d+)?", text):
            return found[0]
    return ""


# ---- checks in a child ------------------------------------------------------------------------------


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU"
    hip = getattr(torch.version, "hip", None)
    text = (
        f"{torch.__version__}, built for {f'ROCm {hip}' if hip else build}; {torch.get_num_threads()} threads"
    )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return _failed("torch", f"{text}; 2.10 or newer is needed")
    return Finding("torch", "ok", text)


def _device() -> Finding:
    import torch

    from ..distributed import pick_device

    driver = _driver()
    if not torch.cuda.is_available():
        if not driver:
            return Finding("device", "ok", f"runs use {pick_device('auto')}; no NVIDIA driver")
        text = f"driver {driver}, but this PyTorch sees no GPU"
        if torch.version.cuda is None:
            return Finding(
                "device", "warning", text, "install PyTorch's build for CUDA: pytorch.org, 'Get started'"
            )
        try:
            torch.cuda.init()
        except Exception as error:
            text += f" ({one_line(error)})"
        return Finding(
            "device", "warning", text, f"a driver for CUDA {torch.version.cuda}, or PyTorch for an older CUDA"
        )
    gpus, fixes = [], []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        gpus.append(
            f"{gpu.name} ({gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB, {free / 1e9:.0f} GB free)"
        )
        if free < 0.5 * gpu.total_memory:
            fixes.append(
                f"GPU {i} is in use by others: nvidia-smi shows by whom; --system.device cuda:N takes another"
            )
    text = f"{'; '.join(gpus)}; driver {driver or 'unknown'}"
    ones = torch.ones(3, 3, device="cuda")
    if float((ones @ ones).sum()) != 27:
        return _failed("device", f"{text}; a matmul gives wrong values")
    return Finding("device", "warning" if fixes else "ok", text, "; ".join(fixes[:1]))


def _kernels() -> Finding:
    """One Triton kernel, on a GPU or in Triton's interpreter, next to its definition."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from ..ops import dispatch as ops

    if reason := ops.unsupported("token_gather", "triton", kind):
        fix = (
            ""
            if kind == "cpu"
            else "without them plain PyTorch runs, slower; the reason says what is missing"
        )
        return Finding("kernels", "missing" if kind == "cpu" else "warning", reason, fix)
    tokens, pos = torch.randn(2, 19, 64, device=kind), torch.randn(19, 64, device=kind)
    keep = torch.rand(3, 2, 19, device=kind).argsort(-1)[..., :5].int().contiguous()
    found, wanted = (
        ops.IMPLEMENTATIONS["token_gather"][name](tokens, keep, pos) for name in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    where = "on the GPU" if kind == "cuda" else "in Triton's interpreter; on a CPU runs use plain PyTorch"
    return Finding("kernels", "ok", f"Triton {_version('triton')}: a kernel gives the right values {where}")


def _compiler() -> Finding:
    """torch.compile of a small function."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or ""
    needs = "by default on a GPU" if kind == "cuda" else "only with --train.compile"
    if not compiler and kind == "cpu":
        return Finding("compiler", "missing", f"no C++ compiler; runs compile {needs}", "")
    x = torch.linspace(0, 1, 64, device=kind)
    y = torch.compile(lambda x: torch.sin(x) + 1)(x)
    torch.testing.assert_close(y, torch.sin(x) + 1)
    return Finding("compiler", "ok", f"torch.compile works ({compiler or 'Triton'}); runs compile {needs}")


def _optional(name: str, module: str, extra: str, use: Callable[[Any], str]) -> Finding:
    """An optional package that is imported and used; `use` returns why it cannot be used here, or nothing."""
    version = _version(name)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(name, "missing", "not installed", install(extra))
    try:
        reason = use(importlib.import_module(module))
    except Exception as error:
        text, _, fix = cannot_import(name, error, extra).rpartition("; ")
        return Finding(name, "warning", f"{version}: {text}", fix)
    return Finding(name, "ok", f"{version}{f': not used here: {reason}' if reason else ''}")


def _torchvision() -> Finding:
    def use(torchvision: Any) -> str:
        import torch

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
        return ""

    return _optional("torchvision", "torchvision", "timm", use)


def _timm() -> Finding:
    return _optional("timm", "timm", "timm", lambda timm: "")


def _xformers() -> Finding:
    def use(xformers: Any) -> str:
        import torch

        from ..ops import dispatch as ops

        return ops.unsupported("attention", "xformers", "cuda" if torch.cuda.is_available() else "cpu")

    return _optional("xformers", "xformers.ops", "xformers", use)


def _pillow() -> Finding:
    found = _optional("pillow", "PIL.features", "train", lambda features: "")
    if found.state != "ok":
        return _failed("pillow", found.text)
    from PIL import Image, features

    Image.init()
    can = {
        "JPEG": "jpg",
        "PNG": "zlib",
        "JPEG 2000": "jpg_2000",
        "WebP": "webp",
        "TIFF": "libtiff",
        "AVIF": "avif",
    }
    have = [name for name, feature in can.items() if feature in features.get_supported()]
    have += [name for name in ("GIF", "BMP") if name in Image.OPEN]
    without = [name for name in can if name not in have]
    text = f"{found.text} reads {', '.join(have)}{'; not ' * bool(without)}{', '.join(without)}"
    if not {"JPEG", "PNG"} <= set(have):
        fix = "pip install --force-reinstall pillow (its wheels have the libraries)"
        return Finding("pillow", "warning", text, fix)
    return Finding("pillow", "ok", text)


def _decoding() -> Finding:
    """Our own loader on a JPEG file, by Pillow and by DALI."""
    import numpy as np
    from PIL import Image

    from ..config import DataConfig
    from ..data.loader import EvalLoader, choose_loader
    from ..data.sources import open_source

    if choose_loader("auto") == "pil":
        version = next(filter(None, map(_version, ("nvidia-dali-cuda130", "nvidia-dali-cuda120"))), "")
        try:
            importlib.import_module("nvidia.dali.fn")
        except Exception as error:
            text = f"DALI {version or 'is not installed'}{f' cannot be loaded ({one_line(error)})' * bool(version)}"
        fix = f"{install('dali-cuda13')}, or for a driver of CUDA 12: {install('dali-cuda12')}"
        return Finding("decoding", "warning" if version else "missing", f"Pillow decodes; {text}", fix)
    with tempfile.TemporaryDirectory() as folder:
        y, x = np.mgrid[0:48, 0:64]
        gradient = np.stack([4 * x, 5 * y, 2 * (x + y)], 2).clip(0, 255).astype(np.uint8)
        Image.fromarray(gradient).save(Path(folder) / "a.jpg", quality=95)
        source = open_source(folder, "train")
        images = []
        for loader in ("pil", "dali"):
            config = DataConfig(train=folder, loader=loader, threads=1)
            ((image, _),) = EvalLoader(source, config, (32, 32), device="cpu")
            images.append(np.asarray(image.cpu()).astype(float))
    difference = float(np.abs(images[0] - images[1]).mean())
    if difference > 2:
        text = f"DALI and Pillow differ by {difference:.1f} gray levels on a JPEG file"
        return Finding("decoding", "warning", text, "--data.loader pil")
    version = next(filter(None, map(_version, ("nvidia-dali-cuda130", "nvidia-dali-cuda120"))), "")
    return Finding("decoding", "ok", f"DALI {version} decodes a JPEG file as Pillow does")


def _self_test() -> Finding:
    """A run of four steps that is saved after two and continued: both ends must be equal."""
    import torch

    from ..config import from_dict, preset
    from ..files import read_log
    from ..train import pretrain
    from ..training.checkpoint import newest, step_folders

    changes = {
        "train": {"epochs": 1, "compile": "none"},
        "ckpt": {"every_steps": 2},
        "eval": {"every_epochs": 0},
        "system": {"backend": "fixed"},
        "log": {"report": False},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        cfg = from_dict({**changes, "out": str(run)}, preset("smoke"))
        ends = []
        for _ in range(2):
            pretrain(cfg, progress=False)
            last = newest(run)
            assert last is not None and last.step == 4
            ends.append(last.tensors())
            # as if it had been killed after the checkpoint of step 2
            shutil.rmtree(step_folders(run / "checkpoints")[4])
            (run / "status.json").unlink()
        records = read_log(run / "log.jsonl")
        again = [r["step"] for r in records if r["kind"] == "train" and r.get("attempt") == 2]
    if again != [3, 4]:
        text = f"the run was not continued after step 2, but took steps {again}"
        return _failed("self-test", text)
    different = [name for name, t in ends[0].items() if not torch.equal(t, ends[1][name])]
    if different:
        most = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in different)
        text = f"a continued run differs from an uninterrupted one in {len(different)} tensors, by up to {most:.1e}"
        # a GPU adds up in any order
        if torch.cuda.is_available() and most < 1e-3:
            return Finding(
                "self-test", "warning", text, "--system.deterministic, where every bit must be equal"
            )
        return _failed("self-test", text)
    return Finding(
        "self-test", "ok", "four training steps; saved after two and continued: equal, bit for bit"
    )


# by the name of what they find
HERE: dict[str, Callable[[Path], Finding]] = {
    "machine": _machine,
    "packages": _packages,
    "names": _names,
    "runs": _runs,
    "caches": _caches,
    "limits": _limits,
}
# each group shares a child: the interpreter of kernels is chosen once per process
CHILDREN: list[dict[str, Callable[[], Finding]]] = [
    {
        "torch": _torch,
        "device": _device,
        "pillow": _pillow,
        "decoding": _decoding,
        "torchvision": _torchvision,
        "timm": _timm,
        "xformers": _xformers,
        "compiler": _compiler,
        "self-test": _self_test,
    },
    {"kernels": _kernels},
]


def _in_children(names: list[str]) -> Iterator[Finding]:
    """Runs checks in a child process, and in another one from where one hangs or crashes."""
    while names:
        read, write = os.pipe()
        with tempfile.TemporaryFile() as noise:
            # modules are found where this process finds them
            begin = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main(sys.argv[1:])"
            command = [sys.executable, "-c", begin, str(write), *names]
            child = subprocess.Popen(
                command, pass_fds=[write], stdin=subprocess.DEVNULL, stdout=noise, stderr=noise
            )
            os.close(write)
            lines: queue.Queue[str] = queue.Queue()
            with os.fdopen(read, encoding="utf-8") as pipe:
                reader = threading.Thread(target=_forward, args=(pipe, lines), daemon=True)
                reader.start()
                reason = ""
                try:
                    while names:
                        line = lines.get(timeout=LIMIT_S)
                        if not line:
                            code = child.wait(LIMIT_S)
                            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                            noise.seek(0)
                            said = noise.read().decode("utf-8", "replace").strip().splitlines()
                            reason = f"the process was ended by {how}{f' ({said[-1][:200]})' if said else ''}"
                            break
                        names = names[1:]
                        yield Finding(*json.loads(line))
                except (queue.Empty, subprocess.TimeoutExpired):
                    reason = f"no answer within {LIMIT_S:.0f} s"
                finally:
                    child.kill()
                    child.wait()
                    reader.join()
        if reason:
            name, names = names[0], names[1:]
            yield _failed(name, reason)


def _forward(pipe: Any, lines: queue.Queue[str]) -> None:
    for line in pipe:
        lines.put(line)
    # the end
    lines.put("")


def main(args: Sequence[str]) -> None:
    """The child: runs checks by name and writes what they find to the file descriptor that comes first."""
    with os.fdopen(int(args[0]), "w", encoding="utf-8") as pipe:
        checks = {name: check for group in CHILDREN for name, check in group.items()}
        for name in args[1:]:
            print(json.dumps(_guarded(name, checks[name])), file=pipe, flush=True)
