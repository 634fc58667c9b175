"""How well do the statistics of a chunk stand when fewer rows of a batch are read?

Run from the repository root (a minute on one core)::

    PYTHONPATH=src python benchmarks/system/sampled_rows.py

A small transformer learns a Markov chain; then every Linear layer of it is read on some batches as telemetry reads it,
with so many rows and with all of them. Told, as medians over layers and batches, for chunks of one feature and of
sixteen:

``variance_error``
    root mean square over the chunks of the variance's relative error;
``mean_error``
    the same of the mean, in standard deviations of the chunk;
``rank_agreement``
    Spearman's correlation over a layer's chunks, of the variance from these rows with that from all rows;
``rank_agreement_1024``
    the same with that from 1,024 rows;
``site_error``
    relative error of the layer's mean variance, which is what a controller sees of it;
``rank_agreement_next``
    the same of the variance from all rows of this batch with that of the next: what a batch by itself leaves open.

It writes ``benchmarks/results/sampled_rows.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.bench.hosts import GPT2, Shape
from esper.kasmina.ops.telemetry import record_statistics

RESULT = Path(__file__).parents[1] / "results" / "sampled_rows.json"
SHAPE = Shape(dim=128, blocks=3, symbols=64, context=256, batch=32)
ROWS = (1024, 512, 256, 128)
CHUNK_SIZES = (1, 16)
STEPS, BATCHES = 150, 6
TOLD = ("variance_error", "mean_error", "rank_agreement", "rank_agreement_1024", "site_error")


def text(batch: int, length: int, chances: Tensor, source: torch.Generator) -> Tensor:
    """Token ids ``(B, T)`` of a Markov chain."""
    ids = torch.randint(len(chances), (batch, 1), generator=source)
    for _ in range(length - 1):
        ids = torch.cat([ids, torch.multinomial(chances[ids[:, -1]], 1, generator=source)], 1)
    return ids


def trained(batch: Callable[[], Tensor], steps: int) -> GPT2:
    """The host after some steps."""
    model = GPT2(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        ids = batch()[:8]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"training loss {float(loss.detach()):.3f}")
    return model


@torch.no_grad()
def outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What each Linear layer of the blocks gives, ``(B, T, F)``."""
    found: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _, __, y, name=name: found.__setitem__(name, y))
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.startswith("blocks")
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def of_chunks(y: Tensor, size: int, rows: int) -> Tensor:
    """``(2, C)``: mean and variance of chunks of ``size`` features, as telemetry reads them."""
    number = y.shape[-1] // size
    out = torch.empty(2, number)
    record_statistics(
        out, y, -1, rows, torch.arange(number).repeat_interleave(size), torch.full((number,), float(size))
    )
    return out


def agreement(one: Tensor, two: Tensor) -> float:
    """Spearman's correlation."""
    ranks = [np.argsort(np.argsort(values.numpy(), kind="stable")) for values in (one, two)]
    return float(np.corrcoef(*ranks)[0, 1])


def compare(model: nn.Module, batches: list[Tensor]) -> list[dict[str, float]]:
    """One line for so many rows and a size of chunk."""
    whole = SHAPE.batch * SHAPE.context
    seen = [outputs(model, ids[:, :-1]) for ids in batches]
    lines: list[dict[str, float]] = []
    for size in CHUNK_SIZES:
        exact = [{name: of_chunks(y, size, whole) for name, y in layers.items()} for layers in seen]
        following = [agreement(a[n][1], b[n][1]) for a, b in itertools.pairwise(exact) for n in a]
        for rows in ROWS:
            found: dict[str, list[float]] = {name: [] for name in TOLD}
            for layers, wanted in zip(seen, exact, strict=True):
                for name, y in layers.items():
                    (mean, variance), (true_mean, true_variance) = of_chunks(y, size, rows), wanted[name]
                    found["variance_error"].append(_rms((variance - true_variance) / true_variance))
                    found["mean_error"].append(_rms((mean - true_mean) / true_variance.sqrt()))
                    found["rank_agreement"].append(agreement(variance, true_variance))
                    found["rank_agreement_1024"].append(agreement(variance, of_chunks(y, size, 1024)[1]))
                    found["site_error"].append(abs(float(variance.mean() / true_variance.mean()) - 1))
            medians = {name: round(statistics.median(values), 4) for name, values in found.items()}
            next_one = round(statistics.median(following), 4)
            lines.append({"chunk_size": size, "rows": rows, **medians, "rank_agreement_next": next_one})
            print(json.dumps(lines[-1]))
    return lines


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, before anything is read")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = torch.Generator().manual_seed(1)
    chances = (3 * torch.randn(SHAPE.symbols, SHAPE.symbols, generator=source)).softmax(1)

    def batch() -> Tensor:
        return text(SHAPE.batch, SHAPE.context + 1, chances, source)

    model = trained(batch, arguments.steps)
    result = {
        "command": f"PYTHONPATH=src python benchmarks/system/sampled_rows.py --steps {arguments.steps}",
        "device": f"cpu, 1 of {os.cpu_count()} cores ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "rows_of_a_batch": SHAPE.batch * SHAPE.context,
        "batches": BATCHES,
        "rows": compare(model, [batch() for _ in range(BATCHES)]),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
