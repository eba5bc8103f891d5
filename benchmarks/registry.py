"""The registry of benchmarks: `python -m benchmarks NAME`. Each is a module with `main(argv) -> exit code`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A command: its name, the module whose `main` it is, one line about it."""

    name: str
    about: str
    module: str = ""

    @property
    def main(self) -> Callable[[list[str]], int]:
        return importlib.import_module(f"{__package__}.{self.module or self.name}").main


MEASUREMENTS = (
    Entry("step", "the training step: released, strong, ours, yardsticks; --scaling: how ours grows"),
    Entry("kernels", "every op beside its plain definition and strong baselines"),
    Entry("attention", "self-attention backends over lengths and dtypes"),
    Entry("encode", "encoding images, dense and masked: ours, accelerated timm, timm's ViT, Hugging Face's"),
    Entry("memory", "peak memory over batch sizes and recomputation options"),
    Entry("loader", "images/s of the data path beside a DataLoader: decode, crop, views, end to end; memory"),
    Entry("startup", "imports, building, first step per compile mode, first image"),
    Entry("learning", "does it learn: a preset over seeds against the random encoder"),
    Entry("registers", "registers and shared memory of every kernel, no GPU needed"),
)
TOOLS = (
    Entry("compare", "two records: ratios with a verdict on noise"),
    Entry("verify", "the correctness checks of everything that is timed; 1 when one fails"),
    Entry("index", "records/README.md, made from the records"),
    Entry("gpu_suite", "everything that only a GPU can show, in one go"),
)
ENTRIES = {e.name: e for e in MEASUREMENTS + TOOLS}
