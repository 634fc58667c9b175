"""The lifecycle of a seed: eleven states and one table; :mod:`esper.kasmina.gates` decides on the way.

Everything that depends on a state (the forward pass, optimizers, reports) reads :data:`TABLE` through the vectorised
lookups below. A transition that the table does not list raises :class:`~esper.errors.TransitionError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from esper.errors import TransitionError
from esper.kasmina.chunks import is_whole
from esper.protocol import Lifecycle

NUM_STATES = len(Lifecycle)


@dataclass(frozen=True, slots=True)
class StateRow:
    """What holds while a seed is in one state.

    Attributes
    ----------
    forward:
        Who adds the branch to the host's output: nobody (``no``), the seed's slot (``slot``), the site's annex
        (``annex``), or the slot for as long as alpha has not come down to 0 (``fading``).
    learns:
        From what the branch learns: nothing (``none``), captured rows (``captured``) or the task's loss (``task``).
    successors:
        Legal next states, each with the gate that decides. For ``CULLED`` that is the gate whose refusal leads
        there; a command to cull leads there too. ``command`` is a user or the system, ``guard`` the guard or operator.
    """

    state: Lifecycle
    forward: Literal["no", "slot", "annex", "fading"]
    learns: Literal["none", "captured", "task"]
    successors: Mapping[Lifecycle, str]


_WITHDRAW = {Lifecycle.CANCELLED: "command", Lifecycle.ROLLED_BACK: "guard"}
"""Open to every active seed. A capture that runs out of time is cancelled by the system."""

_S = Lifecycle
_REJECT = {_S.CULLED: "evidence", **_WITHDRAW}
TABLE: tuple[StateRow, ...] = (
    StateRow(_S.DORMANT, "no", "none", {_S.GERMINATED: "germination"}),
    StateRow(_S.GERMINATED, "no", "none", {_S.TRAINING: "capture", **_WITHDRAW}),
    StateRow(_S.TRAINING, "no", "captured", {_S.GRAFTING: "sanity", _S.CULLED: "sanity", **_WITHDRAW}),
    StateRow(_S.GRAFTING, "slot", "task", {_S.STABILIZATION: "ramp", _S.CULLED: "ramp", **_WITHDRAW}),
    StateRow(_S.STABILIZATION, "slot", "none", {_S.EVALUATING: "stability", _S.CULLED: "stability", **_WITHDRAW}),
    # back to GRAFTING: a gain that is not proven yet; the branch learns on and is judged again
    StateRow(_S.EVALUATING, "slot", "none", {_S.FINE_TUNING: "evidence", _S.GRAFTING: "evidence"} | _REJECT),
    StateRow(_S.FINE_TUNING, "slot", "task", {_S.FOSSILIZED: "hold", _S.CULLED: "hold", **_WITHDRAW}),
    StateRow(_S.FOSSILIZED, "annex", "task", {}),
    StateRow(_S.CULLED, "fading", "none", {}),
    StateRow(_S.CANCELLED, "fading", "none", {}),
    StateRow(_S.ROLLED_BACK, "no", "none", {}),
)
"""One row a state, at the index of its code."""


def _column(values: Sequence[bool]) -> npt.NDArray[np.bool_]:
    column = np.array(values, dtype=np.bool_)
    column.flags.writeable = False
    return column


LEGAL: npt.NDArray[np.bool_] = np.array([[t in row.successors for t in Lifecycle] for row in TABLE], dtype=np.bool_)
"""``(11, 11)`` bool, read-only: ``LEGAL[source, target]``."""
LEGAL.flags.writeable = False

# A state without successors is an end; a state that can be withdrawn from is active. DORMANT is neither.
_TERMINAL = _column([not row.successors for row in TABLE])
_ACTIVE = _column([Lifecycle.CANCELLED in row.successors for row in TABLE])
_IN_FORWARD = _column([row.forward != "no" for row in TABLE])
_IN_SLOT = _column([row.forward in ("slot", "fading") for row in TABLE])
_FADING = _column([row.forward == "fading" for row in TABLE])
_TASK = _column([row.learns == "task" for row in TABLE])
_CAPTURED = _column([row.learns == "captured" for row in TABLE])


def _lookup(column: npt.NDArray[np.bool_], states: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    codes = np.asarray(states)
    # A negative code would silently read the table from its end.
    if codes.size and (codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= NUM_STATES):
        raise TransitionError(f"a state must be a code between 0 and {NUM_STATES - 1}, got {states!r}; use Lifecycle")
    return np.asarray(column[codes.astype(np.intp)])


def is_active(states: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Seeds on their way (GERMINATED to FINE_TUNING). ``states``: integer codes of any shape; so is the result."""
    return _lookup(_ACTIVE, states)


def is_terminal(states: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Seeds at an end (FOSSILIZED, CULLED, CANCELLED, ROLLED_BACK)."""
    return _lookup(_TERMINAL, states)


def in_forward(states: npt.ArrayLike, alpha: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
    """Branches that change the host's output, through their slot or through the annex.

    A culled or cancelled seed counts until its ``alpha`` (same shape as ``states``) is 0; without ``alpha`` it counts.
    """
    return _faded_out(_lookup(_IN_FORWARD, states), states, alpha)


def in_slot(states: npt.ArrayLike, alpha: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
    """As :func:`in_forward`, without what the annex already carries (FOSSILIZED)."""
    return _faded_out(_lookup(_IN_SLOT, states), states, alpha)


def _faded_out(
    inside: npt.NDArray[np.bool_], states: npt.ArrayLike, alpha: npt.ArrayLike | None
) -> npt.NDArray[np.bool_]:
    if alpha is None:
        return inside
    return np.asarray(inside & ~(_lookup(_FADING, states) & (np.asarray(alpha) == 0)))


def learns_from_task(states: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Branches the task's loss trains (GRAFTING, FINE_TUNING, and FOSSILIZED in the annex)."""
    return _lookup(_TASK, states)


def learns_from_captures(states: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Branches trained on captured rows, apart from the host (TRAINING)."""
    return _lookup(_CAPTURED, states)


def check(source: int, target: int) -> None:
    """Raise :class:`~esper.errors.TransitionError` unless the table lets a seed go from ``source`` to ``target``."""
    for name, code in (("source", source), ("target", target)):
        if not is_whole(code) or not 0 <= code < NUM_STATES:
            raise TransitionError(
                f"{name} must be a state code between 0 and {NUM_STATES - 1}, got {code!r}; use Lifecycle"
            )
    if LEGAL[source, target]:
        return
    successors = " or ".join(s.name for s in TABLE[source].successors)
    if not successors:
        successors = "nothing (it is an end state; germinate a new seed instead)"
    raise TransitionError(
        f"{Lifecycle(source).name} -> {Lifecycle(target).name} is not a legal transition; "
        f"{Lifecycle(source).name} leads to {successors}"
    )
