"""Every shipped configuration, compiled for four architectures without a GPU.

Covers, per op: no spills, no local memory, shared memory within each chip's limit, 16-byte accesses on streamed
operands, 64-bit offsets; the committed table (benchmarks/records/registers.json) names every variant and none
has become worse; the offset check itself finds what it is for.
"""

from __future__ import annotations

import json

import pytest
from extrema_fast.kernels import _launch
from extrema_fast.kernels._spec import OPS
from extrema_fast.kernels.aot import narrow_offsets

from benchmarks.registers import FILE, compile_rows, key

pytestmark = pytest.mark.plain
REMAKE = "python -m benchmarks registers"


@pytest.mark.skipif(not _launch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_compiles_within_limits_and_no_worse_than_before(op):
    rows = compile_rows([op])
    problems = [f"{key(r)}: {p}" for r in rows for p in r["problems"]]
    assert rows and not problems, "\n" + "\n".join(problems)
    table = json.loads(FILE.read_text(encoding="utf-8"))
    names = {n for n in table["rows"] if n.startswith(f"{op} |")}
    assert names == {key(r) for r in rows}, f"other variants than in the table; {REMAKE}"
    import triton

    if triton.__version__ != table["triton"]:
        pytest.skip(f"the table was made with Triton {table['triton']}, this is {triton.__version__}")
    worse = []
    for row in rows:
        was = table["rows"][key(row)]
        if row["registers"] > was["registers"] + 8 or row["shared"] > was["shared"] + 1024:
            worse.append(f"{key(row)}: {was} before, now {row}")
        if row["wide_loads"] < was["wide_loads"] or row["wide_stores"] < was["wide_stores"]:
            worse.append(f"{key(row)}: fewer 16-byte accesses, {was} before, now {row}")
    assert not worse, f"\nif this is meant, {REMAKE}\n" + "\n".join(worse)


def test_the_offset_check_finds_32_bit_arithmetic():
    good = """
    %0 = tt.get_program_id x : i32 loc(#loc)
    %1 = arith.extsi %0 : i32 to i64 loc(#loc)
    %2 = arith.muli %1, %c : i64 loc(#loc)
    %3 = tt.addptr %p, %2 : !tt.ptr<bf16>, i64 loc(#loc)
    """
    assert not narrow_offsets(good)
    assert (
        "32-bit product"
        in narrow_offsets(good.replace("%2 = arith.muli %1, %c : i64", "%2 = arith.muli %0, %c : i32"))[0]
    )
    direct = good.replace(
        "%3 = tt.addptr %p, %2 : !tt.ptr<bf16>, i64", "%3 = tt.addptr %p, %0 : !tt.ptr<bf16>, i32"
    )
    assert "32-bit offset" in narrow_offsets(direct)[0]
