"""The measurements behind docs/speed.md, and its charts: how costs grow with sizes."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.observe.report import plot, svg

OPERATIONS = ("telemetry", "graft", "slot_adam", "fit")
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Rows of the files that are there, by name."""

    files: dict[str, Row]

    @classmethod
    def read(cls, folder: Path) -> Results:
        names = ("layer", "step_gpu", "step_cpu", "growth_gpu", "growth_cpu", *(f"ops_{name}" for name in OPERATIONS))
        paths = [folder / f"{name}.json" for name in names]
        return cls({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()})

    def rows(self, name: str, **wanted: Any) -> list[Row]:
        """Those whose fields have the values in ``wanted``."""
        found = self.files.get(name, {"rows": []})["rows"]
        return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]

    def row(self, name: str, **wanted: Any) -> Row | None:
        return next(iter(self.rows(name, **wanted)), None)


@dataclass(frozen=True)
class Chart:
    """Cost against a size, on logarithmic axes: points of several lines."""

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]

    @property
    def is_drawn(self) -> bool:
        return any(len(points) > 1 for points in self.lines.values())


def charts(results: Results) -> list[Chart]:
    """One a size that costs grow with."""

    def of(file: str, x: str, y: str, **wanted: Any) -> list[tuple[float, float]]:
        rows = [row for row in results.rows(file, **wanted) if row.get(x) and row.get(y, 0) > 0]
        return sorted({row[x]: (float(row[x]), float(row[y])) for row in reversed(rows)}.values())

    wide = {"features": 4096}
    few = {"rows": 8192, "columns": 4, "hidden": 8}
    sites = [f"step_{kind}" for kind in ("gpu", "cpu") if f"step_{kind}" in results.files]
    return [
        Chart("speed-rows", "Telemetry against rows (4,096 features, 1,024 chunks)", "rows", "microseconds", {
            "all rows": of("ops_telemetry", "rows", "gpu_us", what="all rows", chunks=1024, **wide),
            "sampled rows": of("ops_telemetry", "rows", "gpu_us", what="sampled rows", chunks=1024, **wide),
            "floor of all rows": of("ops_telemetry", "rows", "floor_us", what="all rows", chunks=1024, **wide),
        }),
        Chart("speed-chunks", "Telemetry against chunks (8,192 x 4,096)", "chunks", "microseconds", {
            "all rows": of("ops_telemetry", "chunks", "gpu_us", what="all rows", rows=8192, **wide),
            "sampled rows": of("ops_telemetry", "chunks", "gpu_us", what="sampled rows", rows=8192, **wide),
        }),
        Chart("speed-seeds", "Graft against seeds (8,192 x 4,096, 4 features, 8 hidden)", "seeds", "microseconds", {
            "forward": of("ops_graft", "seeds", "gpu_us", what="forward", **few),
            "forward + backward": of("ops_graft", "seeds", "gpu_us", what="forward + backward", **few),
            "PyTorch, forward": of("ops_graft", "seeds", "eager_gpu_us", what="forward", **few),
        }),
        Chart("speed-width", "Graft against a seed's columns and hidden units (8,192 x 4,096, all covered)", "columns",
              "microseconds", {
            "taken": of("ops_graft", "columns", "gpu_us", what="width"),
            "dense products": of("ops_graft", "columns", "dense_gpu_us", what="width"),
            "floor": of("ops_graft", "columns", "floor_us", what="width"),
        }),
        Chart("speed-sites", "A dormant step against sites (chain of layers of 64)", "sites", "microseconds added", {
            f"{phase.replace('_', ' ')}, {file[5:]}": of(
                file, "sites", "added_us" if file == "step_gpu" else "added_cpu_us", host="chain", phase=phase
            )
            for file in sites
            for phase in ("every_step", "default")
        }),
    ]  # fmt: skip


STYLE = """
    text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
    .page { fill: #fbfbfa; } .grid { stroke: #e4e7eb; } .axis { stroke: #8c959f; }
    .l0, .l1, .l2, .l3 { fill: none; stroke-width: 2; } .l0 { stroke: #1a7f37; } .l1 { stroke: #0969da; }
    .l2 { stroke: #8c959f; stroke-dasharray: 5 4; } .l3 { stroke: #9a6700; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .page { fill: #15191f; } .grid { stroke: #2a323c; } .axis { stroke: #8b949e; }
      .l0 { stroke: #3fb950; } .l1 { stroke: #58a6ff; } .l2 { stroke: #8b949e; } .l3 { stroke: #d29922; }
    }
  """
_KEY = 190


def picture(chart: Chart) -> str:
    """The chart as a picture that stands alone."""
    points = [point for line in chart.lines.values() for point in line]
    xs, ys = ([math.log2(point[axis]) for point in points] for axis in (0, 1))
    frame = plot.Frame(plot.robust_range(xs), plot.robust_range(ys), width=490, left=64)
    marks: list[str] = []
    for number, (name, line) in enumerate(chart.lines.items()):
        at = [(frame.x(math.log2(x)), frame.y(math.log2(y))) for x, y in line]
        marks.append(svg.polyline(at, f"l{number}"))
        marks += [svg.element("circle", cx=x, cy=y, r=3, class_=f"l{number}") for x, y in at]
        height = 44.0 + 22 * number
        marks.append(svg.line(frame.width + 8, height - 4, frame.width + 28, height - 4, f"l{number}"))
        marks.append(svg.text(frame.width + 34, height, name))
    width = frame.width + _KEY
    return "".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {frame.height}" width="{width}" ',
        f'height="{frame.height}" role="img" aria-labelledby="t">\n',
        f'  <title id="t">{html.escape(chart.title)}</title>\n',
        f"  <style>{STYLE}</style>\n  ", svg.rect(0, 0, width, frame.height, "page"),
        frame.axes(chart.x, chart.y, x_format=_power, y_format=_power), *marks, "</svg>\n",
    ])  # fmt: skip


def _power(value: float, _: float) -> str:
    size = 2.0**value
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"
