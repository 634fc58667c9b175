"""Variants of growing on one task, compared with the first of them: every variant at its own best learning rate."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.training.protocol.arms import GROWN, Arm, register_arm
from benchmarks.training.protocol.cells import CellStore, Record
from benchmarks.training.protocol.command import arguments_of, ends, shown, source_of
from benchmarks.training.protocol.plan import Plan
from benchmarks.training.protocol.runner import run
from benchmarks.training.protocol.task import TASKS, load_all

from esper.config import Config
from esper.runs.statistics import interval

Settings = tuple[str, ...]
SURE_T = 2.0
"""t statistic from which a fit counts as sure of its gain."""


class Variants:
    """``changes``: settings by label, the first of which is what the others are compared with. ``changed_code``: arms
    by label, trained with the first variant's settings."""

    def __init__(
        self, options: argparse.Namespace, changes_of: Callable[[Config], dict[str, Settings]], code: Mapping[str, Arm]
    ) -> None:
        self.task, source = TASKS[options.task], source_of(options)
        preset = self.task.preset(source)
        self.changes = changes_of(preset.config(options.steps or preset.steps))
        self.base = next(iter(self.changes))
        shared: dict[str, Any] = {
            "seeds": range(options.first_seed, options.first_seed + options.seeds), "source": source,
            "code": options.code, "lrs": options.lr, "steps": options.steps,
        }  # fmt: skip
        self.arms = dict.fromkeys(self.changes, GROWN) | {label: register_arm(arm).name for label, arm in code.items()}
        self.plans = {
            label: Plan(
                self.task, arms=[arm],
                settings=(*options.settings, *self.changes.get(label, self.changes[self.base])), **shared,
            )
            for label, arm in self.arms.items()
        }  # fmt: skip

    def line(self, label: str) -> dict[str, Any] | None:
        """How a variant compares; ``None`` until all of its seeds, and the first variant's, are there."""
        base, mine = self.plans[self.base].complete(GROWN), self.plans[label].complete(self.arms[label])
        if base is None or mine is None:
            return None
        return {"settings": list(self.changes.get(label, ()))} | compared(mine, base)

    def report(self) -> dict[str, Any]:
        """Plain JSON: a line a complete variant, and the names of the others."""
        lines = {label: line for label in self.plans if (line := self.line(label)) is not None}
        records = self.plans[self.base].records.values()
        return {
            "task": self.task.name, "title": self.task.title, "base": self.base, "steps": self.plans[self.base].steps,
            "environment": dict(next(iter(records)).environment) if records else {},
            "variants": lines, "missing": [label for label in self.plans if label not in lines],
        }  # fmt: skip


def compared(records: list[Record], base: list[Record]) -> dict[str, Any]:
    """One variant's line: means over seeds, and paired differences from the first variant."""
    held = [record.outcome.held_out for record in records]
    differences = [mine - theirs.outcome.held_out for mine, theirs in zip(held, base, strict=True)]
    flops = sum(record.outcome.flops for record in records)
    cohorts = [record.outcome.cohorts for record in records]
    finite = all(math.isfinite(difference) for difference in differences)
    return {
        "lr": records[0].cell.lr, "held_out": [loss if math.isfinite(loss) else None for loss in held],
        "minus_shipped": mean(differences) if finite else None,
        "minus_shipped_interval": interval(differences) if finite else [None, None],
        "flops_ratio": flops / sum(record.outcome.flops for record in base),
        "germinated": sum(each["germinated"] for each in cohorts), "accepted": sum(e["accepted"] for e in cohorts),
        "fits": fits([fit for record in records for fit in record.outcome.fitted]),
    }  # fmt: skip


def fits(fitted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the isolated trainings that have a target: how many, what share of it they explain on other batches in the
    mean, and how many are sure of that."""
    known = [fit for fit in fitted if fit["explained"] is not None and math.isfinite(fit["explained"])]
    sure = sum(fit["t_statistic"] is not None and fit["t_statistic"] >= SURE_T for fit in known)
    return {"num": len(known), "explained": mean([fit["explained"] for fit in known]), "sure": sure}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def compare(
    argv: Sequence[str] | None,
    described: str | None,
    changes_of: Callable[[Config], dict[str, Settings]],
    code: Mapping[str, Arm],
    kind: str,
) -> None:
    """The command line of a comparison. All variants are trained side by side, and the result is written at the end or
    at the deadline, with what is complete by then."""
    started = time.monotonic()
    load_all()
    options = arguments_of(described, argv, None)
    variants, told = Variants(options, changes_of, code), set[str]()

    def tell(record: Record) -> None:
        for label in variants.plans:
            line = None if label in told else variants.line(label)
            if line is not None:
                told.add(label)
                print(f"{time.monotonic() - started:5.0f} s  {label:52s} {_said(line)}", flush=True)

    store = CellStore(options.cells or options.out.with_suffix(".cells"))
    plans = list(variants.plans.values())
    run(plans, store, workers=options.workers, deadline=ends(options, started), note=tell)
    report = variants.report() | {
        "seeds": options.seeds, "code": options.code,
        "command": shown(sys.argv if argv is None else ["", *argv], f"{kind}_{options.task}", kind),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if report["missing"]:
        print(f"not complete: {', '.join(report['missing'])}; the same command goes on from here")


def _said(line: Mapping[str, Any]) -> str:
    difference = "diverged" if line["minus_shipped"] is None else f"{line['minus_shipped']:+.4f}"
    return (
        f"{difference} {line['minus_shipped_interval']}, {line['flops_ratio']:.2f} FLOPs, "
        f"{line['accepted']} of {line['germinated']} kept, lr {line['lr']:g}"
    )
