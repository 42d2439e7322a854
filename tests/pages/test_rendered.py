"""Pages rendered in a browser."""

import json
import re
import shutil
import subprocess

import pytest

from orchestrator import api

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PROBE = """<script>
const failed = [];
addEventListener("error", (e) => failed.push(String(e.message || e.target.outerHTML)), true);
addEventListener("securitypolicyviolation", (e) => failed.push(e.blockedURI));
addEventListener("load", () => {
  const kept = [...document.querySelectorAll("th")].filter((th) => th.textContent === "kept").pop();
  kept?.querySelector("button")?.click();
  const column = kept?.cellIndex;
  const rows = kept?.closest("table.sortable")?.tBodies[0].rows ?? [];
  parent.postMessage(JSON.stringify({
    failed,
    loaded: performance.getEntriesByType("resource").map((each) => each.name),
    wide: document.documentElement.scrollWidth,
    inner: innerWidth,
    figures: [...document.querySelectorAll("svg[role=img]")].map((s) => s.clientHeight),
    sorted: [...rows].map((row) => Number(row.cells[column].dataset.value)),
  }), "*");
});
</script>"""
HOST = """<!DOCTYPE html><pre></pre><iframe src="{}" width="{}" height="900"></iframe><script>
addEventListener("message", (e) => document.querySelector("pre").append(e.data));
</script>"""


def rendered(page, width, directory):
    """Measurements of a page on itself in a frame of this width, in headless Chromium."""
    probed, host = directory / "probed.html", directory / "host.html"
    probed.write_text(page.read_text().replace("<title>", f"{PROBE}<title>", 1))
    host.write_text(HOST.format(probed.name, width))
    call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    call += ["--virtual-time-budget=5000", f"--user-data-dir={directory / 'profile'}"]
    call += ["--disable-background-networking", host.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    measured = re.search(r"<pre>({.*?})</pre>", done.stdout, re.DOTALL)
    assert measured, done.stderr
    return json.loads(measured[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_pages_in_a_browser(runs, tmp_path):
    """Both pages render in Chromium, load no resources, and fit 400 pixels without scrolling."""
    first, second = runs
    report = api.report(first.out, tmp_path / "report.html")
    compared = api.compare([first.out, second.out], tmp_path / "compared.html")
    for page in (report, compared):
        for width in (400, 1100):
            seen = rendered(page, width, tmp_path)
            assert (seen["failed"], seen["loaded"]) == ([], [])
            assert seen["wide"] <= seen["inner"] == width
            assert seen["figures"]
            assert min(seen["figures"]) > 20
    sorted_by_script = rendered(report, 400, tmp_path)["sorted"]
    assert sorted_by_script == sorted(sorted_by_script)
    assert len(sorted_by_script) == len(first.report["linears"])
