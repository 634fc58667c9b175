"""One function a state: what a cohort needs to leave it. Gates decide; a gate that lacks a metric refuses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esper.config import Config
from esper.errors import CONTAINED, contained
from esper.evidence.judge import Judge
from esper.evidence.paired import PairedResult
from esper.evidence.ranking import best
from esper.fitting import Fitting
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.gates import Gate, capture_gate, ramp_gate, stability_gate
from esper.kasmina.host import HostClock, stacked
from esper.kasmina.ledger import Ledger
from esper.kasmina.lifecycle import in_slot, is_active
from esper.kasmina.strategies import STRATEGIES, GraftContext, Move, checked
from esper.protocol import AnyEvent, Judged, Lifecycle, Transitioned, Verdict
from esper.trials import WITHHELD, Trials
from esper.verdicts import Verdicts

NAN = float("nan")


@dataclass
class Stages:
    """Brings cohorts from germination to an end state, one step at a time."""

    kasmina: Kasmina
    judge: Judge
    clock: HostClock
    ledger: Ledger
    config: Config
    emit: Callable[[AnyEvent], None]
    trials: Trials
    losses: deque[torch.Tensor | float]
    """Detached task losses of the last steps, oldest first."""
    may_graft: Callable[[int], bool]
    """Whether a cohort may be grafted now: it waits for the snapshot from before its graft."""
    held_out: float = NAN
    verdicts: Verdicts = field(default_factory=Verdicts)

    @property
    def fitting(self) -> Fitting:
        """The isolated training, on the sites as they are now."""
        return Fitting(self.kasmina, self.ledger, self.config, self.emit, self.trials.step_flops)

    def state(self) -> dict[str, Any]:
        """What was decided so far, as a state tree."""
        return {"held_out": self.held_out, "verdicts": self.verdicts.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.verdicts.restore(state["verdicts"])
        self.held_out = state["held_out"]

    # ---------------------------------------------------------------------------------------------- the step

    def advance(self, step: int) -> None:
        """Give every cohort its turn; paused ones stand still (alpha as it is, timers stopped)."""
        for number, what in self.kasmina.take_failures().items():
            if number in self.kasmina.cohorts:
                self.expel(self.kasmina.cohorts[number], step, f"its branch failed at {what}")
        if not self.kasmina.cohorts:
            self.clock.measure_gradients(())
            return
        running = [cohort for cohort in list(self.kasmina.cohorts.values()) if not cohort.paused]
        if running:
            self.kasmina.table.tick()
        for cohort in running:
            try:
                self._STAGES[cohort.state](self, cohort, step)
            except CONTAINED as error:
                self.contain(cohort, step, error)
        self.clock.measure_gradients(
            {
                name
                for cohort in self.kasmina.cohorts.values()
                if cohort.state is Lifecycle.GRAFTING and STRATEGIES[cohort.strategy].needs_gradients
                for name in cohort.sites
            }
        )

    def _germinated(self, cohort: Cohort, step: int) -> None:
        sites = [self.kasmina.sites[name] for name in cohort.sites]
        if self._given_up(cohort, step):
            return
        captures = (site.capture for site in sites if site.capture is not None)
        gates: list[Gate] = []
        for capture in captures:
            gates.append(capture_gate(batches=capture.filled, needed=capture.num_batches))
            if not gates[-1].passed:  # the others are not asked in a step in which it waits anyway
                break
        if all(gate.passed for gate in gates):
            reason = gates[0].reason if gates else "capture: the start needs no rows"
            self._move(cohort, Lifecycle.TRAINING, step, reason)
        elif step - cohort.entered >= self.config.capture.timeout:
            filled = min(site.capture.filled for site in sites if site.capture is not None)
            reason = (
                f"capture: {filled} of {self.config.capture.batches} batches after {step - cohort.entered} steps "
                "(no gradient reaches the site?); raise capture.timeout or exclude it"
            )
            self.end(cohort, Lifecycle.CANCELLED, step, reason)

    def _given_up(self, cohort: Cohort, step: int) -> bool:
        """Whether one of the sites turned out unusable; the cohort is cancelled then."""
        for name in cohort.sites:
            reason = self.kasmina.sites[name].refused
            if reason is not None:
                self.end(cohort, Lifecycle.CANCELLED, step, f"{name}: {reason}")
                return True
        return False

    def _training(self, cohort: Cohort, step: int) -> None:
        if self._given_up(cohort, step) or self._still_withheld(cohort, step) or not self.may_graft(cohort.number):
            return
        for name in list(cohort.sites):
            gate = self.fitting.fit(cohort, name, step)
            self.kasmina.drop_captures(cohort, [name])
            if not gate.passed:
                self._drop(cohort, name, step, gate)
        if cohort.members:
            self._thin(cohort, step)
        if not cohort.members:
            return
        if self.trials.withholds(cohort, step):
            return
        self.trials.grafting(cohort, step)
        preserving = all(member.preserves_function for member in cohort.members.values())
        self._move(cohort, Lifecycle.GRAFTING, step, "sanity: the branches may be grafted")
        self.judge.note_graft(cohort.number)
        self.kasmina.graft(cohort)
        if preserving:
            self.kasmina.set_alpha(cohort, 1.0)  # a zero branch has nothing to ramp
        else:
            self._choose_scale(cohort)

    def _still_withheld(self, cohort: Cohort, step: int) -> bool:
        """Whether a draw has held the cohort back; after its time it gives its place free."""
        since = cohort.withheld_since
        if since is not None and step - since >= self.config.evidence.withhold_steps:
            self.end(cohort, Lifecycle.CANCELLED, step, WITHHELD)
        return since is not None

    def _grafting(self, cohort: Cohort, step: int) -> None:
        gate = ramp_gate(alpha=cohort.alpha, target=1.0)
        settled = self.config.graft.ramp_steps + self.config.graft.settle_steps
        if gate.passed and step - cohort.entered >= settled:
            self._move(cohort, Lifecycle.STABILIZATION, step, gate.reason)
        elif step - cohort.entered >= self.config.graft.timeout:
            self.end(cohort, Lifecycle.CULLED, step, f"out of time: {gate.reason}")
        elif not gate.passed:
            self._ramp(cohort)

    def _stabilization(self, cohort: Cohort, step: int) -> None:
        window = stacked(self.losses).cpu().numpy() if self.losses else None
        gate = stability_gate(window, steps=step - cohort.entered, min_steps=self.config.graft.stabilize_steps)
        if gate.passed:
            self._move(cohort, Lifecycle.EVALUATING, step, gate.reason)
        elif step - cohort.entered >= self.config.graft.timeout:
            self.end(cohort, Lifecycle.CULLED, step, f"out of time: {gate.reason}")

    def _evaluating(self, cohort: Cohort, step: int) -> None:
        before = self.ledger.spent["evidence"]
        judged = self.judge.evaluate(cohort.number, cohort.sites, further=self._another_look_fits(step))
        cohort.gain_shrunken = self.verdicts.shrunken(judged.result)
        self._note_gain(cohort, judged.result)
        self.emit(
            Judged(
                step=step, cohort=cohort.number, stage="evaluate", sites=cohort.sites, gain=judged.result.mean,
                gain_low=judged.result.low, gain_high=judged.result.high, gain_shrunken=cohort.gain_shrunken,
                e_value=judged.e_value, e_threshold=judged.threshold, confirm_p=judged.confirm_p,
                num_batches=judged.num_batches, accepted=judged.gate.passed, added_params=cohort.added_params,
                added_flops_share=cohort.added_flops_share, flops=self.ledger.spent["evidence"] - before,
                reason=judged.gate.reason, look=judged.look, undecided=judged.undecided,
            )
        )  # fmt: skip
        if judged.gate.passed:
            self._move(cohort, Lifecycle.FINE_TUNING, step, judged.gate.reason)
        elif judged.undecided:
            self._move(cohort, Lifecycle.GRAFTING, step, judged.gate.reason)
        else:
            self.end(cohort, Lifecycle.CULLED, step, judged.gate.reason)

    def _another_look_fits(self, step: int) -> bool:
        """Whether a cohort that learns on from here could still become permanent before the planned end."""
        graft, total = self.config.graft, self.config.total_steps
        needed = graft.ramp_steps + graft.settle_steps + graft.stabilize_steps + graft.fine_tune_steps
        return total is None or step + needed < total

    def _fine_tuning(self, cohort: Cohort, step: int) -> None:
        if step - cohort.entered >= self.config.graft.fine_tune_steps:
            self.decide_hold(cohort, step)

    def decide_hold(self, cohort: Cohort, step: int) -> None:
        """Make a fine-tuned cohort permanent if its gain still holds, remove it otherwise."""
        before = self.ledger.spent["evidence"]
        result, gate = self.judge.hold(
            cohort.number, cohort.sites, held_out=self.held_out, flops_share=cohort.added_flops_share
        )
        self.emit(
            Judged(
                step=step, cohort=cohort.number, stage="hold", sites=cohort.sites, gain=result.mean,
                gain_low=result.low, gain_high=result.high, gain_shrunken=self.verdicts.shrunken(result), e_value=NAN,
                e_threshold=NAN, confirm_p=NAN, num_batches=result.num, accepted=gate.passed,
                added_params=cohort.added_params, added_flops_share=cohort.added_flops_share,
                flops=self.ledger.spent["evidence"] - before, reason=gate.reason,
            )
        )  # fmt: skip
        if gate.passed:
            self._finish(cohort, Lifecycle.FOSSILIZED, step, gate.reason)
        else:
            self.end(cohort, Lifecycle.CULLED, step, gate.reason)

    def _fading(self, cohort: Cohort, step: int) -> None:
        """A culled or cancelled branch leaves over ``cull_steps`` steps, so that the host can follow."""
        cohort.fading += 1
        left = max(0.0, 1.0 - cohort.fading / max(1, self.config.graft.cull_steps))
        self.kasmina.set_alpha(cohort, cohort.fading_from * left)
        if left == 0.0:
            self.kasmina.remove(cohort, step, self.config.graft.embargo)

    _STAGES = {  # noqa: RUF012  (a constant table)
        Lifecycle.GERMINATED: _germinated,
        Lifecycle.TRAINING: _training,
        Lifecycle.GRAFTING: _grafting,
        Lifecycle.STABILIZATION: _stabilization,
        Lifecycle.EVALUATING: _evaluating,
        Lifecycle.FINE_TUNING: _fine_tuning,
        Lifecycle.CULLED: _fading,
        Lifecycle.CANCELLED: _fading,
    }

    # ---------------------------------------------------------------------------------------------- ends

    def end(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        """Bring a cohort to ``CULLED``, ``CANCELLED`` or ``ROLLED_BACK``; a branch in the forward fades out, or
        leaves at once on a rollback."""
        in_forward = bool(in_slot(int(cohort.state))) and cohort.alpha > 0
        self._conclude(cohort, target, step, reason)  # raises for an illegal end, before anything has changed
        cohort.paused = False
        cohort.fading_from = cohort.alpha
        self.trials.ending(cohort, step)
        if target is Lifecycle.ROLLED_BACK or not in_forward:
            self.kasmina.remove(cohort, step, self.config.graft.embargo)

    def contain(self, cohort: Cohort, step: int, error: BaseException) -> None:
        """A plug-in or the evaluation has failed on a cohort: it leaves at once, the run goes on."""
        reason = f"{cohort.state.name} failed with {contained(error)}"
        if cohort.number in self.kasmina.cohorts:
            self.expel(cohort, step, reason)

    def expel(self, cohort: Cohort, step: int, reason: str) -> None:
        """Take a cohort out at once, whatever its state: roll it back, or cut short the fading of one that ended."""
        if cohort.withheld_since is not None:
            self.end(cohort, Lifecycle.CANCELLED, step, WITHHELD)
        elif bool(is_active(int(cohort.state))):
            self.end(cohort, Lifecycle.ROLLED_BACK, step, reason)
        else:
            self.kasmina.remove(cohort, step, self.config.graft.embargo)

    def _finish(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        self._report_move(cohort, target, step, reason)
        self._add_verdict(cohort, target, step, reason)
        self.judge.forget(cohort.number)
        self.trials.keeping(cohort)
        self.kasmina.fossilise(cohort, step, self.clock.hosts)

    def _conclude(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        self._move(cohort, target, step, reason)
        self._add_verdict(cohort, target, step, reason)
        self.judge.forget(cohort.number)
        self.kasmina.drop_captures(cohort)

    def _add_verdict(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        gain, low, high = cohort.gain
        self.verdicts.add(
            Verdict(
                cohort=cohort.number, step=step, state=target, sites=cohort.sites, gain=gain, gain_low=low,
                gain_high=high, added_params=cohort.added_params, added_flops_share=cohort.added_flops_share,
                reason=reason, gain_shrunken=cohort.gain_shrunken,
            ),
            cohort.gain_error,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- how

    def _thin(self, cohort: Cohort, step: int) -> None:
        """Of the seeds on each site, keep those with the largest first-order gain, where the plan asked for fewer."""
        crowded = [name for name, m in cohort.members.items() if m.keep is not None and m.keep < len(m.slots)]
        if not crowded:
            return
        ranking = self.judge.rank(cohort.number, {n: cohort.members[n].preserves_function for n in crowded})
        for name in crowded:
            keep, total = cohort.members[name].keep, len(cohort.members[name].slots)
            kept = best(ranking.scores.get(name), keep)
            if not kept.size:
                reason = f"rank: no first-order gain known, {ranking.reason}"
                self._drop(cohort, name, step, Gate("rank", False, reason))
                continue
            leaving = self.kasmina.thin(cohort, name, kept, step, self.config.graft.embargo)
            reason = f"{name}: rank: not among the best {len(kept)} of {total} by {ranking.measures[name]}"
            self._emit(cohort, tuple(leaving.tolist()), cohort.state, Lifecycle.CULLED, step, reason)

    def _drop(self, cohort: Cohort, name: str, step: int, gate: Gate) -> None:
        """One site's seeds fail the sanity test: they are culled, the others go on."""
        if len(cohort.members) == 1:
            self.end(cohort, Lifecycle.CULLED, step, f"{name}: {gate.reason}")
            cohort.members.clear()
            return
        slots = cohort.members[name].slots
        self._emit_move(cohort, slots, Lifecycle.CULLED, step, f"{name}: {gate.reason}")
        self.kasmina.drop_member(cohort, name, step, self.config.graft.embargo)

    def _choose_scale(self, cohort: Cohort) -> None:
        """Size of a fitted branch by real forward losses; zero (features kept, output zero) if none helps."""
        banks = [self.kasmina.sites[name].banks[cohort.number] for name in cohort.sites]
        best, least = 0.0, self.judge.calibration_loss()
        for scale in self.config.fit.scales:
            for bank in banks:
                bank.alpha.fill_(scale)
            loss = self.judge.calibration_loss()
            if math.isfinite(loss) and loss < least:
                best, least = scale, loss
        for bank in banks:
            bank.alpha.fill_(cohort.alpha)
            bank.scale_output(best)
        if best == 0.0:
            self.kasmina.set_alpha(cohort, 1.0)

    def _ramp(self, cohort: Cohort) -> None:
        strategy = STRATEGIES[cohort.strategy]
        moves: list[Move] = []
        losses = tuple(stacked(self.losses).tolist()) if strategy.needs_losses and self.losses else ()
        for name in cohort.sites:
            context = GraftContext(
                alpha=cohort.alpha,
                ramped=cohort.ramped,
                weights=self.clock.weights(name),
                memory=cohort.memory.setdefault(name, {}),
                losses=losses,
                gradient_norm=self.clock.gradient_norm(name) if strategy.needs_gradients else None,
            )
            moves.append(checked(strategy.advance(context, self.config.graft), cohort.strategy))
        cohort.held_by = next((move.held_by for move in moves if move.held_by is not None), None)
        alpha = min(
            move.alpha for move in moves
        )  # the site that drifts most holds the others: they are judged together
        if alpha > cohort.alpha:
            cohort.ramped += 1
            self.kasmina.set_alpha(cohort, alpha)

    def _note_gain(self, cohort: Cohort, result: PairedResult) -> None:
        cohort.gain = (result.mean, result.low, result.high)
        cohort.gain_error = result.standard_error

    def _move(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        source = cohort.state
        self.kasmina.move(cohort, target, step)
        self._emit(cohort, cohort.seed_ids, source, target, step, reason)

    def _report_move(self, cohort: Cohort, target: Lifecycle, step: int, reason: str) -> None:
        self._emit(cohort, cohort.seed_ids, cohort.state, target, step, reason)

    def _emit_move(
        self, cohort: Cohort, slots: npt.NDArray[np.int64], target: Lifecycle, step: int, reason: str
    ) -> None:
        ids = tuple(self.kasmina.table.seed_id[slots].tolist())
        self._emit(cohort, ids, cohort.state, target, step, reason)

    def _emit(
        self, cohort: Cohort, ids: tuple[int, ...], source: Lifecycle, target: Lifecycle, step: int, reason: str
    ) -> None:
        self.emit(
            Transitioned(
                step=step, cohort=cohort.number, seeds=ids, source=source, target=target, alpha=cohort.alpha,
                reason=reason,
            )
        )  # fmt: skip
