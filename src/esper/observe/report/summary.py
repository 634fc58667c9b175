"""What the page says in words and numbers: headline, tiles, table of arms, notes."""

from __future__ import annotations

import math

from esper.observe.history import RunHistory, SeedRun
from esper.observe.quantities import decimal, duration, magnitude, percent
from esper.observe.report import svg
from esper.observe.report.plot import Scale
from esper.observe.report.svg import element, escape
from esper.observe.scores import ArmScore, Interval, arm_scores, mean_interval
from esper.protocol import Lifecycle

_MAX_NOTES = 20


def headline(history: RunHistory) -> str:
    """The run's result in a sentence."""
    if not history.num_events:
        return _paragraph("The log is empty: the run has not written its first event yet.")
    scores = arm_scores(history)
    main = next((score for score in scores if score.arm == history.main_arm), None)
    if main is None:
        runs = _main_runs(history)
        step = max((run.last_step for run in runs), default=0)
        planned = next((run.attached.total_steps for run in runs if run.attached), None)
        share = f" of {planned}" if planned else ""
        return _paragraph(f"At step <b>{step}{share}</b>. Scores on the test split come when an arm has finished.")
    text = f"<b>{escape(main.score_name)} {_plus_minus(main.score)}</b> on the test split"
    others = [
        f"{score.advantage.mean:+.3f} against <b>{escape(score.label)}</b>"
        for score in scores
        if score.advantage is not None and score.advantage.num
    ]
    return _paragraph(text + (f"; {', '.join(others)}" if others else "") + ".")


def tiles(history: RunHistory) -> str:
    """Five numbers a user looks for first."""
    runs = _main_runs(history)
    if not runs:
        return ""
    firsts = [run.first_held_out.loss for run in runs if run.first_held_out]
    lasts = [run.last_held_out.loss for run in runs if run.last_held_out]
    sizes = [float(run.last_held_out.params) for run in runs if run.last_held_out]
    growths = [run.last_held_out.params / run.host_params - 1 for run in runs if run.last_held_out and run.host_params]
    counts = {state: sum(run.count(state) for run in runs) for state in Lifecycle}
    ended = sum(counts[s] for s in (Lifecycle.CULLED, Lifecycle.ROLLED_BACK, Lifecycle.CANCELLED))
    alive = sum(cohort.is_alive for run in runs for cohort in run.cohorts.values())
    steps = sum(run.overhead_steps for run in runs)
    overhead = sum(run.overhead_ms for run in runs) / steps if steps else math.nan
    unknown = "not yet"
    reasons = list(dict.fromkeys(run.stopped.reason for run in runs if run.stopped))
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "this seed"
    last = mean_interval(lasts).mean
    size = mean_interval(sizes).mean
    return element("div", "".join([
        _tile("held-out loss", decimal(last) if lasts else unknown,
              f"from {decimal(mean_interval(firsts).mean)}; {seeds}" if firsts else ""),
        _tile("parameters", magnitude(size) if sizes else unknown,
              f"{percent(mean_interval(growths).mean, sign=True)} on the host" if growths else ""),
        _tile("candidates kept", str(counts[Lifecycle.FOSSILIZED]),
              f"{ended} taken out, {alive} in progress"),
        _tile("growth", "stopped" if reasons else "open",
              _cut(reasons[0], 110) if reasons else "no stop reason yet"),
        _tile("overhead", f"{decimal(overhead, 2)} ms" if steps else unknown, "a step, on average" if steps else ""),
    ]), class_="tiles")  # fmt: skip


def result_table(history: RunHistory) -> str:
    """Arms side by side: mean, 95% interval over seeds, and the difference paired by seed."""
    scores = arm_scores(history)
    if not scores:
        return element("p", "No arm has finished yet: its scores on the test split will stand here.", class_="empty")
    values = [value for score in scores for value in score.per_seed.values() if math.isfinite(value)]
    bounds = [value for score in scores for value in (score.score.low, score.score.high) if math.isfinite(value)]
    low, high = min([*values, *bounds], default=0.0), max([*values, *bounds], default=1.0)
    name = escape(scores[0].score_name)
    head = (
        f"<tr><th>arm</th><th class=num>{name}</th><th class=dots>seeds and interval</th>"
        "<th class=num>grown minus this</th>"
        "<th class=num>loss</th><th class=num>parameters</th><th class=num>FLOPs</th><th class=num>time</th></tr>"
    )
    rows = "".join(_row(score, low, high) for score in scores)
    running = [arm for arm, seeds in history.arms.items() if not any(run.finished for run in seeds.values())]
    rest = f"Not finished: {', '.join(running)}." if running else ""
    return f'<div class="table"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>' + (
        element("p", escape(rest), class_="quiet") if rest else ""
    )


def notes(history: RunHistory) -> str:
    """Warnings, what could not grow, and where the run took place."""
    runs = _main_runs(history)
    warned = list(dict.fromkeys(event.message for run in history.seed_runs for event in run.warnings))
    parts = [element("p", escape(message), class_="warning") for message in warned[:_MAX_NOTES]]
    if len(warned) > _MAX_NOTES:
        parts.append(element("p", f"and {len(warned) - _MAX_NOTES} more warnings in the event log", class_="quiet"))
    heading = "<h2>Warnings</h2>" if warned else ""
    taken_back = [event for run in history.seed_runs for event in (*run.restores, *run.incidents)]
    if taken_back:
        parts.insert(0, _incidents(history))
        heading = "<h2>Incidents and warnings</h2>"
    skipped = list(dict.fromkeys((item.name, item.reason) for run in runs for item in run.skipped))
    attached = next((run.attached for run in runs if run.attached), None)
    if attached is not None:
        share = attached.covered_params / attached.host_params if attached.host_params else math.nan
        facts = {
            "sites": f"{len(attached.sites)}, covering {percent(share)} of {magnitude(attached.host_params)} weights"
        }
        if attached.notes:
            facts["chosen by free memory"] = "; ".join(attached.notes)
        facts |= {f"skipped {name}": reason for name, reason in skipped[:_MAX_NOTES]}
        if len(skipped) > _MAX_NOTES:
            facts["skipped too"] = f"{len(skipped) - _MAX_NOTES} more"
        parts.append(_facts("Sites", facts))
    parts.append(_facts("Environment", history.environment)) if history.environment else None
    parts.append(_facts("Configuration", _flat(history.config))) if history.config else None
    return heading + "".join(parts)


def _main_runs(history: RunHistory) -> list[SeedRun]:
    main = history.main_arm
    return list(history.arms[main].values()) if main is not None else []


def _paragraph(markup: str) -> str:
    return element("p", markup, class_="headline")


def _tile(name: str, value: str, detail: str) -> str:
    lines = (("name", name), ("value", value), ("detail", detail))
    return element("div", "".join(element("div", escape(text), class_=key) for key, text in lines), class_="tile")


def _plus_minus(interval: Interval, digits: int = 3) -> str:
    half = f" \u00b1 {decimal(interval.half_width, digits)}" if interval.has_bounds else ""
    return f"{decimal(interval.mean, digits)}{half}"


def _row(score: ArmScore, low: float, high: float) -> str:
    advantage = ""
    if score.advantage is not None and score.advantage.num:
        pair = score.advantage
        bounds = f'<div class="sub">[{pair.low:+.4f}, {pair.high:+.4f}]</div>' if pair.has_bounds else ""
        advantage = f"{pair.mean:+.4f}{bounds}"
    seeds = f"{score.score.num} seed{'s' if score.score.num != 1 else ''}"
    cells = [
        f'<td class="text">{escape(score.label)}<div class="sub">{seeds}</div></td>',
        f"<td class=num>{_plus_minus(score.score, 4)}</td>",
        f"<td class=dots>{_strip(score, low, high)}</td>",
        f"<td class=num>{advantage}</td>",
        f"<td class=num>{_plus_minus(score.loss)}</td>",
        *(f"<td class=num>{magnitude(item.mean)}</td>" for item in (score.params, score.flops)),
        f"<td class=num>{duration(score.seconds.mean)}</td>",
    ]
    is_main = score.advantage is None
    return element("tr", "".join(cells), class_="main" if is_main else None, data_arm=score.arm)


def _strip(score: ArmScore, low: float, high: float) -> str:
    """Every seed's score as a dot over the interval."""
    scale = Scale(low, high, 8.0, 132.0)
    parts = [svg.line(8, 9, 132, 9, "grid")]
    if score.score.has_bounds:
        parts.append(svg.line(scale(score.score.low), 9, scale(score.score.high), 9, "grown interval"))
    for seed, value in score.per_seed.items():
        if math.isfinite(value):
            parts.append(
                svg.mark("ring", scale(value), 9, "shrunken", size=3.0, tip=f"seed {seed}: {decimal(value, 4)}")
            )
    return element("svg", "".join(parts), viewBox="0 0 140 18", class_="strip", role="img", aria_label="scores by seed")


def _facts(title: str, facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<details><summary>{escape(title)}</summary><dl>{rows}</dl></details>"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}\u2026"


def _flat(config: dict[str, object], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            out |= _flat(value, f"{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            out[name] = svg.shorten(str(value), 200)
    return out


def _incidents(history: RunHistory) -> str:
    """What the guard has seen and done, oldest first."""
    told: list[str] = []
    for run in history.seed_runs:
        tag = "" if run.arm == "grown" and run.seed == 0 else f"[{run.arm} {run.seed}] "
        for event in run.incidents:
            whose = "the training's own" if event.cohort is None else f"cohort {event.cohort}"
            told.append(f"{tag}step {event.step}, {whose}, {event.action}: {event.reason}")
        told += [f"{tag}step {event.step}, cohort {event.cohort}: {event.reason}" for event in run.restores]
    shown = "".join(element("li", escape(text)) for text in told[:_MAX_NOTES])
    more = element("li", f"and {len(told) - _MAX_NOTES} more in the event log") if len(told) > _MAX_NOTES else ""
    return element("ul", shown + more, class_="incidents")
