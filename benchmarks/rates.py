"""What this machine can do, measured in the run that is compared with it: large products and copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def clock(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, by events on a GPU."""
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


class Rates:
    """Large matrix products (a linear layer, n x n x n) and copies of this device; buffers are kept.

    precisions  of `DTYPES`
    """

    def __init__(self, device: str, precisions: list[str]) -> None:
        self.device = device
        gpu = device.startswith("cuda")
        self.side = 8192 if gpu else 3072
        generator = torch.Generator(device).manual_seed(0)
        random = torch.randn(2, self.side, self.side, generator=generator, device=device)
        self.factors = {p: random.to(DTYPES[p]) for p in precisions}
        self.source = torch.randint(
            1, 255, (2**30 if gpu else 2**28,), dtype=torch.uint8, generator=generator, device=device
        )
        self.target = torch.empty_like(self.source)
        for _ in range(3 if gpu else 1):
            self.sample()

    def product_tflops(self, precision: str) -> float:
        """TFLOP/s of one product."""
        a, b = self.factors[precision]
        with torch.no_grad():
            return 2 * self.side**3 / clock(lambda: F.linear(a, b), self.device) / 1e9

    def copy_gb_per_s(self) -> float:
        """GB/s of one copy, bytes read and bytes written together."""
        return 2 * self.source.numel() / clock(lambda: self.target.copy_(self.source), self.device) / 1e6

    def sample(self) -> dict[str, float]:
        """One measurement of each: `{"products_bf16_tflops": ..., "copy_gb_per_s": ...}`."""
        found = {f"products_{p}_tflops": self.product_tflops(p) for p in self.factors}
        return found | {"copy_gb_per_s": self.copy_gb_per_s()}


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """The median of every rate over its samples."""
    return {key: statistics.median(s[key] for s in samples) for key in samples[0]}
