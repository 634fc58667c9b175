"""What every grafting strategy promises, and the two strategies' own behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

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


def _still(_: int) -> Tensor:
    return torch.ones(4)


def _doubling(step: int) -> Tensor:
    return torch.full((4,), 2.0 ** min(step, 60))


def _jitter(step: int) -> Tensor:
    return torch.full((4,), 1.0 + 0.5 * (step % 3 == 0))


def _drive(
    name: str, config: GraftConfig, weights: Callable[[int], Tensor] = _still, limit: int = 4000
) -> tuple[list[float], list[str | None]]:
    """Alpha step by step, moved as the stages move it, until it is 1."""
    memory: dict[str, Any] = {}
    alpha, ramped, alphas, held = 0.0, 0, [0.0], []
    for step in range(limit):
        context = GraftContext(alpha=alpha, ramped=ramped, weights=(weights(step),), memory=memory)
        move = STRATEGIES[name].advance(context, config)
        assert 0.0 <= move.alpha <= 1.0
        if move.alpha > alpha:
            alpha, ramped = move.alpha, ramped + 1
        alphas.append(alpha)
        held.append(move.held_by)
        if alpha == 1.0:
            break
    return alphas, held


@every_strategy
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [_still, _doubling, _jitter])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_alpha_rises_to_exactly_one(name: str, shape: str, weights: Callable[[int], Tensor], steps: int) -> None:
    config = GraftConfig(ramp=shape, ramp_steps=steps, pause_duration=5, timeout=400)
    alphas, held = _drive(name, config, weights)
    assert alphas[-1] == 1.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(alphas))
    for before, after, reason in zip(alphas, alphas[1:], held, strict=False):
        assert (after == before) == (reason is not None), "alpha stands still only when held, and says why"
    assert len(alphas) - 1 <= steps * (config.pause_duration + 1)
    assert _drive(name, config, weights)[0] == alphas, "same inputs, same path"


@every_strategy
def test_memory_is_the_callers(name: str) -> None:
    """Two grafts through one strategy object do not see each other."""
    config = GraftConfig(ramp_steps=10, pause_duration=3)
    alone = _drive(name, config, _doubling)[0]
    memories: list[dict[str, Any]] = [{}, {}]
    states = [[0.0, 0], [0.0, 0]]
    path = [0.0]
    for step in range(len(alone) - 1):
        for index, weights in enumerate((_doubling, _still)):
            alpha, ramped = states[index]
            context = GraftContext(alpha=alpha, ramped=int(ramped), weights=(weights(step),), memory=memories[index])
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
    alphas, held = _drive("drift_controlled", GraftConfig(ramp_steps=4, pause_duration=6), _doubling)
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


def test_a_still_host_is_ramped_like_the_fixed_ramp() -> None:
    config = GraftConfig(ramp="cosine", ramp_steps=9)
    assert _drive("drift_controlled", config)[0] == _drive("fixed_ramp", config)[0]
    zeros = _drive("drift_controlled", config, lambda _: torch.zeros(3))
    assert zeros[0] == _drive("fixed_ramp", config)[0], "weights of zero have no drift, not NaN"


def test_unknown_strategies_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fixed_ramp'"):
        STRATEGIES["fixed"]
