"""What trials can be asked for; no heavy import, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper.errors import ConfigError

PEER_NAMES = ("gromo", "gromo-gradmax")


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """Settings of ``esper trials``."""

    num: int = 1000
    """Trials of the kind; those that a peer cannot grow are left out of its count."""
    faults: tuple[str, ...] = ()
    """Names of faults to inject, one a trial in turn; ``all`` for every one."""
    null: bool = False
    """Cohorts that can add nothing, by construction."""
    peer: str | None = None
    """Another library's loop on the same hosts."""
    held_out_rows: int | None = None
    """Rows of each held-out batch of hosts that grow; ``None``: 4, 8 or 16, drawn."""
    jobs: int = 1
    """Trials at a time, each in a process of its own."""
    seed: int = 0
    """Number of the first trial."""
    run_dir: Path = Path("runs/trials")
    """Where finished trials are kept; the same command goes on from there."""
    fresh: bool = False
    """Forget the finished trials of this kind."""

    def __post_init__(self) -> None:
        _require(self.num >= 1, "n must be at least 1", self.num, "use 1000")
        _require(self.jobs >= 1, "jobs must be at least 1", self.jobs, "use 1")
        _require(0 <= self.seed < 2**31, "seed must lie between 0 and 2147483647", self.seed, "use 0")
        chosen = [name for name, on in (("faults", self.faults), ("null", self.null), ("peer", self.peer)) if on]
        _require(len(chosen) <= 1, "trials are of one kind: faults, null or peer", chosen, "run them one after another")
        rows = self.held_out_rows
        _require(rows is None or rows >= 1, "held-out-rows must be at least 1", rows, "use 64, or leave it out")
        _require(rows is None or not chosen, "held-out-rows is for hosts that grow", chosen, "leave one of them out")
        known = self.peer is None or self.peer in PEER_NAMES
        _require(known, f"peer must be one of {', '.join(PEER_NAMES)}", self.peer, "use gromo")

    @property
    def command(self) -> str:
        """What asks for the same trials, on the command line."""
        words = ["esper trials", f"--n {self.num}"]
        words += [f"--faults {' '.join(self.faults)}"] if self.faults else []
        words += ["--null"] if self.null else []
        words += [f"--peer {self.peer}"] if self.peer else []
        words += [f"--held-out-rows {self.held_out_rows}"] if self.held_out_rows else []
        return " ".join([*words, f"--seed {self.seed}"] if self.seed else words)

    @property
    def kind(self) -> str:
        """``grown``, ``null``, ``faults`` or the peer's name."""
        return "null" if self.null else "faults" if self.faults else self.peer or "grown"

    @property
    def archive(self) -> str:
        """Under which name these trials are kept: those that differ in more than their number lie apart."""
        return f"{self.kind}-{self.held_out_rows}-rows" if self.held_out_rows else self.kind


def _require(condition: bool, rule: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}, got {value!r}; {remedy}")
