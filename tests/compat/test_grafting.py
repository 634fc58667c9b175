"""Strategies in the plan's form, in the one registry and under the real Grower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import Pair, rows
from tests.rigs import attach

import esper
from esper.compat import BaseGraftingStrategy, GraftingConfig, GraftingContext, GraftingStrategyRegistry
from esper.kasmina.strategies import STRATEGIES, GraftContext, Move, Strategy
from esper.kasmina.strategies.drift_controlled import DriftControlled
from esper.protocol import Lifecycle

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_registries")]


class DriftControlledGrafting(BaseGraftingStrategy):
    """The plan's own example, word for word but for the name it is registered under."""

    def __init__(self, config: GraftingConfig):
        self.drift_threshold = config.drift_threshold
        self.pause_duration = config.pause_duration

    def update(self, context: GraftingContext) -> float:
        # Monitor weight drift
        current_drift = self._calculate_drift(context.model_weights)

        if current_drift > self.drift_threshold:
            # Pause grafting
            return context.current_alpha  # No change

        # Normal ramp
        return min(1.0, context.current_alpha + context.ramp_rate)

    def _calculate_drift(self, weights: Any) -> Any:
        # EMA of weight changes
        if not hasattr(self, "weight_ema"):
            self.weight_ema = weights.clone()
            return 0.0

        drift = (weights - self.weight_ema).norm() / self.weight_ema.norm()
        self.weight_ema = 0.9 * self.weight_ema + 0.1 * weights
        return drift.item()


def advance(name: str, memory: dict[str, Any], weights: float, alpha: float, ramped: int, **settings: Any) -> Move:
    tensors = (torch.full((2, 2), weights), torch.full((3,), weights))
    context = GraftContext(alpha=alpha, ramped=ramped, weights=tensors, memory=memory)
    return STRATEGIES[name].advance(context, GraftingConfig(**settings))


def test_the_plans_example_moves_as_the_built_in_one() -> None:
    assert GraftingStrategyRegistry.register("plan_drift")(DriftControlledGrafting) is DriftControlledGrafting
    memories: list[dict[str, Any]] = [{}, {}]
    alphas = [0.0, 0.0]
    held = [0, 0]
    source = torch.Generator().manual_seed(0)
    for step in range(60):
        weights = 1.0 + (0.3 * float(torch.rand((), generator=source)) if step % 7 < 3 else 0.0)
        for index, name in enumerate(("plan_drift", "drift_controlled")):
            ramped = round(alphas[index] * 40)
            move = advance(name, memories[index], weights, alphas[index], ramped, ramp_steps=40, pause_duration=1000)
            held[index] += move.held_by is not None
            alphas[index] = max(alphas[index], move.alpha)
        assert alphas[0] == pytest.approx(alphas[1], abs=1e-6)
    assert held[0] == held[1] > 10 and alphas[0] > 0.3


def test_each_graft_has_an_object_of_its_own() -> None:
    GraftingStrategyRegistry.register("plan_drift")(DriftControlledGrafting)
    one: dict[str, Any] = {}
    two: dict[str, Any] = {}
    advance("plan_drift", one, 1.0, 0.0, 0)
    assert advance("plan_drift", one, 9.0, 0.02, 1).held_by == "DriftControlledGrafting waits"
    assert advance("plan_drift", two, 9.0, 0.02, 1).held_by is None
    assert one["strategy"] is not two["strategy"]


def test_what_a_strategy_sees() -> None:
    seen: list[GraftingContext] = []

    @GraftingStrategyRegistry.register("looks")
    class Looks(BaseGraftingStrategy):
        def update(self, context: GraftingContext) -> float:
            assert self.config.ramp_steps == 40
            seen.append(context)
            context.model_weights.zero_()
            return 0.5

    weight = torch.nn.Parameter(torch.arange(4.0).view(2, 2).to(torch.bfloat16))
    context = GraftContext(alpha=0.25, ramped=3, weights=(weight, torch.ones(1)), memory={})
    assert STRATEGIES["looks"].advance(context, GraftingConfig(ramp_steps=40)) == Move(0.5)
    assert (seen[0].current_alpha, seen[0].ramp_rate) == (0.25, 0.025)
    assert seen[0].model_weights.dtype is torch.float32 and seen[0].model_weights.shape == (5,)
    assert weight.flatten().tolist() == [0, 1, 2, 3], "a copy"


def test_strategies_is_a_live_view_of_all() -> None:
    strategies = GraftingStrategyRegistry.strategies
    assert strategies["drift_controlled"] is DriftControlled
    before = len(strategies)
    GraftingStrategyRegistry.register("plan_drift")(DriftControlledGrafting)

    @GraftingStrategyRegistry.register("whole")
    class Whole(Strategy):
        def advance(self, context: GraftContext, config: esper.GraftConfig) -> Move:
            return Move(1.0)

    assert strategies["plan_drift"] is DriftControlledGrafting and strategies["whole"] is Whole
    assert len(strategies) == before + 2 and set(strategies) >= {"fixed_ramp", "plan_drift", "whole"}
    with pytest.raises(esper.UnknownNameError, match="known: drift_controlled"):
        _ = strategies["drift"]


class Silent(BaseGraftingStrategy):
    pass


class Same(DriftControlled):
    """In Esper's own form: a second use of a name is a mistake there."""


def test_the_plans_example_takes_the_name_it_asks_for(caplog: pytest.LogCaptureFixture) -> None:
    """The plan registers it as the strategy that is built in."""
    code = STRATEGIES.code("drift_controlled")
    for _ in range(2):  # a notebook cell run twice
        GraftingStrategyRegistry.register("drift_controlled")(DriftControlledGrafting)
    assert GraftingStrategyRegistry.strategies["drift_controlled"] is DriftControlledGrafting
    assert STRATEGIES.code("drift_controlled") == code
    assert advance("drift_controlled", {}, 1.0, 0.0, 0, ramp_steps=40) == Move(1 / 40)
    (said,) = caplog.messages
    assert said.startswith("strategy 'drift_controlled' is tests.compat.test_grafting.DriftControlledGrafting from now")


def test_the_decorator_without_a_name_says_so() -> None:
    with pytest.raises(esper.ConfigError, match=r"got <class .*Silent'>; write the decorator with \('name'\)"):
        GraftingStrategyRegistry.register(Silent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("drift_controlled", Same, "must be unique, got 'drift_controlled' twice"),
        ("", DriftControlledGrafting, "registered under a name, got ''"),
        ("x", Silent, r"must define update\(context\), Silent leaves it out"),
        ("x", int, "must be a subclass of esper.plugins.Strategy, got <class 'int'>"),
        ("x", 3, "must be a subclass of esper.plugins.Strategy, got 3"),
    ],
)
def test_refusals(name: str, cls: Any, message: str) -> None:
    before = set(GraftingStrategyRegistry.strategies)
    with pytest.raises(esper.ConfigError, match=message):
        GraftingStrategyRegistry.register(name)(cls)
    assert set(GraftingStrategyRegistry.strategies) == before


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan")])
def test_an_alpha_outside_its_range_is_an_error(alpha: float) -> None:
    @GraftingStrategyRegistry.register("wild")
    class Wild(BaseGraftingStrategy):
        def update(self, context: GraftingContext) -> float:
            return alpha

    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], got {alpha} from Wild.update"):
        advance("wild", {}, 1.0, 0.0, 0)


@pytest.mark.e2e
def test_growth_with_the_plans_example() -> None:
    GraftingStrategyRegistry.register("plan_drift")(DriftControlledGrafting)
    torch.manual_seed(2)
    model = Pair(hidden=2)
    rig = attach(
        model, torch.optim.AdamW(model.parameters(), 1e-2), batches=rows(20, size=64),
        held_out=rows(32, seed=7, size=64), fit=esper.FitConfig(steps=60, batch_rows=128),
        graft=esper.GraftConfig(
            strategy="plan_drift", ramp_steps=20, timeout=300, stabilize_steps=10, fine_tune_steps=20, warmup_steps=10
        ),
    )  # fmt: skip
    rig.train(60)
    cohort = rig.until(rig.germinate(start="negative_gradient", width=24), Lifecycle.GRAFTING)
    waits = 0
    while cohort.state is Lifecycle.GRAFTING:
        rig.train()
        waits += cohort.held_by == "DriftControlledGrafting waits"
    assert waits > 0
    rig.until(cohort, Lifecycle.FINE_TUNING)
    rig.train(25)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.FOSSILIZED, verdict
