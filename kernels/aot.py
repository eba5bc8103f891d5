"""Compiles every shipped kernel configuration for four GPU architectures; no GPU is needed.

python -m extrema_fast.kernels.aot [--op NAME ...] [--arch 80 90 100 120] [--jobs 2] [--json FILE] [--known FILE]

Prints registers, stack (where spills go), shared memory, how many programs fit on a multiprocessor, and how many of the
accesses to global memory in the machine code are 16 bytes per thread; fails (exit code 1) on spills and on more shared
memory than a block has.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from . import _launch
from ._spec import OPS, spec

# architecture -> bytes of shared memory that one block may have
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# architecture -> shared memory, warps and blocks of a multiprocessor; each block also takes 1 KiB
MULTIPROCESSOR = {
    80: (167_936, 64, 32),
    90: (233_472, 64, 32),
    100: (233_472, 64, 32),
    120: (102_400, 48, 24),
}


def specialize(launch: _launch.Launch) -> tuple[dict[str, str], dict[str, object], list[str]]:
    """How Triton would compile a launch: types and constants of its arguments, and those that are multiples of 16.

    Addresses of tensors on the device `meta` count as aligned; an integer of 1 becomes a constant.
    """
    types, constants, aligned = {}, {}, []
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    for p in launch.kernel.params:
        value, free = values[p.name], p.do_not_specialize
        if p.is_constexpr or (isinstance(value, int) and value == 1 and not free):
            constants[p.name] = value
        elif isinstance(value, Tensor):
            types[p.name] = f"*{_launch.DTYPE_NAMES[value.dtype]}"
        elif isinstance(value, float):
            types[p.name] = "fp32"
        else:
            types[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        whole = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not free)
        if p.name in types and whole:
            aligned.append(p.name)
    return types, constants, aligned


@functools.cache
def _variants(op: str) -> dict[str, _launch.Launch]:
    return spec(op).variants()


def _source(op: str, name: str) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles for a variant, and its options."""
    import triton

    launch = _variants(op)[name]
    names = launch.kernel.arg_names
    types, constants, aligned = specialize(launch)
    source = triton.compiler.ASTSource(
        fn=launch.kernel,
        signature={a: types.get(a, "constexpr") for a in names},
        constexprs={(names.index(a),): v for a, v in constants.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    return source, {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}


def source_key(op: str, name: str) -> str:
    """What a variant's machine code depends on, the version of Triton and the architecture apart, as 16 digits."""
    source, options = _source(op, name)
    return hashlib.sha256(f"{source.hash()} {sorted(options.items())}".encode()).hexdigest()[:16]


def compile_variant(op: str, name: str, arch: int) -> dict:
    """One row of the table.

    Returns:
        `op`, `variant`, `arch`, `source` (`source_key`), `problems` and, if it compiles: `registers` of a thread, bytes
        of `stack`, `local`, `shared`; `ctas`, programs that fit on a multiprocessor; `accesses` to global memory in the
        machine code, and those of 16 bytes, `wide`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(op, name)
    row: dict[str, Any] = {"op": op, "variant": name, "arch": arch, "source": source_key(op, name)}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return row | {"problems": [f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"]}
    row |= _machine_code(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
    row["ctas"] = occupancy(row["registers"], row["shared"], compiled.metadata.num_warps, arch)
    return row | {"problems": problems(row, arch)}


def occupancy(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many programs fit on a multiprocessor at once."""
    memory, most_warps, most = MULTIPROCESSOR[arch]
    # each of four schedulers has 16,384 registers and gives them to warps in units of 256
    by_registers = 4 * (16_384 // (-(-registers * 32 // 256) * 256))
    return min(by_registers // warps, most_warps // warps, memory // (shared + 1024), most)


def problems(usage: dict, arch: int) -> list[str]:
    """What is wrong with the `stack`, `local` and `shared` bytes of a kernel on an architecture, in words."""
    found = []
    if usage["stack"] or usage["local"]:
        found.append(f"spills: stack {usage['stack']}, local {usage['local']} bytes")
    if usage["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {usage['shared']} is over {SHARED_LIMIT[arch]}")
    return found


def _machine_code(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(what: str) -> str:
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        # LDG, STG, and LDGSTS, which copies to shared memory; `.128` is 16 bytes
        accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E[.\w]*", dump("-sass"))
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "accesses": len(accesses),
        "wide": sum(".128" in x for x in accesses),
    }


def compile_all(
    ops: list[str], architectures: list[int], jobs: int = 1, known: dict[str, str] | None = None
) -> list[dict]:
    """Rows of every variant of `ops` (`compile_variant`), in a fixed order.

    Args:
        known: "op | variant" -> `source_key` of what need not be compiled again. Variants with another key are
            compiled for one of the architectures each, in turns.
    """
    variants = [(op, name) for op in ops for name in _variants(op)]
    if known is None:
        tasks = [(*v, arch) for v in variants for arch in architectures]
    else:
        tasks = [
            (op, name, architectures[i % len(architectures)])
            for i, (op, name) in enumerate(variants)
            if source_key(op, name) != known.get(f"{op} | {name}")
        ]
    if jobs == 1:
        return [compile_variant(*t) for t in tasks]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.starmap(compile_variant, tasks, chunksize=1)


def compile_rows(ops: list[str], jobs: int = 1, known: dict[str, str] | None = None) -> list[dict]:
    """`compile_all` for all architectures in a new process, for callers whose Triton interprets kernels."""
    # interpreted kernels cannot be compiled, and Triton reads the variable at its import
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", __name__, "--jobs", str(jobs), "--json", str(out), "--op", *ops]
        if known is not None:
            (Path(folder) / "known.json").write_text(json.dumps(known), encoding="utf-8")
            command += ["--known", str(Path(folder) / "known.json")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(done.stderr[-2000:] or done.stdout[-2000:])
        return json.loads(out.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 when a variant has problems, 2 without Triton."""
    # before Triton's import, here and in the processes started
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(
        prog="python -m extrema_fast.kernels.aot", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="*", type=int, choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument(
        "--known",
        type=Path,
        help="sources that need not be compiled again (JSON); else for one --arch, in turns",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    if not _launch.HAS_TRITON:
        print("Triton is not installed: nothing to compile", file=sys.stderr)
        return 2
    known = json.loads(args.known.read_text(encoding="utf-8")) if args.known else None
    rows = compile_all(args.op, args.arch, args.jobs, known)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for r in rows:
        name = f"{r['op']:16} {r['variant']:36} sm_{r['arch']:<4}"
        if "registers" in r:
            print(
                f"{name} {r['registers']:>3} registers {r['stack']:>4} stack {r['shared']:>6} shared "
                f"{r['ctas']:>2} per multiprocessor, {r['wide']} of {r['accesses']} accesses of 16 bytes"
            )
        for problem in r["problems"]:
            print(f"{name} PROBLEM {problem}")
    bad = sum(len(r["problems"]) for r in rows)
    print(f"{len(rows)} compiled, {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
