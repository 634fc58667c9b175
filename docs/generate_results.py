"""Write the measured tables into README.md, docs/decisions/0003 and 0014, and docs/results.md with its pictures, from
benchmarks/results/*.json.

Run from the repository root after a benchmark has written its result::

    python docs/generate_results.py

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; everything else in a page is left alone.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this script is also loaded by its path

import growth_bars
import growth_variants

from esper.observe.report import plot, svg

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"

ARMS = {
    "grown": "**grown**",
    "static_small": "small, no growth",
    "static_final": "final shape from the start",
    "static_equal_flops": "fixed shape, same FLOPs",
    "random_growth": "random growth, same schedule",
    "always": "grown, every cohort kept",
    "gromo_tiny": "gromo 0.1.0, TINY",
    "gromo_gradmax": "gromo 0.1.0, GradMax",
    "gromo_tiny_equal_flops": "gromo 0.1.0, TINY, same FLOPs",
    "gromo_gradmax_equal_flops": "gromo 0.1.0, GradMax, same FLOPs",
    "grown_short": "grown in fewer steps",
    "static_final_short": "final shape, 75% of the steps",
}
SCORES = {"digits": "accuracy", "vision": "accuracy", "code-lm": "score (minus nats a byte)"}
IN_README = ("digits", "code_lm")
TITLES = {"digits": "Handwritten digits, two-layer MLP", "code_lm": "Byte-level transformer on Python source"}
KINDS = {
    "redundant_linear": "a linear map on a linear layer",
    "constant": "a constant",
    "duplicate_units": "copies of hidden units",
    "duplicate_of_annex": "copies of grown units",
    "noise_features": "units that read irrelevant inputs only",
    "noise_targets": "tasks in which there is nothing to learn",
    "all_nulls": "**all of these**",
    "useful": "for comparison: branches that do help",
}


def pages() -> dict[Path, str]:
    """Every page that holds a table, as it should be."""
    readme, control = ROOT / "README.md", ROOT / "docs" / "decisions" / "0003-projected-control.md"
    trials = ROOT / "docs" / "decisions" / "0014-twins-withholding-audit.md"
    return {
        readme: _insert(readme.read_text(encoding="utf-8"), "results", _runs()),
        control: _insert(control.read_text(encoding="utf-8"), "nulls", _nulls()),
        trials: _insert(trials.read_text(encoding="utf-8"), "harm", _harm()),
        ROOT / "docs" / "results.md": _results_page(),
        **{PICTURES / f"results-{name}.svg": _picture(name, result) for name, result in _results().items()},
    }


def _insert(page: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def _results() -> dict[str, dict[str, Any]]:
    """Results that compare arms, by name: digits first."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem != "digits", path.stem))
    loaded = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {name: result for name, result in loaded.items() if "arms" in result}


def _runs() -> str:
    return "\n\n".join(_run(RESULTS / f"{name}.json", _results()[name]) for name in IN_README)


def _run(path: Path, result: dict[str, Any]) -> str:
    preset = result.get("preset", path.stem.replace("_", "-"))
    arms = result["arms"]
    place = path.relative_to(ROOT).as_posix()
    command = result.get("command", f"esper run {preset} --json {place}")
    num_seeds = len(arms["grown"]["score_per_seed"])
    lines = [
        f"`{command}`, {num_seeds} paired seeds, means and 95% intervals on the test split:",
        "",
        f"| {preset} | {SCORES.get(preset, 'score')} | loss | parameters | FLOPs | paired: grown minus this |",
        "|---|---|---|---|---|---|",
    ]
    reference = arms["grown"]["flops"]
    contrasts = result.get("grown_minus", {})
    for name, arm in arms.items():
        contrast = contrasts.get(name)
        cells = [
            ARMS.get(name, name),
            _with_interval(arm["score"], arm["score_interval"], ""),
            _with_interval(arm["loss"], arm["loss_interval"], ""),
            f"{arm['params']:,}",
            f"{arm['flops'] / reference:.0%}",
            _with_interval(contrast["score"], contrast["score_interval"], "+") if contrast else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    cohorts = result["cohorts"]
    counts = f"{cohorts['germinated']} cohorts germinated, {cohorts['accepted']} kept, {cohorts['culled']} rejected."
    return "\n".join([*lines, "", counts])


def _with_interval(mean: float, bounds: list[float | None], sign: str) -> str:
    low, high = bounds
    alone = f"{mean:{sign}.3f}"
    return alone if low is None or high is None else f"{alone} ({low:{sign}.3f} to {high:{sign}.3f})"


def _nulls() -> str:
    result = json.loads((RESULTS / "nulls.json").read_text(encoding="utf-8"))
    plain, projected = result["controls"]["plain"], result["controls"]["projected"]
    lines = [
        f"`{result['command']}`:",
        "",
        "| cohorts | judged | accepted, branch switched off | accepted, projected control |",
        "|---|---|---|---|",
    ]
    kinds = sorted(projected, key=lambda kind: list(KINDS).index(kind) if kind in KINDS else -1)
    for kind in kinds:
        judged, off, against = projected[kind]["judged"], plain[kind]["accepted"], projected[kind]["accepted"]
        lines.append(f"| {KINDS.get(kind, kind)} | {judged} | {off} | {against} |")
    bound = projected["all_nulls"]["accepted_rate_upper"]
    lines += ["", f"95% upper bound of the acceptance rate of nulls under the projected control: {bound:.1%}."]
    return "\n".join(lines)


def _harm() -> str:
    result = json.loads((RESULTS / "harm.json").read_text(encoding="utf-8"))
    lines = [
        f"`{result['command']}` ({result['runs']} runs, {result['judged']} cohorts judged):",
        "",
        "| audited by | task | kept cohorts | raise the loss by over 1% | worst gain | mean claimed | mean shrunken "
        "| mean found | slope, found on claimed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source, name in (("on_off", "on/off, when it became permanent"), ("twin", "twin, 90 steps after the graft")):
        for task, row in result[source].items():
            slope, low, high = row["slope"]
            where = "**all**" if task == "all" else task
            counts = f"{row['accepted']} | {row['harmful']} ({row['harmful_beyond_noise']} beyond noise)"
            means = " | ".join(f"{row[key]:+.1%}" for key in ("worst", "mean_claimed", "mean_shrunken", "mean_found"))
            lines.append(f"| {name} | {where} | {counts} | {means} | {slope:.2f} ({low:.2f} to {high:.2f}) |")
    bounds = [result[source]["all"]["harmful_rate_upper"] for source in ("on_off", "twin")]
    lines += [
        "",
        "Gains as shares of the audit loss without the cohort. One-sided 95% bounds of the rate of harmful cohorts "
        f"(Clopper-Pearson): {bounds[0]:.1%} on/off, {bounds[1]:.1%} against twins.",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# docs/results.md

INTRO = """# Does growing pay?

This page is written by `docs/generate_results.py` from the files in [benchmarks/results](../benchmarks/results);
losses are on it as well as wins. The protocol (`benchmarks/training/protocol`): arms are paired by seed (same data,
same order, same number of steps); every arm has its own grid of learning rates, chosen on the first seed and held-out
loss and extended by a factor of 1.5 until the best is bracketed; all FLOPs count (fits, evidence, rejected cohorts);
the test split is opened once, for the chosen rates. Intervals are 95% Student intervals over seeds; differences are
paired.

- **grown**: starts small, decides by itself what to add and what to keep.
- **grown, every cohort kept**: the same without the judgement.
- **small** never grows; **final shape** has the grown network's final widths of the same seed from the start;
  **same FLOPs** has the widths that cost what growth cost.
- **random growth** repeats the grown network's schedule with units of random inputs and zero outputs.
- **gromo** grows to the same widths by TINY or GradMax (on MLPs; `src/esper/runs/peers/gromo.py` says how), or as far
  as makes the whole training cost what growing did (**same FLOPs**).
- **grown in fewer steps** grows anew in as many steps as cost at most 75% of the final shape's training (found by
  trying, up to three trainings, by their cost alone); beside it the **final shape, 75% of the steps**. Both ask whether
  the final shape's quality is to be had for less.
"""


SIZING = """One growing run against a sweep over five widths (1 to 16 times the starting one), both with the same grid
of learning rates on the first seed; the sweep takes the width with the lowest held-out loss. The search costs are those
of that seed, every training of either search counted; scores are on the test split, over all seeds, paired."""


def _sizings(results: list[dict[str, Any]]) -> str:
    lines = [
        "| task | chosen by the sweep | parameters: grown, sweep | score: grown, sweep | grown minus sweep "
        "| trainings: grown, sweep | FLOPs of the search: grown / sweep |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        found = result["sizing"]
        params, score, search = found["params"], found["score"], found["search"]
        contrast = found["grown_minus_sweep"]
        cells = [
            result["title"],
            f"{found['chosen'].removeprefix('static_x')} times the width",
            f"{params['grown']:,}, {params['sweep']:,}",
            f"{score['grown']:.3f}, {score['sweep']:.3f}",
            _with_interval(contrast["score"], contrast["score_interval"], "+"),
            f"{search['grown']['trainings']}, {search['sweep']['trainings']}",
            f"{found['search_flops_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"`{result['command']}`  " for result in results)])


def _results_page() -> str:
    results = _results()
    parts = [INTRO, "## Bars", "", growth_bars.table(results, RESULTS), "", "## In short", "", _overview(results)]
    for name, result in results.items():
        parts += ["", f"## {_title(name, result)}", "", _section(name, result)]
    sizings = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("sizing_*.json"))]
    if sizings:
        parts += ["", "## Finding the right size", "", SIZING, "", _sizings(sizings)]
    for heading, content in growth_variants.sections(RESULTS):
        parts += ["", f"## {heading}", "", content]
    return "\n".join(parts) + "\n"


def _title(name: str, result: dict[str, Any]) -> str:
    title = result.get("title") or TITLES[name]
    return f"{title}, every arm" if name == "code_lm_arms" else title


def _score_name(name: str, result: dict[str, Any]) -> str:
    return result.get("score_name") or SCORES[name.replace("_", "-")]


def _overview(results: dict[str, dict[str, Any]]) -> str:
    """Grown minus each arm, a row a task."""
    arms = [arm for arm in ARMS if arm != "grown"]
    lines = [
        "Score of the grown network minus that of each arm, **bold** where the interval excludes zero, and the FLOPs",
        "of its training as a multiple of that arm's.",
        "",
        f"| task (score) | {' | '.join(ARMS[arm] for arm in arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    for name, result in results.items():
        cells = [_difference(result.get("grown_minus", {}).get(arm)) for arm in arms]
        lines.append(f"| {_title(name, result)} ({_score_name(name, result)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(contrast: dict[str, Any] | None) -> str:
    if contrast is None:
        return ""
    if contrast["score"] is None:
        return "diverged"
    low, high = contrast["score_interval"]
    text = f"{contrast['score']:+.3f}"
    settled = low is not None and (low > 0 or high < 0)
    return f"{f'**{text}**' if settled else text} at {contrast['flops_ratio']:.2g}x"


def _section(name: str, result: dict[str, Any]) -> str:
    arms, reference = result["arms"], result["arms"]["grown"]["flops"]
    command = result.get("command", f"esper run {name.replace('_', '-')} --json benchmarks/results/{name}.json")
    lines = [
        f"![{_title(name, result)}: {_score_name(name, result)} against FLOPs](pictures/results-{name}.svg)",
        "",
        f"| arm | {_score_name(name, result)} | loss | parameters | FLOPs | learning rate | grown minus this |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm_name, arm in arms.items():
        contrast = result["grown_minus"].get(arm_name)
        cells = [
            ARMS.get(arm_name) or arm["title"],
            _measured(arm["score"], arm["score_interval"], ""),
            _measured(arm["loss"], arm["loss_interval"], ""),
            f"{arm['params']:,}",
            f"{arm['flops'] / reference:.0%}",
            f"{arm['lr']:g}",
            _measured(contrast["score"], contrast["score_interval"], "+") if contrast else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    cohorts, num_seeds = result["cohorts"], len(arms["grown"]["score_per_seed"])
    counts = f"{cohorts['germinated']} cohorts germinated, {cohorts['accepted']} kept, {cohorts['culled']} rejected"
    lines += ["", f"{num_seeds} paired seeds, {counts}. `{command}`{_spent(result)}"]
    return "\n".join(lines)


def _spent(result: dict[str, Any]) -> str:
    if "cost" not in result:
        return ""
    cost, places = result["cost"], {place["device"] for place in result["environments"]}
    spent = f"{cost['trainings']} trainings, learning-rate trials among them: {cost['flops']:.3g} FLOPs"
    return f"\n\n{spent}, {cost['seconds'] / 60:.0f} minutes ({', '.join(sorted(places))})."


def _measured(mean: float | None, bounds: list[float | None], sign: str) -> str:
    return "diverged" if mean is None else _with_interval(mean, bounds, sign)


STYLE = """
    text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
    .page { fill: #fbfbfa; } .grid { stroke: #e4e7eb; } .axis { stroke: #8c959f; } .bar { stroke: #57606a; }
    .ln { fill: none; stroke-width: 1; } .bar.ln { stroke-width: 1.5; } .dot { fill: #ffffff; stroke: #57606a; }
    .grown .dot { fill: #d4f0db; stroke: #1a7f37; } .grown .bar { stroke: #1a7f37; } .num { font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .page { fill: #15191f; } .grid { stroke: #2a323c; } .axis, .bar { stroke: #8b949e; }
      .dot { fill: #1d232b; stroke: #8b949e; } .grown .dot { fill: #12391f; stroke: #3fb950; }
      .grown .bar { stroke: #3fb950; }
    }
  """
LEGEND = 260


def _picture(name: str, result: dict[str, Any]) -> str:
    """Score against FLOPs with intervals; what lies far below the rest stands at the bottom, with its value."""
    drawn = {arm: value for arm, value in result["arms"].items() if value["score"] is not None}
    wide = [value for arm, value in drawn.items() if arm != "static_small"] or list(drawn.values())
    bounds = [bound for arm in wide for bound in (arm["score"], *arm["score_interval"]) if bound is not None]
    flops = [arm["flops"] for arm in drawn.values()]
    frame = plot.Frame(plot.robust_range(flops, include=[0.0]), plot.robust_range(bounds), width=490, left=64)
    title = f"{_title(name, result)}: {_score_name(name, result)} against FLOPs"
    places = {arm: (frame.x(value["flops"]), frame.y.clamped(value["score"])) for arm, value in drawn.items()}
    labels = _labels(places)
    numbers = {arm: number for number, arm in enumerate(result["arms"], 1)}
    marks = [_mark(frame, places[arm], labels[arm], numbers[arm], arm, value) for arm, value in drawn.items()]
    keys = [
        svg.text(frame.width + 12, 44 + 22 * number, f"{number}  {_key(arm, value, frame)}")
        for number, (arm, value) in enumerate(result["arms"].items(), 1)
    ]
    width, height = frame.width + LEGEND, max(frame.height, 44 + 22 * len(result["arms"]) + 24)
    return "".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" ',
        f'role="img" aria-labelledby="t">\n  <title id="t">{html.escape(title)}</title>\n  <style>{STYLE}</style>\n  ',
        svg.rect(0, 0, width, height, "page"),
        frame.axes("FLOPs of a training, everything counted", _score_name(name, result)),
        *reversed(marks),  # the grown arm, which comes first, is drawn last
        *keys,
        "</svg>\n",
    ])  # fmt: skip


def _key(arm: str, value: dict[str, Any], frame: plot.Frame) -> str:
    label = (ARMS.get(arm) or value["title"]).strip("*")
    if value["score"] is None:
        return f"{label} (diverged)"
    low, high = frame.y_range
    return label if low <= value["score"] <= high else f"{label} ({value['score']:.3f})"


def _labels(places: dict[str, svg.Point]) -> dict[str, svg.Point]:
    """Where each mark's number stands: beside it, clear of marks and of other numbers."""
    taken = list(places.values())
    labels: dict[str, svg.Point] = {}
    for arm, (x, y) in places.items():
        around = [(x + side * reach, y + lift) for reach in (11, 22, 33) for lift in (0, -13, 13) for side in (1, -1)]
        clear = [spot for spot in around if all(abs(spot[0] - a) > 8 or abs(spot[1] - b) > 10 for a, b in taken)]
        labels[arm] = clear[0] if clear else around[0]
        taken.append(labels[arm])
    return labels


def _mark(frame: plot.Frame, place: svg.Point, label: svg.Point, number: int, arm: str, value: dict[str, Any]) -> str:
    x, y = place
    low, high = value["score_interval"]
    shown = low is not None and frame.y_range[0] <= value["score"] <= frame.y_range[1]
    bar = svg.line(x, frame.y.clamped(low), x, frame.y.clamped(high), "bar") if shown else ""
    dot = svg.element("circle", cx=float(x), cy=float(y), r=4, class_="dot")
    text = svg.text(label[0], label[1] + 4, number, "num", "middle")
    return svg.element("g", bar + dot + text, class_=arm.replace("_", "-"))


if __name__ == "__main__":
    for target, text in pages().items():
        target.write_text(text, encoding="utf-8")
