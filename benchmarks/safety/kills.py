"""How much of its time a run keeps that is killed (SIGKILL) about once a minute and started again each time.

::

    python benchmarks/safety/kills.py --kills 100 --run-dir runs/kills --out benchmarks/results/kills.json

One command, ``esper run ...``, is started, killed after 45 to 75 seconds (drawn by a seed), and started again, and so
on: nobody does anything in between. Written after every kill, so it goes on where it was stopped itself. Measured:

- **effective time**: seconds of training in the newest checkpoints, by the wall-clock seconds of all lives;
- **resume**: from the end of the imports to the first training step that goes on from a checkpoint;
- steps in the newest checkpoints: a life that kept none is counted;
- what the effective time would be if each start had the processor to itself: with the processor seconds up to the
  first step in the place of the wall-clock ones. The two differ where other work shares the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOB = ("code-lm", "--seeds", "20", "--steps", "20000", "--lr", "0.004", "--no-controls")
"""Hours of training on a CPU: twenty transformers, one after another."""


def child(times: Path, command: list[str]) -> int:
    """``esper run`` with two notes of the clock: after the imports, and at its first training step."""
    if "digits" in command:
        with contextlib.suppress(ModuleNotFoundError):
            import sklearn.datasets  # noqa: F401  (imported by that preset later on; it is an import all the same)
    import torch
    import torch._dynamo  # noqa: F401  (torch imports it for the first optimizer)

    from esper.cli import main
    from esper.runs import arms, execute  # noqa: F401

    with times.open("a", buffering=1) as notes:
        notes.write(f"imported {time.monotonic()} {time.process_time()}\n")
        obey = arms.obey

        def first() -> None:
            notes.write(f"step {time.monotonic()} {time.process_time()}\n")
            arms.obey = obey
            obey()

        arms.obey = first
        return main(command)


def kept(run_dir: Path) -> tuple[float, int]:
    """Seconds and steps of training in the newest intact checkpoints of all trainings."""
    from esper.errors import StateError
    from esper.safety.checkpoint import manifest_numbers_or_none, read_manifest
    from esper.safety.disk import LocalDisk

    disk, seconds, steps = LocalDisk(), 0.0, 0
    progress = run_dir / "progress"
    for folder in sorted(progress.iterdir()) if progress.is_dir() else []:
        for number in manifest_numbers_or_none(disk, folder):
            try:
                manifest = read_manifest(disk, folder, number)
            except (StateError, OSError):
                continue
            seconds += manifest.document["seconds"]
            steps += manifest.step
            break
    return seconds, steps


def is_over(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it comes to its end by itself within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def live(command: list[str], run_dir: Path, life_s: float, *, trains_s: float = 0.0) -> dict[str, Any]:
    """One life of the run: it is killed ``life_s`` seconds after its start, or ``trains_s`` after its first step if
    that is later."""
    before, steps = kept(run_dir)
    times = run_dir.with_name(f"{run_dir.name}.times")
    times.unlink(missing_ok=True)
    began, spent = time.monotonic(), os.times()
    asked = [sys.executable, __file__, "--child", str(times), "--", *command, "--run-dir", str(run_dir)]
    with (run_dir.with_name(f"{run_dir.name}.log")).open("ab") as log:
        process = subprocess.Popen(asked, stdout=log, stderr=log)
        over = is_over(process, life_s)
        while trains_s and not over and not (times.exists() and "step" in times.read_text()):
            over = is_over(process, 0.1)
        if not over and not is_over(process, trains_s):
            process.send_signal(signal.SIGKILL)
            process.wait()
    wall, now = time.monotonic() - began, os.times()
    noted = {name: times for name, *times in map(str.split, times.read_text().splitlines())} if times.exists() else {}
    imported, step = (float(noted[name][0]) if name in noted else None for name in ("imported", "step"))
    seconds, steps_now = kept(run_dir)
    return {
        "killed": process.returncode == -signal.SIGKILL,
        "code": process.returncode,
        "wall_s": wall,
        "cpu_s": now.children_user + now.children_system - spent.children_user - spent.children_system,
        "kept_s": seconds - before,
        "kept_steps": steps_now - steps,
        "imports_s": None if imported is None else imported - began,
        "resume_s": None if imported is None or step is None else step - imported,
        "start_cpu_s": float(noted["step"][1]) if "step" in noted else None,
        "load": os.getloadavg()[0],
    }


def told(lives: list[dict[str, Any]]) -> dict[str, Any]:
    """What the lives come to."""
    wall, training = (sum(life[name] for life in lives) for name in ("wall_s", "kept_s"))
    resumed = [life["resume_s"] for life in lives[1:] if life["resume_s"] is not None]
    imports = [life["imports_s"] for life in lives if life["imports_s"] is not None]
    alone = 0.0
    for life in lives:
        if life["start_cpu_s"] is not None:
            share = life["kept_s"] / (life["wall_s"] - life["imports_s"] - life["resume_s"])
            alone += share * (life["wall_s"] - life["start_cpu_s"])
    return {
        "kills": sum(life["killed"] for life in lives),
        "wall_s": wall,
        "kept_s": training,
        "effective": training / wall,
        "effective_without_imports": training / (wall - sum(imports)),
        "effective_if_starts_had_the_processor": alone / wall,
        "imports_median_s": statistics.median(imports),
        "resume_median_s": statistics.median(resumed) if resumed else None,
        "resume_most_s": max(resumed, default=None),
        "lives_that_kept_nothing": sum(life["kept_steps"] <= 0 for life in lives if life["killed"]),
        "other_ends": sorted({life["code"] for life in lives} - {0, -signal.SIGKILL}),
        "load_median": statistics.median(life["load"] for life in lives),
    }


def run(
    command: list[str], run_dir: Path, out: Path, *, kills: int, life_s: tuple[float, float], trains_s: float = 0.0
) -> dict[str, Any]:
    """Kill a run ``kills`` times; whatever is in ``out`` already counts."""
    lives: list[dict[str, Any]] = json.loads(out.read_text())["lives"] if out.exists() else []
    while sum(life["killed"] for life in lives) < kills:
        lives.append(live(command, run_dir, random.Random(len(lives)).uniform(*life_s), trains_s=trains_s))
        result = {"command": command, **told(lives), "lives": lives}
        scratch = out.with_suffix(".new")
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        scratch.replace(out)
        if not lives[-1]["killed"]:
            break  # it has come to its end, or failed
    return {"command": command, **told(lives), "lives": lives}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--life", type=float, nargs=2, default=(45.0, 75.0), metavar="SECONDS", help="least and most")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/kills"))
    parser.add_argument("--out", type=Path, default=Path("kills.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("job", nargs="*", help=f"what is given to esper run; by default {' '.join(JOB)}")
    asked = parser.parse_args()
    if asked.child is not None:
        return child(asked.child, asked.job)
    asked.run_dir.parent.mkdir(parents=True, exist_ok=True)
    result = run(["run", *(asked.job or JOB)], asked.run_dir, asked.out, kills=asked.kills, life_s=tuple(asked.life))
    print(json.dumps({name: value for name, value in result.items() if name != "lives"}, indent=1))
    return 0 if result["effective"] >= 0.9 and not result["other_ends"] else 1


if __name__ == "__main__":
    sys.exit(main())
