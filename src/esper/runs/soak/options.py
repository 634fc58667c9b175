"""What a soak can be asked for; no heavy import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from esper.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """Settings of ``esper soak``: an end in hours or in steps, or in whichever comes first."""

    hours: float | None = None
    steps: int | None = None
    """Host steps, of all families together; those of earlier sittings count."""
    run_dir: Path = Path("runs/soak")
    """Where samples are kept; the same command goes on from there."""
    seed: int = 0
    faults: bool = True
    """Inject a fault now and then."""
    device: str = "auto"
    """auto, cpu or cuda."""
    fresh: bool = False
    """Forget earlier sittings."""

    @property
    def command(self) -> str:
        """What asks for the same, on the command line."""
        words = ["esper soak"]
        words += [] if self.hours is None else [f"--hours {self.hours:g}"]
        words += [] if self.steps is None else [f"--steps {self.steps}"]
        words += [] if self.faults else ["--no-faults"]
        words += [f"--seed {self.seed}"] if self.seed else []
        return " ".join(words if self.device == "auto" else [*words, f"--device {self.device}"])

    def __post_init__(self) -> None:
        if self.hours is None and self.steps is None:
            raise ConfigError("a soak needs an end, got neither hours nor steps; say --hours 1 or --steps 100000")
        hours = self.hours
        _require(hours is None or (math.isfinite(hours) and hours > 0), "hours must be positive", hours, "use 1")
        _require(self.steps is None or self.steps >= 1, "steps must be at least 1", self.steps, "use 100000")
        _require(0 <= self.seed < 2**31, "seed must lie between 0 and 2147483647", self.seed, "use 0")
        _require(self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda", self.device, "use auto")


def _require(condition: bool, rule: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}, got {value!r}; {remedy}")
