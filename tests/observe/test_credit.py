"""Claims against what was found, and the effect of grafting: known answers, and a draw that is unbiased."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.observe.synthetic import records

from esper import protocol as p
from esper.observe.credit import claims, effects_of, fit_line, grafting_effect
from esper.observe.history import RunHistory, fold
from esper.observe.report.claims import calibration_chart, effect_text, twin_table
from esper.protocol import Lifecycle

pytestmark = pytest.mark.unit


def effect(cohort: int, withheld: bool, fall: float) -> p.EffectScored:
    return p.EffectScored(
        step=200, cohort=cohort, withheld=withheld, loss_before=1.0, loss_after=1.0 - fall, num_steps=100, flops=1e6
    )


def history(*stream: p.AnyEvent) -> RunHistory:
    return fold(p.Record(v=1, seq=i, time=float(i), event=event) for i, event in enumerate(stream))


def test_a_line_through_known_points() -> None:
    exact = fit_line([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0])
    assert (exact.slope, exact.intercept, exact.num) == (2.0, 1.0, 4) and exact.low == exact.high == 2.0
    noisy = fit_line([1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 1.9, 3.2, 3.8, 5.0])
    # residuals 0.04, -0.13, 0.2, -0.17, 0.06: standard error sqrt(0.091 / 3 / 10); t(3) = 3.182
    assert noisy.slope == pytest.approx(0.97) and noisy.high - noisy.slope == pytest.approx(3.182 * (0.091 / 30) ** 0.5)


@pytest.mark.parametrize("xs", [[], [1.0], [2.0, 2.0, 2.0]])
def test_no_line_without_two_different_claims(xs: list[float]) -> None:
    assert math.isnan(fit_line(xs, xs).slope)


def test_the_effect_is_the_difference_of_means_with_welchs_interval() -> None:
    grafted, withheld = (0.30, 0.34, 0.26, 0.30), (0.10, 0.20, 0.15)
    events = [effect(i, False, fall) for i, fall in enumerate(grafted)]
    events += [effect(10 + i, True, fall) for i, fall in enumerate(withheld)]
    found = grafting_effect(events)
    assert found is not None and (found.num_grafted, found.num_withheld) == (4, 3)
    assert found.gain == pytest.approx(0.15)
    # standard error sqrt(0.0010667 / 4 + 0.0025 / 3) = 0.033166, Welch's freedom 3.2, t(3) = 3.182
    assert found.high - found.gain == pytest.approx(3.182 * 0.033166, rel=1e-3)


def test_one_of_a_kind_gives_no_interval_and_nothing_drawn_no_effect() -> None:
    assert grafting_effect([]) is None
    one = grafting_effect([effect(1, False, 0.3), effect(2, True, 0.1)])
    assert one is not None and one.gain == pytest.approx(0.2) and math.isnan(one.low)
    none = grafting_effect([effect(1, False, 0.3)])
    assert none is not None and math.isnan(none.gain) and none.num_withheld == 0


def test_the_draw_makes_the_estimate_unbiased_and_its_interval_honest() -> None:
    rng = np.random.default_rng(4)
    gains, covered = [], 0
    for _ in range(400):
        potential = rng.exponential(0.3, 40)  # how much the loss falls anyway differs a lot between cohorts
        events = [
            effect(i, bool(held), float(fall) + (0.0 if held else 0.1))
            for i, (fall, held) in enumerate(zip(potential, rng.random(40) < 0.3, strict=True))
        ]
        found = grafting_effect(events)
        assert found is not None
        gains.append(found.gain)
        covered += found.low <= 0.1 <= found.high
    assert np.mean(gains) == pytest.approx(0.1, abs=3 * np.std(gains) / 20)
    assert covered >= 0.91 * 400


def test_claims_take_the_strongest_source_and_only_accepted_cohorts() -> None:
    run = fold(records()).arms["grown"][0]
    found = claims(run.cohorts.values())
    by_number = {claim.cohort: claim for claim in found}
    assert len(found) == 4 and {by_number[number].source for number in (0, 2, 5)} == {"twin audit"}
    assert by_number[6].source == "twin", "accepted, but gone when the audit came"
    for claim in found:
        assert claim.found == pytest.approx(1.1 * claim.claimed)
        assert claim.low < claim.found < claim.high


def test_what_was_scored_is_drawn_and_said() -> None:
    runs = list(fold(records()).arms["grown"].values())
    assert "slope 1.10" in calibration_chart(runs) and "12 accepted cohorts" in calibration_chart(runs)
    assert "after 100 steps" in twin_table(runs) and "No cohort was withheld" in effect_text(runs)


def test_a_withheld_cohort_is_told_apart_from_a_cancelled_one() -> None:
    from esper.observe.report.outcome import describe, look_of

    cancelled = p.Transitioned(
        step=150, cohort=1, seeds=(1,), source=Lifecycle.TRAINING, target=Lifecycle.CANCELLED, alpha=0.0, reason="why"
    )
    told = history(p.Withheld(step=50, cohort=1, sites=("a",), until=150), effect(1, True, 0.1), cancelled)
    run = told.arms["grown"][0]
    assert look_of(run.cohorts[1]).word == "withheld by a draw" and "at step 50" in describe(run.cohorts[1])
    assert len(effects_of([run])) == 1 and "not known yet" in effect_text([run])
    events = [effect(i, i % 2 == 0, 0.3 - 0.1 * (i % 2 == 0) + 0.01 * i) for i in range(8)]
    assert "Grafting lowered the held-out loss by <b>+0.11" in effect_text([history(*events).arms["grown"][0]])


def test_a_resumed_run_forgets_what_was_scored_after_the_checkpoint() -> None:
    run = history(p.Withheld(step=50, cohort=1, sites=("a",), until=150), effect(1, True, 0.1)).arms["grown"][0]
    run.rewind(100)
    assert run.cohorts[1].effect is None and run.cohorts[1].withheld is not None
