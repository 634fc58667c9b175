"""Samples made by hand."""

from __future__ import annotations

from esper.runs.soak.summary import Sample


def sample(sitting: int, hours: float, **changed: object) -> Sample:
    fields: dict[str, object] = {
        "sitting": sitting, "hours": hours, "sitting_steps": 10, "steps": {"mlp": 10}, "transitions": {"A > B": 1},
        "seed_transitions": 1, "germinations": 1, "longest_wait": 30, "lives": 1, "faults": {}, "lost": {},
        "non_finite": 0, "params": 9, "memory_mb": 100.0, "gpu_memory_mb": None, "handles": 7, "threads": 2,
        "temporary_files": 0,
    }  # fmt: skip
    return Sample(**fields | changed)  # type: ignore[arg-type]
