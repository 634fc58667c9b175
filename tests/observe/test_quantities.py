"""Numbers as people read them: known answers."""

from __future__ import annotations

import math

import pytest

from esper.observe.quantities import decimal, duration, magnitude, percent, signed, site_list

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (magnitude(21_400), "21.4k"), (magnitude(999), "999"), (magnitude(999_999), "1M"), (magnitude(4_100), "4.1k"),
        (magnitude(123_456), "123k"), (magnitude(2.1e9), "2.1G"), (magnitude(0), "0"), (magnitude(-1500), "-1.5k"),
        (magnitude(0.25), "0.25"), (magnitude(math.nan), "?"), (magnitude(3e22), "3.00e+22"),
        (decimal(0.3556), "0.356"), (decimal(math.inf), "?"), (decimal(2e-5), "2.00e-05"), (decimal(0.0), "0.000"),
        (signed(0.031), "+0.031"), (signed(-0.031), "-0.031"), (signed(math.nan), "?"),
        (percent(0.06, sign=True), "+6%"), (percent(0.062), "6.2%"), (percent(1.31), "131%"), (percent(math.nan), "?"),
        (duration(0.25), "250 ms"), (duration(3.5), "3.5 s"), (duration(75), "1 min 15 s"), (duration(120), "2 min"),
        (duration(7260), "2 h 1 min"), (duration(-1), "?"),
        (site_list(["a", "a", "b"]), "a, b"), (site_list(["a", "b", "c", "d"]), "a, b +2"), (site_list([]), "no site"),
    ],
)  # fmt: skip
def test_known_answers(shown: str, expected: str) -> None:
    assert shown == expected
