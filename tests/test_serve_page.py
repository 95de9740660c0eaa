"""The chat page, as a browser sees it."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from serving import Served, serving

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    out = tmp_path_factory.mktemp("page") / "demo"
    bundle = export_bundle(open_checkpoint(DEMO_FOLDER), out, batch_size=2).folder
    with serving(bundle) as server:
        yield server


def test_the_policy_allows_the_pages_own_script_and_style_alone(served: Served):
    status, page, headers = served.ask("/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|\bon\w+=|innerHTML| style=", page)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_it_sends_streams_stops_and_begins_anew(served: Served, browser: Any):
    from playwright.sync_api import expect

    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://127.0.0.1:{served.port}/")
    expect(page.locator("#model")).to_have_text("demo")

    page.get_by_text("Settings").click()
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "12")
    page.fill("#text", "Once upon a time")
    page.keyboard.press("Enter")
    expect(page.locator(".speed")).to_contain_text("tokens/s")
    body = {"messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0}
    answer = served.ask("/v1/chat/completions", {**body, "max_tokens": 12})[1]
    expected = answer["choices"][0]["message"]["content"]
    expect(page.locator(".assistant")).to_have_text(expected.strip())

    page.fill("#text", "dog " * 1000)  # refused by the server, told by the page
    page.click("#send")
    expect(page.locator(".error")).to_contain_text("maximum context length is 512")

    page.click("#reset")
    expect(page.locator("#log > *")).to_have_count(0)
    page.fill("#max_tokens", "480")
    page.fill("#temperature", "1.5")
    page.fill("#text", "Once")
    page.click("#send")
    expect(page.locator(".assistant")).to_contain_text(" ")
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    assert [p for p in problems if "400" not in p] == []  # Chromium tells of the refusal itself
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_and_dark(served: Served, browser: Any, scheme: str, tmp_path: Path):
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{served.port}/")
    color = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    channels = [int(number) for number in re.findall(r"\d+", color)][:3]
    assert (min(channels) > 200) is (scheme == "light")
    assert (max(channels) < 60) is (scheme == "dark")
    page.close()
