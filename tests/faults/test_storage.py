"""Storage that fails: system calls made to fail by a preloaded library, full and read-only file systems.

Covers: every command that writes, with ENOSPC, EIO, EROFS, EDQUOT and EACCES in write, open, rename, unlink, mkdir and
fsync, from the first call on or a later one; a file system of few bytes and one mounted read-only, where this process
may mount. Each ends with a documented exit code and in lines without a traceback, and the same command afterwards
ends well.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extrema_fast.config import to_dict

# of docs/training.md
CODES = (0, 2, 3, 4, 5, 75)
CALLS = ("write", "open", "rename", "unlink", "mkdir", "fsync", "all")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
# of the commands, in `make test`
SHORT = ("embed", "export")


@pytest.fixture
def run_failing(shim, run_cli) -> Callable:
    """`run_cli`, where the variable SHIM makes system calls fail."""
    if shim is None:
        pytest.skip("needs Linux and a C compiler")
    return run_cli


def commands(s, out: Path) -> dict[str, list[object]]:
    """Every command that writes, as it writes into `out`."""
    run = shutil.copytree(s.run, out / "run", dirs_exist_ok=True)
    (run / "status.json").unlink()
    quiet = ["--loader", "pil", "--device", "cpu", "--quiet"]
    few, changed = ["--steps", "1", "--warmup", "1"], ["--quiet", "--allow-config-change"]
    return {
        "pretrain": ["pretrain", "--config", s.root / "new.json", "--out", out / "new", "--quiet"],
        "pretrain again": ["pretrain", "--config", s.root / "longer.json", "--out", run, *changed],
        "evaluate": ["evaluate", run, "--device", "cpu", "--force"],
        "report": ["report", run, "--images", "1"],
        "embed": ["embed", s.images, out / "features", "--weights", s.run, *quiet],
        "pack": ["pack", s.images, out / "packed", "--quiet"],
        "index": ["index", s.images, "--out", out / "m.tsv", "--threads", "1", "--quiet"],
        "export": ["export", s.run, out / "exported"],
        "export a graph": ["export", s.run, out / "graph", "--format", "torch-export"],
        "import": ["import", s.released, out / "imported", "--num-heads", "2"],
        "profile": ["profile", "--config", s.root / "new.json", "--out", out / "profile", *few],
        "search": ["search", s.images / "ape" / "00.png", s.features, "--out", out / "found.png"],
    }


@pytest.fixture(scope="module")
def given(originals, tmp_path_factory):
    """What the commands read, outside the folder in which calls fail."""
    s = originals.copy(tmp_path_factory.mktemp("given") / "things")
    for name, epochs in (("new", 1), ("longer", 2)):
        cfg = s.config(
            train={"epochs": epochs}, data={"train": str(originals.images), "test": str(originals.images)}
        )
        (s.root / f"{name}.json").write_text(json.dumps(to_dict(cfg)))
    return s


def try_command(run, s, tries, out: Path, name: str, shim: str) -> None:
    """One command with failing calls, then without."""
    out.mkdir()
    args = commands(s, out)[name]
    what = f"{name}, {shim}"
    codes, text = run(*args, env={"SHIM": f"{out}:{shim}"})
    held = codes[0] in CODES and "Traceback" not in text and text.count("extrema-fast: error:") <= 1
    tries.expect(what, held, f"exit code {codes[0]}: {text[-600:]}")
    if codes[0] not in (0, 2):
        held = text.rstrip().splitlines()[-1].startswith(("extrema-fast: error: ", "to continue: "))
        tries.expect(f"{what}: its last line", held, text[-300:])
    if codes == [0] and name.startswith(("export", "import")):
        args.append("--force")
    codes, text = run(*args)
    tries.expect(f"{what}: the same command afterwards", codes == [0], f"exit code {codes[0]}: {text[-600:]}")
    shutil.rmtree(out)


def test_a_full_disk(run_failing, given, tries, tmp_path):
    for name in commands(given, tmp_path / "names"):
        if tries.factor > 1 or name == "export":
            try_command(run_failing, given, tries, tmp_path / "out", name, f"write:{errno.ENOSPC}:0")


def test_failing_calls(run_failing, given, tries, tmp_path):
    names = [*commands(given, tmp_path / "names")] if tries.factor > 1 else SHORT
    for _ in range(2 if tries.factor == 1 else 10 * tries.factor):
        name, call = names[tries.rng.integers(len(names))], CALLS[tries.rng.integers(len(CALLS))]
        after = int(tries.rng.choice([0, 0, 1, 2, 3, 5, 8, 13, 30]))
        number = ERRORS[tries.rng.integers(len(ERRORS))]
        try_command(run_failing, given, tries, tmp_path / "out", name, f"{call}:{number}:{after}")


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)`: a file system of its own in memory, with the options of mount."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if (
            os.geteuid()
            or shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("this process may not mount file systems")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system(run_cli, given, tries, mounted):
    for name in commands(given, mounted("size=8m")):
        if tries.factor == 1 and name != "embed":
            continue
        out = mounted("size=8m")
        args = commands(given, out)[name]
        filler = out / "filler"
        with open(filler, "wb", buffering=0) as f:
            # all but a few blocks
            left = max(0, os.statvfs(out).f_bavail - int(tries.rng.integers(0, 4))) * 4096
            f.write(bytes(left))
        codes, text = run_cli(*args)
        held = codes[0] in CODES and "Traceback" not in text
        tries.expect(f"{name}, full", held, f"exit code {codes[0]}: {text[-600:]}")
        filler.unlink()
        codes, text = run_cli(*args)
        again = codes == [0] or "not empty" in text
        tries.expect(f"{name}, with space again", again, f"exit code {codes[0]}: {text[-600:]}")


def test_a_read_only_file_system(run_cli, given, tries, mounted):
    out = mounted("size=64m")
    table = commands(given, out)
    # a finished run, its log and its checkpoints, on a file system that has become read-only
    subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
    for name, args in table.items():
        if tries.factor == 1 and name != "export":
            continue
        codes, text = run_cli(*args)
        held = codes[0] in (2, 5) and "Traceback" not in text and text.count("extrema-fast: error:") == 1
        held = held and ("raw pixels" in text or name != "evaluate")
        tries.expect(name, held, f"exit code {codes[0]}: {text[-600:]}")
