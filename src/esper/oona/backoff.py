"""How to treat a broker that does not answer: wait longer each time, and after some failures do not even ask.

Both are plain state without sleeping, tasks or locks; the caller waits. For one thread each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

from esper.errors import ConfigError

Circuit = Literal["closed", "open", "half-open"]


class Backoff:
    """Waits that grow exponentially with full jitter: uniform between 0 and ``first_s * 2 ** failures``, capped.

    Full jitter spreads many clients of one broker that comes back (M. Brooker, "Exponential Backoff And Jitter", 2015).

    Parameters
    ----------
    first_s, most_s:
        Upper ends of the first wait and of any wait.
    generator:
        Where the jitter comes from; a seeded one makes the waits the same each time.

    Raises
    ------
    ConfigError
        Not ``0 < first_s <= most_s``.
    """

    def __init__(self, *, first_s: float = 0.1, most_s: float = 30.0, generator: random.Random | None = None) -> None:
        if not 0 < first_s <= most_s < float("inf"):
            raise ConfigError(f"waits need 0 < first_s <= most_s, got first_s={first_s}, most_s={most_s}")
        self._first_s, self._most_s = first_s, most_s
        self._generator = generator or random.Random()
        self.failures = 0
        """Waits handed out since the last :meth:`reset`."""

    @property
    def ceiling_s(self) -> float:
        """Upper end of the next wait."""
        # Beyond 2 ** 64 the cap has long been reached; a larger power would overflow a float.
        return min(self._most_s, self._first_s * 2.0 ** min(self.failures, 64))

    def next_s(self) -> float:
        """Seconds to wait after one more failure."""
        ceiling = self.ceiling_s
        self.failures += 1
        return self._generator.uniform(0.0, ceiling)

    def reset(self) -> None:
        """It worked: the next failure begins with a short wait again."""
        self.failures = 0


class CircuitBreaker:
    """Whether to try at all.

    ::

        closed     every call passes; ``most_failures`` failures in a row open it
        open       no call passes for ``rest_s`` seconds
        half-open  one call passes as a probe: if it succeeds the circuit closes, if it fails the circuit opens for
                   twice as long as before, at most ``most_rest_s``; a probe that reports nothing for as long as the
                   last rest (its task was cancelled) is followed by another

    A success closes the circuit whenever it comes, a failure while it is open changes nothing: both may belong to calls
    that began earlier.

    Parameters
    ----------
    most_failures:
        Failures in a row that open it, at least 1.
    rest_s, most_rest_s:
        Length of the first rest and of the longest.
    clock:
        Seconds that only go forward.

    Raises
    ------
    ConfigError
        A parameter is outside its range.
    """

    def __init__(
        self,
        *,
        most_failures: int = 5,
        rest_s: float = 1.0,
        most_rest_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if most_failures < 1:
            raise ConfigError(f"most_failures must be at least 1, got {most_failures}")
        if not 0 < rest_s <= most_rest_s < float("inf"):
            raise ConfigError(f"rests need 0 < rest_s <= most_rest_s, got rest_s={rest_s}, most_rest_s={most_rest_s}")
        self._most_failures, self._first_rest_s, self._most_rest_s = most_failures, rest_s, most_rest_s
        self._clock = clock
        self._failures = 0
        self._rest_s = rest_s
        self._next_probe: float | None = None
        """When a probe may pass; None while closed."""
        self._is_probing = False
        self.times_opened = 0
        """How often it went from closed to open."""

    @property
    def state(self) -> Circuit:
        """Half-open as soon as a probe may pass, and while one is under way."""
        if self._next_probe is None:
            return "closed"
        return "half-open" if self._is_probing or self._clock() >= self._next_probe else "open"

    @property
    def wait_s(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        return 0.0 if self._next_probe is None else max(0.0, self._next_probe - self._clock())

    def allow(self) -> bool:
        """Whether a call may pass now; whoever is told so reports its outcome."""
        if self._next_probe is None:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._is_probing, self._next_probe = True, now + self._rest_s
        return True

    def succeeded(self) -> None:
        """A call got its answer."""
        self._failures, self._rest_s = 0, self._first_rest_s
        self._is_probing, self._next_probe = False, None

    def failed(self) -> None:
        """A call got none."""
        if self._next_probe is None:
            self._failures += 1
            if self._failures >= self._most_failures:
                self.times_opened += 1
                self._next_probe = self._clock() + self._rest_s
        elif self._is_probing:
            self._rest_s = min(2 * self._rest_s, self._most_rest_s)
            self._is_probing, self._next_probe = False, self._clock() + self._rest_s
