"""What `learning` says of its runs: gains seed by seed, and a search that continues where it ended."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import learning
from benchmarks.learning import gains, spread


def test_gains_are_of_the_same_seed():
    found = gains({"knn": spread([0.1, 0.5]), "seconds": spread([1.0, 1.0])}, {"knn": spread([0.3, 0.6])})
    assert found["begun | knn"]["values"] == [0.3, 0.6]
    gain = found["begun, gain | knn"]
    assert [round(v, 6) for v in gain["values"]] == [0.2, 0.1] and round(gain["mean"], 6) == 0.15
    assert len(found) == 2


def test_a_search_continues(tmp_path, monkeypatch):
    """Each line is tried once per seed, with the options of the command line first; lines added later follow."""
    tried = []

    def run(preset, seed, out, overrides, limits):
        tried.append((preset, seed, *overrides))
        features = ("class token", "mean of patches")
        rows = [
            {"encoder": e, "feature": f, "knn": k + (k > 0.4) * seed / 10, "probe": 0.5}
            for f in features
            for e, k in ENCODERS
        ]
        at = {f"teacher{p}_{k}": 0.1 for p in ("", "_proj") for k in ("std", "rank", "cosine")}
        curve = [{"epoch": 0, **at}, {"epoch": 2, **at, "teacher_rank": 7.0}]
        seconds = {"pretrain_s": 2.0, "pretrain_cpu_s": 1.0, "evaluate_s": 0.5}
        return {"seed": seed, "evaluation": {"step": 8, "rows": rows}, "curve": curve, **seconds}

    monkeypatch.setattr(learning, "run", run)
    settings = tmp_path / "settings.txt"
    command = [
        "smoke",
        "--seeds",
        "0",
        "1",
        "--settings",
        str(settings),
        "--out",
        str(tmp_path),
        "--",
        "--a",
        "1",
    ]
    settings.write_text("# why\n--b 2 # and how\n\n")
    assert learning.main(command) == 0
    settings.write_text("--b 2\n--c '3 4'\n")
    assert learning.main(command) == 0
    wanted = [(s, *more) for more in (("--b", "2"), ("--c", "3 4")) for s in (0, 1)]
    assert tried == [("smoke", s, "--a", "1", *more) for s, *more in wanted]
    (folder,) = (f.parent for f in tmp_path.glob("*/record.json"))
    rows = json.loads((folder / "record.json").read_text())["rows"]
    assert [(r["settings"], r["seed"]) for r in rows] == [
        ("--b 2", 0),
        ("--b 2", 1),
        ("--c '3 4'", 0),
        ("--c '3 4'", 1),
    ]
    assert round(rows[0]["cls_knn"]["gain"], 6) == 30 and rows[0]["rank"] == {"first": 0.1, "last": 7.0}
    assert learning.main(["smoke", "--seeds", "0", "1", "--name", "both", "--out", str(tmp_path)]) == 0
    index = (tmp_path / "README.md").read_text()
    assert "runs: 4; k-NN at most 60.0%, probe at most 50.0%" in index
    assert "_both/README.md) | learning: smoke | k-NN 55.0%, probe 50.0% |" in index
    page = (folder / "README.md").read_text()
    assert "| --b 2 | 0 | 8 | 1 | 20.0 | 50.0 | +30.0 |" in page
    # seed 1 is ten points better
    assert "| --b 2 | mean of 2 | 8 | 1 | 20.0 | 55.0 | +35.0 |" in page


def test_a_limited_evaluation_is_found(tmp_path, monkeypatch):
    """What is read is what `evaluate` was told to write: with limits its own choice is another file."""

    def program(command, check):
        if command[3] == "pretrain":
            (tmp_path / "reports").mkdir()
            for name in ("config.json", "env.json", "log.jsonl"):
                (tmp_path / name).write_text("{}\n")
        else:
            assert command[-1] == "--max-test=3"
            Path(command[command.index("--out") + 1]).write_text('{"step": 8}')

    monkeypatch.setattr(learning.subprocess, "run", program)
    done = learning.run("smoke", 0, tmp_path, [], ["--max-test=3"])
    assert done["evaluation"] == {"step": 8}


ENCODERS = [("random init", 0.2), ("pretrained", 0.5), ("raw pixels", 0.1)]
