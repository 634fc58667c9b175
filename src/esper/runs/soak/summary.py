"""What a soak has shown so far, and the bar that it is held to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from esper.runs.soak.life import Counts, rollbacks
from esper.runs.soak.resources import Resources
from esper.runs.soak.slope import LONG_H, WARM_UP, Slope
from esper.runs.trials.archive import header

TRANSITIONS, ROLLBACKS, MB_PER_HOUR, STEPS = 100_000, 1_000, 1.0, 10_000_000


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a soak. Counts are of all sittings; ``hours`` and ``sitting_steps`` of this one."""

    sitting: int
    hours: float
    sitting_steps: int
    steps: dict[str, int]
    transitions: dict[str, int]
    seed_transitions: int
    germinations: int
    longest_wait: int
    lives: int
    faults: dict[str, int]
    lost: dict[str, int]
    non_finite: int
    params: int
    """Of all hosts alive, growth included."""
    memory_mb: float | None
    gpu_memory_mb: float | None
    handles: int | None
    threads: int
    temporary_files: int
    in_use_mb: float | None = None

    @classmethod
    def of(
        cls, counts: Counts, *, sitting: int, hours: float, sitting_steps: int, grown: int, resources: Resources
    ) -> Sample:
        return cls(
            sitting=sitting, hours=hours, sitting_steps=sitting_steps, steps=dict(counts.steps),
            transitions=dict(counts.transitions), seed_transitions=counts.seed_transitions,
            germinations=counts.germinations, longest_wait=counts.longest_wait, lives=counts.lives,
            faults=dict(counts.faults), lost=dict(counts.lost), non_finite=counts.non_finite, params=grown,
            memory_mb=resources.memory_mb, gpu_memory_mb=resources.gpu_memory_mb, handles=resources.handles,
            threads=resources.threads, temporary_files=resources.temporary_files, in_use_mb=resources.in_use_mb,
        )  # fmt: skip

    def restored(self) -> Counts:
        """The counts to go on from."""
        return Counts(
            steps=Counter(self.steps), transitions=Counter(self.transitions), seed_transitions=self.seed_transitions,
            germinations=self.germinations, longest_wait=self.longest_wait, lives=self.lives,
            faults=Counter(self.faults), lost=Counter(self.lost), non_finite=self.non_finite,
        )  # fmt: skip


def summarise(samples: Sequence[Sample], device: str) -> dict[str, Any]:
    """A pure function of the samples (and of the versions that made them)."""
    last = samples[-1]
    sittings = {sample.sitting: [s for s in samples if s.sitting == sample.sitting] for sample in samples}
    longest = max(sittings.values(), key=lambda sitting: sitting[-1].hours)
    memory, in_use, gpu = (_slope(longest, f"{name}_mb") for name in ("memory", "in_use", "gpu_memory"))
    leaks = {name: _leaked(longest, name) for name in ("handles", "threads", "temporary_files")}
    steps = sum(last.steps.values())
    hours = sum(sitting[-1].hours for sitting in sittings.values())
    rate = sum(sitting[-1].sitting_steps for sitting in sittings.values()) / max(3600 * hours, 1e-9)
    transitions, num_rollbacks = sum(last.transitions.values()), rollbacks(last.restored())
    bars = {
        f"transitions, at least {TRANSITIONS:,}": transitions >= TRANSITIONS,
        f"rollbacks, at least {ROLLBACKS:,}": num_rollbacks >= ROLLBACKS,
        f"upper bound of the memory slope, under {MB_PER_HOUR:g} MB an hour": memory.high < MB_PER_HOUR,
        "leaked handles, threads and temporary files: none": all(value == 0 for value in leaks.values()),
        "numbers that are not finite, faults aside: none": last.non_finite == 0,
        "lives lost without a fault: none": last.lost.get("no fault", 0) == 0,
    }
    versions = header()
    return {
        "versions": {"esper": versions.esper, "torch": versions.torch, "device": device},
        "sittings": len(sittings), "hours": round(hours, 4), "steps": steps, "steps_by_family": last.steps,
        "steps_per_second": round(rate, 1),
        "hours_to_10M_steps": round(max(0, STEPS - steps) / max(rate, 1e-9) / 3600, 1),
        "transitions": transitions, "transitions_by_kind": dict(sorted(last.transitions.items())),
        "seed_transitions": last.seed_transitions, "rollbacks": num_rollbacks, "germinations": last.germinations,
        "longest_wait_for_a_germination": last.longest_wait, "lives": last.lives, "faults": last.faults,
        "lives_lost": last.lost, "non_finite": last.non_finite,
        "memory": _shown(memory), **{
            name: _shown(slope) if not math.isnan(slope.mb_per_hour) else None
            for name, slope in (("in_use", in_use), ("gpu_memory", gpu))
        },
        "leaked": leaks, "bars": bars, "met": all(bars.values()),
    }  # fmt: skip


def _slope(sitting: Sequence[Sample], name: str) -> Slope:
    pairs = [(s.hours, value) for s in sitting if (value := getattr(s, name)) is not None]
    return Slope.of([hours for hours, _ in pairs], [value for _, value in pairs])


def _shown(slope: Slope) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return round(value, 4) if math.isfinite(value) else None

    return {
        "mb_per_hour": number(slope.mb_per_hour), "low": number(slope.low), "high": number(slope.high),
        "hours": round(slope.hours, 4), "samples": slope.num_samples,
        f"mb_after_{LONG_H:.0f}_hours_at_most": number(slope.long_mb),
    }  # fmt: skip


def _leaked(sitting: Sequence[Sample], name: str) -> int | None:
    """What there is more at the end than after the warm-up; ``None`` where the system does not tell."""
    start = sitting[-1].hours * WARM_UP
    values = [value for s in sitting if s.hours >= start and (value := getattr(s, name)) is not None]
    return max(0, values[-1] - values[0]) if values else None
