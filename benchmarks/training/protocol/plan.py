"""What to train next, as a pure function of the outcomes so far: neither the order in which trainings finish nor a
test score can change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.training.protocol.arms import ARMS, GROWN, Arm
from benchmarks.training.protocol.cells import Cell, Outcome, Record
from benchmarks.training.protocol.task import Source, Task

from esper.errors import ConfigError
from esper.runs.preset import Preset

EXTENSION = 1.5
MAX_RATES = 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """A cell and what its training needs besides."""

    cell: Cell
    task: Task
    arm: Arm
    source: Source
    given: dict[str, object] = field(default_factory=dict)


class Plan:
    """The cells of one task: learning-rate grids on the first seed, then the other seeds at the chosen rates.

    ``arms`` defaults to those of the task that apply to it; ``grown`` is always among them. ``lrs`` and ``steps``
    default to the preset's.
    """

    def __init__(
        self,
        task: Task,
        *,
        seeds: Sequence[int],
        source: Source,
        code: str,
        arms: Sequence[str] = (),
        lrs: Sequence[float] = (),
        steps: int | None = None,
        settings: tuple[str, ...] = (),
    ) -> None:
        self.task, self.source, self.code, self.settings = task, source, code, settings
        self.seeds = list(seeds)
        preset = self.preset(self.seeds[0])
        self.steps = steps or preset.steps
        self.score_name = preset.score_name
        self.arms = {name: _arm(name) for name in arms or task.arms or ARMS}
        self.arms = {GROWN: _arm(GROWN)} | {name: arm for name, arm in self.arms.items() if arm.applies(preset)}
        self.grid = tuple(sorted(lrs or preset.lrs))
        self.done: dict[Cell, Outcome] = {}
        self.records: dict[Cell, Record] = {}

    def preset(self, seed: int) -> Preset:
        source = self.source
        return self.task.preset(Source(device=source.device, size=source.size, data=source.data, seed=seed))

    def add(self, record: Record) -> None:
        """Take in a finished training; records of other tasks, settings or versions are left aside."""
        cell = record.cell
        if cell.arm in self.arms and cell == self.cell(cell.arm, cell.seed, cell.lr, cell.twin_lr):
            self.done[cell], self.records[cell] = record.outcome, record

    def cell(self, arm: str, seed: int, lr: float, twin_lr: float | None) -> Cell:
        return Cell(
            task=self.task.name, arm=arm, lr=lr, seed=seed, steps=self.steps, size=self.source.size, code=self.code,
            settings=self.settings, twin_lr=twin_lr,
        )  # fmt: skip

    def rates(self, arm: str) -> tuple[float, ...]:
        """The arm's grid, extended as far as its outcomes so far ask for."""
        return self._search(arm)[0]

    def chosen(self, arm: str) -> float | None:
        """The arm's best rate on the first seed; ``None`` until it is known and bracketed (or the grid is full)."""
        return self._search(arm)[1]

    def trials(self, arm: str) -> dict[float, Outcome]:
        """Finished trainings of the first seed by rate."""
        outcomes = {lr: self._outcome(arm, self.seeds[0], lr) for lr in self.rates(arm)}
        return {lr: outcome for lr, outcome in outcomes.items() if outcome is not None}

    def complete(self, arm: str) -> list[Record] | None:
        """The arm's trainings at its chosen rate, one a seed in order; ``None`` unless all are there."""
        lr = self.chosen(arm)
        twin_lr = self._twin_lr(arm)
        if lr is None:
            return None
        records = [self.records.get(self.cell(arm, seed, lr, twin_lr)) for seed in self.seeds]
        found = [record for record in records if record is not None]
        return found if len(found) == len(records) else None

    def ready(self) -> list[Work]:
        """Everything that could be trained now and is not done yet: first what others wait for."""
        found: list[Work] = []
        for name, arm in self.arms.items():
            lr = self.chosen(name)
            wanted = [(self.seeds[0], rate) for rate in self.rates(name)]
            wanted += [(seed, lr) for seed in self.seeds[1:]] if lr is not None else []
            for seed, rate in wanted:
                if self._outcome(name, seed, rate) is None and self._may_start(arm, seed):
                    cell = self.cell(name, seed, rate, self._twin_lr(name))
                    found.append(Work(cell=cell, task=self.task, arm=arm, source=self.source))
        return sorted(found, key=lambda work: (work.arm.priority, work.arm.name, work.cell.seed, work.cell.lr))

    def prepared(self, work: Work) -> Work:
        """``work`` with what its arm takes from the grown training of its seed."""
        seed = work.cell.seed
        source = Source(device=self.source.device, size=self.source.size, data=self.source.data, seed=seed)
        given: dict[str, object] = {}
        if work.arm.follows_grown:
            twin = self._grown(seed)
            assert twin is not None
            given = dict(work.arm.derive(self.preset(seed), twin, self.steps))
        return Work(cell=work.cell, task=work.task, arm=work.arm, source=source, given=given)

    def _search(self, arm: str) -> tuple[tuple[float, ...], float | None]:
        rates = self.grid
        while True:
            outcomes = {lr: self._outcome(arm, self.seeds[0], lr) for lr in rates}
            if any(outcome is None for outcome in outcomes.values()):
                return rates, None
            best = min(rates, key=lambda lr: outcome.rank if (outcome := outcomes[lr]) else float("inf"))
            if len(rates) >= MAX_RATES or best not in (rates[0], rates[-1]):
                return rates, best
            further = best / EXTENSION if best == rates[0] else best * EXTENSION
            rates = tuple(sorted((*rates, float(f"{further:.3g}"))))

    def _outcome(self, arm: str, seed: int, lr: float) -> Outcome | None:
        return self.done.get(self.cell(arm, seed, lr, self._twin_lr(arm)))

    def _twin_lr(self, arm: str) -> float | None:
        return self.chosen(GROWN) if self.arms[arm].follows_grown else None

    def _grown(self, seed: int) -> Outcome | None:
        lr = self.chosen(GROWN)
        return None if lr is None else self._outcome(GROWN, seed, lr)

    def _may_start(self, arm: Arm, seed: int) -> bool:
        return arm.can_train and (not arm.follows_grown or self._grown(seed) is not None)


def _arm(name: str) -> Arm:
    if name not in ARMS:
        raise ConfigError(f"no arm is called {name!r}; known: {', '.join(ARMS)}")
    return ARMS[name]
