"""The guard: growth must never cost the training. Snapshots before grafts, a look at every decision point, and undo.

::

    non-finite numbers, or a loss that diverges
        nothing of Esper on trial   -> reported as the training's own; nothing is changed
        the host is whole           -> the suspects leave at once ("removed"): what is damaged, else the newest
        the host itself is hurt,    -> the whole training goes back to the snapshot from before the suspect's graft,
        or its loss stays away         bit for bit ("restored"), and the suspect leaves

Nothing here waits for the device between decision points.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.config import Config
from esper.errors import StateError
from esper.journal import Journal
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.gates import Gate
from esper.kasmina.host import HostClock, as_tensors
from esper.kasmina.lifecycle import in_slot
from esper.kasmina.reading import Reading
from esper.protocol import Incident, Lifecycle, Restored
from esper.safety.divergence import LossWatch
from esper.safety.snapshot import Snapshot, Snapshots
from esper.safety.training import Training
from esper.safety.tree import digest
from esper.stages import Stages
from esper.state import Loop, Whole
from esper.trials import Trials

SKIPPED = 8
"""Steps that a GradScaler skips in a row before a branch on trial is suspected."""
_BEFORE = "before this process began, and the checkpoint had no room for its snapshot (safety.stored_snapshot_bytes)"


class Orders(Protocol):
    """Commands that wait, seen from here."""

    def forget(self, step: int | None) -> None: ...

    def undone(self, step: int) -> None: ...


class Run(Protocol):
    """What the guard watches and takes back: a grower, seen from here."""

    config: Config
    kasmina: Kasmina
    clock: HostClock
    stages: Stages
    trials: Trials
    journal: Journal
    loop: Loop
    training: Training


@dataclass
class Suspicion:
    """A cohort that was taken out because the loss diverged; until ``until`` the loss must have come back."""

    cohort: int
    reason: str
    until: int


class Guard:
    """Watches one run.

    Parameters
    ----------
    whole:
        The run's state as it is now, without the commands that wait: those go on waiting. With twins or without.
    """

    def __init__(self, run: Run, orders: Orders, whole: Callable[[bool], Whole]) -> None:
        settings = run.config.safety
        self._run, self._orders, self._whole = run, orders, whole
        self.snapshots = Snapshots(settings.snapshot_bytes, settings.stored_snapshot_bytes)
        self._watch = LossWatch(settings.window, settings.max_z, settings.ratio)
        self._recent: list[Tensor | float] = []
        """Losses since the last look."""
        self._suspicion: Suspicion | None = None
        self._seen: dict[int, int] = {}
        """Cohorts in the forward pass of late, and the last step in which: who has just left is suspect still."""
        self._unbounded = {name for name, value in _tensors(run.training) if not bool(torch.isfinite(value).all())}
        """What holds infinities from the beginning: a mask, say."""
        self._without: str | None = None if settings.snapshots else "safety.snapshots is off"
        """Why there are no snapshots."""
        self._reported = False
        """Whether what goes wrong in the user's own training has been said; again after it was in order."""

    # ---------------------------------------------------------------------------------------------- every step

    def note(self, loss: Tensor | float) -> None:
        """Take in the loss of a real step."""
        self._recent.append(loss)
        most = self._run.config.interval + 1  # a look may have been begun a step early, without the newest
        if len(self._recent) > most:
            del self._recent[:-most]

    @property
    def is_calm(self) -> bool:
        """Whether nobody is suspect and nothing is kept to go back to."""
        return self._suspicion is None and not self._seen and not self.snapshots

    def may_graft(self, cohort: int) -> bool:
        """Whether there is what a graft could be taken back to, or never will be."""
        return self._without is not None or cohort in self.snapshots

    def after_step(self, step: int) -> None:
        """End of a step: cohorts that may be grafted in the next one get a snapshot of the run as it is now.

        Losses from before a cohort germinated are judged first, where no look has seen them: they are not its doing.
        """
        if self._recent and any(cohort.born == step for cohort in self._run.kasmina.cohorts.values()):
            self.look(step, Reading((), self._recent, self._run.loop.losses))
        if self._run.clock.steps == step:
            self._keep(step)

    def _keep(self, step: int) -> None:
        cohorts = self._run.kasmina.cohorts.values()
        self._seen.update({cohort.number: step for cohort in cohorts if _is_suspect(cohort)})
        needed = {cohort.number for cohort in cohorts if not _is_held(cohort)} | self._seen.keys()
        if self._suspicion is not None:
            needed.add(self._suspicion.cohort)
        self.snapshots.keep_only(needed)
        self._orders.forget(self.snapshots.oldest_step)
        ready = [cohort.number for cohort in cohorts if _is_ready(cohort) and cohort.number not in self.snapshots]
        if ready and self._without is None:
            self._take(ready, step)

    def _take(self, cohorts: list[int], step: int) -> None:
        twins = bool(self._run.trials.twins)
        try:
            for with_twins in (True, False) if twins else (True,):
                state = self._state_before(cohorts, twins=with_twins)
                if self.snapshots.fits(state):
                    self.snapshots.put(Snapshot.of(state, step), cohorts)
                    if not with_twins:
                        text = f"twins would not outlive an exact restore: {self._bound()}"
                        self._run.journal.warn("snapshot of twins", text, step)
                    return
            self._without = self._bound()
        except StateError as error:
            self._without = str(error)
        text = f"a graft cannot be taken back exactly from here on: {self._without}"
        self._run.journal.warn("snapshot", text, step)

    def _state_before(self, cohorts: list[int], *, twins: bool) -> dict[str, Any]:
        """The state to go back to. Whoever goes back there ends the cohort at once, so the rows it has captured, often
        many times the model, are left out (of several cohorts only one would end: theirs stay)."""
        state: dict[str, Any] = self._whole(twins).state()
        if len(cohorts) == 1:
            kasmina = self._run.kasmina
            sites = state["esper"]["kasmina"]["sites"]
            for name in kasmina.own_captures(kasmina.cohorts[cohorts[0]]):
                sites[name]["capture"] = None
        return state

    def _bound(self) -> str:
        return f"one more would exceed safety.snapshot_bytes = {self.snapshots.max_bytes}"

    def begin_anew(self, step: int) -> None:
        """The run has become another one: nothing of before can be gone back to."""
        self.snapshots.keep_only(set())
        self._keep(step)

    # ---------------------------------------------------------------------------------------------- decision points

    def ask(self, *, sensors: bool) -> Reading:
        """Begin to read what the next look is about, and the sensors of all sites with it, without waiting."""
        kasmina = self._run.kasmina
        readout = kasmina.readout if sensors else None
        return Reading(kasmina.sites.values(), self._recent, self._run.loop.losses, readout)

    def look(self, step: int, reading: Reading) -> None:
        """Judge the steps since the last look. Afterwards the run may stand at an earlier step."""
        del self._recent[: reading.num_losses]  # the others are of steps that came after it
        self._judge(reading.losses, reading.damage, step)
        late = self._run.clock.steps - self._run.config.interval
        self._seen = {number: last for number, last in self._seen.items() if last >= late}

    def glimpse(self, step: int) -> None:
        """:meth:`look` at losses that are at hand, while nothing is alive."""
        losses = array("f", [float(loss) for loss in self._recent]).tolist()  # rounded as a reading does
        self._recent.clear()
        self._judge(losses, {}, step)

    def _judge(self, losses: list[float], damage: dict[int, str], step: int) -> None:
        if not all(map(math.isfinite, losses)):
            self._run.loop.losses.clear()  # one incident has one culprit: the window must not accuse the next cohort
            newest = self._newest()
            damage = damage or ({newest: "a non-finite loss"} if newest is not None else {})
            if not damage and self._suspicion is None:
                self._report("the training loss is not finite and nothing of Esper is on trial: it is the host's", step)
                return
        if damage:
            self._end_damage(damage, step)
        elif self._suspicion is not None and not all(map(math.isfinite, losses)):
            self._restore(self._suspicion.cohort, step, f"{self._suspicion.reason}, and turned non-finite")
        else:
            self._judge_level(losses, step)

    def _end_damage(self, damage: dict[int, str], step: int) -> None:
        """Non-finite numbers: the damaged leave; a hurt host goes back to before the newest of them."""
        if self._is_finite():
            for number, what in damage.items():
                self._remove(number, step, what)
            return
        number = max(self._seen.keys() & damage.keys() or self._seen.keys() or damage.keys())
        what = damage.get(number, next(iter(damage.values())))
        self._restore(number, step, f"{what}, and the host is hurt")

    def _is_finite(self) -> bool:
        """Whether the host and its optimizers hold finite numbers only. Waits for the device once."""
        flags = [torch.isfinite(v).all() for name, v in _tensors(self._run.training) if name not in self._unbounded]
        return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

    def _judge_level(self, losses: list[float], step: int) -> None:
        """A loss that runs away: the newest suspect leaves, and if that does not help, everything goes back."""
        wrong, suspicion = self._watch.verdict(losses), self._suspicion
        if wrong is None:
            self._watch.take(losses)
            self._suspicion, self._reported = None, False
            return
        if suspicion is not None:
            if step >= suspicion.until:
                self._restore(suspicion.cohort, step, f"{suspicion.reason}, and has not come back")
            return
        newest = self._newest()
        if newest is None:
            self._watch.take(losses)
            self._report(f"{wrong}, and nothing of Esper is on trial: it is the training's own", step)
            return
        self._suspicion = Suspicion(newest, wrong, step + self._run.config.safety.recovery)
        self._remove(newest, step, wrong)

    def skipped(self, num: int, step: int) -> None:
        """A GradScaler has skipped ``num`` steps in a row: a broken branch would make it skip for ever."""
        if num % SKIPPED:
            return
        newest = self._newest()
        damage = self._run.kasmina.damaged()
        if newest is not None:
            what = f"{num} steps in a row were skipped for gradients that are not finite"
            for number in damage or [newest]:
                self._remove(number, step, what)

    def _newest(self) -> int | None:
        """The newest cohort that is in the forward pass, or was of late."""
        return max(self._seen, default=None)

    # ---------------------------------------------------------------------------------------------- what is done

    def _report(self, what: str, step: int) -> None:
        """Nothing is changed; once, until the loss is in order again."""
        if not self._reported:
            self._reported = True
            self._run.journal.emit(Incident(step=step, cohort=None, action="reported", reason=what))
            self._run.journal.warn("loss", what, step)

    def _remove(self, number: int, step: int, what: str) -> None:
        """Soft: one cohort out at once, the host as it is."""
        cohort = self._run.kasmina.cohorts.get(number)
        if cohort is None:
            what, action = f"{what}; cohort {number} has left already", "reported"
        else:
            action = "removed"
        self._run.journal.emit(Incident(step=step, cohort=number, action=action, reason=what))
        if cohort is not None:
            self._run.stages.expel(cohort, step, f"guard: {what}")

    def take_back(self, cohort: Cohort, step: int, reason: str) -> Gate:
        """An operator wants a graft undone exactly."""
        if self.snapshots.of(cohort.number) is None:
            why = self._without or f"it was not grafted yet, or {_BEFORE}"
            return Gate("snapshot", False, f"no snapshot from before its graft is kept: {why}; roll back without exact")
        self._restore(cohort.number, step, reason)
        return Gate("command", True, "")

    def _restore(self, number: int, step: int, what: str) -> None:
        """Exact: the whole training as it was before a cohort's graft, then the cohort out."""
        self._suspicion = None
        snapshot = self.snapshots.of(number)
        if snapshot is None:
            self._remove(number, step, what)
            why = self._without or f"it was grafted {_BEFORE}"
            self._report(f"{what}; the host stays as it is, for there is no snapshot to go back to: {why}", step)
            return
        journal = self._run.journal
        told = journal.state()
        journal.emit(Incident(step=step, cohort=number, action="restored", reason=what))
        verified = self._put_back(snapshot)
        rewound = self._run.training.rewinds
        journal.emit(
            Restored(
                step=step, to_step=snapshot.step, cohort=number, verified=verified, rewound=rewound,
                digest=snapshot.digest(), reason=_sentence(what, snapshot.step, verified=verified, rewound=rewound),
            )
        )  # fmt: skip
        journal.remember(told)
        self._run.trials.tell_lost(snapshot.step)
        self._orders.undone(snapshot.step)
        cohort = self._run.kasmina.cohorts.get(number)
        if cohort is not None:
            self._run.stages.expel(cohort, snapshot.step, f"guard: {what}; taken back to step {snapshot.step}")
        self.after_step(snapshot.step)

    def _put_back(self, snapshot: Snapshot) -> bool:
        """Restore, and say whether the hash is the snapshot's."""
        tree = snapshot.tree()
        whole = self._whole("copies" in tree["esper"])
        whole.restore(tree)
        return digest(whole.state()) == snapshot.digest()

    # ---------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Losses and suspicion, as a state tree; snapshots are a part of their own."""
        suspicion = None if self._suspicion is None else asdict(self._suspicion)
        return {
            "watch": self._watch.state(),
            "recent": as_tensors(self._recent),
            "suspicion": suspicion,
            "reported": self._reported,
            "seen": dict(self._seen),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self._watch.restore(state["watch"])
        self._recent, self._reported = list(state["recent"]), state["reported"]
        self._seen = dict(state["seen"])
        suspicion = state["suspicion"]
        self._suspicion = None if suspicion is None else Suspicion(**suspicion)


def _sentence(what: str, step: int, *, verified: bool, rewound: bool) -> str:
    data = (
        "the data went back as well" if rewound else "training goes on with the next batch (nothing in track= rewinds)"
    )
    proof = "hash verified" if verified else "its hash is NOT the snapshot's"
    return f"{what}: taken back to step {step}, {proof}; {data}"


def _is_suspect(cohort: Cohort) -> bool:
    """Whether it is in the forward pass and not permanent."""
    return bool(in_slot(int(cohort.state), cohort.alpha))


def _is_ready(cohort: Cohort) -> bool:
    """Whether it may be grafted in the next step."""
    return cohort.state is Lifecycle.TRAINING and not cohort.paused and cohort.withheld_since is None


def _is_held(cohort: Cohort) -> bool:
    """Whether it waits before its graft: a snapshot of now would be old by then."""
    return cohort.state is Lifecycle.TRAINING and (cohort.paused or cohort.withheld_since is not None)


def _tensors(training: Training) -> list[tuple[str, Tensor]]:
    """The host's parameters and buffers and its optimizers' state, by name."""
    named = [*training.model.named_parameters(), *training.model.named_buffers()]
    for number, optimizer in enumerate(training.optimizers):
        for place, entry in enumerate(optimizer.state.values()):
            named += [(f"{number}/{place}/{k}", v) for k, v in entry.items() if isinstance(v, Tensor)]
    return [(name, value.detach()) for name, value in named if value.is_floating_point()]
