"""Third screen: what Esper itself costs, in milliseconds a step by part."""

from __future__ import annotations

import math

from esper.observe.history import SeedRun
from esper.observe.quantities import decimal
from esper.observe.report import plot, svg
from esper.observe.report.plot import Frame
from esper.protocol import Overhead

_MAX_PARTS = 6
_NUM_COLORS = 6


def overhead_chart(run: SeedRun) -> str:
    """Stacked areas over the run, the costliest part at the bottom."""
    events = [event for event in run.overheads.items if event.num_steps > 0]
    if not events:
        return plot.empty("No overhead was measured yet.")
    parts = _parts(events)
    stacks = [[_per_step(event, names) for _, names in parts] for event in events]
    totals = [sum(stack) for stack in stacks]
    frame = Frame(
        (0.0, max(float(events[-1].step), 1.0)),
        plot.robust_range(totals, high=98.0, include=[0.0], pad=0.0),
        height=240,
    )
    # A measurement covers the steps before it, so each one is a block and not a corner of a line.
    starts = [max(event.step - event.num_steps, 0) for event in events]
    edges = [(frame.x.clamped(start), frame.x(event.step)) for start, event in zip(starts, events, strict=True)]
    xs = [x for _, x in edges]
    lower = [0.0] * len(events)
    areas: list[str] = []
    for index in range(len(parts)):
        upper = [base + stack[index] for base, stack in zip(lower, stacks, strict=True)]
        areas.append(
            svg.band(
                [(x, frame.y(y)) for pair, y in zip(edges, upper, strict=True) for x in pair],
                [(x, frame.y(y)) for pair, y in zip(edges, lower, strict=True) for x in pair],
                f"part-{index % _NUM_COLORS}",
            )
        )
        lower = upper
    hover = [
        (x, "\n".join([f"step {event.step}: {decimal(total, 2)} ms a step", *_lines(parts, stack)]))
        for x, event, stack, total in zip(xs, events, stacks, totals, strict=True)
    ]
    return frame.figure(
        frame.axes("optimizer step", "ms a step") + frame.clipped("".join(areas)),
        "Overhead in milliseconds a step",
        hover,
    )


def overhead_legend(run: SeedRun) -> str:
    events = [event for event in run.overheads.items if event.num_steps > 0]
    return plot.legend([("box", f"part-{i % _NUM_COLORS}", name) for i, (name, _) in enumerate(_parts(events))])


def _lines(parts: list[tuple[str, tuple[str, ...]]], stack: list[float]) -> list[str]:
    return [f"{name} {decimal(value, 2)}" for (name, _), value in zip(parts, stack, strict=True)]


def _parts(events: list[Overhead]) -> list[tuple[str, tuple[str, ...]]]:
    """Parts by total cost; beyond the sixth they are summed as *other*."""
    totals: dict[str, float] = {}
    for event in events:
        for name, value in event.milliseconds.items():
            totals[name] = totals.get(name, 0.0) + (value if math.isfinite(value) else 0.0)
    names = sorted(totals, key=lambda name: -totals[name])
    if len(names) <= _MAX_PARTS:
        return [(name, (name,)) for name in names]
    head = [(name, (name,)) for name in names[: _MAX_PARTS - 1]]
    return [*head, ("other", tuple(names[_MAX_PARTS - 1 :]))]


def _per_step(event: Overhead, names: tuple[str, ...]) -> float:
    values = [event.milliseconds.get(name, 0.0) for name in names]
    return sum(value for value in values if math.isfinite(value)) / event.num_steps
