"""How often are branches accepted that fold into their host's layer? Counts under three controls.

Run from the repository root (about a minute on one core)::

    PYTHONPATH=src:. python benchmarks/training/layer_nulls.py

It writes ``benchmarks/results/layer_nulls.json``: for every kind of cohort and control the number judged and accepted,
and mean gain (loss units). ``before`` is what a run uses for such cohorts: the smaller gain of two hosts, the present
one and the one from before the graft. The first four kinds are nulls: a low-rank map beside the Linear layer that
could have learned it in the same time; in the last one, the branch is there almost from the start of training.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.evidence.cohorts import Task, Trial, grown_trial, redundant_linear
from torch import nn

from esper.kasmina.bank import Bank
from esper.kasmina.site import Site

RESULT = Path(__file__).parents[1] / "results" / "layer_nulls.json"
CONTROLS = ("projected", "plain", "before")


def _fixed(_: nn.Module, __: Site, bank: Bank) -> None:
    """Always the same random map, whatever the host does."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in bank.params.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=source))


KINDS: dict[str, Callable[[int], Trial]] = {
    "learned beside its host": redundant_linear,
    "learned beside a converged host": lambda seed: grown_trial(seed, Task(), 12, "low_rank", units=3, alone=600),
    "fixed random map": lambda seed: grown_trial(seed, Task(), 12, "low_rank", units=3, hold=_fixed),
    "nothing to learn": lambda seed: grown_trial(seed, Task(pure_noise=True), 8, "low_rank", units=3),
    "early in training": lambda seed: grown_trial(seed, Task(), 12, "low_rank", units=3, alone=2, together=40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=100, help="cohorts a kind")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for kind, make in KINDS.items():
        trials = [make(seed) for seed in range(1000, 1000 + arguments.cohorts)]
        kinds[kind] = {}
        for control in CONTROLS:
            judged = [trial.judgement(control=control, seed=number) for number, trial in enumerate(trials)]
            kinds[kind][control] = {
                "judged": len(judged),
                "accepted": sum(judgement.gate.passed for judgement in judged),
                "mean_gain": round(sum(judgement.result.mean for judgement in judged) / len(judged), 6),
            }
        print(kind, {control: kinds[kind][control]["accepted"] for control in CONTROLS}, flush=True)
    result = {
        "command": f"PYTHONPATH=src:. python benchmarks/training/layer_nulls.py --cohorts {arguments.cohorts}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "kinds": kinds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
