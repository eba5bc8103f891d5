"""The runner of a GPU visit, with parts made up; no GPU is used.

Covers: parts that pass, fail, hang, lack a program or package or find no time left, and the summary; parts at the same
time, shared caches; an interruption; what is read from records and test results; the record of what `auto` takes; a
folder in use; no GPU; a run that is continued; that every part of the plan is a command its program understands.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import sys
from dataclasses import replace

import pytest

from benchmarks import gpu_visit
from benchmarks.__main__ import main
from benchmarks.gpu_visit import Part, find_gpu, findings, plan, run
from extrema_fast.errors import UsageError

HANG = "import threading; print('so far', flush=True); threading.Event().wait()"


def part(name: str, code: str, seconds: float = 60) -> Part:
    return Part(name, f"about {name}", seconds, (sys.executable, "-S", "-c", code, "{out}"))


def test_every_kind_of_end(tmp_path, request):
    # as in the background of a shell
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    parts = [
        part("good", "import sys; open(sys.argv[1] + '/x', 'w').close()"),
        part("bad", "print('trouble ahead'); raise SystemExit(3)"),
        part("hangs", HANG, 0.5),
        Part("no-program", "", 60, ("a-program-nobody-has",)),
        replace(part("no-package", "pass"), needs=("sys", "a.package_nobody_has")),
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
        "no-package": "skipped: a.package_nobody_has not installed",
        "after": "passed",
    }
    text = (out / "summary.md").read_text()
    assert (out / "good/x").is_file() and "still here" not in text
    # what hangs is interrupted before it is killed
    assert "trouble ahead" in text and "so far" in text and "KeyboardInterrupt" in text
    with pytest.raises(UsageError, match="--out"):
        run(parts, out, 300, "fake GPU")


MEET = """
import os, sys
folder, mine, other = os.path.dirname(sys.argv[1]), *sys.argv[2:]
if mine == "a":
    os.mkfifo(folder + "/pipe")
while not os.path.exists(folder + "/pipe"):
    pass
open(folder + "/pipe", "r" if mine == "a" else "w").close()
print("found: " + mine + " met " + other, os.environ["TRITON_INTERPRET"])
"""


def test_a_group_runs_at_the_same_time_and_shares_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pair = [replace(part(x, MEET), group="pair", words=(*part(x, MEET).words, x, y)) for x, y in ("ab", "ba")]
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    show = part("after", f"import os; print('found:', [os.environ[n] for n in {caches}])")
    assert run([*pair, show], tmp_path, 60, "fake GPU") == 0
    found = [p["found"] for p in json.loads((tmp_path / "summary.json").read_text())["parts"]]
    assert found == [
        ["a met b 0"],
        ["b met a 0"],
        [str([f"{tmp_path}/cache/{x}" for x in ("inductor", "triton", "home")])],
    ]


def test_an_interrupted_visit_ends_its_parts_and_has_a_summary(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    hang = part("hang", f"import os; open({str(pids)!r}, 'w').write(str(os.getpid()));" + HANG)
    finish = gpu_visit.Process.finish

    def interrupted(process):
        interrupted.pid = int(pids.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(
        gpu_visit.Process, "finish", lambda p: (interrupted if "hang" in str(p.log) else finish)(p)
    )
    assert run([part("good", "pass"), hang, part("never", "pass")], tmp_path / "out", 60, "fake GPU") == 130
    states = [p["state"] for p in json.loads((tmp_path / "out/summary.json").read_text())["parts"]]
    assert states == ["passed", "not run", "not run"]
    with pytest.raises(ProcessLookupError):
        os.kill(interrupted.pid, 0)


def test_no_time_left(tmp_path):
    assert run([part("a", "pass")], tmp_path, 0, "fake GPU") == 0
    assert "skipped: no time left" in (tmp_path / "summary.md").read_text()


JUNIT = """<testsuites><testsuite><testcase classname="t.a" name="good"/><testcase name="left"><skipped/>
</testcase><testcase classname="t.a" name="bad"><failure message="no"/></testcase></testsuite></testsuites>"""


def test_findings(tmp_path):
    rows = [{"key": "ours", "images_per_s": 4321.4}, {"key": "x", "error": "no room"}]
    record = {
        "what": "step",
        "headline": "1.4x",
        "rows": rows,
        "unfinished": "some rounds are missing",
        "gates": [{"name": "strong", "passed": False}],
    }
    (tmp_path / "dated").mkdir()
    (tmp_path / "dated/record.json").write_text(json.dumps(record))
    (tmp_path / "junit.xml").write_text(JUNIT)
    lines = ["step: 1.4x", "some rounds are missing", "ours: 4321 images/s", "not measured: x: no room"]
    lines += ["CHECK FAILED strong", "1 passed, 1 failed, 1 skipped"]
    assert findings(tmp_path, "failed") == {"found": [*lines, "FAILED t.a::bad"], "state": "failed"}
    (tmp_path / "junit.xml").write_text('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert findings(tmp_path, "passed")["state"] == "failed: no test has run"


def test_the_record_of_what_auto_takes(tmp_path):
    times = {"student": {"flash": [300.0, 200.0, 220.0], "short": [100.0, 90.0, 110.0]}}
    found = {"implementation": "short", "reason": "100 us", "times": times}
    measured = {"choice": "attention", "label": "student"}, found
    folder = gpu_visit.write_choices([measured, ({"launch": "fwd"}, {"config": {}})], tmp_path, "choices")
    record = json.loads((folder / "record.json").read_text())
    assert record["headline"] == "attention student: short"
    rows = [(row["key"], row["p50_ms"], row["of_best"]) for row in record["rows"]]
    assert rows == [("attention, student, short", 0.1, 1), ("attention, student, flash", 0.22, 2.2)]
    text = (folder / "README.md").read_text()
    assert "| attention student | short | 100 us |" in text
    assert "| attention, student, flash | 0.21 | 0.22 | 0.27 | 2.20 |" in text


@pytest.mark.parametrize(
    ("code", "words"),
    [("import sys; sys.exit('finds no GPU')", "finds no GPU"), ("pass", "no reason"), (HANG, "no answer")],
)
def test_no_gpu(code, words):
    with pytest.raises(UsageError, match=f"no NVIDIA GPU: .*{words}"):
        find_gpu([sys.executable, "-S", "-c", code], 0.5 if code == HANG else 60)


@pytest.mark.slow
def test_a_short_run_stops_and_goes_on(tmp_path, capsys):
    """What the parts `pretrain` and `pretrain-resume` do, on whatever device is here."""
    folder = str(tmp_path / "run")
    gpu_visit.short_run(folder, 10)
    gpu_visit.short_run(folder, 20, after=10)
    assert "found: steps 11 to 20, loss" in capsys.readouterr().out
    log = tmp_path / "run/log.jsonl"
    good = log.read_text()
    log.write_text(good.replace('"loss": ', '"loss": null, "was": ', 1))
    with pytest.raises(RuntimeError, match="loss is not a number at steps"):
        gpu_visit.short_run(folder, 20, after=10)
    log.write_text(good)
    log.write_text(log.read_text() * 2)
    with pytest.raises(RuntimeError, match="expected 1 to 20"):
        gpu_visit.short_run(folder, 20, after=10)


@pytest.mark.slow
def test_a_short_run_with_dali(tmp_path, capsys):
    pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    gpu_visit.short_run(str(tmp_path / "run"), 10, dali=True)
    assert "found: steps 1 to 10, loss" in capsys.readouterr().out
    lines = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 10]


@pytest.mark.parametrize("xdist", [True, False])
def test_every_part_is_a_command_its_program_understands(xdist, capsys, repository, monkeypatch):
    monkeypatch.setattr(gpu_visit, "_is_installed", lambda package: xdist)
    tested = {"gpu and slow": [], "gpu and not slow": []}
    names = [p.name for p in plan()]
    assert len(set(names)) == len(names)
    for p in plan():
        words = [w.replace("{out}", "out") for w in p.words]
        if "-c" in words:
            tree = ast.parse(words[words.index("-c") + 1])
            call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
            given = [None] * len(call.args), {k.arg: None for k in call.keywords}
            inspect.signature(getattr(gpu_visit, call.func.attr)).bind(*given[0], **given[1])
        elif "benchmarks" in words:
            assert main([*words[words.index("benchmarks") + 1 :], "--device", "cpu", "--list"]) == 0, p
        elif "pytest" in words:
            (which,) = tested.keys() & set(words)
            tested[which] += [w for w in words if w.startswith("tests/")]
    files = sorted(f"tests/gpu/{f.name}" for f in (repository / "tests/gpu").glob("test_*.py"))
    files = ["tests/gpu"] if xdist else files
    assert all(sorted(found) == files for found in tested.values())
