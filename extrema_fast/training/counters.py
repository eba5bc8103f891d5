"""Running sums over steps, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import wide

LOSS, NORM, GOOD, SKIPPED, IN_A_ROW, WORST = range(6)
# after those that are saved: steps since the last line, and the last of them that was skipped
STEPS, LATEST = range(6, 8)


class Arrival:
    """A copy of a small tensor on its way to the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        # pinned memory, when it comes from a CUDA device; MPS has no events to wait for
        self.copy = tensor.to("cpu", non_blocking=tensor.is_cuda, copy=True)
        self.event = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def arrived(self) -> bool:
        """Whether `numbers` returns without waiting."""
        return self.event is None or self.event.query()

    def numbers(self) -> list[float]:
        """The tensor's values."""
        if self.event is not None:
            self.event.synchronize()
        return self.copy.tolist()


class Reading(Arrival):
    """A copy of the counters on its way to the CPU."""

    def values(self) -> dict[str, Any]:
        """Mean loss and gradient norm of the good steps (None without any), skipped steps, most of them in a row.

        `since_skipped`: how many steps before the reading the latest skipped one of the interval was; None: none was.
        """
        values = self.numbers()
        loss, norm = (v / values[GOOD] if values[GOOD] else None for v in values[:2])
        return {
            "loss": loss,
            "grad_norm": norm,
            "skipped": int(values[SKIPPED]),
            "skipped_in_a_row": int(values[WORST]),
            "since_skipped": int(values[STEPS] - values[LATEST]) if values[LATEST] else None,
        }


class Counters:
    """Sums over the steps since the last log line.

    `tensor` [6] fp64 (fp32 on MPS) is on the device, so that no step waits for it, and in the checkpoint, so that a
    resumed run logs the same values.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._all = torch.zeros(8, dtype=wide(device), device=device)
        self.tensor = self._all[:6]
        # what a skipped step adds to the sums
        self._skipped = torch.zeros(4, dtype=self._all.dtype, device=device)
        self._skipped[SKIPPED] = 1

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Adds a step: scalar loss and gradient norm; `bad` is 1 when the step was skipped."""
        loss, norm, bad = (x.to(self._all.dtype) for x in (loss, norm, bad))
        good = torch.stack([loss, norm, self._skipped[3], self._skipped[0]])
        # loss and norm of a bad step may be NaN
        self._all[: SKIPPED + 1] += torch.where(bad > 0, self._skipped, good)
        # (in a row, steps), and the largest of each at a skipped step
        counts, largest = self._all[IN_A_ROW::2], self._all[WORST::2]
        counts += 1
        skipped = counts * bad
        counts[0].copy_(skipped[0])
        torch.maximum(largest, skipped, out=largest)

    def read(self) -> Reading:
        """The sums so far; does not wait for a GPU."""
        return Reading(self._all)

    def worst_in_a_row(self) -> int:
        """Most skipped steps in a row since the last `restart`; waits for the device."""
        return int(self.tensor[WORST].item())

    def in_a_row(self) -> int:
        """How many of the latest steps in a row were skipped; waits for the device."""
        return int(self.tensor[IN_A_ROW].item())

    def restart(self) -> None:
        """Begins the next interval; the total of skipped steps stays."""
        self.tensor[:SKIPPED] = 0
        self.tensor[WORST] = self.tensor[IN_A_ROW]
        self._all[STEPS:] = 0
