"""Exports as a graph: ONNX, torch.export, TorchScript.

    images [B, C, H, W] fp32, normalised -> class_token [B, D] (or the pooled feature, without class head),
                                            patch_tokens [B, N, D][, logits [B, classes]]

Any batch; one image size, since the position table is a constant of the graph. An image of another size is an
error of the program that runs it (`Got invalid dimensions`, `Guard failed`, `images: expected ...`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExtremaError, UsageError
from ..models.encoder import Encoder
from ..ops import dispatch as ops
from .export_timm import largest_difference
from .files import write_json

ONNX, PROGRAM, SCRIPT = "model.onnx", "model.pt2", "model.ts"
OPSET = 18
# a protocol buffer holds 2 GiB; larger weights go into a file beside it
_ONNX_IN_ONE_FILE = 1_800_000_000


class Graph(nn.Module):
    """What is exported: images -> (class token or pooled feature, patch tokens[, logits])."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        out = encoder.encode(images)
        pooled = encoder.fc_norm(out.cls)
        return (pooled, out.patches, encoder.head(pooled)) if encoder.num_classes else (pooled, out.patches)


def output_names(encoder: Encoder) -> list[str]:
    first = "class_token" if encoder.num_prefix_tokens else "pooled"
    return [first, "patch_tokens", "logits"][: 3 if encoder.num_classes else 2]


def _example(encoder: Encoder) -> Tensor:
    # a batch of one would become a constant of the graph
    return torch.zeros(2, encoder.in_chans, *encoder.img_size)


def _write_config(encoder: Encoder, folder: Path, own: Mapping[str, Any]) -> None:
    graph = {"inputs": ["images"], "outputs": output_names(encoder), "batch": "any", "image size": "fixed"}
    write_json(folder / "config.json", {"graph": graph, "extrema_fast": own})


def program(encoder: Encoder) -> torch.export.ExportedProgram:
    """The encoder as an exported program of torch's own operators, with a dynamic batch."""
    _only_torch(encoder)
    batch = torch.export.Dim("batch", max=65535)
    with torch.no_grad():
        return torch.export.export(
            Graph(encoder), (_example(encoder),), dynamic_shapes={"images": {0: batch}}
        )


def _only_torch(encoder: Encoder) -> None:
    """raises UsageError where a setting would put operators into the graph that nobody else has."""
    encoder.set_attention("sdpa")
    for op in ("attention", "attention_pool", "patch_gather"):
        name = ops.choice(op, "cpu", say=False)[0]
        if name not in ("auto", "sdpa", "absorbed", "reference", "products"):
            raise UsageError(
                f"export: {op}={name} is asked for, and a graph holds torch's own operators alone; "
                "unset EXTREMA_FAST_BACKEND"
            )


def _compare(encoder: Encoder, run: Any, images: Sequence[Tensor], what: str) -> dict[str, float]:
    graph = Graph(encoder)
    found = max(largest_difference(graph(x), run(x)) for x in images)
    _check_refuses(encoder, run, what)
    return {f"{what}, {', '.join(output_names(encoder))}": found}


def _check_refuses(encoder: Encoder, run: Any, what: str) -> None:
    height, width = encoder.img_size
    other = torch.zeros(1, encoder.in_chans, height + encoder.patch_size, width)
    try:
        run(other)
    except Exception:
        return
    raise ExtremaError(f"{what}: the graph takes images of another size than {height} x {width}")


# ---- torch.export ---------------------------------------------------------------------------------


def write_program(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    _write_config(encoder, folder, own)
    with _quiet():
        torch.export.save(
            program(encoder), folder / PROGRAM, extra_files={"extrema_fast.json": json.dumps(own)}
        )


def compare_program(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    with _quiet():
        run = torch.export.load(folder / PROGRAM).module()
    return _compare(encoder, run, images, "torch.export")


# ---- ONNX -----------------------------------------------------------------------------------------


def write_onnx(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    opset = OPSET if options["opset"] is None else options["opset"]
    if opset < OPSET:
        raise UsageError(f"--opset: the exporter of torch starts at {OPSET}, got {opset}")
    _write_config(encoder, folder, own)
    with _quiet():
        try:
            made = torch.onnx.export(
                program(encoder),
                input_names=["images"],
                output_names=output_names(encoder),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UsageError(
                f"--opset {opset}: torch cannot write it ({' '.join(str(error).split())[:200]})"
            ) from None
    if (written := made.model.opset_imports.get("")) != opset:
        # torch logs that it failed to convert, and goes on with what it had
        raise UsageError(f"--opset {opset}: torch wrote {written} instead; give a lower one")
    made.model.metadata_props["extrema_fast"] = json.dumps(own)
    size = sum(p.numel() * p.element_size() for p in encoder.state_dict().values())
    made.save(folder / ONNX, external_data=size > _ONNX_IN_ONE_FILE)


def compare_onnx(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(folder / ONNX))
    settings = onnxruntime.SessionOptions()
    # its own errors are raised; the log would repeat them
    settings.log_severity_level = 4
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / ONNX), settings, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]

    return _compare(encoder, run, images, "onnxruntime")


# ---- TorchScript ----------------------------------------------------------------------------------


class _Checked(nn.Module):
    """A traced graph behind a check that a trace itself would lose."""

    def __init__(self, graph: nn.Module, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.graph = graph
        self.channels, self.height, self.width = channels, height, width

    def forward(self, images: Tensor):
        if images.dim() != 4 or images.shape[1:] != [self.channels, self.height, self.width]:
            raise RuntimeError(
                f"images: expected [B, {self.channels}, {self.height}, {self.width}], got {images.shape}"
            )
        return self.graph(images)


def write_script(encoder: Encoder, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    _write_config(encoder, folder, own)
    _only_torch(encoder)
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(Graph(encoder), _example(encoder), check_trace=False)
        script = torch.jit.script(_Checked(traced, encoder.in_chans, *encoder.img_size))
        torch.jit.save(script, str(folder / SCRIPT), _extra_files={"extrema_fast.json": json.dumps(own)})


def compare_script(
    encoder: Encoder, folder: Path, images: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, float]:
    with _quiet():
        run = torch.jit.load(str(folder / SCRIPT))
    return _compare(encoder, run, images, "TorchScript")


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own deprecations and of checks on shapes; what they made is compared afterwards."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
