"""Is a restored or resumed training bit for bit the one that was never interrupted, on this machine's device?

Run from the repository root, on a GPU or (``ESPER_TEST_DEVICE=cpu``, the default) without one; about a minute::

    export ESPER_TEST_DEVICE=cuda
    PYTHONPATH=src:. python benchmarks/safety/restore.py --out benchmarks/results/restore_gpu.json

Three hosts in three precisions (fp16 under a GradScaler), SGD with momentum, a learning-rate schedule, noise from the
device's own stream. For each of them, and both with PyTorch's deterministic algorithms and without:

- **again**: two trainings without Esper from the same seeds: what PyTorch by itself does not repeat;
- **restored**: a cohort is grafted, the host damaged and taken back exactly; then as many steps as **again** compares,
  against a host that never had a grower;
- **resumed**: a checkpoint with the grafted cohort, written to the disk and loaded into another training, goes on
  beside the one that was saved.

Each says whether all bits agree and the largest relative difference: over all tensors of the host and its optimizer
the largest of ``|a - b|max / |a|max``. Whether the restored state has the snapshot's hash is said by itself: that holds
in either mode, for copies are exact. In deterministic mode any difference is a failure (exit status 1).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tests.models import DEVICE, Batch, Task, same_bits
from tests.restoring import PRECISIONS, Course
from torch import Tensor, nn

from esper.protocol import Lifecycle, Restored, RollBack
from esper.runs.hosts import MLP, ByteTransformer, ResNet

MODES = ("deterministic", "free")
FURTHER = 20
"""Steps after the restore, and after the load."""

# ----------------------------------------------------------------------------------------------------------------------
# Hosts large enough that a GPU's sums run in several blocks


def _rows(num: int, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(128, 64, generator=source) for _ in range(num)]
    return [(x.to(DEVICE), x.roll(1, 1).tanh()[:, :16].to(DEVICE)) for x in drawn]


def _images(num: int, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(16, 3, 12, 12, generator=source) for _ in range(num)]
    return [(x.to(DEVICE), x.mean((2, 3)).repeat(1, 4)[:, :10].to(DEVICE)) for x in drawn]


def _tokens(num: int, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(256, (8, 65), generator=source) for _ in range(num)]
    return [(t[:, :-1].to(DEVICE), nn.functional.one_hot(t[:, 1:], 256).float().to(DEVICE)) for t in drawn]


def _resnet() -> nn.Module:
    return ResNet([32, 32], trunk=[32, 32], in_channels=3, num_classes=10).to(DEVICE)


def _transformer() -> nn.Module:
    return ByteTransformer([128, 128], dim=64, num_heads=4, context=64).to(DEVICE)


TASKS = (
    Task("mlp", lambda: MLP(64, [128, 128], 16).to(DEVICE), _rows),
    Task("conv", _resnet, _images),
    Task("transformer", _transformer, _tokens),
)

STARTS = {"conv": "random_zero"}
"""The few rows that these quick settings capture are too few samples of images to fit to; others fit to the gradient.
"""

# ----------------------------------------------------------------------------------------------------------------------
# What is compared


def tensors(run: Course) -> dict[str, Tensor]:
    """Copies of the host's tensors and its optimizer's."""
    moments = {
        f"{place}/{name}": value
        for place, entry in enumerate(run.optimizer.state.values())
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    return {name: value.detach().clone() for name, value in {**run.model.state_dict(), **moments}.items()}


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, Any]:
    """How far two trainings are apart."""
    largest, where = 0.0, None
    for name, value in one.items():
        if same_bits(value, two[name]):
            continue
        scale = float(value.double().abs().max())
        apart = float((value.double() - two[name].double()).abs().max()) / (scale or 1.0)
        if apart >= largest:
            largest, where = apart, name
    return {"same_bits": where is None, "largest_relative": largest, "largest_in": where}


def alone(task: Task, precision: str, steps: int) -> Course:
    run = Course(task, precision, grows=False)
    run.train(steps)
    return run


def grafted(task: Task, precision: str) -> Course:
    """A training two steps after a cohort was grafted."""
    run = Course(task, precision, grows=True)
    run.bring(Lifecycle.GRAFTING, start=STARTS.get(task.name, "negative_gradient"))
    run.train(2)
    return run


def restored(task: Task, precision: str) -> dict[str, Any]:
    """A graft, damage, an exact rollback, and ``FURTHER`` steps; beside the same steps of hosts without Esper."""
    run = grafted(task, precision)
    run.damage()
    run.grower.submit(RollBack(cohort=1, reason="measured", exact=True))
    while not run.told(Restored):
        run.train()
    (event,) = run.told(Restored)
    run.train(FURTHER)
    steps = event.to_step + FURTHER
    first, second = (tensors(alone(task, precision, steps)) for _ in range(2))
    return {
        "hash_verified": event.verified, "steps": steps, "again": difference(first, second),
        "restored": difference(first, tensors(run)),
    }  # fmt: skip


def resumed(task: Task, precision: str) -> dict[str, Any]:
    """A training that is saved and goes on, and another that loads what was saved."""
    run = grafted(task, precision)
    with tempfile.TemporaryDirectory() as folder:
        run.grower.save(folder)
        run.grower.detach()
        straight = Course(task, precision, grows=True, seed=2)
        straight.grower.load(folder)
        straight.train(FURTHER)
        other = Course(task, precision, grows=True, seed=3)
        other.train(2)
        other.grower.load(folder)
        other.train(FURTHER)
    return difference(tensors(straight), tensors(other))


def measure(mode: str) -> list[dict[str, Any]]:
    torch.use_deterministic_algorithms(mode == "deterministic")
    cases: list[dict[str, Any]] = []
    for task in TASKS:
        for precision in PRECISIONS:
            began = time.perf_counter()
            case = {"host": task.name, "precision": precision, "mode": mode, **restored(task, precision)}
            case["resumed"] = resumed(task, precision)
            cases.append({**case, "seconds": round(time.perf_counter() - began, 2)})
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    return cases


# ----------------------------------------------------------------------------------------------------------------------
# One process a mode: cuBLAS reads its setting once


def in_its_own_process(mode: str) -> list[dict[str, Any]]:
    settings = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    if mode == "deterministic":
        settings["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    asked = [sys.executable, __file__, "--mode", mode]
    return json.loads(subprocess.run(asked, env=settings, check=True, stdout=subprocess.PIPE).stdout)


def summed_up(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and the largest differences, by mode."""
    told: dict[str, Any] = {}
    for mode in MODES:
        here = [case for case in cases if case["mode"] == mode]
        told[mode] = {"cases": len(here), "hash_verified": sum(case["hash_verified"] for case in here)}
        for what in ("again", "restored", "resumed"):
            told[mode][f"{what}_same_bits"] = sum(case[what]["same_bits"] for case in here)
            told[mode][f"{what}_largest_relative"] = max(case[what]["largest_relative"] for case in here)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the result is written as JSON")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.mode is not None:
        print(json.dumps(measure(asked.mode)))
        return 0
    began = time.perf_counter()
    cases = [case for mode in MODES for case in in_its_own_process(mode)]
    told = summed_up(cases)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    result = {
        "command": f"ESPER_TEST_DEVICE={DEVICE.type} PYTHONPATH=src:. python benchmarks/safety/restore.py",
        "device": name, "torch": torch.__version__, "further_steps": FURTHER,
        "seconds": round(time.perf_counter() - began, 1), **told, "cases": cases,
    }  # fmt: skip
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1))
    exact = told["deterministic"]
    missed = [what for what in ("again", "restored", "resumed") if exact[f"{what}_same_bits"] < exact["cases"]]
    return 1 if missed or any(not case["hash_verified"] for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
