"""First screen: loss, and size with its budget."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from esper.observe.history import RunHistory, SeedRun
from esper.observe.quantities import decimal, magnitude, percent
from esper.observe.report import plot, svg
from esper.observe.report.outcome import LOOKS, describe, look_of
from esper.observe.report.plot import Frame
from esper.observe.report.svg import Point
from esper.protocol import HeldOut, TrainLoss

TWIN_ARM = "static_small"
AXES = (("step", "optimizer step"), ("flops", "FLOPs spent"))


def loss_chart(history: RunHistory, run: SeedRun, axis: str, limit: int) -> str:
    """Held-out loss unsmoothed, training loss faint, the run without growth, and every decision."""
    held_out = run.held_out.items
    if not held_out:
        return plot.empty(
            "No held-out loss was measured yet."
            if run.train.items
            else "No loss was recorded yet: the first one comes with the first decision point."
        )
    place = _placer(axis)
    main = _curve(held_out, place)
    train = _curve(run.train.items, place)
    twin_run = history.arms.get(TWIN_ARM, {}).get(run.seed) if run.arm != TWIN_ARM else None
    twin = _curve(twin_run.held_out.items, place) if twin_run else []
    if not main:
        return plot.empty("This run recorded no FLOPs, so there is nothing to place the loss on.")
    last_x = max(point[0] for point in (*main, *train))
    frame = Frame((0.0, last_x * 1.01 or 1.0), _loss_range(main, twin, train))
    body = [
        svg.polyline(frame.at(plot.thin(train, limit)), "train"),
        svg.polyline(frame.at(plot.thin(twin, limit)), "twin dash"),
        svg.polyline(frame.at(plot.thin(main, limit)), "grown"),
    ]
    marks = _decision_marks(frame, run, axis)
    hidden = sum(y > frame.y_range[1] for _, y in main)
    note = (
        svg.text(frame.width - frame.right, frame.top + 10, f"{hidden} points lie above this range", "t note", "end")
        if hidden
        else ""
    )
    return frame.figure(
        frame.axes(dict(AXES)[axis], "loss") + frame.clipped("".join(body)) + marks + note,
        f"Held-out loss, last {decimal(main[-1][1])}",
        _hover(frame, axis, [("held-out", main), ("training", train), ("without growth", twin)], limit),
    )


def _loss_range(main: list[Point], twin: list[Point], train: list[Point]) -> tuple[float, float]:
    """Room for where the run is, not for where it began: the first drop is an order of magnitude taller."""
    held_out = [y for _, y in (*main, *twin) if math.isfinite(y)]
    late = sorted(y for _, y in train[len(train) // 2 :] if math.isfinite(y))
    low, high = plot.robust_range(
        held_out, high=80.0 if len(main) >= 10 else 100.0, include=[main[-1][1], *late[len(late) // 20 :][:1]], pad=0.06
    )
    return low, high + 0.25 * (high - low) if len(main) >= 10 else high


def loss_legend(history: RunHistory, run: SeedRun) -> str:
    entries = [("line", "grown", "held-out (not smoothed)"), ("line", "train", "training")]
    if history.arms.get(TWIN_ARM, {}).get(run.seed) and run.arm != TWIN_ARM:
        entries.append(("dash", "twin", "same model, no growth"))
    present = {look_of(cohort).word for cohort in run.cohorts.values() if cohort.ended_step is not None}
    entries += [(look.shape, look.class_, look.word) for look in LOOKS if look.word in present]
    return plot.legend(entries)


def size_chart(history: RunHistory, run: SeedRun, axis: str, limit: int) -> str:
    """Parameters over the run, from the host's size to the ceiling, and why growth stopped."""
    points = run.held_out.items
    if not points:
        return plot.empty("No size was recorded yet: it comes with the first held-out measurement.")
    place = _placer(axis)
    size = [(place(event), float(event.params)) for event in points if math.isfinite(place(event))]
    if not size:
        return plot.empty("This run recorded no FLOPs, so there is nothing to place the size on.")
    anchors = [float(value) for value in (run.host_params, history.budget_params) if value]
    peak = max(y for _, y in size)
    if history.budget_params and history.budget_params > 4 * peak:
        anchors = anchors[:1]  # A ceiling far away would flatten the curve; it is named in the text instead.
    frame = Frame((0.0, size[-1][0] * 1.01 or 1.0), plot.robust_range([y for _, y in size], include=anchors, pad=0.14))
    thinned = plot.thin(size, limit)
    parts = [svg.polyline(frame.at(thinned), "grown", steps=True)]
    outer = [_level(frame, run.host_params, "host alone", "host")]
    outer.append(_level(frame, history.budget_params, "budget", "budget"))
    if run.stopped is not None:
        x = _where(run, run.stopped.step, axis)
        px = frame.x.clamped(x)
        outer.append(svg.line(px, frame.top, px, frame.height - frame.bottom, "stop dash"))
        right = px > frame.width * 0.55
        outer.append(
            svg.text(
                px + (-6 if right else 6), frame.top - 4, "growth stopped", "t strong", "end" if right else None,
                data_tip=f"step {run.stopped.step}\n{run.stopped.reason}",
            )
        )  # fmt: skip
    start = float(run.host_params or size[0][1])
    hover = [
        (frame.x(x), f"{_axis_text(axis, x)}\n{magnitude(y)} parameters ({percent(y / start - 1, sign=True)})")
        for x, y in thinned
    ]
    axes = frame.axes(dict(AXES)[axis], "parameters", y_format=lambda value, _: magnitude(value))
    return frame.figure(axes + frame.clipped("".join(parts)) + "".join(outer), "Parameters over the run", hover)


def _level(frame: Frame, value: float | None, name: str, class_: str) -> str:
    if not value or not frame.y_range[0] <= value <= frame.y_range[1]:
        return ""
    y = frame.y(value)
    label = svg.text(frame.left + 6, y - 6, f"{name} {magnitude(value)}", "t note")
    return svg.line(frame.left, y, frame.width - frame.right, y, f"{class_} dash") + label


def _decision_marks(frame: Frame, run: SeedRun, axis: str) -> str:
    parts: list[str] = []
    for cohort in run.cohorts.values():
        if cohort.ended_step is None:
            continue
        look = look_of(cohort)
        px = frame.x.clamped(_where(run, cohort.ended_step, axis))
        py = frame.y.clamped(_loss_at(run.held_out.items, cohort.ended_step))
        parts.append(svg.line(px, py, px, frame.height - frame.bottom, f"drop {look.class_}"))
        parts.append(svg.mark(look.shape, px, py, look.class_, tip=f"step {cohort.ended_step}\n{describe(cohort)}"))
    return "".join(parts)


def _placer(axis: str) -> Callable[[HeldOut | TrainLoss], float]:
    if axis == "flops":
        return lambda event: float(event.flops)
    return lambda event: float(event.step)


def _curve(events: Sequence[HeldOut | TrainLoss], place: Callable[[HeldOut | TrainLoss], float]) -> list[Point]:
    return [(place(event), event.loss) for event in events if math.isfinite(place(event))]


def _where(run: SeedRun, step: int, axis: str) -> float:
    """A step on the chosen axis: FLOPs are interpolated between the losses that carry them."""
    if axis == "step":
        return float(step)
    events = [event for event in run.train.items or run.held_out.items if math.isfinite(event.flops)]
    if not events:
        return 0.0
    index = bisect.bisect_left([event.step for event in events], step)
    if index == 0:
        return events[0].flops
    if index == len(events):
        return events[-1].flops
    before, after = events[index - 1], events[index]
    share = (step - before.step) / max(after.step - before.step, 1)
    return before.flops + share * (after.flops - before.flops)


def _loss_at(events: Sequence[HeldOut], step: int) -> float:
    """Held-out loss on the drawn line at a step."""
    index = bisect.bisect_left([event.step for event in events], step)
    before, after = events[max(index - 1, 0)], events[min(index, len(events) - 1)]
    share = min(max((step - before.step) / max(after.step - before.step, 1), 0.0), 1.0)
    loss = before.loss + share * (after.loss - before.loss)
    return loss if math.isfinite(loss) else 0.0


def _axis_text(axis: str, x: float) -> str:
    return f"step {x:.0f}" if axis == "step" else f"{magnitude(x)}FLOPs"


def _hover(frame: Frame, axis: str, curves: Sequence[tuple[str, list[Point]]], limit: int) -> list[tuple[float, str]]:
    """What each curve says at the first one's points."""
    out: list[tuple[float, str]] = []
    positions = [[x for x, _ in points] for _, points in curves]
    for x, _ in plot.thin(curves[0][1], limit):
        lines = [_axis_text(axis, x)]
        for (name, points), xs in zip(curves, positions, strict=True):
            index = bisect.bisect_right(xs, x) - 1
            if points and index >= 0 and x <= xs[-1] * 1.001:
                lines.append(f"{name} {decimal(points[index][1], 4)}")
        out.append((frame.x(x), "\n".join(lines)))
    return out
