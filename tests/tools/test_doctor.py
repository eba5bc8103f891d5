"""Looking at a machine.

Covers: packages that crash, hang, fail or end the process while they are imported take no other check along; each
check on this machine, and on broken ones; the small run, which must be continued and equal; exit codes and JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from extrema_fast import train
from extrema_fast.cli import main
from extrema_fast.errors import DataError
from extrema_fast.tools import doctor as module
from extrema_fast.tools.doctor import CHILDREN, FIXES, HERE, NEEDED, Finding, describe, doctor, problem
from extrema_fast.training import checkpoint


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Puts packages that run some code before all others."""

    def put(**packages: str) -> None:
        for name, code in packages.items():
            folder = tmp_path / "broken" / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "broken")

    return put


def states(*names: str) -> dict[str, Finding]:
    return {f.name: f for f in doctor(names=names)}


def test_a_crash_takes_no_other_check_along(broken):
    broken(
        torchvision="import os; print('from C', flush=True); os.abort()",
        xformers="raise ImportError('libcudart.so.11: no such file')",
        timm="raise SystemExit(3)",
    )
    found = states("pillow", "torchvision", "timm", "xformers")
    assert [f.state for f in found.values()] == ["ok", "warning", "warning", "warning"]
    assert "SIGABRT" in found["torchvision"].text and "from C" in found["torchvision"].text
    assert "exit code 3" in found["timm"].text and "libcudart" in found["xformers"].text
    assert all(f.fix for name, f in found.items() if name != "pillow")


def test_a_hang_ends(broken, monkeypatch):
    broken(timm="import time; time.sleep(1000)")
    monkeypatch.setattr(module, "LIMIT_S", 0.3)
    found = states("timm")["timm"]
    assert found.state == "warning" and "no answer" in found.text


def test_without_torch_nothing_else_is_tried(broken):
    broken(torch="raise ImportError('libtorch_cpu.so: file too short')")
    found = list(doctor(names=["torch", "pillow", "self-test"]))
    assert [(f.name, f.state) for f in found] == [("torch", "error")]
    error = problem(found)
    assert error is not None and error.exit_code == 2
    assert "file too short" in str(error) and FIXES["torch"] in str(error)


@pytest.mark.parametrize("name", [*HERE, "torch", "device", "pillow", "decoding", "kernels"])
def test_checks_of_this_machine(name, tmp_path):
    checks = {**CHILDREN[0], **CHILDREN[1]}
    found = HERE[name](tmp_path) if name in HERE else checks[name]()
    assert found.name == name and found.text
    # what this machine has is not known, but a run can start
    assert found.state in ("ok", "warning", "missing") and found.exit_code == 0
    assert (found.state == "warning") <= bool(found.fix)
    assert describe(found).count("\n") == bool(found.fix)
    # extras for the work on this project are nothing that a user lacks
    assert "mkdocs" not in found.text and "lightly" not in found.text


@pytest.mark.parametrize(
    ("fault", "state", "word"),
    [("", "ok", "equal"), ("restart", "error", "not continued"), ("drift", "error", "differs")],
)
def test_self_test(monkeypatch, fault, state, word):
    if fault == "restart":
        monkeypatch.setattr(train, "resume", lambda run, allow: None)
    elif fault == "drift":

        def drift(tensors, *args):
            checkpoint.restore({k: t + 0.01 * ("teacher" in k) for k, t in tensors.items()}, *args)

        monkeypatch.setattr("extrema_fast.training.run.restore", drift)
    found = module._self_test()
    assert found.state == state and word in found.text


def test_what_others_do_to_names(broken, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("apex", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    assert HERE["names"](Path()).state == "ok"
    broken(apex="")
    assert "NVIDIA" in HERE["names"](Path()).fix
    broken(kernels="")
    (Path(sys.path[0]) / "kernels" / "patch_gather").mkdir()
    monkeypatch.setattr(module, "_version", lambda name: "0.9" if name == "kernels" else "")
    found = HERE["names"](Path())
    assert found.state == "warning" and "transformers" in found.text


def test_places_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "file/below", "link", "link/below"):
        found = HERE["runs"](tmp_path / name)
        assert (found.state, found.exit_code) == ("error", 5) and "is not a folder" in found.text

    def full(**args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    found = HERE["runs"](tmp_path)
    assert (found.state, found.exit_code) == ("error", 5) and "No space" in found.text
    assert HERE["caches"](tmp_path).state == "warning"
    monkeypatch.setattr(module, "doctor", lambda out: iter([found]))
    assert main(["doctor", str(tmp_path)]) == 5
    out, err = capsys.readouterr()
    assert out.startswith("error    runs: ") and "--out" in out
    assert err.startswith("extrema-fast: error: ") and err.count("\n") == 1
    assert main(["doctor", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    "free, files, enough", [(1 << 40, 1 << 20, True), (1 << 20, 1 << 20, False), (1 << 40, 3, False)]
)
def test_room(tmp_path, monkeypatch, free, files, enough):
    about = os.statvfs(tmp_path)
    values = list(about)
    block = 4096
    values[0] = values[1] = block
    values[4], values[5], values[7] = free // block, files, files
    monkeypatch.setattr(module.os, "statvfs", lambda path: os.statvfs_result(values))
    found = HERE["runs"](tmp_path / "not" / "yet")
    assert (found.state == "ok") == enough and bool(found.fix) != enough


def test_small_machines(monkeypatch):
    monkeypatch.setattr(module, "_cpu_limit", lambda: 0.5)
    assert "--data.threads 1" in HERE["machine"](Path()).fix
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: (256, 4096))
    assert "ulimit" in HERE["limits"](Path()).fix


def test_a_driver_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "_driver", lambda: "470.1")
    found = CHILDREN[0]["device"]()
    assert found.state == "warning" and "470.1" in found.text and found.fix


@pytest.mark.parametrize("error", [DataError("no image"), MemoryError(), AssertionError("1 != 2")])
@pytest.mark.parametrize("name", ["timm", "self-test"])
def test_whatever_a_check_raises_is_a_finding(name, error):
    def check() -> Finding:
        raise error

    found = module._guarded(name, check)
    assert found.state == ("error" if name in NEEDED else "warning")
    code = getattr(error, "exit_code", 2)
    assert found.exit_code == (code if name in NEEDED else 0)
    assert problem([Finding("a", "ok", ""), Finding("b", "missing", "")]) is None
