"""From the loader to the step: a batch on the device with all its coins drawn, beside the step before.

On a GPU a stream of its own copies crops into one of two buffers that take turns, and draws there what is random of
the batch (keep indices of all views, colour coins, drop-path). The host only enqueues:

    step's stream    ... step t-1 ....|.... step t ......|.... step t+1
    side stream           copy, draw t      copy, draw t+1      copy, draw t+2
    waits                 t-2 is read       t-1 is read         t is read

Two events per buffer keep the order: `filled` before the step reads it, `read` before it is filled again. Before they
are used again their times tell how long the step's stream stood still for its batch; the host's own waiting says
nothing of that, since it is ahead. It is at most two steps ahead, so that batches do not pile up in memory. The
buffers have fixed shapes and places; a recorded step (`graph.StepGraph`) copies from them when it is replayed. On a
CPU batches pass through, and the step draws for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .loader import Batch


class _Buffer(NamedTuple):
    images: Tensor
    filled: torch.cuda.Event
    read: torch.cuda.Event


def feed(
    loader: Iterator[Batch], draw: Callable[[Tensor, Tensor, int], Any], device: torch.device
) -> Iterator[Batch]:
    """The loader's batches, with `images` on the device and `parts` drawn when that is a GPU.

    draw  (images [b, H, W, 3] uint8 on the device, index [b] int64 on the CPU, epoch) -> tensors of the step, nested
    A batch is the caller's until it asks for the next one: its images are then written over.
    """
    return iter(loader) if device.type == "cpu" else _Feed(loader, draw, device)


class _Feed:
    def __init__(
        self, loader: Iterator[Batch], draw: Callable[[Tensor, Tensor, int], Any], device: torch.device
    ) -> None:
        self.loader, self.draw, self.device = loader, draw, device
        self.side = torch.cuda.Stream(device)
        self.buffers: list[_Buffer] = []
        self.turn, self.given = 0, 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> Batch:
        step, waited = torch.cuda.current_stream(self.device), self._waited()
        if self.buffers:
            # all that reads the last batch has been enqueued by now
            self.buffers[self.turn].read.record(step)
        with torch.cuda.stream(self.side):
            batch = next(self.loader)
            buffer = self._next_buffer(batch.images)
            self.side.wait_event(buffer.read)
            buffer.images.copy_(batch.images, non_blocking=True)
            parts = self.draw(buffer.images, batch.index, batch.epoch)
            buffer.filled.record(self.side)
        step.wait_event(buffer.filled)
        for tensor in pytree.tree_leaves(parts):
            # made on the side, read by the step: its memory is free when the step has read it
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(step)
        self.given += 1
        return batch._replace(images=buffer.images, parts=parts, waited=waited)

    def _waited(self) -> float:
        """Seconds the step before the last one waited for its batch after the step before it had ended."""
        if self.given < 3:
            return 0.0
        ended, filled = self.buffers[self.turn].read, self.buffers[1 - self.turn].filled
        ended.synchronize()
        filled.synchronize()
        return max(0.0, ended.elapsed_time(filled) / 1000)

    def _next_buffer(self, images: Tensor) -> _Buffer:
        if not self.buffers:
            for _ in range(2):
                mine = torch.empty(images.shape, dtype=images.dtype, device=self.device)
                # one that was never recorded is not waited for
                filled, read = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
                self.buffers.append(_Buffer(mine, filled, read))
        self.turn = 1 - self.turn
        return self.buffers[self.turn]
