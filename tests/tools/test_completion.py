"""Completion in a shell.

Covers: what a real bash completes, with the script that the command prints: commands, presets, dotted options of every
kind, choices, files; the scripts of all shells hold the same words, and are valid where the shell is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from extrema_fast.cli import COMMANDS, main
from extrema_fast.config import PRESETS, Config, flatten

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    (folder / "photos.toml").touch()
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch:
            lines: list[str] = []
            patch.setattr("extrema_fast.cli._print", lines.append)
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(lines[0])
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash(scripts):
    # words, the last of which is completed -> some of the answers, and one that is none
    wanted = {
        "extrema-fast pre": ({"pretrain"}, "probe"),
        "extrema-fast ": (set(COMMANDS), "photos"),
        "extrema-fast pretrain ph": ({"photos"}, "cifar10"),
        "extrema-fast pretrain paper_base_80x5 --data.re": ({"--data.resident"}, "--data.train"),
        "extrema-fast pretrain --data.resident ": ({"auto", "gpu", "host", "off"}, "dali"),
        "extrema-fast pretrain --train.cuda-graph ": ({"auto", "on", "off"}, "block"),
        "extrema-fast profile --preset ": (set(PRESETS), "base"),
        "extrema-fast finetune runs/a --preset ": ({"small", "paper"}, "photos"),
        "extrema-fast pretrain --config ph": ({"photos.toml"}, "zsh"),
        "extrema-fast evaluate --which ": ({"teacher", "student"}, "photos"),
        "extrema-fast completion ": ({"bash", "zsh", "fish"}, "tcsh"),
    }
    code = "source ./bash; complete -p extrema-fast >/dev/null || exit 1; f=$(complete -p extrema-fast); f=${f##*-F }\n"
    for words in wanted:
        quoted = " ".join(f"'{word}'" for word in words.split(" "))
        code += f"COMPREPLY=(); COMP_WORDS=({quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        code += '${f%% *} extrema-fast "${COMP_WORDS[COMP_CWORD]}" ""; echo "${COMPREPLY[*]}"\n'
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=scripts, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    for words, line in zip(wanted, done.stdout.splitlines(), strict=True):
        some, none = wanted[words]
        found = set(line.split())
        assert some <= found and none not in found, (words, found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_every_word(scripts, shell):
    text = (scripts / shell).read_text()
    for word in (*COMMANDS, *PRESETS, *(name.replace("_", "-") for name in flatten(Config()))):
        assert word in text
    if program := os.environ.get(f"TEST_{shell.upper()}") or shutil.which(shell):
        done = subprocess.run([program, "-n", scripts / shell], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_a_shell_that_is_none(capsys):
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err
