"""The runner of a GPU visit, with parts made up; no GPU is used.

Covers: parts that pass, fail, hang, lack a program or find no time left, and the summary; what is read from records
and test results; a folder in use; no GPU; that every part of the plan is a command its program understands.
"""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import gpu_visit
from benchmarks.__main__ import main
from benchmarks.gpu_visit import Part, find_gpu, findings, plan, run
from extrema_fast.errors import UsageError

HANG = "import threading; print('so far', flush=True); threading.Event().wait()"


def part(name: str, code: str, seconds: float = 60) -> Part:
    return Part(name, f"about {name}", seconds, (sys.executable, "-S", "-c", code, "{out}"))


def test_every_kind_of_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_visit, "GRACE_S", 5.0)
    parts = [
        part("good", "import sys; open(sys.argv[1] + '/x', 'w').close()"),
        part("bad", "print('trouble ahead'); raise SystemExit(3)"),
        part("hangs", HANG, 0.5),
        Part("no-program", "", 60, ("a-program-nobody-has",)),
        part("after", "print('still here')"),
    ]
    out = tmp_path / "new/out"
    assert run(parts, out, 300, "fake GPU") == 1
    states = {p["name"]: p["state"] for p in json.loads((out / "summary.json").read_text())["parts"]}
    assert states == {
        "good": "passed",
        "bad": "failed: exit code 3",
        "hangs": "failed: not ready after 0 s",
        "no-program": "skipped: a-program-nobody-has is not on PATH",
        "after": "passed",
    }
    text = (out / "summary.md").read_text()
    assert (out / "good/x").is_file() and "still here" not in text
    assert "trouble ahead" in text and "so far" in text
    with pytest.raises(UsageError, match="--out"):
        run(parts, out, 300, "fake GPU")


def test_no_time_left(tmp_path):
    assert run([part("a", "pass")], tmp_path, 0, "fake GPU") == 0
    assert "skipped: no time left" in (tmp_path / "summary.md").read_text()


JUNIT = """<testsuites><testsuite><testcase classname="t.a" name="good"/><testcase name="left"><skipped/>
</testcase><testcase classname="t.a" name="bad"><failure message="no"/></testcase></testsuite></testsuites>"""


def test_findings(tmp_path):
    rows = [{"key": "ours", "images_per_s": 4321.4}, {"key": "x"}]
    record = {
        "what": "step",
        "headline": "1.4x",
        "rows": rows,
        "gates": [{"name": "strong", "passed": False}],
    }
    (tmp_path / "dated").mkdir()
    (tmp_path / "dated/record.json").write_text(json.dumps(record))
    (tmp_path / "junit.xml").write_text(JUNIT)
    lines = ["step: 1.4x", "ours: 4321 images/s", "CHECK FAILED strong", "1 passed, 1 failed, 1 skipped"]
    assert findings(tmp_path, "failed") == {"found": [*lines, "FAILED t.a::bad"], "state": "failed"}
    (tmp_path / "junit.xml").write_text('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert findings(tmp_path, "passed")["state"] == "failed: no test has run"


@pytest.mark.parametrize(
    ("code", "words"),
    [("import sys; sys.exit('finds no GPU')", "finds no GPU"), ("pass", "no reason"), (HANG, "no answer")],
)
def test_no_gpu(code, words):
    with pytest.raises(UsageError, match=f"no NVIDIA GPU: .*{words}"):
        find_gpu([sys.executable, "-S", "-c", code], 0.5 if code == HANG else 60)


def test_every_part_is_a_command_its_program_understands(capsys, repository):
    names = [p.name for p in plan()]
    assert len(set(names)) == len(names)
    for p in plan():
        words = [w.replace("{out}", "out") for w in p.words]
        if "-c" in words:
            compile(words[words.index("-c") + 1], p.name, "exec")
        elif "benchmarks" in words:
            assert main([*words[words.index("benchmarks") + 1 :], "--device", "cpu", "--list"]) == 0, p
        elif "pytest" in words:
            files = {w for w in words if w.startswith("tests/")}
            assert files == {f"tests/gpu/{f.name}" for f in (repository / "tests/gpu").glob("test_*.py")}
