"""The acceptance test of cohorts and the hold test, over paired differences that whoever holds the network computes.

:class:`esper.evidence.judge.Judge` asks a model; hosts that are trained in stacks (:mod:`esper.greenhouse`) ask theirs.
Held-out batches are asked for in blocks, and no more of them than the answer needs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from esper.config import EvidenceConfig
from esper.evidence.eprocess import PairedEProcess, fewest_differences, robust_scale
from esper.evidence.fdr import OnlineFDR
from esper.evidence.paired import PairedResult, paired_difference
from esper.evidence.splits import MIN_PART, Rotation, Splits, split_batches, spread
from esper.kasmina.gates import Gate, evidence_gate, hold_gate

NAN = float("nan")
_CONFIRM_BATCHES = 16
"""Most batches of a confirmation where there are not twice as many, ..."""
_FEWEST_TO_CONFIRM = 8
"""... and fewest, where the gate was as quickly sure."""
_FEWEST_TO_HOLD = 12
"""Batches behind a hold test: of six one in twenty proven gains would look hopeless by chance."""
_HOPELESS = 0.9
"""A one-sided p-value from which more batches are not worth their cost: the gain would have to turn round."""
UNJUDGED = Gate("evidence", True, "kept without judgement: evidence.accept is 'always'")

Differences = Callable[[Sequence[int]], list[float]]
"""Loss without minus loss with a cohort on these held-out batches, one a batch."""


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


def fewest_to_judge(config: EvidenceConfig) -> int:
    """Gate batches below which the first cohort could not be accepted at all."""
    return fewest_differences(OnlineFDR(config.fdr).threshold()) if config.accept == "evidence" else MIN_PART


def splits_of(config: EvidenceConfig, num_batches: int, seed: int) -> Splits:
    """The three parts of so many held-out batches, as a grower with these settings draws them."""
    return split_batches(num_batches, config.calibration_share, config.confirm_share, seed, fewest_to_judge(config))


class Acceptance:
    """The tests of one run: an e-process over gate batches, then one confirmation on batches of its own.

    A cohort is looked at up to ``looks`` times, while it learns on in between. The e-values of its looks are added
    with weights of 1/2, 1/4, ... whose sum is 1: their sum is an e-value however the looks depend on each other
    (Vovk and Wang, "E-values: calibration, combination and applications", Annals of Statistics 49(3), 2021).

    Parameters
    ----------
    few_blocks:
        Ask for gate batches in two halves at most, where every block has a cost of its own.
    """

    def __init__(self, splits: Splits, config: EvidenceConfig, *, few_blocks: bool = False) -> None:
        self.splits, self.config, self.few_blocks = splits, config, few_blocks
        self.fdr = OnlineFDR(config.fdr)
        # all of a small split each time: half of a handful of batches confirms nothing
        window = min(len(splits.confirm), max(_CONFIRM_BATCHES, len(splits.confirm) // 2))
        self.confirm = Rotation(spread(splits.confirm), window)
        self._turn = 0
        self._earlier: dict[int, list[float]] = {}
        """Weighted e-values of the looks so far at cohorts that are not decided yet."""

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Splits and settings never change and are shared."""
        twin = type(self)(self.splits, self.config, few_blocks=self.few_blocks)
        twin.restore(self.state())
        return twin

    def state(self) -> dict[str, Any]:
        """Tests so far and positions, as plain values."""
        return {
            "fdr": self.fdr.state(),
            "confirm": self.confirm.state(),
            "turn": self._turn,
            "earlier": copy.deepcopy(self._earlier),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.fdr.restore(state["fdr"])
        self.confirm.restore(state["confirm"])
        self._turn = state["turn"]
        self._earlier = {cohort: list(looks) for cohort, looks in state["earlier"].items()}

    def forget(self, cohort: int) -> None:
        """Called when a cohort has ended. A test that was begun counts, also if nobody waits for its result."""
        if self._earlier.pop(cohort, None) is not None:
            self.fdr.record(False)

    def evaluate(
        self, cohort: int, differences: Differences, calibration: Sequence[float], *, further: bool
    ) -> Judgement:
        """Look at a cohort once.

        Parameters
        ----------
        differences:
            Asked for gate and confirmation batches.
        calibration:
            The differences on the calibration batches: they fix the scale of the bets.
        further:
            Whether there is time for another look. It must not depend on what was measured.
        """
        if not np.isfinite(calibration).all():
            return self._refusal(cohort, "the loss on a calibration batch is not finite; check evaluate= and the model")
        config, earlier = self.config, self._earlier.get(cohort, [])
        look, threshold = len(earlier) + 1, self.fdr.threshold()
        further = further and look < config.looks
        weight = 2.0**-look if further else 2.0 ** (1 - look)
        process = PairedEProcess(robust_scale(calibration), config.min_gain)
        needed = (threshold - sum(earlier)) / weight
        seen, capital = self._bet(differences, process, needed=needed)
        e_value, result, confirm_p = sum(earlier) + weight * capital, paired_difference(seen), NAN
        crossed = capital >= needed and not process.refused
        if crossed:
            # as many as the gate has needed: what is clear there is clear here
            batches = self.confirm.take(max(_FEWEST_TO_CONFIRM, len(seen)))
            result = paired_difference(differences(batches), min_gain=config.min_gain)
            confirm_p = result.p_one_sided
        gate = evidence_gate(
            e_value=e_value, threshold=threshold, confirm_p=confirm_p if crossed else 1.0,
            level=config.confirm_level, gain=result.mean, min_gain=config.min_gain,
        )  # fmt: skip
        undecided = not gate.passed and further and not process.refused and result.mean > config.min_gain
        if undecided:
            self._earlier[cohort] = [*earlier, weight * capital]
            reason = f"undecided after look {look} of {config.looks}, it learns on: {gate.reason}"
            gate = Gate("evidence", False, reason)
        else:
            self._earlier.pop(cohort, None)
            self.fdr.record(gate.passed)
        return Judgement(result, e_value, threshold, confirm_p, len(seen), gate, look, undecided)

    def hold(self, differences: Differences, *, held_out: float, flops_share: float) -> tuple[PairedResult, Gate]:
        """Is the gain still there after fine-tuning, and worth its cost? As few gate batches as settle it.

        The gain must be above zero, and harm beyond ``tolerated_harm`` excluded: that the cohort helps was decided at a
        controlled false discovery rate before, and asking for the proof twice throws proven cohorts away
        (docs/decisions/0015). ``held_out`` is the loss that the gain is relative to, ``flops_share`` the forward FLOPs
        the cohort adds.
        """
        seen: list[float] = []
        result = paired_difference(seen)
        blocks = list(self._blocks(self.splits.gate, first=_FEWEST_TO_HOLD))
        for block in blocks:
            seen += differences(block)
            result = paired_difference(seen)
            settled = result.p_one_sided <= self.config.confirm_level / len(blocks)  # it is asked once a block
            if settled or result.p_one_sided >= _HOPELESS:
                break
        share = 1 / abs(held_out) if held_out else NAN
        gate = hold_gate(
            gain=result.mean, harm=-result.low * share, tolerated_harm=self.config.tolerated_harm,
            gain_per_cost=result.mean * share / max(flops_share, 1e-9),
            min_gain_per_cost=self.config.min_gain_per_cost,
        )  # fmt: skip
        return result, gate

    def _bet(self, differences: Differences, process: PairedEProcess, *, needed: float) -> tuple[list[float], float]:
        """Differences on the gate batches, and the capital where it first reaches ``needed``, or at the end.

        A test that may stop at any time stops where it crosses its line, and where the gain is below zero so clearly
        that nothing is to be expected of the rest.
        """
        seen: list[float] = []
        capital = 1.0
        for block in self._blocks(self.splits.gate, first=fewest_differences(needed)):
            for difference in differences(block):
                seen.append(difference)
                if capital < needed or not math.isfinite(difference):  # what is seen and unknown refuses, also late
                    capital = process.update(difference)
            if capital >= needed or paired_difference(seen, min_gain=process.min_gain).p_one_sided >= _HOPELESS:
                break
        return seen, capital

    def _blocks(self, gate: Sequence[int], *, first: int) -> Generator[tuple[int, ...]]:
        """All gate batches, starting somewhere else each time: ``first`` of them, then as many as before each time.

        Each block is from all over the gate.
        """
        start = (self._turn * (len(gate) // 3 + 1)) % len(gate)
        self._turn += 1
        order = spread(gate)
        batches = (*order[start:], *order[:start])
        if self.few_blocks:
            first = max(first, (len(batches) + 1) // 2)
        done = 0
        while done < len(batches):
            until = max(first, 2 * done)
            if len(batches) - until < first:  # a few that are left over come with the others
                until = len(batches)
            yield tuple(batches[done:until])
            done = until

    def _refusal(self, cohort: int, reason: str) -> Judgement:
        threshold, look = self.fdr.threshold(), len(self._earlier.get(cohort, [])) + 1
        self._earlier.pop(cohort, None)
        self.fdr.record(False)
        return Judgement(paired_difference([]), NAN, threshold, NAN, 0, Gate("evidence", False, reason), look)
