"""The arithmetic of many GPUs: bytes on the wire of real processes, and what times and tables follow from them.

Covers: what each of four processes (DDP) and of two (FSDP2) sends in a step, by the counters of their sockets, against
the formulas; nothing is hidden without computing and nothing waits on an endless network; efficiency falls with more
GPUs; a record with its tables; options that make no sense.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import cluster
from benchmarks.cluster import MODELS, WAYS, Hardware, Size, count, sent, step
from extrema_fast.config import to_dict
from extrema_fast.errors import UsageError
from tests.training.conftest import tiny

# bytes that this process has given to the kernel (tcpi_bytes_sent), over steps 3 to 6
COUNT = """
import os, socket, struct
from extrema_fast import train
original = train.train_step
def given():
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as s:
                if s.type == socket.SOCK_STREAM and s.family in (socket.AF_INET, socket.AF_INET6):
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
        except OSError:
            continue
    return total
def counted(run, batch):
    if run.step == 2:
        run.given = given()
    stats = original(run, batch)
    if run.step == 5:
        both = run.method.student_branch, run.method.teacher_branch, run.method.student.blocks
        sizes = [sum(p.numel() for p in part.parameters()) for part in both]
        print("counted", *sizes, (given() - run.given) / 4, flush=True)
    return stats
train.train_step = counted
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sockets that count, on Linux")
@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 4), ("fsdp", 2)])
def test_bytes_on_the_wire(run_cli, tmp_path, parallel, processes):
    file = tmp_path / "config.json"
    model, head = {"width": 64, "depth": 4}, {"hidden": 256, "out": 64, "predictor_hidden": 256}
    file.write_text(json.dumps(to_dict(tiny(tmp_path / "run", model=model, head=head, train={"epochs": 2}))))
    words = ("--config", file, "--system.parallel", parallel)
    codes, text = run_cli("pretrain", "smoke", *words, processes=processes, setup=COUNT)
    assert codes == [0] * processes, text
    found = [tuple(map(float, line)) for line in re.findall(r"counted (\d+) (\d+) (\d+) (\S+)", text)]
    assert len(found) == processes
    for student, teacher, trunk, given in found:
        size = Size(int(student), int(teacher), int(trunk), 1, 0)
        if parallel == "ddp":
            expected = sent(*WAYS["ddp fp32"], size, processes)
        else:
            # in fp32 on a CPU; gloo's reduce-scatter sends as much as its all-reduce, twice what a ring needs
            expected = sent(4, 4, size, processes) + 4 * student * (processes - 1) / processes
        assert given == pytest.approx(expected, rel=0.02)


SIZE = Size(100_000_000, 90_000_000, 80_000_000, 12, 35e9)
MACHINE = Hardware(0.4, 1, 50e9, 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_what_hides_sending(way):
    pieces = 4 if way.startswith("ddp") else SIZE.depth
    alone, covered = step(way, SIZE, 64, 1e-9, MACHINE), step(way, SIZE, 64, 1e9, MACHINE)
    assert alone["waiting"] == pytest.approx(alone["sending"]) == pytest.approx(covered["sending"])
    assert covered["waiting"] == pytest.approx(covered["sending"] / pieces)
    # a port of 50 GB/s is the narrowest
    assert alone["sending"] == pytest.approx(sent(*WAYS[way], SIZE, 64) / 50e9)


def test_what_shards_send():
    # of a block: gathered in bf16 for three passes, its gradient in fp32; of the rest in fp32 once for each network
    assert sent(2, 4, Size(110, 105, 100, 1, 0), 2) == (3 * 2 * 100 + 4 * 10 + 4 * 5 + 4 * 110) / 2


def test_more_gpus_for_the_same_batch_compute_less_of_the_time(tmp_path):
    assert cluster.main(["--out", str(tmp_path), "--images", "32"]) == 0
    (record,) = tmp_path.glob("*_cluster/record.json")
    rows = json.loads(record.read_text())["rows"]
    for model in MODELS:
        for way in WAYS:
            found = [
                r for r in rows if (r["model"], r["way"], r["ports"], r["fixed"]) == (model, way, 1, True)
            ]
            shares = [r["efficiency"] for r in found]
            assert (
                len(shares) == 7 and shares == sorted(shares, reverse=True) and shares[-1] < 0.5 < shares[0]
            )
    page = record.with_name("README.md").read_text()
    assert "Nothing here was measured on a GPU" in page and page.count("| giant/14, fsdp bf16 |") == 6


WIDTHS = {"base/16": (768, 4), "large/16": (1024, 4), "huge/14": (1280, 4), "giant/14": (1536, 4)}


def test_models():
    # the published sizes of the trunks, in millions; then pooling and heads
    for (name, model), trunk in zip(MODELS.items(), (86, 304, 632, 1135), strict=True):
        size, width, ratio = count(model), *WIDTHS[name]
        pooling, heads = 2 * (4 + 2 * ratio) * width**2, 4096 * (width + 4096 + 3 * 256)
        assert size.student == pytest.approx(1e6 * trunk + pooling + heads, rel=0.01)
        assert size.trunk == pytest.approx(1e6 * trunk, rel=0.02)
        # the predictor, which the teacher has not
        assert size.student - size.teacher == pytest.approx(2 * 256 * 4096, rel=0.01)


@pytest.mark.parametrize(
    "words", ["--batch 0", "--batch 63", "--utilization 1.5", "--ports 0", "--latency -1"]
)
def test_options(words):
    with pytest.raises(UsageError, match=words.split()[0]):
        cluster.main(words.split())
