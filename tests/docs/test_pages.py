"""What the pages tell a user to type exists.

Covers: every command of every page (code blocks and inline code): its program, command, options and their values,
presets, settings as a whole, make targets, files of recipes; every dotted setting; that a command which does not exist
is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from extrema_fast import cli
from extrema_fast.config import PRESETS, Config, flatten, from_dict, nested, preset, read_config
from extrema_fast.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*/*.md")]
PAGES += [ROOT / "examples/README.md", ROOT / "tests/nullgpu/README.md"]
# what was there once
PAGES.remove(ROOT / "CHANGELOG.md")

SETTINGS = set(flatten(Config()))
FILES = (".py", ".json", ".jsonl", ".md", ".toml", ".safetensors")
PROGRAM = re.compile(r"(?:extrema-fast|make|torchrun|srun|\S*python[\d.]*|tests/nullgpu/run)(?= )")


def commands(text: str) -> Iterator[str]:
    """Every command of a page, on one line each and without its comment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    spans = [
        " ".join(s.split())
        for s in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    ]
    for line in [*("\n".join(blocks).replace("\\\n", " ").splitlines()), *spans]:
        for part in re.split(r"&&|\||;|\$\(|\)\"|`", re.split(r"(?:^|\s)#|\s>\s", line)[0]):
            part = re.sub(r"^\s*(?:\w+=\S+\s+)*(?:eval\s+\")?", "", part)
            if PROGRAM.match(part):
                yield part


class Parsed(Exception):
    """A parser has read its arguments without an error."""


def check(command: str) -> None:
    """Raises AssertionError or UsageError for a command that does not exist as it is written."""
    words = shlex.split(command)
    # what is left out, unless it is an option's value
    words = [w for before, w in itertools.pairwise(["", *words]) if w != "..." or before.startswith("--")]
    while words and (words[0] in ("torchrun", "srun") or words[0].endswith("nullgpu/run")):
        # up to what they start
        start = next(
            (i for i, w in enumerate(words) if w == "-m" or (i and w.startswith("python"))), len(words)
        )
        words = ["python", *words[start:]] if words[start : start + 1] == ["-m"] else words[start:]
    if not words:
        return
    if words[0] == "make":
        check_make(words[1:])
    elif words[0].rpartition("/")[2].startswith("python"):
        check_python(words[1:])
    else:
        check_cli(words[1:])


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, value, _ = word.partition("=")
        found = rf"^{name} \?=" if value else rf"^{name}:"
        assert re.search(found, text, re.M) or name.startswith("-"), f"make has no {word}"


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "extrema_fast"]:
        check_cli(words[2:])
    elif words[:2] == ["-m", "benchmarks"] and len(words) > 2:
        check_benchmark(words[2:])
    elif words[:1] == ["-m"] and words[1].startswith("extrema_fast"):
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words and words[0].endswith(".py") and "/" in words[0]:
        assert (ROOT / words[0]).is_file(), f"no script {words[0]}"


def check_benchmark(words: list[str]) -> None:
    from benchmarks.__main__ import COMMANDS

    # "NAME" of a synopsis
    if words[0].isupper():
        return
    assert words[0] in COMMANDS, f"no benchmark {words[0]}"
    module, _, function = COMMANDS[words[0]][0].partition(":")
    with pytest.MonkeyPatch.context() as patch:
        parse = argparse.ArgumentParser.parse_args

        def stop(self: argparse.ArgumentParser, *args: object) -> None:
            parse(self, *args)
            raise Parsed

        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            getattr(importlib.import_module(f"benchmarks.{module}"), function)(words[1:])
        except Parsed:
            pass
        except SystemExit:
            raise AssertionError(f"benchmarks {' '.join(words)}: unknown option or value") from None


parser_of = lru_cache(cli._parser_of)


def check_cli(words: list[str]) -> None:
    if not words or words[0].isupper() or words[0].startswith("-"):
        return
    assert words[0] in cli.COMMANDS, f"no command {words[0]}"
    parser = parser_of(words[0])
    settings = "data.train" in {a.dest for a in parser._actions}
    args = cli._dashed(words[1:])
    first = args.pop(0) if settings and args and not args[0].startswith("-") else None
    # a synopsis, or an option by itself
    if re.search(r"\b(?:PRESET|VALUE|SETTING)\b|\[", " ".join(words)):
        return
    with pytest.MonkeyPatch.context() as patch:
        # a command of which only the beginning is shown
        for action in parser._actions:
            patch.setattr(action, "required", False)
        found, rest = parser.parse_known_args(args)
    assert not rest, f"{words[0]} has no {rest[0]}"
    if not settings:
        return
    looks_like_preset = first and re.fullmatch(r"(?:paper_|photos|cifar|smoke)\w*", first)
    assert not looks_like_preset or first in PRESETS, f"no preset {first}"
    name = first if first in PRESETS else "own" if first else "photos"
    of_file: dict = {}
    if (config := getattr(found, "config", None)) and "/" in config:
        name, of_file = read_config(ROOT / config)
    given = {k: v for k, v in vars(found).items() if k in SETTINGS}
    from_dict(nested(given), from_dict(of_file, preset(name)))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page):
    wrong = []
    for command in commands(page.read_text(encoding="utf-8")):
        try:
            check(command)
        except (AssertionError, UsageError, ValueError) as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_there_are_commands():
    found = [c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 100 and any("pretrain --config docs/recipes/" in c for c in found)


@pytest.mark.parametrize(
    "command",
    [
        "extrema-fast pretrian photos",
        "extrema-fast pretrain paper_small_80x6",
        "extrema-fast pretrain photos --train.epoch 3",
        "extrema-fast pretrain photos --train.epochs many",
        "extrema-fast pretrain photos --mask.ratio 1.5",
        "extrema-fast evaluate RUN --neighbors 3",
        "torchrun --nproc-per-node 8 -m extrema_fast pretrain paper_base_80x5 --data.batch 3",
        "python -m benchmarks learnings",
        "python -m benchmarks step --quik",
        "python examples/nothing.py",
        "make demos",
        "make test JOB=3",
    ],
)
def test_what_does_not_exist_is_found(command):
    (found,) = commands(f"```\n{command}   # as it was\n```\n")
    with pytest.raises((AssertionError, UsageError)):
        check(found)


def test_settings_exist():
    """`section.name` in inline code is a setting; so is each option with a point in it."""
    sections = "|".join(
        f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), f.name))
    )
    wrong = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(rf"(?:`|--)((?:{sections})\.[\w-]+)(?=[ `=])", text):
            if name.replace(".no-", ".").replace("-", "_") not in SETTINGS and not name.endswith(FILES):
                wrong.append(f"{page.relative_to(ROOT)}: {name}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_recipes_are_settings():
    files = sorted((ROOT / "docs/recipes").glob("*.toml"))
    assert files
    for file in files:
        name, options = read_config(file)
        assert from_dict(options, preset(name)) != preset(name)
        assert f"recipes/{file.name}" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
