"""Records made by hand."""

from __future__ import annotations

from typing import Any

from esper.runs.trials.records import CohortRecord, FaultRecord, Found, TrialRecord

UNKNOWN = Found(gain=None, low=None, high=None)


def gain(value: float, half: float = 0.0) -> Found:
    return Found(gain=value, low=value - half, high=value + half)


def kept(on_off: float | None, twin: float | None = None, *, half: float = 0.0, number: int = 1) -> CohortRecord:
    return CohortRecord(
        cohort=number, end="FOSSILIZED", passed=True, on_off=None if on_off is None else gain(on_off, half),
        twin=None if twin is None else gain(twin, half),
    )  # fmt: skip


def culled(number: int = 2, *, is_null: bool = False) -> CohortRecord:
    return CohortRecord(cohort=number, end="CULLED", is_null=is_null)


def trial(number: int, *cohorts: CohortRecord, **changed: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "number": number, "kind": "grown", "task": "spirals", "family": "mlp", "width": 4, "noise": 0.1,
        "gate_rows": 8, "optimizer": "adamw", "lr": 0.01, "decays": True, "headroom": UNKNOWN, "alone": 1.0,
        "effect": UNKNOWN, "seeds": 2 * len(cohorts), "seeds_ended": 2 * len(cohorts), "seeds_cut": 0,
        "rolled_back": 0, "finite": True, "cohorts": cohorts, "seconds": 1.0,
    }  # fmt: skip
    return TrialRecord(**fields | changed)


def fault(number: int, kind: str, *, held: bool, struck: int = 1, expects: str = "restored") -> FaultRecord:
    return FaultRecord(
        number=number, kind=kind, task="spirals", family="mlp", phase="GRAFTING", struck=struck, expects=expects,
        held=held, detail="" if held else "it broke", seconds=0.1,
    )  # fmt: skip
