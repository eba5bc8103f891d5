"""The shared part of the benchmarks: numbers, records, comparisons, processes.

Covers: percentiles, ratios and verdicts; a record written, read, indexed and drawn; every committed record is read
and compared; records with different machines, settings or failed checks; tables with missing values; processes that
take turns, fail, die, hang or are stopped; sub-commands, their lists and unknown names.
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
        (SLOW, SLOW, 1, "within noise"),
        (SLOW[:2], FAST[:2], 2, "too few samples"),
        (WILD, WILD[::-1], 1, "within noise"),
    ],
)
def test_ratio(a, b, ratio, verdict):
    found = harness.ratio(a, b)
    assert found["ratio"] == pytest.approx(ratio, rel=0.02) and found["verdict"] == verdict
    assert found["low"] <= found["ratio"] <= found["high"]


def test_percentiles_and_slope():
    assert harness.percentiles([3.0, 1.0, 2.0])["p50_ms"] == 2
    assert harness.percentiles([5.0]) == {"p20_ms": 5, "p50_ms": 5, "p80_ms": 5}
    assert harness.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)


def record(name: str = "a", samples: list[float] = FAST, **more) -> dict:
    row = {"key": "ours", "batch": 4, "samples_ms": samples, "images_per_s": 400.0, "peak_mb": 100.0}
    row |= harness.percentiles(samples)
    return harness.new_record(name, "step", ["--quick"], "a note", rows=[row], headline="2x") | more


def test_record_is_written_read_and_indexed(tmp_path, capsys):
    made = record(rates={"copy_gb_per_s": 12.123456789})
    folder = harness.write_record(made, harness.heading(made), Namespace(out=tmp_path, name="trial"))
    assert folder.name == f"{made['date']}_{made['machine']['short']}_trial"
    found = harness.read_record(folder)
    assert found == harness.read_record(folder / "record.json")
    assert found["rows"][0]["samples_ms"] == FAST and found["rates"] == {"copy_gb_per_s": 12.1235}
    assert found["command"] == "python -m benchmarks step --quick" and found["machine"]["versions"]["torch"]
    # lists of numbers take one line
    assert '"samples_ms": [10.0, 10.1, 9.9, 10.0, 10.0]' in (folder / "record.json").read_text()
    assert "2x; a note" in (tmp_path / "README.md").read_text() and "# a" in capsys.readouterr().out
    pictures = [p.name for p in folder.glob("*.png")]
    assert all(f"({p})" in (folder / "README.md").read_text() for p in pictures)
    (tmp_path / "README.md").unlink()
    assert (
        main(["index", "--out", str(tmp_path)]) == 0 and folder.name in (tmp_path / "README.md").read_text()
    )


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert harness.picture(record(), tmp_path) == ["bars.png"]
    assert 3_000 < (tmp_path / "bars.png").stat().st_size < 150_000
    for record_without in ({"rows": [{"key": "x"}]}, {"runs": []}):
        assert harness.picture(record_without, tmp_path) == []


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_record(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UsageError, match=tmp_path.name):
        harness.read_record(tmp_path)


def test_committed_records_are_read_and_compared():
    files = sorted(harness.RECORDS.glob("*/record.json"))
    index = (harness.RECORDS / "README.md").read_text(encoding="utf-8")
    for file in files:
        assert f"[{file.parent.name}]" in index
        found = harness.read_record(file)
        harness.comparison_page(found, found)
        assert {c.get("verdict") for c in harness.compared(found, found)} <= {
            "within noise",
            "too few samples",
            None,
        }
    with_samples = [f for f in files if harness.samples_of(harness.read_record(f))]
    assert len(files) > 10 and len(with_samples) > 8


def test_compare(tmp_path, capsys):
    a = record(samples=SLOW, settings={"rounds": 5}, rates={"copy_gb_per_s": 12.0})
    b = record(settings={"rounds": 9}, rates={"copy_gb_per_s": 9.0})
    b["machine"] = b["machine"] | {"cpu": "another"}
    for name, content in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(harness.dumps(content))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = capsys.readouterr().out
    for words in ("**2.000**", "B is faster", "rounds 5 -> 9", "Different cpu", "not equally fast"):
        assert words in text
    failed = [{"name": "ours", "passed": False, "found": ""}]
    assert "ratio" not in harness.compared(a, b | {"gates": failed})[0]
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 2
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
        raise MemoryError("out of memory") if how == "memory" else RuntimeError("went wrong")


def test_processes_take_turns_and_a_failing_one_leaves():
    rows: dict[str, dict] = {"one": {}, "two": {}, "bad": {}}
    began = []
    with processes.Turns(rows, pause=True) as turns:
        for key in rows:
            turns.start(key, Echo, key, environment={"SETTING": key})
        turns.run(2, 3.0, before=lambda: began.append(len(rows["two"].get("samples_ms", []))))
        turns.ask("one", "end", "error")
        turns.run(1, 4.0)
    assert rows["one"]["samples_ms"] == [3, 3] and rows["two"]["samples_ms"] == [3, 3, 4] and began == [0, 1]
    assert rows["one"]["error"] == "end: RuntimeError: went wrong"
    assert "cannot be built" in rows["bad"]["error"] and rows["two"]["setting"] == "two"
    assert "SETTING" not in os.environ
    for row in (rows["one"], rows["two"]):
        with pytest.raises(ProcessLookupError):
            os.kill(row["pid"], 0)


@pytest.mark.parametrize(
    ("how", "words", "out_of_memory"),
    [("killed", "was killed", True), ("memory", "out of memory", True), ("hang", "no answer in", False)],
)
def test_a_process_that_fails(how, words, out_of_memory):
    with processes.Worker(Echo, "x", patience=60) as worker:
        worker.patience = 0.3 if how == "hang" else 60
        with pytest.raises(processes.WorkerError, match=words) as caught:
            worker("end", how)
        assert caught.value.out_of_memory is out_of_memory


def test_clock_and_rates():
    assert (
        len(processes.clock(lambda: None, "cpu", 3)) == 3 and processes.clock(lambda: 1 / 0, "cpu", 0) == []
    )
    assert processes.status_mb("VmRSS") > 10 or not os.path.exists("/proc")


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
        (["step", "--released-code", "nowhere"], r"vits.py"),
        (["encode", "--masks", "100"], "--masks"),
        (["loader", "--batch", "0"], "--batch"),
        (["kernels", "--rounds", "-1"], "--rounds"),
    ],
)
def test_wrong_options_are_refused_at_once(argv, words, capsys):
    assert main(argv) == 2 and words in capsys.readouterr().err


def test_without_a_command(capsys):
    assert main([]) == 0 and "kernels" in capsys.readouterr().out
