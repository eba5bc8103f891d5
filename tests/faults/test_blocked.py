"""Files that block or never end: pipes, endless devices, sockets and folders in the place of each file.

Covers: images, manifests, lists, mixtures, tars and their indexes, configurations, weights, and the files of run,
features and packed folders. Each command ends with a documented exit code within a time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from extrema_fast.config import to_dict

CODES = (0, 2, 3, 4, 5, 75)
# a process that hangs ends with another code
LIMIT = "import os, threading\nt = threading.Timer(LIMIT_S, os._exit, [99])\nt.daemon = True\nt.start()"
LIMIT_S = 30


def make_socket(path: Path) -> None:
    # its address is short; the file stays
    with socket.socket(socket.AF_UNIX) as s:
        here = os.open(path.parent, os.O_RDONLY)
        s.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "socket": make_socket,
    "folder": os.mkdir,
    "pipe behind a link": lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")),
}
# file -> the commands that read it; {root} is where everything is
PRETRAIN = "pretrain --config {root}/c.json --out {root}/new --quiet"
EMBED = "embed {root}/%s {root}/new --weights {root}/run --loader pil --device cpu --quiet"
INDEX = "index {root}/images --out {root}/i.tsv"
SEARCH = "search {root}/images/ape/02.png {root}/features"
CONTINUE = "pretrain --config {root}/run.json --out {root}/run --quiet --allow-config-change"
FILES = {
    "images/ape/00.png": (
        PRETRAIN,
        "pack {root}/images {root}/p --quiet",
        EMBED % "images",
        "index {root}/images --out {root}/i.tsv",
    ),
    "m.tsv": (
        PRETRAIN + " --data.train {root}/m.tsv",
        EMBED % "m.tsv",
        "index {root}/images --out {root}/m.tsv",
    ),
    "list.txt": (PRETRAIN + " --data.train {root}/list.txt", "pack {root}/list.txt {root}/p --quiet"),
    "mix.toml": (PRETRAIN + " --data.train {root}/mix.toml",),
    "shards/a.tar": (PRETRAIN + " --data.train {root}/shards", EMBED % "shards"),
    "shards/a.idx": (PRETRAIN + " --data.train {root}/shards", EMBED % "shards/a.tar"),
    "packed/manifest.tsv": (EMBED % "packed",),
    "c.json": (PRETRAIN,),
    "encoder.pth": (
        "import {root}/encoder.pth {root}/w --num-heads 2",
        PRETRAIN + " --init-from {root}/encoder.pth",
    ),
    "run/config.json": ("report {root}/run --images 0", "evaluate {root}/run --device cpu"),
    "run/log.jsonl": ("report {root}/run --images 0",),
    "run/env.json": ("report {root}/run --images 0",),
    "run/reports/evaluation.json": ("report {root}/run --images 0", "evaluate {root}/run --device cpu"),
    "run/weights/step_00000004/config.json": ("export {root}/run {root}/x",),
    "run/weights/step_00000004/teacher.safetensors": ("export {root}/run {root}/x",),
    "run/checkpoints/step_00000004/state.safetensors": (
        "pretrain --config {root}/run.json --out {root}/run --quiet",
    ),
    "run/checkpoints/step_00000004/COMPLETE": (CONTINUE,),
    "run/status.json": (CONTINUE,),
    "run/run.lock": (CONTINUE,),
    "features/config.json": (
        SEARCH,
        EMBED.replace("new", "features") % "images",
    ),
    "features/rows.tsv": (SEARCH,),
    "features/features/00000.npy": (SEARCH,),
}


def test_files_that_block(originals, run_cli, tries, tmp_path):
    cases = [(f, c, k) for f, cs in FILES.items() for c in cs for k in KINDS]
    if tries.factor == 1:
        cases = [cases[i] for i in tries.rng.permutation(len(cases))[:2]]
    for file, command, kind in cases:
        s = originals.copy(tmp_path / "s")
        images = {"train": str(s.images), "test": str(s.images)}
        (s.root / "c.json").write_text(json.dumps(to_dict(s.config(data=images, ckpt={"every_steps": 0}))))
        same = {"train": str(originals.images), "test": str(originals.images)}
        longer = to_dict(s.config(data=same, train={"epochs": 2}))
        (s.root / "run.json").write_text(json.dumps(longer))
        paths = sorted(p for p in s.images.rglob("*.png"))
        (s.root / "list.txt").write_text("".join(f"{p}\t{p.parent.name}\n" for p in paths))
        (s.root / "mix.toml").write_text(f"[[source]]\npath = '{s.images}'\n")
        place = s.root / file
        place.unlink(missing_ok=True)
        KINDS[kind](place)
        args = command.format(root=s.root).split(" ")
        codes, text = run_cli(*args, setup=LIMIT.replace("LIMIT_S", str(LIMIT_S)))
        held = codes[0] in CODES and "Traceback" not in text
        tries.expect(f"{kind} for {file}: {args[0]}", held, f"exit code {codes[0]}: {text[-500:]}")
        shutil.rmtree(s.root)
