from __future__ import annotations

import inspect
from typing import Any

import pytest

import esper.tamiyo
from esper.config import TamiyoConfig
from esper.errors import ConfigError, UnknownNameError
from esper.protocol import Command, Observation
from esper.tamiyo import HeuristicController, known_controllers, make_controller, register_controller

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_registries")]


def test_makes_the_configured_controller() -> None:
    subject = make_controller("heuristic", TamiyoConfig(temper="aggressive", growth=2.0), seed=4)
    assert isinstance(subject, HeuristicController) and subject.growth == 3.0


def test_one_registration_is_enough() -> None:
    @register_controller("still")
    class Still:
        def __init__(self, config: TamiyoConfig, *, seed: int) -> None:
            self.seed = seed

        def decide(self, observation: Observation) -> tuple[Command, ...]:
            return ()

        def state(self) -> dict[str, Any]:
            return {}

        def load(self, state: dict[str, Any]) -> None:
            return None

    assert {"bandit", "heuristic", "neural", "never", "random", "schedule", "still"} <= set(known_controllers())
    assert isinstance(make_controller("still", TamiyoConfig()), Still)


def test_taken_name() -> None:
    with pytest.raises(ConfigError, match="must be unique, got 'heuristic' twice"):
        register_controller("heuristic")(HeuristicController)


def test_unknown_name_lists_known_and_near() -> None:
    with pytest.raises(UnknownNameError) as caught:
        make_controller("heurstic", TamiyoConfig())
    known = "bandit, heuristic, neural, never, random, schedule"
    assert str(caught.value) == f"no controller is called 'heurstic'; did you mean 'heuristic'? known: {known}"
    with pytest.raises(UnknownNameError) as caught:
        make_controller("ppo", TamiyoConfig())
    assert str(caught.value) == f"no controller is called 'ppo'; known: {known}"


def test_public_names() -> None:
    assert all(inspect.getdoc(getattr(esper.tamiyo, name)) for name in esper.tamiyo.__all__)
