"""What became of one cohort, as it is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from esper.errors import StateError
from esper.protocol import Lifecycle
from esper.worth import Choice, Place, gain_share, targets

REPORT_VERSION = 1
"""Version of the stored form; raised when a field changes meaning or is removed."""
ENDS = (Lifecycle.FOSSILIZED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK)
"""States in which a cohort has ended."""
_MOST_ID_BYTES = 1_000
"""PostgreSQL's indices take 2,700."""
_LARGEST = 1 << 62


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A cohort's seeds on one site: where that was, and what grew there."""

    site: str
    place: Place
    choice: Choice
    """As it grew, which may differ from the design (a rank cap, a budget)."""
    design: str
    """Name of the design it follows."""
    width: int
    """Units of one seed."""
    params: int
    """Of all its seeds."""
    share: float
    """Its part of the cohort's parameters."""


class FieldReport(msgspec.Struct, frozen=True, kw_only=True):
    """A cohort from germination to its end. ``None`` is unknown: a cohort that was never judged has no gain.

    Gains are held-out loss differences (positive is better) with their 95% interval, ``gain_shrunken`` corrected for
    having picked the best of several looks.
    """

    v: int = REPORT_VERSION
    run: str
    """Name of the run and when it began."""
    job: str
    """What was trained: the preset, or whatever the user calls it."""
    arm: str
    seed: int
    cohort: int
    germinated: int
    """Step."""
    ended: int
    """Step."""
    placements: tuple[Placement, ...]
    added_params: int
    added_flops_share: float | None
    """Forward FLOPs the cohort adds, as a share of the model's before it."""
    held_out: float | None
    """Held-out loss before it was judged: what gains are shares of."""
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    gain_shrunken: float | None = None
    looks: int = 0
    """How often it was judged."""
    state: Lifecycle
    """The end state that tells its fate."""
    reason: str

    @property
    def id(self) -> str:
        """Filed twice, a report is one."""
        return f"{self.run}/{self.arm}/{self.seed}/{self.cohort}"

    @property
    def kept(self) -> bool:
        return self.state is Lifecycle.FOSSILIZED

    @property
    def targets(self) -> tuple[float, float, float] | None:
        """What it says of its worth, as :data:`esper.worth.TARGETS`; ``None``: nothing."""
        gain = gain_share(self.gain_shrunken, self.held_out)
        return targets(self.state, gain, self.added_flops_share, self.reason)


def check_report(report: FieldReport) -> None:
    """Refuse a report from elsewhere that fits its form and would still spoil what is learnt from all of them.

    Raises
    ------
    StateError
        It is of a newer version, has not ended, tells of no site, or has a number or a text that cannot be.
    """
    if not 1 <= report.v <= REPORT_VERSION:
        raise StateError(f"this Esper reads field reports up to version {REPORT_VERSION}, got {report.v}; update it")
    if report.state not in ENDS:
        raise StateError(f"a report is about a cohort that has ended, got one in state {report.state.name}")
    if not report.placements:
        raise StateError("a report names the sites where its cohort has grown, got none")
    if (size := len(report.id.encode())) > _MOST_ID_BYTES:
        raise StateError(f"a report's id has at most {_MOST_ID_BYTES} bytes, got {size}")
    for part in (report, *report.placements, *(p.place for p in report.placements), *_choices(report)):
        for name in part.__struct_fields__:
            _check_value(name, getattr(part, name))
    for part in report.placements:
        if not 0 <= part.share <= 1:
            raise StateError(f"a placement's share must lie between 0 and 1, got {part.share}")
    for choice in _choices(report):
        if choice.seeds < 1 or min(choice.growth, choice.scale, choice.lr_scale) < 0:
            raise StateError(f"a choice has a seed at least and no number below 0, got {choice}")


def _choices(report: FieldReport) -> Iterator[Choice]:
    return (part.choice for part in report.placements)


def _check_value(name: str, value: object) -> None:
    if isinstance(value, str) and "\0" in value:  # PostgreSQL keeps none
        raise StateError(f"{name} of a report must be text without NUL characters, got {value[:40]!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise StateError(f"{name} of a report must be finite, got {value}; what is unknown is null")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise StateError(f"{name} of a report must have at most 62 bits, got {value.bit_length()}")
