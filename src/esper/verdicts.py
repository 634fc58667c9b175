"""How cohorts ended, in bounded space: whole verdicts of what was kept and of the newest, sums of the rest.

A run may try cohorts for as long as it trains. What was kept leaves parameters behind, and its verdict costs little
beside them; of all others the newest :data:`NEWEST` are told, and the event log has the rest.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from esper.errors import StateError
from esper.evidence.paired import PairedResult
from esper.evidence.shrinkage import shrink_gains
from esper.protocol import Lifecycle, Verdict

NEWEST = 1000
"""Verdicts that are kept whole whatever became of the cohort, and gains that others are shrunk towards."""

_COLUMNS: dict[str, type[np.generic]] = {
    "cohort": np.int64,
    "step": np.int64,
    "state": np.int8,
    "gain": np.float64,
    "gain_low": np.float64,
    "gain_high": np.float64,
    "gain_shrunken": np.float64,
    "added_params": np.int64,
    "added_flops_share": np.float64,
}
"""Numbers of a verdict, one array each in a state: a snapshot before every graft copies them all."""


class Verdicts(Sequence[Verdict]):
    """Verdicts of one run, oldest first: all of what was kept, and the newest of all others.

    Parameters
    ----------
    newest:
        How many are kept whole whatever became of the cohort; at least 1.

    Attributes
    ----------
    ended:
        How many cohorts have come to each end, since the beginning.
    last_gain, last_growth:
        By site: gain of the last cohort that ended there, and the step at which one became permanent there last.
    """

    def __init__(self, newest: int = NEWEST) -> None:
        self._room = newest
        self.ended: Counter[Lifecycle] = Counter()
        self.last_gain: dict[str, float] = {}
        self.last_growth: dict[str, int] = {}
        self._kept: list[Verdict] = []
        """What was kept and is older than the newest."""
        self._newest: deque[Verdict] = deque()
        self._looks: deque[tuple[float, float]] = deque(maxlen=newest)
        """Gain and standard error of the newest judged cohorts that have ended: gains are shrunk towards this pool."""
        self._told: tuple[Verdict, ...] | None = None

    def add(self, verdict: Verdict, gain_error: float) -> None:
        """Take in how a cohort ended; ``gain_error`` is its gain's standard error, NaN if it was never judged."""
        self.ended[verdict.state] += 1
        if math.isfinite(verdict.gain) and gain_error > 0:
            self._looks.append((verdict.gain, gain_error))
        for site in verdict.sites:
            self.last_gain[site] = verdict.gain
            if verdict.state is Lifecycle.FOSSILIZED:
                self.last_growth[site] = verdict.step
        self._tell(verdict)

    def _tell(self, verdict: Verdict) -> None:
        self._told = None
        self._newest.append(verdict)
        if len(self._newest) > self._room:
            oldest = self._newest.popleft()
            if oldest.state is Lifecycle.FOSSILIZED:
                self._kept.append(oldest)

    def told(self) -> tuple[Verdict, ...]:
        """All verdicts that are still whole, oldest first; the same tuple until the next cohort ends."""
        if self._told is None:
            self._told = (*self._kept, *self._newest)
        return self._told

    @property
    def num_untold(self) -> int:
        """How many cohorts are not among :meth:`told`."""
        return self.ended.total() - len(self)

    def shrunken(self, result: PairedResult) -> float:
        """A gain shrunk towards the run's other judged gains (the best of many looks is too good)."""
        error = result.standard_error
        if not math.isfinite(result.mean) or not error > 0:
            return result.mean
        gains, errors = zip(*self._looks, (result.mean, error), strict=True)
        return float(shrink_gains(gains, errors)[-1])

    def __len__(self) -> int:
        return len(self._kept) + len(self._newest)

    @overload
    def __getitem__(self, index: int) -> Verdict: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Verdict, ...]: ...
    def __getitem__(self, index: int | slice) -> Verdict | tuple[Verdict, ...]:
        return self.told()[index]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.told())

    # ---------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All of it as a state tree: arrays over the verdicts, the different sets of sites once."""
        told = self.told()
        sets = {sites: number for number, sites in enumerate(dict.fromkeys(verdict.sites for verdict in told))}
        return {
            "told": {name: np.array([getattr(v, name) for v in told], dtype) for name, dtype in _COLUMNS.items()},
            "reasons": [verdict.reason for verdict in told],
            "sites": np.array([sets[verdict.sites] for verdict in told], np.int64),
            "site_sets": list(sets),
            "ended": {int(state): count for state, count in self.ended.items()},
            "last_gain": dict(self.last_gain),
            "last_growth": dict(self.last_growth),
            "looks": np.array(self._looks, np.float64).reshape(-1, 2),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told.

        Raises
        ------
        StateError
            The arrays differ in length, or hold other values than verdicts do. Nothing was changed.
        """
        verdicts = _verdicts_of(state)
        ended = Counter({Lifecycle(code): int(count) for code, count in state["ended"].items()})
        looks: npt.NDArray[np.float64] = state["looks"].reshape(-1, 2)
        self.ended = ended
        self.last_gain, self.last_growth = dict(state["last_gain"]), dict(state["last_growth"])
        self._looks.clear()
        self._looks.extend((gain, error) for gain, error in looks.tolist())
        self._kept.clear()
        self._newest.clear()
        self._told = None
        for verdict in verdicts:
            self._tell(verdict)


def _verdicts_of(state: dict[str, Any]) -> Iterable[Verdict]:
    columns: list[list[Any]] = [state["told"][name].tolist() for name in _COLUMNS]
    sets = [tuple(sites) for sites in state["site_sets"]]
    sites: list[int] = state["sites"].tolist()
    reasons: list[str] = state["reasons"]
    lengths = {*map(len, columns), len(sites), len(reasons)}
    if len(lengths) > 1 or not all(0 <= number < len(sets) for number in sites):
        raise StateError(
            f"verdicts must have one value each in every array and name one of {len(sets)} sets of sites, got lengths "
            f"{sorted(lengths)} and sets up to {max(sites, default=0)}; the state is damaged"
        )
    rows = (dict(zip(_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True))
    return [
        Verdict(**{**row, "state": Lifecycle(row["state"])}, sites=sets[number], reason=reason)
        for row, number, reason in zip(rows, sites, reasons, strict=True)
    ]
