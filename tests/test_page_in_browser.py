"""The reports in a browser: nothing in the console, no page wider than its window, tables that sort. Needs Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from mmenvs.benchmark import results
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.store import Store

from . import bench_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
PLAN = Plan(agents=("ppo", "a2c", "blind"), seeds=2, steps=100, episodes=20)
# The page in a frame of some width, and what is seen of it in the title once it is there.
FRAME = """<iframe id="frame" style="width: %dpx; height: 900px; border: 0"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, table = page.querySelector("table");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  const before = column();
  table.querySelector("th button").click();
  document.title = JSON.stringify({wide: root.scrollWidth, window: root.clientWidth, before, after: column()});
};
frame.srcdoc = %s;
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    PLAN.save(folder)
    with Store(folder, write=True) as store:
        for run in PLAN.runs():
            origin = {"code": "a", "commit": "1", "versions": {}, "device": "cpu"}
            store.append([{**row, "provenance": origin} for row in bench_runs.rows_of(run)])
    results.write(folder, folder / "report")
    return folder / "report" / "report.html"


def browse(path, profile):
    """The page after its scripts have run, and what they said in the console."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1400,1000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def test_the_console_stays_empty(page, tmp_path):
    dom, console = browse(page, tmp_path)
    assert "Leaderboard" in dom and console == []


def test_the_console_is_read(page, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>nowhere()</script>")
    assert "nowhere is not defined" in "".join(browse(wrong, tmp_path)[1])


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_its_window_and_sorts(page, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (width, json.dumps(page.read_text()).replace("</", "<\\/")))
    dom, console = browse(frame, tmp_path)
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None, console
    seen = json.loads(html.unescape(title[1]))
    assert 0 < seen["window"] <= width and seen["wide"] <= seen["window"]
    assert seen["before"] != seen["after"] == sorted(seen["before"], reverse=True)
