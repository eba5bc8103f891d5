"""Device code of color_views: parameters, sums, views (README.md).

`color_sums_kernel` sums the gray values of a tile as they stand when contrast is reached; `color_views_kernel` adds
the tiles' sums in their order, applies everything and stores. No atomics, no random numbers inside these two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from ..sample_views.kernel import keyed_uniform, keyed_words
from .reference import COLUMNS, factor_range

BLOCK = 1024

# ---- color: fp32 tiles of red, green, blue in [0, 1], parameters of one view at `row_ptr` ---------


@triton.jit
def gray(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _turn_hue(r, g, b, turns):
    """README.md: thirds of a turn exchange the channels, at most one sextant either way is left."""
    thirds = tl.floor(3.0 * turns + 0.5)
    exchange = (thirds.to(tl.int32) + 3) % 3
    if exchange == 1:
        r, g, b = b, r, g
    elif exchange == 2:
        r, g, b = g, b, r
    low = tl.minimum(tl.minimum(r, g), b)
    top = tl.maximum(tl.maximum(r, g), b)
    mid = tl.maximum(tl.minimum(r, g), tl.minimum(tl.maximum(r, g), b))
    step = (6.0 * turns - 2.0 * thirds) * (top - low)
    r, g, b = (
        2.0 * r - mid - tl.where(g >= b, step, -step),
        2.0 * g - mid - tl.where(b >= r, step, -step),
        2.0 * b - mid - tl.where(r >= g, step, -step),
    )
    r = tl.minimum(tl.maximum(r, low), top)
    g = tl.minimum(tl.maximum(g, low), top)
    b = tl.minimum(tl.maximum(b, low), top)
    return r, g, b


@triton.jit
def _apply(r, g, b, op, row_ptr, mean):
    """One operation: 0 brightness, 1 contrast (towards `mean`), 2 saturation, 3 hue."""
    factor = tl.load(row_ptr + 1 + op)
    if op == 3:
        r, g, b = _turn_hue(r, g, b, factor)
    else:
        rest = r * 0.0
        if op == 1:
            rest += (1.0 - factor) * mean
        elif op == 2:
            rest = (1.0 - factor) * gray(r, g, b)
        r = factor * r + rest
        g = factor * g + rest
        b = factor * b + rest
        # up to 1 these are means of levels
        if factor > 1.0:
            r = tl.minimum(tl.maximum(r, 0.0), 1.0)
            g = tl.minimum(tl.maximum(g, 0.0), 1.0)
            b = tl.minimum(tl.maximum(b, 0.0), 1.0)
    return r, g, b


@triton.jit
def jitter(r, g, b, row_ptr, mean, UNTIL_CONTRAST: tl.constexpr):
    """The four operations in their order, or those before contrast; black stays black before contrast."""
    going = 1
    for place in range(4):
        op = tl.load(row_ptr + 6 + place).to(tl.int32)
        if UNTIL_CONTRAST:
            if op == 1:
                going = 0
        if going == 1:
            r, g, b = _apply(r, g, b, op, row_ptr, mean)
    return r, g, b


# ---- pixels ---------------------------------------------------------------------------------------


@triton.jit
def _byte(word, number: tl.constexpr):
    return ((word >> (8 * number)) & 255).to(tl.float32) * (1.0 / 255.0)


@triton.jit
def _eight(a, b, c, d, e, f, g, h):
    """[S] eight times -> [S, 8], each row in one thread."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [a.shape[0], 8])


@triton.jit
def _pixels(images_ptr, image, first, inside, PIXELS: tl.constexpr, RUN: tl.constexpr):
    """[S, RUN] red, green, blue in [0, 1] of the RUN pixels from each of `first` [S]; 0 where not `inside` [S]."""
    if images_ptr.dtype.element_ty == tl.int32:
        # eight pixels are six words
        start = images_ptr + image * (3 * PIXELS // 4) + tl.multiple_of(first // 8 * 6, 2)
        words = start[:, None] + tl.arange(0, 2)[None, :]
        w0, w1 = tl.split(tl.load(words, mask=inside[:, None], other=0))
        w2, w3 = tl.split(tl.load(words + 2, mask=inside[:, None], other=0))
        w4, w5 = tl.split(tl.load(words + 4, mask=inside[:, None], other=0))
        r = _eight(
            _byte(w0, 0),
            _byte(w0, 3),
            _byte(w1, 2),
            _byte(w2, 1),
            _byte(w3, 0),
            _byte(w3, 3),
            _byte(w4, 2),
            _byte(w5, 1),
        )
        g = _eight(
            _byte(w0, 1),
            _byte(w1, 0),
            _byte(w1, 3),
            _byte(w2, 2),
            _byte(w3, 1),
            _byte(w4, 0),
            _byte(w4, 3),
            _byte(w5, 2),
        )
        b = _eight(
            _byte(w0, 2),
            _byte(w1, 1),
            _byte(w2, 0),
            _byte(w2, 3),
            _byte(w3, 2),
            _byte(w4, 1),
            _byte(w5, 0),
            _byte(w5, 3),
        )
    else:
        offs = 3 * (first[:, None] + tl.arange(0, RUN)[None, :])
        start, mask = images_ptr + image * (3 * PIXELS) + offs, inside[:, None]
        r = tl.load(start, mask=mask, other=0).to(tl.float32) * (1.0 / 255.0)
        g = tl.load(start + 1, mask=mask, other=0).to(tl.float32) * (1.0 / 255.0)
        b = tl.load(start + 2, mask=mask, other=0).to(tl.float32) * (1.0 / 255.0)
    return r, g, b


@triton.jit
def color_sums_kernel(
    # uint8 [B, CROPS, H, W, 3], or its int32 words [B, CROPS, 3 H W / 4]; fp32 [B, 2, 10]; fp32 [B, 2, TILES]
    images_ptr,
    params_ptr,
    sums_ptr,
    CROPS: tl.constexpr,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    both = params_ptr + image * (2 * COLUMNS)
    if (tl.load(both) > 0.0) | (tl.load(both + COLUMNS) > 0.0):
        first = tile * BLOCK + RUN * tl.arange(0, BLOCK // RUN)
        r, g, b = _pixels(images_ptr, image * CROPS, first, first < PIXELS, PIXELS, RUN)
        for view in tl.static_range(2):
            row_ptr = both + view * COLUMNS
            if CROPS == 2 and view == 1:
                r, g, b = _pixels(images_ptr, image * CROPS + view, first, first < PIXELS, PIXELS, RUN)
            if tl.load(row_ptr) > 0.0:
                x, y, z = jitter(r, g, b, row_ptr, 0.0, True)
                # what lies beyond the image is black
                tl.store(sums_ptr + (image * 2 + view) * TILES + tile, tl.sum(gray(x, y, z)))


@triton.jit(do_not_specialize=["rows", "batch"])
def color_views_kernel(
    # as above
    images_ptr,
    params_ptr,
    sums_ptr,
    # [V, B, K] int32; [V B, K, C, PH, PW]; [B, N, C, PH, PW]
    keep_ptr,
    student_ptr,
    teacher_ptr,
    # of each channel: 1 / standard deviation, - mean / standard deviation
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    # V B and B
    rows,
    batch,
    CROPS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    JITTER: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    AREA: tl.constexpr = PH * PW
    N: tl.constexpr = H * W // AREA
    STUDENT_TILES: tl.constexpr = (K * AREA + BLOCK - 1) // BLOCK
    TEACHER_TILES: tl.constexpr = (N * AREA + BLOCK - 1) // BLOCK
    # the student's tiles, then the teacher's
    pid = tl.program_id(0).to(tl.int64)
    is_student = pid < rows * STUDENT_TILES
    pid = tl.where(is_student, pid, pid - rows * STUDENT_TILES)
    tiles = tl.where(is_student, STUDENT_TILES, TEACHER_TILES)
    count = tl.where(is_student, K, N)
    row = pid // tiles
    image = row % batch
    # pixels in the order of the result, RUN at a time
    spot = (pid - row * tiles).to(tl.int32) * BLOCK + RUN * tl.arange(0, BLOCK // RUN)
    k = spot // AREA
    rest = spot - k * AREA
    inside = k < count
    j = k
    if HAS_KEEP:
        if is_student:
            j = tl.load(keep_ptr + row * K + k, mask=inside, other=0)
    gy = j // (W // PW)
    gx = j - gy * (W // PW)
    py = rest // PW
    first = (gy * PH + py) * W + gx * PW + (rest - py * PW)
    crop = image
    if CROPS == 2:
        crop = image * 2 + tl.where(is_student, 0, 1)
    r, g, b = _pixels(images_ptr, crop, first, inside, H * W, RUN)
    if JITTER:
        which = image * 2 + tl.where(is_student, 0, 1)
        row_ptr = params_ptr + which * COLUMNS
        if tl.load(row_ptr) > 0.0:
            offs = tl.arange(0, BLOCK_T)
            sums = tl.load(sums_ptr + which * TILES + offs, mask=offs < TILES, other=0.0)
            r, g, b = jitter(r, g, b, row_ptr, tl.sum(sums, 0) / (H * W), False)
        if tl.load(row_ptr + 5) > 0.0:
            level = gray(r, g, b)
            r, g, b = level, level, level
    if C == 1:
        r = gray(r, g, b)
    low = student_ptr.dtype.element_ty
    # [BLOCK / RUN, RUN]
    place = tl.multiple_of(k * (C * AREA) + rest, RUN)[:, None] + tl.arange(0, RUN)[None, :]
    out = tl.where(is_student, student_ptr, teacher_ptr) + row * (count * C * AREA) + place
    mask = inside[:, None]
    tl.store(out, (r * scale_r + shift_r).to(low), mask=mask)
    if C == 3:
        tl.store(out + AREA, (g * scale_g + shift_g).to(low), mask=mask)
        tl.store(out + 2 * AREA, (b * scale_b + shift_b).to(low), mask=mask)


@triton.jit(do_not_specialize=["rows", "seed", "epoch"])
def color_params_kernel(
    # [B] int64; fp32 [B, 2, 10]
    index_ptr,
    out_ptr,
    # of brightness, contrast, saturation, hue: least factor, and most minus least
    low_b,
    low_c,
    low_s,
    low_h,
    span_b,
    span_c,
    span_s,
    span_h,
    jitter_prob,
    gray_prob,
    # 2 B
    rows,
    seed,
    epoch,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    index = tl.load(index_ptr + row // 2, mask=mask, other=0)
    block = tl.where(row % 2 == 0, STUDENT << 16, TEACHER << 16)
    on, u_b, u_c, u_s = keyed_words(index, block, seed, epoch)
    u_h, u_order, is_gray, _ = keyed_words(index, block + 1, seed, epoch)
    out = out_ptr + row * COLUMNS
    tl.store(out, (keyed_uniform(on) < jitter_prob).to(tl.float32), mask=mask)
    tl.store(out + 1, low_b + keyed_uniform(u_b) * span_b, mask=mask)
    tl.store(out + 2, low_c + keyed_uniform(u_c) * span_c, mask=mask)
    tl.store(out + 3, low_s + keyed_uniform(u_s) * span_s, mask=mask)
    tl.store(out + 4, low_h + keyed_uniform(u_h) * span_h, mask=mask)
    tl.store(out + 5, (keyed_uniform(is_gray) < gray_prob).to(tl.float32), mask=mask)
    # 0 to 23 -> a permutation of 0 to 3, as `reference.permutation`
    number = (keyed_uniform(u_order) * 24.0).to(tl.int32)
    one, two, three = number // 6, number % 6 // 2, number % 2
    two += (two >= one).to(tl.int32)
    three += (three >= tl.minimum(one, two)).to(tl.int32)
    three += (three >= tl.maximum(one, two)).to(tl.int32)
    tl.store(out + 6, one.to(tl.float32), mask=mask)
    tl.store(out + 7, two.to(tl.float32), mask=mask)
    tl.store(out + 8, three.to(tl.float32), mask=mask)
    tl.store(out + 9, (6 - one - two - three).to(tl.float32), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------


def draw_params(
    index: Tensor,
    strength: Sequence[float],
    jitter_prob: float,
    gray_prob: float,
    seed: int,
    epoch: int,
    streams: Sequence[int],
) -> Tensor:
    """Parameters [B, 2, 10] of index [B] int64."""
    out = _launch.empty((index.shape[0], 2, COLUMNS), index, torch.float32)
    low, most = factor_range(strength)
    numbers = (*low.tolist(), *(most - low).tolist(), float(jitter_prob), float(gray_prob))
    args = (index.contiguous(), out, *numbers, 2 * index.shape[0], seed, epoch)
    options = {"STUDENT": streams[0], "TEACHER": streams[1], "COLUMNS": COLUMNS, "BLOCK": 128}
    # every product is rounded, as in torch
    options |= {"num_warps": 4, "enable_fp_fusion": False}
    _launch.launch(color_params_kernel, (triton.cdiv(2 * index.shape[0], 128),), index, *args, **options)
    return out


def render(
    images: Tensor,
    params: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    patch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's view of images uint8 [B, H, W, 3] or [B, 2, H, W, 3] with params [B, 2, 10].

    patch 0: images [B, C, H, W]; else patches, [V B, K, C P P] of keep [V, B, K] (None: all) and [B, N, C P P].
    """
    if channels == 1:
        mean, std = [sum(mean) / 3] * 3, [sum(std) / 3] * 3
    # numbers, not a tensor: copying one to a GPU waits, and cannot be captured in a graph
    norm = (*(1 / s for s in std), *(-m / s for m, s in zip(mean, std)))
    images = _launch.rows_ready(images.contiguous())
    batch, *crops, height, width, _ = images.shape
    # an image is a patch of its size
    ph, pw = (patch, patch) if patch else (height, width)
    pixels, n = height * width, (height // ph) * (width // pw)
    views, kept = (1, n) if keep is None else (keep.shape[0], keep.shape[2])
    student = _launch.empty((views * batch, kept, channels * ph * pw), images, dtype)
    teacher = _launch.empty((batch, n, channels * ph * pw), images, dtype)
    run, tiles = min(8, pw & -pw), triton.cdiv(pixels, BLOCK)
    if run == 8:
        # words of eight pixels each
        images = images.flatten(1).view(torch.int32)
    options = {"num_warps": 4, "num_stages": 1}
    options = _launch.settings("color_views", f"both|n{pixels}", images.device, options)
    options |= {"CROPS": 2 if crops else 1, "TILES": tiles, "BLOCK": BLOCK, "COLUMNS": COLUMNS, "RUN": run}
    sums = images
    if params is not None:
        params, sums = params.contiguous(), _launch.empty((batch, 2, tiles), images, torch.float32)
        reads = (images, params, sums)
        _launch.launch(color_sums_kernel, (batch, tiles), images, *reads, PIXELS=pixels, **options)
    options |= {"H": height, "W": width, "PH": ph, "PW": pw, "K": kept, "C": channels}
    options |= {"BLOCK_T": triton.next_power_of_2(tiles), "JITTER": params is not None}
    programs = views * batch * triton.cdiv(kept * ph * pw, BLOCK) + batch * tiles
    pointers = (
        images,
        images if params is None else params,
        sums,
        images if keep is None else keep.contiguous(),
    )
    args = (*pointers, student, teacher, *norm, views * batch, batch)
    options["HAS_KEEP"] = keep is not None
    _launch.launch(color_views_kernel, (programs,), images, *args, **options)
    if patch:
        return student, teacher
    shape = (batch, channels, height, width)
    return student.view(shape), teacher.view(shape)
