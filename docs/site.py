"""What `make docs` builds: the repository's own pages in their places, and pages made from records and docstrings.

MkDocs calls these functions (`hooks` of mkdocs.yml). A page keeps the path that it has in the repository, so its links
work on a forge and in the site alike. The pages about results, benchmarks, settings and the Python interface are made
here, at each build, and are in no checkout.
"""

from __future__ import annotations

import ast
import fnmatch
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from extrema_fast.config import PRESETS, Config, FinetuneConfig, flatten

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "benchmarks/records"

# what is taken over, beside what a page shows or links to
PAGES = ("*.md", "docs/*.*", "docs/*/*", "examples/*.*", "kernels/*/README.md", f"{RECORDS}/**/*.*")
ALONE = ("tests/nullgpu/README.md", "LICENSE")

# the order of the guides; what is not named here follows
GUIDES = (
    "recipes",
    "training",
    "data",
    "learning",
    "evaluation",
    "finetuning",
    "encoder",
    "distributed",
    "troubleshooting",
    "collapse",
)


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu, from the pages that there are; and, before its plugin asks, where docstrings are read."""
    guides = sorted(p.stem for p in (ROOT / "docs").glob("*.md"))
    inside = ["architecture", "performance"]
    order = [g for g in GUIDES if g in guides] + [g for g in guides if g not in (*GUIDES, *inside)]
    kernels = sorted(p.parent.name for p in ROOT.glob("kernels/*/README.md"))
    config.nav = [
        {"Start": "README.md"},
        {"Guides": [f"docs/{name}.md" for name in order] + ["examples/README.md"]},
        {"Results": ["docs/results.md", "docs/benchmarks.md", f"{RECORDS}/README.md"]},
        {
            "How it works": [
                "docs/architecture.md",
                "docs/performance.md",
                {"Null GPU": "tests/nullgpu/README.md"},
            ]
        },
        {"Kernels": [{name: f"kernels/{name}/README.md"} for name in kernels] + [f"{RECORDS}/registers.md"]},
        {"Reference": ["docs/settings.md", "docs/api.md"]},
        {"Project": ["CONTRIBUTING.md", "CHANGELOG.md"]},
    ]
    # the package as it is installed: `kernels` is a folder of its own in the repository
    config["_package"] = package = tempfile.mkdtemp(prefix="docs-")
    for source, name in (("extrema_fast", "extrema_fast"), ("kernels", "extrema_fast/kernels")):
        shutil.copytree(ROOT / source, Path(package) / name, ignore=shutil.ignore_patterns("__pycache__"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [package]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and what they show, at their paths in the repository, and the pages made here."""
    # those of the theme stay
    taken = Files([f for f in files if f.src_dir != config.docs_dir])
    found = {p for pattern in PAGES for p in ROOT.glob(pattern) if p.is_file()} | {ROOT / p for p in ALONE}
    for path in sorted(found):
        if path.suffix != ".pyc" and path != Path(__file__).resolve():
            taken.append(
                File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
            )
    for page in (results, benchmarks, settings, api):
        taken.append(File.generated(config, f"docs/{page.__name__}.md", content=page()))
    return taken


def on_page_markdown(markdown: str, page: Page, **_: Any) -> None:
    """The search lists records after the pages that explain."""
    if page.file.src_uri.startswith(RECORDS):
        page.meta["search"] = {"boost": 0.3}


def on_post_build(config: MkDocsConfig) -> None:
    """Removes the temporary package."""
    shutil.rmtree(config["_package"])


# ---- pages made from records ------------------------------------------------------------------------


# without a table of contents, which leaves room
WIDE = "---\nhide: [toc]\n---\n\n"
MADE = f"Made from the [records](../{RECORDS}/README.md) when this site was built"


def read_records() -> dict[str, dict[str, Any]]:
    """Folder name -> record, the newest first."""
    files = sorted((ROOT / RECORDS).glob("*/record.json"), reverse=True)
    return {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in files}


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers, in every column but the first two, to the right."""
    lines = [heads, ["---", "---"] + ["---:"] * (len(heads) - 2), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(' | ', ', ') for cell in line)} |" for line in lines)


def link(name: str) -> str:
    """A link to a record, by its name without date and machine."""
    return f"[{name.split('_', 2)[-1]}](../{RECORDS}/{name}/README.md)"


def first(record: dict[str, Any]) -> str:
    """The first paragraph of a record's note; empty without one."""
    return record.get("note", "").partition("\n\n")[0]


def percent(summary: dict[str, Any], key: str) -> str:
    """Mean and standard deviation of a quantity, in %."""
    if key not in summary:
        return ""
    found = summary[key]
    spread = f"\u00a0±\u00a0{100 * found['stdev']:.1f}" if len(found["values"]) > 1 else ""
    return f"{100 * found['mean']:.1f}{spread}"


def results() -> str:
    """The page of accuracies: every record of `python -m benchmarks learning` and its like."""
    rows, notes = [], []
    for name, record in read_records().items():
        summary = record.get("summary", {})
        for begun in ("", "begun | "):
            key = f"{begun}knn | pretrained | class token"
            if key not in summary:
                continue
            seconds = (
                summary.get(f"{begun}processor seconds | pretrain") or summary[f"{begun}seconds | pretrain"]
            )
            rows.append(
                [
                    link(name),
                    record["what"].removeprefix("learning: ")
                    + (", begun from other weights" if begun else ""),
                    percent(summary, key),
                    percent(summary, "knn | random init | class token"),
                    percent(summary, "knn | raw pixels | pixels"),
                    percent(summary, f"{begun}probe | pretrained | class token"),
                    percent(summary, "probe | random init | class token"),
                    percent(summary, "probe | raw pixels | pixels"),
                    f"{seconds['mean']:.0f}{'' if f'{begun}processor seconds | pretrain' in summary else ' *'}",
                    str(len(summary[key]["values"])),
                ]
            )
        if summary:
            command = f": `{record['command']}`" if "command" in record else ""
            notes.append(f"* {link(name)}{command}{'. ' * bool(first(record))}{first(record)}")
    heads = ["record", "preset", "k-NN", "random", "pixels", "probe", "random", "pixels", "seconds", "seeds"]
    return "\n\n".join(
        [
            WIDE + "# Accuracy",
            f"{MADE}. Accuracy of the class token in %, mean and standard deviation over seeds, next to the same "
            "encoder with random weights and to raw pixels. Seconds are CPU seconds of pretraining, with * wall-clock "
            "seconds. Rows on different images cannot be compared.",
            table(heads, rows),
            "\n".join(notes),
        ]
    )


def benchmarks() -> str:
    """The page of speed and memory: every ratio of every record, losses too, and the summary of records without one."""
    rows, notes = [], []
    for name, record in read_records().items():
        for r in record.get("ratios", []):
            ours = ", ".join(r[k] for k in ("what", "stage", "ours", "row") if k in r)
            what = f"{ours + ' against ' if ours else ''}{r['other']}"
            interval = f"{r['low']:.2f} to {r['high']:.2f}" if "low" in r else ""
            rows.append([link(name), what, f"{r['ratio']:.2f}", interval, r.get("verdict", "")])
        if not record.get("ratios") and "summary" not in record:
            result = (record.get("headline") or first(record)).replace(" | ", ", ")
            notes.append(f"* {link(name)}: {record['what']}{'. ' + result if result else ''}")
    return "\n\n".join(
        [
            WIDE + "# Benchmarks",
            f"{MADE}: the time of the other program divided by ours, its 95 % interval, and the verdict on ours, on "
            "the machines that the records name. [Performance](performance.md) explains them.",
            table(["record", "compared", "ratio", "interval", "verdict"], rows),
            "## Other measurements, and what was counted",
            "\n".join(notes),
        ]
    )


# ---- settings and the Python interface, from their docstrings -----------------------------------------


def settings() -> str:
    """The page of every setting, its default, and the presets that have another value."""
    tree = ast.parse((ROOT / "extrema_fast/config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    presets = {name: flatten(make()) for name, make in PRESETS.items()}
    parts = [
        "# Settings",
        "Settings of `pretrain`, given as `--SECTION.NAME VALUE`, or by section in a `--config` file "
        "([training](training.md)): choices or type, default, meaning, and the presets with another value (`own` "
        "chooses more for your images). `pretrain --help` and `finetune --help` show the same.",
    ]
    values = flatten(FinetuneConfig()) | flatten(Config())
    for section, kind in {**Config.__annotations__, "tune": "TuneConfig"}.items():
        if kind not in classes:
            continue
        about = (ast.get_docstring(classes[kind]) or "").partition("\n")[0]
        parts.append(f"## {section}\n\n{about}{' Only of `finetune`.' * (section == 'tune')}")
        for member, after in itertools.pairwise(classes[kind].body):
            if not (isinstance(member, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            name, hint = f"{section}.{ast.unparse(member.target)}", ast.unparse(member.annotation)
            if hint.startswith("Literal["):
                hint = hint.removeprefix("Literal[").removesuffix("]").replace("'", "`")
            text = " ".join(ast.literal_eval(after.value).split())
            others: dict[str, list[str]] = {}
            for preset, theirs in presets.items():
                if theirs.get(name, values[name]) != values[name]:
                    others.setdefault(shown(theirs[name]), []).append(preset)
            for found in others.values():
                for pattern in ("paper_*", "paper_*_90x8", "paper_large_*"):
                    if set(alike := fnmatch.filter(PRESETS, pattern)) <= set(found):
                        found[:] = [n for n in found if n not in alike] + [pattern.replace("*", "\\*")]
            theirs = "; ".join(f"{', '.join(found)}: {value}" for value, found in others.items())
            parts.append(
                f"* **`{name}`** ({hint}; default {shown(values[name])}): {text}"
                + f" Presets: {theirs}." * bool(theirs)
            )
    return "\n\n".join(parts)


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, (list, tuple)):
        value = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return f"`{value}`" if value != "" else "empty"


def api() -> str:
    """The page of the public names of the package and of the kernels, from their docstrings."""
    parts = ["# Python"]
    for package, folder, about in (
        (
            "extrema_fast",
            "extrema_fast",
            "Everything that `import extrema_fast` offers. Names load on first use.",
        ),
        (
            "extrema_fast.kernels",
            "kernels",
            "The ops alone; each runs in plain PyTorch where its kernel cannot.",
        ),
    ):
        tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
        names = [(alias.name, f"{package}.{node.module}") for node in imports for alias in node.names]
        parts += [f"## {package}", about]
        parts += [f"::: {module}.{n}" for n, module in sorted(names, key=lambda x: (x[0][0].isupper(), x))]
    return "\n\n".join(parts)
