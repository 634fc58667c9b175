"""Waits grow within their bounds; the circuit breaker against a plain account of what it may do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.errors import ConfigError
from esper.oona.backoff import Backoff, CircuitBreaker

pytestmark = pytest.mark.unit


@given(st.floats(1e-3, 10), st.floats(1, 1e3), st.integers(0, 2**32), st.integers(1, 200))
def test_each_wait_lies_between_nothing_and_its_ceiling(first: float, times: float, seed: int, num: int) -> None:
    backoff = Backoff(first_s=first, most_s=first * times, generator=random.Random(seed))
    for failure in range(num):
        ceiling = backoff.ceiling_s
        assert ceiling == pytest.approx(min(first * times, first * 2.0 ** min(failure, 64)))
        assert 0 <= backoff.next_s() <= ceiling
        assert backoff.failures == failure + 1


def test_waits_repeat_under_one_seed_and_are_spread_over_the_whole_range() -> None:
    def waits(seed: int) -> list[float]:
        backoff = Backoff(first_s=1, most_s=8, generator=random.Random(seed))
        return [backoff.next_s() for _ in range(2000)]

    assert waits(3) == waits(3) != waits(4)
    late = waits(3)[3:]
    assert min(late) < 0.1 and max(late) > 7.9
    assert sum(late) / len(late) == pytest.approx(4, abs=0.2)


def test_a_success_begins_anew() -> None:
    backoff = Backoff(first_s=0.5, most_s=60)
    for _ in range(10):
        backoff.next_s()
    assert backoff.ceiling_s == 60
    backoff.reset()
    assert backoff.ceiling_s == 0.5


@pytest.mark.parametrize(("first", "most"), [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (float("nan"), 1)])
def test_waits_out_of_range_are_refused(first: float, most: float) -> None:
    with pytest.raises(ConfigError, match="first_s="):
        Backoff(first_s=first, most_s=most)
    with pytest.raises(ConfigError, match="rest_s="):
        CircuitBreaker(rest_s=first, most_rest_s=most)


def test_a_breaker_needs_a_failure_to_open() -> None:
    with pytest.raises(ConfigError, match="got 0"):
        CircuitBreaker(most_failures=0)


class Breaker(RuleBasedStateMachine):
    """The breaker beside an account in words: rests, failures in a row, one probe at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = CircuitBreaker(most_failures=3, rest_s=1, most_rest_s=5, clock=lambda: self.now)
        self.in_a_row, self.opened_at, self.rest, self.probe_since = 0, None, 1.0, None

    @property
    def may_pass(self) -> bool:
        if self.opened_at is None:
            return True
        since = self.opened_at if self.probe_since is None else self.probe_since
        return self.now >= since + self.rest

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        expected = self.may_pass
        assert self.breaker.allow() == expected
        if expected and self.opened_at is not None:
            self.probe_since = self.now

    @rule()
    def succeed(self) -> None:
        self.breaker.succeeded()
        self.in_a_row, self.opened_at, self.rest, self.probe_since = 0, None, 1.0, None

    @rule()
    def fail(self) -> None:
        self.breaker.failed()
        if self.opened_at is None:
            self.in_a_row += 1
            if self.in_a_row >= 3:
                self.opened_at = self.now
        elif self.probe_since is not None:
            self.rest = min(5.0, 2 * self.rest)
            self.opened_at, self.probe_since = self.now, None

    @precondition(lambda self: self.opened_at is not None)
    @rule()
    def wait_as_told(self) -> None:
        self.now += self.breaker.wait_s
        self.ask()

    @invariant()
    def agrees(self) -> None:
        if self.opened_at is None:
            state = "closed"
        else:
            state = "half-open" if self.probe_since is not None or self.may_pass else "open"
        assert self.breaker.state == state
        assert (self.breaker.wait_s == 0) == self.may_pass
        assert self.breaker.wait_s <= 5


TestBreaker = Breaker.TestCase


def test_the_course_of_an_outage() -> None:
    now = 0.0
    breaker = CircuitBreaker(most_failures=2, rest_s=1, most_rest_s=3, clock=lambda: now)
    breaker.failed()
    assert breaker.state == "closed" and breaker.allow()
    breaker.failed()
    assert breaker.state == "open" and not breaker.allow() and breaker.times_opened == 1
    for rest in (2, 3, 3):
        now += breaker.wait_s
        assert breaker.state == "half-open"
        assert breaker.allow() and not breaker.allow(), "one probe at a time"
        breaker.failed()
        assert breaker.state == "open" and breaker.wait_s == rest
    now += breaker.wait_s
    assert breaker.allow()
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.times_opened == 1
