"""The page of `fbclip serve` in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fbclip.runtime.live.alarm import Alarm
from fbclip.runtime.serving.uploads import InTurn
from helpers.missing import Missing, gap, part
from helpers.serving import GOOD, SCRATCH, TOKEN, Server, running
from helpers.tiny import tiny_bundle
from helpers.waiting import PATIENCE_S, eventually

CHROMIUM = Path("/usr/bin/chromium")
expect.set_options(timeout=1e3 * PATIENCE_S)


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that has asked nobody but the server, and met no error, at the end."""
    opened = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    opened.set_default_timeout(1e3 * PATIENCE_S)
    asked: set[str] = set()
    errors: list[str] = []
    opened.on("request", lambda request: asked.add(urlsplit(request.url).hostname or "localhost"))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    yield opened
    opened.context.close()
    assert asked <= {"127.0.0.1", "localhost"}
    assert errors == []


def test_a_camera_that_shows_nothing_is_not_good(server: Server, page: Page, tmp_path: Path) -> None:
    page.goto(server.url)
    server.belt.parts.put(GOOD)
    expect(page.locator("#verdict")).to_contain_text("Good")
    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    server.belt.parts.put(tmp_path / "black.png")
    expect(page.locator("#verdict")).to_contain_text("Unusable black")
    expect(page.locator("#camera")).to_have_text("camera blind")
    server.belt.parts.put(GOOD)
    expect(page.locator("#verdict")).to_contain_text("Good")
    server.belt.turn("lost")
    expect(page.locator("#verdict")).to_contain_text("No picture")
    expect(page.locator("#verdict")).not_to_contain_text("Good")


def test_a_part_that_is_not_there_is_neither_good_nor_a_defect(page: Page, tmp_path: Path) -> None:
    files = {}
    for name, picture in (("good", part(90)), ("gap", gap(200)), ("defect", part(220))):
        files[name] = tmp_path / f"{name}.png"
        Image.fromarray(picture).save(files[name])
    predictor = Missing(tiny_bundle(tmp_path))
    predictor.backend = InTurn(predictor.backend)
    verdict = page.locator("#verdict")
    with running(predictor=predictor, alarm=Alarm(alarm_on="absent")) as server:
        page.goto(server.url)
        server.belt.parts.put(files["good"])
        expect(verdict).to_contain_text("Good")
        expect(page.locator("#figures")).not_to_contain_text("absent")
        server.belt.parts.put(files["gap"])
        expect(verdict).to_contain_text("Absent The part is not in the picture.")
        expect(verdict).to_have_attribute("data-state", "absent")
        expect(page.locator("#verdict-score")).to_be_empty()
        expect(page.get_by_role("img", name="Heat map of belt, gap: absent")).to_be_visible()
        expect(page.locator("#camera")).to_have_text("camera live")
        expect(page.locator("#figures")).to_contain_text("absent1")
        expect(page.locator("#gallery li")).to_have_count(1)  # which --alarm-on asks for
        expect(page.locator("#gallery b")).to_have_text("absent")
        expect(page.locator("#chart")).to_have_attribute("aria-label", re.compile(r"Now no score, highest 0\.3"))
        page.set_input_files("#file", files["gap"])
        expect(page.locator("#scored-text")).to_contain_text("Absent")
        expect(page.locator("#scored-text")).to_contain_text("not judged")
        server.belt.parts.put(files["defect"])
        expect(verdict).to_contain_text("Defect")
        (event,) = server.json("/v1/events")
        assert (event["verdict"], event["regions"]) == ("absent", [])
        assert server.json("/v1/status")["pipeline"]["absent"] == 1


def test_the_page_shows_the_belt(server: Server, page: Page) -> None:
    page.goto(server.url)
    expect(page.locator("#camera")).to_have_text("camera live")
    server.belt.parts.put(GOOD)
    expect(page.locator("#verdict")).to_contain_text("Good")
    picture = page.get_by_role("img", name="Heat map of belt, brushed-steel-good: good")
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("naturalWidth", 720)
    expect(picture).to_have_js_property("naturalHeight", 523)
    expect(page.locator("#gallery li")).to_have_count(0)
    server.belt.parts.put(SCRATCH)
    expect(page.locator("#verdict")).to_contain_text("Defect")
    expect(page.locator("#alarm")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text("Alarm, score 0.9")
    expect(page.get_by_role("img", name="threshold 0.600, 1 alarm")).to_be_visible()  # the graph
    page.get_by_role("button", name="Event at").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("img", name="brushed-steel-scratch")).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    server.belt.turn("lost")
    expect(page.locator("#camera")).to_have_text("camera lost")
    expect(page.locator("#notices")).to_contain_text("the belt is lost")


def test_a_verdict_is_of_what_is_before_the_camera_now(page: Page, tmp_path: Path) -> None:
    Image.open(GOOD).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    parts = cycle([GOOD, tmp_path / "other.png"])  # one picture all the time would be a frozen camera
    with running() as server:
        page.goto(server.url)
        verdict, picture = page.locator("#verdict"), page.locator("#picture")
        expect(verdict).to_contain_text("No frame yet")
        server.belt.parts.put(next(parts))
        expect(verdict).to_contain_text("Good")
        expect(picture).to_have_css("filter", "none")
        expect(verdict).to_contain_text(re.compile("No frame for [0-9]+ s"))  # the camera says that it is live
        expect(verdict).not_to_contain_text("Good")
        expect(picture).to_have_css("filter", "grayscale(1) blur(8px)")  # its bar says good
        for state in ("lost", "black", "frozen", "some state of later"):
            server.belt.parts.put(next(parts))
            server.belt.turn("live")
            expect(verdict).to_contain_text("Good")
            server.belt.turn(state)
            expect(verdict).to_contain_text(f"Camera {state}")
            expect(verdict).to_contain_text(f"No picture to judge: the belt is {state}")
            expect(verdict).not_to_contain_text("Good")
            expect(page.locator("#camera")).to_have_text(f"camera {state}")
            expect(page.locator("#camera")).to_have_attribute("data-state", "bad")
            expect(page.locator("#notices li").first).to_have_attribute("data-state", "bad")
            expect(page.locator("#announcer")).to_have_text(f"the belt is {state}")
        server.belt.parts.put(next(parts))
        server.belt.turn("live")
        expect(verdict).to_contain_text("Good")
        server.belt.parts.put(None)
        expect(verdict).to_contain_text("Camera ended")
    expect(verdict).to_contain_text("No connection")
    expect(verdict).not_to_contain_text("Good")


def test_the_slider_changes_the_verdict(server: Server, page: Page) -> None:
    page.goto(server.url)
    slider, number = page.get_by_role("slider", name="Threshold"), page.get_by_label("Threshold, exact")
    expect(number).to_have_value("0.600")
    server.belt.parts.put(SCRATCH)
    expect(page.locator("#verdict")).to_contain_text("Defect")
    slider.press("End")
    expect(number).to_have_value("1.000")
    eventually(lambda: server.json("/v1/status")["threshold"] == 1)
    server.belt.parts.put(SCRATCH)
    expect(page.locator("#verdict")).to_contain_text("Good")
    number.fill("0.25")
    number.press("Enter")
    expect(slider).to_have_value("0.25")
    eventually(lambda: server.json("/v1/status")["threshold"] == 0.25)
    server.belt.parts.put(GOOD)
    expect(page.locator("#verdict")).to_contain_text("Defect")
    other = page.context.new_page()  # everyone sees the same
    other.goto(server.url)
    expect(other.get_by_label("Threshold, exact")).to_have_value("0.250")


def test_an_image_is_dropped(page: Page) -> None:
    with running(live=False) as server:
        page.goto(server.url)
        expect(page.locator("#upload")).to_be_visible()
        expect(page.locator("#live")).to_be_hidden()
        page.set_input_files("#file", SCRATCH)
        picture = page.get_by_role("img", name="Heat map of brushed-steel-scratch.jpg: defect")
        expect(picture).to_be_visible()
        expect(picture).to_have_js_property("naturalWidth", 720)
        expect(page.locator("#scored-text")).to_contain_text("Defect")
        page.get_by_role("slider", name="Threshold").press("End")  # it is scored anew
        expect(page.locator("#scored-text")).to_contain_text("threshold 1.000")
        expect(page.locator("#scored-text")).to_contain_text("Good")
        drop = """([zone, text, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([text], name, {type: "image/png"}));
            document.querySelector(zone).dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }"""
        page.evaluate(drop, ["#drop", "not an image", "<b>note</b>.png"])
        expect(page.locator("#upload-error")).to_contain_text(
            "<b>note</b>.png: The image is no image that Pillow can read"
        )
        page.set_viewport_size({"width": 360, "height": 740})
        page.wait_for_function("document.documentElement.scrollWidth <= 360")
    expect(page.locator("#connection")).to_have_text("disconnected")


def test_logging_in(page: Page) -> None:
    with running(token=TOKEN) as server:
        page.goto(server.url)
        token = page.get_by_label("Token")
        token.fill("not the token, no")
        token.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That is not the token.")
        token.fill(TOKEN)
        token.press("Enter")
        expect(page.locator("#camera")).to_have_text("camera live")
        cookie = page.context.cookies()[0]
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["value"] == TOKEN) == (True, "Strict", False)
        page.get_by_role("link", name="API").click()
        expect(page.get_by_role("heading", name="/v1/predict")).to_be_visible()
        page.go_back()
        page.get_by_role("button", name="Log out").click()
        expect(token).to_be_visible()
        page.goto(server.url)
        expect(token).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_bundle_is_named(server: Server, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(server.url)
    facts = page.locator("#facts")
    sha256 = server.predictor.bundle.sha256
    expect(facts).to_have_text(f"namefbclip-nanohash{sha256[:12]}memorynonecalibratedno")
    expect(facts.locator("code")).to_have_attribute("title", sha256)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
