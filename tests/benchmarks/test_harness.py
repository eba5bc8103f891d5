"""The shared part of the benchmarks: numbers, records, comparisons, processes, commands.

Covers: ratios and verdicts; a record written, read, indexed and drawn; every committed record is read and compared;
different machines, settings and failed checks; tables with missing values; processes that take turns, fail, die or
hang; every command's list and wrong options.
"""

from __future__ import annotations

import os
import signal
from argparse import Namespace

import pytest

from benchmarks import harness, processes
from benchmarks.__main__ import COMMANDS, main
from extrema_fast.errors import UsageError

SLOW, FAST = [20.0, 20.2, 19.9, 20.1, 20.0], [10.0, 10.1, 9.9, 10.0, 10.0]
WILD = [10.0, 30.0, 12.0, 28.0, 11.0, 29.0]


@pytest.mark.parametrize(
    ("a", "b", "ratio", "verdict"),
    [
        (SLOW, FAST, 2, "faster"),
        (FAST, SLOW, 0.5, "slower"),
        (SLOW[:2], FAST[:2], 2, "too few samples"),
        (WILD, WILD[::-1], 1, "within noise"),
    ],
)
def test_ratio(a, b, ratio, verdict):
    found = harness.ratio(a, b)
    assert found["ratio"] == pytest.approx(ratio, rel=0.02) and found["verdict"] == verdict
    assert found["low"] <= found["ratio"] <= found["high"]


NOTE = "a note\n\nand more of it"


def record(samples: list[float] = FAST, **more) -> dict:
    row = {"key": "ours", "batch": 4, "samples_ms": samples, "peak_mb": 100.0}
    harness.speed(row)
    argv, note = ["--quick", "--note", NOTE, "--batch", "1 2"], NOTE
    return harness.new_record("a", "step", argv, note, rows=[row], headline="2x") | more


def test_record_is_written_read_and_indexed(tmp_path, capsys):
    made = record(rates={"copy_gb_per_s": 12.123456789})
    folder = harness.write_record(made, ["a table"], Namespace(out=tmp_path, name="trial"))
    assert folder.name == f"{made['date']}_{made['machine']['short']}_trial"
    found = harness.read_record(folder)
    assert found == harness.read_record(folder / "record.json")
    assert found["rows"][0]["samples_ms"] == FAST and found["rates"] == {"copy_gb_per_s": 12.1235}
    assert found["command"] == "python -m benchmarks step --quick --batch '1 2'"
    assert found["machine"]["versions"]["torch"]
    # lists of numbers take one line
    assert "10.0, 10.1, 9.9, 10.0, 10.0" in (folder / "record.json").read_text()
    assert "a table" in capsys.readouterr().out
    pictures = [p.name for p in folder.glob("*.png")]
    assert all(f"({p})" in (folder / "README.md").read_text() for p in pictures)
    assert main(["index", "--out", str(tmp_path)]) == 0
    line = f"[{folder.name}]({folder.name}/README.md) | a | 2x; a note |\n"
    assert line in (tmp_path / "README.md").read_text()
    assert (folder / "README.md").read_text().count(NOTE) == 1


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert harness.picture(record(), tmp_path) and 3_000 < (tmp_path / harness.BARS).stat().st_size < 150_000
    assert not harness.picture({"rows": [{"key": "x"}]}, tmp_path) and not harness.picture(
        {"runs": []}, tmp_path
    )


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_record(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UsageError, match=tmp_path.name):
        harness.read_record(tmp_path)


def test_committed_records_are_read_and_compared():
    files = sorted(harness.RECORDS.glob("*/record.json"))
    index = (harness.RECORDS / "README.md").read_text(encoding="utf-8")
    verdicts = []
    for file in files:
        assert f"[{file.parent.name}]" in index
        found = harness.read_record(file)
        harness.comparison_page(found, found)
        verdicts += [c["verdict"] for c in harness.compared(found, found)]
    assert len(files) > 10 and set(verdicts) == {"within noise", "too few samples"}


def test_compare(tmp_path, capsys):
    a = record(SLOW, settings={"rounds": 5}, rates={"copy_gb_per_s": 12.0})
    b = record(settings={"rounds": 9}, rates={"copy_gb_per_s": 9.0})
    b["machine"] = b["machine"] | {"cpu": "another"}
    for name, content in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(harness.dumps(content))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    for words in ("2.000", "faster", "rounds 5 and 9", "machine**: cpu", "rates**: copy_gb_per_s"):
        assert words in text
    failed = [{"name": "ours", "passed": False, "found": ""}]
    assert "ratio" not in harness.compared(a, b | {"gates": failed})[0]
    # an older form of rows: a dictionary of samples, no key
    old = {"rows": [{"dtype": "float32", "n": 39, "samples_ms": {"sdpa": [1.0, 2.0]}}]}
    assert harness.samples_of(old) == {"float32 39 sdpa": [1.0, 2.0]}


def test_columns():
    rows = [{"key": "a | b", "x": {"y": 0.5}}, {"key": "c", "x": {}}]
    assert harness.columns(rows, "row=key", "y=x.y:.0%").splitlines()[2:] == ["| a, b | 50% |", "| c | - |"]


# ---- processes ------------------------------------------------------------------------------------


class Echo:
    """What a worker holds in these tests."""

    def __init__(self, name: str) -> None:
        if name == "bad":
            raise ValueError("cannot be built")
        self.built = {"pid": os.getpid(), "setting": os.environ.get("SETTING")}

    def turn(self, value: float) -> dict[str, list[float]]:
        print("this goes to standard error")
        return {"samples_ms": [value]}

    def end(self, how: str) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            signal.pause()
        raise RuntimeError("went wrong")


def test_processes_take_turns_and_a_failing_one_leaves():
    rows: dict[str, dict] = {"one": {}, "two": {}, "bad": {}}
    began = []
    with processes.Turns(rows, pause=True) as turns:
        for key in rows:
            turns.start(key, Echo, key, environment={"SETTING": key})
        turns.run(2, 3.0, before=lambda: began.append(len(rows["two"].get("samples_ms", []))))
        turns.ask("one", "end", "error")
        turns.run(1, 4.0)
        turns.ask("two", "end", "killed")
    assert rows["one"]["samples_ms"] == [3, 3] and rows["two"]["samples_ms"] == [3, 3, 4] and began == [0, 1]
    assert rows["one"]["error"] == "end: RuntimeError: went wrong"
    assert "end: the process was killed" in rows["two"]["error"]
    assert "cannot be built" in rows["bad"]["error"] and rows["two"]["setting"] == "two"
    assert "SETTING" not in os.environ
    for row in (rows["one"], rows["two"]):
        with pytest.raises(ProcessLookupError):
            os.kill(row["pid"], 0)


def test_a_process_that_hangs(monkeypatch):
    with processes.Worker(Echo, "x") as worker:
        monkeypatch.setattr(processes, "PATIENCE", 0.3)
        with pytest.raises(processes.WorkerError, match="no answer in"):
            worker("end", "hang")


# ---- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("compare", "index")])
def test_every_command_lists_what_it_would_measure(name, capsys):
    assert main([name, "--list"]) == 0 and capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["steps"], "'step'"),
        (["step", "--providers", "our"], "--providers"),
        (["step", "--ours", "train.compil=block"], "train.compil"),
        (["step", "--memory", "--scaling"], "--memory"),
        (["step", "--released-code", "nowhere"], "vits.py"),
        (["encode", "--masks", "100"], "--masks"),
        (["loader", "--batch", "0"], "--batch"),
        (["kernels", "--rounds", "-1"], "--rounds"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
        (["gpu_visit", "--only", "tun"], "--only"),
        (["gpu_visit", "--minutes", "0"], "--minutes"),
    ],
)
def test_wrong_options(argv, words, capsys):
    assert main(argv) == 2 and words in capsys.readouterr().err
