"""SVG text, built safely: every attribute and every text goes through :func:`escape`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Point = tuple[float, float]


def escape(text: object) -> str:
    """Text for HTML or SVG, inside or outside an attribute; characters no document may hold become U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)), quote=True)


def shorten(text: str, limit: int) -> str:
    """Cut the middle out: both ends of a module path say something."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - tail]}\u2026{text[-tail:]}"


def label_width(labels: Iterable[str], *, at_most: float = 170.0) -> float:
    """Room for the longest label at the charts' text size, in pixels (an estimate: no font is at hand)."""
    return min(at_most, 24.0 + 6.6 * max((len(label) for label in labels), default=0))


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """``element("g", inner, class_="x", data_tip="y")``; ``content`` must be markup already."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = number(value) if isinstance(value, float) else escape(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    head = " ".join(parts)
    return f"<{head}>{content}</{name}>" if content or name not in _EMPTY else f"<{head}/>"


_EMPTY = frozenset({"path", "line", "rect", "circle"})


def text(x: float, y: float, value: object, class_: str = "t", anchor: str | None = None, **attributes: object) -> str:
    return element("text", escape(value), x=float(x), y=float(y), class_=class_, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str, **attributes: object) -> str:
    return element(
        "path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=f"ln {class_}", **attributes
    )


def rect(x: float, y: float, width: float, height: float, class_: str, **attributes: object) -> str:
    return element(
        "rect", x=float(x), y=float(y), width=max(0.0, float(width)), height=max(0.0, float(height)), class_=class_,
        **attributes,
    )  # fmt: skip


def polyline(points: Iterable[Point], class_: str, *, steps: bool = False) -> str:
    """A line through the finite points; a non-finite one makes a gap. ``steps`` holds each value until the next."""
    out: list[str] = []
    pen_down, last_y = False, 0.0
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        if pen_down and steps:
            out.append(f"L{number(x)} {number(last_y)}")
        out.append(f"{'L' if pen_down else 'M'}{number(x)} {number(y)}")
        pen_down, last_y = True, y
    return element("path", d="".join(out), class_=f"ln {class_}") if out else ""


def band(upper: Sequence[Point], lower: Sequence[Point], class_: str, **attributes: object) -> str:
    """The filled area between two lines."""
    outline = [*upper, *reversed(lower)]
    if not outline or not all(math.isfinite(x) and math.isfinite(y) for x, y in outline):
        return ""
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in outline) + "Z"
    return element("path", d=path, class_=f"area {class_}", **attributes)


def mark(shape: str, x: float, y: float, class_: str, *, size: float = 5.0, tip: str | None = None) -> str:
    """A symbol whose shape, not only its colour, says what it is; none where the place is unknown."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return ""
    s = size
    paths = {
        "disc": f"M{number(x - s)} {number(y)}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0",
        "ring": f"M{number(x - s)} {number(y)}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0",
        "cross": f"M{number(x - s)} {number(y - s)}l{2 * s} {2 * s}m0 {-2 * s}l{-2 * s} {2 * s}",
        "diamond": f"M{number(x)} {number(y - s - 1)}l{s + 1} {s + 1}l{-s - 1} {s + 1}l{-s - 1} {-s - 1}Z",
        "square": f"M{number(x - s + 1)} {number(y - s + 1)}h{2 * s - 2}v{2 * s - 2}h{-2 * s + 2}Z",
        "triangle": f"M{number(x)} {number(y - s - 1)}l{s + 1} {2 * s}h{-2 * s - 2}Z",
    }
    style = "stroke-mark" if shape in ("cross", "ring") else "fill-mark"
    return element("path", d=paths[shape], class_=f"{style} {class_}", data_tip=tip)
