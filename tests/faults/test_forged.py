"""Files of every kind that is read, forged and mutated: an error in a line, or a result; never a traceback.

Covers: descriptions, logs, tables, tensors and configurations of run, weights, features and packed folders, manifests,
lists, mixtures, tars and their indexes; values of other types, sizes beyond 64 bits, deep nesting, long dotted keys,
broken UTF-8, NUL, cut files, flipped bytes; memory that a few bytes claim.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from extrema_fast.config import load_config
from extrema_fast.data.sources import open_source
from extrema_fast.errors import UsageError
from extrema_fast.evaluation import evaluate as evals
from extrema_fast.evaluation.evaluate import format_table
from extrema_fast.reporting import report as pages
from extrema_fast.reporting.figures import Series
from extrema_fast.reporting.report import report
from extrema_fast.tools.embeddings import load_embeddings
from extrema_fast.training.checkpoint import newest
from extrema_fast.training.logging import history
from extrema_fast.training.run import is_finished
from extrema_fast.training.run_folder import RunFolder
from extrema_fast.weights.load import load_encoder

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


JSON = (mutated_json, mutated_json, mutated_bytes)
TABLE = (mutated_lines, mutated_lines, mutated_bytes)
BYTES = (mutated_bytes,)

ROWS = {
    # those of a run take some tens of milliseconds each
    "run config": Row("run/config.json", read_report, JSON, 3, False),
    "run env": Row("run/env.json", lambda s: (read_run(s), read_report(s)), JSON, 2, False),
    "run status": Row("run/status.json", lambda s: (read_run(s), read_report(s)), JSON, 2, False),
    "log": Row("run/log.jsonl", lambda s: (read_run(s), read_report(s)), TABLE, 4, False),
    "log in charts": Row("run/log.jsonl", lambda s: report(s.run, images=0), TABLE, 0, False),
    "evaluation in the report": Row("run/reports/evaluation.json", read_report, JSON, 3, False),
    "evaluation": Row("run/reports/evaluation.json", read_table, JSON, 3, False),
    "checkpoint state": Row("run/checkpoints/step_00000004/state.json", read_run, JSON, 2, False),
    "checkpoint mark": Row("run/checkpoints/step_00000004/COMPLETE", read_run, JSON, 2, False),
    "checkpoint tensors": Row("run/checkpoints/step_00000004/state.safetensors", read_run, BYTES, 2, False),
    "weights": Row("run/weights/step_00000004/config.json", lambda s: load_encoder(s.weights), JSON, 30),
    "tensors": Row("run/weights/step_00000004/teacher.safetensors", lambda s: load_encoder(s.weights), BYTES),
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
    "configuration": Row("c.toml", lambda s: load_config(s.root / "c.toml"), BYTES, 20),
    "JSON configuration": Row("c.json", lambda s: load_config(s.root / "c.json"), JSON, 30),
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


@pytest.mark.parametrize("restored", ROWS, indirect=True)
def test_files(restored, tries):
    s, row, file, text = restored
    row.read(s)
    # the index of a tar is made again when it is wrong
    whole = WHOLE if row.whole or tries.factor > 1 else (WHOLE[tries.rng.integers(len(WHOLE))],)
    count = max(row.few, 1) * tries.factor if row.few or tries.factor > 1 else 0
    for number, data in enumerate([*whole, *forgeries(text, row, tries.rng, count)]):
        file.write_bytes(data)
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
from extrema_fast.config import load_config
from extrema_fast.errors import ExtremaError
from extrema_fast.weights.load import load_encoder
resource.setrlimit(resource.RLIMIT_AS, (48 << 30, 48 << 30))
def peak():
    return next(int(x.split()[1]) >> 10 for x in open("/proc/self/status") if x.startswith("VmPeak"))
for path in PATHS:
    before = peak()
    try:
        (load_config if path.endswith((".toml", ".json")) else load_encoder)(path)
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
