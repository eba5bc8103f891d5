"""short_attention for the harness: compiled variants, measured cases, settings to try."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from .._spec import Case, Spec, Variant
from .op import fits, short_attention
from .reference import short_attention_reference

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _variant(direction: str, dtype: torch.dtype, n: int, heads: int, d: int, pack: int = 1) -> Variant:
    import triton
    import triton.language as tl

    from . import kernel

    t, chosen = TYPES[dtype], kernel.heuristic(direction, n, heads, d, dtype.itemsize, pack)
    warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
    names = ("qkv_ptr", "out_ptr") if direction == "fwd" else ("qkv_ptr", "dout_ptr", "dqkv_ptr")
    strides = ("stride_r", "stride_n", "stride_3", "stride_h")
    constexprs = {
        "n": n,
        "H": heads,
        "D": d,
        "SCALE": d**-0.5,
        "BLOCK_N": triton.next_power_of_2(max(16, pack * n)),
        "BLOCK_D": triton.next_power_of_2(max(16, d)),
        "ACC": tl.float32,
    }
    held = constexprs["BLOCK_N"] * constexprs["BLOCK_D"] * dtype.itemsize // (32 * warps)
    return Variant(
        f"{direction} {t} n{n} H{heads} d{d}" + (f" pack{pack}" if pack > 1 else ""),
        getattr(kernel, f"short_attention_{direction}_kernel"),
        dict.fromkeys(names, f"*{t}") | {"rows": "i32"} | dict.fromkeys(strides, "i32"),
        constexprs | chosen,
        warps,
        stages,
        aligned=(*names, *strides),
        streamed=names,
        narrow=dict.fromkeys(names, (held, "a small block")) if held < 16 else {},
    )


def variants(every: bool = False) -> list[Variant]:
    """n 19, 39, 64 at head_dim 64; 32 and 80; block-diagonal tiles both ways; bf16, one fp16, some fp32."""
    bf16, fp16, fp32 = TYPES
    both = ("fwd", "bwd")
    shapes = [
        (bf16, 19, 6, 64, 1), (bf16, 39, 12, 64, 1), (bf16, 64, 6, 64, 1), (bf16, 39, 3, 32, 1),
        (bf16, 39, 16, 80, 1), (bf16, 39, 12, 64, 3), (bf16, 19, 12, 64, 6), (fp16, 39, 12, 64, 1),
        (fp32, 19, 6, 64, 1), (fp32, 39, 12, 32, 1),
    ]  # fmt: skip
    found = [_variant(d, *shape) for shape in shapes for d in both]
    if every:
        # every block; full and partly empty ones
        found += [
            _variant(direction, dtype, n, heads, d)
            for dtype in TYPES
            for n in (7, 16, 17, 25, 32, 39, 49, 64)
            for heads, d in ((6, 16), (3, 32), (1, 64), (16, 64), (16, 80))
            for direction in both
            if fits(dtype, n, d)
        ]
    return list({v.name: v for v in found}.values())


def sdpa(qkv):
    """torch's scaled_dot_product_attention on strided views of the packed tensor."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _backend(name: str):
    def run(qkv):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(qkv)

    return run


def _xformers(qkv):
    import xformers.ops

    return xformers.ops.memory_efficient_attention(*qkv.unbind(2))


def _case(label: str, rows: int, n: int, heads: int, d: int) -> Case:
    def make(device, dtype, generator):
        qkv = torch.randn(rows, n, 3, heads, d, device=device, generator=generator)
        return (qkv.to(dtype).requires_grad_(),)

    providers = {"ours": short_attention, "reference": short_attention_reference, "sdpa": sdpa}
    if torch.cuda.is_available():
        providers |= {
            "sdpa efficient": _backend("EFFICIENT_ATTENTION"),
            "sdpa flash": _backend("FLASH_ATTENTION"),
            "sdpa cudnn": _backend("CUDNN_ATTENTION"),
        }
        if importlib.util.find_spec("xformers"):
            providers["xformers"] = _xformers
    tokens = rows * n * heads * d
    return Case(
        label,
        make,
        providers,
        bytes_fwd=2 * 4 * tokens,
        bytes_bwd=2 * 7 * tokens,
        flops_fwd=4 * tokens * n,
        flops_bwd=10 * tokens * n,
        sizes={way: {"d": d, "H": heads, "n": n} for way in ("fwd", "bwd")},
    )


def cases(quick: bool) -> list[Case]:
    """The student's views at ViT-S and ViT-B; quick: what an interpreter can run."""
    if quick:
        return [_case("n7", 2, 7, 2, 16), _case("n39", 2, 39, 2, 32)]
    return [
        _case("S n39", 5120, 39, 6, 64),
        _case("B n19", 8192, 19, 12, 64),
        _case("B n39", 5120, 39, 12, 64),
        _case("B n49", 4096, 49, 12, 64),
        _case("B n64", 4096, 64, 12, 64),
    ]


def space(direction: str, dtype: torch.dtype, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Launch settings that tuning tries."""
    n, heads = sizes["n"], sizes["H"]
    packs = sorted({1, max(1, 64 // n), max(1, 128 // n)})
    groups = [h for h in (1, 2, 3, 4, 6, heads) if heads % h == 0]
    return [
        {"PACK": p, "HEADS": h, "num_warps": w, "num_stages": s}
        for p in packs
        for h in sorted(set(groups))
        for w in (1, 2, 4, 8)
        for s in (1, 2)
        # in a loop over heads the backward pass of a 128-token tile spills
        if direction == "fwd" or p * n <= 64 or h == 1
    ]


SPEC = Spec(
    name="short_attention",
    version=2,
    summary="self-attention to 64 tokens on packed q, k, v; nothing but them is saved",
    public=("short_attention",),
    torch_ops=("short_attention_fwd", "short_attention_bwd"),
    variants=variants,
    cases=cases,
    space=space,
)
