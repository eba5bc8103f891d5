"""Pages as a browser shows them, as wide as a desktop and as a phone, all in one start of Chromium.

Covers, of the report, the comparison and the page of `visualize`: every picture is there, nothing is clipped or wider
than its page, text of charts lies inside them, no chart is empty, pictures become large and small again; choosing a
patch by keys and by a click, next to the cosines computed here. A page with each fault shows that all are found.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from extrema_fast.data.augment import normalize
from extrema_fast.reporting.compare import compare
from extrema_fast.reporting.patches import read_patches, similarity
from extrema_fast.reporting.report import report
from extrema_fast.tools.visualize import visualize
from extrema_fast.weights.load import load_encoder
from tests.reporting.test_compare import make
from tests.reporting.test_report import cache, config, fabricate, images, log_records, run

__all__ = ["cache", "config", "fabricate", "images", "log_records", "run"]

WIDTHS = (1280, 390)

# of a frame's window: what is wrong with its page
CHECK = """<script>
function check(view) {
  const page = view.document, found = [], all = [...page.body.querySelectorAll("*")];
  const say = (what, e) => found.push(what + " " + e.tagName + "." + (e.getAttribute("class") || e.id) + " "
    + (e.textContent || "").trim().slice(0, 30));
  for (const i of page.images) if (!i.complete || !i.naturalWidth) say("no picture", i);
  for (const c of page.querySelectorAll("canvas")) {
    const pixels = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
    if (new Set(pixels).size < 2) say("blank", c);
  }
  const hidden = e => e.checkVisibility && !e.checkVisibility();
  for (const e of all) {
    if (hidden(e) || e.closest("svg") || !e.clientWidth || e.matches(".scroll, .tile, .tile *")) continue;
    if (e.scrollWidth > e.clientWidth + 1 && view.getComputedStyle(e).display !== "inline") say("clipped", e);
  }
  for (const svg of page.querySelectorAll("svg[viewBox]")) {
    if (hidden(svg)) continue;
    const box = svg.getBoundingClientRect();
    const drawn = [...svg.querySelectorAll("path, use")].filter(e => e.closest("defs") === null);
    if (!drawn.some(e => e.getBoundingClientRect().width > 0)) say("empty", svg);
    for (const t of svg.querySelectorAll("text")) {
      const b = t.getBoundingClientRect();
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
        say("outside", t);
    }
  }
  const root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) say("wide", root);
  for (const b of page.querySelectorAll(".tile button")) {
    const t = b.parentElement, before = t.getBoundingClientRect().width;
    b.click();
    const large = t.getBoundingClientRect().width, open = t.matches(":popover-open");
    b.click();
    if (!open || large < 2.5 * before || before < 30 || t.matches(":popover-open")) say("not enlarged", t);
  }
  return [...new Set(found)];
}
function choose(view) {
  const stages = [...view.document.querySelectorAll(".stage")];
  const said = () => [...view.document.querySelectorAll(".scene figcaption span")].map(s => s.textContent);
  if (!stages.length) return null;
  const steps = [said()];
  for (const key of ["ArrowRight", "ArrowDown", "a"])
    stages[0].dispatchEvent(new view.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  steps.push(said());
  const box = stages[1].getBoundingClientRect();
  const at = {clientX: box.left + 0.99 * box.width, clientY: box.top + 0.01 * box.height, bubbles: true};
  stages[1].dispatchEvent(new view.MouseEvent("click", at));
  steps.push(said());
  return steps;
}
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const steps = choose(frame.contentWindow);
    found[frame.id] = {faults: check(frame.contentWindow), steps};
  }
  found.backgrounds = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  document.title = JSON.stringify(found);
};
</script>"""

FAULTS = """<!doctype html><meta name="viewport" content="width=device-width"><body style="margin:0">
<img alt="" src="data:image/png;base64,AAAA"><canvas width="9" height="9"></canvas>
<div id="cut" style="width:60px;white-space:nowrap;overflow:hidden">a text that is too long</div>
<svg viewBox="0 0 90 20"><path d="M0 0h9"/><text x="80" y="15">outside</text></svg><svg viewBox="0 0 9 9"></svg>
<div style="width:1500px;height:1px;position:absolute"></div>
<div class="tile" popover id="t"><button popovertarget="u">x</button></div></body>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium")
    return found


def test_pages_in_a_browser(browser, run, images, tmp_path):
    long = tmp_path / "a name without any space, only_underscores_and_so_on_and_so_on_for_quite_a_while.png"
    shutil.copy(images / "train" / "dark" / "00.png", long)
    other = images / "train" / "bright" / "00.png"
    texts = {
        "report": report(run, images=1).read_text(),
        "compare": compare(
            [make(tmp_path / "a", 4), make(tmp_path / "b", 2)], tmp_path / "c.html"
        ).read_text(),
        "visualize": visualize(run, [other, long], tmp_path / "out", patch=(1, 9)).read_text(),
        "faults": FAULTS,
    }
    frames, backgrounds = [], set()
    for name, text in texts.items():
        # a frame in a page of the same folder, whose script may look into it
        (tmp_path / f"{name}.html").write_text(text)
        backgrounds |= set(re.findall(r"url\((data:[^)]*)\)", text))
        frames += [
            f'<iframe id="{name} {w}" src="{name}.html" style="width:{w}px;height:900px;border:0"></iframe>'
            for w in WIDTHS
        ]
    shown = [f'<img alt="" src="{b}">' for b in sorted(backgrounds)]
    host = tmp_path / "host.html"
    host.write_text("\n".join(["<!doctype html><title></title>", *frames, *shown, CHECK]))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    options += ["--window-size=1400,900", f"--user-data-dir={tmp_path / 'profile'}", host.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"Chromium does not start: {done.stderr[-200:]}")
    found = json.loads(html.unescape(re.search("<title>(.+?)</title>", done.stdout)[1]))
    assert found.pop("backgrounds") == 0 and len(backgrounds) == 3
    for width in WIDTHS:
        faults = found.pop(f"faults {width}")["faults"]
        kinds = ("no picture", "blank", "clipped", "outside", "empty", "wide", "not enlarged")
        # a desktop is not so wide either
        assert [kind for kind in kinds if not any(f.startswith(kind) for f in faults)] == []
    assert {name: page["faults"] for name, page in found.items()} == {
        f"{name} {w}": [] for name in ("report", "compare", "visualize") for w in WIDTHS
    }

    # what the page says of a patch is what the tokens say
    encoder = load_encoder(run)
    patches = []
    for path in (other, long):
        from PIL import Image

        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        patches += read_patches(encoder, normalize(pixels[None], encoder.mean, encoder.std, encoder.in_chans))
    rows, columns = patches[0].grid
    chosen = [
        (0, 9 * rows // 32, 1 * columns // 32),
        (0, 9 * rows // 32 + 1, 1 * columns // 32 + 1),
        (1, 0, columns - 1),
    ]
    for width in WIDTHS:
        for (image, row, column), said in zip(chosen, found[f"visualize {width}"]["steps"], strict=True):
            assert said[image] == f"chosen: row {row + 1}, column {column + 1}"
            r, c, cosine = re.fullmatch(
                r"nearest: row (\d+), column (\d+), cosine (\S+)", said[1 - image]
            ).groups()
            values = similarity(patches[1 - image], patches[image].tokens[row, column])
            # to what the compressed tokens keep
            assert float(cosine) == pytest.approx(values.max(), abs=0.026)
            assert values[int(r) - 1, int(c) - 1] == pytest.approx(values.max(), abs=0.042)
