"""What a training of a policy is asked for. No torch here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training."""

    environment: str = "planted"
    run_dir: Path = Path("runs/controller")
    updates: int = 24
    episodes: int = 32
    """Side by side."""
    steps: int = 24
    """Decision points of each between two updates."""
    size: str = "small"
    seed: int = 0
    lr: float = 5e-4
    clone: str | None = None
    """Controller whose decisions the policy learns first; ``None`` starts from nothing."""
    clone_steps: int = 24
    """Decision points of each episode that are shown to it."""
    test_episodes: int = 200
    """What the policy is scored on in the end."""
    checkpoint_every: int = 5
    workers: int = 1
    """Parts that the episodes are dealt to, each with a random stream of its own."""
    ray: str | None = None
    """A Ray cluster to run the parts in (HOST:PORT, auto, or local for one on this machine); ``None``: this process."""
    fresh: bool = False

    def __post_init__(self) -> None:
        for name in ("updates", "episodes", "steps", "clone_steps", "test_episodes", "checkpoint_every", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the default")
        if self.workers > self.episodes:
            raise ConfigError(
                f"each worker has at least one of the {self.episodes} episodes side by side, got {self.workers} "
                "workers; use fewer"
            )
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, got {self.lr}; use 5e-4")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}; use 0")

    def fixed(self) -> dict[str, str | int | float | None]:
        """What a resumed training must have as it was begun with; where its parts run may change."""
        names = ("environment", "updates", "episodes", "steps", "size", "seed", "lr", "clone", "clone_steps", "workers")
        return {name: getattr(self, name) for name in names}
