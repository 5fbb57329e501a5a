"""The page in a real browser: keys, buttons and sliders drive, pictures change, phones can read it."""

import importlib.util
import shutil

import pytest

from rlawm_jax.reports.html import page as render
from tests.interactive.tiny import serving, tiny_session

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if BROWSER is None or importlib.util.find_spec("playwright") is None:
    pytest.skip("needs a browser: see launch/requirements-dev.txt", allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402

# as root there is no sandbox; the rest keeps it from looking for its maker's hosts
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def server():
    with serving(tiny_session(), render("imagine.html", run="RUN", step=7)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    server.session.reset()
    page = browser.new_page()
    problems = []  # exceptions, and what the page's own policy forbids it
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Policy" in message.text else None)
    page.goto(server.url)
    page.wait_for_selector("#pad button")
    yield page
    page.close()
    assert problems == []


def pictures(page):
    return page.get_attribute("#imagined", "src"), page.get_attribute("#beside", "src")


def steps(page, count):
    page.wait_for_function("count => shown.steps === count", arg=count)


@pytest.mark.parametrize("key", ["ArrowRight", "ArrowUp"])
def test_a_key_changes_both_pictures_and_reset_brings_them_back(page, key):
    start = pictures(page)
    page.keyboard.press(key)
    steps(page, 1)
    moved = pictures(page)
    assert moved[0] != start[0] and moved[1] != start[1]
    assert "1 step since" in page.inner_text("#where")
    page.keyboard.press("r")
    steps(page, 0)
    assert pictures(page) == start


def test_a_held_key_goes_on_until_it_is_lifted(page):
    page.keyboard.down("ArrowRight")
    page.wait_for_function("() => shown.steps >= 3")
    page.keyboard.up("ArrowRight")
    page.wait_for_function("() => !busy")
    count = page.evaluate("shown.steps")
    page.wait_for_timeout(300)
    assert page.evaluate("shown.steps") == count


def test_the_rows_sent_are_the_keys_clipped_and_the_sliders(page, server):
    low, high = server.session.controls.low, server.session.controls.high
    press = server.session.controls.press
    rows = page.evaluate(
        "[['ArrowRight'], ['ArrowLeft', 'ArrowUp'], ['h'], ['sliders']].map((names) => actionOf(new Set(names)))"
    )
    assert rows == [[press[0], 0], [-press[0], press[1]], [0, 0], [0, 0]]
    page.evaluate("shown.rest = [0.9, -0.9]")
    assert page.evaluate("actionOf(new Set(['ArrowRight', 'ArrowDown']))") == [high[0], low[1]]
    page.locator("#sliders input").first.fill("0.5")
    assert page.evaluate("actionOf(new Set(['sliders']))") == [0.5, 0]


def test_everything_is_reached_by_the_keyboard_and_a_focused_slider_keeps_its_arrows(page):
    page.locator("#sliders input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[shown.steps, sliders()[0].value]") == [0, "0.01"]
    for button in ("#apply", "#hold", "#pad button"):
        before = page.evaluate("shown.steps")
        page.locator(button).first.focus()
        page.keyboard.press("Enter")
        steps(page, before + 1)
    assert page.locator("button:not([tabindex='-1'])").count() == page.locator("button").count()


def test_a_new_start_is_shown_with_its_episode(page, server):
    before, start = page.inner_text("#where"), pictures(page)
    page.click("#new")
    page.wait_for_function("before => document.getElementById('where').textContent !== before", arg=before)
    assert f"held-out episode {server.session.start.episode}, start frame 4" in page.inner_text("#where")
    assert pictures(page) != start


def test_a_phone_shows_it_without_scrolling_sideways(page):
    page.set_viewport_size({"width": 360, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert min(image.bounding_box()["width"] for image in page.locator(".views img").all()) > 130
    assert min(button.bounding_box()["height"] for button in page.locator("button").all()) >= 44


def test_an_error_of_the_server_is_shown_on_the_page(page, server, monkeypatch):
    monkeypatch.setattr(type(server.session), "step", lambda self, action: 1 / 0)
    page.evaluate("ask('/step', { action: [7, 7] })")
    page.wait_for_function("() => document.getElementById('error').textContent.startsWith('ZeroDivisionError')")
