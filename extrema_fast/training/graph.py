"""The whole step as one CUDA graph: recorded once, then replayed with new inputs in the same places."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)

# steps run before recording, so that kernels, plans and compiled code are there
EAGER_STEPS = 3


class StepGraph:
    """Calls `compute(inputs)`: as it is for the first steps, then by replaying a recording of it.

    compute  reads `inputs` (tensors, nested) and fixed tensors, and writes fixed tensors; no host reads
    Inputs of another structure or shape (a step whose drop-path did not fit) run as they are. A recording
    that fails is logged once, and all later steps run as they are.
    """

    def __init__(self, compute: Callable[[Any], None], device: torch.device) -> None:
        self.compute, self.device = compute, device
        self.side = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.spec: Any = None
        self.steps, self.failed = 0, False

    def __call__(self, inputs: Any) -> None:
        """One step; recording executes nothing, so the step that records is replayed like all later ones."""
        tensors, spec = pytree.tree_flatten(inputs)
        self.steps += 1
        if self.failed or self.steps <= EAGER_STEPS:
            self._on_the_side(inputs)
            return
        if self.graph is None and not self._record(tensors, spec):
            self._on_the_side(inputs)
            return
        if not self._fits(tensors, spec):
            self.compute(inputs)
            return
        for mine, given in zip(self.inputs, tensors, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given, non_blocking=True)
        self.graph.replay()  # type: ignore[union-attr]

    def _fits(self, tensors: list[Any], spec: Any) -> bool:
        return spec == self.spec and all(
            a.shape == b.shape and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
            for a, b in zip(self.inputs, tensors, strict=True)
        )

    def _on_the_side(self, inputs: Any) -> None:
        # what warms up must have run on a stream that may be recorded
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            self.compute(inputs)
        here.wait_stream(self.side)

    def _record(self, tensors: list[Any], spec: Any) -> bool:
        self.inputs = [t.clone() if isinstance(t, Tensor) else t for t in tensors]
        self.spec, graph = spec, torch.cuda.CUDAGraph()
        try:
            # decoding threads may allocate meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.compute(pytree.tree_unflatten(self.inputs, spec))
        except RuntimeError as error:
            self.failed, self.inputs = True, []
            log.warning("train.cuda_graph: the step cannot be recorded (%s); it runs as it is", error)
            return False
        self.graph = graph
        log.info("train.cuda_graph: step recorded after %d plain ones", self.steps - 1)
        return True
