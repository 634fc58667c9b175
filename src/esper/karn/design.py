"""A design: one way to grow on a kind of site, with where it comes from and whether it may be used."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import msgspec

from esper.worth import Choice

DESIGN_VERSION = 1
"""Version of the stored form; raised when a field changes meaning or is removed."""

GROWTHS = tuple(2.0 ** (step / 2) for step in range(-6, 9))
"""From an eighth to sixteen times the width of reference, in half octaves."""
SEEDS = (1, 2, 4, 8, 16)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
LR_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)

Status = Literal["passed", "failed", "untested"]


class Design(msgspec.Struct, frozen=True, kw_only=True):
    """What could grow on sites of a kind. Its numbers lie on the grid above.

    Only ``passed`` designs are proposed. One that failed its test is kept with the reason, so that nobody makes it
    again.
    """

    v: int = DESIGN_VERSION
    kind: str
    """The :class:`~esper.protocol.SiteKind` it is for."""
    choice: Choice
    parents: tuple[str, ...] = ()
    """Names of the designs it was made from."""
    operator: str = "observed"
    """``observed`` (it has grown in a run), ``menu`` (a built-in pair at a size), ``mutation``, ``crossover`` or
    ``random``."""
    generation: int = 0
    """One more than the oldest parent's."""
    created: float = 0.0
    """Seconds since 1970."""
    status: Status = "untested"
    reason: str = ""
    """Why it failed."""

    @property
    def name(self) -> str:
        """The same kind and choice have the same name, whoever makes them."""
        return content_name(self.kind, self.choice)


def content_name(kind: str, choice: Choice) -> str:
    """Twelve hexadecimal digits that stand for what grows, on the grid."""
    return hashlib.sha256(msgspec.json.encode([kind, on_grid(choice)])).hexdigest()[:12]


def on_grid(choice: Choice) -> Choice:
    """The nearest choice whose numbers lie on the grid."""
    return msgspec.structs.replace(
        choice,
        growth=nearest(choice.growth, GROWTHS),
        seeds=int(nearest(choice.seeds, SEEDS)),
        scale=nearest(choice.scale, SCALES),
        lr_scale=nearest(choice.lr_scale, LR_SCALES),
    )


def nearest(value: float, grid: tuple[float, ...] | tuple[int, ...]) -> float:
    """The grid's member nearest to ``value`` by ratio."""
    return min(grid, key=lambda member: abs(math.log(member / max(value, 1e-9))))
