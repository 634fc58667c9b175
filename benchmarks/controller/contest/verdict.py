"""What a contest comes to: rewards by arm and family, paired differences with intervals, and whether it is a win.

Differences are paired by task and seed. Intervals: trained policies, then tasks, then seeds within tasks are drawn
anew (hierarchical bootstrap); the statistic over several families is the interquartile mean, on one family the mean of
differences held within ten deviations. Every run counts alike, so families with more tasks or seeds count more. Overall
is over fully connected hosts; ``short`` and ``longer`` families of them, and ``other kinds`` of hosts, are told by
themselves. p-values against several controls are Holm's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.controller.contest.arms import ADVISED, CONTROLS

from esper.greenhouse.family import FAMILIES

COLUMNS = ("reward", "loss", "flops", "params", "asked", "kept", "fallback")
MOST = 10.0
DRAWS = 1000
LEARNED = ("policy", "cloned", "sampled", "karn-policy", "replay", "shuffled")
FEW = [
    "never", "always", "random", "heuristic", "heuristic-before", "even", "even-own", "search",
    "search-own", "bandit", "karn-uniform", "karn-200",
]  # fmt: skip
"""What arms other than the policy are held against."""
SUBJECTS = ("policy", "heuristic")
"""Arms that are held against all others."""
Table = dict[str, dict[str, np.ndarray]]
"""By group and family: ``(P, S, T, columns)``."""


GROUPS = ("short", "longer")
"""Of fully connected hosts."""
OTHER_KINDS = "other kinds"


def group_of(family: str) -> str:
    """``short`` or ``longer``, how long its hosts train; or ``other kinds``: convolutional nets and transformers."""
    if FAMILIES[family].body != "mlp":
        return OTHER_KINDS
    return "longer" if FAMILIES[family].purpose == "longer" else "short"


def cell_name(mode: str, arm: str, family: str, seed: int, part: int, parts: int) -> str:
    """Of an evaluation with one seed: of all tasks, or of one of several parts of them, counted from 1."""
    return f"{mode}/{arm}/{family}/{seed}" + (f"/{part}of{parts}" if parts > 1 else "")


def whole(cells: dict[str, Any], mode: str) -> dict[tuple[str, str, int], list[Any]]:
    """Runs by arm, family and seed, where all parts are there."""
    parts: dict[tuple[str, str, int], dict[int, list[Any]]] = {}
    wanted: dict[tuple[str, str, int], int] = {}
    for name, value in cells.items():
        if not name.startswith(f"{mode}/"):
            continue
        _, arm, family, seed, *rest = name.split("/")
        part, num = map(int, rest[0].split("of")) if rest else (1, 1)
        key = (arm, family, int(seed))
        parts.setdefault(key, {})[part], wanted[key] = value, num
    return {
        key: [run for part in sorted(found) for run in found[part]]
        for key, found in parts.items()
        if len(found) == wanted[key]
    }


def table(cells: dict[str, Any], mode: str) -> Table:
    """What was evaluated; of seeds only those that every policy of a group has."""
    found: dict[str, dict[str, dict[str, dict[int, Any]]]] = {}
    for (arm, family, seed), runs in whole(cells, mode).items():
        found.setdefault(arm.partition(":")[0], {}).setdefault(family, {}).setdefault(arm, {})[seed] = runs
    made: Table = {}
    for group, families in found.items():
        for family, arms in families.items():
            common = sorted(set.intersection(*(set(seeds) for seeds in arms.values())))
            if common and common == list(range(len(common))):
                rows = [[arms[arm][seed] for seed in common] for arm in sorted(arms)]
                made.setdefault(group, {})[family] = np.array(rows, dtype=np.float64)
    return made


def differences(known: Table, one: str, other: str, family: str) -> np.ndarray | None:
    """``(P, S, T)``: rewards of ``one`` minus ``other`` on the same hosts; of policies, each against its own number."""
    if family not in known.get(one, {}) or family not in known.get(other, {}):
        return None
    a, b = known[one][family][..., 0], known[other][family][..., 0]
    seeds, tasks = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    a, b = (np.clip(values[:, :seeds, :tasks], -MOST, MOST) for values in (a, b))
    if len(a) > 1 and len(b) > 1 and len(a) != len(b):
        num = min(len(a), len(b))
        a, b = a[:num], b[:num]
    return a - b


def iqm(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of each row."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def mean(values: np.ndarray) -> np.ndarray:
    """Of each row."""
    return values.mean(-1)


def drawn_again(parts: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The statistic (of each row) of all parts together under the bootstrap; every part draws tasks and seeds for
    itself, policies alike."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(parts[0]), size=(DRAWS, len(parts[0])))
    some: list[np.ndarray] = []
    for part in parts:
        num, seeds, tasks = part.shape
        policy = (chosen % num)[:, :, None, None]
        task = rng.integers(tasks, size=(DRAWS, 1, 1, tasks))
        seed = rng.integers(seeds, size=(DRAWS, 1, seeds, tasks))
        some.append(part[policy, seed, task].reshape(DRAWS, -1))
    return statistic(np.concatenate(some, axis=1))


def interval(parts: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Value, 95% interval, and the share of draws at or below zero."""
    draws = drawn_again(parts, statistic)
    low, high = np.quantile(draws, (0.025, 0.975))
    value = float(statistic(np.concatenate([part.ravel() for part in parts])))
    return {
        "value": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3),
        "p": round(float((1 + (draws <= 0).sum()) / (1 + DRAWS)), 4),
    }  # fmt: skip


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values."""
    found: dict[str, float] = {}
    most = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        most = max(most, min(1.0, (len(p) - rank) * p[name]))
        found[name] = round(most, 4)
    return found


def against(known: Table, one: str, others: list[str]) -> dict[str, Any]:
    """One arm against others: over all families of fully connected hosts that both have (``overall``), over the short
    and the longer ones of them, over hosts of other kinds, and family by family."""
    found: dict[str, Any] = {}
    for other in others:
        parts = {f: differences(known, one, other, f) for f in known.get(one, {})}
        there = {family: part for family, part in parts.items() if part is not None}
        if not there or other == one:
            continue
        groups = {g: [part for f, part in there.items() if group_of(f) == g] for g in (*GROUPS, OTHER_KINDS)}
        connected = [part for group in GROUPS for part in groups[group]]
        if not connected:
            continue
        found[other] = {
            "overall": interval(connected, iqm),
            "num_families": len(connected),
            **{group: interval(some, iqm) for group, some in groups.items() if some},
            "families": {f: interval([part], mean) for f, part in there.items()},
        }
    adjusted = holm({name: entry["overall"]["p"] for name, entry in found.items()})
    for name, value in adjusted.items():
        found[name]["overall"]["p_holm"] = value
    return found


def arms(known: Table) -> dict[str, Any]:
    """Every arm's means by family."""
    found: dict[str, Any] = {}
    for group, families in known.items():
        found[group] = {}
        for family, values in families.items():
            rewards = np.clip(values[..., 0], -MOST, MOST)
            by_task = rewards.mean((0, 1))
            error = float(by_task.std(ddof=1)) / math.sqrt(len(by_task)) if len(by_task) > 1 else math.nan
            found[group][family] = {
                "reward": round(float(rewards.mean()), 3), "standard_error": round(error, 3),
                "iqm": round(float(iqm(rewards.ravel())), 3), "policies": len(values), "seeds": values.shape[1],
                "tasks": values.shape[2],
                **{
                    name: round(float(values[..., COLUMNS.index(name)].mean()), 3)
                    for name in ("asked", "kept", "fallback")
                },
                "mflop": round(float(values[..., 2].mean()) / 1e6, 2),
                "by_policy": [round(float(value), 3) for value in rewards.mean((1, 2))],
            }  # fmt: skip
    return found


def win(found: dict[str, Any], subject: str = "policy") -> dict[str, Any]:
    """The test of a win, from one arm's differences: above all controls; no family worse by half a deviation.

    A control that was not played is named: without it nothing is won.
    """
    every = [name for name in (*CONTROLS, "time-only", "replay", "shuffled") if name != subject]
    needed = [name for name in every if name in found]
    not_above = [name for name in needed if not found[name]["overall"]["low"] > 0]
    worse = [
        f"{family} against {name}: {entry['value']:+.2f}"
        for name in needed
        for family, entry in found[name]["families"].items()
        if entry["value"] < -0.5
    ]
    not_played = [name for name in every if name not in found]
    return {"above_all": not not_above, "not_above": not_above, "worse_by_half": worse, "not_played": not_played}


def summary(cells: dict[str, Any], seconds: dict[str, float], plan_path: Path) -> dict[str, Any]:
    """Everything of a contest that is worth keeping."""
    found: dict[str, Any] = {
        "command": "python -m benchmarks.controller.compare --work runs/contest --out "
        "benchmarks/results/controller_contest.json",
        "cpu_s": _costs(seconds),
    }
    if plan_path.exists():
        found["plan"] = json.loads(plan_path.read_text(encoding="utf-8"))
    found["training"] = {
        name: {key: value[key] for key in ("updates", "planned", "episodes", "begun", "lines")}
        for name, value in cells.items()
        if name.startswith("train/")
    }
    for mode in ("stack", "real"):
        known = table(cells, mode)
        if not known:
            continue
        chosen = [name for name in ("policy", "karn-policy", "heuristic", "even", "bandit", *ADVISED) if name in known]
        found[mode] = {
            "arms": arms(known),
            "differences": {
                name: against(known, name, [arm for arm in known if arm != name] if name in SUBJECTS else FEW)
                for name in chosen
            },
        }  # fmt: skip
        for subject in SUBJECTS:
            if subject in known:
                found[mode].setdefault("win", {})[subject] = win(found[mode]["differences"][subject], subject)
    reports = [report for name, value in cells.items() if name.startswith("gather/") for report in value]
    found["reports"] = len(reports)
    return found


def _costs(seconds: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in seconds.items():
        stage = name.split("/")[0]
        found[stage] = round(found.get(stage, 0.0) + value, 1)
    return found
