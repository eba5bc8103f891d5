"""Is pretraining worth it? Fine-tunes from weights and from scratch, as long, over several seeds.

Each run is a process of the product's own command; the one from scratch has the architecture of the weights and no
layer decay, which is for trained layers. Processor seconds are those of the whole process, tests included.

python -m benchmarks finetune runs/cifar10 --data cifar10 --seeds 0 1 -- --data.limit 5000 --system.threads 1

With `none` in the place of weights only the runs from scratch are made, such as longer ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from extrema_fast.config import flatten
from extrema_fast.reporting.record import curve, read_run, settings
from extrema_fast.training.tuning import NONE, RESULT
from extrema_fast.weights.folder import model_config
from extrema_fast.weights.load import load_metadata

from . import harness
from .learning import cpu_seconds, spread


def main(argv: list[str]) -> int:
    """Fine-tunes from weights and from random ones over seeds; options of `finetune` follow after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    overrides = argv[split + 1 :]
    p = harness.parser("finetune", main.__doc__, timed=False)
    p.add_argument(
        "weights", nargs="?", default=NONE, help="a pretraining's run folder; none: from scratch alone"
    )
    p.add_argument(
        "--data", default="photos", help="as of finetune: photos, or a folder with train/ and test/"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--runs", type=Path, default=Path("runs/finetune"), help="where the run folders go")
    args = p.parse_args(argv[:split])
    if args.quick:
        args.seeds, overrides = [0], [*overrides, "--train.epochs", "1", "--data.limit", "128"]
    if args.list:
        print(f"  from {args.weights} and from scratch, seeds {args.seeds}, {' '.join(overrides)}")
        return 0
    ways = {"scratch": [NONE, "--tune.layer-decay", "1", *architecture(args.weights)]}
    if args.weights != NONE:
        ways = {"pretrained": [args.weights], **ways}
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for way, words in ways.items():
            out = args.runs / f"{args.name}-{way}-seed{seed}"
            # what is given last holds
            runs.append({"way": way} | run([*words, "--data", args.data, *overrides], seed, out))
    found = summary(runs)
    record = harness.new_record("fine-tuning", "finetune", argv, args.note, overrides=overrides)
    record |= {"summary": found, "runs": runs}
    text = f"Mean and standard deviation over seeds {args.seeds}; accuracies are shares of the test images."
    if args.weights != NONE:
        record["pretraining"] = pretraining(args.weights)
        text += f" The weights: {describe(record['pretraining'])}."
    lines = [
        {"key": k} | s | {"values": ", ".join(f"{v:.3f}" for v in s["values"])} for k, s in found.items()
    ]
    table = harness.columns(lines, "quantity=key", "mean=mean:.3f", "deviation=stdev:.3f", "each seed=values")
    harness.write_record(record, [text, table], args)
    return 0


def architecture(weights: str) -> list[str]:
    """The options that give random weights the shape of these."""
    if weights == NONE:
        return []
    model = model_config(load_metadata(weights))
    values: dict[str, Any] = dict(zip(("width", "depth", "heads"), model.shape, strict=True))
    values |= {name: getattr(model, name) for name in ("mlp_ratio", "patch_size", "img_size")}
    words: list[str] = []
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        words += [f"--model.{name.replace('_', '-')}", *map(str, numbers)]
    return words


def run(words: list[str], seed: int, out: Path) -> dict[str, Any]:
    """One fine-tuning; returns accuracy, loss, processor seconds, the curve and the settings."""
    command = [sys.executable, "-m", "extrema_fast", "finetune", *words]
    began = cpu_seconds()
    subprocess.run([*command, "--train.seed", str(seed), "--out", str(out), "--overwrite"], check=True)
    took, found = cpu_seconds() - began, read_run(out)
    result = json.loads((out / RESULT).read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "command": ["finetune", *words],
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "cpu_s": round(took, 1),
        "steps": found.step,
        "images": found.train[-1]["images"],
        "curve": curve(found, "eval", "accuracy", "epoch"),
        "per_class": result["per_class"],
        "config": flatten(found.cfg),
    }


def pretraining(weights: str) -> dict[str, Any]:
    """What the run of the weights was: preset, changed options, images, last k-NN."""
    found = read_run(weights)
    name, changed = settings(found)
    known = [r["knn_cls"] for r in found.evals if r.get("knn_cls") is not None]
    return {
        "preset": name,
        # where its images and threads were is of one machine
        "changes": {
            k: new
            for k, (new, _) in changed.items()
            if not k.startswith(("data.train", "data.test", "log.", "ckpt.", "eval.", "system."))
        },
        "steps": found.step,
        "images": found.train[-1]["images"],
        "knn": [known[0], known[-1]] if known else None,
    }


def describe(about: dict[str, Any]) -> str:
    """`preset cifar10 with train.epochs 2, ...; 1,562 steps, ...`."""
    changes = ", ".join(f"{k} {v}" for k, v in about["changes"].items())
    knn = (
        ""
        if about["knn"] is None
        else f"; k-NN {about['knn'][0]:.3f} at step 0, {about['knn'][1]:.3f} at the end"
    )
    return (
        f"preset {about['preset']}{' with ' * bool(changes)}{changes}; {about['steps']:,} steps, "
        f"{about['images']:,} images{knn}"
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, deviation and values over seeds of accuracy and processor seconds by way, and the gain seed by seed."""
    ways = list(dict.fromkeys(r["way"] for r in runs))
    found = {
        f"{label} | {way}": spread([r[field] for r in runs if r["way"] == way])
        for label, field in (("accuracy", "accuracy"), ("processor seconds", "cpu_s"))
        for way in ways
    }
    if len(ways) == 2:
        pairs = zip(*(found[f"accuracy | {way}"]["values"] for way in ways), strict=True)
        found["accuracy | gain over scratch"] = spread([a - b for a, b in pairs])
    return found
