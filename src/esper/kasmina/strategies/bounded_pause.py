"""A ramp that may be held, but never for ever."""

from __future__ import annotations

from esper.config import GraftConfig
from esper.kasmina.strategies.fixed_ramp import ramp
from esper.kasmina.strategies.strategy import GraftContext, Move


def hold_or_ramp(context: GraftContext, config: GraftConfig, obstacle: str | None) -> Move:
    """Hold alpha where it is while there is an ``obstacle``, else go on along ``config.ramp`` from there.

    After ``config.pause_duration`` held steps at a stretch alpha moves once all the same: a condition that never
    clears would otherwise hold the graft until it runs out of time without having tried anything.
    """
    paused = int(context.memory.get("paused", 0))
    if obstacle is not None and paused < config.pause_duration:
        context.memory["paused"] = paused + 1
        return Move(context.alpha, obstacle)
    context.memory["paused"] = 0
    return Move(ramp(config.ramp, (context.ramped + 1) / config.ramp_steps))
