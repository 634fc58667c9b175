"""The wording of progress lines."""

from __future__ import annotations

import math

from esper.observe.history import Cohort, RunHistory, SeedRun
from esper.observe.quantities import decimal, magnitude, percent, signed, site_list
from esper.observe.scores import ArmScore, arm_scores
from esper.protocol import Judged, Lifecycle, Transitioned

_REMOVED = (Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK)


def heartbeat_line(run: SeedRun) -> str:
    """``step 400  held-out 0.412 | 21.4k params (+6%) | 1 grafting | 0 rejected``."""
    last = run.last_held_out
    parts = [f"held-out {decimal(last.loss)}" if last else "held-out not measured yet"]
    if last is not None:
        growth = f" ({percent(last.params / run.host_params - 1, sign=True)})" if run.host_params else ""
        parts.append(f"{magnitude(last.params)} params{growth}")
    alive = [cohort.state for cohort in run.cohorts.values() if cohort.is_alive]
    parts += [f"{alive.count(state)} {state.name.lower().replace('_', '-')}" for state in dict.fromkeys(alive)]
    if run.cohorts:
        parts.append(f"{len(run.kept)} kept")
        parts.append(f"{run.count(Lifecycle.CULLED)} rejected")
    return f"step {run.last_step:<5} {' | '.join(parts)}"


def decision_line(cohort: Cohort, event: Transitioned, word: str) -> str:
    """``step 640  KEPT     layers.1-3 bottleneck x64: -0.031 +/-0.006 for 4.1k params``.

    The number is the change in held-out loss: negative is better.
    """
    head = f"step {event.step:<5} {word:<8} {_what(cohort, event, with_shape=event.target not in _REMOVED)}"
    verdict = cohort.verdict
    if event.target is Lifecycle.FOSSILIZED:
        change = f"{_change(verdict)} for " if verdict is not None else ""
        return f"{head}: {change}{magnitude(cohort.added_params)} params"
    reason = verdict.reason if verdict is not None and not verdict.accepted else event.reason
    return f"{head}: {reason}; removed"


def done_line(history: RunHistory) -> str:
    """``done  0.398 -> 0.355, params +19%; stopped: gain per cost below threshold``, means over seeds."""
    main = history.main_arm
    runs = list(history.arms.get(main, {}).values()) if main is not None else []
    word = "done" if history.is_finished else "so far"
    measured = [(run.first_held_out, run.last_held_out) for run in runs]
    pairs = [(first.loss, last.loss) for first, last in measured if first is not None and last is not None]
    if not pairs:
        return f"{word:<10} nothing measured yet"
    text = (
        f"{word:<10} {decimal(_mean([first for first, _ in pairs]))} -> {decimal(_mean([last for _, last in pairs]))}"
    )
    growths = [run.last_held_out.params / run.host_params - 1 for run in runs if run.last_held_out and run.host_params]
    if growths:
        text += f", params {percent(_mean(growths), sign=True)}"
    reasons = list(dict.fromkeys(run.stopped.reason for run in runs if run.stopped))
    return text + (f"; stopped: {reasons[0]}" if reasons else "")


def controls_line(history: RunHistory) -> str:
    """Every other arm's test score beside the main one's, with its FLOPs when they differ."""
    scores = arm_scores(history)
    main = next((score for score in scores if score.arm == history.main_arm), None)
    if main is None or len(scores) < 2:
        return ""
    shown = [f"{score.label} {decimal(score.score.mean)}{_flops(score, main)}" for score in scores if score is not main]
    return f"           {main.score_name}: {main.label} {decimal(main.score.mean)} | {' | '.join(shown)}"


def _flops(score: ArmScore, main: ArmScore) -> str:
    share = score.flops.mean / main.flops.mean if main.flops.mean else math.nan
    return f" at {percent(share)} of the FLOPs" if math.isfinite(share) and abs(share - 1) >= 0.02 else ""


def _what(cohort: Cohort, event: Transitioned, *, with_shape: bool) -> str:
    """Where, and what it was. Only the seeds that changed state, if that is not the whole cohort."""
    born = cohort.germinated
    if born is None:
        return site_list(cohort.sites) if cohort.sites else f"cohort {cohort.cohort}"
    rows = [
        (site, f"{blueprint} x{width}")
        for seed, site, blueprint, width in zip(born.seeds, born.sites, born.blueprints, born.widths, strict=False)
        if seed in event.seeds or not event.seeds
    ]
    sites = site_list([site for site, _ in rows] or list(born.sites))
    shapes = ", ".join(dict.fromkeys(shape for _, shape in rows))
    return f"{sites} {shapes}" if with_shape and shapes else sites


def _change(verdict: Judged) -> str:
    if not math.isfinite(verdict.gain):
        return "not judged"
    half = (verdict.gain_high - verdict.gain_low) / 2
    bounds = f" +/-{decimal(half)}" if math.isfinite(half) else ""
    return f"{signed(-verdict.gain)}{bounds}"


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
