"""How each fate and each state looks and is called, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esper.observe.history import Cohort
from esper.observe.quantities import magnitude, signed, site_list
from esper.protocol import Lifecycle


@dataclass(frozen=True, slots=True)
class Look:
    """Symbol, style class and word of a cohort's fate."""

    shape: str
    class_: str
    word: str


KEPT = Look("disc", "kept", "kept")
REJECTED = Look("cross", "rejected", "rejected")
ROLLED_BACK = Look("diamond", "rolled", "rolled back")
CANCELLED = Look("square", "cancelled", "cancelled")
WITHHELD = Look("triangle", "cancelled", "withheld by a draw")
ALIVE = Look("ring", "alive", "in progress")
LOOKS = (KEPT, REJECTED, ROLLED_BACK, CANCELLED, WITHHELD, ALIVE)

_BY_STATE = {
    Lifecycle.FOSSILIZED: KEPT,
    Lifecycle.CULLED: REJECTED,
    Lifecycle.ROLLED_BACK: ROLLED_BACK,
    Lifecycle.CANCELLED: CANCELLED,
}

STATE_NAMES = {
    Lifecycle.GERMINATED: "capturing",
    Lifecycle.TRAINING: "isolated training",
    Lifecycle.GRAFTING: "grafting",
    Lifecycle.STABILIZATION: "stabilising",
    Lifecycle.EVALUATING: "evaluating",
    Lifecycle.FINE_TUNING: "fine-tuning",
    Lifecycle.FOSSILIZED: "kept",
    Lifecycle.CULLED: "rejected",
    Lifecycle.CANCELLED: "cancelled",
    Lifecycle.ROLLED_BACK: "rolled back",
    Lifecycle.DORMANT: "dormant",
}


def look_of(cohort: Cohort) -> Look:
    return WITHHELD if cohort.withheld is not None else _BY_STATE.get(cohort.state, ALIVE)


def reason_of(cohort: Cohort) -> str:
    """Why the cohort is where it is: the last gate's own words."""
    verdict = cohort.verdict
    if verdict is not None and not verdict.accepted and cohort.state is Lifecycle.CULLED:
        return verdict.reason
    ends = [event for event in cohort.transitions if event.target is cohort.state]
    return ends[-1].reason if ends else (cohort.germinated.reason if cohort.germinated else "")


def seed_shape(cohort: Cohort) -> str:
    """``bottleneck x64``, or the list of distinct ones."""
    if cohort.germinated is None:
        return ""
    shapes = zip(cohort.germinated.blueprints, cohort.germinated.widths, strict=False)
    return ", ".join(dict.fromkeys(f"{blueprint} x{width}" for blueprint, width in shapes))


def describe(cohort: Cohort) -> str:
    """Tooltip of a cohort: everything that decides about it, a fact a line."""
    lines = [f"#{cohort.cohort} {site_list(cohort.sites, 4)}", f"{look_of(cohort).word}: {reason_of(cohort)}"]
    if seed_shape(cohort):
        lines.append(f"{seed_shape(cohort)}, {magnitude(cohort.added_params)} parameters")
    for judged in cohort.judgements:
        lines.append(
            f"{judged.stage} at step {judged.step}: gain {signed(judged.gain, 4)} "
            f"[{signed(judged.gain_low, 4)}, {signed(judged.gain_high, 4)}], shrunken {signed(judged.gain_shrunken, 4)}"
        )
        lines.append(
            f"  e-value {judged.e_value:.3g} of {judged.e_threshold:.3g}, confirmation p {_p(judged.confirm_p)}, "
            f"{judged.num_batches} batches"
        )
    if cohort.withheld is not None:
        lines.append(f"withheld by a draw at step {cohort.withheld.step}")
    if cohort.twin is not None:
        twin = cohort.twin
        lines.append(
            f"credit against a twin after {twin.num_steps} steps: {signed(twin.credit, 4)} "
            f"[{signed(twin.credit_low, 4)}, {signed(twin.credit_high, 4)}]"
        )
    for audited in cohort.audits:
        lines.append(
            f"audit, {audited.source.replace('_', '/')}: {signed(audited.gain, 4)} "
            f"[{signed(audited.gain_low, 4)}, {signed(audited.gain_high, 4)}]"
        )
    return "\n".join(lines)


def _p(value: float) -> str:
    return "not reached" if math.isnan(value) else f"{value:.2g}"
