"""The rows of a global batch, as a pure function of (seed, epoch, step), for any number of processes.

global   all rows of the epoch, permuted
shards   the tar shards are permuted, and each row is moved by a random distance of up to `data.window` shards. At any
         time rows come from the last `window` shards only, so reads stay local. The end of an epoch wraps around to its
         beginning, so that all rows are mixed equally. A window of all shards shuffles like `global`
"""

from __future__ import annotations

from collections.abc import Sized
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .. import rng
from ..config import DataConfig
from ..errors import UsageError
from .image_source import ImageSource

# candidates that replace a row that cannot be used; the first ones are rows that the epoch leaves out
SUBSTITUTES = 64
_LEFT_OVER_FIRST = 4
# rows drawn at a time
_CHUNK = 1 << 16


def epoch_length(source: Sized) -> int:
    """Rows of an epoch, those of its incomplete last batch included; without fractions of a mixture, its length."""
    return sum(_count(*part) for part in getattr(source, "parts", ())) or len(source)


def _count(first: int, end: int, passes: float) -> int:
    return max(1, round(passes * (end - first)))


class Order:
    """The rows of every global batch, and the candidates that replace a row that cannot be used.

    An epoch holds each row once; its incomplete last batch is left out. In a mixture, a part of n rows with `passes` p
    gives round(p n) rows per epoch, the next ones of an endless sequence of permutations. The next epoch is shuffled in
    a thread while the current one is read; two epochs are held, 8 bytes per row each.

    Raises:
        UsageError: `data.order` shards for a source without shards, or a batch larger than an epoch.
    """

    def __init__(self, source: ImageSource, cfg: DataConfig, batch_size: int, seed: int) -> None:
        if cfg.order == "shards" and source.shards is None:
            raise UsageError(
                f"data.order: shards needs images in tar shards only, and {source.name} has others; "
                "use --data.order global"
            )
        self.length = epoch_length(source)
        if self.length < batch_size:
            raise UsageError(
                f"train.batch_size: {batch_size} is more than the {self.length} images of {source.name}; "
                f"use at most {self.length}"
            )
        self.source, self.cfg, self.batch_size, self.seed = source, cfg, batch_size, seed
        self.steps = self.length // batch_size
        self._epochs: dict[int, Future[np.ndarray]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="order")

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, [batch_size] int64 rows) of a step."""
        epoch, batch = divmod(step, self.steps)
        return epoch, self._rows(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def substitutes(self, step: int, place: int) -> np.ndarray:
        """[SUBSTITUTES] int64 rows that may replace the row at a place of a batch, in the order they are tried."""
        epoch, batch = divmod(step, self.steps)
        at = torch.tensor([batch * self.batch_size + place])
        w = rng.words(at, SUBSTITUTES, seed=self.seed, epoch=epoch, stream=rng.SUBSTITUTE)[0].numpy()
        rows = self._rows(epoch)
        left_over = rows[self.steps * self.batch_size :]
        chosen = rows[w % len(rows)]
        if len(left_over):
            chosen[:_LEFT_OVER_FIRST] = left_over[w[:_LEFT_OVER_FIRST] % len(left_over)]
        return chosen

    def close(self) -> None:
        """Ends the thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _rows(self, epoch: int) -> np.ndarray:
        for e in (epoch, epoch + 1):
            if e not in self._epochs:
                self._epochs[e] = self._worker.submit(self._shuffle, e)
        for e in [e for e in self._epochs if e not in (epoch, epoch + 1)]:
            self._epochs.pop(e).cancel()
        return self._epochs[epoch].result()

    def _shuffle(self, epoch: int) -> np.ndarray:
        rows = self._drawn(epoch)
        if self.cfg.order == "shards":
            return rows[self._by_shards(rows, epoch)].numpy()
        return rows[rng.permutation(self.length, seed=self.seed, epoch=epoch)].numpy()

    def _drawn(self, epoch: int) -> torch.Tensor:
        """[length] int64 rows of an epoch, not shuffled."""
        if not self.source.parts:
            return torch.arange(len(self.source))
        drawn = []
        for number, (first, end, passes) in enumerate(self.source.parts):
            n, count = end - first, _count(first, end, passes)
            begin = epoch * count
            for i in range(begin // n, (begin + count - 1) // n + 1):
                order = rng.permutation(n, seed=self.seed + number, epoch=i, stream=rng.PASS)
                drawn.append(first + order[max(begin - i * n, 0) : begin + count - i * n])
        return torch.cat(drawn)

    def _by_shards(self, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        shard_of = torch.from_numpy(np.unique(np.asarray(self.source.shards), return_inverse=True)[1])
        shards = int(shard_of.max()) + 1
        window = min(self.cfg.window, shards)
        place = rng.permutation(shards, seed=self.seed, epoch=epoch, stream=rng.SHARD)
        when = place[shard_of[rows]] << 32
        for start in range(0, len(rows), _CHUNK):
            # of the place in the epoch's draw, so that a row drawn twice goes to two places
            at = torch.arange(start, min(start + _CHUNK, len(rows)))
            word = rng.words(at, 1, seed=self.seed, epoch=epoch, stream=rng.ORDER)[:, 0]
            when[start : start + _CHUNK] += window * word
        return torch.argsort(when % (shards << 32), stable=True)
