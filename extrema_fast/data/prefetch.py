"""Between loader and step: batches on the device, with their random parameters drawn.

On a GPU a side stream copies the images into one of two buffers (images already on the GPU are used in place) and draws
there while the previous step runs; the CPU only enqueues. On a CPU both happen when the next batch is requested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .loader import Batch

Draw = Callable[[Tensor, Tensor, int], Any]


@dataclass
class _Slot:
    """A batch's images, and when they have been written and read."""

    filled: torch.cuda.Event
    read: torch.cuda.Event
    images: Tensor | None = None

    def put(self, images: Tensor, device: torch.device) -> Tensor:
        """Takes images, or a copy of them from the CPU; the old ones have been read by now, on the current stream."""
        if images.device.type != "cpu":
            # before this, their memory might have been given to another batch while a step still read it
            self.images = images
        else:
            if self.images is None or self.images.shape != images.shape:
                self.images = torch.empty(images.shape, dtype=images.dtype, device=device)
            self.images.copy_(images, non_blocking=True)
        return self.images


def prefetch(loader: Iterable[Batch], draw: Draw, device: torch.device) -> Iterator[Batch]:
    """Yields the loader's batches with `images` on the device, `micro_batches` drawn and `waited` measured.

    Args:
        loader: batches on the CPU, or on the GPU when images are decoded there.
        draw: (images as of `Batch` on the device, index [b] int64 on the CPU, epoch) -> `Batch.micro_batches`,
            tensors in any nesting.
        device: where the step runs. On a GPU a batch is valid until the next one is asked for: its images are
            then overwritten.
    """
    return (_on_gpu if device.type == "cuda" else _on_cpu)(iter(loader), draw, device)


def _on_cpu(loader: Iterator[Batch], draw: Draw, device: torch.device) -> Iterator[Batch]:
    began = time.perf_counter()
    for batch in loader:
        waited, images = time.perf_counter() - began, batch.images.to(device)
        drawn = draw(images, batch.index, batch.epoch)
        yield batch._replace(images=images, micro_batches=drawn, waited=waited)
        began = time.perf_counter()


def _on_gpu(loader: Iterator[Batch], draw: Draw, device: torch.device) -> Iterator[Batch]:
    """Two slots in turn, two events each: `filled` before the step reads it, `read` before it is filled again.

    step's stream    ... step t-1 ....|.... step t ......|.... step t+1
    side stream           copy, draw t      copy, draw t+1      copy, draw t+2
    waits for             step t-2          step t-1            step t

    Before the events are used again, their times tell how long the step's stream waited for its batch.
    """
    side = torch.cuda.Stream(device)
    # an event that was never recorded is not waited for; [0] is the batch before the last one, [1] the last one
    slots = [_Slot(_event(), _event()) for _ in range(2)]
    count = 0
    while True:
        step = torch.cuda.current_stream(device)
        waited = _waited(*slots) if count >= 3 else 0.0
        if count:
            # everything that reads the last batch has been enqueued by now
            slots[1].read.record(step)
        with torch.cuda.stream(side):
            batch = next(loader, None)
            if batch is None:
                return
            slots.reverse()
            slot = slots[1]
            side.wait_event(slot.read)
            images = slot.put(batch.images, device)
            drawn = draw(images, batch.index, batch.epoch)
            slot.filled.record(side)
        step.wait_event(slot.filled)
        for tensor in pytree.tree_leaves(drawn):
            # allocated on the side stream, read by the step: not to be reused before the step has read it
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(step)
        count += 1
        yield batch._replace(images=images, micro_batches=drawn, waited=waited)


def _waited(before_last: _Slot, last: _Slot) -> float:
    """Seconds the step before the last one waited for its batch, after the step before that had ended."""
    # `last.read` has not been recorded for the last batch yet: it tells the end of the step before `before_last`
    last.read.synchronize()
    before_last.filled.synchronize()
    return max(0.0, last.read.elapsed_time(before_last.filled) / 1000)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)
