"""Compiles every shipped kernel configuration for four GPU architectures; no GPU is needed.

python -m extrema_fast.kernels.aot [--op NAME ...] [--arch 80 90 100 120] [--jobs 2] [--json FILE]

Prints registers, stack (spills), shared memory and the width of memory accesses, and fails (exit code 1) on
spills, too much shared memory, streamed operands that do not move 16 bytes at a time, or offsets that could
pass 2^31 in 32-bit arithmetic.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}


def compile_variant(op: str, name: str, arch: int) -> dict:
    """One row of the table: what ptxas made of a variant, and what is wrong with it (`problems`)."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ._spec import spec

    variant = next(v for v in spec(op).variants() if v.name == name)
    names = variant.kernel.arg_names
    missing = set(names) - set(variant.signature) - set(variant.constexprs)
    unknown = (set(variant.signature) | set(variant.constexprs)) - set(names)
    if missing or unknown:
        return {"op": op, "variant": name, "arch": arch, "problems": [f"signature: {missing} {unknown}"]}
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature={a: variant.signature.get(a, "constexpr") for a in names},
        constexprs={(names.index(a),): v for a, v in variant.constexprs.items()},
        attrs={
            (names.index(a),): [["tt.divisibility", 16]] for a in variant.aligned if a in variant.signature
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        return {"op": op, "variant": name, "arch": arch, "problems": [message]}
    row = {"op": op, "variant": name, "arch": arch, "shared": compiled.metadata.shared}
    row |= _resources(compiled.asm["cubin"]) | _widths(compiled.asm["ptx"])
    row["problems"] = _problems(row, variant, compiled.asm["ttir"])
    return row


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]}


def _widths(ptx: str) -> dict[str, int]:
    """How many global accesses there are, and how many of them move 16 bytes or more per thread."""
    wide, loads, stores, wide_stores = 0, 0, 0, 0
    for line in ptx.splitlines():
        if "cp.async.bulk" in line or "cp.async.cg" in line:
            loads, wide = loads + 1, wide + 1
        elif "cp.async.ca" in line:
            loads += 1
        elif found := re.search(r"\b(ld|st)\.global\S*", line):
            parts = re.search(r"\.v(\d)\.[bufs](\d+)", found.group())
            big = parts is not None and int(parts[1]) * int(parts[2]) >= 128
            if found.group(1) == "ld":
                loads, wide = loads + 1, wide + big
            else:
                stores, wide_stores = stores + 1, wide_stores + big
    return {"loads": loads, "wide_loads": wide, "stores": stores, "wide_stores": wide_stores}


def narrow_offsets(ttir: str) -> list[str]:
    """Pointer offsets and products that depend on a program's number in 32-bit arithmetic."""
    tainted: set[str] = set()
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)", line)
        if not match:
            continue
        name, op, rest = match.groups()
        rest = rest.split(" loc(")[0]
        inputs = set(re.findall(r"%\w+", rest))
        if op == "tt.get_program_id":
            # the axes after the first count blocks inside a row
            if " x " in f" {rest} ":
                tainted.add(name)
            continue
        if not inputs & tainted:
            continue
        narrow = re.search(r"i32\b", rest.rsplit(":", 1)[-1].split("->")[-1]) is not None
        if op == "arith.muli" and narrow:
            found.append(f"32-bit product of a program's number: {line.strip()[:120]}")
        if op == "tt.addptr":
            if re.search(r"i32>?\s*$", rest) and rest.split(",")[1].split(":")[0].strip() in tainted:
                found.append(f"32-bit offset: {line.strip()[:120]}")
            continue
        # a result loaded from memory, or a comparison, carries no offset
        if op not in ("tt.load", "arith.cmpi", "arith.cmpf", "tt.store"):
            tainted.add(name)
    return found


def _problems(row: dict, variant, ttir: str) -> list[str]:
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: stack {row['stack']}, local {row['local']} bytes")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"shared memory {row['shared']} is over {SHARED_LIMIT[row['arch']]}")
    if variant.wide_loads and not row["wide_loads"]:
        found.append("no 16-byte load")
    if variant.wide_stores and not row["wide_stores"]:
        found.append("no 16-byte store")
    return found + narrow_offsets(ttir)


def compile_all(ops: list[str], architectures: list[int], jobs: int = 1) -> list[dict]:
    """Rows of every variant of `ops`, in a fixed order."""
    from ._spec import spec

    tasks = [(op, v.name, a) for op in ops for v in spec(op).variants() for a in architectures]
    if jobs == 1:
        return [compile_variant(*t) for t in tasks]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.starmap(compile_variant, tasks, chunksize=1)


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 when a variant has problems."""
    # before Triton's import, here and in the processes started: an interpreted kernel cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)
    from . import _launch
    from ._spec import OPS

    parser = argparse.ArgumentParser(
        prog="python -m extrema_fast.kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="*", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args(argv)
    if not _launch.HAS_TRITON:
        print("Triton is not installed: nothing to compile", file=sys.stderr)
        return 2
    rows = compile_all(args.op, args.arch, args.jobs)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = 0
    for r in rows:
        if "registers" in r:
            print(
                f"{r['op']:16} {r['variant']:36} sm_{r['arch']:<4} {r['registers']:>3} registers "
                f"{r['stack']:>4} stack {r['shared']:>6} shared  loads {r['wide_loads']}/{r['loads']} "
                f"stores {r['wide_stores']}/{r['stores']} wide"
            )
        for problem in r["problems"]:
            bad += 1
            print(f"{r['op']:16} {r['variant']:36} sm_{r['arch']:<4} PROBLEM {problem}")
    print(f"{len(rows)} compiled, {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
