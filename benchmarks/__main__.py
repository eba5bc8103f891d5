"""`python -m benchmarks NAME ...`: one sub-command per measurement."""

from __future__ import annotations

import sys

from . import attention, kernels, learning, registers

COMMANDS = {
    "attention": attention.main,
    "kernels": kernels.main,
    "learning": learning.main,
    "registers": registers.main,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement named by the first argument; lists them without one."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m benchmarks NAME [options]\n")
        for name, function in COMMANDS.items():
            print(f"  {name:10} {function.__doc__.splitlines()[0]}")
        return 0 if argv in ([], ["--help"], ["-h"], ["--list"]) else 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
