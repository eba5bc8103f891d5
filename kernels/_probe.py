"""The smallest kernel, which shows whether Triton can compile and start one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


def run(device: torch.device) -> None:
    """Compiles and starts the kernel on a GPU; raises whatever Triton raises."""
    with torch.cuda.device(device):
        probe_kernel[(1,)](torch.empty(1, dtype=torch.int32, device=device))
