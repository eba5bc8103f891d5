"""`extrema-fast export`: an encoder written for others, read back and compared before it takes its place.

    extrema, timm   model.safetensors + config.json: `load_encoder`, and `timm.create_model("local-dir:DIR")` and
                    Hugging Face's AutoModel after `import extrema_fast.timm`
    vit             the trunk as a stock timm ViT with mean pooling; loads without this project
    cait            the whole encoder under the names of timm's Cait with plain blocks (`export_timm.plain_cait`)
    hf              a Hugging Face folder with a model card; loads with transformers and timm alone
    onnx, torch-export, torchscript
                    a graph of one image size, any batch: images -> class token, patch tokens[, logits]

Every folder has a `config.json` that says how images are made for it and where the weights come from.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import did_you_mean, to_dict
from ..errors import ExtremaError, UsageError, cannot_import
from ..models.encoder import Encoder, model_args
from . import export_graph, export_timm
from .files import (
    ENCODER_OPTIONS,
    SINGLE,
    choose,
    described,
    encoder_options,
    input_meta,
)
from .load import encoder_from, open_weights
from .new_folder import check_free, new_folder

log = logging.getLogger(__name__)


class Format(NamedTuple):
    """How one format is written and compared.

    write     (encoder, folder, config.json without our part, options) -> None
    compare   (encoder, folder, images of several batch sizes) -> {what was compared: largest difference}
    packages  what both need beyond the core, and the extra that brings it
    limit     largest difference that is let through
    """

    write: Callable[..., None]
    compare: Callable[..., dict[str, float]]
    packages: tuple[str, ...] = ()
    extra: str = ""
    limit: float = 1e-5


FORMATS: dict[str, Format] = {
    "extrema": Format(export_timm.write_extrema, export_timm.compare_extrema),
    "vit": Format(export_timm.write_vit, export_timm.compare_vit, ("timm",), "timm"),
    "cait": Format(export_timm.write_cait, export_timm.compare_cait, ("timm",), "timm"),
    "hf": Format(export_timm.write_hf, export_timm.compare_hf, ("timm", "transformers"), "hf"),
    "onnx": Format(
        export_graph.write_onnx,
        export_graph.compare_onnx,
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
        1e-4,
    ),
    "torch-export": Format(export_graph.write_program, export_graph.compare_program),
    "torchscript": Format(export_graph.write_script, export_graph.compare_script),
}
_ALIASES = {"timm": "extrema", "timm-vit": "vit", "timm-cait": "cait", "torch_export": "torch-export"}
# option -> formats that have it
_OPTIONS = {"fc_norm": ("vit", "hf"), "class_token": ("hf",), "opset": ("onnx",)}

# one image, and batches that a graph was not traced with
_BATCHES = (1, 3)


class Exported(NamedTuple):
    """A finished export: folder, names of its files, and the largest difference of each comparison."""

    folder: Path
    files: list[str]
    differences: dict[str, float]


def export(
    weights: str | Path,
    out: str | Path,
    format: str = "extrema",
    *,
    which: str | None = None,
    img_size: int | Sequence[int] | None = None,
    fc_norm: bool | None = None,
    class_token: bool = False,
    opset: int | None = None,
    force: bool = False,
) -> Exported:
    """Writes an encoder for another program, and compares what it gives on random images before it is kept.

    weights      what `load_encoder` takes; which, img_size: as there
    format       `extrema` (= `timm`), `vit`, `cait`, `hf`, `onnx`, `torch-export`, `torchscript`
    fc_norm      vit, hf: a fresh norm after pooling in place of the final norm (start of the paper's fine-tuning)
    class_token  hf: the whole encoder in place of the mean-pooled trunk; `import extrema_fast.timm` then comes
                 before loading
    opset        onnx: operator set, default 18
    force        replace an earlier import or export at `out`
    returns      `Exported`
    raises       UsageError for options, packages or weights that do not fit, ExtremaError when what was written
                 gives other numbers, StorageError when it cannot be written; then nothing is left at `out`
    """
    name = _format_name(format)
    options = {"fc_norm": fc_norm, "class_token": class_token or None, "opset": opset}
    _check_options(name, options)
    for package in FORMATS[name].packages:
        _require(package, FORMATS[name].extra, name)
    check_free(Path(out), force)
    encoder, meta = _load(weights, which, img_size, name, options)
    images = [_random_images(encoder, b, seed) for seed, b in enumerate(_BATCHES)]
    with new_folder(out, force) as folder:
        own = _own_part(
            encoder, meta, {"format": name, **{k: v for k, v in options.items() if v is not None}}
        )
        FORMATS[name].write(encoder, folder, own, options)
        differences = _compare(name, encoder, folder, images, options)
        export_timm.add_differences(folder, differences)
        files = sorted(p.name for p in folder.iterdir())
    return Exported(Path(out), files, differences)


def _format_name(format: str) -> str:
    name = _ALIASES.get(format, format)
    if name not in FORMATS:
        raise UsageError(f"--format: {format!r} is unknown{did_you_mean(format, [*FORMATS, *_ALIASES])}")
    return name


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option, formats in _OPTIONS.items():
        if options[option] is not None and name not in formats:
            raise UsageError(
                f"--{option.replace('_', '-')}: an option of --format {' and '.join(formats)}, not of {name}"
            )
    if options["class_token"] and options["fc_norm"]:
        raise UsageError("--fc-norm: comes after mean pooling; give it or --class-token")


def _require(package: str, extra: str, format: str) -> None:
    try:
        importlib.import_module(package)
    # a package that is there and broken, e.g. torchvision of another torch, fails in other ways
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(f"--format {format}: {cannot_import(package, error, extra)}") from None


def _load(
    weights: str | Path,
    which: str | None,
    img_size: int | Sequence[int] | None,
    name: str,
    options: Mapping[str, Any],
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder to write, and the description it comes from with `which` filled in."""
    opened = open_weights(weights)
    chosen = choose(opened.names, which, weights, opened.meta)
    changes: dict[str, Any] = {}
    if name == "vit" or (name == "hf" and not options["class_token"]):
        changes = {"global_pool": "avg", "fc_norm": options["fc_norm"]}
    encoder = encoder_from(opened, weights, which, img_size=img_size, **changes)
    if encoder_options(opened.meta)["num_classes"] and not encoder.num_classes:
        log.info("the classifier is left out: it was trained on another pooled feature")
    if name == "cait" and encoder.blocks_token is None:
        raise UsageError(f"--format cait: {weights} has no class head; use --format vit")
    return encoder.requires_grad_(False), {**opened.meta, "which": None if chosen == SINGLE else chosen}


def _own_part(encoder: Encoder, meta: Mapping[str, Any], export: dict[str, Any]) -> dict[str, Any]:
    """Our description of what is exported: architecture, input, origin."""
    args = model_args(encoder)
    options = {k: args[k] for k in ENCODER_OPTIONS if k in args}
    size = (encoder.in_chans, *encoder.img_size)
    origin = ("which", "step", "images", "seed", "config_hash", "source")
    return described(
        {
            "model": to_dict(encoder.config),
            "encoder": {**options, "num_classes": encoder.num_classes},
            "data": {"mean": list(encoder.mean), "std": list(encoder.std)},
            "input": {
                **input_meta(size, encoder.mean, encoder.std, encoder.interpolation, encoder.crop_pct),
                "patch_size": encoder.patch_size,
            },
            **{k: meta[k] for k in origin if meta.get(k) is not None},
            "export": export,
        }
    )


def _random_images(encoder: Encoder, batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, encoder.in_chans, *encoder.img_size, generator=generator)


def _compare(
    name: str, encoder: Encoder, folder: Path, images: list[torch.Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    form = FORMATS[name]
    try:
        with torch.no_grad():
            differences = form.compare(encoder, folder, images, options)
    except ExtremaError:
        raise
    except Exception as error:
        log.debug("reading the export back", exc_info=True)
        raise ExtremaError(
            f"--format {name}: what was written cannot be read back ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); nothing was kept"
        ) from error
    # also refuses nan
    if bad := {k: d for k, d in differences.items() if not d <= form.limit}:
        what, worst = max(bad.items(), key=lambda item: item[1])
        raise ExtremaError(
            f"--format {name}: {what} differs by {worst:.2e} from the encoder (at most {form.limit:.0e}); "
            "nothing was kept"
        )
    return differences
