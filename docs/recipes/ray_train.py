"""Pretraining with Ray Train: a worker per GPU, started again when one is lost, where the run continues.

python docs/recipes/ray_train.py paper_base_80x5 /data/imagenet.tsv /data/runs/in1k --workers 16

Images and run folder must have the same path on all nodes. Ray calls `train` in a thread of each worker, where no
handler of a signal can be set: what is lost with a worker are the steps since the last checkpoint (`--every-steps`).
Ray tries again after any error, a wrong setting too.
"""

from __future__ import annotations

import argparse
from typing import Any

from extrema_fast import preset, pretrain
from extrema_fast.config import from_dict


def train(options: dict[str, Any]) -> None:
    """What each worker runs; Ray has set RANK, WORLD_SIZE and LOCAL_RANK, and has made the process group.

    Args:
        options: `preset`, `changes` (settings by section), and whatever `pretrain` takes by name.
    """
    options = dict(options)
    cfg = from_dict(options.pop("changes", {}), preset(options.pop("preset")))
    pretrain(cfg, progress=False, **options)


def main() -> None:
    """Starts the workers and waits for the end of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--every-steps", type=int, default=500, help="between checkpoints")
    args = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        train,
        train_loop_config={
            "preset": args.preset,
            "changes": {"ckpt": {"every_steps": args.every_steps}},
            "data": args.data,
            "out": args.out,
        },
        # flags and messages go by the CPU; Ray's own choice for GPUs has NCCL alone
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl"),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=100)),
    ).fit()


if __name__ == "__main__":
    main()
