"""Pictures of a record, beside it: bars, scaling, memory, roofline. Without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

COLORS = {"released": "#9aa0a6", "strong": "#5b8def", "ours": "#d9542b", "yardstick": "#6aa84f"}
MARKERS = "osD^vPX*<>"
# a record's pictures stay small: repositories keep them for good
DPI, WIDTH = 100, 7.5


def _drawn(function: Callable[[Any, dict[str, Any], Path], list[str]]) -> Callable[..., list[str]]:
    """Gives the function pyplot; without matplotlib there is nothing to draw."""

    @wraps(function)
    def draw(record: dict[str, Any], folder: Path) -> list[str]:
        try:
            import matplotlib
        except ImportError:
            return []
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10,
                 "axes.titleweight": "bold", "axes.axisbelow": True}  # fmt: skip
        with plt.rc_context(style):
            return function(plt, record, folder)

    return draw


def _save(plt: Any, figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return name


def _colors(rows: list[dict[str, Any]]) -> list[str]:
    return [COLORS[r["family"]] for r in rows]


@_drawn
def step(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """bars.png: images/s (p20 to p80) and peak memory of every provider."""
    rows = sorted((r for r in record["rows"] if "p50_ms" in r), key=lambda r: r["images_per_s"])
    if not rows:
        return []
    failed = {g["name"] for g in record["gates"] if not g["passed"]}
    labels = [
        f"{r['provider']} ({r['precision']})" + (" CHECK FAILED" if r["provider"] in failed else "")
        for r in rows
    ]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.1 + 0.32 * len(rows)), sharey=True, gridspec_kw={"width_ratios": [3, 2]}
    )
    speed = [r["images_per_s"] for r in rows]
    ends = [[1000 * r["batch"] / r[f"p{q}_ms"] for r in rows] for q in (80, 20)]
    errors = [
        [max(0.0, s - low) for s, low in zip(speed, ends[0], strict=True)],
        [max(0.0, high - s) for s, high in zip(speed, ends[1], strict=True)],
    ]
    left.barh(labels, speed, xerr=errors, color=_colors(rows), error_kw={"lw": 1, "ecolor": "#333333"})
    for i, (s, high) in enumerate(zip(speed, ends[1], strict=True)):
        left.text(max(s, high) * 1.02, i, f"{s:.2f}" if s < 100 else f"{s:.0f}", va="center")
    left.set_title("images per second (p20 to p80)", loc="left")
    left.set(xlim=(0, max(ends[1] + speed) * 1.2))
    memory = [r.get("peak_mb", 0) / 1024 for r in rows]
    adds = [r.get("step_adds_mb", 0) / 1024 for r in rows]
    right.barh(labels, memory, color=_colors(rows), alpha=0.4)
    right.barh(labels, adds, color=_colors(rows))
    for i, m in enumerate(memory):
        right.text(m * 1.02, i, f"{m:.2f}", va="center")
    right.set_title("peak memory, GiB\n(dark: added by the step)", loc="left")
    right.set(xlim=(0, max(memory + [0.01]) * 1.2))
    for ax in (left, right):
        ax.grid(axis="x", lw=0.5, color="#dddddd")
        ax.tick_params(axis="y", length=0)
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return [_save(plt, figure, folder, "bars.png")]


@_drawn
def scaling(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """scaling.png: time along every axis; parts.png: the share of each component."""
    timed = [r for r in record["rows"] if "p50_ms" in r]
    axes = list(dict.fromkeys(r["axis"] for r in timed))
    if not axes:
        return []
    figure, plots = plt.subplots(2, 2, figsize=(WIDTH, 5.6))
    for ax, axis in zip(plots.flat, axes, strict=False):
        rows = [r for r in timed if r["axis"] == axis]
        y = [r["p50_ms"] for r in rows]
        bars = [
            [b - r["p20_ms"] for b, r in zip(y, rows, strict=True)],
            [r["p80_ms"] - b for b, r in zip(y, rows, strict=True)],
        ]
        if axis in ("batch", "views"):
            x = [int(r["value"]) for r in rows]
            ax.errorbar(x, y, yerr=bars, fmt="o-", color=COLORS["ours"], capsize=2, label="measured")
            ax.plot(
                [0, x[-1]],
                [0, y[0] / x[0] * x[-1]],
                "--",
                lw=1,
                color="#777777",
                label=f"linear from {axis} {x[0]}",
            )
            ax.legend(frameon=False)
            ax.set(xlabel=axis, ylabel="ms per step", ylim=(0, None), xlim=(0, None))
        else:
            per_image = [r["ms_per_image"] for r in rows]
            ax.bar([r["value"] for r in rows], per_image, color=COLORS["ours"], width=0.6)
            for i, v in enumerate(per_image):
                ax.text(i, v, f"{v:.1f}", ha="center", va="bottom")
            ax.set(xlabel={"masks": "dropped percent x views"}.get(axis, axis), ylabel="ms per image")
        ax.grid(axis="y", lw=0.5, color="#dddddd")
    for ax in plots.flat[len(axes) :]:
        ax.remove()
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    names = [_save(plt, figure, folder, "scaling.png")]
    return names + _parts(plt, timed, folder)


def _parts(plt: Any, timed: list[dict[str, Any]], folder: Path) -> list[str]:
    from .scaling import shares

    told = {f"{r['axis']} {r['value']}": shares(r) for r in timed if r.get("components")}
    if not told:
        return []
    sums: dict[str, float] = {}
    for t in told.values():
        for part, share in t.items():
            sums[part] = max(sums.get(part, 0), share)
    # the small ones would be stripes without a name
    large = [p for p in sums if sums[p] >= 2]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.26 * len(told)))
    labels, left = list(told)[::-1], [0.0] * len(told)
    colors = plt.get_cmap("tab20").colors
    for i, part in enumerate([*large, "rest"]):
        widths = [
            told[n].get(part, 0.0)
            if part != "rest"
            else max(0.0, 100 - sum(told[n].get(p, 0.0) for p in large))
            for n in labels
        ]
        ax.barh(labels, widths, left=left, color=colors[i % 20], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.set(title="share of a step per component, %", xlim=(0, 100))
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return [_save(plt, figure, folder, "parts.png")]


@_drawn
def memory(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """memory.png: peak memory over the batch, and memory against time at the largest batch."""
    timed = [r for r in record["rows"] if "peak_mb" in r and "p50_ms" in r]
    if not timed:
        return []
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    names = list(dict.fromkeys(r["provider"] for r in timed))
    shades = plt.get_cmap("tab10").colors
    largest = max(r["batch"] for r in timed)
    for i, name in enumerate(names):
        rows = [r for r in timed if r["provider"] == name]
        color, marker = shades[i % 10], MARKERS[i % len(MARKERS)]
        peaks = [r["peak_mb"] / 1024 for r in rows]
        left.plot([r["batch"] for r in rows], peaks, marker=marker, color=color, label=name)
        if rows[-1]["batch"] == largest:
            right.plot(rows[-1]["p50_ms"] / largest, peaks[-1], marker=marker, color=color, ms=8, ls="")
    top = 1.1 * max(r["peak_mb"] for r in timed) / 1024
    left.set(xlabel="batch", ylabel="peak memory, GiB", ylim=(0, top), xlim=(0, 1.05 * largest))
    right.set(xlabel=f"ms per image at batch {largest}", ylabel="peak memory, GiB", ylim=(0, top))
    right.margins(x=0.15)
    figure.legend(frameon=False, bbox_to_anchor=(1.0, 0.9), loc="upper left")
    for ax in (left, right):
        ax.grid(lw=0.5, color="#dddddd")
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return [_save(plt, figure, folder, "memory.png")]


@_drawn
def encode(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """encode.png: images/s (p20 to p80) over the share of patches kept, a picture per dtype and batch."""
    rows = [r for r in record["rows"] if "p50_ms" in r]
    groups = list(dict.fromkeys((r["dtype"], r["batch"]) for r in rows))
    if not groups:
        return []
    names = list(dict.fromkeys(r["provider"] for r in rows))
    shades = plt.get_cmap("tab10").colors
    high = (len(groups) + 1) // 2
    figure, plots = plt.subplots(high, 2, figsize=(WIDTH, 3.0 * high), squeeze=False)
    for ax, (dtype, batch) in zip(plots.flat, groups, strict=False):
        for i, name in enumerate(names):
            mine = [r for r in rows if (r["provider"], r["dtype"], r["batch"]) == (name, dtype, batch)]
            x, y = [r["mask"] for r in mine], [r["images_per_s"] for r in mine]
            ends = [[1000 * batch / r[f"p{q}_ms"] for r in mine] for q in (80, 20)]
            bars = [[max(0.0, b - low) for b, low in zip(y, ends[0], strict=True)],
                    [max(0.0, top - b) for b, top in zip(y, ends[1], strict=True)]]  # fmt: skip
            style = "--" if "compiled" in name else "-"
            ax.errorbar(x, y, yerr=bars, ls=style, marker=MARKERS[i % len(MARKERS)], ms=4, lw=1.2,
                        capsize=2, color=shades[i % 10], label=name)  # fmt: skip
        ax.set(title=f"{dtype}, batch {batch}", xlabel="% of the patches left out", ylabel="images per second",
               ylim=(0, None))  # fmt: skip
        ax.grid(axis="y", lw=0.5, color="#dddddd")
    for ax in list(plots.flat)[len(groups) :]:
        ax.remove()
    handles, labels = plots.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, bbox_to_anchor=(1.0, 0.9), loc="upper left")
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return [_save(plt, figure, folder, "encode.png")]


@_drawn
def roofline(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """roofline.png: every op's rate over its FLOPs per byte, under the rates measured in the same run."""
    rows = [r for r in record["rows"] if r.get("flop_per_byte") and r.get("tflops")]
    rates = record["rates"]
    peak = max((v for k, v in rates.items() if k.startswith("products_")), default=0)
    if not rows or not peak:
        return []
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2))
    ridge = 1000 * peak / rates["copy_gb_per_s"]
    low = min(0.5 * min(r["flop_per_byte"] for r in rows), ridge / 10)
    high = max(2 * max(r["flop_per_byte"] for r in rows), ridge * 10)
    ax.plot([low, ridge, high], [low * rates["copy_gb_per_s"] / 1000, peak, peak], color="#333333", lw=1.2)
    told = f"products {peak:.3g} TFLOP/s, copies {rates['copy_gb_per_s']:.0f} GB/s"
    ax.text(high, peak * 1.25, told, ha="right")
    shades = plt.get_cmap("tab10").colors
    ops, providers = (list(dict.fromkeys(r[k] for r in rows)) for k in ("op", "provider"))
    for r in rows:
        ax.plot(r["flop_per_byte"], r["tflops"], ls="", ms=7, alpha=0.85, color=shades[ops.index(r["op"]) % 10],
                marker=MARKERS[providers.index(r["provider"]) % len(MARKERS)])  # fmt: skip
    for i, op in enumerate(ops):
        ax.plot([], [], ls="", marker="s", color=shades[i % 10], label=op)
    for i, provider in enumerate(providers):
        ax.plot([], [], ls="", marker=MARKERS[i % len(MARKERS)], color="#555555", label=provider)
    ax.set(xscale="log", yscale="log", xlabel="useful FLOP per byte that must move", ylabel="TFLOP/s",
           title=record["what"], ylim=(None, 3 * peak))  # fmt: skip
    ax.grid(lw=0.5, color="#dddddd")
    ax.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return [_save(plt, figure, folder, "roofline.png")]


@_drawn
def loader(plt: Any, record: dict[str, Any], folder: Path) -> list[str]:
    """loader.png: images/s of every way at every stage (p20 to p80); memory.png: resident memory over epochs."""
    grown = [r for r in record["rows"] if r.get("rss_mb")]
    if grown:
        figure, ax = plt.subplots(figsize=(WIDTH, 3))
        for r in grown:
            ax.plot(range(1, len(r["rss_mb"]) + 1), r["rss_mb"], marker=".", label=r["way"])
        ax.set(xlabel="epoch", ylabel="resident memory, MB", ylim=(0, None), title=record["what"])
        ax.legend(frameon=False)
        return [_save(plt, figure, folder, "memory.png")]
    rows = [r for r in record["rows"] if "images_per_s" in r]
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    if not rows:
        return []
    most = max(sum(r["stage"] == stage for r in rows) for stage in stages)
    figure, axes = plt.subplots(
        len(stages), 1, figsize=(WIDTH, len(stages) * (0.7 + 0.28 * most)), squeeze=False
    )
    failed = {g["name"] for g in record["gates"] if not g["passed"]}
    for ax, stage in zip(axes.flat, stages, strict=True):
        here = [r for r in rows if r["stage"] == stage][::-1]
        speed = [r["images_per_s"] for r in here]
        bars = [[max(0.0, s - 1000 * r["batch"] / r["p80_ms"]) for s, r in zip(speed, here, strict=True)],
                [max(0.0, 1000 * r["batch"] / r["p20_ms"] - s) for s, r in zip(speed, here, strict=True)]]  # fmt: skip
        labels = [
            f"{r['way']} {r['label']}".strip() + (" CHECK FAILED" if r["way"] in failed else "") for r in here
        ]
        colors = [COLORS["ours" if r["way"].startswith("ours") else "strong"] for r in here]
        ax.barh(labels, speed, xerr=bars, color=colors, error_kw={"lw": 1, "ecolor": "#333333"})
        for i, (s, high) in enumerate(zip(speed, bars[1], strict=True)):
            ax.text(s + high, i, f"  {s:.0f} ({here[i]['cpu_ms_per_image']:.2f} ms CPU)", va="center")
        ax.set_title(f"{stage}: images per second", loc="left")
        ax.set(xlim=(0, 1.35 * max(s + high for s, high in zip(speed, bars[1], strict=True))))
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", lw=0.5, color="#dddddd")
    figure.suptitle(record["what"], x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return [_save(plt, figure, folder, "loader.png")]
