"""The runner of a GPU visit, with parts made up: no GPU is needed, and none is used.

Covers: parts that pass, fail, hang (with a child that ignores being asked to end), are killed, cannot be started,
lack a program, find no time left; results written as each part ends; a signal to the runner; a folder in use; what
is read from records, JUnit files, profiles and rates; the page; without a GPU, or with a driver that hangs; which
parts are chosen; that every real part is a command its program understands; `make gpu-check` in an environment that
has everything.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Part, chosen, find_gpu, main, plan
from benchmarks.registry import ENTRIES
from extrema_fast import cli
from extrema_fast.errors import UsageError

HANG = "import threading; threading.Event().wait()"


def fake(name: str, code: str, seconds: float = 60, **more) -> Part:
    return Part(name, f"about {name}", (sys.executable, "-S", "-c", code, "{out}"), seconds, **more)


def run(parts: list[Part], out: Path, seconds: float = 300) -> tuple[int, dict, list[str]]:
    said: list[str] = []
    code = gpu_suite.run(parts, out, seconds, "fake GPU", said.append)
    return code, json.loads((out / "summary.json").read_text()), said


def states(summary: dict) -> dict[str, str]:
    return {p["name"]: p["state"] for p in summary["parts"]}


def test_every_kind_of_end(tmp_path):
    out = tmp_path / "new/out"
    parts = [
        fake("good", "import sys; print('fine'); open(sys.argv[1] + '/x', 'w').close()"),
        fake("bad", "print('trouble ahead'); raise SystemExit(3)"),
        fake("hangs", "print('so far', flush=True); " + HANG, 0.5),
        fake("crashes", "import os; os.abort()"),
        fake("no-program", "pass", needs="a-program-nobody-has"),
        Part("no-such-file", "", ("/nowhere/at/all",), 60),
        fake("after", "print('still here')"),
    ]
    code, summary, said = run(parts, out)
    assert code == 1 and summary["state"] == "complete"
    assert states(summary) == {
        "good": "passed", "bad": "failed", "hangs": "failed", "crashes": "failed", "no-program": "skipped",
        "no-such-file": "failed", "after": "passed",
    }  # fmt: skip
    why = {p["name"]: p.get("why", "") for p in summary["parts"]}
    assert why["bad"] == "exit code 3" and why["hangs"] == "not ready after 0 s"
    assert why["crashes"] == "killed by SIGABRT" and "not on PATH" in why["no-program"]
    assert "cannot be started" in why["no-such-file"]
    assert (out / "good/x").is_file() and (out / "after/log.txt").read_text() == "still here\n"
    page = (out / "summary.md").read_text()
    # what a failed part said last is on the page
    for words in (
        "# GPU visit: fake GPU",
        "**failed: exit code 3**",
        "trouble ahead",
        "so far",
        "still here",
    ):
        assert (words in page) == (words != "still here"), words
    assert said[-1] == "FAILED: bad, hangs, crashes, no-such-file" and said[-2] == "not run: no-program"


def test_all_well(tmp_path):
    code, summary, said = run([fake("a", "pass"), fake("b", "pass")], tmp_path)
    assert code == 0 and states(summary) == {"a": "passed", "b": "passed"}
    assert not any("FAILED" in line or "not run" in line for line in said)


def test_results_are_written_as_each_part_ends(tmp_path):
    look = (
        "import json, sys; s = json.load(open(sys.argv[1] + '/../summary.json'));"
        "print(s['state'], [p['state'] for p in s['parts']])"
    )
    run([fake("a", "pass"), fake("b", "raise SystemExit(1)"), fake("c", look), fake("d", "pass")], tmp_path)
    seen = (tmp_path / "c/log.txt").read_text()
    assert seen == "running ['passed', 'failed', 'running', 'waiting']\n"


def alive(pid: int) -> bool:
    """Whether it still runs, some seconds after it has been killed."""
    try:
        # readable once the process has ended
        select.select([os.pidfd_open(pid)], [], [], 10)
    except ProcessLookupError:
        return False
    # a process that nobody has reaped is dead all the same
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("end", [HANG, "pass"])
def test_what_a_part_leaves_behind_is_ended(tmp_path, end):
    child = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); " + HANG
    )
    code = (
        "import subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}], stdout=subprocess.PIPE, text=True);"
        "print(p.pid, p.stdout.readline().strip(), flush=True);" + end
    )
    run([fake("parent", code, 2 if end == HANG else 60)], tmp_path)
    pid, ready = (tmp_path / "parent/log.txt").read_text().split()
    assert ready == "ready" and not alive(int(pid))


def test_time_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "RESERVE_S", 0.0)
    monkeypatch.setattr(gpu_suite, "LEAST_S", 0.4)
    parts = [fake("short", HANG, 0.5), fake("long", HANG, 60), fake("late", "pass", 60)]
    code, summary, said = run(parts, tmp_path, 2.0)
    assert code == 1 and states(summary) == {"short": "failed", "long": "failed", "late": "skipped"}
    assert "all that was left; its own limit is 60 s" in summary["parts"][1]["why"]
    assert summary["parts"][2]["why"] == "no time left" and not (tmp_path / "late").exists()
    assert "not run: late" in said


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_signal_ends_the_part_and_writes_the_summary(tmp_path, repository):
    # the part itself signals the runner, then hangs
    part = "import os, signal; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGTERM); " + HANG
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu_suite import Part, run\n"
        f"parts = [Part(n, n, (sys.executable, '-S', '-c', c), 60) for n, c in (('a', {part!r}), ('b', 'pass'))]\n"
        f"sys.exit(run(parts, Path({str(tmp_path / 'out')!r}), 300, 'fake GPU'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 128 + 15, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["state"] == "interrupted" and states(summary) == {"a": "interrupted", "b": "waiting"}
    assert not alive(int((tmp_path / "out/a/log.txt").read_text()))


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "results").touch()
    for out in (tmp_path, tmp_path / "results"):
        with pytest.raises(UsageError, match="exists and is not empty; name a new folder"):
            run([fake("a", "pass")], out)
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


# ---- what is found ----------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="t.a" name="good"/>
<testcase classname="t.a" name="bad[x]"><failure message="no"/></testcase>
<testcase classname="t.a" name="broken"><error/></testcase>
<testcase classname="t.a" name="left"><skipped/></testcase>
</testsuite></testsuites>"""


def test_found_in_a_parts_files(tmp_path):
    record = {
        "what": "training step", "headline": "1.4x strong", "rows": [
            {"provider": "ours", "images_per_s": 4321.4, "mfu": 0.5951, "peak_mb": 2048},
            {"provider": "strong", "error": "out of memory"},
            {"op": "x", "ms": 3},
        ],
        "gates": [{"name": "strong", "passed": False}, {"name": "ours", "passed": True}],
    }  # fmt: skip
    (tmp_path / "dated").mkdir()
    (tmp_path / "dated/record.json").write_text(json.dumps(record))
    (tmp_path / "ceilings.json").write_text(json.dumps({"rates": {"copy_gb_per_s": 4300.4}}))
    products = {"share": 0.81, "tflops_per_s": 612.3}
    (tmp_path / "profile.json").write_text(json.dumps({"products": products}))
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert gpu_suite.found(tmp_path, {"state": "failed"}) == {
        "found": [
            "training step: 1.4x strong", "ours: 4321 images/s, MFU 59.5 %, 2.0 GiB", "CHECK FAILED strong",
            "matrix products are 81 % of the step, at 612 TFLOP/s", "copy_gb_per_s 4300",
            "1 passed, 2 failed, 1 skipped", "FAILED t.a::bad[x]", "FAILED t.a::broken",
        ]
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "<testsuites", '{"rows": 3', "[]", "null"])
def test_half_written_files_do_not_stop_the_suite(tmp_path, text):
    for name in ("record.json", "profile.json", "ceilings.json", "junit.xml"):
        (tmp_path / name).write_text(text)
    assert gpu_suite.found(tmp_path, {"state": "failed"})["found"] == []


def test_an_odd_file_does_not_end_the_visit(tmp_path):
    code = """import pathlib, sys; pathlib.Path(sys.argv[1], 'record.json').write_text('{"rows": 5}')"""
    rc, summary, _ = run([fake("odd", code), fake("next", "pass")], tmp_path)
    assert rc == 0 and states(summary) == {"odd": "passed", "next": "passed"}
    assert "its files cannot be read: TypeError" in (tmp_path / "summary.md").read_text()


def test_tests_that_all_skip_have_shown_nothing(tmp_path):
    (tmp_path / "junit.xml").write_text('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert gpu_suite.found(tmp_path, {"state": "passed"}) == {
        "found": ["1 skipped"],
        "state": "failed",
        "why": "no test has run",
    }


def test_pictures_and_records_are_on_the_page(tmp_path):
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1], 'dated'); p.mkdir(); "
        "(p / 'bars.png').touch(); (p / 'README.md').touch()"
    )
    run([fake("step", code)], tmp_path)
    page = (tmp_path / "summary.md").read_text()
    assert "![bars](step/dated/bars.png)" in page and "* all of it: [dated](step/dated/README.md)" in page


# ---- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('torch finds no GPU it can use')", "finds no GPU it can use; nothing was run"),
        ("import torch_that_is_not_there", "No module named"),
        ("pass", "no reason given"),
        (HANG, "no answer in 0 s"),
    ],
)
def test_no_gpu(code, words):
    with pytest.raises(UsageError, match="no NVIDIA GPU to measure: .*" + words):
        find_gpu([sys.executable, "-S", "-c", code], 0.3 if code == HANG else 60)


def test_a_gpu():
    assert find_gpu([sys.executable, "-S", "-c", "print('warning'); print('NVIDIA H200')"]) == "NVIDIA H200"


def test_without_a_gpu_nothing_happens(capsys, monkeypatch, tmp_path):
    def none() -> str:
        raise UsageError("no NVIDIA GPU to measure: none; nothing was run")

    monkeypatch.setattr(gpu_suite, "find_gpu", none)
    monkeypatch.setattr(gpu_suite, "run", lambda *args: pytest.fail("something was run"))
    monkeypatch.chdir(tmp_path)
    from benchmarks.__main__ import main as benchmarks

    assert benchmarks(["gpu_suite", "--out", "here"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "benchmarks gpu_suite: no NVIDIA GPU to measure: none; nothing was run\n"
    assert not list(tmp_path.iterdir())


def test_which_parts():
    parts = plan()
    names = [p.name for p in parts]
    assert len(set(names)) == len(names)
    usual = [p.name for p in chosen(parts, [], [], False)]
    assert usual == [p.name for p in parts if not p.optional] and "tune" not in usual
    assert [p.name for p in chosen(parts, [], [], True)] == [n for n in names if n in usual or n == "tune"]
    # in the suite's order, optional ones too
    assert [p.name for p in chosen(parts, ["tune", "ceilings"], [], False)] == ["ceilings", "tune"]
    assert [p.name for p in chosen(parts, [], usual[1:], False)] == usual[:1]
    for only, skip in ((["tun"], []), ([], ["tun"])):
        with pytest.raises(UsageError, match="unknown part 'tun'; known: environment, "):
            chosen(parts, only, skip, False)
    with pytest.raises(UsageError, match="leaves no part"):
        chosen(parts, ["tune"], ["tune"], False)
    with pytest.raises(UsageError, match="--minutes: expected more than 0"):
        main(["--minutes", "0"])


def test_every_part_is_a_command_its_program_understands(capsys, repository):
    for part in plan():
        command = gpu_suite.words(part, Path("out"))
        command = command[command.index(sys.executable) + 1 :]
        assert command[0] == "-m", command
        module, *args = command[1:]
        if module == "benchmarks":
            name, *args = args
            # parses the options and looks up what they name; measures nothing
            assert ENTRIES[name].main([*args, "--list"]) == 0, part
        elif module == "benchmarks.gpu_suite":
            assert args[:2] == ["--out", "out"] and args[2] == "--do" and args[3] in gpu_suite.OWN
        elif module == "pytest":
            files = [a for a in args if a.endswith(".py")]
            assert files and all((repository / f).is_file() for f in files), part
        elif args[0] == "tune":
            assert args == ["tune", "--out", "out"]
        else:
            assert module == "extrema_fast" and args[0] == "profile"
            p = cli._Parser("profile")
            for option in ("--out", "--steps"):
                p.add_argument(option)
            p.add_argument("--synthetic", action="store_true")
            assert cli._configure(p, args[1:]).cfg.train.batch_size == 256
    capsys.readouterr()


def test_all_gpu_tests_are_in_the_suite(repository):
    named = {w for part in plan() for w in part.command if w.startswith("tests/gpu/")}
    assert named == {f"tests/gpu/{f.name}" for f in (repository / "tests/gpu").glob("test_*.py")}


def test_list(capsys):
    assert main(["--list", "--only", "kernels", "ceilings"]) == 0
    out = capsys.readouterr().out
    assert out.index("ceilings") < out.index("kernels") and "--repeats 10" in out and "profile" not in out


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_uses_an_environment_that_has_everything(repository, tmp_path):
    # no index can be reached: had it tried to install anything, it would have failed
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    # these tests may run under make themselves
    env["PIP_NO_INDEX"] = "1"
    command = [
        "make",
        "gpu-check",
        f"PYTHON={sys.executable}",
        f"VENV={tmp_path}",
        "GPU_ARGS=--list --only ceilings",
    ]
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ceilings"), done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
