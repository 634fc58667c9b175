"""Which part of a recipe pays: trainings of one preset that differ in named settings, side by side.

    python benchmarks/training/ablations.py code-lm --size gpu --workers 10 --out OUT.json \\
        --cell "shipped grown 3e-3" --cell "no boost grown 3e-3 graft.lr_boost=1" --cell "wide static:1568 3e-3"

A cell is a label, an arm (``grown``, ``always``: every cohort is kept, ``static:WIDTH``), a learning rate and settings
by dotted name. Held-out loss only: the test split is not touched. Every FLOP is counted.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from esper.runs.arms import Cell, Trained, load_preset, train
from esper.runs.job import environment
from esper.runs.options import RunOptions
from esper.runs.preset import Preset

_PRESETS: dict[str, Preset] = {}
_JUDGED = ("step", "stage", "gain", "gain_low", "e_value", "confirm_p", "accepted", "reason")


@dataclass(frozen=True, kw_only=True)
class Variant:
    label: str
    arm: str
    width: int | None
    lr: float
    seed: int
    settings: tuple[str, ...]


def read(text: str, seeds: int) -> list[Variant]:
    """``LABEL ARM LR SETTING...``; a label may hold blanks."""
    words = text.split()
    at = next(i for i, word in enumerate(words) if word.partition(":")[0] in ("grown", "always", "static"))
    arm, _, width = words[at].partition(":")
    settings = tuple(words[at + 2 :]) + (("evidence.accept=always",) if arm == "always" else ())
    return [
        Variant(
            label=" ".join(words[:at]), arm=arm, width=int(width) if width else None, lr=float(words[at + 1]),
            seed=seed, settings=settings,
        )
        for seed in range(seeds)
    ]  # fmt: skip


def run(variant: Variant, preset_name: str, size: str, steps: int | None) -> tuple[Variant, Trained]:
    torch.set_num_threads(1)
    device = "cuda" if size == "gpu" else "cpu"
    options = RunOptions(preset=preset_name, settings=variant.settings)
    if size not in _PRESETS:
        _PRESETS[size] = load_preset(options, device, size)
    preset = _PRESETS[size]
    widths = preset.small_widths if variant.width is None else (variant.width,) * len(preset.small_widths)
    cell = Cell(
        arm="static_final" if variant.arm == "static" else "grown", seed=variant.seed, lr=variant.lr,
        steps=steps or preset.steps, widths=widths, options=options, device=device, size=size,
    )  # fmt: skip
    return variant, train(cell, preset, lambda event: None)


def record(variant: Variant, trained: Trained) -> dict[str, Any]:
    judged = [e for e in trained.events if type(e).__name__ == "Judged"]
    fits = [e for e in trained.events if type(e).__name__ == "Fitted"]
    return {
        "label": variant.label, "arm": variant.arm, "lr": variant.lr, "seed": variant.seed,
        "settings": list(variant.settings), "held_out": trained.held_out, "params": trained.params,
        "flops": trained.flops, "flops_parts": trained.flops_parts, "widths": list(trained.widths),
        "cohorts": trained.cohorts, "stopped": trained.stopped, "seconds": trained.seconds,
        "judged": [{key: _plain(getattr(event, key)) for key in _JUDGED} for event in judged],
        "fits": [{key: _plain(getattr(e, key, None)) for key in ("step", "explained", "t_statistic")} for e in fits],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=("digits", "code-lm"))
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--cell", action="append", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    variants = [variant for text in arguments.cell for variant in read(text, arguments.seeds)]
    started, records = time.monotonic(), []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, variant, arguments.preset, arguments.size, arguments.steps) for variant in variants]
        for future in as_completed(futures):
            variant, trained = future.result()
            records.append(record(variant, trained))
            gains = [(e["step"], e["stage"][:4], e["gain"], e["accepted"]) for e in records[-1]["judged"]]
            print(
                f"{time.monotonic() - started:4.0f} s {variant.label} s{variant.seed} lr {variant.lr:g}: held-out "
                f"{trained.held_out:.4f} {trained.params:,} params {trained.flops:.4g} FLOPs {trained.cohorts} "
                f"{[tuple(round(x, 4) if isinstance(x, float) else x for x in gain) for gain in gains]}",
                flush=True,
            )
            text = json.dumps({"environment": environment(), "cells": records}, indent=1)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
