"""What many trials show together: rates with one-sided 95% bounds, and the bars they are held to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esper.evidence.rates import Rate
from esper.runs.trials.archive import header
from esper.runs.trials.records import AnyRecord, CohortRecord, FaultRecord, Found, TrialRecord

HARM = 0.01
"""Relative rise of the audit loss above which what was added counts as harmful."""
HEADROOM = 0.02
"""Relative gain of the wider host from which there is headroom, if its interval agrees."""

Relation = Literal["at least", "at most", "above"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a rate must be. ``met``: its bound says so; ``open``: the rate does, with too few trials; ``missed``."""

    name: str
    rate: Rate
    relation: Relation
    need: float

    @property
    def verdict(self) -> str:
        if not self.rate.trials:
            return "open"
        if not self._holds(self.rate.share):
            return "missed"
        bound = self.rate.high if self.relation == "at most" else self.rate.low
        is_extreme = self.need in (0.0, 1.0)  # no number of trials proves that something never happens
        return "met" if is_extreme or self._holds(bound) else "open"

    def _holds(self, value: float) -> bool:
        if self.relation == "at most":
            return value <= self.need
        return value >= self.need if self.relation == "at least" else value > self.need

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "need": f"{self.relation} {self.need:.1%}", "verdict": self.verdict} | plain(
            self.rate
        )


def summarise(kind: str, records: Sequence[AnyRecord]) -> dict[str, Any]:
    """A pure function of the records (and of the versions that made them)."""
    trials = [record for record in records if isinstance(record, TrialRecord)]
    faults = [record for record in records if isinstance(record, FaultRecord)]
    if kind == "faults":
        parts, bars = _faults(faults)
    elif kind == "null":
        parts, bars = _nulls(trials)
    elif kind == "grown":
        parts, bars = _grown(trials)
    else:
        parts, bars = _peer(trials)
    versions = header()
    return {
        "kind": kind,
        "trials": len(records),
        "versions": {"esper": versions.esper, "torch": versions.torch, "device": versions.device},
        "seconds": round(sum(record.seconds for record in records), 1),
        **parts,
        "bars": [bar.plain() for bar in bars],
        "missed": [bar.name for bar in bars if bar.verdict == "missed"],
    }


def plain(rate: Rate) -> dict[str, Any]:
    """A rate for JSON; without trials its share is unknown."""
    share = round(rate.share, 5) if rate.trials else None
    return {
        "events": rate.events, "trials": rate.trials, "share": share, "low": round(rate.low, 5),
        "high": round(rate.high, 5),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Growing hosts


def _grown(trials: Sequence[TrialRecord]) -> tuple[dict[str, Any], list[Bar]]:
    cohorts = [cohort for trial in trials for cohort in trial.cohorts]
    kept = [cohort for cohort in cohorts if cohort.end == "FOSSILIZED"]
    roomy = [trial for trial in trials if has_headroom(trial)]
    seeds = sum(trial.seeds for trial in trials)
    improves, harms = Rate(_better(kept, on_off), len(kept)), Rate(_harmful(kept, on_off), len(kept))
    with_room = Rate(sum(any(c.end == "FOSSILIZED" for c in trial.cohorts) for trial in roomy), len(roomy))
    ended = Rate(sum(trial.seeds_ended for trial in trials), seeds)
    rolled = Rate(sum(trial.rolled_back for trial in trials), len(cohorts))
    finite = Rate(sum(trial.finite for trial in trials), len(trials))
    rates = {
        "cohorts that passed the evidence gate": Rate(sum(c.passed for c in cohorts), len(cohorts)),
        "cohorts that became permanent": Rate(len(kept), len(cohorts)),
        "permanent cohorts that improve the audit loss, on against off": improves,
        "permanent cohorts harmful beyond 1%, on against off": harms,
        **_twin_rates(kept),
        "hosts with headroom that kept a cohort": with_room,
        "germinated seeds that reached an end state by themselves": ended,
        "germinated seeds taken out by the end of training": Rate(sum(t.seeds_cut for t in trials), seeds),
        "cohorts rolled back by the guard": rolled,
        "trainings with finite weights at the end": finite,
        **_final_rates(trials),
    }
    bars = [
        Bar(name="permanent cohorts that improve the audit loss", rate=improves, relation="above", need=0.95),
        Bar(name="permanent cohorts harmful beyond 1%", rate=harms, relation="at most", need=0.0),
        Bar(name="hosts with headroom that kept a cohort", rate=with_room, relation="at least", need=1.0),
        Bar(name="seeds that reached an end state", rate=ended, relation="above", need=0.90),
        Bar(name="cohorts rolled back without a fault", rate=rolled, relation="at most", need=0.001),
        Bar(name="finite weights", rate=finite, relation="at least", need=1.0),
    ]
    return {
        "rates": {name: plain(rate) for name, rate in rates.items()},
        "gains": {"on_off": _spread(kept, on_off), "twin": _spread(kept, twin)},
        "by_task": _by(trials, lambda trial: trial.task, _task_counts),
        "by_held_out_rows": _by_rows(roomy),
        "on_mlps": _on_mlps(trials),
        "harmful": _worst(trials),
    }, bars


def has_headroom(trial: TrialRecord) -> bool:
    """Whether a plain host of several times the width is better by more than noise."""
    gain, low = trial.headroom.gain, trial.headroom.low
    return gain is not None and low is not None and gain > HEADROOM and low > 0


def on_off(cohort: CohortRecord) -> Found | None:
    return cohort.on_off


def twin(cohort: CohortRecord) -> Found | None:
    return cohort.twin


Read = Callable[[CohortRecord], Found | None]


def _better(cohorts: Iterable[CohortRecord], read: Read) -> int:
    return sum((found := read(c)) is not None and found.gain is not None and found.gain > 0 for c in cohorts)


def _harmful(cohorts: Iterable[CohortRecord], read: Read) -> int:
    """An unknown gain counts as harm."""
    return sum((found := read(c)) is None or found.gain is None or found.gain < -HARM for c in cohorts)


def _surely_harmful(cohorts: Iterable[CohortRecord], read: Read) -> int:
    return sum(
        (found := read(c)) is not None and found.gain is not None and found.high is not None
        and found.gain < -HARM and found.high < 0
        for c in cohorts
    )  # fmt: skip


def _twin_rates(kept: Sequence[CohortRecord]) -> dict[str, Rate]:
    scored = [cohort for cohort in kept if cohort.twin is not None]
    return {
        "permanent cohorts that improve the audit loss against their twin": Rate(_better(scored, twin), len(scored)),
        "permanent cohorts harmful beyond 1% against their twin": Rate(_harmful(scored, twin), len(scored)),
        "the same, beyond the noise of the audit": Rate(_surely_harmful(scored, twin), len(scored)),
    }


def _final_rates(trials: Sequence[TrialRecord]) -> dict[str, Rate]:
    """The whole training against the same host alone; only where something was kept can it differ."""
    grew = [t for t in trials if any(c.end in ("FOSSILIZED", "KEPT") for c in t.cohorts) and t.effect.gain is not None]
    roomy = [trial for trial in grew if has_headroom(trial)]
    better = sum((trial.effect.gain or 0.0) > 0 for trial in grew)
    return {
        "grown hosts better at the end than the same host alone": Rate(better, len(grew)),
        "grown hosts worse by over 1% at the end, beyond the noise of the audit": Rate(
            sum(map(_is_worse, grew)), len(grew)
        ),
        "the same, of hosts with headroom": Rate(sum(map(_is_worse, roomy)), len(roomy)),
    }


def _on_mlps(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """The hosts that peers can grow too, with what is comparable."""
    some = [trial for trial in trials if trial.family == "mlp"]
    kept = [cohort for trial in some for cohort in trial.cohorts if cohort.end == "FOSSILIZED"]
    rates = {**_twin_rates(kept), **_final_rates(some)}
    return {
        "trials": len(some), "kept": len(kept), "rates": {name: plain(rate) for name, rate in rates.items()},
        "gains": {"on_off": _spread(kept, on_off), "twin": _spread(kept, twin)},
    }  # fmt: skip


def _is_worse(trial: TrialRecord) -> bool:
    gain, high = trial.effect.gain, trial.effect.high
    return gain is not None and high is not None and gain < -HARM and high < 0


def _spread(cohorts: Sequence[CohortRecord], read: Read) -> dict[str, Any]:
    gains = [found.gain for c in cohorts if (found := read(c)) is not None and found.gain is not None]
    if not gains:
        return {"num": 0}
    return {
        "num": len(gains), "mean": round(statistics.fmean(gains), 5), "median": round(statistics.median(gains), 5),
        "least": round(min(gains), 5), "most": round(max(gains), 5),
    }  # fmt: skip


def _worst(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Every cohort that raised the audit loss by more than 1%, by either reading."""
    return [
        {
            "trial": trial.number, "task": trial.task, "optimizer": trial.optimizer, "lr": trial.lr,
            "cohort": cohort.cohort, "reading": name, "gain": found.gain, "high": found.high,
        }
        for trial in trials
        for cohort in trial.cohorts
        for name, found in (("on_off", cohort.on_off), ("twin", cohort.twin))
        if cohort.end in ("FOSSILIZED", "KEPT") and found is not None and not (found.gain or -1.0) >= -HARM
    ]  # fmt: skip


def _by_rows(roomy: Sequence[TrialRecord]) -> dict[str, Any]:
    """Hosts with headroom that kept a cohort, by how many rows each held-out batch has."""
    ordered = sorted(roomy, key=lambda trial: trial.gate_rows)
    return _by(
        ordered, lambda trial: str(trial.gate_rows),
        lambda some: plain(Rate(sum(any(c.end == "FOSSILIZED" for c in t.cohorts) for t in some), len(some))),
    )  # fmt: skip


def _task_counts(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    cohorts = [cohort for trial in trials for cohort in trial.cohorts]
    kept = [cohort for cohort in cohorts if cohort.end in ("FOSSILIZED", "KEPT")]
    roomy = [trial for trial in trials if has_headroom(trial)]
    effects = [trial.effect.gain for trial in trials if trial.effect.gain is not None]
    return {
        "trials": len(trials), "cohorts": len(cohorts), "kept": len(kept),
        "improve": _better(kept, on_off), "harmful": _harmful(kept, on_off),
        "harmful_by_twin": _surely_harmful(kept, twin), "headroom": len(roomy),
        "headroom_kept": sum(any(c.end == "FOSSILIZED" for c in trial.cohorts) for trial in roomy),
        "median_effect": round(statistics.median(effects), 5) if effects else None,
    }  # fmt: skip


def _by(
    trials: Sequence[TrialRecord],
    key: Callable[[TrialRecord], str],
    count: Callable[[Sequence[TrialRecord]], dict[str, Any]],
) -> dict[str, Any]:
    names = dict.fromkeys(key(trial) for trial in trials)
    return {name: count([trial for trial in trials if key(trial) == name]) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# Null cohorts, peers, faults


def _nulls(trials: Sequence[TrialRecord]) -> tuple[dict[str, Any], list[Bar]]:
    accepted = _null_rate(trials)
    return {
        "rates": {"null cohorts that became permanent": plain(accepted)},
        "by_kind": _by(trials, lambda trial: trial.kind, lambda some: plain(_null_rate(some))),
    }, [Bar(name="null cohorts accepted", rate=accepted, relation="at most", need=0.01)]


def _null_rate(trials: Sequence[TrialRecord]) -> Rate:
    """Of the null cohorts that a gate has decided on."""
    cohorts = [c for trial in trials for c in trial.cohorts if c.is_null and c.end in ("FOSSILIZED", "CULLED")]
    return Rate(sum(cohort.end == "FOSSILIZED" for cohort in cohorts), len(cohorts))


def _peer(trials: Sequence[TrialRecord]) -> tuple[dict[str, Any], list[Bar]]:
    kept = [cohort for trial in trials for cohort in trial.cohorts]
    rates = {
        "growths that improve the audit loss, just after against just before": Rate(_better(kept, on_off), len(kept)),
        "growths harmful beyond 1%, just after against just before": Rate(_harmful(kept, on_off), len(kept)),
        "growths that improve the audit loss against their twin": Rate(_better(kept, twin), len(kept)),
        "growths harmful beyond 1% against their twin": Rate(_harmful(kept, twin), len(kept)),
        "the same, beyond the noise of the audit": Rate(_surely_harmful(kept, twin), len(kept)),
        "trainings with finite weights at the end": Rate(sum(trial.finite for trial in trials), len(trials)),
        **_final_rates(trials),
    }
    return {
        "rates": {name: plain(rate) for name, rate in rates.items()},
        "gains": {"on_off": _spread(kept, on_off), "twin": _spread(kept, twin)},
        "by_task": _by(trials, lambda trial: trial.task, _task_counts),
    }, []  # a peer is reported, not judged


def _faults(records: Sequence[FaultRecord]) -> tuple[dict[str, Any], list[Bar]]:
    struck = [record for record in records if record.struck]
    held = Rate(sum(record.held for record in struck), len(struck))
    restorable = [record for record in struck if record.expects == "restored"]
    restored = Rate(sum(record.held for record in restorable), len(restorable))
    by_fault: dict[str, Any] = {}
    for name in dict.fromkeys(record.kind for record in records):
        some = [record for record in struck if record.kind == name]
        details = sorted({record.detail for record in some if not record.held}, key=len)
        by_fault[name] = {
            "expects": some[0].expects if some else None, "struck": len(some),
            "never_struck": sum(record.kind == name for record in records) - len(some),
            "held": sum(record.held for record in some), "first_problem": details[0] if details else None,
        }  # fmt: skip
    return {
        "rates": {"faults after which all held that must": plain(held), "restorations": plain(restored)},
        "by_fault": by_fault,
    }, [
        Bar(name="what must hold after a fault holds", rate=held, relation="at least", need=1.0),
        Bar(name="restored after a fault", rate=restored, relation="at least", need=1.0),
    ]
