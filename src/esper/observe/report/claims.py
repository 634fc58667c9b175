"""What was claimed and what held: claimed against found gains, twins, and the effect of grafting; over all seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.observe.credit import Claim, Line, claims, effects_of, fit_line, grafting_effect
from esper.observe.history import Cohort, SeedRun
from esper.observe.quantities import signed, site_list
from esper.observe.report import plot, svg
from esper.observe.report.outcome import look_of
from esper.observe.report.plot import Frame

_SHAPES = {"twin audit": "disc", "on/off audit": "square", "twin": "ring"}
_LOOKS = {"twin audit": "kept", "on/off audit": "alive", "twin": "kept"}
_EVERY = 500


def calibration_chart(runs: Sequence[SeedRun]) -> str:
    """Each accepted cohort's claimed gain against the gain found by audit or twin; on the diagonal they agree."""
    points = _points(runs)
    if not points:
        return plot.empty(
            "No accepted cohort was scored twice: give the Grower audit= batches, or ask for twins "
            "(evidence.twin_share)."
        )
    bounds = [value for point in points for value in (point.low, point.high)]
    ends = [*(point.claimed for point in points), *(point.found for point in points)]
    low, high = plot.robust_range([*ends, *bounds] if len(points) <= 40 else ends, include=[0.0])
    frame = Frame((low, high), (low, high), height=340)
    line = _line(points)
    parts = [
        frame.axes("gain claimed when accepted", "gain found"),
        svg.line(frame.x(low), frame.y(low), frame.x(high), frame.y(high), "host dash"),
    ]
    if math.isfinite(line.slope):
        ends_at = [(x, line.intercept + line.slope * x) for x in _reach(points)]
        parts.append(svg.polyline([(frame.x(x), frame.y.clamped(y)) for x, y in ends_at], "path"))
    parts += [_mark(frame, point) for point in points[:_EVERY]]
    return frame.figure("".join(parts), "Claimed against found gains") + _sentence(line, points)


def calibration_legend(runs: Sequence[SeedRun]) -> str:
    present = dict.fromkeys(point.source for point in _points(runs))
    entries = [(_SHAPES[name], _LOOKS[name], name) for name in _SHAPES if name in present]
    if entries:
        entries += [("dash", "host", "claims that hold exactly"), ("line", "path", "least squares")]
    return plot.legend(entries)


def twin_table(runs: Sequence[SeedRun], limit: int = 30) -> str:
    """Every cohort that had a twin: its measured gain, raw and shrunken, beside its credit."""
    rows = [(run, cohort) for run in runs for cohort in run.cohorts.values() if cohort.twin is not None]
    if not rows:
        return svg.element("p", "No cohort had a twin.", class_="quiet")
    body = "".join(_twin_row(run, cohort) for run, cohort in rows[:limit])
    numbers = "".join(f"<th class=num>{name}</th>" for name in ("gain", "shrunken", "credit"))
    head = f"<tr><th>cohort</th>{numbers}<th></th></tr>"
    rest = f"and {len(rows) - limit} more in the event log" if len(rows) > limit else ""
    more = svg.element("p", rest, class_="quiet") if rest else ""
    caption = "<caption>Against a twin trained without the cohort</caption>"
    return f"<table class=plain>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>{more}"


def effect_text(runs: Sequence[SeedRun]) -> str:
    """What grafting did on average, from the cohorts that a draw withheld."""
    effects = effects_of(runs)
    effect = grafting_effect(effects)
    if effect is None:
        return svg.element("p", "No cohort was withheld by a draw (evidence.withhold_share).", class_="quiet")
    steps = max(event.num_steps for event in effects)
    counts = f"{effect.num_grafted} grafted and {effect.num_withheld} withheld cohorts, {steps} steps after the draw"
    if not math.isfinite(effect.gain):
        return svg.element("p", f"Effect of grafting: not known yet ({counts}).", class_="quiet")
    bounds = (
        f" (95% interval {signed(effect.low, 4)} to {signed(effect.high, 4)})"
        if math.isfinite(effect.low)
        else " (too few for an interval)"
    )
    gain = f"Grafting lowered the held-out loss by <b>{signed(effect.gain, 4)}</b>{bounds}: {counts}."
    return svg.element("p", gain, class_="effect")


def _points(runs: Sequence[SeedRun]) -> list[Claim]:
    return [claim for run in runs for claim in claims(run.cohorts.values())]


def _reach(points: Sequence[Claim]) -> tuple[float, float]:
    claimed = [point.claimed for point in points]
    return min(claimed), max(claimed)


def _line(points: Sequence[Claim]) -> Line:
    return fit_line([point.claimed for point in points], [point.found for point in points])


def _mark(frame: Frame, point: Claim) -> str:
    x, y = frame.x.clamped(point.claimed), frame.y.clamped(point.found)
    parts: list[str] = []
    if math.isfinite(point.low) and math.isfinite(point.high):
        parts.append(svg.line(x, frame.y.clamped(point.low), x, frame.y.clamped(point.high), "hold interval"))
    parts.append(svg.mark(_SHAPES[point.source], x, y, _LOOKS[point.source], size=4.0))
    tip = (
        f"#{point.cohort}\nclaimed {signed(point.claimed, 4)}\n{point.source} {signed(point.found, 4)} "
        f"[{signed(point.low, 4)}, {signed(point.high, 4)}]"
    )
    return svg.element("g", "".join(parts), data_tip=tip)


def _sentence(line: Line, points: Sequence[Claim]) -> str:
    negative = sum(point.found < 0 for point in points)
    text = f"{line.num} accepted cohorts, {negative} found to be worse than nothing"
    if math.isfinite(line.low):
        text += f"; slope {line.slope:.2f} (95% interval {line.low:.2f} to {line.high:.2f})"
    elif math.isfinite(line.slope):
        text += f"; slope {line.slope:.2f}, too few for an interval"
    return svg.element("p", f"{text}.", class_="quiet")


def _twin_row(run: SeedRun, cohort: Cohort) -> str:
    twin, judged = cohort.twin, next((j for j in cohort.judgements if j.stage == "evaluate"), None)
    assert twin is not None  # chosen by it
    raw, shrunken = (signed(judged.gain, 4), signed(judged.gain_shrunken, 4)) if judged is not None else ("", "")
    name = svg.escape(f"#{cohort.cohort} {site_list(cohort.sites, 1)}, seed {run.seed}: {look_of(cohort).word}")
    bounds = f"[{signed(twin.credit_low, 4)}, {signed(twin.credit_high, 4)}] after {twin.num_steps} steps"
    return (
        f"<tr><td>{name}</td><td class=num>{raw}</td><td class=num>{shrunken}</td>"
        f"<td class=num>{signed(twin.credit, 4)}</td><td>{bounds}</td></tr>"
    )
