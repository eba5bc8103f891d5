"""Values, checkpoints, clocks and images that go wrong under a run: named, nothing lost, continued to the same bits.

Covers: NaN and infinities in weights of student and teacher, in gradients of one step and of all, in the pixels of
files; `replay` names the module of each; the newest checkpoint damaged in seven ways; a clock set back, while a run
goes on and between two starts; an image deleted, replaced or added between two starts, or a byte of one changed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from extrema_fast import train
from extrema_fast.config import to_dict
from extrema_fast.distributed import World
from extrema_fast.errors import NonFiniteError
from extrema_fast.files import history
from extrema_fast.tools.replay import replay
from extrema_fast.training.capture import captured, read
from extrema_fast.training.run import build, open_train
from tests.training.conftest import final_hash
from tests.training.test_checkpoint import DAMAGES

STEPS = 8
VALUES = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module")
def things(originals, tmp_path_factory):
    """Images of its own, and a run of 8 steps over them that nothing happened to."""
    s = originals.copy(tmp_path_factory.mktemp("values") / "things")
    cfg = config(s, "straight")
    train.pretrain(cfg, progress=False)
    return s


def config(s, name: str):
    images = str(s.images)
    change = {"data": {"train": images, "test": images}, "train": {"epochs": 2}, "ckpt": {"every_steps": 3}}
    return s.config(out=str(s.root / name), eval={"every_epochs": 0}, **change)


def straight(s) -> str:
    return final_hash(s.root / "straight", STEPS)


def names_of(s) -> list[str]:
    """Parameters of student and teacher."""
    cfg = config(s, "unused")
    run = build(cfg, World(torch.device("cpu")), open_train(cfg))
    return [n for n, _ in run.method.named_parameters()]


def spoil(patch: pytest.MonkeyPatch, step: int, count: int, name: str, value: float, gradient: bool) -> None:
    """Puts a value into a parameter, or into its gradient, at `count` steps from one on."""
    original = train.train_step

    def spoiled(run, batch):
        p, hook = dict(run.method.named_parameters())[name], None
        if step <= run.step < step + count:
            at = (step * 7919) % p.numel()
            if gradient:

                def in_gradient(grad):
                    grad = grad.clone(memory_format=torch.contiguous_format)
                    grad.view(-1)[at] = value
                    return grad

                hook = p.register_hook(in_gradient)
            elif run.step == step:
                with torch.no_grad():
                    p.view(-1)[at] = value
        stats = original(run, batch)
        if hook is not None:
            hook.remove()
        return stats

    patch.setattr(train, "train_step", spoiled)


def test_weights_and_gradients(things, tries, monkeypatch):
    s, names = things, names_of(things)
    student = [n for n in names if n.startswith("student")]
    for i in range(2 * tries.factor):
        gradient = bool(i % 2)
        among = student if gradient else names
        name, value = among[tries.rng.integers(len(among))], VALUES[tries.rng.integers(3)]
        step, out = int(tries.rng.integers(0, 5)), s.root / f"spoiled{i}"
        what = f"{value} in {'the gradient of ' * gradient}{name} from step {step + 1} on"
        with monkeypatch.context() as patch:
            spoil(patch, step, STEPS, name, value, gradient)
            text = ""
            try:
                train.pretrain(config(s, out.name), progress=False)
            except NonFiniteError as error:
                text = str(error)
        kept = captured(out)
        tries.expect(
            f"{what}: said", f"extrema-fast replay {out}" in text and list(kept) == [step + 1], text or kept
        )
        if gradient:
            found = read(kept[step + 1]).state["first_gradients"]
            tries.expect(f"{what}: its gradient", name.removeprefix("student_branch.") in found, found)
        else:
            first = replay(out)["first"]
            owner = name.rpartition(".")[0]
            # what is no module's own input is found where it is read
            held = first is not None and f"{owner}.".startswith(f"{first['module']}.")
            tries.expect(f"{what}: its module", held, first)
        train.pretrain(config(s, out.name), progress=False)
        tries.expect(f"{what}: continued to the same bits", final_hash(out, STEPS) == straight(s))


def test_a_gradient_of_one_step(things, tries, monkeypatch):
    s, names = things, [n for n in names_of(things) if n.startswith("student")]
    for i in range(tries.factor):
        name, step = names[tries.rng.integers(len(names))], int(tries.rng.integers(0, STEPS))
        with monkeypatch.context() as patch:
            spoil(patch, step, 1, name, VALUES[tries.rng.integers(3)], True)
            out = train.pretrain(config(s, f"one{i}"), progress=False)
        records = history(out / "log.jsonl", "train", STEPS)
        told = [r["step"] for r in records if r["skipped"]]
        tries.expect(f"{name} at step {step + 1}", told == list(range(step + 1, STEPS + 1)), told)
        held = list(captured(out)) == [step + 1] and replay(out)["first"] is None
        tries.expect(f"{name} at step {step + 1}: kept, and finite without the fault", held, captured(out))


def test_pixels(tries, tmp_path, originals):
    for i in range(tries.factor):
        folder = tmp_path / f"floats{i}"
        for n in range(8):
            pixels = tries.rng.random((24, 30, 3)).astype(np.float32)
            hit = tries.rng.random(pixels.shape) < 0.2
            pixels[hit] = tries.rng.choice(VALUES, int(hit.sum()))
            (folder / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
            np.save(folder / "ab"[n % 2] / f"{n}.npy", pixels)
        data = {"train": str(folder), "test": "", "range": [0.0, 1.0]}
        cfg = originals.config(out=str(tmp_path / f"run{i}"), data=data, eval={"every_epochs": 0})
        out = train.pretrain(cfg, progress=False)
        last = history(out / "log.jsonl", "train", 9)[-1]
        held = last["skipped"] == 0 and last["bad_images"] == 0 and math.isfinite(last["loss"])
        tries.expect("a fifth of the values not finite", held, last)


@pytest.fixture
def pretrain(things, run_cli):
    """`pretrain(name, ...)` -> (exit codes, output, run folder)."""

    def run(name: str, *flags: str, **options):
        cfg = config(things, name)
        (things.root / "c.json").write_text(json.dumps(to_dict(cfg)))
        return *run_cli("pretrain", "--config", things.root / "c.json", *flags, **options), Path(cfg.out)

    return run


def ends_like(tries, what: str, codes: list[int], text: str, out: Path, wanted: str) -> None:
    same = codes == [0] and final_hash(out, STEPS) == wanted
    tries.expect(f"{what}: the same bits", same, f"exit codes {codes}: {text[-500:]}")


DEAD = {"env": {"EXTREMA_FAULT": "renamed:2"}}


def test_the_newest_checkpoint_is_damaged(full_table, things, tries, pretrain):
    seven = [how for how in DAMAGES if how != "not finite"]
    for how in seven:
        name = f"damaged {how}"
        codes, text, out = pretrain(name, **DEAD)
        tries.expect(f"{how}: killed", codes == [-9], text[-500:])
        DAMAGES[how](out / "checkpoints" / "step_00000006")
        codes, text, out = pretrain(name)
        tries.expect(
            f"{how}: told", "falling back to checkpoint" in text and "step_00000003" in text, text[-500:]
        )
        ends_like(tries, how, codes, text, out, straight(things))


# every clock of Python but the monotonic one, hours behind from the third step on
BACK = """
import time
from extrema_fast import train
original, real = train.train_step, time.time
def step(run, batch):
    if run.step == 3:
        time.time = lambda: real() - 36000
    return original(run, batch)
train.train_step = step
"""


def test_a_clock_set_back(things, tries, pretrain):
    codes, text, out = pretrain("clock", setup=BACK)
    ends_like(tries, "while the run goes on", codes, text, out, straight(things))
    if tries.factor > 1:
        codes, text, out = pretrain("clock between", **DEAD)
        for path in out.rglob("*"):
            if path.is_file():
                # what the first start has written is of the future
                os.utime(path, (2e9, 2e9))
        codes, text, out = pretrain("clock between")
        ends_like(tries, "between two starts", codes, text, out, straight(things))


def deleted(file: Path) -> None:
    file.unlink()


def replaced(file: Path) -> None:
    """Another image that can be decoded, of as many bytes."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    size, image = file.stat().st_size, Image.new("RGB", Image.open(file).size, "gray")
    for pad in (1, 0):
        info = PngInfo()
        # not compressed
        info.add_text("pad", "x" * (pad or 1 + size - file.stat().st_size))
        image.save(file, pnginfo=info)
    assert file.stat().st_size == size


def added(file: Path) -> None:
    (file.parent / "new.png").write_bytes(file.read_bytes())


def test_images_change_between_two_starts(full_table, things, tries, pretrain):
    ways = {"deleted": deleted, "replaced in place": replaced, "added": added}
    files = sorted(things.images.rglob("*.png"))
    for what in ways:
        name = f"images {what}"
        pretrain(name, **DEAD)
        file = files[tries.rng.integers(len(files))]
        before = file.read_bytes()
        ways[what](file)
        codes, text, out = pretrain(name)
        tries.expect(f"{what}: refused", refused(codes, text), f"exit codes {codes}: {text[-500:]}")
        file.write_bytes(before)
        (file.parent / "new.png").unlink(missing_ok=True)
        codes, text, out = pretrain(name)
        ends_like(tries, f"{what}, then as they were", codes, text, out, straight(things))


def test_a_byte_changes_between_two_starts(full_table, things, tries, pretrain):
    """What can still be decoded is another image; what cannot is replaced by another one, if its turn comes."""
    files = sorted(things.images.rglob("*.png"))
    for n in range(3 * tries.factor):
        name, file = f"byte {n}", files[tries.rng.integers(len(files))]
        pretrain(name, **DEAD)
        before = file.read_bytes()
        data, at = bytearray(before), tries.rng.integers(len(before))
        data[at] ^= int(tries.rng.integers(1, 256))
        file.write_bytes(data)
        codes, text, out = pretrain(name)
        file.write_bytes(before)
        held = refused(codes, text) or f"left out from now on: {file}" in text
        held = held or (codes == [0] and final_hash(out, STEPS) == straight(things))
        tries.expect(f"byte {at} of {file.name}", held, f"exit codes {codes}: {text[-500:]}")


def refused(codes: list[int], text: str) -> bool:
    return codes == [2] and text.count("error:") == 1 and "other images" in text
