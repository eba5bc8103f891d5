"""Shell completion of commands, presets and options, as a script that shtab generates from the parsers.

The script contains every word, so completing does not start Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from ..errors import UsageError, cannot_import

SHELLS = ("bash", "zsh", "fish")
# values that are files or folders, by their name in the help
_FOLDERS = ("DIR", "FOLDER")
_FILES = [
    "PATH",
    "FILE",
    "FILE.png",
    "M.tsv",
    "DATA",
    "OUT",
    "RUN",
    "WEIGHTS",
    "RUN_OR_WEIGHTS",
    "INDEX",
    "QUERY",
    "MANIFEST",
    "STR",
]


def script(
    prog: str, parsers: Mapping[str, argparse.ArgumentParser], presets: Sequence[str], shell: str
) -> str:
    """The completion script of a shell.

    Args:
        prog: The program.
        parsers: By command; they are changed, and parse nothing afterwards.
        presets: What may come first after a command with `--preset`.
        shell: One of `SHELLS`.

    Raises:
        UsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UsageError(f"completion: {cannot_import('shtab', error, 'completion')}") from error
    main = argparse.ArgumentParser(prog)
    # what is added is the parser that the command has
    commands = main.add_subparsers(  # type: ignore[call-overload]
        parser_class=lambda prog, **_: parsers[prog.split()[-1]], prog=prog
    )
    for name, parser in parsers.items():
        preset = parser._option_string_actions.get("--preset")
        # `finetune` names its own
        if preset is not None and preset.choices is None:
            parser.add_argument("first", nargs="?", choices=presets, help="preset")
            preset.choices = presets
        for action in parser._actions:
            _values(action, shtab)
        commands.add_parser(name, help=parser.description)
    # bash also completes files where a first word is no preset
    return shtab.complete(main, shell).replace(
        "complete -o bashdefault", "complete -o bashdefault -o default"
    )


def _values(action: argparse.Action, shtab: object) -> None:
    """Says what completes an action's value, as its help names it."""
    if action.help == argparse.SUPPRESS:
        # `--data.no-exif`, of which the help shows the positive
        action.help = "not so"
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar.startswith("{"):
        action.choices, action.metavar = metavar.strip("{}").split(","), None
    elif metavar in _FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif metavar in _FILES and not action.dest.startswith("system."):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
