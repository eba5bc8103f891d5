"""Kernels of ExtreMA's operations, each beside its plain PyTorch reference; see each folder's README.md.

This folder is installed as `extrema_fast.kernels` and imports nothing of the rest of `extrema_fast`.
"""

if __name__ != "extrema_fast.kernels":
    # under a second name every op would be registered twice; and `kernels` on PyPI is another package
    raise ImportError(
        f"this folder was imported as {__name__!r}: use `import extrema_fast.kernels` "
        "(installed by `pip install -e .` in the repository root)"
    )

__all__: list[str] = []
