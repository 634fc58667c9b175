"""Reports and designs as runs would leave them."""

from __future__ import annotations

from typing import Any

from esper.karn import Design, FieldReport, Placement
from esper.karn.design import content_name
from esper.protocol import Lifecycle
from esper.worth import Choice, Place

PLACE = Place(
    kind="linear_span", family="mlp", optimizer="adaptive", log_in=2.1, log_out=1.1, log_hidden=2.1, fill=0.0,
    progress=0.1, loss_level=-0.2, price=0.0,
)  # fmt: skip
STARTS = ("copy", "gradmax", "negative_gradient", "random_zero", "reconstruction", "tiny")
OFFERS = tuple(("bottleneck", start) for start in STARTS)


def choice(start: str = "random_zero", **changes: Any) -> Choice:
    return Choice(**{"blueprint": "bottleneck", "start": start, "growth": 1.0, **changes})


def report(cohort: int = 0, *, start: str = "random_zero", gain: float | None = 0.1, **changes: Any) -> FieldReport:
    """A kept cohort on one span; ``gain=None`` makes it a rejected one."""
    what = changes.pop("choice", choice(start))
    placement = Placement(
        site="0-2", place=changes.pop("place", PLACE), choice=what, width=8, params=100, share=1.0,
        design=changes.pop("design", content_name("linear_span", what)),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "run": "run", "job": "digits", "arm": "grown", "seed": 0, "cohort": cohort, "germinated": 10, "ended": 50,
        "placements": (placement,), "added_params": 100, "added_flops_share": 0.5, "held_out": 1.0, "gain": gain,
        "gain_shrunken": gain, "looks": 1, "state": Lifecycle.CULLED if gain is None else Lifecycle.FOSSILIZED,
        "reason": "because",
    }  # fmt: skip
    return FieldReport(**(fields | changes))


def design(start: str = "tiny", **changes: Any) -> Design:
    what = changes.pop("choice", choice(start, growth=2.0))
    return Design(**{"kind": "linear_span", "choice": what, "operator": "mutation", "status": "passed", **changes})


def experience(good: str = "tiny", num: int = 60) -> tuple[FieldReport, ...]:
    """Every start in turn; only one of them is ever kept."""
    return tuple(
        report(number, start=start, gain=0.2 if start == good else None)
        for number in range(num)
        for start in (STARTS[number % len(STARTS)],)
    )
