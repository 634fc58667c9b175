from __future__ import annotations

import pytest

from esper.journal import Journal
from esper.protocol import AnyEvent, Overhead, Warned

pytestmark = pytest.mark.unit


def test_a_kind_of_warning_comes_once_and_is_an_event() -> None:
    events: list[AnyEvent] = []
    journal = Journal(events.append)
    with pytest.warns(RuntimeWarning) as caught:
        journal.warn("a", "first", 3)
        journal.warn("a", "second", 4)
        journal.warn("b", "third", 5)
    assert [str(warning.message) for warning in caught] == ["first", "third"]
    assert events == [Warned(step=3, message="first"), Warned(step=5, message="third")]


def test_nobody_listens() -> None:
    Journal(None).emit(Warned(step=1, message="x"))


def test_time_is_told_by_part_and_then_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 2.0, 2.25, 3.0, 3.125])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    events: list[AnyEvent] = []
    journal = Journal(events.append)
    with journal.timed("learn"):
        pass
    with pytest.raises(ValueError, match="x"), journal.timed("learn"):
        raise ValueError("x")
    journal.report_overhead(0)
    assert events == [], "no step has passed"
    journal.report_overhead(10)
    with journal.timed("decide"):
        pass
    journal.report_overhead(14)
    assert events == [
        Overhead(step=10, num_steps=10, milliseconds={"learn": 750.0}),
        Overhead(step=14, num_steps=4, milliseconds={"decide": 125.0}),
    ]
