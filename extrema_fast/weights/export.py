"""`extrema-fast export`: writes an encoder for other programs, reads it back and compares outputs before keeping it.

    extrema, timm   model.safetensors + config.json, for `load_encoder`; after `import extrema_fast.timm` also for
                    `timm.create_model("local-dir:DIR")` and Hugging Face's AutoModel
    vit             the trunk as a stock timm ViT with mean pooling; loads without this project
    hf              a Hugging Face folder; loads with only transformers and timm
    onnx, torch-export
                    a graph for one image size and any batch size: images -> class token, patch tokens[, logits]

Every folder has a `config.json`, which describes preprocessing and the origin of the weights, and a model card that is
generated from it (`card.py`).
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import did_you_mean, to_dict
from ..distributed import is_sharded
from ..errors import ExtremaError, NonFiniteError, UsageError, cannot_import, one_line
from ..files import new_folder
from ..models.encoder import Encoder, model_args, timm_config
from ..models.layers import NORM_EPS
from ..ops import dispatch as ops
from .card import CARD, card_hash, kept_card, model_card, run_record, short_path
from .folder import (
    ENCODER_OPTIONS,
    SINGLE,
    check_replaceable,
    data_meta,
    described,
    encoder_options,
    input_meta,
    on_cpu,
    write_json,
    write_tensors,
)
from .foreign import plain_name
from .load import Weights, load_encoder, open_weights, warn_left_out

log = logging.getLogger(__name__)

WEIGHTS, ONNX, PROGRAM = "model.safetensors", "model.onnx", "model.pt2"
OPSET = 18
# a protocol buffer holds 2 GiB; larger weights go into a separate file
_ONNX_IN_ONE_FILE = 1_800_000_000
# batch sizes that a graph was not traced with
_BATCHES = (1, 3)


class Job(NamedTuple):
    """One export: the encoder, the new folder, its description, options, and images to compare outputs on."""

    encoder: Encoder
    folder: Path
    description: dict[str, Any]
    options: Mapping[str, Any]
    images: list[Tensor]


class Exported(NamedTuple):
    """A finished export: its folder, the names of its files, and the largest difference found by each comparison."""

    folder: Path
    files: list[str]
    differences: dict[str, float]


class Format(NamedTuple):
    """One format: how it is written and verified, required packages, options, the largest accepted difference."""

    # writes the files and returns config.json without the description
    write: Callable[[Job], dict[str, Any]]
    # the largest difference of each comparison
    compare: Callable[[Job], dict[str, float]]
    packages: tuple[str, ...] = ()
    # the extra of this project that installs them
    extra: str = ""
    options: tuple[str, ...] = ()
    limit: float = 1e-5


@on_cpu
def export(
    weights: str | Path | nn.Module,
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
    """Exports an encoder for another program, and verifies its outputs on random images before keeping it.

    Args:
        weights: Weights as accepted by `load_encoder`, or an encoder, which is not modified; it may be wrapped by
            torch.compile, DistributedDataParallel or `as_dino`.
        out: The new folder.
        format: `extrema` (same as `timm`), `vit`, `hf`, `onnx` or `torch-export`.
        which: As in `load_encoder`.
        img_size: As in `load_encoder`.
        fc_norm: vit, hf: replace the final norm by a fresh norm after pooling (the start of the paper's fine-tuning).
        class_token: hf: export the whole encoder instead of the mean-pooled trunk. Loading it requires
            `import extrema_fast.timm` first.
        opset: onnx: operator set version, default 18.
        force: Replace an earlier import or export at `out`.

    Returns:
        `Exported`: the folder, its files, and the largest difference found by each comparison.

    Raises:
        UsageError: An option is invalid for this format, a package is missing, or the weights are not supported.
        ExtremaError: The exported model gives different outputs.
        StorageError: `out` cannot be written. After any error nothing is left at `out`.
    """
    name = _format_name(format)
    form = FORMATS[name]
    given = {"fc_norm": fc_norm, "class_token": class_token or None, "opset": opset}
    options = {k: v for k, v in given.items() if v is not None}
    for option in options:
        if option not in form.options:
            formats = " and ".join(k for k, f in FORMATS.items() if option in f.options)
            raise UsageError(f"--{option.replace('_', '-')}: an option of --format {formats}, not of {name}")
    if class_token and fc_norm:
        raise UsageError(
            "--fc-norm: an option of mean pooling, which --class-token replaces; give only one of them"
        )
    for package in form.packages:
        try:
            importlib.import_module(package)
        # a broken package, e.g. torchvision for another torch, raises other errors
        except (ImportError, RuntimeError, OSError) as error:
            raise UsageError(f"--format {name}: {cannot_import(package, error, form.extra)}") from None
    out = Path(out)
    check_replaceable(out, force)
    source = open_weights(weights, which=which) if isinstance(weights, (str, Path)) else _in_memory(weights)
    warn_left_out(source)
    chosen = source.choose(which)
    pooled = name == "vit" or (name == "hf" and not class_token)
    changes: dict[str, Any] = {"global_pool": "avg", "fc_norm": fc_norm} if pooled else {}
    encoder = load_encoder(source, which, img_size=img_size, **changes).requires_grad_(False)
    if encoder_options(source.meta)["num_classes"] and not encoder.num_classes:
        log.info("the classifier is left out: it was trained with another pooling")
    meta = {**source.meta, "which": None if chosen == SINGLE else chosen}
    kept = kept_card(out)
    if isinstance(weights, (str, Path)):
        meta["record"] = run_record(source.path, source.meta, chosen)
    if isinstance(begun := meta.get("finetuned"), dict):
        meta["finetuned"] = {"weights": short_path(str(begun.get("weights", "")))}
    description = _description(encoder, meta, {"format": name, **options})
    images = [
        torch.randn(b, encoder.in_chans, *encoder.img_size, generator=torch.Generator().manual_seed(b))
        for b in _BATCHES
    ]
    if pooled and encoder.norm_eps != NORM_EPS:
        _check_eps(name, encoder, images)
    log.info("writing %s, then comparing it with the encoder on random images", name)
    with new_folder(out, partial(check_replaceable, force=force)) as folder:
        job = Job(encoder, folder, description, options, images)
        # timm and transformers read class names here
        names = {"label_names": encoder.classes} if encoder.classes else {}
        config = {**form.write(job), **names, "extrema_fast": description}
        write_json(folder / "config.json", config)
        differences = description["export"]["differences"] = _compare(name, job)
        card = model_card(config).encode()
        description["export"]["card"] = card_hash(card)
        write_json(folder / "config.json", config)
        (folder / CARD).write_bytes(card if kept is None else kept)
        files = sorted(p.name for p in folder.iterdir())
    return Exported(out, files, differences)


def _in_memory(model: Any) -> Weights:
    """An encoder in memory in the form of weights that were read; nothing is known of its training."""
    name, encoder = "an encoder in memory", model
    while not isinstance(encoder, Encoder):
        # wrapped by torch.compile, by DistributedDataParallel or an EMA, by `Dino`
        inside = (getattr(encoder, key, None) for key in ("_orig_mod", "module", "encoder"))
        encoder = next((m for m in inside if isinstance(m, nn.Module)), None)
        if encoder is None:
            raise UsageError(f"export: expected a file, a folder or an encoder, got a {type(model).__name__}")
    state = encoder.state_dict()
    if any(map(is_sharded, state.values())):
        raise UsageError(
            "export: the weights of this encoder are sharded over processes; save a full state dict (`full_state_dict` "
            "of torch.distributed.checkpoint.state_dict.get_model_state_dict) and export that file"
        )
    tensors = {plain_name(k): v.detach().cpu() for k, v in state.items()}
    return Weights(Path(name), _description(encoder, {"source": {"file": name}}, {}), {SINGLE: tensors})


def _check_eps(name: str, encoder: Encoder, images: list[Tensor]) -> None:
    """Raises UsageError if the eps of timm's VisionTransformer, which `config.json` cannot set, changes features."""
    stock = copy.deepcopy(encoder)
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = NORM_EPS
    with torch.no_grad():
        difference = _outputs_differ(Job(encoder, Path(), {}, {}, images), stock)
    if difference > FORMATS[name].limit:
        raise UsageError(
            f"--format {name}: the norms of these weights have eps {encoder.norm_eps:g}, those of timm's "
            f"VisionTransformer {NORM_EPS:g}, which changes features by {difference:.1e}; use --format extrema, onnx, "
            "torch-export, or hf with --class-token"
        )


def _format_name(format: str) -> str:
    name = _ALIASES.get(format, format)
    if name in _REMOVED:
        raise UsageError(f"--format: {format!r} was removed; use {_REMOVED[name]}")
    if name not in FORMATS:
        raise UsageError(f"--format: {format!r} is unknown{did_you_mean(format, [*FORMATS, *_ALIASES])}")
    return name


def _description(encoder: Encoder, meta: Mapping[str, Any], export: dict[str, Any]) -> dict[str, Any]:
    """The description of an export: architecture, input, origin."""
    args = model_args(encoder)
    cfg = encoder.own_cfg()
    image = input_meta(*(cfg[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")))
    origin = ("which", "step", "images", "seed", "config_hash", "source", "record", "finetuned")
    return described(
        {
            "model": to_dict(encoder.config),
            "encoder": {
                **{k: args[k] for k in ENCODER_OPTIONS if k in args},
                "num_classes": encoder.num_classes,
            },
            "data": data_meta(encoder.mean, encoder.std, encoder.value_range),
            "input": {**image, "patch_size": encoder.patch_size},
            **{k: meta[k] for k in origin if meta.get(k) is not None},
            **({"classes": encoder.classes} if encoder.classes else {}),
            "export": export,
        }
    )


# ---- comparing ------------------------------------------------------------------------------------


def _compare(name: str, job: Job) -> dict[str, float]:
    """Reads the export back and returns the largest difference of each comparison on random images."""
    form = FORMATS[name]
    try:
        with torch.no_grad():
            differences = form.compare(job)
    except ExtremaError:
        raise
    except Exception as error:
        log.debug("reading the export back", exc_info=True)
        raise ExtremaError(
            f"--format {name}: the export cannot be read back ({type(error).__name__}: {one_line(error, 300)}); "
            "nothing was kept"
        ) from error
    for what, difference in differences.items():
        # `>` would accept nan
        if not difference <= form.limit:
            with torch.no_grad():
                finite = job.encoder(job.images[0]).isfinite().all()
            if not finite:
                raise NonFiniteError(
                    f"--format {name}: the encoder's features are not finite; the weights have diverged: take those of "
                    "an earlier step; nothing was kept"
                )
            raise ExtremaError(
                f"--format {name}: {what} differs by {difference:.2e} from the encoder (at most "
                f"{form.limit:.0e}); nothing was kept"
            )
    return differences


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest absolute difference, relative to the largest value if that is above 1; nan if shapes differ."""
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("nan")
    differences = [
        (a - b).abs().max() / a.abs().max().clamp(min=1) for a, b in zip(ours, theirs, strict=True)
    ]
    # torch's max keeps nan, Python's may drop it
    return float(torch.stack(differences).max())


def _outputs_differ(job: Job, model: nn.Module) -> float:
    def outputs(m: Any) -> list[Tensor]:
        tokens = [m.forward_features(x) for x in job.images]
        return [*tokens, *map(m.forward_head, tokens)]

    return largest_difference(outputs(job.encoder), outputs(model))


# ---- timm -----------------------------------------------------------------------------------------


def _write_extrema(job: Job) -> dict[str, Any]:
    write_tensors(job.folder / WEIGHTS, job.encoder.state_dict())
    return timm_config(job.encoder)


def _compare_extrema(job: Job) -> dict[str, float]:
    # opened first, since warnings are of the source
    found = {"load_encoder": _outputs_differ(job, load_encoder(open_weights(job.folder)))}
    try:
        from .. import timm as _registered  # noqa: F401
    except (ImportError, RuntimeError) as error:
        log.info("not verified with timm, which cannot be imported (%s)", str(error).splitlines()[0])
        return found
    return found | {"timm local-dir": _compare_timm(job)}


def _compare_timm(job: Job) -> float:
    import timm

    model = timm.create_model(f"local-dir:{job.folder.absolute()}", pretrained=True)
    return _outputs_differ(job, model.eval())


def _write_vit(job: Job) -> dict[str, Any]:
    """The mean-pooled trunk as a stock timm ViT without class token."""
    config = _write_extrema(job)
    encoder = job.encoder
    width, depth, heads = encoder.config.shape
    args = {
        "img_size": list(encoder.img_size),
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": encoder.config.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": isinstance(encoder.fc_norm, nn.LayerNorm),
    }
    if "final_norm" in config["model_args"]:
        args["final_norm"] = False
    return {
        **config,
        "architecture": encoder.architecture.removeprefix("extrema_"),
        "global_pool": "avg",
        "model_args": args,
        # for another size timm resamples the table
        "pretrained_cfg": {**config["pretrained_cfg"], "fixed_input_size": True},
    }


def _compare_vit(job: Job) -> dict[str, float]:
    return {"timm local-dir, tokens and pooled": _compare_timm(job)}


# ---- Hugging Face ---------------------------------------------------------------------------------


def _write_hf(job: Job) -> dict[str, Any]:
    write = _write_extrema if "class_token" in job.options else _write_vit
    config = write(job) | {"model_type": "timm_wrapper"}
    processor = {"image_processor_type": "TimmWrapperImageProcessor"}
    processor |= {k: config[k] for k in ("architecture", "pretrained_cfg")}
    write_json(job.folder / "preprocessor_config.json", processor)
    return config


def _compare_hf(job: Job) -> dict[str, float]:
    from transformers import AutoModel, AutoModelForImageClassification

    if "class_token" in job.options:
        from .. import timm as _registered  # noqa: F401
    # of a classifier it reports a head that it does not use
    with _quiet():
        model = AutoModel.from_pretrained(job.folder, local_files_only=True).eval()
    ours, theirs = [], []
    for x in job.images:
        tokens, result = job.encoder.forward_features(x), model(pixel_values=x)
        ours += [tokens, job.encoder.forward_head(tokens, pre_logits=True)]
        theirs += [result.last_hidden_state, result.pooler_output]
    found = {"AutoModel, tokens and pooled": largest_difference(ours, theirs)}
    if job.encoder.num_classes:
        classifier = AutoModelForImageClassification.from_pretrained(job.folder, local_files_only=True).eval()
        logits = [classifier(pixel_values=x).logits for x in job.images]
        wanted = [job.encoder(x) for x in job.images]
        found["AutoModelForImageClassification, logits"] = largest_difference(wanted, logits)
    return found


# ---- graphs ---------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """images [B, C, H, W] fp32, normalized -> class token (or pooled feature) [B, D], patch tokens [B, N, D][, logits].

    Any batch; one image size, since the position table is a constant of the graph.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        out = encoder.encode(images)
        pooled = encoder.fc_norm(out.cls)
        return (pooled, out.patches, encoder.head(pooled)) if encoder.num_classes else (pooled, out.patches)


def _output_names(encoder: Encoder) -> list[str]:
    first = "class_token" if encoder.num_prefix_tokens else "pooled"
    return [first, "patch_tokens", "logits"][: 3 if encoder.num_classes else 2]


def _graph_config(encoder: Encoder) -> dict[str, Any]:
    outputs = _output_names(encoder)
    return {"graph": {"inputs": ["images"], "outputs": outputs, "batch": "any", "image size": "fixed"}}


def _program(encoder: Encoder) -> torch.export.ExportedProgram:
    """The encoder as an exported program of torch's own operators, with a dynamic batch."""
    encoder.set_attention("sdpa")
    for op in ("attention", "attention_pool", "patch_gather"):
        name = ops.choice(op, "cpu", say=False)[0]
        if name not in ("auto", "sdpa", "absorbed", "reference", "matmul"):
            raise UsageError(
                f"export: EXTREMA_FAST_BACKEND requests {op}={name}, but a graph has torch's operators only; unset it"
            )
    # torch.export would make a batch size of 1 a constant
    example = torch.zeros(2, encoder.in_chans, *encoder.img_size)
    batch = torch.export.Dim("batch", max=65535)
    with torch.no_grad():
        return torch.export.export(_Graph(encoder), (example,), dynamic_shapes={"images": {0: batch}})


def _compare_graph(job: Job, run: Callable[[Tensor], Sequence[Tensor]], what: str) -> dict[str, float]:
    encoder = job.encoder
    ours, theirs = ([y for x in job.images for y in f(x)] for f in (_Graph(encoder), run))
    found = {f"{what}, {', '.join(_output_names(encoder))}": largest_difference(ours, theirs)}
    height, width = encoder.img_size
    try:
        run(torch.zeros(1, encoder.in_chans, height + encoder.patch_size, width))
    except Exception:
        return found
    raise ExtremaError(
        f"{what}: the graph accepts another image size than {height} x {width}, for which it is wrong"
    )


def _write_program(job: Job) -> dict[str, Any]:
    with _quiet():
        extra = {"extrema_fast.json": json.dumps(job.description)}
        # in memory: on a full disk torch's writer aborts the process
        held = io.BytesIO()
        torch.export.save(_program(job.encoder), held, extra_files=extra)
    (job.folder / PROGRAM).write_bytes(held.getbuffer())
    return _graph_config(job.encoder)


def _compare_program(job: Job) -> dict[str, float]:
    with _quiet():
        run = torch.export.load(job.folder / PROGRAM).module()
    return _compare_graph(job, run, "torch.export")


def _write_onnx(job: Job) -> dict[str, Any]:
    opset = job.options.get("opset", OPSET)
    if opset < OPSET:
        raise UsageError(f"--opset: torch's exporter supports {OPSET} and later, got {opset}")
    with _quiet():
        try:
            onnx = torch.onnx.export(
                _program(job.encoder),
                input_names=["images"],
                output_names=_output_names(job.encoder),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UsageError(f"--opset {opset}: torch cannot write it ({one_line(error)})") from None
    assert onnx is not None  # with dynamo=True
    # torch only logs a failed conversion to another operator set
    if (written := onnx.model.opset_imports.get("")) != opset:
        raise UsageError(f"--opset {opset}: torch wrote {written} instead; give a lower one")
    onnx.model.metadata_props["extrema_fast"] = json.dumps(job.description)
    size = sum(p.numel() * p.element_size() for p in job.encoder.state_dict().values())
    onnx.save(job.folder / ONNX, external_data=size > _ONNX_IN_ONE_FILE)
    return _graph_config(job.encoder)


def _compare_onnx(job: Job) -> dict[str, float]:
    import onnx
    import onnxruntime

    file = str(job.folder / ONNX)
    onnx.checker.check_model(file)
    settings = onnxruntime.SessionOptions()
    # errors are raised; the log would repeat them
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]

    return _compare_graph(job, run, "onnxruntime")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences exporters, which warn about their own deprecations; what they wrote is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- formats --------------------------------------------------------------------------------------


FORMATS: dict[str, Format] = {
    "extrema": Format(_write_extrema, _compare_extrema),
    "vit": Format(_write_vit, _compare_vit, ("timm",), "timm", ("fc_norm",)),
    "hf": Format(_write_hf, _compare_hf, ("timm", "transformers"), "hf", ("fc_norm", "class_token")),
    "onnx": Format(
        _write_onnx, _compare_onnx, ("onnx", "onnxscript", "onnxruntime"), "onnx", ("opset",), limit=1e-4
    ),
    "torch-export": Format(_write_program, _compare_program),
}
_ALIASES = {"timm": "extrema"}
_REMOVED = {
    "torchscript": "onnx or torch-export",
    "cait": "extrema, which timm loads after `import extrema_fast.timm`",
}
