"""What became of one cohort, as it is kept."""

from __future__ import annotations

import msgspec

from esper.protocol import Lifecycle
from esper.worth import Choice, Place, gain_share, targets

REPORT_VERSION = 1
"""Version of the stored form; raised when a field changes meaning or is removed."""


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
