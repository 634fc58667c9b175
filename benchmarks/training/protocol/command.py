"""The command line of a benchmark: train what is missing, write the summary."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.training.protocol.arms import ARMS
from benchmarks.training.protocol.cells import CellStore, Record
from benchmarks.training.protocol.plan import Plan
from benchmarks.training.protocol.runner import run
from benchmarks.training.protocol.summary import summarise
from benchmarks.training.protocol.task import TASKS, Source, device_of, load_all


def arguments_of(description: str | None, argv: Sequence[str] | None, task: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if task is None:
        parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--size", default="gpu" if task else "cpu", choices=("cpu", "gpu"))
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds an arm")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps a training (default: the task's)")
    parser.add_argument(
        "--lr", type=float, action="append", default=[], help="a rate of the grid (default: the task's)"
    )
    parser.add_argument("--arm", action="append", default=[], choices=sorted(ARMS), help="only these (and grown)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0 trains in this one")
    parser.add_argument(
        "--sum-up", action="store_true", help="train nothing, write the summary of what is finished (needs no GPU)"
    )
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which unfinished trainings are left")
    parser.add_argument(
        "--cells", "--cache", type=Path, help="folder of finished trainings, one JSON each (default: OUT with .cells)"
    )
    parser.add_argument("--code", default="unnamed", help="version of the code; other versions' cells are not used")
    parser.add_argument("--out", type=Path, required=True, help="where to write the summary (JSON)")
    return parser.parse_args(argv)


def source_of(options: argparse.Namespace) -> Source:
    device = "cpu" if options.sum_up else device_of(options.size)
    return Source(device=device, size=options.size, data=options.data)


def ends(options: argparse.Namespace, started: float) -> float:
    """The moment (:func:`time.monotonic`) at which training ends."""
    return started + (0 if options.sum_up else options.deadline)


def command(description: str | None, argv: Sequence[str] | None = None, *, task: str | None = None) -> None:
    """Train the missing cells of a task and write its summary, also after a deadline that leaves some out."""
    started = time.monotonic()
    load_all()
    options = arguments_of(description, argv, task)
    plan = Plan(
        TASKS[task or options.task],
        seeds=range(options.first_seed, options.first_seed + options.seeds),
        source=source_of(options),
        code=options.code, arms=options.arm, lrs=options.lr, steps=options.steps, settings=tuple(options.settings),
    )  # fmt: skip
    store = CellStore(options.cells or options.out.with_suffix(".cells"))

    def note(record: Record) -> None:
        cell, outcome = record.cell, record.outcome
        print(
            f"{time.monotonic() - started:6.0f} s  {cell.arm} seed {cell.seed} lr {cell.lr:g}: held-out "
            f"{outcome.held_out:.4f}, {outcome.params:,} params, {outcome.flops:.4g} FLOPs, {outcome.seconds:.1f} s "
            f"{dict(outcome.cohorts) or ''}",
            flush=True,
        )

    for arm in plan.arms.values():
        if not arm.can_train:
            print(f"{arm.name} is not trained: {arm.requires} is not installed; pip install 'esper-morph[bench]'")
    done = run(plan, store, workers=options.workers, deadline=ends(options, started), note=note)
    summary = summarise(plan, store)
    summary["command"] = shown(sys.argv if argv is None else ["", *argv], plan.task.name, task)
    options.out.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, arm in summary.get("arms", {}).items():
        print(f"{name:20s} {arm['score']} {arm['score_interval']} {arm['flops']:.4g} FLOPs, lr {arm['lr']:g}")
    print(json.dumps(summary.get("grown_minus"), indent=1))
    if summary["incomplete"]:
        reason = "" if done or options.sum_up else " (the deadline has passed)"
        print(f"not complete{reason}: {', '.join(summary['incomplete'])}; the same command goes on from here")


def shown(argv: Sequence[str], name: str, fixed: str | None) -> str:
    """The command without what holds on one machine only: its folders, its processes, its deadline."""
    kept: list[str] = []
    words = iter(argv[1:])
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--data":
            kept += [flag, "FOLDER"]
        if flag == "--sum-up":
            continue
        if flag in ("--data", "--cells", "--cache", "--out", "--workers", "--deadline"):
            if not value:
                next(words, None)
            continue
        kept.append(word)
    script = f"benchmarks/training/{fixed or 'run'}.py"
    return shlex.join(["python", script, *kept, "--out", f"benchmarks/results/{name}.json"])
