"""Second screen: every cohort's life, and how its branch was blended in."""

from __future__ import annotations

from esper.observe.history import END_STATES, Cohort, SeedRun
from esper.observe.quantities import decimal, percent, site_list
from esper.observe.report import plot, svg
from esper.observe.report.outcome import LOOKS, STATE_NAMES, describe, look_of
from esper.observe.report.plot import Frame
from esper.protocol import Lifecycle

_ROW = 24
_STATES = (
    Lifecycle.GERMINATED,
    Lifecycle.TRAINING,
    Lifecycle.GRAFTING,
    Lifecycle.STABILIZATION,
    Lifecycle.EVALUATING,
    Lifecycle.FINE_TUNING,
)


def timeline(run: SeedRun, max_rows: int) -> str:
    """A bar a cohort: colour is the state, the filled height is alpha."""
    cohorts = list(run.cohorts.values())
    if not cohorts:
        return plot.empty("No candidate was germinated yet.")
    shown = cohorts[-max_rows:]
    first = shown[0].started_step if len(shown) < len(cohorts) else 0
    frame = Frame(
        (float(first), float(max(run.last_step, first + 1))),
        (0.0, 1.0),
        height=len(shown) * _ROW + 60,
        left=svg.label_width(map(_label, shown)),
        top=18,
    )
    parts = [frame.axes("optimizer step", "", y_ticks=False)]
    parts += [_life(frame, run, cohort, frame.top + index * _ROW) for index, cohort in enumerate(shown)]
    figure = frame.figure("".join(parts), f"Timeline of {len(shown)} cohorts")
    rest = len(cohorts) - len(shown)
    note = f"The {len(shown)} newest; {rest} earlier ones are in the forest above." if rest else ""
    return figure + (svg.element("p", note, class_="quiet") if note else "")


def timeline_legend() -> str:
    return plot.legend([("box", f"state-{state.value}", STATE_NAMES[state]) for state in _STATES])


def grafting_chart(run: SeedRun) -> str:
    """Alpha since the graft began, a line a cohort; a flat stretch is a strategy that held."""
    grafted = [cohort for cohort in run.cohorts.values() if cohort.step_of(Lifecycle.GRAFTING) is not None]
    curves = [(cohort, points) for cohort in grafted if len(points := _alpha_points(cohort)) > 1]
    if not curves:
        return plot.empty("No branch was grafted yet." if not grafted else "Alpha has not moved yet.")
    longest = max(points[-1][0] for _, points in curves)
    frame = Frame((0.0, max(longest, 1.0) * 1.02), (0.0, 1.06), height=240)
    lines: list[str] = []
    marks: list[str] = []
    for cohort, points in curves:
        look = look_of(cohort)
        lines.append(svg.polyline(frame.at(points), f"{look.class_} alpha"))
        origin = cohort.step_of(Lifecycle.GRAFTING) or 0
        for event in cohort.alphas.items:
            if event.held_by is not None:
                tip = f"#{cohort.cohort} held at alpha {event.alpha:.2f}\nstep {event.step}: {event.held_by}"
                marks.append(svg.mark("square", frame.x(event.step - origin), frame.y(event.alpha), "held", tip=tip))
        end_x, end_y = frame.at(points[-1:])[0]
        marks.append(svg.mark(look.shape, end_x, end_y, look.class_, size=4, tip=describe(cohort)))
    axes = frame.axes("steps since the graft began", "alpha")
    return frame.figure(axes + frame.clipped("".join(lines)) + "".join(marks), "Alpha of each grafted cohort")


def grafting_legend(run: SeedRun) -> str:
    present = {look_of(cohort).word for cohort in run.cohorts.values() if _alpha_points(cohort)}
    entries = [(look.shape, look.class_, look.word) for look in LOOKS if look.word in present]
    if any(event.held_by is not None for cohort in run.cohorts.values() for event in cohort.alphas.items):
        entries.append(("square", "held", "held by the strategy"))
    return plot.legend(entries)


def fit_table(run: SeedRun, max_rows: int = 12) -> str:
    """How the isolated training of the newest candidates ended."""
    fits = [fit for cohort in run.cohorts.values() for fit in cohort.fits]
    if not fits:
        return svg.element("p", "No isolated training has ended yet.", class_="quiet")
    rows = "".join(
        f"<tr><td>#{fit.cohort}</td><td>{svg.escape(svg.shorten(fit.site, 28))}</td><td>{svg.escape(fit.start)}</td>"
        f"<td class=num>{percent(fit.explained)}</td><td class=num>{decimal(fit.t_statistic, 1)}</td>"
        f"<td class=num>{decimal(fit.scale, 2)}</td></tr>"
        for fit in fits[-max_rows:]
    )
    numbers = "".join(f"<th class=num>{name}</th>" for name in ("explained", "t", "scale"))
    head = f"<tr><th></th><th>site</th><th>start</th>{numbers}</tr>"
    return (
        f"<details><summary>Isolated training{_newest(len(fits), max_rows)}</summary><table class=plain>"
        f"<thead>{head}</thead><tbody>{rows}</tbody></table></details>"
    )


def _newest(total: int, limit: int) -> str:
    return f", newest {limit} of {total}" if total > limit else ""


def _label(cohort: Cohort) -> str:
    return svg.shorten(f"#{cohort.cohort} {site_list(cohort.sites, 1)}", 24)


def _alpha_points(cohort: Cohort) -> list[svg.Point]:
    """Alpha against steps since the graft began, until it left the grafting state for good."""
    origin = cohort.step_of(Lifecycle.GRAFTING)
    if origin is None:
        return []
    points = [(0.0, 0.0)]
    points += [(float(event.step - origin), event.alpha) for event in cohort.alphas.items if event.step >= origin]
    return points


def _life(frame: Frame, run: SeedRun, cohort: Cohort, y: float) -> str:
    look = look_of(cohort)
    end = cohort.ended_step if cohort.ended_step is not None else run.last_step
    height = _ROW - 8
    parts = [svg.rect(0, y, frame.width, _ROW, "hit")]
    parts.append(svg.text(frame.left - 12, y + 16, _label(cohort), anchor="end"))
    spans: list[tuple[Lifecycle, int, int]] = []
    state, since = Lifecycle.GERMINATED, cohort.started_step
    for event in cohort.transitions:
        if state in END_STATES:
            break
        spans.append((state, since, event.step))
        state, since = event.target, event.step
    if state not in END_STATES:
        spans.append((state, since, end))
    for state, start, stop in spans:
        x, x2 = frame.x.clamped(start), frame.x.clamped(stop)
        parts.append(svg.rect(x, y + 4, max(x2 - x, 1.0), height, f"state-{state.value} soft"))
        parts.append(_alpha_fill(frame, cohort, state, start, stop, y + 4, height))
    end_x = frame.x.clamped(end)
    if cohort.state is Lifecycle.FOSSILIZED:  # From here on it is part of the network.
        parts.append(svg.line(end_x, y + 4 + height / 2, frame.width - frame.right, y + 4 + height / 2, "kept stays"))
    parts.append(
        svg.mark(look.shape, end_x + (9 if end_x < frame.width - 18 else 0), y + 4 + height / 2, look.class_, size=4)
    )
    return svg.element("g", "".join(parts), data_tip=_life_text(cohort), class_="row")


def _alpha_fill(
    frame: Frame, cohort: Cohort, state: Lifecycle, start: int, stop: int, top: float, height: float
) -> str:
    """Filled up to alpha: rising while grafting, whole from then on, nothing before."""
    x, x2 = frame.x.clamped(start), max(frame.x.clamped(stop), frame.x.clamped(start) + 1)
    if state in (Lifecycle.GERMINATED, Lifecycle.TRAINING):
        return ""
    moved = [event for event in cohort.alphas.items if start <= event.step <= stop]
    if state is Lifecycle.GRAFTING:
        curve = [(x, 0.0), *((frame.x.clamped(event.step), event.alpha) for event in moved)]
        curve.append((x2, curve[-1][1]))
    else:
        alpha = next((event.alpha for event in cohort.transitions if event.target is state), 1.0)
        curve = [(x, alpha), (x2, alpha)]
    floor = top + height
    upper = [(px, floor - min(max(alpha, 0.0), 1.0) * height) for px, alpha in curve]
    return svg.band(upper, [(x, floor), (x2, floor)], f"state-{state.value}")


def _life_text(cohort: Cohort) -> str:
    steps = [f"step {cohort.started_step}: germinated"]
    steps += [f"step {event.step}: {STATE_NAMES[event.target]} ({event.reason})" for event in cohort.transitions]
    holds = [event for event in cohort.alphas.items if event.held_by is not None]
    if holds:
        steps.append(f"held {len(holds)} times, last: {holds[-1].held_by}")
    return f"#{cohort.cohort} {site_list(cohort.sites, 4)}\n" + "\n".join(steps)
