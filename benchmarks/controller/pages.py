"""Write the tables of docs/control_headroom.md and docs/greenhouse.md from the measured files.

python benchmarks/controller/pages.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def shown(value: dict[str, Any]) -> str:
    """A mean and its standard error, where there is one."""
    error = value["standard_error"]
    return f"{value['mean']:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def headroom_table(measured: dict[str, dict[str, Any]]) -> str:
    lines = [
        "`python benchmarks/controller/headroom.py --family FAMILY --tasks TASKS --out "
        "benchmarks/results/controller_headroom.json` (*all kept*: with `--keep-all`), mean ± standard error:",
        "",
        "| family | tasks | never | even | oracle | oracle − even | oracle − never | anything to win? |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        reward = found["reward"]
        lines.append(
            f"| {name} ({found['purpose']}) | {found['tasks']} | {shown(reward['never'])} | {shown(reward['even'])} | "
            f"{shown(reward['oracle'])} | {shown(found['oracle_minus_even'])} | {shown(found['oracle_minus_never'])} | "
            f"{verdict(found)} |"
        )
    lines += [
        "",
        "| family | learning rate (never) | best even schedule | MFLOP: never, even, oracle | oracle when chosen |",
    ]
    lines.append("|---|---|---|---|---|")
    for name, found in measured.items():
        flops = found["mean_mflops"]
        lines.append(
            f"| {name} | {found['lr']:g} ({found['never_lr']:g}) | {told(found['even'])} | {flops['never']:.0f}, "
            f"{flops['even']:.0f}, {flops['oracle']:.0f} | {found['oracle_at_selection']:+.2f} |"
        )
    return "\n".join(lines)


def told(schedule: list[dict[str, Any]]) -> str:
    """A schedule in words."""
    steps = ", ".join(str(growth["step"]) for growth in schedule)
    return f"at {steps}: {schedule[0]['size']:g} times, {schedule[0]['start']}"


def verdict(found: dict[str, Any]) -> str:
    """Whether the oracle is above even by two standard errors, and above no growth as well."""
    clear = {
        name: found[f"oracle_minus_{name}"]["mean"] > 2 * found[f"oracle_minus_{name}"]["standard_error"]
        for name in ("even", "never")
    }
    if not clear["even"]:
        return "no"
    return "yes" if clear["never"] else "over even; not clearly over never"


def parity_text(measured: dict[str, Any]) -> str:
    found = measured["summary"]
    again = found["real and real again"]
    text = (
        "`python benchmarks/controller/parity.py --out benchmarks/results/controller_parity.json`: rank correlation "
        "over ten schedules between a stack and a real grower with its own draws and default control, means of three "
        f"seeds, mean over {found['hosts']} hosts: {correlations(found['stack and real'])}. The bar for the reward is "
        f"{found['bar']:g}: {'reached' if found['passes'] else 'not reached'}."
    )
    if "reward" in again:
        text += f" A grower against itself under other draws of units: {correlations(again)}."
    kept = json.loads((RESULTS / "controller_parity_kept.json").read_text(encoding="utf-8"))["summary"]
    return (
        f"{text} With `--keep-all` (no judgement, {kept['hosts']} host{'s' if kept['hosts'] > 1 else ''}): "
        f"{correlations(kept['stack and real'])}. What keeps the two apart is the luck of acceptance, not the training."
    )


def correlations(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(found[name])}" for name in ("reward", "loss", "flops"))


def replaced(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :]


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    found: dict[Path, str] = {}
    for page, name, make in (("control_headroom", "headroom", headroom_table), ("greenhouse", "parity", parity_text)):
        path = ROOT / "docs" / f"{page}.md"
        measured = json.loads((RESULTS / f"controller_{name}.json").read_text(encoding="utf-8"))
        found[path] = replaced(path.read_text(encoding="utf-8"), name, make(measured))
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
