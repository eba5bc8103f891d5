"""The benchmark suite, at tiny sizes and without timing anything that matters.

Covers: every provider of the step agrees with the product in fp32 in loss, gradients and, over three steps, in
student and teacher; a wrong provider is caught; the count of FLOPs; yardsticks step and their FLOPs are those torch
counts; inputs of one value and too few warm-up steps are refused; memory running out tells sizes and remedies;
names, groups, options and memory settings of providers; the released code's folder is checked; records round-trip
and their index names them; percentiles, ratios, verdicts; nothing is concluded about a provider whose check failed;
comparison of two records; growth; pictures; a whole run in processes of their own.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, gates, memory, plots, processes, records, scaling, stats, step, verify
from benchmarks import index as index_command
from benchmarks.__main__ import main
from benchmarks.providers import PROVIDERS, chosen, configuration, parse_settings
from benchmarks.released_code import load_modules
from benchmarks.stepper import Inputs
from benchmarks.tables import Table, markdown
from benchmarks.worker import is_out_of_memory
from extrema_fast.config import from_dict, preset
from extrema_fast.errors import UsageError
from extrema_fast.training.memory import HUGE_PAGES
from extrema_fast.training.plan import flops_per_image

CPU = torch.device("cpu")
BY_NAME = {p.name: p for p in PROVIDERS}
# one of each formulation; without compilation: inductor takes minutes
DISTINCT = ("released", "strong", "strong-plain-attention", "ours")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return gates.save_student(gates.reference(verify.tiny(), CPU), tmp_path / "w.safetensors")


def eager(name: str, cfg, weights: Path | None = None):
    stepper = replace(BY_NAME[name].eager(), precision="fp32").make(cfg, CPU)
    if weights is not None:
        stepper.load(weights)
    return stepper


# ---- providers --------------------------------------------------------------------------------------


def test_every_provider_has_the_products_loss_and_gradients():
    found = verify.steps(verify.tiny(), CPU)
    assert {g.name for g in found} >= set(DISTINCT)
    assert not [g for g in found if not g.passed]


@pytest.mark.parametrize("name", ["released", "strong"])
def test_three_steps_move_student_and_teacher_alike(name, weights):
    # a rate and momentum that leave fp32's rounding far behind
    cfg = from_dict({"optim": {"base_lr": 0.2, "momentum": 0.8}}, verify.tiny())
    assert cfg.model.drop_path > 0
    ours, other = eager("ours", cfg, weights), eager(name, cfg, weights)
    start = {n: p.detach().clone() for n, p in ours.student().items()}
    for inputs in gates.random_images(cfg, 3, CPU):
        inputs = gates.with_coins(inputs, cfg, CPU)
        ours.step(inputs)
        other.step(inputs)
        assert other.loss() == pytest.approx(ours.loss(), rel=1e-4)
    student, teacher = ({n: p.detach() for n, p in x.items()} for x in (other.student(), other.teacher()))
    # the released order moves the teacher at the start of the next step: bring it there
    m = other.schedule.momentum(3)
    teacher = {n: t * m + student[n] * (1 - m) for n, t in teacher.items()}
    for mine, theirs in ((ours.student(), student), (ours.teacher(), teacher)):
        moved = {n: float((p.detach() - start[n]).abs().mean()) for n, p in mine.items()}
        for n, p in mine.items():
            pair = [gates.without_key_bias(n, x.detach()) for x in (p, theirs[n])]
            if pair[0] is not None:
                # a gradient near zero is a step of either sign under Adam: compare the bulk
                assert float((pair[0] - pair[1]).abs().mean()) < 0.01 * moved[n], n


def test_a_wrong_provider_is_caught(weights):
    cfg = gates.small(verify.tiny())
    inputs = gates.with_coins(gates.random_images(cfg, 1, CPU)[0], cfg, CPU)
    truth = gates.one_step(eager("ours", cfg), inputs)
    wrong = eager("strong", cfg, weights)
    with torch.no_grad():
        wrong.student()["encoder.blocks.1.mlp.fc2.weight"].mul_(1.01)
    assert not gates.compare("wrong", gates.one_step(wrong, inputs), truth).passed
    missing = truth._replace(gradients=dict(list(truth.gradients.items())[1:]))
    assert not gates.compare("missing", missing, truth).passed
    assert not gates.compare("nan", truth._replace(loss=math.nan), truth).passed
    assert not gates.first_step(BY_NAME["strong"], "bf16", 2.1, 2.0).passed
    assert gates.first_step(BY_NAME["strong"], "bf16", 2.01, 2.0).passed
    assert not gates.first_step(BY_NAME["mae"], "bf16", math.nan, 2.0).passed


def test_providers_draw_their_own_disjoint_masks(seed):
    cfg = verify.tiny(batch=3)
    for keep in (eager("released", cfg).masks(3), eager("strong", cfg).coins(3)[0]):
        assert keep.shape == (5, 3, cfg.num_keep)
        for image in keep.transpose(0, 1).flatten(1):
            assert image.unique().numel() == image.numel()
    _, scale = eager("strong", cfg).coins(2000)
    # the last block drops one branch in ten, survivors are divided by 0.9
    assert float(scale[0].mean()) == 1
    assert scale[-1].unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert float((scale[-1] == 0).float().mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", ["mae", "supervised"])
def test_yardsticks_learn_and_count_their_flops(name):
    # square: their position tables and torch's counter need nothing else
    head = {"hidden": 48, "out": 24, "predictor_hidden": 40}
    tiny = verify.TINY | {"img_size": [48, 48]}
    cfg = configuration("tiny", 0.8, 5, 4, model=tiny, head=head, drop_path=0.0)
    stepper = eager(name, cfg)
    inputs = gates.random_images(cfg, 1, CPU)[0]
    # by the formula: torch's counter does not know the fused kernel of a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stepper.step(inputs)
    assert counter.get_total_flops() / 4 == pytest.approx(stepper.flops_per_image(), rel=1e-3)
    before = stepper.loss()
    assert before == pytest.approx({"mae": 2.0, "supervised": math.log(1000)}[name], rel=0.5)
    for group in stepper.optimizer.param_groups:
        assert group["lr"] == pytest.approx(cfg.peak_lr)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("small_80x5", 35.45), ("small_90x8", 30.16), ("base_80x5", 136.86), ("base_90x8", 115.09),
     ("large_80x5", 480.33), ("large_90x8", 401.90)],
)  # fmt: skip
def test_flops_per_image_are_the_published_totals(name, gflop):
    assert flops_per_image(preset(f"paper_{name}")) / 1e9 == pytest.approx(gflop, abs=0.006)


# ---- what is refused --------------------------------------------------------------------------------


def test_inputs_of_one_value_are_refused():
    for value in (0, 7):
        with pytest.raises(UsageError, match="random"):
            gates.check_inputs(torch.full((2, 8, 8, 3), value, dtype=torch.uint8))
    for inputs in gates.random_images(verify.tiny(), 3, CPU):
        gates.check_inputs(inputs.images)


@pytest.mark.parametrize(("steps", "kind"), [(0, "cpu"), (1, "cpu"), (19, "cuda")])
def test_too_little_warmup_is_refused(steps, kind):
    with pytest.raises(UsageError, match="--warmup"):
        processes.check_warmup(steps, kind)


def test_the_commands_refuse_it_too(capsys):
    for command in ("step", "memory"):
        assert main([command, "--warmup", "0", "--device", "cpu"]) == 2
        assert "--warmup: 0" in capsys.readouterr().err


def test_exhausted_memory_names_sizes_and_remedies():
    job = processes.Job("ours", BY_NAME["ours"], configuration("small", batch=64), "cpu")
    text = processes.failure(job, processes.WorkerError("x", out_of_memory=True))["error"]
    for part in ("batch 64", "5 views of 39 tokens", "--batch (32)", "train.recompute", "train.accumulation"):
        assert part in text
    assert "out of memory" not in processes.failure(job, processes.WorkerError("another"))["error"]
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_providers_by_name_and_group():
    able, unable = chosen(["strong", "kernels", "released"], "cpu")
    names = [p.name for p in able]
    assert names[0] == "released" and "strong-eager" in names and "ours" not in names
    assert "CUDA" in unable["ours-kernels"]
    with pytest.raises(UsageError, match="released"):
        chosen(["relesed"], "cpu")
    able, _ = chosen(["ours"], "cpu", extra=["train.recompute=gelu,optim.eps=1e-7"])
    assert able[-1].options == {"train.recompute": "gelu", "optim.eps": 1e-7}
    assert parse_settings("train.cuda_graph=true,train.accumulation=2") == {
        "train.cuda_graph": True,
        "train.accumulation": 2,
    }
    for bad in ("compile=loss", "train.compile"):
        with pytest.raises(UsageError, match="--ours"):
            parse_settings(bad)
    with pytest.raises(UsageError, match=r"train\.compil"):
        chosen(["ours"], "cpu", extra=["train.compil=loss"])


def test_only_ours_has_our_memory_settings_unless_asked():
    with_ours = {p.name for p in PROVIDERS if p.environment.get(HUGE_PAGES) == "1"}
    assert "ours" in with_ours and "strong-plain-attention-our-allocator" in with_ours
    assert not {"strong", "released", "mae", "ours-system-allocator"} & with_ours
    rows = usual(environment=BY_NAME["ours"].environment)
    assert f"Memory of `ours`: huge pages ({HUGE_PAGES}=1)" in markdown(step.page(record_of(rows)))


def test_what_is_the_same_here_runs_once(monkeypatch):
    # without 16-bit products the released formulation runs in fp32, and there is one row of it
    monkeypatch.setattr("benchmarks.providers.of_config", lambda cfg, device: "fp32")
    able, unable = chosen(["main"], "cpu")
    assert [p.name for p in able if p.family == "released"] == ["released"]
    assert "released-fp32" in unable


def test_the_released_code_must_be_there(tmp_path):
    with pytest.raises(UsageError, match=r"vits\.py is not there"):
        load_modules(tmp_path)
    (tmp_path / "lib").mkdir()
    for file in ("vits.py", "lib/misc.py", "lib/__init__.py"):
        (tmp_path / file).write_text("")
    (tmp_path / "lib/builder.py").write_text("import a_module_that_does_not_exist\n")
    with pytest.raises(UsageError, match="a_module_that_does_not_exist"):
        load_modules(tmp_path)


def test_unknown_names(capsys):
    assert main(["steps"]) == 2 and "'step'" in capsys.readouterr().err
    assert main(["step", "--device", "cpu", "--providers", "our"]) == 2
    assert main([]) == 0 and "kernels" in capsys.readouterr().out


# ---- numbers ----------------------------------------------------------------------------------------


def test_percentiles_and_ratio():
    assert stats.percentiles([3.0, 1.0, 2.0])["p50_ms"] == 2
    assert stats.percentiles([5.0]) == {"p20_ms": 5, "p50_ms": 5, "p80_ms": 5}
    slow, fast = [20.0, 20.2, 19.9, 20.1, 20.0], [10.0, 10.1, 9.9, 10.0, 10.0]
    r = stats.ratio(slow, fast)
    assert r["ratio"] == pytest.approx(2) and r["low"] > 1.9 and r["high"] < 2.1
    assert stats.verdict(r) == "faster" and stats.verdict(stats.ratio(fast, slow)) == "slower"
    assert stats.verdict(stats.ratio(slow, slow)) == "within noise"
    assert stats.verdict(stats.ratio(slow[:2], fast[:2])) == "too few samples"
    wild = [10.0, 30.0, 12.0, 28.0, 11.0, 29.0]
    assert stats.verdict(stats.ratio(wild, wild[::-1])) == "within noise"
    assert stats.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)


def test_growth_sees_what_is_worse_than_linear():
    def rows(axis, times):
        return [{"axis": axis, "value": str(v), "p50_ms": ms} for v, ms in times]

    good = scaling.growth(rows("batch", [(2, 30), (4, 50), (8, 90)]))[0]
    assert good["linear"] and good["exponent"] < 1 and good["marginal"] == [10, 10]
    # falls first, then rises: the smallest value alone would not show it
    bad = scaling.growth(rows("views", [(1, 100), (2, 110), (4, 300)]))[0]
    assert not bad["linear"] and bad["worst"] == pytest.approx(300 / 4 / 55)


def row(name: str, ms: list[float], **more) -> dict:
    provider = BY_NAME[name]
    made = {"key": name, "provider": name, "family": provider.family, "about": "", "precision": "bf16", "batch": 4,
            "options": {}, "samples_ms": ms, "gflops_per_image": 35.0, "first_step_s": 1.0, "first_loss": 2.0,
            "peak_mb": 1000.0, "step_adds_mb": 600.0, "before_first_step_mb": 400.0}  # fmt: skip
    return made | more


def record_of(rows: list[dict], bad: tuple[str, ...] = ()) -> dict:
    rates = {"products_bf16_tflops": 0.5, "copy_gb_per_s": 12.0}
    for r in rows:
        if "samples_ms" in r:
            step.finish(r, rates)
    checks = [{"name": r["provider"], "passed": r["provider"] not in bad, "found": "x"} for r in rows]
    settings = {"device": "cpu", "gflops_per_image": 35.0, "kept": 39, "patches": 196, "views": 5, "drop_path": 0.1,
                "policy": "spatial", "loss": "byol", "warmup": 2, "rounds": 5, "steps_per_turn": 1, "in_turns": True,
                "input_sets": 4}  # fmt: skip
    made = records.new_record(
        "a step",
        "step",
        ["--quick"],
        settings=settings,
        rates=rates,
        gates=checks,
        not_run={"mae": "why"},
        rows=rows,
    )
    return made | {"ratios": step.ratios(made)}


def usual(**ours) -> list[dict]:
    products = {"step_ms": 100.0, "ms": 80.0, "share": 0.8, "gflop": 30.0, "tflops": 0.375, "largest": []}
    return [
        row("released", [200.0, 201, 199, 200, 202], peak_mb=2000.0, step_adds_mb=1500.0),
        row("released-fp32", [400.0, 401, 399, 400, 402], precision="fp32"),
        row("strong", [120.0, 121, 119, 120, 120]),
        row("strong-plain-attention", [110.0, 111, 109, 110, 110]),
        row("ours", [100.0, 101, 99, 100, 100], products=products) | ours,
    ]


def test_ratios_against_the_best_of_each_kind():
    found = {r["other"]: r for r in record_of(usual())["ratios"] if not r.get("memory")}
    assert set(found) == {"released", "released-fp32", "strong-plain-attention"}
    assert found["released"]["ratio"] == pytest.approx(2) and found["released"]["goal"] == 1.3
    # products alone take 80 of our 100 ms
    assert found["released"]["limit"] == pytest.approx(2.5)
    memory_ratio = next(r for r in record_of(usual())["ratios"] if r.get("memory"))
    assert memory_ratio["ratio"] == 0.5 and memory_ratio["adds"] == pytest.approx(0.4)
    text = markdown(step.page(record_of(usual())))
    assert "**2.00x**" in text and "80 % at 75 %" in text and "`mae`: why" in text


@pytest.mark.parametrize("bad", ["ours", "strong-plain-attention"])
def test_no_speed_up_is_told_when_a_check_failed(bad):
    record = record_of(usual(), bad=(bad,))
    told = [r for r in record["ratios"] if not r.get("memory")]
    if bad == "ours":
        assert all("refused" in r for r in told)
        assert not [r for r in record["ratios"] if r.get("memory")]
    else:
        assert [r["other"] for r in told if "refused" in r] == [bad]
    text = markdown(step.page(record))
    assert "**not compared**" in text and "**no**" in text
    if bad == "ours":
        assert "x**" not in text


def test_a_row_that_failed_is_told_and_compared_with_nothing():
    rows = usual()
    rows[0] = {k: v for k, v in rows[0].items() if k != "samples_ms"} | {"error": "out of memory: ViT"}
    record = record_of(rows)
    assert next(r for r in record["ratios"] if r["other"] == "released")["refused"]
    assert "out of memory: ViT" in markdown(step.page(record))


# ---- records ----------------------------------------------------------------------------------------


def test_records_round_trip_and_are_indexed(tmp_path, capsys):
    record = record_of(usual()) | {"headline": "2.00x released", "note": "a note"}
    folder = records.write_record(record, step.page(record), "trial", tmp_path, plots.step)
    assert folder.name == f"{record['date']}_{record['machine']['short']}_trial"
    again = records.read_record(folder)
    assert again == json.loads(records.dumps(record)) == records.read_record(folder / "record.json")
    assert again["rows"][0]["samples_ms"] == [200, 201, 199, 200, 202]
    # lists of numbers take one line
    assert '"samples_ms": [200.0, 201, 199, 200, 202]' in (folder / "record.json").read_text()
    assert "2.00x released; a note" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    assert index_command.main(["--out", str(tmp_path)]) == 0
    assert folder.name in (tmp_path / "README.md").read_text()
    with pytest.raises(UsageError, match="no record there"):
        records.read_record(tmp_path / "nothing")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match="not a record"):
        records.read_record(tmp_path / "x.json")


def test_a_record_says_what_made_it():
    made = records.new_record("w", "step", ["--quick", "--batch", "4"])
    assert made["command"] == "python -m benchmarks step --quick --batch 4"
    assert made["machine"]["versions"]["torch"] == torch.__version__
    assert made["machine"]["memory_gb"] > 0 and made["machine"]["threads"] == torch.get_num_threads()


def test_the_committed_records_are_indexed_and_can_be_compared():
    text = (records.RECORDS / "README.md").read_text(encoding="utf-8")
    for file in sorted(records.RECORDS.glob("*/record.json")):
        assert f"[{file.parent.name}]" in text
        record = records.read_record(file)
        for entry in compare.compared(record, record):
            assert entry.get("verdict") in (None, "within noise", "too few samples")


def test_compare(tmp_path, capsys):
    a, b = record_of(usual()), record_of(usual(samples_ms=[50.0, 50.5, 49.5, 50, 50]), bad=("released",))
    found = {c["name"]: c for c in compare.compared(a, b)}
    assert found["ours"]["ratio"] == pytest.approx(2) and found["ours"]["verdict"] == "faster"
    assert found["strong"]["verdict"] == "within noise"
    assert "ratio" not in found["released"] and found["released"]["refused"]
    files = []
    for name, record in (("a", a), ("b", b | {"settings": a["settings"] | {"rounds": 9}})):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(records.dumps(record))
    assert main(["compare", *map(str, files)]) == 0
    text = capsys.readouterr().out
    assert "**2.000**" in text and "rounds 5 -> 9" in text and "check failed" in text
    assert main(["compare", str(files[0]), str(tmp_path / "none.json")]) == 2
    # an older form of rows: a dictionary of samples, no key
    old = {"rows": [{"dtype": "float32", "n": 39, "samples_ms": {"sdpa": [1.0, 2.0]}}]}
    assert compare.samples(old) == {"float32 39 sdpa": [1.0, 2.0]}


def test_a_slower_machine_is_told():
    a = record_of(usual())
    b = record_of(usual()) | {"rates": {"products_bf16_tflops": 0.4, "copy_gb_per_s": 12.0}}
    b = b | {"machine": b["machine"] | {"cpu": "another"}}
    text = markdown(compare.differences(a, b))
    assert "not equally fast" in text and "Different cpu" in text and "copy" not in text


def test_tables():
    table = Table(["a", "b"], [["1", "2"]])
    assert markdown(["# x", table]) == "# x\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
    assert markdown("as it is") == "as it is"


def test_memory_per_image():
    rows = [row("ours", [1.0], batch=b, peak_mb=500.0 + 30 * b) for b in (2, 4, 8)]
    assert memory.per_image(rows) == {"ours": pytest.approx(30)}
    assert memory.per_image(rows[:1]) == {}


def test_pictures_are_small(tmp_path):
    pytest.importorskip("matplotlib")
    parts = [{"component": "trunk linears", "share": 0.7}, {"component": "loss", "share": 0.01}]
    scale = [
        row("ours", [5.0 * v], axis=axis, value=str(v), p20_ms=4.0 * v, p50_ms=5.0 * v, p80_ms=6.0 * v,
            ms_per_image=1.0, components=parts)
        for axis in ("batch", "views", "masks") for v in (1, 2)
    ]  # fmt: skip
    ops = [{"op": "x", "provider": "ours", "flop_per_byte": 3.0, "tflops": 0.01}]
    rates = {"products_bf16_tflops": 0.5, "copy_gb_per_s": 12.0}
    names = plots.step(record_of(usual()), tmp_path)
    names += plots.scaling({"what": "w", "rows": scale}, tmp_path)
    names += plots.memory({"what": "w", "rows": record_of(usual())["rows"]}, tmp_path)
    names += plots.roofline({"what": "w", "rows": ops, "rates": rates}, tmp_path)
    assert names == ["bars.png", "scaling.png", "parts.png", "memory.png", "roofline.png"]
    for name in names:
        assert 5_000 < (tmp_path / name).stat().st_size < 150_000


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert plots.step(record_of(usual()), tmp_path) == []


# ---- processes --------------------------------------------------------------------------------------


def test_processes_take_turns_and_a_failing_one_leaves():
    cfg = verify.tiny()
    bad = replace(BY_NAME["ours"], name="bad", options={"train.compile": "nonsense"})
    jobs = [processes.Job(p.name, p, cfg, "cpu", threads=1, sets=2) for p in (BY_NAME["strong-eager"], bad)]
    said: list[str] = []
    rows, sampled = processes.measure(
        jobs, rounds=2, steps=1, warmup=2, profile=["strong-eager"], say=said.append
    )
    good, lost = rows
    assert len(good["samples_ms"]) == 2 and min(good["samples_ms"]) > 0
    assert good["peak_mb"] >= good["before_first_step_mb"] > 50
    assert 0 < good["products"]["share"] < 1 and good["products"]["gflop"] > 0
    assert "nonsense" in lost["error"] and "samples_ms" not in lost
    assert sampled == [] and any("round 2/2 strong-eager" in s for s in said)
    with pytest.raises(UsageError, match="--warmup"):
        processes.measure(jobs, rounds=1, steps=1, warmup=1)


def test_a_process_that_dies_or_hangs_is_told():
    with processes.Worker() as worker:
        with pytest.raises(processes.WorkerError, match="no_such_request"):
            worker("no_such_request")
        worker.process.kill()
        with pytest.raises(processes.WorkerError, match="killed") as caught:
            worker("turn", warm=0, steps=1)
        assert caught.value.out_of_memory
    with processes.Worker(patience=0.01) as worker, pytest.raises(processes.WorkerError, match="no answer"):
        worker("rates", device="cpu", precisions=["fp32"], threads=1)


def test_given_coins_are_the_products():
    cfg = verify.tiny(batch=3)
    inputs = gates.with_coins(gates.random_images(cfg, 2, CPU)[1], cfg, CPU)
    assert isinstance(inputs, Inputs) and inputs.index.tolist() == [3, 4, 5]
    assert inputs.keep.shape == (5, 3, cfg.num_keep) and inputs.scale.shape == (2, 2, 15)
