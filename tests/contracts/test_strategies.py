"""What every grafting strategy promises, and the strategies' own behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.config import GraftConfig
from esper.errors import UnknownNameError
from esper.kasmina.strategies import STRATEGIES, GraftContext
from esper.kasmina.strategies.fixed_ramp import ramp

pytestmark = pytest.mark.unit

every_strategy = pytest.mark.parametrize("name", list(STRATEGIES))
SHAPES = ("linear", "cosine", "sigmoid")


@dataclass(frozen=True)
class Surroundings:
    """What a strategy sees of the host in each step."""

    name: str
    weights: Callable[[int], Tensor]
    loss: Callable[[int], float]
    """The loss of a step; negative steps lie before the graft."""
    gradient_norm: Callable[[int], float | None]

    def __str__(self) -> str:
        return self.name


def _still(_: int) -> Tensor:
    return torch.ones(4)


def _doubling(step: int) -> Tensor:
    return torch.full((4,), 2.0 ** min(step, 60))


def _jitter(step: int) -> Tensor:
    return torch.full((4,), 1.0 + 0.5 * (step % 3 == 0))


CALM = Surroundings("calm", _still, lambda step: 1.0, lambda step: 1.0)
WORSENING = Surroundings("worsening", _doubling, lambda step: 1.0 + max(0, step), lambda step: 10.0**step)
UNSTEADY = Surroundings(
    "unsteady", _jitter, lambda step: 1.0 + (step > 0 and step % 5 == 0), lambda step: 1.0 + 9.0 * (step % 7 == 3)
)
BROKEN = Surroundings("broken", _still, lambda step: float("nan"), lambda step: float("inf") if step % 2 else None)


def _drive(
    name: str, config: GraftConfig, around: Surroundings = CALM, limit: int = 4000
) -> tuple[list[float], list[str | None]]:
    """Alpha step by step, moved as the stages move it, until it is 1."""
    memory: dict[str, Any] = {}
    alpha, ramped, alphas, held = 0.0, 0, [0.0], []
    for step in range(limit):
        move = STRATEGIES[name].advance(_context(around, step, config, alpha, ramped, memory), config)
        assert 0.0 <= move.alpha <= 1.0
        if move.alpha > alpha:
            alpha, ramped = move.alpha, ramped + 1
        alphas.append(alpha)
        held.append(move.held_by)
        if alpha == 1.0:
            break
    return alphas, held


def _context(
    around: Surroundings, step: int, config: GraftConfig, alpha: float, ramped: int, memory: dict[str, Any]
) -> GraftContext:
    past = range(step + 1 - config.stabilize_window, step + 1)
    return GraftContext(
        alpha=alpha, ramped=ramped, weights=(around.weights(step),), memory=memory,
        losses=tuple(around.loss(then) for then in past), gradient_norm=around.gradient_norm(step),
    )  # fmt: skip


@every_strategy
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("around", [CALM, WORSENING, UNSTEADY, BROKEN], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_alpha_rises_to_exactly_one(name: str, shape: str, around: Surroundings, steps: int) -> None:
    config = GraftConfig(ramp=shape, ramp_steps=steps, pause_duration=5, timeout=400)
    alphas, held = _drive(name, config, around)
    assert alphas[-1] == 1.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(alphas))
    for before, after, reason in zip(alphas, alphas[1:], held, strict=False):
        assert (after == before) == (reason is not None), "alpha stands still only when held, and says why"
    assert len(alphas) - 1 <= steps * (config.pause_duration + 1)
    assert _drive(name, config, around)[0] == alphas, "same inputs, same path"


@every_strategy
def test_memory_is_the_callers(name: str) -> None:
    """Two grafts through one strategy object do not see each other."""
    config = GraftConfig(ramp_steps=10, pause_duration=3)
    alone = _drive(name, config, WORSENING)[0]
    memories: list[dict[str, Any]] = [{}, {}]
    states = [[0.0, 0], [0.0, 0]]
    path = [0.0]
    for step in range(len(alone) - 1):
        for index, around in enumerate((WORSENING, CALM)):
            alpha, ramped = states[index]
            context = _context(around, step, config, alpha, int(ramped), memories[index])
            move = STRATEGIES[name].advance(context, config).alpha
            if move > alpha:
                states[index] = [move, ramped + 1]
        path.append(states[0][0])
    assert path == alone


@every_strategy
def test_weights_are_read_never_written(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    before = weight.detach().clone()
    for _ in range(3):
        STRATEGIES[name].advance(GraftContext(alpha=0.5, ramped=3, weights=(weight,), memory={}), GraftConfig())
    assert torch.equal(weight, before)


def test_fixed_ramp_known_answers() -> None:
    assert _drive("fixed_ramp", GraftConfig(ramp_steps=4))[0] == [0.0, 0.25, 0.5, 0.75, 1.0]
    cosine = _drive("fixed_ramp", GraftConfig(ramp="cosine", ramp_steps=4))[0]
    assert cosine == pytest.approx([0.0, 0.1464466094, 0.5, 0.8535533906, 1.0])
    sigmoid = _drive("fixed_ramp", GraftConfig(ramp="sigmoid", ramp_steps=4))[0]
    # 1 / (1 + e^3) = 0.04742587, stretched so that the ends are 0 and 1 (1 / (1 + e^6) = 0.00247262)
    assert sigmoid == pytest.approx([0.0, (0.0474258732 - 0.0024726232) / 0.9950547537, 0.5, 0.9548235, 1.0], abs=1e-6)


@given(st.sampled_from(SHAPES), st.floats(-1, 2), st.floats(-1, 2))
def test_ramps_rise_and_stay_in_the_unit_interval(shape: str, one: float, two: float) -> None:
    low, high = sorted((ramp(shape, one), ramp(shape, two)))
    assert 0.0 <= low <= high <= 1.0
    assert (ramp(shape, min(one, two)), ramp(shape, max(one, two))) == (low, high)
    assert ramp(shape, 0.0) == 0.0 and ramp(shape, 1.0) == 1.0


def test_drift_pauses_at_most_pause_duration_at_a_stretch() -> None:
    alphas, held = _drive("drift_controlled", GraftConfig(ramp_steps=4, pause_duration=6), WORSENING)
    # the first look has no average yet and moves; then six held steps before each single move
    assert [h is None for h in held] == [True, *([*[False] * 6, True] * 3)]
    assert alphas[1] == 0.25 and alphas[7] == 0.25 and alphas[8] == 0.5
    assert all("above 0.05" in reason for reason in held if reason is not None)


def test_drift_is_the_distance_from_the_running_average() -> None:
    """w = 1, then 1.04, then 1.10: averages 1, then 1.004; drifts 0.04 (moves) and 0.0956 (held)."""
    memory: dict[str, Any] = {}
    moves: list[str | None] = []
    for value in (1.0, 1.04, 1.10):
        context = GraftContext(alpha=0.1, ramped=1, weights=(torch.full((3,), value),), memory=memory)
        moves.append(STRATEGIES["drift_controlled"].advance(context, GraftConfig(drift_threshold=0.05)).held_by)
    assert moves[:2] == [None, None] and moves[2] == "drift 0.0956 above 0.05"
    assert memory["ema"][0][0].item() == pytest.approx(0.9 * 1.004 + 0.1 * 1.10)


@every_strategy
def test_calm_surroundings_are_ramped_like_the_fixed_ramp(name: str) -> None:
    config = GraftConfig(ramp="cosine", ramp_steps=9)
    assert _drive(name, config) == _drive("fixed_ramp", config)
    zeros = Surroundings("zeros", lambda _: torch.zeros(3), lambda _: 0.0, lambda _: 0.0)
    assert _drive(name, config, zeros) == _drive("fixed_ramp", config), "nothing moves: no ratio is NaN"


@every_strategy
def test_a_pause_of_zero_is_none(name: str) -> None:
    held = _drive(name, GraftConfig(ramp_steps=6, pause_duration=0), WORSENING)[1]
    assert held == [None] * 6


@every_strategy
@pytest.mark.parametrize("around", [WORSENING, UNSTEADY], ids=str)
def test_memory_is_plain_and_does_not_grow(name: str, around: Surroundings) -> None:
    """It lives as long as the graft, so it must neither grow with it nor keep anything of the host alive."""
    config = GraftConfig(ramp_steps=300, timeout=400, pause_duration=1, stabilize_window=12)
    memory: dict[str, Any] = {}
    for step in range(250):
        STRATEGIES[name].advance(_context(around, step, config, 0.1, 1, memory), config)
    for value in memory.values():
        assert isinstance(value, int | float | list)
        if isinstance(value, list):
            assert len(value) <= max(config.stabilize_window, config.performance_window, config.grad_norm_window)


# ----------------------------------------------------------------------------------------------------------------------
# performance_linked


def _linked(losses_before: list[float], losses_after: list[float], **settings: Any) -> list[str | None]:
    """What held alpha at the first look and at each later loss."""
    config = GraftConfig(ramp_steps=1000, timeout=2000, pause_duration=1000, **settings)
    memory: dict[str, Any] = {}
    held: list[str | None] = []
    window = list(losses_before)
    for loss in [None, *losses_after]:
        window = window if loss is None else [*window, loss]
        context = GraftContext(
            alpha=0.1, ramped=1, weights=(), memory=memory, losses=tuple(window[-config.stabilize_window :])
        )
        held.append(STRATEGIES["performance_linked"].advance(context, config).held_by)
    return held


def test_performance_known_answer() -> None:
    """Before: 1, 3, 1, 3, ... eight times. Level and error of the line at the last loss as NumPy's polyfit has them."""
    before = [1.0, 3.0] * 4
    (slope, start), covariance = np.polyfit(np.arange(8), before, 1, cov=True)
    level = start + 7 * slope
    at_end = np.array([7.0, 1.0])
    error = float(np.sqrt(at_end @ covariance @ at_end))
    scatter = float(np.sqrt(np.sum((np.polyval((slope, start), np.arange(8)) - before) ** 2) / 6))
    allowed = 2 * float(np.hypot(error, scatter))
    assert _linked(before, [level + 0.999 * allowed]) == [None, None]
    first, worse = _linked(before, [level + 1.001 * allowed])
    assert first is None and worse is not None
    assert worse == f"training loss {1.001 * allowed:.3g} above {level:.4g}, more than {allowed:.3g}"


def test_performance_waits_until_the_loss_is_back() -> None:
    before = [2.0, 2.1] * 8
    held = _linked(before, [2.05] * 4 + [3.0] * 4 + [2.05] * 8, performance_window=4)
    assert [reason is not None for reason in held] == [False] * 5 + [True] * 7 + [False] * 5


def test_a_falling_loss_does_not_raise_the_bar() -> None:
    """0.1 a step down from 4.0 to 2.5; afterwards 2.9 is worse although the mean before was 3.25."""
    before = [4.0 - 0.1 * step for step in range(16)]
    assert _linked(before, [2.5]) == [None, None]
    assert _linked(before, [2.4, 2.3, 2.2]) == [None] * 4
    (first, worse) = _linked(before, [2.9])
    assert first is None and worse is not None and "above 2.5" in worse


def test_performance_collects_losses_before_it_judges() -> None:
    held = _linked([1.0] * 3, [1.0] * 6)
    assert held[:5] == [f"{known} losses before the graft, 8 are needed" for known in range(3, 8)]
    assert held[5:] == [None, None]
    assert _linked([float("nan")] * 4 + [1.0] * 8, [float("nan"), 1.0]) == [None, "training loss nan", None]
    assert _linked([], [])[0] == "0 losses before the graft, 8 are needed"


@given(st.integers(0, 10_000))
def test_noise_alone_seldom_holds(seed: int) -> None:
    """At the default band a steady noisy loss stays within the ramp's time: the graft is not lost to noise."""
    draws = np.random.default_rng(seed).normal(2.0, 0.3, 4000).tolist()
    around = Surroundings("noise", _still, lambda step: draws[step + 100], lambda _: 1.0)
    alphas, held = _drive("performance_linked", GraftConfig(), around)
    assert len(alphas) - 1 <= GraftConfig().timeout, [reason for reason in held if reason][:3]


# ----------------------------------------------------------------------------------------------------------------------
# grad_norm_gated


def _gated(norms: list[float | None], **settings: Any) -> list[str | None]:
    config = GraftConfig(pause_duration=1000, **settings)
    memory: dict[str, Any] = {}
    contexts = [GraftContext(alpha=0.1, ramped=1, weights=(), memory=memory, gradient_norm=norm) for norm in norms]
    return [STRATEGIES["grad_norm_gated"].advance(context, config).held_by for context in contexts]


def test_gradient_norm_known_answers() -> None:
    """Medians of the norms before: none, 1, 1.5, 2, 2, 2."""
    held = _gated([1.0, 2.0, 3.0, 4.0, 0.99, 4.01])
    assert held[:4] == [None] * 4, "both ends of the band belong to it"
    # before the fifth: median of 1 2 3 4 = 2.5; before the sixth: of 1 2 3 4 0.99 = 2
    assert held[4] == "gradient norm 0.99 outside 1.25 to 5"
    assert held[5] == "gradient norm 4.01 outside 1 to 4"


def test_a_new_regime_becomes_the_usual_one() -> None:
    held = _gated([1.0] * 5 + [10.0] * 6, grad_norm_window=5)
    assert [reason is not None for reason in held] == [False] * 5 + [True] * 3 + [False] * 3


def test_a_missing_gradient_holds_and_leaves_the_median_alone() -> None:
    held = _gated([1.0, None, float("inf"), float("nan"), 1.0])
    assert held == [None, "no gradient at the site", "gradient norm inf", "gradient norm nan", None]


def test_unknown_strategies_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fixed_ramp'"):
        STRATEGIES["fixed"]
