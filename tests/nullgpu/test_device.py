"""The null GPU itself: what it counts and what it refuses.

Covers: launches by name, copies by direction, pageable ones, waits; limits of a launch; out of memory; rules of
capture: a forbidden call, a stream that is not joined, an event from outside, nodes of a replayed graph; conditions
hold and comparisons still see shapes; registers and spills of Triton's machine code; several devices.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.nullgpu import counters


def test_counts():
    pinned, pageable = torch.ones(5).pin_memory(), torch.ones(5)
    x = torch.empty(5, device="cuda")
    counters.reset()
    x.copy_(pinned, non_blocking=True)
    x.copy_(pageable, non_blocking=True)
    x.add_(1)
    x.fill_(2)
    x.sum().item()
    found = counters.counts()
    assert found["copies_h2d"] == 2 and found["copies_d2h"] == 1 and found["copies"] == 3
    assert found["copies_pageable"] == 1 and found["syncs"] == 1
    assert found["launches"] == sum(counters.kernels().values()) == 3


def test_copies_are_real_and_kernels_are_not():
    x = torch.arange(5).cuda()
    assert x.cpu().tolist() == [0, 1, 2, 3, 4] and (x + 1).clone().cpu().tolist() != [1, 2, 3, 4, 5]


def test_conditions_hold_and_shapes_are_compared():
    x = torch.zeros(5, device="cuda")
    assert x.isfinite().all() and not x.isnan().any() and torch.equal(x, x + 1)
    assert x.sum() > 1 and x.sum().item() == 0 and x.nonzero().shape == (0, 1)
    assert not torch.equal(x, torch.zeros(6, device="cuda"))
    torch.testing.assert_close(x, x + 1)
    for other in (torch.zeros(6, device="cuda"), x.half(), x.cpu()):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(x, other)


def test_memory_ends():
    free, total = torch.cuda.mem_get_info()
    assert 79 * 2**30 < total < 80 * 2**30 and free <= total
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total, dtype=torch.uint8, device="cuda")


# ---- rules of capture ------------------------------------------------------------------------------


def capture(body) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def test_a_graph_replays_its_nodes():
    x = torch.zeros(5, device="cuda")

    def body():
        x.add_(1)
        x.mul_(2)

    graph = capture(body)
    counters.reset()
    graph.replay()
    found = counters.counts()
    assert (found["graph_launches"], found["graph_nodes"], found["launches"]) == (1, 2, 0)


def test_forks_that_join_are_captured():
    x, side = torch.zeros(5, device="cuda"), torch.cuda.Stream()

    def body():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        torch.cuda.current_stream().wait_stream(side)

    counters.reset()
    capture(body)
    assert counters.counts()["outside_capture"] == 0


def waits(x, side):
    x.sum().item()


def does_not_join(x, side):
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)


def awaits_an_event_from_outside(x, side):
    torch.cuda.current_stream().wait_event(side.record_event())


@pytest.mark.parametrize("body", [waits, does_not_join, awaits_an_event_from_outside])
def test_what_a_capture_refuses(body):
    x, side = torch.zeros(5, device="cuda"), torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="null GPU error 90"):
        capture(lambda: body(x, side))
    torch.cuda.synchronize()


def test_work_outside_a_capture_is_counted():
    x, side = torch.zeros(5, device="cuda"), torch.cuda.Stream()

    def body():
        x.add_(1)
        with torch.cuda.stream(side):
            x.add_(1)

    counters.reset()
    capture(body)
    assert counters.counts()["outside_capture"] == 1


# ---- Triton's machine code ---------------------------------------------------------------------------


def test_registers_of_a_kernel_are_those_of_its_machine_code(tmp_path):
    import triton
    from extrema_fast.kernels import _launch, short_attention

    qkv = torch.zeros(4, 39, 3, 12, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with _launch.recording() as found:
        short_attention(qkv).sum().backward()
    assert len(found.launches) >= 2
    for launch in found.launches:
        file = tmp_path / "kernel.cubin"
        file.write_bytes(launch.compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        assert f"REG:{launch.compiled.n_regs} STACK:{4 * launch.compiled.n_spills} " in usage


# ---- several devices -----------------------------------------------------------------------------------

TWO = """
import torch
x = torch.empty(5, device="cuda:1")
assert torch.cuda.device_count() == 2 and x.device.index == 1
assert torch.cuda.memory_allocated(1) and not torch.cuda.memory_allocated(0)
try:
    x + torch.empty(5, device="cuda:0")
except RuntimeError as error:
    assert "two devices" in str(error)
else:
    raise SystemExit("nothing was refused")
"""


def test_two_devices():
    done = subprocess.run([sys.executable, "-c", TWO], env=os.environ | {"NULLGPU_DEVICES": "2"})
    assert done.returncode == 0
