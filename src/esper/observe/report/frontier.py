"""First screen: loss against what it cost, this run's path and the control arms with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esper.observe.history import RunHistory, SeedRun
from esper.observe.quantities import decimal, magnitude
from esper.observe.report import plot, svg
from esper.observe.report.plot import Frame
from esper.observe.scores import Interval, arm_label, mean_interval

AXES = (("params", "parameters"), ("spent", "FLOPs spent"))


@dataclass(frozen=True, slots=True)
class _Arm:
    """Where one arm ended: cost and loss over its seeds."""

    arm: str
    cost: Interval
    loss: Interval


def frontier_chart(history: RunHistory, axis: str, limit: int) -> str:
    """Down and left is better."""
    arms = _arms(history, axis)
    paths = [path for run in _main_runs(history) if len(path := _path(run, axis)) > 1]
    if not arms and not paths:
        return plot.empty("Nothing to place yet: no held-out loss and no finished arm.")
    ys = [arm.loss.mean for arm in arms]
    bounds = [value for arm in arms for value in (arm.loss.low, arm.loss.high)]
    path_ys = [y for path in paths for _, y in path]
    late = plot.robust_range(path_ys, high=60.0, pad=0.0)
    xs = [arm.cost.mean for arm in arms] + [x for path in paths for x, _ in path]
    frame = Frame(
        plot.robust_range(xs, pad=0.1, include=[0.0] if axis == "spent" else []),
        plot.robust_range([*ys, *bounds, *(late if paths else ())], pad=0.1),
        right=24,
    )
    lines = [svg.polyline(frame.at(plot.thin(path, limit)), "path") for path in paths]
    y_name = "loss" if not arms else "held-out loss" if _all_held_out(history) else "test loss (path: held-out)"
    axes = frame.axes(dict(AXES)[axis], y_name, x_format=lambda value, _: magnitude(value) if value else "0", num_x=5)
    marks = "".join(_arm_mark(frame, arm, main=arm.arm == history.main_arm) for arm in arms)
    labels = _labels(frame, arms)
    note = "" if arms else svg.text(frame.left + 6, frame.top + 10, "no arm has finished yet", "t note")
    return frame.figure(axes + frame.clipped("".join(lines)) + marks + labels + note, "Loss against cost")


def frontier_legend(history: RunHistory) -> str:
    entries = [("line", "path", "path of the growing run, a line a seed")]
    if any(run.finished for run in history.seed_runs):
        entries.append(("disc", "arm-main", "arm at its end, mean and 95% interval over seeds"))
    return plot.legend(entries)


def _main_runs(history: RunHistory) -> list[SeedRun]:
    main = history.main_arm
    return list(history.arms[main].values()) if main is not None else []


def _path(run: SeedRun, axis: str) -> list[svg.Point]:
    return [
        (float(event.params if axis == "params" else event.flops), event.loss)
        for event in run.held_out.items
        if math.isfinite(event.loss)
    ]


def _all_held_out(history: RunHistory) -> bool:
    """Arms are compared on held-out loss only if every finished one measured it."""
    return all(run.last_held_out is not None for run in history.seed_runs if run.finished is not None)


def _arms(history: RunHistory, axis: str) -> list[_Arm]:
    held_out = _all_held_out(history)
    out: list[_Arm] = []
    for arm, seeds in history.arms.items():
        ends = [(run.finished, run.last_held_out) for run in seeds.values() if run.finished is not None]
        if not ends:
            continue
        cost = mean_interval([float(end.params if axis == "params" else end.flops) for end, _ in ends])
        losses = [last.loss if held_out and last is not None else end.loss for end, last in ends]
        loss = mean_interval(losses)
        if loss.num and cost.num:
            out.append(_Arm(arm, cost, loss))
    return out


def _arm_mark(frame: Frame, arm: _Arm, *, main: bool) -> str:
    x, y = frame.x.clamped(arm.cost.mean), frame.y.clamped(arm.loss.mean)
    class_ = "arm-main" if main else f"arm-{arm.arm}" if arm.arm in _STYLED else "arm-other"
    parts: list[str] = []
    if arm.loss.has_bounds:
        low, high = frame.y.clamped(arm.loss.low), frame.y.clamped(arm.loss.high)
        parts.append(svg.line(x, low, x, high, f"{class_} interval"))
    if arm.cost.has_bounds:
        low, high = frame.x.clamped(arm.cost.low), frame.x.clamped(arm.cost.high)
        parts.append(svg.line(low, y, high, y, f"{class_} interval"))
    parts.append(svg.mark(_STYLED.get(arm.arm, "square"), x, y, class_, size=5.5 if main else 4.5))
    half = f" +/- {decimal(arm.loss.half_width, 4)}" if arm.loss.has_bounds else ""
    seeds = f"{arm.loss.num} seed{'s' if arm.loss.num != 1 else ''}"
    tip = f"{arm_label(arm.arm)} ({seeds})\nloss {decimal(arm.loss.mean, 4)}{half}\nat {magnitude(arm.cost.mean)}"
    return svg.element("g", "".join(parts), data_tip=tip)


_STYLED = {
    "grown": "disc",
    "static_small": "square",
    "static_final": "triangle",
    "static_equal_flops": "diamond",
    "random_growth": "square",
}


def _labels(frame: Frame, arms: list[_Arm]) -> str:
    """Names beside the marks, pushed apart where they would overlap."""
    places: list[tuple[float, float, _Arm]] = []
    for arm in sorted(arms, key=lambda arm: arm.loss.mean, reverse=True):
        places.append((frame.x.clamped(arm.cost.mean), frame.y.clamped(arm.loss.mean), arm))
    # Labels keep clear of each other and of every mark.
    taken = [(x - 7, x + 7, y) for x, y, _ in places]
    parts: list[str] = []
    for x, y, arm in places:
        name = svg.shorten(arm_label(arm.arm), 26)
        left = x > frame.width * 0.62
        start, end = (x - 10 - 7 * len(name), x - 10) if left else (x + 10, x + 10 + 7 * len(name))
        offsets = [4.0, -10.0, 18.0, -24.0, 32.0, -38.0, 46.0, 60.0]
        label_y = y + next(
            (
                offset for offset in offsets
                if frame.top < y + offset < frame.height - frame.bottom
                and all(end < a or start > b or abs(y + offset - 4 - other) >= 13 for a, b, other in taken)
            ),
            offsets[0],
        )  # fmt: skip
        taken.append((start, end, label_y - 4))
        parts.append(
            svg.text(
                x + (-10 if left else 10), label_y, name, "t strong halo",
                "end" if left else None,
            )
        )  # fmt: skip
    return "".join(parts)
