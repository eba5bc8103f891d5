"""`python -m extrema_fast` and the `extrema-fast` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
