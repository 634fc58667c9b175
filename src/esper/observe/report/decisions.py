"""First screen: the decision forest. Third: how many candidates each gate let through, and what was refused."""

from __future__ import annotations

import math
from collections import Counter

from esper.observe.history import Cohort, SeedRun
from esper.observe.quantities import magnitude, site_list
from esper.observe.report import plot, svg
from esper.observe.report.outcome import LOOKS, describe, look_of
from esper.observe.report.plot import Frame, Scale
from esper.protocol import Judged, Lifecycle

_ROW = 24
_DENSE_ROW = 7
_SCROLLS_FROM = 14


def forest(run: SeedRun, max_rows: int) -> str:
    """Paired held-out gain with its interval for every candidate, rejected ones too, oldest first.

    Above ``max_rows`` candidates the rows shrink and lose their labels; none is left out.
    """
    cohorts = list(run.cohorts.values())
    if not cohorts:
        return plot.empty("No candidate was germinated yet.")
    dense = len(cohorts) > max_rows
    row = _DENSE_ROW if dense else _ROW
    left = 20.0 if dense else svg.label_width(map(_label, cohorts))
    frame = Frame(
        _gain_range(cohorts), (0.0, float(len(cohorts))), height=len(cohorts) * row + 60, left=left,
        right=20 if dense else 234, top=20,
    )  # fmt: skip
    zero = frame.x(0.0)
    parts = [
        frame.axes("paired held-out gain (right of 0: better)", "", y_ticks=False, num_x=4),
        svg.line(zero, frame.top, zero, frame.height - frame.bottom, "zero"),
    ]
    for index, cohort in enumerate(cohorts):
        parts.append(_forest_row(frame, cohort, frame.top + (index + 0.5) * row, dense=dense))
    if not any(cohort.judgements for cohort in cohorts):
        parts.append(svg.text(zero, frame.top - 6, "no cohort was judged yet", "t note", "middle"))
    figure = frame.figure("".join(parts), f"Decisions on {len(cohorts)} candidates")
    scrolls = len(cohorts) * row > _SCROLLS_FROM * _ROW
    return svg.element("div", figure, class_="scroll", tabindex="0") if scrolls else figure


def forest_legend(run: SeedRun) -> str:
    present = {look_of(cohort).word for cohort in run.cohorts.values()}
    entries = [(look.shape, look.class_, look.word) for look in LOOKS if look.word in present]
    if any(cohort.judgements for cohort in run.cohorts.values()):
        entries.append(("ring", "shrunken", "shrunken gain"))
    if any(_hold(cohort) for cohort in run.cohorts.values()):
        entries.append(("line", "hold", "looked at again before keeping"))
    return plot.legend(entries)


def gate_funnel(run: SeedRun) -> str:
    """Candidates that got as far as each stage, one bar a stage."""
    cohorts = list(run.cohorts.values())
    if not cohorts:
        return plot.empty("No candidate was germinated yet.")
    reached = {
        "germinated": len(cohorts),
        "fitted": sum(c.step_of(Lifecycle.TRAINING) is not None for c in cohorts),
        "grafted": sum(c.step_of(Lifecycle.GRAFTING) is not None for c in cohorts),
        "judged": sum(bool(c.judgements) for c in cohorts),
        "accepted": sum(any(judged.accepted for judged in c.judgements) for c in cohorts),
        "kept": sum(c.state is Lifecycle.FOSSILIZED for c in cohorts),
    }
    width, left, row = 640, 100, 28
    scale = Scale(0, len(cohorts), 0, width - left - 60)
    parts: list[str] = []
    for index, (name, count) in enumerate(reached.items()):
        y = 8 + index * row
        parts.append(svg.text(left - 10, y + 14, name, anchor="end"))
        parts.append(svg.rect(left, y, max(scale(count), 1), row - 9, "funnel", rx=3))
        parts.append(svg.text(left + scale(count) + 8, y + 14, count, "t strong"))
    height = 12 + len(reached) * row
    return svg.element(
        "svg", "".join(parts), viewBox=f"0 0 {width} {height}", class_="plot", role="img",
        aria_label="Candidates that reached each stage",
    )  # fmt: skip


def refusals(run: SeedRun, limit: int = 12) -> str:
    """What gates refused and why, most frequent first."""
    if not run.refusals:
        return svg.element("p", "No command was refused.", class_="quiet")
    counts = Counter((event.gate, event.reason) for event in run.refusals)
    rows = "".join(
        f"<tr><td class=num>{count}\u00d7</td><td>{svg.escape(gate)}</td><td>{svg.escape(reason)}</td></tr>"
        for (gate, reason), count in counts.most_common(limit)
    )
    rest = len(counts) - limit
    more = svg.element("p", f"and {rest} more kinds of refusal in the event log", class_="quiet") if rest > 0 else ""
    return f"<table class=plain><caption>Refused commands</caption><tbody>{rows}</tbody></table>{more}"


def _gain_range(cohorts: list[Cohort]) -> tuple[float, float]:
    judged = [judgement for cohort in cohorts for judgement in cohort.judgements]
    ends = [value for item in judged for value in (item.gain, item.gain_low, item.gain_high)]
    trimmed = len(judged) >= 20
    return plot.robust_range(ends, low=2.0 if trimmed else 0.0, high=98.0 if trimmed else 100.0, include=[0.0])


def _label(cohort: Cohort) -> str:
    return svg.shorten(f"#{cohort.cohort} {site_list(cohort.sites, 1)}", 24)


def _hold(cohort: Cohort) -> Judged | None:
    return next((judged for judged in reversed(cohort.judgements) if judged.stage == "hold"), None)


def _forest_row(frame: Frame, cohort: Cohort, y: float, *, dense: bool) -> str:
    look = look_of(cohort)
    first = next((judged for judged in reversed(cohort.judgements) if judged.stage != "hold"), cohort.verdict)
    parts = [svg.rect(0, y - 11, frame.width, 22, "hit")] if not dense else []
    tip = describe(cohort)
    if not dense:
        parts.append(svg.text(frame.left - 12, y + 4, _label(cohort), anchor="end"))
    tail_x = frame.width - frame.right + 14
    if first is None:
        if not dense:
            word = look.word if not cohort.is_alive else "in progress"
            parts.append(svg.text(tail_x, y + 4, svg.shorten(f"{word}, not judged", 30), "t note"))
        parts.append(svg.mark(look.shape, frame.x(0.0), y, f"{look.class_} faint", size=3.0 if dense else 4.5))
    else:
        hold = _hold(cohort)
        if hold is not None and hold is not first and not dense:
            parts.append(_interval(frame, hold, y + 6, "hold"))
        parts.append(_interval(frame, first, y, look.class_))
        if math.isfinite(first.gain_shrunken) and not dense:
            parts.append(svg.mark("ring", frame.x.clamped(first.gain_shrunken), y, "shrunken", size=3.2))
        parts.append(svg.mark(look.shape, frame.x.clamped(first.gain), y, look.class_, size=2.5 if dense else 4.5))
        if not dense:
            gain, low, high = (_digits(frame, value) for value in (first.gain, first.gain_low, first.gain_high))
            parts.append(svg.text(tail_x, y + 4, f"{gain} [{low}, {high}]", "t tabular"))
            parts.append(svg.text(frame.width - 2, y + 4, magnitude(cohort.added_params), "t note", "end"))
    return svg.element("g", "".join(parts), data_cohort=cohort.cohort, data_tip=tip, class_="row")


def _digits(frame: Frame, gain: float) -> str:
    """A gain with the digits this chart's range needs, the same in every row."""
    span = frame.x_range[1] - frame.x_range[0]
    digits = min(max(2 - math.floor(math.log10(span)), 1), 7)
    return f"{gain:+.{digits}f}" if math.isfinite(gain) else "?"


def _interval(frame: Frame, judged: Judged, y: float, class_: str) -> str:
    low = frame.x_range[0] if math.isnan(judged.gain_low) else judged.gain_low
    high = frame.x_range[1] if math.isnan(judged.gain_high) else judged.gain_high
    return svg.line(frame.x.clamped(low), y, frame.x.clamped(high), y, f"{class_} interval")
