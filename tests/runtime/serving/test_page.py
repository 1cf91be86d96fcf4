"""The page, in headless Chromium: reading, learning, writing, saving, forking, resetting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient


def test_its_files_are_served_under_a_strict_policy(client: TestClient) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "<script>" not in client.get("/").text


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """The page in a browser, which is to say nothing on its console."""
    from playwright.sync_api import sync_playwright

    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert binary, "this suite needs a browser: apt-get install chromium"
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        yield page
        browser.close()
    assert not said


@pytest.mark.suite("page")
def test_the_whole_way(page: Any, client: TestClient) -> None:  # noqa: ANN401
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    said, badge = page.locator("#said"), page.locator("#state")
    expect(badge).to_have_text("0 bytes read · saved")
    text = "the same line over and over\n" * 40 + "and then ünïcödé €"
    size = len(text.encode())
    page.fill("#text", text)
    page.click("#read")
    expect(said).to_have_text(re.compile(r"^Read\."))
    assert page.text_content("#text-on") == page.text_content("#text-off") == text
    assert page.locator("#text-on i").count() > 5
    assert float(page.text_content("#bits-off")) > 0
    assert page.locator("#chart polyline").count() == 2
    expect(badge).to_have_text(f"{size:,} bytes read · not saved")
    first = float(page.text_content("#bits-on"))
    page.click("#read")
    expect(badge).to_have_text(f"{2 * size:,} bytes read · not saved")
    assert float(page.text_content("#bits-on")) < first  # it has learnt from the first time
    page.fill("#prompt", "the same")
    page.fill("#count", "20")
    page.click("#write")
    expect(said).to_have_text(re.compile(r"^Written\."))
    assert page.text_content("#written").startswith("the same")
    page.click("#save")
    expect(said).to_have_text("Saved.")
    expect(badge).to_have_text(f"{2 * size + 28:,} bytes read · saved")
    own = page.input_value("#memory")
    page.once("dialog", lambda dialog: dialog.accept("twin"))
    page.click("#fork")
    expect(page.locator("#memory")).to_have_value("twin")
    page.click("#reset")
    expect(badge).to_have_text("0 bytes read · saved")
    page.select_option("#memory", own)
    expect(badge).to_have_text(f"{2 * size + 28:,} bytes read · saved")
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == f"{own}.memory"
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#delete")
    expect(page.locator("#memory")).to_have_value("twin")
    assert [one["id"] for one in client.get("/v1/memories").json()["data"]] == ["twin"]


@pytest.mark.suite("page")
def test_stopping_leaves_the_memory_as_it_was(page: Any) -> None:  # noqa: ANN401
    from playwright.sync_api import expect

    page.fill("#text", "x" * 90_000)
    page.click("#read")
    page.click("#stop")
    expect(page.locator("#said")).to_have_text("Stopped. The memory is as it was before.")
    expect(page.locator("#state")).to_have_text("0 bytes read · saved")


@pytest.mark.suite("page")
def test_a_text_is_shown_as_text(page: Any) -> None:  # noqa: ANN401
    """Not as markup, whatever it holds."""
    from playwright.sync_api import expect

    text = '<img src=x onerror="document.title=1"><b>&amp;</b>' * 4
    page.fill("#text", text)
    page.click("#read")
    expect(page.locator("#said")).to_have_text(re.compile(r"^Read\."))
    assert page.text_content("#text-on") == text
    assert page.locator("#text-on b").count() == 0
