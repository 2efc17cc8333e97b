"""The page of a run in a real browser: light and dark, on a desk and on a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.checkpoint_viewer import main
from tests.conftest import save_picture
from tests.utils.tools.report.test_page import make_run

LONG = "averylongnamewithoutaspace" * 8
NORMAL_TEXT, GRAPHICS = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11

OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true;"
SCROLLS_SIDEWAYS = (
    "const page = document.documentElement; return page.scrollWidth > page.clientWidth;"
)
# Elements that reach beyond the window, other than those in a box that scrolls.
TOO_WIDE = """
return [...document.querySelectorAll("body *")].filter(element =>
    !element.parentElement.closest(".scroll")
    && element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
).map(element => element.outerHTML.slice(0, 200));
"""
# The lowest contrast of a text, and of a line of a chart, with what lies behind it.
LOWEST_CONTRASTS = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([red, green, blue]) => [red, green, blue].map(value => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
}).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
const behind = element => {
    const color = channels(getComputedStyle(element).backgroundColor);
    return color[3] === 0 && element.parentElement ? behind(element.parentElement) : color;
};
const contrast = (color, element) => {
    const pair = [luminance(channels(color)), luminance(behind(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
};
const hasText = element => [...element.childNodes].some(
    child => child.nodeType === Node.TEXT_NODE && child.data.trim());
const texts = [...document.querySelectorAll("body *")].filter(hasText).filter(
    element => element.tagName !== "style").map(element => contrast(
        element.closest("svg") ? getComputedStyle(element).fill : getComputedStyle(element).color,
        element));
const lines = [...document.querySelectorAll("svg path[style*=line-]")].map(
    element => contrast(getComputedStyle(element).stroke, element));
return [Math.min(...texts), Math.min(...lines), luminance(behind(document.body))];
"""


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of selenium's client
def test_a_page_fits_its_window_can_be_read_and_asks_for_nothing(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(LONG)
    assert main(["report", "--run-name", "deeper"]) == 0
    address = (tmp_path / "run.html").as_uri()
    for width in (360, 1280):
        for scheme in ("light", "dark"):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            browser.get(address)
            browser.execute_script(OPEN_ALL)
            where = f"{width} pixels, {scheme}"
            assert browser.execute_script(SCROLLS_SIDEWAYS) is False, where
            assert browser.execute_script(TOO_WIDE) == [], where
            text, line, background = browser.execute_script(LOWEST_CONTRASTS)
            assert text >= NORMAL_TEXT, where
            assert line >= GRAPHICS, where
            assert (background < 0.1) == (scheme == "dark")
            save_picture(browser, tmp_path, f"report-{width}-{scheme}")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        and message["params"]["documentURL"] == address  # chromium begins with a page of its own
    }
    assert asked - {"data:,"} == {address}
    assert browser.get_log("browser") == []  # nothing that the policy of the page refused
