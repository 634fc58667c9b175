"""One trial: a small host grows under the real :class:`esper.Grower` and is scored after the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from esper.config import Config
from esper.grower import Grower
from esper.protocol import AnyEvent, Audited, Germinated, Judged, Lifecycle, Transitioned, Verdict
from esper.runs.interrupt import obey
from esper.runs.trials.records import CohortRecord, Found, TrialRecord
from esper.runs.trials.training import (
    STEPS,
    Contrast,
    Setup,
    audit_losses,
    take_step,
    train_plainly,
    trial_config,
)

WIDER = 4
"""Times the host's width: a plain host that much wider tells whether there is headroom."""
HEADROOM = 0.02
"""Relative gain of the wider host from which there is headroom, beyond its noise."""

_ENDS = (Lifecycle.FOSSILIZED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK)
UNKNOWN = Found(gain=None, low=None, high=None)


def grown_trial(number: int, held_out_rows: int | None = None) -> TrialRecord:
    """Train host ``number`` three times: alone, wider, and growing; audit what was accepted."""
    started = time.perf_counter()
    setup = Setup.of(number, gate_rows=held_out_rows)
    alone = audit_losses(setup.task, train_plainly(setup, setup.host()))
    wider = audit_losses(setup.task, train_plainly(setup, setup.host(WIDER)))
    events: list[AnyEvent] = []
    model = setup.host()
    grower = train_growing(setup, model, trial_config(number), events, audit=True)
    return trial_record(
        setup, "grown", events, grower.verdicts, headroom=found(Contrast.between(alone, wider)),
        alone=known(sum(alone) / len(alone)),
        effect=found(Contrast.between(alone, audit_losses(setup.task, model))), finite=is_finite(model),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def train_growing(
    setup: Setup,
    model: nn.Module,
    config: Config,
    events: list[AnyEvent],
    *,
    audit: bool,
    after_step: Callable[[Grower, int], None] | None = None,
) -> Grower:
    """The whole training of a host that grows; ``after_step`` may do things to it in between."""
    choose = setup.batches.clone_state()
    optimizer = setup.recipe.build(model)
    grower = Grower(
        model, optimizer, loss=setup.task.loss, evaluate=setup.task.gate, config=config, on_event=events.append,
        audit=setup.task.audit if audit else None,
    )  # fmt: skip
    for step in range(STEPS):
        obey()
        batch = setup.task.batch(choose)
        grower.step(take_step(setup, model, optimizer, batch, step), batch=batch)
        if after_step is not None:
            after_step(grower, step)
    grower.finish()
    return grower


def trial_record(
    setup: Setup, kind: str, events: list[AnyEvent], verdicts: Iterable[Verdict], *, headroom: Found, effect: Found,
    finite: bool, seconds: float, alone: float | None = None, nulls: frozenset[int] = frozenset(),
) -> TrialRecord:  # fmt: skip
    """What the events of a run say."""
    seeds = {seed for event in events if isinstance(event, Germinated) for seed in event.seeds}
    moves = [event for event in events if isinstance(event, Transitioned) and event.target in _ENDS]
    cut = {seed for move in moves if _is_cut(move) for seed in move.seeds}
    ended = {seed for move in moves if not _is_cut(move) for seed in move.seeds}
    return TrialRecord(
        number=setup.number, kind=kind, **setup.described(), headroom=headroom, alone=alone, effect=effect,
        seeds=len(seeds), seeds_ended=len(ended & seeds), seeds_cut=len(cut - ended), finite=finite,
        cohorts=tuple(_cohorts(events, verdicts, nulls)),
        rolled_back=sum(v.state is Lifecycle.ROLLED_BACK and not _was_cut(v.reason) for v in verdicts),
        seconds=round(seconds, 2),
    )  # fmt: skip


def _cohorts(
    events: list[AnyEvent], verdicts: Iterable[Verdict], nulls: frozenset[int]
) -> Iterable[CohortRecord]:  # fmt: skip
    ends = {verdict.cohort: verdict for verdict in verdicts}
    passed = {e.cohort for e in events if isinstance(e, Judged) and e.stage == "evaluate" and e.accepted}
    audits = {(e.cohort, e.source): e for e in events if isinstance(e, Audited)}
    for event in events:
        if not isinstance(event, Germinated):
            continue
        number = event.cohort
        end, on_off = ends.get(number), audits.get((number, "on_off"))
        yield CohortRecord(
            cohort=number,
            end=None if end is None else "CUT" if _was_cut(end.reason) else end.state.name,
            passed=number in passed,
            reason="" if end is None or end.state is Lifecycle.FOSSILIZED else end.reason,
            claimed=None if on_off is None else known(on_off.claimed / (on_off.loss + on_off.gain)),
            on_off=_audit(on_off),
            twin=_audit(audits.get((number, "twin"))),
            is_null=number in nulls,
        )


def _is_cut(move: Transitioned) -> bool:
    return _was_cut(move.reason)


def _was_cut(reason: str) -> bool:
    return reason.startswith("training ended")


def _audit(event: Audited | None) -> Found | None:
    if event is None:
        return None
    without = event.loss + event.gain
    return Found(
        gain=known(event.gain / without), low=known(event.gain_low / without), high=known(event.gain_high / without)
    )


def found(contrast: Contrast) -> Found:
    return Found(gain=known(contrast.gain), low=known(contrast.low), high=known(contrast.high))


def known(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return round(value, 6) if math.isfinite(value) else None


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in model.parameters())
