"""The report as one HTML document: headline, table, charts in the order people look."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import resources

from esper.observe.history import RunHistory, SeedRun
from esper.observe.report import claims, costs, curves, decisions, frontier, growth, seeds
from esper.observe.report.summary import headline, notes, result_table, tiles
from esper.observe.report.svg import element, escape

MAX_BYTES = 2_000_000
REFRESH_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is drawn; the page takes the most that fits its size."""

    num_seeds: int
    num_points: int
    num_rows: int


_DETAILS = (Detail(5, 400, 200), Detail(3, 240, 60), Detail(1, 160, 30), Detail(1, 60, 12))


def render(history: RunHistory) -> str:
    """The whole page as text, at most 2 MB in UTF-8. The same history gives the same page."""
    page = ""
    for detail in _DETAILS:
        page = _page(history, detail)
        if len(page.encode()) <= MAX_BYTES:
            return page
    return page


@lru_cache(maxsize=2)
def _asset(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _page(history: RunHistory, detail: Detail) -> str:
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Should an escape ever be missed, the browser still runs this one script only and fetches nothing.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    title = escape(history.run or "run")
    refresh = "" if history.is_finished else f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    runs = _main_runs(history)
    views = runs[: detail.num_seeds]
    body = "".join([
        _header(history),
        headline(history),
        tiles(history),
        _switches(views, len(runs)),
        _first_screen(history, views, detail),
        _second_screen(views, detail),
        _claims_screen(runs),
        _third_screen(views),
        "<h2>All arms</h2>",
        element("section", result_table(history), class_="card"),
        notes(history),
    ])  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f'<title>{title} \u00b7 Esper</title><link rel="icon" href="data:,">'
        f"<style>{_asset('report.css')}</style></head>\n"
        f'<body><main>{body}</main><div id="tip" role="tooltip" hidden></div><script>{script}</script></body></html>\n'
    )


def _main_runs(history: RunHistory) -> list[SeedRun]:
    main = history.main_arm
    return list(history.arms[main].values()) if main is not None else []


def _header(history: RunHistory) -> str:
    state = ("done", "finished") if history.is_finished else ("running", "running")
    if not history.num_events:
        state = ("running", "no event yet")
    time = history.last_time
    updated = ""
    if math.isfinite(time):
        running = "0" if history.is_finished else "1"
        updated = element(
            "time", f"last update {_utc(time)}", id="updated", class_="updated", data_time=f"{time:.3f}",
            data_running=running, title=_utc(time),
        )  # fmt: skip
    preset = element("span", escape(f"preset {history.preset}"), class_="chip") if history.preset else ""
    chip = element("span", state[1], class_=f"chip {state[0]}")
    return element("header", f"<h1>{escape(history.run or 'Esper run')}</h1>{chip}{preset}{updated}")


def _utc(time: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"


def _switch(name: str, label: str, values: list[tuple[str, str]]) -> str:
    """Buttons of which one is chosen; the first one is at the start."""
    buttons = "".join(
        element(
            "button", escape(text), type="button", data_choice=name, data_value=value,
            aria_pressed="true" if index == 0 else "false",
        )
        for index, (value, text) in enumerate(values)
    )  # fmt: skip
    return element("div", f"<span>{escape(label)}</span>{buttons}", class_="switch", role="group", aria_label=label)


def _alternatives(name: str, class_: str, contents: list[tuple[str, str]]) -> str:
    """One of several contents, chosen by the switch of that name."""
    if len(contents) == 1:
        return contents[0][1]
    return "".join(
        element(
            "div", content, class_=class_, data_when=name, data_value=value, hidden=None if index == 0 else "hidden"
        )
        for index, (value, content) in enumerate(contents)
    )


def _switches(views: list[SeedRun], total: int) -> str:
    parts: list[str] = []
    if views:
        parts.append(_switch("x", "horizontal axis", [("step", "step"), ("flops", "FLOPs")]))
    if len(views) > 1:
        parts.append(_switch("seed", "seed", [(str(run.seed), str(run.seed)) for run in views]))
    if total > len(views):
        parts.append(element("span", f"{len(views)} of {total} seeds drawn; the table has all", class_="quiet"))
    return element("div", "".join(parts), class_="bar") if parts else ""


def _card(title: str, says: str, content: str, *, side: str = "") -> str:
    head = f'<div class="top"><h3>{escape(title)}</h3>{side}</div>'
    return element("section", f'{head}<p class="says">{escape(says)}</p>{content}', class_="card")


def _per_seed(views: list[SeedRun], draw: Callable[[SeedRun], str], missing: str) -> str:
    if not views:
        return element("p", escape(missing), class_="empty")
    return _alternatives("seed", "pane", [(str(run.seed), draw(run)) for run in views])


def _first_screen(history: RunHistory, views: list[SeedRun], detail: Detail) -> str:
    points = detail.num_points

    def loss(run: SeedRun) -> str:
        charts = [(axis, curves.loss_chart(history, run, axis, points)) for axis, _ in curves.AXES]
        return _alternatives("x", "alt", charts) + curves.loss_legend(history, run)

    def size(run: SeedRun) -> str:
        charts = [(axis, curves.size_chart(history, run, axis, points)) for axis, _ in curves.AXES]
        reason = run.stopped.reason if run.stopped else "growth has not been stopped"
        said = f"Stopped at step {run.stopped.step}: {reason}" if run.stopped else f"Still open: {reason}."
        return _alternatives("x", "alt", charts) + element("p", escape(said), class_="quiet")

    def forest(run: SeedRun) -> str:
        return decisions.forest(run, detail.num_rows) + decisions.forest_legend(run)

    cost = _alternatives(
        "cost", "alt", [(axis, frontier.frontier_chart(history, axis, points)) for axis, _ in frontier.AXES]
    )
    cards = [
        _card("Loss", "On held-out batches, with every decision that was taken.",
              _per_seed(views, loss, "No training run has started yet.")),
        _card("Size and budget", "Parameters in the model, from the host alone up to the ceiling.",
              _per_seed(views, size, "No training run has started yet.")),
        _card("Decisions", "What each candidate changed on the same held-out batches, on against off, 95% interval.",
              _per_seed(views, forest, "No candidate was germinated yet.")),
        _card("Frontier", "Loss against cost: down and left is better.", cost + frontier.frontier_legend(history),
              side=_switch("cost", "against", list(frontier.AXES))),
    ]  # fmt: skip
    return element("div", "".join(cards), class_="grid")


def _second_screen(views: list[SeedRun], detail: Detail) -> str:
    def growth_map(run: SeedRun) -> str:
        charts = [(kind, growth.growth_map(run, kind, min(detail.num_rows, 32))) for kind, _ in growth.MAPS]
        return _alternatives("map", "alt", charts)

    def life(run: SeedRun) -> str:
        return seeds.timeline(run, min(detail.num_rows, 32)) + seeds.timeline_legend()

    def graft(run: SeedRun) -> str:
        return seeds.grafting_chart(run) + seeds.grafting_legend(run) + seeds.fit_table(run)

    def need(run: SeedRun) -> str:
        return growth.need_against_spend(run) + growth.need_legend()

    missing = "No training run has started yet."
    cards = [
        _card("Growth map", "Sites by time, greatest need first; darker is more, dashed is a silent sensor.",
              _per_seed(views, growth_map, missing), side=_switch("map", "shade", list(growth.MAPS))),
        _card("Seed timeline", "From germination to the end; the filled height is alpha.",
              _per_seed(views, life, missing)),
        _card("Need against spend", "Where the gradients pressed, and where units were added.",
              _per_seed(views, need, missing)),
        _card("Grafting", "How each branch was blended in.", _per_seed(views, graft, missing)),
    ]  # fmt: skip
    return "<h2>Where and how it grew</h2>" + element("div", "".join(cards), class_="grid")


def _claims_screen(runs: list[SeedRun]) -> str:
    cards = [
        _card("Claims", "Gains claimed when cohorts were accepted, against what was found afterwards; all seeds.",
              claims.calibration_chart(runs) + claims.calibration_legend(runs)),
        _card("Without growth", "What became of the same training without a cohort; all seeds.",
              claims.effect_text(runs) + claims.twin_table(runs)),
    ]  # fmt: skip
    return "<h2>What was claimed and what held</h2>" + element("div", "".join(cards), class_="grid")


def _third_screen(views: list[SeedRun]) -> str:
    missing = "No training run has started yet."
    cards = [
        _card("Overhead", "Time Esper itself took, by part.",
              _per_seed(views, lambda run: costs.overhead_chart(run) + costs.overhead_legend(run), missing)),
        _card("Gates", "How far candidates got, and what was refused.",
              _per_seed(views, lambda run: decisions.gate_funnel(run) + decisions.refusals(run), missing)),
    ]  # fmt: skip
    return "<h2>What it cost and what was turned down</h2>" + element("div", "".join(cards), class_="grid")


__all__ = ["MAX_BYTES", "render"]
