"""Weights for the examples when you have none: a small encoder, pretrained on the built-in photographs.

In your own project, `extrema_fast.load_encoder("runs/mine")` replaces all this.
"""

from dataclasses import replace
from pathlib import Path

import extrema_fast


def demo_weights(path: str | None, quick: bool) -> str:
    """`path`, or the run of `make demo`, which is pretrained first if it is missing (minutes on a CPU)."""
    if path is not None:
        return path
    cfg = replace(extrema_fast.preset("photos"), out="runs/demo")
    if quick:
        cfg = replace(
            cfg,
            out="runs/examples_quick",
            data=replace(cfg.data, limit=64),
            optim=replace(cfg.optim, warmup_epochs=1),
            train=replace(cfg.train, epochs=2),
            eval=replace(cfg.eval, every_epochs=0),
        )
    if not (Path(cfg.out) / "weights").exists():
        print(f"no --weights given: pretraining into {cfg.out}", flush=True)
        extrema_fast.pretrain(cfg)
    return cfg.out
