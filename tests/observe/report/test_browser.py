"""The report in a real browser: quiet console, no request, inert names, working switches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.observe.synthetic import SITES, events

from esper import protocol as p
from esper.observe.event_log import EventLog
from esper.observe.report import write_report

pytestmark = pytest.mark.e2e

EVIL = "<img src=x onerror='window.pwned=1'></script><script>window.pwned=1</script>"


def unavailable(reason: str) -> None:
    if os.environ.get("ESPER_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{reason}, and ESPER_REQUIRE_BROWSER=1 asks for it")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = Path(os.environ.get("ESPER_CHROMIUM", "/usr/bin/chromium"))
    if not path.exists():
        unavailable(f"no browser at {path}; set ESPER_CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed; pip install playwright")
    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=str(path), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


def hostile(event: p.AnyEvent) -> p.AnyEvent:
    """Site names and reasons that would run if they were not escaped."""
    values: dict[str, Any] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if name in ("reason", "message", "held_by") and value is not None:
            values[name] = value + EVIL
        elif name == "sites" and value and isinstance(value[0], str):
            values[name] = tuple(site + EVIL if site == SITES[0] else site for site in value)
    return msgspec.structs.replace(event, **values)


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str], list[str]]]:
    folder = tmp_path_factory.mktemp("run")
    with EventLog(folder / "events.jsonl") as log:
        for event in events(seeds=2):
            log.append(hostile(event))
    report = write_report(folder)
    view = browser.new_page(viewport={"width": 1400, "height": 1000})
    complaints: list[str] = []
    requests: list[str] = []
    view.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(report.as_uri())
    yield view, complaints, requests
    view.close()


def visible(view: Any, choice: str, value: str) -> int:
    return view.locator(f'[data-when="{choice}"][data-value="{value}"]:visible').count()


def test_switches_show_one_alternative_and_survive_a_reload(page: tuple[Any, list[str], list[str]]) -> None:
    view, _, _ = page
    assert visible(view, "x", "step") == 2 and visible(view, "x", "flops") == 0
    view.get_by_role("button", name="FLOPs", exact=True).click()
    view.get_by_role("group", name="seed").get_by_role("button", name="1").click()
    view.get_by_role("button", name="FLOPs spent").click()
    for _ in range(2):
        assert visible(view, "x", "step") == 0 and visible(view, "x", "flops") == 2
        assert visible(view, "seed", "0") == 0 and visible(view, "seed", "1") > 4
        assert visible(view, "cost", "spent") == 1
        assert view.locator('button[data-choice="x"][aria-pressed="true"]').inner_text() == "FLOPs"
        view.reload()


def test_tooltips_tell_what_is_under_the_pointer(page: tuple[Any, list[str], list[str]]) -> None:
    view, _, _ = page
    tip = view.locator("#tip")
    view.locator("[data-cohort]:visible").first.hover()
    assert "#0 layers.0-2" in tip.inner_text() and "e-value" in tip.inner_text()
    view.locator("svg[data-hover]:visible").first.hover(position={"x": 300, "y": 60})
    assert "held-out" in tip.inner_text()


def test_hostile_names_do_not_run_and_nothing_is_fetched(page: tuple[Any, list[str], list[str]]) -> None:
    view, complaints, requests = page
    assert EVIL[:20] in view.locator("body").inner_text() + (
        view.locator("[data-tip]").first.get_attribute("data-tip") or ""
    )
    assert view.evaluate("window.pwned") is None and view.locator("img").count() == 0
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
    assert complaints == []
    assert "last update" in view.locator("#updated").inner_text()


def test_nothing_overflows_a_narrow_window(page: tuple[Any, list[str], list[str]]) -> None:
    view, _, _ = page
    view.set_viewport_size({"width": 700, "height": 900})
    assert view.evaluate("document.documentElement.scrollWidth") <= 700
