"""Shipped configurations, compiled without a GPU: in turns for one of sm_80, sm_90, sm_100 and sm_120.

Compiled are those whose source is not the one that the committed table (benchmarks/records/registers.json) was made
of, and one more. (`python -m benchmarks registers` compiles all for all, in minutes.)

Covers: no spills, no local memory, shared memory within each chip's limit; the table names every variant and none has
become worse (registers, shared memory, programs per multiprocessor, accesses below 16 bytes); strides multiplied in
64 bits; how a launch becomes a signature.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from extrema_fast.kernels import _launch, aot
from extrema_fast.kernels._spec import OPS, meta, spec

pytestmark = [
    pytest.mark.plain,
    pytest.mark.skipif(not _launch.HAS_TRITON, reason="Triton is not installed"),
]
REMAKE = "python -m benchmarks registers"


def test_everything_compiles_within_limits_and_no_worse_than_before(repository):
    import triton

    table = json.loads((repository / "benchmarks/records/registers.json").read_text(encoding="utf-8"))
    variants = [f"{op} | {name}" for op in OPS for name in spec(op).variants()]
    # what another version of Triton makes of them is not known
    same = triton.__version__ == table["triton"]
    # the last is compiled whether it is known or not
    known = {k: v for k, v in table["sources"].items() if same and k != variants[-1]}
    rows = {f"{r['op']} | {r['variant']} | sm_{r['arch']}": r for r in aot.compile_rows(list(OPS), 1, known)}
    problems = [f"{name}: {p}" for name, row in rows.items() for p in row["problems"]]
    assert any(name.startswith(variants[-1]) for name in rows)
    assert not problems, "\n" + "\n".join(problems)
    assert not any(r["stack"] or r["local"] for r in table["rows"].values())
    assert {name.rpartition(" | ")[0] for name in table["rows"]} == set(variants), f"other variants; {REMAKE}"
    if not same:
        pytest.skip(f"the table was made with Triton {table['triton']}, this is {triton.__version__}")
    worse = []
    for name, row in rows.items():
        was = table["rows"][name]
        narrow = row["accesses"] - row["wide"] > was["accesses"] - was["wide"]
        more = row["registers"] > was["registers"] + 8 or row["shared"] > was["shared"] + 1024
        if narrow or more or row["ctas"] < was["ctas"]:
            worse.append(f"{name}: {was} before, now {row}")
    assert not worse, f"\nif this is meant, {REMAKE}\n" + "\n".join(worse)


def test_strides_are_multiplied_in_64_bits(repository):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels._strides"]
    done = subprocess.run(command, env=env, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    # q, k and v as planes of a large tensor are this far from each other
    assert any(line.startswith("short_attention_fwd_kernel") for line in lines)
    assert not [line for line in lines if "\t" in line]


def test_spills_and_too_much_shared_memory_are_problems():
    usage = {"registers": 255, "stack": 0, "local": 0, "shared": 101_376}
    assert not aot.problems(usage, 120)
    assert "spills: stack 8" in aot.problems(usage | {"stack": 8}, 120)[0]
    assert "shared memory 101377 is over 101376" in aot.problems(usage | {"shared": 101_377}, 120)[0]


def test_occupancy():
    # by registers, warps, shared memory, blocks (what CUDA's occupancy calculator gives)
    assert aot.occupancy(97, 40_960, 4, 90) == 4 and aot.occupancy(168, 0, 4, 90) == 3
    assert aot.occupancy(32, 0, 8, 90) == 8 and aot.occupancy(32, 0, 8, 120) == 6
    assert aot.occupancy(32, 49_152, 4, 120) == 2 and aot.occupancy(16, 0, 1, 80) == 32


def test_what_a_launch_is_compiled_for():
    def parameter(name, **kinds):
        return SimpleNamespace(**{"name": name, "is_constexpr": False, "do_not_specialize": False} | kinds)

    params = [parameter(name) for name in ("x_ptr", "a", "b", "c", "d", "scale")]
    params += [parameter("rows", do_not_specialize=True), parameter("N", is_constexpr=True)]
    kernel = SimpleNamespace(params=params, arg_names=[p.name for p in params])
    args = (meta(torch.bfloat16, 3, 4), 32, 7, 1, 2**40 + 1, 0.5, 1)
    types, constants, aligned = aot.specialize(_launch.Launch(kernel, args, {"N": 39, "num_warps": 4}))
    wanted = {"x_ptr": "*bf16", "a": "i32", "b": "i32", "d": "i64", "scale": "fp32", "rows": "i32"}
    assert types == wanted and constants == {"c": 1, "N": 39} and aligned == ["x_ptr", "a"]
