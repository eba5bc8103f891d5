"""Two records of the same benchmark: the ratio of every row that both have, and whether it is more than noise.

python -m benchmarks compare benchmarks/records/A benchmarks/records/B
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .records import read_record
from .stats import ratio, verdict
from .tables import Page, Table, show


def main(argv: list[str]) -> int:
    """Ratios of two records, row by row, with a verdict on noise."""
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=main.__doc__)
    p.add_argument("a", type=Path, metavar="A.json", help="record or its folder")
    p.add_argument("b", type=Path, metavar="B.json")
    args = p.parse_args(argv)
    a, b = read_record(args.a), read_record(args.b)
    show(page(a, b))
    return 0 if compared(a, b) else 1


def samples(record: dict[str, Any]) -> dict[str, list[float]]:
    """`{row's name: milliseconds}` of every row with raw samples."""
    found: dict[str, list[float]] = {}
    for row in record.get("rows", []):
        name = row.get("key") or " ".join(
            str(v) for v in row.values() if isinstance(v, (str, int)) and not isinstance(v, bool)
        )
        raw = row.get("samples_ms")
        if isinstance(raw, dict):
            found |= {f"{name} {provider}": values for provider, values in raw.items() if values}
        elif raw:
            found[name] = raw
    return found


def failed(record: dict[str, Any]) -> set[str]:
    """Names whose check failed in a record."""
    return {g["name"] for g in record.get("gates", []) if not g["passed"]}


def compared(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per row of both: times in ms, ratio A / B with interval and verdict on B; none where a check failed."""
    left, right = samples(a), samples(b)
    bad = failed(a) | failed(b)
    found = []
    for name in (n for n in left if n in right):
        entry: dict[str, Any] = {"name": name, "a_ms": left[name], "b_ms": right[name]}
        if name in bad:
            entry["refused"] = "its check failed"
        else:
            entry |= ratio(left[name], right[name])
            entry["verdict"] = verdict(entry)
        found.append(entry)
    return found


def page(a: dict[str, Any], b: dict[str, Any]) -> Page:
    """The comparison to read."""
    out: Page = [f"# {a['what']}: A against B"]
    for name, r in (("A", a), ("B", b)):
        m = r["machine"]
        out.append(f"* {name}: {r['date']}, {m['gpu'] or m['cpu']}, {m['threads']} threads, torch {m['torch']}, "
                   f"commit {m.get('commit', 'unknown')}: `{r['command']}`")  # fmt: skip
    out += differences(a, b)
    rows = []
    for c in compared(a, b):
        middle = [sorted(c[k])[len(c[k]) // 2] for k in ("a_ms", "b_ms")]
        if "refused" in c:
            rows.append([c["name"], *(f"{m:.3g}" for m in middle), "-", "-", c["refused"]])
            continue
        rows.append([c["name"], *(f"{m:.4g}" for m in middle), f"**{c['ratio']:.3f}**",
                     f"{c['low']:.3f} to {c['high']:.3f}", f"B is {c['verdict']}"])  # fmt: skip
    if rows:
        out.append(Table(["row", "A ms", "B ms", "A / B", "95 % interval", "verdict"], rows))
    else:
        out.append("**No row is in both records.**")
    for name, x, y in (("A", a, b), ("B", b, a)):
        alone = [r for r in samples(x) if r not in samples(y)]
        if alone:
            out.append(f"Only in {name}: {', '.join(alone)}.")
    return out


def differences(a: dict[str, Any], b: dict[str, Any]) -> Page:
    """Warnings: other machines, versions, settings, or a machine that was faster in one of the runs."""
    out: Page = []
    for key in ("cpu", "gpu", "threads", "torch"):
        x, y = a["machine"].get(key), b["machine"].get(key)
        if x != y:
            out.append(f"**Different {key}**: {x} and {y}; the ratios compare machines, not programs.")
    old, new = a.get("settings", {}), b.get("settings", {})
    changed = [f"{k} {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    if changed:
        out.append(f"**Different settings**: {', '.join(changed)}.")
    for key, x in a.get("rates", {}).items():
        y = b.get("rates", {}).get(key)
        if y and not 0.95 < x / y < 1.05:
            out.append(f"**The machine itself was not equally fast**: {key} {x:.4g} and {y:.4g}.")
    return out
