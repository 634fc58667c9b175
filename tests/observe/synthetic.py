"""A realistic stream of events, made without training anything.

Run as a script it writes a run directory with its report::

    python tests/observe/synthetic.py DIRECTORY [--unfinished]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from esper import protocol as p
from esper.protocol import Lifecycle as S

ARMS = ("grown", "static_small", "static_final", "static_equal_flops", "random_growth")
SITES = tuple(f"layers.{i}-{i + 2}" for i in range(0, 12, 2))
HOST_PARAMS = 20_200
TOTAL_STEPS = 2400
FATES = ("kept", "rejected", "kept", "unfit", "rolled_back", "kept", "faded")
_END = {"kept": S.FOSSILIZED, "rejected": S.CULLED, "faded": S.CULLED, "rolled_back": S.ROLLED_BACK, "unfit": S.CULLED}


@dataclass
class _Arm:
    """State of one synthetic training run."""

    arm: str
    seed: int
    rng: np.random.Generator
    params: int = HOST_PARAMS
    flops: float = 0.0
    gain: float = 0.0
    units: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SITES, 0))

    born: dict[int, p.Germinated] = field(default_factory=dict)

    def tag(self, step: int) -> dict[str, object]:
        return {"step": step, "arm": self.arm, "seed": self.seed}

    def loss(self, step: int) -> float:
        floor = {"static_final": 0.352, "static_equal_flops": 0.372}.get(self.arm, 0.392)
        return floor + 1.9 * math.exp(-step / 160) - self.gain + 0.004 * self.seed + self.rng.normal(0, 0.0022)


def events(*, seeds: int = 3, finish: bool = True, arms: tuple[str, ...] = ARMS) -> Iterator[p.AnyEvent]:
    """The whole run, in order. With ``finish=False`` it breaks off in the middle of the first grown seed."""
    yield p.RunStarted(
        step=0,
        run="digits-01",
        preset="digits",
        config={"seed": 0, "budget": {"params": 30_000, "flops_share": None}, "tamiyo": {"temper": "balanced"}},
        environment={"python": "3.12.3", "torch": "2.11.0", "device": "cpu (2 cores)"},
    )
    for arm in arms:
        for seed in range(seeds):
            state = _Arm(arm, seed, np.random.default_rng([ARMS.index(arm), seed]))
            for event in _arm(state):
                yield event
                if not finish and event.step >= 1500:
                    return
    yield p.RunFinished(step=TOTAL_STEPS, summary={"stopped_because": "gain per cost below threshold"})


def _arm(run: _Arm) -> Iterator[p.AnyEvent]:
    grows = run.arm in ("grown", "random_growth")
    if run.arm == "static_final":
        run.params = 24_000
    if grows:
        yield _attached(run)
    cohorts: dict[int, list[p.AnyEvent]] = {}
    if grows:
        for number, fate in enumerate(FATES):
            for event in _cohort(run, number, fate, 120 + number * 220):
                cohorts.setdefault(event.step, []).append(event)
    for step in range(0, TOTAL_STEPS + 1, 10):
        run.flops += 10 * 6.0 * run.params * 64
        for event in cohorts.get(step, []):
            yield event
            _take_in(run, event)
        yield p.TrainLoss(**run.tag(step), loss=run.loss(step) * 0.94 + run.rng.normal(0, 0.03), flops=run.flops)
        if step % 40 == 0:
            yield p.HeldOut(**run.tag(step), loss=run.loss(step), params=run.params, flops=run.flops)
        if grows and step % 40 == 0:
            yield _telemetry(run, step)
            yield _overhead(run, step)
    if grows:
        yield p.Stopped(**run.tag(1900), reason="gain per cost below threshold (0.011 < 0.02) for 2 cohorts in a row")
        yield p.Refused(
            **run.tag(1910), command="germinate", gate="budget",
            reason="parameters must stay under 30000, got 31200; raise budget.params",
        )  # fmt: skip
        yield p.Refused(
            **run.tag(1920), command="germinate", gate="embargo",
            reason="layers.0-2 rests until step 1980; wait or choose another site",
        )  # fmt: skip
        yield p.Warned(**run.tag(1930), message="grower.step was called 2 times for one optimizer step; call it once")
    yield _finished(run)


def _attached(run: _Arm) -> p.Attached:
    sites = tuple(
        p.SiteInfo(
            name=name, kind=p.SiteKind.LINEAR_SPAN, in_features=64, out_features=64,
            hidden_features=24, num_chunks=8, weights=3100,
        )
        for name in SITES
    )  # fmt: skip
    return p.Attached(
        **run.tag(0), sites=sites, skipped=(p.Skipped(name="head", reason="tied to embed"),),
        host_params=HOST_PARAMS, covered_params=18_600, total_steps=TOTAL_STEPS,
    )  # fmt: skip


def _cohort(run: _Arm, number: int, fate: str, start: int) -> Iterator[p.AnyEvent]:
    step, width = start, int(run.rng.choice([8, 16, 24]))
    sites = (SITES[number % 3],) if number % 2 == 0 else (SITES[number % 6], SITES[(number + 2) % 6])
    seeds = tuple(number * 10 + i for i in range(len(sites)))
    added = width * 129 * len(sites) // 2

    def move(at: int, source: S, target: S, alpha: float, reason: str) -> p.Transitioned:
        return p.Transitioned(
            **run.tag(at), cohort=number, seeds=seeds, source=source, target=target, alpha=alpha, reason=reason
        )

    n = len(sites)
    yield p.Germinated(
        **run.tag(step), cohort=number, seeds=seeds, sites=sites, blueprints=("bottleneck",) * n,
        starts=("negative_gradient",) * n, widths=(width,) * n, added_params=added, reason="strongest gradient energy",
    )  # fmt: skip
    yield move(step := step + 10, S.GERMINATED, S.TRAINING, 0.0, "capture full (8 batches)")
    for seed_id, site in zip(seeds, sites, strict=True):
        fitted = fate != "unfit"
        yield p.Fitted(
            **run.tag(step), cohort=number, seed_id=seed_id, site=site, start="negative_gradient",
            explained=float(run.rng.uniform(0.1, 0.4)) if fitted else 0.01, t_statistic=6.1 if fitted else 0.4,
            scale=0.1, flops=2.1e9,
        )  # fmt: skip
    if fate == "unfit":
        yield move(step + 10, S.TRAINING, S.CULLED, 0.0, "fit predicts no gain on other batches (t = 0.4 < 2.0)")
        return
    yield move(step := step + 10, S.TRAINING, S.GRAFTING, 0.0, "fit predicts a gain (t = 6.1)")
    ramp = 5 + number
    for i in range(1, ramp + 1):
        held = i in (3, 4) and number % 2 == 0
        yield p.AlphaMoved(
            **run.tag(step := step + 10), cohort=number, alpha=(2.5 if held else i) / ramp,
            held_by="drift 0.061 above 0.05" if held else None,
        )  # fmt: skip
        if fate == "rolled_back" and i == 4:
            yield move(step, S.GRAFTING, S.ROLLED_BACK, 0.0, "guard: loss 8.1 is 6.2 deviations above its trend")
            return
    yield move(step := step + 10, S.GRAFTING, S.STABILIZATION, 1.0, "alpha at its target")
    yield move(step := step + 20, S.STABILIZATION, S.EVALUATING, 1.0, "slope and variance in band")
    gain = {"kept": 0.017 - 0.0014 * number, "faded": 0.006}.get(fate, 0.0004) + run.rng.normal(0, 0.0007)
    step += 10
    accepted = fate != "rejected"
    yield _judged(run, step, number, sites, "evaluate", gain, accepted, added)
    if not accepted:
        yield move(step, S.EVALUATING, S.CULLED, 1.0, "gain not above zero (p = .41)")
        return
    yield move(step, S.EVALUATING, S.FINE_TUNING, 1.0, "gain above zero")
    step += 40
    kept = fate == "kept"
    yield _judged(run, step, number, sites, "hold", gain * (0.95 if kept else 0.1), kept, added)
    found = gain * 1.1
    ends = {"credit_low": found - 0.003, "credit_high": found + 0.003}
    yield p.TwinScored(
        **run.tag(step), cohort=number, sites=sites, num_steps=100, credit=found, **ends, loss=0.4, num_batches=8,
        flops=3e9, reason="100 steps after the graft",
    )  # fmt: skip
    if kept:
        yield p.Audited(
            **run.tag(TOTAL_STEPS), cohort=number, sites=sites, source="twin", claimed=gain,
            claimed_shrunken=gain * 0.82, gain=found, gain_low=found - 0.001, gain_high=found + 0.001, loss=0.4,
            num_batches=40, flops=1e9,
        )  # fmt: skip
    reason = "gain held, worth its cost" if kept else "gain faded below its cost"
    yield move(step, S.FINE_TUNING, _END[fate], 1.0, reason)


def _judged(
    run: _Arm, step: int, number: int, sites: tuple[str, ...], stage: str, gain: float, accepted: bool, added: int
) -> p.Judged:
    half = float(run.rng.uniform(0.003, 0.0055))
    return p.Judged(
        **run.tag(step), cohort=number, stage=stage, sites=sites, gain=gain, gain_low=gain - half,
        gain_high=gain + half, gain_shrunken=gain * 0.82, e_value=48.0 if accepted else 0.7, e_threshold=20.0,
        confirm_p=0.004 if accepted else math.nan, num_batches=24, accepted=accepted, added_params=added,
        added_flops_share=added / HOST_PARAMS, flops=run.flops,
        reason="gain above zero" if accepted else "gain not above zero (p = .41)",
    )  # fmt: skip


def _take_in(run: _Arm, event: p.AnyEvent) -> None:
    """What growth does to size and loss."""
    if isinstance(event, p.Germinated):
        run.born[event.cohort] = event
    elif isinstance(event, p.Transitioned) and event.target is S.GRAFTING:
        run.params += 1100
    elif isinstance(event, p.Transitioned) and event.target in (S.CULLED, S.ROLLED_BACK):
        run.params = max(HOST_PARAMS, run.params - (1100 if event.source is not S.TRAINING else 0))
    elif isinstance(event, p.Transitioned) and event.target is S.FOSSILIZED:
        run.gain += 0.011 if run.arm == "grown" else 0.006
        for site, width in zip(run.born[event.cohort].sites, run.born[event.cohort].widths, strict=True):
            run.units[site] += width


def _telemetry(run: _Arm, step: int) -> p.Telemetry:
    decay = math.exp(-step / 1500)
    energy = tuple(
        math.nan if i == 5 and step > 1600 else decay * (0.9**i) * float(run.rng.uniform(0.8, 1.2)) / (1 + units / 24)
        for i, units in enumerate(run.units.values())
    )
    n = len(SITES)
    return p.Telemetry(
        **run.tag(step), sites=SITES, activation_mean=(0.1,) * n, activation_var=(1.0,) * n, gradient_energy=energy,
        grown=tuple(run.units.values()),
    )  # fmt: skip


def _overhead(run: _Arm, step: int) -> p.Overhead:
    noise = run.rng.uniform(0.8, 1.2, 4)
    parts = {"telemetry": 4.0, "capture": 1.5, "fit": 22.0 if step % 200 == 120 else 0.0, "evidence": 9.0}
    values = {key: float(value * factor) for (key, value), factor in zip(parts.items(), noise, strict=True)}
    return p.Overhead(**run.tag(step), num_steps=40, milliseconds=values)


def _finished(run: _Arm) -> p.ArmFinished:
    loss = run.loss(TOTAL_STEPS) + 0.004
    return p.ArmFinished(
        **run.tag(TOTAL_STEPS), score=0.985 - 0.12 * (loss - 0.3), score_name="accuracy", loss=loss,
        params=run.params, flops=run.flops * (1.31 if run.arm == "static_final" else 1.0), seconds=14.0 + run.seed,
        lr=1e-3, widths={name: 24 + units for name, units in run.units.items()},
    )  # fmt: skip


def records(*, start: float = 1_750_000_000.0, **kwargs: object) -> Iterator[p.Record]:
    """:func:`events` as they would be read from a log."""
    for seq, event in enumerate(events(**kwargs)):  # type: ignore[arg-type]
        yield p.Record(v=p.SCHEMA_VERSION, seq=seq, time=start + seq * 0.05, event=event)


def main() -> None:
    from esper.observe.event_log import EventLog
    from esper.observe.report import write_report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--unfinished", action="store_true")
    arguments = parser.parse_args()
    with EventLog(arguments.directory / "events.jsonl") as log:
        for event in events(finish=not arguments.unfinished):
            log.append(event)
    write_report(arguments.directory)


if __name__ == "__main__":
    main()
