"""The benchmark of encoding, at tiny sizes and without timing anything that matters.

Covers: every eager provider equals its definition in float64, dense and masked, in both dtypes, Hugging Face's with
timm's weights; one that drops a token, or whose weights are elsewhere, is caught; what is masked; names, options and
their errors; nothing is concluded about a row whose check failed or that has no time; ratios and their goal; the page
and its picture; a whole run in processes of their own, with one that fails at a mask and one that dies.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import encode, encoders, plots, verify
from benchmarks.__main__ import main
from benchmarks.encoders import BY_NAME, Encoding
from benchmarks.tables import markdown
from extrema_fast.errors import UsageError

CPU = torch.device("cpu")
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


# ---- the encoders -----------------------------------------------------------------------------------


@needs_timm
def test_every_provider_is_its_definition():
    found = list(verify.encodings(CPU))
    there = {g.name.split()[1] for g in found}
    assert there >= {"ours", "accelerated", "timm"} and len(found) == 2 * len(there)
    if importlib.util.find_spec("transformers"):
        assert "hf" in there
    assert not [g for g in found if not g.passed]


@needs_timm
@pytest.mark.parametrize("name", ["ours", "timm"])
def test_a_wrong_one_is_caught(name):
    encoding = Encoding(name, "tiny", 48, 3, "bf16", CPU)
    encoding.choose(4)
    right = encoding.encode
    assert encoding.check()["error_of"] <= encoding.check()["limit"]
    # other patches of the right number
    encoding.encode = lambda images, keep: right(images, (keep + 1) % 9)
    assert encoding.check()["error_of"] > encoding.check()["limit"]


@needs_timm
def test_weights_of_hugging_face_must_be_timms():
    pytest.importorskip("transformers")
    encoding = Encoding("hf", "tiny", 48, 2, "bf16", CPU)
    encoding.choose(0)
    model = encoding.encode.__closure__[0].cell_contents
    assert isinstance(model, nn.Module) and encoding.check()["error_of"] <= 3e-2
    with torch.no_grad():
        layer = model.layers[3].attention
        layer.q_proj.weight.copy_(layer.v_proj.weight)
        layer.v_proj.weight.mul_(-1)
    assert encoding.check()["error_of"] > 3e-2


@needs_timm
def test_inputs():
    encoding = Encoding("timm", "tiny", 48, 3, "fp32", CPU)
    dense, masked = encoding.choose(0), encoding.choose(4)
    assert all(keep is None for _, keep in dense) and len(dense) == encoders.SETS
    assert [tuple(keep.shape) for _, keep in masked] == [(3, 4)] * encoders.SETS
    for _, keep in masked:
        assert all(len(row.unique()) == 4 and row.max() < 9 for row in keep)
    assert not torch.equal(masked[0][1], masked[1][1]) and not torch.equal(masked[0][0], masked[1][0])
    encoding.step(masked[0])
    assert encoding.out.shape == (3, 5, 192) and not encoding.out.requires_grad


# ---- names and options ------------------------------------------------------------------------------


def test_providers_by_name(monkeypatch):
    able, unable = encode.chosen(["ours", "ours-triton"], "cpu")
    assert [p.name for p in able] == ["ours"] and unable == {"ours-triton": "needs a CUDA device"}
    assert not any(p.compiled for p in encode.chosen([], "cpu", quick=True)[0])
    assert len(BY_NAME) == len(encoders.PROVIDERS)
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert encode.chosen(["hf"], "cpu") == ([], {"hf": "transformers is not installed"})
    with pytest.raises(UsageError, match=r"none of them runs here: \{.timm.: .timm is not installed.\}"):
        encode.main(["--providers", "timm", "--device", "cpu"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--providers", "tim"], "unknown 'tim'; did you mean 'timm'"),
        (["--img-size", "100"], "--img-size: expected a multiple of 16, got 100"),
        (["--masks", "0", "100"], "--masks: expected 0 to 99 percent that leave a patch of 196, got 100"),
        (["--masks", "-5"], "got -5"),
        (["--img-size", "32", "--masks", "90"], "that leave a patch of 4, got 90"),
        (["--batch", "8", "0"], "--batch: expected at least 1, got 0"),
        (["--rounds", "-1"], "--rounds: expected 0"),
    ],
)
def test_errors(argv, words, capsys):
    assert main(["encode", "--device", "cpu", *argv]) == 2
    assert words in capsys.readouterr().err


def test_list(capsys):
    assert main(["encode", "--list", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in BY_NAME) and "not here: needs a CUDA device" in told


# ---- what follows from the rows ---------------------------------------------------------------------


def record_of(
    times: dict[tuple[str, int], list[float]], bad: tuple[str, ...] = (), device: str = "cpu"
) -> dict:
    """A record with these milliseconds by (provider, mask)."""
    rows = []
    for (name, mask), ms in times.items():
        row = encode.head(BY_NAME[name], encode.Case("fp32", 8), mask, 49)
        row |= {"samples_ms": ms, "error_of": 1e-6, "limit": 1e-5, "p50_ms": sorted(ms)[len(ms) // 2]}
        row |= {"p20_ms": min(ms), "p80_ms": max(ms), "images_per_s": 8000 / row["p50_ms"]}
        row["error_of"] = float("nan") if name in bad else row["error_of"]
        rows.append(row)
    machine = {"gpu": None, "cpu": "test", "threads": 1, "torch": "2", "python": "3", "commit": None}
    settings = {"device": device, "rounds": 5, "steps_per_turn": 1}
    return {"what": "encoding", "date": "today", "machine": machine, "note": "", "command": "c",
            "settings": settings, "rows": rows, "gates": encode.gates(rows),
            "not_run": {"hf": "transformers is not installed"}}  # fmt: skip


TIMES = {
    ("accelerated", 0): [100.0] * 9, ("accelerated", 75): [30.0] * 9,
    ("timm", 0): [110.0] * 9, ("timm", 75): [50.0] * 9,
    ("timm-compiled", 0): [90.0] * 9, ("timm-compiled", 75): [45.0] * 9,
}  # fmt: skip


def test_ratios_are_against_the_fastest_and_the_own_dense_pass():
    record = record_of(TIMES)
    row = record["rows"][1]
    beside = encode.against(record, row, "timm")
    assert beside["other"] == "timm-compiled" and beside["ratio"] == pytest.approx(1.5)
    assert beside["verdict"] == "faster" and encode.against(record, row, "hf") is None
    assert encode.over_dense(record, row)["ratio"] == pytest.approx(100 / 30)
    assert encode.headline(record) == (
        "fp32, batch 8: 75 % masked 3.33x of dense; fp32, batch 8: 75 % masked 1.50x timm-compiled"
    )
    told = markdown(encode.page(record))
    assert "| `accelerated`, 75 % masked | best of timm: `timm-compiled` | **1.50x** |" in told
    assert "| **3.33x** | 3.33 to 3.33 | >= 2.5: reached |" in told
    assert "* `hf`: transformers is not installed" in told
    slow = record_of(TIMES | {("accelerated", 75): [50.0] * 9})
    assert "| >= 2.5: **not reached** |" in markdown(encode.page(slow))
    assert ">= 2.5" not in markdown(encode.page(record_of(TIMES, device="cuda")))


def test_nothing_is_concluded_from_a_wrong_row():
    record = record_of(TIMES, bad=("timm-compiled",))
    assert encode.against(record, record["rows"][1], "timm")["other"] == "timm"
    assert {g["name"] for g in record["gates"] if not g["passed"]} == {
        "timm-compiled | fp32 | batch 8 | dense", "timm-compiled | fp32 | batch 8 | 75 % masked"
    }  # fmt: skip
    told = markdown(encode.page(record))
    assert "**wrong**" in told and "best of timm: `timm-compiled`" not in told
    record = record_of(TIMES, bad=("accelerated",))
    assert encode.against(record, record["rows"][1], "timm") is None
    assert encode.over_dense(record, record["rows"][1]) is None and encode.headline(record) == ""


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.encode(record_of(TIMES), tmp_path) == ["encode.png"]
    assert 5_000 < (tmp_path / "encode.png").stat().st_size < 200_000
    assert plots.encode(record_of({}), tmp_path) == []


# ---- whole runs -------------------------------------------------------------------------------------


def test_a_run_in_processes_of_their_own(tmp_path: Path):
    argv = ["--model", "tiny", "--img-size", "32", "--batch", "3", "--dtypes", "bf16", "--masks", "0", "75",
            "--providers", "ours", "--rounds", "3", "--threads", "1", "--device", "cpu"]  # fmt: skip
    assert main(["encode", *argv, "--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("*/record.json")).read_text())
    assert [r["key"] for r in record["rows"]] == [
        "ours | bf16 | batch 3 | dense", "ours | bf16 | batch 3 | 75 % masked"
    ]  # fmt: skip
    assert [(r["kept"], r["tokens"], len(r["samples_ms"])) for r in record["rows"]] == [(4, 5, 3), (1, 2, 3)]
    assert all(g["passed"] for g in record["gates"]) and len(record["gates"]) == 2
    page = next(tmp_path.glob("*/README.md")).read_text()
    assert "| `ours`, 75 % masked | **" in page and "| ours, bf16, batch 3, dense | yes |" in page


class FakeWorker:
    """Answers without a process; `ours` fails at one mask, `timm` is gone after the checks."""

    def __init__(self, threads: int, environment: dict[str, str]) -> None:
        self.process, self.code, self.kept, self.turns = self, None, 0, 0

    def poll(self) -> int | None:
        return self.code

    def close(self) -> None:
        self.closed = True

    def __call__(self, do: str, **arguments):
        if do == "encoder":
            self.name = arguments["provider"]
        elif do == "encoding":
            self.kept = arguments["kept"]
            if self.name == "ours" and self.kept == 98:
                raise encode.WorkerError("encoding: no memory", True)
            return {"error_of": 1e-7, "limit": 1e-5} if arguments["check"] else {}
        elif do == "turn":
            self.turns += 1
            if self.name == "timm" and self.turns == 4:
                self.code = -9
                raise encode.WorkerError("turn: the process was killed", True)
            return {"samples_ms": [1.0] * arguments["steps"]}
        return {}


def test_what_fails_leaves_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(encode, "Worker", FakeWorker)
    args = encode.options(["--masks", "0", "50", "75", "--rounds", "2", "--steps", "2"])
    rows = encode.measure(
        [BY_NAME[n] for n in ("ours", "timm", "accelerated")], encode.Case("fp32", 8), args, "cpu"
    )
    found = {(r["provider"], r["mask"]): r.get("error", len(r["samples_ms"])) for r in rows}
    gone = "turn: the process was killed"
    assert found == {
        ("ours", 0): 4, ("ours", 50): "encoding: no memory", ("ours", 75): 4,
        ("timm", 0): gone, ("timm", 50): gone, ("timm", 75): gone,
        ("accelerated", 0): 4, ("accelerated", 50): 4, ("accelerated", 75): 4,
    }  # fmt: skip
    assert all("p50_ms" in r or "error" in r for r in rows)
    assert "ours: encoding: no memory" in capsys.readouterr().err
