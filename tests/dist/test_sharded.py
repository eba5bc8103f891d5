"""Weights spread over processes (FSDP2), and DistributedDataParallel, over gloo against one process.

Covers: gradients, norm and clipping of two and of four equal those of one with the whole batch, in fp64, compiled too;
what a part holds; a bad loss on one rank; whole runs equal to rounding, weights as usual; checkpoints in parts read by
one, two and four processes, with shards and without, continued bit for bit; a signal to one process, its death in a save; what
cannot be sharded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import extrema_fast
from extrema_fast.config import to_dict
from extrema_fast.errors import UsageError
from extrema_fast.training.resolve import resolve
from tests.dist.test_two_processes import RUN, STEPS, STOP_ONE, assert_close
from tests.training.conftest import command, final_hash, tiny

__all__ = ["command"]

# one batch in fp64 on all processes and on one
STEP = """
import json, os
import torch
from extrema_fast.config import from_dict, smoke
from extrema_fast.distributed import World, local, start, whole
from extrema_fast.models.extrema import alone
from extrema_fast.training import run as runs, step
from extrema_fast.training.draw import MicroBatch
step.BACKEND = "eager"

ours = from_dict(json.loads(os.environ["CONFIG"]), smoke())
B, V, N, K = ours.train.batch_size, ours.mask.views, ours.model.num_patches, ours.num_keep
g = torch.Generator().manual_seed(3)
patches = torch.randn(B, N, 3 * ours.model.patch_size**2, generator=g, dtype=torch.float64)
keep = torch.stack([torch.stack([torch.randperm(N, generator=g)[:K] for _ in range(B)]) for _ in range(V)])
kept = lambda run, m: (torch.cat([torch.stack([x[k] for x, k in zip(m.images, some)]) for some in m.keep]), m.images)
step.color_views = kept

def begin(world, **system):
    parts = ours.train.accumulation if world.size > 1 else 1
    cfg = from_dict({"system": system, "train": {"accumulation": parts, "compile": "none"}}, ours)
    if system.get("parallel") == "fsdp" and world.size == 2:
        cfg = from_dict({"train": {"compile": "block"}}, cfg)
    run = runs.build(cfg, world, runs.open_train(cfg))
    run.method.double()
    runs.shard(run)
    run.followed = run.method.ema_pairs()
    step.wrap(run)
    size = B // world.size // parts
    first = range(B)[world.rank * B // world.size:][:B // world.size:size]
    micro = [MicroBatch(patches[i : i + size], None, keep[:, i : i + size], None) for i in first]
    return run, micro

def gradients(run, micro):
    step.compute(run, micro)
    found = {n: whole(p.grad) for n, p in run.method.student_parameters()}
    return found, run.counters.read().values()

with start("cpu") as world:
    found = {}
    for parallel in ("fsdp", "ddp"):
        run, micro = begin(world, parallel=parallel)
        held = sum(local(p).numel() for p in run.method.parameters())
        found[parallel] = gradients(run, micro), held / sum(p.numel() for p in run.method.parameters())
        if parallel == "fsdp":
            before = [local(t).clone() for t in run.method.state_dict().values()]
            if world.rank == 1:
                loss = run.method.loss
                run.method.loss = lambda *args: loss(*args) * float("nan")
            step.compute(run, micro)
            after = [local(t) for t in run.method.state_dict().values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after)) and run.counters.in_a_row() == 1
    for saved, parallel in json.loads(os.environ["SAVED"]):
        # of another number of processes
        cfg = from_dict({"out": saved, "system": {"parallel": parallel}}, ours)
        run = runs.build(cfg, world, runs.open_train(cfg), continued=True)
        runs.shard(run)
        runs.resume(run, True)
        again = runs.collect(run.method, run.optimizer, run.counters.tensor)
        saved = runs.newest(runs.Path(cfg.out)).tensors()
        assert saved.keys() == again.keys() and all(torch.equal(saved[n], whole(again[n])) for n in saved)
    if world.is_rank_zero:
        step.gather_targets = lambda own: (own, 0)
        with alone():
            wanted, values = gradients(*begin(World(world.device)))
        size = max(t.abs().max() for t in wanted.values())
        for parallel, ((grads, mine), share) in found.items():
            assert grads.keys() == wanted.keys()
            worst = max((grads[n] - wanted[n]).abs().max() / size for n in wanted)
            differ = max(abs(mine[k] / values[k] - 1) for k in ("loss", "grad_norm"))
            print("RESULT", json.dumps([parallel, float(worst), differ, mine["grad_norm"] / float(size), share]))
"""


def steps(run_cli, processes: int, saved: Sequence[tuple[Path, str]] = (), **head) -> None:
    # clipped, so that the share of each process is scaled by the norm of all
    change = {"model": {"drop_path": 0.0}, "optim": {"clip_grad": 1e-3}, "head": head}
    cfg = tiny("unused", RUN, change, FSDP, train={"accumulation": processes // 2})
    env = {"CONFIG": json.dumps(to_dict(cfg)), "SAVED": json.dumps([[str(path), parallel] for path, parallel in saved])}
    codes, text = run_cli("--version", processes=processes, setup=STEP, env=env)
    assert codes == [0] * processes, text
    results = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
    assert [r[0] for r in results] == ["fsdp", "ddp"], text
    for parallel, worst, differ, norm, share in results:
        # the loss is summed in fp32
        assert worst < 1e-10 and differ < 1e-6 and norm > 1e3, (parallel, text)
        assert share == pytest.approx(1 / processes if parallel == "fsdp" else 1, rel=0.01)


# 6 rows are spread over four processes as 2, 2, 2, 0
FSDP = {"system": {"parallel": "fsdp", "device": "cpu"}, "head": {"out": 6}}


@pytest.fixture
def pretrain(command, tmp_path):
    """`pretrain(folder, processes, *flags, ...)` -> (exit codes, its output, the folder)."""

    def run(name: str, processes: int, *flags: str, **options):
        # an evaluation at both ends
        return *command(tiny(tmp_path / name, RUN, FSDP), *flags, processes=processes, **options), tmp_path / name

    return run


def go_back(run: Path, step: int) -> None:
    """A run as if it had been killed after a step."""
    for folder in run.glob("checkpoints/step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def test_two_equal_one(run_cli):
    steps(run_cli, 2, decorrelation=0.3, norm="batch")


LEAVES = "from extrema_fast.training import checkpoint\ncheckpoint.LEAVE_S = 0.2\n"


def test_runs_saved_in_parts_and_read_by_others(pretrain, run_cli, tmp_path):
    (codes, text, one), (codes2, text2, two) = pretrain("one", 1), pretrain("two", 2)
    assert codes == [0] and codes2 == [0, 0], text + text2
    assert_close(one, two)
    parts = [f"step_{step:08d}/state-0000{n}-of-00002.safetensors" for step in (4, STEPS) for n in (1, 2)]
    files = two.glob("checkpoints/*/state-*")
    assert sorted(str(p.relative_to(two / "checkpoints")) for p in files) == parts
    env = [json.loads((run / "env.json").read_text())["resolved"]["sharded"] for run in (one, two)]
    assert env == [False, True] and not [*one.glob("checkpoints/*/state-*")]
    weights = [extrema_fast.load_encoder(run).state_dict() for run in (one, two)]
    for name, w in weights[0].items():
        torch.testing.assert_close(weights[1][name], w, rtol=1e-4, atol=1e-6, msg=name)
    # parts and one file, by four that spread them or not
    steps(run_cli, 4, [(two, "fsdp"), (two, "ddp"), (one, "fsdp")], loss="infonce")
    ended = final_hash(two, STEPS)
    go_back(two, 4)
    shutil.copytree(two, tmp_path / "alone")
    for name, processes in (("alone", 1), ("two", 2)):
        codes, text, out = pretrain(name, processes)
        assert codes == [0] * processes and "continuing at step 4 of 6" in text, text
        assert_close(one, out)
    assert final_hash(two, STEPS) == ended

    # a signal to process 1; its death in a save; then to the same end
    codes, text, out = pretrain("run", 2, setup=STOP_ONE)
    assert codes == [75, 75] and len([*out.glob("checkpoints/step_00000003/state-*")]) == 2, text
    codes, text, out = pretrain("run", 2, setup=LEAVES, env=[{}, {"EXTREMA_FAULT": "tensors:1"}])
    assert codes == [6, -9] and "not saved: the weights were spread over" in text, text
    assert {p.name for p in out.glob("checkpoints/step_*")} == {"step_00000002", "step_00000003"}
    codes, text, out = pretrain("run", 2)
    assert codes == [0, 0] and "continuing at step 3 of 6" in text, text
    assert final_hash(out, STEPS) == ended and not [*out.glob("*/.tmp-*")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"name": "lars"}}, "optim.name: lars"),
        ({"train": {"fp8": "teacher"}}, "train.fp8: teacher"),
        ({"train": {"compile": "step"}}, "use train.compile block"),
    ],
)
def test_what_cannot_be_sharded(change, words):
    with pytest.raises(UsageError, match=words):
        resolve(tiny("unused", FSDP, change), torch.device("cpu"), world_size=2)
