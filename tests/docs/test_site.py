"""`make docs`: the site is built strictly, is complete, and needs nothing from another server.

Covers: no broken link or anchor (strict); a page for every guide, kernel and record; figures of a record on the pages
made from records; every setting and every public name on their pages; lists and tables that Markdown understood;
pictures, styles and scripts that lie in the site, none on another server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import extrema_fast
from extrema_fast import kernels
from extrema_fast.config import FinetuneConfig, flatten

for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="the extra `docs`")


@pytest.fixture(scope="module")
def built(repository, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=repository, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return out


@pytest.fixture(scope="module")
def site(built):
    return {p.relative_to(built).as_posix(): p.read_text(encoding="utf-8") for p in built.rglob("*.html")}


def test_pages_are_complete(site, repository):
    sources = [*repository.glob("docs/*.md"), *repository.glob("kernels/*/README.md")]
    sources += [*repository.glob("benchmarks/records/*/README.md"), repository / "README.md"]
    for source in sources:
        name = source.relative_to(repository).with_suffix(".html").as_posix()
        assert name.replace("README.html", "index.html") in site, f"{name} is missing"


def test_results_are_those_of_the_records(site, repository):
    for file in repository.glob("benchmarks/records/*/record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        page = site["docs/results.html" if "summary" in record else "docs/benchmarks.html"]
        assert f"records/{file.parent.name}/index.html" in page
        if mean := record.get("summary", {}).get("knn | pretrained | class token", {}).get("mean"):
            assert f"<td>{100 * mean:.1f}" in re.sub(r'<td style="[^"]*">', "<td>", page)


def test_every_public_name_has_its_docstring(site):
    ids = set(re.findall(r'id="(extrema_fast[\w.]*)"', site["docs/api.html"]))
    missing = [n for n in extrema_fast.__all__ if not any(i.endswith(f".{n}") for i in ids)]
    missing += [n for n in kernels.__all__ if not any(i.endswith(f".{n}") for i in ids)]
    assert ids and not missing


def test_every_setting_is_listed(site):
    values = flatten(FinetuneConfig())
    missing = [
        n for n in values if "." in n and f"<code>{n}</code></strong> (" not in site["docs/settings.html"]
    ]
    assert len(values) > 90 and not missing
    assert "paper_*_90x8" in site["docs/settings.html"]


def test_markdown_is_understood(site):
    for name, page in site.items():
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.S)
        # a list or a table without an empty line before it stays text
        left = re.search(r"\n(?:[*-] |\d\. |\| ?-{3}).*", "\n".join(re.findall(r"<p>(.*?)</p>", text, re.S)))
        assert not left, f"{name}: {left[0]}"


def test_everything_is_here(site, built):
    for name, page in site.items():
        if name == "404.html":
            continue
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="?([^" >]+)', page)
        loaded += re.findall(r'<link[^>]*rel="?(?:stylesheet|icon|preconnect)"?[^>]*href="?([^" >]+)', page)
        loaded += re.findall(r'<link[^>]*href="?([^" >]+)[^>]*rel="?(?:stylesheet|icon|preconnect)', page)
        absent = [
            a for a in loaded if not a.startswith("data:") and not (built / name).parent.joinpath(a).is_file()
        ]
        assert loaded and not absent, f"{name}: {absent}"
