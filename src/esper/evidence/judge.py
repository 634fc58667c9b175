"""Does a cohort help? Paired on/off evidence on held-out batches, accepted at a controlled false discovery rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esper.config import EvidenceConfig
from esper.evidence.before import HostBefore, only_folds, smaller, tensors_by_name
from esper.evidence.control import Recorder, WithoutCohort, probing, recalibrated
from esper.evidence.eprocess import PairedEProcess, robust_scale
from esper.evidence.evaluator import Evaluator
from esper.evidence.fdr import OnlineFDR
from esper.evidence.paired import PairedResult, paired_difference
from esper.evidence.ranking import Ranking, rank
from esper.evidence.splits import Rotation
from esper.evidence.tokens import recorder_for, stand_in_of
from esper.kasmina import memory
from esper.kasmina.gates import Gate, evidence_gate, hold_gate
from esper.kasmina.isolation import undisturbed
from esper.kasmina.site import Site

NAN = float("nan")
_CONFIRM_BATCHES = 16
_UNJUDGED = Gate("evidence", True, "kept without judgement: evidence.accept is 'always'")


@dataclass(frozen=True)
class Judgement:
    """What was measured. ``result`` is the paired gain (positive: the cohort helps) with its 95% interval."""

    result: PairedResult
    e_value: float
    threshold: float
    confirm_p: float
    num_batches: int
    gate: Gate
    look: int = 1
    """Which look at the cohort this was."""
    undecided: bool = False
    """The gate is not passed, but there is a gain, and a later look may prove it."""


@dataclass(frozen=True)
class _Control:
    """What stands in for a cohort at its sites, and the host from before it, if that is asked as well."""

    probes: dict[str, WithoutCohort]
    before: HostBefore | None = None


class Judge:
    """Compares the network with and without a cohort over the same held-out batches.

    Parameters
    ----------
    sites:
        All sites of the model by name.
    """

    def __init__(self, evaluator: Evaluator, sites: dict[str, Site], config: EvidenceConfig, *, seed: int) -> None:
        self.evaluator = evaluator
        self.sites = sites
        self.config = config
        self.fdr = OnlineFDR(config.fdr)
        self.generator = torch.Generator().manual_seed(seed)
        splits = evaluator.splits
        self.calibration = splits.calibration
        self._turn = 0
        self._before: dict[int, HostBefore] = {}
        self._earlier: dict[int, list[float]] = {}
        """Weighted e-values of the looks so far at cohorts that are not decided yet."""
        # all of a small split each time: half of a handful of batches confirms nothing
        window = min(len(splits.confirm), max(_CONFIRM_BATCHES, len(splits.confirm) // 2))
        self.confirm = Rotation(splits.confirm, window)

    def note_graft(self, cohort: int) -> None:
        """Called before a cohort enters the forward pass: keeps the host as it is, where the control needs it."""
        if self.config.control == "projected" and self.config.accept == "evidence" and only_folds(self.sites, cohort):
            self._before[cohort] = HostBefore(self.evaluator.model, self.sites, cohort)

    def forget(self, cohort: int) -> None:
        """Called when a cohort has ended. A test that was begun counts, also if nobody waits for its result."""
        self._before.pop(cohort, None)
        if self._earlier.pop(cohort, None) is not None:
            self.fdr.record(False)

    def state(self) -> dict[str, Any]:
        """Tests so far, positions and draws, as a state tree; the tensors are its own, not copies."""
        names = {id(value): name for name, value in tensors_by_name(self.evaluator.model, self.sites).items()}
        return {
            "fdr": self.fdr.state(),
            "confirm": self.confirm.state(),
            "generator": self.generator.get_state(),
            "turn": self._turn,
            "before": {cohort: before.state(names) for cohort, before in self._before.items()},
            "earlier": {cohort: list(looks) for cohort, looks in self._earlier.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told, once the sites do. It takes over the tensors."""
        tensors = tensors_by_name(self.evaluator.model, self.sites)
        self._before = {cohort: HostBefore.of(kept, tensors) for cohort, kept in state["before"].items()}
        self.fdr.restore(state["fdr"])
        self.confirm.restore(state["confirm"])
        self.generator.set_state(state["generator"].cpu())
        self._turn = state["turn"]
        self._earlier = {cohort: list(looks) for cohort, looks in state["earlier"].items()}

    # ---------------------------------------------------------------------------------------------- the tests

    def evaluate(self, cohort: int, members: Sequence[str], *, further: bool = False) -> Judgement:
        """The acceptance test: an e-process over gate batches, then one confirmation on batches of its own.

        A cohort is looked at up to ``looks`` times, while it learns on in between. The e-values of its looks are added
        with weights of 1/2, 1/4, ... whose sum is 1: their sum is an e-value however the looks depend on each other
        (Vovk and Wang, "E-values: calibration, combination and applications", Annals of Statistics 49(3), 2021).

        Parameters
        ----------
        further:
            Whether there is time for another look. It must not depend on what was measured.
        """
        if self.config.accept == "always":
            return Judgement(paired_difference([]), NAN, NAN, NAN, 0, _UNJUDGED)
        control = self._control(cohort, members)
        calibration = self._differences(control, self.calibration)
        if not np.isfinite(calibration).all():
            return self._refusal(cohort, "the loss on a calibration batch is not finite; check evaluate= and the model")
        earlier = self._earlier.get(cohort, [])
        look, threshold = len(earlier) + 1, self.fdr.threshold()
        further = further and look < self.config.looks
        weight = 2.0**-look if further else 2.0 ** (1 - look)
        process = PairedEProcess(robust_scale(calibration), self.config.min_gain)
        seen, capital = self._bet(control, process, needed=(threshold - sum(earlier)) / weight)
        e_value, result, confirm_p = sum(earlier) + weight * capital, paired_difference(seen), NAN
        crossed = capital >= (threshold - sum(earlier)) / weight
        if crossed:
            result = paired_difference(self._differences(control, self.confirm.take()), min_gain=self.config.min_gain)
            confirm_p = result.p_one_sided
        gate = evidence_gate(
            e_value=e_value, threshold=threshold, confirm_p=confirm_p if crossed else 1.0,
            level=self.config.confirm_level, gain=result.mean, min_gain=self.config.min_gain,
        )  # fmt: skip
        undecided = not gate.passed and further and not process.refused and result.mean > self.config.min_gain
        if undecided:
            self._earlier[cohort] = [*earlier, weight * capital]
            reason = f"undecided after look {look} of {self.config.looks}, it learns on: {gate.reason}"
            gate = Gate("evidence", False, reason)
        else:
            self._earlier.pop(cohort, None)
            self.fdr.record(gate.passed)
        return Judgement(result, e_value, threshold, confirm_p, len(seen), gate, look, undecided)

    def _bet(self, control: _Control, process: PairedEProcess, *, needed: float) -> tuple[list[float], float]:
        """Differences on the gate batches, and the capital where it first reaches ``needed``, or at the end."""
        seen: list[float] = []
        capital = 1.0
        for block in _blocks(self._gate_batches()):
            for difference in self._differences(control, block):
                seen.append(difference)
                if capital < needed:  # a test that may stop at any time stops where it crosses its line
                    capital = process.update(difference)
            if capital >= needed:
                break
        return seen, capital

    def hold(
        self, cohort: int, members: Sequence[str], *, held_out: float, flops_share: float
    ) -> tuple[PairedResult, Gate]:
        """Is the gain still there after fine-tuning, and worth its cost? Half the gate batches, or all of them.

        The gain must be above zero, and harm beyond ``tolerated_harm`` excluded: that the cohort helps was decided at a
        controlled false discovery rate before, and asking for the proof twice throws proven cohorts away
        (docs/decisions/0015). All gate batches are looked at where half of them leave it open. ``held_out`` is the loss
        that the gain is relative to, ``flops_share`` the forward FLOPs the cohort adds.
        """
        if self.config.accept == "always":
            return paired_difference([]), _UNJUDGED
        control = self._control(cohort, members)
        seen: list[float] = []
        result = paired_difference(seen)
        for block in _blocks(self._gate_batches()):
            seen += self._differences(control, block)
            result = paired_difference(seen)
            if result.p_one_sided <= self.config.confirm_level:
                break
        share = 1 / abs(held_out) if held_out else NAN
        gate = hold_gate(
            gain=result.mean, harm=-result.low * share, tolerated_harm=self.config.tolerated_harm,
            gain_per_cost=result.mean * share / max(flops_share, 1e-9),
            min_gain_per_cost=self.config.min_gain_per_cost,
        )  # fmt: skip
        return result, gate

    def measure(self, cohort: int, members: Sequence[str], indices: Sequence[int]) -> tuple[PairedResult, float]:
        """Paired gain over any batches against the configured control, and the mean loss with the cohort."""
        gains = self._differences(self._control(cohort, members), indices)
        return paired_difference(gains), float(np.mean(self._arm({}, indices)))

    def held_out(self, num_batches: int) -> float:
        """Mean loss over the first gate batches: the held-out curve (always the same batches)."""
        values = self.evaluator.losses(sorted(self.evaluator.splits.gate)[:num_batches])
        return float(np.mean(values))

    def calibration_loss(self) -> float:
        """Mean loss over the calibration batches, for choosing the size of a fitted branch."""
        return float(np.mean(self.evaluator.losses(self.calibration)))

    def rank(self, cohort: int, members: Mapping[str, bool]) -> Ranking:
        """First-order gains of a cohort's seeds on some sites, from one backward pass a calibration batch.

        ``members`` says of each site whether its branches add nothing yet.
        """
        return rank(self.evaluator, self.sites, cohort, members, self.calibration)

    # ---------------------------------------------------------------------------------------------- how

    def _control(self, cohort: int, members: Sequence[str]) -> _Control:
        """The better (on calibration batches) of switching off and letting the host's layer stand in.

        Where the layer could hold the branches themselves: switching off, for the present host and an earlier one.
        """
        plain = {name: WithoutCohort(cohort) for name in members}
        if self.config.control == "plain" or cohort in self._before:
            return _Control(plain, self._before.get(cohort))
        projected: dict[str, WithoutCohort] = {}
        for group in self._groups(members):
            projected |= self._stand_ins(cohort, group)
        if not any(probe.stands_in for probe in projected.values()):
            return _Control(plain)
        losses = [float(np.mean(self._arm(arm, self.calibration))) for arm in (plain, projected)]
        return _Control(projected if losses[1] < losses[0] else plain)

    def _groups(self, members: Sequence[str]) -> list[list[str]]:
        """Sites whose sums are held at once: all of them, unless memory is short."""
        groups: list[list[str]] = [[]]
        room = self._room()
        held = 0
        for name in members:
            needed = Recorder.num_bytes(self.sites[name])
            if groups[-1] and held + needed > room:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += needed
        return groups

    def _room(self) -> float:
        device = next((parameter.device for parameter in self.evaluator.model.parameters()), torch.device("cpu"))
        free = memory.free_bytes(device)
        return math.inf if free is None else memory.SUMS_SHARE * free

    def _stand_ins(self, cohort: int, members: Sequence[str]) -> dict[str, WithoutCohort]:
        rows = -(-self.config.projection_rows // len(self.calibration))
        recorders = {name: recorder_for(self.sites[name], cohort, rows, self.generator) for name in members}
        self._arm(recorders, self.calibration)
        self.evaluator.ledger.add("evidence", sum(recorder.flops for recorder in recorders.values()))
        return {name: stand_in_of(recorders.pop(name), self.sites[name]) for name in members}

    def _gate_batches(self) -> tuple[int, ...]:
        """All gate batches, starting somewhere else each time."""
        gate = self.evaluator.splits.gate
        start = (self._turn * (len(gate) // 3 + 1)) % len(gate)
        self._turn += 1
        return gate[start:] + gate[:start]

    def _refusal(self, cohort: int, reason: str) -> Judgement:
        threshold, look = self.fdr.threshold(), len(self._earlier.get(cohort, [])) + 1
        self._earlier.pop(cohort, None)
        self.fdr.record(False)
        return Judgement(paired_difference([]), NAN, threshold, NAN, 0, Gate("evidence", False, reason), look)

    def _differences(self, control: _Control, indices: Sequence[int]) -> list[float]:
        """Loss without minus loss with, batch by batch; the smaller one where two hosts are asked."""

        def differences() -> list[float]:
            without, present = self._arm(control.probes, indices), self._arm({}, indices)
            return [off - on for off, on in zip(without, present, strict=True)]

        now = differences()
        if control.before is None:
            return now
        with control.before.restored():
            return smaller(now, differences())

    def _arm(self, probes: dict[str, WithoutCohort] | dict[str, Recorder], indices: Sequence[int]) -> list[float]:
        """Losses with ``probes`` in place of their sites, norm statistics recomputed for the network as it then is."""
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.evaluator.model))
            removed = {name: probe for name, probe in probes.items() if isinstance(probe, WithoutCohort)}
            stack.enter_context(probing(self.sites, removed))
            stack.enter_context(recalibrated(self.evaluator.model, self.sites, self._calibration_runs()))
            stack.enter_context(probing(self.sites, probes))  # recorders see the batches once, after that
            return self.evaluator.losses(indices)

    def _calibration_runs(self) -> list[Callable[[], object]]:
        evaluator = self.evaluator

        def one(index: int) -> Callable[[], object]:
            def run() -> object:
                evaluator.ledger.add("evidence", evaluator.forward_cost(1))
                return evaluator.loss(evaluator.model, evaluator.batches[index])

            return run

        return [one(index) for index in self.calibration]


def _blocks(indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Two halves: an anytime-valid test may stop after the first."""
    middle = (len(indices) + 1) // 2
    return [tuple(indices[:middle]), tuple(indices[middle:])] if len(indices) >= 16 else [tuple(indices)]
