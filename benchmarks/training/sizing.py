"""Right-sizing: one growing run against a sweep over five widths, both with the same grid of learning rates.

    python benchmarks/training/sizing.py mnist1d --data FOLDER --out benchmarks/results/sizing_mnist1d.json

The sweep trains the task's network at 1, 2, 4, 8 and 16 times its starting inner widths, every width at every rate of
the grid (extended until the best is bracketed), on the first seed, and takes the width with the lowest held-out loss.
Growing searches its rate over the same grid. What either search cost, all of it, stands beside what it found; the
chosen networks are then trained with the other seeds, paired, and scored once on the test split.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.protocol.arms import ARMS, GROWN, Arm, Given, Result, register_arm, train_esper
from benchmarks.training.protocol.cells import Cell, CellStore, Record
from benchmarks.training.protocol.command import arguments_of, ends, shown, source_of
from benchmarks.training.protocol.plan import Plan
from benchmarks.training.protocol.runner import run
from benchmarks.training.protocol.summary import summarise
from benchmarks.training.protocol.task import TASKS, load_all

from esper.runs.preset import Preset

MULTIPLES = (1, 2, 4, 8, 16)


def train_multiple(preset: Preset, cell: Cell, given: Given, *, multiple: int) -> Result:
    """A static network of ``multiple`` times the starting inner widths."""
    return train_esper(preset, cell, {"widths": [multiple * width for width in preset.small_widths]})


def width_arm(multiple: int) -> str:
    """Name of the arm of one width; registered at the first call."""
    name = f"static_x{multiple}"
    if name not in ARMS:
        train = functools.partial(train_multiple, multiple=multiple)
        register_arm(Arm(name=name, title=f"fixed, {multiple} times the width", train=train, priority=6))
    return name


def compared(summary: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What each search found and what it cost."""
    best = {name: min(outcome.rank for outcome in plan.trials(name).values()) for name in plan.arms}
    widths = {name: arm for name, arm in summary["arms"].items() if name != GROWN}
    chosen = min(widths, key=lambda name: best[name])
    sweep = {key: sum(arm["search"][key] for arm in widths.values()) for key in ("trainings", "flops", "seconds")}
    grown, fixed = summary["arms"][GROWN], widths[chosen]
    return {
        "chosen": chosen,
        "params": {"grown": grown["params"], "sweep": fixed["params"]},
        "score": {"grown": grown["score"], "sweep": fixed["score"]},
        "grown_minus_sweep": summary["grown_minus"][chosen],
        "search": {"grown": grown["search"], "sweep": sweep},
        "search_flops_ratio": grown["search"]["flops"] / sweep["flops"],
        "search_trainings_ratio": grown["search"]["trainings"] / sweep["trainings"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    load_all()
    options = arguments_of(__doc__, argv, None)
    plan = Plan(
        TASKS[options.task], seeds=range(options.first_seed, options.first_seed + options.seeds),
        source=source_of(options), code=options.code,
        arms=[GROWN, *map(width_arm, MULTIPLES)], lrs=options.lr, steps=options.steps,
        settings=tuple(options.settings),
    )  # fmt: skip
    store = CellStore(options.cells or options.out.with_suffix(".cells"))

    def note(record: Record) -> None:
        cell, outcome = record.cell, record.outcome
        spent = time.monotonic() - started
        print(
            f"{spent:6.0f} s  {cell.arm} seed {cell.seed} lr {cell.lr:g}: held-out {outcome.held_out:.4f}", flush=True
        )

    run(plan, store, workers=options.workers, deadline=ends(options, started), note=note)
    summary = summarise(plan, store)
    if summary["incomplete"]:
        sys.exit(f"not complete: {', '.join(summary['incomplete'])}; the same command goes on from here")
    found = compared(summary, plan)
    # "arms" would make it a task's comparison of arms
    kept = {"title": summary["title"], "score_name": summary["score_name"], "seeds": summary["seeds"],
            "code": summary["code"], "environments": summary["environments"], "widths": summary["arms"]}  # fmt: skip
    result = {"task": options.task, **kept, "sizing": found}
    result["command"] = shown(sys.argv if argv is None else ["", *argv], f"sizing_{options.task}", "sizing")
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
