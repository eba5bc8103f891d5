"""How much do frozen features say about your classes? A linear classifier on them.

    python examples/linear_probe.py                                      # the built-in photographs
    python examples/linear_probe.py --weights runs/mine --train flowers/train --test flowers/test

Folders have one sub-folder per class. Without --test every fifth image of --train is held out. Ends in a number.
(`extrema-fast probe` is the paper's own protocol, beside a random encoder; this is what to build on.)
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_weights import demo_weights

import extrema_fast


def features(data: str, out: Path, weights: str, split: str, limit: int) -> tuple[torch.Tensor, list[str]]:
    """[n, D] class tokens and the n labels, computed once and kept in `out`."""
    made = extrema_fast.embed(data, out, weights, norm=False, split=split, limit=limit, force=True)
    return made.features(), [row.label for row in made.rows()]


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", default="photos", help="images in class folders")
    p.add_argument(
        "--test", help="the same for the test (default: a fifth of --train; of photos, its test half)"
    )
    p.add_argument("--weights", help="run folder or weights; default: a small encoder made for the examples")
    p.add_argument("--out", default="runs/linear_probe", help="where the features go")
    p.add_argument("--steps", type=int, default=400, help="steps of the classifier")
    p.add_argument("--quick", action="store_true", help="little data, for a test")
    args = p.parse_args(argv)
    out, weights = Path(args.out), demo_weights(args.weights, args.quick)
    limit = 180 if args.quick else 0

    x, labels = features(args.train, out / "train", weights, "train", limit)
    test = args.test or ("photos" if args.train == "photos" else None)
    if test is not None:
        test_x, test_labels = features(test, out / "test", weights, "test", limit)
    else:
        held = torch.arange(len(x)) % 5 == 4
        test_x, test_labels = x[held], [label for label, h in zip(labels, held, strict=True) if h]
        x, labels = x[~held], [label for label, h in zip(labels, held, strict=True) if not h]

    classes = sorted(set(labels))
    y, test_y = (torch.tensor([classes.index(label) for label in part]) for part in (labels, test_labels))
    # every dimension with mean 0 and deviation 1 on the training images, as the paper's probe
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std

    torch.manual_seed(0)
    linear = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(args.steps):
        rows = torch.randint(len(x), (512,))
        loss = F.cross_entropy(linear(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    accuracy = (linear(test_x).argmax(1) == test_y).float().mean().item()
    print(
        f"{accuracy:.1%} of {len(test_y)} test images right ({len(classes)} classes, chance {1 / len(classes):.1%})"
    )
    return accuracy


if __name__ == "__main__":
    main()
