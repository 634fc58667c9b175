"""Does growth that was accepted ever do harm? Many small runs, every accepted cohort scored after the run.

Run from the repository root (some minutes on one core)::

    PYTHONPATH=src:. python benchmarks/training/harm.py

It trains small hosts (MLPs and conv nets; teacher-student, spirals, digits, digits as images; noisy targets, several
learning rates and optimizers, small gate sets) under the default controller until ``--accepted`` cohorts were kept, and
writes ``benchmarks/results/harm.json``. Each kept cohort is scored on a large audit split that nothing has read before
the run's end, in two ways: *on/off* (the network as it was when the cohort became permanent, against the run's own
control) and *twin* (host against the network trained on the same batches without the cohort, 90 steps after the graft).
Reported: how many raise the audit loss by more than 1% of the loss without them, with a one-sided 95% Clopper-Pearson
bound, and the line of audited on claimed gains (both as shares of the loss without the cohort).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import esper
from esper.evidence.rates import upper_bound
from esper.observe.credit import fit_line
from esper.protocol import AnyEvent, Audited, Germinated, Judged

RESULT = Path(__file__).parents[1] / "results" / "harm.json"
STEPS = 600
BATCH_ROWS = 32
GATE_BATCHES = 56
"""Held-out batches of 4, 8 or 16 rows; half of them judge."""
HARM = 0.01
"""Relative rise of the loss above which a cohort counts as harmful."""

Rows = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Rows], Tensor]


@dataclass
class Task:
    """A host with data in three disjoint parts."""

    name: str
    model: nn.Module
    loss: Loss
    train: Rows
    gate: list[Rows]
    audit: list[Rows]


def squared(model: nn.Module, batch: Rows) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def entropy(model: nn.Module, batch: Rows) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def split(name: str, model: nn.Module, loss: Loss, rows: Rows, sizes: tuple[int, int], gate_rows: int) -> Task:
    """``sizes``: training rows and gate rows; the rest is the audit, in batches of 64."""
    first, second = sizes[0], sizes[0] + sizes[1]
    x, y = rows
    return Task(
        name, model, loss, (x[:first], y[:first]),
        list(zip(x[first:second].split(gate_rows), y[first:second].split(gate_rows), strict=True)),
        list(zip(x[second:].split(64), y[second:].split(64), strict=True)),
    )  # fmt: skip


def mlp(inputs: int, width: int, outputs: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def teacher(choose: torch.Generator, gate_rows: int) -> Task:
    total = 512 + GATE_BATCHES * gate_rows + 4096
    x = torch.randn(total, 8, generator=choose)
    inner = torch.randn(8, 16, generator=choose) / 8**0.5 * 1.5
    noise = (0.1, 0.3, 0.6)[pick(choose, 3)]
    y = torch.tanh(x @ inner) @ torch.randn(16, 3, generator=choose) / 4
    y = y + noise * torch.randn(y.shape, generator=choose)
    model = mlp(8, 2 + pick(choose, 4), 3, 1 + pick(choose, 2))
    return split("teacher-student", model, squared, (x, y), (512, GATE_BATCHES * gate_rows), gate_rows)


def spirals(choose: torch.Generator, gate_rows: int) -> Task:
    total = 512 + GATE_BATCHES * gate_rows + 4096
    label = torch.randint(2, (total,), generator=choose)
    radius = torch.rand(total, generator=choose).sqrt()
    angle = 7.0 * radius + math.pi * label
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) * 2
    x = x + 0.1 * torch.randn(x.shape, generator=choose)
    y = flipped(label, 2, 0.1, choose)
    return split(
        "spirals", mlp(2, 3 + pick(choose, 4), 2, 2), entropy, (x, y), (512, GATE_BATCHES * gate_rows), gate_rows
    )


def flipped(labels: Tensor, classes: int, share: float, choose: torch.Generator) -> Tensor:
    wrong = torch.rand(labels.shape, generator=choose) < share
    return torch.where(wrong, torch.randint(classes, labels.shape, generator=choose), labels)


def digit_rows(choose: torch.Generator) -> Rows:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=choose)
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 8 - 1
    return x, flipped(torch.tensor(data.target)[order], 10, 0.1, choose)


def digits(choose: torch.Generator, gate_rows: int) -> Task:
    model = mlp(64, 3 + pick(choose, 4), 10, 1 + pick(choose, 2))
    return split(
        "digits", model, entropy, digit_rows(choose), (600, GATE_BATCHES * min(gate_rows, 8)), min(gate_rows, 8)
    )


def digit_images(choose: torch.Generator, _: int) -> Task:
    x, y = digit_rows(choose)
    width = 1 + pick(choose, 2)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(width, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    rows = x.view(-1, 1, 8, 8), y
    return split("digit images", model, entropy, rows, (600, GATE_BATCHES * 8), 8)


TASKS = (teacher, spirals, digits, digit_images)


def pick(choose: torch.Generator, num: int) -> int:
    return int(torch.randint(num, (), generator=choose))


def config(seed: int) -> esper.Config:
    return esper.Config(
        capture=esper.CaptureConfig(batches=4, rows=4096),
        fit=esper.FitConfig(steps=40, batch_rows=512),
        graft=esper.GraftConfig(
            ramp_steps=10, settle_steps=40, timeout=150, stabilize_steps=5, stabilize_window=16,
            fine_tune_steps=10, cull_steps=5, warmup_steps=10, embargo=20,
        ),
        evidence=esper.EvidenceConfig(twin_share=1.0, twin_steps=90),
        tamiyo=esper.TamiyoConfig(first=40, spacing=110, growth=2.0, patience=2, min_gain_per_cost=1e-6,
                                  last_share=0.85),
        interval=10,
        total_steps=STEPS,
        seed=seed,
    )  # fmt: skip


def run(number: int) -> tuple[str, list[AnyEvent]]:
    """Train one host; the whole of it follows from ``number``."""
    torch.manual_seed(number)
    choose = torch.Generator().manual_seed(number)
    task = TASKS[number % len(TASKS)](choose, (4, 8, 16)[pick(choose, 3)])
    lr = (3e-3, 1e-2, 2e-2)[pick(choose, 3)]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(task.model.parameters(), lr)
    if pick(choose, 3) == 0:
        optimizer = torch.optim.SGD(task.model.parameters(), 5 * lr, momentum=0.9)
    events: list[AnyEvent] = []
    grower = esper.Grower(
        task.model, optimizer, loss=task.loss, evaluate=task.gate, audit=task.audit, config=config(number),
        on_event=events.append,
    )  # fmt: skip
    x, y = task.train
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH_ROWS,), generator=choose)
        batch = x[chosen], y[chosen]
        loss = task.loss(task.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step(loss, batch=batch)
        if grower.stopped is not None and not grower.kasmina.cohorts and not grower.trials.twins:
            break
    grower.finish()
    return task.name, events


@dataclass(frozen=True)
class Found:
    """One audit of one accepted cohort; gains as shares of the audit loss without it."""

    task: str
    run: int
    cohort: int
    source: str
    claimed: float
    shrunken: float
    found: float
    high: float


def found_in(task: str, number: int, events: list[AnyEvent]) -> list[Found]:
    found: list[Found] = []
    for event in events:
        if isinstance(event, Audited):
            without = event.loss + event.gain
            parts = (event.claimed, event.claimed_shrunken, event.gain, event.gain_high)
            found.append(Found(task, number, event.cohort, event.source, *(part / without for part in parts)))
    return found


def summarise(found: list[Found]) -> dict[str, Any]:
    if not found:
        return {"accepted": 0}
    harmful = [item for item in found if not item.found >= -HARM]  # an unknown gain counts as harm
    sure = [item for item in harmful if not item.high >= 0]
    raw = fit_line([item.claimed for item in found], [item.found for item in found])
    shrunken = fit_line([item.shrunken for item in found], [item.found for item in found])
    return {
        "accepted": len(found),
        "harmful": len(harmful),
        "harmful_rate_upper": round(upper_bound(len(harmful), len(found)), 4),
        "harmful_beyond_noise": len(sure),
        "worst": round(min(item.found for item in found), 4),
        "mean_claimed": round(sum(item.claimed for item in found) / len(found), 4),
        "mean_shrunken": round(sum(item.shrunken for item in found) / len(found), 4),
        "mean_found": round(sum(item.found for item in found) / len(found), 4),
        "slope": [round(value, 3) for value in (raw.slope, raw.low, raw.high)],
        "slope_of_shrunken": [round(value, 3) for value in (shrunken.slope, shrunken.low, shrunken.high)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accepted", type=int, default=200, help="kept cohorts to reach")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    start = time.perf_counter()
    found: list[Found] = []
    counts = {"runs": 0, "germinated": 0, "judged": 0}
    while len({(item.run, item.cohort) for item in found}) < arguments.accepted:
        number = arguments.first + counts["runs"]
        task, events = run(number)
        new = found_in(task, number, events)
        found += new
        counts["runs"] += 1
        counts["germinated"] += sum(isinstance(event, Germinated) for event in events)
        counts["judged"] += sum(isinstance(event, Judged) and event.stage == "evaluate" for event in events)
        print(number, task, [(item.source, f"{item.claimed:.3f}", f"{item.found:.3f}") for item in new], flush=True)
    by_source = {source: [item for item in found if item.source == source] for source in ("on_off", "twin")}
    result = {
        "command": f"PYTHONPATH=src:. python benchmarks/training/harm.py --accepted {arguments.accepted}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start, 1),
        **counts,
        **{
            source: {
                "all": summarise(items),
                **{
                    name: summarise([item for item in items if item.task == name])
                    for name in dict.fromkeys(item.task for item in items)
                },
            }
            for source, items in by_source.items()
        },
        "cohorts": [
            {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            for row in (dataclasses.asdict(item) for item in found)
        ],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({source: result[source]["all"] for source in by_source}, indent=2))


if __name__ == "__main__":
    main()
