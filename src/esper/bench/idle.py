"""A controller that never asks for anything: what is alive was ordered by the benchmark."""

from __future__ import annotations

from typing import Any

from esper.protocol import Command, Observation


class Idle:
    """Waits."""

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
