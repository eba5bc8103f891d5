"""Mixtures: rows and parts by passes, labels and shards of the whole, reading, and every error."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from extrema_fast.data.sources import open_source

from .conftest import fails
from .tars import samples, write_tar


def images(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def mixture(path, *entries):
    lines = []
    for entry in entries:
        lines.append("[[source]]")
        lines += [f"{k} = {v!r}" if isinstance(v, str) else f"{k} = {v}" for k, v in entry.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def sets(tmp_path):
    """`one`: 3 images of a and b; `two`: 2 of b and c; `flat`: 4 without labels; `s`: 5 in two shards."""
    images(tmp_path / "one", ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    images(tmp_path / "two", ["b/4.jpg", "c/5.jpg"])
    images(tmp_path / "flat", [f"{i}.png" for i in range(4)])
    write_tar(tmp_path / "s/a.tar", samples(2, first=1))
    write_tar(tmp_path / "s/b.tar", samples(3, first=3))
    return tmp_path


def test_whole_passes_repeat_rows(sets):
    spec = mixture(sets / "m.toml", {"path": "one", "passes": 2}, {"path": "two"})
    source = open_source(str(spec))
    one, two = open_source(str(sets / "one")), open_source(str(sets / "two"))
    assert source.paths == one.paths * 2 + two.paths and source.parts == ()
    assert source.classes == ["a", "b", "c"]
    assert [source.classes[i] for i in source.labels.tolist()] == [*"aabaab", *"bc"]
    assert source.spans is None and source.names is None and source.shards is None
    assert source.name == str(spec) and source.read(6) == b"b/4.jpg"
    # rounding makes no part
    spec = mixture(sets / "m.toml", {"path": "flat", "passes": 1.0000000001}, {"path": "one", "passes": 3.0})
    assert open_source(str(spec)).parts == () and len(open_source(str(spec))) == 4 + 9


def test_a_fraction_is_a_part(sets):
    spec = mixture(
        sets / "m.toml",
        {"path": "flat", "passes": 2.25},
        {"path": "one"},
        {"path": str(sets / "two"), "passes": 0.5},
    )
    source = open_source(str(spec))
    # 4 rows twice and a quarter of them, 3 once, half of 2
    assert len(source) == 4 * 3 + 3 + 2
    assert source.parts == ((0, 4, 1.0), (4, 8, 1.0), (8, 12, 0.25), (12, 15, 1.0), (15, 17, 0.5))
    assert source.paths[8:12] == source.paths[:4] == open_source(str(sets / "flat")).paths
    assert source.labels is None


def test_shards_and_files_are_read_by_row(sets):
    spec = mixture(sets / "m.toml", {"path": "s/*.tar", "passes": 2}, {"path": "one", "label": "9"})
    source = open_source(str(spec))
    shards, one = open_source(str(sets / "s")), open_source(str(sets / "one"))
    wanted = [shards.read(r) for r in range(5)] * 2 + [one.read(r) for r in range(3)]
    assert [source.read(r) for r in range(13)] == wanted
    assert source.title(7) == shards.title(2) and source.title(10) == one.paths[0]
    assert source.shards is None
    # a label for all of a source
    assert [source.classes[i] for i in source.labels.tolist()] == [*"12012" * 2, "9", "9", "9"]
    # shard numbers continue, where all are shards
    source = open_source(str(mixture(sets / "m.toml", {"path": "s", "passes": 2}, {"path": "s/a.tar"})))
    assert source.shards.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4] and source.shards.dtype == np.int32


def test_headers_of_a_manifest_are_kept(sets):
    from extrema_fast.data.manifest import Row, header_lines, row_line

    row = Row(path="one/a/1.jpg", bytes=7, width=30, height=20, orientation=6, kind="jpeg")
    (sets / "m.tsv").write_text(header_lines(".", []) + row_line(row))
    source = open_source(str(mixture(sets / "m.toml", {"path": "two"}, {"path": "m.tsv"})))
    assert source.headers.tolist() == [[0, 0, 0], [0, 0, 0], [20, 30, 6]]


def test_labels_that_do_not_agree_are_dropped(sets, caplog):
    with caplog.at_level(logging.WARNING):
        source = open_source(str(mixture(sets / "m.toml", {"path": "s"}, {"path": "one"})))
    assert source.labels is None and source.classes == []
    assert "classes are numbers in" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert open_source(str(mixture(sets / "m.toml", {"path": "one"}, {"path": "flat"}))).labels is None
    assert f"no labels in {sets / 'flat'}; the mixture has no labels" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert open_source(str(mixture(sets / "m.toml", {"path": "flat"}, {"path": "flat"}))).labels is None
    assert not caplog.text


def test_fingerprint(sets):
    entries = [{"path": "one"}, {"path": "two", "passes": 2}]
    first = open_source(str(mixture(sets / "m.toml", *entries))).fingerprint
    assert open_source(str(mixture(sets / "n.toml", *entries))).fingerprint == first
    others = [
        [{"path": "one"}, {"path": "two", "passes": 3}],
        [{"path": "two", "passes": 2}, {"path": "one"}],
        [{"path": "one", "label": "a"}, {"path": "two", "passes": 2}],
        [{"path": "one"}],
    ]
    found = {open_source(str(mixture(sets / "m.toml", *o))).fingerprint for o in others}
    assert len(found) == len(others) and first not in found
    images(sets / "one", ["a/10.jpg"])
    assert open_source(str(mixture(sets / "m.toml", *entries))).fingerprint != first


def test_limit(sets):
    spec = mixture(sets / "m.toml", {"path": "one", "passes": 2})
    assert len(open_source(str(spec), limit=4)) == 4
    spec = mixture(sets / "m.toml", {"path": "one", "passes": 1.5})
    fails(spec, r"data\.limit: 4 of a mixture with parts of an epoch.*--data\.limit 0", limit=4)


def test_built_in_sets_are_no_paths(sets, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(sets / "cache"))
    source = open_source(str(mixture(sets / "m.toml", {"path": "synthetic"})))
    assert len(source) > 0 and len(source.classes) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe\x00", r"m\.toml: cannot be read \(.*utf-8"),
        ("", r"m\.toml: no \[\[source\]\] in it; a mixture has an entry such as"),
        ("source = 3", r"no \[\[source\]\] in it"),
        ("[[sources]]\npath='one'", "unknown key 'sources'; did you mean 'source'"),
        ("[[source]]\npath=one", r"m\.toml: not TOML \("),
        ("[[source]]\npath='one'\npases=2", "source 1: unknown key 'pases'; did you mean 'passes'"),
        (
            "[[source]]\npath='one'\n[[source]]\npasses=2",
            "source 2: path: expected the place of images, got None",
        ),
        ("[[source]]\npath=''", "source 1: path: expected"),
        (
            "[[source]]\npath='one'\npasses=0",
            "source 1: passes: expected a number above 0, at most 1000, got 0",
        ),
        ("[[source]]\npath='one'\npasses=-1.5", "got -1.5"),
        ("[[source]]\npath='one'\npasses=nan", "got nan"),
        ("[[source]]\npath='one'\npasses=true", "got True"),
        ("[[source]]\npath='one'\npasses='2'", "got '2'"),
        ("[[source]]\npath='one'\npasses=1e-10", "passes: 1e-10 of 3 images is less than one image"),
        ("[[source]]\npath='one'\npasses=1e9", "at most 1000, got 1000000000.0"),
        ("[[source]]\npath='one'\npasses=0.1", "passes: 0.1 of 3 images is less than one image an epoch"),
        ("[[source]]\npath='one'\nlabel=3", "source 1: label: expected the name of a class as text, got 3"),
        ("[[source]]\npath='onee'", r"m\.toml: source 1: .*onee: does not exist; did you mean 'one'"),
        ("[[source]]\npath='one'\n[[source]]\npath='m.toml'", r"source 2: m\.toml is a mixture itself"),
        ("[[source]]\npath='empty'", r"source 1: .*empty: no images"),
    ],
)
def test_errors(sets, text, words):
    (sets / "empty").mkdir()
    (sets / "m.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(sets / "m.toml", words)
