"""How long does one decision take? Features, masks and policy over many sites, on the CPU.

Run from the repository root (a minute)::

    PYTHONPATH=src:. python benchmarks/controller/latency.py

For each size of the policy and each number of threads: the least and the median of ``--repeats`` decisions over
``--sites`` sites, in milliseconds by the clock and of CPU time (all threads together). On a busy machine the least CPU
time on one thread is the number to trust. Writes ``benchmarks/results/policy_latency.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tests.tamiyo.observations import make

from esper.tamiyo.features import FeatureReader
from esper.tamiyo.neural.batch import Batch
from esper.tamiyo.neural.policy import SIZES_BY_NAME, Policy
from esper.tamiyo.sight import see

RESULT = Path(__file__).parents[1] / "results" / "policy_latency.json"


def measure(size: str, threads: int, sites: int, repeats: int) -> dict[str, object]:
    """One row."""
    torch.set_num_threads(threads)
    policy, reader, observation = Policy(size), FeatureReader(), make(np.random.default_rng(0), sites)
    clock, cpu = list[float](), list[float]()
    with torch.inference_mode():
        for _ in range(repeats):
            start, spent = time.perf_counter(), time.process_time()
            policy(Batch.of([see(reader, observation)]))
            clock.append(1000 * (time.perf_counter() - start))
            cpu.append(1000 * (time.process_time() - spent))
    return {
        "size": size, "threads": threads, "sites": sites, "params": sum(p.numel() for p in policy.parameters()),
        "clock_ms": {"least": round(min(clock), 2), "median": round(float(np.median(clock)), 2)},
        "cpu_ms": {"least": round(min(cpu), 2), "median": round(float(np.median(cpu)), 2)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    rows = [
        measure(size, threads, asked.sites, asked.repeats) for size in SIZES_BY_NAME for threads in (1, 2)
    ]  # fmt: skip
    for row in rows:
        print(row)
    result = {
        "command": f"python benchmarks/controller/latency.py --sites {asked.sites} --repeats {asked.repeats}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
