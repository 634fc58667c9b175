"""Second screen: where the network grew, and whether that is where the need was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from esper.observe.history import SeedRun
from esper.observe.quantities import magnitude, percent
from esper.observe.report import plot, svg
from esper.observe.report.plot import Frame, Scale
from esper.protocol import Telemetry

MAPS = (("units", "units added"), ("need", "need (share of gradient energy)"))
_NUM_COLUMNS = 72
_NUM_LEVELS = 8


def growth_map(run: SeedRun, kind: str, max_rows: int) -> str:
    """Sites x time: darker means more units added, or a larger share of all gradient energy. Worst need first."""
    snapshots = run.telemetry.items
    if not snapshots:
        return plot.empty("No telemetry was recorded yet.")
    names = list(dict.fromkeys(name for snapshot in snapshots for name in snapshot.sites))
    need = site_need(snapshots, names)
    order = sorted(range(len(names)), key=lambda i: -1.0 if math.isnan(need[i]) else need[i], reverse=True)
    shown = [names[index] for index in order[:max_rows]]
    columns = _resample(snapshots, _NUM_COLUMNS)
    values = _matrix(columns, shown, names, kind)
    row = 22 if len(shown) <= 16 else 14
    frame = Frame(
        (0.0, max(float(snapshots[-1].step), 1.0)),
        (0.0, 1.0),
        height=len(shown) * row + 66,
        left=svg.label_width(svg.shorten(name, 25) for name in shown),
        right=104,
        top=24,
    )
    parts = [frame.axes("optimizer step", "", y_ticks=False), _cells(frame, columns, values, row)]
    for index, name in enumerate(shown):
        parts.append(_row_text(frame, run, name, need[order[index]], frame.top + index * row, row))
    parts.append(svg.text(frame.width, 14, "units \u00b7 need", "t name", "end"))
    figure = frame.figure("".join(parts), f"Growth map: {dict(MAPS)[kind]}")
    rest = len(names) - len(shown)
    more = f"{rest} further sites with less need are not drawn." if rest else ""
    return figure + (svg.element("p", more, class_="quiet") if more else "")


def need_against_spend(run: SeedRun, max_rows: int = 14) -> str:
    """Per site: its share of all gradient energy beside its share of all added units."""
    snapshots = run.telemetry.items
    if not snapshots:
        return plot.empty("No telemetry was recorded yet.")
    names = list(dict.fromkeys(name for snapshot in snapshots for name in snapshot.sites))
    need = site_need(snapshots, names)
    units = run.units_added() or dict(zip(snapshots[-1].sites, snapshots[-1].grown, strict=False))
    total = sum(units.values())
    rows = sorted(
        ((name, share, units.get(name, 0) / total if total else 0.0) for name, share in zip(names, need, strict=True)),
        key=lambda row: (-(row[1] if math.isfinite(row[1]) else 0.0), -row[2]),
    )[:max_rows]
    top = max((value for _, share, spend in rows for value in (share, spend) if math.isfinite(value)), default=1.0)
    width, row_height = 640.0, 30.0
    left = svg.label_width(svg.shorten(name, 25) for name, _, _ in rows)
    scale = Scale(0.0, top or 1.0, 0.0, width - left - 60)
    parts: list[str] = []
    for index, (name, share, spend) in enumerate(rows):
        y = 6 + index * row_height
        tip = f"{name}\nneed {percent(share)} of gradient energy\nspent {percent(spend)} of added units"
        parts.append(svg.rect(0, y - 2, width, row_height, "hit", data_tip=tip))
        parts.append(svg.text(left - 14, y + 15, svg.shorten(name, 25), anchor="end"))
        for offset, value, class_ in ((1, share, "need"), (12, spend, "spend")):
            length = scale(value) if math.isfinite(value) else 0.0
            parts.append(svg.rect(left, y + offset, max(length, 1.0), 9, f"{class_} nohit", rx=2))
            shown = percent(value) if math.isfinite(value) else "silent"
            parts.append(svg.text(left + length + 6, y + offset + 8, shown, "t tiny"))
    figure = svg.element(
        "svg", "".join(parts), viewBox=f"0 0 640 {svg.number(10 + len(rows) * row_height)}", class_="plot", role="img",
        aria_label="Need against spend per site",
    )  # fmt: skip
    note = svg.element("p", "Nothing was kept yet, so nothing was spent.", class_="quiet") if not total else ""
    return figure + note


def need_legend() -> str:
    return plot.legend([("box", "need", "need: gradient energy"), ("box", "spend", "spent: added units")])


def site_need(snapshots: Sequence[Telemetry], names: Sequence[str]) -> list[float]:
    """Mean share of gradient energy over the run, a value a name; NaN for a site whose sensor was always silent."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for snapshot in snapshots:
        for name, share in _shares(snapshot).items():
            if math.isfinite(share):
                sums[name] += share
                counts[name] += 1
    return [sums[name] / counts[name] if counts[name] else math.nan for name in names]


def _shares(snapshot: Telemetry) -> dict[str, float]:
    finite = [max(value, 0.0) for value in snapshot.gradient_energy if math.isfinite(value)]
    total = math.fsum(finite)
    return {
        name: max(value, 0.0) / total if total > 0 and math.isfinite(value) else math.nan
        for name, value in zip(snapshot.sites, snapshot.gradient_energy, strict=False)
    }


def _resample(snapshots: Sequence[Telemetry], limit: int) -> list[Telemetry]:
    """The last snapshot of each time bucket."""
    if len(snapshots) <= limit:
        return list(snapshots)
    return [snapshots[(index + 1) * len(snapshots) // limit - 1] for index in range(limit)]


def _matrix(
    columns: Sequence[Telemetry], shown: Sequence[str], names: Sequence[str], kind: str
) -> npt.NDArray[np.float64]:
    values = np.full((len(shown), len(columns)), np.nan)
    for col, snapshot in enumerate(columns):
        if kind == "need":
            cells = _shares(snapshot)
        else:
            cells = {name: float(units) for name, units in zip(snapshot.sites, snapshot.grown, strict=False)}
        for row, name in enumerate(shown):
            values[row, col] = cells.get(name, math.nan)
    return values


def _cells(frame: Frame, columns: Sequence[Telemetry], values: npt.NDArray[np.float64], row: int) -> str:
    """One path a shade, so that thousands of cells stay small; a silent sensor is left hatched."""
    finite = values[np.isfinite(values)]
    top = float(np.percentile(finite, 99)) if finite.size else 1.0
    top = top if top > 0 else 1.0
    edges = [0.0, *(float(snapshot.step) for snapshot in columns)]
    levels = np.where(np.isfinite(values), np.clip(np.ceil(values / top * _NUM_LEVELS), 0, _NUM_LEVELS), -1)
    paths: dict[int, list[str]] = {}
    for index in range(values.shape[0]):
        y = svg.number(frame.top + index * row + 1)
        start = 0
        for col in range(1, values.shape[1] + 1):
            if col < values.shape[1] and levels[index, col] == levels[index, start]:
                continue
            x, end = frame.x(edges[start]), frame.x(edges[col])
            path = (
                f"M{svg.number(x)} {y}h{svg.number(max(end - x, 0.8))}v{row - 2}h{svg.number(x - max(end, x + 0.8))}z"
            )
            paths.setdefault(int(levels[index, start]), []).append(path)
            start = col
    return "".join(
        svg.element("path", d="".join(cells), class_="silent" if level < 0 else f"heat h{level}")
        for level, cells in sorted(paths.items())
    )


def _row_text(frame: Frame, run: SeedRun, name: str, need: float, y: float, row: int) -> str:
    last = run.telemetry.last
    grown = dict(zip(last.sites, last.grown, strict=False)).get(name, 0) if last is not None else 0
    hidden = next((site.hidden_features for site in run.sites if site.name == name), None)
    units = f"{hidden}+{grown}" if hidden is not None else f"+{grown}"
    share = percent(need) if math.isfinite(need) else "silent"
    tip = f"{name}\n{units} units\nneed {share} of gradient energy (mean over the run)"
    site = next((site for site in run.sites if site.name == name), None)
    if site is not None:
        tip += f"\n{site.kind.value}, {magnitude(site.weights)} host weights"
    middle = y + row / 2 + 4
    return (
        svg.rect(0, y, frame.width, row, "hit", data_tip=tip)
        + svg.text(frame.left - 14, middle, svg.shorten(name, 25), "t nohit", "end")
        + svg.text(frame.width, middle, f"{units} \u00b7 {share}", "t tabular nohit", "end")
    )
