"""Write docs/speed.md and its pictures from the measurements in benchmarks/results.

Run from the repository root after ``esper bench --out benchmarks/results``::

    python docs/generate_speed.py

What has no measurement yet says so.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this script is also loaded by its path

from speed_charts import OPERATIONS, Results, Row, charts, picture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGE = ROOT / "docs" / "speed.md"
NOT_YET = "not measured yet"

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
under Esper. The *floor* is the time that the bytes take at the measured rate of a copy; the launch itself (`launch_us`
in newer files) is part of every time but not of the floor.
"""


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


def _added_step(row: Row) -> str:
    low, high = row["added_quartiles"]
    at = f" (Esper at {row['code']})" if "code" in row else ""
    return f"{row['added_share']:+.1%}, quartiles {low:+.1%} to {high:+.1%}{at}"


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
            Bar(title, "step_gpu", {**gpt2, "phase": phase}, f"{bar:+.1%}", _added_step,
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
            lambda r: f"{r['esper_percent']:.0f}% (bare {r['bare_percent']:.0f}%; "
            f"{r['counter'] if 'counter' in r else r['esper_counter']}), matrix "
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
        bars.append(
            Bar("the same while nobody looks", "step_cpu", {"host": host, "phase": "unwatched"}, "+3%", _cpu_share,
                lambda r: r["added_cpu_share"] <= 0.03)
        )  # fmt: skip
    return bars


def page(results: Results) -> str:
    """The whole page."""
    parts = [
        HEAD, _machines(results), "## Bars\n", _bar_table(results), _elsewhere(results),
        "## Roofline\n", _roofline(results),
        "## Where dense products win\n", _widths(results), "## How costs grow\n", _growth(results),
        "## Memory\n", _memory(results), "## The five metrics\n", _metrics(results), "## A small host on a CPU\n",
        _small_hosts(results), "## Many sites on a GPU\n", _chains(results),
        "## Memory errors and races\n", _sanitized(),
    ]  # fmt: skip
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _machines(results: Results) -> str:
    lines = ["| file | machine | versions | command |", "|---|---|---|---|"]
    for name, content in results.files.items():
        versions = f"torch {content['torch']}, Triton {content['triton'] or 'none'}, Python {content['python']}"
        device = f"{content['device']}, {content['threads']} thread" if "threads" in content else content["device"]
        command = content["command"].partition(" --out")[0]
        versions += f", Esper at {content['code']}" if "code" in content else ""
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


def _elsewhere(results: Results) -> str:
    """The same steps in other sittings, on other cards of the same kind."""
    others = results.files.get("step_gpu", {}).get("elsewhere", [])
    if not others:
        return ""
    told = "; ".join(
        f"{row['phase'].replace('_', ' ')} {row['added_share']:+.1%} ({row['added_quartiles'][0]:+.1%} to "
        f"{row['added_quartiles'][1]:+.1%}, Esper at {row['code']})"
        for row in others
    )
    return (
        "Two blocks of 20 steps beside each other differ by more than these bars on a machine that others use as well. "
        f"Other sittings, other cards of the same kind, the quartiles of their pairs: {told}. 2a34383 waited "
        "for the device's queue at each decision and read twice the rows; afc213b and 2cad752 had a machine whose "
        "processors others used as well, and a step with 512 seeds launches as fast as its processor can.\n"
    )


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


def _growth(results: Results) -> str:
    parts = [
        f"![{chart.title}](pictures/{chart.name}.svg)" if chart.is_drawn else f"{chart.title}: {NOT_YET}."
        for chart in charts(results)
    ]
    return "\n\n".join(parts)


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
        "\nTimes are CPU time of the process. What a dormant step costs hardly depends on the host: a look at all\n"
        "sites every tenth step, less than a millisecond for two sites, and a few microseconds in between. A step of\n"
        "a quarter of a millisecond shows that, one of seven hardly does. Half of a look is what it pushes out of the\n"
        "processor's caches: the pass that feeds the sensors, the decision and the next two steps all run slower.\n"
        "Where nobody looks (growth has stopped, or the controller waits for a later step, and no events, file or bus\n"
        "are written) the sensors stay off and the guard alone reads the losses: the row *unwatched*. `esper run`\n"
        "writes events, so it is always looked at. The chains, and the ResNet while nobody looks, were measured\n"
        "beside other work "
        "at 3c77787; the quartiles of the ResNet's steps are wider than what is looked for."
    )
    return "\n".join(lines) + "\n" + text if len(lines) > 2 else NOT_YET


def _chains(results: Results) -> str:
    """What each further site adds on a GPU, where eager steps are as fast as their launches."""
    lines = ["| sites | phase | bare | added, quartiles |", "|---|---|---|---|"]
    for row in results.rows("step_gpu", host="chain"):
        low, high = row["added_quartiles"]
        phase = row["phase"].replace("_", " ")
        added = f"{row['added_share']:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(f"| {row['sites']} | {phase} | {row['bare_ms']:.2f} ms | {added} |")
    text = (
        "\nA chain of small eager layers does nothing but launch, so each of ours shows: about 80 us a site in\n"
        "a step whose telemetry is read, a tenth of it at the default interval. (A shared machine; see the quartiles.)"
    )
    return "\n".join(lines) + "\n" + text if len(lines) > 2 else NOT_YET


def _sanitized() -> str:
    """What compute-sanitizer found."""
    path = RESULTS / "ops_sanitizer.json"
    if not path.exists():
        return NOT_YET
    told = [f"{run['tool']}: {run['summary']}" for run in json.loads(path.read_text(encoding="utf-8"))]
    return (
        "Every variant of every kernel under NVIDIA's compute-sanitizer on an H100 (`benchmarks/ops/sanitize.py`): "
        f"{'; '.join(told[1:])}. Its race check found one defect that no comparison of values had shown: of a tensor "
        "with fewer numbers than a program has threads several threads hold the same one, and the fit kernel did not "
        "wait until all of them had read a moment before one moved it on."
    )


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
