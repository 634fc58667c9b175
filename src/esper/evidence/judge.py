"""Does a cohort help? Paired on/off evidence on held-out batches, accepted at a controlled false discovery rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from esper.config import EvidenceConfig
from esper.evidence.acceptance import UNJUDGED, Acceptance, Judgement
from esper.evidence.before import HostBefore, only_folds, smaller, tensors_by_name
from esper.evidence.control import Recorder, WithoutCohort, has_statistics, probing, recalibrated
from esper.evidence.evaluator import Evaluator
from esper.evidence.paired import PairedResult, paired_difference
from esper.evidence.ranking import Ranking, rank
from esper.evidence.tokens import recorder_for, stand_in_of
from esper.kasmina import memory
from esper.kasmina.gates import Gate
from esper.kasmina.isolation import undisturbed
from esper.kasmina.site import Site

NAN = float("nan")


@dataclass(frozen=True)
class _Control:
    """What stands in for a cohort at its sites, and the host from before it, if that is asked as well.

    ``calibration`` are the differences on the calibration batches, where choosing the control has measured them.
    """

    probes: dict[str, WithoutCohort]
    before: HostBefore | None = None
    calibration: list[float] | None = None


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
        self.generator = torch.Generator().manual_seed(seed)
        self.calibration = evaluator.splits.calibration
        # every block of gate batches runs all calibration batches first where there are statistics to recompute
        self.acceptance = Acceptance(evaluator.splits, config, few_blocks=has_statistics(evaluator.model))
        self._before: dict[int, HostBefore] = {}

    def note_graft(self, cohort: int) -> None:
        """Called before a cohort enters the forward pass: keeps the host as it is, where the control needs it."""
        if self.config.control == "projected" and self.config.accept == "evidence" and only_folds(self.sites, cohort):
            self._before[cohort] = HostBefore(self.evaluator.model, self.sites, cohort)

    def forget(self, cohort: int) -> None:
        """Called when a cohort has ended. A test that was begun counts, also if nobody waits for its result."""
        self._before.pop(cohort, None)
        self.acceptance.forget(cohort)

    def state(self) -> dict[str, Any]:
        """Tests so far, positions and draws, as a state tree; the tensors are its own, not copies."""
        names = {id(value): name for name, value in tensors_by_name(self.evaluator.model, self.sites).items()}
        return {
            **self.acceptance.state(),
            "generator": self.generator.get_state(),
            "before": {cohort: before.state(names) for cohort, before in self._before.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told, once the sites do. It takes over the tensors."""
        tensors = tensors_by_name(self.evaluator.model, self.sites)
        self._before = {cohort: HostBefore.of(kept, tensors) for cohort, kept in state["before"].items()}
        self.acceptance.restore(state)
        self.generator.set_state(state["generator"].cpu())

    # ---------------------------------------------------------------------------------------------- the tests

    def evaluate(self, cohort: int, members: Sequence[str], *, further: bool = False) -> Judgement:
        """The acceptance test, once (:meth:`esper.evidence.acceptance.Acceptance.evaluate`)."""
        if self.config.accept == "always":
            return Judgement(paired_difference([]), NAN, NAN, NAN, 0, UNJUDGED)
        control = self._control(cohort, members)
        calibration = control.calibration
        if calibration is None:
            calibration = self._differences(control, self.calibration)
        return self.acceptance.evaluate(cohort, partial(self._differences, control), calibration, further=further)

    def hold(
        self, cohort: int, members: Sequence[str], *, held_out: float, flops_share: float
    ) -> tuple[PairedResult, Gate]:
        """The test after fine-tuning (:meth:`esper.evidence.acceptance.Acceptance.hold`).

        Against switching off, which is what happens to a cohort that fails it: that its host could not have had the
        same for nothing was proven before.
        """
        if self.config.accept == "always":
            return paired_difference([]), UNJUDGED
        differences = partial(self._differences, self._switched_off(cohort, members))
        return self.acceptance.hold(differences, held_out=held_out, flops_share=flops_share)

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
        plain = self._switched_off(cohort, members)
        if self.config.control == "plain" or plain.before is not None:
            return plain
        projected: dict[str, WithoutCohort] = {}
        present: list[float] = []
        for group in self._groups(members):
            present, probes = self._stand_ins(cohort, group)
            projected |= probes
        if not any(probe.stands_in for probe in projected.values()):
            return plain
        without = {name: self._arm(arm, self.calibration) for name, arm in (("off", plain.probes), ("in", projected))}
        better = "in" if np.mean(without["in"]) < np.mean(without["off"]) else "off"
        differences = [off - on for off, on in zip(without[better], present, strict=True)]
        return _Control(projected if better == "in" else plain.probes, calibration=differences)

    def _switched_off(self, cohort: int, members: Sequence[str]) -> _Control:
        return _Control({name: WithoutCohort(cohort) for name in members}, self._before.get(cohort))

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

    def _stand_ins(self, cohort: int, members: Sequence[str]) -> tuple[list[float], dict[str, WithoutCohort]]:
        """Losses of the network as it is on the calibration batches, and what they have told of the cohort."""
        rows = -(-self.config.projection_rows // len(self.calibration))
        recorders = {name: recorder_for(self.sites[name], cohort, rows, self.generator) for name in members}
        present = self._arm(recorders, self.calibration)
        self.evaluator.ledger.add("evidence", sum(recorder.flops for recorder in recorders.values()))
        return present, {name: stand_in_of(recorders.pop(name), self.sites[name]) for name in members}

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
