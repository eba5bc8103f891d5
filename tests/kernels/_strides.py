"""Which kernels multiply a stride in 32 bits, one a line; for a process whose Triton compiles kernels (test_aot.py).

A stride may be as large as 32 bits hold, and so must be widened before it is multiplied.
"""

from __future__ import annotations

import re

from extrema_fast.kernels import aot
from extrema_fast.kernels._spec import OPS, spec


def narrow(ttir: str) -> list[str]:
    """Lines of a kernel's TTIR that multiply a 32-bit stride, or what is made of one without arithmetic."""
    made, found = set(re.findall(r"%stride_\w+(?=: i32)", ttir)), []
    for line in ttir.splitlines():
        result, _, rest = line.strip().partition(" = ")
        if made & set(re.findall(r"%\w+", rest)):
            if rest.startswith("arith.muli"):
                found.append(line.strip())
            elif rest.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims")):
                made.add(result)
    return found


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    for op in OPS:
        kernels = {launch.kernel: name for name, launch in spec(op).variants().items()}
        for kernel, name in kernels.items():
            if any(p.startswith("stride_") for p in kernel.arg_names):
                source, options = aot._source(op, name)
                compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                print(kernel.fn.__name__, *narrow(compiled.asm["ttir"]), sep="\t")


if __name__ == "__main__":
    main()
