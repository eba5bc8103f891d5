"""Compiles every shipped kernel configuration for four GPU architectures; no GPU is needed.

python -m extrema_fast.kernels.aot [--op NAME ...] [--arch 80 90 100 120] [--every] [--jobs 2] [--json FILE]

Prints registers, stack (spills), shared memory and the width of memory accesses, and fails (exit code 1) on
spills, too much shared memory, a streamed operand that does not move 16 bytes at a time, offsets that could
pass 2^31 in 32-bit arithmetic, and blocks of fp64. --every: beside the shipped shapes every kind of block that
the launchers can choose (minutes).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._spec import Variant

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}


def compile_variant(op: str, name: str, arch: int) -> dict:
    """One row of the table: what ptxas made of a variant, and what is wrong with it (`problems`)."""
    from ._spec import spec

    variant = next(v for v in spec(op).variants(every=True) if v.name == name)
    return compile_one(op, variant, arch)


def compile_one(op: str, variant: Variant, arch: int) -> dict:
    """As `compile_variant`, of a variant at hand."""
    import triton
    from triton.backends.compiler import GPUTarget

    name = variant.name
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
    row["operands"] = operand_bytes(compiled.asm["ptx"], variant.kernel.fn, variant.streamed)
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


def _accesses(ptx: str) -> Iterator[tuple[str, int, str]]:
    """(`ld` or `st`, bytes per thread, where it comes from: `12` or `12 34` inlined) of global accesses."""
    where = ""
    for line in ptx.splitlines():
        if found := re.match(r"\s*\.loc\s+\d+ (\d+)", line):
            # the lines of the calls through which it was inlined
            outer = re.findall(r"(?:inlined_at \d+ |@\[ [^\s:]+:)(\d+)", line)
            where = " ".join([found[1], *outer])
        elif "cp.async.bulk" in line and "commit" not in line and "wait" not in line:
            yield "ld", 16, where
        elif found := re.search(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", line):
            yield "ld", int(found[1], 0), where
        elif found := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", line):
            yield found[1], int(found[2] or 1) * int(found[3]) // 8, where


def _widths(ptx: str) -> dict[str, int]:
    """How many global accesses there are, and how many of them move 16 bytes or more per thread."""
    row = dict.fromkeys(("loads", "wide_loads", "stores", "wide_stores"), 0)
    for kind, size, _ in _accesses(ptx):
        name = "loads" if kind == "ld" else "stores"
        row[name] += 1
        row[f"wide_{name}"] += size >= 16
    return row


def operand_bytes(ptx: str, function: Any, operands: tuple[str, ...]) -> dict[str, int]:
    """Bytes per thread and access of each operand, the narrowest of its accesses; 0: it has none.

    An operand is a name in the address of a `tl.load` or `tl.store` in the function's file. Where such a call is
    inlined more than once (a branch for whole blocks, one with masks), the widest of them counts.
    """
    lines: dict[int, str] = {}
    for node in ast.walk(ast.parse(Path(inspect.getsourcefile(function)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
            for name in names.intersection(operands):
                lines |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), name)
    copies: dict[int, dict[str, int]] = {}
    for _, size, where in _accesses(ptx):
        line, *outer = map(int, where.split()) if where else [0]
        if line in lines:
            copy = copies.setdefault(line, {})
            copy[str(outer)] = min(size, copy.get(str(outer), size))
    widths = dict.fromkeys(operands, 0)
    for line, copy in copies.items():
        name, widest = lines[line], max(copy.values())
        widths[name] = min(widest, widths[name] or widest)
    return widths


def narrow_offsets(ttir: str) -> list[str]:
    """Offsets and products in 32-bit arithmetic that depend on a program's number or on a loaded index."""
    tainted: set[str] = set()
    found: list[str] = []
    # again, for what a loop carries into its next turn
    for _ in range(2):
        found = _narrow_offsets(ttir, tainted)
    return found


def _narrow_offsets(ttir: str, tainted: set[str]) -> list[str]:
    found = []
    carried: list[list[str]] = []
    for line in ttir.splitlines():
        line = line.split(" loc(")[0]
        if yielded := re.match(r"\s*scf\.yield (.*)", line):
            if carried:
                values = re.findall(r"%\w+", yielded[1].split(":")[0])
                tainted |= {arg for arg, v in zip(carried.pop(), values, strict=False) if v in tainted}
            continue
        match = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(\S+) (.*)", line)
        if not match:
            continue
        name, op, rest = match.groups()
        if op in ("scf.for", "scf.while"):
            pairs = re.findall(r"(%\w+) = (%\w+)", rest.partition("iter_args")[2])
            tainted |= {arg for arg, start in pairs if start in tainted}
            carried.append([arg for arg, _ in pairs])
        elif op == "scf.if":
            carried.append([])
        if name is None:
            continue
        if op == "tt.get_program_id":
            # the axes after the first count blocks inside a row
            if rest.startswith("x "):
                tainted.add(name)
            continue
        if op == "tt.load":
            # an index; other loaded values are no offsets
            if "ptr<i32" in rest:
                tainted.add(name)
            continue
        if not set(re.findall(r"%\w+", rest)) & tainted:
            continue
        narrow = re.search(r"i32\b", rest.rsplit(":", 1)[-1].split("->")[-1]) is not None
        if op == "arith.muli" and narrow:
            found.append(f"32-bit product: {line.strip()[:120]}")
        if op == "tt.addptr":
            if re.search(r"i32>?\s*$", rest) and rest.split(",")[1].split(":")[0].strip() in tainted:
                found.append(f"32-bit offset: {line.strip()[:120]}")
            continue
        # a comparison carries no offset
        if op not in ("arith.cmpi", "arith.cmpf"):
            tainted.add(name)
    return found


def _problems(row: dict, variant: Variant, ttir: str) -> list[str]:
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: stack {row['stack']}, local {row['local']} bytes")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"shared memory {row['shared']} is over {SHARED_LIMIT[row['arch']]}")
    for name, size in row["operands"].items():
        wanted = variant.narrow.get(name, (16, ""))[0]
        if size < wanted:
            found.append(f"{name}: {size} bytes per thread and access, {wanted} expected")
    if not variant.fp64 and re.search(r"tensor<[^>]*f64>", ttir):
        found.append("blocks of fp64")
    return found + narrow_offsets(ttir)


def compile_all(ops: list[str], architectures: list[int], jobs: int = 1, every: bool = False) -> list[dict]:
    """Rows of every variant of `ops`, in a fixed order."""
    from ._spec import spec

    tasks = [(op, v.name, a) for op in ops for v in spec(op).variants(every=every) for a in architectures]
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
    parser.add_argument("--every", action="store_true", help="every kind of block, not only shipped shapes")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args(argv)
    if not _launch.HAS_TRITON:
        print("Triton is not installed: nothing to compile", file=sys.stderr)
        return 2
    rows = compile_all(args.op, args.arch, args.jobs, args.every)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = 0
    for r in rows:
        if "registers" in r:
            print(
                f"{r['op']:16} {r['variant']:36} sm_{r['arch']:<4} {r['registers']:>3} registers "
                f"{r['stack']:>4} stack {r['shared']:>6} shared  loads {r['wide_loads']}/{r['loads']} "
                f"stores {r['wide_stores']}/{r['stores']} wide  "
                + " ".join(f"{name} {size}" for name, size in r["operands"].items())
            )
        for problem in r["problems"]:
            bad += 1
            print(f"{r['op']:16} {r['variant']:36} sm_{r['arch']:<4} PROBLEM {problem}")
    print(f"{len(rows)} compiled, {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
