"""The bars that growing has to reach, each with what was measured and whether that reaches it: the first table of
docs/results.md. Read by ``generate_results.py``; what no file in benchmarks/results tells is *not measured*."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esper.runs.statistics import interval

Results = dict[str, dict[str, Any]]
Row = tuple[str, str, str]
"""Bar, what was measured, whether it is met."""
NOT_YET = "not measured"
YES, NO = "yes", "**no**"
TASKS = {
    "code_lm": "code-lm",
    "tinyshakespeare": "tinyshakespeare",
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "mnist1d": "MNIST-1D",
    "teacher_student": "teacher-student",
    "teacher_student_constant": "teacher-student, constant rate",
    "uci_kin8nm": "kin8nm",
    "digits_arms": "digits",
}
PEERS = {"gromo_tiny_equal_flops": "TINY", "gromo_gradmax_equal_flops": "GradMax"}
QUALITY_SHARE, QUALITY_TASKS = 0.75, 3
POINT = 0.001
"""A tenth of a point of accuracy."""
SIZES = ("mnist1d", "teacher_student", "digits_arms", "uci_kin8nm")
HARM_COHORTS, NULL_COHORTS, NULL_SHARE = 200, 1_000, 0.01
SEEDS, DECISION_MS = 1_000_000, 50.0


def table(results: Results, folder: Path) -> str:
    rows = [_never_below(results), _above_peers(results), _quality_for_less(results)]
    rows += [_as_good_as_its_twin(results, task) for task in ("cifar10", "fashion_mnist")]
    rows += [_right_size(folder, task) for task in SIZES]
    rows += [*_harm(folder), _nulls(folder), _decision(folder)]
    lines = [f"| {bar} | {measured} | {met} |" for bar, measured, met in rows]
    return "\n".join(["| bar | measured | met |", "|---|---|---|", *lines])


def _never_below(results: Results) -> Row:
    """No task on which the interval of grown minus same FLOPs lies below zero."""
    found = {task: difference for task in TASKS if (difference := _minus(results, task, "static_equal_flops"))}
    below = [task for task, (_, _, high) in found.items() if high < 0]
    missing = [name for task, name in TASKS.items() if task not in found]
    said = f"below on {len(below)} of {len(found)} tasks{_named(below)}; worst: {_worst(found)}" if found else ""
    met = NO if below else YES if not missing else f"so far; {NOT_YET}: {', '.join(missing)}"
    return (
        "never below a fixed shape of the same FLOPs, beyond the interval, on any task",
        said,
        met if found else NOT_YET,
    )


def _worst(found: dict[str, tuple[float, float, float]]) -> str:
    task = min(found, key=lambda task: found[task][2])
    return f"{TASKS[task]} {_said(found[task])}"


def _above_peers(results: Results) -> Row:
    """Tasks on which grown is above both of gromo's methods at equal FLOPs, beyond the intervals."""
    above: list[str] = []
    level: list[str] = []
    below: list[str] = []
    for task in TASKS:
        against = [difference for peer in PEERS if (difference := _minus(results, task, peer))]
        if len(against) < len(PEERS):
            continue
        if all(low > 0 for _, low, _ in against):
            above.append(task)
        elif any(high < 0 for _, _, high in against):
            below.append(task)
        else:
            level.append(task)
    total = len(above) + len(level) + len(below)
    peers = " and ".join(PEERS.values())
    bar = f"above {peers} (gromo) at equal FLOPs, beyond the interval, on most tasks where they run"
    if not total:
        return bar, "", NOT_YET
    said = f"above on {len(above)} of {total}{_named(above)}, level on {len(level)}{_named(level)}, "
    return bar, f"{said}below one of them on {len(below)}{_named(below)}", YES if 2 * len(above) > total else NO


def _quality_for_less(results: Results) -> Row:
    """Tasks on which a grown network of at most 75% of the final shape's FLOPs is not below it beyond the interval."""
    reached: list[str] = []
    lines: list[str] = []
    for task, name in TASKS.items():
        pairs = [pair for found in _of(results, task) for pair in _cheap(found.get("arms", {}))]
        if not pairs:
            continue
        best, final = max(pairs, key=lambda pair: pair[0]["score"] - pair[1]["score"])
        difference = _paired(best["score_per_seed"], final["score_per_seed"])
        if difference[2] >= 0:
            reached.append(task)
        lines.append(f"{name} {_said(difference)} at {best['flops'] / final['flops']:.0%}")
    bar = f"the final shape's quality at {QUALITY_SHARE:.0%} of its FLOPs or less on {QUALITY_TASKS} tasks "
    bar += "(not below it beyond the interval)"
    said = f"on {len(reached)} of {len(lines)}{_named(reached)}: {'; '.join(lines)}"
    return (bar, said, YES if len(reached) >= QUALITY_TASKS else NO) if lines else (bar, "", NOT_YET)


def _cheap(arms: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Grown arms that cost little enough, each with the final shape."""
    final = arms.get("static_final")
    if final is None or final["score"] is None:
        return []
    grown = [arms[arm] for arm in ("grown", "grown_short") if arm in arms and arms[arm]["score"] is not None]
    return [(arm, final) for arm in grown if arm["flops"] <= (QUALITY_SHARE + 0.005) * final["flops"]]


def _of(results: Results, task: str) -> list[dict[str, Any]]:
    """What was measured on a task: its own file, and beside it one that has more arms on fewer seeds."""
    return [results[name] for name in (task, f"{task}_arms") if name in results]


def _as_good_as_its_twin(results: Results, task: str) -> Row:
    bar = f"{TASKS[task]}: the exported network at most 0.1 point below its never-grown twin, interval included"
    twin, final = _minus(results, task, "static_small"), _minus(results, task, "static_final")
    if twin is None or final is None:
        return bar, "", NOT_YET
    said = f"{_said(twin)} (accuracy) against the same training that never grows; "
    said += f"{_said(final)} against the final shape"
    return bar, said, YES if twin[1] >= -POINT else NO


def _right_size(folder: Path, task: str) -> Row:
    bar = f"{TASKS[task]}: one growing run finds a size as good as a sweep over five widths does, for less"
    result = _read(folder, f"sizing_{task}")
    if result is None:
        return bar, "", NOT_YET
    found = result["sizing"]
    contrast = found["grown_minus_sweep"]
    low, high = contrast["score_interval"]
    cost = found["search_flops_ratio"]
    said = f"{_said((contrast['score'], low, high))} at {cost:.2f} of the search's FLOPs, "
    said += f"{found['params']['grown']:,} parameters against {found['params']['sweep']:,}"
    return bar, said, YES if high >= 0 and cost < 1 else NO


def _harm(folder: Path) -> list[Row]:
    result = _read(folder, "harm")
    rows: list[Row] = []
    for source, name in (("on_off", "against the network without it"), ("twin", "against a twin trained without it")):
        bar = f"of {HARM_COHORTS} kept cohorts none raises the loss by over 1%, {name}"
        if result is None:
            rows.append((bar, "", NOT_YET))
            continue
        found = result[source]["all"]
        said = f"{found['harmful']} of {found['accepted']}; at most {found['harmful_rate_upper']:.1%} (one-sided 95%)"
        rows.append((bar, said, YES if not found["harmful"] and found["accepted"] >= HARM_COHORTS else NO))
    return rows


def _nulls(folder: Path) -> Row:
    bar = f"of {NULL_COHORTS:,} worthless cohorts at most {NULL_SHARE:.0%} are kept"
    result = _read(folder, "nulls")
    if result is None:
        return bar, "", NOT_YET
    found = result["controls"]["projected"]["all_nulls"]
    said = f"{found['accepted']} of {found['judged']:,}; at most {found['accepted_rate_upper']:.1%} (one-sided 95%)"
    enough = found["judged"] >= NULL_COHORTS
    return bar, said, YES if enough and found["accepted"] <= NULL_SHARE * found["judged"] else NO


def _decision(folder: Path) -> Row:
    bar = f"a decision over a million seeds takes less than {DECISION_MS:.0f} ms on a CPU"
    result = _read(folder, "decision")
    if result is None:
        return bar, "", NOT_YET
    found = result["milliseconds"]["dormant"]
    said = f"{found['median']:.0f} ms (at most {found['most']:.0f}) over {result['seeds']:,} seeds"
    return bar, said, YES if result["seeds"] >= SEEDS and found["median"] < DECISION_MS else NO


def _minus(results: Results, task: str, arm: str) -> tuple[float, float, float] | None:
    """Grown minus an arm: mean and interval; ``None`` where it is not measured, or diverged."""
    tables = [found.get("grown_minus", {}) for found in _of(results, task)]
    contrast = next((found[arm] for found in tables if arm in found), None)
    if contrast is None or None in (contrast["score"], *contrast["score_interval"]):
        return None
    return contrast["score"], *contrast["score_interval"]


def _paired(mine: list[float], theirs: list[float]) -> tuple[float, float, float]:
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    low, high = interval(differences)
    mean = sum(differences) / len(differences)
    return mean, mean if low is None else low, mean if high is None else high


def _said(difference: tuple[float, float, float]) -> str:
    mean, low, high = difference
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _named(tasks: list[str]) -> str:
    return f" ({', '.join(TASKS[task] for task in tasks)})" if tasks else ""


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
