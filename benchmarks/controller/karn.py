"""Are Karn's proposals worth more the more it has seen? Small hosts of `esper trials` under the heuristic controller.

    python benchmarks/controller/karn.py --out benchmarks/results/karn.json

First a number of hosts grow with what is drawn evenly from Karn's candidates; their reports are Karn's experience.
Then hosts that are not among them grow once by each arm: without Karn, with even draws, and with proposals after so
many reports. All arms of a host share its weights, data, batches and learning rates. Finished trainings are kept in the
folder of --work, and the same command goes on from there. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from esper.grower import Grower
from esper.karn import AdvisedController, Architect, Collector, Database, FieldReport, Snapshot
from esper.karn.experience import rows
from esper.runs.advice import breed_into
from esper.runs.trials.training import STEPS, Setup, audit_losses, take_step, trial_config
from esper.tamiyo import BanditController, Controller, make_controller

FIRST_EVALUATED = 1_000_000
"""Number of the first host that is evaluated on; those that experience comes from count from 0."""


class Trial(msgspec.Struct, kw_only=True):
    """One training."""

    arm: str
    number: int
    task: str
    reports: list[FieldReport]
    audit_loss: float
    params: int
    flops: float
    seconds: float


def grow(number: int, arm: str, controller: Callable[[Any, int], Controller | None]) -> Trial:
    """Train host ``number`` with a controller of its own."""
    started = time.perf_counter()
    setup = Setup.of(number)
    config = trial_config(number, twins=False)
    collector = Collector(f"{arm}-{number}", job=setup.task.name)
    model = setup.host()
    optimizer = setup.recipe.build(model)
    grower = Grower(
        model, optimizer, loss=setup.task.loss, evaluate=setup.task.gate, config=config,
        controller=controller(config, number), on_event=collector.on_event,
    )  # fmt: skip
    choose = setup.batches.clone_state()
    for step in range(STEPS):
        batch = setup.task.batch(choose)
        grower.step(take_step(setup, model, optimizer, batch, step), batch=batch)
    grower.finish()
    losses = audit_losses(setup.task, model)
    return Trial(
        arm=arm, number=number, task=setup.task.name, reports=collector.reports(),
        audit_loss=sum(losses) / len(losses), params=grower.kasmina.params, flops=grower.ledger.total,
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


class Kept:
    """Finished trainings, one a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = path.read_bytes().splitlines() if path.exists() else []
        self._known = {(t.arm, t.number): t for t in (msgspec.json.decode(line, type=Trial) for line in lines)}

    def get(self, number: int, arm: str, controller: Callable[[Any, int], Controller | None]) -> Trial:
        if (arm, number) not in self._known:
            trial = grow(number, arm, controller)
            with self._path.open("ab") as stream:
                stream.write(msgspec.json.encode(trial) + b"\n")
            self._known[arm, number] = trial
            print(f"{arm} {number} {trial.task}: {len(trial.reports)} cohorts, {trial.seconds} s", flush=True)
        return self._known[arm, number]


def advised(snapshot: Snapshot, **how: Any) -> Callable[[Any, int], Controller]:
    architect = Architect(snapshot, **how)

    def make(config: Any, number: int) -> Controller:
        inner = make_controller("heuristic", config.tamiyo, seed=config.seed)
        return AdvisedController(inner, architect, seed=number)

    return make


def bandit(reports: Sequence[FieldReport]) -> Callable[[Any, int], Controller]:
    def make(config: Any, number: int) -> Controller:
        controller = BanditController(config.tamiyo, seed=number)
        controller.learn(*rows(reports))
        return controller

    return make


def gather(kept: Kept, num_reports: int) -> list[FieldReport]:
    """Experience: reports that say something, in the order of the hosts."""
    reports: list[FieldReport] = []
    number = 0
    while len(reports) < num_reports:
        trial = kept.get(number, "gather", advised(Snapshot(), uniform=True))
        reports += [report for report in trial.reports if report.targets is not None]
        number += 1
    return reports[:num_reports]


def with_bred(reports: Sequence[FieldReport], folder: Path, num: int) -> Snapshot:
    """A snapshot with new designs made from these reports."""
    path = folder / f"bred-{len(reports)}.db"
    with Database(path) as database:
        database.file(reports)
        if num and not any(d.operator not in ("observed", "menu") for d in database.designs()):
            breed_into(database, num, seed=0)
        return Snapshot.of(database)


def interval(values: Sequence[float], *, draws: int = 2000) -> list[float]:
    """Mean and 95% interval by the bootstrap over hosts."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not known.size:
        return [math.nan] * 3
    rng = np.random.default_rng(0)
    means = known[rng.integers(known.size, size=(draws, known.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return [round(float(v), 5) for v in (known.mean(), low, high)]


def ratio(trials: Sequence[Trial], top: Callable[[FieldReport], float], *, draws: int = 2000) -> list[float]:
    """Mean over cohorts and its 95% interval, whole hosts drawn anew."""
    told = [[top(r) for r in trial.reports if r.targets is not None] for trial in trials]
    sums, counts = np.array([sum(t) for t in told]), np.array([len(t) for t in told])
    index = np.random.default_rng(0).integers(len(told), size=(draws, len(told)))
    means = sums[index].sum(1) / np.maximum(1, counts[index].sum(1))
    low, high = np.quantile(means, (0.025, 0.975))
    return [round(float(v), 5) for v in (sums.sum() / max(1, counts.sum()), low, high)]


def summary(arms: dict[str, list[Trial]], base: str) -> dict[str, Any]:
    """By arm, and paired against ``base``."""
    rows: dict[str, Any] = {}
    for arm, trials in arms.items():
        pairs = list(zip(trials, arms[base], strict=True))
        gain = [sum(r.targets[1] for r in t.reports if r.targets) for t in trials]
        other = [sum(r.targets[1] for r in t.reports if r.targets) for _, t in pairs]
        generated = [p for t in trials for r in t.reports for p in r.placements if r.kept]
        rows[arm] = {
            "hosts": len(trials), "cohorts": sum(len([r for r in t.reports if r.targets]) for t in trials),
            "acceptance": ratio(trials, lambda r: r.targets[2]), "gain_per_cost": ratio(trials, lambda r: r.targets[0]),
            "gain_per_host": interval(gain), "log_params": interval([math.log(t.params) for t in trials]),
            "paired_log_audit_loss": interval([math.log(t.audit_loss / o.audit_loss) for t, o in pairs]),
            "paired_log_flops": interval([math.log(t.flops / o.flops) for t, o in pairs]),
            "paired_gain_per_host": interval([a - b for a, b in zip(gain, other, strict=True)]),
            "paired_acceptance": interval([_rate(t, 2) - _rate(o, 2) for t, o in pairs]),
            "paired_gain_per_cost": interval([_rate(t, 0) - _rate(o, 0) for t, o in pairs]),
            "kept_placements": len(generated), "seconds": round(sum(t.seconds for t in trials), 1),
        }  # fmt: skip
    return rows


def _rate(trial: Trial, column: int) -> float:
    told = [r.targets[column] for r in trial.reports if r.targets is not None]
    return sum(told) / len(told) if told else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/karn-benchmark"))
    parser.add_argument("--reports", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--hosts", type=int, default=28)
    parser.add_argument("--bred", type=int, default=24, help="designs bred from the largest experience")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms, uniform among them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    kept = Kept(args.work / "trials.jsonl")
    reports = gather(kept, max(args.reports))
    makers: dict[str, Callable[[Any, int], Controller | None]] = {
        "heuristic": lambda config, number: None, "uniform": advised(Snapshot(), uniform=True),
    }  # fmt: skip
    for num in args.reports:
        for how in ("hybrid", "efficiency"):
            makers[f"karn-{num}-{how}"] = advised(Snapshot(reports=tuple(reports[:num])), strategy=how)
    if args.bred:
        snapshot = with_bred(reports, args.work, args.bred)
        makers[f"karn-{max(args.reports)}-hybrid-bred"] = advised(snapshot)
    makers["bandit"] = bandit(())
    makers[f"bandit-{max(args.reports)}"] = bandit(reports)
    makers = {name: make for name, make in makers.items() if not args.only or name in args.only}
    numbers = range(FIRST_EVALUATED, FIRST_EVALUATED + args.hosts)
    arms: dict[str, list[Trial]] = {name: [] for name in makers}
    for number in numbers:  # host by host, so that what is finished is paired
        for name, make in makers.items():
            arms[name].append(kept.get(number, name, make))
    result = {
        "command": f"python benchmarks/controller/karn.py --reports {' '.join(map(str, args.reports))} --hosts "
        f"{args.hosts} --bred {args.bred}" + (f" --only {' '.join(args.only)}" if args.only else ""),
        "gathered": {"reports": len(reports), "kept": sum(r.kept for r in reports)},
        "by_arm": summary(arms, "uniform"),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
