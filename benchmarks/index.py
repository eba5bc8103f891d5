"""python -m benchmarks index: the page that lists the records."""

from __future__ import annotations

import argparse
from pathlib import Path

from .records import RECORDS, write_index


def main(argv: list[str]) -> int:
    """Writes README.md of the folder of records."""
    p = argparse.ArgumentParser(prog="python -m benchmarks index", description=main.__doc__)
    p.add_argument("--out", type=Path, default=RECORDS, metavar="FOLDER", help="the folder of records")
    args = p.parse_args(argv)
    print(write_index(args.out))
    return 0
