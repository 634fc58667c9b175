"""The acceptance test of :class:`esper.evidence.judge.Judge` with its plain control, for one host.

The same splits, e-process, control of false discoveries, confirmation and looks; what differs is only who computes the
losses. ``differences(indices)`` gives loss without minus loss with the cohort on those held-out batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.config import EvidenceConfig
from esper.evidence.eprocess import PairedEProcess, fewest_differences, robust_scale
from esper.evidence.fdr import OnlineFDR
from esper.evidence.paired import PairedResult, paired_difference
from esper.evidence.splits import MIN_PART, Rotation, Splits, split_batches
from esper.kasmina.gates import Gate, evidence_gate, hold_gate

_CONFIRM_BATCHES = 16
NAN = float("nan")

Differences = Callable[[Sequence[int]], list[float]]


@dataclass(frozen=True)
class Look:
    """One judgement: the paired gain, whether it passed, and whether a later look may still prove it."""

    result: PairedResult
    gate: Gate
    undecided: bool


def splits_of(config: EvidenceConfig, num_batches: int, seed: int) -> Splits:
    """The three parts of the held-out batches, as a grower with these settings draws them."""
    fewest = fewest_differences(OnlineFDR(config.fdr).threshold()) if config.accept == "evidence" else MIN_PART
    return split_batches(num_batches, config.calibration_share, config.confirm_share, seed, fewest)


class Evidence:
    """Tests so far of one host."""

    def __init__(self, splits: Splits, config: EvidenceConfig) -> None:
        self.splits, self.config = splits, config
        self.fdr = OnlineFDR(config.fdr)
        self.confirm = Rotation(splits.confirm, self._window)
        self._turn = 0
        self._earlier: dict[int, list[float]] = {}

    @property
    def _window(self) -> int:
        confirm = self.splits.confirm
        return min(len(confirm), max(_CONFIRM_BATCHES, len(confirm) // 2))

    def __deepcopy__(self, memo: dict[int, object]) -> Evidence:
        """Splits and settings never change and are shared."""
        twin = Evidence(self.splits, self.config)
        twin.fdr = copy.deepcopy(self.fdr)
        twin.confirm.restore(self.confirm.state())
        twin._turn, twin._earlier = self._turn, copy.deepcopy(self._earlier)
        return twin

    def evaluate(self, cohort: int, differences: Differences, *, further: bool) -> Look:
        """As :meth:`esper.evidence.judge.Judge.evaluate`."""
        if self.config.accept == "always":
            return Look(paired_difference([]), Gate("evidence", True, "kept without judgement"), False)
        config = self.config
        earlier = self._earlier.get(cohort, [])
        look, threshold = len(earlier) + 1, self.fdr.threshold()
        further = further and look < config.looks
        weight = 2.0**-look if further else 2.0 ** (1 - look)
        process = PairedEProcess(robust_scale(differences(self.splits.calibration)), config.min_gain)
        needed = (threshold - sum(earlier)) / weight
        seen, capital = self._bet(differences, process, needed)
        result, confirm_p = paired_difference(seen), 1.0
        if capital >= needed:
            result = paired_difference(differences(self.confirm.take()), min_gain=config.min_gain)
            confirm_p = result.p_one_sided
        gate = evidence_gate(
            e_value=sum(earlier) + weight * capital, threshold=threshold, confirm_p=confirm_p,
            level=config.confirm_level, gain=result.mean, min_gain=config.min_gain,
        )  # fmt: skip
        undecided = not gate.passed and further and not process.refused and result.mean > config.min_gain
        if undecided:
            self._earlier[cohort] = [*earlier, weight * capital]
        else:
            self._earlier.pop(cohort, None)
            self.fdr.record(gate.passed)
        return Look(result, gate, undecided)

    def hold(self, differences: Differences, *, held_out: float, flops_share: float) -> tuple[PairedResult, Gate]:
        """As :meth:`esper.evidence.judge.Judge.hold`."""
        if self.config.accept == "always":
            return paired_difference([]), Gate("hold", True, "kept without judgement")
        seen: list[float] = []
        result = paired_difference(seen)
        for block in _blocks(self._gate_batches()):
            seen += differences(block)
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

    def forget(self, cohort: int) -> None:
        """A cohort has ended; a test that was begun counts."""
        if self._earlier.pop(cohort, None) is not None:
            self.fdr.record(False)

    def _bet(self, differences: Differences, process: PairedEProcess, needed: float) -> tuple[list[float], float]:
        seen: list[float] = []
        capital = 1.0
        for block in _blocks(self._gate_batches()):
            for difference in differences(block):
                seen.append(difference)
                if capital < needed:
                    capital = process.update(difference)
            if capital >= needed:
                break
        return seen, capital

    def _gate_batches(self) -> tuple[int, ...]:
        gate = self.splits.gate
        start = (self._turn * (len(gate) // 3 + 1)) % len(gate)
        self._turn += 1
        return gate[start:] + gate[:start]


def _blocks(indices: Sequence[int]) -> list[tuple[int, ...]]:
    middle = (len(indices) + 1) // 2
    return [tuple(indices[:middle]), tuple(indices[middle:])] if len(indices) >= 16 else [tuple(indices)]
