"""How often are cohorts accepted that can add nothing? Counts for both controls, and the power against real help.

Run from the repository root (a few minutes on one core)::

    PYTHONPATH=src:. python benchmarks/training/nulls.py

It writes ``benchmarks/results/nulls.json``: for every kind of cohort and every control the number judged and accepted,
the number whose e-value crossed the threshold, mean and largest gain (loss units), and a 95% Clopper-Pearson upper
bound of the acceptance rate. Every cohort gets a host, data and a judge of its own, so that each meets the lowest
threshold a run ever asks for. The kinds are described in ``tests/evidence/cohorts.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tests.evidence.cohorts import NULLS, useful

from esper.evidence.judge import Judgement
from esper.evidence.rates import upper_bound

RESULT = Path(__file__).parents[1] / "results" / "nulls.json"
CONTROLS = ("projected", "plain")


def summarise(judged: list[Judgement]) -> dict[str, Any]:
    accepted = sum(j.gate.passed for j in judged)
    return {
        "judged": len(judged),
        "accepted": accepted,
        "crossed": sum(j.e_value >= j.threshold for j in judged),
        "accepted_rate_upper": round(upper_bound(accepted, len(judged)), 4),
        "mean_gain": round(sum(j.result.mean for j in judged) / len(judged), 6),
        "max_gain": round(max(j.result.mean for j in judged), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=170, help="cohorts a kind (170 make 1,020 null cohorts)")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    judged: dict[str, dict[str, list[Judgement]]] = {control: {} for control in CONTROLS}
    for kind, make in {**NULLS, "useful": useful}.items():
        trials = [make(seed) for seed in range(1000, 1000 + arguments.cohorts)]
        for control in CONTROLS:
            judged[control][kind] = [trial.judgement(control=control, seed=i) for i, trial in enumerate(trials)]
        print(kind, {control: summarise(judged[control][kind])["accepted"] for control in CONTROLS}, flush=True)
    result = {
        "command": f"PYTHONPATH=src:. python benchmarks/training/nulls.py --cohorts {arguments.cohorts}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "controls": {
            control: {
                **{kind: summarise(values) for kind, values in kinds.items()},
                "all_nulls": summarise([j for kind in NULLS for j in kinds[kind]]),
            }
            for control, kinds in judged.items()
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({c: result["controls"][c]["all_nulls"] for c in CONTROLS}, indent=2))


if __name__ == "__main__":
    main()
