"""Files of every kind that is read, forged and mutated: an error in a line, or a result; never a traceback.

Covers: descriptions, logs, tables, tensors and configurations of run, weights, features and packed folders, manifests,
lists, mixtures, tars and their indexes; values of other types, sizes beyond 64 bits, deep nesting, long dotted keys,
broken UTF-8, NUL, cut files, flipped bytes; well-formed checkpoints and weights with other tensors and valid sums;
memory that a few bytes claim.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from extrema_fast import train
from extrema_fast.config import from_dict, read_config
from extrema_fast.data.sources import open_source
from extrema_fast.distributed import World
from extrema_fast.errors import StorageError, UsageError
from extrema_fast.evaluation import evaluate as evals
from extrema_fast.evaluation.result import format_table
from extrema_fast.files import history
from extrema_fast.reporting import report as pages
from extrema_fast.reporting.figures import Series
from extrema_fast.reporting.report import report
from extrema_fast.tools.embeddings import load_embeddings
from extrema_fast.training.checkpoint import collect, newest, not_finite
from extrema_fast.training.run import build, init_weights, is_finished, open_train, resume
from extrema_fast.training.run_folder import RunFolder
from extrema_fast.training.step import update
from extrema_fast.weights.load import load_encoder
from tests.faults.test_links import snapshot
from tests.training.conftest import final_hash

# ---- mutations ------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, -1e308, 1e-320, float("inf"), float("nan"),
    "", "x", "\0", "\ud800", "\x1b[2J", "a" * 5000, "../../x", "<script>", "nan", "1", [], [[]], [0], [None, "x"], {},
    {"a": {}}, {"": 0}, [1e308] * 3, [2**70] * 2,
)  # fmt: skip


def mutated_value(data: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one node replaced, removed or doubled."""
    nodes: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            nodes.append((value, key))
            if isinstance(child, (dict, list)):
                walk(child)

    walk(data)
    if not nodes:
        return data
    parent, key = nodes[rng.integers(len(nodes))]
    how = rng.random()
    if how < 0.15:
        del parent[key]
    elif how < 0.25 and isinstance(parent, list):
        parent.append(parent[key])
    elif how < 0.3 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    else:
        parent[key] = VALUES[rng.integers(len(VALUES))]
    return data


def mutated_json(text: bytes, rng: np.random.Generator) -> bytes:
    data = json.loads(text)
    for _ in range(rng.integers(1, 3)):
        data = mutated_value(data, rng)
    # lone surrogates become bytes that are no UTF-8
    return json.dumps(data, ensure_ascii=bool(rng.random() < 0.7)).encode("utf-8", "surrogatepass")


def mutated_lines(text: bytes, rng: np.random.Generator) -> bytes:
    """JSON lines or a table: one line, or one field of it, changed."""
    lines = text.split(b"\n")
    i = rng.integers(len(lines))
    if lines[i].startswith(b"{") and rng.random() < 0.8:
        lines[i] = mutated_json(lines[i], rng)
    else:
        fields = lines[i].split(b"\t")
        value = VALUES[rng.integers(len(VALUES))]
        fields[rng.integers(len(fields))] = str(value).encode("utf-8", "surrogatepass")
        lines[i] = b"\t".join(fields)
    return b"\n".join(lines)


def mutated_bytes(text: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped, overwritten or inserted bytes."""
    data, how = bytearray(text), rng.integers(6)
    # the beginning describes the rest
    at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(len(data), 600)))
    if how == 0:
        return bytes(data[:at])
    if how == 1:
        data[at] ^= 1 << rng.integers(8)
    elif how == 2:
        data[at : at + 8] = rng.bytes(8)
    elif how == 3:
        data[at:at] = b"\0" * int(rng.integers(1, 9))
    elif how == 4:
        data[at:at] = b"\xff\xfe\x80"
    else:
        data[at : at + 8] = b"\xff" * 8
    return bytes(data)


FILLS = (float("nan"), float("inf"), -1.0, 1e30, -1e30)


def mutated_tensors(text: bytes, rng: np.random.Generator) -> bytes:
    """A well-formed safetensors file with one tensor removed, added, renamed, or of other shape, dtype or values."""
    tensors = load(text)
    # the few that are not weights or moments, too
    rare = [n for n in tensors if n == "counters" or n.endswith(".step")]
    names = rare if rare and rng.random() < 0.3 else list(tensors)
    name, other = (names[rng.integers(len(names))] for _ in range(2))
    t, how = tensors[name].clone(), rng.integers(10)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[f"{name}.x" if rng.random() < 0.5 else "x" * int(rng.integers(1, 300))] = t
    elif how == 2:
        tensors[("../" + name, name.upper(), name[1:], "\x1b[2J")[rng.integers(4)]] = tensors.pop(name)
    elif how == 3:
        tensors[name], tensors[other] = tensors[other].clone(), t
    elif how == 4:
        tensors[name] = t.reshape((1, *t.shape) if rng.random() < 0.5 else (-1, 1))
    elif how == 5:
        tensors[name] = torch.zeros(((0,), (2**40, 0), (1,) * 9, (3, 5), ())[rng.integers(5)], dtype=t.dtype)
    elif how == 6:
        kinds = (torch.int64, torch.bool, torch.float16, torch.float64, torch.complex64, torch.uint8)
        tensors[name] = t.to(kinds[rng.integers(6)])
    elif how == 7:
        # a whole kind of tensor
        end = name.rpartition(".")[2]
        tensors = {n: t for n, t in tensors.items() if not n.endswith(end)}
    else:
        (t if rng.random() < 0.5 else t.view(-1)[:1]).fill_(FILLS[rng.integers(len(FILLS))])
        tensors[name] = t
    return save(tensors)


DEEP = (b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
WHOLE = (b"", b"\0", b"null", b"[]", b"{}", b"\xff\xfe", b"1e999", b'"x"', b"9" * 5000, b"\n" * 1000, *DEEP)


# ---- what is read ---------------------------------------------------------------------------------


def read_features(s: Any) -> None:
    e = load_embeddings(s.features)
    assert len(e) >= 0 and e.broken >= 0
    e.features()
    list(e.rows())


def read_run(s: Any) -> None:
    """What a start does before it trains."""
    cfg = s.config()
    is_finished(cfg, True)
    found = newest(s.run)
    if found is not None:
        found.tensors()
    history(s.run / "log.jsonl", "eval", 10)
    with RunFolder(s.run) as folder:
        assert folder.attempt >= 1


def seal(file: Path) -> None:
    """Makes the mark of a checkpoint valid for what its files hold now."""
    mark = file.with_name("COMPLETE")
    names = [name for name in json.loads(mark.read_text()) if file.with_name(name).exists()]
    bodies = {name: file.with_name(name).read_bytes() for name in names}
    sums = {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in bodies.items()}
    mark.write_text(json.dumps(sums))


def continue_forged(s: Any) -> None:
    """What a start does with a checkpoint, and a step with what it holds; the folder stays as it is."""
    before = sorted(p.relative_to(s.run) for p in s.run.rglob("*"))
    cfg = s.config(train={"epochs": 2})
    is_finished(cfg, True)
    run = build(cfg, World(torch.device("cpu")), open_train(cfg), continued=True)
    resume(run, True)
    assert run.step in (2, 4)
    for p in run.trained:
        p.grad = torch.ones_like(p)
    run.teacher_weight.fill_(0.5)
    update(run, torch.zeros((), dtype=torch.float64))
    run.counters.add(torch.zeros(()), torch.zeros(()), torch.zeros(()))
    assert run.counters.read().values()["skipped"] <= run.step
    assert not not_finite(collect(run.method, run.optimizer, run.counters.tensor))
    assert before == sorted(p.relative_to(s.run) for p in s.run.rglob("*"))


def read_table(s: Any) -> None:
    """As the command does, without measuring again: that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "extract", measure_again)
        format_table(evals.evaluate(s.run, device="cpu"))


def measure_again(*args: object, **options: object) -> None:
    raise UsageError("measured again")


def read_report(s: Any) -> None:
    """The page without the drawing of charts, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "line_chart", points_of)
        report(s.run, images=0)


def points_of(title: str, series: list[Series], **options: bool) -> str:
    """What a chart makes of its series before it draws."""
    for one in series:
        x = np.array([p[0] for p in one.points], float)
        y = np.array([math.nan if p[1] is None else p[1] for p in one.points], float)
        assert np.isfinite(x).all() and x.shape == y.shape
    return "<svg></svg>"


def start_from(s: Any) -> None:
    cfg = s.config(out=str(s.root / "never"))
    run = build(cfg, World(torch.device("cpu")), open_train(cfg))
    init_weights(run, s.weights, overwrite=False)
    assert not not_finite(run.method.state_dict())


def configured(file: Path) -> None:
    from_dict(read_config(file)[1])


def read_source(path: str) -> Callable[[Any], None]:
    def read(s: Any) -> None:
        source = open_source(str(s.root / path))
        assert len(source) == len(source.paths) > 0
        source.title(0)

    return read


class Row(NamedTuple):
    """A file, what reads it, and how it is mutated."""

    file: str
    read: Callable[[Any], object]
    mutate: tuple[Callable[[bytes, np.random.Generator], bytes], ...]
    # mutations in `make test`, and whether it tries the files of WHOLE
    few: int = 12
    whole: bool = True
    # called with the file once it is forged
    seal: Callable[[Path], None] = lambda file: None


JSON = (mutated_json, mutated_json, mutated_bytes)
TABLE = (mutated_lines, mutated_lines, mutated_bytes)
BYTES = (mutated_bytes,)
TENSORS = (mutated_tensors,)

ROWS = {
    # those of a run take some tens of milliseconds each
    "run config": Row("run/config.json", read_report, JSON, 2, False),
    "run env": Row("run/env.json", lambda s: (read_run(s), read_report(s)), JSON, 1, False),
    "run status": Row("run/status.json", lambda s: (read_run(s), read_report(s)), JSON, 1, False),
    "log": Row("run/log.jsonl", lambda s: (read_run(s), read_report(s)), TABLE, 2, False),
    "log in charts": Row("run/log.jsonl", lambda s: report(s.run, images=0), TABLE, 0, False),
    "evaluation in the report": Row("run/reports/evaluation.json", read_report, JSON, 2, False),
    "evaluation": Row("run/reports/evaluation.json", read_table, JSON, 3, False),
    "checkpoint state": Row("run/checkpoints/step_00000004/state.json", read_run, JSON, 1, False),
    "checkpoint mark": Row("run/checkpoints/step_00000004/COMPLETE", read_run, JSON, 1, False),
    "checkpoint tensors": Row("run/checkpoints/step_00000004/state.safetensors", read_run, BYTES, 1, False),
    "sealed checkpoint state": Row(
        "run/checkpoints/step_00000004/state.json", continue_forged, JSON, 2, False, seal
    ),
    "sealed checkpoint tensors": Row(
        "run/checkpoints/step_00000004/state.safetensors", continue_forged, TENSORS, 3, False, seal
    ),
    "weights": Row("run/weights/step_00000004/config.json", lambda s: load_encoder(s.weights), JSON, 30),
    "tensors": Row("run/weights/step_00000004/teacher.safetensors", lambda s: load_encoder(s.weights), BYTES),
    "other tensors": Row(
        "run/weights/step_00000004/teacher.safetensors", lambda s: load_encoder(s.weights), TENSORS, 12, False
    ),
    "weights to start from": Row(
        "run/weights/step_00000004/teacher.safetensors",
        start_from,
        (mutated_tensors, mutated_bytes),
        4,
        False,
    ),
    "released": Row("encoder.pth", lambda s: load_encoder(s.released, num_heads=2), BYTES, 30),
    "features config": Row("features/config.json", read_features, JSON, 30),
    "features rows": Row("features/rows.tsv", read_features, TABLE, 30),
    "features part": Row("features/features/00000.npy", read_features, BYTES),
    "manifest": Row("m.tsv", read_source("m.tsv"), TABLE, 40),
    "packed manifest": Row("packed/manifest.tsv", read_source("packed"), TABLE, 30),
    "tar": Row("shards/a.tar", read_source("shards"), BYTES, 20),
    "tar index": Row("shards/a.idx", read_source("shards"), TABLE, 20),
    "list": Row("list.txt", read_source("list.txt"), TABLE, 20),
    "mixture": Row("mix.toml", read_source("mix.toml"), BYTES, 20),
    "configuration": Row("c.toml", lambda s: configured(s.root / "c.toml"), BYTES, 20),
    "JSON configuration": Row("c.json", lambda s: configured(s.root / "c.json"), JSON, 30),
}


@pytest.fixture(scope="module")
def forged(originals, tmp_path_factory) -> Any:
    s = originals.copy(tmp_path_factory.mktemp("forged") / "things")
    open_source(str(s.tar.parent))
    paths = sorted(s.images.rglob("*.png"))
    (s.root / "list.txt").write_text("".join(f"{p}\t{p.parent.name}\n" for p in paths))
    mixture = f"[[source]]\npath = '{s.images}'\npasses = 2.0\n[[source]]\npath = '{s.manifest}'\n"
    (s.root / "mix.toml").write_text(mixture)
    (s.root / "c.toml").write_text('out = "x"\n[train]\nepochs = 3\n[data]\nmean = [0.5, 0.5, 0.5]\n')
    from extrema_fast.config import to_dict

    (s.root / "c.json").write_text(json.dumps(to_dict(s.config())))
    return s


@pytest.fixture
def restored(forged, request) -> Iterator[tuple[Any, Row, Path, bytes]]:
    row = ROWS[request.param]
    file = forged.root / row.file
    text = file.read_bytes()
    yield forged, row, file, text
    file.write_bytes(text)
    row.seal(file)


@pytest.mark.parametrize("restored", ROWS, indirect=True)
def test_files(restored, tries):
    s, row, file, text = restored
    row.read(s)
    # the index of a tar is made again when it is wrong
    whole = WHOLE if row.whole or tries.factor > 1 else (WHOLE[tries.rng.integers(len(WHOLE))],)
    count = max(row.few, 1) * tries.factor if row.few or tries.factor > 1 else 0
    for number, data in enumerate([*whole, *forgeries(text, row, tries.rng, count)]):
        file.write_bytes(data)
        row.seal(file)
        tries.judge(f"{number}: {describe_bytes(text, data)}", lambda: row.read(s))


def forgeries(text: bytes, row: Row, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    for n in range(count):
        data = row.mutate[n % len(row.mutate)](text, rng)
        if rng.random() < 0.1:
            data = mutated_bytes(data or b"x", rng)
        yield data


def describe_bytes(before: bytes, after: bytes) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    return f"{len(after)} bytes, from byte {at}: {after[max(0, at - 20) : at + 40]!r}"


# ---- forged checkpoints, continued ------------------------------------------------------------------

MOMENT = "optimizer.predictor.0.weight.exp_avg"
WEIGHT = "method.student_branch.predictor.0.weight"
# what becomes of the tensors and of the description of a checkpoint
FORGERIES: dict[str, Callable[[dict, dict], object]] = {
    "no counters": lambda t, d: t.pop("counters"),
    "counters of another shape": lambda t, d: t.update(counters=torch.zeros(4, dtype=torch.float64)),
    "counters beyond the step": lambda t, d: t["counters"].fill_(1e6),
    "no moment": lambda t, d: t.pop(MOMENT),
    "no moments": lambda t, d: [t.pop(n) for n in [*t] if n.startswith("optimizer.")],
    "a moment of another shape": lambda t, d: t.update({MOMENT: torch.zeros(3)}),
    "a moment of another dtype": lambda t, d: t.update({MOMENT: t[MOMENT].to(torch.int64)}),
    "a moment that is NaN": lambda t, d: t[MOMENT].fill_(math.nan),
    "a moment that is infinite": lambda t, d: t[MOMENT].fill_(math.inf),
    "a negative second moment": lambda t, d: t[f"{MOMENT}_sq"].fill_(-1.0),
    "a negative step of a moment": lambda t, d: t.update(
        {MOMENT.replace("exp_avg", "step"): torch.tensor(-3.0)}
    ),
    "a weight of another dtype": lambda t, d: t.update({WEIGHT: t[WEIGHT].half()}),
    "no weight": lambda t, d: t.pop(WEIGHT),
    "a weight of a huge empty shape": lambda t, d: t.update({WEIGHT: torch.zeros(2**40, 0)}),
    "one tensor more": lambda t, d: t.update({"method.student_branch.extra": torch.zeros(3)}),
    "a stranger's tensor": lambda t, d: t.update({"model.weight": torch.zeros(3)}),
    "other names": lambda t, d: [t.update({f"module.{n}": t.pop(n)}) for n in [*t]],
    "no tensors": lambda t, d: t.clear(),
    "a negative step": lambda t, d: d.update(step=-4),
    "a step beyond the schedule": lambda t, d: d.update(step=10**9, total_steps=10**9),
    "a later step": lambda t, d: d.update(step=d["step"] + 95, total_steps=10**9),
    "a step that is text": lambda t, d: d.update(step="4"),
    "a fingerprint of another type": lambda t, d: d.update(fingerprint=[1]),
    "no configuration": lambda t, d: d.pop("config"),
}


def forge(folder: Path, how: str) -> None:
    file = folder / "state.safetensors"
    tensors, state = load(file.read_bytes()), json.loads((folder / "state.json").read_text())
    FORGERIES[how](tensors, state)
    file.write_bytes(save(tensors))
    (folder / "state.json").write_text(json.dumps(state))
    seal(file)
    if how == "a later step":
        folder.rename(folder.with_name(f"step_{state['step']:08d}"))


def test_forged_checkpoints(originals, tries, tmp_path):
    names = [*FORGERIES] if tries.factor > 1 else [[*FORGERIES][tries.rng.integers(len(FORGERIES))]]
    wanted = final_hash(originals.run, 4)
    for how in names:
        # the last of two: from the other to the same bits
        s = originals.copy(tmp_path / "s")
        (s.run / "status.json").unlink()
        forge(s.checkpoint, how)
        cfg = s.config(data={"train": str(originals.images), "test": str(originals.images)})
        train.pretrain(cfg, progress=False)
        tries.expect(f"{how}: continued to the same bits", final_hash(s.run, 4) == wanted)
        shutil.rmtree(s.root)
        # both
        s = originals.copy(tmp_path / "s")
        for folder in (s.checkpoint, s.checkpoint.with_name("step_00000002")):
            forge(folder, how)
        (s.run / "status.json").unlink()
        before = snapshot(s.run)
        with pytest.raises(StorageError) as error:
            train.pretrain(cfg, progress=False)
        tries.expect(
            f"{how}: one line", "\n" not in str(error.value) and "restore a copy" in str(error.value)
        )
        after = snapshot(s.run)
        tries.expect(f"{how}: nothing is touched", before == after, before.keys() ^ after.keys())
        shutil.rmtree(s.root)


# ---- memory ---------------------------------------------------------------------------------------

CLAIMS = {
    # a string of 7.9 GB, announced in a pickle of few bytes
    "pickle.pth": b"\x80\x04\x8d" + (7_900_000_000).to_bytes(8, "little") + b"x" * 16 + b".",
    "bytes.pth": b"\x80\x04\x8e" + (7_900_000_000).to_bytes(8, "little") + b"x" * 16 + b".",
    "long.pth": b"\x80\x02\x8b" + (2_000_000_000).to_bytes(4, "little") + b"x" * 16 + b".",
    "memo.pth": b"\x80\x02Nr" + (2_000_000_000).to_bytes(4, "little") + b"x" * 16 + b".",
    "old.pth": b"\x80\x02T" + (2_000_000_000).to_bytes(4, "little") + b"x" * 16 + b".",
    "huge.safetensors": (7_900_000_000).to_bytes(8, "little") + b"{" + b" " * 23,
    "dotted.toml": b".".join([b"a"] * 100_000) + b" = 1\n",
    "dotted_table.toml": b"[" + b".".join([b"a"] * 100_000) + b"]\n",
    "many.toml": b"".join(b".".join([b"k%d" % i, *([b"a"] * 3000)]) + b" = 1\n" for i in range(300)),
    "layers.json": b'{"model": {"layer_scale": 1e308}}',
    "width.json": b'{"model": {"width": 1000000000000, "depth": 1}}',
}
READER = """
import resource
from extrema_fast import train
from extrema_fast.config import from_dict, read_config
from extrema_fast.errors import ExtremaError
from extrema_fast.weights.load import load_encoder
resource.setrlimit(resource.RLIMIT_AS, (48 << 30, 48 << 30))
def peak():
    return next(int(x.split()[1]) >> 10 for x in open("/proc/self/status") if x.startswith("VmPeak"))
for path in PATHS:
    before = peak()
    try:
        from_dict(read_config(path)[1]) if path.endswith((".toml", ".json")) else load_encoder(path)
        what = "read"
    except ExtremaError as error:
        what = f"{type(error).__name__} {str(error)[:200]}"
    print(f"{path}\\t{peak() - before} MB\\t{what}", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the address space that was asked for")
def test_few_bytes_claim_no_memory(tmp_path, tries, run_cli):
    for name, data in CLAIMS.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in CLAIMS]
    _, text = run_cli("--version", setup=READER.replace("PATHS", repr(paths)))
    lines = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    for path in paths:
        found = lines.get(path, f"ended: {text[-300:]}")
        tries.expect(path, path in lines and int(found.split()[0]) < 300, found)
