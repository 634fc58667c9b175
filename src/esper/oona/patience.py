"""How long whoever takes data may need: longer for more of it, so that what is large is not given up half sent."""

from __future__ import annotations

SLOWEST_BYTES_PER_S = 1 << 20
"""A wire or a server that is slower than this counts as gone."""


def patience_for(num_bytes: int) -> float:
    """Seconds that so many bytes may take, beside what any answer may take."""
    return num_bytes / SLOWEST_BYTES_PER_S
