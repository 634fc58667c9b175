"""What a trial leaves behind, a line each: everything but ``seconds`` follows from the trial's number."""

from __future__ import annotations

import msgspec

FORMAT = 1
"""Of the records; raised when a field changes its meaning."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found: gain and interval as shares of the audit loss without what was added (``None``: unknown)."""

    gain: float | None
    low: float | None
    high: float | None


class CohortRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One cohort of a trial, or one round of a peer's growth."""

    cohort: int
    end: str | None
    """The end state by name; ``None``: it reached none."""
    passed: bool = False
    """Whether it passed the evidence gate."""
    reason: str = ""
    claimed: float | None = None
    on_off: Found | None = None
    """As it was when it became permanent (a peer: just after against just before the growth)."""
    twin: Found | None = None
    """Against the network trained on without it."""
    is_null: bool = False
    """Whether it could add nothing, by construction."""


class TrialRecord(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """One host that grew."""

    number: int
    kind: str
    """``grown``, ``gromo`` or ``null: KIND``."""
    task: str
    family: str
    width: int
    noise: float
    gate_rows: int
    """Rows of a held-out batch."""
    optimizer: str
    lr: float
    decays: bool
    headroom: Found
    """A plain host of four times the width against the plain host; unknown where it was not measured."""
    alone: float | None
    """Audit loss of the host trained alone."""
    effect: Found
    """The grown network at its end against the same host trained alone."""
    seeds: int
    """Seeds germinated."""
    seeds_ended: int
    """Of these, how many reached an end state before the training was over or in its last step."""
    seeds_cut: int
    """And how many were taken out by the end of training."""
    rolled_back: int
    """Cohorts that the guard took out."""
    finite: bool
    """Whether all weights were finite at the end."""
    cohorts: tuple[CohortRecord, ...]
    seconds: float


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True, tag="fault"):
    """One fault done to one host."""

    number: int
    kind: str
    task: str
    family: str
    phase: str
    """What the cohort was doing when it struck."""
    struck: int
    """How often it struck; 0: the moment never came, the trial says nothing."""
    expects: str
    held: bool
    """Whether what must hold afterwards did."""
    detail: str
    seconds: float


AnyRecord = TrialRecord | FaultRecord


class Header(msgspec.Struct, frozen=True, kw_only=True, tag="header"):
    """The first line: what wrote the others."""

    format: int
    esper: str
    torch: str
    device: str
