"""Write the tables of docs/control_headroom.md, docs/greenhouse.md and docs/control.md from the measured files.

python -m benchmarks.controller.pages
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.controller.contest.verdict import GROUPS, OTHER_KINDS, group_of

from esper.greenhouse.family import FAMILIES

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
    if all("heuristic" in found["reward"] for found in measured.values()):
        lines += ["", "| family | heuristic | heuristic − even | heuristic − never |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {shown(found['reward']['heuristic'])} | {shown(found['heuristic_minus_even'])} | "
            f"{shown(found['heuristic_minus_never'])} |"
            for name, found in measured.items()
        ]
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


ARMS = {
    "policy": "policy", "cloned": "policy before PPO", "sampled": "policy, actions drawn",
    "replay": "its mean schedule",
    "shuffled": "policy, shown another host", "karn-policy": "policy with Karn",
    "never": "never", "static": "best width",
    "always": "always", "even": "even schedule", "even-own": "even, tuned on the family",
    "search": "best of 64 schedules",
    "search-own": "best of 64, tuned on the family", "random": "random, same rate", "heuristic": "heuristic",
    "heuristic-before": "heuristic of decision 0024", "heuristic-0021": "heuristic of decision 0021",
    "heuristic-0023": "heuristic of decision 0023",
    "heuristic-until-60": "heuristic until 60% of a run",
    "bandit": "bandit", "bandit-1000": "bandit, taught", "karn-uniform": "heuristic, even draws of designs",
    "karn-50": "heuristic with Karn, 50 reports", "karn-200": "with Karn, 200", "karn-1000": "with Karn, 1,000",
    "critic": "critic instead of siblings", "no-start": "no start", "heuristic-start": "start from the heuristic alone",
    "no-floors": "no entropy floors", "no-masks": "no masks", "time-only": "sees the time alone",
    "raw-reward": "rewards not clipped", "uncounted": "costs not counted",
}  # fmt: skip
"""What the arms of a contest are called on the page."""


def called(arm: str, measured: dict[str, Any]) -> str:
    """An arm's name on the page, with as many reports as there were."""
    return ARMS[arm].replace("1,000", f"{min(1000, measured.get('reports') or 1000):,}")


def contest_tables(measured: dict[str, Any], subject: str = "heuristic") -> str:
    """Rewards by arm and family, in stacks and under real growers, and one arm against all others: short families,
    longer ones and other kinds of hosts in a table each."""
    parts = [f"`{measured['command']}` ({sum(measured['cpu_s'].values()) / 3600:.1f} CPU hours in all)."]
    for mode, title in (("real", "Under real growers"), ("stack", "In stacks")):
        there = {family for rows in measured.get(mode, {}).get("arms", {}).values() for family in rows}
        for group in (*GROUPS, OTHER_KINDS):
            families = [family for family in FAMILIES if family in there and group_of(family) == group]
            if families:
                lengths = " or ".join(f"{steps:,}" for steps in sorted({FAMILIES[name].steps for name in families}))
                kind = "; a conv net and a transformer" if group == OTHER_KINDS else ""
                parts += [
                    f"**{title}**, runs of {lengths} steps{kind}, mean reward ± standard error over tasks:",
                    contest_table(measured, mode, families, group, subject),
                ]
    return "\n\n".join(parts)


def contest_table(measured: dict[str, Any], mode: str, families: list[str], group: str, subject: str) -> str:
    """One row an arm that was on all of the families."""
    found = measured[mode]
    against = found["differences"].get(subject, {})
    lines = [
        f"| | {' | '.join(families)} | MFLOP | kept | {subject} minus it |",
        "|---|" + "---|" * (len(families) + 3),
    ]
    for name in ARMS:
        rows = {family: row for family, row in found["arms"].get(name, {}).items() if family in families}
        if len(rows) < len(families):
            continue
        cells = [f"{rows[f]['reward']:+.2f} ± {rows[f]['standard_error']:.2f}" for f in families]
        mflop, kept = (sum(row[key] for row in rows.values()) / len(rows) for key in ("mflop", "kept"))
        over = against.get(name, {}).get(group)
        told = "" if over is None else f"{over['value']:+.2f} ({over['low']:+.2f} to {over['high']:+.2f})"
        lines.append(f"| {called(name, measured)} | {' | '.join(cells)} | {mflop:.0f} | {kept:.1f} | {told} |")
    return "\n".join(lines)


def default_table(measured: dict[str, Any]) -> str:
    """The heuristic as it comes against every other arm."""
    found = measured["real"]["differences"]["heuristic"]
    lines = [
        "Heuristic minus the other one, 95% interval:",
        "",
        "| | all fully connected | runs of 400 steps | of 2,000 | conv net and transformer |",
        "|---|---|---|---|---|",
    ]
    for name in ARMS:
        if name in found:
            parts = (found[name].get(part) for part in ("overall", *GROUPS, OTHER_KINDS))
            lines.append(f"| {called(name, measured)} | {' | '.join(_over(part) for part in parts)} |")
    return "\n".join(lines)


def karn_table(measured: dict[str, Any]) -> str:
    """What designs by Karn make of the heuristic and of the bandit, against arms without."""
    found = measured["real"]["differences"]
    others = ("never", "heuristic", "even", "even-own", "search-own", "karn-uniform")
    lines = [
        "Reward under real growers, overall difference and 95% interval (short families unless it says otherwise):",
        "",
        f"| | {' | '.join(ARMS[name] for name in others)} |",
        "|---|" + "---|" * len(others),
    ]
    for name in ("karn-uniform", "karn-50", "karn-200", "karn-1000", "bandit-1000"):
        if name in found:
            cells = [_over(found[name].get(other, {}).get("short")) for other in others]
            lines.append(f"| {called(name, measured)} | {' | '.join(cells)} |")
            for group, families in (("longer", "longer families"), (OTHER_KINDS, "conv net and transformer")):
                cells = [_over(found[name].get(other, {}).get(group)) for other in others]
                if any(cells):
                    lines.append(f"| {called(name, measured)}, {families} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['value']:+.2f} ({entry['low']:+.2f} to {entry['high']:+.2f})"


def shipped_text(measured: dict[str, Any]) -> str:
    """What the policy that comes with the package does, family by family."""
    training, found = measured["training"], measured["differences"]
    lines = [
        f"`{measured['command']}`: training {measured['seed']} of the full recipe, {training['updates']} of "
        f"{training['planned']} updates, {training['episodes']:,} episodes, {training['seconds'] / 60:.0f} minutes of "
        "one core. Under real growers:",
        "",
        "| | reward | minus the heuristic | minus never | minus the even schedule |",
        "|---|---|---|---|---|",
    ]
    against = ("heuristic", "never", "even")
    lines.append(f"| all | | {' | '.join(_over(found[other]['overall']) for other in against)} |")
    for family in FAMILIES:
        if family in measured["rewards"]:
            cells = " | ".join(_over(found[other]["families"][family]) for other in against)
            lines.append(f"| {family} | {measured['rewards'][family]['reward']:+.2f} | {cells} |")
    return "\n".join(lines)


def effort_text(measured: dict[str, Any]) -> str:
    """What finding a good width costs."""
    reached = ", ".join(f"{name} {share}" for name, share in measured["reached"].items())
    lines = [
        "`python -m benchmarks.controller.effort --work runs/effort --out benchmarks/results/controller_effort.json`. "
        f"Reached 99% of the best static width's score: {reached}. What growing costs, as a multiple (geometric mean, "
        "95% interval; a failure pays for the sweep as well):",
        "",
        "| | of a sweep | of Optuna |",
        "|---|---|---|",
    ]
    for what, title in (("flops", "FLOPs"), ("runs", "runs"), ("cpu_s", "CPU time")):
        cells = [measured["ratio"][f"{what} over {other}"] for other in ("sweep", "optuna")]
        lines.append(
            f"| {title} | " + " | ".join(f"{c['value']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells) + " |"
        )
    return "\n".join(lines)


def defaults_text(measured: dict[str, Any]) -> str:
    """The grid that the default was chosen from: means over families of one length."""
    families = list(next(iter(measured["rows"].values()))["minus_never"])
    lengths = sorted({FAMILIES[family].steps for family in families})
    lines = [
        f"`{measured['command']}`. Reward minus that of no growth, {measured['tasks']} tuning tasks a family, "
        f"{measured['seeds']} seeds, each at its own best learning rate; means over the families of each length, and "
        "the worst of all families (names: how often the width, from which share of the run on, which start):",
        "",
        f"| | {' | '.join(f'{steps:,} steps' for steps in lengths)} | worst family |",
        "|---|" + "---|" * (len(lengths) + 1),
    ]
    for name, row in measured["rows"].items():
        if name == "never":
            continue
        found = row["minus_never"]
        means = [
            sum(found[f] for f in families if FAMILIES[f].steps == steps)
            / sum(FAMILIES[f].steps == steps for f in families)
            for steps in lengths
        ]
        worst = min(found, key=lambda family: found[family])
        lines.append(f"| {name} | {' | '.join(f'{value:+.2f}' for value in means)} | {worst} {found[worst]:+.2f} |")
    if measured["incomplete"]:
        few = sorted({len(row) for row in measured["partly"].values()})
        lines += [
            "",
            f"Not played on all families: {len(measured['incomplete'])} of {len(measured['settings'])} settings. They "
            f"were on {few[0]} to {few[-1]} of {len(families)} (`partly` in the file).",
        ]
    return "\n".join(lines)


def foresight_text(measured: dict[str, Any]) -> str:
    """Whether it can be told in advance that growth pays."""
    told_from = measured["told_from"]
    lines = [
        f"`{measured['command']}`: {measured['hosts']} pairs of runs. The correlation of prediction and outcome is "
        f"{told_from['other families']['correlation']:+.2f} on families that the regression has not seen and "
        f"{told_from['other tasks']['correlation']:+.2f} on other tasks of families it has.",
        "",
        "| | growing earns | growing where it looks positive: other families, other tasks | knowing | two seeds of a "
        "task agree (by learning rate) |",
        "|---|---|---|---|---|",
    ]
    for family, row in measured["by_family"].items():
        earned = ", ".join(f"{told_from[name]['earned'][family]:+.2f}" for name in ("other families", "other tasks"))
        agree = ", ".join(f"{value:.2f}" for value in row["seeds_agree"].values())
        lines.append(f"| {family} | {row['growing']:+.2f} | {earned} | {row['knowing']:+.2f} | {agree} |")
    return "\n".join(lines)


def worth_text(measured: dict[str, Any]) -> str:
    """What a report tells against what comes of the run."""
    told = [f"{name} {r:+.2f} ({low:+.2f} to {high:+.2f})" for name, (r, low, high) in measured["correlation"].items()]
    lines = [
        f"`{measured['command']}`: {measured['runs']} runs. Correlation with the reward at the end, minus that of the "
        f"default on the same host: {', '.join(told)}.",
        "",
        "| first cohort's start | runs | gain | gain per cost | kept | reward minus the default's |",
        "|---|---|---|---|---|---|",
    ]
    for start, row in measured["by_start"].items():
        lines.append(
            f"| {start} | {row['runs']} | {row['gain']:.3f} | {row['efficiency']:.3f} | {row['kept']:.0%} | "
            f"{row['reward_minus_default']:+.2f} ± {row['standard_error']:.2f} |"
        )
    return "\n".join(lines)


def stack_speed_text(measured: dict[str, Any]) -> str:
    """What a host step costs in three ways."""
    ways = list(next(iter(measured["microseconds"].values()))["no growth"])
    lines = [
        f"Microseconds a host step (`{measured['command']}`; {measured['machine']}), without growth; with two cohorts "
        "of eight units a site:",
        "",
        f"| family | {' | '.join(ways)} |",
        "|---|" + "---|" * len(ways),
    ]
    for family, found in measured["microseconds"].items():
        cells = [f"{found['no growth'][way]:.0f}; {found['two cohorts'][way]:.0f}" for way in ways]
        lines.append(f"| {family} ({FAMILIES[family].body}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlations(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(found[name])}" for name in ("reward", "loss", "flops"))


def replaced(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :]


SOURCES = {"karn": "contest", "default": "contest"}
"""Measured files that have another name than the text."""


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    found: dict[Path, str] = {}
    for page, name, make in (
        ("control_headroom", "headroom", headroom_table), ("control_headroom", "headroom_32", headroom_table),
        ("greenhouse", "parity", parity_text), ("greenhouse", "stack_speed", stack_speed_text),
        ("control", "default", default_table), ("control", "contest", contest_tables),
        ("control", "ablations", partial(contest_tables, subject="policy")),
        ("control", "karn", karn_table),
        ("control", "shipped", shipped_text), ("control", "effort", effort_text),
        ("control", "foresight", foresight_text), ("control", "worth", worth_text),
        ("control", "defaults", defaults_text),
    ):  # fmt: skip
        path, source = ROOT / "docs" / f"{page}.md", RESULTS / f"controller_{SOURCES.get(name, name)}.json"
        text = make(json.loads(source.read_text(encoding="utf-8"))) if source.exists() else "Not measured yet."
        found[path] = replaced(found.get(path) or path.read_text(encoding="utf-8"), name, text)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
