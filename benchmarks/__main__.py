"""`python -m benchmarks NAME ...`: one sub-command per measurement."""

from __future__ import annotations

import importlib
import sys

from extrema_fast.config import did_you_mean
from extrema_fast.errors import ExtremaError

# name -> (module:function, one line)
COMMANDS = {
    "step": ("step:main", "training steps: released, strong, ours; --memory, --scaling"),
    "step_bytes": ("step_bytes:main", "launches, copies, waits, memory, bytes of a step; needs no GPU"),
    "kernels": ("kernels:main", "every op next to its plain definition and strong baselines"),
    "attention": ("kernels:attention", "self-attention backends over sequence lengths and dtypes"),
    "registers": ("kernels:registers", "registers and shared memory of every kernel, without a GPU"),
    "encode": ("encode:main", "inference, dense and masked: ours, accelerated timm, timm, Hugging Face"),
    "loader": ("loader:main", "images/s of the data path next to a DataLoader of PIL and of torchvision"),
    "startup": ("startup:main", "imports, first step per compile mode, first batch"),
    "learning": ("learning:main", "a preset over seeds against the random encoder"),
    "finetune": ("finetune:main", "fine-tuning from weights against scratch, over seeds"),
    "race": ("race:main", "ours against other people's methods, k-NN at equal minutes"),
    "cluster": ("cluster:main", "bytes sent, times and reads on 8 to 512 GPUs, by arithmetic"),
    "collapse": ("collapse:main", "settings that collapse and settings that do not: when each is warned of"),
    "saving": ("saving:main", "what saving every 50 steps costs a run on a CPU"),
    "soak": ("soak:main", "memory, descriptors and threads over 20,000 steps with saves and failing images"),
    "compare": ("harness:compare", "two records: ratios with a verdict on noise"),
    "index": ("harness:index", "README.md of the folder of records"),
    "gpu_visit": ("gpu_visit:main", "everything that only a GPU can show, in one go"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the sub-command named first and returns its exit code; 2 for an error that the user can correct."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h"):
        print(
            "usage: python -m benchmarks NAME [options]   (NAME --help: its options, NAME --list: its cases)\n"
        )
        print("\n".join(f"  {name:10} {about}" for name, (_, about) in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        print(f"benchmarks: unknown {argv[0]!r}{did_you_mean(argv[0], list(COMMANDS))}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    try:
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(argv[1:])
    except ExtremaError as error:
        print(f"benchmarks {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
