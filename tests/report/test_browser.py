"""Reports in headless Chromium: `make test-report`. Screenshots are kept in the folder SCREENSHOTS."""

import json
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest

from deepseek_jax.report import page as pages
from deepseek_jax.run import metrics
from tests.support import report_runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Pixels of each chart in the colour of one of its curves, and of each map the colours that there are.
DRAWN = """() => report.charts.map((chart) => {
  const { canvas } = chart.plot.ctx;
  const { data } = chart.plot.ctx.getImageData(0, 0, canvas.width, canvas.height);
  const wanted = chart.lines.map((line) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(`--c${line.style % 8}`).trim();
    return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  });
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] > 200 && wanted.some((c) => c.every((v, k) => Math.abs(v - data[i + k]) < 12))) count++;
  }
  return [chart.spec.title, count];
})"""
COLORS = """() => report.maps.map(({ canvas }) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let i = 0; i < data.length; i += 4) found.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
  return found.size;
})"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs, and a page of each and of two together."""
    top = tmp_path_factory.mktemp("reports")
    report_runs.whole(top / "whole")
    report_runs.whole(top / "hostile", text=report_runs.HOSTILE)
    other = report_runs.folder(top / "other", 300)
    report_runs.append(other, report_runs.rows_of(300, seed=3))
    report_runs.write_load(other, 300, 2, 8)
    short = report_runs.folder(top / "short", 300)
    report_runs.append(short, report_runs.rows_of(300)[:1])
    report_runs.folder(top / "empty")
    long = report_runs.folder(top / "long", 100_000, 28, 64)
    report_runs.append(long, report_runs.rows_of(100_000, every=10))
    report_runs.write_load(long, 100_000, 27, 64, 128)
    for name in ("whole", "hostile", "short", "empty", "long", "whole other"):
        folders = [str(top / part) for part in name.split()]
        pages.write(str(top / f"{name}.html"), pages.build(folders, metrics.METRICS))
    return top


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="make test-report installs it")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Tab:
    """A page, and what it said and asked for."""

    def __init__(self, browser, path: pathlib.Path, width: int = 1280, scheme: str = "light"):
        self.said: list[str] = []
        self._context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = page = self._context.new_page()
        page.on("console", lambda m: self.said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.said.append(f"error: {e}"))
        page.on("dialog", self._dialog)
        page.on("request", lambda r: self._asked(r.url, path.as_uri()))
        begun = time.monotonic()
        page.goto(path.as_uri())
        page.wait_for_function("window.report && report.charts.every((c) => c.plot)")
        page.wait_for_timeout(100)
        self.seconds = time.monotonic() - begun

    def _dialog(self, dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _asked(self, url: str, own: str) -> None:
        if url != own:
            self.said.append(f"asks for {url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.close()

    def live(self) -> str:
        return self.page.text_content("#live")

    def chart(self, title: str):
        return self.page.locator(
            "figure", has=self.page.get_by_role("heading", name=title, exact=True)
        )

    def plot(self, title: str):
        return self.chart(title).locator(".plot")


@pytest.fixture(scope="module")
def tab(browser, runs):
    with Tab(browser, runs / "whole.html") as tab:
        yield tab


@pytest.fixture(scope="module")
def shots():
    folder = pathlib.Path(os.environ.get("SCREENSHOTS") or "/tmp/deepseek_jax_screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", ["whole", "hostile", "short", "empty", "long", "whole other"])
def test_it_draws_and_says_and_asks_for_nothing(name, width, scheme, browser, runs, shots):
    with Tab(browser, runs / f"{name}.html", width, scheme) as tab:
        page = tab.page
        drawn = page.evaluate(DRAWN)
        assert all(count >= 10 for _, count in drawn), drawn
        assert bool(drawn) == (name != "empty")
        assert all(count > 8 for count in page.evaluate(COLORS))
        assert page.evaluate("report.maps.length") == (0 if name in ("short", "empty") else 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.evaluate("document.querySelectorAll('img, iframe, link').length") == 0
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate(
            "document.querySelectorAll('#options details').forEach((d) => { d.open = false; })"
        )
        page.screenshot(
            path=shots / f"{name.replace(' ', '-')}-{scheme}-{width}.png", full_page=True
        )
        assert tab.said == []
        assert tab.seconds < 20


def test_the_tables_have_the_figures_of_metrics_jsonl(tab, runs):
    rows = [
        json.loads(line) for line in (runs / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    by_step = {r["step"]: r for r in rows if "lr" in r}
    held = {r["step"]: r["eval_loss"] for r in rows if "eval_loss" in r}
    for chart in tab.page.evaluate("report.charts.map((c) => c.spec)"):
        figure = tab.page.locator(f"#{chart['id']}")
        figure.locator("summary").click()
        lines = [line.split("\t") for line in figure.locator("tbody").inner_text().splitlines()]
        assert len(lines) > 8
        for step, *cells in lines:
            for series, cell in zip(chart["series"], cells, strict=True):
                at = int(step.replace(",", ""))
                wanted = by_step.get(at, {}).get(series["name"])
                if series["name"] == "eval_loss":
                    wanted = held.get(at)
                elif series["name"].startswith("eval_"):
                    continue
                shown = None if cell in ("", "–") else float(cell.replace(",", ""))
                assert shown == wanted, (series, step)
        figure.locator("summary").click()
    tiles = tab.page.locator(".tiles data").evaluate_all("all => all.map((e) => e.value)")
    assert {json.dumps(by_step[400]["loss"]), json.dumps(held[400])} <= set(tiles)


def test_the_keyboard_moves_the_cursor_and_says_the_figures(tab, runs):
    tab.page.mouse.move(2, 2)  # a page that scrolls moves charts away from under a mouse, too
    plot = tab.plot("Loss")
    plot.focus()
    tab.page.wait_for_timeout(100)
    plot.press("Home")
    rows = {r["step"]: r for r in report_runs.rows_of(400) if "lr" in r}
    assert tab.live().startswith(f"Loss: step 1 · training {rows[1]['loss']:g}")
    for _ in range(3):
        plot.press("ArrowRight")
    plot.press("PageDown")
    assert tab.live().startswith(f"Loss: step 14 · training {rows[14]['loss']:g}")
    cursor = tab.page.evaluate("report.charts[0].plot.cursor.idx")
    assert cursor == 13
    others = tab.page.evaluate(
        "report.charts.map((c) => Math.round(c.plot.posToVal(c.plot.cursor.left, 'x')))"
    )
    assert max(others) - min(others) <= 2  # pixels are no steps
    for _ in range(21):
        plot.press("PageDown")
    assert "spike at step 220: loss 4.25" in tab.live() or "step 224" in tab.live()
    plot.press("End")
    assert "step 400" in tab.live() and "checkpoint at step 400" in tab.live()
    reached = []
    tab.page.locator(".skip").focus()
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.getAttribute('aria-label') || ''"))
    assert sum("Arrow keys move" in label for label in reached) > 6


def test_the_keyboard_moves_over_the_maps(tab):
    plot = tab.plot("The fullest expert of each layer")
    plot.focus()
    plot.press("ArrowDown")
    plot.press("End")
    assert re.search(r"layer 2, step 400 · fullest expert 1\.\d\d times the mean", tab.live())
    plot.press("Enter")
    assert tab.page.locator("#layer").input_value() == "1"
    tab.page.locator("#layer").select_option("3")
    experts = tab.plot("The experts of a layer")
    experts.focus()
    experts.press("ArrowLeft")
    assert re.search(r"layer 4, expert 0, step 4\d\d · \d\.\d\d times the mean", tab.live()), (
        tab.live()
    )


def test_the_maps_of_another_run(browser, runs):
    with Tab(browser, runs / "whole other.html") as tab:
        before = tab.plot("The fullest expert of each layer").screenshot()
        tab.page.locator("#load-run").select_option(label="other")
        assert tab.page.locator("#layer option").count() == 2
        assert tab.plot("The fullest expert of each layer").screenshot() != before
        assert tab.said == []


def test_smooth_log_and_marks(browser, runs):
    with Tab(browser, runs / "whole.html") as tab:
        check_toggles(tab)


def check_toggles(tab) -> None:
    def drawn() -> bytes:
        return tab.plot("Loss").screenshot()

    before = drawn()
    for name in ("smooth", "log", "marks"):
        tab.page.locator(f"#{name}").click()
        assert drawn() != before, name
    # x, the curve, its average, the held-out loss
    assert tab.page.evaluate("report.charts[0].plot.series.length") == 4
    assert tab.page.evaluate("report.charts[0].plot.scales.y.distr") == 3
    for name in ("smooth", "log", "marks"):
        tab.page.locator(f"#{name}").click()
    tab.page.mouse.move(0, 0)
    assert drawn() == before
    tab.page.locator("#theme").click()
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert drawn() != before
    tab.page.locator("#theme").click()
    assert tab.said == []


def test_dragging_zooms_all_and_a_button_goes_back(tab):
    def views() -> list[list[float]]:
        tab.page.wait_for_timeout(50)
        return tab.page.evaluate(
            "report.charts.map((c) => [c.plot.scales.x.min, c.plot.scales.x.max])"
        )

    plot = tab.plot("Loss")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.page.mouse.move(box["x"] + 300, box["y"] + 80)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 600, box["y"] + 90, steps=5)
    tab.page.mouse.up()
    zoomed = views()
    assert np.ptp(np.array(zoomed), axis=0).max() < 1e-6 and zoomed[0][1] - zoomed[0][0] < 200
    assert tab.page.locator("#reset").is_enabled()
    tab.page.locator("#reset").click()
    assert all(view == [1, 400] for view in views())
    assert tab.page.locator("#reset").is_disabled()
    plot.focus()
    for keys, wanted in (("Home + +", [1, 100.75]), ("End", [1, 100.75]), ("- -", [1, 400])):
        for key in keys.split():
            plot.press(key)
        assert all(view == pytest.approx(wanted) for view in views()), keys


def test_what_is_not_the_pages_own_does_not_run(browser, runs):
    """The policy, on top of escaping: a script that got in all the same would not run."""
    with Tab(browser, runs / "hostile.html") as tab:
        tab.page.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "window.ran = 1";
              document.body.append(script);
              document.body.insertAdjacentHTML("beforeend", "<p onclick='window.ran = 1' id='p'>x</p>");
              document.getElementById("p").click();
            }"""
        )
        assert tab.page.evaluate("window.ran") is None
        assert all("Content Security Policy" in text for text in tab.said) and tab.said
