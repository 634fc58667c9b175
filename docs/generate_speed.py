"""Write docs/speed.md and its pictures from the measurements in benchmarks/results.

Run from the repository root after ``esper bench --out benchmarks/results``::

    python docs/generate_speed.py

What has no measurement yet says so.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.observe.report import plot, svg

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGE = ROOT / "docs" / "speed.md"
NOT_YET = "not measured yet"
OPERATIONS = ("telemetry", "graft", "slot_adam", "fit")
Row = dict[str, Any]

HEAD = """# Speed

What Esper costs, against the bare host in the same run and against what the hardware allows. This page is written by
`docs/generate_speed.py` from the files in [benchmarks/results](../benchmarks/results); a bar that is missed is on it as
well as one that is met. `esper bench` measures everything again on your machine:

```
esper bench                           operations, whole steps, growth; about 12 minutes on one H100
esper bench ops                       every kernel against float64, then against the read floor and PyTorch
esper bench step                      whole training steps with and without Esper, memory, utilisation
esper bench growth                    the plan's five metrics on a small run that grows
esper bench --rehearse                tiny sizes: does it all run here?
```

With `--out DIR` each line is on file as soon as it is measured, so that a run that is cut short keeps what it has.
Nothing is timed that computes wrongly: every operation is compared with float64 first. Times of operations are medians
of GPU time between events, caches cold and clean (*dirty* caches hold what somebody has just written, and the call pays
for writing that back); steps are medians over pairs of blocks that alternate between the bare host and the same host
under Esper. The *floor* is the time that the bytes take at the measured rate of a copy; the launch itself, some three
microseconds between two events, is part of every time but not of the floor.
"""


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
class Bar:
    """One promise: where its measurement is, how it is shown, and what it must not exceed (or fall below)."""

    what: str
    file: str
    where: Row
    bar: str
    shown: Callable[[Row], str]
    met: Callable[[Row], bool]


def _us(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1f} us"


def _percent(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:+.1%}"


def _cpu_share(row: Row) -> str:
    return f"{row['added_share']:+.1%} by the wall, {row['added_cpu_share']:+.1%} by CPU time"


def _graft(seeds: int, what: str) -> Row:
    return {"what": what, "rows": 8192, "seeds": seeds, "columns": 4}


def _bars() -> list[Bar]:
    large = {"rows": 8192, "features": 4096, "chunks": 1024}
    gpt2 = {"host": "gpt2"}
    bars = [
        Bar("telemetry, 8192 x 4096 bf16, 1024 chunks, all rows", "ops_telemetry", {"what": "all rows", **large},
            "1.6x the read floor", lambda r: f"{r['over_floor']:.2f}x ({r['gpu_us']:.1f} us)",
            lambda r: r["over_floor"] <= 1.6),
        Bar("telemetry, sampled rows", "ops_telemetry", {"what": "sampled rows", **large}, "8 us", _us("gpu_us"),
            lambda r: r["gpu_us"] <= 8),
        Bar("graft forward, 64 seeds of 4, hidden 8, N = 8192", "ops_graft", _graft(64, "forward"), "15 us",
            lambda r: f"{r['gpu_us']:.1f} us" + (f" ({r['touch_us']:.1f} of them only touch the columns)"
                                                 if "touch_us" in r else ""), lambda r: r["gpu_us"] <= 15),
        Bar("graft forward, 1024 of 1024 seeds", "ops_graft", _graft(1024, "forward"), "100 us", _us("gpu_us"),
            lambda r: r["gpu_us"] <= 100),
        Bar("a layer with telemetry and 64 active seeds, added", "layer", {"seeds": 64, "rows": 8192}, "100 us",
            lambda r: f"{r['added_gpu_us']:.1f} us of the GPU, {r['added_wall_us']:.1f} us by the wall",
            lambda r: max(r["added_gpu_us"], r["added_wall_us"]) < 100),
        Bar("the same against the plan's loop over chunks", "layer", {"seeds": 64, "rows": 8192}, "10x the throughput",
            lambda r: f"{r['over_loop']:.0f}x, {r['added_over_loop']:.0f}x of what is added",
            lambda r: r["over_loop"] >= 10),
    ]  # fmt: skip
    bars += [
        Bar(f"graft forward and backward against vectorised PyTorch, {seeds} seeds", "ops_graft",
            _graft(seeds, "forward + backward"), "5x", lambda r: f"{r['over_eager']:.1f}x",
            lambda r: r["over_eager"] >= 5)
        for seeds in (64, 1024)
    ]  # fmt: skip
    for phase, title, bar in (
        ("every_step", "whole step, GPT-2-124M shape, compiled, dormant, telemetry every step", 0.015),
        ("default", "the same at the default interval", 0.005),
        ("grafted_and_training", "the same, 256 seeds grafted and 256 training over 12 layers", 0.08),
    ):
        bars.append(
            Bar(title, "step_gpu", {**gpt2, "phase": phase}, f"{bar:+.1%}", _percent("added_share"),
                lambda r, bar=bar: r["added_share"] <= bar)
        )  # fmt: skip
    for moment, title, bar in (
        ("dormant", "peak memory, dormant", 0.01), ("default_pool", "peak memory, default pool of seeds", 0.05),
        ("lifecycle", "peak memory, worst moment of a whole lifecycle", 0.10),
    ):  # fmt: skip
        bars.append(
            Bar(title, "step_gpu", {**gpt2, "phase": f"memory_{moment}"}, f"{bar:+.0%}",
                _percent("added_memory_share"), lambda r, bar=bar: r["added_memory_share"] <= bar)
        )  # fmt: skip
    bars.append(
        Bar("GPU utilisation of the 256 + 256 run", "step_gpu", {**gpt2, "phase": "utilisation"}, "over 80%",
            lambda r: f"{r['esper_percent']:.0f}% ({r['counter'] if 'counter' in r else r['esper_counter']}), matrix "
            f"kernels {r['esper_matrix_share']:.0%} of the time (bare {r['bare_matrix_share']:.0%})",
            lambda r: r["esper_percent"] > 80)
    )  # fmt: skip
    for host, title in (
        ("digits", "digits MLP 64-8-8-10, batch 64"), ("mlp", "digits MLP 64-512-512-10, batch 256"),
        ("resnet", "small ResNet, batch 32"),
    ):  # fmt: skip
        bars.append(
            Bar(f"{title}, on one CPU thread, dormant, default interval", "step_cpu",
                {"host": host, "phase": "default"}, "+3%", _cpu_share, lambda r: r["added_cpu_share"] <= 0.03)
        )  # fmt: skip
    return bars


def page(results: Results) -> str:
    """The whole page."""
    parts = [
        HEAD, _machines(results), "## Bars\n", _bar_table(results), "## Roofline\n", _roofline(results),
        "## Where dense products win\n", _widths(results), "## How costs grow\n", _growth(results),
        "## Memory\n", _memory(results), "## The five metrics\n", _metrics(results), "## A small host on a CPU\n",
        _small_hosts(results),
    ]  # fmt: skip
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _machines(results: Results) -> str:
    lines = ["| file | machine | versions | command |", "|---|---|---|---|"]
    for name, content in results.files.items():
        versions = f"torch {content['torch']}, Triton {content['triton'] or 'none'}, Python {content['python']}"
        device = f"{content['device']}, {content['threads']} thread" if "threads" in content else content["device"]
        command = content["command"].partition(" --out")[0]
        lines.append(f"| `benchmarks/results/{name}.json` | {device} | {versions} | `{command}` |")
    return "\n".join(lines)


def _bar_table(results: Results) -> str:
    lines = ["| what | bar | measured | met |", "|---|---|---|---|"]
    for bar in _bars():
        row = results.row(bar.file, **bar.where)
        if row is None or any(value is None for key, value in row.items() if key.startswith(("added", "esper_"))):
            lines.append(f"| {bar.what} | {bar.bar} | {NOT_YET} | |")
        else:
            lines.append(f"| {bar.what} | {bar.bar} | {bar.shown(row)} | {'yes' if bar.met(row) else '**no**'} |")
    return "\n".join(lines)


def _roofline(results: Results) -> str:
    lines = [
        "| operation | size | bytes | FLOPs | floor | measured | over the floor | only touching | dirty caches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in OPERATIONS:
        rate = results.files.get(f"ops_{name}", {}).get("copy_tb_per_s")
        for row in results.rows(f"ops_{name}"):
            if row["what"] in ("width", "sweep"):
                continue
            num_bytes = row.get("bytes", row["floor_us"] * rate * 1e6 if rate else math.nan)
            flops = f"{row['flops'] / 1e6:,.0f} M" if "flops" in row else NOT_YET
            more = [f"{row[key]:.1f} us" if key in row else "" for key in ("touch_us", "dirty_gpu_us")]
            lines.append(
                f"| {name}: {row['what']} | {_size(row)} | {num_bytes / 1e6:,.1f} MB | {flops} "
                f"| {row['floor_us']:.1f} us | {row['gpu_us']:.1f} us | {row['over_floor']:.1f}x | {' | '.join(more)} |"
            )
    rows = len(lines) > 2
    note = (
        "\nFor a few seeds the floor counts only their own columns, which no memory can read alone: a row's four\n"
        "bf16 columns are 8 bytes of a 32-byte sector, and memory is read in units of 64. *Only touching* is a kernel\n"
        "that reads these columns and writes them back, and computes nothing: what the graft can reach at best."
    )
    return "\n".join(lines) + ("\n" + note if rows else f"\n\n{NOT_YET}")


def _memory(results: Results) -> str:
    """The most that was needed in each state of a cohort's life."""
    lines = ["| state | forward and backward, over the bare host | bytes between steps |", "|---|---|---|"]
    rows = results.rows("step_gpu", phase="memory_by_state")
    for state, most in rows[0]["by_state"].items() if rows else ():
        over = most["training"] / rows[0]["peak_bytes_bare"] - 1
        lines.append(f"| {state} | {over:+.1%} | {most['between_steps']:,} |")
    text = "What Esper holds when, by which formulas, is on [a page of its own](memory.md). GPT-2-124M shape, eager:"
    return "\n".join([text, "", *lines]) if rows else f"{text} {NOT_YET}."


def _size(row: Row) -> str:
    names = {key: key for key in ("steps", "rows", "rows_read", "chunks", "seeds", "slots")} | {"rows_read": "read"}
    parts = [f"{row[key]:,} {word}" for key, word in names.items() if key in row]
    return ", ".join([*parts, *([f"{row['columns']} x {row['hidden']}"] if "hidden" in row else [])])


def _widths(results: Results) -> str:
    rows = results.rows("ops_graft", what="width")
    text = (
        "Seeds of up to 128 columns and hidden units (64 in fp32) run in the graft kernel, wider ones as batched dense "
        "products: a program's registers hold no more. "
        "Seeds over all of 4,096 features, N = 8192:"
    )
    if not rows:
        return f"{text} {NOT_YET}."
    lines = [text, "", "| columns and hidden units | path taken | taken | dense | kernel |", "|---|---|---|---|---|"]
    for row in rows:
        kernel = row["gpu_us"] if row["path"] == "kernel" else row.get("kernel_gpu_us", "")
        cell = f"{kernel:.1f} us" if isinstance(kernel, float) else kernel
        taken = f"{row['gpu_us']:.1f} us"
        lines.append(f"| {row['columns']} | {row['path']} | {taken} | {row['dense_gpu_us']:.1f} us | {cell} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Growth


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


def _growth(results: Results) -> str:
    parts = [
        f"![{chart.title}](pictures/{chart.name}.svg)" if chart.is_drawn else f"{chart.title}: {NOT_YET}."
        for chart in charts(results)
    ]
    return "\n\n".join(parts)


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


# ----------------------------------------------------------------------------------------------------------------------
# The rest


def _metrics(results: Results) -> str:
    from esper.bench.words import metric

    lines = [
        "`esper bench growth`: a small student grows towards a teacher network; all five come from that command.",
        "",
    ]
    for kind, title in (("gpu", "On a GPU"), ("cpu", "On one CPU thread")):
        rows = results.rows(f"growth_{kind}")
        lines += [f"- {title}: {metric(row)}" for row in rows] or [f"- {title}: {NOT_YET}"]
    return "\n".join(lines)


def _small_hosts(results: Results) -> str:
    lines = ["| host | phase | bare | with Esper | added by the wall | added CPU time |", "|---|---|---|---|---|---|"]
    for row in results.rows("step_cpu"):
        if "added_cpu_share" not in row or row["host"] == "gpt2":
            continue
        host = f"{row['host']}, {row['sites']} sites"
        wall, cpu = f"{row['added_share']:+.1%}", f"{row['added_cpu_share']:+.1%}"
        cells = [host, row["phase"].replace("_", " "), f"{row['bare_cpu_ms']:.3f} ms", f"{row['esper_cpu_ms']:.3f} ms"]
        lines.append(f"| {' | '.join([*cells, wall, cpu])} |")
    text = (
        "\nTimes are CPU time of the process. A dormant step costs some microseconds of Python whatever the host (the\n"
        "step itself, hooks on each site's layers, a look every tenth step): a step of a third of a millisecond shows\n"
        "that, one of seven milliseconds hardly does. The machine was shared while this was measured."
    )
    return "\n".join(lines) + "\n" + text if len(lines) > 2 else NOT_YET


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """The page and its pictures, as they should be."""
    results = Results.read(folder)
    drawn = [chart for chart in charts(results) if chart.is_drawn]
    return {PAGE: page(results), **{PICTURES / f"{chart.name}.svg": picture(chart) for chart in drawn}}


def stale(wanted: Sequence[Path]) -> list[Path]:
    """Pictures of an earlier run that are drawn no longer."""
    return [path for path in PICTURES.glob("speed-*.svg") if path not in wanted]


if __name__ == "__main__":
    made = pages()
    for target, content in made.items():
        target.write_text(content, encoding="utf-8")
    for path in stale(list(made)):
        path.unlink()
