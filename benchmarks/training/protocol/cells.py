"""Finished trainings on disk: one small JSON file each, so that the work can spread over sittings and machines."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training to do; all that tells it from another.

    ``twin_lr`` is the grown arm's chosen rate where the cell takes something from the grown training of its seed.
    ``code`` names the version of the code: cells of other versions are not mixed in.
    """

    task: str
    arm: str
    lr: float
    seed: int
    steps: int
    size: str
    code: str
    settings: tuple[str, ...] = ()
    twin_lr: float | None = None

    @property
    def name(self) -> str:
        """File name, without its ending: readable, and unique by a hash of every field."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.arm}-seed{self.seed}-lr{self.lr:g}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training showed, the test split left out. ``held_out`` is infinite where it diverged."""

    held_out: float
    flops: float
    params: int
    seconds: float
    widths: tuple[int, ...]
    flops_parts: Mapping[str, float] = field(default_factory=dict)
    cohorts: Mapping[str, int] = field(default_factory=dict)
    stopped: str | None = None
    schedule: tuple[Mapping[str, Any], ...] = ()
    """Germinations whose branches stayed, for the arm that repeats them."""
    judged: tuple[Mapping[str, Any], ...] = ()
    fitted: tuple[Mapping[str, Any], ...] = ()
    """Isolated trainings: how much of their target they explain on other batches, with what certainty."""

    @property
    def rank(self) -> float:
        """Held-out loss by which rates are compared; whatever is not finite comes last."""
        return self.held_out if math.isfinite(self.held_out) else math.inf


@dataclass(frozen=True, kw_only=True)
class Record:
    cell: Cell
    outcome: Outcome
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the cell took from the grown training of its seed."""
    environment: Mapping[str, str] = field(default_factory=dict)


class CellStore:
    """A folder of records. :meth:`read` never shows a test score; :meth:`unseal` does, one cell at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Record]:
        """All records, by name.

        Raises
        ------
        ValueError
            For a file that is no record of this format.
        """
        return [self._record(path) for path in sorted(self.folder.glob("*.json"))]

    def write(self, record: Record, score: float | None, loss: float | None) -> Path:
        """Keep a finished training and its sealed score; written aside first, so that a kill leaves no half of it."""
        content = {
            "format": FORMAT,
            "cell": asdict(record.cell),
            "given": record.given,
            "outcome": _without_non_finite(asdict(record.outcome)),
            "environment": record.environment,
            "sealed": _without_non_finite({"score": score, "loss": loss}),
        }
        path = self.folder / f"{record.cell.name}.json"
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
        return path

    def unseal(self, cell: Cell) -> tuple[float, float]:
        """``(score, loss)`` of the test split, NaN where the training diverged. For the summary only."""
        sealed = self._content(self.folder / f"{cell.name}.json")["sealed"]
        score, loss = (math.nan if sealed[key] is None else float(sealed[key]) for key in ("score", "loss"))
        return score, loss

    def _record(self, path: Path) -> Record:
        content = self._content(path)
        cell, outcome = content["cell"], content["outcome"]
        cell["settings"] = tuple(cell["settings"])
        if outcome["held_out"] is None:
            outcome["held_out"] = math.inf
        for key in ("widths", "schedule", "judged", "fitted"):
            outcome[key] = tuple(outcome.get(key, ()))
        return Record(
            cell=Cell(**cell), outcome=Outcome(**outcome), given=content["given"], environment=content["environment"]
        )

    def _content(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must be a record of a training ({error}); move it out of the folder") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} must be a record of format {FORMAT}; move it out of the folder of cells")
        return content


def _without_non_finite(value: Any) -> Any:
    """JSON knows no infinity: ``None`` stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(inner) for inner in value]
    return value
