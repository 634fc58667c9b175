"""Scales, ticks, axes and the frame every chart is drawn in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from esper.observe.quantities import trim
from esper.observe.report import svg
from esper.observe.report.svg import Point


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.end - self.start) if span else self.start

    def clamped(self, value: float) -> float:
        """Like calling it, but never outside; an unknown value stands at the start."""
        if math.isnan(value):
            return self.start
        return self(min(max(value, self.low), self.high))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values (1, 2, 2.5 or 5 times a power of ten) inside the range."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    raw = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """As many digits as neighbouring ticks need to differ."""
    if value == 0:
        return "0"
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{_digits(value / scale, step / scale)}{prefix}"
    return _digits(value, step)


def _digits(value: float, step: float) -> str:
    if abs(step) < 1e-4:
        return f"{value:.1e}"
    digits = max(0, -math.floor(math.log10(abs(step)) + 1e-9))
    if abs(step) < 1 and round(step * 10**digits, 6) % 1:
        digits += 1
    text = f"{value:.{digits}f}"
    return trim(text) if abs(step) >= 0.1 else text


def robust_range(
    values: Iterable[float], *, low: float = 0.0, high: float = 100.0, include: Iterable[float] = (), pad: float = 0.06
) -> tuple[float, float]:
    """Range between two percentiles of the finite values, padded; outliers must not flatten everything else.

    Never empty: without values it is (0, 1), and a single value gets room around it.
    """
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    anchors = [value for value in include if math.isfinite(value)]
    if finite.size:
        bottom, top = (float(value) for value in np.percentile(finite, [low, high]))
    elif anchors:
        bottom, top = anchors[0], anchors[0]
    else:
        return 0.0, 1.0
    bottom, top = min(bottom, *anchors, top), max(top, *anchors, bottom)
    if top - bottom <= 1e-12 * max(abs(top), abs(bottom), 1e-30):
        room = abs(top) * 0.1 or 1.0
        return bottom - room, top + room
    room = (top - bottom) * pad
    return bottom - room, top + room


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about ``limit`` points: lowest and highest of each bucket, so no spike is lost; nothing is smoothed."""
    if len(points) <= limit or limit < 4:
        return list(points)
    kept: list[Point] = [points[0]]
    inner = points[1:-1]
    num_buckets = max(1, (limit - 2) // 2)
    for index in range(num_buckets):
        bucket = inner[index * len(inner) // num_buckets : (index + 1) * len(inner) // num_buckets]
        finite = [point for point in bucket if math.isfinite(point[1])]
        if finite:
            ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
            kept.extend(sorted(ends))
        elif bucket:
            kept.append(bucket[0])
    kept.append(points[-1])
    return kept


@dataclass(frozen=True, slots=True)
class Frame:
    """A chart's drawing area: outer size in pixels, margins and two scales."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 640
    height: float = 300
    left: float = 56
    right: float = 18
    top: float = 30
    bottom: float = 40

    @property
    def x(self) -> Scale:
        return Scale(*self.x_range, self.left, self.width - self.right)

    @property
    def y(self) -> Scale:
        return Scale(*self.y_range, self.height - self.bottom, self.top)

    def at(self, points: Iterable[Point]) -> list[Point]:
        x, y = self.x, self.y
        return [(x(px), y(py)) for px, py in points]

    def axes(
        self,
        x_label: str,
        y_label: str,
        *,
        x_format: Callable[[float, float], str] = tick_label,
        y_format: Callable[[float, float], str] = tick_label,
        y_ticks: bool = True,
        num_x: int = 6,
    ) -> str:
        """Faint horizontal grid, tick labels, axis names."""
        parts: list[str] = []
        floor = self.height - self.bottom
        if y_ticks:
            values = ticks(*self.y_range, 5)
            step = values[1] - values[0] if len(values) > 1 else 1.0
            for value in values:
                y = self.y(value)
                parts.append(svg.line(self.left, y, self.width - self.right, y, "grid"))
                parts.append(svg.text(self.left - 8, y + 4, y_format(value, step), anchor="end"))
        values = ticks(*self.x_range, num_x)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        for value in values:
            x = self.x(value)
            parts.append(svg.line(x, floor, x, floor + 4, "axis"))
            parts.append(svg.text(x, floor + 17, x_format(value, step), anchor="middle"))
        parts.append(svg.line(self.left, floor, self.width - self.right, floor, "axis"))
        parts.append(svg.text(self.width - self.right, self.height - 6, x_label, "t name", "end"))
        if y_label:
            parts.append(svg.text(self.left - 44, 14, y_label, "t name"))
        return "".join(parts)

    def clipped(self, content: str) -> str:
        """Marks that must not leave the plot area (nested SVG: clips without needing an id)."""
        width, height = self.width - self.left - self.right, self.height - self.top - self.bottom
        box = f"{svg.number(self.left)} {svg.number(self.top)} {svg.number(width)} {svg.number(height)}"
        return svg.element(
            "svg", content, x=float(self.left), y=float(self.top), width=float(width), height=float(height),
            viewBox=box, class_="clip",
        )  # fmt: skip

    def figure(self, content: str, label: str, hover: Sequence[tuple[float, str]] = ()) -> str:
        """The whole SVG. ``hover`` lists x pixels and what to say there; the script shows the nearest."""
        data = json.dumps([[round(x, 1), tip] for x, tip in hover], separators=(",", ":")) if hover else None
        crosshair = ""
        if hover:
            crosshair = svg.line(0, self.top, 0, self.height - self.bottom, "crosshair")
        return svg.element(
            "svg", content + crosshair, viewBox=f"0 0 {svg.number(self.width)} {svg.number(self.height)}",
            role="img", aria_label=label, class_="plot", data_hover=data,
        )  # fmt: skip


def empty(message: str) -> str:
    """What stands where a chart will be: says what is missing."""
    return svg.element("p", svg.escape(message), class_="empty")


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Entries of (symbol, class, name); the symbol is ``line``, ``dash``, ``box`` or a mark's shape."""
    items: list[str] = []
    for symbol, class_, name in entries:
        if symbol in ("line", "dash"):
            inner = svg.line(0, 7, 20, 7, f"{class_}{' dash' if symbol == 'dash' else ''}")
        elif symbol == "box":
            inner = svg.rect(3, 1, 14, 12, class_)
        else:
            inner = svg.mark(symbol, 10, 7, class_, size=4.5)
        icon = svg.element("svg", inner, viewBox="0 0 20 14", width=20, height=14, aria_hidden="true")
        items.append(svg.element("span", icon + svg.escape(name), class_="key"))
    return svg.element("div", "".join(items), class_="legend")
