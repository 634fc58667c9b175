"""Grafting strategies: how alpha moves."""

from esper.kasmina.strategies import drift_controlled, fixed_ramp, grad_norm_gated, performance_linked
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy, checked

__all__ = [
    "STRATEGIES",
    "GraftContext",
    "Move",
    "Strategy",
    "checked",
    "drift_controlled",
    "fixed_ramp",
    "grad_norm_gated",
    "performance_linked",
]
