"""Controllers: from an observation to commands. They never touch modules."""

from esper.config import TamiyoConfig
from esper.tamiyo.bandit import BanditController
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.registry import Controller, Noting, Waiting, known_controllers, make_controller, register_controller
from esper.tamiyo.schedule import ScheduleController
from esper.tamiyo.yardsticks import EvenController, NeverController, RandomController

__all__ = [
    "BanditController",
    "Controller",
    "EvenController",
    "HeuristicController",
    "NeverController",
    "Noting",
    "RandomController",
    "ScheduleController",
    "Waiting",
    "known_controllers",
    "make_controller",
    "register_controller",
]


@register_controller("neural")
def _neural(config: TamiyoConfig, *, seed: int) -> Controller:
    """The neural controller, whose module imports torch."""
    from esper.tamiyo.neural.controller import NeuralController

    return NeuralController(config, seed=seed)
