"""Which start pays on the digits preset? Held-out loss of the grown network, five paired seeds a start.

Run from the repository root (about two minutes on one core)::

    PYTHONPATH=src python benchmarks/training/starts.py

It writes ``benchmarks/results/digits_starts.json``. Everything but the start is the preset's own; the learning rate is
the same for all (3e-3); the test split is not touched.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from esper.evidence.paired import paired_difference
from esper.runs.arms import Cell, load_preset, train
from esper.runs.options import RunOptions

RESULT = Path(__file__).parents[1] / "results" / "digits_starts.json"
STARTS = ("negative_gradient", "random_zero", "reconstruction")
SEEDS, LR = range(5), 3e-3


def held_out(start: str, seed: int) -> tuple[float, float, int]:
    """Held-out loss, FLOPs and kept cohorts of one grown run."""
    options = RunOptions(preset="digits", start=start)
    preset = load_preset(options, "cpu", "cpu")
    cell = Cell(
        arm="grown", seed=seed, lr=LR, steps=preset.steps, widths=preset.small_widths, options=options,
        device="cpu", size="cpu",
    )  # fmt: skip
    trained = train(cell, preset, lambda event: None)
    return trained.held_out, trained.flops, trained.cohorts["accepted"]


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": "PYTHONPATH=src python benchmarks/training/starts.py",
        "environment": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "lr": LR,
    }
    losses: dict[str, list[float]] = {}
    for start in STARTS:
        runs = [held_out(start, seed) for seed in SEEDS]
        losses[start] = [loss for loss, _, _ in runs]
        result[start] = {
            "held_out_per_seed": losses[start],
            "held_out": sum(losses[start]) / len(runs),
            "flops": sum(flops for _, flops, _ in runs) / len(runs),
            "accepted_per_seed": [accepted for _, _, accepted in runs],
        }
        print(start, result[start], flush=True)
    fitted = losses["negative_gradient"]
    for start in STARTS[1:]:
        paired = paired_difference([a - b for a, b in zip(fitted, losses[start], strict=True)])
        result[f"negative_gradient minus {start}"] = [paired.mean, paired.low, paired.high]
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
