"""Files, folders and locks: whole or not there.

Covers: a failed write leaves the old file or folder and no temporary one; what killed processes left beside a
folder; a place that was taken meanwhile; a lock held by a living process, left by a dead one, on a file system
without flock, or of another machine, or taken over meanwhile; JSON that is missing, damaged, no object, too deep, too
large.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from safetensors import SafetensorError

from extrema_fast import files
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.files import lock, new_file, new_folder, read_json, write_file


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_failed_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "f"
    write_file(path, "old \udcff")
    assert path.read_bytes() == b"old \xff"
    with pytest.raises(KeyError), new_file(path) as f:
        f.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old \xff" and names(path.parent) == ["f"]


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_failed_folder_leaves_the_old_one(tmp_path, error):
    out = tmp_path / "d"
    with new_folder(out) as new:
        (new / "a").write_text("1")
    with pytest.raises(StorageError if error is OSError else error), new_folder(out) as new:
        (new / "b").write_text("2")
        raise error
    assert names(tmp_path) == ["d"] and names(out) == ["a"]
    with new_folder(out) as new:
        (new / "b").write_text("2")
    assert names(tmp_path) == ["d"] and names(out) == ["b"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    out, real = tmp_path / "d", os.rename
    (out / "a").mkdir(parents=True)

    def rename(a, b):
        if files._NEW in str(a):
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError, match="No space left"), new_folder(out):
        pass
    assert names(tmp_path) == ["d"] and names(out) == ["a"]


def test_a_folder_that_is_there_counts(tmp_path, monkeypatch, caplog):
    original = files.sync

    def failing(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(path)

    monkeypatch.setattr(files, "sync", failing)
    with new_folder(tmp_path / "out") as new:
        (new / "x").write_text("1")
    assert (tmp_path / "out/x").read_text() == "1" and "power failure" in caplog.text


def test_errors_of_libraries_are_of_the_storage(tmp_path):
    with pytest.raises(StorageError, match="Permission denied"), new_folder(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    with pytest.raises(SafetensorError), new_folder(tmp_path / "out"):
        raise SafetensorError("Error while deserializing header: invalid")
    assert not (tmp_path / "out").exists()


def test_what_killed_processes_left(tmp_path, dead_pid):
    for name in (f".tmp-d-{dead_pid}", f".tmp-d-{os.getppid()}", f".tmp-other-{dead_pid}", ".tmp-d-x"):
        (tmp_path / name).mkdir()
    (tmp_path / f".replaced-d-{dead_pid}" / "moved aside").mkdir(parents=True)
    with pytest.raises(KeyError), new_folder(tmp_path / "d"):
        raise KeyError
    left = {f".tmp-d-{os.getppid()}", f".tmp-other-{dead_pid}", ".tmp-d-x", "d"}
    assert set(names(tmp_path)) == left and names(tmp_path / "d") == ["moved aside"]


def test_a_place_taken_meanwhile(tmp_path):
    def check(out):
        if out.exists():
            raise UsageError("taken")

    with pytest.raises(UsageError, match="taken"), new_folder(tmp_path / "d", check):
        (tmp_path / "d").mkdir()
    assert names(tmp_path) == ["d"]


HOST = socket.gethostname()


def test_lock(tmp_path, caplog, dead_pid, monkeypatch):
    caplog.set_level("INFO", logger="extrema_fast")
    path = tmp_path / "lock"
    with pytest.raises(KeyError), lock(path, "here"):
        with pytest.raises(UsageError, match=f"here: .*process {os.getpid()} on"), lock(path, "here"):
            pass
        raise KeyError
    assert not path.exists()
    # left by kill -9: the kernel holds no lock
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with lock(path, "here"):
        assert read_json(path)["pid"] == os.getpid()
    assert "process 1 on elsewhere is taken over" in caplog.text and not path.exists()

    def no_flock(*args):
        raise OSError(95, "not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_flock)
    host = socket.gethostname()
    for holder, is_held in (
        ({"host": "elsewhere", "pid": 1}, True),
        ({"host": host, "pid": os.getppid()}, True),
        ({"host": host, "pid": dead_pid}, False),
        ({"host": host}, False),
    ):
        path.write_text(json.dumps(holder))
        if is_held:
            with pytest.raises(UsageError, match="another job"), lock(path, "here"):
                pass
        else:
            with lock(path, "here"):
                pass


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("here", [{"host": "elsewhere"}, {"host": HOST, "system": "another"}])
def test_a_lock_of_another_machine(tmp_path, monkeypatch, flock, here):
    """On a file system that locks within each machine alone, or not at all; machines may bear one name (pods)."""

    def elsewhere(*args):
        if not flock:
            raise OSError(95, "not supported")

    monkeypatch.setattr(files.fcntl, "flock", elsewhere)
    monkeypatch.setattr(files, "BEAT_S", 0.02)
    monkeypatch.setattr(files, "GONE_S", 0.4)
    path, pid = tmp_path / "lock", os.getpid()
    with lock(path, "here"):
        monkeypatch.setattr(files, "_here", lambda: here)
        with pytest.raises(UsageError, match=f"here: .*process {pid} on {HOST}"), lock(path, "here"):
            pass
        # it has ended without a word
        left = path.read_bytes()
    path.write_bytes(left)
    with lock(path, "here"):
        assert here.items() <= read_json(path).items()
    assert not path.exists()


def test_a_lock_that_was_taken_over_meanwhile(tmp_path, monkeypatch, caplog):
    codes, ended, path = [], threading.Event(), tmp_path / "lock"
    monkeypatch.setattr(files.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(files, "BEAT_S", 0.02)
    with lock(path, "here"):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beats": 5}))
        assert ended.wait(20)
    assert {*codes} == {6} and "here: another job took it over" in caplog.text
    # which is the other's
    assert read_json(path)["host"] == "elsewhere"


@pytest.mark.parametrize(
    "text", [None, "", "{", "[1]", "\xff", '{"a":' * 100_000, " " * (files.MAX_JSON + 1)]
)
def test_json_that_is_none(tmp_path, text):
    path = tmp_path / "f.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    assert read_json(path, {"a": 1}) == {"a": 1}
    with pytest.raises(UsageError, match=r"f\.json: ") as error:
        read_json(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
