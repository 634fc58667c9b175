"""How fast is fast enough: a token bucket."""

from __future__ import annotations

import time
from collections.abc import Callable

from esper.errors import ConfigError


class TokenBucket:
    """``rate`` tokens a second, at most ``burst`` at once. For one thread.

    Spending may overdraw it, so that what is larger than the bucket passes as well: then it takes longer to fill.

    Raises
    ------
    ConfigError
        A parameter is not above 0.
    """

    def __init__(self, rate: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not (0 < rate < float("inf") and 0 < burst < float("inf")):
            raise ConfigError(f"a rate and its burst must be above 0, got rate={rate}, burst={burst}")
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = burst, clock()

    @property
    def wait_s(self) -> float:
        """Seconds until something may be spent; 0 now."""
        self._fill()
        return 0.0 if self._tokens > 0 else -self._tokens / self._rate + 1e-6

    def spend(self, tokens: float) -> None:
        """Take tokens out, whether they are there or not."""
        self._fill()
        self._tokens -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
