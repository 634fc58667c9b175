"""Controllers: from an observation to commands. They never touch modules."""

from esper.tamiyo.bandit import BanditController
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.registry import Controller, known_controllers, make_controller, register_controller
from esper.tamiyo.schedule import ScheduleController

__all__ = [
    "BanditController",
    "Controller",
    "HeuristicController",
    "ScheduleController",
    "known_controllers",
    "make_controller",
    "register_controller",
]
