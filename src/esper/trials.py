"""What a cohort was really worth: twins, randomised withholding, and an audit after the run.

None of this decides anything, and none of it reaches the host: twins and audits work on copies, and a withheld cohort
is one that is not grafted. Its cost is booked as evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
from torch import nn

from esper.config import Config
from esper.copies import Copies, Kept
from esper.evidence.audit import HostAndTwin, Network, OnOff
from esper.evidence.draws import drawn
from esper.evidence.judge import Judge
from esper.evidence.paired import paired_difference
from esper.evidence.twins import MAX_DEPARTURE, HostWatch, TrainStep, Twin
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.kasmina.isolation import preserved_rng
from esper.kasmina.ledger import Ledger
from esper.kasmina.lifecycle import in_slot
from esper.protocol import AnyEvent, Audited, EffectScored, Lifecycle, TwinScored, Verdict, Withheld

Scored = TwinScored | EffectScored | Audited
_MAY_STAY = (
    Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING, Lifecycle.FINE_TUNING, Lifecycle.FOSSILIZED,
)  # fmt: skip

WITHHELD = "withheld by a draw (evidence.withhold_share), to compare with what is grafted"


@dataclass
class Window:
    """A ready cohort between its draw and the look at what became of the held-out loss."""

    cohort: int
    since: int
    withheld: bool
    loss: float
    flops: float


@dataclass
class Trials:
    """Experiments on whole cohorts of one run.

    Parameters
    ----------
    train_step:
        ``train_step(model, optimizers, batch)`` takes one training step, for twins.
    audit:
        Batches for the audit, or ``None``; not touched before :meth:`finish`.
    step_flops:
        FLOPs of one training step of the network as it is now.
    """

    model: nn.Module
    kasmina: Kasmina
    judge: Judge
    clock: HostClock
    ledger: Ledger
    config: Config
    emit: Callable[[AnyEvent], None]
    warn: Callable[[str, str, int], None]
    train_step: TrainStep
    audit: Iterable[Any] | None
    step_flops: Callable[[], float]
    scored: list[Scored] = field(default_factory=list[Scored])
    """Everything that was scored so far, oldest first."""
    _windows: list[Window] = field(default_factory=list[Window])

    def __post_init__(self) -> None:
        self.copies = Copies(self.model, self.clock, lambda: self.kasmina)

    @property
    def twins(self) -> dict[int, Twin]:
        """Twins that train beside the host, by their cohorts."""
        return self.copies.twins

    @property
    def are_open(self) -> bool:
        """Whether a twin trains, or a window waits for its end."""
        return self.copies.watch is not None or bool(self._windows)

    def state(self) -> dict[str, Any]:
        """Scores and open windows, and which copies there are, as a state tree; :attr:`copies` tells those."""
        return {
            "scored": [msgspec.to_builtins(event) for event in self.scored],
            "windows": [asdict(window) for window in self._windows],
            "copies": self.copies.numbers(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told; copies come afterwards, if they are part of the whole."""
        scored: list[Scored] = [msgspec.convert(plain, Scored) for plain in state["scored"]]
        self.scored[:] = scored
        self._windows[:] = [Window(**window) for window in state["windows"]]
        self.copies.go_back(state["copies"])

    def tell_lost(self, step: int) -> None:
        """After a restore: say which copies the earlier run had and this one has not."""
        missing = self.copies.missing
        for kind, what in (("twins", "their twins get no score"), ("kept", "they are not audited")):
            if missing[kind]:
                text = ", ".join(map(str, sorted(set(missing[kind]))))
                self.warn(f"restored {what} {text}", f"a restored run has no copies of cohorts {text}: {what}", step)
            missing[kind].clear()

    # ---------------------------------------------------------------------------------------------- withholding

    def withholds(self, cohort: Cohort, step: int) -> bool:
        """Draw whether a ready cohort is held back; the held-out loss of either kind is read now and later."""
        evidence = self.config.evidence
        if evidence.withhold_share <= 0:
            return False
        withheld = drawn(evidence.withhold_share, self.config.seed, "withhold", cohort.number)
        loss, flops = self._confirm_loss()
        self._windows.append(Window(cohort.number, step, withheld, loss, flops))
        if withheld:
            cohort.withheld_since = step
            self.emit(
                Withheld(step=step, cohort=cohort.number, sites=cohort.sites, until=step + evidence.withhold_steps)
            )
        return withheld

    def _close_windows(self, step: int) -> None:
        if not self._windows:
            return
        num_steps = self.config.evidence.withhold_steps
        due = [window for window in self._windows if step - window.since >= num_steps]
        for window in due:
            self._windows.remove(window)
            loss, flops = self._confirm_loss()
            self._add(
                EffectScored(
                    step=step, cohort=window.cohort, withheld=window.withheld, loss_before=window.loss, loss_after=loss,
                    num_steps=step - window.since, flops=window.flops + flops,
                )
            )  # fmt: skip

    def _confirm_loss(self) -> tuple[float, float]:
        """Mean loss over the batches that choose nothing but the single confirmations, and its FLOPs."""
        before = self.ledger.spent["evidence"]
        losses = self.judge.evaluator.losses(self.judge.evaluator.splits.confirm)
        return float(np.mean(losses)), self.ledger.spent["evidence"] - before

    # ---------------------------------------------------------------------------------------------- twins

    def grafting(self, cohort: Cohort, step: int) -> None:
        """A cohort is about to enter the forward pass: earlier twins end here, and it may get one of its own."""
        for number in list(self.twins):
            self._score(number, step, f"cohort {cohort.number} is grafted, which the twin does not have")
        evidence = self.config.evidence
        if not drawn(evidence.twin_share, self.config.seed, "twin", cohort.number) or self._others_present(cohort):
            return
        self.copies.begin(cohort, since=step, step_flops=self.step_flops())

    def _others_present(self, cohort: Cohort) -> bool:
        """Whether another cohort is on trial in the forward pass: a copy of it would stand still in a twin."""
        others = [other for other in self.kasmina.cohorts.values() if other is not cohort]
        return any(bool(in_slot(int(other.state), other.alpha)) for other in others)

    def follow(self, batch: Any, step: int) -> None:
        """After a real step of the host: twins take the same one, and what is due is scored."""
        watch = self.copies.watch
        if watch is not None:
            for twin in list(self.twins.values()):
                self._repeat(twin, batch, watch, step)
            if self.twins:
                watch.rearm()
        self._close_windows(step)

    def _repeat(self, twin: Twin, batch: Any, watch: HostWatch, step: int) -> None:
        if batch is None:
            self.copies.drop(twin.cohort.number)
            self.warn("twin batch", "twins need the batch of each step; call grower.step(loss, batch=batch)", step)
            return
        before = [p.detach().clone() for p in twin.model.parameters()] if twin.steps == 0 else []
        twin.step(self.train_step, batch, watch, self.clock.hosts)
        self.ledger.add("evidence", twin.step_flops)
        if before:
            departure = twin.departure(self.model, before)
            if not departure <= MAX_DEPARTURE:
                self.copies.drop(twin.cohort.number)
                self.warn(
                    "twin step",
                    "a twin must train as the host does, but after one step on the same batch they differ by "
                    f"{departure:.0%} of that step; pass train_step=, a function of (model, optimizer, batch) that "
                    "does all your loop does (clipping, accumulation, augmentation, another loss)",
                    step,
                )
                return
        if twin.steps >= self.config.evidence.twin_steps:
            self._score(twin.cohort.number, step, f"{twin.steps} steps after the graft")

    def ending(self, cohort: Cohort, step: int) -> None:
        """A cohort has ended but is still in the forward pass: its twin is scored while there is a difference."""
        if cohort.number in self.twins:
            self._score(cohort.number, step, f"the cohort ended: {cohort.state.name}")

    def _score(self, number: int, step: int, reason: str) -> None:
        twin = self.copies.drop(number)
        if twin.steps == 0:
            return
        before, evaluator = self.ledger.spent["evidence"], self.judge.evaluator
        indices = evaluator.splits.confirm
        host, alone = evaluator.losses(indices), evaluator.losses(indices, twin.model)
        result = paired_difference([off - on for on, off in zip(host, alone, strict=True)])
        flops = twin.steps * twin.step_flops + self.ledger.spent["evidence"] - before
        self._add(
            TwinScored(
                step=step, cohort=number, sites=twin.cohort.sites, num_steps=twin.steps, credit=result.mean,
                credit_low=result.low, credit_high=result.high, loss=float(np.mean(host)), num_batches=result.num,
                flops=flops, reason=reason,
            )
        )  # fmt: skip
        if self.audit is not None and twin.cohort.state in _MAY_STAY:
            host = Network.of(self.model, self.kasmina.sites).park()
            alone = Network(twin.model, twin.sites).park()
            self.copies.kept.append(Kept(twin.cohort, HostAndTwin(host, alone)))

    # ---------------------------------------------------------------------------------------------- audit

    def keeping(self, cohort: Cohort) -> None:
        """A cohort is about to become permanent: keep the network as it is, if it will be audited."""
        if self.audit is not None:
            self.copies.kept.append(Kept(cohort, OnOff(Network.of(self.model, self.kasmina.sites).park())))

    def finish(self, step: int, verdicts: Sequence[Verdict]) -> None:
        """The run is over: score what is left, and audit every cohort that was kept."""
        for number in list(self.twins):
            self._score(number, step, "the run ended")
        accepted = {verdict.cohort for verdict in verdicts if verdict.state is Lifecycle.FOSSILIZED}
        kept = [entry for entry in self.copies.kept if entry.cohort.number in accepted]
        self.copies.kept.clear()
        if self.audit is None or not kept:
            return
        with preserved_rng():
            batches = list(self.audit)
        if len(batches) < 2:
            self.warn("audit", f"an audit needs at least 2 batches, got {len(batches)}; nothing was audited", step)
            return
        for entry in kept:
            self._audit(entry, batches, step)

    def _audit(self, entry: Kept, batches: Sequence[Any], step: int) -> None:
        cohort, before = entry.cohort, self.ledger.spent["evidence"]
        result, loss = entry.networks.score(self.judge, cohort.number, cohort.sites, batches)
        self._add(
            Audited(
                step=step, cohort=cohort.number, sites=cohort.sites, source=entry.networks.source,
                claimed=cohort.gain[0], claimed_shrunken=cohort.gain_shrunken, gain=result.mean, gain_low=result.low,
                gain_high=result.high, loss=loss, num_batches=result.num,
                flops=self.ledger.spent["evidence"] - before,
            )
        )  # fmt: skip

    def _add(self, event: Scored) -> None:
        self.scored.append(event)
        self.emit(event)
