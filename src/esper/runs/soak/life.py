"""One host that trains and grows until it has grown too large or is old, and then makes room for the next."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch

from esper.config import BudgetConfig, CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig
from esper.grower import Grower
from esper.protocol import AnyEvent, Germinated, Lifecycle, Transitioned
from esper.runs.interrupt import obey
from esper.runs.soak.fates import Restless
from esper.runs.trials.injection import BrokenOffError, Injection, inconsistencies, time_limit
from esper.runs.trials.tasks import Rows, Task, make_task
from esper.safety.faults import FAULTS, Expectation, Moment

FAMILIES = {
    "mlp": ("teacher-student", "spirals", "mixture", "friedman", "glyphs"),
    "conv": ("glyph images",),
    "transformer": ("sequences",),
}
"""Host families, and the tasks that take turns in each."""
LR = 3e-3
HELD_OUT = 20
"""Held-out batches: enough to judge with, few enough to judge often."""
LARGEST = 4.0
"""Parameters at which a life ends, as a multiple of the host's."""
LONGEST = 2_500
"""Steps after which a life ends in any case, so that many kinds of hosts come and go."""
FAULT_EVERY = 400
"""Steps of a life between two faults."""
GRACE = 15
"""Steps after a fault in which nothing is looked at: the guard itself looks only at decision points."""


def usable_faults() -> tuple[str, ...]:
    """Those that a run must come through: not the host's own trouble, and not those of disk and bus."""
    elsewhere = (Moment.SAVING, Moment.COMMANDED)
    return tuple(
        name
        for name in FAULTS
        if FAULTS[name].expects is not Expectation.REPORTED and FAULTS[name].moment not in elsewhere
    )


def life_config(seed: int, *, keeps_all: bool) -> Config:
    """A whole life of a cohort within some fifty steps; every other host keeps whatever comes to judgement."""
    return Config(
        capture=CaptureConfig(batches=2, rows=256, timeout=20),
        fit=FitConfig(steps=3, batch_rows=64),
        graft=GraftConfig(
            ramp_steps=3, timeout=25, stabilize_steps=2, stabilize_window=8, fine_tune_steps=3, cull_steps=2,
            warmup_steps=1, embargo=0,
        ),
        evidence=EvidenceConfig(accept="always" if keeps_all else "evidence", looks=1),
        budget=BudgetConfig(),
        interval=5,
        held_out_every=50,
        seed=seed,
    )  # fmt: skip


@dataclasses.dataclass
class Counts:
    """What has happened so far, in all lives and sittings."""

    steps: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """By family."""
    transitions: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Of cohorts, by kind: ``GRAFTING > CULLED``."""
    seed_transitions: int = 0
    germinations: int = 0
    longest_wait: int = 0
    """Most steps between two germinations of a life."""
    lives: int = 0
    """Hosts begun."""
    faults: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """That struck, by name."""
    lost: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """Lives that a fault has ended, by its name."""
    non_finite: int = 0
    """Losses, or looks at all weights, with a number that is not finite, while no fault was about."""


class Life:
    """A host under a grower that never rests.

    Parameters
    ----------
    number:
        Everything about it follows from it; those with an odd one ask for evidence before they keep anything.
    longest:
        Steps after which it ends in any case; ``None``: it may go on for ever.
    """

    def __init__(
        self, number: int, family: str, counts: Counts, device: torch.device, *, faults: Sequence[str],
        longest: int | None = LONGEST,
    ) -> None:  # fmt: skip
        self.family, self.counts, self.faults, self.longest = family, counts, faults, longest
        tasks = FAMILIES[family]
        self.choose = torch.Generator().manual_seed(number)
        self.task: Task = make_task(tasks[number // len(FAMILIES) % len(tasks)], self.choose).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            self.model = self.task.build(1).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR)
        self.config = life_config(number, keeps_all=number % 2 == 0)
        self.grower = self._attach()
        self.fault_turn = number
        self.injection: Injection | None = None
        self.struck: str | None = None
        """The fault that struck last: what goes wrong now is put down to it."""
        self._bad_losses = torch.zeros((), dtype=torch.int64, device=device)
        self._last_germination = 0
        self._taken = 0  # the grower's own clock goes back when it is restored
        self._struck_at = -GRACE
        self._escaped: Exception | None = None
        counts.lives += 1

    def _attach(self, first: Grower | None = None) -> Grower:
        return Grower(
            self.model, self.optimizer, loss=self.task.loss, evaluate=self.task.gate[:HELD_OUT], config=self.config,
            controller=Restless(seed=self.config.seed), on_event=self._note,
        )  # fmt: skip

    def train(self, steps: int) -> bool:
        """Train on; ``False`` once the life is over (it has grown large, or a fault has ended it)."""
        try:
            begun = self._taken
            while self._taken - begun < steps or self._taken - self._struck_at < GRACE:
                obey()
                self._step(self.task.batch(self.choose))
                self.counts.steps[self.family] += 1
                if self._escaped is not None:
                    break
        finally:
            if self.injection is not None and self._escaped is not None:
                self.injection.end()
        kasmina, old = self.grower.kasmina, self.longest is not None and self._taken >= self.longest
        return self._is_sound() and not old and kasmina.params < LARGEST * kasmina.host_params

    def close(self) -> None:
        """End it as a user would: nothing of the grower stays on the model."""
        if self.injection is not None:
            self.injection.end()
        if self._escaped is None:
            self.grower.finish()
        self.grower.detach()

    def _step(self, batch: Rows) -> None:
        clock = self._taken
        self._begin_fault(clock)
        self._taken += 1
        injection = self.injection
        try:
            loss = self.task.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._bad_losses += ~torch.isfinite(loss.detach())
            with time_limit(injection.time_limit_s if injection is not None else None):
                self.grower.step(loss)
        except BrokenOffError:
            pass  # the soak's own doing
        except Exception as error:  # noqa: BLE001  a user's run would have ended here
            self._escaped = error
        if injection is not None:
            injection.after_step(clock)
            if injection.strikes.num:
                self._struck_at = clock
            if injection.strikes.num and self.struck is None:
                self.struck = FAULT_NAMES[type(injection.fault)]
                self.counts.faults[self.struck] += 1
            if not injection.is_waiting and not injection.is_acting:
                self.injection = None

    def _begin_fault(self, clock: int) -> None:
        if self.faults and clock and clock % FAULT_EVERY == 0:
            name = self.faults[self.fault_turn % len(self.faults)]
            self.fault_turn += 1
            self.injection, self.struck = Injection(FAULTS[name], self._attach), None
        if self.injection is not None and self.injection.is_waiting and self.injection.is_due(self.grower):
            self.injection.begin(self.grower, clock)

    def _is_sound(self) -> bool:
        """Looks at all numbers; what is wrong soon after a fault counts as that fault's, else as Esper's own."""
        tensors = [*self.model.parameters()]
        for site in self.grower.kasmina.sites.values():
            tensors += [v for bank in [*site.permanent, *site.banks.values()] for v in bank.params.values()]
        finite = bool(torch.stack([torch.isfinite(value).all() for value in tensors]).all())
        bad_losses = int(self._bad_losses)
        self._bad_losses.zero_()
        wrong = not finite or self._escaped is not None or bool(inconsistencies(self.grower))
        if wrong:
            self.counts.lost[self.struck or "no fault"] += 1
        if self.struck is None and (bad_losses or not finite):
            self.counts.non_finite += 1
        return not wrong

    def _note(self, event: AnyEvent) -> None:
        counts = self.counts
        if isinstance(event, Transitioned):
            counts.transitions[f"{event.source.name} > {event.target.name}"] += 1
            counts.seed_transitions += len(event.seeds)
        elif isinstance(event, Germinated):
            counts.germinations += 1
            counts.longest_wait = max(counts.longest_wait, event.step - self._last_germination)
            self._last_germination = event.step


FAULT_NAMES = {type(FAULTS[name]): name for name in FAULTS}


def rollbacks(counts: Counts) -> int:
    """Cohorts that ended in ROLLED_BACK."""
    return sum(num for kind, num in counts.transitions.items() if kind.endswith(f"> {Lifecycle.ROLLED_BACK.name}"))
