"""The curves of a policy's training as one HTML document: return, critic, what it does, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from esper.observe.report import plot, svg
from esper.observe.report.plot import Frame
from esper.observe.report.svg import Point, element, escape

Line = Mapping[str, Any]
"""A line of ``curves.jsonl``."""
_LOOKS = ("grown", "train", "twin", "grown dash", "twin dash")
_MOST_POINTS = 400


def training_page(lines: Sequence[Line], title: str = "training of a policy") -> str:
    """The whole page as text; it fetches nothing and runs no script."""
    problems = list(lines[-1].get("problems", ())) if lines else []
    said = "".join(element("p", escape(text), class_="note") for text in problems)
    charts = "".join(
        element("section", element("h2", escape(name)) + _chart(lines, name, curves), class_="card")
        for name, curves in _charts(lines).items()
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = resources.files(__package__ or "").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} \u00b7 Esper</title><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>{said}{charts}</main></body></html>\n"
    )


def _charts(lines: Sequence[Line]) -> dict[str, dict[str, Callable[[Line], Any]]]:
    """Curves by chart; operations and heads are those that any line names."""
    charts: dict[str, dict[str, Callable[[Line], Any]]] = {
        "mean return": {"return of the episodes that ended": lambda line: line.get("mean_return")},
        "explained variance of the returns": {"critic": lambda line: line.get("explained_variance")},
    }
    for title, key in (("what it does, where there is a choice", "operations"), ("entropy of its choices", "entropy")):
        names = dict.fromkeys(name for line in lines for name in line.get(key, {}))
        charts[title] = {name: _part(key, name) for name in names}
    return charts


def _part(key: str, name: str) -> Callable[[Line], Any]:
    return lambda line: line.get(key, {}).get(name)


def _chart(lines: Sequence[Line], name: str, curves: Mapping[str, Callable[[Line], Any]]) -> str:
    found: dict[str, list[Point]] = {}
    for curve, of in curves.items():
        points = [(float(line["update"]), float(value)) for line in lines if (value := of(line)) is not None]
        if any(math.isfinite(y) for _, y in points):
            found[curve] = points
    if not found:
        return plot.empty("Nothing was recorded of this.")
    everything = [point for points in found.values() for point in points]
    last = max(x for x, _ in everything)
    frame = Frame((0.0, last * 1.01 or 1.0), plot.robust_range([y for _, y in everything], low=1.0))
    looks = dict(zip(found, (_LOOKS[row % len(_LOOKS)] for row in range(len(found))), strict=True))
    drawn = "".join(
        svg.polyline(frame.at(plot.thin(points, _MOST_POINTS)), looks[curve]) for curve, points in found.items()
    )
    ends = ", ".join(f"{curve} {points[-1][1]:.3g}" for curve, points in found.items())
    key = plot.legend(("dash" if "dash" in look else "line", look.split()[0], curve) for curve, look in looks.items())
    return frame.figure(frame.axes("update", "") + frame.clipped(drawn), f"{name}; last: {ends}") + key
