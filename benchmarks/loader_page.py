"""The loader's record to read."""

from __future__ import annotations

from typing import Any

from .loader_ways import STAGES, WAYS
from .records import heading
from .tables import Page, Table


def page(record: dict[str, Any]) -> Page:
    """Tables of rates, ratios, checks, memory; what did not run."""
    s = record["settings"]
    out = heading(record)
    threads = ", ".join(map(str, s["threads"]))
    out.append(
        f"{s['images']} images of {s['data']}, crops of {s['img_size']}, batch {s['batch']}, {threads} decoding "
        "threads or worker processes, and as many cores for everything that a way starts."
    )
    if "epochs" in s:
        out.append(memory_table(record))
        out.append(
            "Resident memory of the process at the end of each epoch (crops and colour views); slope by least squares "
            "over the last four fifths of the epochs."
        )
    else:
        out += rates(record)
    lost = [f"* {r['key']}: {r['error']}" for r in record["rows"] if "error" in r]
    lost += [f"* {name}: {why}" for name, why in record["not_run"].items()]
    return [*out, "Not measured:\n\n" + "\n".join(lost)] if lost else out


def rates(record: dict[str, Any]) -> Page:
    """What was timed."""
    s, rows = record["settings"], [r for r in record["rows"] if "images_per_s" in r]
    out: Page = []
    if record["ratios"]:
        out += ["## Ratios", Table(
            ["stage", "ours", "against", "images/s", "95 % interval", "processor time", "goal", "reached"],
            [ratio_row(r) for r in record["ratios"]],
        )]  # fmt: skip
    out += ["## Rates", Table(
        ["stage", "way", "images/s", "p20 to p80", "per core", "CPU ms per image", "images per CPU s", "waited"],
        [rate_row(r) for r in rows],
    )]  # fmt: skip
    turns = "in turns" if s["in_turns"] else "one after another"
    out.append(
        f"{s['rounds']} turns of {s['batches_per_turn']} batches ({turns}; end to end: a quarter of that); a turn's "
        "batches together are one sample, as loaders deliver in bursts. CPU ms: processor time of the process and of "
        "all it starts, for every image; less disturbed by other programs than images/s. Waited: share of the time in "
        f"which no batch was there; end to end trains ViT-{s['model']} on {s['device']}."
    )
    out.append("\n".join(f"* `{w}`: {WAYS[w].about}" for w in dict.fromkeys(r["way"] for r in rows)))
    out.append("\n".join(f"* {t}: {STAGES[t]}" for t in dict.fromkeys(r["stage"] for r in rows)))
    out += ["## Checks", "\n".join(
        f"* {g['name']}: " + ("" if g["passed"] else "**FAILED**, ") + g["found"] for g in record["gates"]
    )]  # fmt: skip
    return out


def ratio_row(r: dict[str, Any]) -> list[str]:
    """One line of the table of ratios."""
    head, goal = [r["stage"], f"`{r['ours']}`", f"`{r['other']}`"], f">= {r['goal']:g}" if r["goal"] else "-"
    if "refused" in r:
        return [*head, "**not compared**", r["refused"], "-", goal, "-"]
    reached = "-" if not r["goal"] else "yes" if r["ratio"] >= r["goal"] else "no"
    return [
        *head, f"**{r['ratio']:.2f}x**", f"{r['low']:.2f} to {r['high']:.2f}, {r['verdict']}",
        f"{r['cpu_ratio']:.2f}x ({r['cpu_low']:.2f} to {r['cpu_high']:.2f})", goal, reached,
    ]  # fmt: skip


def rate_row(r: dict[str, Any]) -> list[str]:
    """One line of the table of rates."""
    low, high = (1000 * r["batch"] / r[f"p{q}_ms"] for q in (80, 20))
    way = f"`{r['way']}`" + (f", {r['label']}" if r["label"] else "")
    waited = f"{100 * r['waited']:.0f} %" if r["stage"] == "end to end" else "-"
    return [
        r["stage"], way, f"{r['images_per_s']:.1f}", f"{low:.1f} to {high:.1f}", f"{r['images_per_s_per_core']:.1f}",
        f"{r['cpu_ms_per_image']:.2f}", f"{r['images_per_cpu_s']:.0f}", waited,
    ]  # fmt: skip


def memory_table(record: dict[str, Any]) -> Table:
    """Resident memory and its growth."""
    return Table(
        ["way", "epochs", "MB early", "MB at the end", "MB per epoch", "peak MB"],
        [
            [f"`{r['way']}`", str(len(r["rss_mb"])), f"{r['first_mb']:.1f}", f"{r['last_mb']:.1f}",
             f"{r['mb_per_epoch']:+.3f}", f"{r['peak_mb']:.1f}"]
            for r in record["rows"] if "mb_per_epoch" in r
        ],
    )  # fmt: skip
