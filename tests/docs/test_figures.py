"""Every figure on a page says where it comes from.

Covers: a number with a unit, in a paragraph, list item or table row of README, docs and the kernels' pages, stands next
to the record it was measured for, which exists and holds it to rounding, or in a sentence that says what else it is:
published, counted, estimated, an aim, or a limit; that the rule finds a figure without a record, or with another value.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/records"
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*/README.md")]
PAGES += [ROOT / "examples/README.md", ROOT / "tests/nullgpu/README.md"]

NUMBER = r"(?<![\w.,/-])(\d[\d,]*(?:\.\d+)?)"
# what only a measurement gives: 1.42x, 63.8 ± 0.2, 503 images/s, 41.5 %
RESULT = re.compile(
    rf"{NUMBER}(?:x\b|\ ±\ |\ ?(?:images|crops)/s|\ times\ as)|(?<![\w.,/-])(\d+\.\d+)(?:\ %|\ times)"
)
# what may be a measurement or a setting
OTHER = re.compile(
    rf"{NUMBER}\ ?(?:%|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|[KMGT]i?B\b|points?\b|per second)"
)
ORIGIN = re.compile(r"publish|\breport(?:s|ed)?\b|counted|estimate|\baims?\b|\bgoal\b|registers\.md")
LIMIT = re.compile(
    r"at most|at least|more than|less than|up to|above|below|after|or more|within|\bfrom\b|views? of|views \|",
    re.I,
)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(paragraph, list item or table row; the text whose records it may name) of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found = [b for b in re.split(r"\n\s*\n|\n(?=\* |\d+\. )", text) if b.strip()]
    for before, block, after in zip(["", *found], found, [*found[1:], ""], strict=False):
        if block.lstrip().startswith("|"):
            # a row without a record has that of the table: of the paragraph before or after it
            for row in block.splitlines():
                yield row, row if "records/" in row else f"{before}\n{block}\n{after}"
        else:
            yield block, block


def values(record: Path) -> set[float]:
    """Every number that a record holds outside its lists of samples, and ratios of its rows' speeds."""
    texts = [(record / "README.md").read_text(encoding="utf-8")]
    found: set[float] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner if isinstance(inner, dict) else None)
        elif isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (int, float)):
            found.add(float(value))

    content = json.loads((record / "record.json").read_text(encoding="utf-8"))
    walk(content)
    found |= {
        float(n.replace(",", "")) for t in texts for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", t)
    }
    rows = content.get("rows", [])
    speeds = [r["images_per_s"] for r in rows if r.get("images_per_s")]
    return found | {a / b for a, b in itertools.permutations(speeds, 2)}


def holds(known: set[float], figure: str) -> bool:
    """Whether a number, or a share as percent, is known to the places that the figure has."""
    value, places = float(figure.replace(",", "")), len(figure.partition(".")[2])
    return any(abs(k * scale - value) <= 0.501 * 10**-places for k in known for scale in (1, 100))


def problems(text: str) -> list[str]:
    """The figures of a page that name no record, or one that does not hold them."""
    wrong = []
    for block, near in blocks(text):
        plain = re.sub(r"`[^`]*`", "", " ".join(block.split()))
        named = sorted(set(re.findall(r"benchmarks/records/([\w.-]+)/", near)))
        missing = [n for n in named if not (RECORDS / n / "record.json").is_file()]
        wrong += [f"no record {n}" for n in missing]
        if named and not missing:
            known = set().union(*(values(RECORDS / n) for n in named))
            for match in RESULT.finditer(plain):
                sentence = re.split(r"[.;] (?=[A-Z*])", plain[: match.start()])[-1]
                if not holds(known, match[1] or match[2]) and not ORIGIN.search(sentence):
                    wrong.append(f"{match[0].strip()} is not in {', '.join(named)}: {plain}")
        elif not named:
            table = near != block
            for sentence in re.split(r"(?<=[.;]) (?=[A-Z*`(])", plain):
                if ORIGIN.search(near if table else sentence):
                    continue
                result, other = RESULT.search(sentence), OTHER.search(sentence)
                if result or (other and not LIMIT.search(sentence)):
                    wrong.append(f"{(result or other)[0].strip()} has no record: {sentence}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_have_a_record(page):
    found = problems(page.read_text(encoding="utf-8"))
    how = "link the record's README.md there, or say that it is published, counted, estimated, an aim, or a limit"
    assert not found, "\n".join(["", *found, how])


HERE = "([record](benchmarks/records/2026-11-24_cpu1_photos_infonce/README.md))"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("k-NN is 63.8 %.", 1),
        (f"k-NN is 63.8 % {HERE}.", 0),
        (f"k-NN is 63.7 % {HERE}.", 1),
        (HERE.replace("infonce", "nothing"), 1),
        ("The released code reports 73.3 %.", 0),
        ("It took 44 s of CPU time.", 1),
        ("What is not there after 120 s is left out.", 0),
        ("On a GPU it is 2x as fast, and 4,000 images/s. Memory was counted.", 1),
        ("| | k-NN |\n| --- | --- |\n| ours | **63.8 ± 0.2** |", 1),
        (f"| | k-NN |\n| --- | --- |\n| ours | **63.8 ± 0.2** |\n\nOne thread {HERE}.", 0),
        (f"| | k-NN |\n| --- | --- |\n| ours | **68.8 ± 0.2** |\n\nOne thread {HERE}.", 1),
        (f"Pretraining {HERE}.\n\nIt is 1.9x as fast.", 1),
        ("Views of 20 %, 80 % x 5 in the paper's recipe: `--mask.ratio 0.8`.", 0),
    ],
)
def test_the_rule(text, count):
    assert len(problems(text)) == count, problems(text)
