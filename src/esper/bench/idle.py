"""A controller that never asks for anything: what is alive was ordered by the benchmark."""

from __future__ import annotations

from typing import Any

from esper.protocol import Command, Observation


class Idle:
    """Waits, and looks at what it is shown unless it is ``asleep``."""

    def __init__(self, *, asleep: bool = False) -> None:
        self.asleep = asleep

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        return self.asleep

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
