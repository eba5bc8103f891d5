"""The package as others get it: metadata, versions, extras, wheel content, and the name `kernels`.

Covers: one version in package, wheel and CHANGELOG; extras free of apex; a tested version of every dependency
in constraints.txt, inside the range of setup.py, for each supported Python; the wheel holds every module and
data file of extrema_fast/ and kernels/ (as extrema_fast.kernels) and nothing else, and imports without the
checkout; `kernels` by its bare name is empty; one ruff; the Makefile installs extras that exist; the licence is whole.
"""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import extrema_fast
from extrema_fast.errors import install

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
ADDED = ("extrema_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout keeps no build folder and no old one leaks in."""
    source = tmp_path_factory.mktemp("source")
    for name in ADDED:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repository / name, source / name)
    # folders of a checkout that must stay out
    for name in ("tests", "benchmarks"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    out = tmp_path_factory.mktemp("wheel")
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


def requirements(info: Message) -> list[Requirement]:
    return [Requirement(line) for line in info.get_all("Requires-Dist")]


def constraints(repository: Path) -> list[Requirement]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def holds(requirement: Requirement, python: str, extra: str = "", system: str = "Linux") -> bool:
    """Whether its marker is true with this Python."""
    environment = {"python_version": python, "platform_system": system, "extra": extra}
    environment["platform_machine"] = {"Linux": "x86_64", "Darwin": "arm64"}[system]
    return requirement.marker is None or requirement.marker.evaluate(environment)


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_version_stands_once(repository, wheel_metadata):
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?=\s|$)", changelog, re.M)
    assert first, "CHANGELOG.md: expected a heading like `## 0.1.0`"
    assert first.group(1) == extrema_fast.__version__ == wheel_metadata["Version"]


def test_metadata(wheel_metadata):
    keys = ("Name", "License-Expression", "Requires-Python")
    assert [wheel_metadata[k] for k in keys] == ["extrema-fast", "Apache-2.0", ">=3.10"]
    assert len(wheel_metadata.get_payload()) > 500, "README.md should be the long description"


def test_installed_command():
    (command,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "extrema-fast"]
    assert command.value == "extrema_fast.__main__:main"
    assert callable(command.load())


@pytest.mark.parametrize(("system", "more"), [("Linux", {"triton"}), ("Darwin", set())])
def test_core_is_small(wheel_metadata, system, more):
    core = {r.name for r in requirements(wheel_metadata) if holds(r, "3.12", system=system)}
    assert core == {"torch", "numpy", "safetensors"} | more


def test_extras(wheel_metadata):
    named = {"train", "tensorboard", "dali-cuda13", "dali-cuda12", "xformers", "timm", "bench", "dev"}
    assert set(wheel_metadata.get_all("Provides-Extra")) >= named
    names = {r.name.lower() for r in requirements(wheel_metadata)}
    assert not {n for n in names if "apex" in n}, "the apex of PyPI is an unrelated package"


@pytest.mark.parametrize("version", PYTHONS)
def test_every_dependency_has_a_tested_version_in_range(repository, wheel_metadata, version):
    pins = {}
    for pin in constraints(repository):
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        if holds(pin, version):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {version}"
            pins[pin.name] = Version(exact.version)
    wanted = requirements(wheel_metadata)
    extras = ["", *wheel_metadata.get_all("Provides-Extra")]
    for requirement in wanted:
        if requirement.name == "setuptools" or not any(holds(requirement, version, e) for e in extras):
            continue
        assert requirement.name in pins, (
            f"constraints.txt: {requirement.name} for Python {version} is missing"
        )
        assert pins[requirement.name] in requirement.specifier, (requirement, pins[requirement.name])


def test_wheel_holds_the_package_and_nothing_else(repository, wheel):
    expected = set()
    for folder, base in (("extrema_fast", "extrema_fast"), ("kernels", "extrema_fast/kernels")):
        for path in (repository / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{base}/{path.relative_to(repository / folder).as_posix()}")
    assert "extrema_fast/kernels/__init__.py" in expected and "extrema_fast/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {n for n in names if n.partition("/")[0].endswith(".dist-info")}
    assert any(n.endswith("licenses/LICENSE") for n in info)
    missing, surplus = expected - names, names - info - expected
    assert not missing, f"not in the wheel (setup.py: package_data): {sorted(missing)}"
    assert not surplus, f"must not be in the wheel: {sorted(surplus)}"


def test_wheel_imports_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        # the editable install of the checkout must not answer for a module missing in the wheel
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import extrema_fast, extrema_fast.kernels, extrema_fast.ops.dispatch\n"
        "print(extrema_fast.__file__, extrema_fast.kernels.__file__)"
    )
    done = python("-c", code, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(Path(p).is_relative_to(tmp_path) for p in done.stdout.split())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import kernels; kernels.patch_gather", "import extrema_fast.kernels"),
        ("import kernels.patch_gather", "No module named 'kernels.patch_gather'"),
    ],
)
def test_kernels_by_its_bare_name_is_an_error(repository, code, words):
    done = python("-c", code, cwd=repository)
    assert done.returncode == 1 and words in done.stderr


def test_who_looks_for_the_other_kernels_finds_an_empty_module(repository):
    # as transformers does at its import; with the checkout on the path it finds this folder
    code = "import sys, kernels; print(getattr(kernels, '__version__', 'N/A'), 'torch' in sys.modules)"
    done = python("-c", code, cwd=repository)
    assert done.stdout.split() == ["N/A", "False"], done.stderr


def test_one_ruff(repository):
    hooks = (repository / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hook = re.search(r"ruff-pre-commit\s+rev: v(\S+)", hooks).group(1)
    (pin,) = [p for p in constraints(repository) if p.name == "ruff"]
    assert str(pin.specifier) == f"=={hook}"


def test_makefile_installs_extras_that_exist(repository, wheel_metadata):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    default = re.search(r"^DALI \?= (\S+)", makefile, re.M).group(1)
    named = [n for group in re.findall(r'-e "\.\[(.+?)\]"', makefile) for n in group.split(",")]
    assert len(named) > 3
    extras = set(wheel_metadata.get_all("Provides-Extra"))
    assert {default if n == "$(DALI)" else n for n in named} <= extras


# stands for the environment's Python: a torchvision that does not load until one comes from the index $FITS
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *__version__*) echo 2.13.0+cpu ;;
    *sysconfig*) echo "$VENV" ;;
    *"import torchvision"*) test -f "$VENV/fits" ;;
    *"-m pip install"*torchvision)
        found=pip
        case "$*" in *"--index-url"*) found=$(echo "$*" | sed 's/.*--index-url \\([^ ]*\\).*/\\1/') ;; esac
        echo "$found" >> "$VENV/tried"
        case "$found" in "$FITS") touch "$VENV/fits" ;; none*) exit 1 ;; esac ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["install", "install-dev"])
@pytest.mark.parametrize(
    ("given", "fits", "tried"),
    [
        ("https://mine/whl", "https://mine/whl", 1),
        ("none", "https://download.pytorch.org/whl/cpu", 2),
        ("", "pip", 2),
        ("https://mine/whl", "nowhere", 3),
    ],
)
def test_make_finds_the_torchvision_that_fits(repository, tmp_path, target, given, fits, tried):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "FITS": fits, "VENV": str(tmp_path), "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", target, f"VENV={tmp_path}", f"TORCH_INDEX={given}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=repository,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    indexes = [given] * bool(given) + ["https://download.pytorch.org/whl/cpu", "pip"]
    assert (tmp_path / "tried").read_text().split() == indexes[:tried]
    assert ("no torchvision for torch 2.13.0+cpu was found" in done.stderr) == (fits == "nowhere")
    assert (tmp_path / "torchvision_operators.pth").is_file() == (fits == "nowhere")


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_timm_is_imported_next_to_a_torchvision_that_does_not_fit(repository, tmp_path):
    shutil.copy(repository / "tests" / "torchvision_operators.py", tmp_path)
    # as the Makefile writes it
    line = re.search(r'echo "(import torchvision_operators .*?)"', (repository / "Makefile").read_text())[1]
    (tmp_path / "torchvision_operators.pth").write_text(line + "\n")
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); assert 'torch' not in sys.modules; import timm"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_missing_is_named_by_its_packages(wheel_metadata, monkeypatch):
    # an editable installation may be older than setup.py
    monkeypatch.setattr(metadata, "requires", lambda name: wheel_metadata.get_all("Requires-Dist"))
    for extra in wheel_metadata.get_all("Provides-Extra"):
        program, how, *packages = shlex.split(install(extra))
        assert (program, how) == ("pip", "install") and packages
        found = {str(Requirement(p)) for p in packages}
        marked = [
            r for r in requirements(wheel_metadata) if r.marker and f'extra == "{extra}"' in str(r.marker)
        ]
        assert found == {f"{r.name}{r.specifier}" for r in marked}
    assert install("nothing") == 'pip install -e ".[nothing]" in the checkout'


def test_nobody_is_told_to_take_our_name_from_pypi(repository):
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False)
    names = [n for n in listed.stdout.splitlines() if not n.startswith("benchmarks/records/")]
    if not names:
        pytest.skip("not a git checkout")
    told = []
    for name in names:
        path = repository / name
        if path.suffix in (".py", ".md", ".yml", ".toml", ".j2", ".txt", "") and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                # with an address it is not PyPI's
                if re.search(r"pip install(?!.* @ git).*extrema.fast", line):
                    told.append(f"{name}: {line.strip()}")
    assert len(names) > 100 and not told


def test_licence_is_complete(repository):
    text = (repository / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {n}. " in text for n in range(1, 10))


def test_pages_link_to_what_exists(repository):
    pages = [
        *repository.glob("*.md"),
        *(repository / "docs").glob("*.md"),
        *repository.glob("kernels/**/*.md"),
    ]
    pages += [repository / "examples/README.md"]
    missing = []
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                missing.append(f"{page.relative_to(repository)}: {link}")
    assert len(pages) > 10 and not missing
