"""Powers of two: the sizes that tiles of a kernel can have."""

from __future__ import annotations


def power_above(number: int) -> int:
    """The smallest power of two that is at least ``number`` (>= 1)."""
    return 1 << (number - 1).bit_length()


def power_below(number: int) -> int:
    """The largest power of two that is at most ``number`` (>= 1)."""
    return 1 << (number.bit_length() - 1)
