"""Processes of a run that do not fit together: one error that names the process, and all leave with its exit code.

Covers: world size, versions, code, settings, weights to start from, images missing on one node, other images, images
replaced in place, a run folder that is not shared; clocks that are apart are a warning; a GPU of two processes; random
weights that differ.
"""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from extrema_fast import __version__, distributed
from extrema_fast.config import to_dict
from extrema_fast.errors import UsageError
from tests.training.conftest import tiny

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: train)")

# process 1 is on another node, whose current folder is another one; `more(...)` adds to its command line
NODE = """
import os, torch
from extrema_fast import cli, distributed, train
rank, node = os.environ["RANK"], os.environ["NODE"]
distributed.socket.gethostname = lambda: f"node{rank}"
os.chdir(f"{node}{rank}")
def more(*words):
    main = cli.main
    cli.main = lambda args: main([*args, *words])
wrap, share = train.wrap, distributed.World.share
def told(run):
    print("begins with", sum(float(p.detach().double().sum()) for p in run.method.parameters()), flush=True)
    return wrap(run)
train.wrap = told
def moved(world, tensors):
    tensors = [x.add_(1) for x in tensors]
    share(world, tensors)
if rank == "1":
    CHANGE
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Folders `node0` and `node1` with the same images; the run's file is beside them."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "node0/images").mkdir(parents=True)
    for i in range(9):
        Image.effect_noise((32, 32), 20 + i).convert("RGB").save(folder / f"node0/images/{i}.png")
    for other in ("node1", "fewer1", "replaced1", "node2"):
        shutil.copytree(folder / "node0", folder / other)
    (folder / "fewer1/images/3.png").unlink()
    replaced = folder / "replaced1/images/3.png"
    replaced.write_bytes(replaced.read_bytes()[:-1] + b"x")
    (folder / "empty1").mkdir()
    for other in ("fewer0", "replaced0", "empty0"):
        (folder / other).symlink_to("node0")
    cfg = to_dict(tiny("run", data={"train": "images"}, ckpt={"every_steps": 1}))
    (folder / "run.json").write_text(json.dumps(cfg))
    return folder


@pytest.fixture
def pretrain(nodes, run_cli):
    def run(change: str, *flags: str, node: str = "node", processes: int = 2):
        setup = NODE.replace("CHANGE", change)
        command = ("pretrain", "smoke", "--config", nodes / "run.json", *flags)
        return run_cli(*command, processes=processes, setup=setup, env={"NODE": str(nodes / node), "RANK": "0"})

    return run


@pytest.mark.parametrize(
    ("change", "node", "words"),
    [
        ("os.environ['WORLD_SIZE'] = '3'", "node", "WORLD_SIZE is 3 for process 1 on node1, 2 for process 0"),
        ("torch.__version__ = '1.0'", "node", "torch is 1.0 for process 1 on node1"),
        ("distributed._code = lambda: 'old'", "node", "extrema_fast is 0.1.0, old for process 1 on node1"),
        ("more('--train.seed', '7')", "node", "settings differ: train.seed is 7 for process 1 on node1, 0 for"),
        ("more('--init-from', 'x')", "node", "settings differ: --init-from is x for process 1 on node1"),
        ("pass", "empty", "or a mixture (.toml) (process 1 on node1)"),
        ("pass", "fewer", "data.train: images is 8 for process 1 on node1, 9 for process 0 on node0"),
        ("pass", "replaced", "data.train: sample.images/3.png is "),
    ],
)
def test_one_error_and_one_exit_code(pretrain, nodes, change, node, words):
    codes, text = pretrain(change, node=node)
    assert codes == [2, 2] and words in text, text
    # process 0 tells it, in a line
    assert text.count("error:") == 1 and "Traceback" not in text
    assert not (nodes / "node0/run").exists()


def test_a_run_folder_that_is_not_shared(pretrain, nodes):
    late = "import time; t = time.time; time.time = lambda: t() - 60; distributed.World.share = moved"
    codes, text = pretrain(late)
    assert codes == [0, 0], text
    assert text.count("the clock of node1 is 60 s behind that of node0") == 1
    begins = [line for line in text.splitlines() if line.startswith("begins with")]
    assert len(begins) == 2 and len(set(begins)) == 1, text
    longer = ("--train.epochs", "3", "--allow-config-change")
    words = "run/checkpoints/step_00000002: state.safetensors.size is None for process 1 on node1"
    spread = "this one cannot write where process 0 on node0 does ("
    for flags, told in (((), words), (("--system.parallel", "fsdp"), spread)):
        codes, text = pretrain("pass", *longer, *flags)
        assert codes == [2, 2] and told in text and "put --out on a disk that all nodes share" in text, text
    assert not [*(nodes / "node0/run").glob(".tmp-*")]
    shutil.copytree(nodes / "node0/run", nodes / "node1/run")
    codes, text = pretrain("pass", *longer)
    assert codes == [0, 0] and "continuing at step 2 of 3" in text, text


@pytest.mark.parametrize("other", ["a", "b"])
def test_a_gpu_of_two_processes(monkeypatch, other):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    store, device = torch.distributed.HashStore(), torch.device("cuda", 0)
    about = {"WORLD_SIZE": 2, "torch": torch.__version__, "extrema_fast": f"{__version__}, {distributed._code()}"}
    store.set("about/1", json.dumps([about, socket.gethostname(), other]))
    store.set("time/1", "0")
    expected = pytest.raises(UsageError, match=r"^system\.device: processes 0 and 1 share GPU a")
    with expected if other == "a" else nullcontext():
        distributed._check_alike(store, 0, 2, device)
