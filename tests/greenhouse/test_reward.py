"""What would pay under a naive reward, and does not here.

Each exploit is shown twice: it earns under the naive reward, and it earns nothing (or loses) under ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from esper.greenhouse.episodes import Episodes, Outcome
from esper.greenhouse.family import HostSpec
from esper.greenhouse.frontier import Frontier, frontier_of, tasks_of
from esper.protocol import Command, Cull, Germinate, Lifecycle, Observation, SeedPlan, Stop

pytestmark = pytest.mark.component

Player = Callable[[Observation], Sequence[Command]]
TASKS = range(4)


def grow(observation: Observation, *sites: int, size: float = 2.0, start: str = "random_zero") -> list[Command]:
    """Germinate on the sites that may grow."""
    free = [site for site in sites or range(len(observation.site_names)) if observation.eligible[site]]
    plans = [
        SeedPlan(site=observation.site_names[site], width=round(size * observation.hidden[site]), start=start)
        for site in free
    ]
    return [Germinate(seeds=tuple(plans))] if plans else []


def never(observation: Observation) -> list[Command]:
    return []


def at(steps: Sequence[int], *sites: int, **how: float) -> Player:
    return lambda seen: grow(seen, *sites, **how) if seen.step in steps else []


def churn(observation: Observation) -> list[Command]:
    """Fit and graft whenever that is possible, and take out what is there before it is judged."""
    young = [view for view in observation.alive if view.state is Lifecycle.GRAFTING]
    return [Cull(cohort=young[0].cohort, reason="churn")] if young else grow(observation, start="negative_gradient")


def stop_at_once(observation: Observation) -> list[Command]:
    return [Stop(reason="early")] if observation.stopped is None else []


PLAYERS: dict[str, Player] = {
    "never": never,
    "right site": at([20], 0, size=4.0),
    "wrong site": at([20, 120], 1, size=1.0),
    "everything": grow,
    "at the end": at([360]),
    "late": at([320], 0),
    "churn": churn,
    "stop": stop_at_once,
}


@functools.cache
def outcomes(family: str, player: str) -> tuple[Outcome, ...]:
    running = Episodes([HostSpec(family=family, task=task, seed=s, lr=2e-2) for task in TASKS for s in (0, 1)])
    while not running.done:
        running.order([PLAYERS[player](seen) for seen in running.observations])
    return running.outcomes


def reward(family: str, player: str) -> float:
    return float(np.mean([end.reward for end in outcomes(family, player)]))


def loss(family: str, player: str) -> float:
    return float(np.mean([end.loss for end in outcomes(family, player)]))


def flops(family: str, player: str, *parts: str) -> float:
    return float(np.mean([sum(end.parts[part] for part in parts) for end in outcomes(family, player)]))


def test_growing_everything_lowers_the_loss_most_and_earns_no_more_than_it_costs() -> None:
    assert loss("planted", "everything") < 0.7 * loss("planted", "never")  # a reward for the loss alone would pay
    assert reward("planted", "everything") < 0.5
    assert reward("planted", "everything") < reward("planted", "right site") - 1


def test_never_growing_costs_least_and_earns_nothing_where_growth_helps() -> None:
    assert flops("planted", "never", "host", "branches", "fit", "evidence") < flops(
        "planted", "right site", "host", "branches", "fit", "evidence"
    )  # a reward for few FLOPs would pay
    assert reward("planted", "never") < 0.5 < reward("planted", "right site") - 0.5


def test_stopping_at_once_is_never_growing() -> None:
    assert reward("planted", "stop") == pytest.approx(reward("planted", "never"), abs=1e-9)


@pytest.mark.parametrize("player", ["at the end", "late"])
def test_growing_late_adds_size_but_no_reward(player: str) -> None:
    """A reward for the size, or against the frontier of the training alone, would pay for nothing learnt."""
    ends = outcomes("planted", player)
    assert flops("planted", player, "branches", "evidence") > 1.5 * flops("planted", "never", "branches", "evidence")
    assert np.mean([end.reward for end in ends]) < reward("planted", "never")


def test_churning_is_paid_for() -> None:
    """Fits, trials that are taken out again and looks at held-out data: left out of the sum they would be free."""
    free = [
        frontier_of("null", task).reward(end.loss, end.parts["host"])
        for task, end in zip(np.repeat(TASKS, 2).tolist(), outcomes("null", "churn"), strict=True)
    ]
    assert np.mean(free) > reward("null", "churn")
    assert reward("null", "churn") < reward("null", "never")


@pytest.mark.parametrize("player", ["everything", "at the end", "churn"])
def test_a_null_host_pays_nobody(player: str) -> None:
    assert reward("null", player) < min(0.3, reward("null", "never"))


def test_a_null_host_hardly_grows_even_when_asked_to() -> None:
    grown = [end.params for end in outcomes("null", "everything")]
    assert np.median(grown) <= 2.5 * min(end.params for end in outcomes("null", "never"))


def test_a_planted_site_is_the_right_one() -> None:
    assert reward("planted", "right site") > reward("planted", "wrong site") + 3
    assert reward("planted", "right site") > 1


def test_drift_of_the_host_is_no_credit() -> None:
    """The held-out loss falls while nothing grows: what falls since a germination is not what it has earned."""
    assert loss("planted", "late") < 0.9  # the host has learnt a lot since the start (about 1 by chance)
    assert abs(loss("planted", "late") / loss("planted", "never") - 1) < 0.03
    assert reward("planted", "late") < reward("planted", "never")


# ----------------------------------------------------------------------------------------------------------------------
# The frontier


@pytest.mark.unit
def test_the_envelope_of_known_points() -> None:
    frontier = Frontier.of([4.0, 1.0, 2.0, 8.0], [0.5, 1.0, 1.2, 0.6], 0.1)
    assert frontier.flops == (1.0, 4.0) and frontier.losses == (1.0, 0.5)
    assert frontier.loss_at(2.0) == pytest.approx(0.75)  # straight in log FLOPs
    assert frontier.loss_at(0.5) == 1.0 and frontier.loss_at(100.0) == 0.5
    assert frontier.reward(0.55, 2.0) == pytest.approx(2.0)
    assert frontier.reward(float("nan"), 2.0) == frontier.reward(float("inf"), 2.0) == -10.0


@pytest.mark.unit
def test_more_shapes_make_a_stricter_frontier() -> None:
    for task in tasks_of("teacher")[:8]:
        own, strict = frontier_of("teacher", task), frontier_of("teacher", task, any_shape=True)
        for cost in own.flops:
            assert strict.loss_at(cost) <= own.loss_at(cost) + 1e-12
        assert own.deviation == strict.deviation > 0
        assert list(own.losses) == sorted(own.losses, reverse=True) and len(own.flops) >= 3


@pytest.mark.unit
def test_what_was_not_measured_is_an_error() -> None:
    from esper.errors import ConfigError

    with pytest.raises(ConfigError, match="task 77777 of family 'teacher' was not measured"):
        frontier_of("teacher", 77777)
