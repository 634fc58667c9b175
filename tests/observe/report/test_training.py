"""The page of a policy's training."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from esper.observe.report.training import training_page

pytestmark = pytest.mark.unit


def line(update: int, **values: object) -> dict[str, object]:
    usual = {
        "update": update, "mean_return": 0.1 * update, "explained_variance": None,
        "operations": {"wait": 0.5, "germinate": 0.5}, "entropy": {"operation": 0.9, "strategy": None}, "problems": [],
    }  # fmt: skip
    return usual | values


def test_a_page_draws_what_was_recorded_and_says_what_was_not() -> None:
    page = training_page([line(1), line(2), line(3, problems=["the policy only waits <always>"])], "a < b")
    root = ElementTree.fromstring(page.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', ""). replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""
    ).replace("img-src data:\">", "img-src data:\"/>").replace('href="data:,">', 'href="data:,"/>'))  # fmt: skip
    labels = [found.get("aria-label") for found in root.iter("svg") if found.get("role") == "img"]
    assert labels[0] == "mean return; last: return of the episodes that ended 0.3"
    assert labels[1].startswith("what it does") and "germinate 0.5" in labels[1]  # type: ignore[union-attr]
    assert labels[2] == "entropy of its choices; last: operation 0.9"  # nobody ever chose a strategy
    assert "Nothing was recorded of this." in page  # of the critic
    assert "the policy only waits &lt;always&gt;" in page and "a &lt; b" in page and "<script" not in page


def test_a_page_without_lines_stands() -> None:
    assert training_page([]).count("Nothing was recorded of this.") == 4
