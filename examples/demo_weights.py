"""Weights for the examples when you have none: a small encoder, pretrained on the built-in photographs.

In a project of your own, `extrema_fast.load_encoder("runs/mine")` takes the place of all this.
"""

from dataclasses import replace
from pathlib import Path

import extrema_fast


def demo_weights(path: str | None, quick: bool) -> str:
    """`path`, or the run that `make demo` leaves; pretrained first where there is none (minutes on a CPU)."""
    if path is not None:
        return path
    cfg = extrema_fast.preset("photos")
    if quick:
        cfg = replace(
            cfg,
            out="runs/examples_quick",
            data=replace(cfg.data, limit=64),
            optim=replace(cfg.optim, warmup_epochs=1),
            train=replace(cfg.train, epochs=2),
            eval=replace(cfg.eval, every_epochs=0),
        )
    else:
        cfg = replace(cfg, out="runs/demo")
    if not (Path(cfg.out) / "weights").exists():
        print(f"no --weights given: pretraining into {cfg.out}", flush=True)
        extrema_fast.pretrain(cfg)
    return cfg.out
