"""For every test: one thread, a printed seed, and none of the user's caches or settings."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nullgpu import counters

# before torch: several test processes and their children share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    # without torch, which must not be imported before the variables are set
    return Path("/dev/nvidiactl").exists()


# before Triton, which reads it at its import: on a CPU kernels are tested in its interpreter
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a developer's own settings must not decide a test; these two only say where test files are
KEPT = ("EXTREMA_FAST_PARITY", "EXTREMA_FAST_SHARED")
for _name in [n for n in os.environ if n.startswith("EXTREMA_FAST_") and n not in KEPT]:
    del os.environ[_name]

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "tries of tests/faults")
    group.addoption("--tries", type=int, default=1, help="how many times as many as in `make test`")
    group.addoption("--try-seed", type=int, default=0, help="of what is random about them")
    parser.addoption(
        "--timm-tests", default="", metavar="FOLDER", help="runs timm's own tests; its source goes there"
    )
    group.addoption("--try-record", default="", metavar="FILE.json", help="what was tried, and what held")


def pytest_configure(config: pytest.Config) -> None:
    try:
        found = importlib.util.find_spec("extrema_fast.kernels")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise pytest.UsageError("extrema_fast is not installed for this Python; run `make install-dev`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    skip = pytest.mark.skip(reason="needs a CUDA device")
    # numbers that the host reads there are 0, or what another test left in that memory
    raised = (AssertionError, ArithmeticError)
    fail = pytest.mark.xfail(raises=raised, reason="the null GPU computes no values")
    for item in items:
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        if counters.active() and item.get_closest_marker("values"):
            item.add_marker(fail)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # one cache for all test processes: built-in images are written once, and never into the user's home
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed from the test's own name: torch starts from it, and a failing test shows it."""
    import torch

    value = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command called in this process sets the level of our log; the next test starts without it."""
    logger = logging.getLogger("extrema_fast")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


# ---- commands in processes of their own ------------------------------------------------------------

# torch is imported once; each job is a fork of this process, which has neither threads nor autograd running
_SERVER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
# what a first optimizer or image would import, at more cost than a whole tiny run
import torch._dynamo, torch.distributed.fsdp, PIL.Image
import extrema_fast.cli, extrema_fast.tools.dry_run, extrema_fast.evaluation.evaluate
for line in sys.stdin:
    job = json.loads(line)
    children = []
    for env in job["env"]:
        pid = os.fork()
        if pid == 0:
            os.environ.update(env)
            out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            # whole lines at once even under PYTHONUNBUFFERED: several processes write to this file
            for stream in sys.stdout, sys.stderr:
                stream.reconfigure(line_buffering=True, write_through=False)
            code = 1
            try:
                exec(job["setup"], {})
                if job["cpu_seconds"]:
                    signal.setitimer(signal.ITIMER_PROF, job["cpu_seconds"])
                code = extrema_fast.cli.main(job["args"])
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The library that makes system calls of a job fail where its variable SHIM says so (tests/faults/shim.c)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = REPOSITORY / "tests" / "faults" / "shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def run_cli(
    tmp_path_factory: pytest.TempPathFactory, _cache_folder: None, shim: Path | None
) -> Iterator[Callable[..., Any]]:
    """`run_cli(*args, processes=1, env={}, setup="", cpu_seconds=0) -> (exit codes, output)`.

    Runs `extrema-fast ARGS` in processes of their own (under a process group when more than one).
    env          added to each one's environment; a list: one for each process, which then say how they find each other
    setup        Python run before the command in each of them
    cpu_seconds  the process dies without any cleaning up once it has used that much processor time
    """
    folder = tmp_path_factory.mktemp("jobs")
    preloaded = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), shim and str(shim)]))
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ({"LD_PRELOAD": preloaded} if preloaded else {}),
    )

    def run(
        *args: Any,
        processes: int = 1,
        env: dict | list | None = None,
        setup: str = "",
        cpu_seconds: float = 0,
    ):
        output = folder / f"{len(list(folder.iterdir()))}.txt"
        output.touch()
        envs = env if isinstance(env, list) else [dict(env or {}) for _ in range(processes)]
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            for rank, e in enumerate(envs):
                e |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                e |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        job = {
            "args": [str(a) for a in args],
            "env": envs,
            "setup": setup,
            "cpu_seconds": cpu_seconds,
            "output": str(output),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the job server has died"
        return json.loads(answer), output.read_text()

    yield run
    server.stdin.close()
    server.wait()
