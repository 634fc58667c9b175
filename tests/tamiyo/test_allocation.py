from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.protocol import SITE_FEATURES, Observation
from esper.tamiyo.allocation import (
    MIN_WIDTH,
    Room,
    UnitCosts,
    affordable_share,
    asked_widths,
    fit_widths,
    growth_for,
    room,
    unit_costs,
)

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]
INF = float("inf")
NAN = float("nan")


def costs(params: list[float], flops: list[float] | None = None) -> UnitCosts:
    return UnitCosts(np.array(params), np.array(params if flops is None else flops))


def test_estimated_costs(observe: Observe) -> None:
    linear = unit_costs(observe(spans=1, layers=1))
    assert linear.params == pytest.approx([64 + 64 + 1, 64 + 64])
    assert linear.flops == pytest.approx(linear.params * 200)  # the host: 4e6 FLOPs for 20,000 parameters
    conv = unit_costs(observe(spans=1, layers=1, conv=True))
    assert conv.params == pytest.approx([9 * 128 + 1, 9 * 64 + 64])


def test_stated_costs_win_where_known(observe: Observe) -> None:
    stated = unit_costs(observe(spans=2, unit_params=np.array([7.0, NAN]), unit_flops=np.array([NAN, 9.0])))
    assert stated.params == pytest.approx([7.0, 129.0])
    assert stated.flops == pytest.approx([7.0 * 200, 9.0])


def test_room(observe: Observe) -> None:
    assert room(observe()) == Room(INF, INF)
    assert room(observe(budget_params=21_000, budget_flops=3e6)) == Room(1000.0, -1e6)


def test_asked_widths(observe: Observe) -> None:
    assert asked_widths(observe(spans=1, layers=1), 1.0).tolist() == [32, 8]
    assert asked_widths(observe(spans=1, layers=1), 1.5).tolist() == [48, 12]
    assert asked_widths(observe(spans=1, layers=1), 0.01).tolist() == [MIN_WIDTH, MIN_WIDTH]
    assert asked_widths(observe(spans=0, layers=1, width=3), 1.0).tolist() == [3]
    assert asked_widths(observe(spans=0, layers=1, width=16), 100.0).tolist() == [16]
    observation = observe(spans=0, layers=1)
    observation.sites[:] = NAN
    assert asked_widths(observation, 1.0).tolist() == [MIN_WIDTH]


@pytest.mark.parametrize(
    ("width", "reads", "writes", "conv", "found"),
    [
        (64, 64, 64, False, 32), (64, 64, 20, False, 20), (64, 64, 10, False, 16), (64, 9, 64, False, 16),
        (64, 19, 64, False, 20), (64, 3, 64, True, 28), (4, 10, 2, False, 2), (4, 10, 1, False, 2), (8, 2, 8, False, 3),
    ],
)  # fmt: skip
def test_lean_spans_ask_for_what_they_can_use(
    observe: Observe, width: int, reads: int, writes: int, conv: bool, found: int
) -> None:
    """Half the width, no more than outputs or inputs and a bias, at least half of that; a kernel reads nine times."""
    observation = observe(spans=1, layers=1, conv=conv)
    observation.hidden[0] = width
    observation.sites[0, SITE_FEATURES.index("log_in")] = np.log(reads)
    observation.sites[0, SITE_FEATURES.index("log_out")] = np.log(writes)
    plain = asked_widths(observation, 0.5)
    assert asked_widths(observation, 0.5, lean=True).tolist() == [found, plain[1]]
    assert plain[0] == max(MIN_WIDTH, width // 2)
    observation.sites[0, SITE_FEATURES.index("log_in")] = NAN
    assert asked_widths(observation, 0.5, lean=True)[0] == np.clip(writes, np.ceil(plain[0] / 2), plain[0])
    observation.sites[0, SITE_FEATURES.index("log_out")] = NAN
    assert asked_widths(observation, 0.5, lean=True)[0] == plain[0], "where nothing is known nothing is cut"


def test_growth_for_a_share_of_the_flops(observe: Observe) -> None:
    """32 units of each of four spans at 1e4 are 1.28e6 of 4e6."""
    cheap = observe(unit_flops=np.full(4, 1e4), grown=np.full(4, 32), flops_per_step=8e6)
    assert growth_for(0.5, cheap) == pytest.approx(2e6 / 1.28e6)
    assert growth_for(0.5, cheap, compound=True) == pytest.approx(4e6 / 2.56e6)
    cheap.eligible[1:] = False
    assert growth_for(0.5, cheap) == pytest.approx(2e6 / 1.28e6), "the same where few can grow"
    guessed = observe(unit_flops=np.array([1e4, 1e4, 1e4, NAN]))
    assert growth_for(0.5, guessed) == pytest.approx(2e6 / (0.96e6 + 32 * 129 * 200)), "what is not stated"
    assert np.isnan(growth_for(0.5, observe(spans=0, layers=4, unit_flops=np.full(4, 1e4)))), "no spans"
    assert np.isnan(growth_for(0.5, observe(unit_flops=np.zeros(4)))), "nothing costs anything"
    blind = observe(unit_flops=np.full(4, NAN))
    blind.sites[:, SITE_FEATURES.index("log_in")] = NAN
    assert np.isnan(growth_for(0.5, blind))


def test_each_site_may_grow_by_its_own(observe: Observe) -> None:
    seen = observe(spans=2, layers=1)
    assert asked_widths(seen, np.array([0.5, 2.0, 1.0])).tolist() == [16, 64, 8]


def test_even_trim_known_answers() -> None:
    asked = np.array([32, 64])
    assert fit_widths(asked, costs([10.0, 10.0]), Room(INF, INF)).tolist() == [32, 64]
    assert fit_widths(asked, costs([10.0, 10.0]), Room(960, INF)).tolist() == [32, 64]
    assert fit_widths(asked, costs([10.0, 10.0]), Room(480, INF)).tolist() == [16, 32]
    assert fit_widths(asked, costs([10.0, 10.0], [5.0, 5.0]), Room(480, 120)).tolist() == [8, 16]
    # A third of the room: 32 / 3 and 64 / 3, rounded down.
    assert fit_widths(asked, costs([10.0, 10.0]), Room(320, INF)).tolist() == [10, 21]


def test_sites_trimmed_below_the_minimum_are_left_out() -> None:
    assert fit_widths(np.array([8, 80]), costs([1.0, 1.0]), Room(22, INF)).tolist() == [0, 20]


def test_cheapest_sites_get_the_minimum_when_an_even_trim_leaves_none() -> None:
    asked = np.array([8, 8, 8])
    assert fit_widths(asked, costs([3.0, 1.0, 2.0]), Room(4.0, INF)).tolist() == [0, 4, 0]
    assert fit_widths(asked, costs([3.0, 1.0, 2.0]), Room(12.0, INF)).tolist() == [0, 4, 4]
    assert fit_widths(asked, costs([3.0, 1.0, 2.0]), Room(3.9, INF)).tolist() == [0, 0, 0]
    assert fit_widths(asked, costs([3.0, 1.0, 2.0]), Room(-5.0, INF)).tolist() == [0, 0, 0]


def test_unknown_cost_gets_nothing_under_a_ceiling() -> None:
    asked = np.array([8, 8])
    assert fit_widths(asked, costs([NAN, 1.0]), Room(100, INF)).tolist() == [0, 8]
    assert fit_widths(asked, costs([NAN, NAN]), Room(100, INF)).tolist() == [0, 0]
    assert fit_widths(asked, costs([NAN, NAN]), Room(INF, INF)).tolist() == [8, 8]
    assert fit_widths(asked, costs([1.0, 1.0]), Room(NAN, INF)).tolist() == [0, 0]


def test_affordable_share() -> None:
    assert affordable_share(np.array([10, 10]), costs([1.0, 3.0], [1.0, 1.0]), Room(10, 10)) == pytest.approx(0.25)
    assert affordable_share(np.array([10, 10]), costs([1.0, NAN]), Room(20, INF)) == 1.0


sites = st.integers(1, 30).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(1, 5000), min_size=k, max_size=k),
        st.lists(st.integers(1, 10**6), min_size=k, max_size=k),
        st.lists(st.floats(1.0, 1e15), min_size=k, max_size=k),
    )
)


@given(sites, st.integers(-10, 10**10), st.floats(0, 1e19))
def test_never_over_either_ceiling(drawn: tuple[list[int], list[int], list[float]], params: int, flops: float) -> None:
    asked, unit_params, unit_flops = (np.array(part) for part in drawn)
    widths = fit_widths(asked, UnitCosts(unit_params.astype(float), unit_flops), Room(params, flops))
    assert ((widths == 0) | (widths >= np.minimum(asked, MIN_WIDTH))).all() and (widths <= asked).all()
    assert (widths * unit_params).sum() <= max(params, 0)
    assert (widths * unit_flops).sum() <= flops
    cheapest = (np.minimum(asked, MIN_WIDTH) * unit_params).argmin()
    least = min(asked[cheapest], MIN_WIDTH)
    if (unit_flops * np.minimum(asked, MIN_WIDTH)).sum() <= flops and least * unit_params[cheapest] <= params:
        assert widths.any()
