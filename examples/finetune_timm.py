"""Fine-tune with timm: its model registry, layer-wise learning rates and scheduler; your classes.

    python examples/finetune_timm.py                                     # the built-in photographs
    python examples/finetune_timm.py --weights runs/mine --train flowers/train --test flowers/test

Folders have one sub-folder per class. As in the paper, training starts from the student without its class head, with a
fresh norm and classifier on the mean of the patch tokens. Prints the test accuracy.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from demo_weights import demo_weights
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import extrema_fast.timm
from extrema_fast.config import DataConfig
from extrema_fast.data.augment import normalize
from extrema_fast.data.loader import EvalLoader, TrainLoader
from extrema_fast.data.sources import match_classes, open_source


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", default="photos", help="images in class folders")
    p.add_argument("--test", default="photos", help="images in class folders")
    p.add_argument("--weights", help="run folder or weights (default: a small encoder made for the examples)")
    p.add_argument(
        "--out", default="runs/finetune_timm", help="folder for the exported and the tuned weights"
    )
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3, help="of the head; each block below has 0.75 of it")
    p.add_argument("--quick", action="store_true", help="little data, for a test")
    args = p.parse_args(argv)
    out, epochs, limit = Path(args.out), 2 if args.quick else args.epochs, 180 if args.quick else 0

    train = open_source(args.train, "train", limit=limit)
    test = match_classes(open_source(args.test, "test", limit=limit), train)

    # a folder that timm reads; the same as `extrema-fast export WEIGHTS OUT --format timm --which student`
    weights = extrema_fast.export(
        demo_weights(args.weights, args.quick), out / "pretrained", which="student", force=True
    )
    model = timm.create_model(
        f"local-dir:{weights.folder}",
        pretrained=True,
        num_classes=len(train.classes),
        global_pool="avg",
        fc_norm=True,
        drop_path_rate=0.1,
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05, layer_decay=0.75)
    mean, std, size = model.pretrained_cfg["mean"], model.pretrained_cfg["std"], model.img_size

    cfg = DataConfig(area=(0.35, 1.0))
    with TrainLoader(train, cfg, size, batch_size=64, seed=0) as loader:
        steps = epochs * loader.steps_per_epoch
        schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, t_in_epochs=False)
        model.train()
        for step, batch in zip(range(steps), loader, strict=False):
            schedule.step_update(step)
            logits = model(normalize(batch.images, mean, std))
            loss = F.cross_entropy(logits, train.labels[batch.index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % loader.steps_per_epoch == 0:
                print(f"epoch {batch.epoch + 1} of {epochs}: loss {loss:.3f}", flush=True)

    correct = 0
    model.eval()
    with torch.no_grad():
        for images, index in EvalLoader(test, cfg, size, resizing=model.resizing()):
            correct += int((model(normalize(images, mean, std)).argmax(1) == test.labels[index]).sum())
    torch.save(model.state_dict(), out / "finetuned.pth")
    accuracy = correct / len(test)
    print(f"{accuracy:.1%} of {len(test)} test images right; weights: {out / 'finetuned.pth'}")
    return accuracy


if __name__ == "__main__":
    main()
