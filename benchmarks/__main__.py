"""`python -m benchmarks NAME ...`: one sub-command per measurement."""

from __future__ import annotations

import importlib.util
import sys

from extrema_fast.config import did_you_mean
from extrema_fast.errors import ExtremaError

from .registry import ENTRIES, MEASUREMENTS, TOOLS

USAGE = """usage: python -m benchmarks NAME [--quick] [--out FOLDER] [--name NAME] [--list] [options]

measurements (each writes a record; `NAME --help` tells its options, `NAME --list` what it would measure):
{measurements}

tools:
{tools}
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement named by the first argument; lists them without one. 2: the user can mend it."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "--list"):
        print(USAGE.format(measurements=lines(MEASUREMENTS), tools=lines(TOOLS)), end="")
        return 0
    if argv[0] not in ENTRIES:
        print(f"benchmarks: unknown {argv[0]!r}{did_you_mean(argv[0], list(ENTRIES))}", file=sys.stderr)
        return 2
    try:
        return ENTRIES[argv[0]].main(argv[1:])
    except ExtremaError as error:
        print(f"benchmarks {argv[0]}: {error}", file=sys.stderr)
        return 2


def lines(entries: tuple) -> str:
    """`  name  about` of what is there."""
    there = [e for e in entries if importlib.util.find_spec(f"{__package__}.{e.module or e.name}")]
    return "\n".join(f"  {e.name:10} {e.about}" for e in there)


if __name__ == "__main__":
    sys.exit(main())
