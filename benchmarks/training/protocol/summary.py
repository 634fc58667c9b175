"""The result of a task: the only place that opens sealed test scores, and only those of chosen rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.training.protocol.arms import GROWN
from benchmarks.training.protocol.cells import CellStore, Record
from benchmarks.training.protocol.plan import Plan

from esper.runs import statistics
from esper.runs.arms import Cell, Trained
from esper.runs.options import RunOptions


def summarise(plan: Plan, store: CellStore) -> dict[str, Any]:
    """Plain JSON: arms of which every seed is there (means, 95% Student intervals, learning-rate trials), paired
    differences grown minus each, what everything cost, and the list of cells. Arms that are not complete are named in
    ``incomplete``; means over a diverged training are ``None``."""
    complete = {name: plan.complete(name) for name in plan.arms}
    finished = {name: records for name, records in complete.items() if records}
    records = [plan.records[cell] for cell in sorted(plan.records, key=lambda c: (c.arm, c.seed, c.lr))]
    summary: dict[str, Any] = {
        "task": plan.task.name,
        "title": plan.task.title,
        "score_name": plan.score_name,
        "code": plan.code,
        "size": plan.source.size,
        "steps": plan.steps,
        "settings": list(plan.settings),
        "seeds": plan.seeds,
        "environments": _distinct([dict(record.environment) for record in records]),
        "incomplete": [name for name in plan.arms if name not in finished],
    }
    if GROWN in finished:
        scored = {name: [_scored(record, store) for record in finished[name]] for name in finished}
        trials = {name: {lr: o.held_out for lr, o in plan.trials(name).items()} for name in finished}
        summary |= statistics.summarise(scored, trials)
        for name, arm in summary["arms"].items():
            arm["title"] = plan.arms[name].title
            arm["diverged_seeds"] = [r.cell.seed for r in finished[name] if not math.isfinite(r.outcome.held_out)]
            arm["search"] = _cost(list(plan.trials(name).values()))
        summary["judged_per_seed"] = [list(record.outcome.judged) for record in finished[GROWN]]
    summary["cost"] = _cost([record.outcome for record in records])
    scored_cells = {record.cell for found in finished.values() for record in found}
    summary["cells"] = [_listed(record, scored=record.cell in scored_cells) for record in records]
    return _finite(summary)


def _scored(record: Record, store: CellStore) -> Trained:
    outcome, cell = record.outcome, record.cell
    score, loss = store.unseal(cell)
    return Trained(
        cell=Cell(
            arm=cell.arm, seed=cell.seed, lr=cell.lr, steps=cell.steps, widths=outcome.widths,
            options=RunOptions(settings=cell.settings), device="", size=cell.size,
        ),
        held_out=outcome.held_out, params=outcome.params, flops=outcome.flops, seconds=outcome.seconds,
        widths=outcome.widths, flops_parts=dict(outcome.flops_parts), cohorts=dict(outcome.cohorts),
        stopped=outcome.stopped, score=score, loss=loss,
    )  # fmt: skip


def _listed(record: Record, *, scored: bool) -> dict[str, Any]:
    cell, outcome = record.cell, record.outcome
    return {
        "name": cell.name, "arm": cell.arm, "seed": cell.seed, "lr": cell.lr,
        "scored": scored, "held_out": outcome.held_out,
        "flops": outcome.flops, "params": outcome.params, "seconds": outcome.seconds,
        "widths": list(outcome.widths),
    }  # fmt: skip


def _cost(outcomes: Sequence[Any]) -> dict[str, float]:
    return {
        "trainings": len(outcomes),
        "flops": sum(outcome.flops for outcome in outcomes),
        "seconds": sum(outcome.seconds for outcome in outcomes),
    }


def _distinct(values: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
