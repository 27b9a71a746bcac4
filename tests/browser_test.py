"""The page of a run in a real Chromium: it opens, moves, filters, and no text can act in it.

Needs playwright (in the extra "test") and a Chromium that is installed, such as Debian's package;
without them the tests are skipped. Screenshots go to $IGPO_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import time

import pytest
from etils import epath

from igpo_jax.viewer.notebook import Viewer
from igpo_jax.viewer.page import make_page
from tests.sample_runs import HOSTILE, LENGTH, hostile_run, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
  api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  if not CHROMIUM:
    pytest.skip("no Chromium is installed: apt-get install chromium")
  with api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Pages: of two seeds, and of hostile texts."""
  folder = tmp_path_factory.mktemp("pages")
  two = [epath.Path(make_run(folder / name, seed=k)) for k, name in enumerate(("one", "two"))]
  (folder / "two.html").write_text(make_page(two))
  (folder / "hostile.html").write_text(make_page([epath.Path(hostile_run(folder / "hostile"))]))
  frame = Viewer(folder / "one")._repr_html_()
  (folder / "frame.html").write_text(f"<!DOCTYPE html><body>{frame}")
  return folder


class Tab:
  """An open page, and everything that its console said."""

  def __init__(self, browser, path, viewport=WIDE, scheme="light"):
    self.context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
    self.page, self.said = self.context.new_page(), []
    self.page.on("console", lambda message: self.said.append(message.text))
    self.page.on("pageerror", lambda error: self.said.append(str(error)))
    self.page.on("request", lambda request: self.said.append(request.url) if not
                 request.url.startswith(("file:", "data:", "about:")) else None)  # fmt: skip
    self.page.goto(f"file://{path}")

  def ready(self):
    self.page.wait_for_selector("html[data-ready=true]", timeout=20_000)
    return self.page

  def close(self, name=""):
    """Keeps a screenshot, and fails if the console said anything."""
    kept = os.environ.get("IGPO_SCREENSHOTS")
    if kept and name:
      pathlib.Path(kept).mkdir(parents=True, exist_ok=True)
      self.page.screenshot(path=f"{kept}/{name}.png")
    self.context.close()
    assert self.said == []


def canvas(page):
  return "".join(page.locator("#canvas .token").all_text_contents())


@pytest.mark.slow
def test_the_slider_and_the_play_button_move_tokens(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  assert page.locator("#chosen strong").inner_text().startswith("hinted 1: inserted")
  assert canvas(page) == "12=>77" + "<eos>" * (LENGTH - 3)
  page.locator("#denoise").fill("-1")
  assert canvas(page) == "12=>7" + "░" * (LENGTH - 2), "hints alone, the rest is masked"
  assert page.locator("#canvas .token.hint").count() == 2
  page.locator("#denoise").fill("0")
  assert canvas(page) == "12=>77" + "░" * (LENGTH - 3)
  assert page.locator("#canvas .token.new").all_text_contents() == ["7"]
  page.locator("#play").click()
  page.locator("#play", has_text="▶").wait_for(timeout=10_000)  # it stops by itself
  assert "░" not in canvas(page)
  # Another completion of the group, with its own canvas.
  page.locator("button.completion[data-place='own 1']").click()
  assert page.locator("#chosen strong").inner_text() == "own 1: kept"
  assert page.locator("#canvas .token.hint").count() == 0
  tab.close("rollouts")


@pytest.mark.slow
def test_colours_show_what_they_say(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  back = lambda k: page.locator(f"#canvas [data-k='{k}']").evaluate("n => n.style.background")
  seen = {}
  for name in ("commit", "confidence", "entropy", "advantage", "ratio", "none"):
    page.locator("#color").select_option(name)
    seen[name] = [back(k) for k in range(LENGTH)]
  assert len({tuple(colors) for colors in seen.values()}) == 6
  assert len(set(seen["commit"][2:])) == LENGTH - 2 and seen["commit"][0] == ""
  assert set(seen["none"]) == {""} and len(set(seen["entropy"])) == LENGTH
  assert "dropped" in page.locator("#canvas [data-k='0']").get_attribute("class")
  tab.close()


@pytest.mark.slow
def test_filters_let_through_what_they_name(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  found = lambda: page.locator("#found").inner_text()
  assert found() == "4 groups in 2 steps"
  for name, groups in (("wrong", 2), ("inserted", 2), ("shown", 2), ("unparseable", 2),
                       ("longest", 4)):  # fmt: skip
    page.locator("#filter").select_option(name)
    assert found() == f"{groups} groups in 2 steps", name
  page.locator("#search").fill("question 1")
  assert found() == "2 groups in 2 steps"
  page.locator("#search").fill("nowhere")
  assert found() == "0 groups in 0 steps" and page.locator("#nothing").is_visible()
  tab.close()


def test_the_keyboard_goes_everywhere(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  press = page.keyboard.press
  whole = canvas(page)
  press("ArrowLeft")
  assert canvas(page) != whole and "░" in canvas(page)
  press("ArrowRight")
  assert canvas(page) == whole
  press("j")
  first = page.locator("#chosen strong").inner_text()
  press("k")
  assert page.locator("#chosen strong").inner_text() != first
  assert page.locator("#step-told").inner_text() == "RL step 2"
  press("[")
  assert page.locator("#step-told").inner_text() == "RL step 1"
  press("n")
  assert page.locator("#groups [aria-pressed=true]").get_attribute("data-group") == "1"
  press("c")
  assert page.locator("#color").input_value() == "confidence"
  press("f")
  assert page.locator("#filter").input_value() == "wrong"
  press("?")
  assert page.locator("#help").is_visible()
  press("t")
  assert page.locator("html").get_attribute("data-theme") == "dark"
  press(" ")
  assert page.locator("#play").inner_text().endswith("stop")
  tab.close()


@pytest.mark.slow
def test_two_runs_lie_over_each_other_and_seeds_make_a_band(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  chart = page.locator(".chart", has=page.locator("h3", has_text="Reward"))
  assert chart.locator(".u-series:visible").count() == 1 + 2, "two bands: reward, reward after"
  assert "2 seeds of one" in chart.inner_text()
  page.locator("#bands").uncheck()
  legend = chart.inner_text()
  assert "one reward" in legend and "two reward" in legend
  assert chart.locator(".u-series:visible").count() == 1 + 4
  page.locator("#smoothing").fill("10")
  assert "last 10" in page.locator("#smoothing-told").inner_text()
  chart.locator(".u-over").hover()
  assert "--" not in chart.locator(".u-legend").inner_text(), "the values under the pointer"
  assert page.locator("#headline tr").count() == 1 + 2 * 3
  page.locator("#run").select_option("1")
  assert page.locator("#canvas .token").count() == LENGTH
  tab.close("curves")


def test_items_of_evaluations_are_compared(browser, folder):
  tab = Tab(browser, folder / "two.html")
  page = tab.ready()
  page.locator("#from").select_option(label="one: sft-20")
  page.locator("#to").select_option(label="two: rl-20")
  assert page.locator("#items-found").inner_text().startswith("3 of 4 items; 2 became right, 1")
  page.locator("#wanted").select_option("worse")
  assert page.locator("#items details").count() == 1
  page.locator("#items summary").click()
  assert "sft-20 says 1" in page.locator("#items").inner_text()
  tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_in_its_width(browser, folder, scheme):
  tab = Tab(browser, folder / "two.html", PHONE, scheme)
  page = tab.ready()
  assert page.evaluate("document.documentElement.scrollWidth") <= 390
  own, second = (page.locator(name).bounding_box() for name in ("#own", "#second"))
  assert second["y"] >= own["y"] + own["height"], "one below the other"
  color = page.evaluate("getComputedStyle(document.body).backgroundColor")
  assert (color == "rgb(255, 255, 255)") == (scheme == "light")
  page.locator("#chosen").scroll_into_view_if_needed()
  tab.close(f"phone_{scheme}")


@pytest.mark.slow
def test_no_text_of_a_model_can_act_in_the_page(browser, folder):
  tab = Tab(browser, folder / "hostile.html")
  page = tab.ready()
  for group, (name, text) in enumerate(HOSTILE.items()):
    page.locator(f"#groups [data-group='{group}']").click()
    shown = page.locator("#chosen").inner_text()
    if text.isascii() and text.isprintable() and len(text) < 200:
      assert text in shown, name
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown), name
    assert not any(c in shown for c in "\u202e\u2067\u200f\0"), name
  page.locator("#wanted").select_option("all")
  for summary in page.locator("#items summary").all():
    summary.click()
  assert page.title() == "hostile - igpo_jax"
  assert page.locator("img, iframe, object, embed").count() == 0
  assert page.evaluate("document.scripts.length") == 7
  tab.close("hostile")


def test_the_viewer_works_in_a_notebooks_frame(browser, folder):
  tab = Tab(browser, folder / "frame.html")
  frame = tab.page.frame_locator("iframe")
  frame.locator("html[data-ready=true]").wait_for(timeout=20_000)
  assert frame.locator("#canvas .token").count() == LENGTH
  assert not frame.locator("#overview").is_visible()
  tab.close()


@pytest.mark.slow
def test_a_page_as_large_as_they_get_opens_soon(browser, tmp_path, monkeypatch):
  from igpo_jax.viewer import collect
  from tests.sample_runs import samples

  run = make_run(tmp_path / "large", steps=2000, rows=samples(range(1, 1200)))
  monkeypatch.setattr(collect, "SAMPLE_BYTES", 4 << 20)
  page = make_page([epath.Path(run)])
  assert 3 << 20 < len(page) < 20 << 20
  (tmp_path / "large.html").write_text(page)
  began = time.monotonic()
  tab = Tab(browser, tmp_path / "large.html")
  tab.ready()
  assert time.monotonic() - began < 15, "three seconds on a machine that does nothing else"
  tab.close()
