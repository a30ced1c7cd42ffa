# ruff: noqa: RUF001 - the signs of typography are meant
"""The report as a browser shows it: on a phone and on a desk, in light and in dark, without a network."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from burnish.report.page import write_page
from tests.unit.report.folders import LATER, METHODS, finished_run, later_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs a Chromium to open the report in: apt-get install chromium (or put google-chrome on PATH)",
)

MEASURE = """
const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement
const style = e => frame.contentWindow.getComputedStyle(e)
const all = [...page.querySelectorAll("body *")]
const says = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
const written = all.filter(e => e.getClientRects().length && says(e))
const behind = e => /, 0\\)$/.test(style(e).backgroundColor) ? behind(e.parentElement) : style(e).backgroundColor
document.querySelector("pre").textContent = JSON.stringify({
  overflow: root.scrollWidth - root.clientWidth,
  beyond: all.filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > root.clientWidth + 1)
             .map(e => e.outerHTML.slice(0, 80)),
  requested: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
  rows: [...page.querySelectorAll(".results tbody tr")].map(r => [...r.children].map(c => c.innerText.trim())),
  charts: [...page.querySelectorAll("svg.chart")].map(c => c.getBoundingClientRect().width),
  colours: [...new Set(written.map(e => (e.closest("svg") ? style(e).fill : style(e).color) + " on " + behind(e)))],
  smallest: Math.min(...written.filter(e => !e.closest("svg")).map(e => parseFloat(style(e).fontSize))),
  scripts: page.scripts.length, images: page.images.length,
})
"""

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--proxy-server=http://127.0.0.1:9"),
    *("--window-size=1400,1000", "--dump-dom"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    runs = [finished_run(folder / kind, kind) for kind in METHODS]
    return write_page(runs, folder / "report.html", "Three ways to fine-tune").read_text(encoding="utf-8")


def opened(html: str, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of the page in a window of this width. Whatever it asks of a network meets a closed port."""
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(html)}"></iframe>'
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>{frame}<pre></pre>'
        f"<script>onload = () => {{ {MEASURE} }}</script>",
        encoding="utf-8",
    )
    assert CHROMIUM
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = re.search(r"<pre>(.+?)</pre>", done.stdout.rpartition("</iframe>")[2], re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def contrast(pair: str) -> float:
    """The contrast ratio of WCAG 2 between two colours, `rgb(...) on rgb(...)`."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, pair.split(" on ")))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_the_report_opens_in_chromium(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    seen = opened(page, tmp_path, width, dark)
    assert seen["overflow"] == 0
    assert seen["beyond"] == []
    assert [row[0] for row in seen["rows"]] == ["Base model", "Full fine-tuning", "LoRA", "QLoRA"]
    assert seen["rows"][2][1:4] == ["184k (5.1%)", "92.0 MiB", "39 s (0.88×)"]
    assert len(seen["charts"]) == 8
    assert all(200 < chart_width <= width for chart_width in seen["charts"])
    assert seen["requested"] == []
    assert (seen["scripts"], seen["images"]) == (0, 0), "the HTML inside samples must be shown, not obeyed"
    assert seen["smallest"] >= 12
    faint = {pair: round(contrast(pair), 2) for pair in seen["colours"] if contrast(pair) < 4.5}
    assert not faint, "text below the contrast of WCAG AA"
    background = next(iter(seen["colours"])).split(" on ")[1]
    assert (contrast(f"{background} on rgb(0, 0, 0)") < 2) == dark


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_report_of_learning_from_preferences_opens_too(tmp_path: Path, width: int, dark: bool) -> None:
    runs = [finished_run(tmp_path / kind, kind) for kind in METHODS]
    runs += [later_run(tmp_path / kind, kind) for kind in LATER]
    page = write_page(runs, tmp_path / "report.html", "Six methods on one base").read_text(encoding="utf-8")
    seen = opened(page, tmp_path, width, dark)
    assert seen["overflow"] == 0
    assert seen["beyond"] == []
    methods = ["Full fine-tuning", "LoRA", "QLoRA", "LoRA + DPO", "LoRA + reward model", "LoRA + PPO"]
    assert [row[0] for row in seen["rows"]] == ["Base model", *methods]
    assert seen["rows"][6][7:11] == ["0.930", "1.24", "61.5%", "–"]
    assert all(200 < chart_width <= width for chart_width in seen["charts"])
    assert seen["requested"] == []
    assert seen["smallest"] >= 12
    assert not {pair: contrast(pair) for pair in seen["colours"] if contrast(pair) < 4.5}


def test_a_request_would_be_noticed(page: str, tmp_path: Path) -> None:
    planted = page.replace("<main>", '<main><img src="http://example.invalid/x.png">')
    assert opened(planted, tmp_path, 390)["requested"] == ["http://example.invalid/x.png"]
