"""What a job can be asked for; no heavy import, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from esper.errors import ConfigError

PRESET_NAMES = ("digits", "code-lm", "vision")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Settings of one ``esper run``; ``None`` means the preset's own value."""

    preset: str = "digits"
    """digits (an MLP on scikit-learn's digits), code-lm (a byte-level transformer on the Python standard library's
    source) or vision (a small ResNet on an .npz of images)."""
    seeds: int | None = None
    """Paired seeds an arm."""
    steps: int | None = None
    """Optimizer steps a training."""
    lr: tuple[float, ...] = ()
    """Learning rates every arm may choose from, on held-out loss and the first seed."""
    controls: bool = True
    """Train the control arms too."""
    device: str = "auto"
    """auto, cpu or cuda."""
    size: str = "auto"
    """auto (by device), cpu or gpu."""
    data: Path | None = None
    """An .npz with x_train, y_train, x_test, y_test (vision)."""
    run_dir: Path | None = None
    """Where to write; by default the next free runs/PRESET-NN."""
    temper: str | None = None
    """conservative, balanced, aggressive or exploratory."""
    controller: str | None = None
    start: str | None = None
    """How first weights are made; by default chosen by site kind and optimizer."""
    growth: float | None = None
    """Units a cohort adds, as a multiple of the host's inner width."""
    budget_params: int | None = None
    """Most parameters the grown model may have."""
    settings: tuple[str, ...] = ()
    """``NAME=VALUE`` for any setting of docs/configuration.md, over the preset's."""
    karn: str | Path | None = field(default=None, repr=False)
    """A Karn database, a file or a URL: proposals for what grows come from it, and what became of them goes back. Left
    out of the ``repr``, since a URL may hold a password."""
    karn_strategy: str | None = None
    """How Karn selects among candidates: performance, efficiency, stability, risk, novelty or hybrid."""
    seed: int = 0
    """First seed."""
    jobs: int = 1
    """Trainings at a time, each in a process of its own."""

    bus: str | None = None
    """URL of a message bus that the run talks over."""
    unsigned_commands: bool = False
    """Take commands that nobody vouches for from a bus that others can reach."""
    checkpoint_every: float = 10.0
    """Most seconds of a training that an interruption may cost."""
    fresh: bool = False
    """Begin anew where an interrupted run of the same configuration could be resumed."""

    def changed_settings(self) -> dict[str, str]:
        """:attr:`settings` taken apart."""
        return {name.strip(): value.strip() for name, _, value in (item.partition("=") for item in self.settings)}

    def __post_init__(self) -> None:
        for item in self.settings:
            _require("=" in item, "a setting must be NAME=VALUE", item, "say --set graft.lr_boost=1.5")
        _require(self.seeds is None or self.seeds >= 1, "seeds must be at least 1", self.seeds, "use 3")
        _require(self.steps is None or self.steps >= 10, "steps must be at least 10", self.steps, "use 1000")
        finite = all(0 < lr < float("inf") for lr in self.lr)
        _require(finite, "lr must be positive and finite", self.lr, "use 3e-3")
        _require(0 <= self.seed < 2**31, "seed must lie between 0 and 2147483647", self.seed, "use 0")
        _require(self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda", self.device, "use auto")
        _require(self.size in ("auto", "cpu", "gpu"), "size must be auto, cpu or gpu", self.size, "use auto")
        _require(
            self.checkpoint_every >= 0, "checkpoint_every must be at least 0 seconds", self.checkpoint_every, "use 10"
        )
        _require(
            self.controller != "remote" or self.bus is not None, "a remote controller is reached over a bus",
            self.bus, "say --bus redis://localhost:6379",
        )  # fmt: skip
        _require(
            self.karn_strategy is None or self.karn is not None, "karn_strategy selects among Karn's proposals",
            self.karn_strategy, "say --karn PATH too",
        )  # fmt: skip
        _require(self.jobs >= 1, "jobs must be at least 1", self.jobs, "use 1")


def _require(condition: bool, rule: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}, got {value!r}; {remedy}")
