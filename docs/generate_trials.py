"""Write the measured tables of docs/trials.md from benchmarks/results/trials*.json and soak.json.

Run from the repository root after trials or a soak have written their results::

    python docs/generate_trials.py

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; everything else in the page is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "trials.md"


def render(page: str) -> str:
    """The page with its tables as they should be."""
    tables = {
        "grown": _grown, "held-out": _held_out, "null": _null, "faults": _faults, "peer": _peer, "soak": _soak,
    }  # fmt: skip
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _made_by(result: dict[str, Any], what: str) -> str:
    versions = result["versions"]
    return f"`{result['command']}`: {what} (PyTorch {versions['torch']}, {versions['device']})."


def _share(rate: dict[str, Any]) -> str:
    share = "-" if rate["share"] is None else f"{rate['share']:.1%}"
    return f"{rate['events']:,} of {rate['trials']:,} | {share} | {rate['low']:.1%} to {rate['high']:.1%}"


def _rates(rates: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_share(rate)} |" for name, rate in rates.items() if rate["trials"]]
    return ["| | of | share | one-sided 95% bounds |", "|---|---|---|---|", *rows]


def _bars(result: dict[str, Any]) -> list[str]:
    lines = ["| bar | got | verdict |", "|---|---|---|"]
    for bar in result["bars"]:
        share = "no trials" if bar["share"] is None else f"{bar['share']:.1%} ({bar['low']:.1%} to {bar['high']:.1%})"
        lines.append(f"| {bar['name']}, {bar['need']} | {share} | {bar['verdict']} |")
    return lines


def _grown() -> str:
    result = _load("trials")
    names = ("trials", "cohorts", "kept", "improve", "harmful", "harmful_by_twin", "headroom", "headroom_kept")
    head = "trials | cohorts | kept | improve | harmful | harmful by twin | with headroom | of these, kept one"
    lines = [_made_by(result, f"{result['trials']} hosts"), "", *_rates(result["rates"]), "", *_bars(result), ""]
    lines += [f"| task | {head} | median effect |", f"|---|{'---|' * (len(names) + 1)}"]
    for task, counts in result["by_task"].items():
        cells = [str(counts[name]) for name in names]
        lines.append(f"| {task} | {' | '.join(cells)} | {counts['median_effect']:+.1%} |")
    return "\n".join(lines)


def _held_out() -> str:
    """Who kept a cohort, by how much there was to judge by: a row for each size of a held-out batch."""
    drawn, larger = _load("trials"), _load("trials_held_out")
    lines = [
        _made_by(larger, f"{larger['trials']} hosts"),
        "",
        "| rows of a held-out batch | hosts with headroom that ",
    ]
    lines[-1] += "kept a cohort | share | one-sided 95% bounds |"
    lines += ["|---|---|---|---|"]
    for result in (drawn, larger):
        lines += [f"| {rows} | {_share(rate)} |" for rows, rate in result.get("by_held_out_rows", {}).items()]
    return "\n".join([*lines, "", *_bars(larger)])


def _null() -> str:
    result = _load("trials_null")
    lines = [_made_by(result, f"{result['trials']} hosts"), "", "| cohorts | kept | share | one-sided 95% bounds |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {kind.removeprefix('null: ')} | {_share(rate)} |" for kind, rate in result["by_kind"].items()]
    (everything,) = result["rates"].values()
    return "\n".join([*lines, f"| **all of these** | {_share(everything)} |"])


def _faults() -> str:
    result = _load("trials_faults")
    lines = [_made_by(result, f"{result['trials']} hosts"), "", "| fault | it must be | struck | held |"]
    lines += ["|---|---|---|---|"]
    for name, entry in result["by_fault"].items():
        lines.append(f"| `{name}` | {entry['expects']} | {entry['struck']} | {entry['held']} |")
    return "\n".join([*lines, "", *_rates(result["rates"])])


def _peer() -> str:
    ours, peers = _load("trials"), _load("trials_gromo")
    mlps = ours["on_mlps"]
    lines = [
        _made_by(peers, f"{peers['trials']} hosts; Esper on the {mlps['trials']} MLPs of its own trials"),
        "",
        "| | Esper: of | share | one-sided 95% bounds | gromo: of | share | one-sided 95% bounds |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = {
        "improve the audit loss against their twin": (
            "permanent cohorts that improve the audit loss against their twin",
            "growths that improve the audit loss against their twin",
        ),
        "harmful beyond 1% against their twin": (
            "permanent cohorts harmful beyond 1% against their twin",
            "growths harmful beyond 1% against their twin",
        ),
        "the same, beyond the noise of the audit": ("the same, beyond the noise of the audit",) * 2,
        "hosts better at the end than the same host alone": ("grown hosts better at the end than the same host alone",)
        * 2,
        "hosts worse by over 1% at the end": ("grown hosts worse by over 1% at the end, beyond the noise of the audit",)
        * 2,
    }
    for name, (mine, theirs) in pairs.items():
        lines.append(f"| {name} | {_share(mlps['rates'][mine])} | {_share(peers['rates'][theirs])} |")
    gains = [mlps["gains"]["twin"], peers["gains"]["twin"]]
    lines += ["", *(f"{who}: {_gain(gain)}." for who, gain in zip(("Esper", "gromo"), gains, strict=True))]
    return "\n".join(lines)


def _gain(gain: dict[str, Any]) -> str:
    spread = f"{gain['least']:+.1%} to {gain['most']:+.1%}"
    return f"gain against the twin {gain['mean']:+.1%} on average, median {gain['median']:+.1%} ({spread})"


def _slope(slope: dict[str, Any] | None) -> str:
    if slope is None:
        return "not told here"
    return f"{slope['mb_per_hour']:+.2f} MB an hour ({slope['low']:+.2f} to {slope['high']:+.2f})"


def _soak() -> str:
    result = _load("soak")
    memory, families = result["memory"], result["steps_by_family"]
    long = next(value for name, value in memory.items() if name.startswith("mb_after"))
    counted = ", ".join(f"{name} {num:,}" for name, num in families.items())
    lost = ", ".join(f"{name} {num}" for name, num in result["lives_lost"].items()) or "none"
    rows = {
        "steps": f"{result['steps']:,} ({counted})",
        "hours": f"{result['hours']:.2f} in {result['sittings']} sitting(s), {result['steps_per_second']:,} steps a "
        "second",
        "10,000,000 steps": f"{result['hours_to_10M_steps']:,} h more at this rate",
        "transitions of cohorts": f"{result['transitions']:,} ({result['seed_transitions']:,} of seeds)",
        "rollbacks": f"{result['rollbacks']:,}",
        "germinations": f"{result['germinations']:,}, at most {result['longest_wait_for_a_germination']} steps apart",
        "hosts": f"{result['lives']:,}",
        "faults that struck": ", ".join(f"{name} {num}" for name, num in sorted(result["faults"].items())),
        "hosts lost": lost,
        "numbers that are not finite, faults aside": str(result["non_finite"]),
        "memory": f"{_slope(memory)}, read from {memory['hours']:.2f} h; by the upper bound {long:+,.0f} MB in 72 h",
        "of it in use": _slope(result.get("in_use")),
        "leaked": ", ".join(f"{name.replace('_', ' ')} {num}" for name, num in result["leaked"].items()),
    }
    lines = [_made_by(result, "so far"), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "| bar | verdict |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {'met' if met else 'missed'} |" for name, met in result["bars"].items())])


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
