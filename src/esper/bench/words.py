"""Measurements in a line each, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from esper.bench.record import Line


def summary(files: dict[str, Any]) -> list[str]:
    """The lines that answer a question: parity, what has a bar, and the five metrics."""
    return [text for name, content in files.items() for text in _of(name, content)]


def _of(name: str, content: Line) -> Iterator[str]:
    if "parity" in content:
        yield f"{name}: {len(content['parity'])} parity checks passed ({content['implementation']})"
    for row in content["rows"]:
        if "metric" in row:
            yield metric(row)
        elif "added_share" in row:
            yield (
                f"{row['host']}, {row['sites']} sites, {row['phase']}: {row['added_share']:+.1%} of a step "
                f"({row['added_cpu_share']:+.1%} by CPU time){_verdict(row)}"
            )
        elif "added_memory_share" in row:
            what, place = (row[key].replace("_", " ") for key in ("phase", "place"))
            yield (
                f"{row['host']}, peak {what}: {row['added_memory_share']:+.1%}, reached in {row['state']} at step "
                f"{row['step']} ({place}){_verdict(row)}"
            )
        elif "met" in row:
            yield f"{name}: {_operation(row)}{_verdict(row)}"


def _operation(row: Line) -> str:
    if row.get("what") == "layer":
        added = f"{row['added_gpu_us']:.1f} us of the GPU, {row['added_wall_us']:.1f} us by the wall"
        return f"layer with {row['seeds']} seeds: {added}"
    if "gpu_us" in row:
        return f"{row['what']}, {_sizes(row)}: {row['gpu_us']:.1f} us, bar {row['bar_us']:.1f}"
    return str(row.get("phase", row))


def _sizes(row: Line) -> str:
    return ", ".join(f"{row[key]} {key}" for key in ("rows", "rows_read", "chunks", "seeds", "columns") if key in row)


def _verdict(row: Line) -> str:
    return "" if "met" not in row else " - met" if row["met"] else " - NOT met"


def metric(row: Line) -> str:
    """One of the plan's five."""
    kind = row["metric"]
    if kind == "forward_latency":
        pairs = (
            f"{when} {row[when]['esper_us']:.0f} us, bare {row[when]['bare_us']:.0f}" for when in ("dormant", "grown")
        )
        return f"forward latency: {'; '.join(pairs)}"
    if kind == "memory":
        return (
            f"memory: {row['host_parameter_bytes']:,} bytes of host parameters, "
            f"{row['grown_parameter_bytes']:,.0f} grown, device peak {row['device_peak_bytes']:,}, "
            f"process {row['resident_bytes']:,}"
        )
    if kind == "gpu_utilisation":
        percent = f"{row['percent']:.0f}%" if row["percent"] is not None else "not measured"
        return f"GPU utilisation: {percent} ({row['counter']})"
    if kind == "adaptation_success":
        interval = "" if row["interval"] is None else f" (95%: {row['interval'][0]:.0%} to {row['interval'][1]:.0%})"
        return f"adaptation success: {row['kept']} of {row['cohorts']} cohorts kept{interval}"
    ends = (f"{end.lower()} {found['steps']:.0f} steps, {found['seconds']:.2f} s" for end, found in row["ends"].items())
    return f"seed lifecycle: {'; '.join(ends) or 'no seed has ended'}"
