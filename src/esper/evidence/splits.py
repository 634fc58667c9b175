"""Held-out batches in three disjoint parts, and a rotation so that confirmations do not reuse what they used before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.errors import AttachError, EvidenceError

MIN_BATCHES = 8
"""Fewest held-out batches of all, whatever is judged with them."""
MIN_PART = 2
"""Fewest batches a part may have."""
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Indices of held-out batches, ascending; disjoint, and together all of them."""

    calibration: tuple[int, ...]
    """Fix scales before a test starts."""
    gate: tuple[int, ...]
    """Judge cohorts, one after another."""
    confirm: tuple[int, ...]
    """Confirm acceptances only."""


def split_batches(
    num_batches: int, calibration_share: float, confirm_share: float, seed: int = 0, min_gate: int = MIN_PART
) -> Splits:
    """Split ``range(num_batches)`` for calibration, gate and confirmation.

    Each part takes one batch from each of as many equal stretches of the order as it has batches, at a place drawn
    with ``seed`` (own generator): a trend over the order reaches all parts alike, and a period in it none in
    particular. Each part has at least two batches, the gate at least ``min_gate``.

    Raises
    ------
    AttachError
        Fewer than 8 batches, or too few for the gate.
    EvidenceError
        Shares that are not positive or leave nothing for the gate.
    """
    if not (calibration_share > 0 and confirm_share > 0 and calibration_share + confirm_share < 1):
        raise EvidenceError(
            "calibration_share and confirm_share must be positive and leave room for the gate, "
            f"got {calibration_share!r} and {confirm_share!r}; use 0.2 and 0.3"
        )
    num_calibration, num_confirm = _sizes(num_batches, calibration_share, confirm_share)
    if num_batches < MIN_BATCHES or num_batches - num_calibration - num_confirm < min_gate:
        raise AttachError(
            f"evaluate must yield at least {_fewest(calibration_share, confirm_share, min_gate)} batches (calibration, "
            f"gate and confirmation share none, and a gate of fewer than {min_gate} can accept nothing), got "
            f"{num_batches}; pass smaller batches, e.g. evaluate=[rows[i:i + n] for i in range(0, len(rows), n)]"
        )
    rng = np.random.default_rng(seed)
    rest = np.arange(num_batches)
    confirm = _draw_stratified(rest, num_confirm, rng)
    rest = np.setdiff1d(rest, confirm)
    calibration = _draw_stratified(rest, num_calibration, rng)
    gate = np.setdiff1d(rest, calibration)
    return Splits(calibration=tuple(calibration.tolist()), gate=tuple(gate.tolist()), confirm=tuple(confirm.tolist()))


def _sizes(num_batches: int, calibration_share: float, confirm_share: float) -> tuple[int, int]:
    """Batches for calibration and for confirmation; the gate has the rest."""
    num_calibration = max(MIN_PART, round(calibration_share * num_batches))
    num_confirm = max(MIN_PART, round(confirm_share * num_batches))
    while num_calibration + num_confirm > max(num_batches, 3 * MIN_PART) - MIN_PART:
        if num_calibration > num_confirm:
            num_calibration -= 1
        else:
            num_confirm -= 1
    return num_calibration, num_confirm


def _fewest(calibration_share: float, confirm_share: float, min_gate: int) -> int:
    """Fewest held-out batches of which at least ``min_gate`` are left for the gate."""
    if min_gate <= MIN_PART:
        return MIN_BATCHES
    rest = 1.0 - calibration_share - confirm_share
    num = max(MIN_BATCHES, int((min_gate - 1) / rest))  # each of the two roundings moves half a batch at most
    while num - sum(_sizes(num, calibration_share, confirm_share)) < min_gate:
        num += 1
    return num


def _draw_stratified(pool: npt.NDArray[np.int64], num: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    edges = np.linspace(0, pool.size, num + 1).round().astype(np.int64)
    return pool[rng.integers(edges[:-1], edges[1:])]


def spread(batches: Sequence[int]) -> tuple[int, ...]:
    """Return all of them in an order of which every stretch, however short, comes from all over the given one.

    Held-out data often lie in an order (of classes, of time): a test that stops after a few batches must not have seen
    one end of it alone. Steps of a golden ratio do that, and fall in with no period.
    """
    num = len(batches)
    stride = max(1, round(num * _GOLDEN))
    while math.gcd(stride, num) > 1:
        stride += 1
    return tuple(batches[step * stride % num] for step in range(num))


class Rotation:
    """Windows over confirm batches, each starting where the last ended and wrapping around.

    Parameters
    ----------
    indices:
        Batches to rotate over; at least two, all different.
    window:
        Batches a confirmation uses; half of them by default (at least two). Windows of at most half of the batches
        never share one with the window before (:attr:`disjoint`); of two or three batches each window must reuse some.

    Raises
    ------
    EvidenceError
        Too few or repeated indices, or a window outside ``2 .. len(indices)``.
    """

    def __init__(self, indices: Sequence[int], window: int | None = None) -> None:
        self._indices = tuple(indices)
        if len(self._indices) < MIN_PART or len(set(self._indices)) < len(self._indices):
            raise EvidenceError(
                f"a rotation needs at least {MIN_PART} different batches, got {self._indices!r}; "
                "raise evidence.confirm_share or pass more held-out batches"
            )
        self.window = max(MIN_PART, len(self._indices) // 2) if window is None else window
        if not MIN_PART <= self.window <= len(self._indices):
            raise EvidenceError(
                f"window must lie between {MIN_PART} and {len(self._indices)}, the batches there are, got {window!r}; "
                "leave it None for half of them"
            )
        self.position = 0

    @property
    def disjoint(self) -> bool:
        """Whether consecutive windows share no batch."""
        return 2 * self.window <= len(self._indices)

    def take(self, most: int | None = None) -> tuple[int, ...]:
        """Return the next window of batch indices, or the first ``most`` of it, and move on."""
        size, num = len(self._indices), self.window if most is None else min(most, self.window)
        taken = tuple(self._indices[(self.position + offset) % size] for offset in range(num))
        self.position = (self.position + num) % size
        return taken

    def state(self) -> dict[str, int]:
        """Return everything that :meth:`restore` needs."""
        return {"position": self.position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from what :meth:`state` has told.

        Raises
        ------
        EvidenceError
            The position lies outside the batches.
        """
        position = state["position"]
        if not 0 <= position < len(self._indices):
            raise EvidenceError(
                f"position must lie between 0 and {len(self._indices) - 1}, got {position!r}; "
                "the number of held-out batches must be what it was when the position was saved"
            )
        self.position = position
