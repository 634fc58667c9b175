"""The states of a seed."""

from __future__ import annotations

import enum


class Lifecycle(enum.IntEnum):
    """The eleven states of a seed; the codes are those of the specification and never change."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10
