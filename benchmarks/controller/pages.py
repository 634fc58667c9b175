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
        "`python benchmarks/controller/headroom.py --out benchmarks/results/controller_headroom.json`, mean ± standard "
        "error over tasks:",
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
    """Whether the oracle beats even *and* never by two standard errors."""
    clear = {
        name: found[f"oracle_minus_{name}"]["mean"] > 2 * found[f"oracle_minus_{name}"]["standard_error"]
        for name in ("even", "never")
    }
    if all(clear.values()):
        return "yes"
    return "no: not above even" if not clear["even"] else "no: not above no growth"


def parity_text(measured: dict[str, Any]) -> str:
    found = measured["summary"]
    stack, again = found["stack and real"], found["real and real again"]
    what = ", ".join(f"{name} {shown(stack[name])}" for name in ("reward", "loss", "flops"))
    text = (
        f"`python benchmarks/controller/parity.py --out benchmarks/results/controller_parity.json`, {found['hosts']} "
        "hosts, means of three seeds. Rank correlation over schedules between a stack and a real grower with its own "
        f"draws and default control, mean over hosts: {what}. The bar for the reward is {found['bar']:g}: "
        f"{'reached' if found['passes'] else 'not reached'}."
    )
    if "reward" in again:
        text += (
            f" A grower against itself under other draws of units: reward {again['reward']['mean']:+.2f}, loss "
            f"{again['loss']['mean']:+.2f}."
        )
    return text


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
